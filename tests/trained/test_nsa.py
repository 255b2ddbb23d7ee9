"""NSA as a function: the published values, a plain reference of the three branches, gradients of all inputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.trained import nsa_attention, nsa_compressed, nsa_select_blocks, nsa_selected
from tests.support.golden import golden
from tests.support.patterns import Largest

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list:
    """q, k, v and three gates."""
    draw = torch.Generator().manual_seed(n)
    sizes = (heads, 16), (kv_heads, 16), (kv_heads, 12)
    tensors = [torch.randn(batch, h, n, d, generator=draw, dtype=dtype) for h, d in sizes]
    return tensors + [torch.rand(batch, heads, n, generator=draw, dtype=dtype) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Masked attention, 0 where a query has no key."""
    weights = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    return weights.nan_to_num(0.0) @ v


def plain(q, k, v, g_cmp, g_slc, g_swa, block: int, count: int, window: int) -> tuple[Tensor, list]:
    """Output, and the list of blocks of each (row, head of keys, query), with loops."""
    group, n = q.shape[1] // k.shape[1], q.shape[2]
    ended = n // block
    t = torch.arange(n)[:, None]
    mean_k, mean_v = (
        torch.stack([x[:, :, c * block : (c + 1) * block].mean(2) for c in range(ended)], 2) if ended else x[:, :, :0]
        for x in (k, v)
    )
    wide = [x.repeat_interleave(group, 1) for x in (k, v, mean_k, mean_v)]
    done = (torch.arange(ended) + 1) * block - 1 <= t
    weights = (q @ wide[2].mT * q.shape[-1] ** -0.5).masked_fill(~done, -torch.inf).softmax(-1).nan_to_num(0.0)
    mask, lists = torch.zeros(*q.shape[:3], n, dtype=torch.bool), []
    for b in range(q.shape[0]):
        for g in range(k.shape[1]):
            score = weights[b, g * group : (g + 1) * group].mean(0)
            for i in range(n):
                own = i // block
                forced = list(dict.fromkeys([own, max(own - 1, 0), 0]))[:count]
                rest = sorted(set(range(own)) - {own, own - 1, 0}, key=lambda c: -score[i, c].item())
                lists.append(sorted(forced + rest[: count - len(forced)]))
                for c in lists[-1]:
                    mask[b, g * group : (g + 1) * group, i, c * block : min((c + 1) * block, i + 1)] = True
    near = (t - torch.arange(n) < window) & (t >= torch.arange(n))
    parts = attend(q, *wide[2:], done), attend(q, *wide[:2], mask), attend(q, *wide[:2], near)
    out = sum(g[..., None] * o for g, o in zip((g_cmp, g_slc, g_swa), parts, strict=True))
    return out, lists


def test_the_published_values() -> None:
    data = {name: torch.from_numpy(value) for name, value in golden("nsa").items()}
    names = ("q", "k", "v", "g_cmp", "g_slc", "g_swa")
    tensors = [data[name].transpose(1, 2).clone().requires_grad_() for name in names]
    q, k, v = (x.detach() for x in tensors[:3])
    block, count, window = (int(data[name]) for name in ("block", "count", "window"))
    close = {"rtol": 2e-5, "atol": 2e-5}
    out, lse = nsa_compressed(q, k, v, block)
    torch.testing.assert_close(out, data["o_cmp"].transpose(1, 2), **close)
    torch.testing.assert_close(lse, data["lse"].transpose(1, 2), **close)
    lists = nsa_select_blocks(q, k, block, count)
    want = data["block_indices"].transpose(1, 2).long()
    assert torch.equal(lists.sort(-1).values, want.sort(-1).values)
    torch.testing.assert_close(nsa_selected(q, k, v, want, block), data["o_slc"].transpose(1, 2), **close)
    for given in (None, want):
        got = nsa_attention(*tensors, block, count, window, block_indices=given)
        torch.testing.assert_close(got.detach(), data["out"].transpose(1, 2), **close)
        grads = torch.autograd.grad(got, tensors, data["grad_out"].transpose(1, 2))
        for name, grad in zip(names, grads, strict=True):
            torch.testing.assert_close(grad, data[f"grad_{name}"].transpose(1, 2), **close)


