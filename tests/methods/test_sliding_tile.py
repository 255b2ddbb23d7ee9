"""Sliding tile attention: the published tile masks and densities, any canvas, a window per head, windows by share."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Decline, TokenLayout
from hf_sparse_attn.methods import sliding_tile
from hf_sparse_attn.methods.sliding_tile import SlidingTile
from tests.support.golden import golden
from tests.support.patterns import expected, random_inputs

GOLDEN = golden("sliding_tile")
# Frames, height, width, text before, text after.
CANVASES = {
    "odd": (7, 13, 9, 0, 0),
    "one_frame": (1, 11, 13, 0, 0),
    "one_token": (1, 1, 1, 0, 0),
    "narrow": (5, 1, 7, 2, 0),
    "text_before": (4, 6, 10, 9, 0),
    "text_after": (3, 9, 11, 0, 1),
    "text_both": (5, 7, 6, 40, 33),
    "whole_tiles": (4, 6, 8, 0, 0),
}


def layout_of(canvas: str) -> TokenLayout:
    return TokenLayout.video(*CANVASES[canvas])


def named(key: str) -> tuple[list[int], list[int]]:
    canvas, window = key.split("_")
    return [int(n) for n in canvas[1:].split("x")], [int(n) for n in window[1:].split("x")]


def pattern_of(method: SlidingTile, layout: TokenLayout, heads: int = 1) -> BlockPattern:
    found = method.pattern(None, None, Context(layout, num_heads=heads, num_kv_heads=heads))
    assert isinstance(found, BlockPattern)
    return found


def reference(canvas: tuple[int, int, int, int, int], tile: tuple[int, int, int], window: tuple[int, int, int]):
    """The published rule, token by token: a centre that is clamped, and tiles at most half a window away from it."""
    *grid, before, after = canvas
    video, near = grid[0] * grid[1] * grid[2], None
    token = np.arange(video)
    at = (token // (grid[1] * grid[2]), token // grid[2] % grid[1], token % grid[2])
    for length, size, width, own in zip(grid, tile, window, at, strict=True):
        tiles, mine = -(-length // size), own // size
        centre = np.minimum(np.maximum(mine, width // 2), tiles - 1 - width // 2)
        one = np.abs(centre[:, None] - mine[None, :]) <= width // 2
        near = one if near is None else near & one
    mask = np.ones((before + video + after,) * 2, dtype=bool)
    mask[before : before + video, before : before + video] = near
    return torch.from_numpy(mask)


@pytest.mark.parametrize("key", sorted(GOLDEN))
def test_the_published_masks_of_tiles(key: str) -> None:
    canvas, window = named(key)
    want = torch.from_numpy(GOLDEN[key])
    # On the published canvas a tile is three blocks, all of them whole.
    pattern = pattern_of(SlidingTile(window=tuple(window)), TokenLayout.video(*canvas))
    assert len(pattern.tiles) == 1
    blocks = torch.zeros(3 * len(want), 3 * len(want), dtype=torch.bool)
    blocks[torch.arange(len(blocks)).repeat_interleave(pattern.row_counts()[0, 0]), pattern.starts.long() // 128] = (
        True
    )
    assert torch.equal(blocks, want.repeat_interleave(3, 0).repeat_interleave(3, 1))
    # The same canvas in tiles of 2 x 2 x 4 tokens, each of them a block.
    small = TokenLayout.video(canvas[0] // 3, canvas[1] // 4, canvas[2] // 2)
    pattern = pattern_of(SlidingTile(window=tuple(window), tile=(2, 2, 4), block_size=16), small)
    assert torch.equal(pattern.block_map()[0, 0], want)


@pytest.mark.parametrize(
    ("canvas", "window", "density"),
    [
        ((18, 48, 80), (3, 3, 3), 0.15), ((18, 48, 80), (3, 3, 5), 0.25), ((18, 48, 80), (3, 1, 10), 0.1667),
        ((18, 48, 80), (1, 5, 7), 0.1944), ((18, 48, 80), (1, 6, 5), 0.1667), ((18, 48, 80), (1, 3, 10), 0.1667),
        ((18, 48, 80), (3, 6, 1), 0.10), ((18, 48, 80), (2, 2, 2), 0.15), ((30, 48, 80), (3, 3, 3), 0.09),
        ((30, 48, 80), (3, 3, 5), 0.15), ((30, 48, 80), (5, 6, 1), 0.10), ((30, 48, 80), (5, 1, 10), 0.1667),
        ((30, 48, 80), (4, 4, 4), 0.4167), ((36, 48, 48), (3, 3, 3), 0.125),
    ],
    ids=str,
)  # fmt: skip
def test_published_densities(canvas: tuple[int, int, int], window: tuple[int, int, int], density: float) -> None:
    layout = TokenLayout.video(*canvas)
    method = SlidingTile(window=window)
    assert method.least_density(Context(layout)) == pytest.approx(density, abs=5e-5)
    assert pattern_of(method, layout).density() == pytest.approx(method.least_density(Context(layout)), abs=1e-12)


@pytest.mark.parametrize("block", [16, 64])
@pytest.mark.parametrize("tile", [(2, 2, 4), (2, 3, 5), (1, 1, 3), (6, 8, 8), (1, 20, 2)], ids=str)
@pytest.mark.parametrize("canvas", CANVASES)
def test_any_canvas_against_the_rule_token_by_token(canvas: str, tile: tuple[int, int, int], block: int) -> None:
    for window in ((3, 3, 3), (1, 2, 4), (1, 1, 1), (3, 1, 10)):
        method = SlidingTile(window=window, tile=tile, block_size=block)
        pattern = pattern_of(method, layout_of(canvas)).validate()
        want = reference(CANVASES[canvas], tile, window)
        assert torch.equal(pattern.to_dense()[0, 0], want)
        assert method.least_density(Context(layout_of(canvas))) == pytest.approx(
            want.double().mean().item(), abs=1e-12
        )


def test_a_window_by_hand() -> None:
    """Five tiles of one token: at the edges the window is moved, and a window of two reads three."""
    layout = TokenLayout.video(1, 1, 5)
    for width in (2, 3):
        mask = pattern_of(SlidingTile(window=(1, 1, width), tile=(1, 1, 1), block_size=16), layout).to_dense()[0, 0]
        want = ["11100", "11100", "01110", "00111", "00111"]
        assert ["".join(map(str, row)) for row in mask.int().tolist()] == want


@pytest.mark.parametrize(("width", "reads"), [(1, 1), (2, 3), (3, 3), (4, 5), (5, 5), (6, 6), (9, 6)])
def test_an_even_window_reads_one_more_unless_it_covers_all(width: int, reads: int) -> None:
    mask = pattern_of(SlidingTile(window=(1, width, 1), tile=(1, 1, 1)), TokenLayout.video(1, 6, 1)).to_dense()[0, 0]
    assert mask.sum(-1).tolist() == [reads] * 6


def test_tiles_of_equal_size_follow_one_another() -> None:
    """Tokens of a tile stay together, in the order of the video; the ragged tiles come last."""
    layout = TokenLayout.video(2, 2, 5, text_before=1, text_after=1)
    pattern = pattern_of(SlidingTile(window=(1, 1, 1), tile=(1, 2, 2)), layout)
    whole, ragged = [1, 2, 6, 7, 3, 4, 8, 9, 11, 12, 16, 17, 13, 14, 18, 19], [5, 10, 15, 20]
    assert pattern.q_order[0, 0].tolist() == [*whole, *ragged, 0, 21]
    assert torch.equal(pattern.kv_order, pattern.q_order)


def test_an_order_that_changes_nothing_is_left_out() -> None:
    assert pattern_of(SlidingTile(tile=(1, 8, 8)), TokenLayout.video(5, 8, 8, text_after=3)).q_order is None
    assert pattern_of(SlidingTile(tile=(1, 8, 8)), TokenLayout.video(5, 8, 8, text_before=3)).q_order is not None


def test_few_blocks_lie_in_several_tiles() -> None:
    """480p of Wan, no dimension of which is a multiple of the tile."""
    layout = TokenLayout.video(21, 30, 52)
    pattern = pattern_of(SlidingTile(window=(3, 3, 3)), layout)
    assert float((pattern.tile_ids > 0).double().mean()) < 0.4
    assert pattern.nbytes < 8_000_000


@pytest.mark.parametrize("canvas", ["odd", "text_both"])
def test_a_window_for_each_head(canvas: str) -> None:
    windows = ((1, 1, 1), (3, 3, 3), (1, 1, 1), 0.5, (1, 5, 2))
    method = SlidingTile(window=windows, tile=(2, 3, 2), block_size=32)
    pattern = pattern_of(method, layout_of(canvas), heads=5).validate()
    assert pattern.heads == 5 and pattern.q_order.shape[1] == 1
    each = [pattern_of(SlidingTile(window=w, tile=(2, 3, 2), block_size=32), layout_of(canvas)) for w in windows]
    assert torch.equal(pattern.to_dense(), torch.cat([p.to_dense() for p in each], 1))
    ctx = Context(layout_of(canvas), num_heads=5, num_kv_heads=5, head_dim=16)
    assert method.least_density(ctx) == pytest.approx(pattern.density(), abs=1e-12)
    q, k, v = random_inputs(pattern, batch=2, heads=5, dim=16)
    out, lse = hsa.attention(q, k, v, method, ctx, return_lse=True, backend="torch_gather")
    expected(q, k, v, pattern, 0.25).check(out, lse)


def test_one_window_given_for_each_head_is_one_pattern() -> None:
    layout = layout_of("odd")
    assert pattern_of(SlidingTile(window=((3, 1, 2), (2, 1, 3))), layout, heads=2).heads == 1


def test_a_share_is_a_chain_of_windows() -> None:
    """The dimension that is covered least grows first, the earlier one where equal."""
    tiling = sliding_tile._tiling(TokenLayout.video(18, 48, 80), (6, 8, 8))
    assert tiling.shape == (3, 6, 10)
    chain = {
        1: (1, 1, 1), 3: (1, 1, 3), 9: (1, 3, 3), 15: (1, 3, 5), 45: (3, 3, 5), 75: (3, 5, 5), 105: (3, 5, 7),
        135: (3, 5, 9), 162: (3, 6, 9), 180: (3, 6, 10),
    }  # fmt: skip
    last = (1, 1, 1)
    for tiles in range(1, 181):
        last = chain.get(tiles, last)
        assert tiling.extents(tiles / 180 + 1e-9) == last, tiles


@pytest.mark.parametrize("canvas", CANVASES)
def test_the_share_bounds_the_density_and_more_keeps_more(canvas: str) -> None:
    knob, layout = SlidingTile.knob, layout_of(canvas)
    assert knob is not None
    video, last = layout.video_part[1].length, None
    for share in np.geomspace(knob.low, knob.high, 15):
        method = SlidingTile(tile=(1, 2, 3), block_size=16).turned(float(share))
        mask = pattern_of(method, layout).to_dense()[0, 0]
        assert last is None or not bool((last & ~mask).any())
        kept = int(mask.sum()) - layout.kv_len**2 + video**2
        one = SlidingTile(tile=(1, 2, 3), window=(1, 1, 1))
        assert kept <= share * video**2 or torch.equal(mask, pattern_of(one, layout).to_dense()[0, 0])
        last = mask
    assert bool(last.all())


def test_a_window_comes_back_from_a_file() -> None:
    for window in ((3, 1, 2), 0.25, ((1, 1, 1), 0.5), 1.0):
        method = SlidingTile(window=window)
        again = SlidingTile(**json.loads(json.dumps(method.params())))
        assert again == method and hash(again) == hash(method)


BAD = [
    ({"window": 3}, TypeError, r"`window` must be \(frames, height, width\) in tiles, a share as a float.*got 3 of"),
    ({"window": 1.5}, ValueError, "`window` must be more than 0 and at most 1, got 1.5"),
    ({"window": (3, 3)}, TypeError, "`window` must be .*got 3 of type int"),
    ({"window": ()}, ValueError, r"`window` must be \(frames, height, width\), got \(\)"),
    ({"window": (3, 0, 3)}, ValueError, "`window` must be at least 1, got 0"),
    ({"window": (3, True, 3)}, TypeError, "`window` must be an int, got True"),
    ({"window": ((3, 3, 3), (3, 3))}, ValueError, r"`window` must be \(frames, height, width\), got \(3, 3\)"),
    ({"window": ((3, 3, 3), "all")}, TypeError, "got 'all'"),
    ({"tile": 8}, TypeError, r"`tile` must be \(frames, height, width\), got 8"),
    ({"tile": (6, 8)}, ValueError, r"`tile` must be \(frames, height, width\), got \(6, 8\)"),
    ({"tile": (6, 8, 0)}, ValueError, "`tile` must be at least 1, got 0"),
    ({"tile": (6, 8, 2.0)}, TypeError, "`tile` must be an int, got 2.0"),
    ({"block_size": 384}, ValueError, "power of two from 16 to 256, got 384"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SlidingTile(**params)


def test_where_it_does_not_apply() -> None:
    two = {"num_heads": 2, "num_kv_heads": 2}
    found = SlidingTile().pattern(None, None, Context(TokenLayout.video(2, 3, 4).continued(12), **two))
    assert isinstance(found, Decline) and "all tokens as queries" in found.reason
    found = SlidingTile().pattern(None, None, Context(TokenLayout.bidirectional(24), **two))
    assert isinstance(found, Decline) and "one video segment" in found.reason
    assert SlidingTile().least_density(Context(TokenLayout.causal(9))) == 0.0
    with pytest.raises(ValueError, match="`window` must be one for each of the 2 heads, got 3"):
        SlidingTile(window=(0.5, 0.5, 0.5)).pattern(None, None, Context(TokenLayout.video(2, 3, 4), **two))
