"""What methods choose by, computed in fewer steps than by its definition: both agree."""

from __future__ import annotations

import pytest
import torch

from hf_sparse_attn.pattern.layout import causal_tiles
from hf_sparse_attn.pattern.ops import _row_sizes, density
from hf_sparse_attn.selection import best_ascending, rank_descending
from tests.support.patterns import random_pattern


@pytest.mark.parametrize("count", [0, 1, 5, 32, 63, 64])
@pytest.mark.parametrize("kind", ["any", "ties", "forced", "nan"])
def test_best_ascending_is_the_head_of_the_ranking(kind: str, count: int) -> None:
    scores = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        scores = scores.round()
    elif kind == "forced":
        scores[..., :20] = torch.inf
    elif kind == "nan":
        scores[0, 0, 7] = torch.nan
    found = best_ascending(scores, count)
    assert torch.equal(found, rank_descending(scores)[..., :count].sort(-1).values)


def test_causal_tiles_hold_those_that_are_used_once() -> None:
    distance = torch.tensor([40, -3, 0, 5, 40, -3])
    ids, tiles = causal_tiles(distance, 8, 16)
    query, key = torch.arange(8)[:, None], torch.arange(16)
    assert len(tiles) == 4 and tiles[0].all()
    for own, at in zip(ids, distance, strict=True):
        assert torch.equal(tiles[own], key <= query + at)


@pytest.mark.parametrize("queries, keys", [(96, 128), (96, 125), (90, 125)])
def test_density_counts_cut_blocks_by_what_they_have(queries: int, keys: int) -> None:
    pattern = random_pattern(queries, keys, block_q=32, block_k=16, heads=3, columns=7, seed=2)
    assert int(_row_sizes(pattern).sum()) == queries
    assert density(pattern, "full") == pytest.approx(pattern.to_dense().double().mean().item())
