"""Block-sparse attention in Triton with 8-bit logits, in the manner of SageAttention: forward, the whole pattern."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.kernels import triton_common
from hf_sparse_attn.kernels.triton_common import (
    LOG2E,
    Launch,
    constants_of,
    jit,
    lead_strides,
    lists_of,
    load_tokens,
    on_device,
    padded,
    rows_dense,
    tanh,
    tokens_at,
    valid_range,
)
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float16, torch.bfloat16)
# Keys that one program of the preparation adds up, and that it takes at a time.
_SUMMED = 1024
_TAKEN = 64


@triton.jit
def _quantise(x):  # type: ignore[no-untyped-def]
    """int8 rows of a float32 [n, dim] and the step of each row; a row with NaN or infinities gets the step NaN."""
    flaw = tl.sum(x * 0.0, 1)
    x = tl.where((flaw == 0.0)[:, None], x, 0.0)
    largest = tl.max(tl.abs(x), 1)
    # A step is never 0: a masked logit is -inf times it.
    some = largest > 1e-30
    largest = tl.where(some, largest, 127.0)
    step = largest / 127.0 + flaw
    return tl.floor(x * (127.0 / largest)[:, None] + 0.5).to(tl.int8), step


@jit
def _sum_keys(  # type: ignore[no-untyped-def]
    k, kv_range, sums, counts, k_batch, k_head, k_token, k_dim, range_batch, kv_heads, kv_len, chunks,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, SUMMED: tl.constexpr, TAKEN: tl.constexpr, HAS_RANGE: tl.constexpr,
):  # fmt: skip
    """Sum and number of the valid, finite keys among SUMMED of one head."""
    program = tl.program_id(0)
    batch = (program // chunks // kv_heads).to(tl.int64)
    keys_of = k + batch * k_batch + (program // chunks % kv_heads).to(tl.int64) * k_head
    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)
    total = tl.zeros([DIM_PAD], tl.float32)
    number = tl.zeros([TAKEN], tl.float32)
    for i in range(0, SUMMED, TAKEN):
        key = program % chunks * SUMMED + i + tl.arange(0, TAKEN)
        valid = (key >= low) & (key < high)
        keys = load_tokens(keys_of, program * 0, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, True)
        # A key that is not finite must not spoil the mean, and so the keys of all: perhaps nobody reads it.
        finite = tl.sum(keys * 0.0, 1) == 0.0
        total += tl.sum(tl.where(finite[:, None], keys, 0.0), 0)
        number += tl.where(finite & valid, 1.0, 0.0)
    tl.store(sums + program.to(tl.int64) * DIM_PAD + tl.arange(0, DIM_PAD), total)
    tl.store(counts + program, tl.sum(number, 0))


@jit
def _quantise_keys(  # type: ignore[no-untyped-def]
    k, mean, keys8, steps, k_batch, k_head, k_token, k_dim, kv_heads, kv_len, chunks,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, TAKEN: tl.constexpr,
):  # fmt: skip
    """TAKEN keys of one head, less the mean key, in 8 bits."""
    program = tl.program_id(0)
    flat = (program // chunks).to(tl.int64)
    keys_of = k + flat // kv_heads * k_batch + flat % kv_heads * k_head
    key = program % chunks * TAKEN + tl.arange(0, TAKEN)
    valid = key < kv_len
    lane = tl.arange(0, DIM_PAD)
    keys = load_tokens(keys_of, program * 0, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, True)
    quantised, step = _quantise(keys - tl.load(mean + flat * DIM_PAD + lane)[None, :])
    at = flat * kv_len + key
    tl.store(keys8 + at[:, None] * DIM_PAD + lane[None, :], quantised, mask=valid[:, None])
    tl.store(steps + at, step, mask=valid)


@triton.jit
def _accumulate(out, peak, total, logits, step, values):  # type: ignore[no-untyped-def]
    """One round of the online softmax in base 2; `logits` and `peak` are in steps of the query."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # While a query has seen no key its peak is -inf: 0 in its place gives weights 0, not NaN.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    # One multiplication and addition, as without steps.
    weight = tl.exp2(logits * step[:, None] - (shift * step)[:, None])
    decay = tl.exp2((peak - shift) * step)
    total = total * decay + tl.sum(weight, 1)
    out = tl.dot(weight.to(values.dtype), values, out * decay[:, None], input_precision="ieee")
    return out, new_peak, total


