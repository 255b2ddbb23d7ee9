"""A video cut into tiles of frames x height x width: the order of tokens, means, and the pattern of chosen tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.context import TokenLayout, check_int
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time

Sizes = tuple[int, int, int]

# Sizes of a block of the pattern; what all backends take, and no larger than what fits into fast memory with ease.
_LEAST_BLOCK, _LARGEST_BLOCK = 16, 128
# Bits of a mask held in one integer.
_WORD = 62


def check_sizes(name: str, value: Any) -> Sizes:
    """Returns the sizes of a tile or a window, (frames, height, width), each at least 1."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"`{name}` must be (frames, height, width), got {value!r} of type {type(value).__name__}")
    if len(value) != 3:
        raise ValueError(f"`{name}` must be (frames, height, width), got {value!r}")
    frames, height, width = (check_int(name, n, 1) for n in value)
    return frames, height, width


def tile_for(layout: TokenLayout) -> Sizes:
    """A tile of about a sixth of the canvas along each side, at most the published (6, 8, 8)."""
    part = layout.video_part
    grid = (1, 1, 1) if part is None or part[1].grid is None else part[1].grid
    frames, height, width = (
        min(size, most, max(2, -(-size // 6))) for size, most in zip(grid, (6, 8, 8), strict=True)
    )
    return frames, height, width


class Cut(NamedTuple):
    """A canvas cut into tiles, the last of a dimension being smaller where the tile does not divide it.

    Args:
        sizes: tokens of each tile along each dimension: frames, height, width.
        coordinates: int64 [tiles, 3], the place of each tile on the canvas, in the order of the tiles: those of equal
            size follow one another, the largest first.
        tile_at: int64 [video tokens], the tile at each place of the order, ascending.
        order: int64 [video tokens], the token at each place.
    """

    sizes: tuple[Tensor, Tensor, Tensor]
    coordinates: Tensor
    tile_at: Tensor
    order: Tensor


def cut_video(grid: Sizes, tile: Sizes) -> Cut:
    """Cuts a canvas of `grid` tokens into tiles of `tile` tokens, from its first corner on."""
    sizes = [torch.tensor([min(t, n - i) for i in range(0, n, t)]) for n, t in zip(grid, tile, strict=True)]
    shape = [len(s) for s in sizes]
    volume = torch.einsum("a,b,c->abc", *sizes).flatten()
    ranked = torch.sort(volume, descending=True, stable=True).indices
    rank = torch.empty_like(ranked).scatter_(0, ranked, torch.arange(len(ranked)))
    at = torch.meshgrid(*(torch.arange(n) // t for n, t in zip(grid, tile, strict=True)), indexing="ij")
    tile_of = rank[((at[0] * shape[1] + at[1]) * shape[2] + at[2]).flatten()]
    order = torch.sort(tile_of, stable=True)
    coordinates = torch.stack(torch.unravel_index(ranked, shape), 1)
    return Cut((sizes[0], sizes[1], sizes[2]), coordinates, order.values, order.indices)


@dataclass(frozen=True, eq=False)
class VideoTiles:
    """The tokens of a layout with one video, in the order of its tiles; text comes after them.

    Args:
        start: first token of the video.
        counts: tokens in each tile, descending.
        order: int64 [tokens], the token at each place.
        tile_of: int64 [video tokens], the tile of each token of the video.
        tile_at: int64 [tokens], the tile at each place; that of text is the number of tiles.
        block, block_k: tokens in a block of queries and of keys of the pattern.
    """

    start: int
    counts: tuple[int, ...]
    order: Tensor
    tile_of: Tensor
    tile_at: Tensor
    block: int
    block_k: int

    @property
    def tiles(self) -> int:
        """Number of tiles."""
        return len(self.counts)

    @property
    def tokens(self) -> int:
        """Number of tokens of the video."""
        return len(self.tile_of)

    def means(self, x: Tensor) -> Tensor:
        """Mean of the tokens that each tile has, in float32 (float64 for float64).

        Args:
            x: [batch, heads, tokens, dim], text included.

        Returns:
            [batch, heads, tiles, dim].
        """
        placed = x.index_select(2, self.order[: self.tokens])
        parts, at = [], 0
        # One mean for all tiles of a size: sums by index would depend on the order in which a GPU adds.
        for size, group in groupby(self.counts):
            end = at + size * len(list(group))
            part = placed[:, :, at:end].unflatten(2, (-1, size))
            parts.append(part.mean(3, dtype=torch.promote_types(x.dtype, torch.float32)))
            at = end
        return torch.cat(parts, 2)


def video_tiles(layout: TokenLayout, tile: Sizes, device: torch.device | str = "cpu") -> VideoTiles:
    """The tiles of the video of a layout; kept for a few layouts.

    Args:
        layout: with exactly one video segment.
        tile: (frames, height, width) of a tile in tokens; larger than the canvas means the canvas.
        device: of the tensors.

    Raises:
        ValueError: the layout has no video, or more than one.
    """
    return _video_tiles(layout, tile, torch.device(device))


@lru_cache(maxsize=16)
def _video_tiles(layout: TokenLayout, tile: Sizes, device: torch.device) -> VideoTiles:
    if layout.video_part is None or layout.video_part[1].grid is None:
        raise ValueError(f"`layout` must have exactly one video segment, got {layout}")
    start, video = layout.video_part
    grid = layout.video_part[1].grid
    cut = cut_video(grid, tile)
    counts = torch.bincount(cut.tile_at)
    tile_of = torch.empty_like(cut.order).scatter_(0, cut.order, cut.tile_at)
    text = torch.cat([torch.arange(start), torch.arange(start + video.length, layout.kv_len)])
    tile_at = torch.nn.functional.pad(cut.tile_at, (0, len(text)), value=len(counts))
    largest = int(counts[0])
    # The largest power of two that divides a whole tile: its blocks then hold no other.
    block = max(_LEAST_BLOCK, min(_LARGEST_BLOCK, largest & -largest))
    ragged = largest > int(counts[-1])
    return VideoTiles(
        start,
        tuple(counts.tolist()),
        torch.cat([cut.order + start, text]).to(device),
        tile_of.to(device),
        tile_at.to(device),
        block,
        # Of two small tiles instead of four in a block of keys, the masks are few; see tile_pattern.
        max(_LEAST_BLOCK, block // 2) if ragged else block,
    )


class _Pieces(NamedTuple):
    """Blocks by the number of tiles that they lie in. All tokens of a piece, a part of a block in one tile, are alike.

    Args:
        groups: (blocks int64 [n], their tiles int64 [n, pieces]) for each number of pieces.
        first, last: int64 [blocks], the tiles of the first and of the last token.
        cut: int64 [blocks], how a block is cut: a row of `cuts`.
        cuts: int64 [kinds, block], the piece of each token.
        most: largest number of pieces.
    """

    groups: tuple[tuple[Tensor, Tensor], ...]
    first: list[int]
    last: list[int]
    cut: Tensor
    cuts: Tensor
    most: int


@lru_cache(maxsize=16)
def _pieces(tiles: VideoTiles, size: int) -> _Pieces:
    at = tiles.tile_at
    rows = -(-len(at) // size)
    # What does not exist behind the last token goes with it.
    blocks = torch.cat([at, at[-1:].expand(rows * size - len(at))]).view(rows, size)
    piece = blocks.diff(dim=1, prepend=blocks[:, :1]).ne(0).cumsum(1)
    number = piece[:, -1] + 1
    most = int(number.max())
    tile_of = blocks[:, -1:].repeat(1, most).scatter_(1, piece, blocks)
    cuts, cut = piece.unique(dim=0, return_inverse=True)
    members = [(number == n).nonzero()[:, 0] for n in number.unique().tolist()]
    groups = tuple((own, tile_of[own, : int(number[own[0]])]) for own in members)
    return _Pieces(groups, blocks[:, 0].tolist(), blocks[:, -1].tolist(), cut, cuts, most)


def tile_pattern(tiles: VideoTiles, choose: Callable[[int, int], Tensor], batch: int, heads: int) -> BlockPattern:
    """The pattern in which the tokens of a tile read those of the tiles chosen for it; text reads and is read whole.

    Exact to the token. A block that lies in several tiles has a mask where it is not kept whole; of equal masks there
    is one, and there are none where the tile divides the canvas. Else p small tiles in a block of queries and k in one
    of keys make up to 2^(p k) masks, which is why blocks of keys are half as long there: with random scores, for 12
    heads of 21 x 45 x 80 tokens in tiles of 4 x 4 x 4, masks of 13 MB beside blocks of 33 MB (122 MB beside 19 MB with
    blocks of one length).

    Args:
        tiles: the tokens.
        choose: (first, last tile of queries) -> bool [batch, heads, last - first, tiles].
        batch, heads: as `choose` gives them.
    """
    queries, keys, text = _pieces(tiles, tiles.block), _pieces(tiles, tiles.block_k), tiles.tiles
    device, rows, columns = tiles.order.device, len(queries.first), len(keys.first)
    step = at_a_time(batch * heads * (text + 1) * queries.most)
    parts, drawn, found = [], [], 0
    for first in range(0, rows, step):
        last = min(first + step, rows)
        low, high = queries.first[first], queries.last[last - 1]
        chosen = choose(low, min(high + 1, text))
        chosen = torch.nn.functional.pad(chosen, (0, 1), value=True)
        if high == text:
            chosen = torch.nn.functional.pad(chosen, (0, 0, 0, 1), value=True)
        # Number of the mask: -1 for blocks that are not kept, 0 for whole ones.
        ids = torch.full((batch, heads, last - first, columns), -1, dtype=torch.int64, device=device)
        for own, own_tiles in queries.groups:
            mine = (own >= first) & (own < last)
            query, of_query = own[mine], own_tiles[mine] - low
            if not len(query):
                continue
            read = chosen[:, :, of_query]
            for key, of_key in keys.groups:
                kept = read[..., of_key].transpose(3, 4).flatten(-2)
                whole = kept.all(-1)
                ids[:, :, query[:, None] - first, key] = torch.where(whole, 0, -1)
                if kept.shape[-1] == 1:
                    continue
                b, h, i, j = (kept.any(-1) & ~whole).nonzero().unbind(1)
                ids[b, h, query[i] - first, key[j]] = found + 1 + torch.arange(len(b), device=device)
                found += len(b)
                cut = queries.cut[query[i]] * len(keys.cuts) + keys.cut[key[j]]
                drawn.append(_packed(cut, kept[b, h, i, j], of_key.shape[1], (queries.most, keys.most)))
        kept = ids >= 0
        column = torch.arange(columns, device=device).expand_as(kept)
        parts.append((kept.sum(-1), column[kept], ids[kept]))
    counts, column, ids = _joined(parts)
    masks, ids = _masks(drawn, ids, queries, keys)
    length, sizes = len(tiles.order), (tiles.block, tiles.block_k)
    pattern = BlockPattern.from_rows(counts, column * tiles.block_k, *sizes, length, length, ids, masks)
    order = tiles.order[None, None]
    return replace(pattern, q_order=order, kv_order=order)


def _packed(cut: Tensor, kept: Tensor, columns: int, most: tuple[int, int]) -> Tensor:
    """What masks are told apart by: how queries and keys are cut, and the bits of the pairs of pieces that are kept.

    Args:
        cut: int64 [n].
        kept: bool [n, rows of pieces * columns].
        columns: pieces of the keys.
        most: pieces that a block of queries, and one of keys, has at most; bit i * most[1] + j is that of pieces i
            and j.

    Returns:
        int64 [n, 1 + words].
    """
    words = [cut]
    place = torch.arange(kept.shape[1], device=kept.device)
    bit = place // columns * most[1] + place % columns
    for word in range(-(-(most[0] * most[1]) // _WORD)):
        here = bit // _WORD == word
        words.append((kept[:, here].long() << bit[here] % _WORD).sum(1))
    return torch.stack(words, 1)


def _joined(parts: list[tuple[Tensor, Tensor, Tensor]]) -> tuple[Tensor, Tensor, Tensor]:
    """Counts [batch, heads, rows], columns and masks of all strips of rows, head after head and row after row."""
    if len(parts) == 1:
        return parts[0]
    counts = torch.cat([count for count, _, _ in parts], 2)
    row_of, at = [], 0
    number = torch.arange(counts.numel(), device=counts.device).view_as(counts)
    for count, _, _ in parts:
        rows = number[:, :, at : at + count.shape[2]].flatten()
        row_of.append(torch.repeat_interleave(rows, count.flatten()))
        at += count.shape[2]
    order = torch.sort(torch.cat(row_of), stable=True).indices
    return counts, torch.cat([c for _, c, _ in parts])[order], torch.cat([m for _, _, m in parts])[order]


def _masks(drawn: list[Tensor], ids: Tensor, queries: _Pieces, keys: _Pieces) -> tuple[Tensor, Tensor]:
    """The masks, bool [masks, queries, keys], of which the first is all true, and the one of each block.

    Args:
        drawn: for each block with a mask what `_packed` gives, in the order of their numbers, from 1 on.
        ids: int64 [blocks], their numbers, 0 for a whole block.
        queries, keys: how blocks are cut.
    """
    full = torch.ones(1, queries.cuts.shape[1], keys.cuts.shape[1], dtype=torch.bool, device=ids.device)
    if not sum(map(len, drawn)):
        return full, ids
    kinds, kind = torch.cat(drawn).unique(dim=0, return_inverse=True)
    most, total = keys.most, len(keys.cuts)
    query, key = queries.cuts[kinds[:, 0] // total], keys.cuts[kinds[:, 0] % total]
    bit = torch.arange(queries.most * most, device=ids.device)
    kept = (kinds[:, 1:].gather(1, (bit // _WORD).expand(len(kinds), -1)) >> bit % _WORD & 1).bool()
    masks = kept.gather(1, (query[:, :, None] * most + key[:, None]).flatten(1)).unflatten(1, full.shape[1:])
    return torch.cat([full, masks]), torch.nn.functional.pad(kind + 1, (1, 0))[ids]
