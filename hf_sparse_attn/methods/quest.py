"""Quest: the pages of a cache whose keys fit the query best, by what is remembered of each page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.pages import (
    PageBounds,
    PageSpreads,
    bound_weights,
    check_page_size,
    check_sharing,
    grouped,
    keep_best,
    remembered,
    share_of_heads,
)
from hf_sparse_attn.registry import METHODS

# How far between the mean key and the ends of a page the key is taken to be that fits a query best; measured.
_SPREAD = 0.5


@METHODS.register("quest")
@dataclass(frozen=True, kw_only=True)
class Quest(Budgeted):
    """Where text is generated, each query keeps the pages of the cache whose keys could fit it best.

    Of every page the range of each channel of its keys is remembered, as they are with their positions, and a query
    takes the pages of the largest products that a key in these ranges could have. Prompts are attended to exactly.

    Deviations: such a bound is far above what any key of a page has, so that by default a key is taken that is part
    of the way from the page's mean to it (`estimate="spread"`), remembered in half precision. The heads of queries
    that share a head of keys choose together, so that a page is read once: by the mean of the weights that they give
    the pages, or by the sum of their bounds. Pages have 8 tokens, and first and last pages are kept in any case (with
    `estimate="spread"` always one that is not full).
    With them SmolLM2 stays three times nearer to its dense answers at an eighth of the tokens. The published rule is
    `estimate="bound", page_size=16, share="head", sink_pages=0, recent_pages=0`, with `budget` in tokens. Keys of
    padding do not count, and a row with padding has its budget and its first page by its own tokens.

    Formula:
        bound: score_h(p) = sum over channels d of max(q_d * hi_d(p), q_d * lo_d(p)), hi and lo over the keys of page p
        spread: score_h(p) = q . mean(p) + 0.5 * sum_d |q_d| * (hi_d(p) - lo_d(p)) / 2
        group: sum over its heads h of score_h (bound), or of softmax over p of scale * score_h (spread)
        keep = the first sink_pages, the last recent_pages, and the best others, tokens // page_size in all, at least 3

    When:
        Take it to generate after long prompts: to choose costs a tenth of attention, and nothing is forgotten. Leave
        it for caches of a few thousand tokens, where to read everything is as fast.

    Args:
        density: share of the tokens of the cache that is kept, in (0, 1]; 1/8 if `budget` is not given, either.
        budget: tokens that are kept, at least 1; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything.
        page_size: tokens of a page, a power of two from 8 to 64.
        estimate: what a page is chosen by: "spread", or "bound" as published.
        share: "group": the heads of queries of a head of keys keep the same pages; "head": each its own.
        sink_pages: first pages that are kept in any case, at least 0.
        recent_pages: last pages that are kept in any case, the one of the query itself among them, at least 0.

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Tang et al. 2024, Quest (arXiv 2406.10774)"

    page_size: int = 8
    estimate: str = "spread"
    share: str = "group"
    sink_pages: int = 1
    recent_pages: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_page_size(self.page_size)
        if self.estimate not in ("spread", "bound"):
            raise ValueError(f"`estimate` must be 'spread' or 'bound', got {self.estimate!r}")
        check_sharing(self.share)
        check_int("sink_pages", self.sink_pages, 0)
        check_int("recent_pages", self.recent_pages, 0)

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """The pages with the highest scores; see Method.decode."""
        if self.skips(step) or self.tokens(step.length) >= step.length:
            return None
        scores = self._scores(step, grouped(step, self.share))
        return keep_best(step, scores, self.page_size, self.tokens, self.sink_pages, self.recent_pages, least=3)

    def _scores(self, step: Step, q: Tensor) -> Tensor:
        """Of every page for each list: float32 [batch, lists, pages]."""
        if self.estimate == "bound":
            # Linear in the weights: those of several queries are added up before the pages are read.
            weights = bound_weights(q).sum(3, keepdim=True)
            return remembered(step, PageBounds, self.page_size).products(weights)[:, :, :, 0].flatten(1, 2)
        weights = torch.cat([q, _SPREAD * q.abs()], -1) * step.scale
        logits = remembered(step, PageSpreads, self.page_size).products(weights)
        return share_of_heads(step, logits, self.page_size)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Few pages, of small size."""
        return [{"budget": 48, "share": "head"}]
