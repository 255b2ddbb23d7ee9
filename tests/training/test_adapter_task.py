"""What recipes with an adapter have in common: what is trained, what is refused, what is taken off again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import active_patch
from hf_sparse_attn.recipe import OptimizerSettings, Run, SparseSettings
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask, checkpoint_gradients
from hf_sparse_attn.training.loop import train
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.sparse import check_backward
from tests.support.tiny_lm import FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIMIZER = OptimizerSettings(learning_rate=1e-2, warmup_steps=1)
LORA = LoraSettings(targets=("q_proj", "v_proj"), rank=4, trained=("norm",))
SPARSE = SparseSettings(method="sliding_window", params={"window": 24, "sink": 4, "block_size": 16}, min_tokens=0)


@dataclass(frozen=True, kw_only=True)
class Small(AdapterRecipe):
    model: str = "tiny"
    steps: int = 4
    optimizer: OptimizerSettings = OPTIMIZER
    lora: LoraSettings | None = LORA
    sparse: SparseSettings | None = SPARSE
    batch: int = 3

    def task(self, run: Run) -> AdapterTask:
        return SmallTask(self, run, fresh(), base_model="tiny")


class SmallTask(AdapterTask):
    def batch(self, step: int, samples: Sequence[int]) -> Tensor:
        rows = []
        for number in self.numbers(step, samples):
            draw = torch.Generator().manual_seed(number)
            rows.append(torch.randint(0, 50, (63,), generator=draw))
        return torch.stack(rows)

    def weight(self, batch: Tensor) -> float:
        return len(batch)

    def loss(self, batch: Tensor) -> Tensor:
        logits = self.model(input_ids=batch, use_cache=False).logits
        losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none")
        return losses.view(len(batch), -1).mean(1).sum()

    def evaluate(self) -> dict[str, float]:
        batch = self.batch(1000, range(2))
        return {"loss": float(self.loss(batch)) / 2}


def fresh() -> Any:
    return FAMILIES["llama"]()


def run(folder: Path = Path(".")) -> Run:
    return Run(folder, torch.device("cpu"), progress=False)


def adapted(folder: Path, recipe: Small) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Figures, and the weights of the adapter in the bundle."""
    from safetensors.torch import load_file

    figures = train(recipe, folder, progress=False)
    return figures, load_file(folder / "result" / "adapter_model.safetensors")


