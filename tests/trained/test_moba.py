"""MoBA as a function: the published values, a plain reference, gradients, packed samples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.selection_by_query import pattern_by_query
from hf_sparse_attn.trained import moba_attention
from tests.support.golden import golden
from tests.support.patterns import Largest

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list:
    draw = torch.Generator().manual_seed(n)
    sizes = (heads, 16), (kv_heads, 16), (kv_heads, 12)
    return [torch.randn(batch, h, n, d, generator=draw, dtype=dtype) for h, d in sizes]


def plain(q: Tensor, k: Tensor, chunk: int, top_k: int) -> Tensor:
    """Which keys each query reads, query by query: bool [batch, heads, tokens, keys]."""
    batch, heads, n, _ = q.shape
    mask = torch.zeros(batch, heads, n, n, dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            key = k[b, h * k.shape[1] // heads]
            for t in range(n):
                own = t // chunk
                gate = [float(q[b, h, t] @ key[c * chunk : (c + 1) * chunk].mean(0)) for c in range(own)]
                best = sorted(range(own), key=lambda c: -gate[c])[: own if top_k == 1 else top_k - 1]
                for c in [*best, own]:
                    mask[b, h, t, c * chunk : min((c + 1) * chunk, t + 1)] = True
    return mask


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_the_published_values() -> None:
    data = {name: torch.from_numpy(value) for name, value in golden("moba").items()}
    q, k, v, out, grad = (data[n].transpose(0, 1)[None] for n in ("q", "k", "v", "out", "grad_out"))
    chunk, top_k = int(data["chunk"]), int(data["topk"])
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    for got in (
        moba_attention(*tensors, chunk_size=chunk, top_k=top_k, cu_seqlens=data["cu"]),
        hsa.attention(*tensors, "moba", chunk_size=chunk, top_k=top_k),
    ):
        torch.testing.assert_close(got.detach(), out, rtol=2e-5, atol=2e-5)
        for name, one in zip("qkv", torch.autograd.grad(got, tensors, grad), strict=True):
            torch.testing.assert_close(one, data[f"grad_{name}"].transpose(0, 1)[None], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch, n, chunk, top_k", [
    (2, 61, 8, 3), (1, 61, 12, 2), (1, 150, 16, 4), (1, 150, 48, 2), (1, 131, 100, 2), (1, 140, 131, 2), (2, 61, 8, 1),
    (1, 40, 64, 3), (1, 1, 8, 3), (1, 50, 1, 5), (1, 61, 8, 99),
])  # fmt: skip
def test_a_plain_reference(batch: int, n: int, chunk: int, top_k: int) -> None:
    q, k, v = inputs(n, batch)
    mask = plain(q, k, chunk, top_k)
    torch.testing.assert_close(moba_attention(q, k, v, chunk, top_k), masked(q, k, v, mask), rtol=1e-4, atol=1e-5)
    method = hsa.get_method("moba")(chunk_size=chunk, top_k=top_k)
    pattern = method.pattern(q, k, hsa.Context.for_tensors(q, k)).validate()
    assert torch.equal(pattern.to_dense().expand(batch, 4, -1, -1), mask)


def test_a_part_of_a_prompt_chooses_as_the_whole() -> None:
    q, k, v = inputs(150)
    for start in (37, 64, 149):
        part = moba_attention(q[:, :, start:], k, v, 16, 3)
        torch.testing.assert_close(part, moba_attention(q, k, v, 16, 3)[:, :, start:], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("lengths", [[60], [17, 43], [8, 3, 40, 1], [0, 33, 24]], ids=str)
@pytest.mark.parametrize("top_k", [1, 3])
def test_packed_samples_are_samples(lengths: list[int], top_k: int) -> None:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    tensors = [x.requires_grad_() for x in inputs(int(ends[-1]))]
    got = moba_attention(*tensors, chunk_size=8, top_k=top_k, cu_seqlens=ends.int())
    parts = zip(*(x.split(lengths, 2) for x in tensors), strict=True)
    want = torch.cat([moba_attention(*one, chunk_size=8, top_k=top_k) for one in parts if one[0].shape[2]], 2)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(x, tensors, weight) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_gradients_in_float64() -> None:
    tensors = [x.requires_grad_() for x in inputs(27, heads=2, kv_heads=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: moba_attention(*x, chunk_size=6, top_k=2), tensors, fast_mode=True)


def test_half_precision_and_scale() -> None:
    q, k, v = inputs(150)
    low = moba_attention(*(x.bfloat16() for x in (q, k, v)), chunk_size=16, top_k=3, scale=0.1)
    assert low.dtype == torch.bfloat16
    exact = moba_attention(*(x.bfloat16().float() for x in (q, k, v)), chunk_size=16, top_k=3, scale=0.1)
    torch.testing.assert_close(low.float(), exact, rtol=2e-2, atol=2e-2)
    assert not torch.allclose(exact, moba_attention(q, k, v, 16, 3), atol=1e-2)


def test_strips_and_tiles_do_not_change_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = inputs(150, batch=2)
    method, ctx = hsa.get_method("moba")(chunk_size=16, top_k=3), hsa.Context.for_tensors(q, k)
    whole = method.pattern(q, k, ctx)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    again = method.pattern(q, k, ctx)
    assert torch.equal(whole.to_dense(), again.to_dense())
    assert len(whole.tiles) == len(whole.tiles.unique(dim=0)) and len(whole.tiles) > 50


def test_memory_is_linear_in_the_tokens() -> None:
    peaks = []
    for n in (1024, 4096):
        with Largest() as seen:
            moba_attention(*inputs(n, heads=2, kv_heads=1), chunk_size=n // 16, top_k=3)
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]


@pytest.mark.parametrize("density", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("start", [0, 100])
def test_what_is_kept_is_known_before(density: float, start: int) -> None:
    q, k, _ = inputs(300)
    method = hsa.get_method("moba")(chunk_size=24, density=density)
    ctx = hsa.Context.for_tensors(q[:, :, start:], k)
    found = method.pattern(q[:, :, start:], k, ctx).density("causal")
    assert found == pytest.approx(method.least_density(ctx), rel=1e-6)


def test_heads_of_a_group_share_a_choice() -> None:
    keep = torch.rand(2, 2, 61, 8, generator=torch.Generator().manual_seed(0)) < 0.4
    layout = hsa.TokenLayout.causal(61)
    one = pattern_by_query(lambda a, b: keep[:, :, a:b], (2, 2, 61, 8), 8, layout)
    many = pattern_by_query(lambda a, b: keep[:, :, a:b], (2, 2, 61, 8), 8, layout, group=3).validate()
    want = keep.repeat_interleave(8, -1)[..., :61].tril()
    assert torch.equal(one.to_dense(), want)
    assert torch.equal(many.to_dense(), want.repeat_interleave(3, 1))


def test_a_short_last_row_has_whole_blocks() -> None:
    layout = hsa.TokenLayout.causal(61)
    pattern = pattern_by_query(lambda a, b: torch.ones(1, 1, b - a, 4, dtype=torch.bool), (1, 1, 61, 4), 16, layout)
    # Row r has r blocks before its own.
    assert (pattern.tile_ids == 0).tolist() == [column < row for row in range(4) for column in range(row + 1)]


BAD = [
    ({"chunk_size": 0}, ValueError, "`chunk_size` must be at least 1, got 0"),
    ({"top_k": 0}, ValueError, "`top_k` must be at least 1, got 0"),
    ({"chunk_size": 2.5}, TypeError, "`chunk_size` must be an int, got 2.5"),
    ({"top_k": True}, TypeError, "`top_k` must be an int, got True"),
    ({"cu_seqlens": torch.tensor([0, 30])}, ValueError, r"`cu_seqlens` must rise from 0 to 40, got \[0, 30\]"),
    ({"cu_seqlens": torch.tensor([0, 30, 20, 40])}, ValueError, "`cu_seqlens` must rise"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=str)
def test_bad_input_is_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        moba_attention(*inputs(40), **params)
    if "cu_seqlens" not in params:
        with pytest.raises(error, match=message):
            hsa.get_method("moba")(**params)


def test_number_and_share_exclude_one_another() -> None:
    with pytest.raises(ValueError, match=r"`top_k` must be None when `density` is given, got 2 and 0\.5"):
        hsa.get_method("moba")(top_k=2, density=0.5)
    with pytest.raises(ValueError, match="`cu_seqlens` must come with a batch of 1"):
        moba_attention(*inputs(40, batch=2), cu_seqlens=torch.tensor([0, 40]))
    assert hsa.get_method("moba")().top_k == 12
    assert hsa.get_method("moba")(top_k=3).turned(0.5) == hsa.get_method("moba")(density=0.5)
