"""DSA as a function: the published values, a plain reference of the indexer and of the attention, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.trained import dsa_attention, dsa_select_tokens
from tests.support.golden import golden
from tests.support.patterns import Largest

pytestmark = pytest.mark.usefixtures("one_thread")


def inputs(n: int, batch: int = 1, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32) -> list:
    """q, k, v, and queries, keys and weights of an indexer of 16 heads."""
    draw = torch.Generator().manual_seed(n)
    shapes = (heads, n, 16), (kv_heads, n, 16), (kv_heads, n, 12), (16, n, 10), (n, 10), (16, n)
    return [torch.randn(batch, *shape, generator=draw, dtype=dtype) for shape in shapes]


def plain_lists(q: Tensor, k: Tensor, weights: Tensor, top_k: int) -> list[list[int]]:
    """The tokens of every query of every row, one query at a time."""
    found, start = [], k.shape[1] - q.shape[2]
    for b in range(q.shape[0]):
        for t in range(q.shape[2]):
            score = (weights[b, :, t, None] * (q[b, :, t] @ k[b, : start + t + 1].T).relu()).sum(0)
            found.append(sorted(score.topk(min(top_k, start + t + 1)).indices.tolist()))
    return found


def mask_of(lists: list[list[int]], batch: int, queries: int, keys: int) -> Tensor:
    mask = torch.zeros(batch * queries, keys, dtype=torch.bool)
    for row, own in zip(mask, lists, strict=True):
        row[own] = True
    return mask.view(batch, 1, queries, keys)


def masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def test_the_published_values() -> None:
    data = {name: torch.from_numpy(value) for name, value in golden("dsa").items()}
    tensors = [data[name].transpose(1, 2).clone().requires_grad_() for name in "qkv"]
    indexer = data["q_idx"].transpose(1, 2), data["k_idx"], data["w_idx"].transpose(1, 2)
    top_k, want = int(data["topk"]), data["indices"].long()
    assert torch.equal(dsa_select_tokens(*indexer, top_k).sort(-1).values, want.sort(-1).values)
    for given in (None, want):
        got = dsa_attention(*tensors, *indexer, top_k, indices=given)
        torch.testing.assert_close(got.detach(), data["out"].transpose(1, 2), rtol=2e-5, atol=2e-5)
        grads = torch.autograd.grad(got, tensors, data["grad_out"].transpose(1, 2))
        for name, grad in zip("qkv", grads, strict=True):
            torch.testing.assert_close(grad, data[f"grad_{name}"].transpose(1, 2), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("batch, heads, kv_heads, n, top_k", [
    (2, 4, 2, 61, 9), (1, 4, 4, 61, 1), (2, 8, 2, 90, 20), (1, 16, 1, 50, 7), (1, 6, 2, 30, 99), (1, 4, 1, 1, 5),
])  # fmt: skip
def test_a_plain_reference(batch: int, heads: int, kv_heads: int, n: int, top_k: int) -> None:
    q, k, v, *indexer = inputs(n, batch, heads, kv_heads)
    lists = plain_lists(*indexer, top_k)
    found = dsa_select_tokens(*indexer, top_k)
    assert found.shape == (batch, n, min(top_k, n))
    assert [[s for s in row if s >= 0] for row in found.flatten(0, 1).tolist()] == lists
    tensors = [x.requires_grad_() for x in (q, k, v)]
    got, want = dsa_attention(*tensors, *indexer, top_k), masked(*tensors, mask_of(lists, batch, n, n))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    weight = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(x, tensors, weight) for x in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_part_of_a_prompt_is_as_in_the_whole() -> None:
    q, k, v, q_index, k_index, weights = inputs(90, heads=8)
    whole = dsa_attention(q, k, v, q_index, k_index, weights, 9)
    part = dsa_attention(q[:, :, 40:], k, v, q_index[:, :, 40:], k_index, weights[:, :, 40:], 9)
    torch.testing.assert_close(part, whole[:, :, 40:], rtol=1e-4, atol=1e-5)


def test_ties_go_to_the_earlier_token_whatever_the_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, q_index, k_index, weights = inputs(61, batch=2)
    # All products are negative: every score is 0.
    found = dsa_select_tokens(-q_index.abs(), k_index.abs(), weights, 5)
    assert found[0, 40].tolist() == [0, 1, 2, 3, 4] and found[0, 2].tolist() == [0, 1, 2, -1, -1]
    whole = dsa_select_tokens(q_index, k_index, weights, 9)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert torch.equal(dsa_select_tokens(q_index, k_index, weights, 9), whole)


@pytest.mark.parametrize("heads", [2, 8])
def test_indices_that_are_given_need_no_order_and_hide_what_is_ahead(heads: int) -> None:
    q, k, v, *indexer = inputs(40, heads=heads)
    lists = torch.rand(1, 40, 40, generator=torch.Generator().manual_seed(0)).argsort(-1)[..., :12]
    lists[0, 3:6] = -1
    own = [[s for s in row if 0 <= s <= t] for t, row in enumerate(lists[0].tolist())]
    got = dsa_attention(q, k, v, *indexer, indices=lists)
    want = masked(q, k, v, mask_of(own, 1, 40, 40)).nan_to_num(0.0)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert not bool(got[:, :, 3:6].any())


def test_gradients_in_float64() -> None:
    q, k, v, *indexer = inputs(21, heads=4, kv_heads=1, dtype=torch.float64)
    tensors = [x.requires_grad_() for x in (q, k, v)]
    assert torch.autograd.gradcheck(lambda *x: dsa_attention(*x, *indexer, 6), tensors, fast_mode=True)


def test_memory_is_linear_in_the_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1 << 16)
    peaks = []
    for n in (1024, 4096):
        q, k, v, q_index, k_index, weights = inputs(n, heads=2, kv_heads=1)
        with Largest() as seen:
            dsa_attention(q, k, v, q_index[:, :2], k_index, weights[:, :2], top_k=24)
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]


def test_bad_input_is_named() -> None:
    q, k, v, q_index, k_index, weights = inputs(40)
    for given, message in (
        ((q_index, k_index, weights.transpose(1, 2)), "must be .batch, heads, tokens, dim., .batch, keys, dim. and"),
        ((q_index, k_index[:, :30], weights), r"must be of 40 queries and \[1, 40, dim\] keys"),
        ((q_index[:, :, :30], k_index, weights[:, :, :30]), r"must be of 40 queries"),
        ((q_index[..., :8], k_index, weights), r"`k_index` must be \[1, at least 40 keys, 8\] like `q_index`"),
    ):
        with pytest.raises(ValueError, match=message):
            dsa_attention(q, k, v, *given)
    with pytest.raises(ValueError, match="`top_k` must be at least 1, got 0"):
        dsa_attention(q, k, v, q_index, k_index, weights, 0)
    with pytest.raises(ValueError, match=r"`indices` must be integers \[batch, tokens, n\] \[1, 40, n\]"):
        dsa_attention(q, k, v, q_index, k_index, weights, indices=torch.zeros(1, 4, 40, 3))
