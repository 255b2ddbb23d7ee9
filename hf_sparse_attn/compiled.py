"""Sparse attention as operators of torch that torch.compile keeps whole, with fake kernels and a backward.

The compiler does not look into them: the backend is chosen, and what it does is decided, when they run. A pattern goes
in as its tensors and sizes; lengths are symbolic, so that another length is no reason to compile anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_sparse_attn.backend import BackendUnavailable, KernelBackend, choose_backend
from hf_sparse_attn.pattern.block_pattern import BlockPattern

_Sizes = tuple[int, int, int, int]


def in_program() -> bool:
    """Whether what runs is being made into a program that outlives it: by torch.export (also AOT) or torch.jit."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


# What is called while tracing gives a constant, and its errors come out as they are. (Torch leaves it untyped.)
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def refuse_program() -> None:
    """Raises where a model would be made into a program without what its layers ask when they run."""
    raise RuntimeError(
        "a model with sparse attention must not be exported or traced: its program would have no patch, or that of "
        "another model. unpatch() it first, or export within patch.paused(); with attn_implementation='hsa:<name>' "
        "call model.set_attn_implementation('sdpa') first"
    )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def refuse_method() -> None:
    """Raises where a method is asked for its pattern while its call is exported."""
    raise RuntimeError(
        "`method` must be a ready BlockPattern in an exported program, for a method looks at values when it runs: make "
        "it before, by `pattern = method.pattern(q, k, ctx)`"
    )


def _spread(p: BlockPattern) -> tuple[Any, ...]:
    """The pattern as arguments that an operator of torch can take, in the order of _gathered."""
    return (
        p.indptr, p.starts, p.tile_ids, p.tiles, p.column_indptr, p.columns, p.q_order, p.kv_order, p.kv_range,
        p.block_q, p.block_k, p.q_len, p.kv_len,
    )  # fmt: skip


# Patterns made of an operator's arguments, by `indptr`: what a kernel has planned for a pattern lives as long as it.
_PATTERNS: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def _gathered(tensors: tuple[Tensor | None, ...], sizes: _Sizes) -> BlockPattern:
    """The pattern of an operator's arguments; the same object while they are the same tensors."""
    indptr, rest = tensors[0], tensors[1:]
    if indptr is None:
        raise TypeError("`indptr` must be a tensor, got None")
    known: BlockPattern | None = _PATTERNS.get(indptr)
    if known is not None:
        spread = _spread(known)
        if spread[9:] == sizes and all(a is b for a, b in zip(spread[1:9], rest, strict=True)):
            return known
    # A value that holds its own key would keep both alive for ever: the pattern gets another handle on the memory.
    made = BlockPattern(*sizes, indptr.detach(), *rest)  # type: ignore[arg-type]
    _PATTERNS[indptr] = made
    return made


@torch.library.custom_op("hf_sparse_attn::block_sparse", mutates_args=())
def _operator(
    q: Tensor, k: Tensor, v: Tensor,
    indptr: Tensor, starts: Tensor, tile_ids: Tensor, tiles: Tensor, column_indptr: Tensor | None,
    columns: Tensor | None, q_order: Tensor | None, kv_order: Tensor | None, kv_range: Tensor | None,
    block_q: int, block_k: int, q_len: int, kv_len: int, scale: float, softcap: float, backend: str, needs_grad: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    tensors = (indptr, starts, tile_ids, tiles, column_indptr, columns, q_order, kv_order, kv_range)
    pattern = _gathered(tensors, (block_q, block_k, q_len, kv_len))
    chosen = choose_backend(backend, pattern, q, k, v, needs_grad, softcap)[1]
    attention = _with_backward(chosen).forward if needs_grad else chosen.attention
    out, lse = attention(q, k, v, pattern, scale, softcap)
    # In memory as the fake kernel says.
    return out.contiguous(), lse.contiguous()


@torch.library.custom_op("hf_sparse_attn::block_sparse_backward", mutates_args=())
def _operator_backward(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    indptr: Tensor, starts: Tensor, tile_ids: Tensor, tiles: Tensor, column_indptr: Tensor | None,
    columns: Tensor | None, q_order: Tensor | None, kv_order: Tensor | None, kv_range: Tensor | None,
    block_q: int, block_k: int, q_len: int, kv_len: int, scale: float, softcap: float, backend: str, needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    tensors = (indptr, starts, tile_ids, tiles, column_indptr, columns, q_order, kv_order, kv_range)
    pattern = _gathered(tensors, (block_q, block_k, q_len, kv_len))
    chosen = _with_backward(choose_backend(backend, pattern, q, k, v, True, softcap)[1])
    grads = chosen.backward(grad_out, grad_lse, q, k, v, out, lse, pattern, scale, softcap)
    return grads[0].contiguous(), grads[1].contiguous(), grads[2].contiguous()


@_operator.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(*q.shape[:3], v.shape[3]), lse


@_operator_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:12])
    ctx.rest = inputs[12:]
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, *pattern = ctx.saved_tensors
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    grads = _operator_backward(grad_out, grad_lse, q, k, v, out, lse, *pattern, *ctx.rest)
    return (*grads, *(None for _ in range(9 + len(ctx.rest))))


_operator.register_autograd(_grads, setup_context=_save)


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float, backend: str
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp as one operator of the graph that is being traced; shapes as in backend.Backend."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    done: tuple[Tensor, Tensor] = _operator(q, k, v, *_spread(pattern), scale, softcap, backend, needs_grad)
    return done


def _with_backward(chosen: Any) -> type[KernelBackend]:
    if not issubclass(chosen, KernelBackend):
        raise BackendUnavailable(f"`backend` {chosen.name!r} cannot run this call: no backward under torch.compile")
    return chosen
