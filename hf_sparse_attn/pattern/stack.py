"""Patterns of several heads put together: side by side in one pattern, or as the union of what they keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_attn.pattern.layout import causal_tiles, distinct_tiles, entry_rows
from hf_sparse_attn.pattern.ops import _expand, _full_batch

if TYPE_CHECKING:
    from hf_sparse_attn.pattern.block_pattern import BlockPattern


def stack_heads(patterns: Sequence[BlockPattern], order: Sequence[int] | None = None) -> BlockPattern:
    """See BlockPattern.stack_heads."""
    if not patterns:
        raise ValueError("`patterns` must hold at least one BlockPattern, got none")
    first = patterns[0]
    for p in patterns[1:]:
        if (p.q_len, p.kv_len) != (first.q_len, first.kv_len):
            raise ValueError(
                f"`patterns` must have equal lengths {(first.q_len, first.kv_len)}, got {(p.q_len, p.kv_len)}"
            )
        same = p.kv_range is first.kv_range
        if p.kv_range is not None and first.kv_range is not None:
            same = torch.equal(p.kv_range, first.kv_range)
        if not same:
            raise ValueError("`patterns` must have one `kv_range`: it belongs to the batch, not to a head")
    heads = [_full_batch(p)[1] for p in patterns]
    total = sum(heads)
    if order is not None and (not order or min(order) < 0 or max(order) >= total):
        raise ValueError(f"`order` must be numbers of {total} heads, got {list(order)}")
    block_q = math.gcd(*(p.block_q for p in patterns))
    block_k = math.gcd(*(p.block_k for p in patterns))
    patterns = [p.reblock(block_q, block_k) for p in patterns]
    batch = max(_full_batch(p)[0] for p in patterns)
    if any(p.batch not in (1, batch) for p in patterns):
        raise ValueError(f"`patterns` must have batch 1 or {batch}, got {[p.batch for p in patterns]}")
    # What differs from one row of the batch to the next; the orders and ranges may differ where the blocks do not.
    own = max(t.shape[0] for p in patterns for t in (p.indptr, p.column_indptr) if t is not None)
    tiles, tile_ids = _one_table(patterns)
    counts, chosen = _chosen([(p.indptr, len(p.starts), h) for p, h in zip(patterns, heads, strict=True)], own, order)
    column_counts, columns = None, None
    if any(p.columns is not None for p in patterns):
        column_counts, columns = _stack_columns(patterns, heads, own, order)
    out = first.from_rows(
        counts, torch.cat([p.starts for p in patterns])[chosen], block_q, block_k, first.q_len, first.kv_len,
        tile_ids[chosen], tiles, column_counts, columns,
    )  # fmt: skip
    return replace(
        out,
        kv_range=first.kv_range,
        q_order=_stack_orders([p.q_order for p in patterns], heads, batch, first.q_len, order),
        kv_order=_stack_orders([p.kv_order for p in patterns], heads, batch, first.kv_len, order),
    )


def _one_table(patterns: Sequence[BlockPattern]) -> tuple[Tensor, Tensor]:
    """The tiles of all patterns in one table, and the tile of every block of all of them in it."""
    # Patterns often share their table, of a mask that is the same for all: comparing tiles is what takes time.
    tables: list[Tensor] = []
    places = []
    for p in patterns:
        found = next((i for i, t in enumerate(tables) if t is p.tiles or _equal(t, p.tiles)), len(tables))
        if found == len(tables):
            tables.append(p.tiles)
        places.append(found)
    if len(tables) == 1:
        return tables[0], torch.cat([p.tile_ids for p in patterns])
    tiles, merged = distinct_tiles(torch.cat(tables))
    offsets = [sum(len(t) for t in tables[:i]) for i in range(len(tables))]
    merged = merged.to(torch.int32)
    return tiles, torch.cat(
        [merged[offsets[i] : offsets[i] + len(p.tiles)][p.tile_ids] for p, i in zip(patterns, places, strict=True)]
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


def _chosen(
    parts: Sequence[tuple[Tensor, int, int]], batch: int, order: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Counts of the rows of all heads in order, and where each of their entries lies among those of all parts.

    Args:
        parts: row offsets [batch or 1, heads or 1, rows + 1], number of entries, and heads of each pattern.
        batch: leading size of the result.
        order: as in BlockPattern.stack_heads.
    """
    counts = torch.cat([_expand(indptr.diff(dim=-1), batch, heads) for indptr, _, heads in parts], 1)
    begin, offset = [], 0
    for indptr, entries, heads in parts:
        begin.append(_expand(indptr, batch, heads)[..., 0] + offset)
        offset += entries
    first = torch.cat(begin, 1)
    if order is not None:
        index = torch.tensor(order, device=counts.device)
        counts, first = counts[:, index], first[:, index]
    sizes = counts.sum(-1).flatten()
    shift = torch.repeat_interleave(first.flatten() - (sizes.cumsum(0) - sizes), sizes)
    return counts, torch.arange(len(shift), device=counts.device) + shift


def _stack_columns(
    patterns: Sequence[BlockPattern], heads: Sequence[int], batch: int, order: Sequence[int] | None
) -> tuple[Tensor, Tensor]:
    """Counts and columns of all heads; a pattern without columns has none."""
    parts, columns = [], []
    for p, h in zip(patterns, heads, strict=True):
        columns.append(p.starts[:0] if p.columns is None else p.columns)
        parts.append(
            (torch.zeros_like(p.indptr[:1]) if p.column_indptr is None else p.column_indptr, len(columns[-1]), h)
        )
    counts, chosen = _chosen(parts, batch, order)
    return counts, torch.cat(columns)[chosen]


