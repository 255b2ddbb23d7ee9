"""Layers with a sliding window beside those that select keys: strips of queries, not a mask of all pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.hosts.natively_sparse_mask import SelectingMask
from hf_sparse_attn.hosts.transformers_mask import MaskRule, read_rule
from hf_sparse_attn.listed_attention import Visible

# Queries of a strip.
_ROWS = 64


def attend_window(q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Attention of a layer with a sliding window, in memory that grows with the length alone.

    Args:
        q: [batch, heads, q_len, dim].
        k, v: [batch, heads, kv_len, dim].
        mask: of the call.
        kwargs: what else the layer hands to an attention function.

    Returns:
        output [batch, q_len, heads, value dim]; None where the mask is another one, there is little to leave out, or
        the weights are dropped or wanted.
    """
    if not isinstance(mask, SelectingMask) or k.shape[1] != q.shape[1] or kwargs.get("s_aux") is not None:
        return None
    rule, keys = read_rule(mask.wanted.get("mask_function")), k.shape[2]
    window = rule.window
    if window is None or rule != MaskRule(causal=True, window=window) or keys <= window + _ROWS:
        return None
    if kwargs.get("dropout") or kwargs.get("output_attentions"):
        return None
    visible, scaling = mask.up_to_own, kwargs["scaling"]
    outs = []
    for start in range(0, q.shape[2], _ROWS):
        stop = min(start + _ROWS, q.shape[2])
        own = slice(max(0, visible.first + start - window + 1), visible.end(stop, keys))
        seen = _seen(visible, start, stop, own, window, q.device)
        logits = (q[:, :, start:stop] @ k[:, :, own].transpose(2, 3)) * scaling
        # Rows of padding see nothing, and must not spoil what is learned.
        logits = logits.masked_fill(~seen[:, None], torch.finfo(logits.dtype).min)
        outs.append(logits.softmax(-1, dtype=torch.float32).to(v.dtype) @ v[:, :, own])
    return torch.cat(outs, 2).transpose(1, 2).contiguous()


def _seen(visible: Visible, start: int, stop: int, own: slice, window: int, device: torch.device) -> Tensor:
    """Whether queries from `start` to `stop` see the keys of a slice: bool [batch or 1, queries, keys]."""
    query = torch.arange(visible.first + start, visible.first + stop, device=device)
    near = torch.arange(own.start, own.stop, device=device) > query[:, None] - window
    return visible.rows(start, stop, own.stop, device)[:, :, own] & near
