"""XAttention: key blocks by the sums along the anti-diagonals of the scores."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Estimating, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import (
    check_block_size,
    check_share,
    covering,
    gather_rows,
    least_of_row_blocks,
    pattern_of_rows,
    row_blocks,
    text_blocks,
)
from hf_sparse_attn.selection_by_density import block_pairs, gather_share, share_missing, whole_map

# Later rows of a causal prompt see more keys: in strips, what early rows cannot see is not computed.
_FEWEST_STRIPS = 4
# Logits in whose time the operators of a strip are called.
_STRIP_PAIRS = 6000.0


@METHODS.register("xattention")
@dataclass(frozen=True, kw_only=True)
class XAttention(Estimating):
    """Each block of queries keeps the fewest key blocks that hold a share of its estimated attention; drops the rest.

    The scores of `stride` x `stride` tokens are estimated by the sum along one anti-diagonal, which every vertical and
    every diagonal line crosses. A softmax over these sums, added up by blocks, is the attention of a block. Kept are
    the first block and the query's own (causal only, as published), then the blocks from the highest on until those
    before hold the share `threshold`. Text beside a video is kept whole (bidirectional). Ties go to the earlier block.

    Deviations from the published code: batches, grouped heads, float32 and any number of tokens (a sum at the end is
    over the tokens there are; the published code fails where the length is a multiple of its chunks); the first block
    never competes for the share (in the first chunk of queries of the published code, commit e379887, it does, so that
    one or two blocks more are kept per row there); one threshold for all heads (give heads their own by a profile);
    at threshold 1 everything is kept. With `density` (ours) every head has the threshold at which it keeps that share
    of the pairs: rows then still differ in what they keep, and inputs do not. In chunked prefill the blocks of queries
    begin at the chunk: choose chunks of whole blocks to get the blocks of the whole prompt.

    Formula:
        e(a, b) = sum over t < S of Q[a * S + S - 1 - t] . K[b * S + t] / (S * sqrt(dim)), S = stride
        score(r, c) = softmax over b of e(a, b), summed over a in r and b in c
        keep(r) = the first block, its own, and the fewest others so that `threshold` of the score is held

    When:
        Take it where single columns and diagonals matter and the budget may follow the content; with `density` also
        where the budget must be known ahead. Leave it where estimating would cost more than it saves: at short
        lengths.

    Args:
        threshold: share of the estimated attention that is kept, in (0, 1].
        stride: tokens along an anti-diagonal, at least 1; must divide the block size. Fewer estimate better: the
            estimate does 1 / `stride` of the products of queries and keys.
        block_size: tokens in a block of queries and of keys, a power of two from 16 to 256.
        density: share of the visible pairs that every head keeps, in (0, 1], in place of `threshold`; None means that
            `threshold` decides. The first block and each query's own are kept whatever it is.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Xu et al. 2025, XAttention (arXiv 2503.16428)"
    knob = Knob("threshold", 0.01, 1.0)

    threshold: float = 0.9
    stride: int = 16
    block_size: int = 128
    density: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "threshold", check_share("threshold", self.threshold))
        if self.density is not None:
            object.__setattr__(self, "density", check_share("density", self.density))
        check_block_size(self.block_size)
        if self.block_size % check_int("stride", self.stride, 1):
            raise ValueError(f"`stride` must divide `block_size` = {self.block_size}, got {self.stride}")

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The covering blocks of each head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: xattention chooses by content, got None")
        if self.density is not None:
            return self.pattern_by(self.estimate(q, k, ctx), ctx)
        strips = Strips(self, q, k, ctx)

        def keep(first: int, last: int) -> Tensor:
            forced, visible = strips.bounds(first, last)
            return covering(strips.scores(first, last), self.threshold, forced, visible) | strips.text(first, last)

        counts, blocks = gather_rows(keep, strips.shape, strips.weight, strips.fewest)
        return pattern_of_rows(counts, blocks, self.block_size, ctx.layout)

    def estimate_key(self) -> Hashable:
        """That of a density: a threshold keeps no map of all blocks; see Estimating."""
        return None if self.density is None else (self.name, self.stride, self.block_size)

    def estimate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """What would be missing of each row before a block: bfloat16 [batch, heads, rows, key blocks]."""
        strips = Strips(self, q, k, ctx)

        def missing(first: int, last: int) -> Tensor:
            forced, visible = strips.bounds(first, last)
            return share_missing(strips.scores(first, last), forced | strips.text(first, last), visible)

        return (whole_map(missing, strips.shape, q.device, strips.weight, strips.fewest),)

    def pattern_by(self, estimate: tuple[Tensor, ...], ctx: Context) -> BlockPattern:
        """The blocks of each head up to the threshold that keeps its density; see Estimating."""
        assert self.density is not None
        pairs = block_pairs(ctx.layout, self.block_size, estimate[0].device)
        counts, blocks = gather_share(estimate[0], pairs, self.density)
        return pattern_of_rows(counts, blocks, self.block_size, ctx.layout)

    def turned(self, value: float) -> Method:
        """With `density` at the value where there is one, else `threshold`; see Method.turned."""
        return replace(self, threshold=value) if self.density is None else replace(self, density=value)

    def least_density(self, ctx: Context) -> float:
        """The first block and the query's own, or a density less half a block; see Method.least_density."""
        least = least_of_row_blocks(ctx, self.block_size)
        if self.density is None:
            return least
        pairs = ctx.layout.q_len * ctx.layout.kv_len / (2 if ctx.layout.is_causal else 1)
        return max(least, self.density - 0.5 * self.block_size**2 / pairs)

    def choosing_pairs(self, ctx: Context) -> float:
        """One logit for each `stride` pairs, and what a strip takes whatever its size; see Method.choosing_pairs."""
        whole = ctx.layout.is_causal and not ctx.layout.query_start
        seen, strips = (0.5, _FEWEST_STRIPS) if whole else (1.0, 1)
        return seen * ctx.layout.q_len * ctx.layout.kv_len / self.stride + strips * _STRIP_PAIRS

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """By density, which holds on inputs that were not measured; see Method.candidates."""
        return [{"density": share, "stride": 8} for share in (1 / 16, 3 / 32, 1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """A low share with long anti-diagonals, a high one with short ones."""
        return [
            {"threshold": 0.5, "stride": 16, "block_size": 16},
            {"threshold": 0.9, "stride": 4, "block_size": 32},
            {"density": 0.25, "stride": 8, "block_size": 16},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """The whole attention."""
        return {"threshold": 1.0, "stride": 8, "block_size": 32}


class Strips:
    """The block scores of a call, some rows of query blocks at a time.

    Args:
        method: whose stride and block size.
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim].
        ctx: the call.
    """

    def __init__(self, method: XAttention, q: Tensor, k: Tensor, ctx: Context) -> None:
        self.size, self.stride, self.ctx = method.block_size, method.stride, ctx
        layout, size = ctx.layout, method.block_size
        queries, keys = q.detach(), k.detach()
        if not q.is_cuda:
            # Once for all strips.
            queries, keys = queries.float(), keys.float()
        self.queries, self.keys = queries, tiles_of(keys, self.stride, size).flip(3).flatten(3)
        self.shape = (q.shape[0], q.shape[1], -(-layout.q_len // size), -(-layout.kv_len // size))
        self.low, self.high = row_blocks(layout, size, q.device)
        self.block = torch.arange(self.shape[3], device=q.device)
        self.text_row, self.text_col = (t.to(q.device) for t in text_blocks(layout, size, size))
        # Scores of tiles that are held for one of a block, and the fewest strips.
        self.weight, self.fewest = (size // self.stride) ** 2, _FEWEST_STRIPS if layout.is_causal else 1

    def bounds(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Blocks that every row from `first` to `last` keeps, and those that it may keep, text rows left out."""
        if not self.ctx.layout.is_causal:
            forced = self.text_col.expand(last - first, -1)
            return forced, torch.ones_like(forced)
        begin, end = self.low[first:last, None], self.high[first:last, None]
        return (self.block == 0) | (self.block == begin) | (self.block == end), self.block <= end

    def text(self, first: int, last: int) -> Tensor:
        """Rows that hold text beside a video, which keep everything: bool [rows, 1]."""
        return self.text_row[first:last, None]

    def scores(self, first: int, last: int) -> Tensor:
        """Estimated attention of the rows from `first` to `last`: float32 [batch, heads, rows, key blocks]."""
        ctx, layout, size, stride = self.ctx, self.ctx.layout, self.size, self.stride
        per_block, blocks = size // stride, self.shape[3]
        seen = -(-(layout.query_start + last * size) // size) if layout.is_causal else blocks
        keys = self.keys[:, :, : min(seen, blocks) * per_block]
        query = tiles_of(self.queries[:, :, first * size : last * size], stride, size).flatten(3)
        rows = query.unflatten(1, (keys.shape[1], -1)).flatten(2, 3)
        logits = products(rows.flatten(0, 1), keys.flatten(0, 1).mT).mul_(ctx.softmax_scale / stride)
        if ctx.softcap:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        logits = logits.view(*query.shape[:3], keys.shape[2])
        at = layout.query_start + first * size + torch.arange(query.shape[2], device=query.device) * stride
        key = torch.arange(keys.shape[2], device=query.device) * stride
        hidden = (key > at[:, None]) if layout.is_causal else (key >= layout.kv_len)
        weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1)
        if last * size > layout.q_len:
            weights[:, :, at >= layout.kv_len] = 0
        # Rows first: that adds whole lines of memory.
        score = weights.unflatten(2, (-1, per_block)).sum(3).unflatten(3, (-1, per_block)).sum(4)
        return torch.nn.functional.pad(score, (0, blocks - score.shape[3]))


def tiles_of(x: Tensor, stride: int, size: int) -> Tensor:
    """Tokens in groups of `stride`, with zeros up to a whole block: [batch, heads, tiles, stride, dim].

    Args:
        x: [batch, heads, tokens, dim].
        stride: tokens in a tile.
        size: tokens in a block, a multiple of `stride`.
    """
    missing = -x.shape[2] % size
    if missing:
        x = torch.nn.functional.pad(x, (0, 0, 0, missing))
    return x.unflatten(2, (-1, stride))


def products(a: Tensor, b: Tensor) -> Tensor:
    """Matrix products in float32, [n, rows, dim] times [n, dim, cols]."""
    # Half precision products added up in float32 are exact enough, and a CUDA device has fast units for them alone.
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16) and torch.version.hip is None:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.bmm(a.float(), b.float())
