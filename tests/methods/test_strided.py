"""Strided heads: the published layouts, chunks, heads, and the densities that the parameters promise."""

from __future__ import annotations

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import Context, TokenLayout
from hf_sparse_attn.methods.strided import Strided
from hf_sparse_attn.selection import text_tokens
from tests.support.golden import golden

GOLDEN = {key: torch.from_numpy(mask) for key, mask in golden("strided").items()}


def block_map(method: Strided, layout: TokenLayout, heads: int = 8, kv_heads: int = 8) -> torch.Tensor:
    ctx = Context(layout, num_heads=heads, num_kv_heads=kv_heads)
    return method.pattern(None, None, ctx).validate().block_map()[0]


def test_the_published_causal_layout() -> None:
    """Eight blocks of two tokens there, of sixteen here: the map over blocks is the same."""
    got = block_map(Strided(local=2, stride=3, head_step=0, block_size=16), TokenLayout.causal(128))
    assert torch.equal(got, GOLDEN["unit_causal"])


def test_the_published_bidirectional_layout() -> None:
    # The published code counts from the edge of the window: an offset of 1 - local, here -1 = 2 (mod 3).
    method = Strided(local=2, stride=3, head_step=0, offset=2, block_size=16)
    assert torch.equal(block_map(method, TokenLayout.bidirectional(128)), GOLDEN["unit_bidirectional"])


def test_the_published_offsets_of_eight_heads() -> None:
    got = block_map(Strided(local=4, stride=8, block_size=64), TokenLayout.causal(2048))
    assert torch.equal(got, GOLDEN["h8_b64"])


def test_the_strided_heads_of_the_sparse_transformer() -> None:
    method = Strided(local=3, stride=3, head_step=0, relative=True, block_size=16)
    distance = torch.arange(7)[:, None] - torch.arange(7)
    want = (distance >= 0) & ((distance < 3) | (distance % 3 == 0))
    assert torch.equal(block_map(method, TokenLayout.causal(111))[0], want)


def test_sinks_and_offset() -> None:
    kept = block_map(Strided(local=1, stride=5, sink=1, offset=2, block_size=16), TokenLayout.causal(160), 1, 1)[0]
    assert kept[9].int().tolist() == [1, 0, 0, 1, 0, 0, 0, 0, 1, 1]


def test_groups_share_an_offset_and_one_pattern_serves_heads_alike() -> None:
    layout = TokenLayout.causal(1000)
    kept = block_map(Strided(local=1, stride=8, block_size=32), layout, 6, 3)
    assert torch.equal(kept[::2], kept[1::2]) and not torch.equal(kept[0], kept[2])
    # Two steps of 8 // 3 blocks: the second group keeps blocks 6, 14, ...
    assert kept[2, 20, :20].nonzero()[:, 0].tolist() == [6, 14]
    alike = Strided(local=1, stride=8, head_step=8, block_size=32)
    assert len(block_map(alike, layout, 6, 3)) == 1


def test_heads_of_another_model_are_not_taken_from_the_cache() -> None:
    method, layout = Strided(local=1, stride=4, block_size=16), TokenLayout.causal(300)
    q, k = torch.zeros(1, 4, 300, 8), torch.zeros(1, 4, 300, 8)
    found = [method.pattern_for(q, k, Context(layout, num_heads=n, num_kv_heads=m)) for n, m in ((4, 4), (4, 2))]
    assert found[0] is not found[1]
    assert not torch.equal(found[0].block_map(), found[1].block_map())


@pytest.mark.parametrize("heads, together", [(8, True), (12, True), (7, False)])
def test_heads_together_see_all_if_there_are_as_many_as_the_stride(heads: int, together: bool) -> None:
    kept = block_map(Strided(local=1, stride=8, block_size=16), TokenLayout.causal(512), heads, heads)
    assert bool(kept.any(0)[-1].all()) == together


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("start", [32, 192, 288])
def test_chunks_of_whole_blocks_are_the_whole(start: int, relative: bool) -> None:
    method = Strided(local=2, stride=4, relative=relative, block_size=32)
    ctx = Context(TokenLayout.causal(300), num_heads=4, num_kv_heads=2)
    part = Context(TokenLayout.causal(300).continued(start), num_heads=4, num_kv_heads=2)
    whole, chunk = (method.pattern(None, None, c).to_dense() for c in (ctx, part))
    assert torch.equal(whole[:, :, start:], chunk)


