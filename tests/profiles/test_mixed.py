"""ProfiledMethod: heads of several methods in one launch are what each would be by itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Decline, TokenLayout
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.method import Method, PartlyDense
from hf_sparse_attn.methods.sliding_window import SlidingWindow
from hf_sparse_attn.pattern.stack import stack_heads, union_heads
from hf_sparse_attn.profiles.head_parts import equal_groups
from hf_sparse_attn.profiles.head_profile import HeadProfile, StepPlan
from hf_sparse_attn.profiles.profiled_method import ProfiledMethod
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support.patterns import FEATURES, random_pattern
from tests.support.tiny_lm import FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

GET = hsa.get_method


@dataclass(frozen=True, kw_only=True)
class Branch(Method):
    """A window, and the log-sum-exp shifted by one, so that it shows that this ran."""

    window: int = 20
    name = "branch"

    def pattern(self, q, k, ctx):
        return SlidingWindow(window=self.window, sink=1, block_size=32).pattern(q, k, ctx)

    def attention(self, q, k, v, ctx, run):
        assert q.shape[1] == ctx.num_heads and k.shape[1] == ctx.num_kv_heads and q.shape[1] % k.shape[1] == 0
        out, lse = run(q, k, v, self.pattern(None, None, ctx))
        return out * 2, lse + 1


@dataclass(frozen=True, kw_only=True)
class Never(Method):
    name = "never"
    static_reason: str = "not today"

    def pattern(self, q, k, ctx):
        return Decline(self.static_reason)


@dataclass(frozen=True, kw_only=True)
class Ordered(Method):
    """All keys, in an order that differs from head to head."""

    name = "ordered"
    same: bool = False

    def pattern(self, q, k, ctx):
        p = BlockPattern.dense(q.shape[2], k.shape[2], False, block=32)
        order = torch.rand(1, 1 if self.same else q.shape[1], k.shape[2]).argsort(-1)
        from dataclasses import replace

        return replace(p, kv_order=order)


CAUSAL = (
    GET("dense")(),
    GET("vertical_slash")(vertical=10, slash=50, block_size=16),
    GET("sliding_window")(window=40, sink=4, block_size=32),
    GET("block_topk")(block_size=32, density=0.4),
    Branch(),
    GET("sliding_window")(window=9, sink=0, block_size=64),
)
VIDEO = (
    GET("dense")(),
    GET("radial")(decay=0.5, block_size=32),
    GET("sliding_window")(window=40, sink=4, block_size=16),
    GET("block_topk")(block_size=32, density=0.3),
)
CASES = {
    "text": (CAUSAL, TokenLayout.causal(111), [1, 3, 2, 0, 5, 1]),
    "apart": (CAUSAL, TokenLayout.causal(111), [4, 3, 4, 0, 4, 1]),
    "only_apart": (CAUSAL, TokenLayout.causal(63), [4, 0, 4, 4, 4, 0]),
    "chunk": (CAUSAL, TokenLayout.causal(300).continued(77), [1, 3, 2, 0, 5, 4]),
    "video": (VIDEO, TokenLayout.video(5, 7, 13), [1, 3, 2, 0, 2, 1]),
    "video_text": (VIDEO, TokenLayout.video(3, 9, 11, text_before=5, text_after=21), [3, 1, 2, 2, 3, 1]),
}


def profile(methods: Any, row: Any, heads: int = 6, kv_heads: int = 3, steps=((0.0, 1.0),), **given: Any):
    """Rows of a choice [heads], [layers, heads] or one of these per step range."""
    row = np.array(row)
    choices = row if row.ndim == 3 else np.array(row)[None] if row.ndim == 2 else row[None, None]
    plans = tuple(StepPlan(s, c) for s, c in zip(steps, choices, strict=True))
    model = Fingerprint("X", "llama", choices.shape[1], heads, kv_heads, 16, "", "")
    figures = {"density": np.full(choices.shape, math.nan)}
    return HeadProfile(model, methods, plans, figures, "published", {}, {}, **given)


def call(layout: TokenLayout, heads=6, kv_heads=3, batch=2, dtype=torch.float64, **given: Any):
    ctx = Context(layout, num_heads=heads, num_kv_heads=kv_heads, head_dim=16, **given)
    draw = torch.Generator().manual_seed(0)

    def tensor(heads: int, n: int) -> torch.Tensor:
        return torch.randn(batch, n, heads, 16, generator=draw).to(dtype).transpose(1, 2)

    return ctx, tensor(heads, layout.q_len), tensor(kv_heads, layout.kv_len), tensor(kv_heads, layout.kv_len)


def masks(found: BlockPattern, batch: int, heads: int) -> torch.Tensor:
    return found.validate().to_dense().expand(batch, heads, -1, -1)


# ------------------------------------------------------------------ each head alone


@pytest.mark.parametrize("kv_heads", [1, 3, 6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("case", CASES)
def test_every_head_is_what_its_method_alone_gives(case: str, dtype: torch.dtype, kv_heads: int) -> None:
    methods, layout, row = CASES[case]
    method = profile(methods, row, kv_heads=kv_heads).method()
    ctx, q, k, v = call(layout, kv_heads=kv_heads, dtype=dtype)
    out, lse = hsa.attention(q, k, v, method, ctx, return_lse=True)
    pattern = masks(method.pattern(q, k, ctx), 2, 6)
    # Twenty roundings: the blocks are cut differently, so that sums are added up in another order.
    tolerance = 20 * torch.finfo(dtype).eps
    for head, index in enumerate(row):
        alone, alone_lse = hsa.attention(q, k, v, methods[index], ctx, return_lse=True)
        assert float((out[:, head] - alone[:, head]).abs().max()) <= tolerance * float(alone.abs().max())
        assert float((lse[:, head] - alone_lse[:, head]).abs().max()) <= tolerance * float(alone_lse.abs().max())
        if methods[index].name != "branch":
            single = masks(methods[index].pattern_for(q, k, ctx), 2, 6)
            assert torch.equal(pattern[:, head], single[:, head])


def test_a_batch_is_its_items() -> None:
    methods, layout, row = CASES["text"]
    method = profile(methods, row).method()
    ctx, q, k, v = call(layout)
    whole = hsa.attention(q, k, v, method, ctx)
    for b in range(2):
        one = hsa.attention(q[b : b + 1], k[b : b + 1], v[b : b + 1], method, ctx)
        torch.testing.assert_close(one, whole[b : b + 1], rtol=0, atol=1e-13)


@pytest.mark.parametrize("index", [1, 2, 3, 4])
def test_equal_plans_are_the_single_method_to_the_bit(index: int) -> None:
    ctx, q, k, v = call(TokenLayout.causal(111), dtype=torch.float32)
    mixed = hsa.attention(q, k, v, profile(CAUSAL, [index] * 6).method(), ctx, return_lse=True)
    single = hsa.attention(q, k, v, CAUSAL[index], ctx, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(mixed, single, strict=True))


def test_one_launch_for_all_but_those_with_a_branch() -> None:
    ctx, q, k, v = call(TokenLayout.causal(111))
    for case, launches in (("text", 1), ("apart", 2), ("only_apart", 3)):
        sizes = []

        def run(q, k, v, pattern, sizes=sizes):
            sizes.append((q.shape[1], k.shape[1]))
            return hsa.attention(q, k, v, pattern, return_lse=True)

        method = profile(CAUSAL, CASES[case][2]).method()
        method.attention(q, k, v, ctx, run)
        # Heads 0, 2, 4 have a branch, one in each group; in the last case 0 and 4 in one, 2 and 3 in another.
        assert len(sizes) == launches
        assert sizes[-1] == (6, 3) or case == "only_apart"


def test_heads_go_by_groups_with_equally_many() -> None:
    ctx = Context(TokenLayout.causal(9), num_heads=8, num_kv_heads=4)
    assert equal_groups([7, 0, 1, 2, 6], ctx) == [([0, 1, 6, 7], [0, 3]), ([2], [1])]
    assert equal_groups(list(range(8)), ctx) == [(list(range(8)), [0, 1, 2, 3])]


def test_keys_are_never_repeated() -> None:
    @dataclass(frozen=True, kw_only=True)
    class Spy(Method):
        name = "spy"

        def pattern(self, q, k, ctx):
            seen.append((q.shape[1], k.shape[1], ctx.num_heads, ctx.num_kv_heads))
            return BlockPattern.dense(q.shape[2], k.shape[2], True, block=32)

    seen: list[tuple] = []
    ctx, q, k, _ = call(TokenLayout.causal(40), heads=8, kv_heads=2)
    profile((CAUSAL[0], Spy()), [1, 1, 0, 0, 1, 0, 0, 0], 8, 2).method().pattern(q, k, ctx)
    assert seen == [(2, 1, 2, 1), (1, 1, 1, 1)]


def test_gradients_are_those_of_single_methods() -> None:
    methods, layout, row = CASES["apart"]
    ctx, *inputs = call(layout, batch=1)
    grads = []
    for mixed in (True, False):
        q, k, v = (t.clone().requires_grad_() for t in inputs)
        if mixed:
            out = hsa.attention(q, k, v, profile(methods, row).method(), ctx)
        else:
            alone = [hsa.attention(q, k, v, methods[i], ctx)[:, h] for h, i in enumerate(row)]
            out = torch.stack(alone, 1)
        (out * torch.linspace(0, 1, 16)).sum().backward()
        grads.append((q.grad, k.grad, v.grad))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


# ------------------------------------------------------------------ where heads are dense


def test_a_method_that_declines_leaves_its_heads_dense_and_says_why() -> None:
    methods = (*CAUSAL[:2], Never())
    ctx, q, k, v = call(TokenLayout.causal(111))
    method = profile(methods, [2, 1, 1, 2, 0, 1]).method()
    done = method.attention(q, k, v, ctx, lambda q, k, v, p: hsa.attention(q, k, v, p, return_lse=True))
    assert isinstance(done, PartlyDense) and done.reasons == ("heads 0, 3 dense: not today",)
    dense = hsa.attention(q, k, v, "dense", ctx)
    torch.testing.assert_close(done[0][:, [0, 3, 4]], dense[:, [0, 3, 4]], rtol=0, atol=1e-13)
    every = profile(methods, [2, 0, 2, 2, 0, 2]).method()
    with pytest.raises(hsa.MethodDoesNotApply, match="does not apply: head"):
        hsa.attention(q, k, v, every, ctx)


def test_declined_heads_are_in_the_report_or_raise() -> None:
    model = FAMILIES["llama"]("sdpa")
    made = profile((*CAUSAL[:3], Never()), [[3, 2, 1, 2], [0, 3, 0, 3]], 4, 2)
    object.__setattr__(made, "model", Fingerprint.of(model))
    with torch.no_grad(), hsa.patch(model, made, min_tokens=0) as patch:
        model(input_ids=tokens(1, 111))
        first, second = patch.report().layers
    assert first.sparse_calls == 1 and first.partly_dense == {"head 0 dense: not today": 1} and not first.reasons
    assert second.dense_calls == 1 and second.reasons == {"heads 1, 3 dense: not today": 1}
    assert "head 0 dense: not today" in str(patch.report())
    with torch.no_grad(), hsa.patch(model, made, min_tokens=0, strict=True):
        with pytest.raises(hsa.DenseFallback, match="head 0 dense: not today"):
            model(input_ids=tokens(1, 111))


def test_layers_that_are_dense_by_choice_are_no_fallback() -> None:
    model = FAMILIES["llama"]("sdpa")
    made = profile(CAUSAL, [[0, 0, 0, 0], [1, 2, 2, 0]], 4, 2)
    object.__setattr__(made, "model", Fingerprint.of(model))
    with torch.no_grad():
        with hsa.patch(model, made, min_tokens=0, strict=True) as patch:
            model(input_ids=tokens(1, 111))
            first, second = patch.report().layers
        assert first.reasons == {"dense by the profile": 1} and second.sparse_calls == 1
        before = model(input_ids=tokens(1, 111)).logits
        object.__setattr__(made, "plans", (StepPlan((0.0, 1.0), np.zeros((2, 4), np.int16)),))
        with hsa.patch(model, made, min_tokens=0, strict=True):
            assert torch.equal(model(input_ids=tokens(1, 111)).logits, before)


def test_a_call_with_other_heads_declines() -> None:
    ctx, q, k, v = call(TokenLayout.causal(40), heads=4, kv_heads=2)
    with pytest.raises(hsa.MethodDoesNotApply, match=r"1 layers of 6 heads, the call is of layer 0 with 4 heads"):
        hsa.attention(q, k, v, profile(CAUSAL, [1] * 6).method(), ctx)
    assert isinstance(profile(CAUSAL, [1] * 6).method().pattern(q, k, ctx), Decline)


# ------------------------------------------------------------------ steps, layers, what a profile says of itself


def test_the_choice_follows_layer_and_step() -> None:
    rows = [[[1] * 6, [2] * 6], [[3] * 6, [5] * 6]]
    method = profile(CAUSAL, rows, steps=((0.0, 0.24), (0.24, 1.0))).method()
    for layer in (0, 1):
        for step in range(4):
            ctx, q, k, _ = call(TokenLayout.causal(111), layer=layer, num_layers=2, step=step, num_steps=4)
            single = CAUSAL[rows[int(step >= 1)][layer][0]].pattern_for(q, k, ctx)
            assert torch.equal(masks(method.pattern(q, k, ctx), 2, 6), masks(single, 2, 6))


def test_what_it_needs_and_is_comes_from_the_methods_in_use() -> None:
    method = profile(VIDEO, [0, 1, 2, 2, 1, 0]).method()
    assert method.static and method.trainable and method.needs == {"bidirectional", "video grid"}
    assert not profile(VIDEO, [0, 3, 2, 2, 2, 0]).method().static
    assert profile(CAUSAL, [0, 2, 2, 2, 2, 0]).method().needs == frozenset()
    assert not profile(CAUSAL, [4, 2, 2, 2, 2, 0]).method().static
    assert method.params()["model"] == "X" and method.requested_density(7) is None
    with pytest.raises(hsa.MethodDoesNotApply, match=r"needs .*video segment"):
        made = profile(VIDEO, [[1, 2, 2, 1]] * 2, 4, 2)
        model = FAMILIES["llama"]("sdpa")
        object.__setattr__(made, "model", Fingerprint.of(model))
        hsa.patch(model, made)


def test_least_density_is_the_mean() -> None:
    ctx, *_ = call(TokenLayout.causal(400))
    found = profile(CAUSAL, [0, 2, 2, 3, 3, 3]).method().least_density(ctx)
    assert found == pytest.approx((1 + 2 * CAUSAL[2].least_density(ctx) + 3 * 0.4) / 6)


def test_every_dynamic_method_of_a_mix_takes_its_time() -> None:
    ctx = call(TokenLayout.causal(200))[0]
    dynamic = [i for i, method in enumerate(CAUSAL) if not method.static]
    mixed = profile(CAUSAL, (dynamic[0], dynamic[1], 0, 2, 2, dynamic[0])).method()
    assert mixed.choices(ctx) == 4 and profile(CAUSAL, [dynamic[0]] * 6).method().choices(ctx) == 1
    table, shape = cost.table_for(torch.device("cpu")), cost.Shape(200, 200, True, 6, 16, "float32")
    assert table.choosing_seconds(shape, 100.0, 4) > 3 * table.choosing_seconds(shape, 100.0)


def test_static_patterns_stay() -> None:
    methods, layout, _ = CASES["video"]
    method = profile(methods, [1, 2, 2, 0, 2, 1]).method()
    ctx, q, k, _ = call(layout)
    assert method.pattern(q, k, ctx) is method.pattern(q, k, ctx)
    other, q, k, _ = call(TokenLayout.video(3, 7, 13))
    assert method.pattern(q, k, other) is not method.pattern(None, None, ctx)
    with pytest.raises(TypeError, match="block_topk chooses by content"):
        profile(methods, [3] * 5 + [1]).method().pattern(None, None, ctx)


def test_kept_patterns_are_bounded(monkeypatch: Any) -> None:
    from hf_sparse_attn.profiles import profiled_method as mixed

    method = profile(CAUSAL, [2, 2, 5, 5, 0, 2]).method()
    monkeypatch.setattr(mixed, "_KEPT_BYTES", 20_000)
    for n in range(200, 220):
        method.pattern(None, None, call(TokenLayout.causal(n))[0])
    assert 1 <= len(method._kept) < 10


# ------------------------------------------------------------------ patched models


def patched(made: HeadProfile, model: Any, **options: Any) -> hsa.Patch:
    object.__setattr__(made, "model", Fingerprint.of(model))
    return hsa.patch(model, made, min_tokens=0, **options)


def test_a_padded_batch_is_its_texts() -> None:
    model = FAMILIES["llama"]("sdpa").double()
    ids, mask, singles = padded([111, 63, 90], "left")
    made = profile(CAUSAL, [[1, 2, 0, 3], [5, 5, 4, 2]], 4, 2)
    with torch.no_grad(), patched(made, model) as patch:
        out = model(input_ids=ids, attention_mask=mask, position_ids=positions(mask)).logits
        for row, single in enumerate(singles):
            alone = model(input_ids=single).logits[0]
            torch.testing.assert_close(out[row, -len(alone) :], alone, rtol=0, atol=1e-11)
        assert all(not r.dense_calls for r in patch.report().layers)


def test_chunked_prefill_of_static_methods_is_one_prefill() -> None:
    model = FAMILIES["llama"]("sdpa").double()
    ids = tokens(1, 150)
    made = profile(CAUSAL, [[2, 2, 0, 5], [5, 5, 2, 2]], 4, 2)
    with torch.no_grad(), patched(made, model):
        whole = model(input_ids=ids).logits
        first = model(input_ids=ids[:, :70], use_cache=True)
        second = model(input_ids=ids[:, 70:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-11)


def test_compiled_and_eager_agree() -> None:
    model = FAMILIES["llama"]("sdpa")
    made = profile(CAUSAL, [[1, 2, 0, 3], [5, 5, 4, 2]], 4, 2)
    ids = tokens(1, 111)
    with torch.no_grad(), patched(made, model):
        eager = model(input_ids=ids).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids).logits
    torch.compiler.reset()
    torch.testing.assert_close(compiled, eager, rtol=0, atol=1e-5)


def test_density_counts_every_head_once() -> None:
    model = FAMILIES["llama"]("sdpa")
    row = [4, 2, 4, 0]
    ctx, q, k, _ = call(TokenLayout.causal(111), heads=4, kv_heads=2)
    wanted = sum(CAUSAL[i].pattern(q, k, ctx).density("causal") for i in row) / 4
    with torch.no_grad(), patched(profile(CAUSAL, [row, row], 4, 2), model) as patch:
        model(input_ids=tokens(1, 111))
        assert patch.report().density == pytest.approx(wanted)


def test_layers_do_not_share_what_the_judge_knows() -> None:
    """A layer that can never pay says nothing of one that does."""
    model = FAMILIES["llama"]("sdpa")
    near_dense = GET("block_topk")(block_size=32, density=1.0)
    made = profile((CAUSAL[0], near_dense, CAUSAL[5]), [[1] * 4, [2] * 4], 4, 2)
    object.__setattr__(made, "model", Fingerprint.of(model))
    method = made.method()
    contexts = [call(TokenLayout.causal(4096), 4, 2, batch=1, layer=i, num_layers=2) for i in (0, 1)]
    from hf_sparse_attn.cost.judge import Judge

    judge = Judge(method, "auto")
    found = [judge.bound(q, ctx)[0] for ctx, q, _, _ in contexts]
    assert len(judge.bounds) == 2 and found[1] is None


# ------------------------------------------------------------------ groups that share


@pytest.mark.parametrize("group", [2, 3])
@pytest.mark.parametrize("layout", ["text", "chunk", "video"])
def test_heads_of_a_group_read_the_union(layout: str, group: int) -> None:
    methods, tokens_, row = CASES[layout]
    row = [*(0 if methods[i].name == "branch" else i for i in row[:5]), 1]
    kv_heads = 6 // group
    ctx, q, k, v = call(tokens_, kv_heads=kv_heads)
    apart = masks(profile(methods, row, 6, kv_heads).method().pattern(q, k, ctx), 2, 6)
    method = profile(methods, row, 6, kv_heads, same_in_group=True).method()
    shared = masks(method.pattern(q, k, ctx), 2, 6).unflatten(1, (kv_heads, group))
    assert bool((shared == shared[:, :, :1]).all())
    union = apart.unflatten(1, (kv_heads, group)).any(2)
    assert not bool((union & ~shared[:, :, 0]).any())
    if tokens_.is_causal:
        later = torch.ones(tokens_.q_len, tokens_.kv_len, dtype=torch.bool).triu(tokens_.query_start + 1)
        assert not bool((shared & later).any())
    else:
        # Nothing here is unaligned: the union is exact.
        assert torch.equal(union, shared[:, :, 0])
    out = hsa.attention(q, k, v, method, ctx)
    alone = hsa.attention(q, k, v, method.pattern(q, k, ctx), ctx)
    assert torch.equal(out, alone)


def test_a_branch_stays_out_of_the_union() -> None:
    ctx, q, k, v = call(TokenLayout.causal(111))
    row = [4, 3, 2, 5, 4, 4]
    shared = profile(CAUSAL, row, same_in_group=True).method()
    apart = profile(CAUSAL, row).method()
    out, alone = hsa.attention(q, k, v, shared, ctx), hsa.attention(q, k, v, apart, ctx)
    # Head 1 shares its keys with a head that runs by itself: there is nothing to unite.
    torch.testing.assert_close(out[:, [0, 1, 4, 5]], alone[:, [0, 1, 4, 5]], rtol=0, atol=1e-13)
    assert not torch.equal(out[:, 3], alone[:, 3])


def test_orders_of_their_own_cannot_be_united() -> None:
    ctx, q, k, v = call(TokenLayout.bidirectional(111))
    methods = (GET("dense")(), Ordered(), Ordered(same=True))
    with pytest.raises(hsa.MethodDoesNotApply, match=r"same_in_group: .* must have one `kv_order`"):
        hsa.attention(q, k, v, profile(methods, [1, 1, 0, 0, 0, 0], same_in_group=True).method(), ctx)
    dense = hsa.attention(q, k, v, "dense", ctx)
    for row in ([1, 1, 0, 1, 0, 0], [2, 2, 0, 2, 0, 1]):
        out = hsa.attention(q, k, v, profile(methods, row).method(), ctx)
        torch.testing.assert_close(out, dense, rtol=0, atol=1e-12)


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("q_order", "kv_order", "all")])
def test_union_of_random_patterns(feature: str) -> None:
    p = random_pattern(111, 150, heads=6, batch=2, seed=3, **{"keep": 0.3, **FEATURES[feature]})
    united = union_heads(p, 3).validate()
    mask, wanted = united.to_dense(), p.to_dense().unflatten(1, (2, 3)).any(2)
    assert not bool((wanted & ~mask).any())
    if feature in ("aligned", "aligned_tiles", "nothing"):
        assert torch.equal(mask, wanted)


def test_union_with_orders_that_are_the_same() -> None:
    p = random_pattern(111, 150, heads=4, aligned=True, q_order=(1, 1), kv_order=(1, 1))
    assert torch.equal(union_heads(p, 2).validate().to_dense(), p.to_dense().unflatten(1, (2, 2)).any(2))
    with pytest.raises(ValueError, match="`group` must divide 4 heads, got 3"):
        union_heads(p, 3)
    with pytest.raises(ValueError, match="must have one `q_order`"):
        union_heads(random_pattern(64, 64, heads=4, q_order=(1, 4)), 2)
    assert union_heads(p, 1) is p


# ------------------------------------------------------------------ stacking in an order


@pytest.mark.parametrize("feature", FEATURES)
def test_stacking_in_an_order(feature: str) -> None:
    given = {k: v for k, v in FEATURES[feature].items() if k != "kv_range"}
    parts = [random_pattern(111, 150, heads=h, batch=b, seed=h, **given) for h, b in ((3, 2), (1, 1), (2, 2))]
    order = [5, 0, 3, 3, 1]
    every = torch.cat([p.to_dense().expand(2, -1, -1, -1) for p in parts], 1)
    stacked = stack_heads(parts, order).validate()
    assert torch.equal(stacked.to_dense(), every[:, order])
    assert torch.equal(stack_heads(parts).to_dense(), every)


def test_patterns_that_tell_heads_apart_by_orders_alone() -> None:
    p = random_pattern(64, 64, kv_order=(2, 3))
    other = random_pattern(64, 64, heads=2, seed=1)
    every = torch.cat([p.to_dense(), other.to_dense().expand(2, -1, -1, -1)], 1)
    assert torch.equal(stack_heads([p, other], [4, 2, 0]).validate().to_dense(), every[:, [4, 2, 0]])


@pytest.mark.parametrize("order", [[], [3], [-1]])
def test_an_order_names_heads_that_are_there(order: list[int]) -> None:
    with pytest.raises(ValueError, match="`order` must be numbers of 3 heads"):
        stack_heads([random_pattern(64, 64, heads=3)], order)


def test_a_method_of_a_profile_has_no_knob() -> None:
    with pytest.raises(TypeError, match="no parameter that sets its density"):
        ProfiledMethod(profile=profile(CAUSAL, [1] * 6)).turned(0.5)


@pytest.mark.parametrize("more", [1, 2])
def test_methods_that_share_an_estimate_make_it_once(monkeypatch: pytest.MonkeyPatch, more: int) -> None:
    """Six heads of five settings keep what each would by itself; two calls if no head is to be estimated in vain."""
    monkeypatch.setattr("hf_sparse_attn.profiles.head_parts._MORE_HEADS", more)
    from hf_sparse_attn.methods.vertical_slash import VerticalSlash
    from hf_sparse_attn.methods.xattention import XAttention

    methods = (
        GET("dense")(),
        *(XAttention(density=share, stride=8, block_size=32) for share in (0.2, 0.4)),
        *(VerticalSlash(vertical=v, slash=s, block_size=16) for v, s in ((20, 60), (60, 51))),
        XAttention(threshold=0.5, stride=8, block_size=32),
    )
    heads, kv_heads, n = 6, 3, 300
    choice = (1, 3, 2, 1, 5, 2)
    ctx = Context(TokenLayout.causal(n), num_layers=1, num_heads=heads, num_kv_heads=kv_heads, head_dim=16)
    q, k = torch.randn(2, heads, n, 16).cumsum(2) * 0.3, torch.randn(2, kv_heads, n, 16).cumsum(2) * 0.3
    called: list[str] = []
    for kind in (XAttention, VerticalSlash):
        own = kind.estimate
        monkeypatch.setattr(kind, "estimate", lambda self, *a, own=own: (called.append(self.name), own(self, *a))[1])
    mixed = profile(methods, choice).method().pattern(q, k, ctx).to_dense()
    assert sorted(called) == ["vertical_slash", "xattention", "xattention"][: 4 - more]
    for head, index in enumerate(choice):
        kv = head // 2
        one = Context(TokenLayout.causal(n), num_heads=1, num_kv_heads=1, head_dim=16)
        alone = methods[index].pattern_for(q[:, head : head + 1], k[:, kv : kv + 1], one)
        assert torch.equal(mixed[:, head], alone.to_dense()[:, 0]), head
