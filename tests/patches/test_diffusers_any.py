"""Family diffusers: every transformer class that can be built small, what its tokens are, and what is refused."""

from __future__ import annotations

import copy
import logging
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import hf_sparse_attn as hsa
from hf_sparse_attn.coverage.of_diffusers import diffusers_classes
from hf_sparse_attn.hosts.diffusers_model import self_attentions
from hf_sparse_attn.patches.diffusers_any import TOKENS
from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_diffusers as tiny
from tests.support.tiny_hunyuan import Recorder
from tests.support.tiny_wan import assert_same, spy, state

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOW: dict[str, Any] = {"window": 20, "sink": 3, "block_size": 16}
SPARSE: dict[str, Any] = {"backend": "torch_reference", "min_tokens": 0, **WINDOW}
WITH_GRID = [name for name, known in tiny.TABLE.items() if known.grid is not None]
# Every second layer attends over the three frames alone, which is dense by policy.
SHORT = ("LatteTransformer3DModel",)
# The text has a part in the embedding of the timestep.
POOLED = ("MochiTransformer3DModel",)
TWO = tiny.TWO


def run(model: Any, given: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        out = model(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


@contextmanager
def masked(masks: list[tuple[int, torch.Tensor]], dtype: torch.dtype) -> Iterator[None]:
    """Recorded masks in turn in the self-attention of an unpatched model, by PyTorch's function in `dtype`."""
    waiting = iter(masks)

    class Masks(TorchFunctionMode):
        def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
            given = dict(kwargs or {})
            if func is not F.scaled_dot_product_attention:
                return func(*args, **given)
            given.update(zip(("query", "key", "value", "attn_mask"), args, strict=False))
            q, k, v = (given[name] for name in ("query", "key", "value"))
            tokens = q.shape[2]
            if tokens == k.shape[2] and tokens >= self.size:
                mask = self.mask
                own, n = given.get("attn_mask"), mask.shape[-1]
                both = torch.ones(q.shape[0], q.shape[1], tokens, tokens, dtype=torch.bool)
                both[..., :n, :n] &= mask
                if own is not None:
                    both &= own if own.dtype == torch.bool else own == 0
                given["attn_mask"] = both
                self.advance()
            else:
                return func(**given)
            given.update(query=q.to(dtype), key=k.to(dtype), value=v.to(dtype))
            return func(**given).to(q.dtype)

        def advance(self) -> None:
            self.mask = next(waiting, (0, torch.zeros(0, 1 << 30, device="meta")))[1]
            self.size = self.mask.shape[-1]

    mode = Masks()
    mode.advance()
    with mode:
        yield
    assert mode.size == 1 << 30, "a recorded mask was not used"


@pytest.mark.parametrize("name", tiny.CLASSES)
def test_a_class(name: str) -> None:
    """Dense to the bit; sparse as the same pattern in a mask; everything kept is dense; all as before afterwards."""
    model, given = tiny.build(name)
    before, own = state(model), run(model, given)
    with hsa.patch(model, "dense", min_tokens=0) as patch:
        assert torch.equal(run(model, given), own)
    assert patch.family == "diffusers" and all(r.dense_calls for r in patch.report().layers)
    for params in (WINDOW, {"window": 1 << 20, "sink": 0, "block_size": 32}):
        recorder = Recorder(inner=hsa.get_method("sliding_window")(**params))
        with hsa.patch(model, recorder, backend="torch_reference", min_tokens=0, strict=True) as patch:
            got = run(model, given)
        assert all(r.sparse_calls == 1 or name in SHORT for r in patch.report().layers), patch.report()
        with masked(recorder.masks, torch.float64):
            exact = run(model, given)
        with masked(recorder.masks, torch.float32):
            low = run(model, given)
        rounding = max((low - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())
        assert (got - exact).abs().max() <= 8 * rounding
        assert torch.equal(got, own) or params is WINDOW or (got - own).abs().max() <= 8 * rounding
    with hsa.patch(model, "sliding_window", **{**SPARSE, "window": 2, "sink": 0}):
        assert not torch.equal(run(model, given), own), "attention has no part in the output"
    assert_same(before, state(model))
    assert torch.equal(run(model, given), own)


@pytest.mark.parametrize("kind", ["ltx", "cogvideox", "flux"])
def test_a_pipeline_is_the_same_before_and_after(kind: str) -> None:
    """End to end to pixels, guidance in one batch or in two calls: one line on, one line off."""
    pipe, generate = tiny.pipeline(kind)
    before = generate()
    with hsa.patch(pipe, "dense"):
        assert torch.equal(generate(), before)
    with hsa.patch(pipe, "sliding_window", strict=True, dense_steps=0.3, **{**SPARSE, "window": 3}) as patch:
        sparse = generate()
    assert sparse.isfinite().all() and not torch.equal(sparse, before)
    passes = 2 if kind == "flux" else 1
    assert all((r.sparse_calls, r.dense_calls) == (2 * passes, passes) for r in patch.report().layers)
    assert torch.equal(generate(), before)


@pytest.mark.parametrize("family", ["wan", "hunyuan_video", "diffusers"])
def test_the_tiny_model_of_a_family_is_of_that_family(family: str) -> None:
    model, given = FAMILIES.get(family).tiny()
    own = run(model, given)
    with hsa.patch(model, "dense") as patch:
        assert torch.equal(run(model, given), own) and patch.family == family
    with hsa.patch(model, "radial", block_size=64, backend="torch_reference", min_tokens=0, strict=True) as patch:
        assert not torch.equal(run(model, given), own)
    assert all(r.sparse_calls == 1 for r in patch.report().layers)


@pytest.mark.parametrize(
    "name, whole",
    [
        pytest.param(name, whole, id=f"{'whole' if whole else 'blocks'}-{name}", marks=[pytest.mark.slow] * slow)
        for name, whole, slow in ((TWO[0], True, 0), (TWO[1], False, 0), (TWO[0], False, 1), (TWO[1], True, 1))
    ],
)
def test_compiled(name: str, whole: bool) -> None:
    """Whole graphs by the dispatcher; PyTorch's function ends them. Layers and steps share them, training included."""
    model, given = tiny.build(name)
    torch._dynamo.reset()
    full = name == TWO[0]

    def gradients(run: Any) -> list[torch.Tensor]:
        model.zero_grad()
        run(**given, return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with hsa.patch(model, "sliding_window", strict=True, **SPARSE) as patch:
        sparse, grads = run(model, given), gradients(model)
        if not whole:
            for block in model.transformer_blocks:
                block.compile(backend="aot_eager", fullgraph=full)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=full) if whole else model
        eps = torch.finfo(torch.float32).eps
        assert (run(compiled, given) - sparse).abs().max() <= 8 * eps * sparse.abs().max()
        with torch._dynamo.config.patch(error_on_recompile=True):
            assert run(compiled, {**given, "timestep": torch.tensor([100.0])}).isfinite().all()
        for got, want in zip(gradients(compiled), grads, strict=True):
            assert (got - want).abs().max() <= 64 * eps * max(g.abs().max() for g in grads)
    assert all(r.sparse_calls == 5 for r in patch.report().layers), patch.report()
    torch._dynamo.reset()


@pytest.mark.parametrize("name", WITH_GRID)
def test_the_order_of_tokens(name: str) -> None:
    """Latents of one cell of the grid move the queries of that token in the first layer, and those of no other."""
    model, given = tiny.build(name)
    known = tiny.TABLE[name]
    patch, seen = spy(model)
    first: list[torch.Tensor] = []
    attention = patch.session.method.__class__.attention

    def noted(self: Any, q: Any, k: Any, v: Any, ctx: Any, run: Any) -> Any:
        if ctx.layer == 0:
            first.append(q.clone())
        return attention(self, q, k, v, ctx, run)

    with pytest.MonkeyPatch.context() as monkey:
        monkey.setattr(type(patch.session.method), "attention", noted)
        run(model, given)
        frames, height, width = known.grid or (0, 0, 0)
        for place in {(0, 0, 0), (frames - 1, height - 1, width - 1), (frames // 2, 1, width // 2)}:
            run(model, tiny.cell(name, given, place))
            moved = (first[-1] - first[0]).abs().amax((0, 1, 3)).nonzero()[:, 0].tolist()
            assert moved == [known.before + (place[0] * height + place[1]) * width + place[2]]
        if (known.before or known.after) and name not in POOLED:
            text = {**given, "encoder_hidden_states": given["encoder_hidden_states"] + 1.0}
            run(model, text)
            moved = (first[-1] - first[0]).abs().amax((0, 1, 3)) > 0
            video = slice(known.before, known.before + frames * height * width)
            assert not moved[video].any() and int(moved.sum()) == known.before + known.after
    layout = hsa.TokenLayout.video(*known.grid, text_before=known.before, text_after=known.after)
    assert {c.layout for c in seen} == {layout}
    layers = {c.layer for c in seen}
    assert layers == set(range(len(patch.report().layers)))


def test_classes_of_known_order_are_those_tested() -> None:
    assert set(TOKENS) == set(WITH_GRID)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TWO)
@pytest.mark.parametrize("method", ["sliding_window", "radial", "block_topk"])
def test_methods_and_precisions(name: str, method: str, dtype: torch.dtype) -> None:
    model, given = tiny.build(name)
    model = model.to(dtype)
    given = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    for params in hsa.get_method(method).examples():
        recorder = Recorder(inner=hsa.get_method(method)(**params))
        with hsa.patch(model, recorder, backend="torch_reference", min_tokens=0, strict=True):
            got = run(model, given)
        with masked(recorder.masks, torch.float64):
            exact = run(model, given)
        with masked(recorder.masks, dtype):
            low = run(model, given)
        rounding = max((low - exact).abs().max(), torch.finfo(dtype).eps * exact.abs().max())
        assert (got - exact).abs().max() <= 8 * rounding


def test_a_grid_is_needed_and_not_known() -> None:
    model, _ = tiny.build("AuraFlowTransformer2DModel")
    before = state(model)
    with pytest.raises(hsa.MethodDoesNotApply, match="order of tokens in AuraFlowTransformer2DModel is not known"):
        hsa.patch(model, "radial")
    assert_same(before, state(model))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("FluxTransformer2DModel", lambda g: {**g, "img_ids": g["img_ids"] + torch.tensor([1.0, 0, 0])}),
        ("FluxTransformer2DModel", lambda g: {**g, "img_ids": g["img_ids"].flip(0)}),
        ("LTXVideoTransformer3DModel", lambda g: {**g, "hidden_states": torch.randn(1, 106, 4), "video_coords": None}),
        ("QwenImageTransformer2DModel", lambda g: {**g, "img_shapes": [[(1, 5, 4), (1, 5, 3)]]}),
    ],
    ids=["other image", "other order", "more tokens", "two images"],
)
def test_tokens_that_are_no_grid(name: str, change: Any) -> None:
    """Reference images and the like: bidirectional, and methods that need a grid decline in each call."""
    model, given = tiny.build(name)
    given = change(given)
    if "video_coords" in given:
        given["video_coords"] = torch.zeros(1, 3, 106)
    own = run(model, given)
    with hsa.patch(model, "radial", min_tokens=0, block_size=16) as patch:
        assert torch.equal(run(model, given), own)
    for layer in patch.report().layers:
        assert "needs exactly one video segment" in next(iter(layer.reasons))
    patch, seen = spy(model)
    run(model, given)
    assert {str(c.layout).split()[0] for c in seen} == {"bidirectional"} and not any(c.layout.video_part for c in seen)


@pytest.mark.parametrize("lengths", [(6,), (9,), (6, 1)], ids=str)
def test_padded_text_between_others_is_cut_away(lengths: tuple[int, ...]) -> None:
    """Qwen-Image: text first, so that its padding stands between valid tokens."""
    model, given = tiny.build("QwenImageTransformer2DModel")
    if "txt_seq_lens" in given:
        pytest.skip(f"diffusers {diffusers.__version__} makes no mask of it")
    rows = len(lengths)
    given = {k: v.repeat(rows, *[1] * (v.ndim - 1)) if torch.is_tensor(v) else v * rows for k, v in given.items()}
    given["encoder_hidden_states_mask"] = (torch.arange(9) < torch.tensor(lengths)[:, None]).long()
    garbage = {**given, "encoder_hidden_states": given["encoder_hidden_states"].clone()}
    garbage["encoder_hidden_states"][given["encoder_hidden_states_mask"] == 0] = 1e3
    double = copy.deepcopy(model).double()
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in given.items()}
    exact, own = run(double, wide), run(model, given)
    patch, seen = spy(model)
    got = run(model, given)
    assert torch.equal(run(model, garbage), got)
    rounding = max((own - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())
    assert (got - exact).abs().max() <= 4 * rounding
    assert {c.layout for c in seen} == {hsa.TokenLayout.video(1, 5, 7, text_before=n) for n in lengths}
    patch.remove()
    with hsa.patch(model, "sliding_window", dense_layers=5, **SPARSE):
        assert (run(model, given) - exact).abs().max() <= 4 * rounding


@pytest.mark.parametrize("lengths", [(6, 1)], ids=str)
def test_a_batch_of_a_processor_that_goes_row_by_row(lengths: tuple[int, ...]) -> None:
    """Mochi calls attention once for each row, on its valid text."""
    model, given = tiny.build("MochiTransformer3DModel")
    given = {k: v.repeat(2, *[1] * (v.ndim - 1)) for k, v in given.items()}
    given["encoder_attention_mask"] = torch.arange(9) < torch.tensor(lengths)[:, None]
    patch, seen = spy(model)
    own = run(model, given)
    assert [c.layout.parts[-1].length for c in seen] == [6, 1] * 2
    patch.remove()
    assert (run(model, given) - own).abs().max() <= 8 * torch.finfo(torch.float32).eps * own.abs().max()


@pytest.mark.parametrize("name", TWO)
def test_steps_and_branch(name: str) -> None:
    model, given = tiny.build(name)
    _, seen = spy(model)
    for time in (900.0, 900.0, 500.0, 900.0):
        run(model, {**given, "timestep": torch.tensor([time])})
    with model.cache_context("pred_uncond", step_index=3, num_inference_steps=7):
        run(model, given)
    assert [(c.step, c.branch) for c in seen if c.layer == 1] == [
        *((s, None) for s in (0, 0, 1, 0)),
        (3, "uncond"),
    ]


@pytest.mark.parametrize("name", TWO)
def test_a_change_after_the_patch_is_noticed(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny.build(name)
    own = run(model, given)
    attention = self_attentions(model)[0][1]
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    kind = type(attention.processor).__mro__[1] if name == TWO[1] else type(attention.processor)
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        attention.processor = kind()
        got = run(model, given)
    assert "changed after the patch to" in caplog.text and not torch.equal(got, own)
    first, second = patch.report().layers
    assert first.sparse_calls == 0 and "changed after the patch" in next(iter(first.reasons))
    assert second.sparse_calls == 1
    patch.remove()
    assert torch.equal(run(model, given), own)


@pytest.mark.parametrize("name", TWO)
def test_a_deep_copy_runs_dense_and_outlives_the_patch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny.build(name)
    own = run(model, given)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, given), own) and "deep copy" in caplog.text
    patch.remove()
    assert torch.equal(run(twin, given), own) and torch.equal(run(model, given), own)


@pytest.mark.parametrize("name", TWO)
def test_removal_after_an_exception(name: str) -> None:
    model, given = tiny.build(name)
    before, own = state(model), run(model, given)
    kinds = [type(module.processor) for _, module, _ in self_attentions(model)]
    with pytest.raises(RuntimeError), hsa.patch(model, "sliding_window", **SPARSE):
        run(model, {**given, "encoder_hidden_states": torch.zeros(1, 9, 15)})
    with hsa.patch(model, "sliding_window", **SPARSE) as patch:
        with pytest.raises(ValueError, match="patched already"):
            hsa.patch(model, "dense")
        hsa.unpatch(model)
    assert patch.report().family == "diffusers"
    assert_same(before, state(model))
    assert kinds == [type(module.processor) for _, module, _ in self_attentions(model)]
    assert torch.equal(run(model, given), own)


@pytest.mark.parametrize("name", TWO)
def test_checkpointed_layers_are_recomputed_as_they_were(name: str) -> None:
    model, given = tiny.build(name)

    def gradients(calls: list[dict[str, Any]]) -> list[torch.Tensor]:
        model.zero_grad()
        sum(model(**c, return_dict=False)[0].square().mean() for c in calls).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    calls = [given, {**given, "timestep": torch.tensor([100.0])}]
    calls[1]["hidden_states"] = given["hidden_states"] + 1
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE):
        plain = gradients(calls)
        model.enable_gradient_checkpointing()
        model.train()
        again = gradients(calls)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    _, seen = spy(model, strict=True)
    gradients(calls)
    told = [(c.layer, c.step) for c in seen]
    assert told == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 1), (0, 1), (1, 0), (0, 0)]


