"""Settings of a low-rank adapter, and the name that peft knows it by."""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_sparse_attn.context import check_int

ADAPTER = "default"


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """A low-rank adapter (Hu et al. 2021, LoRA, arXiv 2106.09685).

    Args:
        rank: of the added matrices, at least 1.
        alpha: the added product is scaled by alpha / rank, more than 0; None means alpha = rank.
        targets: names, or ends of names, of the linear modules that get one; a single one with a `*` or a `\\` in it
            is a regular expression over whole names.
        trained: ends of names of modules that are trained in full besides (norms, embeddings).
        dropout: on what the added matrices read, in [0, 1); drawn anew in each process and micro-batch.
    """

    targets: tuple[str, ...]
    rank: int = 16
    alpha: float | None = None
    trained: tuple[str, ...] = ()
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_int("rank", self.rank, 1)
        if not self.targets:
            raise ValueError("`targets` must name at least one module, got none")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be at least 0 and less than 1, got {self.dropout}")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise ValueError(f"`alpha` must be more than 0 and finite, or none, got {self.alpha}")

    @property
    def pattern(self) -> str | None:
        """The regular expression over whole names; None where `targets` are names."""
        return self.targets[0] if len(self.targets) == 1 and any(sign in self.targets[0] for sign in "*\\") else None