@pytest.mark.parametrize("relative", [False, True])
def test_a_chunk_between_blocks_keeps_no_less(relative: bool) -> None:
    method = Strided(local=2, stride=4, relative=relative, block_size=32)
    whole, chunk = (
        method.pattern(None, None, Context(layout, num_heads=4, num_kv_heads=4)).to_dense()
        for layout in (TokenLayout.causal(300), TokenLayout.causal(300).continued(77))
    )
    assert not bool((whole[:, :, 77:] & ~chunk).any())
    assert not bool(chunk.all())


def test_text_beside_a_video_is_whole() -> None:
    layout = TokenLayout.video(3, 9, 11, text_before=5, text_after=40)
    mask = Strided(local=1, stride=9, block_size=16).pattern(None, None, Context(layout)).to_dense()[0]
    text = text_tokens(layout)
    assert bool(mask[:, text].all()) and bool(mask[:, :, text].all()) and not bool(mask.all())


@pytest.mark.parametrize("layout", [TokenLayout.causal(1000), TokenLayout.bidirectional(1000)], ids=str)
@pytest.mark.parametrize("relative", [False, True])
def test_density_falls_with_the_stride(layout: TokenLayout, relative: bool) -> None:
    ctx, base = Context(layout), Strided(local=1, block_size=16, relative=relative)
    assert base.knob is not None
    found = []
    for stride in (base.knob.low, 2, 4, 8, 16, 32, base.knob.high):
        method = base.turned(stride)
        assert isinstance(method, Strided) and method.stride == stride
        found.append(method.pattern(None, None, ctx).density(layout.density_count))
    assert found == sorted(found, reverse=True) and found[0] == 1.0 and found[-1] < 0.05


@pytest.mark.parametrize("layout", [TokenLayout.causal(1000), TokenLayout.bidirectional(333)], ids=str)
@pytest.mark.parametrize("local", [1, 3, 99])
def test_least_density_is_no_more_than_the_density(layout: TokenLayout, local: int) -> None:
    method, ctx = Strided(local=local, stride=1000, block_size=32), Context(layout, num_heads=2, num_kv_heads=2)
    density = method.pattern(None, None, ctx).density(layout.density_count)
    # Up to the short last block and the one column that every head keeps.
    assert 0.8 * density - 0.05 <= method.least_density(ctx) <= density


def test_least_density_of_short_and_continued_prompts_is_not_known() -> None:
    assert Strided().least_density(Context(TokenLayout.causal(63))) == 0.0
    assert Strided().least_density(Context(TokenLayout.causal(630).continued(64))) == 0.0


BAD = [
    ({"local": 0}, ValueError, "`local` must be at least 1, got 0"),
    ({"stride": 0}, ValueError, "`stride` must be at least 1, got 0"),
    ({"stride": 2.0}, TypeError, "`stride` must be an int, got 2.0"),
    ({"sink": -1}, ValueError, "`sink` must be at least 0, got -1"),
    ({"offset": -1}, ValueError, "`offset` must be at least 0, got -1"),
    ({"head_step": -2}, ValueError, "`head_step` must be at least 0, got -2"),
    ({"relative": 1}, TypeError, "`relative` must be True, False or None, got 1"),
    ({"block_size": 24}, ValueError, "power of two from 16 to 256, got 24"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=[str(b[0]) for b in BAD])
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Strided(**params)


def test_the_map_is_drawn_in_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    method, layout = Strided(local=2, stride=4, block_size=16), TokenLayout.causal(300)
    whole = block_map(method, layout)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert torch.equal(block_map(method, layout), whole)


def test_it_runs() -> None:
    q, k, v = (torch.randn(2, h, 300, 16) for h in (4, 2, 2))
    method = hsa.get_method("strided")(local=2, stride=4, block_size=16)
    ctx = Context(TokenLayout.causal(300), num_heads=4, num_kv_heads=2, head_dim=16)
    mask = method.pattern(None, None, ctx).to_dense()
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(hsa.attention(q, k, v, method, ctx), want, rtol=1e-4, atol=1e-5)
