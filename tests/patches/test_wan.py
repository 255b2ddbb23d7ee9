"""Wan: what a patch changes, what it leaves alone, and what each layer is told, on tiny real transformers."""

from __future__ import annotations

import copy

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_wan
from tests.support.tiny_wan import assert_close, assert_same, run, spy, state, window_mask

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

PIPELINES = ("t2v", "experts", "low_only", "ti2v", "i2v")
SPARSE = {"backend": "torch_reference", "min_tokens": 0, "window": 60, "sink": 5, "block_size": 32}


def applicable() -> list[str]:
    return [n for n in hsa.list_methods() if hsa.get_method(n).needs <= FAMILIES.get("wan").provides]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dense_changes_no_bit(dtype: torch.dtype) -> None:
    model = tiny_wan.transformer().to(dtype)
    given = {k: v.to(dtype) for k, v in tiny_wan.inputs(batch=2).items()}
    before = run(model, **given)
    with hsa.patch(model, "dense", min_tokens=0) as patch:
        assert torch.equal(run(model, **given), before)
    assert [r.dense_calls for r in patch.report().layers] == [1, 1]
    assert torch.equal(run(model, **given), before)


@pytest.mark.parametrize("kind", PIPELINES)
def test_dense_changes_no_bit_of_a_pipeline(kind: str) -> None:
    pipe = tiny_wan.pipeline(kind)
    before = tiny_wan.generate(pipe)
    with hsa.patch(pipe, "dense", min_tokens=0) as patch:
        assert torch.equal(tiny_wan.generate(pipe), before)
    layers = patch.report().layers
    assert sum(r.dense_calls for r in layers) == 8 and not any(r.sparse_calls for r in layers)


@pytest.mark.parametrize("kind", ["bare", "t2v", "experts"])
@pytest.mark.parametrize("how", ["remove", "with", "exception", "unpatch", "later hooks"])
def test_removal_restores_everything(kind: str, how: str) -> None:
    model = tiny_wan.transformer() if kind == "bare" else tiny_wan.pipeline(kind)
    part = model if kind == "bare" else model.transformer
    part.blocks[1].attn1.set_attention_backend("_native_math")
    given = tiny_wan.inputs()
    output = run(part, **given)
    if kind != "bare":
        tiny_wan.generate(model, 1)
    before = state(model)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    assert not torch.equal(run(part, **given), output)
    if how == "later hooks":
        modules = (part, part.blocks[0].attn1)
        handles = [m.register_forward_pre_hook(lambda *_: None, prepend=p) for m in modules for p in (True, False)]
        patch.remove()
        for handle in handles:
            handle.remove()
    elif how == "exception":
        with pytest.raises(RuntimeError), patch:
            run(part, **{**given, "encoder_hidden_states": torch.zeros(1, 9, 31)})
    elif how == "with":
        with patch:
            pass
    else:
        patch.remove() if how == "remove" else hsa.unpatch(model)
    assert_same(before, state(model))
    assert torch.equal(run(part, **given), output)


def test_cross_attention_and_its_image_keys_are_not_touched() -> None:
    model = tiny_wan.transformer(image_dim=16, added_kv_proj_dim=24)
    given = tiny_wan.inputs()
    given["encoder_hidden_states"] = torch.randn(1, 512, 32)
    given["encoder_hidden_states_image"] = torch.randn(1, 7, 16)
    with hsa.patch(model, "sliding_window", **SPARSE) as patch:
        got = run(model, **given)
        assert [r.sparse_calls for r in patch.report().layers] == [1, 1]
    assert_close(got, model, given, window_mask(455))


def test_a_processor_shared_with_cross_attention() -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    model.set_attn_processor(copy.copy(model.blocks[0].attn1.processor))
    before = state(model)
    with hsa.patch(model, "sliding_window", **SPARSE) as patch:
        got = run(model, **given)
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(1, 0), (1, 0)]
    assert_same(before, state(model))
    assert_close(got, model, given, window_mask(455))


def test_dense_calls_use_the_backend_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models import attention_dispatch as file

    model, given, calls = tiny_wan.transformer(), tiny_wan.inputs(), []
    math = file.AttentionBackendName._NATIVE_MATH
    original = file._AttentionBackendRegistry._backends[math]
    monkeypatch.setitem(
        file._AttentionBackendRegistry._backends, math, lambda **given: calls.append(1) or original(**given)
    )
    model.blocks[0].attn1.set_attention_backend("_native_math")
    with hsa.patch(model, "dense", min_tokens=0):
        run(model, **given)
        assert len(calls) == 1
        with file.attention_backend("_native_math"):
            run(model, **given)
        assert len(calls) == 1 + 4


