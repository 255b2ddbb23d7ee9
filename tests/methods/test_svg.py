"""Sparse VideoGen: the published masks, the choice between the two kinds of heads, any grid with text on any side."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import Context, Decline, TokenLayout
from hf_sparse_attn.methods import svg
from hf_sparse_attn.methods.svg import Svg, row_errors
from tests.support.golden import golden
from tests.support.patterns import Largest

GOLDEN = golden("svg")
# Frames, height, width, text before, text after.
GRIDS = {
    "odd": (7, 13, 9, 0, 0),
    "one_frame": (1, 7, 11, 0, 0),
    "one_frame_text": (1, 5, 9, 3, 20),
    "one_token": (1, 1, 1, 0, 0),
    "two_per_frame": (23, 1, 2, 0, 5),
    "one_per_frame": (37, 1, 1, 17, 0),
    "text_before": (5, 7, 5, 33, 0),
    "text_after": (3, 9, 11, 0, 1),
    "text_both": (5, 8, 8, 21, 40),
}


def reference(
    frames: int, per_frame: int, before: int, after: int, reach: int, sink: bool, temporal: bool
) -> torch.Tensor:
    """The token mask written out: where each token stands in the head's order, then band, sink and text."""
    video = sorted(
        ((frame, patch) for frame in range(frames) for patch in range(per_frame)),
        key=(lambda x: (x[1], x[0])) if temporal else None,
    )
    place = {at: i for i, at in enumerate(video)}
    where = [place[frame, patch] for frame in range(frames) for patch in range(per_frame)]
    at = torch.tensor([math.nan] * before + where + [math.nan] * after)
    query, key = at[:, None], at[None, :]
    near = ((query - key).abs() <= reach) | (key < per_frame if sink else key < 0)
    return near | query.isnan() | key.isnan()


def layout_of(grid: str) -> TokenLayout:
    return TokenLayout.video(*GRIDS[grid])


def mask_of(method: Svg, layout: TokenLayout, heads: int = 1) -> torch.Tensor:
    return method.pattern(None, None, Context(layout, num_heads=heads, num_kv_heads=heads)).validate().to_dense()


