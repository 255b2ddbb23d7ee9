"""Video transformers with what else diffusers does to them, before and after patching: neither knows of the other."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from tests.support import tiny_hunyuan, tiny_wan
from tests.support.composed_video import (
    FULL,
    KINDS,
    NOW,
    WINDOW,
    assert_full_budget,
    assert_no_trace,
    attention_in,
    fresh,
    inputs,
    play,
)
from tests.support.tiny_wan import assert_same, run, state

diffusers = pytest.importorskip("diffusers")
accelerate = pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.usefixtures("one_thread")

TARGETS = ["to_q", "to_v"]
CPU = torch.device("cpu")
Undo = Callable[[], object] | None


# ------------------------------------------------------------------ what is done to a model; each gives its undoing


@functools.cache
def adapter(kind: str, seed: int) -> dict[str, torch.Tensor]:
    """Weights of a LoRA as a file of them has, with the pipeline's part in their names."""
    model = fresh(kind)
    torch.manual_seed(seed)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False))
    weights = peft.get_peft_model_state_dict(model, adapter_name="default")
    return {f"transformer.{k}": v.detach().clone() for k, v in weights.items()}


def lora(model: Any, kind: str) -> Undo:
    for seed, name in enumerate("ab"):
        model.load_lora_adapter(dict(adapter(kind, seed)), prefix="transformer", adapter_name=name)
    model.set_adapters(["a", "b"], [0.7, -0.4])
    return model.unload_lora


def fused_lora(model: Any, kind: str) -> Undo:
    unload = lora(model, kind)
    model.fuse_lora()

    def undo() -> None:
        model.unfuse_lora()
        unload()

    return undo


def fused_projections(model: Any, kind: str) -> Undo:
    if not hasattr(model, "fuse_qkv_projections"):
        pytest.skip(f"{type(model).__name__} of diffusers {diffusers.__version__} fuses no projections")
    model.fuse_qkv_projections()
    return model.unfuse_qkv_projections


def group_offload(model: Any, kind: str) -> Undo:
    try:
        model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)
    except AttributeError:
        pytest.skip(f"group offload of diffusers {diffusers.__version__} needs an accelerator")
    return None


def model_offload(model: Any, kind: str) -> Undo:
    accelerate.cpu_offload_with_hook(model, "cpu")
    return lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True)


def sequential_offload(model: Any, kind: str) -> Undo:
    accelerate.cpu_offload(model, "cpu", offload_buffers=True)
    return None


def dispatched(model: Any, kind: str) -> Undo:
    names = {n for n, _ in model.named_children()} | {n for n, _ in model.named_parameters(recurse=False)}
    accelerate.dispatch_model(model, dict.fromkeys(names, "cpu"), main_device="cpu", force_hooks=True)
    return lambda: accelerate.hooks.remove_hook_from_module(model, recurse=True)


def float8_storage(model: Any, kind: str) -> Undo:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    return None


def half(model: Any, kind: str) -> Undo:
    model.to(torch.bfloat16)
    return None


def average(model: Any, kind: str) -> Undo:
    """Weights of an exponential average, put in and taken out."""
    from diffusers.training_utils import EMAModel

    ema = EMAModel(fresh(kind).parameters(), decay=0.5)
    with torch.no_grad():
        for shadow in ema.shadow_params:
            shadow.mul_(0.9)
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    return lambda: ema.restore(model.parameters())


CHANGES = (
    lora, fused_lora, fused_projections, group_offload, model_offload, sequential_offload, dispatched, float8_storage,
    half, average,
)  # fmt: skip


def named(change: Callable[..., Undo]) -> str:
    return change.__name__


