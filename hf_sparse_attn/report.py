"""Report: what each patched layer did, as a table, a dictionary or one number."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from hf_sparse_attn.tables import table


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
        density: mean density of the sparse calls (of the causal half where causal), or None.
        predicted_gain: dense over sparse seconds of attention as predicted, mean over the sparse calls, or None.
        measured_gain: dense over sparse seconds of the calls that were measured (Patch.measure), pattern building
            counted; None where none was.
        reasons: dense calls by reason.
        exact_calls: calls that computed all there is to compute, in fewer runs than the model alone would take.
        segments: the separate runs of tokens (frames, windows) in them, each of which would be a run of its own.
        partly_dense: sparse calls in which some heads were dense, by reason.
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


@dataclass(frozen=True)
class Report:
    """What a patch did so far; `str()` is a table, with the notes under it.

    Args:
        method, params: the method in force and its parameters.
        family: of the model.
        layers: what each layer did.
        notes: what is to be known besides: settings without effect, what was guessed.
    """

    method: str
    params: dict[str, Any]
    family: str
    layers: list[LayerReport] = field(default_factory=list)
    notes: tuple[str, ...] = ()

    @property
    def density(self) -> float:
        """Mean density over all calls but the exact ones, a dense call counting 1; 1.0 before the first call."""
        calls = sum(r.sparse_calls + r.dense_calls for r in self.layers)
        if not calls:
            return 1.0
        return sum((r.density or 0.0) * r.sparse_calls + r.dense_calls for r in self.layers) / calls

    def to_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        plain = (str, int, float, bool, type(None), tuple, list, dict)
        # A parameter may be an object (trained gates), which only its name stands for.
        params = {k: v if isinstance(v, plain) else repr(v) for k, v in self.params.items()}
        return {**asdict(replace(self, params=params)), "density": self.density}

    def __str__(self) -> str:
        params = ", ".join(f"{k}={v}" for k, v in self.params.items())
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
        columns += ["dense because", *(["exact"] if exact else [])]
        title = f"{self.method}({params}) on {self.family}: mean density {self.density:.3f}"
        return "\n".join([table(columns, rows, title, width=140), *(f"note: {text}" for text in self.notes)])
