"""HunyuanVideo: exact text, padding cut away, and what each layer is told, on tiny real transformers."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_hunyuan as tiny
from tests.support.patterns import Largest
from tests.support.tiny_wan import assert_same, run, spy, state

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = tiny.KINDS
WINDOW: dict[str, Any] = {"window": 60, "sink": 5, "block_size": 32}
SPARSE: dict[str, Any] = {"backend": "torch_reference", "min_tokens": 0, **WINDOW}
DTYPES = (torch.float32, torch.bfloat16)


def cast(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def applicable(*kinds: Any) -> list[Any]:
    """(kind, method, parameters): of the first kind all examples of a method, of the others the first alone."""
    fitting = FAMILIES.get("hunyuan_video").provides
    names = [n for n in hsa.list_methods() if n != "dense" and hsa.get_method(n).needs <= fitting]
    return [
        pytest.param(kind, name, params, id=f"{kind}-{name}-{i}")
        for kind in kinds
        for name in names
        for i, params in enumerate(hsa.get_method(name).examples()[: None if kind == kinds[0] else 1])
    ]


def rounding(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """How far two ways of the same are apart, and no less than a rounding of the largest."""
    return max((one - two).abs().max(), torch.finfo(one.dtype).eps * one.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_changes_no_bit(kind: str, dtype: torch.dtype) -> None:
    model, given = tiny.transformer(kind).to(dtype), cast(tiny.inputs(kind, (7, 1)), dtype)
    before = run(model, **given)
    with hsa.patch(model, "dense", min_tokens=0) as patch:
        assert torch.equal(run(model, **given), before)
    assert [r.dense_calls for r in patch.report().layers] == [1, 1]
    assert torch.equal(run(model, **given), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipeline_is_the_same_before_and_after(kind: str) -> None:
    """End to end to pixels: one line on, one line off."""
    pipe = tiny.pipeline(kind)
    before = tiny.generate(pipe, output="pt")
    with hsa.patch(pipe, "dense"):
        assert torch.equal(tiny.generate(pipe, output="pt"), before)
    with hsa.patch(pipe, "sliding_window", strict=True, **{**SPARSE, "window": 4}) as patch:
        sparse = tiny.generate(pipe, output="pt")
    assert sparse.isfinite().all() and not torch.equal(sparse, before)
    assert all(r.sparse_calls == (8 if kind == "framepack" else 4) for r in patch.report().layers), patch.report()
    assert torch.equal(tiny.generate(pipe, output="pt"), before)


@pytest.mark.parametrize("kind", ["t2v", "1.5", "framepack"])
@pytest.mark.parametrize("how", ["remove", "with", "exception", "unpatch", "failed"])
def test_removal_restores_everything(kind: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = tiny.transformer(kind), tiny.inputs(kind)
    first = next(m for n, m in model.named_modules() if n == "transformer_blocks.0.attn")
    first.processor._attention_backend = diffusers.models.attention_dispatch.AttentionBackendName._NATIVE_MATH
    output, before = run(model, **given), state(model)
    if how == "failed":
        last = max((m for m in model.modules() if hasattr(m, "processor") and hasattr(m, "heads")), key=id)
        original = type(last).register_forward_pre_hook
        calls: list[int] = []

        def fail_at_the_second(module: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise ZeroDivisionError
            return original(module, *args, **kwargs)

        monkeypatch.setattr(type(last), "register_forward_pre_hook", fail_at_the_second)
        with pytest.raises(ZeroDivisionError):
            hsa.patch(model, "sliding_window", **SPARSE)
    else:
        patch = hsa.patch(model, "sliding_window", **SPARSE)
        assert not torch.equal(run(model, **given), output)
        if how == "exception":
            broken = {**given, "hidden_states": given["hidden_states"][:, :3]}
            with pytest.raises(RuntimeError), patch:
                run(model, **broken)
        elif how == "with":
            with patch:
                pass
        else:
            patch.remove() if how == "remove" else hsa.unpatch(model)
    assert_same(before, state(model))
    assert torch.equal(run(model, **given), output)


@pytest.mark.parametrize(("kind", "name", "params"), applicable("t2v", "framepack", "1.5", "t2v in bfloat16"))
def test_sparse_equals_the_mask(kind: str, name: str, params: dict[str, Any]) -> None:
    """Two rows of different text: each as the method's own pattern gives it as a mask, beside the model's mask."""
    kind, _, half = kind.partition(" in ")
    dtype = torch.bfloat16 if half else torch.float32
    model, given = tiny.transformer(kind).to(dtype), cast(tiny.inputs(kind, (7, 12)), dtype)
    recorder = tiny.Recorder(inner=hsa.get_method(name)(**params))
    with hsa.patch(model, recorder, backend="torch_reference", min_tokens=0, strict=True):
        got = run(model, **given)
    exact, low = (tiny.replay(model, given, recorder.masks, d) for d in (torch.float64, dtype))
    assert (got - exact).abs().max() <= 4 * rounding(low, exact)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grid", [(7, 13, 9), (1, 2, 17), (3, 1, 1)], ids=lambda g: "x".join(map(str, g)))
@pytest.mark.parametrize("length", [1, 5, 12])
def test_odd_grids_and_any_text(kind: str, grid: tuple[int, int, int], length: int) -> None:
    """Every token of video has the window and all text, and text has everything."""
    if kind == "framepack" and min(grid) == 1 == grid[1]:
        pytest.skip("FramePack's own embedding fails below a patch of its history")
    model, given = tiny.transformer(kind), tiny.inputs(kind, (length,), grid)
    before, after = tiny.tokens_of(kind, length, grid)
    recorder = tiny.Recorder(inner=hsa.get_method("sliding_window")(**WINDOW))
    with hsa.patch(model, recorder, backend="auto", min_tokens=0, strict=True) as patch:
        patch.session.policy.__dict__["min_queries"] = 1
        got = run(model, **given)
    video = grid[0] * grid[1] * grid[2]
    i = torch.arange(before + video + after)
    text = (i < before) | (i >= before + video)
    mask = ((i[:, None] - i).abs() < 60) | (i < 5) | text[:, None] | text
    assert [layer for layer, _ in recorder.masks] == [0, 1]
    assert all(torch.equal(m[0, 0], mask) for _, m in recorder.masks)
    exact, low = (tiny.replay(model, given, recorder.masks, d) for d in (torch.float64, torch.float32))
    assert (got - exact).abs().max() <= 4 * rounding(low, exact)


@pytest.mark.parametrize(("kind", "name", "params"), applicable(*KINDS))
def test_a_batch_is_its_rows(kind: str, name: str, params: dict[str, Any]) -> None:
    """Both guidance branches in one batch, of different text, give what two calls give; as do rows of equal text."""
    model, lengths = tiny.transformer(kind), (7, 1, 12, 7)
    batch = tiny.inputs(kind, lengths)
    shared = ("indices_",)
    rows = [{k: v if k.startswith(shared) else v[i : i + 1] for k, v in batch.items()} for i in range(len(lengths))]
    off = rounding(run(model, **batch), torch.cat([run(model, **r) for r in rows]))
    with hsa.patch(model, name, backend="torch_reference", min_tokens=0, strict=True, **params) as patch:
        apart = torch.cat([run(model, **r) for r in rows])
        together = run(model, **batch)
    assert (together - apart).abs().max() <= 8 * off
    assert all(r.sparse_calls == 5 for r in patch.report().layers), patch.report()


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense_layers"])
@pytest.mark.parametrize("kind", KINDS)
def test_padded_text_is_cut_away(kind: str, dense: bool) -> None:
    """Garbage in padded places changes no bit, and a row without padding gives the same but for rounding."""
    model = tiny.transformer(kind)
    given, garbage = tiny.inputs(kind, (7, 3)), tiny.inputs(kind, (7, 3))
    hidden = garbage["encoder_attention_mask"] == 0
    garbage["encoder_hidden_states"][hidden] = 1e4
    if kind == "1.5":
        garbage["encoder_hidden_states_2"][garbage["encoder_attention_mask_2"] == 0] = 1e4
    own = run(model, **given)
    with hsa.patch(model, "sliding_window", dense_layers=[0, 1] if dense else None, **SPARSE) as patch:
        got = run(model, **given)
        assert torch.equal(run(model, **garbage), got)
        short = {k: v[1:] if not k.startswith("indices_") else v for k, v in given.items()}
        padded, own_padded = run(model, **short), own[1:]
        short["encoder_hidden_states"] = short["encoder_hidden_states"][:, :3]
        short["encoder_attention_mask"] = short["encoder_attention_mask"][:, :3]
        unpadded = run(model, **short)
    off = rounding(run(model, **short), own_padded)
    assert (unpadded - padded).abs().max() <= 8 * off
    calls = [(r.sparse_calls, r.dense_calls) for r in patch.report().layers]
    assert calls == [(0, 4), (0, 4)] if dense else calls == [(4, 0), (4, 0)]
    if dense:
        assert (got - own).abs().max() <= 8 * off


@pytest.mark.parametrize("kind", ["t2v", "1.5"])
@pytest.mark.parametrize("lengths", [(12,), (7, 3)], ids=str)
@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "dense_layers"])
def test_no_mask_of_tokens_by_tokens(kind: str, lengths: tuple[int, ...], dense: bool) -> None:
    model, grid = tiny.transformer(kind), (3, 37, 41)
    given = tiny.inputs(kind, lengths, grid)
    square = (3 * 37 * 41) ** 2
    with Largest() as own:
        run(model, **given)
    assert kind != "1.5" or own.bytes >= square
    with hsa.patch(model, "sliding_window", min_tokens=0, dense_layers=[0, 1] if dense else None, **WINDOW):
        with Largest() as largest:
            run(model, **given)
    assert largest.bytes < square


def test_every_layer_is_told_where_it_is() -> None:
    model = tiny.transformer(num_layers=2, num_single_layers=3)
    patch, seen = spy(model)
    names = [f"transformer_blocks.{i}" for i in range(2)] + [f"single_transformer_blocks.{i}" for i in range(3)]
    assert [(r.layer, r.name) for r in patch.report().layers] == [
        (i, f"transformer.{name}.attn") for i, name in enumerate(names)
    ]
    with model.cache_context("uncond", step_index=4, num_inference_steps=9):
        run(model, **tiny.inputs())
    assert [(c.layer, c.num_layers, c.step, c.num_steps, c.branch) for c in seen] == [
        (i, 5, 4, 9, "uncond") for i in range(5)
    ]
    assert {(c.layout, c.num_heads, c.num_kv_heads, c.head_dim) for c in seen} == {
        (hsa.TokenLayout.video(3, 7, 9, text_after=7), 2, 2, 12)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_pipeline(kind: str) -> None:
    """A second clip begins anew, and so does each section of FramePack."""
    pipe = tiny.pipeline(kind)
    _, seen = spy(pipe)
    for _ in range(2):
        tiny.generate(pipe, steps=3)
    branches = ["cond", "uncond"] if kind in ("t2v", "1.5") else [None, None]
    if kind == "t2v" and not any(c.branch for c in seen):
        pytest.fail("the pipeline told no branch")
    runs = 4 if kind == "framepack" else 2
    told = [(c.step, c.num_steps, c.branch, c.layer) for c in seen]
    assert told == [(s, 3, b, layer) for s in range(3) for b in branches for layer in (0, 1)] * runs
    text = {c.layout.parts[-1].length for c in seen}
    assert text == {"framepack": {7, 5}, "1.5": {7, 5}}.get(kind, {5, 3})


def test_dense_steps_and_layers() -> None:
    pipe = tiny.pipeline("1.5")
    patch = hsa.patch(pipe, "sliding_window", dense_steps=(0.25, 0.25), dense_layers=[0], strict=True, **SPARSE)
    tiny.generate(pipe, steps=4)
    first, second = patch.report().layers
    assert first.reasons == {"dense_layers": 8} and second.reasons == {"dense_steps": 4} and second.sparse_calls == 4


def test_two_models_share_nothing() -> None:
    models = [tiny.transformer(), tiny.transformer("1.5")]
    (first, one), (second, two) = (spy(m) for m in models)
    for time in (900.0, 600.0):
        run(models[0], **tiny.inputs(time=time))
    run(models[1], **tiny.inputs("1.5", time=300.0))
    assert [c.step for c in one if c.layer == 1] == [0, 1] and [c.step for c in two if c.layer == 1] == [0]
    first.remove()
    run(models[1], **tiny.inputs("1.5", time=100.0))
    assert [c.step for c in two if c.layer == 1] == [0, 1] and len(one) == 4
    second.remove()


@pytest.mark.parametrize("kind", ["t2v", "1.5"])
@pytest.mark.parametrize("what", ["backend", "processor"])
def test_a_change_after_the_patch_is_noticed(kind: str, what: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny.transformer(kind), tiny.inputs(kind)
    before, dense = state(model), run(model, **given)
    attention = model.transformer_blocks[0].attn
    processor = type(attention.processor)
    patch = hsa.patch(model, "sliding_window", dense_layers=[1], **SPARSE)
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        if what == "backend":
            attention.processor._attention_backend = diffusers.models.attention_dispatch.AttentionBackendName.NATIVE
        else:
            attention.set_processor(processor())
        got = run(model, **given)
        run(model, **given)
    assert sum("changed after the patch to" in r.message for r in caplog.records) == 1
    assert (got - dense).abs().max() <= 8 * rounding(dense, dense)
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(0, 2), (0, 2)]
    theirs = attention.processor
    patch.remove()
    if what == "processor":
        assert attention.processor is theirs
        before = state(model)
    assert_same(before, state(model))
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE):
        attention.processor._attention_backend = None
        with pytest.raises(hsa.DenseFallback, match=r"transformer_blocks\.0\.attn: attention backend changed"):
            run(model, **given)
    assert_same(before, state(model))


@pytest.mark.parametrize("kind", ["t2v", "1.5"])
def test_a_deep_copy_runs_dense_and_outlives_the_patch(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny.transformer(kind), tiny.inputs(kind, (7, 3))
    dense = run(model, **given)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, **given), dense) and "deep copy" in caplog.text
    assert [type(m.processor) for m in (twin.transformer_blocks[0].attn,)] == [
        type(tiny.transformer(kind).transformer_blocks[0].attn.processor)
    ]
    patch.remove()
    assert torch.equal(run(twin, **given), dense)


@pytest.mark.parametrize("kind", ["t2v", "1.5"])
def test_calls_that_do_not_fit_are_dense_and_said(kind: str) -> None:
    """An attention called by itself, and a mask that differs from query to query."""
    model, given = tiny.transformer(kind), tiny.inputs(kind)
    attention = model.transformer_blocks[0].attn
    hidden, text = torch.randn(1, 64, 24), torch.randn(1, 6, 24)
    mask = torch.arange(6)[None] < 4 if kind == "1.5" else (torch.arange(70) < 68)[None, None, None]
    with torch.no_grad():
        expected = attention(hidden, text, attention_mask=mask)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    with torch.no_grad():
        got = attention(hidden, text, attention_mask=mask)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))

    def square(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        n = kwargs["hidden_states"].shape[1] + kwargs["encoder_hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": torch.ones(1, 1, n, n, dtype=torch.bool).tril()}

    handle = attention.register_forward_pre_hook(square, with_kwargs=True)
    run(model, **given)
    handle.remove(), patch.remove()
    reasons = patch.report().layers[0].reasons
    assert list(reasons.values()) == [1, 1] and patch.report().layers[1].sparse_calls == 1
    assert "outside of the transformer's forward" in "; ".join(reasons)
    assert "differs from query to query" in "; ".join(reasons)


def test_a_processor_that_reaches_no_dispatcher_is_refused() -> None:
    model = tiny.transformer()
    model.single_transformer_blocks[0].attn.processor = object()
    before = state(model)
    with pytest.raises(ValueError, match=r"without `_attention_backend` at transformer\.single_transformer_blocks\.0"):
        hsa.patch(model, "sliding_window")
    assert_same(before, state(model))


@pytest.mark.parametrize("kind", ["t2v", "framepack", "1.5"])
def test_checkpointed_layers_are_recomputed_as_they_were(kind: str) -> None:
    """Two forwards of different grids, text and steps before one backward."""
    model = tiny.transformer(kind)
    calls = [tiny.inputs(kind, (7,), (3, 7, 9), time=900.0), tiny.inputs(kind, (3,), (1, 4, 8), time=300.0)]

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        sum(run(model, grad=True, **given).square().mean() for given in calls).backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    with hsa.patch(model, "sliding_window", strict=True, **SPARSE):
        plain = gradients()
        model.enable_gradient_checkpointing()
        model.train()
        again = gradients()
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(gradients(), plain, strict=True))


@pytest.mark.parametrize("kind", ["t2v", "1.5"])
def test_compiled_blocks_share_their_graphs(kind: str) -> None:
    """A graph for each kind of block and strides, not for each layer (there are 5); none for a step."""
    model, given = tiny.transformer(kind, num_layers=5), tiny.inputs(kind)
    torch._dynamo.reset()
    limit = {"recompile_limit": 3, "fail_on_recompile_limit_hit": True}
    with hsa.patch(model, "sliding_window", dense_steps=0.3, **SPARSE) as patch:
        with model.cache_context("cond", step_index=1, num_inference_steps=3):
            sparse = run(model, **given)
        model.compile_repeated_blocks(backend="eager")
        for step in (0, 1, 2, 1):
            with (
                torch._dynamo.config.patch(limit if step < 2 else {"error_on_recompile": True}),
                model.cache_context("cond", step_index=step, num_inference_steps=3),
            ):
                got = run(model, **given)
        assert torch.equal(got, sparse)
    assert all((r.sparse_calls, r.dense_calls) == (4, 1) for r in patch.report().layers)
