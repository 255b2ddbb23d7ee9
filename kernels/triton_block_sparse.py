"""Block-sparse attention in Triton over the whole BlockPattern: the backend and its forward."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.backend import KernelBackend
from hf_sparse_attn.kernels import triton_common
from hf_sparse_attn.kernels.triton_block_sparse_backward import gradients
from hf_sparse_attn.kernels.triton_block_sparse_parts import (
    Launch,
    is_wide,
    jit,
    launched,
    load_tokens,
    logits_of,
    masked_stages,
    on_device,
    padded,
    tokens_at,
    valid_range,
)
from hf_sparse_attn.kernels.triton_block_sparse_plan import rows_of, schedule
from hf_sparse_attn.kernels.triton_common import LOG2E, accumulate, runs_interpreted
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


# Kernel functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@jit
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, order, indptr, starts, tile_ids, wholes, tiles, read, column_indptr, columns, q_order, kv_order,
    kv_range,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    out_batch, out_head, out_token,
    lead_batch, lead_head, q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    heads, group, rows, q_len, kv_len, read_rows, factor, cap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr, HAS_RANGE: tl.constexpr,
    HAS_CAP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """M queries of one row and head over all key blocks and columns of the row, N keys at a time."""
    strips: tl.constexpr = BLOCK_Q // M
    pieces: tl.constexpr = BLOCK_K // N
    # Indices into all keys at once, not relative to a block.
    FAR: tl.constexpr = HAS_KV_ORDER or WIDE
    item = tl.load(order + tl.program_id(0) // strips)
    row = item % rows
    head_of_all = item // rows
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)

    lane = (tl.program_id(0) % strips) * M + tl.arange(0, M)
    place = row * BLOCK_Q + lane
    exists = place < q_len
    query = tokens_at(q_order + batch * q_order_batch + head * q_order_head, place, exists, HAS_Q_ORDER)
    queries = load_tokens(
        q + batch * q_batch + head * q_head, row * 0, query, exists, q_token, q_dim, DIM, DIM_PAD, True, True, UPCAST
    )
    keys_of = k + batch * k_batch + (head // group) * k_head
    values_of = v + batch * v_batch + (head // group) * v_head
    kv_order += batch * kv_order_batch + head * kv_order_head
    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)

    result = tl.zeros([M, VALUE_PAD], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)

    lead = batch * lead_batch + head * lead_head
    indptr += lead * (rows + 1) + row
    first = tl.load(indptr)
    count = (tl.load(indptr + 1) - first).to(tl.int32)
    whole = tl.load(wholes + lead * rows + row)
    inner = tl.arange(0, N)

    # Whole blocks: all their keys exist and all queries read them, so that nothing is masked but what kv_range cuts.
    # The next start is loaded a step ahead: a load whose address is loaded in the same step halves what is in flight.
    last = first + whole - 1
    ahead = tl.load(starts + first, mask=whole > 0, other=0)
    for i in range(0, whole * pieces):
        start = ahead + (i % pieces) * N
        ahead = tl.load(starts + tl.minimum(first + (i + 1) // pieces, last))
        base = start
        key = inner
        if HAS_KV_ORDER:
            key = tl.load(kv_order + start + inner)
            base = start * 0
        valid = inner < N
        if HAS_RANGE:
            valid = (base + key >= low) & (base + key < high)
        keys = load_tokens(keys_of, base, key, valid, k_token, k_dim, DIM, DIM_PAD, HAS_RANGE, FAR, UPCAST)
        values = load_tokens(values_of, base, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, HAS_RANGE, FAR, UPCAST)
        logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
        if HAS_RANGE:
            logits = tl.where(valid[None, :], logits, -float("inf"))
        result, peak, total = accumulate(result, peak, total, logits, values)

    # A value that no query of its row reads is not loaded, so NaN and infinities there do not matter; the last row
    # has a table of its own, since its tiles also speak of queries that do not exist. A NaN value that some query
    # reads reaches the queries of the same row that do not (0 * NaN), and no other row. A NaN key reaches its readers.
    read += tl.where(row == rows - 1, read_rows, 0) * BLOCK_K
    last = first + count - 1
    ahead = tl.load(starts + last, mask=count > whole, other=0)
    tile_ahead = tl.load(tile_ids + last, mask=count > whole, other=0)
    for i in tl.range(0, (count - whole) * pieces, num_stages=STAGES):
        within = (i % pieces) * N + inner
        start = ahead
        tile = tile_ahead.to(tl.int64)
        entry = tl.maximum(last - (i + 1) // pieces, first + whole)
        ahead = tl.load(starts + entry)
        tile_ahead = tl.load(tile_ids + entry)
        valid = start + within < kv_len
        base = start
        key = within
        if HAS_KV_ORDER:
            key = tl.load(kv_order + start + within, mask=valid, other=0)
            base = start * 0
        if HAS_RANGE:
            valid = valid & (base + key >= low) & (base + key < high)
        is_read = valid & (tl.load(read + tile * BLOCK_K + within) != 0)
        keys = load_tokens(keys_of, base, key, valid, k_token, k_dim, DIM, DIM_PAD, True, FAR, UPCAST)
        values = load_tokens(values_of, base, key, is_read, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, FAR, UPCAST)
        logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
        cell = tiles + tile * (BLOCK_Q * BLOCK_K) + (lane[:, None] * BLOCK_K + within[None, :])
        keep = (tl.load(cell) != 0) & valid[None, :]
        logits = tl.where(keep, logits, -float("inf"))
        result, peak, total = accumulate(result, peak, total, logits, values)

    if HAS_COLUMNS:
        column_indptr += lead * (rows + 1) + row
        first = tl.load(column_indptr)
        count = (tl.load(column_indptr + 1) - first).to(tl.int32)
        for i in range(0, count, N):
            valid = i + inner < count
            key = tl.load(columns + first + i + inner, mask=valid, other=0)
            key = tokens_at(kv_order, key, valid, HAS_KV_ORDER)
            if HAS_RANGE:
                valid = valid & (key >= low) & (key < high)
            keys = load_tokens(keys_of, row * 0, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST)
            values = load_tokens(
                values_of, row * 0, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST
            )
            logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
            logits = tl.where(valid[None, :], logits, -float("inf"))
            result, peak, total = accumulate(result, peak, total, logits, values)

    # A query without a key has total 0 and peak -inf: output 0 / 1, log-sum-exp -inf + 0.
    total = tl.where(total == 0.0, 1.0, total)
    value_lane = tl.arange(0, VALUE_PAD)
    to = out + batch * out_batch + head * out_head + query.to(tl.int64)[:, None] * out_token + value_lane[None, :]
    stored = exists[:, None] & (value_lane < VALUE_DIM)[None, :]
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=stored)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + (batch * heads + head) * q_len + query, (peak + tl.log2(total)) * ln2, mask=exists)


@BACKENDS.register("triton_block_sparse")
class TritonBlockSparse(KernelBackend):
    """Reads only the kept key blocks and columns, forward and backward; float16, bfloat16, float32; NVIDIA and ROCm.

    Orders are read by index and grouped heads share their keys: nothing is permuted, repeated or gathered in memory.
    The gradients of keys and values come from the transposed lists of blocks, each key summed by one program in one
    order: no atomics, and two runs are bit-equal. Programs start longest first: see `schedule`, which says why.
    Measured: equality with the reference in Triton's interpreter on the CPU, all features, and compilation down to
    machine code for several targets. Not measured: anything on a GPU, so neither speed, nor whether the rule of
    `choose_launch` is good; `triton_block_sparse_tune.tune` finds better launches where there is a GPU.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {"cuda": 10}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        reason = triton_common.why_not(pattern, q, k, v, False, _DTYPES)
        if reason is not None:
            return reason
        if pattern is not None:
            for name, size in (("block_q", pattern.block_q), ("block_k", pattern.block_k)):
                if size < 16 or size & (size - 1):
                    return f"needs `{name}` to be a power of two from 16 on, got {size}"
        return None

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """See backend.KernelBackend. Accumulates in float32, float32 products without TF32; two runs are bit-equal."""
        batch, heads, q_len, dim = q.shape
        value_dim, p = v.shape[3], pattern
        out = q.new_empty(batch, heads, q_len, value_dim)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        if lse.numel() == 0:
            return out, lse
        r, group = rows_of(p), heads // k.shape[1]
        key_bytes = p.kv_len * (dim + value_dim) * q.element_size() // group
        order = schedule(p, "queries", r.keys, batch, heads, key_bytes)
        lead = (p.heads if p.batch > 1 else 0, 1 if p.heads > 1 else 0)
        factor, cap = (scale / softcap, softcap * LOG2E) if softcap else (scale * LOG2E, 0.0)

        def run(launch: Launch) -> None:
            _forward[(batch * heads * p.rows * (p.block_q // launch.queries),)](
                q, k, v, out, lse, order, r.indptr, r.starts, r.tile_ids, r.wholes, r.tiles, r.read, r.column_indptr,
                r.columns, r.q_order, r.kv_order, r.kv_range,
                *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3], *lead, *r.order_strides(p),
                heads, group, p.rows, q_len, p.kv_len, len(p.tiles), factor, cap,
                DIM=dim, DIM_PAD=padded(dim), VALUE_DIM=value_dim, VALUE_PAD=padded(value_dim),
                BLOCK_Q=p.block_q, BLOCK_K=p.block_k, M=launch.queries, N=launch.keys,
                HAS_COLUMNS=p.columns is not None, HAS_Q_ORDER=p.q_order is not None,
                HAS_KV_ORDER=p.kv_order is not None, HAS_RANGE=p.kv_range is not None, HAS_CAP=bool(softcap),
                WIDE=is_wide(p.block_k, k, v), UPCAST=runs_interpreted(),
                STAGES=masked_stages(launch), num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip

        with on_device(q):
            launched("forward", p, q, v, run)
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        pattern: BlockPattern, scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See backend.KernelBackend. Sums in float32 and in one order: two runs are bit-equal."""
        return gradients(grad_out, grad_lse, q, k, v, out, lse, pattern, scale, softcap)

    @staticmethod
    def calibrate(device: torch.device) -> list[dict[str, Any]]:
        """Finds and keeps the fastest launches on a GPU, for `hf-sparse-attn bench --calibrate`; nothing on a CPU."""
        from hf_sparse_attn.kernels.triton_block_sparse_tune import tune

        return tune(device) if device.type == "cuda" and not runs_interpreted() else []
