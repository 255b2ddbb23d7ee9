"""Attention of few queries over selected blocks of a long cache in Triton: split over keys, merged by log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.decoding import Kept
from hf_sparse_attn.kernels import triton_common
from hf_sparse_attn.kernels.triton_common import (
    accumulate,
    constants_of,
    factors,
    jit,
    lists_of,
    load_tokens,
    logits_of,
    on_device,
    padded,
    store_split,
    tokens_at,
    valid_range,
)
from hf_sparse_attn.kernels.triton_decode_pages import attend_cache
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Above this many queries the strips of triton_block_sparse fill a GPU, and nothing is left to split over keys for.
_MAX_QUERIES = 64
# Fewer steps of a split than this cost more in merging than they gain in running side by side.
_LEAST_STEPS = 2
_MAX_SPLITS = 128
# Splits that the merging kernel reads at a time.
_MERGED = 16


@jit
def _attend(  # type: ignore[no-untyped-def]
    q, k, v, out, lse,
    indptr, starts, tile_ids, tiles, column_indptr, columns, q_order, kv_order, kv_range,
    q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim,
    v_batch, v_head, v_token, v_dim,
    indptr_batch, indptr_head, column_batch, column_head,
    q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    batch_size, heads, group, rows, strips, splits, block_q, q_len, kv_len, factor, cap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_K: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    HAS_TILES: tl.constexpr, HAS_COLUMNS: tl.constexpr, HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr,
    HAS_RANGE: tl.constexpr, HAS_CAP: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of one row: M pairs of a query and one of PACK heads that read the same keys, N keys at a time.

    The keys of a row are numbered through, first those of its blocks, then its columns, and cut in steps of N; split s
    of S takes steps [total * s / S, total * (s + 1) / S). Blocks may have any size: a step may cross their borders.
    With SPLIT, `out` and `lse` are [splits, batch, heads, q_len, ...] in float32 and `lse` is in base 2.
    """
    program = tl.program_id(0)
    split = program % splits
    unit = program // splits
    strip = unit % strips
    row = unit // strips % rows
    lists = heads // PACK
    batch = (unit // (strips * rows) // lists).to(tl.int64)
    first_head = (unit // (strips * rows) % lists).to(tl.int64) * PACK

    lane = strip * M + tl.arange(0, M)
    query_lane = lane // PACK
    head = first_head + lane % PACK
    place = row * block_q + query_lane
    exists = (query_lane < block_q) & (place < q_len)
    query = tokens_at(q_order + batch * q_order_batch + first_head * q_order_head, place, exists, HAS_Q_ORDER)
    dim_lane = tl.arange(0, DIM_PAD)
    zero = row * 0
    where = q + batch * q_batch + (head * q_head + query.to(tl.int64) * q_token)[:, None] + dim_lane[None, :] * q_dim
    queries = tl.load(where, mask=exists[:, None] & (dim_lane < DIM)[None, :], other=0.0)
    # Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot.
    if UPCAST:
        queries = queries.to(tl.float32)
    keys_of = k + batch * k_batch + (first_head // group) * k_head
    values_of = v + batch * v_batch + (first_head // group) * v_head
    kv_order += batch * kv_order_batch + first_head * kv_order_head
    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)

    indptr += batch * indptr_batch + first_head * indptr_head + row
    first = tl.load(indptr)
    count = (tl.load(indptr + 1) - first).to(tl.int32)
    block_steps = tl.cdiv(count * BLOCK_K, N)
    steps = block_steps
    if HAS_COLUMNS:
        column_indptr += batch * column_batch + first_head * column_head + row
        first_column = tl.load(column_indptr)
        column_count = (tl.load(column_indptr + 1) - first_column).to(tl.int32)
        steps += tl.cdiv(column_count, N)
    begin = (steps.to(tl.int64) * split // splits).to(tl.int32)
    end = (steps.to(tl.int64) * (split + 1) // splits).to(tl.int32)

    result = tl.zeros([M, VALUE_PAD], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)

    for i in range(begin, tl.minimum(end, block_steps)):
        if BLOCK_K % N == 0:
            # The whole step lies in one block: its number is a scalar.
            entry = first + i // (BLOCK_K // N)
            inner = (i % (BLOCK_K // N)) * N + tl.arange(0, N)
            start = tl.load(starts + entry)
            if HAS_TILES:
                tile = tl.load(tile_ids + entry) + tl.zeros([N], tl.int32)
        else:
            position = i * N + tl.arange(0, N)
            listed = position // BLOCK_K < count
            entry = first + position // BLOCK_K
            inner = position % BLOCK_K
            start = tl.load(starts + entry, mask=listed, other=kv_len)
            if HAS_TILES:
                tile = tl.load(tile_ids + entry, mask=listed, other=0)
        key = start + inner
        valid = key < kv_len
        if HAS_TILES:
            cell = tiles + (tile.to(tl.int64) * block_q * BLOCK_K + inner)[None, :] + query_lane[:, None] * BLOCK_K
        key = tokens_at(kv_order, key, valid, HAS_KV_ORDER)
        if HAS_RANGE:
            valid = valid & (key >= low) & (key < high)
        keep = valid[None, :]
        is_read = valid
        if HAS_TILES:
            partial = valid & (tile != 0)
            keep = keep & (tl.load(cell, mask=exists[:, None] & partial[None, :], other=1) != 0)
            # A value that none of the queries reads is not loaded, so NaN and infinities there do not matter.
            is_read = tl.max((keep & exists[:, None]).to(tl.int32), 0) != 0
        keys = load_tokens(keys_of, zero, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST)
        values = load_tokens(values_of, zero, key, is_read, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
        logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
        logits = tl.where(keep, logits, -float("inf"))
        result, peak, total = accumulate(result, peak, total, logits, values)

    if HAS_COLUMNS:
        for i in range(tl.maximum(begin, block_steps) - block_steps, end - block_steps):
            inner = i * N + tl.arange(0, N)
            valid = inner < column_count
            key = tl.load(columns + first_column + inner, mask=valid, other=0)
            key = tokens_at(kv_order, key, valid, HAS_KV_ORDER)
            if HAS_RANGE:
                valid = valid & (key >= low) & (key < high)
            keys = load_tokens(keys_of, zero, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST)
            values = load_tokens(values_of, zero, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
            logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
            logits = tl.where(valid[None, :], logits, -float("inf"))
            result, peak, total = accumulate(result, peak, total, logits, values)

    spot = ((split * batch_size + batch) * heads + head) * q_len + query
    store_split(out, lse, result, peak, total, spot, exists, VALUE_DIM, VALUE_PAD, SPLIT)


@jit
def _merge(  # type: ignore[no-untyped-def]
    part, part_lse, out, lse, splits, spots,
    VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """One query of one head: its splits in their order, so that two runs give the same bits."""
    spot = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, VALUE_PAD)
    result = tl.zeros([VALUE_PAD], tl.float32)
    peak = -float("inf")
    total = 0.0
    for i in range(0, splits, MERGED):
        split = i + tl.arange(0, MERGED)
        at = split * spots + spot
        height = tl.load(part_lse + at, mask=split < splits, other=-float("inf"))
        seen = (split < splits)[:, None] & (lane < VALUE_DIM)[None, :]
        values = tl.load(part + (at * VALUE_DIM)[:, None] + lane[None, :], mask=seen, other=0.0)
        new_peak = tl.maximum(peak, tl.max(height, 0))
        shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
        weight = tl.exp2(height - shift)
        decay = tl.exp2(peak - shift)
        total = total * decay + tl.sum(weight, 0)
        result = result * decay + tl.sum(weight[:, None] * values, 0)
        peak = new_peak
    total = tl.where(total == 0.0, 1.0, total)
    to = out + spot * VALUE_DIM + lane
    tl.store(to, (result / total).to(out.dtype.element_ty), mask=lane < VALUE_DIM)
    tl.store(lse + spot, (peak + tl.log2(total)) * 0.6931471805599453)


class Launch(NamedTuple):
    """How one program of the kernel is cut and run."""

    lanes: int
    keys: int
    warps: int
    stages: int


def choose_launch(lanes: int, dim: int, value_dim: int, itemsize: int, shared: int, hops: int) -> Launch:
    """Lanes and keys at a time, warps and pipeline stages; a rule by sizes, never by length, and nothing is timed.

    Args:
        lanes: pairs of a query and a head that read the same keys.
        dim, value_dim: padded head dims.
        itemsize: bytes of an element.
        shared: bytes of shared memory that a program may use.
        hops: loads, one after the other, that the address of a key waits for; as many need more stages.
    """
    wide = max(dim, value_dim)
    # Exact float32 products use no tensor cores and are unrolled: larger pieces spill.
    most, keys = (16, 32 if wide <= 64 else 16) if itemsize == 4 else (64, 64 if wide <= 128 else 32)
    lanes = min(max(16, triton.next_power_of_2(lanes)), most)

    def need(keys: int, buffers: int) -> int:
        return itemsize * (lanes * dim + buffers * keys * (dim + value_dim) + lanes * keys)

    # What limits decoding is memory: bytes on their way count, and two programs should share a multiprocessor.
    buffers = 2
    while need(keys, buffers) > shared // 2 and (buffers > 1 or keys > 16):
        if buffers > 1:
            buffers -= 1
        else:
            keys //= 2
    # Triton spreads the stages evenly over loads that wait for one another (seen in what it compiles).
    return Launch(lanes, keys, 8 if lanes * wide > 64 * 128 else 4, 1 + buffers * (1 + hops))


def choose_splits(units: int, steps: int, multiprocessors: int) -> int:
    """Into how many splits the keys of every row are cut.

    The lengths of the rows are on the device and are not asked for: that would wait for all work before. Their mean
    follows from shapes; every row is cut in equally many splits, of equal length on the device whatever its own is.

    Args:
        units: programs without a split.
        steps: steps of a row of mean length.
        multiprocessors: of the device; each should have two programs, so that one computes while the other loads.
    """
    return max(1, min(2 * multiprocessors // max(units, 1), steps // _LEAST_STEPS, _MAX_SPLITS))


@BACKENDS.register("triton_decode")
class TritonDecode:
    """Decoding: at most 64 queries, the keys of a row split over the GPU and merged; the whole pattern; forward only.

    Query heads that share a key/value head and the pattern read each key once, together. Blocks may have any size.
    Measured: equality with the reference in Triton's interpreter on the CPU, all features, and that it compiles for
    the GPUs of the tests. Not measured: anything on a GPU, so neither its speed nor whether the rules of
    `choose_launch` and `choose_splits` are good.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {"cuda": 5}
    few_queries: ClassVar[bool] = True

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        if q.shape[2] > _MAX_QUERIES:
            return f"needs at most {_MAX_QUERIES} queries, got {q.shape[2]}"
        return triton_common.why_not(pattern, q, k, v, needs_grad, _DTYPES)

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend. Accumulates in float32, float32 products without TF32; two runs are bit-equal."""
        batch, heads, q_len, dim = q.shape
        value_dim = v.shape[3]
        out = q.new_empty(batch, heads, q_len, value_dim)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        if lse.numel() == 0:
            return out, lse
        p, group = pattern, heads // k.shape[1]
        pack = group if _one_for_all_heads(p) else 1
        lanes = pack * min(p.block_q, q_len)
        hops = int(p.kv_order is not None) + int(p.block_k % 64 != 0)
        launch, multiprocessors = _launch(lanes, padded(dim), padded(value_dim), hops, q)
        strips = -(-lanes // launch.lanes)
        units = batch * (heads // pack) * p.rows * strips
        splits = choose_splits(units, _mean_steps(p, launch.keys), multiprocessors)
        part, part_lse = _parts(out, lse, splits)
        tensors, strides = lists_of(p)
        with on_device(q):
            _attend[(units * splits,)](
                q, k, v, part, part_lse, *tensors,
                *q.stride(), *k.stride(), *v.stride(), *strides,
                batch, heads, group, p.rows, strips, splits, p.block_q, q_len, p.kv_len, *factors(scale, softcap)[:2],
                BLOCK_K=p.block_k, PACK=pack, M=launch.lanes, N=launch.keys, HAS_TILES=len(p.tiles) > 1,
                HAS_COLUMNS=p.columns is not None, SPLIT=splits > 1, **constants_of(q, v, p, softcap),
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            _merge_parts(part, part_lse, out, lse, splits)
        return out, lse

    @staticmethod
    def why_not_decode(q: Tensor, k: Tensor, v: Tensor, kept: Kept | None) -> str | None:
        """See backend.Decoder."""
        return TritonDecode.why_not(None, q, k, v, False)

    @staticmethod
    def decode(
        q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, scale: float, softcap: float, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See backend.Decoder. Every list is cut in equally many splits, whatever the pages in it are."""
        batch, heads, q_len, dim = q.shape
        value_dim, group = v.shape[3], heads // k.shape[1]
        out = q.new_empty(batch, heads, q_len, value_dim)
        lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
        lists, count, page, keys = 1, 0, 0, k.shape[2]
        pages = lse
        if kept is not None:
            pages = kept.pages.to(torch.int32).contiguous()
            lists, count, page = pages.shape[1], pages.shape[2], kept.size
            keys = min(keys, count * page)
        pack = 1 if lists == heads else group
        lanes = pack * q_len
        launch, multiprocessors = _launch(lanes, padded(dim), padded(value_dim), int(kept is not None), q)
        strips = -(-lanes // launch.lanes)
        units = batch * (heads // pack) * strips
        splits = choose_splits(units, -(-keys // launch.keys), multiprocessors)
        part, part_lse = _parts(out, lse, splits)
        with on_device(q):
            attend_cache[(units * splits,)](
                q, k, v, part, part_lse, pages, lse if first is None else first.to(torch.int64).contiguous(),
                *q.stride(), *k.stride(), *v.stride(),
                batch, heads, group, strips, splits, q_len, k.shape[2], lists, count, *factors(scale, softcap)[:2],
                DIM=dim, DIM_PAD=padded(dim), VALUE_DIM=value_dim, VALUE_PAD=padded(value_dim), PAGE=page, PACK=pack,
                M=launch.lanes, N=launch.keys, CAUSAL=q_len > 1, HAS_FIRST=first is not None, HAS_CAP=bool(softcap),
                SPLIT=splits > 1, UPCAST=triton_common.runs_interpreted(),
                num_warps=launch.warps, num_stages=launch.stages,
            )  # fmt: skip
            _merge_parts(part, part_lse, out, lse, splits)
        return out.transpose(1, 2).contiguous().transpose(1, 2), lse


def _parts(out: Tensor, lse: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Where splits put their output and log-sum-exp: a single one where the call does."""
    if splits == 1:
        return out, lse
    part = out.new_empty(splits, *out.shape, dtype=torch.float32)
    return part, part.new_empty(part.shape[:-1])


def _merge_parts(part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor, splits: int) -> None:
    if splits > 1:
        dim = out.shape[3]
        _merge[(lse.numel(),)](
            part, part_lse, out, lse, splits, lse.numel(),
            VALUE_DIM=dim, VALUE_PAD=padded(dim), MERGED=_MERGED, num_warps=4,
        )  # fmt: skip


def _one_for_all_heads(p: BlockPattern) -> bool:
    """Whether all heads read the same keys in the same order, by the shape of the pattern or by repeated memory."""
    parts = (p.indptr, p.column_indptr, p.q_order, p.kv_order)
    return all(t is None or t.shape[1] == 1 or t.stride(1) == 0 for t in parts)


def _mean_steps(p: BlockPattern, keys: int) -> int:
    """Steps of `keys` keys that a row takes, in the mean over all rows of the pattern; at most a row of all keys."""
    rows = p.batch * p.heads * p.rows
    if p.indptr.stride(1) == 0:
        rows //= p.heads
    listed = len(p.starts) * p.block_k + (0 if p.columns is None else len(p.columns))
    return -(-min(-(-listed // rows), p.kv_len) // keys)


def _launch(lanes: int, dim: int, value_dim: int, hops: int, q: Tensor) -> tuple[Launch, int]:
    """The launch for a call, and how many multiprocessors there are to fill."""
    if not q.is_cuda:
        # The interpreter runs one program after the other: splits would only be slower.
        return choose_launch(lanes, dim, value_dim, q.element_size(), 1 << 20, hops), 1
    multiprocessors, shared = triton_common.device_limits(q.device)
    return choose_launch(lanes, dim, value_dim, q.element_size(), shared, hops), multiprocessors
