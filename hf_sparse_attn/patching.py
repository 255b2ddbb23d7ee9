"""Patch: what was replaced in a model and how to put it back; Session: what its layers share while they run."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import no_autocast
from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.cost.judge import PAUSED, Judge, Loss
from hf_sparse_attn.cost.timing import compare
from hf_sparse_attn.dispatch import dense_attention, run_pattern
from hf_sparse_attn.method import Decline, Method, PartlyDense
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import KEPT_SHAPES, Done
from hf_sparse_attn.record import LayerRecord as LayerRecord
from hf_sparse_attn.report import Report
from hf_sparse_attn.span import Span

log = logging.getLogger(__name__)

# Where a patched module keeps its Patch; absent from modules that are not patched.
PATCH_ATTRIBUTE = "_hf_sparse_attn_patch"
_ABSENT = object()


class DenseFallback(RuntimeError):
    """Raised with strict=True where sparse attention had to be given up."""


# Shown q, k, v, place and output of every sparse sequence, with gradients; again when checkpointing computes it again.
Watcher = Callable[[Tensor, Tensor, Tensor, Context, Tensor], object]

# All that are alive, by number: what a compiled graph can name.
SESSIONS: WeakValueDictionary[int, Session] = WeakValueDictionary()
_NUMBERS = itertools.count()


class Session:
    """What the layers of one patch share: the method, the policy, the backend and the records."""

    def __init__(self, method: Method, policy: Policy, backend: str, strict: bool) -> None:
        self.method = method
        self.policy = policy
        self.backend = backend
        self.strict = strict
        # Fields of LayerInputs that the hooks fill in.
        self.reads = method.reads
        self.judge = Judge(method, backend)
        self.in_training: Callable[[], bool] = bool
        self.watcher: Watcher | None = None
        self.pauses = self._steady = 0
        self.records: dict[str, LayerRecord] = {}
        self.number = next(_NUMBERS)
        SESSIONS[self.number] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        # A copied model goes on with the same counts; copying a session would split them silently.
        return self

    def steady(self, *inputs: Tensor) -> bool:
        """Whether a call must decide as the same call did before and will again: in training, for recomputation.

        What earlier calls taught is then left aside; prediction by the table is not.
        """
        if self._steady > 0 or self.in_training():
            return True
        return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)

    @contextmanager
    def steadily(self, training: bool) -> Iterator[None]:
        """Within it, with `training`, calls are steady whatever the state of torch."""
        self._steady += training
        try:
            yield
        finally:
            self._steady -= training

    def as_before(self, record: LayerRecord) -> bool:
        """Whether a call runs as in the unpatched model, to the bit: by method "dense", or in a pause, not counted."""
        if self.method.name == "dense" and not self.pauses:
            record.dense_reasons["method dense"] += 1
        return self.method.name == "dense" or self.pauses > 0

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

    def why_dense(
        self, record: LayerRecord, q: Tensor, ctx: Context, steady: bool = False
    ) -> tuple[str | Loss, str] | None:
        """Why a call is dense whatever its content, noted in the record for calls of this shape; or None.

        For hosts without steps, whose layout is known by the shape of `q` and the number of keys; `steady` as in
        the method of that name.
        """
        reason: str | Loss | None = self.method.dense_here(ctx) or self.policy.why_dense(ctx, q.device)
        origin, shape = "", (q.shape, ctx.layout.kv_len, q.dtype)
        if reason is None and self.policy.min_tokens == "auto":
            reason, origin = self.judge.bound(q, ctx)
            pause = 0 if reason is not None or steady else self.judge.take_pause(record.name, q, ctx)
            if pause:
                if len(record.paused) >= KEPT_SHAPES:
                    record.paused.clear()
                record.paused[shape] = pause - 1
                return PAUSED, origin
        if reason is None:
            return None
        if len(record.always_dense) >= KEPT_SHAPES:
            record.always_dense.clear()
        found = record.always_dense[shape] = reason, origin
        return found

    def sparse(
        self,
        record: LayerRecord,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        ctx: Context,
        spans: Sequence[Span] | None = None,
        dense: Callable[[], object] | None = None,
    ) -> tuple[Tensor, Tensor] | None:
        """Sparse attention of one call, or None where the host must run its own dense attention; counted either way.

        Args:
            record: the layer's record.
            q: [batch, heads, q_len, dim].
            k, v: [batch, kv_heads, kv_len, dim]; all three in the dtype to compute in (autocast.cast_inputs).
            ctx: where the call is; its layout is that of a whole row.
            spans: the valid sequences in the batch; None means that every row is one. Places outside get output 0.
            dense: runs the host's own dense attention on the same inputs; without it no gain is measured.

        Returns:
            output [batch, heads, q_len, value dim] and log-sum-exp [batch, heads, q_len], or None.
        """
        if self.as_before(record):
            return None
        reason = self.method.dense_here(ctx) or self.policy.why_dense(ctx, q.device)
        if reason is not None:
            record.dense_reasons[reason] += 1
            return None

        def sparse(record: LayerRecord) -> tuple[Tensor, Tensor] | None:
            with no_autocast(q.device):
                return attended(record)

        def attended(record: LayerRecord) -> tuple[Tensor, Tensor] | None:
            if spans and not (len(spans) == 1 and spans[0].is_whole(q, k)):
                return self._attend_spans(record, q, k, v, ctx, spans)
            own = replace(ctx, layout=spans[0].layout) if spans and spans[0].layout is not None else ctx
            done = self._attend(record, q, k, v, own)
            if done is None:
                return None
            record.count_sparse([done])
            return done.out, done.lse

        result = sparse(record)
        if record.to_measure and result is not None and dense is not None:
            record.to_measure -= 1
            # The runs that are timed count for a record of nobody.
            again = LayerRecord(record.name, record.index, on_trial=True)
            record.measured.append(compare(lambda: sparse(again), dense, q.device))
        return result

    def _attend_spans(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spans: Sequence[Span]
    ) -> tuple[Tensor, Tensor] | None:
        """Each sequence of the batch by itself; None where none of them is sparse."""
        contexts = [span.context(ctx) for span in spans]
        results: list[Done | None] = []
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
                one, two = dense_attention(*span.cut(q, k, v), own)
            else:
                one, two = done.out, done.lse
            rows = span.row_index
            out[rows, :, slice(*span.q)], lse[rows, :, slice(*span.q)] = one, two.to(lse.dtype)
        record.count_sparse([done for done in results if done is not None])
        return out, lse

    def _attend(self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Done | None:
        """The method on one sequence or a batch of equal ones; None where it is dense, with the reason counted."""
        densities: list[float | Tensor] = []
        auto = self.policy.min_tokens == "auto" and not record.on_trial
        # First what was found for this shape before: a short call that stays dense must pay for no more than that.
        loss, origin = self.judge.bound(q, ctx) if auto else (None, "")
        if loss is not None:
            record.count_dense(loss, origin)
            return None
        learns = not record.on_trial and not self.steady(q, k, v)
        call = self.judge.call(record.name, q, ctx)
        skip = call.why_not_ask(learns) if auto else None
        if skip is not None:
            record.count_dense(skip, call.table.origin)
            return None

        def run(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
            prediction = call.found(pattern, q, k, v)
            if auto and not prediction.pays:
                raise _NotWorth
            out, lse, name = run_pattern(q, k, v, pattern, ctx.softmax_scale, self.backend, ctx.softcap)
            record.backends[name] += 1
            # A method may run some of the heads by themselves.
            share = q.shape[1] / ctx.num_heads
            densities.append(pattern.density_later(ctx.layout.density_count) * share)
            return out, lse

        if learns:
            call.start()
        try:
            done = self.method.attention(q, k, v, ctx, run)
        except _NotWorth:
            record.count_dense(call.rejected(learns), call.table.origin)
            return None
        if isinstance(done, Decline):
            self.give_up(record, done.reason)
            return None
        for reason in done.reasons if isinstance(done, PartlyDense) else ():
            if self.strict:
                raise DenseFallback(f"layer {record.name}: {reason} (strict=True)")
            record.partly_dense[reason] += 1
        if learns:
            call.done()
        if self.watcher is not None and not record.on_trial:
            self.watcher(q, k, v, ctx, done[0])
        # Several passes of one method read disjoint keys, so that their densities add up.
        return Done(*done, sum(densities), call.dense / call.sparse if call.sparse else 0.0)


class _NotWorth(Exception):
    """Leaves Method.attention when the policy keeps the call dense."""


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
        watched = [ref(module) for module in self.modules]
        session.in_training = lambda: any(m.training for one in watched if (m := one()) is not None)

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
        records = sorted(session.records.values(), key=lambda r: (r.exact, r.index, r.name))
        layers = [r.report(session.method.requested_density(r.index)) for r in records]
        return Report(session.method.name, session.method.params(), self.family, layers)

    def measure(self, calls: int = 1) -> None:
        """Has the next sparse calls of each layer measured: the model's own dense attention is run beside them.

        Each measured call runs both attentions a few times more, in turns and without gradients; its output stays the
        sparse one. `report()` then shows the gain. A layer whose host does not say how it runs dense shows none.

        Args:
            calls: how many sparse calls of each layer.

        Raises:
            ValueError, TypeError: `calls` is not a number from 0 on.
        """
        check_int("calls", calls, 0)
        for record in self.session.records.values():
            record.to_measure = calls

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model runs its own dense attention, to the bit, as if it had no patch; nothing is counted.

        What is run within it with gradient checkpointing must have its backward within it, too.
        """
        self.session.pauses += 1
        try:
            yield
        finally:
            self.session.pauses -= 1

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
