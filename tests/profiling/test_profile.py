"""Measuring heads and choosing for them: figures against brute force, and models left as they were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.patching import PATCH_ATTRIBUTE
from hf_sparse_attn.profiling import run as profiling
from hf_sparse_attn.profiling.measure import measure
from hf_sparse_attn.profiling.observe import Seen, observing
from hf_sparse_attn.profiling.probe import UNIT, Probe, sample_units
from hf_sparse_attn.profiling.tally import Tally
from hf_sparse_attn.registry import FAMILIES as FAMILIES_OF_MODELS
from tests.support import tiny_wan
from tests.support.patterns import Largest
from tests.support.tiny_lm import FAMILIES, padded, tiny_vl, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILY_NAMES = FAMILIES_OF_MODELS.names()


def window(size: int = 24, sink: int = 2) -> Method:
    return hsa.get_method("sliding_window")(window=size, sink=sink, block_size=16)


def topk(density: float = 0.3) -> Method:
    return hsa.get_method("block_topk")(density=density, block_size=16)


def quiet(model: Any, batches: Any, candidates: Any = None, *rest: Any, **options: Any) -> Any:
    chosen = [window(), topk()] if candidates is None else candidates
    return measure(model, batches, chosen, *rest, **{"progress": False, "maps": 0, **options})


def seen(n: int = 333, layout: TokenLayout | None = None, grad: bool = False, dim: int = 16, batch: int = 1) -> Seen:
    """A call with four heads of two key/value heads."""
    layout = TokenLayout.causal(n) if layout is None else layout
    made = torch.Generator().manual_seed(1)
    q, k, v, g = (torch.randn(batch, h, layout.kv_len, dim, generator=made) for h in (4, 2, 2, 4))
    q = 2 * q[:, :, layout.query_start :]
    ctx = Context(layout, num_heads=4, num_kv_heads=2, head_dim=dim)
    return Seen("layer", q, k, v, ctx, g[:, :, layout.query_start :] if grad else None)


def brute_force(call: Seen, pattern: hsa.BlockPattern) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Dense weights in float64, the kept ones of them, and v per query head."""
    k, v = (t.double().repeat_interleave(2, 1) for t in (call.k, call.v))
    logits = call.q.double() @ k.mT * call.ctx.softmax_scale
    layout = call.ctx.layout
    if layout.is_causal:
        mask = torch.arange(layout.kv_len) > torch.arange(layout.query_start, layout.kv_len)[:, None]
        logits = logits.masked_fill(mask, -torch.inf)
    weights = logits.softmax(-1)
    return weights, weights * pattern.to_dense().expand_as(weights), v