def test_cross_attention_by_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by its keys being the text alone, also where there are as many of them as tokens."""
    model, given = tiny.build("LTXVideoTransformer3DModel")
    given["encoder_hidden_states"], given["encoder_attention_mask"] = torch.randn(1, 105, 16), torch.ones(1, 105)
    with hsa.patch(model, "sliding_window", **SPARSE):
        want = run(model, given)
    monkeypatch.setattr("hf_sparse_attn.hosts.diffusers_model._ASIDE", re.compile("nothing"))
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE) as patch:
        assert torch.equal(run(model, given), want)
    calls = {r.name.split(".")[-1]: r.sparse_calls for r in patch.report().layers}
    assert calls == {"attn1": 1, "attn2": 0}


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.nn.Linear(2, 2), "Linear holds no transformer model of diffusers"),
        (lambda: types.SimpleNamespace(unet=1), "neither a module nor a pipeline with a `transformer`"),
        (lambda: diffusers.SanaTransformer2DModel(num_layers=1), "computes attention by itself, .*SanaLinearAttn"),
        (lambda: diffusers.PRXTransformer2DModel(depth=1, hidden_size=56, axes_dim=[1, 1]), "text that does not"),
        (lambda: diffusers.T5FilmDecoder(num_layers=1, d_model=8), "T5FilmDecoder computes attention by itself"),
    ],
    ids=["Linear", "no transformer", "linear attention", "asymmetric", "own attention"],
)
def test_what_cannot_be_patched_is_refused(make: Any, reason: str) -> None:
    with torch.device("meta"):
        model = make()
    with pytest.raises(TypeError, match=reason):
        hsa.patch(model, "dense")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Kandinsky6SRTransformer3DModel", "attention is sparse by itself"),
        ("NucleusMoEImageTransformer2DModel", "the image attends to text that does not attend to it"),
        ("OmniGenTransformer2DModel", "text attends causally"),
        ("QwenImage21Transformer2DModel", "text attends causally"),
        ("WanAnimate2Transformer3DModel", "each frame sees the reference of the same frame alone"),
    ],
)
def test_attention_that_is_not_among_all_tokens_is_refused(name: str, reason: str) -> None:
    """Every call of theirs would run dense: one that could never be sparse is not called patched."""
    with pytest.raises(TypeError, match=f"{name}: {reason}"):
        hsa.patch(tiny.build(name)[0], "dense")


@pytest.mark.parametrize(
    ("name", "layers", "calls"),
    [
        ("StableAudio3DiTModel", r"transformer_blocks\.\d\.self_attn", 2),
        ("LuminaNextDiT2DModel", r"layers\.\d\.attn1", 1),
        ("Ideogram4Transformer2DModel", r"layers\.\d\.attention", 1),
        ("Kandinsky6Transformer3DModel", r"visual_transformer_blocks\.\d\.video_dec_block\.self_attention", 1),
        ("Flux3Transformer2DModel", r"(mode_blocks\.image|single_transformer_blocks)\.\d\.attn", 1),
    ],
    ids=["difference of two", "mask of all queries", "segments", "text apart", "image apart"],
)
def test_layers_that_are_patched_and_how_often_they_ask(name: str, layers: str, calls: int) -> None:
    """All calls of a layer are sparse by its pattern, and what is no self-attention of the main tokens is left out."""
    model, given = tiny.build(name)
    recorder = Recorder(inner=hsa.get_method("sliding_window")(**WINDOW))
    with hsa.patch(model, recorder, backend="torch_reference", min_tokens=0, strict=True) as patch:
        got = run(model, given)
    found = patch.report().layers
    assert all(re.fullmatch(rf"transformer\.{layers}", r.name) for r in found) and len(found) >= 2
    assert {(r.sparse_calls, r.dense_calls) for r in found} == {(calls, 0)}
    with masked(recorder.masks, torch.float64):
        exact = run(model, given)
    with masked(recorder.masks, torch.float32):
        low = run(model, given)
    rounding = max((low - exact).abs().max(), torch.finfo(torch.float32).eps * exact.abs().max())
    assert (got - exact).abs().max() <= 4 * rounding


def test_two_calls_of_a_compiled_layer() -> None:
    model, given = tiny.build("StableAudio3DiTModel")
    torch._dynamo.reset()
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE) as patch:
        sparse = run(model, given)
        for block in model.transformer_blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        eps = torch.finfo(torch.float32).eps
        assert (run(model, given) - sparse).abs().max() <= 8 * eps * sparse.abs().max()
    assert all((r.sparse_calls, r.dense_calls) == (4, 0) for r in patch.report().layers), patch.report()
    torch._dynamo.reset()


def test_packed_segments_are_sequences_of_their_own() -> None:
    model, given = tiny.build("Ideogram4Transformer2DModel")
    given["segment_ids"] = given["segment_ids"].clone()
    given["segment_ids"][:, :20] = 1
    own = run(model, given)
    with hsa.patch(model, "sliding_window", strict=True, **{**SPARSE, "window": 1 << 20}) as patch:
        assert (run(model, given) - own).abs().max() <= 1e-5
    assert all((r.sparse_calls, r.dense_calls) == (1, 0) for r in patch.report().layers)
    with hsa.patch(model, "sliding_window", strict=True, **{**SPARSE, "window": 2, "sink": 0}):
        sparse = run(model, given)
        # What the other segment holds has no part in one.
        given["hidden_states"] = given["hidden_states"].clone()
        given["hidden_states"][:, :20] += 1.0
        assert torch.equal(run(model, given)[:, 20:], sparse[:, 20:]) and not torch.equal(sparse, own)


def test_coverage_lists_every_class_with_its_way_or_its_reason() -> None:
    found = {c.name: c for c in diffusers_classes()}
    assert len(found) >= 45 and list(found) == sorted(found)
    assert all((c.way is None) == (c.reason is not None) for c in found.values())
    assert {c.family for c in found.values()} == {None, "wan", "hunyuan_video", "diffusers"}
    assert found["HunyuanVideo15Transformer3DModel"].family == "hunyuan_video"
    assert (found["CogVideoXTransformer3DModel"].way, found["FluxTransformer2DModel"].way) == (
        "function",
        "dispatcher",
    )
    assert "linear" in str(found["SanaTransformer2DModel"].reason).lower()
    assert found["HunyuanDiT2DModel"].built and found["HunyuanDiT2DModel"].way == "function"
    assert not any(c.verified for c in found.values())
