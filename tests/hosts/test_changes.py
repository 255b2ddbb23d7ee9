"""What is changed around a patch, before it or since: the model runs as it would alone, and the report says why."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

import hf_sparse_attn as hsa
from hf_sparse_attn.backend import choose_backend
from hf_sparse_attn.decision import Decision
from hf_sparse_attn.hosts import sdpa_hook
from hf_sparse_attn.method import Decline
from hf_sparse_attn.registry import BACKENDS, FAMILIES
from hf_sparse_attn.session import DenseFallback
from tests.support import tiny_diffusers as tiny
from tests.support.processes import run_code

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

# Hides most, so that a sparse call shows.
NARROW: dict[str, Any] = {"method": "sliding_window", "window": 3, "sink": 0, "block_size": 16, "min_tokens": 0}
# By the dispatcher, by PyTorch's function, and a transformers model.
MODELS = ("QwenImageTransformer2DModel", "CogView4Transformer2DModel", "llama")


def build(name: str) -> tuple[Any, dict[str, Any]]:
    return FAMILIES.get(name).tiny() if name == "llama" else tiny.build(name)


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given, return_dict=False)[0]
    return out


def counts(patch: hsa.Patch) -> list[tuple[int, dict[str, int]]]:
    return [(layer.sparse_calls, layer.reasons) for layer in patch.report().layers]


def values(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Attention that gives the values back."""
    return value.repeat_interleave(query.shape[1] // value.shape[1], 1)


class Values(TorchFunctionMode):
    """The same as a mode, which is how perturbed attention guidance does it."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        return (values if func is F.scaled_dot_product_attention else func)(*args, **(kwargs or {}))


# ---------------------------------------------------------------------- who must see attention


def replaced(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(F, "scaled_dot_product_attention", values)
    return nullcontext()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", [lambda _: Values(), replaced], ids=["mode", "replaced function"])
def test_what_must_see_attention_sees_it(name: str, way: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, given = build(name)
    with monkeypatch.context() as patched, way(patched):
        want = run(model, given)
    with hsa.patch(model, **NARROW) as patch:
        with monkeypatch.context() as patched, way(patched):
            assert torch.equal(run(model, given), want)
        # Afterwards it is sparse again.
        run(model, given)
    for sparse, reasons in counts(patch):
        assert sparse == 1 and list(reasons.values()) == [1]
        assert "Values" in next(iter(reasons)) or "values of tests.hosts" in next(iter(reasons))
    with (
        hsa.patch(model, strict=True, **NARROW),
        monkeypatch.context() as patched,
        way(patched),
        pytest.raises(DenseFallback, match=r"(?i)values"),
    ):
        run(model, given)
    with hsa.patch(model, "dense") as patch, monkeypatch.context() as patched, way(patched):
        assert torch.equal(run(model, given), want)
    assert all(reasons == {"method dense": 1} for _, reasons in counts(patch))


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("context", [lambda: torch.device("cpu"), lambda: FlopCounterMode(display=False)])
def test_what_does_not_change_attention_is_no_reason(name: str, context: Callable[[], Any]) -> None:
    model, given = build(name)
    with hsa.patch(model, strict=True, **NARROW) as patch, context():
        run(model, given)
    assert all(sparse == 1 for sparse, _ in counts(patch))


SKIPS = {
    "scores": {"skip_attention": False, "skip_attention_scores": True, "skip_ff": False},
    "attention": {"skip_attention": True, "skip_ff": False},
    "block": {"skip_attention": True, "skip_ff": True},
}
SKIPPED = [
    *(("CogView4", skip) for skip in SKIPS),
    *(("PixArt", skip) for skip in SKIPS),
    ("QwenImage", "scores"),
    ("QwenImage", "block"),
    ("ZImage", "scores"),
    ("ZImage", "attention"),
]


@pytest.mark.parametrize("before", [True, False], ids=["hook first", "patch first"])
@pytest.mark.parametrize("name, skip", SKIPPED)
def test_perturbed_attention_and_skipped_layers(name: str, skip: str, before: bool) -> None:
    """Guidance by a weakened model: its hooks work under a patch, whichever was there first."""
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    kind = f"{name}Transformer2DModel"

    def weaken(model: Any) -> Any:
        apply_layer_skip(model, LayerSkipConfig(indices=[0, 1], **SKIPS[skip]))
        return model

    given = tiny.build(kind)[1]
    want = run(weaken(tiny.build(kind)[0]), given) if name != "ZImage" else None
    model = tiny.build(kind)[0]
    if before:
        weaken(model)
    with hsa.patch(model, **NARROW) as patch:
        got = run_any(model if before else weaken(model), given)
    assert torch.equal(got, run_any(weaken(tiny.build(kind)[0]), given) if want is None else want)
    scores = skip == "scores"
    assert counts(patch)[0] == (0, {said: 1 for said in counts(patch)[0][1]}) and bool(counts(patch)[0][1]) == scores
    if scores:
        assert "AttentionScoreSkipFunctionMode" in next(iter(counts(patch)[0][1]))


def run_any(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out = model(**given, return_dict=False)[0]
    return torch.stack(out) if isinstance(out, list) else out


def test_a_mode_in_a_compiled_model(fresh_compiler: None) -> None:
    model, given = build(MODELS[0])
    with Values():
        want = run(model, given)
    with hsa.patch(model, **NARROW) as patch:
        for block in model.transformer_blocks:
            block.compile(backend="eager")
        run(model, given)
        with Values():
            assert (run(model, given) - want).abs().max() <= 1e-5
    for sparse, reasons in counts(patch):
        assert sparse == 1 and list(reasons) == [f"{said} (counted once per compiled graph)" for said in [SEEN]]


SEEN = "Values at work, a mode that sees every call of a function of torch"


# ---------------------------------------------------------------------- who took attention over


@pytest.mark.parametrize("before", [True, False], ids=["replaced first", "patch first"])
def test_a_replaced_attention_implementation(before: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As sequence parallelism does it, whose ranks hold a share of the tokens each."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as known

    model, given = build("llama")
    own = known["sdpa"]

    @functools.wraps(own)
    def of_a_rank(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        return own(module, query, key, 2 * value, *args, **kwargs)

    replace = functools.partial(monkeypatch.setitem, known._local_mapping, "sdpa", of_a_rank)
    with monkeypatch.context() as patched:
        patched.setitem(known._local_mapping, "sdpa", of_a_rank)
        want = run(model, given)
    if before:
        replace()
    with hsa.patch(model, **NARROW) as patch:
        replace()
        assert torch.equal(run(model, given), want)
    reason = "attention function of 'sdpa' was replaced by sdpa_attention_forward"
    assert counts(patch) == [(0, {reason: 1})] * 2
    with hsa.patch(model, strict=True, **NARROW), pytest.raises(DenseFallback, match="was replaced by"):
        run(model, given)


def test_a_replaced_mask_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS as known

    model, given = build("llama")
    monkeypatch.setitem(known._local_mapping, "sdpa", lambda *args, **kwargs: torch.ones(2, 1, 111, 111).bool())
    want = run(model, given)
    with hsa.patch(model, **NARROW) as patch:
        assert torch.equal(run(model, given), want)
    assert all("mask function of 'sdpa' was replaced by" in next(iter(said)) for _, said in counts(patch))


def test_context_parallelism_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "torch.distributed.tensor.experimental._context_parallel._attention"
    ring = types.FunctionType(values.__code__, {"__name__": name}, "inner_fn")
    monkeypatch.setattr(F, "scaled_dot_product_attention", ring)
    model, given = build("llama")
    with hsa.patch(model, **NARROW), pytest.raises(ValueError, match="under torch's context parallelism"):
        run(model, given)
    with hsa.patch(model, "dense"):
        run(model, given)


@pytest.mark.slow
def test_context_parallelism_as_it_is() -> None:
    """In a process of its own, for it changes torch: one rank, a model whose layers are not called self_attn."""
    code = """
import os, torch, torch.distributed as dist, hf_sparse_attn as hsa
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from transformers import GPT2Config, GPT2LMHeadModel
model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2))
ids = torch.arange(64)[None]
with hsa.patch(model.eval(), "sliding_window", window=8, block_size=16, min_tokens=0), torch.no_grad():
    try:
        with context_parallel(init_device_mesh("cpu", (1,)), buffers=[ids], buffer_seq_dims=[1]):
            model(ids, use_cache=False)
    except ValueError as error:
        print(error)
    model(ids, use_cache=False)
