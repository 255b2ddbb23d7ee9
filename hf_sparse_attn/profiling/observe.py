"""Observing a model: q, k, v and Context of every self-attention call that a patch would take, while it runs dense."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.family import check_reads, find_family, install
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import Done, LayerRecord
from hf_sparse_attn.session import Session

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
class _Observed(Method):
    """Stands for the method of a session that shows its calls. Not `dense`, for which hosts ask no session."""

    name = "observed"

    def __init__(self, by_steps: bool) -> None:
        object.__setattr__(self, "by_steps", by_steps)


class Observing(Session):
    """A session that shows every call to an observer and lets the host run its own dense attention.

    The calls come by the way of a patched model's, and are shown where its method would be asked: what is shown is
    what a method is given.

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
        super().__init__(_Observed(method is not None and method.by_steps), policy, "auto", strict=False)
        # Asked by itself for each sequence, so that one that it leaves dense is shown as well.
        self.in_force = None if method is None else Session(method, policy, "auto", strict=False)
        self.observer = observer
        self.reads |= reads if method is None else reads | method.reads
        self.gradients = gradients
        self.outputs: list[Tensor] = []

    def _attend(
        self, record: LayerRecord, q: Tensor, k: Tensor, v: Tensor, ctx: Context, known: bool = False
    ) -> Done | None:
        """Shows a sequence, or a batch of equal ones; see Session._attend."""
        seen = Seen(record.name, q.detach(), k.detach(), v.detach(), ctx)
        if not self.gradients:
            self._show(seen)
        inner, done = self.in_force, None
        if inner is not None:
            done = inner.sparse(inner.record(record.name, record.index), q, k, v, ctx)
        if done is None:
            record.count(record.dense_reasons, "observed")
            if not self.gradients:
                return None
            done = dense_attention(q, k, v, ctx)[:2]
        if self.gradients:
            self._watch(done[0], seen)
        return Done(*done, 1.0, 0.0, self.work(q, ctx.layout))

    def _show(self, seen: Seen) -> None:
        with torch.no_grad():
            self.observer(seen)

    def _watch(self, out: Tensor, seen: Seen) -> None:
        if not out.requires_grad:
            # Frozen weights: the graph that is needed begins here.
            out.requires_grad_()
        out.register_hook(lambda grad: self._show(replace(seen, grad=grad)))
        self.outputs.append(out)


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


def capture(model: nn.Module, inputs: Tensor | Mapping[str, Any]) -> dict[int, Call]:
    """q, k, v of every layer, by its index, of a dense forward.

    Args:
        model: the model.
        inputs: tokens [1, length], or keyword inputs of the forward.
    """
    found: dict[int, Call] = {}

    def keep(seen: Seen) -> None:
        found[seen.ctx.layer] = Call(seen.q, seen.k, seen.v, seen.ctx)

    with observing(model, keep), torch.no_grad():
        model(**inputs) if isinstance(inputs, Mapping) else model(inputs, use_cache=False)
    return found
