"""Patched video transformers under torch.compile: whole graphs, few of them, the steps and counts as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_sparse_attn as hsa
from tests.support import tiny_hunyuan, tiny_wan

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

WINDOW = dict(method="sliding_window", window=40, sink=0, block_size=16, min_tokens=0)
RADIAL = dict(method="radial", block_size=16, min_tokens=0)
KINDS = ["wan", "hunyuan", "hunyuan 1.5"]
# The forward of HunyuanVideo 1.5 branches on whether its image is all zeros, which breaks a graph with or without us.
WHOLE = ["wan", "hunyuan"]
# Fused operators sum in another order, over a few layers of float32.
CLOSE = dict(atol=2e-5, rtol=2e-5)


def build(kind: str, layers: int = 3) -> tuple[Any, dict[str, torch.Tensor]]:
    if kind == "wan":
        return tiny_wan.transformer(num_layers=layers), tiny_wan.inputs()
    name = "1.5" if kind.endswith("1.5") else "t2v"
    return tiny_hunyuan.transformer(name, num_layers=layers), tiny_hunyuan.inputs(name)


def counts(patch: hsa.Patch) -> set[tuple[int, int]]:
    return {(r.sparse_calls, r.dense_calls) for r in patch.report().layers}


def over_steps(run: Any, model: Any, given: dict[str, torch.Tensor], grad: bool = False) -> list[torch.Tensor]:
    """One output per step of a run of three, cond and uncond at the last."""
    found = []
    for step, branch in ((0, "cond"), (1, "cond"), (2, "cond"), (2, "uncond")):
        with (
            model.cache_context(branch, step_index=step, num_inference_steps=3),
            torch.set_grad_enabled(grad),
        ):
            found.append(run(**given)[0])
    return found


@pytest.mark.parametrize(
    "kind, backend",
    [*((kind, "aot_eager") for kind in KINDS), pytest.param("wan", "inductor", marks=pytest.mark.slow)],
)
def test_blocks_are_whole_graphs_that_layers_and_steps_share(kind: str, backend: str) -> None:
    model, given = build(kind, layers=5)
    counter = CompileCounterWithBackend(backend)
    with hsa.patch(model, dense_steps=0.3, **RADIAL) as patch:
        want = over_steps(model, model, given)
        assert counts(patch) == {(3, 1)}
        model.compile_repeated_blocks(fullgraph=True, backend=counter)
        for got, eager in zip(over_steps(model, model, given), want, strict=True):
            torch.testing.assert_close(got, eager, **CLOSE)
        assert counts(patch) == {(6, 2)}
        # One for each kind of block: HunyuanVideo repeats embeddings and text refiners, too.
        assert counter.frame_count <= {"wan": 1, "hunyuan": 4, "hunyuan 1.5": 5}[kind]


@pytest.mark.parametrize("kind", WHOLE)
def test_whole_transformer_is_one_graph_for_all_steps_and_grids(kind: str) -> None:
    model, given = build(kind)
    counter = CompileCounterWithBackend("eager")
    with hsa.patch(model, dense_steps=0.3, **RADIAL) as patch:
        want = over_steps(model, model, given)
        run = torch.compile(model, fullgraph=True, backend=counter)
        for got, eager in zip(over_steps(run, model, given), want, strict=True):
            torch.testing.assert_close(got, eager, **CLOSE)
        assert counts(patch) == {(6, 2)}
        # The model, and the hook before it.
        assert counter.frame_count == 2
        if kind == "wan":
            for size in ((3, 10, 18), (2, 18, 8)):
                other = tiny_wan.inputs(latents=size)
                torch.testing.assert_close(run(**other)[0], model(**other)[0], **CLOSE)
            assert counter.frame_count <= 4


@pytest.mark.parametrize(
    "kind, whole",
    [
        pytest.param("wan", True, id="whole-wan"),
        pytest.param("hunyuan", True, id="whole-hunyuan", marks=pytest.mark.slow),
        pytest.param("wan", False, id="blocks-wan", marks=pytest.mark.slow),
        pytest.param("hunyuan", False, id="blocks-hunyuan"),
        pytest.param("hunyuan 1.5", False, id="blocks-hunyuan 1.5", marks=pytest.mark.slow),
    ],
)
def test_gradients(kind: str, whole: bool) -> None:
    """Of several forwards before one backward: each is recomputed as it was."""
    model, given = build(kind, layers=2)
    found = []
    with hsa.patch(model, dense_steps=0.3, **WINDOW) as patch:
        run = model
        for compiled in (False, True):
            if compiled and whole:
                run = torch.compile(model, fullgraph=True, backend="aot_eager")
            elif compiled:
                model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
            model.zero_grad()
            sum(out.square().mean() for out in over_steps(run, model, given, grad=True)).backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        assert counts(patch) == {(6, 2)}
    for name, grad in found[0].items():
        assert (found[1][name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-9, name


@pytest.mark.parametrize("kind", ["wan", "hunyuan", pytest.param("hunyuan 1.5", marks=pytest.mark.slow)])
def test_gradient_checkpointing_in_compiled_blocks(kind: str) -> None:
    model, given = build(kind, layers=2)
    model.train()
    found = []
    with hsa.patch(model, **WINDOW):
        for _ in range(2):
            model.zero_grad()
            model(**given)[0].square().mean().backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
            model.enable_gradient_checkpointing()
            model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    for name, grad in found[0].items():
        assert (found[1][name] - grad).abs().max() <= 2e-4 * grad.abs().max() + 1e-9, name


@pytest.mark.slow
@torch.no_grad()
def test_removed_patches_are_gone_from_the_graph() -> None:
    model, given = build("wan")
    dense = model(**given)[0]
    run = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(**given)[0], dense, **CLOSE)
    for _ in range(2):
        with hsa.patch(model, **WINDOW) as patch:
            assert (run(**given)[0] - dense).abs().max() > 1e-3
            assert counts(patch) == {(1, 0)}
        torch.testing.assert_close(run(**given)[0], dense, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_a_backend_set_after_the_patch_is_noticed_in_the_graph(caplog: pytest.LogCaptureFixture) -> None:
    model, given = build("wan")
    dense = model(**given)[0]
    with hsa.patch(model, **WINDOW) as patch:
        run = torch.compile(model, fullgraph=True, backend="eager")
        run(**given)
        model.set_attention_backend("native")
        torch.testing.assert_close(run(**given)[0], dense, **CLOSE)
        assert counts(patch) == {(1, 1)}
    assert "attention backend changed after the patch" in caplog.text


@pytest.mark.slow
@torch.no_grad()
def test_two_patched_models_in_graphs_do_not_mix() -> None:
    models = [tiny_wan.transformer(seed=i) for i in range(2)]
    given = tiny_wan.inputs()
    patches = [hsa.patch(m, **method) for m, method in zip(models, (WINDOW, RADIAL), strict=True)]
    want = [m(**given)[0] for m in models]
    runs = [torch.compile(m, fullgraph=True, backend="eager") for m in models]
    for _ in range(2):
        for run, out in zip(runs, want, strict=True):
            torch.testing.assert_close(run(**given)[0], out, **CLOSE)
    assert [counts(p) for p in patches] == [{(3, 0)}] * 2
    for patch in patches:
        patch.remove()


@torch.no_grad()
def test_a_call_with_dropout_is_dense_in_the_graph_and_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.transformers import transformer_wan

    model, given = build("wan", layers=2)
    dispatch = transformer_wan.dispatch_attention_fn

    def with_dropout(*args: Any, **kwargs: Any) -> torch.Tensor:
        return dispatch(*args, **{**kwargs, "dropout_p": 1e-12})

    dense = model(**given)[0]
    monkeypatch.setattr(transformer_wan, "dispatch_attention_fn", with_dropout)
    with hsa.patch(model, **WINDOW) as patch:
        run = torch.compile(model, fullgraph=True, backend="eager")
        for _ in range(2):
            torch.testing.assert_close(run(**given)[0], dense, **CLOSE)
    noted = "the call has a dropout, which is not supported (counted once per compiled graph)"
    assert [r.reasons for r in patch.report().layers] == [{noted: 1}] * 2
