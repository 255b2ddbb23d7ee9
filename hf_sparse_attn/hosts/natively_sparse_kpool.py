"""GLM 5.3: an indexer chooses pools of keys, from the first token on, and latent attention of all heads reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from hf_sparse_attn.hosts.natively_sparse_kind import (
    Attended,
    Kind,
    OwnCall,
    awake,
    layer_of,
    replace_method,
    why_other,
)
from hf_sparse_attn.hosts.natively_sparse_latent import (
    attend_expanded,
    attend_latent,
    caches_latents,
    keep_latents,
)
from hf_sparse_attn.hosts.natively_sparse_pools import top_pools
from hf_sparse_attn.listed_attention import Visible
from hf_sparse_attn.patching import Patch

# Visible pairs of query and key by lists: a layer gets those alone, and so does one that takes over a selection.
_PAIRS = WeakTensorKeyDictionary()


class KPool(Kind):
    """GLM 5.3, whose layers of linear attention stay as they are.

    Seams: `indexer.forward`, which selects in strips of queries; `build_attention_mask_from_topk`, which hands the
    lists on in place of a mask; `expand_kv`, which hands the latents on.
    """

    name: ClassVar[str] = "k-pool"
    models: ClassVar[frozenset[str]] = frozenset({"glm5_next"})

    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """See Kind."""
        for module in modules:
            where = f"layer {module.layer_idx} ({type(module).__name__})"
            why = why_other(module, "expand_kv", "kv_nope", "k_rot") or why_other(
                module, "build_attention_mask_from_topk", "topk_indices", "query_states", "kv_length"
            )
            if why is None and module.indexer is not None:
                takes = ("hidden_states", "q_resid", "attention_mask", "past_key_values")
                why = why_other(module.indexer, "forward", *takes) or why_other(
                    module.indexer, "get_pooled_states", "packed_states"
                )
            if why is not None:
                return f"{where}: {why}"
        return None

    def install(self, patch: Patch, module: Any) -> None:
        """See Kind."""
        runs = partial(awake, module)
        if module.indexer is not None:
            replace_method(patch, module.indexer, "forward", _select, runs)
        replace_method(patch, module, "build_attention_mask_from_topk", _lists, runs)
        if caches_latents(module):
            replace_method(patch, module, "expand_kv", keep_latents, runs)

    def attend(self, state: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """See Kind; k and v are the latents and the rotated part of the keys, where the seam hands these on."""
        heads, pairs = q.shape[1], _PAIRS.get(mask)
        if pairs is None:
            # The lists went to another device on their way.
            pairs = Visible(k.shape[2] - q.shape[2]).pairs(q.shape[0], q.shape[2], k.shape[2])
        run = attend_latent if caches_latents(module) else attend_expanded
        out, backend = run(module, q, k, v, mask, kwargs["scaling"], None)
        return Attended(out, int((mask >= 0).sum()) * heads, pairs * heads, backend)

    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """See Kind."""
        q, k, v, mask = call.q, call.k, call.v, call.mask
        if active:
            keys = k.shape[2]
            if caches_latents(module):
                k, v = type(module).expand_kv(module, k, v)
            mask = type(module).build_attention_mask_from_topk(module, mask, q, keys)
        state = layer_of(module)
        if state is not None and state.dense == "sdpa" and mask.is_floating_point():
            # The config names the hook, for which the model makes the mask of eager attention.
            mask = mask == 0
        return call._replace(k=k, v=v, mask=mask)


def _lists(module: Any, topk_indices: Tensor, query_states: Tensor, kv_length: int) -> Tensor:
    """In place of `build_attention_mask_from_topk`: the lists themselves."""
    return topk_indices


@torch.no_grad()
def _select(
    indexer: Any, hidden_states: Tensor, q_resid: Tensor, attention_mask: Tensor, past_key_values: Any
) -> Tensor:
    """In place of an indexer's forward: int32 [batch, q_len, n], -1 for none."""
    batch, queries, _ = hidden_states.shape
    q = indexer.wq_b(q_resid).view(batch, queries, -1, indexer.head_dim)
    k = indexer.k_norm(indexer.wk(hidden_states))
    gate = torch.nn.functional.linear(hidden_states, indexer.index_kpool_compress_gate)
    packed = torch.cat([k, gate, attention_mask.to(k.dtype)[..., None]], -1)
    end = queries
    if past_key_values is not None:
        packed = past_key_values.update_indexer(packed, indexer.layer_idx)
        # Fewer than there are slots in a static cache.
        end = int(past_key_values.layers[indexer.layer_idx].get_seq_length())
    weights = indexer.weights_proj(hidden_states.to(indexer.weights_proj.weight.dtype)).float() * indexer.n_heads**-0.5
    q = q.float() * indexer.softmax_scale
    keys, pools, whole = indexer.get_pooled_states(packed_states=packed)
    size, topk, tail = indexer.index_kpool, indexer.index_topk, bool(indexer.index_kpool_always_select_tail)
    valid = packed[..., -1].bool()
    lists, pairs = pooled_lists(q, weights, keys, pools, whole, valid, end - queries, size, topk, tail)
    lists = lists.masked_fill(~attention_mask[..., None], -1).int()
    _PAIRS[lists] = pairs
    return lists


def pooled_lists(
    q: Tensor, weights: Tensor, pool_keys: Tensor, pools: Tensor, pool_valid: Tensor, valid: Tensor, first: int,
    size: int, topk: int, tail: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """The keys of the pools with the highest scores, and those of the pool that a query's own key has begun.

    Args:
        q: index queries [batch, q_len, heads, dim], scaled.
        weights: [batch, q_len, heads].
        pool_keys: [batch, pools, dim], one key of each pool.
        pools: int [batch, pools, size], slots of its keys.
        pool_valid: bool [batch, pools], whether a pool is whole.
        valid: bool [batch, kv_len], False where a slot is padding or unwritten.
        first: slot of the first query.
        size: keys of a pool.
        topk: keys of whole pools in a list.
        tail: whether the begun pool is read.

    Returns:
        int64 [batch, q_len, topk] or, with the tail, [batch, q_len, topk + size - 1]: slots of keys, -1 for none; and
        the pairs of query and key that are visible.
    """
    batch, queries = q.shape[:2]
    rows, slots = torch.arange(batch, device=q.device), torch.arange(first, first + queries, device=q.device)
    start = torch.where(valid.any(1), valid.long().argmax(1), valid.shape[1])[:, None]
    # Those that are not whole stand between others only where padding does, and count as the one before.
    ends = pools[..., -1].masked_fill(~pool_valid, -1).cummax(1).values
    seen = torch.searchsorted(ends, slots.repeat(batch, 1), right=True)
    chosen = top_pools(q, pool_keys, weights, seen, topk // size, valid=pool_valid)
    found = pools[rows[:, None, None], chosen.clamp(min=0)] if pools.shape[1] else pools.new_empty(*chosen.shape, size)
    lists = found.masked_fill(chosen[..., None] < 0, -1).flatten(2)
    lists = torch.nn.functional.pad(lists, (0, topk - lists.shape[2]), value=-1)
    count = valid.cumsum(1)[:, slots.clamp(max=valid.shape[1] - 1)]
    if tail and size > 1:
        begun, offsets = (count % size)[..., None], torch.arange(size - 1, device=q.device)
        own = (start + count)[..., None] - begun + offsets
        there = (offsets < begun) & (own <= slots[:, None])
        there &= valid[rows[:, None, None], own.clamp(max=valid.shape[1] - 1)]
        lists = torch.cat([lists, own.masked_fill(~there, -1)], 2)
    return lists, int(count.sum())
