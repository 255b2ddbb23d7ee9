"""An adapter that the model passes by is told: fused projections, and modules that a forward does not call."""

from __future__ import annotations

import copy
import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa
from hf_sparse_attn.training.lora.adapter import Adapter, add_lora
from hf_sparse_attn.training.lora.settings import LoraSettings
from tests.support import tiny_diffusers, tiny_lm, tiny_wan
from tests.support.lora_cases import shake, snapshot

pytestmark = pytest.mark.usefixtures("one_thread")

QKV = LoraSettings(rank=2, targets=("to_q", "to_k", "to_v"))
LOG = "hf_sparse_attn.training.lora.reach"
# Of diffusers: the flag of the attention decides, its processor does, or neither.
BY_FLAG = (
    "WanTransformer3DModel",
    "FluxTransformer2DModel",
    "HeliosTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
)
BY_PROCESSOR = ("CogVideoXTransformer3DModel", "SD3Transformer2DModel", "AuraFlowTransformer2DModel")
NEVER = ("LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel")


def runs(model: Any, inputs: dict[str, Any]) -> Callable[[], Tensor]:
    def run() -> Tensor:
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]

    return run


def wan() -> tuple[Any, Callable[[], Tensor]]:
    model = tiny_wan.transformer()
    return model, runs(model, tiny_wan.inputs(latents=(3, 6, 10)))


def put_on(model: nn.Module, settings: LoraSettings = QKV) -> Adapter:
    adapter = add_lora(model, settings)
    shake(adapter)
    return adapter


@pytest.mark.parametrize("name", BY_FLAG + BY_PROCESSOR)
def test_fused_projections_get_no_adapter_until_they_are_unfused(name: str) -> None:
    model, inputs = tiny_diffusers.build(name)
    run = runs(model, inputs)
    base = run()
    model.fuse_qkv_projections()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"`targets` must be modules that the model calls, got .*unfuse_qkv_proj"):
        add_lora(model, QKV)
    for part, (module, kind, attributes) in {k: v for k, v in before.items() if k != "weights"}.items():
        assert snapshot(model)[part] == (module, kind, attributes)
    model.unfuse_qkv_projections()
    with put_on(model):
        assert not torch.equal(run(), base)
    assert torch.equal(run(), base)


@pytest.mark.parametrize("name", NEVER)
def test_where_no_processor_asks_for_fused_projections_the_adapter_acts(name: str) -> None:
    model, inputs = tiny_diffusers.build(name)
    model.fuse_qkv_projections()
    run = runs(model, inputs)
    base = run()
    with put_on(model):
        acts = run()
        model.fuse_qkv_projections()
        assert torch.equal(run(), acts) and not torch.equal(acts, base)


@pytest.mark.slow
def test_what_is_refused_is_what_is_not_called() -> None:
    """Every transformer of diffusers that can be built small and fused: the rule says what its forward does."""
    import diffusers

    from hf_sparse_attn.training.lora.reach import _FUSED, _passed_by

    once = {name for names in _FUSED.values() for name in names}
    seen = 0
    for name in sorted(n for n in dir(diffusers) if "Transformer" in n and n.endswith("Model")):
        try:
            model, inputs = tiny_diffusers.build(name)
            model.fuse_qkv_projections()
            run = runs(model, inputs)
            parts = {n: m for n, m in model.named_modules() if n.rpartition(".")[2] in once}
            called: set[str] = set()
            for part, module in parts.items():
                module.register_forward_pre_hook(lambda *_, add=called.add, part=part: add(part))
            run()
        # No tiny model, nothing to fuse, or classes whose own fusing or forward fails.
        except (AttributeError, RuntimeError, TypeError, ValueError, KeyError):
            continue
        passed = {n for n in parts if n.rpartition(".")[2] in _passed_by(model.get_submodule(n.rpartition(".")[0]))}
        assert passed == parts.keys() - called, name
        seen += bool(passed)
    assert seen >= 15


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CogVideoXTransformer3DModel"])
@pytest.mark.parametrize("first", [True, False], ids=["patched, then fused", "fused, then patched"])
def test_with_sparse_attention_on_it_is_refused_too(name: str, first: bool) -> None:
    model, _ = tiny_diffusers.build(name)
    if not first:
        model.fuse_qkv_projections()
    with hsa.patch(model, "block_topk", min_tokens=0):
        if first:
            model.fuse_qkv_projections()
        with pytest.raises(ValueError, match="whose projections are fused"):
            add_lora(model, QKV)