dist.destroy_process_group()
"""
    done = run_code(code)
    assert done.returncode == 0 and "one rank's share of the tokens" in done.stdout, done.stderr


# ---------------------------------------------------------------------- modules that were changed


def sharded(module: Any) -> None:
    """What fully_shard does to a module: a class of its own, made from the one it had."""
    kind = type(module)
    module.__class__ = type(f"FSDP{kind.__name__}", (kind,), {})


@pytest.mark.parametrize("before", [True, False], ids=["sharded first", "patch first"])
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SD3Transformer2DModel", "FluxTransformer2DModel"])
def test_classes_that_are_swapped(name: str, before: bool) -> None:
    model, given = FAMILIES.get("wan").tiny() if name.startswith("Wan") else tiny.build(name)
    with hsa.patch(model, "radial", block_size=16, min_tokens=0, strict=True):
        want = run(model, given)
    whole = [model, *(module for module in model.modules() if isinstance(module, nn.ModuleList) for module in module)]
    if before:
        for module in whole:
            sharded(module)
    with hsa.patch(model, "radial", block_size=16, min_tokens=0, strict=True):
        if not before:
            for module in whole:
                sharded(module)
        assert torch.equal(run(model, given), want)


def other_processor(model: Any, attention: str) -> None:
    module = model.get_submodule(attention)
    module.set_processor(type(module.processor).__mro__[-2 if "CogView4" in type(model).__name__ else 0]())


CHANGES: dict[str, tuple[Callable[[Any, str], Any], str]] = {
    "block": (
        lambda model, _: model.transformer_blocks.__setitem__(0, copy.deepcopy(model.transformer_blocks[0])),
        "attention module replaced after the patch",
    ),
    "attention": (
        lambda model, path: model.set_submodule(path, copy.deepcopy(model.get_submodule(path))),
        "attention module replaced after the patch",
    ),
    "processor": (other_processor, "changed after the patch to"),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", MODELS[:2])
def test_a_changed_diffusers_model(name: str, change: str) -> None:
    model, given = build(name)
    act, reason = CHANGES[change]
    path = f"transformer_blocks.0.{'attn1' if 'CogView4' in name else 'attn'}"
    with hsa.patch(model, **NARROW) as patch:
        act(model, path)
        run(model, given)
    assert any(reason in said for said in counts(patch)[0][1]) and counts(patch)[1] == (1, {})
    with hsa.patch(model, strict=True, **NARROW):
        act(model, path)
        with pytest.raises(DenseFallback, match=reason):
            run(model, given)


def test_a_wrapped_block_is_no_change() -> None:
    """Compilation and checkpointing put a block into another module."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.inner(*args, **kwargs)

    model, given = build(MODELS[0])
    text, ids = build("llama")
    with hsa.patch(model, strict=True, **NARROW) as patch, hsa.patch(text, strict=True, **NARROW) as other:
        model.transformer_blocks[0] = Wrapped(model.transformer_blocks[0])
        text.model.layers[1] = Wrapped(text.model.layers[1])
        for _ in range(2):
            run(model, given)
            run(text, ids)
    assert counts(patch) == counts(other) == [(2, {})] * 2


