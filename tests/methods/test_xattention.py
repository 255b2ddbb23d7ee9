"""XAttention: the published selection, a plain rewriting of it for every layout, and planted structure."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse_attn import Context, TokenLayout
from hf_sparse_attn.methods.xattention import Strips, XAttention, products
from hf_sparse_attn.selection import covering, row_blocks, text_blocks
from hf_sparse_attn.selection_by_density import block_pairs, share_missing
from tests.support.golden import golden
from tests.support.patterns import Largest

GOLDEN = {key: torch.from_numpy(value) for key, value in golden("xattention").items()}


def context(layout: TokenLayout, heads: int = 4, kv_heads: int = 2, dim: int = 16, softcap: float = 0.0) -> Context:
    return Context(layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, softcap=softcap)


def inputs(layout: TokenLayout, batch: int = 2, heads: int = 4, kv_heads: int = 2, dim: int = 16):
    """Queries and keys with neighbours that are alike, so that blocks differ clearly."""
    q, k = (torch.randn(batch, h, layout.kv_len, dim).cumsum(2) for h in (heads, kv_heads))
    q, k = (x / x.norm(dim=-1, keepdim=True) * 6 for x in (q, k))
    return q[:, :, layout.query_start :], k


def block_map(method: XAttention, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    found = method.pattern(q, k, ctx).validate()
    return found.block_map()


def plain_scores(method: XAttention, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """Block scores of one head from all token scores, float64 [rows, cols]."""
    layout, size, stride = ctx.layout, method.block_size, method.stride
    rows, cols = -(-layout.q_len // size), -(-layout.kv_len // size)
    every = torch.zeros(rows * size, cols * size, dtype=torch.float64)
    every[: layout.q_len, : layout.kv_len] = q.double() @ k.double().T
    # [query tiles, key tiles, stride]: an anti-diagonal is a diagonal once the keys of each tile are reversed.
    tiles = every.unflatten(0, (-1, stride)).unflatten(2, (-1, stride)).flip(3).diagonal(dim1=1, dim2=3)
    logits = tiles.sum(-1) * ctx.softmax_scale / stride
    if ctx.softcap:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    query = layout.query_start + torch.arange(len(logits))[:, None] * stride
    key = torch.arange(logits.shape[1]) * stride
    seen = key <= query if layout.is_causal else (key < layout.kv_len).expand_as(logits)
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1) * (query < layout.kv_len)
    return weights.unflatten(0, (rows, -1)).unflatten(2, (cols, -1)).sum((1, 3))


def plain(method: XAttention, q: Tensor, k: Tensor, ctx: Context) -> Tensor:
    """Kept blocks of one head: bool [rows, cols]."""
    layout, size = ctx.layout, method.block_size
    score = plain_scores(method, q, k, ctx)
    kept = torch.zeros_like(score, dtype=torch.bool)
    text_row, text_col = text_blocks(layout, size, size)
    for row in range(len(score)):
        first = layout.query_start + row * size
        last = min(first + size, layout.kv_len) - 1
        forced = {0, first // size, last // size} if layout.is_causal else set(text_col.nonzero()[:, 0].tolist())
        others = [c for c in range(score.shape[1]) if not (layout.is_causal and c * size > last) and c not in forced]
        held = sum(float(score[row, c]) for c in forced)
        kept[row, list(forced)] = True
        for c in sorted(others, key=lambda c: -float(score[row, c])):
            if held < method.threshold * float(score[row].sum()) or text_row[row]:
                kept[row, c] = True
            held += float(score[row, c])
    return kept


def test_the_published_selection() -> None:
    method = XAttention(threshold=0.9, stride=8, block_size=64)
    ctx = context(TokenLayout.causal(1000), 2, 2, 32)
    scores = Strips(method, GOLDEN["q"], GOLDEN["k"], ctx).scores(0, 16)
    torch.testing.assert_close(scores, GOLDEN["scores"], rtol=1e-5, atol=1e-6)
    assert torch.equal(block_map(method, GOLDEN["q"], GOLDEN["k"], ctx), GOLDEN["mask"])


LAYOUTS = {
    "causal": TokenLayout.causal(256),
    "odd": TokenLayout.causal(333),
    "short": TokenLayout.causal(5),
    "chunk": TokenLayout.causal(333).continued(128),
    "odd_chunk": TokenLayout.causal(333).continued(77),
    "bidirectional": TokenLayout.bidirectional(300),
    "video": TokenLayout.video(3, 9, 11, text_before=5, text_after=40),
}


@pytest.mark.parametrize("stride", [1, 4, 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_against_token_scores(layout: str, stride: int) -> None:
    method = XAttention(threshold=0.7, stride=stride, block_size=32)
    ctx = context(LAYOUTS[layout])
    q, k = inputs(LAYOUTS[layout], batch=1)
    want = torch.stack([plain(method, q[0, h], k[0, h // 2], ctx) for h in (0, 3)])
    assert torch.equal(block_map(method, q, k, ctx)[0, [0, 3]], want)


def test_softcap_flattens_the_estimate() -> None:
    method, layout = XAttention(threshold=0.7, stride=8, block_size=32), TokenLayout.causal(333)
    q, k = inputs(layout, 1)
    capped = block_map(method, q, k, context(layout, softcap=4.0))
    assert torch.equal(capped[0, 1], plain(method, q[0, 1], k[0, 0], context(layout, softcap=4.0)))
    assert int(capped.sum()) > int(block_map(method, q, k, context(layout)).sum())


@pytest.mark.parametrize("causal", [True, False])
def test_a_needle_is_kept_by_all_that_see_it(causal: bool) -> None:
    layout = TokenLayout.causal(500) if causal else TokenLayout.bidirectional(500)
    q, k = torch.randn(1, 2, 500, 16) * 0.1, torch.randn(1, 1, 500, 16) * 0.1
    # Sixteen keys that all queries look for, in the block from 192 on; one anti-diagonal of eight meets two of them.
    q[..., 0] += 20
    k[:, :, 200:216, 0] += 20
    kept = block_map(XAttention(threshold=0.5, stride=8, block_size=32), q, k, context(layout, 2, 1))
    if causal:
        assert bool(kept[:, :, 6:, 6].all())
        # Beside it only the first block and the row's own.
        assert torch.equal(kept[0, 0, 10].nonzero()[:, 0], torch.tensor([0, 6, 10]))
    else:
        assert torch.equal(kept.nonzero()[:, 3], torch.full((2 * 16,), 6))


def test_what_is_kept_holds_the_share_and_no_block_too_many() -> None:
    method, layout = XAttention(threshold=0.8, stride=8, block_size=32), TokenLayout.bidirectional(700)
    ctx, (q, k) = context(layout), inputs(layout)
    kept = block_map(method, q, k, ctx)
    score = Strips(method, q, k, ctx).scores(0, kept.shape[2])
    share = score / score.sum(-1, keepdim=True)
    held = (share * kept).sum(-1)
    least = share.masked_fill(~kept, torch.inf).min(-1).values
    assert float(held.min()) > 0.8 - 1e-5
    assert float((held - least).max()) < 0.8 + 1e-5


def test_covering_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0]])
    visible = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    forced = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 1], [0, 0, 0, 0]]).bool()
    # 0.1 forced, then 0.4, then 0.3 as 0.5 is less than 0.75; ties from the left; nothing invisible.
    assert covering(scores, 0.75, forced, visible).int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [1, 1, 0, 0]]
    assert covering(scores, 0.05, forced, visible).int().tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]
    assert torch.equal(covering(scores, 1.0, forced, visible), visible)


@pytest.mark.parametrize("start", [64, 160, 288])
def test_chunks_of_whole_blocks_are_the_whole(start: int) -> None:
    method, layout = XAttention(threshold=0.6, stride=8, block_size=32), TokenLayout.causal(300)
    q, k = inputs(layout)
    whole = method.pattern(q, k, context(layout)).to_dense()
    chunk = method.pattern(q[:, :, start:], k, context(layout.continued(start))).to_dense()
    assert torch.equal(whole[:, :, start:], chunk)


@pytest.mark.parametrize("layout", ["odd", "bidirectional"])
def test_scores_are_made_in_strips(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, ctx = XAttention(threshold=0.6, stride=8, block_size=32), context(LAYOUTS[layout])
    q, k = inputs(LAYOUTS[layout])
    whole = block_map(method, q, k, ctx)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert torch.equal(block_map(method, q, k, ctx), whole)


def test_strips_are_small_whatever_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block score is made of 64 tile scores: of all at once there would be 4 MB, a strip of rows holds 64 KB."""
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1 << 14)
    layout = TokenLayout.causal(2048)
    q, k = inputs(layout, 1)
    with Largest() as seen:
        XAttention(threshold=0.3, stride=4, block_size=32).pattern(q, k, context(layout))
    assert seen.bytes <= q.nbytes


