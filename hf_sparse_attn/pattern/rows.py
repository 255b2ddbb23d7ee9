"""Parts of a BlockPattern: some of its query rows, each of its heads, its keys in coarse cells."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.pattern.layout import entry_rows
from hf_sparse_attn.pattern.ops import _chunks, _expand, _full_batch, _row_sizes, key_validity

if TYPE_CHECKING:
    from hf_sparse_attn.pattern.block_pattern import BlockPattern


def query_rows(p: BlockPattern, rows: Tensor) -> BlockPattern:
    """See BlockPattern.query_rows."""
    rows = _check_rows(p, rows)
    entry, counts = _entries_of(p.indptr, rows)
    column_counts = columns = None
    if p.column_indptr is not None and p.columns is not None:
        picked, column_counts = _entries_of(p.column_indptr, rows)
        columns = p.columns[picked]
    q_len = int(_row_sizes(p)[rows].sum())
    cut = p.from_rows(
        counts, p.starts[entry], p.block_q, p.block_k, q_len, p.kv_len, p.tile_ids[entry], p.tiles,
        column_counts, columns,
    )  # fmt: skip
    return replace(cut, kv_order=p.kv_order, kv_range=p.kv_range)


def last_queries(p: BlockPattern, count: int) -> BlockPattern:
    """See BlockPattern.last_queries."""
    if check_int("count", count, 1) > p.q_len or p.q_order is not None:
        raise ValueError(f"`count` must be at most the {p.q_len} queries, in the order of the tokens; got {count}")
    start = p.q_len - count
    finer = p.reblock(math.gcd(start, p.block_q), p.block_k)
    return finer.query_rows(torch.arange(start // finer.block_q, finer.rows, device=p.device))


def row_tokens(p: BlockPattern, rows: Tensor) -> Tensor:
    """See BlockPattern.row_tokens."""
    rows = _check_rows(p, rows)
    places = (rows[:, None] * p.block_q + torch.arange(p.block_q, device=p.device)).flatten()
    places = places[places < p.q_len]
    return places[None, None] if p.q_order is None else p.q_order[:, :, places]


def _check_rows(p: BlockPattern, rows: Tensor) -> Tensor:
    if not isinstance(rows, Tensor) or rows.ndim != 1 or rows.dtype != torch.int64:
        raise TypeError(f"`rows` must be an int64 tensor [rows], got {rows!r}")
    rows = rows.to(p.device)
    if not len(rows) or int(rows[0]) < 0 or int(rows[-1]) >= p.rows or bool((rows.diff() < 1).any()):
        raise ValueError(f"`rows` must be ascending, from 0 to {p.rows - 1}, at least one; got {rows.tolist()}")
    return rows


def _entries_of(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Which CSR entries belong to `rows`, in their order, and the number in each row [batch, heads, rows]."""
    first, counts = indptr[..., rows], indptr.diff(dim=-1)[..., rows]
    flat = counts.flatten()
    row = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), flat)
    offset = torch.arange(len(row), device=flat.device) - (flat.cumsum(0) - flat)[row]
    return first.flatten()[row] + offset, counts


