"""Observing a model: q, k, v and Context of every self-attention call that a patch would take, while it runs dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import no_autocast
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.decision import of_sequence
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.family import check_reads, find_family, install
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.session import Session, gathered
from hf_sparse_attn.span import Span

# More than no share and less than any that keeps a step dense: the family then tells steps it is sure of, or none.
_KNOWN_STEPS = 1e-12


@dataclass(frozen=True, eq=False)
class Seen:
    """One self-attention call: a sequence, or a batch of equal ones, without padding.

    Args:
        layer: name of the layer.
        q: [batch, heads, q_len, dim]; k, v: [batch, kv_heads, kv_len, dim]; without gradients.
        ctx: where the call is.
        grad: gradient of the loss for the output [batch, heads, q_len, value dim]; None where not asked for.
    """

    layer: str
    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context
    grad: Tensor | None = None


Observer = Callable[[Seen], object]


@dataclass(frozen=True, kw_only=True)
class _Nothing(Method):
    """Stands for the method of a session that has none. Not `dense`, for which hosts ask no session."""

    name = "observed"


class Observing(Session):
    """A session that shows every call to an observer and lets the host run its own dense attention.

    Args:
        observer: called with each Seen.
        method: what the layers run after they were shown, so that later layers see its errors; None means dense.
        gradients: the calls are shown in the backward pass instead, with the gradient of their output. The session
            then computes dense attention itself, so that it has an output to watch.
        steps: whether calls must know the step they belong to and the number of steps.
        reads: what of the layer's inputs the calls are shown with, besides what `method` reads.
    """

    def __init__(
        self, observer: Observer, method: Method | None = None, gradients: bool = False, steps: bool = False,
        reads: frozenset[str] = frozenset(),
    ) -> None:  # fmt: skip
        policy = Policy(min_tokens=0, dense_steps=_KNOWN_STEPS if steps else None)
        super().__init__(_Nothing() if method is None else method, policy, "auto", strict=False)
        self.observer = observer
        self.reads |= reads
        self.gradients = gradients
        self.outputs: list[Tensor] = []

    def sparse(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spans: Sequence[Span] | None = None,
        dense: Callable[[], object] | None = None, decided: TokenLayout | None = None,
    ) -> tuple[Tensor, Tensor] | None:  # fmt: skip
        """Shows the call; see Session.sparse."""
        if self.stays_dense(record, of_sequence(self, ctx, q.device)):
            return None
        with no_autocast(q.device):
            if self.gradients:
                return self._watched(record, q, k, v, ctx, spans)
            for span, own in _spans(q, k, ctx, spans):
                if of_sequence(self, own, q.device).reason is None:
                    self._show(_seen(record.name, span.cut(q, k, v), own))
        if isinstance(self.method, _Nothing):
            record.count(record.dense_reasons, "observed")
            return None
        return super().sparse(record, q, k, v, ctx, spans, decided=decided)

    def _show(self, seen: Seen) -> None:
        with torch.no_grad():
            self.observer(seen)

    def _watched(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, spans: Sequence[Span] | None
    ) -> tuple[Tensor, Tensor]:
        """Attention, dense where there is no method, whose gradient is shown when it is known."""
        record.count(record.dense_reasons, "observed")
        sequences, parts = _spans(q, k, ctx, spans), []
        for span, own in sequences:
            cut = span.cut(q, k, v)
            done = None if isinstance(self.method, _Nothing) else self._attend(record, *cut, own)
            parts.append(dense_attention(*cut, own) if done is None else done[:2])
            if of_sequence(self, own, q.device).reason is None:
                self._watch(parts[-1][0], _seen(record.name, cut, own))
        return gathered(q, v, [span for span, _ in sequences], parts)

    def _watch(self, out: Tensor, seen: Seen) -> None:
        if not out.requires_grad:
            # Frozen weights: the graph that is needed begins here.
            out.requires_grad_()
        out.register_hook(lambda grad: self._show(replace(seen, grad=grad)))
        self.outputs.append(out)


def _seen(layer: str, cut: tuple[Tensor, Tensor, Tensor], ctx: Context) -> Seen:
    q, k, v = (t.detach() for t in cut)
    return Seen(layer, q, k, v, ctx)


def _spans(q: Tensor, k: Tensor, ctx: Context, spans: Sequence[Span] | None) -> list[tuple[Span, Context]]:
    """The sequences of a call with their contexts; a call without spans is one."""
    if not spans:
        whole = Span(tuple(range(q.shape[0])), (0, q.shape[2]), (0, k.shape[2]), ctx.layout)
        return [(whole, ctx)]
    return [(span, span.context(ctx)) for span in spans]


@contextmanager
def observing(
    model: Any, observer: Observer, method: Method | None = None, gradients: bool = False, steps: bool = False,
    reads: frozenset[str] = frozenset(),
) -> Iterator[Patch]:  # fmt: skip
    """Within it, every self-attention call of a model is shown to `observer`; afterwards the model is as it was.

    Calls with fewer than 16 queries (decoding) are not shown.

    Args:
        model: a transformers model, a diffusers transformer, or a diffusers pipeline.
        observer, method, gradients, steps, reads: as in Observing.

    Yields:
        the Patch; with `gradients`, its session's `outputs` are what the loss is to be differentiated for.

    Raises:
        TypeError: a model of no known family.
        ValueError: it is patched already or has no self-attention layers, or does not hand over what is read.
    """
    found, session = find_family(model), Observing(observer, method, gradients, steps, reads)
    check_reads(found, session.reads, "what is to be observed")
    with install(model, found, session) as patch:
        yield patch


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within it, modules are in evaluation mode; afterwards each part is in the mode it was in."""
    parts = {part: part.training for module in modules for part in module.modules()}
    try:
        for module in modules:
            module.eval()
        yield
    finally:
        for part, training in parts.items():
            part.training = training


class Call(NamedTuple):
    """One attention call of a model.

    Args:
        q: [batch, heads, q_len, dim].
        k, v: [batch, kv_heads, kv_len, dim].
        ctx: where it is.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    ctx: Context


def capture(model: nn.Module, tokens: Tensor) -> dict[int, Call]:
    """q, k, v of every layer, by its index, of a dense forward over `tokens` [1, length]."""
    found: dict[int, Call] = {}

    def keep(seen: Seen) -> None:
        found[seen.ctx.layer] = Call(seen.q, seen.k, seen.v, seen.ctx)

    with observing(model, keep), torch.no_grad():
        model(tokens, use_cache=False)
    return found
