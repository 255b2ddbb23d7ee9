"""Policy: where dense attention is kept whatever the method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_attn.context import Context
from hf_sparse_attn.cost.judge import fewest_keys


@dataclass(frozen=True)
class Policy:
    """Where dense attention is kept whatever the method; the same for all methods.

    Args:
        dense_layers: number of first layers, or the layers themselves; None means none.
        dense_steps: share of the model evaluations of a denoising run that is kept dense at its start, or (start, end)
            shares; each that is more than 0 keeps at least one step, so that a 4-step run still starts dense.
        min_tokens: fewest keys for sparse attention, or "auto": dense where sparse is predicted not to pay
            (cost/; here only what no pattern can change is looked at).
        min_queries: fewest queries for a method that reads prompts; below it is decoding, by the session's decoder.
    """

    dense_layers: int | tuple[int, ...] | None = None
    dense_steps: float | tuple[float, float] | None = None
    min_tokens: int | str = "auto"
    min_queries: int = 16

    def __post_init__(self) -> None:
        layers = self.dense_layers
        if isinstance(layers, Sequence) and not isinstance(layers, str):
            object.__setattr__(self, "dense_layers", layers := tuple(layers))
        numbers = layers if isinstance(layers, tuple) else (() if layers is None else (layers,))
        if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in numbers):
            raise ValueError(f"`dense_layers` must be a number of layers or a list of layer indices, got {layers!r}")
        for share in self.shares:
            if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share <= 1:
                raise ValueError(f"`dense_steps` must be shares between 0 and 1, got {self.dense_steps!r}")
        if self.min_tokens != "auto" and (
            isinstance(self.min_tokens, (bool, str)) or not isinstance(self.min_tokens, int) or self.min_tokens < 0
        ):
            raise ValueError(f"`min_tokens` must be 'auto' or a number of tokens, got {self.min_tokens!r}")

    @property
    def shares(self) -> tuple[Any, Any]:
        """Shares of the schedule that are dense, at its start and its end."""
        if self.dense_steps is None:
            return 0.0, 0.0
        if isinstance(self.dense_steps, Sequence) and not isinstance(self.dense_steps, str):
            if len(self.dense_steps) != 2:
                raise ValueError(f"`dense_steps` must be one share or (start, end), got {self.dense_steps!r}")
            return self.dense_steps[0], self.dense_steps[1]
        return self.dense_steps, 0.0

    @property
    def by_steps(self) -> bool:
        """Whether some steps of a denoising run are kept dense."""
        return any(share > 0 for share in self.shares)

    def is_dense_layer(self, index: int) -> bool:
        """Whether a layer is kept dense."""
        layers = self.dense_layers
        return layers is not None and (index < layers if isinstance(layers, int) else index in layers)

    def why_dense(self, ctx: Context, device: torch.device) -> str | None:
        """Why this call is dense before the method is asked, or None."""
        if self.is_dense_layer(ctx.layer):
            return "dense_layers"
        start, end = (math.ceil(share * ctx.num_steps - 1e-9) for share in self.shares)
        if ctx.step < start or ctx.step >= ctx.num_steps - end:
            return "dense_steps"
        if ctx.layout.q_len < self.min_queries:
            return f"decoding: fewer than {self.min_queries} queries"
        if self.min_tokens == "auto":
            fewest = fewest_keys(ctx, device)
        else:
            fewest = int(self.min_tokens)
        if ctx.layout.kv_len < fewest:
            return f"fewer than {fewest} keys (min_tokens={self.min_tokens})"
        return None