def test_a_changed_transformers_model() -> None:
    model, given = build("llama")
    donor = build("llama")[0]
    with hsa.patch(model, **NARROW) as patch:
        first = model.model.layers[0]
        model.model.layers[0] = donor.model.layers[0]
        run(model, given)
        model.model.layers[0] = first
        layers, model.model.layers = model.model.layers, model.model.layers[:1]
        run(model, given)
        model.model.layers = layers
        model.set_attn_implementation("eager")
        run(model, given)
    switched = "attn_implementation set to 'eager' after the patch"
    assert counts(patch) == [
        (1, {"attention module replaced after the patch": 1, switched: 1}),
        (1, {"attention module removed after the patch": 1, switched: 1}),
    ]
    model.set_attn_implementation("sdpa")
    with hsa.patch(model, strict=True, **NARROW):
        model.model.layers[1] = donor.model.layers[1]
        with pytest.raises(DenseFallback, match="replaced after the patch"):
            run(model, given)


def test_a_layer_of_another_model_is_given_the_mask_as_a_tensor() -> None:
    model, given = build("llama")
    donor = build("llama")[0]
    mask = (torch.arange(111)[None] >= 7).long().expand(2, -1)
    own = run(model, {**given, "attention_mask": mask})
    with hsa.patch(model, "sliding_window", window=1 << 20, block_size=16, min_tokens=0):
        model.model.layers[1] = donor.model.layers[1]
        got = run(model, {**given, "attention_mask": mask})
    assert (got - own)[:, 7:].abs().max() <= 1e-5