@pytest.mark.parametrize("latents", [(5, 14, 26), (1, 2, 34), (3, 6, 10)], ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("backend", ["torch_reference", "auto"])
def test_sparse_equals_the_mask(latents: tuple[int, int, int], backend: str) -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs(2, latents)
    tokens = latents[0] * latents[1] * latents[2] // 4
    with hsa.patch(model, "sliding_window", strict=True, **{**SPARSE, "backend": backend}):
        got = run(model, **given)
    assert_close(got, model, given, window_mask(tokens))


def test_vace_control_blocks_are_sparse_too() -> None:
    model = tiny_wan.transformer(cls="WanVACETransformer3DModel", vace_layers=[0, 2], vace_in_channels=8, num_layers=3)
    given = {**tiny_wan.inputs(), "control_hidden_states": torch.randn(1, 8, 5, 14, 26)}
    dense = run(model, **given)
    with hsa.patch(model, "dense"):
        assert torch.equal(run(model, **given), dense)
    with hsa.patch(model, "sliding_window", **SPARSE) as patch:
        got = run(model, **given)
    names = [(r.layer, r.name.removeprefix("transformer.")) for r in patch.report().layers if r.sparse_calls == 1]
    control = [(0, "vace_blocks.0.attn1"), (2, "vace_blocks.1.attn1")]
    assert sorted(names) == sorted([*((i, f"blocks.{i}.attn1") for i in range(3)), *control])
    from diffusers.models.transformers import transformer_wan_vace as file

    assert file.WanAttnProcessor is type(model.vace_blocks[0].attn1.processor)
    assert_close(got, model, given, window_mask(455))


@pytest.mark.parametrize("name", applicable())
def test_full_budget_is_dense(name: str) -> None:
    params = hsa.get_method(name).full_budget()
    if params is None:
        pytest.skip("has no budget")
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    with hsa.patch(model, name, backend="torch_reference", min_tokens=0, strict=True, **params):
        got = run(model, **given)
    assert_close(got, model, given, None)


@pytest.mark.parametrize("name", applicable())
def test_a_batch_is_its_rows(name: str) -> None:
    """Both guidance branches in one batch, or two clips, give what two calls give."""
    model = tiny_wan.transformer()
    rows = [tiny_wan.inputs(latents=(3, 10, 14), seed=s) for s in (1, 2)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    one = torch.cat([run(model, **r) for r in rows])
    rounding = max((run(model, **batch) - one).abs().max(), torch.finfo(torch.float32).eps * one.abs().max())
    for params in hsa.get_method(name).examples():
        with hsa.patch(model, name, backend="torch_reference", min_tokens=0, **params) as patch:
            apart = torch.cat([run(model, **r) for r in rows])
            together = run(model, **batch)
        assert together.isfinite().all()
        assert (together - apart).abs().max() <= 8 * rounding
        assert name == "dense" or all(r.sparse_calls == 3 for r in patch.report().layers), patch.report()


def test_every_layer_is_told_where_it_is() -> None:
    model = tiny_wan.transformer(num_layers=3)
    patch, seen = spy(model)
    assert [(r.layer, r.name) for r in patch.report().layers] == [
        (i, f"transformer.blocks.{i}.attn1") for i in range(3)
    ]
    with model.cache_context("cond", step_index=4, num_inference_steps=9):
        run(model, **tiny_wan.inputs())
    assert [(c.layer, c.num_layers, c.step, c.num_steps, c.branch) for c in seen] == [
        (i, 3, 4, 9, "cond") for i in range(3)
    ]
    assert {(c.layout, c.num_heads, c.num_kv_heads, c.head_dim) for c in seen} == {
        (hsa.TokenLayout.video(5, 7, 13), 2, 2, 12)
    }


@pytest.mark.parametrize("kind", [*PIPELINES, "v2v"])
def test_steps_of_a_pipeline(kind: str) -> None:
    """Announced by WanPipeline, counted for the others; experts count as one run, and a second clip starts anew."""
    pipe = tiny_wan.pipeline(kind)
    patch, seen = spy(pipe)
    for _ in range(2):
        tiny_wan.generate(pipe, steps=4)
    # strength=0.5 leaves the last half of the schedule
    steps = 2 if kind == "v2v" else 4
    branches = [None, None] if kind == "v2v" else ["cond", "uncond"]
    told = [(c.step, c.num_steps, c.branch, c.layer) for c in seen]
    assert told == [(s, steps, b, layer) for s in range(steps) for b in branches for layer in (0, 1)] * 2
    names = {r.name.split(".")[0] for r in patch.report().layers if r.sparse_calls}
    expected = {"experts": {"transformer", "transformer_2"}, "low_only": {"transformer_2"}}
    assert names == {**expected, "i2v": expected["experts"]}.get(kind, {"transformer"})


@pytest.mark.parametrize("kind", ["t2v", "experts", "i2v"])
def test_dense_steps_and_layers(kind: str) -> None:
    pipe = tiny_wan.pipeline(kind)
    patch = hsa.patch(pipe, "sliding_window", dense_steps=(0.25, 0.25), dense_layers=[0], strict=True, **SPARSE)
    tiny_wan.generate(pipe, steps=4)
    first, second = ([r for r in patch.report().layers if r.layer == i] for i in (0, 1))
    assert sum(r.sparse_calls for r in first) == 0 and sum(r.reasons["dense_layers"] for r in first) == 8
    assert sum(r.sparse_calls for r in second) == 4 and sum(r.reasons["dense_steps"] for r in second) == 4
    assert all(r.dense_calls == r.sparse_calls == 4 // len(second) for r in second)


def test_timesteps_per_token_count_by_their_largest() -> None:
    model = tiny_wan.transformer()
    _, seen = spy(model)
    for time in (900.0, 900.0, 500.0, 100.0, 900.0):
        per_token = torch.full((1, 455), time)
        per_token[:, :91] = 0.0
        run(model, **{**tiny_wan.inputs(), "timestep": per_token})
    assert [c.step for c in seen if c.layer == 0] == [0, 0, 1, 2, 0]


def test_an_unknown_schedule_is_said() -> None:
    """A bare transformer: dense_steps needs the run's length, which the user can announce."""
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    with hsa.patch(model, "sliding_window", dense_steps=0.5, **SPARSE) as patch:
        run(model, **given)
        for step in range(2):
            with model.cache_context("cond", step_index=step, num_inference_steps=2):
                run(model, **given)
    for layer in patch.report().layers:
        assert layer.sparse_calls == 1 and layer.reasons.pop("dense_steps") == 1
        assert "number of steps unknown" in next(iter(layer.reasons))
    with hsa.patch(model, "sliding_window", dense_steps=0.5, strict=True, **SPARSE):
        with pytest.raises(hsa.DenseFallback, match="number of steps unknown"):
            run(model, **given)
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE) as patch:
        run(model, **given)
    assert all(r.sparse_calls == 1 for r in patch.report().layers)


def test_the_schedule_of_a_pipeline_serves_a_loop_of_its_own() -> None:
    pipe = tiny_wan.pipeline("t2v")
    _, seen = spy(pipe)
    tiny_wan.generate(pipe, steps=2)
    seen.clear()
    pipe.scheduler.set_timesteps(3)
    # Its own times, by a variable that no loop sets; and more falls than the schedule has steps: still a valid step.
    times = [*pipe.scheduler.timesteps.tolist(), 0.5]
    while times:
        run(pipe.transformer, **tiny_wan.inputs(time=times.pop(0)))
    assert [(c.step, c.num_steps) for c in seen if c.layer == 0] == [(0, 3), (1, 3), (2, 3), (2, 3)]


def test_two_pipelines_share_nothing() -> None:
    pipes = [tiny_wan.pipeline("t2v"), tiny_wan.pipeline("t2v")]
    (first, one), (second, two) = (spy(p) for p in pipes)
    for time in (900.0, 600.0):
        run(pipes[0].transformer, **tiny_wan.inputs(time=time))
    run(pipes[1].transformer, **tiny_wan.inputs(latents=(3, 6, 10), time=300.0))
    assert [c.step for c in one if c.layer == 1] == [0, 1] and [c.step for c in two if c.layer == 1] == [0]
    assert {str(c.layout) for c in two} == {"bidirectional 3x3x5"}
    first.remove()
    run(pipes[1].transformer, **tiny_wan.inputs(time=100.0))
    assert [c.step for c in two if c.layer == 1] == [0, 1] and len(one) == 4
    second.remove()
