"""Patch: what was replaced in a model and how to put it back; Session: what its layers share while they run."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.dispatch import Policy, run_pattern
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern import BlockPattern
from hf_sparse_attn.report import LayerReport, Report

log = logging.getLogger(__name__)

# Where a patched module keeps its Patch; absent from modules that are not patched.
PATCH_ATTRIBUTE = "_hf_sparse_attn_patch"
_ABSENT = object()


class DenseFallback(RuntimeError):
    """Raised with strict=True where sparse attention had to be given up."""


@dataclass
class LayerRecord:
    """What one attention layer did so far."""

    name: str
    index: int
    sparse_calls: int = 0
    dense_reasons: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    density_sum: float = 0.0

    def count_sparse(self, densities: Sequence[float]) -> None:
        """Counts one sparse call, whose density is the mean over its sequences."""
        self.sparse_calls += 1
        self.density_sum += sum(densities) / len(densities)

    def report(self, requested: float | None) -> LayerReport:
        """The record as it stands."""
        return LayerReport(
            layer=self.index,
            name=self.name,
            sparse_calls=self.sparse_calls,
            dense_calls=sum(self.dense_reasons.values()),
            backends=dict(self.backends),
            requested_density=requested,
            density=self.density_sum / self.sparse_calls if self.sparse_calls else None,
            reasons=dict(self.dense_reasons),
        )


@dataclass(frozen=True)
class Span:
    """Batch rows whose valid tokens stand at the same places: one sequence without padding or neighbours.

    Args:
        rows: indices into the batch.
        q: (start, end) among the queries.
        k: (start, end) among the keys; ends where the queries end.
    """

    rows: tuple[int, ...]
    q: tuple[int, int]
    k: tuple[int, int]

    @property
    def row_index(self) -> slice | list[int]:
        """The rows as an index; a slice where they follow one another, which copies nothing."""
        first, last = self.rows[0], self.rows[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else list(self.rows)

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of the span alone."""
        rows = self.row_index
        return q[rows, :, slice(*self.q)], k[rows, :, slice(*self.k)], v[rows, :, slice(*self.k)]


