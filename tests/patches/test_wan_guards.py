"""Wan: gradients through a patch, and every guard of it firing."""

from __future__ import annotations

import copy
import gc
import logging
import types
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Method
from tests.support import tiny_wan
from tests.support.processes import run_code
from tests.support.tiny_wan import assert_same, run, spy, state, window_mask

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = {"backend": "torch_reference", "min_tokens": 0, "window": 60, "sink": 5, "block_size": 32}


@dataclass(frozen=True, kw_only=True)
class NeedsCausal(Method):
    """Never applies to video."""

    needs = frozenset({"causal"})


def gradients(model: Any, *calls: dict[str, Any]) -> list[torch.Tensor]:
    """Gradients of all trained weights after one backward through several forwards."""
    model.zero_grad()
    sum(run(model, grad=True, **given).square().mean() for given in calls).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointed_layers_are_recomputed_as_they_were(reentrant: bool) -> None:
    """Two forwards of different grids and steps before one backward: each recomputation gets its own."""
    model = tiny_wan.transformer(num_layers=3)
    calls = [tiny_wan.inputs(latents=(5, 14, 26), time=900.0), tiny_wan.inputs(latents=(3, 6, 10), time=300.0)]
    for given in calls:
        given["hidden_states"].requires_grad_()
    with hsa.patch(model, "sliding_window", **SPARSE):
        plain = gradients(model, *calls)
        model.enable_gradient_checkpointing(
            lambda f, *args: torch.utils.checkpoint.checkpoint(f, *args, use_reentrant=reentrant)
        )
        model.train()
        again = gradients(model, *calls)
    # The reentrant kind sums the six gradients of the text (three layers, two forwards) in another order, in the
    # unpatched model too.
    rounding = 6 * torch.finfo(torch.float32).eps if reentrant else 0.0
    for a, b in zip(plain, again, strict=True):
        assert (a - b).abs().max() <= rounding * a.abs().max()
    patch, seen = spy(model, strict=True)
    gradients(model, *calls)
    told = [(c.layer, c.step, str(c.layout)) for c in seen]
    assert sorted(told[:6]) == sorted(told[6:]) and told[6:] != told[:6] and len(told) == 12
    patch.remove()
    model.disable_gradient_checkpointing()
    assert not all(torch.equal(a, b) for a, b in zip(gradients(model, *calls), plain, strict=True))