# ---------------------------------------------------------------------- networks of a pipeline


class Pipe:
    """A pipeline of some networks, which runs them one after another."""

    def __init__(self, **networks: Any) -> None:
        self.__dict__.update(networks)

    def __call__(self, given: dict[str, Any]) -> list[Tensor]:
        return [run(part, given) for part in vars(self).values()]


def flux() -> tuple[Any, dict[str, Any]]:
    return tiny.build("FluxTransformer2DModel")


def test_all_networks_that_denoise_are_patched() -> None:
    (model, given), (other, _) = flux(), flux()
    pipe = Pipe(transformer=model, unconditional_transformer=other)
    with hsa.patch(pipe, strict=True, **NARROW) as patch:
        pipe(given)
    names = [layer.name.partition(".")[0] for layer in patch.report().layers]
    assert names == ["transformer", "unconditional_transformer"] * 3
    assert counts(patch) == [(1, {})] * 6


@pytest.mark.parametrize("method", ["sliding_window", "radial"])
def test_a_controlnet_is_patched(method: str) -> None:
    model, given = flux()
    kind = diffusers.FluxControlNetModel
    control: Any = tiny.tiny_model(kind, {**tiny.tiny_sizes(kind)})
    pipe = Pipe(transformer=model, controlnet=control)
    with hsa.patch(pipe, method, block_size=16, min_tokens=0, strict=True) as patch, torch.no_grad():
        control(controlnet_cond=given["hidden_states"], **given)
        run(model, given)
    assert {layer.name.partition(".")[0] for layer in patch.report().layers} == {"controlnet", "transformer"}
    assert all(count == (1, {}) for count in counts(patch))


def test_a_network_that_cannot_be_patched_is_told() -> None:
    model, given = flux()
    kind = diffusers.SanaControlNetModel
    pipe: Any = Pipe(transformer=model)
    vars(pipe)["controlnet"] = tiny.tiny_model(kind)
    call: Callable[..., Any] = lambda self, given: run(self.transformer, given)  # noqa: E731
    Quiet = type("Quiet", (Pipe,), {"__call__": call})
    pipe.__class__ = Quiet
    reason = "controlnet (SanaControlNetModel) cannot be patched and runs dense"
    with hsa.patch(pipe, **NARROW) as patch:
        pipe(given)
        pipe(given)
    assert type(pipe) is Quiet
    assert counts(patch)[0] == (0, {reason: 2}) and patch.report().layers[0].name == "controlnet"
    assert counts(patch)[1:] == [(2, {})] * 3
    with hsa.patch(pipe, strict=True, **NARROW), pytest.raises(DenseFallback, match="cannot be patched"):
        pipe(given)
    with hsa.patch(pipe, "dense") as patch:
        pipe(given)
    assert all(reasons == {"method dense": 1} for _, reasons in counts(patch))


