"""Latent attention over lists: keys and values stay compressed where few are read, and are expanded where many are."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hf_sparse_attn.listed_attention import listed_attention


def attend_latent(
    module: Any, q: Tensor, latents: Tensor, rotated: Tensor, lists: Tensor, scaling: float, sinks: Tensor | None
) -> tuple[Tensor, str]:
    """Attention of a layer whose keys and values are latents that `kv_b_proj` expands, over lists all heads share.

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
    heads, nope, value = q.shape[1], module.qk_nope_head_dim, module.v_head_dim
    if _is_plain(module.kv_b_proj):
        weight = module.kv_b_proj.weight.view(heads, nope + value, -1)
        q_nope, q_rot = q.split([nope, q.shape[3] - nope], -1)
        absorbed = q_nope @ weight[:, :nope]
        further = (q_rot, rotated) if rotated.shape[3] else None
        found, _ = listed_attention(absorbed, latents, latents, lists[:, None], scaling, sinks, further)
        out = found @ weight[:, nope:].transpose(1, 2)
        return out.transpose(1, 2).contiguous(), "latents by list"
    k, v = type(module).expand_kv(module, latents, rotated)
    out, _ = listed_attention(q, k, v, lists[:, None], scaling, sinks)
    return out.transpose(1, 2).contiguous(), "keys by list"


def _is_plain(linear: nn.Module) -> bool:
    """Whether a module is a product with its weight and no more: not quantised, adapted, offloaded or looked at."""
    weight = getattr(linear, "weight", None)
    return (
        type(linear) is nn.Linear
        and type(weight) in (nn.Parameter, Tensor)
        and weight.device.type != "meta"
        and linear.bias is None
        and "forward" not in linear.__dict__
        and not (linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks)
        and not linear._backward_pre_hooks
    )
