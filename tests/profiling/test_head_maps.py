"""Attention in coarse cells: their values, and where pictures put them, at lengths that the cells do not divide."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.demo import _draw_head
from hf_sparse_attn.profiles.measurements import HeadMap
from hf_sparse_attn.profiling.head_maps import extent, pooled_attention
from hf_sparse_attn.profiling.view.curves import _draw

SIZES = ((96, 12), (111, 12), (130, 12), (7, 12))


def weights_of(q: torch.Tensor, k: torch.Tensor, scale: float) -> torch.Tensor:
    logits = q.double() @ k.double().T * scale
    return logits.masked_fill(torch.ones_like(logits).triu(1).bool(), -torch.inf).softmax(-1)


@pytest.mark.parametrize(("tokens", "cells"), SIZES)
@pytest.mark.parametrize("reduce", ["max", "mean"])
def test_cells_hold_the_attention_of_their_tokens(tokens: int, cells: int, reduce: Any) -> None:
    q, k = torch.randn(2, tokens, 16)
    found = pooled_attention(q, k, 0.5, cells, reduce=reduce)
    weights, size = weights_of(q, k, 0.5), -(-tokens // cells)
    for row in range(cells):
        for column in range(cells):
            part = weights[row * size : (row + 1) * size, column * size : (column + 1) * size]
            want = 0.0 if not part.numel() else part.max() if reduce == "max" else part.sum(1).mean()
            assert float(found[row, column]) == pytest.approx(float(want), abs=1e-6)


class Picture:
    """Axes that note what is drawn, and tell the value at a token."""

    def __init__(self) -> None:
        self.images: list[tuple[Any, tuple[float, ...]]] = []
        self.limits: dict[str, tuple[float, float]] = {}
        self.spines: dict[str, Any] = {}

    def imshow(self, image: Any, *, extent: tuple[float, ...], **_: Any) -> None:
        self.images.append((np.ma.filled(image, 0) if np.ma.isMaskedArray(image) else np.asarray(image), extent))

    def set_xlim(self, *limits: float) -> None:
        self.limits["x"] = limits

    def set_ylim(self, *limits: float) -> None:
        self.limits["y"] = limits

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None

    def at(self, number: int, query: int, key: int) -> Any:
        image, (left, right, bottom, top) = self.images[number]
        row = int((query + 0.5 - top) / (bottom - top) * image.shape[0])
        return image[row, int((key + 0.5 - left) / (right - left) * image.shape[1])]


@pytest.mark.parametrize("tokens", [4096, 1000, 192, 130])
def test_the_demo_draws_a_column_where_it_is(tokens: int) -> None:
    column = tokens * 7 // 8
    q, k = torch.ones(tokens, 8), torch.zeros(tokens, 8)
    k[column] = 8.0
    keep = torch.zeros(1, 1, -(-tokens // 64), -(-tokens // 64), dtype=torch.bool)
    keep[..., column // 64] = True
    keep |= torch.eye(len(keep[0, 0])).bool()
    pattern = hsa.BlockPattern.from_block_map(keep, 64, 64, tokens, tokens, causal=True)
    drawn = Picture()
    _draw_head(drawn, q, k, 1.0, pattern)
    cell = -(-tokens // 192)
    assert drawn.limits == {"x": (0, tokens), "y": (tokens, 0)}
    assert drawn.at(0, tokens - 1, column) == 0 and drawn.at(0, tokens - 1, column - cell) < -2
    assert drawn.at(0, column - cell, column) < -2
    for query, key in ((tokens - 1, column), (tokens - 1, tokens - 1), (tokens - 1, 0), (0, tokens - 1)):
        assert (drawn.at(1, query, key)[3] > 0) == bool(keep[0, 0, query // 64, key // 64] and key <= query)


@pytest.mark.parametrize("tokens", [96, 111, 130])
def test_the_page_of_a_profile_draws_a_column_where_it_is(tokens: int) -> None:
    column = tokens * 7 // 8
    q, k = torch.ones(tokens, 8), torch.zeros(tokens, 8)
    k[column] = 8.0
    attention = pooled_attention(q, k, 1.0, 12, reduce="mean").numpy()
    drawn = Picture()
    _draw(drawn, HeadMap(0, 0, 0, attention, np.ones((1, 12, 12), bool)), tokens, attention > 0.5)
    assert drawn.limits == {"x": (0, tokens), "y": (tokens, 0)}
    cell = -(-tokens // 12)
    for number in (0, 1):
        assert drawn.at(number, tokens - 1, column) > 0.5 > drawn.at(number, tokens - 1, column - cell)


def test_squares_reach_beyond_the_tokens() -> None:
    assert extent(4096, 192) == (0, 4224, 4224, 0) and extent(384, 192) == (0, 384, 384, 0)
