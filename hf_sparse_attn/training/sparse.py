"""The patch of a training: made, and checked to have a backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.backend import BackendUnavailable
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.profiles.head_profile import find_profile
from hf_sparse_attn.recipe import SparseSettings
from hf_sparse_attn.registry import BACKENDS, make_method


def make_patch(model: Any, sparse: SparseSettings) -> Patch:
    """Puts sparse attention on a model as settings say; see hsa.patch."""
    steps: Any = sparse.dense_steps
    return patch(
        model,
        sparse.method,
        backend=sparse.backend,
        dense_layers=sparse.dense_layers,
        dense_steps=steps,
        min_tokens=sparse.min_tokens,
        **sparse.params,
    )


def check_backward(sparse: SparseSettings, model: nn.Module) -> None:
    """Raises where no gradient can pass through sparse attention as settings ask for it.

    Raises:
        ValueError: the method has no backward pass, or a name or parameter is wrong.
        BackendUnavailable: the backend has none, or cannot run on the model's device.
    """
    profile = find_profile(sparse.method)
    method = make_method(sparse.method, sparse.params) if profile is None else profile.method()
    if not method.trainable:
        raise ValueError(f"`sparse.method` must have a backward pass, got {method.name!r}, which has none")
    if sparse.backend == "auto":
        return
    # Quantised weights are whole numbers.
    weight = next(p for p in model.parameters() if p.is_floating_point())
    like: Tensor = torch.zeros(1, 1, 64, 64, device=weight.device, dtype=weight.dtype, requires_grad=True)
    reason = BACKENDS.get(sparse.backend).why_not(None, like, like, like, True)
    if reason is not None:
        raise BackendUnavailable(f"`sparse.backend` {sparse.backend!r} cannot train here: {reason}")
