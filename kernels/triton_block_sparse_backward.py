"""Gradients of block-sparse attention in Triton: those of queries along the rows, those of keys along their columns.

Three steps, as in dense flash attention: what every query needs (`_prepare`), the gradient of the queries, walking
the rows like the forward, and those of keys and values, one program per tile of keys over the transposed lists.
Single columns have transposed lists of their own, over the distinct columns, added after those of the blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.kernels.triton_block_sparse_parts import is_wide, launched, masked_stages
from hf_sparse_attn.kernels.triton_block_sparse_plan import (
    Keys,
    Share,
    columns_of,
    keys_of,
    readers_of,
    rows_of,
    schedule,
    share_of,
)
from hf_sparse_attn.kernels.triton_block_sparse_rows import logit_gradient, run_rows
from hf_sparse_attn.kernels.triton_common import (
    Launch,
    constants_of,
    factors,
    jit,
    load_tokens,
    logits_of,
    on_device,
    padded,
    rows_dense,
    tokens_at,
    valid_range,
)
from hf_sparse_attn.pattern.block_pattern import BlockPattern

# Queries of one program of `_prepare`.
_STRIP = 64
# Distinct columns that one program sums at most, and queries that it takes at a time: they are bits of an int64.
_BITS = 64

# Kernel functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@jit
def _prepare(  # type: ignore[no-untyped-def]
    grad, out, lse, grad_lse, delta, base2,
    g_batch, g_head, g_token, g_dim, out_batch, out_head, out_token, out_dim, s_batch, s_head, s_token,
    heads, q_len, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, M: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """delta = sum(grad * out) - grad_lse, and the log-sum-exp in base 2, +inf for a query without keys."""
    strips = tl.cdiv(q_len, M)
    head_of_all = tl.program_id(0) // strips
    batch = (head_of_all // heads).to(tl.int64)
    head = (head_of_all % heads).to(tl.int64)
    query = (tl.program_id(0) % strips) * M + tl.arange(0, M)
    exists = query < q_len
    far = query.to(tl.int64)
    lane = tl.arange(0, VALUE_PAD)
    mask = exists[:, None] & (lane < VALUE_DIM)[None, :]
    at = grad + batch * g_batch + head * g_head + far[:, None] * g_token + lane[None, :] * g_dim
    grads = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    at = out + batch * out_batch + head * out_head + far[:, None] * out_token + lane[None, :] * out_dim
    total = tl.sum(grads * tl.load(at, mask=mask, other=0.0).to(tl.float32), 1)
    if HAS_LSE:
        total -= tl.load(grad_lse + batch * s_batch + head * s_head + far * s_token, mask=exists, other=0.0)
    at = (batch * heads + head) * q_len + query
    own = tl.load(lse + at, mask=exists, other=0.0)
    tl.store(delta + at, total, mask=exists)
    # exp2(logit - inf) = 0: a query without keys has weights 0.
    tl.store(base2 + at, tl.where(own == -float("inf"), float("inf"), own * 1.4426950408889634), mask=exists)


@jit
def _strip(  # type: ignore[no-untyped-def]
    q, grad, delta, base2, q_order, batch, head, row, lane,
    q_batch, q_head, q_token, q_dim, g_batch, g_head, g_token, g_dim, q_order_batch, q_order_head, heads, q_len,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, HAS_Q_ORDER: tl.constexpr, ALIVE: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Queries, gradients of their outputs, log-sum-exp and delta of some lanes of a row; 0 where there is none.

    With ALIVE queries without keys count as none: weight 0 times a NaN query would be NaN.
    """
    FAR: tl.constexpr = HAS_Q_ORDER or WIDE
    exists = row * BLOCK_Q + lane < q_len
    base = row * BLOCK_Q
    query = lane
    if HAS_Q_ORDER:
        query = tl.load(q_order + batch * q_order_batch + head * q_order_head + base + lane, mask=exists, other=0)
        base = row * 0
    stat = (batch * heads + head) * q_len + base + query
    shift = tl.load(base2 + stat, mask=exists, other=float("inf"))
    mean = tl.load(delta + stat, mask=exists, other=0.0)
    if ALIVE:
        exists = exists & (shift < float("inf"))
        mean = tl.where(exists, mean, 0.0)
    queries = load_tokens(
        q + batch * q_batch + head * q_head, base, query, exists, q_token, q_dim, DIM, DIM_PAD, True, FAR, UPCAST
    )
    grads = load_tokens(
        grad + batch * g_batch + head * g_head, base, query, exists, g_token, g_dim, VALUE_DIM, VALUE_PAD, True, FAR,
        UPCAST,
    )  # fmt: skip
    return queries, grads, shift[None, :], mean[None, :]