def along(what: str, frames: int, per_frame: int, dim: int = 64, seed: int = 0) -> torch.Tensor:
    """Queries and keys [tokens, dim] of a head that attends evenly to its own frame, or to its own patch over time."""
    draw = torch.Generator().manual_seed(seed)
    size = frames if what == "spatial" else per_frame
    known = torch.linalg.qr(torch.randn(dim, dim, generator=draw)).Q[:size]
    number = torch.arange(frames * per_frame)
    return 12 * known[number // per_frame if what == "spatial" else number % per_frame]


def planted(kinds: list[list[str]], frames: int = 8, height: int = 6, width: int = 8):
    """(context, q, k, v) with heads of the kinds given by batch row and head."""
    per_frame = height * width
    rows = [[along(kind, frames, per_frame, seed=10 * b + h) for h, kind in enumerate(r)] for b, r in enumerate(kinds)]
    q = torch.stack([torch.stack(row) for row in rows])
    v = torch.randn(*q.shape[:3], 16, generator=torch.Generator().manual_seed(5))
    heads = q.shape[1]
    ctx = Context(TokenLayout.video(frames, height, width), num_heads=heads, num_kv_heads=heads, head_dim=64)
    return ctx, q, q.clone(), v


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
def test_the_masks_of_the_choice_are_the_published_ones(kind: str) -> None:
    want = torch.from_numpy(GOLDEN[f"profile_{kind}_wan_F4_T256"])
    masks = Svg(density=0.9).profile_masks(TokenLayout.video(4, 16, 16), torch.arange(1024))
    assert torch.equal(masks[("spatial", "temporal").index(kind)], want)
    some = torch.tensor([3, 500, 1023])
    assert torch.equal(Svg(density=0.9).profile_masks(TokenLayout.video(4, 16, 16), some), masks[:, some]), (
        "rows are drawn from the same mask"
    )


def test_the_band_is_the_published_mask_of_the_run() -> None:
    """1.5 frames wide: 0.51 is 1 - (1 - 1.5 / 5)^2."""
    want = torch.from_numpy(GOLDEN["wan_flex_mask_F5_T64_mul1.5"])
    layout = TokenLayout.video(5, 8, 8)
    assert torch.equal(mask_of(Svg(density=0.51, kind="spatial"), layout)[0, 0], want)
    # A temporal head runs the same mask over its own order of tokens.
    place = torch.arange(320).view(64, 5).T.flatten()
    assert torch.equal(mask_of(Svg(density=0.51, kind="temporal"), layout)[0, 0], want[place][:, place])


@pytest.mark.parametrize(
    ("grid", "text", "density", "frames"),
    [
        ((21, 45, 80), 0, 0.3, 3.430139),
        ((21, 45, 80), 0, 0.25, 2.813467),
        ((21, 45, 80), 0, 0.2, 2.217029),
        ((33, 45, 80), 256, 0.25, 4.348694),
    ],
    ids=str,
)
def test_published_widths(grid: tuple[int, int, int], text: int, density: float, frames: float) -> None:
    layout = TokenLayout.video(*grid, text_after=text)
    assert Svg(density=density)._reach(layout) == math.ceil(frames * 3600 / 128) * 128
    # In blocks of 16 the width is what was published to within a block.
    assert 0 <= Svg(density=density, block_size=16)._reach(layout) - frames * 3600 < 16


@pytest.mark.parametrize("density", [0.2, 0.25, 0.3])
def test_the_band_alone_has_about_the_density_asked_for(density: float) -> None:
    pattern = Svg(density=density, kind="spatial", sink=False).pattern(
        None, None, Context(TokenLayout.video(21, 45, 80))
    )
    assert density <= pattern.density() < density + 3e-3
    assert pattern.nbytes < 4_000_000


@pytest.mark.parametrize("kind", ["spatial", "temporal"])
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no_sink"])
@pytest.mark.parametrize("block", [16, 32, 128])
@pytest.mark.parametrize("grid", GRIDS)
def test_any_grid_against_the_mask_written_out(grid: str, block: int, sink: bool, kind: str) -> None:
    frames, height, width, before, after = GRIDS[grid]
    video, tokens = frames * height * width, layout_of(grid).kv_len
    for density in (0.05, 0.4):
        share = max(0.0, density - 2 * (before + after) / tokens)
        reach = max(1, math.ceil(tokens * (1 - (1 - share) ** 0.5) / block)) * block
        method = Svg(density=density, kind=kind, sink=sink, block_size=block)
        got = mask_of(method, layout_of(grid))[0, 0]
        assert torch.equal(got, reference(frames, video // frames, before, after, reach, sink, kind == "temporal"))
        assert method.least_density(Context(layout_of(grid))) == pytest.approx(got.double().mean().item(), abs=1e-12)


@pytest.mark.parametrize("grid", GRIDS)
def test_online_on_any_grid(grid: str) -> None:
    """Whatever a head is told to be, its mask is that of a head which is given the kind."""
    layout = layout_of(grid)
    ctx = Context(layout, num_heads=3, num_kv_heads=1, head_dim=8)
    q, k, v = (torch.randn(2, heads, layout.kv_len, 8) for heads in (3, 1, 1))
    method = Svg(density=0.2, block_size=16)
    temporal, mask = method.choose(q, k, v, ctx), method.pattern(q, k, ctx, v).validate().to_dense()
    both = [mask_of(Svg(density=0.2, block_size=16, kind=kind), layout)[0, 0] for kind in ("spatial", "temporal")]
    assert mask.shape[:2] == temporal.shape == (2, 3)
    for b in range(2):
        for h in range(3):
            assert torch.equal(mask[b, h], both[int(temporal[b, h])])


@pytest.mark.parametrize("grid", ["text_before", "text_both", "two_per_frame"])
def test_the_choice_against_plain_attention(grid: str) -> None:
    """All rows of the video, the masks drawn token by token: blocks less than two frames apart, and the sink."""
    frames, height, width, before, after = GRIDS[grid]
    per_frame, layout = height * width, layout_of(grid)
    ctx = Context(layout, num_heads=16, num_kv_heads=16, head_dim=8)
    q, k, v = (torch.randn(1, 16, layout.kv_len, 8) for _ in range(3))
    q = 3 * q
    method = Svg(density=0.5, block_size=16, num_samples=10_000)
    reach = max(1, math.ceil(layout.kv_len * (1 - (1 - 0.5 + 2 * (before + after) / layout.kv_len) ** 0.5) / 16))
    apart = max(1, min(2 * per_frame // 16, reach))
    token = torch.arange(frames * per_frame)
    video = slice(before, before + len(token))
    scores = q.double() @ k.double().mT * 8**-0.5
    dense, errors = scores.softmax(-1) @ v.double(), []
    for key in (lambda t: (t // per_frame, t % per_frame), lambda t: (t % per_frame, t // per_frame)):
        place = torch.tensor([sorted(token.tolist(), key=key).index(t) for t in token.tolist()])
        mask = torch.ones(layout.kv_len, layout.kv_len, dtype=torch.bool)
        mask[video, video] = (place[:, None] // 16 - place // 16).abs() < apart
        mask[video, video] |= place < per_frame
        near = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v.double()
        errors.append((near - dense)[0, :, video].square().mean((1, 2)))
    temporal = method.choose(q, k, v, ctx)[0]
    assert torch.equal(temporal, errors[1] < errors[0])
    assert 0 < int(temporal.sum()) < 16, "both kinds are there"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no_sink"])
@pytest.mark.parametrize("values", [True, False], ids=["values", "weights"])
def test_planted_heads_get_their_kind(values: bool, sink: bool, dtype: torch.dtype) -> None:
    kinds = [["spatial", "temporal", "temporal", "spatial"], ["temporal", "spatial", "temporal", "spatial"]]
    ctx, q, k, v = planted(kinds)
    q, k, v = (x.to(dtype) for x in (q, k, v))
    method = Svg(density=0.3, block_size=16, sink=sink)
    temporal = method.choose(q, k, v if values else None, ctx)
    assert temporal.tolist() == [[kind == "temporal" for kind in row] for row in kinds]
    # The right kind loses nothing of such a head, the wrong one much.
    mask = method.pattern(q, k, ctx, v).to_dense()
    weights = (q.float() @ k.float().mT * ctx.softmax_scale).softmax(-1)
    assert float((weights * mask).sum(-1).min()) > 0.99
    assert float((weights * mask[:, [1, 0, 3, 2]]).sum(-1).mean()) < 0.9


def test_planted_heads_that_share_keys() -> None:
    """Two query heads to one key head: each is told by its own queries."""
    ctx, q, _, v = planted([["spatial", "temporal"]])
    k = torch.cat([q[:, :1], q[:, 1:]], -1)
    zero = torch.zeros_like(q[:, :1])
    q = torch.cat([torch.cat([q[:, :1], zero], -1), torch.cat([zero, q[:, 1:]], -1)], 1)
    ctx = Context(ctx.layout, num_heads=2, num_kv_heads=1, head_dim=128, scale=0.125)
    assert Svg(density=0.3, block_size=16).choose(q, k, v[:, :1], ctx).tolist() == [[False, True]]


def test_planted_heads_beside_text() -> None:
    ctx, q, k, v = planted([["temporal", "spatial"]])
    pad = torch.randn(1, 2, 30, 64)
    q, k, v = (torch.cat([p[:, :, :11], x, p[:, :, 11:]], 2) for p, x in ((pad, q), (pad, k), (pad[..., :16], v)))
    ctx = Context(TokenLayout.video(8, 6, 8, 11, 19), num_heads=2, num_kv_heads=2, head_dim=64)
    assert Svg(density=0.3, block_size=16).choose(q, k, v, ctx).tolist() == [[True, False]]


def test_equal_errors_are_spatial() -> None:
    ctx, q, k, v = planted([["temporal", "spatial"]], frames=1)
    assert Svg(density=0.3, block_size=16).choose(q, k, v, ctx).tolist() == [[False, False]]
    ctx, q, k, v = planted([["temporal", "spatial"]])
    assert Svg(density=1.0, block_size=128).choose(q, k, torch.zeros_like(v), ctx).tolist() == [[False, False]]


def test_heads_given_and_told_together() -> None:
    ctx, q, k, v = planted([["temporal", "spatial", "temporal", "spatial"]])
    method = Svg(density=0.3, block_size=16, kind=("auto", "auto", "spatial", "temporal"))
    assert not method.static and method.choose(q, k, v, ctx).tolist() == [[True, False, False, True]]
    given = Svg(density=0.3, block_size=16, kind=("temporal", "spatial", "spatial", "temporal"))
    assert given.static and torch.equal(mask_of(given, ctx.layout, 4), method.pattern(q, k, ctx, v).to_dense())
    assert given.pattern_for(q, k, ctx) is given.pattern_for(q, k, ctx)


def test_the_kind_of_a_guidance_branch_is_its_own() -> None:
    """A batch of both branches gives what two calls give, to the bit."""
    ctx, q, k, v = planted([["spatial", "temporal"], ["temporal", "spatial"]])
    method = Svg(density=0.3, block_size=16)
    both = hsa.attention(q, k, v, method, ctx, backend="torch_reference")
    for b in range(2):
        own = (x[b : b + 1] for x in (q, k, v))
        assert torch.equal(hsa.attention(*own, method, ctx, backend="torch_reference")[0], both[b])


@pytest.mark.parametrize("backend", ["torch_gather", "torch_reference"])
def test_both_kinds_run_in_one_launch(backend: str) -> None:
    ctx, q, k, v = planted([["spatial", "temporal"], ["temporal", "temporal"]])
    out = hsa.attention(q, k, v, Svg(density=0.3, block_size=16), ctx, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    assert float((out - dense).abs().max()) < 0.05 * float(dense.abs().max())


def test_the_band_is_built_once_per_layout() -> None:
    ctx, q, k, v = planted([["spatial", "temporal"]])
    method = Svg(density=0.3, block_size=16)
    first, second = method.pattern(q, k, ctx, v), method.pattern(k, q, ctx, v)
    assert first.starts is second.starts and first.tiles is second.tiles and first.heads == 1


@pytest.mark.parametrize("values", [True, False], ids=["values", "weights"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_errors_of_rows_against_plain_attention(softcap: float, values: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = (torch.randn(2, heads, 63, 8) for heads in (4, 2, 2))
    rows, masks = torch.tensor([0, 17, 62]), torch.rand(2, 3, 63) < 0.5
    masks[..., 0] = True
    scores = (q.double() @ k.double().repeat_interleave(2, 1).mT)[:, :, rows] * 0.7
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    each = v.double().repeat_interleave(2, 1) if values else torch.eye(63).double().expand(2, 4, -1, -1)
    dense = scores.softmax(-1) @ each
    near = [scores.masked_fill(~mask, -torch.inf).softmax(-1) @ each for mask in masks]
    want = torch.stack([(x - dense).square().mean((2, 3)) for x in near])
    got = row_errors(q, k, v if values else None, rows, masks, 0.7, softcap)
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-8)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    # Products of one head and of all heads at once may differ in the last digit.
    one_by_one = row_errors(q, k, v if values else None, rows, masks, 0.7, softcap)
    torch.testing.assert_close(one_by_one, got, rtol=1e-5, atol=1e-8)


def test_rows_are_drawn_over_the_whole_video_without_repeats() -> None:
    rows = svg._sample(75600, 64, torch.device("cpu"))
    assert len(rows.unique()) == 64 and torch.equal(rows, rows.sort().values)
    # Each quarter of the video has its share: of 64 draws, fewer than 6 would be off by three deviations.
    assert torch.histc(rows.float(), 4, 0, 75600).min() >= 6
    svg._sample.cache_clear()
    assert torch.equal(svg._sample(75600, 64, torch.device("cpu")), rows)
    assert svg._sample(5, 64, torch.device("cpu")).tolist() == [0, 1, 2, 3, 4]


def test_the_number_of_rows_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spied(q, k, v, rows, *rest):
        seen.append(len(rows))
        return row_errors(q, k, v, rows, *rest)

    monkeypatch.setattr(svg, "row_errors", spied)
    ctx, q, k, v = planted([["spatial", "temporal"]])
    for count in (3, 1000):
        Svg(num_samples=count).pattern(q, k, ctx, v)
    assert seen == [3, 384]


def test_scores_are_made_of_sampled_rows_only() -> None:
    layout = TokenLayout.video(8, 32, 32)
    q = torch.randn(1, 2, layout.kv_len, 16)
    ctx = Context(layout, num_heads=2, num_kv_heads=2, head_dim=16)
    method = Svg(num_samples=8)
    method.pattern(q, q, ctx)
    with Largest() as seen:
        method.pattern(q, q, ctx, q)
    # Two heads of 8 rows by 8192 keys in float32; a map of all tokens would be 67 MB as booleans.
    assert seen.bytes <= max(2 * 8 * 8192 * 4, q.nbytes)


def test_masks_of_the_choice_are_no_wider_than_the_band_and_never_empty() -> None:
    rows = torch.arange(9 * 4)
    # Two frames are half a block here: the published rule would leave no key at all.
    masks = Svg(density=0.01, sink=False, block_size=16).profile_masks(TokenLayout.video(9, 2, 2), rows)
    assert masks.any(-1).all() and not masks.all()
    # Two frames are 64 tokens, four blocks; the band that is run is one block wide.
    layout = TokenLayout.video(12, 4, 8)
    narrow = Svg(density=0.02, sink=False, block_size=16).profile_masks(layout, torch.arange(384))
    assert narrow[0].sum() == 384 * 16
    wide = Svg(density=0.9, sink=False, block_size=16).profile_masks(layout, torch.arange(384))
    assert wide[0, 200].sum() == 5 * 16, "1.5 frames: blocks fewer than 3 apart"


def test_density_rises_with_the_knob() -> None:
    knob = Svg.knob
    assert knob is not None
    for layout in (TokenLayout.video(7, 13, 9), TokenLayout.video(5, 8, 8, text_after=30)):
        ctx, last = Context(layout, num_heads=1, num_kv_heads=1), 0.0
        for value in np.geomspace(knob.low, knob.high, 25):
            turned = Svg(kind="spatial", block_size=16).turned(float(value))
            got = turned.pattern(None, None, ctx).density()
            assert got >= last
            last = got
        assert last == 1.0


BAD = [
    ({"density": 0}, ValueError, "`density` must be more than 0 and at most 1, got 0"),
    ({"density": "low"}, TypeError, "`density` must be a number"),
    ({"kind": "diagonal"}, ValueError, "`kind` must be one of auto, spatial, temporal.*got 'diagonal'"),
    ({"kind": ("spatial", "both")}, ValueError, "`kind` must be one of"),
    ({"kind": ()}, ValueError, "`kind` must be one of"),
    ({"kind": 3}, ValueError, "`kind` must be one of"),
    ({"num_samples": 0}, ValueError, "`num_samples` must be at least 1, got 0"),
    ({"sink": 1}, TypeError, "`sink` must be a bool, got 1"),
    ({"block_size": 100}, ValueError, "power of two from 16 to 256, got 100"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Svg(**params)


def test_where_it_does_not_apply() -> None:
    q = torch.randn(1, 2, 24, 8)
    method, two = Svg(kind="spatial"), {"num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
    found = method.pattern(None, None, Context(TokenLayout.video(2, 3, 4).continued(12), **two))
    assert isinstance(found, Decline) and "all tokens as queries" in found.reason
    found = method.pattern(None, None, Context(TokenLayout.bidirectional(24), **two))
    assert isinstance(found, Decline) and "one video segment" in found.reason
    with pytest.raises(ValueError, match="`kind` must be one for each of the 2 heads, got 3"):
        Svg(kind=("auto",) * 3).pattern(q, q, Context(TokenLayout.video(2, 3, 4), **two))
    with pytest.raises(TypeError, match="svg chooses by content"):
        Svg().pattern(None, None, Context(TokenLayout.video(2, 3, 4), **two))
    assert method.least_density(Context(TokenLayout.causal(9))) == 0.0


def test_a_list_is_a_tuple() -> None:
    assert Svg(kind=["spatial", "auto"]) == Svg(kind=("spatial", "auto"))
    assert hash(Svg(kind=["spatial", "auto"]))
