"""Transforms of torch.func (grad, vjp, vmap, ...): attention is one step to them, computed on plain tensors.

Kernels and what chooses blocks look at values, which tensors inside of a transform do not show. First derivatives
alone: they run the step again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

# What a step computes of its tensors; it runs with gradients where it runs again for them, and without before.
Compute = Callable[..., tuple[Tensor, ...]]


def are_transformed(*values: object) -> bool:
    """Whether a tensor among them is inside of a transform; not for graphs that are being traced."""
    if torch.compiler.is_compiling():
        return False
    return any(isinstance(x, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(x) for x in values)


def plain(x: Any) -> Any:
    """A tensor outside of all transforms, with what vmap has spread as one more dim; anything else as it is."""
    while are_transformed(x):
        x = torch._C._functorch.get_unwrapped(x)
    return x


def step(compute: Compute, *inputs: Tensor | None) -> tuple[Tensor, ...]:
    """What `compute` gives of these inputs, as one step of the transforms around it; vmap runs it sample by sample."""
    made: tuple[Tensor, ...] = _Step.apply(compute, *inputs)
    return made


def _each(
    call: Callable[..., tuple[Tensor, ...]], count: int, dims: Sequence[int | None], inputs: Sequence[Any]
) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The results of all samples, and the dim along which they lie."""
    samples = [
        call(*(x if dim is None else x.select(dim, i) for x, dim in zip(inputs, dims, strict=True)))
        for i in range(count)
    ]
    stacked = tuple(torch.stack(parts) for parts in zip(*samples, strict=True))
    return stacked, (0,) * len(stacked)


class _Step(Function):
    @staticmethod
    def forward(compute: Compute, *inputs: Tensor | None) -> tuple[Tensor, ...]:
        return compute(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.compute = inputs[0]
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        found = iter(_Gradients.apply(ctx.compute, len(grads), *grads, *inputs))
        return (None, *(next(found) if _is_wanted(x) else None for x in inputs))

    @staticmethod
    def jvp(ctx: Any, *_: Tensor | None) -> Any:
        raise RuntimeError("sparse attention has no derivatives in forward mode (jvp, jacfwd, hessian): use grad")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], compute: Compute, *inputs: Tensor | None) -> Any:
        return _each(lambda *one: step(compute, *one), info.batch_size, in_dims[1:], inputs)


class _Gradients(Function):
    @staticmethod
    def forward(compute: Compute, outputs: int, *given: Tensor | None) -> tuple[Tensor, ...]:
        grads = given[:outputs]
        inputs = [x.detach().requires_grad_() if x is not None and _is_wanted(x) else x for x in given[outputs:]]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        with torch.enable_grad():
            made = compute(*inputs)
        return torch.autograd.grad(made, wanted, grads, allow_unused=True, materialize_grads=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("sparse attention has first derivatives alone: it cannot be differentiated twice")

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], compute: Compute, outputs: int, *given: Tensor | None) -> Any:
        def one(*sample: Tensor | None) -> tuple[Tensor, ...]:
            found: tuple[Tensor, ...] = _Gradients.apply(compute, outputs, *sample)
            return found

        return _each(one, info.batch_size, in_dims[2:], given)


def _is_wanted(x: Tensor | None) -> bool:
    return x is not None and x.is_floating_point()
