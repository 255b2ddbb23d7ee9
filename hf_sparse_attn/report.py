"""Report: what each patched layer did, as a table, a dictionary or one number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from hf_sparse_attn.tables import Table, escape, html, table


class Pairs(NamedTuple):
    """Pairs of query and key over batch rows and heads: those which were computed, out of all visible ones."""

    computed: float = 0.0
    visible: int = 0


_NONE = Pairs()
# The heading of the column of reasons.
_WHY = "dense because"
_DECODING = "decoding, not by the model's own attention"


@dataclass(frozen=True)
class Decoding:
    """What one attention layer did where text was generated, by one way of choosing keys.

    Args:
        calls: of fewer queries than Policy.min_queries.
        density: computed share of the visible pairs of query and key.
        pages: pages of the cache that were read, over calls, batch rows and lists; 0 where it is not read by pages.
        gain: predicted seconds of reading all keys on the same path over those of the calls, mean, or None.
        backends: kernel runs by backend.
        visible: pairs of query and key, over batch rows and heads, of which `density` is a share.
    """

    calls: int
    density: float
    pages: int
    gain: float | None
    backends: dict[str, int]
    visible: int = 0


@dataclass(frozen=True)
class LayerReport:
    """What one attention layer did.

    Args:
        layer: index of the layer.
        name: its name in the model.
        sparse_calls: calls that ran sparse.
        dense_calls: calls that ran dense.
        backends: kernel runs by backend.
        requested_density: the density asked for, where the method takes one.
        density: computed share of the visible pairs of query and key in the sparse calls, or None.
        predicted_gain: dense over sparse seconds of attention as predicted, mean over the sparse calls, or None.
        measured_gain: dense over sparse seconds of the calls that were measured (Patch.measure), pattern building
            counted; None where none was.
        reasons: dense calls by reason.
        exact_calls: calls that computed all there is to compute, in fewer runs than the model alone would take.
        segments: the separate runs of tokens (frames, windows) in them, each of which would be a run of its own.
        partly_dense: sparse calls in which some heads were dense, by reason; and decoding calls that read all keys
            where a method was to choose some of them.
        prefill, decode: pairs of all calls but the exact ones, decoding (fewer queries than Policy.min_queries) apart.
        decoding: decoding calls that did not run the model's own attention, by the method that chose the keys
            ("exact": all); counted nowhere else but in `decode`.
    """

    layer: int
    name: str
    sparse_calls: int
    dense_calls: int
    backends: dict[str, int]
    requested_density: float | None
    density: float | None
    predicted_gain: float | None
    measured_gain: float | None
    reasons: dict[str, int]
    exact_calls: int = 0
    segments: int = 0
    partly_dense: dict[str, int] = field(default_factory=dict)
    prefill: Pairs = _NONE
    decode: Pairs = _NONE
    decoding: dict[str, Decoding] = field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What a patch did so far; `str()` is a table, with the notes under it.

    Args:
        method, params: the method in force and its parameters.
        family: of the model.
        layers: what each layer did.
        notes: what is to be known besides: settings without effect, what was guessed.
        model_gain: dense over sparse seconds of the whole model (Patch.measure_model), or None.
        decode: what attends where text is generated: "dense", "exact", or a method with its parameters; "" in a model
            that generates none.
    """

    method: str
    params: dict[str, Any]
    family: str
    layers: list[LayerReport] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    model_gain: float | None = None
    decode: str = ""

    @property
    def density(self) -> float:
        """Computed share of the visible pairs of query and key, over all calls but the exact ones; 1.0 before any.

        Calls count by their work: one that reads a long text weighs more than one that adds a word to it.
        """
        found = _share([pairs for r in self.layers for pairs in (r.prefill, r.decode)])
        return 1.0 if found is None else found

    @property
    def prefill_density(self) -> float | None:
        """`density` of the calls that are no decoding, or None where there were none."""
        return _share([r.prefill for r in self.layers])

    @property
    def decode_density(self) -> float | None:
        """`density` of the calls that are decoding, or None where there were none."""
        return _share([r.decode for r in self.layers])

    @property
    def decoding(self) -> dict[str, Decoding]:
        """Decoding calls that did not run the model's own attention, of all layers, by the method that chose the keys.

        Densities count by pairs, gains by calls.
        """
        kinds = dict.fromkeys(kind for r in self.layers for kind in r.decoding)
        return {kind: _sum([r.decoding[kind] for r in self.layers if kind in r.decoding]) for kind in kinds}

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = (str, int, float, bool, type(None), tuple, list, dict)
        # A parameter may be an object (trained gates), which only its name stands for.
        params = {k: v if isinstance(v, plain) else repr(v) for k, v in self.params.items()}
        names = ("density", "prefill_density", "decode_density")
        decoding = {kind: asdict(found) for kind, found in self.decoding.items()}
        plain_values = {**asdict(replace(self, params=params)), "decoding": decoding}
        return {**plain_values, **{name: getattr(self, name) for name in names}}

    def __str__(self) -> str:
        notes = (f"note: {text}" for text in self.notes)
        parts = [table(*self._table(), self._title(), width=140)]
        if self.decoding:
            parts += ["", table(*self._decoding_table(), _DECODING, width=140)]
        return "\n".join([*parts, *notes])

    def _repr_html_(self) -> str:
        """The same in a notebook."""
        notes = "".join(f"<li>{escape(text)}</li>" for text in self.notes)
        columns, rows = self._table()
        decoding = ""
        if self.decoding:
            decoding = f"<p>{escape(_DECODING)}</p>{html(*self._decoding_table(), range(1, 6), inline=True)}"
        return (
            f"<p><b>{escape(self._title())}</b></p>{html(columns, rows, range(1, columns.index(_WHY)), inline=True)}"
            f"{decoding}{notes and f'<p>Notes:</p><ul>{notes}</ul>'}"
        )

    def _title(self) -> str:
        params = ", ".join(f"{k}={v}" for k, v in self.params.items())
        title = f"{self.method}({params}) on {self.family}: density {self.density:.3f}"
        if self.prefill_density is not None and self.decode_density is not None:
            title += f" (prefill {self.prefill_density:.3f}, decoding {self.decode_density:.3f})"
        if self.decode and self.decode_density is not None:
            title += f", decode={self.decode}"
        if self.model_gain is not None:
            title += f", whole model {self.model_gain:.2f}x"
        return title

    def _decoding_table(self) -> Table:
        """Columns and rows: a way of choosing keys each."""
        rows = []
        for kind, found in self.decoding.items():
            layers = sum(kind in r.decoding for r in self.layers)
            pages = f"{found.pages / found.calls:.1f}" if found.pages else "-"
            gain = "-" if found.gain is None else f"{found.gain:.2f}x"
            backends = ", ".join(found.backends)
            rows.append((kind, str(layers), str(found.calls), f"{found.density:.3f}", pages, gain, backends))
        return ["keys by", "layers", "calls", "density", "pages a call", "predicted", "backend"], rows

    def _table(self) -> Table:
        """Columns and rows: a layer each."""
        # Two experts have layers of the same index each: their names then tell them apart.
        twice = len({r.layer for r in self.layers}) < len(self.layers)
        exact = any(r.exact_calls for r in self.layers)
        rows = []
        for r in self.layers:
            rows.append(
                (
                    r.name if twice else str(r.layer),
                    str(r.sparse_calls),
                    str(r.dense_calls),
                    ", ".join(r.backends) or "-",
                    "-" if r.requested_density is None else f"{r.requested_density:.3f}",
                    "-" if r.density is None else f"{r.density:.3f}",
                    "-" if r.predicted_gain is None else f"{r.predicted_gain:.2f}x",
                    "-" if r.measured_gain is None else f"{r.measured_gain:.2f}x",
                    "; ".join(f"{n}x {reason}" for reason, n in (*r.reasons.items(), *r.partly_dense.items())) or "-",
                    *([f"{r.exact_calls} ({r.segments} segments)" if r.exact_calls else "-"] if exact else []),
                )
            )
        columns = ["layer", "sparse", "dense", "backend", "requested", "density", "predicted", "measured"]
        return [*columns, _WHY, *(["exact"] if exact else [])], rows


def _sum(parts: Sequence[Decoding]) -> Decoding:
    """The decoding of several layers as one."""
    calls, visible = sum(p.calls for p in parts), sum(p.visible for p in parts)
    told = [(p.gain, p.calls) for p in parts if p.gain is not None]
    backends: Counter[str] = Counter()
    for part in parts:
        backends.update(part.backends)
    return Decoding(
        calls,
        sum(p.density * p.visible for p in parts) / visible if visible else 1.0,
        sum(p.pages for p in parts),
        sum(gain * n for gain, n in told) / sum(n for _, n in told) if told else None,
        dict(backends),
        visible,
    )


def _share(pairs: Iterable[Pairs]) -> float | None:
    """Computed share of the visible pairs, or None where there are none."""
    pairs = list(pairs)
    visible = sum(p.visible for p in pairs)
    return sum(p.computed for p in pairs) / visible if visible else None
