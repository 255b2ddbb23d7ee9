"""Exact attention as a method: all keys, by whatever computes them fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS


@METHODS.register("exact")
@dataclass(frozen=True, kw_only=True)
class Exact(Method):
    """Keeps everything, and runs on the fastest exact path: equal to the model up to rounding.

    A call runs on a kernel of this package where the table of costs predicts that it beats the model's own attention,
    as it does for long prompts on CPUs; all others run the model's own attention, untouched. Where text is generated
    heads that share keys read them together. Nothing is given up where the model's own attention runs, so that it is
    no error with `strict=True` either.

    Formula:
        keep(i) = all j, and j <= i where causal

    When:
        Take it first: it risks nothing. With `cache="preallocated"` text is generated faster, too.
    """

    paper = "Dao et al. 2022, FlashAttention: Fast and Memory-Efficient Exact Attention with IO-Awareness"
    static = True
    keeps_all: ClassVar[bool] = True

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern:
        """All keys; see Method.pattern."""
        return BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal)

    def least_density(self, ctx: Context) -> float:
        """All of it; see Method.least_density."""
        return 1.0

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Always everything."""
        return {}
