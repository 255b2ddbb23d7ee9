"""Attention of single heads in coarse cells, for pictures: what dense attention weighs and what candidates keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.rows import kept_cells
from hf_sparse_attn.profiles.measurements import HeadMap
from hf_sparse_attn.profiling.observe import Seen

CELLS = 64
# Queries of a cell whose attention is averaged: bounds the time at long context.
_QUERIES = 64


def pooled_attention(
    q: Tensor,
    k: Tensor,
    scale: float,
    cells: int,
    causal: bool = True,
    softcap: float = 0.0,
    reduce: Literal["max", "mean"] = "max",
    queries: int | None = None,
) -> Tensor:
    """Attention of one head over cells x cells squares, a strip of queries at a time.

    Args:
        q, k: [tokens, dim]; the last query is at the last key.
        scale: factor on the logits.
        cells: squares along each side.
        causal: whether queries see only the keys up to their own.
        softcap: cap on the logits as in Context, 0 for none.
        reduce: "max", the largest weight in a square; "mean", the sum over its keys, mean over its queries.
        queries: how many queries of a cell, evenly spread, are looked at; None means all.

    Returns:
        float32 [cells, cells]; 0 in cells beyond the tokens.
    """
    n, keys = len(q), len(k)
    size, width = -(-n // cells), -(-keys // cells)
    out = torch.zeros(cells, cells, device=q.device)
    position = torch.arange(keys, device=q.device)
    for row, start in enumerate(range(0, n, size)):
        stop = min(start + size, n)
        step = 1 if queries is None else max(1, (stop - start) // queries)
        query = torch.arange(start, stop, step, device=q.device)
        strip = q[query].float() @ k.float().T * scale
        if softcap:
            strip = softcap * (strip / softcap).tanh()
        if causal:
            strip = strip.masked_fill(position > query[:, None] + keys - n, -torch.inf)
        weights = strip.softmax(-1)
        per_key = weights.amax(0) if reduce == "max" else weights.mean(0)
        squares = nn.functional.pad(per_key, (0, -keys % width)).unflatten(0, (-1, width))
        found = squares.amax(1) if reduce == "max" else squares.sum(1)
        out[row, : len(found)] = found
    return out


def extent(tokens: int, cells: int) -> tuple[float, float, float, float]:
    """Where a picture of cells x cells squares lies among the tokens, as `imshow` takes it.

    All squares are of one size, so that the last ones of a length which they do not divide reach beyond it.
    """
    end = cells * -(-tokens // cells)
    return 0, end, end, 0


class MapMaker:
    """Draws `most` heads, spread evenly over layers and heads, the first time each layer is seen.

    Args:
        most: how many.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.open: list[HeadMap] = []
        self.seen: set[int] = set()
        self.case: object = None

    def begin(self, seen: Seen, case: object, candidates: int) -> list[HeadMap]:
        """The maps that a call opens: their dense attention is drawn; of the candidates, dense keeps all.

        Args:
            seen: the call.
            case: what it belongs to; only calls of the first case are drawn.
            candidates: how many there are, dense first.
        """
        ctx = seen.ctx
        self.case = case if self.case is None else self.case
        if case != self.case or ctx.layer in self.seen:
            return []
        self.seen.add(ctx.layer)
        total = ctx.num_layers * ctx.num_heads
        number = min(self.most, total)
        picked = {(2 * i + 1) * total // (2 * number) for i in range(number)}
        opened = []
        for layer, head in (divmod(i, ctx.num_heads) for i in sorted(picked)):
            if layer != ctx.layer:
                continue
            q, k = seen.q[0, head], seen.k[0, head // (ctx.num_heads // ctx.num_kv_heads)]
            attention = pooled_attention(
                q, k, ctx.softmax_scale, CELLS, ctx.layout.is_causal, ctx.softcap, "mean", _QUERIES
            )
            kept = np.zeros((candidates, CELLS, CELLS), np.bool_)
            kept[0] = True
            # Which case it is of is known at the end.
            opened.append(HeadMap(0, layer, head, attention.cpu().numpy(), kept))
        self.open += opened
        return opened

    def finish(self, case: int) -> list[HeadMap]:
        """All maps, of the case with this number."""
        return [replace(drawn, case=case) for drawn in self.open]


def keep(maps: Sequence[HeadMap], candidate: int, patterns: Sequence[BlockPattern], keys: int) -> None:
    """Notes what a candidate kept in a call; patterns over other keys than the call's (pooled ones) are left out."""
    for drawn in maps:
        for pattern in patterns:
            if pattern.kv_len == keys:
                drawn.kept[candidate] |= kept_cells(pattern, drawn.head, CELLS).cpu().numpy()
