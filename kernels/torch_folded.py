"""Attention of few queries to a cache with PyTorch's own operators: the heads of a group are folded into queries.

PyTorch repeats the keys of grouped heads, or multiplies them head by head, where queries are few. With the group in
the place of the queries the same call reads every key once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.registry import BACKENDS

# With more queries nothing is gained by folding.
_MAX_QUERIES = 16


@BACKENDS.register("torch_folded")
class TorchFolded:
    """Decoding with PyTorch's operators: at most 16 queries, every key or pages of keys; forward only.

    Query heads that share a key/value head are folded into the queries, so that every key is read once.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {"cpu": 4, "cuda": 8, "mps": 8, "xpu": 8}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        if q.is_meta:
            return "needs values, the tensors are on meta"
        if q.shape[2] > _MAX_QUERIES:
            return f"needs at most {_MAX_QUERIES} queries, got {q.shape[2]}"
        if needs_grad:
            return "it is forward only, and a gradient is needed"
        if pattern is not None and not _is_whole(pattern):
            return "needs a pattern of every key, causal among the queries, which are the last tokens"
        return None

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend."""
        return TorchFolded.decode(q, k, v, None, scale, softcap, None)

    @staticmethod
    def why_not_decode(q: Tensor, k: Tensor, v: Tensor, kept: Kept | None) -> str | None:
        """See backend.Decoder: there is no call it cannot run."""
        return None

    @staticmethod
    def decode(
        q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, scale: float, softcap: float, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See backend.Decoder."""
        if kept is not None:
            done = _attend_pages(q, k, v, kept, scale, softcap, first)
        elif first is None:
            done = _attend(q, k, v, scale, softcap)
        else:
            # Row by row: a mask would still let what lies in padding into the sums.
            rows = [
                _attend(q[b : b + 1], k[b : b + 1, :, at:], v[b : b + 1, :, at:], scale, softcap)
                for b, at in enumerate(first.clamp(0, k.shape[2]).tolist())
            ]
            done = torch.cat([out for out, _ in rows]), torch.cat([lse for _, lse in rows])
        return done[0].transpose(1, 2).contiguous().transpose(1, 2), done[1]


def _is_whole(p: BlockPattern) -> bool:
    def look() -> bool:
        if any(x is not None for x in (p.q_order, p.kv_order, p.kv_range)) or (p.batch, p.heads) != (1, 1):
            return False
        seen = torch.arange(p.kv_len, device=p.device) <= torch.arange(
            p.kv_len - p.q_len, p.kv_len, device=p.device
        ).unsqueeze(1)
        return torch.equal(p.to_dense()[0, 0], seen)

    return derived(p, ("folded", "whole"), look)


def _attend_pages(
    q: Tensor, k: Tensor, v: Tensor, kept: Kept, scale: float, softcap: float, first: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One query of each row over the slots of the pages that are kept, gathered."""
    slots = kept.pages[..., None].long() * kept.size + torch.arange(kept.size, device=q.device)
    is_read = (kept.pages[..., None] >= 0) & (slots < k.shape[2])
    if first is not None:
        is_read = is_read & (slots >= first[:, None, None, None])
    slots, is_read = slots.flatten(2), is_read.flatten(2)
    heads = max(k.shape[1], slots.shape[1])
    # Slots that are not read are not gathered: zeros stand in their place.
    index = slots.where(is_read, 0).expand(-1, heads, -1)
    k, v = (
        x.repeat_interleave(heads // x.shape[1], 1).gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
        for x in (k, v)
    )
    if not bool(is_read.all()):
        k, v = (x.masked_fill(~is_read[..., None], 0.0) for x in (k, v))
    else:
        is_read = None
    return _attend(q, k, v, scale, softcap, is_read)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float, is_read: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp over all keys, causal among the queries; `is_read` [batch, 1 or kv_heads, keys]."""
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len = k.shape[1:3]
    folded = q.reshape(batch, kv_heads, heads // kv_heads * q_len, dim)
    keep = None
    if q_len > 1:
        later = torch.arange(q_len, device=q.device)[:, None] + kv_len - q_len
        keep = (torch.arange(kv_len, device=q.device) <= later).repeat(heads // kv_heads, 1)
    if is_read is not None:
        keep = is_read[:, :, None] if keep is None else keep & is_read[:, :, None]
    out, lse = (
        _fused(folded, k, v, keep, scale)
        if _has_fused(q, v, softcap) and kv_len
        else _plain(folded, k, v, keep, scale, softcap)
    )
    return out.reshape(batch, heads, q_len, v.shape[3]), lse.reshape(batch, heads, q_len)


def _has_fused(q: Tensor, v: Tensor, softcap: float) -> bool:
    """Whether PyTorch has a fused operator there that gives the log-sum-exp."""
    return q.device.type == "cpu" and not softcap and q.shape[3] == v.shape[3]


def _fused(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    mask = None
    if keep is not None:
        mask = torch.zeros(keep.shape, dtype=q.dtype, device=q.device).masked_fill_(~keep, -torch.inf)
        mask = mask.expand(q.shape[0], -1, -1, -1) if keep.ndim == 4 else mask
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask, scale=scale)
    if keep is not None:
        # The operator has no answer for a query without a key.
        none = ~keep.any(-1).expand(lse.shape)
        out, lse = out.masked_fill(none[..., None], 0.0), lse.masked_fill(none, -torch.inf)
    return out, lse


def _plain(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    compute = torch.promote_types(q.dtype, torch.float32)
    logits = q.to(compute) @ k.to(compute).mT * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if keep is not None:
        logits = logits.masked_fill(~keep, -torch.inf)
    lse = logits.logsumexp(-1)
    # A query without a key has the weights exp(-inf) = 0.
    weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    return (weights @ v.to(compute)).to(q.dtype), lse