def test_it_trains_the_adapter_alone_and_the_bundle_brings_it_back(tmp_path: Path) -> None:
    figures, _ = adapted(tmp_path, Small(steps=12))
    assert figures["after"]["loss"] < figures["before"]["loss"] - 0.01
    model = fresh()
    before = {name: p.clone() for name, p in model.named_parameters()}
    ids = tokens(2, 63)
    with torch.no_grad():
        plain = model(ids).logits
        with hsa.load_bundle(model, tmp_path / "result") as loaded:
            sparse = model(ids).logits
            assert loaded.patch is not None and 0 < loaded.patch.report().density < 1
            assert loaded.recipe["recipe"] == "" and loaded.recipe["steps"] == 12
            assert loaded.figures["after"] == pytest.approx(figures["after"])
        assert not torch.equal(sparse, plain) and torch.equal(model(ids).logits, plain)
    # Nothing but the adapter was trained: a fresh model under the bundle is the trained one.
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_everything_is_taken_off_when_the_task_is_closed() -> None:
    model = fresh()
    ids = tokens(1, 63)
    plain = model(ids).logits
    required = [p.requires_grad for p in model.parameters()]
    task = SmallTask(replace(Small(), gradient_checkpointing=True), run(), model, base_model="tiny")
    # Two layers with two adapted projections, and the last norm.
    assert sum("lora_A" in name for name in task.trained()) == 4
    assert all("lora_" in name or "norm.modules_to_save" in name for name in task.trained())
    assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules()) and any(
        active_patch(module) is task.patch for module in model.modules()
    )
    task.close()
    assert [p.requires_grad for p in model.parameters()] == required
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            {"lora": LoraSettings(targets=("q_prof",))},
            ValueError,
            "`targets` must be modules of .*q_proj.*got 'q_prof'",
        ),
        ({"sparse": SparseSettings(method="radial")}, ValueError, "LlamaForCausalLM .* has none"),
        ({"sparse": SparseSettings(method="radal")}, ValueError, "`method` must be one of .*'radal'"),
        ({"sparse": SparseSettings(method="sliding_window", params={"windows": 3})}, TypeError, "windows"),
        (
            {"sparse": replace(SPARSE, backend="flex_attention")},
            RuntimeError,
            "`sparse.backend` 'flex_attention' cannot train here",
        ),
    ],
    ids=["target", "layout", "method", "parameter", "backend"],
)
def test_what_cannot_be_trained_is_refused_and_the_model_untouched(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = fresh()
    ids = tokens(1, 63)
    plain, modules = model(ids).logits, [id(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        SmallTask(replace(Small(), gradient_checkpointing=True, **change), run(), model, base_model="tiny")
    assert [id(m) for m in model.modules()] == modules and all(p.requires_grad for p in model.parameters())
    assert torch.equal(model(ids).logits, plain) and not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )


def test_a_method_without_a_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    window: type[Method] = METHODS.get("sliding_window")
    monkeypatch.setattr(window, "trainable", False)
    with pytest.raises(ValueError, match=r"`sparse.method` must have a backward pass, got 'sliding_window'"):
        train(Small(), tmp_path, progress=False)
    assert not (tmp_path / "checkpoints").exists() and not (tmp_path / "log.jsonl").exists()


def test_a_backend_is_tried_on_a_model_whose_first_weights_are_quantised() -> None:
    model = fresh()
    packed = torch.nn.Parameter(torch.zeros(8, dtype=torch.uint8), requires_grad=False)
    model._parameters["packed"] = packed
    assert next(model.parameters()) is packed
    check_backward(replace(SPARSE, backend="torch_gather"), model)
    with pytest.raises(RuntimeError, match="cannot train here"):
        check_backward(replace(SPARSE, backend="flex_attention"), model)


def test_checkpointing_and_micro_batches_change_nothing(tmp_path: Path) -> None:
    _, whole = adapted(tmp_path / "whole", Small())
    for name, change in {"checkpointing": {"gradient_checkpointing": True}, "parts": {"micro_batch": 1}}.items():
        _, other = adapted(tmp_path / name, replace(Small(), **change))
        assert whole.keys() == other.keys()
        for key in whole:
            # Adam's steps are the rate whatever the gradient's size: where it is near 0 rounding shows most.
            torch.testing.assert_close(other[key], whole[key], rtol=0, atol=2e-4)
        assert any(not torch.equal(whole[key], torch.zeros_like(whole[key])) for key in whole if "lora_B" in key)


def test_sparse_and_dense_training_differ(tmp_path: Path) -> None:
    _, sparse = adapted(tmp_path / "sparse", Small())
    _, dense = adapted(tmp_path / "dense", replace(Small(), sparse=None))
    assert any(float((sparse[key] - dense[key]).abs().max()) > 1e-3 for key in sparse)


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`optimizer.warmup_steps` must be at most `steps` = 4, got 9"):
        Small(optimizer=OptimizerSettings(learning_rate=1.0, warmup_steps=9))
    with pytest.raises(ValueError, match="`steps` must be at least 1"):
        Small(steps=0)
    with pytest.raises(ValueError, match="`batch` must be at least 1"):
        Small(batch=0)


def test_a_model_without_checkpointing_is_named() -> None:
    with pytest.raises(ValueError, match="`gradient_checkpointing` must be false for Linear"):
        checkpoint_gradients(nn.Linear(2, 2))


@pytest.mark.parametrize("fewest", [0, 64], ids=["sparse", "dense"])
def test_a_training_that_is_dense_all_along_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, fewest: int
) -> None:
    train(Small(steps=2, sparse=replace(SPARSE, min_tokens=fewest)), tmp_path / "out", progress=False)
    told = [record.message for record in caplog.records if "left every layer dense" in record.message]
    # Once, although there are two steps.
    assert len(told) == (fewest > 0)
    assert all("in the first step: fewer than 64 keys (min_tokens=64)" in line for line in told)