def test_a_replaced_transformer_is_told() -> None:
    (model, given), (other, _) = flux(), flux()
    pipe = Pipe(transformer=model)
    want = pipe(given)[0]
    reason = "transformer (FluxTransformer2DModel) was replaced after the patch and runs dense"
    with hsa.patch(pipe, **NARROW) as patch:
        vars(pipe)["transformer"] = other
        assert torch.equal(pipe(given)[0], want)
        # A wrapper of what was patched, nothing, and what has a patch of its own are no reason.
        vars(pipe)["transformer"] = torch.compile(model, backend="eager")
        hsa.patch(other, **NARROW)
        vars(pipe)["transformer"] = other
        pipe(given)
        hsa.unpatch(other)
        copied = copy.deepcopy(pipe)
        assert type(copied) is Pipe
    assert type(pipe) is Pipe
    assert [layer.reasons for layer in patch.report().layers if layer.reasons] == [{reason: 1}]
    with hsa.patch(pipe, strict=True, **NARROW):
        vars(pipe)["transformer"] = model
        with pytest.raises(DenseFallback, match="was replaced after the patch"):
            pipe(given)
    assert torch.equal(pipe(given)[0], want)


def test_a_pipeline_of_diffusers_tells_of_another_transformer() -> None:
    pipe, generate = tiny.pipeline("flux")
    kind = type(pipe)
    with hsa.patch(pipe, **NARROW) as patch:
        pipe.transformer = tiny.build("FluxTransformer2DModel")[0]
        generate()
        assert pipe.__class__.__name__ == kind.__name__ and isinstance(pipe, kind)
        pipe.unload_lora_weights()
        again = kind.from_pipe(pipe)
    assert type(pipe) is type(again) is kind
    said = [layer.reasons for layer in patch.report().layers if layer.reasons]
    assert said == [{"transformer (FluxTransformer2DModel) was replaced after the patch and runs dense": 1}]


# ---------------------------------------------------------------------- reasons


@pytest.mark.parametrize("reason", ["", "  ", None])
def test_a_decline_says_why(reason: Any) -> None:
    with pytest.raises(ValueError, match="`reason` must say why"):
        Decline(reason)


def test_a_decision_says_why() -> None:
    with pytest.raises(ValueError, match="`reason` must say why the call is dense"):
        Decision("")


def test_no_backend_names_each_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 1, 4, 8, device="meta")
    with pytest.raises(hsa.BackendUnavailable) as raised:
        choose_backend("auto", None, q, q, q, False)
    assert all(f"{name}: " in str(raised.value) for name in BACKENDS.names())
    silent = types.SimpleNamespace(why_not=lambda *_: "", attention=None, auto_rank={"meta": 0})
    monkeypatch.setattr(BACKENDS, "_entries", {"silent": silent})
    for backend in ("auto", "silent"):
        with pytest.raises(hsa.BackendUnavailable, match="it does not say why"):
            choose_backend(backend, None, q, q, q, False)
    monkeypatch.setattr(BACKENDS, "_entries", {})
    monkeypatch.setattr(BACKENDS, "missing", {})
    with pytest.raises(hsa.BackendUnavailable, match="none is registered"):
        choose_backend("auto", None, q, q, q, False)


def test_the_modes_of_torch_are_known() -> None:
    assert sdpa_hook.watched_by() is None
    with torch.device("meta"):
        assert sdpa_hook.watched_by() is None
        with Values():
            assert sdpa_hook.watched_by() == SEEN
