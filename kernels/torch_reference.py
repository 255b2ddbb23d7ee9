"""The specification: attention over the pattern's token mask, materialised, on any device and in any precision."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

# Logits above this many do not fit a test machine; a run that needs more wants another backend.
_MAX_LOGITS = 1 << 31


@BACKENDS.register("torch_reference")
class TorchReference:
    """Dense logits and a mask: slow, O(q_len x kv_len) memory, right. Differentiable; float64 stays float64."""

    auto_rank: ClassVar[Mapping[str, int]] = {}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        logits = q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
        return f"{logits} logits do not fit in memory (limit {_MAX_LOGITS})" if logits > _MAX_LOGITS else None

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend. Computes in float32, or float64 for float64 input."""
        compute = torch.promote_types(q.dtype, torch.float32)
        group = q.shape[1] // k.shape[1]
        query = q.to(compute).unflatten(1, (k.shape[1], group))
        logits = torch.einsum("bngqd,bnkd->bngqk", query, k.to(compute)).flatten(1, 2) * scale
        if softcap:
            logits = softcap * torch.tanh(logits / softcap)
        mask = pattern.to_dense()
        logits = logits.masked_fill(~mask, -torch.inf)
        lse = logits.logsumexp(-1)
        # A row without keys has only -inf logits: subtracting 0 instead of its log-sum-exp gives weights 0, not NaN.
        weights = (logits - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        # Weight 0 times a NaN or infinite value is NaN: values that nobody reads must not matter.
        value = v.to(compute)
        read = mask.any(2).expand(q.shape[0], q.shape[1], -1).unflatten(1, (k.shape[1], group)).any(2)
        value = value.masked_fill(~read[..., None], 0.0)
        out = torch.einsum("bngqk,bnkd->bngqd", weights.unflatten(1, (k.shape[1], group)), value).flatten(1, 2)
        return out.to(q.dtype), lse