def test_a_bundle_on_fused_projections_is_refused_and_leaves_the_model(tmp_path: Path) -> None:
    model, run = wan()
    adapter = put_on(model)
    wanted = run()
    hsa.save_bundle(tmp_path, model=model, adapter=adapter, base_model="x", sparse=None, figures={}, recipe={})
    model, run = wan()
    base = run()
    model.fuse_qkv_projections()
    fused = run()
    with pytest.raises(ValueError, match=r"attn1.to_q, whose projections are fused: call unfuse_qkv_projections\(\)"):
        hsa.load_bundle(model, tmp_path)
    assert torch.equal(run(), fused)
    model.unfuse_qkv_projections()
    with hsa.load_bundle(model, tmp_path):
        assert torch.equal(run(), wanted)
        with pytest.raises(ValueError, match=r"`fuse_projections` must leave out no adapter, blocks.0.attn1 has one"):
            model.fuse_qkv_projections()
        assert torch.equal(run(), wanted)
    assert torch.equal(run(), base)
    model.fuse_qkv_projections()
    assert torch.equal(run(), fused)


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "SD3Transformer2DModel"])
def test_fusing_afterwards_is_refused_and_changes_nothing(name: str) -> None:
    """Also of the projections of text."""
    model, inputs = tiny_diffusers.build(name)
    run = runs(model, inputs)
    with put_on(model, LoraSettings(rank=2, targets=("add_k_proj",))):
        acts = run()
        with pytest.raises(ValueError, match="has one on add_k_proj: remove it first, or merge it"):
            model.fuse_qkv_projections()
        assert torch.equal(run(), acts)
    model.fuse_qkv_projections()


def test_a_projection_that_stays_single_keeps_its_adapter() -> None:
    """Of attention to text the queries are not fused."""
    model, run = wan()
    base = run()
    settings = LoraSettings(rank=2, targets=("attn2.to_q", "to_out.0"))
    with put_on(model, settings):
        acts = run()
        model.fuse_qkv_projections()
        torch.testing.assert_close(run(), acts)
    with put_on(model, settings):
        torch.testing.assert_close(run(), acts)
    torch.testing.assert_close(run(), base)


def test_an_adapter_on_what_was_fused_acts_and_is_not_deleted() -> None:
    model, run = wan()
    model.fuse_qkv_projections()
    base = run()
    with put_on(model, LoraSettings(rank=2, targets=("to_qkv",))):
        acts = run()
        assert not torch.equal(acts, base)
        with pytest.raises(ValueError, match=r"must leave out no adapter.*to_qkv: remove it first$"):
            model.unfuse_qkv_projections()
        assert torch.equal(run(), acts)
    model.unfuse_qkv_projections()


def test_what_is_merged_may_be_fused_and_must_be_unmerged_to_come_off() -> None:
    model, run = wan()
    base = run()
    adapter = put_on(model)
    acts = run()
    model.fuse_lora()
    model.fuse_qkv_projections()
    torch.testing.assert_close(run(), acts)
    with pytest.raises(ValueError, match=r"merged into .*unmerge it first \(unfuse_lora"):
        adapter.remove()
    model.unfuse_qkv_projections()
    model.unfuse_lora()
    adapter.remove()
    torch.testing.assert_close(run(), base)


def test_modules_that_no_forward_calls_are_told_once(caplog: Any) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.spare = nn.Linear(8, 8), nn.Linear(8, 8)
            # Takes the weight of its last projection, and does not call it.
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            return self.attention(x, x, x, need_weights=False)[0]

    model = Odd()
    before = snapshot(model)
    with put_on(model, LoraSettings(rank=2, targets=("first", "spare", "out_proj"))), caplog.at_level(logging.WARNING):
        model(torch.ones(1, 3, 8))
        model(torch.ones(1, 3, 8))
        assert [r.message for r in caplog.records if r.name == LOG] == [
            "an adapter has no effect on modules that the model does not call: its first forward called 1 of 3, not "
            "attention.out_proj, spare"
        ]
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert {k: v[2] for k, v in snapshot(model).items() if k != "weights"} == {
        k: v[2] for k, v in before.items() if k != "weights"
    }


@pytest.mark.parametrize("how", ["copied", "pickled", "compiled", "failed before"])
def test_a_model_that_calls_all_is_told_of_nothing(how: str, caplog: Any) -> None:
    model = tiny_lm.FAMILIES["llama"]("sdpa")
    ids = tiny_lm.tokens(1, 9)
    with put_on(model, LoraSettings(rank=2, targets=("q_proj", "down_proj"), trained=("norm",))):
        twin: Any = model
        if how == "copied":
            twin = copy.deepcopy(model)
        elif how == "pickled":
            kept = io.BytesIO()
            torch.save(model.model.layers[0].mlp, kept)
            kept.seek(0)
            torch.load(kept, weights_only=False)(torch.zeros(1, 2, model.config.hidden_size))
        elif how == "compiled":
            twin = torch.compile(model, backend="eager", fullgraph=True)
        else:
            with pytest.raises((TypeError, ValueError)):
                model(input_ids=None, labels=None)
        expected = model(input_ids=ids).logits if how != "compiled" else None
        again = twin(input_ids=ids).logits
        assert expected is None or torch.equal(again, expected)
        torch.testing.assert_close(model(input_ids=ids).logits, again)
    assert not [r for r in caplog.records if r.name == LOG]
