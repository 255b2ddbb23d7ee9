"""Session: what the layers of one patch share while they run, and how each of their calls is run."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_sparse_attn import decision
from hf_sparse_attn.autocast import made_on_cpu, no_autocast
from hf_sparse_attn.compiled import in_program, refuse_program
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.cost.judge import Judge
from hf_sparse_attn.cost.timing import compare
from hf_sparse_attn.decision import Case, Decision, NotWorth
from hf_sparse_attn.decoder import Decoder, prompt_reader, usual_decoder
from hf_sparse_attn.dispatch import dense_attention, run_pattern
from hf_sparse_attn.method import Decline, Method, PartlyDense
from hf_sparse_attn.notes import Notes
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import Done, LayerRecord, Work
from hf_sparse_attn.span import Span


class DenseFallback(RuntimeError):
    """Raised with strict=True where sparse attention had to be given up."""


# Shown q, k, v, place and output of every sparse sequence, with gradients; again when checkpointing computes it again.
Watcher = Callable[[Tensor, Tensor, Tensor, Context, Tensor], object]

# All that are alive, by number: what a compiled graph can name.
SESSIONS: WeakValueDictionary[int, Session] = WeakValueDictionary()
_NUMBERS = itertools.count()


# The sessions that are paused in this thread or task.
_PAUSED: ContextVar[frozenset[int]] = ContextVar("hf_sparse_attn_paused", default=frozenset())


class _Pauses:
    depth = 0


class _Thread(threading.local):
    # An object of its own, for what graphs read of the local storage itself is not kept apart.
    def __init__(self) -> None:
        self.pauses = _Pauses()


class Uncopied:
    """Base of what a deep copy of a patched model shares with it: a copy goes on with the same state and counts."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self