def test_density_rises_with_the_threshold() -> None:
    layout = TokenLayout.causal(1000)
    ctx, (q, k), base = context(layout), inputs(layout), XAttention(stride=8, block_size=32)
    assert base.knob is not None
    values = (base.knob.low, 0.2, 0.4, 0.6, 0.8, base.knob.high)
    found = [base.turned(x).pattern(q, k, ctx).density("causal") for x in values]
    assert found == sorted(set(found)) and found[0] < 0.2 and found[-1] == 1.0


def test_the_knob_turns_the_density_where_one_decides() -> None:
    assert XAttention(density=0.3).turned(0.5) == XAttention(density=0.5)
    assert XAttention().turned(0.5) == XAttention(threshold=0.5)


@pytest.mark.parametrize("n", [20, 64, 333, 1000])
def test_least_density_is_what_is_forced(n: int) -> None:
    layout = TokenLayout.causal(n)
    q, k = torch.zeros(1, 4, n, 16), torch.zeros(1, 2, n, 16)
    method = XAttention(threshold=1e-6, stride=8, block_size=32)
    density = method.pattern(q, k, context(layout)).density("causal")
    assert method.least_density(context(layout)) == pytest.approx(density)
    assert method.least_density(context(layout.continued(n // 2))) == 0.0
    assert method.least_density(context(TokenLayout.bidirectional(n))) == 0.0


@pytest.mark.parametrize("layout", ["odd", "odd_chunk", "bidirectional", "video"])
@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_a_density_is_kept_by_every_head_with_a_threshold_of_its_own(layout: str, density: float) -> None:
    method = XAttention(density=density, stride=8, block_size=16)
    ctx, (q, k) = context(LAYOUTS[layout]), inputs(LAYOUTS[layout])
    kept = block_map(method, q, k, ctx)
    pairs = block_pairs(ctx.layout, 16)
    shares = (kept * pairs).sum((2, 3)) / pairs.sum()
    # Text beside a video is kept whatever the density.
    least = 0.0 if layout != "video" else float(shares.min())
    # Blocks whose missing shares are equal to 8 bits are kept or dropped together.
    assert (shares - max(density, least)).abs().max() <= 0.01
    if layout != "video":
        assert density - 0.02 < method.least_density(ctx) < density
    score = Strips(method, q, k, ctx).scores(0, kept.shape[2])
    low, high = row_blocks(ctx.layout, 16)
    block = torch.arange(kept.shape[3])
    visible = block <= high[:, None] if ctx.layout.is_causal else torch.ones_like(kept[0, 0])
    text_row, text_col = text_blocks(ctx.layout, 16, 16)
    forced = (block == 0) | (block == low[:, None]) | (block == high[:, None]) if ctx.layout.is_causal else text_col
    # Each head is what one threshold gives: the least share of a row that is missing before a block that is kept.
    missing = share_missing(score, forced | text_row[:, None], visible).float()
    for here, gone in zip(kept.flatten(0, 1), missing.flatten(0, 1), strict=True):
        left_out = gone[~here & (gone >= 0)]
        assert not len(left_out) or float(left_out.max()) < float(gone[here].min())


def test_visible_pairs_of_blocks() -> None:
    for layout in LAYOUTS.values():
        query, key = torch.arange(layout.query_start, layout.kv_len), torch.arange(layout.kv_len)
        seen = key <= query[:, None] if layout.is_causal else torch.ones(layout.q_len, layout.kv_len, dtype=torch.bool)
        padded = torch.nn.functional.pad(seen, (0, -layout.kv_len % 32, 0, -layout.q_len % 32))
        want = padded.unflatten(1, (-1, 32)).unflatten(0, (-1, 32)).sum((1, 3))
        assert torch.equal(block_pairs(layout, 32), want)


def test_share_missing_by_hand() -> None:
    scores = torch.tensor([[0.1, 0.4, 0.3, 0.2], [0.5, 0.5, 0.0, 0.0]])
    visible = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]).bool()
    forced = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]).bool()
    found = share_missing(scores, forced, visible).float()
    want = torch.tensor([[torch.inf, 0.9, 0.5, 0.2], [torch.inf, 0.5, -1, -1]])
    torch.testing.assert_close(found, want, rtol=0.01, atol=0)


