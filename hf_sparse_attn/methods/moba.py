"""MoBA, mixture of block attention: every query reads the chunks of keys whose mean fits it best, and its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.autocast import cast_inputs, made_on_cpu, no_autocast
from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.dispatch import check_tensors, run_pattern
from hf_sparse_attn.method import SHARES, Decline, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.selection_by_query import best_places, pattern_by_query

_TOP_K = 12


@METHODS.register("moba")
@dataclass(frozen=True, kw_only=True)
class Moba(Method):
    """Each query and head keeps its own chunk of keys up to itself and the chunks whose mean key fits it best.

    The gate has no weights: it is the product of the query with the mean key of a chunk, in float32, and only chunks
    that ended before the query's own are asked. Their keys and those of the own chunk go into one softmax. Models are
    trained with it as it is (`moba_attention` is the same as a function, with gradients for q, k and v and none
    through the choice); other models run it like any choice by content. Ties go to the earlier chunk. The choice of
    every query is kept exactly, in tiles of 16 queries: what is computed is what any of 16 neighbours has chosen.

    As in the published code, `top_k=1` keeps all keys up to the query, not the own chunk alone. Deviations: none in
    what is kept; `density`. The published code decodes with all keys.

    Formula:
        g(t, c) = q_t . mean(K_c), for chunks c that ended before the chunk of t
        keep(t) = own chunk up to t, and the top_k - 1 chunks with the highest g;  all up to t where top_k is 1

    When:
        Take it for a model that was trained with it. On others it chooses as block_topk does, by means of keys, but
        for every query by itself: finer, and the dearer the less neighbours agree.

    Args:
        chunk_size: tokens in a chunk, at least 1; those of a power of two or a multiple of 16 run fastest.
        top_k: chunks that a query reads, its own among them, at least 1; or
        density: share of the chunks up to its own that a query reads, its own among them, in (0, 1]; one of the two,
            `top_k` 12 if neither is given.

    Raises:
        ValueError, TypeError: both given, or a value out of range or of the wrong type.
    """

    paper = "Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189)"
    needs = frozenset({"causal"})
    knob = Knob("density", 1e-4, 1.0, log=True)

    chunk_size: int = 4096
    top_k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        check_int("chunk_size", self.chunk_size, 1)
        if self.density is None:
            object.__setattr__(self, "top_k", check_int("top_k", _TOP_K if self.top_k is None else self.top_k, 1))
            return
        if self.top_k is not None:
            raise ValueError(f"`top_k` must be None when `density` is given, got {self.top_k} and {self.density}")
        object.__setattr__(self, "density", check_share("density", self.density))

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The chunks of each query and head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: moba chooses by content, got None")
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        layout, size = ctx.layout, self.chunk_size
        if self.top_k == 1:
            return BlockPattern.dense(layout.q_len, layout.kv_len, True, device=q.device)
        q, k = q.detach(), k.detach()
        # Of a chunk that is not over no mean is asked.
        means = chunk_means(k, size)
        own = self._own(layout, q.device)
        counts = self._counts(own) - 1
        blocks = -(-layout.kv_len // size)
        place = torch.arange(blocks, device=q.device)

        def keep(first: int, last: int) -> Tensor:
            mine = own[first:last, None]
            scores = _gate(q[:, :, first:last], means).masked_fill(place[: means.shape[2]] >= mine, -torch.inf)
            best = best_places(scores, counts[first:last])
            return torch.nn.functional.pad(best, (0, blocks - means.shape[2])) | (place == mine)

        return pattern_by_query(keep, (*q.shape[:3], blocks), size, layout)

    def turned(self, value: float) -> Method:
        """With `density` at the value, in place of `top_k`; see Method.turned."""
        return replace(self, density=value, top_k=None)

    def _own(self, layout: TokenLayout, device: torch.device | str = "cpu") -> Tensor:
        """The chunk in which each query lies, int64 [queries]."""
        return torch.arange(layout.query_start, layout.kv_len, device=device) // self.chunk_size

    def _counts(self, own: Tensor) -> Tensor:
        """Chunks that each query reads, its own among them."""
        if self.density is None:
            assert self.top_k is not None
            return (own + 1).clamp(max=self.top_k)
        return ((own + 1).double() * self.density).round().long().clamp(min=1)

    def least_density(self, ctx: Context) -> float:
        """What is kept, which the content does not change; see Method.least_density."""
        layout, size = ctx.layout, self.chunk_size
        if not layout.is_causal:
            return 0.0
        if self.top_k == 1:
            return 1.0
        token = torch.arange(layout.query_start, layout.kv_len)
        kept = (self._counts(token // size) - 1) * size + token % size + 1
        return min(1.0, float(kept.sum()) / float((token + 1).sum()))

    def choosing_pairs(self, ctx: Context) -> float:
        """Every query with every mean; see Method.choosing_pairs."""
        return ctx.layout.q_len * ctx.layout.kv_len / self.chunk_size

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Shares of about a hundred chunks; see Method.candidates."""
        size = 16
        while size < 4096 and size * 128 <= tokens:
            size *= 2
        return [{"chunk_size": size, "density": share} for share in SHARES]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """By number and by share, with chunks that end with a row of queries and chunks that do not."""
        return [{"chunk_size": 32, "top_k": 3}, {"chunk_size": 24, "density": 0.4}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All chunks."""
        return {"chunk_size": 32, "density": 1.0}


def moba_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk_size: int = 4096, top_k: int = _TOP_K, cu_seqlens: Tensor | None = None,
    scale: float | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """MoBA, mixture of block attention, as a function to train with (Lu et al. 2025, arXiv 2502.13189); see Moba.

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
    method = Moba(chunk_size=chunk_size, top_k=top_k)
    with no_autocast(q.device), made_on_cpu():
        packed = None if cu_seqlens is None else _Packed(cu_seqlens, q, k)
        if packed is not None:
            q, k, v = (packed.apart(x) for x in (q, k, v))
        ctx = replace(Context.for_tensors(q, k), scale=scale)
        pattern = method.pattern(q, k, ctx)
        assert isinstance(pattern, BlockPattern)
        out = run_pattern(q, k, v, pattern, ctx.softmax_scale, backend)[0]
        return out if packed is None else packed.together(out)


class _Packed:
    """Samples that stand in one row one after another, and the same beside one another with room at their ends.

    A sample needs nothing of what stands after it, for attention is causal and no chunk that is not over is chosen.
    """

    def __init__(self, cu_seqlens: Tensor, q: Tensor, k: Tensor) -> None:
        total = q.shape[2]
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


def chunk_means(k: Tensor, size: int) -> Tensor:
    """Mean key of each whole chunk, at least float32: [batch, kv_heads, chunks, dim]."""
    whole = k.shape[2] // size * size
    return k[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=torch.promote_types(k.dtype, torch.float32))


def _gate(q: Tensor, means: Tensor) -> Tensor:
    """Scores of queries with mean keys, [batch, heads, queries, chunks]."""
    grouped = q.to(means.dtype).unflatten(1, (means.shape[1], -1))
    return (grouped @ means[:, :, None].mT).flatten(1, 2)
