"""Strided heads (Sparse Transformer, S2-Attention): neighbours and every n-th block, from an offset by head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import (
    amount_of,
    check_amount,
    check_block_size,
    gather_rows,
    pattern_of_rows,
    row_blocks,
    text_blocks,
)


@METHODS.register("strided")
@dataclass(frozen=True, kw_only=True)
class Strided(Method):
    """Each block of queries keeps its neighbours and every n-th block of keys, heads from different offsets.

    Row r keeps block c where |r - c| < local, c < sink, or (x + g * head_step + offset) mod stride is 0: x is c where
    `relative` is false (the same columns for all rows, S2-Attention) and |r - c| where it is true (diagonals, as in
    the Sparse Transformer, whose strided pair of heads in one is `local` = `stride`, `relative`, `head_step` 0). g is
    the key/value head. Causal layouts drop what comes after the query; text beside a video is kept whole.

    Deviations: the heads of a group share one offset and `head_step` counts groups, so that the keys of a group are
    read once (S2-Attention has the option and steps by query heads); blocks in place of the tokens of the Sparse
    Transformer; a relative stride counts from the query, that of S2-Attention where bidirectional from the edge of
    the window (here `offset` = (1 - local) % stride); `sink` is ours, pretrained models need it. The heads together
    see all keys only if there are at least `stride` key/value heads. In chunked prefill a row that begins within a
    key block keeps what the two blocks on which it lies would keep.

    Formula:
        keep(r, c): |r - c| < local, or c < sink, or (x + g * head_step + offset) mod stride = 0
        x = c, or |r - c| where relative; g = key/value head

    When:
        Take it for models that are trained with it, whose heads learn to share the work. Leave it for pretrained
        ones as they are: most of its far blocks are none that a head asked for.

    Args:
        local: neighbouring blocks, the row's own included (on both sides where bidirectional), at least 1; or, as a
            float in (0, 1), a share of the blocks of keys, which means the same at any length.
        stride: distance between the other blocks that are kept, at least 1 (all).
        sink: first blocks kept by every row, at least 0.
        offset: shift of all heads, at least 0.
        head_step: shift from a key/value head to the next, at least 0 (all alike); None means
            max(1, stride // key/value heads).
        relative: whether the stride is counted from the query; None means in bidirectional layouts only, as published.
        block_size: tokens in a block of queries and of keys, a power of two from 16 to 256.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Child et al. 2019, Sparse Transformer (arXiv 1904.10509); Lin et al. 2024, S2-Attention (2407.17678)"
    static = True
    decodes = True
    knob = Knob("stride", 1, 1024, log=True, integer=True)

    local: int | float = 16
    stride: int = 8
    sink: int = 0
    offset: int = 0
    head_step: int | None = None
    relative: bool | None = None
    block_size: int = 64

    def __post_init__(self) -> None:
        check_amount("local", self.local, 1)
        check_int("stride", self.stride, 1)
        check_int("sink", self.sink, 0)
        check_int("offset", self.offset, 0)
        if self.head_step is not None:
            check_int("head_step", self.head_step, 0)
        if self.relative is not None and not isinstance(self.relative, bool):
            kind = type(self.relative).__name__
            raise TypeError(f"`relative` must be True, False or None, got {self.relative!r} of type {kind}")
        check_block_size(self.block_size)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern:
        """Neighbours and strides as aligned blocks, one head for all where no offset differs; see Method.pattern."""
        layout, size = ctx.layout, self.block_size
        rows, cols = -(-layout.q_len // size), -(-layout.kv_len // size)
        local = amount_of(self.local, cols)
        low, high = row_blocks(layout, size)
        block = torch.arange(cols)
        text_row, text_col = text_blocks(layout, size, size)
        relative = not layout.is_causal if self.relative is None else self.relative
        step = max(1, self.stride // ctx.num_kv_heads) if self.head_step is None else self.head_step
        shift = (torch.arange(ctx.num_kv_heads) * step + self.offset) % self.stride
        if bool((shift == shift[0]).all()):
            shift = shift[:1]
        else:
            shift = shift.repeat_interleave(ctx.num_heads // ctx.num_kv_heads)
        shift = shift[:, None, None]

        def keep(first: int, last: int) -> Tensor:
            begin, end = low[first:last, None], high[first:last, None]
            if relative:
                strided = ((begin - block).abs() + shift) % self.stride == 0
                strided = strided | (((end - block).abs() + shift) % self.stride == 0)
            else:
                strided = (block + shift) % self.stride == 0
            near = (block > begin - local) & (block < end + local)
            kept = strided | near | (block < self.sink) | text_row[first:last, None] | text_col
            return (kept & (block <= end) if layout.is_causal else kept)[None]

        counts, blocks = gather_rows(keep, (1, len(shift), rows, cols))
        return pattern_of_rows(counts, blocks, size, layout)

    def cache_key(self, ctx: Context) -> tuple[Any, ...]:
        """The offsets depend on the heads; see Method.cache_key."""
        return (ctx.layout, ctx.num_heads, ctx.num_kv_heads)

    def least_density(self, ctx: Context) -> float:
        """The neighbours alone, of a prompt in whole blocks; see Method.least_density."""
        layout, size = ctx.layout, self.block_size
        blocks = layout.kv_len // size
        if layout.query_start or not blocks:
            return 0.0
        local = min(amount_of(self.local, -(-layout.kv_len // size)), blocks)
        pairs = local * blocks - local * (local - 1) // 2
        if layout.is_causal:
            kept = pairs * size**2 - blocks * size * (size - 1) // 2
            return kept / (layout.kv_len * (layout.kv_len + 1) / 2)
        return (2 * pairs - blocks) * size**2 / layout.kv_len**2

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Every few blocks; of both sides the row's own besides, as found best for images; see Method.candidates."""
        if layout.is_causal:
            return [{"local": 1 / 32, "stride": stride, "sink": 1} for stride in (8, 16)]
        return [{"local": 1, "stride": stride} for stride in (2, 3, 4, 6, 8)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Offsets by head, all heads alike with a sink, and the Sparse Transformer's."""
        return [
            {"local": 2, "stride": 4, "block_size": 16},
            {"local": 1, "stride": 5, "sink": 1, "offset": 2, "head_step": 0, "block_size": 32},
            {"local": 3, "stride": 3, "head_step": 0, "relative": True, "block_size": 16},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Every block."""
        return {"stride": 1, "block_size": 32}
