"""MoBA, mixture of block attention (Lu et al. 2025): the choice of chunks, and attention over them to train with."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse_attn.autocast import cast_inputs, made_on_cpu, no_autocast
from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.dispatch import check_tensors, run_pattern
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.selection_by_query import best_places, block_means, grouped_products, pattern_by_query

TOP_K = 12


def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int = 4096, top_k: int = TOP_K, cu_seqlens: Tensor | None = None,
    scale: float | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """MoBA, mixture of block attention, as a function to train with (Lu et al. 2025, arXiv 2502.13189).

    Every query reads its own chunk up to itself and the `top_k` - 1 chunks before it whose mean key fits it best,
    `q . mean(k of the chunk)` in float32, head by head; one softmax over all of them. Differentiable in q, k and v;
    no gradient passes through the choice. As in the published code `top_k=1` is plain causal attention.

    Args:
        q: [batch, heads, tokens, dim]; fewer queries than keys are the last ones.
        k: [batch, kv_heads, tokens, dim]; kv_heads divides heads.
        v: [batch, kv_heads, tokens, value dim].
        chunk_size: tokens in a chunk, at least 1; the last may be shorter.
        top_k: chunks that a query reads, its own among them, at least 1.
        cu_seqlens: int [samples + 1], where samples that are packed into one row begin, from 0 to all tokens; chunks
            begin with each sample and no query reads another's. None means one sample in each row.
        scale: factor on the logits; None means dim ** -0.5.
        backend: "auto", or a backend by name.

    Returns:
        [batch, heads, tokens, value dim] in the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, types or sizes that do not fit.
    """
    q, k, v = cast_inputs(q, k, v)
    check_tensors(q, k, v)
    check_int("chunk_size", chunk_size, 1)
    check_int("top_k", top_k, 1)
    with no_autocast(q.device), made_on_cpu():
        packed = None if cu_seqlens is None else _Packed(cu_seqlens, q, k)
        if packed is not None:
            q, k, v = (packed.apart(x) for x in (q, k, v))
        ctx = replace(Context.for_tensors(q, k), scale=scale)
        pattern = moba_pattern(q, k, ctx.layout, chunk_size, top_k)
        out = run_pattern(q, k, v, pattern, ctx.softmax_scale, backend)[0]
        return out if packed is None else packed.together(out)


@torch.no_grad()
def moba_pattern(q: Tensor, k: Tensor, layout: TokenLayout, size: int, amount: int | float) -> BlockPattern:
    """The chunks of each query and head.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim].
        layout: the tokens, causal.
        size: tokens in a chunk.
        amount: chunks that a query reads, or as a float the share of those up to its own.
    """
    if _is_all(amount):
        return BlockPattern.dense(layout.q_len, layout.kv_len, True, device=q.device)
    means, blocks = block_means(k, size), -(-layout.kv_len // size)
    own = torch.arange(layout.query_start, layout.kv_len, device=q.device) // size
    others, place = _counts(own, amount) - 1, torch.arange(blocks, device=q.device)
    # A last chunk that is not whole has no mean, and nobody asks for it.
    asked = place[: means.shape[2]]

    def keep(first: int, last: int) -> Tensor:
        mine = own[first:last, None]
        gate = grouped_products(q[:, :, first:last], means).masked_fill(asked >= mine, -torch.inf)
        best = best_places(gate, amount - 1 if isinstance(amount, int) else others[first:last])
        return torch.nn.functional.pad(best, (0, blocks - len(asked))) | (place == mine)

    return pattern_by_query(keep, (q.shape[0], q.shape[1], q.shape[2], blocks), size, layout)


def kept_share(layout: TokenLayout, size: int, amount: int | float) -> float:
    """Share of the visible pairs that `moba_pattern` keeps, which the content does not change."""
    if _is_all(amount):
        return 1.0
    token = torch.arange(layout.query_start, layout.kv_len)
    kept = (_counts(token // size, amount) - 1) * size + token % size + 1
    return min(1.0, float(kept.sum()) / float((token + 1).sum()))


def _is_all(amount: int | float) -> bool:
    """Whether every query reads everything: the published code takes one chunk for no selection at all."""
    return isinstance(amount, int) and amount == 1


def _counts(own: Tensor, amount: int | float) -> Tensor:
    """Chunks that queries in the chunks `own` read, their own among them."""
    if isinstance(amount, int):
        return (own + 1).clamp(max=amount)
    return ((own + 1).double() * amount).round().long().clamp(min=1)


class _Packed:
    """Samples that stand in one row one after another, and the same beside one another with room at their ends.

    A sample needs nothing of what stands after it, for attention is causal and no chunk that is not over is chosen.
    """

    def __init__(self, cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
        total = q.shape[2]
        if not isinstance(cu_seqlens, Tensor):
            raise TypeError(f"`cu_seqlens` must be a tensor [samples + 1], got {type(cu_seqlens).__name__}")
        if q.shape[0] != 1 or k.shape[2] != total:
            raise ValueError(
                f"`cu_seqlens` must come with a batch of 1 and as many queries as keys, got {list(q.shape)} and "
                f"{list(k.shape)}"
            )
        ends = cu_seqlens.to(q.device, torch.int64)
        lengths = ends.diff()
        if ends.ndim != 1 or len(ends) < 2 or int(ends[0]) or int(ends[-1]) != total or bool((lengths < 0).any()):
            raise ValueError(f"`cu_seqlens` must rise from 0 to {total}, got {cu_seqlens.tolist()}")
        self.samples, self.longest = len(lengths), int(lengths.max())
        sample = torch.repeat_interleave(torch.arange(self.samples, device=q.device), lengths)
        self.place = sample * self.longest + torch.arange(total, device=q.device) - ends[sample]

    def apart(self, x: Tensor) -> Tensor:
        """[1, heads, tokens, dim] as [samples, heads, longest, dim], zeros at the ends."""
        rows = x.new_zeros(self.samples * self.longest, x.shape[1], x.shape[3]).index_copy(
            0, self.place, x[0].transpose(0, 1)
        )
        return rows.unflatten(0, (self.samples, self.longest)).transpose(1, 2)

    def together(self, x: Tensor) -> Tensor:
        """The inverse of `apart`."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.place).transpose(0, 1)[None]
