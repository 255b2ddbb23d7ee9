"""Attention under torch.autocast: in the dtype that `F.scaled_dot_product_attention` computes in, as models expect."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def cast_inputs(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values as PyTorch's attention takes them: under autocast in its dtype, else as they are.

    Without it they may differ from one another: a model whose weights are float32 rotates queries and keys in float32,
    and has values in autocast's dtype. float64 is left alone, as autocast leaves it.

    Args:
        q, k, v: of any shape, on one device.
    """
    if not _enabled(q.device):
        return q, k, v
    dtype = torch.get_autocast_dtype(q.device.type)
    q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    return q, k, v


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Within it operators compute in the dtype of what they are given: estimates in float32 stay what they are."""
    return torch.autocast(device.type, enabled=False) if _enabled(device) else nullcontext()


def made_on_cpu() -> AbstractContextManager[object]:
    """Within it tensors are made on the CPU where nothing else is said, whatever torch.set_default_device says."""
    # A graph that is traced cannot ask for it.
    if torch.compiler.is_compiling() or torch.get_default_device().type == "cpu":
        return nullcontext()
    return torch.device("cpu")


def _enabled(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