def test_lora_trains_through_the_patch() -> None:
    """PEFT wraps the transformer; the patch finds it inside and the gradient is that of the masked model."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    model, given = peft.get_peft_model(tiny_wan.transformer(), config).eval(), tiny_wan.inputs()
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE) as patch:
        got = gradients(model, given)
        assert [r.sparse_calls for r in patch.report().layers] == [1, 1]
    with tiny_wan.replaced_attention(window_mask(455), torch.float64):
        exact = gradients(model, given)
    with tiny_wan.replaced_attention(window_mask(455), torch.float32):
        rounding = max((a - b).abs().max() for a, b in zip(gradients(model, given), exact, strict=True))
    assert len(got) == 16 and all((a - b).abs().max() <= 4 * rounding for a, b in zip(got, exact, strict=True))
    assert max(g.abs().max() for g in got) > 100 * rounding


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (nn.Linear(2, 2), "Linear holds no WanTransformer3DModel"),
        (types.SimpleNamespace(components={}), "neither a module nor a pipeline with a `transformer`"),
        (types.SimpleNamespace(transformer=None), "has no transformer"),
        (types.SimpleNamespace(transformer=nn.Linear(2, 2)), "holds no WanTransformer3DModel"),
    ],
    ids=["Linear", "no attribute", "no transformer", "other transformer"],
)
def test_other_models_are_refused(model: Any, reason: str) -> None:
    with pytest.raises(TypeError, match=reason):
        hsa.patch(model, "dense")


def test_a_pipeline_whose_transformers_are_gone() -> None:
    pipe = tiny_wan.pipeline("t2v")
    pipe.transformer = None
    with pytest.raises(TypeError, match="WanPipeline has no transformer"):
        hsa.patch(pipe, "dense")


def test_other_models_are_refused_without_diffusers() -> None:
    code = (
        "import sys, torch, hf_sparse_attn.patches.wan as f; d = f.Wan.targets(torch.nn.Linear(2, 2));"
        "assert 'holds no' in d.reason and 'diffusers' not in sys.modules"
    )
    done = run_code(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("why", ["method", "needs", "processor", "diffusers"])
def test_a_failed_patch_leaves_the_model_untouched(why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = tiny_wan.transformer(), NeedsCausal() if why == "needs" else "sliding_window"
    error: tuple[Any, str] = (hsa.MethodDoesNotApply, "needs a causal layout")
    if why == "method":
        method, error = "no_such_method", (ValueError, "must be one of")
    if why == "processor":
        model.blocks[1].attn1.processor = object()
        error = (ValueError, "an? object without `_attention_backend` at transformer.blocks.1.attn1")
    if why == "diffusers":
        from diffusers.models import attention_dispatch as file

        monkeypatch.setattr(file._AttentionBackendRegistry, "_constraints", None)
        error = (RuntimeError, "must have the attention dispatcher")
    before = state(model)
    with pytest.raises(error[0], match=error[1]):
        hsa.patch(model, method)
    assert_same(before, state(model))


def test_patching_twice_changes_nothing() -> None:
    pipe = tiny_wan.pipeline("experts")
    hsa.patch(pipe.transformer_2, "sliding_window")
    before = state(pipe)
    with pytest.raises(ValueError, match="patched already"):
        hsa.patch(pipe, "sliding_window")
    assert_same(before, state(pipe))
    hsa.unpatch(pipe)
    with pytest.raises(ValueError, match="must be patched"):
        hsa.unpatch(pipe)


def test_a_backend_set_after_the_patch_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    before, dense = state(model), run(model, **given)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    model.blocks[1].attn1.set_attention_backend("native")
    with caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        run(model, **given)
        run(model, **given)
    assert sum("changed after the patch to native" in r.message for r in caplog.records) == 1
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(2, 0), (0, 2)]
    patch.remove()
    assert_same(before, state(model))
    with hsa.patch(model, "sliding_window", strict=True, **SPARSE):
        model.blocks[0].attn1.set_attention_backend("native")
        with pytest.raises(hsa.DenseFallback, match=r"transformer\.blocks\.0\.attn1: attention backend changed"):
            run(model, **given)
    assert torch.equal(run(model, **given), dense)


def test_calls_that_do_not_fit_are_dense_and_said() -> None:
    """A mask, another number of tokens than the grid has, and an attention called by itself."""
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    attention = model.blocks[0].attn1
    hidden, mask = torch.randn(1, 64, 24), window_mask(64)
    with torch.no_grad():
        expected = attention(hidden, None, mask), attention(hidden)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    with torch.no_grad():
        assert torch.equal(attention(hidden, None, mask), expected[0])
        with pytest.raises(RuntimeError):
            run(model, **{**given, "encoder_hidden_states": torch.zeros(1, 9, 31)})
        assert torch.equal(attention(hidden), expected[1])
    masked = attention.register_forward_pre_hook(lambda m, a: (*a[:2], window_mask(455), a[3]))
    run(model, **given)
    masked.remove()
    crop = attention.register_forward_pre_hook(lambda m, a: (a[0][:, :50], None, None))
    pad = attention.register_forward_hook(lambda m, a, out: F.pad(out, (0, 0, 0, 405)))
    run(model, **given)
    first, second = patch.report().layers
    assert second.sparse_calls == 2 and first.sparse_calls == 0 and list(first.reasons.values()) == [2, 1, 1]
    reasons = "; ".join(first.reasons)
    for part in ("has a mask", "outside of the transformer's forward", "50 queries and 50 keys do not fit the grid"):
        assert part in reasons
    crop.remove(), pad.remove(), patch.remove()


def test_a_deep_copy_runs_dense_and_outlives_the_patch(caplog: pytest.LogCaptureFixture) -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    dense = run(model, **given)
    patch = hsa.patch(model, "sliding_window", **SPARSE)
    twin = copy.deepcopy(model)
    assert torch.equal(run(twin, **given), dense) and "deep copy" in caplog.text
    assert twin.cache_context.__self__ is twin
    sparse = run(model, **given)
    patch.remove()
    assert torch.equal(run(twin, **given), dense) and not torch.equal(sparse, dense)


def test_a_patch_keeps_no_pipeline_alive() -> None:
    pipe = tiny_wan.pipeline("t2v")
    hsa.patch(pipe, "sliding_window")
    gone = weakref.ref(pipe), weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert [ref() for ref in gone] == [None, None]


def test_a_transformer_patched_by_itself_forgets_its_pipeline() -> None:
    pipe = tiny_wan.pipeline("experts")
    tiny_wan.generate(pipe)
    hsa.patch(pipe, "sliding_window").remove()
    patch, seen = spy(pipe.transformer_2)
    run(pipe.transformer_2, **tiny_wan.inputs())
    assert [r.name for r in patch.report().layers] == [f"transformer.blocks.{i}.attn1" for i in (0, 1)]
    assert {c.num_steps for c in seen} == {1}


@pytest.mark.parametrize("what", ["fused projections", "group offload", "float8 storage"])
def test_what_else_diffusers_does_to_a_model(what: str) -> None:
    def change(model: Any) -> None:
        if what == "fused projections":
            model.fuse_qkv_projections()
        elif what == "group offload":
            cpu = torch.device("cpu")
            try:
                diffusers.hooks.apply_group_offloading(
                    model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1
                )
            except AttributeError:
                pytest.skip(f"group offload of diffusers {diffusers.__version__} needs an accelerator")
        else:
            model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)

    given, models = tiny_wan.inputs(), [tiny_wan.transformer(), tiny_wan.transformer()]
    change(models[0])
    dense = run(models[0], **given)
    with hsa.patch(models[0], "dense", min_tokens=0):
        assert torch.equal(run(models[0], **given), dense)
    patches = [hsa.patch(model, "sliding_window", **SPARSE) for model in models]
    change(models[1])
    before, after = (run(model, **given) for model in models)
    assert torch.equal(before, after) and not torch.equal(before, dense)
    assert all(r.sparse_calls == 1 for patch in patches for r in patch.report().layers)
    patches[0].remove()
    assert torch.equal(run(models[0], **given), dense)


def test_compiled_blocks_share_their_graphs() -> None:
    """No recompilation from layer to layer or step to step, which dynamo would give up on after eight."""
    model, given = tiny_wan.transformer(num_layers=3), tiny_wan.inputs()
    torch._dynamo.reset()
    with hsa.patch(model, "sliding_window", dense_steps=0.3, **SPARSE) as patch:
        with model.cache_context("cond", step_index=1, num_inference_steps=3):
            sparse = run(model, **given)
        model.compile_repeated_blocks(backend="eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for step in range(3):
                with model.cache_context("cond", step_index=step, num_inference_steps=3):
                    got = run(model, **given)
        assert torch.equal(got, sparse)
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(3, 1)] * 3
