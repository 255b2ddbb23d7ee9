"""Key blocks that every query chooses for itself, as a pattern: what methods keep that models are trained with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.selection import rank_descending

# Queries in a row of the pattern. Few enough that their choices, one bit each, make a bounded table of tiles.
_ROW = 16
# Most keys in a block of the pattern, and fewest that a kernel likes.
_MOST_KEYS, _FEWEST_KEYS = 64, 16


def pattern_by_query(
    keep: Callable[[int, int], Tensor],
    shape: tuple[int, int, int, int],
    size: int,
    layout: TokenLayout,
    group: int = 1,
) -> BlockPattern:
    """The exact pattern of queries that choose aligned blocks of keys one by one, cut at the diagonal.

    Queries go in rows of 16; a block of keys that some of a row have chosen gets a tile which holds, query by query,
    whether it did. No tile is stored twice, and there is no map of all queries and keys.

    Args:
        keep: (first query, last query) -> bool [batch, heads, queries, blocks]: which blocks each query reads.
        shape: (batch, heads, queries, blocks) of all queries.
        size: keys in a block, at least 1.
        layout: the tokens, causal.
        group: query heads for each head of `keep`, which share its choice.
    """
    batch, heads, queries, _ = shape
    rows = -(-queries // _ROW)
    flat, block, bits = _chosen(keep, shape, rows)
    width = _key_block(size)
    row = flat % rows
    query = layout.query_start + row * _ROW
    # A block that is wider than the pattern's is as many of them, one after another.
    start = block[:, None] * size + torch.arange(0, size, width, device=block.device)
    last = (query + _ROW - 1).clamp(max=layout.kv_len - 1)
    seen = start <= last[:, None]
    spread = (flat[:, None].expand_as(start)[seen], start[seen], bits[:, None].expand_as(start)[seen])
    distance = (query[:, None] - start)[seen].clamp(max=width - 1)
    flat, start, tile_ids, tiles = _tiles(*spread, distance, width)
    counts = torch.bincount(flat, minlength=batch * heads * rows).view(batch, heads, rows)
    if group > 1:
        order = _repeated(counts.sum(-1).flatten(), group)
        counts, start, tile_ids = counts.repeat_interleave(group, 1), start[order], tile_ids[order]
    return BlockPattern.from_rows(counts, start, _ROW, width, layout.q_len, layout.kv_len, tile_ids, tiles)


def best_places(scores: Tensor, counts: Tensor | int) -> Tensor:
    """Which elements of each row are its best, ties by lower index: bool like `scores`.

    Args:
        scores: [..., n]; those of -inf are never among the best.
        counts: how many of each row, [...] or one number.
    """
    order = rank_descending(scores)
    place = torch.arange(scores.shape[-1], device=scores.device)
    among = place < (counts if isinstance(counts, int) else counts[..., None])
    best = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, among.expand_as(order))
    return best & (scores > -torch.inf)


def block_means(x: Tensor, size: int) -> Tensor:
    """Mean of each whole block of `size` tokens, at least in float32: [batch, heads, blocks, dim]; differentiable."""
    whole = x.shape[2] // size * size
    return x[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=torch.promote_types(x.dtype, torch.float32))


def grouped_products(q: Tensor, means: Tensor) -> Tensor:
    """Products of queries with the means of keys of their group, [batch, heads, queries, blocks], in their dtype."""
    grouped = q.to(means.dtype).unflatten(1, (means.shape[1], -1))
    return (grouped @ means[:, :, None].mT).flatten(1, 2)


def _chosen(
    keep: Callable[[int, int], Tensor], shape: tuple[int, int, int, int], rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Row over all heads, block, and one bit for each query of the row that chose it, in the order of the rows."""
    batch, heads, queries, blocks = shape
    step = at_a_time(batch * heads * blocks * _ROW)
    parts = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        kept = keep(first * _ROW, min(last * _ROW, queries))
        kept = torch.nn.functional.pad(kept, (0, 0, 0, (last - first) * _ROW - kept.shape[2]))
        lane = 1 << torch.arange(_ROW, dtype=torch.int32, device=kept.device)
        bits = (kept.unflatten(2, (-1, _ROW)) * lane[:, None]).sum(3, dtype=torch.int32)
        item, head, row, block = bits.nonzero(as_tuple=True)
        parts.append(((item * heads + head) * rows + first + row, block, bits[item, head, row, block].long()))
    flat, block, found = (torch.cat(part) for part in zip(*parts, strict=True))
    if len(parts) > 1:
        # A strip holds rows of all heads; the pattern goes head by head.
        order = flat.argsort(stable=True)
        flat, block, found = flat[order], block[order], found[order]
    # Queries that do not exist choose everything, or the last row would have no whole block.
    spare = -queries % _ROW
    found = torch.where(flat % rows == rows - 1, found | ((1 << _ROW) - (1 << (_ROW - spare))), found)
    return flat, block, found


def _tiles(
    flat: Tensor, start: Tensor, bits: Tensor, distance: Tensor, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, first keys and tiles of the blocks, without those that no query reads.

    Args:
        flat, start: [n], row and first key of each block.
        bits: which queries of the row chose it.
        distance: from the block's first key to the row's first query, at most `width` - 1: then all keys are seen.
        width: keys in a block.
    """
    kinds, kind = (bits * (_ROW + width) + distance + _ROW).unique(return_inverse=True)
    lane = torch.arange(_ROW, device=kinds.device)
    chose = (kinds[:, None] // (_ROW + width) >> lane) & 1 == 1
    ahead = kinds % (_ROW + width) - _ROW
    key = torch.arange(width, device=kinds.device)
    tiles = chose[:, :, None] & (key <= (lane + ahead[:, None])[:, :, None])
    some, whole = tiles.flatten(1).any(1), tiles.flatten(1).all(1)
    partial = some & ~whole
    tile_ids = torch.where(partial, partial.cumsum(0), 0)[kind]
    read = some[kind]
    return flat[read], start[read], tile_ids[read], torch.cat([tiles.new_ones(1, _ROW, width), tiles[partial]])


def _key_block(size: int) -> int:
    """Keys in a block of the pattern: a power of two where one divides `size`, else the largest number that does."""
    width = min(size & -size, _MOST_KEYS)
    if width >= _FEWEST_KEYS:
        return width
    return max(n for n in range(1, min(size, 2 * _MOST_KEYS) + 1) if size % n == 0)


def _repeated(lengths: Tensor, times: int) -> Tensor:
    """Places of entries that stand in runs, each run `times` times in turn: int64 [times * sum of lengths]."""
    first = (lengths.cumsum(0) - lengths).repeat_interleave(times)
    lengths = lengths.repeat_interleave(times)
    run = torch.repeat_interleave(first - (lengths.cumsum(0) - lengths), lengths)
    return run + torch.arange(len(run), device=run.device)