class Session:
    """What the layers of one patch share: the method, the policy, the backend and the records."""

    def __init__(self, method: Method, policy: Policy, backend: str, strict: bool) -> None:
        self.method = method
        self.policy = policy
        self.backend = backend
        self.strict = strict
        self.records: dict[str, LayerRecord] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # A copied model goes on with the same counts; copying a session would split them silently.
        return self

    def record(self, name: str, index: int) -> LayerRecord:
        """The record of the layer called `name`, made at first use."""
        return self.records.setdefault(name, LayerRecord(name, index))

    def give_up(self, record: LayerRecord, reason: str) -> None:
        """Counts a dense call that was not asked for.

        Raises:
            DenseFallback: with strict=True.
        """
        if self.strict:
            raise DenseFallback(f"layer {record.name}: {reason} (strict=True)")
        record.dense_reasons[reason] += 1

    def sparse(
        self,
        record: LayerRecord,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        spans: Sequence[Span] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Sparse attention of one call, or None where the host must run its own dense attention; counted either way.

        Args:
            record: the layer's record.
            q: [batch, heads, q_len, dim].
            k, v: [batch, kv_heads, kv_len, dim].
            ctx: where the call is; its layout is that of a whole row.
            spans: the valid sequences in the batch; None means that every row is one. Places outside get output 0.

        Returns:
            output [batch, heads, q_len, value dim] and log-sum-exp [batch, heads, q_len], or None.
        """
        dense = "method dense" if self.method.name == "dense" else self.policy.why_dense(ctx, q.device)
        if dense is not None:
            record.dense_reasons[dense] += 1
            return None
        if not spans or (len(spans) == 1 and _is_whole(spans[0], q, k)):
            done = self._attend(record, q, k, v, ctx)
            if done is None:
                return None
            record.count_sparse([done.density])
            return done.out, done.lse
        return self._attend_spans(record, q, k, v, ctx, spans)

    def _attend_spans(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spans: Sequence[Span]
    ) -> tuple[Tensor, Tensor] | None:
        """Each sequence of the batch by itself; None where none of them is sparse."""
        contexts = [replace(ctx, layout=_span_layout(ctx.layout, s)) for s in spans]
        results: list[_Done | None] = []
        for span, own in zip(spans, contexts, strict=True):
            short = self.policy.why_dense(own, q.device)
            if short is not None:
                record.dense_reasons[short] += 1
            results.append(None if short else self._attend(record, *span.cut(q, k, v), own))
        if not any(results):
            return None
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        for span, own, done in zip(spans, contexts, results, strict=True):
            if done is None:
                layout = own.layout
                pattern = BlockPattern.dense(layout.q_len, layout.kv_len, layout.is_causal, device=q.device)
                one, two, _ = run_pattern(*span.cut(q, k, v), pattern, own.softmax_scale)
            else:
                one, two = done.out, done.lse
            rows = span.row_index
            out[rows, :, slice(*span.q)], lse[rows, :, slice(*span.q)] = one, two.to(lse.dtype)
        record.count_sparse([done.density for done in results if done is not None])
        return out, lse

    def _attend(self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> _Done | None:
        """The method on one sequence or a batch of equal ones; None where it is dense, with the reason counted."""
        densities: list[float] = []

        def run(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
            reason = self.policy.why_not_worth(pattern, ctx)
            if reason is not None:
                raise _NotWorth(reason)
            out, lse, name = run_pattern(q, k, v, pattern, ctx.softmax_scale, self.backend)
            record.backends[name] += 1
            densities.append(pattern.density(ctx.layout.density_count))
            return out, lse

        try:
            done = self.method.attention(q, k, v, ctx, run)
        except _NotWorth as not_worth:
            record.dense_reasons[str(not_worth)] += 1
            return None
        if isinstance(done, Decline):
            self.give_up(record, done.reason)
            return None
        # Several passes of one method read disjoint keys, so that their densities add up.
        return _Done(*done, sum(densities))


class _Done(NamedTuple):
    """What one sequence gave: output, log-sum-exp and density."""

    out: Tensor
    lse: Tensor
    density: float


class _NotWorth(Exception):
    """Leaves Method.attention when the policy keeps the call dense."""


def _is_whole(span: Span, q: Tensor, k: Tensor) -> bool:
    return len(span.rows) == q.shape[0] and span.q == (0, q.shape[2]) and span.k == (0, k.shape[2])


def _span_layout(layout: TokenLayout, span: Span) -> TokenLayout:
    """The layout of one sequence in a batch of text; only text can be padded or packed at this point."""
    n = span.k[1] - span.k[0]
    whole = TokenLayout.causal(n) if layout.is_causal else TokenLayout.bidirectional(n)
    return whole.continued(n - (span.q[1] - span.q[0]))


class Patch:
    """A reversible change of a model, made by `patch()`; `remove()` or the end of `with` leaves it as it was."""

    def __init__(self, family: str, session: Session, modules: Sequence[nn.Module], model: object) -> None:
        self.family = family
        self.session = session
        self.modules = list(modules)
        # Weak, for the modules hold the patch: a transformer kept alone must not keep its pipeline alive.
        self._model = ref(model)
        self._undo = ExitStack()
        self._removed = False
        for module in self.modules:
            self.set_attribute(module, PATCH_ATTRIBUTE, self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Patch:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("a patched model must not be pickled: unpatch() it first, or save its state_dict()")

    @property
    def model(self) -> Any:
        """What `patch()` was given, the pipeline or model; None when it is gone."""
        return self._model()

    @property
    def method(self) -> Method:
        """The method in force."""
        return self.session.method

    def on_remove(self, call: Callable[..., object], *args: Any) -> None:
        """Registers what puts something back; called in reverse order."""
        self._undo.callback(call, *args)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an instance attribute; `remove()` restores the value or the absence it had."""
        before = owner.__dict__.get(name, _ABSENT)

        def restore() -> None:
            if before is _ABSENT:
                owner.__dict__.pop(name, None)
            else:
                owner.__dict__[name] = before

        self.on_remove(restore)
        owner.__dict__[name] = value

    def report(self) -> Report:
        """What every patched layer did so far."""
        session = self.session
        requested = session.method.params().get("density")
        layers = [r.report(requested) for r in sorted(session.records.values(), key=lambda r: (r.index, r.name))]
        return Report(session.method.name, session.method.params(), self.family, layers)

    def remove(self) -> None:
        """Puts back everything that was replaced. A second call does nothing."""
        if not self._removed:
            self._removed = True
            self._undo.close()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.session.records)} layers"
        return f"Patch({self.session.method!r} on {self.family}, {state})"


def active_patch(module: object) -> Patch | None:
    """The patch on a module, or None."""
    found = getattr(module, "__dict__", {}).get(PATCH_ATTRIBUTE)
    # A deep copy of a patched module carries the attribute over, but is not what the patch changed.
    return found if isinstance(found, Patch) and any(own is module for own in found.modules) else None
