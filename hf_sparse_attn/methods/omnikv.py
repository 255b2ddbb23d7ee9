"""OmniKV: a few layers read everything and say which tokens the layers after them read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from hf_sparse_attn.anchors import check_anchors, of_depth
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.pages import keep_best, step_logits
from hf_sparse_attn.registry import METHODS

# Layers of Llama-3.1-8B, which has 32, as published.
_PUBLISHED, _OF = (2, 8, 18), 32


@METHODS.register("omnikv")
@dataclass(frozen=True, kw_only=True)
class OmniKV(Budgeted):
    """Where text is generated, a few layers read everything; the tokens they look at most are all that others read.

    In an anchor layer every head attends to the whole cache. A token counts by the largest weight that any head gives
    it, and the best are kept by all heads of the layers that follow, up to the next anchor. The first layers and the
    one after an anchor read everything. Prompts are attended to exactly.

    Deviations: tokens of padding are never kept; models of other depths have their anchors at the same shares of
    their layers. Where an anchor did not run, as the policy leaves it dense, the layers after it read everything.

    Formula:
        anchor: keep = the best tokens by max over heads of softmax(q k / sqrt(dim)), for the layers after it

    When:
        Take it where layers agree on what matters, as in deep models. On short caches the anchors cost more than the
        others save.

    Args:
        density: share of the tokens of the cache that is kept, in (0, 1]; 1/10 if `budget` is not given, either.
        budget: tokens that are kept, at least 1; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything.
        anchors: layers that choose; None: 2, 8 and 18 of 32, or the same shares of a model of another depth.

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Hao et al. 2025, OmniKV (ICLR 2025)"
    default_density = 0.1

    min_budget: int = 128
    anchors: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anchors", check_anchors(self.anchors))

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """What the last anchor said; see Method.decode."""
        anchors = of_depth(self.anchors, _PUBLISHED, _OF, step.num_layers)
        if step.layer in anchors:
            weights = step_logits(step).softmax(-1).flatten(1, 2).amax(1, keepdim=True)
            step.layers[self.name, step.length] = keep_best(step, weights, 1, self.tokens)
            return None
        if self.skips(step) or step.layer - 1 in anchors:
            return None
        found: Kept | None = step.layers.get((self.name, step.length))
        return found