def head_densities(p: BlockPattern, count: Literal["full", "causal"]) -> Tensor:
    """`BlockPattern.density` of every batch row and head by itself, float64 [batch or 1, heads or 1]."""
    batch, heads = _full_batch(p)
    valid = key_validity(p)
    total = p.q_len * p.kv_len
    if count == "causal":
        total = int(torch.arange(p.kv_len - p.q_len + 1, p.kv_len + 1, dtype=torch.float64).clamp(min=0).sum())
    if valid is not None:
        return _kept_valid(p, _expand(valid, batch, heads)) / total
    flat = entry_rows(p.indptr, len(p.starts))
    queries = _row_sizes(p)[flat % p.rows]
    keys = (p.kv_len - p.starts.long()).clamp(min=0, max=p.block_k)
    # area[t, a, b]: kept cells of the first a queries and b keys of tile t.
    area = torch.nn.functional.pad(p.tiles.long().cumsum(1).cumsum(2), (1, 0, 1, 0))
    kept = torch.zeros(p.batch * p.heads, dtype=torch.int64, device=p.device)
    kept.index_add_(0, flat // p.rows, area[p.tile_ids.long(), queries, keys])
    found = kept.view(p.batch, p.heads).expand(batch, heads).double()
    if p.column_indptr is not None:
        found = found + (p.column_indptr.diff(dim=-1) * _row_sizes(p)).sum(-1).double()
    return found / total


def _kept_valid(p: BlockPattern, valid: Tensor) -> Tensor:
    """Kept pairs of each head where only some keys are valid."""
    batch, heads = valid.shape[:2]
    kept = torch.zeros(batch, heads, dtype=torch.float64, device=p.device)

    def add(flat: Tensor, key: Tensor, queries: Tensor, lead: tuple[int, int]) -> None:
        item, head = flat // (p.rows * lead[1]), flat // p.rows % lead[1]
        for b in range(batch):
            for h in range(heads):
                mine = (item == (b if lead[0] > 1 else 0)) & (head == (h if lead[1] > 1 else 0))
                kept[b, h] += (queries[mine] * valid[b, h][key[mine]]).sum()

    for row, place, mask in _chunks(p, entry_rows(p.indptr)):
        add(row, place.clamp(0, p.kv_len - 1), mask.sum(1), (p.batch, p.heads))
    if p.columns is not None and p.column_indptr is not None:
        flat = entry_rows(p.column_indptr)
        lead = (p.column_indptr.shape[0], p.column_indptr.shape[1])
        add(flat, p.columns.long(), _row_sizes(p)[flat % p.rows], lead)
    return kept


def kept_cells(p: BlockPattern, head: int, cells: int) -> Tensor:
    """Bool [cells, cells]: whether a block of queries with a query of the one cell reads any key of the other.

    Cells are equal runs of tokens of the first batch row; memory is O(tokens x cells). Nothing but rows is told apart
    within a block of queries: a cell beside a partial tile may count as kept that only the row's other queries read.

    Args:
        p: the pattern.
        head: query head.
        cells: cells along each side.
    """

    def of_head(t: Tensor) -> Tensor:
        return t[0, min(head, t.shape[1] - 1)]

    def cell_of(order: Tensor | None, n: int) -> Tensor:
        token = torch.arange(n, device=p.device) if order is None else of_head(order)
        return token // -(-n // cells)

    by_row = torch.zeros(p.rows, cells, dtype=torch.bool, device=p.device)
    key_cell = cell_of(p.kv_order, p.kv_len)
    rows, here = _head_entries(of_head(p.indptr))
    within = torch.arange(p.block_k, device=p.device)
    place = p.starts[here, None].long() + within
    some = p.tiles.any(1)[p.tile_ids[here].long()] & (place < p.kv_len)
    by_row[rows[:, None].expand_as(place)[some], key_cell[place[some]]] = True
    if p.columns is not None and p.column_indptr is not None:
        rows, here = _head_entries(of_head(p.column_indptr))
        by_row[rows, key_cell[p.columns[here].long()]] = True
    row = torch.arange(p.q_len, device=p.device) // p.block_q
    pairs = torch.stack([cell_of(p.q_order, p.q_len), row], 1).unique(dim=0)
    out = torch.zeros(cells, cells, dtype=torch.int32, device=p.device)
    return out.index_add_(0, pairs[:, 0], by_row[pairs[:, 1]].int()) > 0


def _head_entries(indptr: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and places of the entries of one head, from its offsets [rows + 1]."""
    counts = indptr.diff()
    rows = torch.repeat_interleave(torch.arange(len(counts), device=indptr.device), counts)
    return rows, torch.arange(int(indptr[0]), int(indptr[-1]), device=indptr.device)
