"""RocketKV's second stage: tokens by the largest channels of the query and the bounds of small pages."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.pages import (
    PageBounds,
    check_sharing,
    grouped,
    keep_best,
    remembered,
    share_of_heads,
)
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import best_ascending


@METHODS.register("rocket")
@dataclass(frozen=True, kw_only=True)
class Rocket(Budgeted):
    """Where text is generated, each query keeps the tokens that its largest channels and small pages point at.

    The second of RocketKV's stages: logits are estimated from the channels in which the queries of a head of keys are
    largest, and from the bounds of pages of a few tokens in the place of keys; which of the two bounds of a channel
    counts, the sign of the summed queries says for all of them. The weights that follow, their mean over the queries,
    choose the tokens. Prompts are attended to exactly.

    Deviations: the first stage, which evicts tokens of the prompt for good, is no part of it: caches are read here,
    and never cut. The first layers keep everything (`skip_layers=0` is as published). As the bounds of pages of 2
    tokens are as many numbers as the keys, in float32, they take memory, which the published code has by its eviction.

    Formula:
        c = ceil(sqrt(compression)), 1 if that is more than compression; r = floor(dim * c / compression)
        s_d = sign of sum_h q_hd; R = the r channels of the largest mean_h |q_hd|
        a_h(p) = scale * sqrt(|q_h|_1 / |q_h in R|_1) * sum_{d in R} s_d q_hd * max_{j in p} s_d k_jd, p a page of c
        keep = the best tokens by mean_h softmax(a_h)

    When:
        Take it to compare with, or where a few tokens far apart matter more than passages. On processors quest is
        faster: a token costs less in a page.

    Args:
        density: share of the tokens of the cache that is kept, in (0, 1]; 1/8 if `budget` is not given, either.
        budget: tokens that are kept, at least 1; one of the two. RocketKV's own budget is twice that.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything.
        compression: by how much fewer numbers are looked at than the keys have, at least 1.
        share: "group": the heads of queries of a head of keys keep the same tokens; "head": each its own.

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Behnam et al. 2025, RocketKV (arXiv 2502.14051)"

    compression: float = 4.0
    share: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.compression, bool) or not isinstance(self.compression, (int, float)):
            raise TypeError(f"`compression` must be a number, got {self.compression!r}")
        if not 1 <= self.compression < math.inf:
            raise ValueError(f"`compression` must be at least 1, got {self.compression}")
        check_sharing(self.share)

    @property
    def page(self) -> int:
        """Tokens of a page."""
        size = math.ceil(math.sqrt(self.compression))
        return 1 if size > self.compression else size

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """The tokens with the highest estimated weights; see Method.decode."""
        if self.skips(step) or self.tokens(step.length) >= step.length:
            return None
        bounds = remembered(step, PageBounds, self.page)
        q = grouped(step, self.share)
        channels = max(1, int(q.shape[4] * self.page / self.compression))
        largest = torch.zeros_like(q[:, :, :, :1], dtype=torch.bool)
        largest.scatter_(4, best_ascending(q.abs().mean(3, keepdim=True), channels), True)
        used = q * largest
        high = q.sum(3, keepdim=True) >= 0
        weights = torch.cat([used.where(high, 0.0), used.where(~high, 0.0)], -1)
        factor = (q.abs().sum(4) / used.abs().sum(4).clamp(min=1e-30)).sqrt() * step.scale
        logits = bounds.products(weights) * factor[..., None]
        logits = logits.repeat_interleave(self.page, -1)[..., : step.length]
        return keep_best(step, share_of_heads(step, logits, 1), 1, self.tokens)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Few tokens."""
        return [{"budget": 48, "compression": 2, "share": "head"}]
