"""What every registered method must do, and the values published for single ones."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Decline, TokenLayout
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.methods.vertical_slash import VerticalSlash
from hf_sparse_attn.selection import last_query_sums, text_tokens
from tests.support.golden import golden
from tests.support.patterns import Largest, expected, random_inputs

LAYOUTS = {
    "one": TokenLayout.causal(1),
    "causal_111": TokenLayout.causal(111),
    "causal_300": TokenLayout.causal(300),
    "chunk": TokenLayout.causal(300).continued(192),
    "odd_chunk": TokenLayout.causal(300).continued(77),
    "bidirectional": TokenLayout.bidirectional(111),
    "video": TokenLayout.video(5, 7, 13),
    "video_text": TokenLayout.video(3, 9, 11, text_before=5, text_after=21),
}


def applies(name: str, params: dict, layout: str) -> bool:
    method, tokens = hsa.get_method(name)(**params), torch.zeros(1, 1, 1, 1)
    if method.decodes and not method.reads_prompts and LAYOUTS[layout].q_len > 111:
        # Every query is a step by itself.
        return False
    return method.why_not(reading(method, tokens, tokens, Context(LAYOUTS[layout]))) is None


def reading(method: hsa.Method, q: torch.Tensor, k: torch.Tensor, ctx: Context) -> Context:
    """The context with what the method reads besides: q and k themselves, as if they had no positions yet."""
    if not method.reads:
        return ctx
    return replace(ctx, inputs=LayerInputs(q.transpose(1, 2).flatten(2), q, k))


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, method: hsa.Method, ctx: Context, **kwargs):
    return hsa.attention(q, k, v, method, reading(method, q, k, ctx), **kwargs)


CASES = [
    pytest.param(name, params, layout, id=f"{name}-{i}-{layout}")
    for name in hsa.list_methods()
    for i, params in enumerate(hsa.get_method(name).examples())
    for layout in LAYOUTS
    if applies(name, params, layout)
]
FULL = [
    pytest.param(name, layout, id=f"{name}-{layout}")
    for name in hsa.list_methods()
    if (budget := hsa.get_method(name).full_budget()) is not None
    for layout in LAYOUTS
    if applies(name, budget, layout)
]
# Those that q, k and a Context tell what they keep.
ASKED = [name for name in hsa.list_methods() if hsa.get_method(name).has_pattern()]
NEEDY = [name for name in hsa.list_methods() if hsa.get_method(name).needs]


def allowed(layout: TokenLayout) -> torch.Tensor:
    everything = torch.ones(layout.q_len, layout.kv_len, dtype=torch.bool)
    return everything.tril(layout.query_start) if layout.is_causal else everything


def call(layout: TokenLayout, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16, seed: int = 0):
    ctx = Context(layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    sizes = BlockPattern.dense(layout.q_len, layout.kv_len, False)
    return ctx, *random_inputs(sizes, batch=batch, heads=heads, kv_heads=kv_heads, dim=dim, seed=seed)


def chosen(method: hsa.Method, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ctx: Context) -> BlockPattern:
    """The one pattern that the method runs on a call; it may choose by the values, too."""
    patterns = []

    def run(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: BlockPattern):
        patterns.append(pattern)
        return torch.zeros(*q.shape[:3], v.shape[3]), torch.zeros(q.shape[:3])

    assert not isinstance(method.attention(q, k, v, reading(method, q, k, ctx), run), Decline)
    (pattern,) = patterns
    return pattern


MADE: dict[tuple[str, str, str], tuple] = {}


def made(name: str, params: dict, layout: str):
    """(method, context, q, k, v, pattern); made once, and changed by no test."""
    key = name, repr(params), layout
    if key not in MADE:
        method = hsa.get_method(name)(**params)
        ctx, q, k, v = call(LAYOUTS[layout])
        MADE[key] = method, ctx, q, k, v, chosen(method, q, k, v, ctx)
    return MADE[key]


@pytest.mark.parametrize("name, params, layout", CASES)
def test_patterns_are_valid_and_leave_no_query_empty(name: str, params: dict, layout: str) -> None:
    _, _, _, _, _, pattern = made(name, params, layout)
    mask = pattern.validate().to_dense()
    assert bool(mask.any(-1).all())
    assert not bool((mask & ~allowed(LAYOUTS[layout])).any())


@pytest.mark.parametrize("name, params, layout", CASES)
def test_output_is_masked_attention(name: str, params: dict, layout: str) -> None:
    method, ctx, q, k, v, pattern = made(name, params, layout)
    out, lse = attend(q, k, v, method, ctx, return_lse=True)
    expected(q, k, v, pattern, ctx.softmax_scale).check(out, lse)


@pytest.mark.parametrize("name, layout", FULL)
def test_full_budget_is_dense(name: str, layout: str) -> None:
    _, ctx, q, k, v, pattern = made(name, hsa.get_method(name).full_budget(), layout)
    assert torch.equal(pattern.to_dense().all(1).all(0), allowed(LAYOUTS[layout]))
    dense = BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal)
    method = hsa.get_method(name)(**hsa.get_method(name).full_budget())
    out, lse = attend(q, k, v, method, ctx, return_lse=True)
    expected(q, k, v, dense, ctx.softmax_scale).check(out, lse)


@pytest.mark.parametrize("name, params, layout", CASES)
def test_a_batch_is_its_items(name: str, params: dict, layout: str) -> None:
    method, ctx, q, k, v, pattern = made(name, params, layout)
    for b in range(2):
        single = chosen(method, q[b : b + 1], k[b : b + 1], v[b : b + 1], ctx)
        assert torch.equal(single.to_dense()[0], pattern.to_dense().expand(2, -1, -1, -1)[b])


@pytest.mark.parametrize("name, params, layout", CASES)
def test_grouped_heads_are_repeated_keys(name: str, params: dict, layout: str) -> None:
    method, ctx, q, k, v, pattern = made(name, params, layout)
    repeated = chosen(method, q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), ctx)
    assert torch.equal(repeated.to_dense(), pattern.to_dense())


@pytest.mark.parametrize("name, params, layout", CASES)
def test_heads_are_independent(name: str, params: dict, layout: str) -> None:
    method, ctx, q, k, v, pattern = made(name, params, layout)
    order = torch.tensor([1, 0, 3, 2])
    moved = chosen(method, q[:, order], k, v, ctx).to_dense().expand(2, 4, -1, -1)
    assert torch.equal(moved, pattern.to_dense().expand(2, 4, -1, -1)[:, order])


@pytest.mark.parametrize("name, params, layout", CASES)
def test_large_values_in_half_precision(name: str, params: dict, layout: str) -> None:
    method, ctx, q, k, v, _ = made(name, params, layout)
    q, k, v = (x.to(torch.bfloat16) for x in (q * 1e4, k * 1e4, v))
    out = attend(q, k, v, method, ctx)
    assert bool(out.isfinite().all())
    assert torch.equal(out, attend(q, k, v, method, ctx))


@pytest.mark.parametrize("name", ASKED)
def test_gradients_flow(name: str) -> None:
    method = hsa.get_method(name)(**hsa.get_method(name).examples()[0])
    layout = LAYOUTS["causal_111"] if "video grid" not in method.needs else LAYOUTS["video"]
    ctx, q, k, v = call(layout)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    pattern = chosen(method, q, k, v, ctx)
    weight = torch.randn(*q.shape[:3], v.shape[3])
    got = torch.autograd.grad((attend(*tensors, method, ctx) * weight).sum(), tensors)
    mask = pattern.to_dense().expand(2, 4, -1, -1)
    out = torch.nn.functional.scaled_dot_product_attention(*tensors, attn_mask=mask, enable_gqa=True)
    for a, b in zip(got, torch.autograd.grad((out * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ASKED)
def test_static_methods_need_no_tensors_and_are_cached(name: str) -> None:
    method = hsa.get_method(name)(**hsa.get_method(name).examples()[0])
    if not method.static:
        with pytest.raises(TypeError, match="chooses by content"):
            method.pattern(None, None, Context(LAYOUTS["causal_111"]))
        return
    layout = LAYOUTS["causal_111"] if "video grid" not in method.needs else LAYOUTS["video"]
    ctx, q, k, _ = call(layout)
    assert method.pattern_for(q, k, ctx) is method.pattern_for(q, k, ctx)


@pytest.mark.parametrize("name", NEEDY)
def test_a_method_that_does_not_apply_says_so(name: str) -> None:
    method = hsa.get_method(name)
    layout = LAYOUTS["bidirectional"] if "causal" in method.needs else LAYOUTS["causal_111"]
    ctx, q, k, v = call(layout)
    with pytest.raises(hsa.MethodDoesNotApply, match=f"{name}.* needs"):
        hsa.attention(q, k, v, method(**method.examples()[0]), ctx)


def test_vertical_slash_reproduces_the_published_selection() -> None:
    data = {key: torch.from_numpy(value) for key, value in golden("vertical_slash").items()}
    q, k, v = data["q"], data["k"], data["v"]
    method = VerticalSlash(vertical=40, slash=104)
    ctx = Context(TokenLayout.causal(300), num_heads=1, num_kv_heads=1, head_dim=32)
    vertical, slash = last_query_sums(q, k, 64, ctx.softmax_scale)
    # The stored sums are taken before anything is forced; the published code stores the far diagonals first.
    finite = data["vertical_sums"].isfinite()
    torch.testing.assert_close(vertical[finite], data["vertical_sums"][finite])
    torch.testing.assert_close(slash.flip(-1), data["slash_sums"])
    columns, diagonals = method.choose(q, k, ctx)
    assert torch.equal(columns[0, 0], data["vertical"].sort().values)
    assert torch.equal(diagonals[0, 0], data["slash"].sort().values)
    mask = np.unpackbits(data["mask_packed"].numpy())[: 300 * 300].reshape(300, 300).astype(bool)
    assert torch.equal(method.pattern(q, k, ctx).to_dense()[0, 0], torch.from_numpy(mask))
    out = hsa.attention(q, k, v, method, ctx)
    torch.testing.assert_close(out[0, 0].double(), data["out"], rtol=1e-5, atol=1e-5)


def test_sliding_window_is_the_published_a_shape() -> None:
    mask = torch.from_numpy(golden("sliding_window")["a_shape_256_8_32"])
    pattern = hsa.get_method("sliding_window")(window=32, sink=8).pattern(None, None, Context(TokenLayout.causal(256)))
    assert torch.equal(pattern.to_dense()[0, 0], mask)


@pytest.mark.parametrize("key", sorted(golden("radial")))
def test_radial_reproduces_the_published_masks(key: str) -> None:
    revision, frames, tokens, block, decay, variant, text = key.split("_")
    method = hsa.get_method("radial")(
        decay=float(decay[1:]),
        block_size=int(block[1:]),
        variant=variant,
        rule={"d945317": "release", "72788d4": "head"}[revision],
    )
    layout = TokenLayout.video(int(frames[1:]), 1, int(tokens[1:]), text_after=int(text[1:]))
    pattern = method.pattern(None, None, Context(layout))
    assert torch.equal(pattern.block_map()[0, 0], torch.from_numpy(golden("radial")[key]))


def test_radial_has_the_published_sparsity_and_draws_no_token_mask() -> None:
    with Largest() as seen:
        pattern = hsa.get_method("radial")().pattern(None, None, Context(TokenLayout.video(18, 48, 80)))
    assert 1 - pattern.density() == pytest.approx(0.7366323, abs=1e-6)
    # One pair of frames has 3840 x 3840 tokens; what is built instead is 0.6 MB of blocks from 5 MB of parts.
    assert pattern.nbytes < 1_000_000 and seen.bytes < 8_000_000


@pytest.mark.parametrize("grid", [(21, 45, 80), (21, 30, 52), (5, 7, 13), (13, 9, 31), (2, 23, 29)], ids=str)
@pytest.mark.parametrize("variant", ["wan", "hunyuan"])
def test_radial_block_rule_against_the_token_mask(grid: tuple[int, int, int], variant: str) -> None:
    """The closed form of the rounding against counting a drawn band, on grids that are no multiple of a block."""
    frames, tokens, size = grid[0], grid[1] * grid[2], 64
    method = hsa.get_method("radial")(decay=0.7, block_size=size, variant=variant)
    half, _ = method._bands(torch.arange(frames), tokens)
    width = (size - 1 + tokens - 1) // size + 1
    for distance, row_offset, col_offset in [(0, 0, 5), (1, 37, 0), (frames - 1, 63, 63)]:
        drawn = torch.zeros(width * size, width * size, dtype=torch.bool)
        query, key = torch.arange(tokens)[:, None], torch.arange(tokens)
        drawn[row_offset : row_offset + tokens, col_offset : col_offset + tokens] = (query - key).abs() <= half[
            distance
        ]
        share = drawn.unflatten(0, (width, size)).unflatten(2, (width, size)).double().mean(1)
        want = (share > 1 / 3).sum(-1) / ((share > 0).sum(-1) + 1e-9) > 0.6
        got = method._patches(row_offset, torch.tensor([col_offset]), half[distance : distance + 1], tokens, width)
        assert torch.equal(got[0], want)


def test_radial_declines_frames_too_small_to_round() -> None:
    found = hsa.get_method("radial")(block_size=128).pattern(None, None, Context(TokenLayout.video(9, 4, 5)))
    assert isinstance(found, Decline) and "tokens per frame, got 20" in found.reason


def test_radial_keeps_text_whole() -> None:
    layout = TokenLayout.video(3, 16, 16, text_before=10, text_after=30)
    mask = hsa.get_method("radial")(block_size=32).pattern(None, None, Context(layout)).to_dense()[0, 0]
    text = torch.ones(layout.kv_len, dtype=torch.bool)
    text[10 : 10 + 768] = False
    assert bool(mask[text].all()) and bool(mask[:, text].all()) and not bool(mask.all())


BESIDE_VIDEO = {
    "before": TokenLayout.video(3, 9, 11, text_before=9),
    "after": TokenLayout.video(7, 5, 7, text_after=1),
    "both": TokenLayout.video(3, 9, 11, text_before=40, text_after=71),
}


@pytest.mark.parametrize("layout", BESIDE_VIDEO)
@pytest.mark.parametrize(
    ("name", "params"),
    [
        pytest.param(name, params, id=f"{name}-{i}")
        for name in hsa.list_methods()
        for i, params in enumerate(hsa.get_method(name).examples())
        if hsa.get_method(name)(**params).why_not(Context(BESIDE_VIDEO["both"])) is None
    ],
)
def test_text_beside_a_video_is_exact(name: str, params: dict, layout: str) -> None:
    """Its rows and columns are kept by every method: text attends to all and all to it."""
    tokens = BESIDE_VIDEO[layout]
    ctx, q, k, _ = call(tokens)
    method = hsa.get_method(name)(**params)
    found = method.pattern_for(q, k, reading(method, q, k, ctx))
    assert isinstance(found, BlockPattern), found
    mask, is_text = found.to_dense(), text_tokens(tokens)
    assert int(is_text.sum()) == sum(p.length for p in tokens.parts if p.kind == "text")
    assert bool(mask[:, :, is_text].all()) and bool(mask[..., is_text].all())


@pytest.mark.parametrize("layout", BESIDE_VIDEO)
def test_sliding_window_keeps_text_to_the_token(layout: str) -> None:
    tokens = BESIDE_VIDEO[layout]
    i, text = torch.arange(tokens.kv_len), text_tokens(tokens)
    for params in hsa.get_method("sliding_window").examples():
        mask = hsa.get_method("sliding_window")(**params).pattern(None, None, Context(tokens)).to_dense()[0, 0]
        near = (i[:, None] - i).abs() < params["window"]
        assert torch.equal(mask, near | (i < params["sink"]) | text[:, None] | text)


def test_static_causal_windows_are_the_same_in_chunks() -> None:
    method = hsa.get_method("sliding_window")(window=40, sink=4, block_size=32)
    whole = method.pattern(None, None, Context(TokenLayout.causal(300))).to_dense()
    chunk = method.pattern(None, None, Context(TokenLayout.causal(300).continued(77))).to_dense()
    assert torch.equal(whole[:, :, 77:], chunk)


def test_block_topk_takes_the_best_blocks() -> None:
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    q[..., 0] = 1.0
    k[:, :, 32:48, 0] = 1.0
    method = hsa.get_method("block_topk")(block_size=16, topk=3)
    kept = method.pattern(q, k, Context(TokenLayout.bidirectional(64), num_heads=1, num_kv_heads=1)).block_map()[0, 0]
    # The first block and the row's own are forced; the third is the one with the high mean, ties go to the earlier.
    assert kept.int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 0, 1, 1]]


@pytest.mark.parametrize("density", [1 / 16, 0.125, 0.5])
def test_block_topk_reaches_the_density_asked_for(density: float) -> None:
    layout = TokenLayout.bidirectional(2048)
    ctx, q, k, _ = call(layout, batch=1)
    pattern = hsa.get_method("block_topk")(block_size=32, density=density).pattern(q, k, ctx)
    assert pattern.density() == pytest.approx(density)


BAD = [
    ("sliding_window", {"window": 0}, ValueError, "`window` must be at least 1, got 0"),
    ("sliding_window", {"sink": -1}, ValueError, "`sink` must be at least 0, got -1"),
    ("sliding_window", {"window": 2.5}, TypeError, "`window` must be an int, got 2.5"),
    ("sliding_window", {"block_size": 48}, ValueError, "power of two from 16 to 256, got 48"),
    ("vertical_slash", {"last_queries": 0}, ValueError, "`last_queries` must be at least 1"),
    ("vertical_slash", {"vertical": True}, TypeError, "`vertical` must be an int"),
    ("block_topk", {"topk": 2, "density": 0.5}, ValueError, "`topk` must be None when `density`"),
    ("block_topk", {"density": 0}, ValueError, "more than 0 and at most 1, got 0"),
    ("block_topk", {"density": "half"}, TypeError, "`density` must be a number"),
    ("radial", {"decay": 0}, ValueError, "`decay` must be more than 0"),
    ("radial", {"decay": float("nan")}, ValueError, "`decay` must be more than 0"),
    ("radial", {"variant": "mochi"}, ValueError, "`variant` must be one of wan, hunyuan; got 'mochi'"),
    ("radial", {"rule": "main"}, ValueError, "`rule` must be one of release, head"),
    ("radial", {"block_size": "128"}, TypeError, "`block_size` must be an int"),
]


@pytest.mark.parametrize("name, params, error, message", BAD, ids=[f"{b[0]}-{b[1]}" for b in BAD])
def test_bad_parameters_are_named(name: str, params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hsa.get_method(name)(**params)


def test_vertical_slash_estimates_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, q, k, _ = call(LAYOUTS["causal_300"])
    whole = last_query_sums(q, k, 64, ctx.softmax_scale)
    monkeypatch.setattr("hf_sparse_attn.selection._WEIGHTS_AT_A_TIME", 1)
    for a, b in zip(whole, last_query_sums(q, k, 64, ctx.softmax_scale), strict=True):
        torch.testing.assert_close(a, b)


def test_block_topk_ranks_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, q, k, _ = call(LAYOUTS["causal_300"])
    method = hsa.get_method("block_topk")(block_size=16, density=0.4)
    whole = method.pattern(q, k, ctx).to_dense()
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert torch.equal(method.pattern(q, k, ctx).to_dense(), whole)


@pytest.mark.parametrize("name", ASKED)
def test_memory_grows_with_the_length_not_with_its_square(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Choosing and running together, at two lengths: the largest tensor of all."""
    # Scores are made in strips of this many; with the usual size these lengths fit into one strip.
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1 << 14)
    peaks = []
    for n in (1024, 4096):
        method = hsa.get_method(name)(**hsa.get_method(name).examples()[0])
        layout = TokenLayout.video(n // 128, 8, 16) if "video grid" in method.needs else TokenLayout.causal(n)
        if method.decodes and not method.reads_prompts:
            # It is asked of one query at a time.
            layout = layout.continued(n - 16)
        ctx, q, k, v = call(layout, batch=1)
        with Largest() as seen:
            attend(q, k, v, method, ctx)
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]