@jit
def _item(items, bits, at, spare, here, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """One item of a transposed list (see plan.Keys): reader, two starts with their tiles, bits."""
    reader = tl.load(items + at, mask=here, other=0)
    start = reader
    tile = reader
    second = reader
    second_tile = reader
    readers = at
    if COLUMNS:
        readers = tl.load(bits + at, mask=here, other=0)
    else:
        start = tl.load(items + spare + at, mask=here, other=0)
        tile = tl.load(items + spare * 2 + at, mask=here, other=0)
        second = tl.load(items + spare * 3 + at, mask=here, other=0)
        second_tile = tl.load(items + spare * 4 + at, mask=here, other=0)
    return reader, start, tile, second, second_tile, readers


@jit
def _keys(  # type: ignore[no-untyped-def]
    q, k, v, grad, delta, base2, dk, dv, order, lists, ends, wholes, items, bits, places, used, readers_of,
    q_order, kv_order, kv_range,
    q_batch, q_head, q_token, q_dim, k_batch, k_head, k_token, k_dim, v_batch, v_head, v_token, v_dim,
    g_batch, g_head, g_token, g_dim, dk_batch, dk_head, dk_token, dk_dim, dv_batch, dv_head, dv_token, dv_dim,
    lead_batch, lead_head, q_order_batch, q_order_head, kv_order_batch, kv_order_head, range_batch,
    heads, group, rows, q_len, kv_len, tiles_of_keys, merged, repeats, offset, spare, factor, cap, scale,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    COLUMNS: tl.constexpr, ADD: tl.constexpr,
    HAS_Q_ORDER: tl.constexpr, HAS_KV_ORDER: tl.constexpr, HAS_RANGE: tl.constexpr,
    HAS_CAP: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of N keys and values of one key head, or of N distinct columns, over all rows that read them."""
    strips: tl.constexpr = BLOCK_Q // M
    # The readers of a key of a tile are bits of this many int64.
    WORDS: tl.constexpr = (BLOCK_Q + 63) // 64
    item = tl.load(order + tl.program_id(0))
    tile_of_keys = item % tiles_of_keys
    head_of_all = item // tiles_of_keys
    kv_heads = heads // group
    batch = (head_of_all // kv_heads).to(tl.int64)
    kv_head = (head_of_all % kv_heads).to(tl.int64)
    first_head = kv_head * group + offset
    lead = batch * lead_batch + first_head // merged * lead_head
    cell = lead * tiles_of_keys + tile_of_keys

    inner = tl.arange(0, N)
    place = tile_of_keys * N + inner
    if COLUMNS:
        exists = place < tl.load(used + lead)
        place = tl.load(places + lead * kv_len + place, mask=exists, other=0)
    else:
        exists = place < kv_len
    key = tokens_at(kv_order + batch * kv_order_batch + first_head * kv_order_head, place, exists, HAS_KV_ORDER)
    low, high = valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE)
    valid = exists
    if HAS_RANGE:
        valid = valid & (key >= low) & (key < high)
    zero = tile_of_keys * 0
    keys = load_tokens(
        k + batch * k_batch + kv_head * k_head, zero, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST
    )
    values = load_tokens(
        v + batch * v_batch + kv_head * v_head, zero, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True,
        UPCAST,
    )  # fmt: skip
    key_grad = tl.zeros([N, DIM_PAD], tl.float32)
    value_grad = tl.zeros([N, VALUE_PAD], tl.float32)

    begin = tl.load(lists + cell)
    count = (tl.load(ends + cell) - begin).to(tl.int32)
    whole = 0
    if not COLUMNS:
        whole = tl.load(wholes + cell)
    for repeat in range(0, repeats):
        # Rows that read all keys of the tile. Keys beyond the last or out of range get what is never stored.
        if not COLUMNS:
            ahead = tl.load(items + begin, mask=whole > 0, other=0)
            for i in range(0, whole * strips):
                reader = ahead
                ahead = tl.load(items + begin + tl.minimum((i + 1) // strips, whole - 1))
                head = first_head + repeat + reader // rows
                lane = (i % strips) * M + tl.arange(0, M)
                queries, grads, shift, mean = _strip(
                    q, grad, delta, base2, q_order, batch, head, reader % rows, lane,
                    q_batch, q_head, q_token, q_dim, g_batch, g_head, g_token, g_dim, q_order_batch, q_order_head,
                    heads, q_len, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, BLOCK_Q, HAS_Q_ORDER, False, WIDE, UPCAST,
                )  # fmt: skip
                logits, bounded = logits_of(keys, queries, factor, cap, HAS_CAP)
                products = tl.dot(values, tl.trans(grads), input_precision="ieee")
                weight, slope = logit_gradient(logits, bounded, shift, products, mean, valid[:, None], False, HAS_CAP)
                value_grad = tl.dot(weight.to(grads.dtype), grads, value_grad, input_precision="ieee")
                key_grad = tl.dot(slope.to(queries.dtype), queries, key_grad, input_precision="ieee")
        item_ahead = _item(items, bits, begin + whole, spare, count > whole, COLUMNS)
        for i in tl.range(0, (count - whole) * strips, num_stages=STAGES):
            reader, start, tile, second, second_tile, readers = item_ahead
            at = begin + tl.minimum(whole + (i + 1) // strips, count - 1)
            item_ahead = _item(items, bits, at, spare, count > whole, COLUMNS)
            head = first_head + repeat + reader // rows
            lane = (i % strips) * M + tl.arange(0, M)
            queries, grads, shift, mean = _strip(
                q, grad, delta, base2, q_order, batch, head, reader % rows, lane,
                q_batch, q_head, q_token, q_dim, g_batch, g_head, g_token, g_dim, q_order_batch, q_order_head,
                heads, q_len, DIM, DIM_PAD, VALUE_DIM, VALUE_PAD, BLOCK_Q, HAS_Q_ORDER, True, WIDE, UPCAST,
            )  # fmt: skip
            if COLUMNS:
                keep = (((readers >> inner.to(tl.int64)) & 1) != 0) & valid
                keep = keep[:, None] & (lane < BLOCK_Q)[None, :]
            else:
                # One block of the row covers the tile of keys, or two that follow one another.
                in_one = (place >= start) & (place < start + BLOCK_K)
                within = place - tl.where(in_one, start, second)
                cell_of = tl.where(in_one, tile, second_tile).to(tl.int64) * BLOCK_K + within
                here = (within >= 0) & (within < BLOCK_K) & valid
                word = tl.load(readers_of + cell_of * WORDS + (i % strips) * M // 64, mask=here, other=0)
                # Shifts of 64 bits cost several instructions: of 32 queries at a time one.
                if M <= 32:
                    few = (word >> ((i % strips) * M % 64)).to(tl.int32)
                    keep = ((few[:, None] >> tl.arange(0, M)[None, :]) & 1) != 0
                else:
                    keep = ((word[:, None] >> tl.arange(0, M).to(tl.int64)[None, :]) & 1) != 0
            logits, bounded = logits_of(keys, queries, factor, cap, HAS_CAP)
            products = tl.dot(values, tl.trans(grads), input_precision="ieee")
            weight, slope = logit_gradient(logits, bounded, shift, products, mean, keep, True, HAS_CAP)
            value_grad = tl.dot(weight.to(grads.dtype), grads, value_grad, input_precision="ieee")
            key_grad = tl.dot(slope.to(queries.dtype), queries, key_grad, input_precision="ieee")

    # Keys out of range have gathered what no one may see.
    key_grad = tl.where(valid[:, None], key_grad * scale, 0.0)
    value_grad = tl.where(valid[:, None], value_grad, 0.0)
    far = key.to(tl.int64)[:, None]
    dim_lane = tl.arange(0, DIM_PAD)[None, :]
    value_lane = tl.arange(0, VALUE_PAD)[None, :]
    to = dk + batch * dk_batch + kv_head * dk_head + far * dk_token + dim_lane * dk_dim
    stored = exists[:, None] & (dim_lane < DIM)
    if ADD:
        key_grad += tl.load(to, mask=stored, other=0.0)
    tl.store(to, key_grad.to(dk.dtype.element_ty), mask=stored)
    to = dv + batch * dv_batch + kv_head * dv_head + far * dv_token + value_lane * dv_dim
    stored = exists[:, None] & (value_lane < VALUE_DIM)
    if ADD:
        value_grad += tl.load(to, mask=stored, other=0.0)
    tl.store(to, value_grad.to(dv.dtype.element_ty), mask=stored)


def gradients(
    grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    p: BlockPattern, scale: float, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """See backend.KernelBackend.backward."""
    if q.numel() == 0:
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    batch, heads, q_len, _ = q.shape
    # A gradient that was only expanded is one number for a whole row: its copy is read in wide loads.
    grad_out = rows_dense(grad_out)
    lse = lse.contiguous()
    # Apart: a view of half a tensor is aligned for some lengths only, which would compile the kernels anew.
    delta, base2 = torch.empty_like(lse), torch.empty_like(lse)
    with on_device(q):
        _prepare[(batch * heads * triton.cdiv(q_len, _STRIP),)](
            grad_out, out, lse, lse if grad_lse is None else grad_lse, delta, base2,
            *grad_out.stride(), *out.stride(), *(lse if grad_lse is None else grad_lse).stride(),
            heads, q_len, VALUE_DIM=v.shape[3], VALUE_PAD=padded(v.shape[3]), M=_STRIP, HAS_LSE=grad_lse is not None,
            num_warps=4,
        )  # fmt: skip
        dq = torch.empty_like(q)
        run_rows(q, k, v, dq, p, scale, softcap, given=(grad_out, delta, base2))
        dk, dv = _gradients_of_keys(grad_out, q, k, v, delta, base2, p, scale, softcap)
    return dq, dk, dv


def _gradients_of_keys(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, base2: Tensor, p: BlockPattern, scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, heads, q_len, dim = q.shape
    r, group, readers = rows_of(p), heads // k.shape[1], readers_of(p)
    share = share_of(p, group)
    # Where one launch adds to what another has stored, the sum is kept in float32.
    parts = share.launches > 1 or p.columns is not None
    dk, dv = (torch.empty_like(x, dtype=torch.float32 if parts else x.dtype) for x in (k, v))
    head_bytes = q_len * (dim + v.shape[3]) * q.element_size() * group

    def run_with(launch: Launch, walk: Keys, keys: int, columns: bool, offset: int, add: bool) -> None:
        order = schedule(p, f"{'columns' if columns else 'keys'} {keys} {share.merged} {offset}", _sizes(
            walk, p, share, group, offset), batch, heads // group, head_bytes)  # fmt: skip
        _keys[(order.numel(),)](
            q, k, v, grad_out, delta, base2, dk, dv, order, walk.lists, walk.ends, walk.wholes, walk.items, walk.bits,
            walk.places, walk.used, readers, r.q_order, r.kv_order, r.kv_range,
            *q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), *dk.stride(), *dv.stride(),
            *r.strides(p, share.merged),
            heads, group, p.rows, q_len, p.kv_len, walk.tiles, share.merged, share.repeats, offset,
            walk.items.stride(0), *factors(scale, softcap),
            BLOCK_Q=p.block_q, BLOCK_K=p.block_k, M=min(launch.queries, _BITS), N=keys, COLUMNS=columns, ADD=add,
            WIDE=is_wide(p.block_q, q, grad_out), **constants_of(q, v, p, softcap),
            STAGES=masked_stages(launch), num_warps=launch.warps, num_stages=launch.stages,
        )  # fmt: skip

    def run(launch: Launch) -> None:
        for offset in range(share.launches):
            run_with(launch, keys_of(p, launch.keys, share), launch.keys, False, offset, offset > 0)

    def run_columns(launch: Launch) -> None:
        size = min(launch.keys, _BITS)
        for offset in range(share.launches):
            run_with(launch, columns_of(p, size, share), size, True, offset, True)

    launched("keys", p, q, v, run)
    if p.columns is not None:
        launched("keys", p, q, v, run_columns)
    return dk.to(k.dtype), dv.to(v.dtype)


def _sizes(walk: Keys, p: BlockPattern, share: Share, group: int, offset: int) -> Tensor:
    """Items of each tile of keys, int32 [batch or 1, key heads or 1, tiles]."""
    sizes = walk.sizes.view(p.batch, p.heads // share.merged, walk.tiles)
    return sizes[:, offset::group] if share.launches > 1 and p.heads > 1 else sizes
