"""What BlockPattern can be turned into and checked for: the bodies of its methods."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hf_sparse_attn.pattern.layout import CHUNK, distinct_tiles, entry_rows

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    from hf_sparse_attn.pattern.block_pattern import BlockPattern


def key_validity(p: BlockPattern) -> Tensor | None:
    """Whether the key at each place is in `kv_range`, bool [batch, heads or 1, kv_len]; None where all are."""
    if p.kv_range is None:
        return None
    token = torch.arange(p.kv_len, device=p.device) if p.kv_order is None else p.kv_order
    start, end = p.kv_range[:, 0, None, None], p.kv_range[:, 1, None, None]
    return (token >= start) & (token < end)


def _expand(t: Tensor, batch: int, heads: int) -> Tensor:
    return t.expand(batch, heads, *t.shape[2:])


def _full_batch(p: BlockPattern) -> tuple[int, int]:
    """Batch and heads over which the pattern differs, kv_range and orders included."""
    sizes = [p.indptr] + [t for t in (p.q_order, p.kv_order, p.column_indptr) if t is not None]
    batch = max([t.shape[0] for t in sizes] + ([] if p.kv_range is None else [p.kv_range.shape[0]]))
    return batch, max(t.shape[1] for t in sizes)


def _chunks(p: BlockPattern, rows_of: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(flat rows, key places [n, block_k], kept [n, block_q, block_k]) of the blocks, few at a time."""
    step = max(1, CHUNK // (p.block_q * p.block_k))
    within = torch.arange(p.block_k, device=p.device)
    lane = torch.arange(p.block_q, device=p.device)
    for i in range(0, len(rows_of), step):
        row = rows_of[i : i + step]
        place = p.starts[i : i + step, None].long() + within
        query = (row % p.rows)[:, None] * p.block_q + lane
        kept = p.tiles[p.tile_ids[i : i + step].long()]
        kept = kept & ((place >= 0) & (place < p.kv_len))[:, None, :] & (query < p.q_len)[:, :, None]
        yield row, place, kept


def to_dense(p: BlockPattern) -> Tensor:
    """See BlockPattern.to_dense."""
    mask = torch.zeros(p.batch * p.heads, p.q_len, p.kv_len, dtype=torch.bool, device=p.device)
    lane = torch.arange(p.block_q, device=p.device)
    for row, place, kept in _chunks(p, entry_rows(p.indptr)):
        query = (row % p.rows)[:, None] * p.block_q + lane
        n, a, b = kept.nonzero(as_tuple=True)
        mask[row[n] // p.rows, query[n, a], place[n, b]] = True
    mask = mask.unflatten(0, (p.batch, p.heads))
    batch, heads = _full_batch(p)
    mask = _expand(mask, batch, heads)
    if p.columns is not None and p.column_indptr is not None:
        flat = entry_rows(p.column_indptr)
        cols = torch.zeros(p.column_indptr.shape[0] * p.column_indptr.shape[1] * p.rows, p.kv_len, device=p.device)
        cols[flat, p.columns.long()] = 1
        cols = cols.unflatten(0, (*p.column_indptr.shape[:2], p.rows)).bool()
        mask = mask | _expand(cols.repeat_interleave(p.block_q, 2)[:, :, : p.q_len], batch, heads)
    valid = key_validity(p)
    if valid is not None:
        mask = mask & valid[:, :, None, :]
    # Place i holds token order[i]: scatter places back to tokens.
    if p.kv_order is not None:
        index = _expand(p.kv_order, batch, heads)[:, :, None, :].expand_as(mask)
        mask = torch.zeros_like(mask).scatter(3, index, mask)
    if p.q_order is not None:
        index = _expand(p.q_order, batch, heads)[:, :, :, None].expand_as(mask)
        mask = torch.zeros_like(mask).scatter(2, index, mask)
    return mask.contiguous()


def block_map(p: BlockPattern) -> Tensor:
    """See BlockPattern.block_map."""
    cols = -(-p.kv_len // p.block_k)
    batch, heads = _full_batch(p)
    valid = key_validity(p)
    out = torch.zeros(batch, heads, p.rows, cols, dtype=torch.bool, device=p.device)
    for row, place, kept in _chunks(p, entry_rows(p.indptr)):
        any_query = kept.any(1)
        n, b = any_query.nonzero(as_tuple=True)
        key, flat = place[n, b], row[n]
        _mark(out, p, flat, key, valid, p.batch, p.heads)
    if p.columns is not None and p.column_indptr is not None:
        flat = entry_rows(p.column_indptr)
        _mark(out, p, flat, p.columns.long(), valid, *p.column_indptr.shape[:2])
    return out


def _mark(
    out: Tensor, p: BlockPattern, flat: Tensor, key: Tensor, valid: Tensor | None, batch: int, heads: int
) -> None:
    """Sets out[batch, head, row, key // block_k] for valid keys, repeating a leading size of 1 over all of `out`."""
    row, head, item = flat % p.rows, flat // p.rows % heads, flat // (p.rows * heads)
    for b in range(out.shape[0]):
        for h in range(out.shape[1]):
            mine = (item == (b if batch > 1 else 0)) & (head == (h if heads > 1 else 0))
            r, c = row[mine], key[mine]
            if valid is not None:
                ok = valid[b if valid.shape[0] > 1 else 0, h if valid.shape[1] > 1 else 0][c]
                r, c = r[ok], c[ok]
            out[b, h, r, c // p.block_k] = True


def density(p: BlockPattern, count: Literal["full", "causal"]) -> float | Tensor:
    """See BlockPattern.density_later."""
    if count not in ("full", "causal"):
        raise ValueError(f"`count` must be 'full' or 'causal', got {count!r}")
    batch, heads = _full_batch(p)
    valid = key_validity(p)
    kept: float | Tensor = 0.0
    if valid is None:
        kept = _kept_without_range(p) * (batch * heads) / (p.batch * p.heads)
        if p.column_indptr is not None:
            kept = kept + _kept_columns(p) * (batch * heads) / (p.column_indptr.shape[0] * p.column_indptr.shape[1])
    else:
        kept = _kept_with_range(p, _expand(valid, batch, heads))
    total = p.q_len * p.kv_len
    if count == "causal":
        # Query i sees kv_len - q_len + 1 + i keys; queries before the first key see none.
        seen = torch.arange(p.kv_len - p.q_len + 1, p.kv_len + 1, dtype=torch.float64).clamp(min=0)
        total = int(seen.sum())
    return kept / (batch * heads * total)


def _row_sizes(p: BlockPattern) -> Tensor:
    """Queries that exist in each row, int64 [rows]."""
    return (p.q_len - torch.arange(p.rows, device=p.device) * p.block_q).clamp(max=p.block_q)


def _kept_columns(p: BlockPattern) -> Tensor:
    assert p.column_indptr is not None
    return (p.column_indptr.diff(dim=-1) * _row_sizes(p)).sum().double()


def _kept_without_range(p: BlockPattern) -> Tensor:
    """Kept pairs of the blocks by counting areas: nothing is expanded but the tiles, which are few."""
    if p.device.type == "cpu" and p.q_len % p.block_q == 0:
        sizes = p.tiles.flatten(1).sum(1)
        kept = sizes[p.tile_ids].sum()
        cut = p.starts > p.kv_len - p.block_k
        if bool(cut.any()):
            # Blocks that end behind the last key, by the number of keys that they have.
            tile, keys = p.tile_ids[cut].long(), (p.kv_len - p.starts[cut].long()).clamp(min=0)
            there = torch.nn.functional.pad(p.tiles[tile].sum(1).cumsum(1), (1, 0))
            kept = kept - sizes[tile].sum() + there.gather(1, keys[:, None]).sum()
        return kept.double()
    # The number of blocks is given, or a GPU would be asked for it.
    row = entry_rows(p.indptr, len(p.starts)) % p.rows
    queries = _row_sizes(p)[row]
    keys = (p.kv_len - p.starts.long()).clamp(min=0, max=p.block_k)
    # area[t, a, b]: kept cells of the first a queries and b keys of tile t.
    area = torch.nn.functional.pad(p.tiles.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    return area[p.tile_ids.long(), queries, keys].sum().double()


def _kept_with_range(p: BlockPattern, valid: Tensor) -> float:
    kept = 0
    batch, heads = valid.shape[:2]
    for row, place, mask in _chunks(p, entry_rows(p.indptr)):
        item, head = row // (p.rows * p.heads), row // p.rows % p.heads
        per_key = mask.sum(1)
        place = place.clamp(0, p.kv_len - 1)
        for b in range(batch):
            for h in range(heads):
                mine = (item == (b if p.batch > 1 else 0)) & (head == (h if p.heads > 1 else 0))
                kept += int((per_key[mine] * valid[b, h][place[mine]]).sum())
    if p.columns is not None and p.column_indptr is not None:
        flat = entry_rows(p.column_indptr)
        n_batch, n_heads = p.column_indptr.shape[:2]
        size = _row_sizes(p)[flat % p.rows]
        for b in range(batch):
            for h in range(heads):
                mine = flat // (p.rows * n_heads) == (b if n_batch > 1 else 0)
                mine &= flat // p.rows % n_heads == (h if n_heads > 1 else 0)
                kept += int((size[mine] * valid[b, h][p.columns[mine].long()]).sum())
    return float(kept)


def to_flex(p: BlockPattern) -> BlockMask:
    """See BlockPattern.to_flex."""
    from torch.nn.attention.flex_attention import BlockMask

    if p.columns is not None and p.columns.numel():
        raise ValueError("`columns` must be absent for FlexAttention: it reads whole key blocks only")
    if bool((p.starts % p.block_k != 0).any()):
        raise ValueError(f"`starts` must be multiples of block_k = {p.block_k} for FlexAttention")
    if p.kv_range is not None:
        raise ValueError("`kv_range` must be absent for FlexAttention: cut the keys to their valid range first")
    cols = -(-p.kv_len // p.block_k)
    flat, block = entry_rows(p.indptr), p.starts.long() // p.block_k
    shape = (p.batch, p.heads, p.rows)
    # FlexAttention's own structure is dense over blocks: this memory is its price, not the pattern's.
    tile_of = torch.full((math.prod(shape), cols), -1, dtype=torch.int32, device=p.device)
    tile_of[flat, block] = p.tile_ids
    full, partial = tile_of == 0, tile_of > 0
    # Blocks that are not there get a tile that keeps nothing: the mask alone must be right, too.
    tiles = torch.cat([p.tiles, torch.zeros_like(p.tiles[:1])])
    tile_of = torch.where(tile_of < 0, len(p.tiles), tile_of).view(*shape, cols)

    def pack(chosen: Tensor) -> tuple[Tensor, Tensor]:
        number = chosen.sum(-1, dtype=torch.int32).view(shape)
        order = torch.argsort(chosen.to(torch.int8), dim=-1, descending=True, stable=True)
        return number, order.to(torch.int32).view(*shape, cols)

    block_q, block_k, many_batch, many_heads = p.block_q, p.block_k, p.batch > 1, p.heads > 1

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        tile = tile_of[b if many_batch else b * 0, h if many_heads else h * 0, q // block_q, kv // block_k]
        return tiles[tile, q % block_q, kv % block_k]

    return BlockMask.from_kv_blocks(
        *pack(partial), *pack(full), BLOCK_SIZE=(block_q, block_k), mask_mod=mask_mod, seq_lengths=(p.q_len, p.kv_len)
    )


def reblock(p: BlockPattern, block_q: int, block_k: int) -> BlockPattern:
    """See BlockPattern.reblock."""
    if p.block_q % block_q or p.block_k % block_k:
        raise ValueError(
            f"`block_q`, `block_k` must divide {p.block_q}, {p.block_k}, got {block_q}, {block_k}"
        )  # fmt: skip
    fq, fk = p.block_q // block_q, p.block_k // block_k
    if fq == 1 and fk == 1:
        return p
    rows = -(-p.q_len // block_q)
    flat, lead = entry_rows(p.indptr), p.batch * p.heads
    # Sub-tile (i, j) of tile t has number t * fq * fk + i * fk + j before equal ones are merged.
    sub = p.tiles.unflatten(1, (fq, block_q)).unflatten(3, (fk, block_k)).transpose(2, 3).flatten(0, 2)
    tiles, sub_id = distinct_tiles(sub)
    i = torch.arange(fq, device=p.device)[None, :, None]
    j = torch.arange(fk, device=p.device)[None, None, :]
    tile = sub_id[(p.tile_ids.long()[:, None, None] * fq + i) * fk + j]
    row = (flat % p.rows)[:, None, None] * fq + i + 0 * j
    start = p.starts.long()[:, None, None] + j * block_k + 0 * i
    some = tiles.flatten(1).any(1)[tile] & (row < rows) & (start < p.kv_len)
    head = (flat // p.rows)[:, None, None].expand_as(row)
    head, row, start, tile = head[some], row[some], start[some], tile[some]
    order = torch.argsort((head * rows + row) * (p.kv_len + p.block_k) + start, stable=True)
    counts = torch.bincount((head * rows + row), minlength=lead * rows).view(p.batch, p.heads, rows)
    column_counts, columns = None, None
    if p.columns is not None and p.column_indptr is not None:
        column_counts, columns = _repeat_columns(p, fq, rows)
    out = p.from_rows(
        counts, start[order], block_q, block_k, p.q_len, p.kv_len, tile[order], tiles, column_counts, columns
    )
    return replace(out, q_order=p.q_order, kv_order=p.kv_order, kv_range=p.kv_range)


def _repeat_columns(p: BlockPattern, factor: int, rows: int) -> tuple[Tensor, Tensor]:
    """The columns of every row given to each of its `factor` sub-rows."""
    assert p.column_indptr is not None and p.columns is not None
    counts = p.column_indptr.diff(dim=-1).repeat_interleave(factor, -1)[..., :rows]
    first = p.column_indptr[..., :-1].repeat_interleave(factor, -1)[..., :rows]
    indptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))[:-1]
    entry = torch.repeat_interleave(torch.arange(counts.numel(), device=p.device), counts.flatten())
    offset = torch.arange(entry.numel(), device=p.device) - indptr[entry]
    return counts, p.columns[first.flatten()[entry] + offset]
