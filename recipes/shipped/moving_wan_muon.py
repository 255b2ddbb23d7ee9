"""Muon in float32: PyTorch's own computes in bfloat16, which costs more than the rest of a step on most processors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Of K. Jordan's post on Muon: they pull every singular value to about 1 in five steps.
_QUINTIC = (3.4445, -4.7750, 2.0315)
_STEPS = 5
_MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal, with Nesterov's look ahead and decoupled weight decay.

    The update of a [rows, columns] matrix has root mean square 0.2, about that of AdamW's.

    Args:
        params: matrices.
        lr: learning rate.
        weight_decay: share of the weight, times `lr`, taken off in each step.

    Raises:
        ValueError: a parameter is no matrix.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.ndim != 2:
                    raise ValueError(f"`params` must be matrices, got one of shape {tuple(weight.shape)}")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step; a closure is refused.

        Raises:
            ValueError: a closure is given.
        """
        if closure is not None:
            raise ValueError("`closure` must be None, got a function")
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(weight.shape, []).append((weight, self._look_ahead(weight, weight.grad)))
            for shape, pairs in by_shape.items():
                updates = _orthogonal(torch.stack([update for _, update in pairs])) * (0.2 * math.sqrt(max(shape)))
                for (weight, _), update in zip(pairs, updates, strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])

    def _look_ahead(self, weight: Tensor, gradient: Tensor) -> Tensor:
        state: dict[str, Any] = self.state[weight]
        momentum: Tensor = state.setdefault("momentum", torch.zeros_like(weight))
        momentum.lerp_(gradient, 1 - _MOMENTUM)
        return gradient.lerp(momentum, _MOMENTUM)


def _orthogonal(updates: Tensor) -> Tensor:
    """Each of [matrices, rows, columns] with its singular values near 1, by Newton-Schulz steps."""
    tall = updates.shape[1] > updates.shape[2]
    x = updates.mT if tall else updates
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    a, b, c = _QUINTIC
    for _ in range(_STEPS):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x
