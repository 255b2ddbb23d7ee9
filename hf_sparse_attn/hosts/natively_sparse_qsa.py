"""Qwen 4: an indexer chooses pools of visible keys by their mean, one list for all heads."""

from __future__ import annotations

import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.hosts.natively_sparse_kind import Attended, Kind, OwnCall, awake, layer_of, why_other
from hf_sparse_attn.hosts.natively_sparse_mask import SelectingMask
from hf_sparse_attn.hosts.natively_sparse_pools import top_pools
from hf_sparse_attn.listed_attention import Visible, listed_attention
from hf_sparse_attn.patching import Patch


@dataclass(frozen=True)
class Selection:
    """What an indexer selected, in the place of the mask that it makes of it.

    Args:
        lists: int32 [batch, q_len, n], slots of keys, -1 for none.
        mask: what the layer was given.
        pairs: pairs of query and key that are visible.
    """

    lists: Tensor
    mask: SelectingMask
    pairs: int


class QSA(Kind):
    """Qwen 4, whose layers of linear attention stay as they are.

    Seam: `indexer.forward`, which makes the pools once for all queries of a sequence. Its Selection takes the place of
    the mask (SelectingMask.__and__).
    """

    name: ClassVar[str] = "QSA"
    models: ClassVar[frozenset[str]] = frozenset({"qwen4_exp"})

    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """See Kind."""
        for module in modules:
            takes = ("hidden_states", "position_embeddings", "attention_mask", "past_key_values")
            why = why_other(module.indexer, "forward", *takes) if hasattr(module, "indexer") else "has no `indexer`"
            if why is not None:
                return f"layer {module.layer_idx} ({type(module).__name__}): {why}"
        return None

    def install(self, patch: Patch, module: Any) -> None:
        """See Kind."""
        indexer = module.indexer
        before = indexer.forward
        runs = partial(awake, module)

        def forward(self: Any, hidden_states: Tensor, position_embeddings: Any, attention_mask: Any,
                    past_key_values: Any) -> Any:  # fmt: skip
            if isinstance(attention_mask, SelectingMask):
                if runs() and attention_mask.visible.mask is None:
                    return _select(self, hidden_states, position_embeddings, attention_mask, past_key_values)
                # It asks every row of its mask.
                state = layer_of(module)
                assert state is not None
                attention_mask = attention_mask.dense(state.dense, hidden_states.device)
            return before(hidden_states, position_embeddings, attention_mask, past_key_values)

        patch.set_attribute(indexer, "forward", types.MethodType(forward, indexer))

    def attend(self, state: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """See Kind."""
        if not isinstance(mask, Selection):
            return "mask that is not the plain causal one"
        out, _ = listed_attention(q, k, v, mask.lists[:, None], kwargs["scaling"])
        heads = q.shape[1]
        listed = int((mask.lists >= 0).sum()) * heads
        return Attended(out.transpose(1, 2).contiguous(), listed, mask.pairs * heads, "keys by list")

    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """See Kind."""
        given = call.mask
        if not isinstance(given, Selection):
            return call
        keys = call.k.shape[2]
        chosen = torch.zeros(*given.lists.shape[:2], keys + 1, dtype=torch.bool, device=call.q.device)
        chosen.scatter_(2, given.lists.long().where(given.lists >= 0, keys), True)
        return call._replace(mask=given.mask & chosen[:, None, :, :keys])


@torch.no_grad()
def _select(
    indexer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], mask: SelectingMask, cache: Any
) -> Selection:
    """In place of an indexer's forward, under a causal mask."""
    batch, queries, _ = hidden_states.shape
    heads, dim = indexer.index_n_heads, indexer.index_head_dim
    qk = indexer.index_qk_proj(hidden_states).view(batch, queries, heads + 1, dim)
    rotate = partial(inspect.unwrap(type(indexer).forward).__globals__["apply_rotary_pos_emb"], unsqueeze_dim=2)
    cos, sin = position_embeddings
    q = rotate(indexer.q_layernorm(qk[:, :, :heads]), cos=cos[:, -queries:], sin=sin[:, -queries:])
    k = qk[:, :, heads]
    if cache is not None:
        k = cache.update_indexer(k, indexer.layer_idx)
    visible, size = mask.visible, indexer.compress_ratio
    order, count = visible_order(visible, batch, queries, k.shape[1], q.device)

    def pool_keys(slots: Tensor) -> Tensor:
        """Keys [batch, pools, dim] of pools [batch, pools, size]."""
        row = torch.arange(batch, device=q.device)[:, None]
        means = k[row[..., None], slots].float().mean(2).to(k.dtype)
        at = [x.expand(batch, -1, -1)[row, slots[..., 0]] for x in (cos, sin)]
        return rotate(indexer.k_layernorm(means)[:, :, None], cos=at[0], sin=at[1])[:, :, 0]

    lists = visible_pools(q, pool_keys, order, count, size, indexer.block_topk)
    return Selection(lists.int(), mask, int(count.sum()))


def visible_order(
    visible: Visible, batch: int, queries: int, keys: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """The keys that are no padding, in order, and how many of them each query sees.

    Args:
        visible: without a mask of its own.
        batch, queries, keys: of the call.

    Returns:
        int64 [batch, kv_len], slots of keys, of those of padding at the end; and int64 [batch, q_len].
    """
    slots = torch.arange(visible.first, visible.first + queries, device=device).clamp(max=keys - 1)
    if visible.padding is None:
        return torch.arange(keys, device=device).expand(batch, -1), (slots + 1).expand(batch, -1)
    # False before True, each in order.
    return torch.sort(~visible.padding, dim=1, stable=True).indices, visible.padding.cumsum(1)[:, slots]


def visible_pools(q: Tensor, pool_keys: Any, order: Tensor, count: Tensor, size: int, topk: int) -> Tensor:
    """The keys of the pools with the highest scores, and those of the pool that a query's own key has begun.

    Args:
        q: index queries [batch, q_len, heads, dim].
        pool_keys: gives the keys [batch, pools, dim] of pools, from the slots of theirs [batch, pools, size].
        order: int [batch, kv_len], slots of visible keys in order.
        count: int [batch, q_len], how many of them each query sees.
        size: keys of a pool.
        topk: pools of a list.

    Returns:
        int64 [batch, q_len, min(topk, pools) * size + size - 1], slots of keys, -1 for none.
    """
    batch, dim = q.shape[0], q.shape[3]
    whole = count // size
    most = int(whole.max())
    pools = order[:, : most * size].unflatten(1, (most, size))
    row = torch.arange(batch, device=q.device)[:, None, None]
    if most:
        chosen = top_pools(q.float() * dim**-0.5, pool_keys(pools), None, whole, topk, own_width=True)
        lists = pools[row, chosen.clamp(min=0)].masked_fill(chosen[..., None] < 0, -1).flatten(2)
    else:
        lists = order.new_empty(batch, q.shape[1], 0)
    offsets = torch.arange(size - 1, device=q.device)
    begun = (whole * size)[..., None] + offsets
    tail = order[row, begun.clamp(max=order.shape[1] - 1)].masked_fill(begun >= count[..., None], -1)
    return torch.cat([lists, tail], 2)
