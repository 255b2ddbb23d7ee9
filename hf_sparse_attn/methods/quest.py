"""Quest: the pages of a cache whose keys could fit the query best, by the bounds of their channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from hf_sparse_attn.context import check_int
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.pages import (
    PageBounds,
    bound_weights,
    check_page_size,
    check_sharing,
    grouped,
    keep_best,
    remembered_rows,
)
from hf_sparse_attn.registry import METHODS


@METHODS.register("quest")
@dataclass(frozen=True, kw_only=True)
class Quest(Budgeted):
    """Where text is generated, each query keeps the pages of the cache whose best possible key fits it best.

    Of every page the largest and the smallest number of each channel of its keys, as they are with their positions,
    are remembered. By them no key of the page can have a product with the query above the page's bound.
    The heads of queries that share a head of keys choose together, by the sum of their bounds, so that a page is read
    once. Prompts are attended to exactly.

    Deviations: heads that choose together, and first and last pages that are kept in any case; `share="head"`,
    `sink_pages=0` and `recent_pages=0` give the published rule, with `budget` in tokens. Keys of padding do not
    count, and a row with padding has its budget and its first page by its own tokens.

    Formula:
        bound(p) = sum over channels d of max(q_d * hi_d(p), q_d * lo_d(p)), hi and lo over the keys of page p
        keep = the first sink_pages, the last recent_pages, and the best others, tokens // page_size in all, at least 3

    When:
        Take it to generate after long prompts: it reads a sixteenth of the keys to choose, and forgets nothing. Leave
        it for caches of a few thousand tokens, where to read everything is as fast.

    Args:
        density: share of the tokens of the cache that is kept, in (0, 1]; 1/8 if `budget` is not given, either.
        budget: tokens that are kept, at least 1; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything.
        page_size: tokens of a page, a power of two from 8 to 64.
        share: "group": the heads of queries of a head of keys keep the same pages; "head": each its own.
        sink_pages: first pages that are kept in any case, at least 0.
        recent_pages: last pages that are kept in any case, the one of the query itself among them, at least 0.

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Tang et al. 2024, Quest (arXiv 2406.10774)"

    page_size: int = 16
    share: str = "group"
    sink_pages: int = 1
    recent_pages: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_page_size(self.page_size)
        check_sharing(self.share)
        check_int("sink_pages", self.sink_pages, 0)
        check_int("recent_pages", self.recent_pages, 0)

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """The pages with the highest bounds; see Method.decode."""
        if self.skips(step) or self.tokens(step.length) >= step.length:
            return None
        bounds = remembered_rows(step, PageBounds, self.page_size)
        weights = bound_weights(grouped(step, self.share)).sum(3)
        scores = (weights @ bounds.mT).flatten(1, 2)
        return keep_best(step, scores, self.page_size, self.tokens, self.sink_pages, self.recent_pages, least=3)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Few pages, of small size."""
        return [{"budget": 48, "page_size": 8, "share": "head"}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All tokens."""
        return {"density": 1.0}
