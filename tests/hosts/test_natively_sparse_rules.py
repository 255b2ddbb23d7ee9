"""The rules by which natively sparse models choose blocks, pools and entries give what transformers' indexers gave."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_sparse_attn.hosts import natively_sparse_pools
from hf_sparse_attn.hosts.natively_sparse_compress import overlapping
from hf_sparse_attn.hosts.natively_sparse_kpool import pooled_lists
from hf_sparse_attn.hosts.natively_sparse_msa import top_blocks
from hf_sparse_attn.hosts.natively_sparse_pools import top_pools
from hf_sparse_attn.hosts.natively_sparse_qsa import visible_order, visible_pools
from hf_sparse_attn.listed_attention import Visible
from tests.support.golden import golden


@pytest.fixture(params=[3, 64], ids=["strips of 3", "one strip"])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(natively_sparse_pools, "_ROWS", request.param)


pytestmark = pytest.mark.usefixtures("strips")


def case(name: str) -> Any:
    """The arrays of one case as attributes; whole numbers as such."""
    found = {k.split(".")[1]: v for k, v in golden("native_pools").items() if k.startswith(f"{name}.")}
    return SimpleNamespace(**{k: v.item() if v.ndim == 0 else torch.from_numpy(v) for k, v in found.items()})


def sets(lists: Tensor) -> Tensor:
    """Lists in ascending order, -1 first, by which they are compared."""
    return lists.long().sort(-1).values


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def half_split(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first channels, in two halves; the rest passes."""
    n = cos.shape[-1]
    a, b = x[..., :n].chunk(2, -1)
    return torch.cat([x[..., :n] * cos + torch.cat([-b, a], -1) * sin, x[..., n:]], -1)


def test_msa() -> None:
    g = case("msa")
    dim = len(g.q_norm)
    q, k = ((g.x @ w.T).unflatten(-1, (-1, dim)).transpose(1, 2) for w in (g.q_proj, g.k_proj))
    q, k = (half_split(normed(x, 1 + w, g.eps), g.cos, g.sin) for x, w in ((q, g.q_norm), (k, g.k_norm)))
    found = top_blocks(q, k, torch.arange(48)[None], g.block, g.topk_blocks, g.local_blocks)
    assert torch.equal(sets(found), sets(g.block_indices))
    # None before one: where there is no further block, the list ends.
    assert bool(((found[..., 1:] < 0) | (found[..., :-1] >= 0)).all())


def test_msa_over_a_static_buffer() -> None:
    """Slots beyond the queries change nothing, nor does the number of queries at a time."""
    g = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 2, 30, 8, generator=g), torch.randn(1, 1, 30, 8, generator=g)
    places = torch.arange(30)[None]
    whole = top_blocks(q, k, places, 4, 3, 1)
    assert torch.equal(top_blocks(q, F.pad(k, (0, 0, 0, 21)), places, 4, 3, 1), whole)
    parts = [top_blocks(q[:, :, i : i + 7], k[:, :, : i + 7], places[:, i : i + 7], 4, 3, 1) for i in range(0, 30, 7)]
    assert torch.equal(torch.cat([F.pad(p, (0, 3 - p.shape[3]), value=-1) for p in parts], 2), whole)


def kpool_inputs(g: Any) -> tuple[Any, ...]:
    """What `pooled_lists` takes, by the formula of the paper."""
    size, dim = g.pool, len(g.k_norm_w)
    keys = F.layer_norm(g.x @ g.wk.T, (dim,), g.k_norm_w, g.k_norm_b, g.eps)
    gate = g.x @ g.gate.T
    first = g.pad.long().argmax(1)
    pools = first[:, None, None] + torch.arange(48).view(-1, size)
    inside = pools < 48
    row = torch.arange(len(g.x))[:, None, None]
    whole = (inside & g.pad[row, pools.clamp(max=47)]).all(-1)
    weights = (gate[row, pools.clamp(max=47)] + g.ape).softmax(2)
    pool_keys = (weights * keys[row, pools.clamp(max=47)]).sum(2)
    q = (g.q_resid @ g.wq_b.T).unflatten(-1, (-1, dim)) * dim**-0.5
    heads = (g.x @ g.weights_proj.T) * q.shape[2] ** -0.5
    return q, heads, pool_keys, pools.where(inside, -1), whole, g.pad, 0, size, g.topk, True


def test_kpool() -> None:
    g = case("kpool")
    lists, pairs = pooled_lists(*kpool_inputs(g))
    assert torch.equal(sets(lists.masked_fill(~g.pad[..., None], -1)), sets(g.indices))
    assert pairs == int(g.pad.cumsum(1).sum())


