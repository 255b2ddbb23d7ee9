"""Block-sparse attention in Triton over the whole BlockPattern: forward, one program per strip of a query block."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_DIM = 256
# Triton supports NVIDIA GPUs from this compute capability on.
_MIN_CAPABILITY = (8, 0)
# Shared memory that every supported GPU has (ROCm's 64 KiB is the least).
_LEAST_SHARED = 64 * 1024


def runs_interpreted() -> bool:
    """Whether the kernel of this file runs in Triton's interpreter (decided by Triton when the file was imported)."""
    return not isinstance(_forward, triton.JITFunction)


# The kernel's functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@triton.jit  # type: ignore[untyped-decorator]
def _load_tokens(  # type: ignore[no-untyped-def]
    base, token, valid, stride_token, stride_dim, SIZE: tl.constexpr, PAD: tl.constexpr, UPCAST: tl.constexpr
):
    """Rows `token` of a [tokens, SIZE] matrix as [n, PAD]; zeros where not valid and beyond SIZE."""
    lane = tl.arange(0, PAD)
    # A head of a long video passes 2**31 elements: token offsets are 64 bit.
    where = base + token.to(tl.int64)[:, None] * stride_token + lane[None, :] * stride_dim
    mask = valid[:, None]
    if SIZE != PAD:
        mask = mask & (lane < SIZE)[None, :]
    x = tl.load(where, mask=mask, other=0.0)
    # Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot.
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit
def _accumulate(out, peak, total, logits, values):  # type: ignore[no-untyped-def]
    """One step of the online softmax in base 2."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # While a query has seen no key its peak is -inf: 0 in its place gives weights 0, not NaN.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weight = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weight, 1)
    out = tl.dot(weight.to(values.dtype), values, out * decay[:, None], input_precision="ieee")
    return out, new_peak, total


_LENGTHS = ["heads", "group", "rows", "q_len", "kv_len", "read_rows"]


# Lengths are not specialised: a length that happens to be a multiple of 16 must not compile the kernel anew.
@triton.jit(do_not_specialize=_LENGTHS)  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q, k, v, out, lse,
    indptr, starts, tile_ids, tiles, read, column_indptr, columns, q_order, kv_order, kv_range,
    q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim,
    v_batch, v_head, v_token, v_dim,
    out_batch, out_head, out_token,
    indptr_batch, indptr_head, column_batch, column_head,
    q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    heads, group, rows, q_len, kv_len, read_rows, factor,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr, HAS_RANGE: tl.constexpr,
    UPCAST: tl.constexpr,
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

    lane = (unit % strips) * M + tl.arange(0, M)
    place = row * BLOCK_Q + lane
    exists = place < q_len
    if HAS_Q_ORDER:
        query = tl.load(q_order + batch * q_order_batch + head * q_order_head + place, mask=exists, other=0)
    else:
        query = place
    queries = _load_tokens(q + batch * q_batch + head * q_head, query, exists, q_token, q_dim, DIM, DIM_PAD, UPCAST)
    keys_of = k + batch * k_batch + (head // group) * k_head
    values_of = v + batch * v_batch + (head // group) * v_head
    kv_order += batch * kv_order_batch + head * kv_order_head

    low = 0
    high = kv_len
    if HAS_RANGE:
        low = tl.load(kv_range + batch * range_batch)
        high = tl.load(kv_range + batch * range_batch + 1)

    result = tl.zeros([M, VALUE_PAD], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)

    # A value that no query of its row reads is not loaded, so NaN and infinities there do not matter; the last row
    # has a table of its own, since its tiles also speak of queries that do not exist. A NaN value that some query
    # reads reaches the queries of the same row that do not (0 * NaN), and no other row. A NaN key reaches its readers.
    read += tl.where(row == rows - 1, read_rows, 0) * BLOCK_K

    indptr += batch * indptr_batch + head * indptr_head + row
    first = tl.load(indptr)
    count = (tl.load(indptr + 1) - first).to(tl.int32)
    for i in range(0, count * pieces):
        entry = first + i // pieces
        inner = (i % pieces) * N + tl.arange(0, N)
        start = tl.load(starts + entry)
        tile = tl.load(tile_ids + entry).to(tl.int64)
        key_place = start + inner
        valid = key_place < kv_len
        if HAS_KV_ORDER:
            key = tl.load(kv_order + key_place, mask=valid, other=0)
        else:
            key = key_place
        if HAS_RANGE:
            valid = valid & (key >= low) & (key < high)
        keys = _load_tokens(keys_of, key, valid, k_token, k_dim, DIM, DIM_PAD, UPCAST)
        is_read = valid & (tl.load(read + tile * BLOCK_K + inner) != 0)
        values = _load_tokens(values_of, key, is_read, v_token, v_dim, VALUE_DIM, VALUE_PAD, UPCAST)
        logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
        edge = start + (i % pieces) * N
        # An order spreads the tokens of a range over all places, so that no block is known to lie inside it.
        ragged = (edge < low) | (edge + N > high) | (HAS_KV_ORDER and HAS_RANGE)
        if ragged | (tile != 0):
            cell = tiles + tile * (BLOCK_Q * BLOCK_K) + lane[:, None] * BLOCK_K + inner[None, :]
            keep = tl.load(cell, mask=valid[None, :], other=1) != 0
            logits = tl.where(keep & valid[None, :], logits, -float("inf"))
        result, peak, total = _accumulate(result, peak, total, logits, values)

    if HAS_COLUMNS:
        column_indptr += batch * column_batch + head * column_head + row
        first = tl.load(column_indptr)
        count = (tl.load(column_indptr + 1) - first).to(tl.int32)
        for i in range(0, count, N):
            inner = i + tl.arange(0, N)
            valid = inner < count
            key = tl.load(columns + first + inner, mask=valid, other=0)
            if HAS_KV_ORDER:
                key = tl.load(kv_order + key, mask=valid, other=0)
            if HAS_RANGE:
                valid = valid & (key >= low) & (key < high)
            keys = _load_tokens(keys_of, key, valid, k_token, k_dim, DIM, DIM_PAD, UPCAST)
            values = _load_tokens(values_of, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, UPCAST)
            logits = tl.dot(queries, tl.trans(keys), input_precision="ieee") * factor
            logits = tl.where(valid[None, :], logits, -float("inf"))
            result, peak, total = _accumulate(result, peak, total, logits, values)

    # A query without a key has total 0 and peak -inf: output 0 / 1, log-sum-exp -inf + 0.
    total = tl.where(total == 0.0, 1.0, total)
    value_lane = tl.arange(0, VALUE_PAD)
    to = out + batch * out_batch + head * out_head + query.to(tl.int64)[:, None] * out_token + value_lane[None, :]
    stored = exists[:, None] & (value_lane < VALUE_DIM)[None, :]
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=stored)
    ln2: tl.constexpr = 0.6931471805599453
    tl.store(lse + (batch * heads + head) * q_len + query, (peak + tl.log2(total)) * ln2, mask=exists)


class Launch(NamedTuple):
    """How one program of the kernel is cut and run."""

    queries: int
    keys: int
    warps: int
    stages: int


def choose_launch(block_q: int, block_k: int, dim: int, value_dim: int, itemsize: int, shared: int) -> Launch:
    """Queries and keys at a time, warps and pipeline stages; a rule by sizes, never by length, and nothing is timed.

    Args:
        block_q, block_k: sizes of the pattern's blocks; what is returned divides them.
        dim, value_dim: padded head dims.
        itemsize: bytes of an element.
        shared: bytes of shared memory that a program may use.
    """
    wide = max(dim, value_dim)
    if itemsize == 4:
        # Exact float32 products use no tensor cores and are unrolled: larger pieces spill thousands of bytes (ptxas).
        queries, keys = min(block_q, 32 if wide <= 128 else 16), 16
    else:
        queries, keys = min(block_q, 128 if wide <= 128 else 64), min(block_k, 64)

    def need(queries: int, keys: int, stages: int) -> int:
        return itemsize * (queries * dim + stages * keys * (dim + value_dim) + queries * keys)

    stages = 3
    while need(queries, keys, stages) > shared and (stages > 1 or keys > 16 or queries > 16):
        if stages > 2 or (stages == 2 and keys == 16):
            stages -= 1
        elif keys > 16:
            keys //= 2
        else:
            queries //= 2
    return Launch(queries, keys, 4 if queries <= 64 else 8, stages)


@BACKENDS.register("triton_block_sparse")
class TritonBlockSparse:
    """Reads only the kept key blocks and columns; float16, bfloat16, float32; NVIDIA and ROCm GPUs; forward only.

    Orders are read by index and grouped heads share their keys: nothing is permuted, repeated or gathered in memory.
    Measured: equality with the reference in Triton's interpreter on the CPU, all features. Not measured: anything on
    a GPU, so neither that the kernel compiles there nor its speed, nor whether the rule of `choose_launch` is good.
    """

    @staticmethod
    def why_not(pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool) -> str | None:
        """See dispatch.Backend."""
        if q.device.type != "cuda" and not (runs_interpreted() and q.device.type == "cpu"):
            where = f"the tensors are on {q.device}"
            return f"needs a CUDA or ROCm GPU, {where}; on the CPU only Triton's interpreter can run it"
        if q.device.type == "cuda" and torch.version.hip is None and not runs_interpreted():
            capability = torch.cuda.get_device_capability(q.device)
            if capability < _MIN_CAPABILITY:
                return f"needs compute capability 8.0 or more, {q.device} has {capability[0]}.{capability[1]}"
        if needs_grad:
            return "it is forward only, and a gradient is needed"
        if q.dtype not in _DTYPES:
            return f"needs float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
        for name, size in (("dim", q.shape[3]), ("value dim", v.shape[3])):
            if not 1 <= size <= _MAX_DIM:
                return f"needs a {name} from 1 to {_MAX_DIM}, got {size}"
        for name, device in (("k", k.device), ("v", v.device), ("pattern", pattern.device if pattern else q.device)):
            if device != q.device:
                return f"needs `{name}` on {q.device} like `q`, it is on {device}"
        if pattern is not None:
            for name, size in (("block_q", pattern.block_q), ("block_k", pattern.block_k)):
                if size < 16 or size & (size - 1):
                    return f"needs `{name}` to be a power of two from 16 on, got {size}"
        return None

    @staticmethod
    def attention(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor, Tensor]:
        """See dispatch.Backend. Accumulates in float32, float32 products without TF32; two runs give the same bits."""
        batch, heads, q_len, dim = q.shape
        value_dim = v.shape[3]
        out = q.new_empty(batch, heads, q_len, value_dim)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        if lse.numel() == 0:
            return out, lse
        p = pattern
        dim_pad, value_pad = (max(16, triton.next_power_of_2(size)) for size in (dim, value_dim))
        launch = _launch(p, dim_pad, value_pad, q)
        tail = q_len - (p.rows - 1) * p.block_q
        # [2, tiles, block_k]: whether any query of a row reads the key, for a whole row and for the last one.
        read = torch.stack([p.tiles.any(1), p.tiles[:, :tail].any(1)])
        orders, order_strides = [], []
        for order in (p.q_order, p.kv_order):
            orders.append(p.indptr if order is None else _rows_dense(order))
            order_strides += [0, 0] if order is None else _lead_strides(orders[-1])
        indptr = _rows_dense(p.indptr)
        column_indptr = indptr if p.column_indptr is None else _rows_dense(p.column_indptr)
        columns = p.starts if p.columns is None else p.columns
        kv_range = p.starts if p.kv_range is None else _rows_dense(p.kv_range)
        range_stride = kv_range.stride(0) if p.kv_range is not None and len(kv_range) > 1 else 0
        units = p.rows * (p.block_q // launch.queries)
        # Triton launches on the current device, which need not be that of the tensors.
        with torch.cuda.device(q.device) if q.is_cuda else contextlib.nullcontext():
            _forward[(batch * heads * units,)](
                q, k, v, out, lse,
                indptr, p.starts.contiguous(), p.tile_ids.contiguous(), p.tiles.contiguous().view(torch.uint8),
                read.view(torch.uint8), column_indptr, columns.contiguous(), *orders, kv_range,
                *q.stride(), *k.stride(), *v.stride(), *out.stride()[:3],
                *_lead_strides(indptr), *_lead_strides(column_indptr), *order_strides, range_stride,
                heads, heads // k.shape[1], p.rows, q_len, p.kv_len, len(p.tiles), scale * 1.4426950408889634,
                DIM=dim, DIM_PAD=dim_pad, VALUE_DIM=value_dim, VALUE_PAD=value_pad,
                BLOCK_Q=p.block_q, BLOCK_K=p.block_k, M=launch.queries, N=launch.keys,
                HAS_COLUMNS=p.columns is not None, HAS_Q_ORDER=p.q_order is not None,
                HAS_KV_ORDER=p.kv_order is not None, HAS_RANGE=p.kv_range is not None, UPCAST=runs_interpreted(),
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
        return out, lse


def _rows_dense(t: Tensor) -> Tensor:
    """The tensor with its last dimension dense in memory; leading sizes that are only repeated stay so."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _lead_strides(t: Tensor) -> list[int]:
    """Strides over batch and heads; a size of 1 stands for all and gets stride 0."""
    return [t.stride(i) if t.shape[i] > 1 else 0 for i in (0, 1)]


def _launch(pattern: BlockPattern, dim: int, value_dim: int, q: Tensor) -> Launch:
    """The launch for a call; the interpreter pays per operation, so it takes whole blocks."""
    if runs_interpreted():
        return Launch(pattern.block_q, pattern.block_k, 4, 1)
    properties: Any = torch.cuda.get_device_properties(q.device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0)) or _LEAST_SHARED
    return choose_launch(pattern.block_q, pattern.block_k, dim, value_dim, q.element_size(), shared)
