"""Entries that stand for windows of tokens, as DeepSeek-V4 makes them for its attention and for its indexers."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def compress(module: Any, name: str, hidden_states: Tensor, cache: Any) -> Tensor:
    """All entries so far [batch, entries, dim], those of the windows that these tokens close among them.

    Args:
        module: a compressor or an indexer: projections, `position_bias`, `kv_norm`, `rotary_emb`.
        name: its place in the cache.
        hidden_states: [batch, q_len, hidden].
        cache: the layer of the cache, or None.
    """
    kv, gate = module.kv_proj(hidden_states), module.gate_proj(hidden_states)
    rate, first = module.compress_rate, 0
    if cache is None:
        usable = kv.shape[1] // rate * rate
        kv, gate = kv[:, :usable], gate[:, :usable]
    else:
        kv, gate, first = cache.store_compression_weights(name, kv, gate)
    entries = kv.new_zeros(kv.shape[0], 0, module.head_dim)
    if kv.shape[1]:
        kv, gate = (x.unflatten(1, (-1, rate)) for x in (kv, gate))
        gate = gate + module.position_bias
        if kv.shape[3] > module.head_dim:
            before = None if cache is None else cache.update_overlap_state(name, kv, gate, module.head_dim)
            kv, gate = overlapping(kv, gate, before)
        entries = module.kv_norm((kv * gate.softmax(2, dtype=torch.float32).to(kv.dtype)).sum(2))
        at = torch.arange(entries.shape[1], device=kv.device) * rate + first
        cos, sin = module.rotary_emb(
            entries, position_ids=at.expand(len(entries), -1), layer_type=module.rope_layer_type
        )
        # The model's own function, which a kernel of the Hub may stand for.
        rotate = inspect.unwrap(type(module).forward).__globals__["apply_rotary_pos_emb"]
        entries = rotate(entries[:, None], cos, sin)[:, 0]
    return entries if cache is None else cache.update_compressor_states(name, entries)


def overlapping(kv: Tensor, gate: Tensor, before: tuple[Tensor | None, Tensor | None] | None) -> tuple[Tensor, Tensor]:
    """Windows that reach over the one before: its tokens by the first half of the channels, the own by the second.

    Args:
        kv, gate: [batch, windows, rate, 2 * dim].
        before: the first half of the last window of an earlier call, [batch, rate, dim] each; (None, None) or None
            where there is none, and the first window has its own tokens alone.

    Returns:
        values and gates [batch, windows, 2 * rate, dim], gates -inf where there is no token.
    """
    dim = kv.shape[3] // 2
    out = []
    for x, earlier, nothing in zip((kv, gate), before or (None, None), (0.0, -torch.inf), strict=True):
        own, following = x[..., dim:], x[:, :-1, :, :dim]
        first = x.new_full((len(x), 1, x.shape[2], dim), nothing) if earlier is None else earlier[:, None].to(x.dtype)
        out.append(torch.cat([torch.cat([first, following], 1), own], 2))
    return out[0], out[1]
