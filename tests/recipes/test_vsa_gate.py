"""The recipe of VSA's gates: its schedule, which weights it trains, what it writes, and what it refuses."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import hf_sparse_attn as hsa
from hf_sparse_attn.patching import active_patch
from hf_sparse_attn.recipe import OptimizerSettings, Run, SparseSettings, read_recipe
from hf_sparse_attn.training.loop import train
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.video.scenes import SceneSettings

pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytest.importorskip("accelerate")

from hf_sparse_attn.recipes.vsa_gate import SparsitySchedule, VsaGate, VsaGateTask
from hf_sparse_attn.shipped.moving import load_moving_wan

pytestmark = pytest.mark.usefixtures("one_thread")

# 256 tokens in four tiles.
SCENES = SceneSettings(frames=4, height=16, width=16, turn=3, clips=0)
LORA = LoraSettings(targets=("attn1.to_q", "attn1.to_v"), rank=2)


def recipe(**given: Any) -> VsaGate:
    made: dict[str, Any] = {
        "model": "moving_wan",
        "scenes": SCENES,
        "sparse": SparseSettings(method="vsa", params={"density": 0.25}, min_tokens=0),
        "schedule": SparsitySchedule(rate=0.25, interval=1),
        "steps": 4,
        "batch": 2,
        "held_out": 1,
        "optimizer": OptimizerSettings(learning_rate=1e-2),
    }
    return VsaGate(**{**made, **given})


def task(tmp_path: Path, **given: Any) -> VsaGateTask:
    return recipe(**given).task(Run(output=tmp_path, device=torch.device("cpu")))


def test_the_published_schedule() -> None:
    schedule = SparsitySchedule()
    assert [schedule.sparsity(step, 0.9) for step in (0, 49, 50, 99, 100, 1500, 9999)] == pytest.approx(
        [0, 0, 0.03, 0.03, 0.06, 0.9, 0.9]
    )
    for step in range(0, 2000, 7):
        assert schedule.sparsity(step, 0.9) == pytest.approx(min(step // 50, round(0.9 / 0.03)) * 0.03)
    # The last rise is to the density that is asked for, to the bit.
    assert SparsitySchedule(rate=0.1, interval=2).sparsity(14, 0.7) == 0.7
    with pytest.raises(ValueError, match=r"`rate` must divide the sparsity that is wanted, 0\.875, got 0\.03"):
        schedule.sparsity(0, 0.875)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"sparse": None}, "`sparse.method` must be 'vsa', got None"),
        ({"sparse": SparseSettings(method="radial", min_tokens=0)}, "must be 'vsa', got 'radial'"),
        ({"sparse": SparseSettings(method="vsa")}, "`sparse.min_tokens` must be a number.*got 'auto'"),
        ({"sparse": SparseSettings(method="vsa", params={"gates": "x"}, min_tokens=0)}, "must be without `gates`"),
        (
            {"sparse": SparseSettings(method="vsa", params={"density": 2}, min_tokens=0)},
            "`density` must be more than 0",
        ),
        ({"schedule": SparsitySchedule(rate=0.2)}, "`rate` must divide the sparsity that is wanted, 0.75, got 0.2"),
        ({"scenes": None}, "`scenes` must say"),
    ],
    ids=["none", "method", "auto", "gates", "density", "rate", "scenes"],
)
def test_settings_that_cannot_work_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**given)
    for bad in ({"rate": 0}, {"rate": 1.0}, {"interval": 0}):
        with pytest.raises(ValueError, match=f"`{next(iter(bad))}` must be"):
            SparsitySchedule(**bad)


@pytest.mark.parametrize("name", ["vsa_gate", "moving_wan_vsa"])
def test_the_shipped_settings_are_valid(name: str) -> None:
    found = read_recipe(name)
    assert isinstance(found, VsaGate) and found.density_at(0) == 1.0
    assert found.density_at(found.steps) == pytest.approx(found.density)


def test_without_a_schedule_every_step_has_the_final_density() -> None:
    assert {recipe(schedule=None).density_at(step) for step in (0, 1, 999)} == {0.25}


@pytest.mark.parametrize("lora", [None, LORA], ids=["gates", "lora"])
def test_only_gates_and_adapter_are_trained_and_everything_is_put_back(
    lora: LoraSettings | None, tmp_path: Path
) -> None:
    made = task(tmp_path, lora=lora)
    before = {name: p.detach().clone() for name, p in made.module.named_parameters()}
    names = made.trained()
    assert sum(name.startswith("gates.layers.") for name in names) == 8
    assert all(name.startswith("gates.layers.") or "lora_" in name for name in names)
    assert any("lora_" in name for name in names) == (lora is not None)
    (optimizer,) = made.optimizers()
    for step in range(3):
        made.begin_step(step)
        batch = made.batch(step, range(2))
        torch.autograd.backward(made.loss(batch) / made.weight(batch))
        optimizer.step()
        optimizer.zero_grad()
        made.end_step(step)
    changed = {name for name, p in made.module.named_parameters() if not torch.equal(p, before[name])}
    assert changed == set(names)
    model = made.model
    made.close()
    assert active_patch(model) is None
    fresh = load_moving_wan().state_dict()
    now = model.state_dict()
    assert now.keys() == fresh.keys() and all(torch.equal(now[name], fresh[name]) for name in fresh)
    assert all(p.requires_grad for p in model.parameters())


def test_the_density_falls_as_scheduled_and_is_final_in_evaluations(tmp_path: Path) -> None:
    with closing(task(tmp_path)) as made:
        found = []
        for step in range(5):
            made.begin_step(step)
            found.append(made.patch.method.density)
            assert made.patch.method.gates is made.gates
        assert found == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.25])
        made.begin_step(0)
        with torch.no_grad():
            figures = made.evaluate()
        # Gates of zeros: the pooled branch adds nothing yet.
        assert figures["flow_loss"] == figures["flow_loss_no_gates"] and figures["density"] == pytest.approx(0.25)
        made.begin_step(1)
        assert made.patch.method.density == pytest.approx(0.75)


def test_whatever_was_evaluated_a_step_is_the_same(tmp_path: Path) -> None:
    with closing(task(tmp_path)) as made:
        torch.nn.init.normal_(made.gates.layers[0].weight, std=0.1)

        # The first at the density of the evaluation, the second at another.
        def loss() -> torch.Tensor:
            found = []
            for step in (3, 2):
                made.begin_step(step)
                found.append(made.loss(made.batch(step, range(2))).detach())
            return torch.stack(found)

        first = loss()
        with torch.no_grad():
            assert made.evaluate()["flow_loss"] != made.evaluate()["flow_loss_no_gates"]
        assert torch.equal(loss(), first)


def test_killed_and_resumed_it_ends_with_the_same_bits_and_its_bundle_loads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = recipe(save_every=2, steps=3, lora=LORA)
    train(settings, tmp_path / "whole", progress=False)

    def killed(self: VsaGateTask, step: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        before = VsaGateTask.begin_step
        patched.setattr(VsaGateTask, "begin_step", lambda s, step: killed(s, step) if step == 2 else before(s, step))
        with pytest.raises(KeyboardInterrupt):
            train(settings, tmp_path / "two", progress=False)
    figures = train(settings, tmp_path / "two", resume=True, progress=False)
    assert figures["steps"] == 3 and figures["after"]["flow_loss"] != figures["after"]["flow_loss_no_gates"]
    for file in ("gates/gates.safetensors", "adapter_model.safetensors"):
        # Not the bytes of the files: the order of what a header says besides is another one every time.
        one, two = (load_file(tmp_path / name / "result" / file) for name in ("whole", "two"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)

    model = load_moving_wan()
    given = task(tmp_path).batch(0, [0]).given
    with torch.no_grad():
        plain = model(**given, return_dict=False)[0]
        with hsa.load_bundle(model, tmp_path / "two" / "result") as loaded:
            assert loaded.patch.method.name == "vsa" and loaded.patch.method.reads == {"hidden"}
            assert loaded.patch.method.density == 0.25
            assert not torch.allclose(model(**given, return_dict=False)[0], plain, atol=1e-3)
        assert torch.equal(model(**given, return_dict=False)[0], plain)


def test_micro_batches_add_up(tmp_path: Path) -> None:
    gradients = []
    for parts in ([range(2)], [[0], [1]]):
        with closing(task(tmp_path, schedule=None)) as made:
            made.begin_step(0)
            for part in parts:
                made.loss(made.batch(0, part)).backward()
            gradients.append([p.grad for p in made.trained().values()])
    for a, b in zip(*gradients, strict=True):
        assert bool(a.any())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_checkpointed_blocks_give_the_same_gradients(tmp_path: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        made = task(tmp_path, lora=LORA, gradient_checkpointing=checkpointing)
        with closing(made):
            made.module.train()
            torch.nn.init.normal_(made.gates.layers[1].weight, std=0.1)
            made.gates.layers[1].weight.data.mul_(0).add_(0.01)
            made.begin_step(3)
            made.loss(made.batch(0, range(2))).backward()
            gradients.append({name: p.grad for name, p in made.trained().items() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, a in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], a, rtol=1e-4, atol=1e-6)


def test_a_recipe_for_latents_of_a_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The way of a real Wan: a pipeline of diffusers and a folder of latents."""
    from hf_sparse_attn.recipes import video_models
    from hf_sparse_attn.training.video.data import VideoSettings
    from hf_sparse_attn.training.video.latents import LatentSample
    from hf_sparse_attn.training.video.material import FlowSettings
    from tests.support import tiny_wan
    from tests.support.latents import write_latents

    samples = [LatentSample(torch.randn(16, 3, 12, 10), {"prompt_embeds": torch.randn(9, 32)}) for _ in range(3)]
    write_latents(tmp_path / "latents", samples)
    monkeypatch.setattr(video_models, "load_pipeline", lambda *_: tiny_wan.pipeline("t2v"))
    settings = replace(
        recipe(),
        model="tiny",
        scenes=None,
        videos=VideoSettings(source=str(tmp_path / "latents"), frames=9, height=96, width=80),
        flow=FlowSettings(drop=0.0),
        batch=1,
    )
    with closing(settings.task(Run(output=tmp_path, device=torch.device("cpu")))) as made:
        made.begin_step(3)
        made.loss(made.batch(3, [0])).backward()
        assert all(bool(p.grad.any()) for p in made.gates.parameters())
