"""What the Triton kernels walk for a pattern: rows with whole blocks first, longest rows first, and the transposed
lists of the backward. Planned on the device without waiting for it, and kept with the pattern, which may be static."""

from __future__ import annotations

from typing import NamedTuple, TypeVar

import torch
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.kernels.triton_common import jit, lead_strides, on_device, rows_dense
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived

T = TypeVar("T")
# Entries that a planning program handles at a time.
_CHUNK = 128


class Rows(NamedTuple):
    """A pattern as the kernels over queries read it.

    Args:
        indptr, column_indptr, columns: as in BlockPattern, dense in memory; without columns `indptr` and `starts`.
        starts, tile_ids: of the blocks; in each row the whole ones first, then the others in reverse order.
        wholes: int32 [batch or 1, heads or 1, rows], number of whole blocks: tile 0, and all keys exist.
        keys: int32 [batch or 1, heads or 1, rows], keys of the row.
        tiles: uint8 [n_tiles, block_q, block_k].
        read: uint8 [2, n_tiles, block_k], whether any query reads the key: of a whole row, and of the last one, whose
            tiles also speak of queries that do not exist.
        q_order, kv_order, kv_range: as in BlockPattern, dense in their last dimension; `indptr` where there is none.
    """

    indptr: Tensor
    starts: Tensor
    tile_ids: Tensor
    wholes: Tensor
    keys: Tensor
    tiles: Tensor
    read: Tensor
    column_indptr: Tensor
    columns: Tensor
    q_order: Tensor
    kv_order: Tensor
    kv_range: Tensor

    def strides(self, p: BlockPattern, merged: int = 1) -> list[int]:
        """Strides over batch and heads: of lists, each for so many heads, and of both orders; then of the range."""
        pairs = ((p.q_order, self.q_order), (p.kv_order, self.kv_order), (p.kv_range, self.kv_range))
        orders = [s for given, ours in pairs for s in lead_strides(None if given is None else ours)][:-1]
        return [p.heads // merged if p.batch > 1 else 0, 1 if p.heads > 1 else 0, *orders]


@jit
def _partition(  # type: ignore[no-untyped-def]
    indptr, starts, tile_ids, column_indptr, to_starts, to_tiles, wholes, keys, rows, kv_len,
    BLOCK_K: tl.constexpr, HAS_COLUMNS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One row: whole blocks to its front, the others to its back."""
    item = tl.program_id(0)
    at = item.to(tl.int64) + item // rows
    first = tl.load(indptr + at)
    end = tl.load(indptr + at + 1)
    front = first
    back = end - 1
    for i in range(0, (end - first).to(tl.int32), CHUNK):
        entry = first + i + tl.arange(0, CHUNK)
        here = entry < end
        start = tl.load(starts + entry, mask=here, other=0)
        tile = tl.load(tile_ids + entry, mask=here, other=0)
        whole = here & (tile == 0) & (start <= kv_len - BLOCK_K)
        rest = here & ((tile != 0) | (start > kv_len - BLOCK_K))
        one = whole.to(tl.int32)
        other = rest.to(tl.int32)
        to = tl.where(whole, front + tl.cumsum(one, 0) - one, back - tl.cumsum(other, 0) + other)
        tl.store(to_starts + to, start, mask=here)
        tl.store(to_tiles + to, tile, mask=here)
        front += tl.sum(one, 0)
        back -= tl.sum(other, 0)
    tl.store(wholes + item, (front - first).to(tl.int32))
    number = (end - first) * BLOCK_K
    if HAS_COLUMNS:
        number += tl.load(column_indptr + at + 1) - tl.load(column_indptr + at)
    tl.store(keys + item, number.to(tl.int32))


def rows_of(p: BlockPattern) -> Rows:
    """The rows of a pattern."""
    return derived(p, ("triton", "rows"), lambda: _rows_of(p))


def _rows_of(p: BlockPattern) -> Rows:
    indptr = p.indptr.contiguous()
    starts, tile_ids = p.starts.contiguous(), p.tile_ids.contiguous()
    column_indptr = indptr if p.column_indptr is None else p.column_indptr.contiguous()
    columns = starts if p.columns is None else p.columns.contiguous()
    to_starts, to_tiles = torch.empty_like(starts), torch.empty_like(tile_ids)
    wholes = torch.empty(p.batch, p.heads, p.rows, dtype=torch.int32, device=p.device)
    keys = torch.empty_like(wholes)
    with on_device(starts):
        _partition[(wholes.numel(),)](
            indptr, starts, tile_ids, column_indptr, to_starts, to_tiles, wholes, keys, p.rows, p.kv_len,
            BLOCK_K=p.block_k, HAS_COLUMNS=p.columns is not None, CHUNK=_CHUNK, num_warps=1,
        )  # fmt: skip
    tail = p.q_len - (p.rows - 1) * p.block_q
    read = torch.stack([p.tiles.any(1), p.tiles[:, :tail].any(1)]).view(torch.uint8)
    dense = [indptr if t is None else rows_dense(t) for t in (p.q_order, p.kv_order)]
    kv_range = wholes if p.kv_range is None else p.kv_range.contiguous()
    tiles = p.tiles.contiguous().view(torch.uint8)
    return Rows(
        indptr, to_starts, to_tiles, wholes, keys, tiles, read, column_indptr, columns, dense[0], dense[1], kv_range
    )


def schedule(p: BlockPattern, name: str, sizes: Tensor, batch: int, heads: int, head_bytes: int) -> Tensor:
    """The order in which programs are started: int32 [batch * heads * n], flat places in [batch, heads, n].

    The GPU starts programs in order as earlier ones end, so that longest first balances the load without a
    persistent kernel; and heads go in groups whose streamed tensors fit half of the second-level cache together, so
    that programs that run at the same time read the same keys. Where all fits, the longest of all heads come first;
    where one head fills the cache it has enough programs for its own shortest ones to even out the end.

    Args:
        p: the pattern the order is kept with, under `name`.
        sizes: int32 [batch or 1, heads or 1, n], work of each program.
        batch, heads: sizes of the launch.
        head_bytes: bytes that the programs of one head stream, together.
    """
    device = sizes.device
    together = max(1, min(batch * heads, _cache_bytes(device) // (2 * max(1, head_bytes))))

    def make() -> Tensor:
        work = sizes.expand(batch, heads, -1).flatten(0, 1)
        if together == batch * heads:
            return work.flatten().sort(descending=True, stable=True).indices.to(torch.int32)
        cluster = torch.arange(batch * heads, device=device)[:, None] // together
        return ((cluster << 32) - work).flatten().sort(stable=True).indices.to(torch.int32)

    return derived(p, ("triton", "schedule", name, batch, heads, together), make)


def _cache_bytes(device: torch.device) -> int:
    """Bytes of the second-level cache."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size) if device.type == "cuda" else 0


# ---------------------------------------------------------------------- transposed lists


def readers_of(p: BlockPattern) -> Tensor:
    """The tiles by key: int64 [n_tiles, block_k, block_q / 64 rounded up], bit a of word w is query 64 w + a."""
    return derived(p, ("triton", "readers"), lambda: _readers_of(p.tiles))


def _readers_of(tiles: Tensor) -> Tensor:
    spare = -tiles.shape[1] % 64
    octets = torch.nn.functional.pad(tiles.to(torch.uint8), (0, 0, 0, spare)).unflatten(1, (-1, 8))
    weights = 2 ** torch.arange(8, device=tiles.device)[:, None]
    packed = (octets * weights.to(torch.uint8)).sum(2, dtype=torch.uint8)
    # Bytes in the order of rising bits: every GPU and CPU that Triton runs on is little-endian.
    return packed.transpose(1, 2).contiguous().view(torch.int64)


class Share(NamedTuple):
    """How the query heads of a key head are walked by a program that sums over them.

    Args:
        merged: query heads whose entries stand in one list.
        repeats: times a program walks its list, each for the next head.
        launches: launches that follow one another and add up.
    """

    merged: int
    repeats: int
    launches: int


def share_of(p: BlockPattern, group: int) -> Share:
    """One list for all heads of a group, unless each head has its own order: then a place is no one token."""
    if group > 1 and p.kv_order is not None and p.kv_order.shape[1] > 1:
        return Share(1, 1, group)
    return Share(group, 1, 1) if p.heads > 1 else Share(1, group, 1)


class Keys(NamedTuple):
    """A pattern as the kernel over keys reads it: for each list of heads ("lead") and tile of keys, who reads it.

    Args:
        lists: int64 [leads * tiles + 1], where the items of each tile begin.
        ends: int64 [leads * tiles], where they end; the room up to the next tile's is spare.
        wholes: int32 [leads * tiles], items at the front that read all keys of the tile.
        items: int32 [5, n]: head in its list * rows + row; then start and tile of the one or two blocks of the row
            that overlap the tile of keys, the second start beyond all keys where there is one. For columns one row.
        bits: int64 [n], for columns: which keys of the tile the row reads; else `lists`.
        places: int64 [leads, kv_len], for columns: key places, those in use first; else `lists`.
        used: int32 [leads], for columns: how many places are in use; else `wholes`.
        sizes: int32 [leads * tiles], number of items.
        tiles: tiles of keys of a lead.
    """

    lists: Tensor
    ends: Tensor
    wholes: Tensor
    items: Tensor
    bits: Tensor
    places: Tensor
    used: Tensor
    sizes: Tensor
    tiles: int


@jit
def _join(  # type: ignore[no-untyped-def]
    lists, order, row_of, starts, tile_ids, items, wholes, ends, tiles_of_keys, rows, kv_len, spare,
    BLOCK_K: tl.constexpr, N: tl.constexpr, COPIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One tile of keys: joins the two blocks of a row that share it, whole tiles to the front, the others after."""
    cell = tl.program_id(0)
    low = (cell % tiles_of_keys) * N
    high = tl.minimum(low + N, kv_len)
    begin = tl.load(lists + cell)
    end = tl.load(lists + cell + 1)
    front = begin
    for pass_ in tl.static_range(2):
        for i in range(0, (end - begin).to(tl.int32), CHUNK):
            at = begin + i + tl.arange(0, CHUNK)
            here = at < end
            more = at + 1 < end
            entry = tl.load(order + at, mask=here, other=0) // COPIES
            after = tl.load(order + at + 1, mask=more, other=0) // COPIES
            before = tl.load(order + at - 1, mask=here & (at > begin), other=0) // COPIES
            row = tl.load(row_of + entry, mask=here, other=0)
            new = here & ((at == begin) | (tl.load(row_of + before, mask=here, other=0) != row))
            two = more & (tl.load(row_of + after, mask=more, other=0) == row)
            start = tl.load(starts + entry, mask=here, other=0)
            tile = tl.load(tile_ids + entry, mask=here, other=0)
            second = tl.load(starts + after, mask=two, other=0)
            second_tile = tl.load(tile_ids + after, mask=two, other=0)
            covered = tl.minimum(start + BLOCK_K, high) - tl.maximum(start, low)
            covered += tl.where(two, tl.minimum(second + BLOCK_K, high) - tl.maximum(second, low), 0)
            whole = (tile == 0) & (second_tile == 0) & (covered == high - low)
            chosen = new & (whole if pass_ == 0 else (whole == 0))
            one = chosen.to(tl.int32)
            to = front + tl.cumsum(one, 0) - one
            tl.store(items + to, (row % rows).to(tl.int32), mask=chosen)
            tl.store(items + spare + to, start, mask=chosen)
            tl.store(items + spare * 2 + to, tile, mask=chosen)
            # No key of any tile lies in a block that starts there.
            tl.store(items + spare * 3 + to, tl.where(two, second, kv_len + N), mask=chosen)
            tl.store(items + spare * 4 + to, second_tile, mask=chosen)
            front += tl.sum(one, 0)
        if pass_ == 0:
            tl.store(wholes + cell, (front - begin).to(tl.int32))
    tl.store(ends + cell, front)


def keys_of(p: BlockPattern, size: int, share: Share) -> Keys:
    """Who reads each tile of `size` consecutive key places through blocks; `size` divides block_k."""
    return derived(p, ("triton", "keys", size, share.merged), lambda: _keys_of(p, size, share.merged))


def _keys_of(p: BlockPattern, size: int, merged: int) -> Keys:
    device, entries = p.device, p.starts.numel()
    starts, tile_ids = p.starts.contiguous(), p.tile_ids.contiguous()
    leads, tiles = p.batch * p.heads // merged, -(-p.kv_len // size)
    row_of = _row_of(p.indptr, entries)
    # An entry overlaps at most `copies` tiles; a copy too many goes to a list after all others, which nobody reads.
    # Blocks of one row do not overlap, and are no shorter than a tile: at most two of them share one.
    copies = p.block_k // size + 1
    tile = starts[:, None] // size + torch.arange(copies, dtype=torch.int32, device=device)
    end = (starts + p.block_k).clamp(max=p.kv_len)[:, None]
    dtype = torch.int32 if leads * tiles < 2**31 else torch.int64
    cell = (row_of // (merged * p.rows))[:, None] * tiles + tile
    cell = torch.where(tile * size < end, cell, leads * tiles).flatten().to(dtype)
    # Stable: within a tile the rows keep their order, so that sums are made in the same order at every run.
    cell, order = cell.sort(stable=True)
    lists = torch.searchsorted(cell, torch.arange(leads * tiles + 1, dtype=dtype, device=device))
    items = torch.empty(5, len(order), dtype=torch.int32, device=device)
    ends, wholes = torch.empty_like(lists[1:]), torch.empty(leads * tiles, dtype=torch.int32, device=device)
    with on_device(starts):
        _join[(leads * tiles,)](
            lists, order, row_of, starts, tile_ids, items, wholes, ends, tiles, merged * p.rows, p.kv_len, len(order),
            BLOCK_K=p.block_k, N=size, COPIES=copies, CHUNK=_CHUNK, num_warps=1,
        )  # fmt: skip
    return Keys(lists, ends, wholes, items, lists, lists, wholes, (ends - lists[:-1]).to(torch.int32), tiles)


def columns_of(p: BlockPattern, size: int, share: Share) -> Keys:
    """Who reads each tile of `size` (at most 64) of the distinct columns of a list of heads."""
    return derived(p, ("triton", "columns", size, share.merged), lambda: _columns_of(p, size, share.merged))


def _columns_of(p: BlockPattern, size: int, merged: int) -> Keys:
    if p.columns is None or p.column_indptr is None:
        raise ValueError(f"`p` must have columns, got {p}")
    device, entries, rows = p.device, p.columns.numel(), merged * p.rows
    leads, tiles = p.batch * p.heads // merged, -(-min(p.kv_len, max(1, entries)) // size)
    row_of = _row_of(p.column_indptr, entries)
    key = row_of // rows * p.kv_len + p.columns
    # Keys are numbered by their rank among those that any row of the list reads: single columns lie far apart, and
    # a tile of consecutive places would hold few of them.
    used = torch.zeros(leads * p.kv_len, dtype=torch.bool, device=device).index_fill_(0, key, True)
    used = used.view(leads, p.kv_len)
    rank = (used.cumsum(-1) - 1).flatten()[key]
    cell = row_of // rows * tiles + rank // size
    cell, order = cell.to(torch.int32 if leads * tiles < 2**31 else torch.int64).sort(stable=True)
    row, rank = (row_of % rows)[order], rank[order]
    # Columns of one row in one tile become one item.
    new = torch.ones(entries + 1, dtype=torch.int64, device=device)
    if entries:
        new[1:-1] = (cell[1:] != cell[:-1]) | (row[1:] != row[:-1])
    item = new.cumsum(0) - 1
    bits = torch.zeros(entries, dtype=torch.int64, device=device)
    bits.index_add_(0, item[:-1], torch.bitwise_left_shift(torch.ones_like(rank), rank % size))
    items = torch.empty(1, entries, dtype=torch.int32, device=device)
    items[0].index_copy_(0, item[:-1], row.to(torch.int32))
    lists = item[torch.searchsorted(cell, torch.arange(leads * tiles + 1, dtype=cell.dtype, device=device))]
    places = used.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices
    number, ends = used.sum(-1, dtype=torch.int32), lists[1:]
    sizes = (ends - lists[:-1]).to(torch.int32)
    return Keys(lists, ends, torch.zeros_like(sizes), items, bits, places, number, sizes, tiles)


def _row_of(indptr: Tensor, entries: int) -> Tensor:
    """For each entry the flat index of its row, int64; the number of entries is given, so that nobody waits for it."""
    counts = indptr.diff(dim=-1).flatten()
    rows = torch.arange(counts.numel(), device=indptr.device)
    return torch.repeat_interleave(rows, counts, output_size=entries)