def _stack_orders(
    orders: Sequence[Tensor | None], heads: Sequence[int], batch: int, length: int, order: Sequence[int] | None
) -> Tensor | None:
    """The orders of all heads together, tokens as they are for heads without one; None where no head has one."""
    given = [t for t in orders if t is not None]
    if not given:
        return None
    identity = torch.arange(length, device=given[0].device)[None, None]
    expanded = [_expand(identity if t is None else t, batch, h) for t, h in zip(orders, heads, strict=True)]
    stacked = torch.cat(expanded, dim=1)
    return stacked if order is None else stacked[:, torch.tensor(order, device=stacked.device)]


def union_heads(p: BlockPattern, group: int, query_start: int | None = None) -> BlockPattern:
    """The pattern whose heads each keep what any of `group` consecutive heads of `p` keeps.

    Exact where blocks are aligned. A block that is not, and a single column, is widened to the aligned blocks that
    cover it, so that more may be kept, but under a causal mask nothing after the query.

    Args:
        p: the pattern; with one head it is its own union.
        group: heads that share, a divisor of the heads of `p`.
        query_start: position of the first query under a causal mask, or None where there is no mask.

    Returns:
        a pattern with heads / `group` heads.

    Raises:
        ValueError: `group` does not divide the heads, or heads that share have orders of their own.
    """
    if p.heads == 1 or group == 1:
        return p
    if p.heads % group:
        raise ValueError(f"`group` must divide {p.heads} heads, got {group}")
    for name in ("q_order", "kv_order"):
        given: Tensor | None = getattr(p, name)
        if given is not None and given.shape[1] > 1:
            first = given.unflatten(1, (-1, group))
            if not bool((first == first[:, :, :1]).all()):
                raise ValueError(f"`patterns` of heads that share must have one `{name}`, got several in a group")
    rows, cols = p.rows, -(-p.kv_len // p.block_k)
    row, block, tile, tiles = _covered(p, query_start)
    shared = (row // (rows * p.heads)) * (p.heads // group) + row // rows % p.heads // group
    place = (shared * rows + row % rows) * cols + block
    # Each tile of a place once, whole ones (tile 0) first.
    pairs = torch.unique(place * len(tiles) + tile)
    place, tile = pairs // len(tiles), pairs % len(tiles)
    place, many = torch.unique_consecutive(place, return_counts=True)
    first = many.cumsum(0) - many
    tile, tiles = _united(tile, tiles, first, many)
    tiles, merged = distinct_tiles(tiles)
    counts = torch.bincount(place // cols, minlength=p.batch * (p.heads // group) * rows)
    out = p.from_rows(
        counts.view(p.batch, -1, rows), place % cols * p.block_k, p.block_q, p.block_k, p.q_len, p.kv_len,
        merged[tile], tiles,
    )  # fmt: skip
    return replace(out, kv_range=p.kv_range, q_order=_first(p.q_order, group), kv_order=_first(p.kv_order, group))


def _first(order: Tensor | None, group: int) -> Tensor | None:
    return order if order is None or order.shape[1] == 1 else order[:, ::group]


def _covered(p: BlockPattern, query_start: int | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flat row, aligned block and tile of all that `p` keeps, and the tiles; what was not aligned is widened."""
    row, start, tile = entry_rows(p.indptr, len(p.starts)), p.starts.long(), p.tile_ids.long()
    whole = start % p.block_k == 0
    loose = start[~whole].div(p.block_k, rounding_mode="floor")
    rows, blocks = [row[~whole]] * 2, [loose, loose + 1]
    if p.columns is not None and p.column_indptr is not None:
        wide = _expand(p.column_indptr.diff(dim=-1), p.batch, p.heads).flatten()
        begin = _expand(p.column_indptr[..., :-1], p.batch, p.heads).flatten()
        at = torch.repeat_interleave(torch.arange(len(wide), device=p.device), wide)
        offset = torch.arange(len(at), device=p.device) - torch.repeat_interleave(wide.cumsum(0) - wide, wide)
        rows.append(at)
        blocks.append(p.columns[begin[at] + offset].long() // p.block_k)
    loose_row, loose_block = torch.cat(rows), torch.cat(blocks)
    inside = (loose_block >= 0) & (loose_block * p.block_k < p.kv_len)
    loose_row, loose_block = loose_row[inside], loose_block[inside]
    loose_tile, tiles = torch.zeros_like(loose_row), p.tiles
    if query_start is not None and len(loose_row):
        distance = query_start + loose_row % p.rows * p.block_q - loose_block * p.block_k
        seen = distance > -p.block_q
        loose_row, loose_block = loose_row[seen], loose_block[seen]
        ids, causal = causal_tiles(distance[seen], p.block_q, p.block_k)
        loose_tile, tiles = torch.where(ids > 0, ids + len(tiles), 0).long(), torch.cat([tiles, causal])
    return (
        torch.cat([row[whole], loose_row]),
        torch.cat([start[whole] // p.block_k, loose_block]),
        torch.cat([tile[whole], loose_tile]),
        tiles,
    )


def _united(tile: Tensor, tiles: Tensor, first: Tensor, many: Tensor) -> tuple[Tensor, Tensor]:
    """One tile per place, the union of its `many` from `first` on, and the table with the tiles that this adds."""
    found = tile[first]
    for turn in range(1, int(many.max()) if len(many) else 0):
        more = (many > turn) & (found > 0)
        if not bool(more.any()):
            break
        pairs, which = torch.unique(torch.stack([found[more], tile[first[more] + turn]]), dim=1, return_inverse=True)
        found[more] = len(tiles) + which
        tiles = torch.cat([tiles, tiles[pairs[0]] | tiles[pairs[1]]])
    return found, tiles
