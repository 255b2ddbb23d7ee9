"""Canvases that the tile does not divide: exact to the token, and with masks of few bytes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.video_tiles import Sizes, tile_pattern, video_tiles

pytestmark = pytest.mark.usefixtures("one_thread")

MB = 2**20


def chosen(layout: TokenLayout, tile: Sizes, heads: int, density: float) -> tuple[BlockPattern, Tensor]:
    """A pattern of tiles drawn at random, small ones more often, as their means of few tokens are the larger."""
    tiles, draw = video_tiles(layout, tile), torch.Generator().manual_seed(0)
    scores = torch.randn(1, heads, tiles.tiles, tiles.tiles, generator=draw)
    scores /= torch.tensor(tiles.counts) ** 0.5
    best = scores.topk(max(1, round(density * tiles.tiles)), 3).indices
    keep = torch.zeros_like(scores, dtype=torch.bool).scatter_(3, best, True)
    return tile_pattern(tiles, lambda first, last: keep[:, :, first:last], 1, heads), keep


@pytest.mark.parametrize(
    ("grid", "tile", "text"),
    [
        ((5, 9, 13), (4, 4, 4), (0, 0)),
        ((5, 5, 5), (4, 4, 4), (3, 5)),
        ((6, 9, 9), (4, 8, 8), (0, 7)),
        ((3, 7, 11), (2, 3, 5), (1, 0)),
        ((9, 6, 6), (8, 8, 8), (0, 0)),
        ((2, 2, 3), (1, 1, 2), (0, 0)),
    ],
    ids=lambda value: "x".join(map(str, value)),
)
def test_every_token_reads_the_tiles_of_its_own(grid: Sizes, tile: Sizes, text: tuple[int, int]) -> None:
    layout = TokenLayout.video(*grid, text_before=text[0], text_after=text[1])
    pattern, keep = chosen(layout, tile, 2, 0.4)
    tiles = video_tiles(layout, tile)
    places = torch.nn.functional.pad(tiles.tile_of, text, value=tiles.tiles)
    wanted = torch.nn.functional.pad(keep, (0, 1, 0, 1), value=True)[:, :, places][..., places]
    assert torch.equal(pattern.validate().to_dense(), wanted)


def test_blocks_are_as_long_as_before_where_the_tile_divides_the_canvas() -> None:
    pattern, _ = chosen(TokenLayout.video(8, 8, 12), (4, 4, 4), 2, 0.3)
    assert (pattern.block_q, pattern.block_k, len(pattern.tiles)) == (64, 64, 1)


def test_masks_of_a_large_canvas_are_smaller_than_its_blocks() -> None:
    """A video of 81 frames of 720 x 1280: 21 x 45 x 80 tokens, of which no dimension is a multiple of 4 but one."""
    heads = 2
    pattern, _ = chosen(TokenLayout.video(21, 45, 80), (4, 4, 4), heads, 0.125)
    masks = pattern.tiles.numel() * pattern.tiles.element_size()
    assert masks < min(4 * MB * heads, pattern.nbytes - masks) and pattern.nbytes < 8 * MB * heads
