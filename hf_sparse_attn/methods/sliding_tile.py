"""Sliding tile attention: a video cut into tiles, and each tile of queries reads the tiles around it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import CHUNK, distinct_tiles
from hf_sparse_attn.pattern.video_tiles import Cut, Sizes, check_sizes, cut_video, tile_for
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_block_size, check_share

Window = float | Sizes


@METHODS.register("sliding_tile")
@dataclass(frozen=True, kw_only=True)
class SlidingTile(Method):
    """Each tile of a video reads a window of whole tiles around it; near the edges the window is moved, not cut.

    Tokens are re-ordered tile by tile. In each dimension of n tiles, with a window of K, the tile at t reads those at
    most K // 2 away from t clamped to [K // 2, n - 1 - K // 2], so that all tiles read equally many; all else is
    dropped. Text is kept whole, by all queries and for all keys. Each head may have a window of its own.

    An even K reads K + 1 tiles, unless K >= n, which reads all: so in the published code, and kept, as published
    windows and densities rest on it.

    Deviations from the published code: any canvas (there 18x48x80, 30x48x80 and 36x48x48): the last tiles of a
    dimension are smaller where the tile does not divide it, and tiles of equal size follow one another in the order,
    the largest first; text may stand before the video, too, and is not padded to a tile; a window given as a share.
    That share is ours: beginning with one tile, the window grows by a tile on either side in the dimension of which
    it covers the smallest part (the earlier one where equal), as long as no more than the share of all pairs of video
    tokens is kept. So no dimension lags behind, and a larger share keeps all that a smaller one does.

    Formula:
        keep the tile t for queries in tile s: |t - clamp(s, K // 2, n - 1 - K // 2)| <= K // 2
        in each of frames, height and width, with n tiles and a window of K

    When:
        Take it for video models with a window for each head, found by `hsa.profile` or published: nothing is
        estimated, and whole tiles run at full speed. Leave it where heads look far along one axis only: svg and
        radial follow these more cheaply.

    Args:
        window: (frames, height, width) in tiles, each at least 1, or a share in (0, 1] as a float, for all heads; or
            a tuple with one of these for each head.
        tile: (frames, height, width) of a tile in tokens, each at least 1; larger than the canvas means the canvas.
        block_size: tokens in a block of the pattern, a power of two from 16 to 256; does not change what is kept.
            Best where it divides the tokens of a tile.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Zhang et al. 2025, Fast Video Generation with Sliding Tile Attention (ICML 2025, arXiv 2502.04507)"
    needs = frozenset({"bidirectional", "video grid"})
    static = True
    knob = Knob("window", 1 / 256, 1.0, log=True)

    window: Window | tuple[Window, ...] = (3, 3, 3)
    tile: Sizes = (6, 8, 8)
    block_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "tile", check_sizes("tile", self.tile))
        window: Any = self.window
        if _is_window(window):
            window = _check_window(window)
        elif isinstance(window, (list, tuple)) and len(window):
            window = tuple(map(_check_window, window))
        else:
            window = _check_window(window)
        object.__setattr__(self, "window", window)
        check_block_size(self.block_size)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Whole blocks, with a mask where a block lies in several tiles; see Method.pattern.

        Raises:
            ValueError: `window` is for another number of heads.
        """
        layout = ctx.layout
        if layout.video_part is None:
            return Decline("sliding_tile needs exactly one video segment")
        if layout.query_start:
            return Decline("sliding_tile needs all tokens as queries")
        windows, size = self._windows(ctx), self.block_size
        tiling = _tiling(layout, self.tile)
        distinct = sorted(set(windows))
        known = BlockPattern.stack_heads([_window_pattern(tiling, window, layout.kv_len, size) for window in distinct])
        found = _take_heads(known, [distinct.index(window) for window in windows]) if len(distinct) > 1 else known
        order = _order(layout, tiling)
        if torch.equal(order, torch.arange(layout.kv_len)):
            return found
        return replace(found, q_order=order[None, None], kv_order=order[None, None])

    def _windows(self, ctx: Context) -> list[Sizes]:
        """Tiles that a tile reads in each dimension: one window for all heads, or one for each."""
        tiling = _tiling(ctx.layout, self.tile)
        if _is_window(self.window):
            return [tiling.extents(self.window)]  # type: ignore[arg-type]
        given: Any = self.window
        if len(given) != ctx.num_heads:
            raise ValueError(f"`window` must be one for each of the {ctx.num_heads} heads, got {len(given)}")
        return [tiling.extents(window) for window in given]

    def least_density(self, ctx: Context) -> float:
        """What is kept, exactly; see Method.least_density."""
        layout = ctx.layout
        if layout.video_part is None or layout.query_start:
            return 0.0
        tokens, video = layout.kv_len, layout.video_part[1].length
        tiling, windows = _tiling(layout, self.tile), self._windows(ctx)
        kept = sum(map(tiling.pairs, windows)) / len(windows)
        return (tokens**2 - video**2 + kept) / tokens**2

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Shares of the canvas; see Method.candidates."""
        return [{"window": share, "tile": tile_for(layout)} for share in (1 / 32, 1 / 8, 1 / 4)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Tiles of a block, tiles that straddle blocks, and a share."""
        return [
            {"window": (1, 3, 2), "tile": (2, 2, 4), "block_size": 16},
            {"window": (3, 1, 3), "tile": (2, 3, 5), "block_size": 32},
            {"window": 0.3, "tile": (1, 4, 4), "block_size": 16},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """A window of the whole canvas."""
        return {"window": 1.0, "tile": (2, 4, 4), "block_size": 32}


class Tiling(Cut):
    """A canvas cut into tiles, and windows over them."""

    @property
    def shape(self) -> Sizes:
        """Number of tiles in each dimension."""
        frames, height, width = map(len, self.sizes)
        return frames, height, width

    def reads(self, window: Sizes) -> list[tuple[Tensor, Tensor]]:
        """For each dimension the first tile that a tile reads and the one after the last, int64 [tiles]."""
        found = []
        for count, extent in zip(self.shape, window, strict=True):
            start = (torch.arange(count) - extent // 2).clamp(0, count - extent)
            found.append((start, start + extent))
        return found

    def pairs(self, window: Sizes) -> int:
        """Pairs of tokens of the video that a window keeps."""
        kept = 1
        for sizes, (start, stop) in zip(self.sizes, self.reads(window), strict=True):
            before = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
            kept *= int((sizes * (before[stop] - before[start])).sum())
        return kept

    def extents(self, window: Window) -> Sizes:
        """Tiles that are read in each dimension, for a window as the user gives it."""
        shape = self.shape
        if isinstance(window, tuple):
            frames, height, width = (
                n if size >= n else min(n, size // 2 * 2 + 1) for size, n in zip(window, shape, strict=True)
            )
            return frames, height, width
        most = window * self.pairs(shape)
        found: Sizes = (1, 1, 1)
        while found != shape:
            dim = min((d for d in range(3) if found[d] < shape[d]), key=lambda d: found[d] / shape[d])
            frames, height, width = (min(shape[d], found[d] + 2 * (d == dim)) for d in range(3))
            if self.pairs((frames, height, width)) > most:
                break
            found = frames, height, width
        return found


@lru_cache(maxsize=16)
def _tiling(layout: TokenLayout, tile: Sizes) -> Tiling:
    """The video of a layout in tiles."""
    if layout.video_part is None or layout.video_part[1].grid is None:
        raise ValueError(f"`layout` must have exactly one video segment, got {layout}")
    return Tiling(*cut_video(layout.video_part[1].grid, tile))


def _order(layout: TokenLayout, tiling: Tiling) -> Tensor:
    """The token at each place, int64 [tokens]: the video tile by tile, then all text."""
    start, video = layout.video_part or (0, layout.parts[0])
    before, after = torch.arange(start), torch.arange(start + video.length, layout.kv_len)
    return torch.cat([start + tiling.order, before, after])


def _window_pattern(tiling: Tiling, window: Sizes, tokens: int, size: int) -> BlockPattern:
    """One head over places: the blocks that a window keeps a part of, with a mask where it is not the whole.

    Args:
        tiling: the video.
        window: tiles read in each dimension.
        tokens: number of tokens, text included.
        size: tokens in a block.
    """
    rows, text = -(-tokens // size), len(tiling.coordinates)
    tile_at = torch.nn.functional.pad(tiling.tile_at, (0, tokens - len(tiling.tile_at)), value=text)
    # What does not exist behind the last token goes with it.
    blocks = torch.cat([tile_at, tile_at[-1:].expand(rows * size - tokens)]).view(rows, size)
    # A block is cut where a tile ends: all tokens of a piece read and are read alike.
    piece = blocks.diff(dim=1, prepend=blocks[:, :1]).ne(0).cumsum(1)
    pieces = int(piece.max()) + 1
    tile_of = blocks[:, -1:].repeat(1, pieces).scatter_(1, piece, blocks)
    cuts, cut = piece.unique(dim=0, return_inverse=True)

    found: list[tuple[Tensor, Tensor, Tensor]] = []
    step = max(1, CHUNK // (rows * pieces**2))
    for first in range(0, rows, step):
        query, key = tile_of[first : first + step, None, :, None], tile_of[:, None, :]
        kept = (query == text) | (key == text)
        near = torch.ones_like(kept)
        for (start, stop), at in zip(tiling.reads(window), tiling.coordinates.unbind(1), strict=True):
            # Text has no place of its own: any will do, as it is kept anyway.
            at = torch.nn.functional.pad(at, (0, 1))
            near &= (start[at[query]] <= at[key]) & (at[key] < stop[at[query]])
        kept = (kept | near).flatten(2)
        row, col = kept.any(-1).nonzero().unbind(1)
        found.append((row + first, col, kept[row, col]))
    row, col, kept = (torch.cat(part) for part in zip(*found, strict=True))
    tile_ids, tiles = _masks(kept, cut[row], cut[col], cuts)
    counts = torch.bincount(row, minlength=rows)[None, None]
    return BlockPattern.from_rows(counts, col * size, size, size, tokens, tokens, tile_ids, tiles)


def _masks(kept: Tensor, row_cut: Tensor, col_cut: Tensor, cuts: Tensor) -> tuple[Tensor, Tensor]:
    """Tile ids [blocks] and tiles of blocks from what their pieces keep.

    Args:
        kept: bool [blocks, pieces * pieces], for each pair of a piece of queries and one of keys.
        row_cut, col_cut: int64 [blocks], how the queries and the keys are cut: places in `cuts`.
        cuts: int64 [kinds, size], the piece of each token of a block.
    """
    ids = torch.zeros(len(kept), dtype=torch.int64)
    part = (~kept.all(1)).nonzero()[:, 0]
    pieces = math.isqrt(kept.shape[1])
    # Blocks that are cut and kept alike have one mask, drawn once.
    alike = torch.cat([row_cut[part, None], col_cut[part, None], kept[part]], 1)
    kinds, kind = alike.unique(dim=0, return_inverse=True)
    query, key = cuts[kinds[:, 0]], cuts[kinds[:, 1]]
    masks = kinds[:, 2:].bool().gather(1, (query[:, :, None] * pieces + key[:, None]).flatten(1))
    tiles, tile = distinct_tiles(masks.unflatten(1, (cuts.shape[1], -1)))
    ids[part] = tile[kind]
    return ids, tiles


def _take_heads(p: BlockPattern, heads: list[int]) -> BlockPattern:
    """The pattern whose heads are those of `p` with these numbers; a head may be taken more than once."""
    own = [slice(int(p.indptr[0, h, 0]), int(p.indptr[0, h, -1])) for h in heads]
    starts, tile_ids = (torch.cat([t[part] for part in own]) for t in (p.starts, p.tile_ids))
    counts = p.row_counts()[:, heads]
    return BlockPattern.from_rows(counts, starts, p.block_q, p.block_k, p.q_len, p.kv_len, tile_ids, p.tiles)


def _is_window(value: object) -> bool:
    """Whether this is one window, not one for each head."""
    if isinstance(value, (list, tuple)):
        return len(value) == 3 and all(isinstance(n, int) for n in value)
    return isinstance(value, float)


def _check_window(value: Any) -> Window:
    if isinstance(value, float):
        return check_share("window", value)
    if not isinstance(value, (list, tuple)):
        raise TypeError(
            f"`window` must be (frames, height, width) in tiles, a share as a float, or one of these per head, "
            f"got {value!r} of type {type(value).__name__}"
        )
    return check_sizes("window", value)
