"""MoBA, mixture of block attention: every query reads the chunks of keys whose mean fits it best, and its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.trained.moba import TOP_K, kept_share, moba_pattern


@METHODS.register("moba")
@dataclass(frozen=True, kw_only=True)
class Moba(Method):
    """Each query and head keeps its own chunk of keys up to itself and the chunks whose mean key fits it best.

    The gate has no weights: it is the product of the query with the mean key of a chunk, in float32, and only chunks
    that ended before the query's own are asked. Their keys and those of the own chunk go into one softmax. Models are
    trained with it as it is (`moba_attention` is the same as a function, with gradients for q, k and v and none
    through the choice); other models run it like any choice by content. Ties go to the earlier chunk. The choice of
    every query is kept exactly, in tiles of 16 queries: what is computed is what any of 16 neighbours has chosen.

    As in the published code, `top_k=1` keeps all keys up to the query, not the own chunk alone. Deviations: none in
    what is kept; `density`. The published code decodes with all keys.

    Formula:
        g(t, c) = q_t . mean(K_c), for chunks c that ended before the chunk of t
        keep(t) = own chunk up to t, and the top_k - 1 chunks with the highest g;  all up to t where top_k is 1

    When:
        Take it for a model that was trained with it. Others lose their first tokens, which it does not force: at a
        quarter of the pairs of 4,096 tokens attention of SmolLM2 is further off than with block_topk, which costs
        less.

    Args:
        chunk_size: tokens in a chunk, at least 1; those of a power of two or a multiple of 16 run fastest.
        top_k: chunks that a query reads, its own among them, at least 1; or
        density: share of the chunks up to its own that a query reads, its own among them, in (0, 1]; one of the two,
            `top_k` 12 if neither is given.

    Raises:
        ValueError, TypeError: both given, or a value out of range or of the wrong type.
    """

    paper = "Lu et al. 2025, MoBA: Mixture of Block Attention for Long-Context LLMs (arXiv 2502.13189)"
    needs = frozenset({"causal"})
    knob = Knob("density", 1e-4, 1.0, log=True)

    chunk_size: int = 4096
    top_k: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        check_int("chunk_size", self.chunk_size, 1)
        if self.density is None:
            object.__setattr__(self, "top_k", check_int("top_k", TOP_K if self.top_k is None else self.top_k, 1))
            return
        if self.top_k is not None:
            raise ValueError(f"`top_k` must be None when `density` is given, got {self.top_k} and {self.density}")
        object.__setattr__(self, "density", check_share("density", self.density))

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The chunks of each query and head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: moba chooses by content, got None")
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        return moba_pattern(q, k, ctx.layout, self.chunk_size, self.amount)

    @property
    def amount(self) -> int | float:
        """Chunks that a query reads, or as a float their share."""
        found = self.density if self.top_k is None else self.top_k
        assert found is not None
        return found

    def turned(self, value: float) -> Method:
        """With `density` at the value, in place of `top_k`; see Method.turned."""
        return replace(self, density=value, top_k=None)

    def least_density(self, ctx: Context) -> float:
        """What is kept, which the content does not change; see Method.least_density."""
        if not ctx.layout.is_causal:
            return 0.0
        return kept_share(ctx.layout, self.chunk_size, self.amount)

    def choosing_pairs(self, ctx: Context) -> float:
        """Every query with every mean; see Method.choosing_pairs."""
        return ctx.layout.q_len * ctx.layout.kv_len / self.chunk_size

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """None: a model that was not trained with it lacks its first tokens; see Method.candidates."""
        return []

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """By number and by share, with chunks that end with a row of queries and chunks that do not."""
        return [{"chunk_size": 32, "top_k": 3}, {"chunk_size": 24, "density": 0.4}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All chunks."""
        return {"chunk_size": 32, "density": 1.0}
