"""The kernel of triton_decode.py for calls without a pattern: every key of a cache, or pages of it by number."""

from __future__ import annotations

import triton.language as tl

from hf_sparse_attn.kernels.triton_common import accumulate, jit, load_tokens, logits_of, store_split


@jit
def attend_cache(  # type: ignore[no-untyped-def]
    q, k, v, out, lse, pages, first,
    q_batch, q_head, q_token, q_dim,
    k_batch, k_head, k_token, k_dim,
    v_batch, v_head, v_token, v_dim,
    batch_size, heads, group, strips, splits, q_len, kv_len, lists, page_count, factor, cap,
    DIM: tl.constexpr, DIM_PAD: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr,
    PAGE: tl.constexpr, PACK: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_CAP: tl.constexpr, SPLIT: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One split of the keys of PACK heads that read the same: M pairs of a query and a head, N keys at a time.

    With PAGE `pages` is [batch, lists, page_count], numbers of pages of PAGE slots, negative where there is none; else
    every slot is read. Slots below `first` [batch] never are. `out` and `lse` are as in triton_decode._attend.
    """
    program = tl.program_id(0)
    split = program % splits
    unit = program // splits
    strip = unit % strips
    sets = heads // PACK
    batch = (unit // strips // sets).to(tl.int64)
    first_head = (unit // strips % sets).to(tl.int64) * PACK

    lane = strip * M + tl.arange(0, M)
    query = lane // PACK
    head = first_head + lane % PACK
    exists = query < q_len
    dim_lane = tl.arange(0, DIM_PAD)
    zero = strip * 0
    where = q + batch * q_batch + (head * q_head + query.to(tl.int64) * q_token)[:, None] + dim_lane[None, :] * q_dim
    queries = tl.load(where, mask=exists[:, None] & (dim_lane < DIM)[None, :], other=0.0)
    # Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot.
    if UPCAST:
        queries = queries.to(tl.float32)
    keys_of = k + batch * k_batch + (first_head // group) * k_head
    values_of = v + batch * v_batch + (first_head // group) * v_head
    low = 0
    if HAS_FIRST:
        low = tl.load(first + batch).to(tl.int32)
    if PAGE:
        pages += (batch * lists + first_head * lists // heads) * page_count
        steps = tl.cdiv(page_count * PAGE, N)
    else:
        steps = tl.cdiv(tl.maximum(kv_len - low, 0), N)
    begin = (tl.cast(steps, tl.int64) * split // splits).to(tl.int32)
    end = (tl.cast(steps, tl.int64) * (split + 1) // splits).to(tl.int32)

    result = tl.zeros([M, VALUE_PAD], tl.float32)
    peak = tl.full([M], -float("inf"), tl.float32)
    total = tl.zeros([M], tl.float32)
    for i in range(begin, end):
        position = i * N + tl.arange(0, N)
        if PAGE:
            entry = position // PAGE
            page = tl.load(pages + entry, mask=entry < page_count, other=-1)
            key = page * PAGE + position % PAGE
            valid = (page >= 0) & (key >= low) & (key < kv_len)
        else:
            key = low + position
            valid = key < kv_len
        keys = load_tokens(keys_of, zero, key, valid, k_token, k_dim, DIM, DIM_PAD, True, True, UPCAST)
        values = load_tokens(values_of, zero, key, valid, v_token, v_dim, VALUE_DIM, VALUE_PAD, True, True, UPCAST)
        logits, _ = logits_of(queries, keys, factor, cap, HAS_CAP)
        keep = valid[None, :]
        if CAUSAL:
            keep = keep & (key[None, :] <= (kv_len - q_len + query)[:, None])
        result, peak, total = accumulate(result, peak, total, tl.where(keep, logits, -float("inf")), values)

    spot = ((split * batch_size + batch) * heads + head) * q_len + query
    store_split(out, lse, result, peak, total, spot, exists, VALUE_DIM, VALUE_PAD, SPLIT)
