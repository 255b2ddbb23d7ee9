"""Dense attention as a method: the model's own attention, untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS


@METHODS.register("dense")
@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Keeps everything: a patched model runs its own attention backend and gives the same bits.

    What to measure others against, and a way to learn shapes and call counts without changing anything. The pattern
    (all keys up to the query where causal) exists for the functional form.

    Formula:
        keep(i) = all j, and j <= i where causal

    When:
        Take it to measure others against, or for the layers of a profile that tolerate nothing else.
    """

    paper = "Vaswani et al. 2017, Attention Is All You Need"
    static = True
    keeps_all: ClassVar[bool] = True

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern:
        """All keys; see Method.pattern."""
        return BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal)

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """Always everything."""
        return {}
