"""Latent attention over lists: keys and values stay compressed where few are read, and are expanded where many are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.hosts.transformers_hook import code_names
from hf_sparse_attn.listed_attention import gathered_cost, listed_attention, pairs_computed

# Bytes of queries, taken into the space of the latents, that are held at a time.
_ABSORBED = 1 << 26


def caches_latents(module: Any) -> bool:
    """Whether the cache of a layer holds latents, which are expanded after it; in transformers 5.17 it holds keys."""
    names = code_names(type(module))
    return "update" in names and names.index("update") < names.index("expand_kv")


def keep_latents(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """In place of `expand_kv`: the latents and the rotated part of the keys."""
    return kv_nope, k_rot


def attend_latent(
    module: Any, q: Tensor, latents: Tensor, rotated: Tensor, lists: Tensor, scaling: float, sinks: Tensor | None
) -> tuple[Tensor, str]:
    """Attention of a layer whose keys and values are latents that `kv_b_proj` expands, over lists all heads share.

    Either queries are taken into the space of the latents, so that a key is read once for all heads, or the latents
    are expanded, whose products are shorter; what is cheaper for the lists at hand.

    Args:
        module: the attention module.
        q: [batch, heads, q_len, nope + rope].
        latents: [batch, 1, kv_len, rank].
        rotated: [batch, 1, kv_len, rope], the channels of the keys that have positions, for all heads.
        lists: int32 [batch, q_len, n], -1 for none.
        scaling: factor on the logits.
        sinks: [heads], or None.

    Returns:
        output [batch, q_len, heads, value dim], contiguous, and what ran.
    """
    plain = is_plain(module.kv_b_proj)
    if plain and _stays_compressed(module, q, latents, rotated, lists):
        return _compressed(module, q, latents, rotated, lists, scaling, sinks), "latents by list"
    if not plain and lists[0].numel() < latents.shape[2]:
        latents, rotated, lists = _used(latents, rotated, lists)
    k, v = type(module).expand_kv(module, latents, rotated)
    return attend_expanded(module, q, k, v, lists, scaling, sinks)


def attend_expanded(
    module: Any, q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scaling: float, sinks: Tensor | None
) -> tuple[Tensor, str]:
    """The same of keys [batch, heads, kv_len, nope + rope] and values [batch, heads, kv_len, value dim]."""
    out, _ = listed_attention(q, k, v, lists[:, None], scaling, sinks)
    return out.transpose(1, 2).contiguous(), "keys by list"


def _compressed(
    module: Any, q: Tensor, latents: Tensor, rotated: Tensor, lists: Tensor, scaling: float, sinks: Tensor | None
) -> Tensor:
    batch, heads, queries, width = q.shape
    nope, rank = module.qk_nope_head_dim, latents.shape[3]
    weight = module.kv_b_proj.weight.view(heads, nope + module.v_head_dim, rank)
    rows = max(64, _ABSORBED // (batch * heads * rank * q.element_size()))
    outs = []
    for start in range(0, queries, rows):
        part = slice(start, start + rows)
        q_nope, q_rot = q[:, :, part].split([nope, width - nope], -1)
        further = (q_rot, rotated) if rotated.shape[3] else None
        own = lists[:, None, part]
        found, _ = listed_attention(q_nope @ weight[:, :nope], latents, latents, own, scaling, sinks, further)
        outs.append((found @ weight[:, nope:].transpose(1, 2)).transpose(1, 2))
    return torch.cat(outs, 1) if len(outs) > 1 else outs[0].contiguous()


def _stays_compressed(module: Any, q: Tensor, latents: Tensor, rotated: Tensor, lists: Tensor) -> bool:
    """Whether reading latents takes fewer products of numbers than expanding them, per head."""
    batch, _, queries, width = q.shape
    keys, rank = latents.shape[2:]
    value, rope = module.v_head_dim, rotated.shape[3]
    by_list, whole = pairs_computed(lists[:, None], keys, gathered_cost(q.shape[1], rank + rope))
    compressed = by_list * (2 * rank + rope) + batch * queries * rank * (width - rope + value)
    expanded = whole * (width + value) + batch * keys * rank * (width - rope + value)
    return compressed <= expanded


def _used(latents: Tensor, rotated: Tensor, lists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The keys that some query lists alone, at the places that the lists then name."""
    _, queries, n = lists.shape
    index = lists.flatten(1).clamp(min=0).long()[:, None, :, None]
    found = (x.gather(2, index.expand(-1, -1, -1, x.shape[3])) for x in (latents, rotated))
    place = torch.arange(queries * n, dtype=lists.dtype, device=lists.device).view(1, queries, n)
    return *found, place.where(lists >= 0, -1)  # type: ignore[return-value]


def is_plain(linear: nn.Module) -> bool:
    """Whether a module is a product with its weight and no more: not quantised, adapted, offloaded or looked at."""
    weight: Any = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type != "meta"
        and linear.bias is None
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        and not linear._backward_pre_hooks
    )
