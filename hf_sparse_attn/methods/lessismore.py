"""LessIsMore: one set of tokens for all heads, from a ranking over heads, chosen in a few layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from hf_sparse_attn.anchors import check_anchors, of_depth
from hf_sparse_attn.context import check_int
from hf_sparse_attn.decoding import Kept, Step, kept_tokens
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.pages import keep_best, step_logits
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_share, rank_descending

# Layers of models of 32 and more layers, as published.
_PUBLISHED, _OF = (2, 12), 32


@METHODS.register("lessismore")
@dataclass(frozen=True, kw_only=True)
class LessIsMore(Budgeted):
    """Where text is generated, two layers choose one set of tokens for all heads; the layers after them read it.

    Of the budget a part goes to the first tokens and the most recent ones, and the rest to those that heads rank
    highest: the best of every head, then the second best of every head, and so on, each token once. In the layers that
    choose, and before the first of them, everything is read. Prompts are attended to exactly.

    Deviations: every row of a batch has a set of its own (the published code takes that of the first row for all);
    the first tokens are left out in the steps alone whose budget has no room for them (there for good).
    Models of other depths have their anchors at the same shares of their layers. Where an anchor did not run, as the
    policy leaves it dense, the layers after it read everything.

    Formula:
        last = n - floor(n * (1 - recent_share)) tokens: sink first ones among them, the others the most recent
        keep = these, and of the others the first n - last by the order (rank within the head, head)

    When:
        Take it for long reasoning, where all heads come back to the same few places. On short caches the anchors cost
        more than the others save.

    Args:
        density: share n of the tokens of the cache that is kept, in (0, 1]; 1/10 if `budget` is not given, either.
        budget: tokens n that are kept, at least 1; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything in any case.
        anchors: layers that choose; None: 2 and 12 of 32, or the same shares of a model of another depth.
        sink: first tokens that are kept, at least 0.
        recent_share: share of n that goes to the first and the most recent tokens, in (0, 1].

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Yang et al. 2025, Less Is More (arXiv 2508.07101)"
    default_density = 0.1

    min_budget: int = 128
    skip_layers: int = 0
    anchors: Sequence[int] | None = None
    sink: int = 4
    recent_share: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anchors", check_anchors(self.anchors))
        check_int("sink", self.sink, 0)
        check_share("recent_share", self.recent_share)

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """What the last anchor said; see Method.decode."""
        key = self.name, step.length
        if step.layer in of_depth(self.anchors, _PUBLISHED, _OF, step.num_layers):
            step.layers[key] = self._choose(step)
            return None
        found: Kept | None = None if self.skips(step) else step.layers.get(key)
        return found

    def _choose(self, step: Step) -> Kept | None:
        """One set of tokens for each row of the batch."""
        if step.first is None:
            return self._chosen(step)
        rows = []
        for row, first in enumerate(step.first.tolist()):
            q, k, v = step.q[row : row + 1], step.k[row : row + 1, :, first:], step.v[row : row + 1, :, first:]
            found = self._chosen(replace(step, q=q, k=k, v=v, first=None))
            rows.append(torch.arange(k.shape[2], device=k.device)[None] if found is None else found.pages[0])
            rows[-1] = rows[-1] + first
        return kept_tokens(rows, len(rows))

    def _chosen(self, step: Step) -> Kept | None:
        """As `_choose`, where nothing is padding."""
        length, n = step.length, self.tokens(step.length)
        if n >= length:
            return None
        middle = int(n * (1 - self.recent_share))
        sink = self.sink if self.sink <= n - middle else 0
        recent = n - middle - sink
        logits = step_logits(step).flatten(1, 2)
        scores = logits.new_full((len(logits), 1, length), -torch.inf)
        if middle:
            ranked = rank_descending(logits[..., sink : length - recent])[..., :middle] + sink
            # Place of every candidate in the order of the ranks, of which the first one counts.
            place = ranked.mT.flatten(1)[:, None]
            order = -torch.arange(place.shape[2], device=place.device, dtype=scores.dtype)
            scores.scatter_reduce_(2, place, order.expand(place.shape), "amax")
        return keep_best(step, scores, 1, lambda _: n, sink, recent)
