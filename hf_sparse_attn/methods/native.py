"""What a model that is sparse by itself selects, and nothing besides: its own indexer, run without its detours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS


@METHODS.register("native")
@dataclass(frozen=True, kw_only=True)
class Native(Method):
    """Keeps the keys that the model's own, trained indexer selects: exact, up to rounding.

    Models that were trained to be sparse (DeepSeek-V3.2, GLM-5 and their like) choose keys for every query. In
    transformers that selection becomes a mask of all pairs of tokens, and attention is dense under it. With this
    method the indexer runs in strips of queries and attention reads the selected keys alone, so that memory grows
    with the length and no longer with its square. It has no parameters, and works on no other model: the rule is part
    of the model, so that there is no pattern of q and k that could be asked for without it.

    Formula:
        keep(i) = the keys up to i that the layer's indexer selects for query i, one list for heads that share keys

    When:
        Take it for every model that is sparse by itself; no other method can be used there.
    """

    paper: ClassVar[str] = "DeepSeek-AI 2025, DeepSeek-V3.2: Pushing the Frontier of Open Large Language Models"
    needs: ClassVar[frozenset[str]] = frozenset({"own selection"})

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """A Decline: the selection is made within the model's layers; see Method.pattern."""
        return Decline(f"{self.name} keeps what a model's own layers select, which q and k alone do not tell")