@pytest.mark.parametrize("batch, heads, kv_heads, n, block, count, window", [
    (2, 4, 2, 61, 8, 4, 12), (1, 4, 4, 61, 12, 3, 7), (1, 4, 1, 150, 16, 5, 32), (1, 6, 2, 131, 32, 2, 1),
    (1, 4, 2, 7, 8, 4, 12), (1, 4, 2, 61, 8, 99, 99), (1, 4, 2, 40, 8, 1, 5), (1, 2, 1, 33, 1, 6, 3),
])  # fmt: skip
def test_a_plain_reference(batch, heads, kv_heads, n, block, count, window) -> None:
    tensors = [x.requires_grad_() for x in inputs(n, batch, heads, kv_heads)]
    out, lists = plain(*tensors, block, count, window)
    chosen = nsa_select_blocks(tensors[0], tensors[1], block, count)
    assert chosen.shape == (batch, kv_heads, n, count)
    assert [[c for c in row if c >= 0] for row in chosen.flatten(0, 2).tolist()] == lists
    got = nsa_attention(*tensors, block, count, window)
    torch.testing.assert_close(got, out, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(out)
    # Where no block has ended yet, the compressed branch has no part in the gradient.
    grads = (torch.autograd.grad(x, tensors, weight, allow_unused=True) for x in (got, out))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_block_counts_from_the_query_on_that_ends_it() -> None:
    """The last token of a block: one head is full of it, and has little to say of the others."""
    q, k = torch.zeros(1, 2, 20, 16), torch.zeros(1, 1, 20, 16)
    k[:, :, 4:8, 1] = k[:, :, 8:12, 2] = k[:, :, 16:, 3] = 1.0
    q[:, 0, 19, 3], q[:, 0, 19, 1], q[:, 1, 19, 2] = 10.0, 2.0, 1.0
    q[:, :, 18] = q[:, :, 19]
    chosen = nsa_select_blocks(q, k, 4, 4, scale=1.0)[0, 0]
    assert chosen[19].tolist() == [0, 2, 3, 4] and chosen[18].tolist() == [0, 1, 3, 4]


def test_a_part_of_a_prompt_is_as_in_the_whole() -> None:
    q, k, v, *gates = inputs(150)
    whole = nsa_attention(q, k, v, *gates, 16, 4, 20)
    for start in (5, 64, 149):
        own = [g[:, :, start:] for g in gates]
        part = nsa_attention(q[:, :, start:], k, v, *own, 16, 4, 20)
        torch.testing.assert_close(part, whole[:, :, start:], rtol=1e-4, atol=1e-5)


def test_gradients_in_float64() -> None:
    tensors = [x.requires_grad_() for x in inputs(29, heads=2, kv_heads=1, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: nsa_attention(*x, 4, 4, 6), tensors, fast_mode=True)
    # The first queries have no block, and a log-sum-exp of -inf.
    assert torch.autograd.gradcheck(lambda *x: nsa_compressed(*x, 4)[1][:, :, 3:], tensors[:3], fast_mode=True)


def test_branches_are_left_out() -> None:
    q, k, v, g_cmp, g_slc, g_swa = inputs(61)
    lists, zero = nsa_select_blocks(q, k, 8, 4), torch.zeros_like(g_slc)
    alone = g_slc[..., None] * nsa_selected(q, k, v, lists, 8)
    torch.testing.assert_close(nsa_attention(q, k, v, None, g_slc, None, 8, 4), alone)
    torch.testing.assert_close(nsa_attention(q, k, v, zero, g_slc, g_swa, 8, 4, 0), alone)
    both = alone + g_cmp[..., None] * nsa_compressed(q, k, v, 8)[0]
    torch.testing.assert_close(nsa_attention(q, k, v, g_cmp, g_slc, None, 8, 4), both)


def test_lists_that_are_given_are_cut_at_the_query() -> None:
    q, k, v, *_ = inputs(40)
    lists = torch.full((1, 2, 40, 3), -1)
    lists[:, :, :20, 0] = 4
    lists[:, :, 20:, 1:] = torch.tensor([2, 0])
    out = nsa_selected(q, k, v, lists, 8)
    assert not bool(out[:, :, :20].any()) and bool(out[:, :, 20:].any(-1).all())
    mask = torch.zeros(40, 40, dtype=torch.bool)
    mask[20:, :8] = mask[20:, 16:24] = True
    wide = [x.repeat_interleave(2, 1) for x in (k, v)]
    torch.testing.assert_close(out, attend(q, *wide, mask.tril()), rtol=1e-4, atol=1e-5)


def test_strips_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, *_ = inputs(150, batch=2)
    whole = nsa_select_blocks(q, k, 16, 5)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert torch.equal(nsa_select_blocks(q, k, 16, 5), whole)


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1 << 14)
    peaks = []
    for n in (1024, 4096):
        with Largest() as seen:
            nsa_attention(*inputs(n, heads=2, kv_heads=1), block_size=32, block_count=6, window_size=64)
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]


def test_half_precision() -> None:
    *tensors, g_cmp, g_slc, g_swa = inputs(150)
    low = [x.bfloat16() for x in tensors]
    got = nsa_attention(*low, g_cmp, g_slc, g_swa, 16, 4, 32)
    exact = nsa_attention(*(x.float() for x in low), g_cmp, g_slc, g_swa, 16, 4, 32)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), exact, rtol=2e-2, atol=2e-2)


def test_bad_input_is_named() -> None:
    q, k, v, *gates = inputs(40)
    for params, error, message in (
        ({"block_size": 0}, ValueError, "`block_size` must be at least 1, got 0"),
        ({"block_count": 0}, ValueError, "`block_count` must be at least 1, got 0"),
        ({"window_size": -1}, ValueError, "`window_size` must be at least 0, got -1"),
        ({"window_size": 2.0}, TypeError, "`window_size` must be an int, got 2.0"),
        ({"block_indices": torch.zeros(1, 4, 40, 2)}, ValueError, r"`block_indices` must be integers"),
        (
            {"block_indices": torch.full((1, 2, 40, 2), 7)},
            ValueError,
            "`block_indices` must be less than 1 blocks",
        ),
    ):
        with pytest.raises(error, match=message):
            nsa_attention(q, k, v, *gates, **params)
    with pytest.raises(ValueError, match=r"`g_slc` must be \[batch, heads, tokens\] \[1, 4, 40\], got \[1, 40, 4\]"):
        nsa_attention(q, k, v, gates[0], gates[1].transpose(1, 2), gates[2])
    with pytest.raises(ValueError, match="`k` must have a number of heads that divides 3"):
        nsa_attention(q[:, :3], k, v, *gates)


def test_the_names_are_public() -> None:
    assert hsa.nsa_attention is nsa_attention
    assert callable(hsa.moba_attention) and callable(hsa.dsa_attention)