@jit
def _attend(  # type: ignore[no-untyped-def]
    q, keys8, key_steps, mean, v, out, lse,
    read, indptr, starts, tile_ids, tiles, column_indptr, columns, q_order, kv_order, kv_range,
    q_batch, q_head, q_token, q_dim,
    v_batch, v_head, v_token, v_dim,
    indptr_batch, indptr_head, column_batch, column_head,
    q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    heads, group, rows, q_len, kv_len, read_rows, factor, cap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr,
    HAS_RANGE: tl.constexpr, HAS_CAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """M queries of one row and head over all key blocks and columns of the row, N keys at a time."""
    strips: tl.constexpr = BLOCK_Q // M
    pieces: tl.constexpr = BLOCK_K // N
    program = tl.program_id(0)
    # Last rows first: under a causal pattern they are the longest, and must not be left for the end.
    unit = rows * strips - 1 - program % (rows * strips)
    row = unit // strips
    head_of_all = program // (rows * strips)
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)
    kv_head = batch * (heads // group) + head // group

    lane = (unit % strips) * M + tl.arange(0, M)
    place = row * BLOCK_Q + lane
    exists = place < q_len
    query = tokens_at(q_order + batch * q_order_batch + head * q_order_head, place, exists, HAS_Q_ORDER)
    zero = row * 0
    queries = load_tokens(
        q + batch * q_batch + head * q_head, zero, query, exists, q_token, q_dim, DIM, DIM_PAD, True, True, True
    )
    scaled = queries * factor
    # What the mean key, which the keys are without, adds to all logits of a query.
    offset = tl.sum(scaled * tl.load(mean + kv_head * DIM_PAD + tl.arange(0, DIM_PAD))[None, :], 1)
    queries8, step = _quantise(scaled)
    weight_step = step
    if HAS_CAP:
        weight_step = step * 0.0 + 1.0
    keys_of = keys8 + kv_head * kv_len * DIM_PAD
    key_steps += kv_head * kv_len
    values_of = v + batch * v_batch + (head // group) * v_head
    kv_order += batch * kv_order_batch + head * kv_order_head

    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)

    result = tl.zeros([M, VALUE_PAD], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)

    # A value that no query of its row reads is not loaded, so NaN and infinities there do not matter; the last row
    # has a table of its own, since its tiles also speak of queries that do not exist.
    read += tl.where(row == rows - 1, read_rows, 0) * BLOCK_K

    indptr += batch * indptr_batch + head * indptr_head + row
    first = tl.load(indptr)
    count = (tl.load(indptr + 1) - first).to(tl.int32)
    for i in range(0, count * pieces):
        entry = first + i // pieces
        inner = (i % pieces) * N + tl.arange(0, N)
        start = tl.load(starts + entry)
        key = start + inner
        valid = key < kv_len
        key = tokens_at(kv_order, key, valid, HAS_KV_ORDER)
        if HAS_RANGE:
            valid = valid & (key >= low) & (key < high)
        is_read = valid
        if HAS_TILES:
            tile = tl.load(tile_ids + entry).to(tl.int64)
            is_read = valid & (tl.load(read + tile * BLOCK_K + inner) != 0)
        keys = load_tokens(keys_of, zero, key, valid, DIM_PAD, 1, DIM_PAD, DIM_PAD, True, True, False)
        key_step = tl.load(key_steps + key, mask=valid, other=0.0)
        values = load_tokens(values_of, zero, key, is_read, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
        logits = tl.dot(queries8, tl.trans(keys)).to(tl.float32) * key_step[None, :]
        if HAS_CAP:
            logits = cap * tanh((logits * step[:, None] + offset[:, None]) / cap)
        edge = start + (i % pieces) * N
        # An order spreads the tokens of a range over all places, so that no block is known to lie inside it.
        ragged = (edge < low) | (edge + N > high) | (HAS_KV_ORDER and HAS_RANGE)
        if HAS_TILES:
            if ragged | (tile != 0):
                cell = tiles + tile * (BLOCK_Q * BLOCK_K) + lane[:, None] * BLOCK_K + inner[None, :]
                keep = tl.load(cell, mask=valid[None, :], other=1) != 0
                logits = tl.where(keep & valid[None, :], logits, -float("inf"))
        elif ragged:
            logits = tl.where(valid[None, :], logits, -float("inf"))
        result, peak, total = _accumulate(result, peak, total, logits, weight_step, values)

    if HAS_COLUMNS:
        column_indptr += batch * column_batch + head * column_head + row
        first = tl.load(column_indptr)
        count = (tl.load(column_indptr + 1) - first).to(tl.int32)
        for i in range(0, count, N):
            inner = i + tl.arange(0, N)
            valid = inner < count
            key = tl.load(columns + first + inner, mask=valid, other=0)
            key = tokens_at(kv_order, key, valid, HAS_KV_ORDER)
            if HAS_RANGE:
                valid = valid & (key >= low) & (key < high)
            keys = load_tokens(keys_of, zero, key, valid, DIM_PAD, 1, DIM_PAD, DIM_PAD, True, True, False)
            key_step = tl.load(key_steps + key, mask=valid, other=0.0)
            values = load_tokens(values_of, zero, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
            logits = tl.dot(queries8, tl.trans(keys)).to(tl.float32) * key_step[None, :]
            if HAS_CAP:
                logits = cap * tanh((logits * step[:, None] + offset[:, None]) / cap)
            logits = tl.where(valid[None, :], logits, -float("inf"))
            result, peak, total = _accumulate(result, peak, total, logits, weight_step, values)

    # A query without a key has total 0 and peak -inf: output 0 / 1, log-sum-exp -inf + 0.
    total = tl.where(total == 0.0, 1.0, total)
    height = peak * weight_step + tl.log2(total)
    # A soft cap has had the offset already.
    if not HAS_CAP:
        height += offset
    spot = (batch * heads + head) * q_len + query
    value_lane = tl.arange(0, VALUE_PAD)
    stored = exists[:, None] & (value_lane < VALUE_DIM)[None, :]
    to = out + (spot * VALUE_DIM)[:, None] + value_lane[None, :]
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=stored)
    tl.store(lse + spot, height * 0.6931471805599453, mask=exists)


def choose_launch(block_q: int, block_k: int, dim: int, value_dim: int, shared: int, hops: int = 0) -> Launch:
    """Queries and keys at a time, warps and pipeline stages; a rule by sizes, never by length, and nothing is timed.

    Args:
        block_q, block_k: sizes of the pattern's blocks; what is returned divides them.
        dim, value_dim: padded head dims.
        shared: bytes of shared memory that a program may use.
        hops: loads that the address of a key waits for; as many need more stages.
    """
    queries, keys = min(block_q, 128 if max(dim, value_dim) <= 128 else 64), min(block_k, 64)

    def need(queries: int, keys: int, buffers: int) -> int:
        return queries * dim + buffers * keys * (dim + 2 * value_dim) + 2 * queries * keys

    buffers = 2
    while need(queries, keys, buffers) > shared and (buffers > 1 or keys > 16 or queries > 16):
        if buffers > 1:
            buffers -= 1
        elif keys > 16:
            keys //= 2
        else:
            queries //= 2
    # Triton spreads the stages evenly over loads that wait for one another (seen in what it compiles).
    return Launch(queries, keys, 4 if queries <= 64 else 8, 1 + buffers * (1 + hops))


@BACKENDS.register("triton_int8")
class TritonInt8:
    """Opt-in, inexact: logits from 8-bit queries and keys (SageAttention), values in 16 bits; forward only.

    As in SageAttention (arXiv 2410.02367) the mean key of a head, over its valid keys, is taken off the keys: softmax
    does not see it, outlier channels vanish, and what it adds is given back to the log-sum-exp (and before a soft
    cap). Queries, with the softmax scale, and keys are then rounded to the nearest of 255 steps, the products are
    summed exactly in int32; weights times values are products of 16 bits summed in float32.

    Deviations: a step for every query and every key, where the paper has one for a block of them. It costs as much
    (the peak of the softmax is kept in steps of the query), is more exact, suits key blocks from any start and in any
    order, and keeps tokens apart: what a padded token holds changes no bit elsewhere. Only finite keys enter the mean.
    Keys are prepared whole at each call, read or not: it is for many queries, not for decoding.

    Measured on a CPU against float64, random normal inputs, dims 64 and 128, 1,024 and 4,096 keys, all read: output
    off by 0.9 % in relative L2 (L1 alike, cosine 0.99996), the worst element by 2 % of the largest output; PyTorch in
    float16 is off by 0.02 %. With a step for a block of 64 keys: 1.3 %. With four channels of the keys moved by 15 to
    30: 0.9 % again; without taking off the mean 6.8 %. Equality with these steps in plain torch: in Triton's
    interpreter, all features. Not measured: anything on a GPU, so neither its speed nor `choose_launch`.
    """

    # Never: a user who did not ask for less exact logits must not get them.
    auto_rank: ClassVar[Mapping[str, int]] = {}
    # Largest error of an output over the largest output that is its nature and no fault (measured: 0.02).
    inexact: ClassVar[float] = 0.04

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        reason = triton_common.why_not(pattern, q, k, v, needs_grad, _DTYPES)
        if reason is not None:
            return f"{reason} (values are multiplied in 16 bits)" if q.dtype not in _DTYPES else reason
        return triton_common.why_not_blocks(pattern)

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend. Logits from 8 bits; two runs are bit-equal."""
        batch, heads, q_len, _ = q.shape
        value_dim = v.shape[3]
        out = q.new_empty(batch, heads, q_len, value_dim)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        if lse.numel() == 0:
            return out, lse
        p = pattern
        keys8, steps, mean = quantise_keys(k, p.kv_range)
        launch = _launch(p, keys8.shape[3], padded(value_dim), q)
        tail = q_len - (p.rows - 1) * p.block_q
        # [2, tiles, block_k]: whether any query of a row reads the key, for a whole row and for the last one.
        read = torch.stack([p.tiles.any(1), p.tiles[:, :tail].any(1)]) if len(p.tiles) > 1 else p.tiles
        tensors, strides = lists_of(p)
        with on_device(q):
            _attend[(batch * heads * p.rows * (p.block_q // launch.queries),)](
                q, keys8, steps, mean, v, out, lse, read.contiguous().view(torch.uint8), *tensors,
                *q.stride(), *v.stride(), *strides,
                heads, heads // k.shape[1], p.rows, q_len, p.kv_len, len(p.tiles), scale * LOG2E, softcap * LOG2E,
                BLOCK_Q=p.block_q, BLOCK_K=p.block_k, M=launch.queries, N=launch.keys, HAS_TILES=len(p.tiles) > 1,
                HAS_COLUMNS=p.columns is not None, **constants_of(q, v, p, softcap) | {"DIM_PAD": keys8.shape[3]},
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        return out, lse


def quantise_keys(k: Tensor, kv_range: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Keys in 8 bits, less their mean.

    Args:
        k: [batch, kv_heads, kv_len, dim].
        kv_range: int32 [batch or 1, 2], valid keys [start, end), or None.

    Returns:
        int8 [batch, kv_heads, kv_len, padded dim], their steps float32 [batch, kv_heads, kv_len] (NaN for a key that
        is not finite), and the mean of the valid, finite keys, float32 [batch, kv_heads, padded dim].
    """
    batch, kv_heads, kv_len, dim = k.shape
    # 32: the least depth of an 8-bit product on tensor cores.
    pad = max(32, triton.next_power_of_2(dim))
    kv_range = None if kv_range is None else rows_dense(kv_range)
    chunks = -(-kv_len // _SUMMED)
    sums = k.new_empty(batch, kv_heads, chunks, pad, dtype=torch.float32)
    counts = sums.new_empty(batch, kv_heads, chunks, 1)
    keys8 = k.new_empty(batch, kv_heads, kv_len, pad, dtype=torch.int8)
    steps = sums.new_empty(batch, kv_heads, kv_len)
    with on_device(k):
        _sum_keys[(batch * kv_heads * chunks,)](
            k, steps if kv_range is None else kv_range, sums, counts, *k.stride(), lead_strides(kv_range)[0],
            kv_heads, kv_len, chunks, DIM=dim, DIM_PAD=pad, SUMMED=_SUMMED, TAKEN=_TAKEN,
            HAS_RANGE=kv_range is not None,
        )  # fmt: skip
        mean = sums.sum(2) / counts.sum(2).clamp(min=1)
        chunks = -(-kv_len // _TAKEN)
        _quantise_keys[(batch * kv_heads * chunks,)](
            k, mean, keys8, steps, *k.stride(), kv_heads, kv_len, chunks, DIM=dim, DIM_PAD=pad, TAKEN=_TAKEN
        )
    return keys8, steps, mean


def _launch(pattern: BlockPattern, dim: int, value_dim: int, q: Tensor) -> Launch:
    """The launch for a call; the interpreter pays per operation, so it takes whole blocks."""
    if not q.is_cuda:
        return Launch(pattern.block_q, pattern.block_k, 4, 1)
    _, shared = triton_common.device_limits(q.device)
    return choose_launch(pattern.block_q, pattern.block_k, dim, value_dim, shared, int(pattern.kv_order is not None))