def reference(change: Callable[..., Undo], kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a model without a patch gives when it is changed, and when that is undone."""
    model = fresh(kind)
    undo = change(model, kind)
    changed = play(model, kind)
    if undo is None:
        return changed, None
    undo()
    return changed, play(model, kind)


def state_of(model: Any) -> dict[str, Any]:
    """`state`, less the weights that are elsewhere while nothing runs."""
    found = state(model)
    for name, value in found.items():
        if name.endswith("weights"):
            found[name] = {k: v for k, v in value.items() if v.device.type != "meta"}
    return found


@functools.cache
def sparse_after_change(change: Callable[..., Undo], kind: str) -> torch.Tensor:
    model = fresh(kind)
    change(model, kind)
    with hsa.patch(model, **WINDOW) as patch:
        sparse = play(model, kind)
    assert all((r.sparse_calls, r.dense_calls) == (1, 0) for r in patch.report().layers)
    return sparse


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_changed_before_the_patch(change: Callable[..., Undo], kind: str) -> None:
    changed, undone = reference(change, kind)
    model = fresh(kind)
    undo = change(model, kind)
    assert torch.equal(play(model, kind), changed)
    before = state_of(model)
    with hsa.patch(model, "dense", min_tokens=0):
        assert torch.equal(play(model, kind), changed)
    with hsa.patch(model, **WINDOW):
        assert torch.equal(play(model, kind), sparse_after_change(change, kind))
    assert_full_budget(model, lambda: play(model, kind), torch.bfloat16 if change is half else torch.float32)
    assert_same(before, state_of(model))
    assert torch.equal(play(model, kind), changed)
    if undo is not None:
        with hsa.patch(model, **WINDOW):
            undo()
            assert not torch.equal(play(model, kind), undone)
        assert torch.equal(play(model, kind), undone)
    assert_no_trace(model)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("change", CHANGES, ids=named)
def test_changed_after_the_patch(change: Callable[..., Undo], kind: str) -> None:
    changed, undone = reference(change, kind)
    model = fresh(kind)
    patch = hsa.patch(model, **WINDOW)
    play(model, kind)
    undo = change(model, kind)
    sparse = play(model, kind)
    assert torch.equal(sparse, sparse_after_change(change, kind)) and not torch.equal(sparse, changed)
    assert all((r.sparse_calls, r.dense_calls) == (2, 0) for r in patch.report().layers)
    patch.remove()
    assert_no_trace(model)
    assert torch.equal(play(model, kind), changed)
    if undo is not None:
        undo()
        assert torch.equal(play(model, kind), undone)


# ------------------------------------------------------------------ adapters through the pipeline, and their training


@pytest.mark.parametrize("first", ["patch", "lora"])
@pytest.mark.parametrize("kind", KINDS)
def test_lora_of_a_pipeline(kind: str, first: str) -> None:
    """Load, weigh, fuse, unfuse, unload: with a dense patch every step gives what it gives without one."""
    tiny = tiny_wan if kind == "wan" else tiny_hunyuan
    steps: list[Callable[[Any], object]] = [
        lambda pipe: pipe.load_lora_weights(dict(adapter(kind, 0)), adapter_name="a"),
        lambda pipe: pipe.load_lora_weights(dict(adapter(kind, 1)), adapter_name="b"),
        lambda pipe: pipe.set_adapters(["a", "b"], [0.7, -0.4]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(components=["transformer"]),
        lambda pipe: pipe.unfuse_lora(components=["transformer"]),
        lambda pipe: pipe.delete_adapters("a"),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    plain, pipes = tiny.pipeline(), [tiny.pipeline(), tiny.pipeline()]
    start = tiny.generate(plain, 1)
    sparse = {**WINDOW, "window": 3, "sink": 1}
    patches = [hsa.patch(pipe, **how) for pipe, how in zip(pipes, ({"method": "dense"}, sparse), strict=True)]
    if first == "lora":
        for patch in patches:
            patch.remove()
        for pipe in (plain, *pipes):
            steps[0](pipe)
        steps = steps[1:]
        patches = [hsa.patch(pipe, **how) for pipe, how in zip(pipes, ({"method": "dense"}, sparse), strict=True)]
    seen = [start]
    for step in steps:
        for pipe in (plain, *pipes):
            step(pipe)
        dense = tiny.generate(plain, 1)
        assert torch.equal(tiny.generate(pipes[0], 1), dense)
        assert not torch.equal(tiny.generate(pipes[1], 1), dense)
        seen.append(dense)
    assert not torch.equal(seen[-2], seen[0])
    for patch, pipe in zip(patches, pipes, strict=True):
        patch.remove()
        assert torch.equal(tiny.generate(pipe, 1), seen[-1])
        assert_no_trace(pipe.transformer)


@pytest.mark.parametrize("kind", KINDS)
def test_added_adapter_trains(kind: str, tmp_path: Any) -> None:
    """The same gradients in both orders, those of dense attention at full budget; after a step the weights are the
    model's own, with or without the patch, and a saved adapter has nothing of ours.
    """
    config = peft.LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)

    def train(how: dict[str, Any] | None, first: str, dtype: torch.dtype | None = None) -> tuple[Any, torch.Tensor]:
        model, patch = fresh(kind), None
        for what in ("lora", "patch") if first == "lora" else ("patch", "lora"):
            if what == "patch" and how is not None:
                patch = hsa.patch(model, **how)
            if what == "lora":
                torch.manual_seed(5)
                model.add_adapter(config)
        for name, weight in model.named_parameters():
            weight.requires_grad_("lora_" in name)
        if dtype is None:
            run(model, grad=True, **inputs(kind)).square().mean().backward()
        else:
            with attention_in(dtype):
                run(model, grad=True, **inputs(kind)).square().mean().backward()
        if patch is not None:
            assert all((r.sparse_calls, r.dense_calls) == (1, 0) for r in patch.report().layers)
            patch.remove()
            assert_no_trace(model)
        return model, torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (model, one), (_, two) = train(WINDOW, "lora"), train(WINDOW, "patch")
    assert torch.equal(one, two)
    exact, low = (train(None, "lora", dtype)[1] for dtype in (torch.float64, torch.float32))
    rounding = 4 * (low - exact).abs().max() + 4 * torch.finfo(torch.float32).eps * exact.abs().max()
    assert (train(FULL, "lora")[1] - exact).abs().max() <= rounding
    assert (one - exact).abs().max() > 10 * rounding
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    with hsa.patch(model, **WINDOW):
        model.save_lora_adapter(tmp_path, adapter_name="default")
    assert not [f for f in tmp_path.iterdir() if b"hsa" in f.read_bytes() or b"hf_sparse" in f.read_bytes()]
    other = fresh(kind)
    with hsa.patch(other, **WINDOW):
        file = "pytorch_lora_weights.safetensors"
        other.load_lora_adapter(tmp_path, prefix=None, adapter_name="default", weight_name=file)
    assert torch.equal(play(other, kind), play(model, kind))


# ------------------------------------------------------------------ caches over steps


def broadcast(model: Any) -> Any:
    skip = {f"{n}_attention_timestep_skip_range": (0, 1000) for n in ("spatial", "cross")}
    ranges = {f"{n}_attention_block_skip_range": 2 for n in ("spatial", "cross")}
    identifiers = {"spatial_attention_block_identifiers": ("blocks", "transformer_blocks")}
    return diffusers.PyramidAttentionBroadcastConfig(
        **skip, **ranges, **identifiers, current_timestep_callback=lambda: NOW[0]
    )


def first_block(model: Any) -> Any:
    return diffusers.FirstBlockCacheConfig(threshold=0.1)


def faster(model: Any) -> Any:
    return diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 850),
        spatial_attention_block_identifiers=("blocks", "transformer_blocks"),
        unconditional_batch_skip_range=2,
        unconditional_batch_timestep_skip_range=(-1, 1),
        attention_weight_callback=lambda _: 0.3,
        current_timestep_callback=lambda: NOW[0],
        is_guidance_distilled=True,
        tensor_format="BCFHW",
    )


# Near and far steps, so that a cache that looks at the differences skips some of them.
TIMES = (900.0, 899.0, 800.0, 799.0, 300.0, 299.0)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cache", [broadcast, first_block, faster], ids=lambda c: c.__name__)
def test_cache_over_steps(cache: Callable[[Any], Any], kind: str, when: str) -> None:
    plain = fresh(kind)
    plain.enable_cache(cache(plain))
    dense = play(plain, kind, TIMES)
    counts, outputs = {}, {}
    for name, how in {"dense": {"method": "dense"}, "full": FULL, "sparse": WINDOW}.items():
        model = fresh(kind)
        alone = play(model, kind, TIMES)
        if when == "before":
            model.enable_cache(cache(model))
            before = state(model)
        patch = hsa.patch(model, **how)
        if when == "after":
            model.enable_cache(cache(model))
        outputs[name] = play(model, kind, TIMES)
        layers = patch.report().layers
        counts[name] = [r.sparse_calls + r.dense_calls for r in layers]
        if name != "dense":
            assert all(r.dense_calls == 0 for r in layers)
        patch.remove()
        if when == "before":
            model._reset_stateful_cache()
            assert_same(before, state(model))
        assert torch.equal(play(model, kind, TIMES), dense)
        assert_no_trace(model)
        model.disable_cache()
        assert torch.equal(play(model, kind, TIMES), alone)
    assert torch.equal(outputs["dense"], dense) and not torch.equal(dense, alone)
    assert counts["dense"] == counts["full"] and min(counts["full"]) < len(TIMES)
    assert_full_budget(plain, lambda: play(plain, kind, TIMES))
    assert not torch.equal(outputs["sparse"], dense)


def test_a_skipped_layer_does_not_pass_for_the_next_attention() -> None:
    """One processor for self- and cross-attention: where the cache skips the first, the second is still itself."""
    model = fresh("wan")
    model.set_attn_processor(copy.copy(model.blocks[0].attn1.processor))
    config = broadcast(model)
    config.cross_attention_block_skip_range = None
    model.enable_cache(config)
    with hsa.patch(model, **WINDOW) as patch:
        play(model, "wan", TIMES)
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(3, 0), (3, 0)]


# ------------------------------------------------------------------ files and copies


@pytest.mark.parametrize("kind", KINDS)
def test_saved_while_patched(kind: str, tmp_path: Any) -> None:
    model = fresh(kind)
    with hsa.patch(model, **WINDOW):
        play(model, kind)
        model.save_pretrained(tmp_path)
    assert "hsa" not in (tmp_path / "config.json").read_text()
    # Weights read from a file lie elsewhere in memory, by which products may differ in the last bit.
    model.save_pretrained(tmp_path / "plain")
    loaded, plain = (type(model).from_pretrained(place) for place in (tmp_path, tmp_path / "plain"))
    dense = play(plain, kind)
    assert torch.equal(play(loaded, kind), dense)
    with hsa.patch(plain, **WINDOW):
        sparse = play(plain, kind)
    with hsa.patch(loaded, **WINDOW):
        assert torch.equal(play(loaded, kind), sparse)
    assert_no_trace(loaded)
    assert torch.equal(play(loaded, kind), dense)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_with_averaged_weights_is_patched_by_itself(kind: str) -> None:
    """The copy of a trainer: made of a patched model it is dense, and patched it is as sparse as the model."""
    model = fresh(kind)
    dense = play(model, kind)
    with hsa.patch(model, **WINDOW):
        sparse = play(model, kind)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for own, other in zip(twin.parameters(), model.parameters(), strict=True):
                own.lerp_(other, 0.5)
    assert torch.equal(play(twin, kind), dense)
    with hsa.patch(twin, **WINDOW) as patch:
        assert torch.equal(play(twin, kind), sparse)
    assert all(r.sparse_calls == 1 for r in patch.report().layers)
    assert torch.equal(play(twin, kind), dense) and torch.equal(play(model, kind), dense)
