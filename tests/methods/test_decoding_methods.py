"""Methods that choose keys where text is generated: what is published of each, and what holds for all of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn import Context, Decline, TokenLayout
from hf_sparse_attn.decoding import Kept, Memory, Step
from hf_sparse_attn.dispatch import run_exact, run_kept
from tests.support.golden import golden

GOLDEN = golden("decoding")
SCALE = 16**-0.5
# Every method that decodes, with few keys; the layers of a model of which the second one is an anchor.
FEW: dict[str, dict[str, Any]] = {
    "quest": {"budget": 48, "skip_layers": 0},
    "block_topk": {"block_size": 16, "topk": 3},
    "streaming": {"sink": 5, "recent": 40},
    "sliding_window": {"sink": 5, "window": 40},
    "strided": {"local": 1, "stride": 4, "sink": 1, "block_size": 16},
    "duo": {"retrieval": ((), (0,), (1,), (0, 1), ()), "sink": 5, "recent": 40},
    "rocket": {"budget": 48, "skip_layers": 0},
    "omnikv": {"budget": 48, "anchors": (1,), "skip_layers": 0},
    "lessismore": {"budget": 48, "anchors": (1,)},
    "kascade": {"budget": 48, "anchors": (1,), "head_map": ((0, 1), (0, 1), (1, 0), (1, 1), (0, 0))},
}
LAYERS = 5
PUBLISHED: dict[str, Any] = {"estimate": "bound", "page_size": 16, "sink_pages": 0, "recent_pages": 0}


def tensor(name: str) -> Tensor:
    return torch.from_numpy(GOLDEN[name])


def bits(name: str, *shape: int) -> Tensor:
    return torch.from_numpy(np.unpackbits(GOLDEN[name])[: np.prod(shape)].reshape(shape).astype(bool))


def published(method: hsa.Method, anchor: int, reuse: int) -> tuple[Tensor, Tensor, Kept | None]:
    """Outputs of an anchor and of a layer that reads what it says, and what that keeps."""
    outs, kept, layers = [], None, {}
    for layer, name in ((anchor, "a"), (reuse, "b")):
        q, k, v = (tensor(f"cache.{x}_{name}") for x in "qkv")
        kept = method.decode(Step(q, k, v, None, layer, 32, SCALE, layers=layers))
        assert not isinstance(kept, Decline)
        outs.append((run_exact(q, k, v, SCALE) if kept is None else run_kept(q, k, v, kept, SCALE))[0][0, :, 0])
    return outs[0], outs[1], kept


def mask(found: Kept | None, heads: int, length: int, batch: int = 1, first: Tensor | None = None) -> Tensor:
    """What every head reads, bool [batch, heads, length]."""
    if found is None:
        real = torch.arange(length) >= (torch.zeros(batch, 1) if first is None else first[:, None])
        return real[:, None].expand(-1, heads, -1)
    return found.pattern(length, heads, first).to_dense()[:, :, 0]


def close(got: Tensor, name: str) -> None:
    torch.testing.assert_close(got, tensor(name), rtol=1e-4, atol=2e-5)


def test_quest_is_the_published_choice() -> None:
    method = hsa.get_method("quest")(**PUBLISHED, share="head", budget=128)
    q, k, v = (tensor(f"cache.{x}_a") for x in "qkv")
    found = method.decode(Step(q, k, v, None, 2, 32, SCALE))
    assert torch.equal(mask(found, 4, 290)[0], bits("quest.kept", 4, 290))
    close(hsa.attention(q, k, v, method)[0, :, 0], "quest.out")


def test_omnikv_is_the_published_choice() -> None:
    anchor, reuse, found = published(hsa.get_method("omnikv")(), 2, 4)
    close(anchor, "omnikv.out_anchor")
    close(reuse, "omnikv.out_reuse")
    assert found is not None and sorted(found.pages.flatten().tolist()) == GOLDEN["omnikv.tokens"].tolist()


def test_lessismore_is_the_published_choice() -> None:
    anchor, reuse, found = published(hsa.get_method("lessismore")(), 2, 3)
    close(anchor, "lessismore.out_anchor")
    close(reuse, "lessismore.out_reuse")
    assert torch.equal(mask(found, 4, 290)[0], bits("lessismore.kept", 4, 290))


def test_kascade_is_the_published_choice() -> None:
    head_map = [GOLDEN["kascade.head_map"].tolist()] * 32
    anchor, reuse, _ = published(hsa.get_method("kascade")(head_map=head_map), 2, 3)
    close(anchor, "kascade.out_anchor")
    close(reuse, "kascade.out_reuse")


@pytest.mark.parametrize("rolling", [False, True])
def test_kascade_reads_prompts_in_the_published_tiles(rolling: bool) -> None:
    q, k, v = (tensor(f"kascade_prefill.{x}") for x in "qkv")
    method = hsa.get_method("kascade")(rolling=rolling)
    ctx = Context(TokenLayout.causal(200), 2, 32, num_heads=4, num_kv_heads=2, head_dim=16)
    close(hsa.attention(q, k, v, method, ctx)[0].transpose(0, 1), "kascade_prefill.out_anchor")
    kept = method.pattern(q, k, ctx).to_dense()[0]
    for group, tiles in enumerate(GOLDEN["kascade_prefill.tokens"]):
        for tile, tokens in enumerate(tiles):
            want = torch.zeros(200, dtype=torch.bool)
            want[[token for token in tokens if token < 32 * tile]] = True
            assert torch.equal(kept[2 * group, 32 * tile, : 32 * tile], want[: 32 * tile])


def test_rocket_is_the_published_choice() -> None:
    method = hsa.get_method("rocket")(
        budget=int(GOLDEN["rocket.topk"]), compression=float(GOLDEN["rocket.compression"])
    )
    out = hsa.attention(tensor("rocket.q"), tensor("cache.k_a"), tensor("cache.v_a"), method)
    close(out[0, :, 0], "rocket.out")


@pytest.mark.parametrize("name", ["streaming", "duo"])
def test_prompts_are_read_by_the_published_window(name: str) -> None:
    heads = {"retrieval": ((1,),)} if name == "duo" else {}
    sizes = {"sink": int(GOLDEN["duo.sink"]), "recent": int(GOLDEN["duo.recent"])}
    n = int(GOLDEN["duo.tokens"])
    x = torch.randn(1, 2, n, 16)
    ctx = Context(TokenLayout.causal(n), num_heads=2, num_kv_heads=2, head_dim=16)
    kept = hsa.get_method(name)(**heads, **sizes).pattern(x, x, ctx).to_dense()[0]
    assert torch.equal(kept[0], bits("duo.mask", n, n))
    if name == "duo":
        assert torch.equal(kept[1], torch.ones(n, n, dtype=torch.bool).tril())


def test_streaming_keeps_its_own_token_besides() -> None:
    q, k, v = tokens(1, 300)
    found = hsa.get_method("streaming")(sink=8, recent=24).decode(Step(q[:, :, -1:], k, v, None, 3, LAYERS, SCALE))
    assert sorted(found.pages[0, 0].tolist()) == [*range(8), *range(275, 300)]


def tokens(batch: int, length: int, seed: int = 0, heads: int = 4, kv_heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """q of every token, k and v of a few kinds of tokens, so that some keys matter more than others."""
    draw = torch.Generator().manual_seed(seed)
    kinds = torch.randn(8, 16, generator=draw) * 2
    kind = torch.randint(8, (batch, 1, length), generator=draw)
    k = kinds[kind.expand(-1, kv_heads, -1)] + torch.randn(batch, kv_heads, length, 16, generator=draw)
    q = torch.randn(batch, heads, length, 16, generator=draw) + kinds[kind.roll(7, 2).expand(-1, heads, -1)] / 2
    return q, k, torch.randn(k.shape, generator=draw)


def cut(length: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x[:, :, :length] for x in tensors)


class Cache:
    """Keys and values that grow, as a patched model has them: what is remembered goes with every layer."""

    def __init__(self, method: hsa.Method) -> None:
        self.method = method
        self.memories = [Memory() for _ in range(LAYERS)]

    def step(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> list[Tensor]:
        """What every layer keeps for the last token of q; layers have other keys each."""
        layers: dict[Any, Any] = {}
        kept = []
        for layer, memory in enumerate(self.memories):
            keys = k.roll(layer, 3)
            found = self.method.decode(Step(q[:, :, -1:], keys, v, first, layer, LAYERS, SCALE, memory, layers))
            assert not isinstance(found, Decline)
            kept.append(mask(found, q.shape[1], k.shape[2], len(k), first))
        return kept


def fresh(method: hsa.Method, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None = None) -> list[Tensor]:
    return Cache(method).step(q, k, v, first)


def equal(got: list[Tensor], want: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.fixture(params=FEW)
def method(request: pytest.FixtureRequest) -> hsa.Method:
    return hsa.get_method(request.param)(**FEW[request.param])


def test_every_method_that_decodes_is_tried() -> None:
    assert set(FEW) == {name for name in hsa.list_methods() if hsa.get_method(name).decodes}


def test_few_keys_are_kept_and_the_query_s_own(method: hsa.Method) -> None:
    q, k, v = tokens(2, 301)
    kept = fresh(method, q, k, v)
    assert min(float(one.float().mean()) for one in kept) < 0.4
    assert all(bool(one.any(-1).all()) for one in kept)


def test_what_is_kept_is_the_same_after_growing_cropping_and_choosing_rows(method: hsa.Method) -> None:
    q, k, v = tokens(3, 330)
    cache = Cache(method)
    for length in (200, 201, 216, 217, 290, 291):
        assert equal(cache.step(*cut(length, q, k, v)), fresh(method, *cut(length, q, k, v)))
    for memory in cache.memories:
        memory.crop(277)
    other = tokens(3, 330, seed=1)
    q, k, v = (torch.cat([a[:, :, :277], b[:, :, 277:]], 2) for a, b in zip((q, k, v), other, strict=True))
    assert equal(cache.step(*cut(278, q, k, v)), fresh(method, *cut(278, q, k, v)))
    # Beams change places, with no other length, and rows are repeated and left out.
    for rows in ([2, 0, 0], [1, 2], [0, 0, 1, 1]):
        at = torch.tensor(rows)
        q, k, v = (x[at] for x in (q, k, v))
        for memory in cache.memories:
            memory.select(at)
        assert equal(cache.step(*cut(279, q, k, v)), fresh(method, *cut(279, q, k, v)))


def test_a_row_with_padding_keeps_none_of_it_and_is_the_row_alone(method: hsa.Method) -> None:
    """Pages stand where they stand: a row whose padding is whole pages keeps what it keeps alone."""
    starts = torch.tensor([0, 64, 37, 299])
    q, k, v = tokens(4, 301)
    # What stands in padding must not matter, however large.
    for row, start in enumerate(starts.tolist()):
        k[row, :, :start] = 1e4
    cache = Cache(method)
    cache.step(q[:, :, :280], k[:, :, :280], v[:, :, :280], starts.clamp(max=279))
    kept = cache.step(q, k, v, starts)
    assert equal(kept, fresh(method, q, k, v, starts))
    for row, start in enumerate(starts.tolist()):
        assert not any(bool(one[row, :, :start].any()) for one in kept)
        assert all(bool(one[row].any(-1).all()) for one in kept)
        if start % 16 == 0:
            alone = fresh(method, *(x[row : row + 1, :, start:] for x in (q, k, v)))
            assert equal([one[row : row + 1, :, start:] for one in kept], alone)


@pytest.mark.parametrize("name", FEW)
def test_a_budget_of_all_tokens_is_dense(name: str) -> None:
    budget = hsa.get_method(name).full_budget()
    if budget is None:
        budget = {"stride": 1}
    if name == "duo":
        budget["retrieval"] = ((),) * LAYERS
    q, k, v = tokens(2, 301)
    starts = torch.tensor([5, 140])
    assert all(bool(one.all()) for one in fresh(hsa.get_method(name)(**budget), q, k, v))
    for one in fresh(hsa.get_method(name)(**budget), q, k, v, starts):
        assert torch.equal(one, (torch.arange(301) >= starts[:, None])[:, None].expand_as(one))


@pytest.mark.parametrize("name", ["sliding_window", "strided"])
def test_a_static_method_keeps_the_last_row_of_a_prompt(name: str) -> None:
    method = hsa.get_method(name)(**FEW[name])
    for length in (1, 37, 256, 301):
        q, k, v = tokens(1, length)
        ctx = Context(TokenLayout.causal(length), num_heads=4, num_kv_heads=2, head_dim=16)
        last = method.pattern(None, None, ctx).to_dense()[:, :, -1].expand(1, 4, -1)
        assert torch.equal(fresh(method, q, k, v)[0], last)


def test_equal_scores_go_to_the_earlier_pages() -> None:
    q, k, v = torch.ones(1, 4, 1, 16), torch.ones(1, 2, 160, 16), torch.ones(1, 2, 160, 16)
    step = Step(q, k, v, None, 4, LAYERS, SCALE)
    found = hsa.get_method("quest")(budget=32, recent_pages=1).decode(step)
    assert found.pages.tolist() == [[[0, 1, 2, 19]] * 2]
    found = hsa.get_method("rocket")(budget=4).decode(step)
    assert found.pages.tolist() == [[[0, 1, 2, 3]] * 2]


def test_heads_of_a_group_choose_by_the_sum_of_their_bounds() -> None:
    q, k, v = tokens(1, 301)
    step = Step(q[:, :, -1:], k, v, None, 2, LAYERS, SCALE)
    found = hsa.get_method("quest")(**PUBLISHED, budget=64).decode(step)
    assert found.pages.shape == (1, 2, 4) and found.pages.dtype == torch.int32
    pages = torch.nn.functional.pad(k, (0, 0, 0, 3), value=torch.nan).unflatten(2, (19, 16))
    edges = (pages.nan_to_num(-9e9).amax(3), pages.nan_to_num(9e9).amin(3))
    high, low = (q[:, :, -1:] * edge.repeat_interleave(2, 1) for edge in edges)
    bound = torch.maximum(high, low).sum(-1).unflatten(1, (2, 2)).sum(2)
    assert torch.equal(found.pages.long(), bound.topk(4).indices.sort(-1).values)


def test_rows_of_a_batch_choose_for_themselves() -> None:
    """The published lessismore gives the set of the first row to all of them."""
    for name in ("lessismore", "omnikv", "kascade"):
        q, k, v = tokens(2, 301)
        kept = fresh(hsa.get_method(name)(**FEW[name]), q, k, v)
        assert not torch.equal(kept[3][0], kept[3][1])
        for row in range(2):
            alone = fresh(hsa.get_method(name)(**FEW[name]), *(x[row : row + 1] for x in (q, k, v)))
            assert equal([one[row : row + 1] for one in kept], alone)


def test_layers_after_an_anchor_that_did_not_run_read_everything() -> None:
    q, k, v = tokens(1, 301)
    for name in ("omnikv", "lessismore", "kascade"):
        method = hsa.get_method(name)(**FEW[name])
        assert method.decode(Step(q[:, :, -1:], k, v, None, 3, LAYERS, SCALE)) is None


def test_duo_declines_what_it_does_not_know() -> None:
    q, k, v = tokens(1, 301)
    with pytest.raises(hsa.MethodDoesNotApply, match="must be told which heads retrieve"):
        hsa.attention(q, k, v, "duo")
    with pytest.raises(ValueError, match="`retrieval` must be"):
        hsa.get_method("duo")().check_model(None)
    for heads, why in ((((0,),), "knows the heads of 1 layers"), (((), (), (5,)), "head of keys 5 of layer 2")):
        found = hsa.get_method("duo")(retrieval=heads).decode(Step(q[:, :, -1:], k, v, None, 2, LAYERS, SCALE))
        assert isinstance(found, Decline) and why in found.reason


def test_kascade_declines_heads_that_are_not_there() -> None:
    q, k, v = tokens(1, 301)
    with pytest.raises(AssertionError):
        fresh(hsa.get_method("kascade")(budget=48, head_map=((0, 1),)), q, k, v)


@pytest.mark.parametrize("name", ["streaming", "duo"])
def test_prompts_are_read_if_asked(name: str) -> None:
    ctx = Context(TokenLayout.causal(300), num_heads=4, num_kv_heads=2, head_dim=16)
    for prompts in (False, True):
        method = hsa.get_method(name)(**hsa.get_method(name).examples()[0], prompts=prompts)
        assert method.reads_prompts is prompts
        assert (method.dense_here(ctx) is None) is prompts


@pytest.mark.parametrize(
    ("name", "params", "said"),
    [
        ("quest", {"page_size": 12}, "`page_size` must be a power of two from 8 to 64, got 12"),
        ("quest", {"page_size": 128}, "`page_size` must be a power of two from 8 to 64, got 128"),
        ("quest", {"page_size": 16.0}, "`page_size` must be an int"),
        ("quest", {"share": "all"}, "`share` must be 'group' or 'head', got 'all'"),
        ("quest", {"density": 0.5, "budget": 3}, "`budget` must be None when `density` is given"),
        ("quest", {"density": 0.0}, "`density` must be more than 0"),
        ("quest", {"budget": 0}, "`budget` must be at least 1"),
        ("quest", {"skip_layers": -1}, "`skip_layers` must be at least 0"),
        ("rocket", {"compression": 0.5}, "`compression` must be at least 1"),
        ("rocket", {"compression": "4"}, "`compression` must be a number"),
        ("omnikv", {"anchors": 3}, "`anchors` must be a list of layers"),
        ("omnikv", {"anchors": ()}, "`anchors` must be a list of layers"),
        ("lessismore", {"recent_share": 2}, "`recent_share` must be more than 0 and at most 1"),
        ("kascade", {"tile": 33}, "`tile` must be a power of two"),
        ("kascade", {"rolling": 1}, "`rolling` must be a bool"),
        ("duo", {"retrieval": 3}, "`retrieval` must be a list of heads for each layer"),
        ("streaming", {"prompts": 1}, "`prompts` must be a bool"),
        ("streaming", {"recent": 0}, "`recent` must be at least 1"),
        ("quest", {"estimate": "mean"}, "`estimate` must be 'spread' or 'bound', got 'mean'"),
    ],
)
def test_a_wrong_parameter_is_named(name: str, params: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        hsa.get_method(name)(**params)
