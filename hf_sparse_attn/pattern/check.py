"""Every rule a BlockPattern must keep: the body of BlockPattern.validate."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_sparse_attn.pattern.layout import CHUNK, entry_rows

if TYPE_CHECKING:
    from hf_sparse_attn.pattern.block_pattern import BlockPattern


def validate(p: BlockPattern) -> None:
    """See BlockPattern.validate."""
    for name, dtype in (
        ("indptr", torch.int64),
        ("starts", torch.int32),
        ("tile_ids", torch.int32),
        ("tiles", torch.bool),
    ):
        if getattr(p, name).dtype != dtype:
            raise TypeError(f"`{name}` must be {dtype}, got {getattr(p, name).dtype}")
    rows = -(-p.q_len // p.block_q)
    if p.indptr.ndim != 3 or p.indptr.shape[2] != rows + 1:
        raise ValueError(f"`indptr` must be [batch, heads, {rows + 1}], got {list(p.indptr.shape)}")
    _validate_csr("indptr", p.indptr, len(p.starts))
    if tuple(p.tiles.shape[1:]) != (p.block_q, p.block_k) or not len(p.tiles) or not bool(p.tiles[0].all()):
        raise ValueError(
            f"`tiles` must be [n, {p.block_q}, {p.block_k}] with tile 0 all true, got {list(p.tiles.shape)}"
        )
    if p.tile_ids.shape != p.starts.shape:
        raise ValueError(f"`tile_ids` must be as long as `starts` ({len(p.starts)}), got {len(p.tile_ids)}")
    for name, values, high in (("starts", p.starts, p.kv_len), ("tile_ids", p.tile_ids, len(p.tiles))):
        if values.numel() and (int(values.min()) < 0 or int(values.max()) >= high):
            raise ValueError(f"`{name}` must lie in [0, {high}), got {int(values.min())} to {int(values.max())}")
    if (p.columns is None) != (p.column_indptr is None):
        raise ValueError("`columns` and `column_indptr` must be given both or neither")
    if p.columns is not None and p.column_indptr is not None:
        if p.column_indptr.shape != p.indptr.shape:
            raise ValueError(f"`column_indptr` must be {list(p.indptr.shape)}, got {list(p.column_indptr.shape)}")
        _validate_csr("column_indptr", p.column_indptr, len(p.columns))
        if p.columns.numel() and (int(p.columns.min()) < 0 or int(p.columns.max()) >= p.kv_len):
            raise ValueError(
                f"`columns` must lie in [0, {p.kv_len}), got {int(p.columns.min())} to {int(p.columns.max())}"
            )
    for name, length in (("q_order", p.q_len), ("kv_order", p.kv_len)):
        order = getattr(p, name)
        if order is not None and not bool((order.sort(-1).values == torch.arange(length, device=p.device)).all()):
            raise ValueError(f"`{name}` must be permutations of {length} tokens, got {list(order.shape)}")
    if p.kv_range is not None:
        start, end = p.kv_range[:, 0], p.kv_range[:, 1]
        if bool(((start < 0) | (start > end) | (end > p.kv_len)).any()):
            raise ValueError(f"`kv_range` must hold 0 <= start <= end <= {p.kv_len}, got {p.kv_range.tolist()}")
    _validate_once(p)


def _validate_csr(name: str, indptr: Tensor, entries: int) -> None:
    ends = indptr[..., -1].flatten()
    first = indptr[..., 0].flatten()
    ordered = bool((indptr.diff(dim=-1) >= 0).all()) and int(first[0]) == 0 and bool((first[1:] == ends[:-1]).all())
    if not ordered or int(ends[-1]) != entries:
        raise ValueError(
            f"`{name}` must rise from 0 to {entries} head after head, got {first.tolist()} to {ends.tolist()}"
        )


def _validate_once(p: BlockPattern) -> None:
    """No key twice in a row, blocks and columns together."""
    flat = entry_rows(p.indptr)
    step = max(1, CHUNK // (p.kv_len + p.block_k))
    for i in range(0, p.batch * p.heads * p.rows, step):
        seen = torch.zeros(step, p.kv_len + p.block_k, dtype=torch.int32, device=p.device)
        mine = (flat >= i) & (flat < i + step)
        keys = p.starts[mine].long()[:, None] + torch.arange(p.block_k, device=p.device)
        index = (flat[mine] - i)[:, None] * seen.shape[1] + keys
        seen.view(-1).index_add_(0, index.flatten(), torch.ones_like(index.flatten(), dtype=torch.int32))
        if p.columns is not None and p.column_indptr is not None:
            col_flat = entry_rows(p.column_indptr)
            mine = (col_flat >= i) & (col_flat < i + step)
            single = (col_flat[mine] - i) * seen.shape[1] + p.columns[mine].long()
            seen.view(-1).index_add_(0, single, torch.ones_like(single, dtype=torch.int32))
        twice = (seen[:, : p.kv_len] > 1).nonzero()
        if len(twice):
            row_number, key = int(twice[0, 0]) + i, int(twice[0, 1])
            raise ValueError(f"`starts` and `columns` must hold a key once a row, got {key} twice in row {row_number}")
