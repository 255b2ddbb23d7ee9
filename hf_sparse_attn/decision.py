"""What runs for a call, sparse or dense attention, and why: decided here, by the same rules whatever the host.

In the order in which more is known: what was asked for (`as_before`, `of_call`, `of_sequence`), what holds for every
call of a shape (`by_shape`), and a `Case`, which is decided before its method is asked and again by its pattern. All
of it depends on what the call is and on the table of costs, on no clock and on no call before: what is kept between
calls is kept to be found faster.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.cost.judge import TOO_DENSE, Call, Loss
from hf_sparse_attn.pattern.block_pattern import BlockPattern

if TYPE_CHECKING:
    from hf_sparse_attn.record import LayerRecord
    from hf_sparse_attn.session import Session

# Density from which on nothing is left out, up to rounding.
FULL = 1 - 1e-6
# Shapes of calls that are kept in mind.
KEPT_SHAPES = 256


@dataclass(frozen=True)
class Decision:
    """What runs for a call, or for one sequence of it.

    Args:
        reason: why it is dense, in words or as a prediction; None means that it is sparse.
        origin: of the table of costs behind a prediction.
        fallback: nobody asked for dense attention: with strict=True it is an error.
        counted: whether the report tells of it.
    """

    reason: str | Loss | None = None
    origin: str = ""
    fallback: bool = False
    counted: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.reason, str) and not self.reason.strip():
            raise ValueError(f"`reason` must say why the call is dense, got {self.reason!r}")


SPARSE = Decision()


def as_before(session: Session) -> Decision:
    """Whether the model runs as without a patch, to the bit: in a pause, not counted, or by method "dense"."""
    if session.paused:
        return Decision("paused", counted=False)
    return Decision("method dense") if session.method.name == "dense" else SPARSE


def of_sequence(session: Session, ctx: Context, device: torch.device) -> Decision:
    """Whether the policy keeps a sequence dense, be it a whole call or one of several in it."""
    return Decision(session.policy.why_dense(ctx, device))


def of_call(session: Session, ctx: Context, device: torch.device) -> Decision:
    """Whether the method by its own word, or the policy, keeps a call dense."""
    word = session.method.dense_here(ctx)
    return of_sequence(session, ctx, device) if word is None else Decision(word)


def by_shape(
    session: Session,
    record: LayerRecord,
    q: Tensor,
    kv_len: int,
    context: Callable[[], Context],
    tokens: Hashable = None,
) -> Decision:
    """Whether a call is dense whatever its content, remembered by the record for all calls alike.

    For hosts without steps.

    Args:
        session, record: of the layer.
        q: the call's queries [batch, heads, q_len, dim].
        kv_len: its keys.
        context: makes the call's context; not asked where the shape is known.
        tokens: what the layout depends on besides the number of queries and keys.
    """
    shape, known = _shape(q, kv_len, tokens), record.by_shape
    decision = known.get(shape)
    if decision is None:
        ctx = context()
        decision = of_call(session, ctx, q.device)
        if decision.reason is None:
            decision = _bound(session, q, ctx)
        if len(known) >= KEPT_SHAPES:
            known.clear()
        known[shape] = decision
    return decision


def known_dense(record: LayerRecord, q: Tensor, kv_len: int, tokens: Hashable = None) -> Decision | None:
    """What `by_shape` has said of a call, if it said that all calls of the shape are dense; arguments as there."""
    decision = record.by_shape.get(_shape(q, kv_len, tokens))
    return None if decision is None or decision.reason is None else decision


def _shape(q: Tensor, kv_len: int, tokens: Hashable) -> Hashable:
    return q.shape, kv_len, q.dtype, q.device, tokens


def _bound(session: Session, q: Tensor, ctx: Context) -> Decision:
    """Whether no pattern of the method could pay."""
    if session.policy.min_tokens != "auto":
        return SPARSE
    loss, origin = session.judge.bound(q, ctx)
    if loss is not None and session.method.keeps_all:
        return _own_is_faster(session)
    if loss is not None and loss.prediction.density >= FULL:
        session.tell_full(ctx)
    return Decision(loss, origin)


def _own_is_faster(session: Session) -> Decision:
    """Dense, and as good as what was asked for."""
    return Decision(f"{session.method.name}: the model's own attention is predicted faster")


class NotWorth(Exception):
    """Leaves Method.attention where its pattern shows that the sequence is better dense."""

    def __init__(self, decision: Decision) -> None:
        super().__init__(decision)
        self.decision = decision


class Case:
    """One sequence of a call, or a batch of equal ones, on its way through the method.

    Args:
        session, record: of the layer. A record on trial is sparse whatever is predicted.
        q: its queries.
        ctx: where it is.
        known: whether `by_shape` has said that some pattern could pay.
    """

    call: Call

    def __init__(self, session: Session, record: LayerRecord, q: Tensor, ctx: Context, known: bool = False) -> None:
        self.session, self.q, self.ctx = session, q, ctx
        self.known = known
        self.auto = session.policy.min_tokens == "auto" and not record.on_trial

    def before(self) -> Decision:
        """Whether the method need not be asked, for no pattern of it can pay."""
        if self.auto and not self.known:
            # A short sequence that stays dense must pay for no more than this.
            decision = _bound(self.session, self.q, self.ctx)
            if decision.reason is not None:
                return decision
        self.call = self.session.judge.call(self.q, self.ctx)
        return SPARSE

    def check(self, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Decides again, now that (another) pattern of the method is known.

        Raises:
            NotWorth: the sequence is dense.
        """
        prediction = self.call.found(pattern, q, k, v)
        if self.auto and not prediction.pays and self.session.method.keeps_all:
            raise NotWorth(_own_is_faster(self.session))
        if self.auto and not prediction.pays:
            # What is predicted counts half of every tile; a GPU is not waited for.
            if prediction.density > 0.98 and q.device.type == "cpu":
                if pattern.density(self.ctx.layout.density_count) >= FULL:
                    self.session.tell_full(self.ctx)
            raise NotWorth(Decision(Loss(TOO_DENSE, prediction), self.call.table.origin))

    def gain(self) -> float:
        """What was predicted for a sequence that ends sparse, or 0."""
        return self.call.dense / self.call.sparse if self.call.sparse else 0.0