class Session(Uncopied):
    """What the layers of one patch share: the method, the decoder, the policy, the backend and the records."""

    def __init__(
        self, method: Method, policy: Policy, backend: str, strict: bool, decoder: Decoder | None = None
    ) -> None:
        # What was asked for, and what reads prompts.
        self.asked: Method = method
        self.method: Method = prompt_reader(method)
        self.decoder = usual_decoder(method) if decoder is None else decoder
        self.policy: Policy = policy
        self.backend = backend
        self.strict = strict
        # Fields of LayerInputs that the hooks fill in.
        self.reads: frozenset[str] = self.method.reads
        self.judge = Judge(self.method, backend)
        self.watcher: Watcher | None = None
        # Whether attention ever ran that backward runs again; see recomputation.
        self.checkpointed = False
        # Whether the patch is all on, and whether it was removed: a forward is under it that begins in between.
        self.begun = self.ended = False
        self._here = _Thread()
        self.records: dict[str, LayerRecord] = {}
        # What is told besides figures: settings without effect, steps that are guessed.
        self.notes = Notes()
        self._told_full = False
        self._told_lengths: set[int] = set()
        self.number = next(_NUMBERS)
        SESSIONS[self.number] = self

    @property
    def paused(self) -> bool:
        """Whether calls of this thread or task run as without the patch."""
        # A graph knows no context variables; one that is traced now outlives a patch that was removed.
        if torch.compiler.is_compiling():
            return self._here.pauses.depth > 0 or self.ended
        return self.number in _PAUSED.get()

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within it, `paused` holds in this thread or task, and in no other."""
        here, before = self._here.pauses, _PAUSED.get()
        here.depth += 1
        _PAUSED.set(before | {self.number})
        try:
            yield
        finally:
            here.depth -= 1
            _PAUSED.set(before)

    def work(self, q: Tensor, layout: TokenLayout) -> Work:
        """What there is to compute for queries `q` [batch, heads, q_len, dim] over the tokens of a row."""
        return Work.of(q, layout.kv_len, layout.is_causal, self.policy.min_queries)

    def stays_dense(self, record: LayerRecord, found: Decision, work: Work | None = None) -> bool:
        """Whether a call is dense by what was decided, which is then counted with its work.

        Raises:
            DenseFallback: nobody asked for it, and the patch is strict.
        """
        if found.reason is None:
            return False
        if found.fallback:
            self._check_strict(record, found.reason)
        if found.counted:
            record.count_dense(found, work)
        return True

    def tell_full(self, ctx: Context | None = None) -> None:
        """Notes, once, that the method keeps all keys of a call, or of calls: being sparse saves nothing there."""
        if self._told_full or self.method.keeps_all:
            return
        self._told_full = True
        params = ", ".join(f"{name}={value}" for name, value in self.method.params().items())
        where = "of some calls" if ctx is None else f"of a call of {ctx.layout.kv_len} tokens"
        self.notes.add(f"{self.method.name}({params}) keeps all keys {where}: nothing is saved there")

    def _tell_length(self, ctx: Context) -> None:
        """Notes what the method says of calls of a length, the first time that one comes."""
        tokens = ctx.layout.kv_len
        if tokens not in self._told_lengths:
            self._told_lengths.add(tokens)
            remark = self.method.remark(ctx)
            if remark is not None:
                self.notes.add(remark)

    def _check_strict(self, record: LayerRecord, reason: object) -> None:
        # Where nothing is left out nothing is given up either.
        if self.strict and not (self.method.keeps_all and self.decoder.method is None):
            raise DenseFallback(f"layer {record.name}: {reason} (strict=True)")

    def check_program(self) -> None:
        """Raises where the model is made into a program (compiled.in_program), unless it runs as it did before."""
        if in_program() and decision.as_before(self).reason is None:
            refuse_program()

    def as_before(self, record: LayerRecord, work: Work | None = None) -> bool:
        """Whether a call runs as in the unpatched model, to the bit: by method "dense", or in a pause, not counted."""
        return self.stays_dense(record, decision.as_before(self), work)

    def record(self, name: str, index: int) -> LayerRecord:
        """The record of the layer called `name`, made at first use."""
        return self.records.setdefault(name, LayerRecord(name, index))

    def give_up(self, record: LayerRecord, reason: str, work: Work | None = None) -> None:
        """Counts a dense call that was not asked for.

        Raises:
            DenseFallback: with strict=True.
        """
        self.stays_dense(record, Decision(reason, fallback=True), work)

    def sparse(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spans: Sequence[Span] | None = None,
        dense: Callable[[], object] | None = None, decided: TokenLayout | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Sparse attention of one call, or None where the host must run its own dense attention; counted either way.

        Args:
            record: the layer's record.
            q: [batch, heads, q_len, dim].
            k, v: [batch, kv_heads, kv_len, dim]; all three in the dtype to compute in (autocast.cast_inputs).
            ctx: where the call is; its layout is that of a whole row.
            spans: the valid sequences in the batch; None means that every row is one. Places outside get output 0.
            dense: runs the host's own dense attention on the same inputs; without it no gain is measured.
            decided: the layout for which the host has asked `decision.by_shape`, whose answer still holds for it.

        Returns:
            output [batch, heads, q_len, value dim] and log-sum-exp [batch, heads, q_len], or None.
        """
        if ctx.layout != decided:
            found = decision.of_call(self, ctx, q.device)
            if self.stays_dense(record, found, self.work(q, ctx.layout)):
                return None
        own = ctx
        if spans and len(spans) == 1 and spans[0].is_whole(q, k):
            own, spans = replace(ctx, layout=spans[0].layout or ctx.layout), None

        def sparse(record: LayerRecord) -> tuple[Tensor, Tensor] | None:
            with no_autocast(q.device), made_on_cpu():
                if spans:
                    return self._attend_spans(record, q, k, v, ctx, spans)
                done = self._attend(record, q, k, v, own, known=own.layout == decided)
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
            parts, found = span.cut(q, k, v), decision.of_sequence(self, own, q.device)
            short = self.stays_dense(record, found, self.work(parts[0], own.layout))
            results.append(None if short else self._attend(record, *parts, own))
        if not any(results):
            return None
        record.count_sparse([done for done in results if done is not None])
        # One by one: dense outputs are not kept beside one another.
        outputs = (
            dense_attention(*span.cut(q, k, v), own) if done is None else done[:2]
            for span, own, done in zip(spans, contexts, results, strict=True)
        )
        return gathered(q, v, spans, outputs)

    def _attend(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, known: bool = False
    ) -> Done | None:
        """The method on one sequence or a batch of equal ones; None where it is dense, with the reason counted."""
        case = Case(self, record, q, ctx, known)
        work = self.work(q, ctx.layout)
        if self.stays_dense(record, case.before(), work):
            return None
        self._tell_length(ctx)
        densities: list[float | Tensor] = []

        def run(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
            case.check(pattern, q, k, v)
            out, lse, name = run_pattern(q, k, v, pattern, ctx.softmax_scale, self.backend, ctx.softcap)
            record.count(record.backends, name)
            # A method may run some of the heads by themselves.
            share = q.shape[1] / ctx.num_heads
            densities.append(pattern.density_later(ctx.layout.density_count) * share)
            return out, lse

        try:
            done = self.method.attention(q, k, v, ctx, run)
        except NotWorth as lost:
            record.count_dense(lost.decision, work)
            return None
        if isinstance(done, Decline):
            self.give_up(record, done.reason, work)
            return None
        for reason in done.reasons if isinstance(done, PartlyDense) else ():
            self._check_strict(record, reason)
            record.count(record.partly_dense, reason)
        gain = case.gain()
        if self.watcher is not None and not record.on_trial:
            self.watcher(q, k, v, ctx, done[0])
        # Several passes of one method read disjoint keys, so that their densities add up.
        density = sum(densities)
        # A GPU is not waited for: there the report finds out.
        if isinstance(density, float) and density >= decision.FULL:
            self.tell_full(ctx)
        return Done(*done, density, gain, work)


def gathered(
    q: Tensor, v: Tensor, spans: Iterable[Span], parts: Iterable[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of a batch with queries `q` and values `v` from those of its sequences; 0 outside."""
    out = q.new_zeros(*q.shape[:3], v.shape[3])
    lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
    for span, (one, two) in zip(spans, parts, strict=True):
        rows = span.row_index
        out[rows, :, slice(*span.q)], lse[rows, :, slice(*span.q)] = one, two.to(lse.dtype)
    return out, lse
