"""Kascade: exact top-k in a few layers, reused head by head in the layers after them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.anchors import check_anchors, of_depth
from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import Budgeted
from hf_sparse_attn.method import Decline
from hf_sparse_attn.pages import check_sharing, keep_best, step_logits
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import causal_tiles
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import best_ascending, check_block_size

# Layers of Llama-3.1-8B, which has 32, as published.
_PUBLISHED, _OF = (0, 2, 8, 13, 14), 32


@METHODS.register("kascade")
@dataclass(frozen=True, kw_only=True)
class Kascade(Budgeted):
    """Where text is generated, a few layers find the tokens of most weight exactly; those after them read the same.

    In an anchor layer the weights of the queries of a head of keys are summed, and the tokens of the largest sums are
    kept, by the layer itself and by the layers after it up to the next anchor; a head of keys there reads what the
    head of the anchor that `head_map` names has chosen. The first layer chooses and reads everything. Prompts of a
    patched model are attended to exactly.

    Several queries in one call are a prompt: tiles of queries choose together among the tokens before their tile,
    `tile` fewer than a single query, and read their own tile up to themselves. There every layer chooses by itself.

    Deviations: where prompts are read in tiles, too, the published code decodes with `tile` fewer tokens; here single
    queries have their whole budget. Tokens of padding are never kept. Models of other depths have their anchors at
    the same shares of their layers. Where an anchor did not run, as the policy leaves it dense, the layers after it
    read everything.

    Formula:
        anchor, head of keys g: keep = the best tokens by sum over heads h of g of softmax(q_h k / sqrt(dim))
        other layer j, head g: keep = that of head head_map[j][g] of the last anchor
        prompts, tile t: keep = the best tokens - tile ones before t by the sum over heads and queries of t, and t

    When:
        Take it where anchors and heads were matched on texts like yours (`anchors.choose_anchors`). On short caches
        the anchors cost more than the others save.

    Args:
        density: share of the tokens of the cache that is kept, in (0, 1]; 1/10 if `budget` is not given, either.
        budget: tokens that are kept, at least 1; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers of the model that keep everything.
        anchors: layers that choose, of which the first layer is always one; None: 0, 2, 8, 13 and 14 of 32, or the
            same shares of a model of another depth.
        head_map: for every layer, and each head of keys, the head of the last anchor; None: the head itself.
        share: "group": the heads of queries of a head of keys keep the same tokens; "head": each its own.
        tile: queries of a prompt that choose together, a power of two from 16 to 256.
        rolling: whether tiles early in a prompt keep fewer tokens, as many as the tokens before them would.

    Raises:
        ValueError, TypeError: `density` and `budget` both given, or a parameter out of its range or of the wrong type.
    """

    paper = "Deshmukh et al. 2025, Kascade (arXiv 2512.16391)"
    default_density = 0.1

    min_budget: int = 128
    skip_layers: int = 1
    anchors: Sequence[int] | None = None
    head_map: Sequence[Sequence[int]] | None = None
    share: str = "group"
    tile: int = 32
    rolling: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anchors", check_anchors(self.anchors))
        if self.head_map is not None:
            heads = tuple(tuple(check_int("head_map", head, 0) for head in layer) for layer in self.head_map)
            object.__setattr__(self, "head_map", heads)
        check_sharing(self.share)
        check_block_size(self.tile, "tile")
        if not isinstance(self.rolling, bool):
            raise TypeError(f"`rolling` must be a bool, got {self.rolling!r} of type {type(self.rolling).__name__}")

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | Decline | None:
        """The best tokens, or those of the last anchor; see Method.decode."""
        key = self.name, step.length
        if step.layer == 0 or step.layer in of_depth(self.anchors, _PUBLISHED, _OF, step.num_layers):
            weights = step_logits(step).softmax(-1)
            weights = weights.sum(2) if self.share == "group" else weights.flatten(1, 2)
            step.layers[key] = keep_best(step, weights, 1, self.tokens)
            return None if self.skips(step) else step.layers[key]
        found: Kept | None = None if self.skips(step) else step.layers.get(key)
        return found if found is None or self.head_map is None else self._mapped(found, step.layer)

    def _mapped(self, found: Kept, layer: int) -> Kept | Decline:
        """The lists of the heads of an anchor for those of a layer."""
        assert self.head_map is not None
        heads = self.head_map[layer] if layer < len(self.head_map) else ()
        lists = found.pages.shape[1]
        if len(heads) != lists or max(heads) >= lists:
            return Decline(
                f"kascade's `head_map` must name one of {lists} heads for each, of layer {layer} got {heads}"
            )
        return Kept(found.pages[:, list(heads)], found.size)

    @torch.no_grad()
    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """A step, or the tiles of a prompt; see Method.pattern."""
        if q is None or k is None or ctx.layout.q_len == 1:
            return super().pattern(q, k, ctx)
        layout, tile = ctx.layout, self.tile
        if ctx.layer < self.skip_layers and ctx.num_layers > 1:
            return BlockPattern.dense(layout.q_len, layout.kv_len, True, device=q.device)
        begin = torch.arange(layout.query_start, layout.kv_len, tile, device=q.device)
        best = [self._before(q, k, ctx, start) for start in range(layout.query_start, layout.kv_len, tile)]
        counts = torch.tensor([one.shape[2] for one in best], device=q.device).expand(q.shape[0], q.shape[1], -1)
        tile_ids, tiles = causal_tiles(torch.zeros_like(begin), tile, tile)
        lead = q.shape[0] * q.shape[1]
        return BlockPattern.from_rows(
            torch.ones_like(counts), begin.repeat(lead), tile, tile, layout.q_len, layout.kv_len,
            tile_ids.repeat(lead), tiles, counts, torch.cat(best, 2).flatten(),
        )  # fmt: skip

    def _before(self, q: Tensor, k: Tensor, ctx: Context, start: int) -> Tensor:
        """The tokens before the tile at `start` that it keeps: int64 [batch, heads, count]."""
        total, end = ctx.layout.kv_len, min(start + self.tile, ctx.layout.kv_len)
        wanted = self.tokens(total)
        count = start if wanted >= total else min(start, max(0, wanted - self.tile))
        if self.rolling:
            count = min(count, self.tokens(start))
        queries = q[:, :, start - ctx.layout.query_start : end - ctx.layout.query_start]
        queries = queries.float().unflatten(1, (k.shape[1], -1))
        logits = queries @ k[:, :, None, :end].float().mT * ctx.softmax_scale
        if ctx.softcap:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        later = torch.ones(end - start, end, dtype=torch.bool, device=q.device).triu(start + 1)
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1).sum(3)[..., :start]
        group = weights.shape[2]
        if self.share == "group":
            return best_ascending(weights.sum(2), count).repeat_interleave(group, 1)
        return best_ascending(weights.flatten(1, 2), count)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Few tokens, for small tiles."""
        return [{"budget": 48, "tile": 16, "share": "head"}]
