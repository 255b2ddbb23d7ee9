"""The kernel over rows of a block-sparse pattern in Triton: the forward, and the gradient of the queries."""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from hf_sparse_attn.kernels.triton_block_sparse_parts import is_wide, launched, masked_stages
from hf_sparse_attn.kernels.triton_block_sparse_plan import rows_of, schedule
from hf_sparse_attn.kernels.triton_common import (
    Launch,
    accumulate,
    constants_of,
    factors,
    jit,
    load_tokens,
    logits_of,
    tokens_at,
    valid_range,
)
from hf_sparse_attn.pattern.block_pattern import BlockPattern

# Kernel functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@jit
def logit_gradient(  # type: ignore[no-untyped-def]
    logits, bounded, base2, products, delta, keep, KEEP: tl.constexpr, HAS_CAP: tl.constexpr
):
    """Weights of the softmax and the gradient of the products of query and key, without the factor; 0 if not kept."""
    weight = tl.exp2(logits - base2)
    slope = weight * (products - delta)
    if HAS_CAP:
        slope = slope * (1.0 - bounded * bounded)
    if KEEP:
        weight = tl.where(keep, weight, 0.0)
        slope = tl.where(keep, slope, 0.0)
    return weight, slope


@jit
def _step(  # type: ignore[no-untyped-def]
    result, peak, total, queries, keys, values, grads, shift, mean, keep, factor, cap,
    KEEP: tl.constexpr, HAS_CAP: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """N keys more: their part of the gradient of the queries, or of the online softmax; with KEEP only pairs kept."""
    logits, bounded = logits_of(queries, keys, factor, cap, HAS_CAP)
    if GRADIENT:
        products = tl.dot(grads, tl.trans(values), input_precision="ieee")
        _, slope = logit_gradient(logits, bounded, shift, products, mean, keep, KEEP, HAS_CAP)
        result = tl.dot(slope.to(keys.dtype), keys, result, input_precision="ieee")
    else:
        if KEEP:
            logits = tl.where(keep, logits, -float("inf"))
        result, peak, total = accumulate(result, peak, total, logits, values)
    return result, peak, total


@jit
def _rows(  # type: ignore[no-untyped-def]
    q, k, v, grad, delta, base2, out, lse, order, indptr, starts, tile_ids, wholes, tiles, read, column_indptr,
    columns, q_order, kv_order, kv_range,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    g_batch, g_head, g_token, g_dim, out_batch, out_head, out_token, out_dim,
    lead_batch, lead_head, q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    heads, group, rows, q_len, kv_len, read_rows, factor, cap, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr, HAS_RANGE: tl.constexpr,
    HAS_CAP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """M queries of one row and head over all key blocks and columns of the row, N keys at a time.

    `out` is their output, and `lse` the log-sum-exp; or with GRADIENT `out` is their gradient, for which `grad` is
    that of the output, and `delta` and `base2` are as the backward prepares them.
    """
    strips: tl.constexpr = BLOCK_Q // M
    pieces: tl.constexpr = BLOCK_K // N
    # Indices into all keys at once, not relative to a block.
    FAR: tl.constexpr = HAS_KV_ORDER or WIDE
    SIZE: tl.constexpr = DIM if GRADIENT else VALUE_DIM
    PAD: tl.constexpr = DIM_PAD if GRADIENT else VALUE_PAD
    item = tl.load(order + tl.program_id(0) // strips)
    row = item % rows
    head_of_all = item // rows
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)

    lane = (tl.program_id(0) % strips) * M + tl.arange(0, M)
    place = row * BLOCK_Q + lane
    exists = place < q_len
    query = tokens_at(q_order + batch * q_order_batch + head * q_order_head, place, exists, HAS_Q_ORDER)
    zero = row * 0
    queries = load_tokens(
        q + batch * q_batch + head * q_head, zero, query, exists, q_token, q_dim, DIM, DIM_PAD, True, True, UPCAST
    )
    stat = (batch * heads + head) * q_len + query
    grads = queries
    shift = 0.0
    mean = 0.0
    if GRADIENT:
        grads = load_tokens(
            grad + batch * g_batch + head * g_head, zero, query, exists, g_token, g_dim, VALUE_DIM, VALUE_PAD, True,
            True, UPCAST,
        )  # fmt: skip
        shift = tl.load(base2 + stat, mask=exists, other=float("inf"))[:, None]
        mean = tl.load(delta + stat, mask=exists, other=0.0)[:, None]
    keys_of = k + batch * k_batch + (head // group) * k_head
    values_of = v + batch * v_batch + (head // group) * v_head
    kv_order += batch * kv_order_batch + head * kv_order_head
    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)

    result = tl.zeros([M, PAD], tl.float32)
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
        result, peak, total = _step(
            result, peak, total, queries, keys, values, grads, shift, mean, valid[None, :], factor, cap,
            HAS_RANGE, HAS_CAP, GRADIENT,
        )  # fmt: skip

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
        if GRADIENT:
            # Nor is such a key: gradient 0 times a NaN key would be NaN.
            valid = is_read
        keys = load_tokens(keys_of, base, key, valid, k_token, k_dim, DIM, DIM_PAD, True, FAR, UPCAST)
        values = load_tokens(values_of, base, key, is_read, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, FAR, UPCAST)
        cell = tiles + tile * (BLOCK_Q * BLOCK_K) + (lane[:, None] * BLOCK_K + within[None, :])
        keep = (tl.load(cell) != 0) & valid[None, :]
        result, peak, total = _step(
            result, peak, total, queries, keys, values, grads, shift, mean, keep, factor, cap, True, HAS_CAP, GRADIENT
        )

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
            keys = load_tokens(keys_of, zero, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST)
            values = load_tokens(values_of, zero, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
            result, peak, total = _step(
                result, peak, total, queries, keys, values, grads, shift, mean, valid[None, :], factor, cap,
                True, HAS_CAP, GRADIENT,
            )  # fmt: skip

    if GRADIENT:
        # A query without keys keeps 0: none of its pairs is kept, whatever comes in for its output and log-sum-exp.
        result = result * scale
    else:
        # A query without a key has total 0 and peak -inf: output 0 / 1, log-sum-exp -inf + 0.
        total = tl.where(total == 0.0, 1.0, total)
        result = result / total[:, None]
        ln2: tl.constexpr = 0.6931471805599453
        tl.store(lse + stat, (peak + tl.log2(total)) * ln2, mask=exists)
    at = tl.arange(0, PAD)
    to = out + batch * out_batch + head * out_head + query.to(tl.int64)[:, None] * out_token + at[None, :] * out_dim
    tl.store(to, result.to(out.dtype.element_ty), mask=exists[:, None] & (at < SIZE)[None, :])


def run_rows(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, p: BlockPattern, scale: float, softcap: float, *,
    lse: Tensor | None = None, given: tuple[Tensor, Tensor, Tensor] | None = None,
) -> None:  # fmt: skip
    """Fills the output of the forward and its log-sum-exp, or the gradient of the queries.

    Args:
        q, k, v: [batch, heads or kv_heads, tokens, dim].
        out: like the output, or like q.
        p, scale, softcap: see backend.KernelBackend.
        lse: float32 [batch, heads, q_len]; None for the gradient.
        given: for the gradient that of the output, and of each query what it needs (see `_prepare`).
    """
    batch, heads, q_len, dim = q.shape
    r, group = rows_of(p), heads // k.shape[1]
    key_bytes = p.kv_len * (dim + v.shape[3]) * q.element_size() // group
    order = schedule(p, "queries", r.keys, batch, heads, key_bytes)
    grad, delta, base2 = given or (None, None, None)

    def run(launch: Launch) -> None:
        _rows[(batch * heads * p.rows * (p.block_q // launch.queries),)](
            q, k, v, grad, delta, base2, out, lse, order, r.indptr, r.starts, r.tile_ids, r.wholes, r.tiles, r.read,
            r.column_indptr, r.columns, r.q_order, r.kv_order, r.kv_range,
            *q.stride(), *k.stride(), *v.stride(), *([None] * 4 if grad is None else grad.stride()), *out.stride(),
            *r.strides(p), heads, group, p.rows, q_len, p.kv_len, len(p.tiles), *factors(scale, softcap),
            BLOCK_Q=p.block_q, BLOCK_K=p.block_k, M=launch.queries, N=launch.keys,
            HAS_COLUMNS=p.columns is not None, WIDE=is_wide(p.block_k, k, v), GRADIENT=grad is not None,
            **constants_of(q, v, p, softcap), STAGES=masked_stages(launch),
            num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    launched("forward" if grad is None else "queries", p, q, v, run)
