"""Attention over lists of single keys, against the softmax under a mask that says the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_attn import listed_attention as file
from hf_sparse_attn.listed_attention import Visible, gathered_cost, listed_attention

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=["whole", "gathered", "mixed"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Keys in products with strips of queries, keys gathered for every query, and both in one call."""
    cost = {"whole": 1e9, "gathered": 0.0, "mixed": 4.0}[request.param]
    monkeypatch.setattr(file, "gathered_cost", lambda each, dim: cost)
    monkeypatch.setattr(file, "_ROWS", 16)
    monkeypatch.setattr(file, "_STRIP", 1 << 12)
    name: str = request.param
    return name


def given(dtype: torch.dtype = torch.float64, groups: int = 2, lists: int = 2, n: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    batch, heads, queries, keys = 2, 4, 45, 70

    def some(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

    order = torch.rand(batch, lists, queries, keys, generator=draw).argsort(-1)[..., :n].int()
    # The keys up to 25 + i are seen; others, and some places of every list, are none.
    chosen = order.where(order <= 25 + torch.arange(queries)[:, None], -1)
    chosen[:, :, ::7, 1::2] = -1
    chosen[:, :, 11] = -1
    return {
        "q": some(batch, heads, queries, 6), "k": some(batch, groups, keys, 6), "v": some(batch, groups, keys, 5),
        "q2": some(batch, heads, queries, 3), "k2": some(batch, groups, keys, 3), "sinks": some(heads),
        "lists": chosen,
    }  # fmt: skip


def under_a_mask(x: dict[str, Tensor], scaling: float, v: Tensor) -> Tensor:
    """The same with all pairs."""
    heads, keys = x["q"].shape[1], x["k"].shape[2]
    lists = x["lists"].long()
    keep = torch.zeros(*lists.shape[:3], keys + 1, dtype=torch.bool).scatter(3, lists.where(lists >= 0, keys), True)
    keep = keep[..., :-1].repeat_interleave(heads // keep.shape[1], 1)
    q, k = torch.cat([x["q"], x["q2"]], -1), torch.cat([x["k"], x["k2"]], -1)
    k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
    logits = (q @ k.transpose(2, 3) * scaling).masked_fill(~keep, -torch.inf)
    sink = x["sinks"].view(1, heads, 1, 1).expand(*logits.shape[:3], 1)
    return torch.cat([logits, sink], -1).softmax(-1)[..., :-1] @ v


@pytest.mark.parametrize("groups, lists", [(2, 2), (2, 1), (1, 1), (4, 1)])
def test_output_and_gradients(way: str, groups: int, lists: int) -> None:
    x = given(groups=groups, lists=lists)
    leaves = [x[name].requires_grad_() for name in ("q", "k", "v", "sinks", "q2", "k2")]
    further = (x["q2"], x["k2"])
    out, lse = listed_attention(x["q"], x["k"], x["v"], x["lists"], 0.3, x["sinks"], further)
    wanted = under_a_mask(x, 0.3, x["v"])
    torch.testing.assert_close(out, wanted)
    assert not lse.requires_grad
    # A query without any key has the sink alone.
    torch.testing.assert_close(lse[:, :, 11], x["sinks"].detach().expand(2, -1))
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    for mine, theirs in zip(
        torch.autograd.grad((out * weight).sum(), leaves), torch.autograd.grad((wanted * weight).sum(), leaves),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(mine, theirs)


def test_values_that_are_the_keys(way: str) -> None:
    x = given(groups=1, lists=1)
    k = x["k"].requires_grad_()
    out, _ = listed_attention(x["q"], k, k, x["lists"], 0.3, x["sinks"], (x["q2"], x["k2"]))
    wanted = under_a_mask(x, 0.3, k)
    torch.testing.assert_close(out, wanted)
    weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    mine, theirs = (torch.autograd.grad((o * weight).sum(), k)[0] for o in (out, wanted))
    torch.testing.assert_close(mine, theirs)


def test_a_query_without_keys_gives_nothing(way: str) -> None:
    x = given()
    q = x["q"].requires_grad_()
    out, lse = listed_attention(q, x["k"], x["v"], x["lists"], 0.3)
    assert bool((out[:, :, 11] == 0).all()) and bool((lse[:, :, 11] == -torch.inf).all())
    out.sum().backward()
    assert q.grad is not None and bool(q.grad.isfinite().all()) and bool((q.grad[:, :, 11] == 0).all())
    nothing, _ = listed_attention(q, x["k"], x["v"], x["lists"][..., :0], 0.3)
    assert bool((nothing == 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(way: str, dtype: torch.dtype) -> None:
    x, exact = given(dtype), given()
    out, _ = listed_attention(x["q"], x["k"], x["v"], x["lists"], 0.3, x["sinks"], (x["q2"], x["k2"]))
    assert out.dtype == dtype
    same = {name: t.double() if t.is_floating_point() else t for name, t in x.items()}
    wanted = under_a_mask({**exact, **same}, 0.3, same["v"])
    torch.testing.assert_close(out.double(), wanted, rtol=torch.finfo(dtype).eps, atol=1e-3)


def test_memory_does_not_hold_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor made is that of one strip."""
    monkeypatch.setattr(file, "_STRIP", 1 << 16)
    sizes: list[int] = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            sizes.extend(o.untyped_storage().nbytes() for o in [out] if isinstance(o, Tensor))
            return out

    q, k = torch.randn(1, 4, 1000, 8), torch.randn(1, 1, 1000, 8)
    lists = torch.arange(1000).view(1, 1, 1000, 1) - torch.arange(9)
    with torch.no_grad(), Largest():
        listed_attention(q, k, k, lists.int(), 1.0)
    assert max(sizes) <= 4 * q.nbytes < 4 * 4 * 1000 * 1000


def test_what_does_not_fit_is_refused() -> None:
    x = given()
    with pytest.raises(ValueError, match=r"`lists` must be \[2, 1 or 2, 45, n\], got \[2, 2, 44, 9\]"):
        listed_attention(x["q"], x["k"], x["v"], x["lists"][:, :, 1:], 1.0)
    with pytest.raises(ValueError, match="`k` and `v` must be"):
        listed_attention(x["q"], x["k"], x["v"][:, :1], x["lists"], 1.0)


def test_gathering_pays_for_many_heads_and_few_keys() -> None:
    assert gathered_cost(128, 576) < 1.5 < gathered_cost(8, 80) < 5 < gathered_cost(1, 320)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("first", [0, 13, 60])
def test_visible(padding: bool, first: int) -> None:
    """Rows, lists and numbers, of queries that go on from a cache, in a buffer that is longer or too short."""
    batch, queries, keys = 2, 20, 70
    hidden = torch.zeros(batch, keys, dtype=torch.bool)
    hidden[1, :5] = True
    seen = (torch.arange(keys) <= first + torch.arange(queries)[:, None]).expand(batch, -1, -1)
    seen = seen & ~hidden[:, None] if padding else seen
    lists = torch.rand(batch, queries, keys).argsort(-1)[..., :30].int()
    lists[:, :, 3] = -1
    wanted = lists.where(seen.gather(2, lists.clamp(min=0).long()) & (lists >= 0), -1)
    for visible in (Visible(first, ~hidden if padding else None), Visible(mask=seen)):
        end = visible.end(17, keys)
        assert not bool(seen[:, :17, end:].any())
        found = visible.rows(3, 17, end, lists.device).expand(batch, -1, -1)
        assert torch.equal(found, seen[:, 3:17, :end])
        assert torch.equal(visible.of(lists), wanted)
        assert visible.pairs(batch, queries, keys) == int(seen.sum())
