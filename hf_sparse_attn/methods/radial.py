"""Radial attention: in a video, the farther apart two frames, the fewer tokens of one see tokens of the other."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_block_size, text_blocks

# A pair of frames whose band would be narrower than this is kept only at some distances.
_NARROWEST_BAND = 128
# A block of a pair is kept if in more than _BLOCK_SHARE of the columns that the band touches at all, more than
# _COLUMN_SHARE of the rows are in the band.
_COLUMN_SHARE, _BLOCK_SHARE = 1 / 3, 0.6


@METHODS.register("radial")
@dataclass(frozen=True, kw_only=True)
class Radial(Method):
    """Each pair of frames keeps a diagonal band whose width halves as their distance doubles; far pairs thin out.

    For frames d apart, of T tokens each, with P the power of two above T and g = bit_length(d): the pair is kept if
    P / 2^g >= 128, else only where d is a multiple of int(128 * 2^g / P). Token offsets k, l in the frames see each
    other if |k - l| <= w, with w = max(block_size, decay * P / 2^g) from d = 2 on, T within a frame. Blocks are kept
    by their share in the band. Wan keeps all of the first frame besides, for every query. Text is kept whole. The same
    for all heads, layers and steps; no token order is changed.

    Deviations from the published code: any number of tokens and frames, text on either side; the last block of a
    frame that begins inside a block is counted as well (there it is cut off), and the block of the query itself is
    always kept: both change nothing where T is a multiple of block_size. `decay=inf` keeps everything. Frames too
    small for the rounding to keep anything (T at most a third of block_size) are declined.

    Formula:
        d = frames apart, g = bit_length(d), P = power of two above T, k and l = places in the two frames
        keep the pair of frames: P / 2^g >= 128, or d mod int(128 * 2^g / P) = 0
        keep the tokens: |k - l| <= max(block_size, decay * P / 2^g) for d >= 2; T within a frame

    When:
        Take it for long clips of Wan and HunyuanVideo, with the presets: nothing is estimated, and its share falls
        as the clip grows. Leave it for clips of few or small frames, whose bands are as wide as a block.

    Args:
        decay: factor on the width of the bands, more than 0; 0.2 for Wan 2.1, 0.8 for Wan 2.2, 0.95 for Hunyuan.
        block_size: tokens in a block, a power of two from 16 to 256.
        variant: "wan" (first frame kept) or "hunyuan" (neighbouring frames kept whole).
        rule: "release" (neighbouring frames of Wan have half width T // 2) or "head" (T), as changed later.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Li et al. 2025, Radial Attention (NeurIPS 2025, arXiv 2506.19852)"
    needs = frozenset({"bidirectional", "video grid"})
    static = True
    knob = Knob("decay", 1e-3, 1e3, log=True)

    decay: float = 0.2
    block_size: int = 128
    variant: Literal["wan", "hunyuan"] = "wan"
    rule: Literal["release", "head"] = "release"

    def __post_init__(self) -> None:
        if isinstance(self.decay, bool) or not isinstance(self.decay, (int, float)):
            raise TypeError(f"`decay` must be a number, got {self.decay!r} of type {type(self.decay).__name__}")
        if not self.decay > 0:
            raise ValueError(f"`decay` must be more than 0, got {self.decay}")
        check_block_size(self.block_size)
        for name, value, known in (
            ("variant", self.variant, ("wan", "hunyuan")),
            ("rule", self.rule, ("release", "head")),
        ):
            if value not in known:
                raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}{nearest(value, known)}")

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """One head of aligned, whole blocks; see Method.pattern."""
        layout, size = ctx.layout, self.block_size
        if layout.video_part is None:
            return Decline("radial needs exactly one video segment")
        if layout.query_start:
            return Decline("radial needs all tokens as queries")
        start, video = layout.video_part
        assert video.grid is not None
        frames, per_frame = video.grid[0], video.length // video.grid[0]
        blocks = -(-layout.kv_len // size)
        keep = torch.zeros(blocks, blocks, dtype=torch.bool)
        if math.isinf(self.decay):
            keep[:] = True
        elif per_frame * 3 <= size:
            return Decline(f"radial needs more than block_size / 3 = {size / 3:.0f} tokens per frame, got {per_frame}")
        else:
            self._mark_frames(keep, start, frames, per_frame)
        whole = layout.kv_len // size
        # The published rule keeps the short last block and text whole; a block with any text counts as text here.
        keep[whole:], keep[:, whole:] = True, True
        text_rows, text_cols = text_blocks(layout, size, size)
        keep[text_rows], keep[:, text_cols] = True, True
        keep.fill_diagonal_(True)
        return BlockPattern.from_block_map(keep[None, None], size, size, layout.kv_len, layout.kv_len)

    def _mark_frames(self, keep: Tensor, start: int, frames: int, per_frame: int) -> None:
        """Sets the blocks kept by every pair of frames, a few query frames at a time."""
        size = self.block_size
        begin = start + torch.arange(frames) * per_frame
        first, offset = begin // size, begin % size
        # The blocks that a frame touches when it begins at the last place of one.
        width = (size - 1 + per_frame - 1) // size + 1
        for query in range(frames):
            distance = (torch.arange(frames) - query).abs()
            half, kept = self._bands(distance, per_frame)
            if self.variant == "wan":
                half[0], kept[0] = per_frame, True
            key = kept.nonzero()[:, 0]
            if not len(key):
                continue
            # Pairs with equal width and equal key offset have equal patches: each is worked out once.
            kinds, kind = torch.stack([half[key], offset[key].double()], 1).unique(dim=0, return_inverse=True)
            patch = self._patches(int(offset[query]), kinds[:, 1].long(), kinds[:, 0], per_frame, width)[kind]
            pair, row, col = patch.nonzero().unbind(1)
            row, col = row + first[query], col + first[key][pair]
            inside = (row < len(keep)) & (col < len(keep))
            keep[row[inside], col[inside]] = True

    def _bands(self, distance: Tensor, per_frame: int) -> tuple[Tensor, Tensor]:
        """Half width of the band for each distance between frames, float64, and whether the pair is kept at all."""
        above = float(1 << per_frame.bit_length())
        doubled = torch.tensor([float(1 << int(d).bit_length()) for d in distance], dtype=torch.float64)
        band = above / doubled
        every = (_NARROWEST_BAND / band).long().clamp(min=1)
        kept = (band >= _NARROWEST_BAND) | (distance % every == 0)
        half = (self.decay * band).clamp(min=self.block_size)
        half[distance == 0] = per_frame
        narrow = self.variant == "wan" and self.rule == "release"
        half[distance == 1] = per_frame // 2 if narrow else per_frame
        return half, kept

    def _patches(self, row_offset: int, col_offset: Tensor, half: Tensor, tokens: int, width: int) -> Tensor:
        """Which blocks a pair of frames keeps, bool [pairs, width, width], from the ends of the band alone.

        Args:
            row_offset: place of the query frame's first token in its block.
            col_offset: int64 [pairs], the same for the key frames.
            half: float64 [pairs], half width of the band.
            tokens: tokens in a frame.
            width: blocks to look at in each direction.
        """
        size = self.block_size
        edge = torch.arange(width) * size
        # Query tokens [low, high) of the frame in each row of blocks, key tokens [left, right) in each column.
        low, high = ((edge + end - row_offset).clamp(0, tokens)[:, None] for end in (0, size))
        left, right = ((edge + end - col_offset[:, None]).clamp(0, tokens)[:, None] for end in (0, size))
        reach = half.floor().long()[:, None, None]

        def columns(rows: int) -> Tensor:
            """Columns of each block with at least `rows` rows in the band: an interval, as the band is convex."""
            first = torch.maximum(left, low + rows - 1 - reach)
            last = torch.minimum(right - 1, high + reach - rows)
            fits = (high - low >= rows) & (2 * reach + 1 >= rows)
            return (last - first + 1).clamp(min=0) * fits

        # More than a third of the rows; no power of two is a multiple of three.
        return columns(math.floor(size * _COLUMN_SHARE) + 1) / (columns(1) + 1e-9) > _BLOCK_SHARE

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """As it is; see Method.candidates."""
        return [{}]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Small blocks, both variants and rules."""
        return [
            {"decay": 0.5, "block_size": 32},
            {"decay": 1.0, "block_size": 16, "variant": "hunyuan", "rule": "head"},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Everything."""
        return {"decay": math.inf, "block_size": 32}
