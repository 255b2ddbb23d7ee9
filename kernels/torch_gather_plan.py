"""Which rows of a pattern torch_gather runs together, planned once per pattern."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived

Array = np.ndarray[Any, Any]

# Keys and values gathered for one call, in bytes: about a second-level cache, so that the copy is read from there.
_CACHE_BYTES = 2 << 20
_MOST_ROWS = 16
# A row joins the group of a longer one if it is shorter by at most this share; the rest of it is masked.
_PADDING = 1 / 16


@dataclass(frozen=True)
class Group:
    """Rows of one head that run in one call.

    Args:
        rows: int64 [n], rows of the pattern.
        starts: int64 [n, blocks], first key place of each block; kv_len stands for a block that is not there.
        tiles: int64 [n or 1, blocks], tile of each block, or None where all are whole.
        columns: int64 [n, columns], single key places, kv_len for one that is not there; or None.
        spare: whether any place is at or beyond kv_len, in a short last block or where a row is shorter than another.
        again: whether the rows were visited before with other keys, so that this result is merged into that one.
    """

    rows: Tensor
    starts: Tensor
    tiles: Tensor | None
    columns: Tensor | None
    spare: bool
    again: bool = False


def plan_of(p: BlockPattern, batch: int, head: int, key_bytes: int) -> list[Group]:
    """The groups of one head of the pattern, longest rows first; kept with the pattern, which may be static."""
    at = (min(batch, p.batch - 1), min(head, p.heads - 1), key_bytes)
    return derived(p, ("gather", "groups", at), lambda: list(_make_groups(p, *at)))


def _make_groups(p: BlockPattern, batch: int, head: int, key_bytes: int) -> Iterator[Group]:
    # Planned in numpy: the arrays are small and many, and its operators cost a tenth of torch's for them.
    indptr, starts, tile_ids = (x.cpu().numpy() for x in (p.indptr[batch, head], p.starts, p.tile_ids))
    blocks, tiled = np.diff(indptr), len(p.tiles) > 1
    columns, column_indptr, column_keys = np.zeros_like(blocks), indptr, starts
    if p.columns is not None and p.column_indptr is not None:
        at = min(batch, p.column_indptr.shape[0] - 1), min(head, p.column_indptr.shape[1] - 1)
        column_indptr, column_keys = p.column_indptr[at].cpu().numpy(), p.columns.cpu().numpy()
        columns = np.diff(column_indptr)
    # Rows run together have nearly equal numbers of blocks and of columns.
    order = np.argsort(-(blocks * (p.kv_len + 1) + columns), kind="stable")
    keys = (blocks * p.block_k + columns)[order]
    blocks_in_order = blocks[order]
    first, end = 0, int((keys > 0).sum())
    while first < end:
        most = min(_MOST_ROWS, max(1, _CACHE_BYTES // int(keys[first] * key_bytes)))
        window = slice(first, min(first + most, end))
        near = (keys[window] >= (1 - _PADDING) * keys[first]) & (keys[window] <= keys[first])
        near &= blocks_in_order[window] >= (1 - _PADDING) * blocks_in_order[first]
        last = first + (len(near) if near.all() else int(near.argmin()))
        rows = order[first:last]
        places = _take(starts, indptr, rows, p.kv_len)
        tiles = _take(tile_ids, indptr, rows, 0) if tiled else None
        if tiles is not None:
            tiles = tiles[:1] if (tiles == tiles[:1]).all() else tiles
            tiles = tiles if tiles.any() else None
        # Tiles that differ from row to row want a mask of the size of the logits. They mostly stand at the end of a
        # row: what comes before is run by itself, without a mask.
        cut = 0 if tiles is None or len(tiles) == 1 else int(tiles.any(0).argmax())
        single = _take(column_keys, column_indptr, rows, p.kv_len) if columns[rows].any() else None
        rest = None if tiles is None else tiles[:, cut:]
        if cut:
            yield _group(p, rows, places[:, :cut], None, single)
            yield _group(p, rows, places[:, cut:], rest, None, again=True)
        else:
            yield _group(p, rows, places, rest, single)
        first = last


def _group(
    p: BlockPattern, rows: Array, places: Array, tiles: Array | None, single: Array | None, again: bool = False
) -> Group:
    spare = places.max(initial=0) > p.kv_len - p.block_k or (single is not None and single.max() == p.kv_len)
    return Group(
        rows=torch.from_numpy(rows).to(p.device),
        starts=torch.from_numpy(np.ascontiguousarray(places)).to(p.device),
        tiles=None if tiles is None else torch.from_numpy(np.ascontiguousarray(tiles)).to(p.device),
        columns=None if single is None else torch.from_numpy(single).to(p.device),
        spare=bool(spare),
        again=again,
    )


def _take(values: Array, indptr: Array, rows: Array, absent: int) -> Array:
    """The entries of some rows as a rectangle, int64 [rows, longest], `absent` where a row is shorter."""
    begin, counts = indptr[rows], indptr[rows + 1] - indptr[rows]
    lane = np.arange(counts.max())
    if counts.min() == len(lane):
        return values[begin[:, None] + lane].astype(np.int64)
    inside = lane < counts[:, None]
    return np.where(inside, values[np.where(inside, begin[:, None] + lane, 0)], absent).astype(np.int64)