LAYOUTS = {
    "causal": TokenLayout.causal(333),
    "chunk": TokenLayout.causal(333).continued(100),
    "both_ways": TokenLayout.bidirectional(300),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_figures_are_those_of_brute_force(layout: TokenLayout) -> None:
    call = seen(layout=layout, grad=True, batch=2)
    method = topk()
    found = Probe(call).measure(method)
    weights, kept, v = brute_force(call, method.pattern_for(call.q, call.k, call.ctx))
    dense, sparse = weights @ v, kept / kept.sum(-1, keepdim=True) @ v
    torch.testing.assert_close(found.figures["recall"], kept.sum(-1).mean((0, 2)), rtol=1e-5, atol=1e-6)
    error = ((sparse - dense).norm(dim=-1) / dense.norm(dim=-1)).transpose(0, 1).flatten(1)
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(found.figures["output_error"], error.median(1).values, **close)
    rank = min(error.shape[1] - 1, int(0.95 * error.shape[1]))
    torch.testing.assert_close(found.figures["output_error_p95"], error.sort(1).values[:, rank], **close)
    torch.testing.assert_close(found.figures["video_mse"], (sparse - dense).square().mean((0, 2, 3)), **close)
    # MoA's sum over the cells of the attention matrix: dL/dA times the change of A.
    by_cell = (call.grad.double() @ v.mT) * (kept / kept.sum(-1, keepdim=True) - weights)
    torch.testing.assert_close(found.figures["influence"], by_cell.sum((0, 2, 3)).abs(), rtol=1e-3, atol=1e-4)


@dataclass(frozen=True, kw_only=True)
class Reordered(Method):
    """A window over shuffled tokens, another order for every head; a second pass reads a few more keys."""

    passes: int = 1

    def pattern(self, q: Any, k: Any, ctx: Context) -> hsa.BlockPattern:
        made = torch.Generator().manual_seed(2)
        n = ctx.layout.kv_len
        order = torch.stack([torch.randperm(n, generator=made) for _ in range(q.shape[1])])[None]
        keep = (torch.arange(-(-n // 16)) - torch.arange(-(-n // 32))[:, None] * 2).abs() < 3
        pattern = hsa.BlockPattern.from_block_map(keep[None, None], 32, 16, n, n)
        return replace(pattern, q_order=order, kv_order=order)

    def attention(self, q: Any, k: Any, v: Any, ctx: Context, run: Any) -> Any:
        from hf_sparse_attn.selection import merge_by_lse

        pattern = self.pattern(q, k, ctx)
        first = run(q, k, v, pattern)
        if self.passes == 1:
            return first
        mask = ~pattern.to_dense() & (torch.arange(ctx.layout.kv_len) < 40)
        return merge_by_lse(first, run(q, k, v, hsa.BlockPattern.from_token_mask(mask, 16, 16)))


SAMPLED = {
    "causal": (TokenLayout.causal(700), window()),
    "chosen": (TokenLayout.causal(700), hsa.get_method("vertical_slash")(vertical=9, slash=60, block_size=32)),
    "chunk": (TokenLayout.causal(700).continued(57), topk()),
    "both_ways": (TokenLayout.bidirectional(650), topk()),
    "orders": (TokenLayout.bidirectional(650), Reordered()),
    "two_passes": (TokenLayout.bidirectional(650), Reordered(passes=2)),
}


@pytest.mark.parametrize("layout, method", SAMPLED.values(), ids=SAMPLED.keys())
def test_sampling_all_rows_is_no_sampling(layout: TokenLayout, method: Method) -> None:
    call = seen(layout=layout, grad=True)
    whole = Probe(call).measure(method)
    every = Probe(call, torch.arange(-(-layout.q_len // UNIT))).measure(method)
    for name, value in whole.figures.items():
        torch.testing.assert_close(every.figures[name], value, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("layout, method", [SAMPLED["causal"], SAMPLED["orders"]], ids=["causal", "orders"])
def test_sampled_rows_are_compared_with_their_own(layout: TokenLayout, method: Method) -> None:
    call = seen(layout=layout)
    units = torch.tensor([1, 4])
    found = Probe(call, units).measure(method)
    pattern = found.patterns[0]
    _, kept, _ = brute_force(call, pattern)
    places = (units[:, None] * UNIT + torch.arange(UNIT)).flatten()
    tokens_of = places.expand(1, 4, -1) if pattern.q_order is None else pattern.q_order[:, :, places]
    want = kept.sum(-1).gather(2, tokens_of).mean((0, 2))
    torch.testing.assert_close(found.figures["recall"], want, rtol=1e-5, atol=1e-6)
    assert float(found.figures["density"][0]) == pytest.approx(pattern.density(layout.density_count))


def test_units_are_spread_and_seeded() -> None:
    assert sample_units(32 * UNIT, None, 0) is None and sample_units(3 * UNIT, 3, 0) is None
    found = sample_units(100 * UNIT + 1, 7, 5)
    assert found.tolist() == sample_units(100 * UNIT + 1, 7, 5).tolist() != sample_units(100 * UNIT + 1, 7, 6).tolist()
    edges = [101 * i // 7 for i in range(8)]
    assert all(a <= x < b for a, x, b in zip(edges, found.tolist(), edges[1:], strict=False))


def test_retrieval_counts_the_weight_on_the_needles() -> None:
    call, method = seen(), topk()
    needles = [([300, 301], [17, 18, 19]), ([310], [200])]
    found = Probe(call, sample_units(333, 1, 0), needles).measure(method)
    weights, kept, _ = brute_force(call, method.pattern_for(call.q, call.k, call.ctx))
    lost = [(weights - kept)[0, :, i][:, stated].sum(-1) for asked, stated in needles for i in asked]
    torch.testing.assert_close(found.figures["retrieval_score"], 1 - torch.stack(lost).mean(0), rtol=1e-5, atol=1e-6)


def test_needles_must_lie_in_the_tokens() -> None:
    with pytest.raises(ValueError, match=r"`needles` must lie in one unpadded row of 333 tokens.*position 333"):
        Probe(seen(), None, [([333], [1])])


@dataclass(frozen=True, kw_only=True)
class Blend(Method):
    """One head moved a little from dense towards a candidate."""

    candidate: Method
    layer: int
    head: int
    share: float

    def attention(self, q: Any, k: Any, v: Any, ctx: Context, run: Any) -> Any:
        dense = run(q, k, v, hsa.BlockPattern.dense(q.shape[2], k.shape[2], True))
        sparse = run(q, k, v, self.candidate.pattern_for(q, k, ctx))[0]
        if ctx.layer == self.layer:
            dense[0][:, self.head] += self.share * (sparse - dense[0])[:, self.head]
        return dense


def test_influence_is_the_slope_of_the_loss() -> None:
    model, ids = FAMILIES["llama"]().double(), tokens(1, 90)
    found = quiet(model, [{"input_ids": ids, "labels": ids}], [window(20, 1)], ("influence",))
    assert all(p.grad is None for p in model.parameters())
    for layer, head in ((0, 1), (1, 2)):
        loss = []
        for share in (-1e-3, 1e-3):
            method = Blend(candidate=window(20, 1), layer=layer, head=head, share=share)
            with hsa.patch(model, method, min_tokens=0), torch.no_grad():
                logits = model(ids).logits
            # The model's own loss, and its norms, are in float32, too coarse for a smaller step.
            loss.append(float(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])))
        slope = abs(loss[1] - loss[0]) / 2e-3
        assert found.figures["influence"][0, layer, head, 1] == pytest.approx(slope, rel=5e-3)


# ------------------------------------------------------------------ models are left as they were


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """Fails when it is asked."""

    seen: list[Any] = field(default_factory=list, hash=False, compare=False)

    def pattern(self, q: Any, k: Any, ctx: Context) -> hsa.BlockPattern:
        raise RuntimeError("broken")


@pytest.mark.parametrize("metric", ["output_error", "influence"])
@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_text_model_is_left_as_it_was(metric: str, fails: bool) -> None:
    model, ids = FAMILIES["llama"]().train(), tokens(1, 80)
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        before = model.eval()(ids).logits
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            quiet(model, [{"input_ids": ids, "labels": ids}], [window(), Broken()], (metric,))
    else:
        quiet(model, [{"input_ids": ids, "labels": ids}], None, (metric,))
    assert [m.training for m in model.modules()] == modes
    assert all(PATCH_ATTRIBUTE not in m.__dict__ and not m._forward_hooks for m in model.modules())
    assert model.config._attn_implementation == "sdpa" and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model.eval()(ids).logits, before)


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
def test_a_video_model_is_left_as_it_was(fails: bool) -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    before, state = tiny_wan.run(model, **given), tiny_wan.state(model)
    if fails:
        with pytest.raises(RuntimeError, match="broken"):
            quiet(model, [given], [topk(), Broken()])
    else:
        found = quiet(model, [given], [topk()], ("video_mse",))
        assert found.cases[0].tokens == 5 * 7 * 13 and (found.figures["video_mse"][..., 1] > 0).all()
    tiny_wan.assert_same(state, tiny_wan.state(model))
    assert torch.equal(tiny_wan.run(model, **given), before)


def test_a_patched_model_is_refused() -> None:
    model = FAMILIES["llama"]()
    with hsa.patch(model, "dense"), pytest.raises(ValueError, match="must not be patched already"):
        quiet(model, [tokens(1, 40)])


# ------------------------------------------------------------------ what is seen


def test_the_observer_sees_what_the_layers_compute() -> None:
    model, ids = FAMILIES["gemma2"](), tokens(1, 60)
    calls: list[Seen] = []
    with observing(model, calls.append), torch.no_grad():
        model(ids)
    # The first layer has a window of its own, and is left to it.
    assert [(c.ctx.layer, tuple(c.q.shape), tuple(c.k.shape)) for c in calls] == [(1, (1, 4, 60, 8), (1, 2, 60, 8))]
    assert calls[0].ctx.softcap == 50 and calls[0].ctx.scale == 24**-0.5


def test_padding_and_decoding_are_no_part_of_it() -> None:
    model = FAMILIES["llama"]()
    ids, mask, _ = padded([70, 33], "left")
    calls: list[Seen] = []
    with observing(model, calls.append), torch.no_grad():
        model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False)
    assert [(c.ctx.layer, c.q.shape[2], c.ctx.layout.kv_len) for c in calls] == [
        (0, 70, 70), (0, 33, 33), (1, 70, 70), (1, 33, 33),
    ]  # fmt: skip


def test_a_vision_language_model() -> None:
    model, given = tiny_vl("sdpa")
    found = quiet(model, [given], [window()])
    assert np.isfinite(found.figures["recall"]).all() and (found.figures["recall"][..., 1] < 1).all()


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_every_family_can_be_profiled(family: str) -> None:
    model, given = FAMILIES_OF_MODELS.get(family).tiny()
    if getattr(FAMILIES_OF_MODELS.get(family), "requires", None):
        with pytest.raises(ValueError, match=r"`model` must be one whose keys are to be chosen; .* selects its own"):
            quiet(model, [given], ["block_topk"])
        return
    found = quiet(model, [given], ["block_topk"], maps=2)
    recall = found.figures["recall"][..., 1]
    assert np.isfinite(recall).any() and (recall[np.isfinite(recall)] <= 1).all() and found.maps


def test_layers_with_a_window_of_their_own_stay_dense() -> None:
    found = hsa.profile(FAMILIES["gemma2"](), [tokens(1, 90)], [window()], budget=0.6, progress=False, maps=0)
    assert found.plans[0].choice[0].tolist() == [0, 0, 0, 0] and found.plans[0].choice[1].any()
    assert np.isnan(found.figures["density"][0, 0]).all() and found.density <= 0.6


def test_reasons_are_named_where_nothing_is_seen() -> None:
    with pytest.raises(ValueError, match=r"attend to 16 tokens or more, batch 0: decoding: fewer than 16 queries"):
        quiet(FAMILIES["llama"](), [tokens(1, 9)])


def test_the_largest_tensor_grows_with_length() -> None:
    model = FAMILIES["llama"](num_hidden_layers=1)
    largest = []
    for n in (1536, 3072):
        with Largest() as made:
            quiet(model, [tokens(1, n) % 50 + 3], [window()], query_blocks=3, maps=2)
        largest.append(made.bytes)
    assert largest[1] <= 2.1 * largest[0]


# ------------------------------------------------------------------ killed runs


def interrupted(batches: list[Any], after: int) -> Iterator[Any]:
    yield from batches[:after]
    raise KeyboardInterrupt


def test_a_killed_run_goes_on(tmp_path) -> None:
    model, batches = FAMILIES["llama"](), [tokens(1, 40 + 30 * i, i) for i in range(3)]
    want = quiet(model, batches)
    state = tmp_path / "run" / "state"
    with pytest.raises(KeyboardInterrupt):
        quiet(model, interrupted(batches, 2), state=state)
    assert [p.name for p in state.parent.iterdir()] == ["state"]
    about = {"model": "x"}
    with pytest.raises(ValueError, match="`state` must be of the same model: x here"):
        Tally.load(state, about, None)
    calls: list[int] = []
    first = model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = quiet(model, batches, state=state)
    first.remove()
    assert len(calls) == 1 and found.cases == want.cases and found.layers == want.layers
    for name, values in want.figures.items():
        np.testing.assert_array_equal(found.figures[name], values)
    refused = {
        "candidates": {"candidates": [window()]},
        "metrics": {"metrics": ("video_mse",)},
        "seed": {"seed": 1},
        "steps": {"steps": [(0, 0.5)]},
    }
    for what, options in refused.items():
        with pytest.raises(ValueError, match=f"`state` must be of the same {what}"):
            quiet(model, batches, state=state, **options)
    with pytest.raises(ValueError, match="`state` must be of the same model"):
        quiet(FAMILIES["llama"](num_attention_heads=2), batches, state=state)
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(ValueError, match="`state` must be a file of an unfinished profile"):
        quiet(model, batches, state=state)


# ------------------------------------------------------------------ profiles


def test_lengths_are_cases_of_their_own() -> None:
    model, batches = FAMILIES["llama"](), [tokens(1, 64), tokens(1, 200), tokens(1, 70, 1)]
    found = hsa.profile(model, batches, [window(), topk()], budget=0.6, progress=False, maps=3, metrics=("recall",))
    assert [c.tokens for c in found.measurements.cases] == [67, 200]
    densities = found.measurements.figures["density"]
    order = [found.measurements.candidates.index(m) for m in found.methods]
    chosen = np.array(order)[found.plans[0].choice]
    each = np.take_along_axis(densities, chosen[None, ..., None], -1)[..., 0].mean((1, 2))
    assert (each <= 0.6 + 1e-6).all() and len(found.measurements.maps) == 3
    with hsa.patch(model, found, min_tokens=0) as patch, torch.no_grad():
        model(batches[1])
    assert patch.report().density == pytest.approx(each[1], abs=1e-3)


def test_step_ranges_get_choices_of_their_own() -> None:
    pipe = tiny_wan.pipeline()
    options: dict[str, Any] = {"budget": 0.9, "metric": "video_mse", "progress": False, "maps": 0}
    found = hsa.profile(
        pipe, [lambda p: tiny_wan.generate(p, steps=4)], [topk(), window()], steps=[(0, 0.5), (0.5, 1)], **options
    )
    assert [p.steps for p in found.plans] == [(0, 0.5), (0.5, 1)]
    assert [c.steps for c in found.measurements.cases] == [(0, 0.5), (0.5, 1)]
    assert found.density <= 0.9
    with pytest.raises(ValueError, match="number of steps unknown"):
        hsa.profile(tiny_wan.transformer(), [tiny_wan.inputs()], [topk()], steps=[(0, 0.5), (0.5, 1)], **options)


def test_a_second_pass_sees_the_errors_of_the_first() -> None:
    model, ids = FAMILIES["llama"](), [tokens(1, 150)]
    one, two = (
        hsa.profile(model, ids, [window(), topk()], budget=0.35, passes=n, progress=False, maps=0) for n in (1, 2)
    )
    first, second = one.measurements.figures["recall"], two.measurements.figures["recall"]
    np.testing.assert_array_equal(first[0, 0], second[0, 0])
    assert (first[0, 1, :, 1:] != second[0, 1, :, 1:]).all()
    assert two.calibration["passes"] == 2


def test_time_is_a_budget_too() -> None:
    found = hsa.profile(
        FAMILIES["llama"](),
        [tokens(1, 2100)],
        [window(200), topk(0.1)],
        budget=0.9,
        per="time",
        progress=False,
        maps=0,
    )
    assert found.budget == {"time": 0.9}
    assert float(found.figures["seconds"].mean()) <= 0.9 * float(found.measurements.figures["seconds"][..., 0].mean())


@dataclass(frozen=True, kw_only=True)
class Never(Method):
    """Applies nowhere."""

    def pattern(self, q: Any, k: Any, ctx: Context) -> Decline:
        return Decline("never")


def test_candidates_that_decline_are_named_and_not_chosen() -> None:
    found = hsa.profile(FAMILIES["llama"](), [tokens(1, 90)], [Never(), window()], budget=0.6, progress=False, maps=0)
    assert set(found.measurements.declined.values()) == {"never"}
    assert np.isnan(found.measurements.figures["recall"][..., 1]).all()
    assert all(not isinstance(m, Never) for m in found.methods)


REFUSED = {
    "metric": ({"metric": "speed"}, "`metric` must be one of"),
    "per": ({"per": "energy"}, "`per` must be 'density' or 'time'"),
    "budget": ({"budget": 0.0}, "`budget` must be more than 0"),
    "passes": ({"passes": 3}, "`passes` must be 1 or 2"),
    "steps": ({"steps": [(0, 0.4), (0.5, 1)]}, "`steps` must follow one another from 0 to 1"),
    "query_blocks": ({"query_blocks": 0}, "`query_blocks` must be at least 1"),
    "twice": ({"candidates": [window(), window()]}, "`candidates` must be distinct"),
    "dense": ({"candidates": ["dense"]}, "at least one beside dense"),
    "name": ({"candidates": "block_topk"}, "`candidates` must be a list"),
    "needles": ({"metric": "retrieval_score"}, '"needles" for the metric'),
    "labels": ({"metric": "influence"}, '"labels" for a model'),
    "none": ({"batches": []}, "at least one batch, got none"),
    "kind": ({"batches": [3]}, "mappings, token ids or callables, got int"),
    "least": ({"budget": 0.01}, "least"),
}


@pytest.mark.parametrize("options, said", REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_is_refused(options: dict[str, Any], said: str) -> None:
    given = {"batches": [tokens(1, 60)], "candidates": [window()], "progress": False, "maps": 0, **options}
    with pytest.raises((ValueError, TypeError), match=said):
        hsa.profile(FAMILIES["llama"](), **given)


def test_the_function_is_not_hidden_by_a_module() -> None:
    assert callable(hsa.profile) and hsa.profile is profiling.profile


def test_the_command_profiles_and_saves(tmp_path, capsys, monkeypatch) -> None:
    from hf_sparse_attn.cli import profile as command
    from hf_sparse_attn.cli.commands import main

    methods = [{"method": "sliding_window", "params": {"window": 64, "sink": 8, "block_size": 32}}]
    (tmp_path / "candidates.json").write_text(json.dumps(methods))
    options = ["--length", "640", "--batches", "2", "--candidates", str(tmp_path / "candidates.json")]
    folder = str(tmp_path / "out")
    assert main(["profile", "byte_llama", *options, "--budget", "0.5", "--output", folder, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["density"] <= 0.5 and sum(m["heads"] for m in said["methods"]) == 24
    saved = hsa.HeadProfile.from_pretrained(folder)
    assert saved.density == pytest.approx(said["density"], rel=1e-3) and said["output"] == folder
    monkeypatch.setattr(command, "profile", lambda *args, **options: saved)
    assert main(["profile", "byte_llama", "--output", folder]) == 0
    shown = capsys.readouterr().out
    assert "budget: density 0.5" in shown and shown.endswith(f"hf_sparse_attn.patch(model, {folder!r})\n")
    assert main(["report", folder, "--worst", "0"]) == 0
    assert shown.startswith(capsys.readouterr().out)
    assert main(["profile", "byte_llama", "--call", "{}", "--output", folder]) == 2
    assert "--call must be left out for byte_llama" in capsys.readouterr().err
