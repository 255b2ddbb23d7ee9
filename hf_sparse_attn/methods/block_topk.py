"""Block top-k: the key blocks whose mean key fits the mean query best."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.pages import PageMeans, grouped, keep_best, remembered, share_of_heads
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import causal_tiles
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_block_size, check_share, pool_blocks, text_blocks, top_blocks

# Where text is generated: tokens of a page, first and last pages that are kept, first layers that keep everything.
# Means of larger pages lose what single tokens say.
_PAGE, _SINK, _RECENT, _SKIPPED = 8, 1, 2, 2


@METHODS.register("block_topk")
@dataclass(frozen=True, kw_only=True)
class BlockTopK(Method):
    """Each block of queries keeps the k key blocks whose mean key fits its mean query best; drops the rest.

    The block-sparse pattern of MInference (there 64 tokens, k = 100). Kept besides, within k: the first block and the
    block of the query itself, without which a causal model loses its sink and its neighbourhood; blocks that hold the
    text beside a video, for queries and for keys (bidirectional only). Ties go to the earlier block.

    Where text is generated a query keeps pages of 8 tokens by their mean keys, the heads that share a head of keys the
    same ones: as large a share of the tokens, or as many as `topk` blocks hold. The first page and the last two are
    among them, and the first two layers keep everything.

    Deviations: the forced blocks; means of a short last block are over the tokens it has (the published code pads it).
    In chunked prefill the blocks of queries begin at the chunk: choose chunks of whole blocks to get the blocks of the
    whole prompt.

    Formula:
        score(r, c) = mean(Q_r) . mean(K_c), r a block of queries, c one of keys that it sees
        keep(r) = {0, own block} and the best others, k in all; k = topk, or round(density * blocks seen)
        decoding: score(p) = sum over the heads of a group of softmax(q . mean(K_p) * scale) over p, pages of 8 tokens

    When:
        Take it for video, or for text whose heads look for passages: no dynamic choice costs less. Leave it where
        single tokens far away matter, for they drown in the mean of their block: vertical_slash finds them.

    Args:
        block_size: tokens in a block of queries and of keys, a power of two from 16 to 256.
        topk: key blocks kept per query block, at least 1; or
        density: share of the visible key blocks kept per query block, in (0, 1]; one of the two, 0.25 if neither is.

    Raises:
        ValueError, TypeError: both given, or a value out of range or of the wrong type.
    """

    paper = "block-sparse pattern of Jiang et al. 2024, MInference (arXiv 2407.02490)"
    knob = Knob("density", 1e-4, 1.0, log=True)
    decodes = True

    block_size: int = 128
    topk: int | None = None
    density: float | None = None

    def __post_init__(self) -> None:
        check_block_size(self.block_size)
        if self.topk is not None and self.density is not None:
            raise ValueError(f"`topk` must be None when `density` is given, got {self.topk} and {self.density}")
        if self.topk is not None:
            check_int("topk", self.topk, 1)
        else:
            object.__setattr__(self, "density", check_share("density", 0.25 if self.density is None else self.density))

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The best blocks of each head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: block_topk chooses by content, got None")
        layout, size = ctx.layout, self.block_size
        batch, heads, group = q.shape[0], q.shape[1], q.shape[1] // k.shape[1]
        queries = pool_blocks(q, size).unflatten(1, (k.shape[1], group))
        keys = pool_blocks(k, size)[:, :, None].mT
        rows, cols = queries.shape[3], keys.shape[4]
        device = q.device
        row, col = torch.arange(rows, device=device), torch.arange(cols, device=device)
        last_key = (layout.query_start + (row + 1) * size - 1).clamp(max=layout.kv_len - 1)
        # The block in which the row's last query lies; the rows of a chunk need not begin where a key block does.
        own = last_key // size
        text_row, text_col = (t.to(device) for t in text_blocks(layout, size, size))

        def score(first: int, last: int) -> Tensor:
            found = (queries[:, :, :, first:last] @ keys).flatten(1, 2)
            home = own[first:last, None]
            forced = (col == home) | (col == 0) | text_col
            if layout.is_causal:
                start = layout.query_start + row[first:last, None] * size
                forced = forced | (col == (start // size))
                found = found.masked_fill(col > home, -torch.inf)
            return found.masked_fill(forced, torch.inf)

        visible = own + 1 if layout.is_causal else torch.full_like(own, cols)
        counts = self._counts(visible, int(text_col.sum()))
        counts = torch.where(text_row, visible, counts)
        chosen = top_blocks(score, counts, (batch, heads, rows, cols)).flatten() * size
        shape = (batch, heads, rows)
        tile_ids, tiles = None, None
        if layout.is_causal:
            start = (layout.query_start + row * size).repeat_interleave(counts).repeat(batch * heads)
            tile_ids, tiles = causal_tiles(start - chosen, size, size)
        return BlockPattern.from_rows(
            counts.expand(shape), chosen, size, size, layout.q_len, layout.kv_len, tile_ids, tiles
        )

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """The pages whose mean keys fit best; see Method.decode."""
        if (step.layer < _SKIPPED and step.num_layers > 1) or self._tokens(step.length) >= step.length:
            return None
        logits = remembered(step, PageMeans, _PAGE).products(grouped(step, "group") * step.scale)
        return keep_best(step, share_of_heads(step, logits, _PAGE), _PAGE, self._tokens, _SINK, _RECENT)

    def _tokens(self, length: int) -> int:
        """How many of `length` tokens of a cache are kept."""
        if self.topk is not None:
            return self.topk * self.block_size
        assert self.density is not None
        return int(self.density * length)

    def turned(self, value: float) -> Method:
        """With `density` at the value, in place of `topk`; see Method.turned."""
        return replace(self, density=value, topk=None)

    def _counts(self, visible: Tensor, text: int) -> Tensor:
        """Blocks to keep in each row, from the number it may see; text comes on top."""
        if self.topk is not None:
            wanted = torch.full_like(visible, self.topk)
        else:
            assert self.density is not None
            wanted = (visible.double() * self.density).round().long().clamp(min=1)
        return torch.minimum(wanted + text, visible)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """By number and by share."""
        return [{"block_size": 16, "topk": 3}, {"block_size": 32, "density": 0.4}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All blocks."""
        return {"block_size": 32, "density": 1.0}