def test_no_gradient_goes_through_the_estimate() -> None:
    layout = TokenLayout.causal(111)
    q, k = (x.requires_grad_() for x in inputs(layout))
    method = XAttention(stride=8, block_size=32)
    assert method.pattern(q, k, context(layout)).starts.numel()
    assert not Strips(method, q, k, context(layout)).scores(0, 4).requires_grad


BAD = [
    ({"threshold": 0}, ValueError, "`threshold` must be more than 0 and at most 1, got 0"),
    ({"threshold": 1.5}, ValueError, "`threshold` must be more than 0 and at most 1, got 1.5"),
    ({"threshold": "0.9"}, TypeError, "`threshold` must be a number, got '0.9'"),
    ({"stride": 0}, ValueError, "`stride` must be at least 1, got 0"),
    ({"stride": 12}, ValueError, "`stride` must divide `block_size` = 128, got 12"),
    ({"stride": 8.0}, TypeError, "`stride` must be an int, got 8.0"),
    ({"block_size": 100}, ValueError, "power of two from 16 to 256, got 100"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        XAttention(**params)


def test_it_needs_tensors() -> None:
    with pytest.raises(TypeError, match="`q` and `k` must be tensors: xattention chooses by content"):
        XAttention().pattern(None, None, context(TokenLayout.causal(64)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_products_are_float32_on_a_gpu(dtype: torch.dtype) -> None:
    a, b = torch.randn(3, 40, 64, device="cuda", dtype=dtype), torch.randn(3, 64, 24, device="cuda", dtype=dtype)
    got = products(a, b)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), a.double() @ b.double(), rtol=1e-4, atol=1e-4)