def test_kpool_with_a_hole() -> None:
    """Pools that padding cuts through are never chosen, and those after it are not mistaken for them."""
    g = case("kpool")
    q, heads, keys, pools, whole, valid, *rest = kpool_inputs(g)
    whole = whole.clone()
    whole[1, 2] = False
    lists, _ = pooled_lists(q, heads, keys, pools, whole, valid, *rest)
    kept = whole.any(0)
    kept[2] = False
    fewer, _ = pooled_lists(q, heads, keys[:, kept], pools[:, kept], whole[:, kept], valid, *rest)
    assert torch.equal(sets(lists[1]), sets(fewer[1]))
    chosen = lists[1][..., :-3]
    assert not bool(((chosen >= pools[1, 2, 0]) & (chosen <= pools[1, 2, -1])).any())


def test_qsa() -> None:
    g = case("qsa")
    dim = len(g.q_norm)
    qk = (g.x @ g.qk_proj.T).unflatten(-1, (-1, dim))
    q = half_split(normed(qk[:, :, : g.heads], 1 + g.q_norm, g.eps), g.cos[:, None], g.sin[:, None])
    raw = qk[:, :, g.heads]

    def pool_keys(slots: Tensor) -> Tensor:
        row = torch.arange(len(raw))[:, None, None]
        means = normed(raw[row, slots].mean(2), 1 + g.k_norm, g.eps)
        return half_split(means, g.cos[slots[..., 0]], g.sin[slots[..., 0]])

    order, count = visible_order(Visible(padding=g.pad), 2, 48, 48, g.x.device)
    lists = visible_pools(q, pool_keys, order, count, g.ratio, g.budget // g.ratio)
    chosen = torch.zeros(2, 48, 49, dtype=torch.bool).scatter_(2, lists.where(lists >= 0, 48), True)[..., :48]
    shape = g.selected_shape.tolist()
    wanted = torch.from_numpy(np.unpackbits(g.selected.numpy(), count=math.prod(shape)).reshape(shape)).bool()[:, 0]
    assert torch.equal(chosen, wanted)
    # No key twice.
    assert torch.equal(chosen.sum(-1), (lists >= 0).sum(-1))


def interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the last channels, in pairs."""
    n = 2 * cos.shape[-1]
    plain, rope = x[..., :-n], x[..., -n:]
    a, b = rope[..., ::2], rope[..., 1::2]
    return torch.cat([plain, torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)], -1)


def entries(g: Any, name: str) -> Tensor:
    kv, gate = (g.x @ getattr(g, f"{name}{p}_proj_weight").T for p in ("kv", "gate"))
    kv, gate = (x.unflatten(1, (-1, g.rate)) for x in (kv, gate))
    kv, gate = overlapping(kv, gate + getattr(g, f"{name}position_bias"), None)
    found = normed((kv * gate.softmax(2)).sum(2), getattr(g, f"{name}kv_norm_weight"), g.eps)
    return interleaved(found, g.cos[:: g.rate], g.sin[:: g.rate])


def test_csa() -> None:
    g = case("csa")
    torch.testing.assert_close(entries(g, ""), g.compressed[:, 0], rtol=2e-5, atol=2e-5)
    k = entries(g, "indexer_")
    q = (g.q_resid @ g.indexer_q_b_proj_weight.T).unflatten(-1, (-1, k.shape[-1]))
    q = interleaved(q, g.cos[:, None], g.sin[:, None]) * k.shape[-1] ** -0.5
    weights = (g.x @ g.indexer_scorer_weights_proj_weight.T) * q.shape[2] ** -0.5
    closed = (torch.arange(48)[None] + 1) // g.rate
    assert torch.equal(sets(top_pools(q, k, weights, closed, g.topk)), sets(g.indices))


def test_windows_of_an_earlier_call_reach_into_the_next() -> None:
    kv, gate = (torch.randn(2, 6, 4, 10, generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    whole = overlapping(kv, gate, None)
    first = overlapping(kv[:, :4], gate[:, :4], (None, None))
    after = overlapping(kv[:, 4:], gate[:, 4:], (kv[:, 3, :, :5], gate[:, 3, :, :5]))
    for a, b, c in zip(whole, first, after, strict=True):
        assert torch.equal(a, torch.cat([b, c], 1))


@pytest.mark.parametrize("own_width", [False, True])
def test_equal_scores_are_chosen_as_from_a_whole_row(own_width: bool) -> None:
    """Of one head most scores are 0, and which of them torch.topk takes depends on the width of the row."""
    g = torch.Generator().manual_seed(3)
    q, k = torch.randn(2, 90, 1, 4, generator=g), torch.randn(2, 90, 4, generator=g) - 1.0
    seen = torch.arange(1, 91)[None]
    found = top_pools(q, k, None, seen, 12, own_width=own_width)
    scores = (q[:, :, 0] @ k.transpose(1, 2)).relu()
    for row in range(2):
        for i in range(90):
            own = scores[row, i].masked_fill(torch.arange(90) > i, -torch.inf)
            if own_width:
                own = own[: i + 1]
            best, wanted = own.topk(min(12, len(own)))
            wanted = wanted.where(best > -torch.inf, -1)
            assert (
                found[row, i][found[row, i] >= 0].sort().values.tolist() == wanted[wanted >= 0].sort().values.tolist()
            )
