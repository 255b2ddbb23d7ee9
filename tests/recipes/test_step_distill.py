"""Recipe step_distill: which weights change, who teaches, gradients, resumption, prompts, and what is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.recipe import OptimizerSettings, Run, SparseSettings, read_recipe
from hf_sparse_attn.recipes import video_models
from hf_sparse_attn.recipes.reports import step_distill_report
from hf_sparse_attn.recipes.step_distill import ClipSettings, FakeSettings, StepDistill, StudentSettings
from hf_sparse_attn.recipes.step_distill_task import StepDistillTask
from hf_sparse_attn.shipped import moving
from hf_sparse_attn.shipped.moving_scenes import draw_classes
from hf_sparse_attn.training import trajectory_matching as tm
from hf_sparse_attn.training.flow_matching import sample_seed
from hf_sparse_attn.training.loop import train
from hf_sparse_attn.training.lora.adapter import add_lora
from hf_sparse_attn.training.lora.companion import add_companion
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.video import data as video_data
from hf_sparse_attn.training.video.data import read_prompts
from hf_sparse_attn.training.video.material import HELD_OUT
from hf_sparse_attn.training.video.scenes import SceneSettings
from tests.support import tiny_prompts
from tests.support.processes import run_code

pytest.importorskip("peft")

SCENES = SceneSettings(frames=4, height=12, width=12, turn=3, clips=0, sampling_steps=2, guidance=2.0)
WINDOW = SparseSettings(method="sliding_window", params={"window": 8, "sink": 0, "block_size": 16}, min_tokens=0)
LORA = LoraSettings(targets=("attn1.to_q", "attn1.to_v", "attn2.to_k"), rank=4)
STUDENT = StudentSettings(steps=3, shift=3.0, keep=0.9)
COMMON: dict[str, Any] = {
    "lora": LORA,
    "sparse": WINDOW,
    "student": STUDENT,
    "guidance": 2.0,
    "steps": 4,
    "batch": 3,
    "held_out": 2,
    "threads": 1,
    "optimizer": OptimizerSettings(learning_rate=1e-2, beta1=0.0),
    "fake": FakeSettings(learning_rate=3e-2),
}


def scenes_recipe(**given: Any) -> StepDistill:
    made = StepDistill(**{**COMMON, "model": "moving_wan", "scenes": SCENES, **given})
    type(made).name = "step_distill"
    return made


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(output=tmp_path, device=torch.device("cpu"))


def shaken(task: StepDistillTask) -> StepDistillTask:
    """With all the trained weights drawn anew, so that neither adapter is 0 and both differ."""
    for place, p in enumerate(task.trained().values()):
        torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(place))
    return task


def gradients(task: StepDistillTask, parts: list[list[int]], step: int = 1) -> tuple[float, dict[str, Tensor | None]]:
    """Loss of a step and its gradients, over some micro-batches."""
    task.model.zero_grad()
    weights = task.adapter.parameters() | task.companion.parameters()
    total = 0.0
    for samples in parts:
        loss = task.loss(task.batch(step, samples))
        torch.autograd.backward(loss)
        total += float(loss.detach())
    return total, {name: None if p.grad is None else p.grad.clone() for name, p in weights.items()}


def assert_close(found: dict[str, Any], wanted: dict[str, Any], rtol: float) -> None:
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=rtol, atol=rtol * float(gradient.abs().max()))


# ---------------------------------------------------------------------- two adapters


def test_a_companion_is_a_model_of_its_own() -> None:
    model, plain = moving.load_moving_wan(), moving.load_moving_wan()
    given = {
        "hidden_states": torch.randn(1, 6, 2, 8, 8),
        "timestep": torch.tensor([500.0]),
        "encoder_hidden_states": torch.randn(1, 3, 16),
    }

    def out() -> Tensor:
        with torch.no_grad():
            found: Tensor = model(**given, return_dict=False)[0]
        return found

    adapter = add_lora(model, LORA)
    for place, p in enumerate(adapter.parameters().values()):
        torch.nn.init.normal_(p, std=0.2, generator=torch.Generator().manual_seed(place))
    first, own = out(), dict(adapter.parameters())
    companion = add_companion(adapter)
    assert torch.equal(out(), first) and not companion.in_force
    # It begins as the first one, in memory of its own, and is trained as well.
    with companion.active():
        assert companion.in_force and torch.equal(out(), first)
    for p in companion.parameters().values():
        assert p.requires_grad
        p.data += 0.1
    again = companion.bound(out)
    with companion.active():
        second, there = out(), companion.bound(out)
        assert torch.equal(again(), first)
    assert not torch.equal(second, first) and torch.equal(out(), first) and torch.equal(there(), second)
    assert dict(adapter.parameters()).keys() == own.keys()
    assert not own.keys() & companion.parameters().keys() and len(own) == len(companion.parameters())
    with torch.no_grad(), adapter.disabled(), companion.active():
        assert torch.equal(out(), plain(**given, return_dict=False)[0])
    with pytest.raises(ValueError, match="`adapter` must have no companion yet"):
        add_companion(adapter)
    companion.remove()
    companion.remove()
    assert torch.equal(out(), first) and not companion.parameters()
    adapter.remove()
    with pytest.raises(ValueError, match="must be on its model"):
        add_companion(adapter)
    with (
        add_lora(model, replace(LORA, trained=("proj_out",))) as other,
        pytest.raises(
            ValueError, match=r"`lora.trained` must be empty where there are two adapters, got \['proj_out'\]"
        ),
    ):
        add_companion(other)


def test_only_the_two_adapters_change(run: Run) -> None:
    plain = moving.load_moving_wan().state_dict()
    with closing(scenes_recipe().task(run)) as task:
        before = {name: p.detach().clone() for name, p in task.model.named_parameters()}
        optimizers = task.optimizers()
        for step in range(2):
            task.begin_step(step)
            for optimizer in optimizers:
                optimizer.zero_grad()
            torch.autograd.backward(task.loss(task.batch(step, range(3))) / 3)
            for optimizer in optimizers:
                optimizer.step()
            task.end_step(step)
        changed = {name for name, p in task.model.named_parameters() if not torch.equal(p, before[name])}
        assert changed == set(task.trained()) == {name for name in before if ".lora_" in name}
        groups = task.gradient_groups(task.trained())
        assert [len(group) for group in groups] == [len(task.trained()) // 2] * 2
        assert {id(p) for p in groups[0]} == {id(p) for p in task.adapter.parameters().values()}
        assert [o.param_groups[0]["lr"] for o in optimizers] == [1e-2, 3e-2]
        assert optimizers[1].param_groups[0]["betas"] == (0.0, 0.999)
        model = task.model
    after = model.state_dict()
    assert after.keys() == plain.keys() and all(torch.equal(after[name], plain[name]) for name in plain)


@pytest.mark.parametrize("sparse", [WINDOW, None], ids=["sparse", "dense"])
def test_the_teacher_is_the_untouched_model_with_guidance(run: Run, sparse: SparseSettings | None) -> None:
    plain = moving.load_moving_wan()
    with closing(shaken(scenes_recipe(sparse=sparse).task(run))) as task, torch.no_grad():
        drawn, conditions = task.batch(0, [0, 2])
        told, guided = task.taught(drawn.start, drawn.level, conditions)
        nothing = {name: t.expand(2, *t.shape) for name, t in task.material.nothing.items()}
        given = [task.material.inputs(drawn.start, drawn.level, c) for c in (conditions, nothing)]
        with_, without = (plain(**one, return_dict=False)[0] for one in given)
        assert torch.equal(told, with_)
        torch.testing.assert_close(guided, without + 2.0 * (with_ - without))
        assert not torch.equal(task.velocity(drawn.start, drawn.level, conditions), told)


@pytest.mark.parametrize("anchor", [0.0, 0.5], ids=["", "anchored"])
def test_gradients_are_those_of_a_plain_formulation(run: Run, anchor: float) -> None:
    recipe = scenes_recipe(sparse=None, fake=FakeSettings(anchor=anchor))
    teacher = moving.load_moving_wan().double()
    with closing(shaken(recipe.task(run))) as task:
        task.model.double()
        task.material.dtype = torch.float64
        loss, found = gradients(task, [[0, 1, 2]], step=5)
        drawn, conditions = task.batch(5, [0, 1, 2])
        assert drawn.start.dtype == torch.float64 and len(set(drawn.step.tolist())) > 1
        levels, student = tm.student_levels(3, 3.0).double(), task.adapter.parameters()
        total, wanted = 0.0, {name: torch.zeros_like(p) for name, p in task.trained().items()}
        for row, seed in enumerate(drawn.seeds):
            one = {name: t[row : row + 1] for name, t in conditions.items()}

            def ask(model: Any, state: Tensor, level: Tensor, told: dict[str, Tensor]) -> Tensor:
                given = task.material.inputs(state, level.view(1), told)
                velocity: Tensor = model(**given, return_dict=False)[0]
                return velocity

            state, step = drawn.start[row : row + 1], int(drawn.step[row])
            for past in range(step):
                with torch.no_grad():
                    velocity = ask(task.model, state, levels[past], one)
                fresh = tm._normal([seed], state.shape[1:], tm._WAY, past).double()
                noise = 0.9 * (state + (1 - levels[past]) * velocity) + math.sqrt(0.19) * fresh
                sample = state - levels[past] * velocity
                state = (1 - levels[past + 1]) * sample + levels[past + 1] * noise
            velocity = ask(task.model, state, levels[step], one)
            here, there, level = levels[step], levels[step + 1], drawn.level[row]
            sample = (state - here * velocity).detach()
            noise = 0.9 * (state + (1 - here) * velocity.detach()) + math.sqrt(0.19) * drawn.again[row]
            share = (1 - level) / (1 - there)
            diffused = share * ((1 - there) * sample + there * noise)
            diffused = diffused + (level**2 - share**2 * there**2).sqrt() * drawn.diffused[row]
            with torch.no_grad():
                told, none = (
                    ask(teacher, diffused, level, c)
                    for c in (one, {n: t[None] for n, t in task.material.nothing.items()})
                )
            with task.companion.active():
                guess = ask(task.model, diffused, level, one)
            real = diffused - level * (none + 2.0 * (told - none))
            away = (diffused - level * guess.detach()) - real
            away = away / (sample - real).abs().mean()
            pull = torch.autograd.grad(velocity, list(student.values()), -here * away / away.numel())
            error = (guess - (diffused - sample) / level).square().mean() + anchor * (guess - told).square().mean()
            fake = task.companion.parameters()
            push = torch.autograd.grad(error, list(fake.values()))
            for name, gradient in [*zip(student, pull, strict=True), *zip(fake, push, strict=True)]:
                wanted[name] += gradient
            total += float((error + 0.5 * away.square().mean()).detach())
    assert loss == pytest.approx(total, rel=1e-9)
    assert_close(found, wanted, 1e-8)


@pytest.mark.parametrize("imitate", [0, 4], ids=["matched", "imitating"])
def test_checkpointing_changes_nothing(run: Run, imitate: int) -> None:
    found = []
    for on in (False, True):
        recipe = scenes_recipe(gradient_checkpointing=on, student=replace(STUDENT, imitate=imitate))
        with closing(shaken(recipe.task(run))) as task:
            task.model.train()
            task.begin_step(1)
            found.append(gradients(task, [[0, 1]]))
            assert task.model.is_gradient_checkpointing == on
    (plain, without), (saved, with_) = found
    assert saved == pytest.approx(plain, rel=1e-6)
    assert_close(with_, without, 1e-5)


def test_micro_batches_are_the_whole(run: Run) -> None:
    with closing(shaken(scenes_recipe(batch=4).task(run))) as task:
        whole, expected = gradients(task, [[0, 1, 2, 3]])
        parts, found = gradients(task, [[2], [0, 3], [1]])
        assert parts == pytest.approx(whole, rel=1e-5)
        assert task.weight(task.batch(0, [0, 1, 2])) == 3
        assert_close(found, expected, 1e-4)


def test_the_student_learns_in_some_steps_and_the_fake_score_in_all(run: Run) -> None:
    recipe = scenes_recipe(fake=FakeSettings(updates=3), student=replace(STUDENT, imitate=1))
    with closing(shaken(recipe.task(run))) as task:
        learns = []
        for step in range(5):
            task.begin_step(step)
            found = gradients(task, [[0]], step)[1]
            own = [found[name] is not None for name in task.adapter.parameters()]
            assert all(own) or not any(own)
            assert all(found[name] is not None for name in task.companion.parameters())
            learns.append(own[0])
            task.end_step(step)
            assert all(p.requires_grad for p in task.trained().values())
        # The first one imitates.
        assert learns == [True, False, True, False, False]


def test_an_imitating_student_is_held_to_the_guided_velocity(run: Run) -> None:
    with closing(shaken(scenes_recipe(student=replace(STUDENT, imitate=1)).task(run))) as task, torch.no_grad():
        batch = task.batch(0, [0])
        task.begin_step(0)
        loss = float(task.loss(batch))
        drawn, conditions = batch
        state = tm.rollout(lambda s, level, rows: task.velocity(s, level, conditions), drawn, task.levels, 0.9)
        here = task.levels[drawn.step]
        velocity = task.velocity(state, here, conditions)
        reached = tm.reach(state, velocity, drawn, task.levels, 0.9)
        with task.companion.active():
            fake = tm.fake_loss(reached, task.velocity(reached.state, reached.level, conditions))
        apart = (velocity - task.taught(state, here, conditions)[1]).square().mean()
        assert loss == pytest.approx(float(fake + apart), rel=1e-6)


def test_samples_depend_on_seed_step_and_number_alone(run: Run) -> None:
    with closing(scenes_recipe().task(run)) as task:
        drawn, conditions = task.batch(4, [0, 1, 2])
        alone, told = task.batch(4, [2])
        assert alone.seeds == drawn.seeds[2:] == (sample_seed(0, 14),)
        assert torch.equal(alone.start[0], drawn.start[2]) and torch.equal(alone.level[0], drawn.level[2])
        assert all(torch.equal(told[name][0], conditions[name][2]) for name in told)
        assert not torch.equal(task.batch(5, [2])[0].start, alone.start)


# ---------------------------------------------------------------------- the engine


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = scenes_recipe(fake=FakeSettings(updates=2), save_every=1, batch=2, held_out=1)

    def dies(self: StepDistillTask, step: int) -> None:
        if step == 3:
            raise KeyboardInterrupt
        kept(self, step)

    kept = StepDistillTask.begin_step
    whole = train(recipe, tmp_path / "whole", progress=False)
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(StepDistillTask, "begin_step", dies)
        train(recipe, tmp_path / "killed", progress=False)
    found = train(recipe, tmp_path / "killed", resume=True, progress=False)
    weights = [load_file(tmp_path / n / "result" / "adapter_model.safetensors") for n in ("whole", "killed")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert any(tensor.any() for name, tensor in weights[0].items() if "lora_B" in name)
    # The density is a mean over all calls so far, in another order.
    assert found["after"] == pytest.approx(whole["after"], rel=1e-12) and found["loss"] == whole["loss"]
    # The fake score is no part of what comes out.
    assert not any("companion" in name for name in weights[0])


@pytest.mark.slow
def test_two_processes_equal_one(tmp_path: Path) -> None:
    code = f"import runpy, torch; torch.set_num_threads(1); found = runpy.run_path({__file__!r}); "
    done = run_code(code + f"found['program'](found['Path']({str(tmp_path / 'two')!r}))", processes=2)
    assert done.returncode == 0, done.stderr[-2000:]
    program(tmp_path / "one")
    one, two = (load_file(tmp_path / n / "result" / "adapter_model.safetensors") for n in ("one", "two"))
    # A sum in another order, after two steps of Adam, whose length does not depend on that of the gradient. Had the
    # student moved while it stood still it would be off by a third.
    assert_close(two, one, 1e-2)


def program(folder: Path) -> None:
    """A training in which the student stands still in every other step."""
    optimizer = OptimizerSettings(learning_rate=1e-3, beta1=0.9, weight_decay=0.1)
    recipe = scenes_recipe(fake=FakeSettings(updates=2), optimizer=optimizer, batch=2, held_out=1)
    train(recipe, folder, progress=False)


# ---------------------------------------------------------------------- what comes out


def test_the_bundle_samples_as_the_student_did(run: Run) -> None:
    with closing(shaken(scenes_recipe(scenes=replace(SCENES, clips=1)).task(run))) as task, torch.no_grad():
        figures = task.evaluate()
        task.save(run.output / "bundle", figures)
        clips, _ = task.material.made(STUDENT, 3.0)
        assert task.evaluate() == pytest.approx(figures, abs=60)
    names = {"right", "motion_error", "seen", "flicker", "seconds", "calls"}
    assert set(figures) == {"teacher_error", "density", *names, *(f"teacher_{name}" for name in names)}
    assert (figures["calls"], figures["teacher_calls"]) == (3.0, 4.0) and 0 < figures["density"] < 1
    kept = load_file(run.output / "clips-00000.safetensors")["clips"]
    assert torch.equal(kept, (clips * 255).round().byte())
    model = moving.load_moving_wan()
    with hsa.load_bundle(model, run.output / "bundle") as loaded:
        scene = draw_classes(1, SCENES.seed)
        again = moving.sample(model, scene, 4, 12, 12, steps=3, seed=SCENES.seed, guidance=1.0, turn=3, even=True)
        # The same operations; what differs is the memory they work in.
        torch.testing.assert_close(again, clips, rtol=0, atol=1e-4)
        assert loaded.recipe["sampling"]["num_inference_steps"] == 3
        assert loaded.recipe["sampling"]["guidance_scale"] == 1.0
        assert loaded.recipe["sampling"]["flow_shift"] == 3.0 and loaded.recipe["recipe"] == "step_distill"
        assert "sampling.num_inference_steps" in (run.output / "bundle" / "README.md").read_text()


def test_even_levels_of_the_small_model_are_the_students() -> None:
    levels: list[float] = []
    model = moving.load_moving_wan()
    model.register_forward_pre_hook(lambda _, args: levels.append(float(args[1][0]) / 1000))
    for even in (True, False):
        levels.clear()
        moving.sample(model, draw_classes(1, 0), 2, 12, 12, steps=4, guidance=1.0, even=even, shift=5.0)
        assert levels == pytest.approx(tm.student_levels(4, 5.0, even)[:-1].tolist(), rel=1e-5)


# ---------------------------------------------------------------------- prompts


@pytest.fixture
def prompts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., StepDistill]:
    """A recipe for a tiny Wan pipeline and seven prompts."""
    pipe = tiny_prompts.wan()
    monkeypatch.setattr(video_models, "load_pipeline", lambda model, dtype: pipe)
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"a cat walks {n} steps\n" for n in range(7)), encoding="utf-8")

    def recipe(**given: Any) -> StepDistill:
        clip = ClipSettings(frames=9, height=32, width=48, tokens=11, negative="the grass")
        made = StepDistill(**{**COMMON, "model": "tiny", "prompts": str(file), "clip": clip, **given})
        type(made).name = "step_distill"
        return made

    recipe.pipe = pipe  # type: ignore[attr-defined]
    return recipe


def test_prompts_are_encoded_once_and_kept(prompts: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = prompts.pipe
    with closing(prompts().task(run)) as task:
        drawn, conditions = task.batch(0, [0, 1, 2])
        assert drawn.start.shape == (3, 16, 3, 4, 6) and conditions["prompt_embeds"].shape == (3, 11, 32)
        data = task.material.data
        for n in range(7):
            with torch.no_grad():
                wanted = pipe.encode_prompt(
                    f"a cat walks {n} steps", do_classifier_free_guidance=False, max_sequence_length=11
                )[0]
            torch.testing.assert_close(data[n].conditions["prompt_embeds"], wanted[0])
        with torch.no_grad():
            negative = pipe.encode_prompt("the grass", do_classifier_free_guidance=False, max_sequence_length=11)[0][0]
        torch.testing.assert_close(task.material.nothing["prompt_embeds"], negative)
        assert math.isfinite(float(task.loss(task.batch(0, [0])).detach()))
        # The last two prompts are for evaluation.
        trained = {float(task.draw([n])[1]["prompt_embeds"].sum()) for n in range(12)}
        held = {float(task.draw([HELD_OUT + n])[1]["prompt_embeds"].sum()) for n in range(2)}
        assert len(trained) == 5 and len(held) == 2 and not trained & held
        with torch.no_grad():
            assert set(task.evaluate()) == {"teacher_error", "density"}
        assert task.shift == 3.0
    calls: list[str] = []
    monkeypatch.setattr(video_data, "encode_caption", lambda pipe, prompt, *rest: calls.append(prompt))
    with closing(prompts().task(run)) as task:
        assert not calls and torch.equal(task.batch(0, [0, 1, 2])[1]["prompt_embeds"], conditions["prompt_embeds"])


def test_the_student_goes_where_the_pipeline_goes(prompts: Any, run: Run) -> None:
    recipe = prompts(student=StudentSettings(steps=3, even=False))
    with closing(shaken(recipe.task(run))) as task, torch.no_grad():
        drawn, conditions = task.draw([HELD_OUT])
        state = drawn.start
        for step in range(3):
            here, there = task.levels[step].view(1), task.levels[step + 1].view(1)
            state = tm.advance(state, task.velocity(state, here, conditions), here, there)
        made = prompts.pipe(
            prompt_embeds=conditions["prompt_embeds"],
            latents=drawn.start,
            num_inference_steps=3,
            guidance_scale=1.0,
            num_frames=9,
            height=32,
            width=48,
            output_type="latent",
        ).frames
        torch.testing.assert_close(made, state, rtol=1e-4, atol=1e-4)


def test_a_model_that_is_told_its_guidance_needs_no_other_prompt(
    prompts: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_prompts.hunyuan()
    monkeypatch.setattr(video_models, "load_pipeline", lambda model, dtype: pipe)
    lora = LoraSettings(targets=(r"(single_)?transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0)",), rank=4)
    clip = ClipSettings(frames=9, height=32, width=48)
    with closing(shaken(prompts(clip=clip, lora=lora, guidance=1.0, embedded=6.0).task(run))) as task:
        batch = task.batch(0, [0])
        assert task.material.nothing is None and set(batch.conditions) >= {"prompt_embeds", "pooled_prompt_embeds"}
        torch.autograd.backward(task.loss(batch))
        assert all(p.grad is not None and bool(p.grad.any()) for p in task.trained().values())
        assert task.bundle_parts()["recipe"]["sampling"]["guidance_scale"] == 6.0
        with torch.no_grad():
            told, guided = task.taught(batch.drawn.start, batch.drawn.level, batch.conditions)
            assert told is guided


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "`prompts` must be a text file with a prompt a line, got .*, which is not there"),
        (b"\n  \n", "`prompts` must hold at least one prompt, got none"),
        (b"\xff\xfe\x00", "`prompts` must be a text file in UTF-8"),
    ],
    ids=["missing", "empty", "no text"],
)
def test_prompts_that_are_none_are_refused(text: bytes | None, words: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    if text is not None:
        file.write_bytes(text)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_prompts(file)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"scenes": None}, "`prompts` or `scenes` must say what is made, got None and None"),
        ({"prompts": "a.txt"}, "`prompts` or `scenes` must say what is made"),
        ({"scenes": None, "prompts": "a.txt"}, "`clip` must go with `prompts`, got None and 'a.txt'"),
        ({"guidance": 0.0}, "`guidance` must be more than 0, got 0.0"),
        ({"embedded": 6.0}, "`embedded` must be none for scenes, got 6.0"),
        ({"guidance": 3.0}, "`scenes.guidance` must be `guidance` = 3.0, the same teacher's, got 2.0"),
        ({"held_out": 0}, "`held_out`"),
        ({"lora": None}, "`lora` must say what is trained, got none"),
        ({"lora": replace(LORA, dropout=0.1)}, "without dropout, .*; got trained .., dropout 0.1"),
        ({"lora": replace(LORA, trained=("proj_out",))}, r"got trained \['proj_out'\]"),
        ({"sparse": replace(WINDOW, dense_steps=0.25)}, "`sparse.dense_steps` must be none, .* got 0.25"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_settings_that_cannot_be_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        scenes_recipe(**given)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: StudentSettings(steps=0), "`steps`"),
        (lambda: StudentSettings(imitate=-1), "`imitate`"),
        (lambda: StudentSettings(shift=0.0), "`student.shift` must be more than 0, or none, got 0.0"),
        (lambda: StudentSettings(keep=1.5), "`student.keep` must be from 0 to 1, got 1.5"),
        (lambda: FakeSettings(updates=0), "`updates`"),
        (lambda: FakeSettings(learning_rate=0.0), "`fake.learning_rate` must be more than 0, got 0.0"),
        (lambda: FakeSettings(anchor=-1.0), "`fake.anchor` must be 0 or more, got -1.0"),
    ],
    ids=["steps", "imitate", "shift", "keep", "updates", "rate", "anchor"],
)
def test_parts_of_settings_are_checked(build: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build()


def test_what_cannot_work_is_refused_before_the_first_step(
    prompts: Any, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched, pytest.raises(ValueError, match=r"`sparse.method` must have a backward"):
        patched.setattr(hsa.get_method("sliding_window"), "trainable", False)
        scenes_recipe().task(run)
    with pytest.raises(ValueError, match="`held_out` must leave some of the 7"):
        prompts(held_out=7).task(run)
    clip = ClipSettings(frames=10, height=32, width=48)
    with pytest.raises(ValueError, match=r"`frames` must be 4n \+ 1"):
        prompts(clip=clip).task(run)
    prompts.pipe.register_to_config(boundary_ratio=0.7)
    with pytest.raises(
        ValueError, match="`model` must have one transformer for all noise levels, got a pipeline with"
    ):
        prompts().task(run)


def test_attention_that_is_dense_after_all_is_refused(run: Run) -> None:
    with closing(scenes_recipe(sparse=replace(WINDOW, min_tokens=10_000)).task(run)) as task:
        with pytest.raises(ValueError, match=r"`sparse` must make a layer sparse, all were dense: .*min_tokens"):
            task.loss(task.batch(0, [0]))


def test_recipes_that_come_with_the_package_are_read() -> None:
    large, small = read_recipe("step_distill"), read_recipe("moving_wan_distill")
    assert isinstance(large, StepDistill) and isinstance(small, StepDistill)
    assert (large.lora.rank, large.lora.alpha, large.student.steps, large.student.keep) == (64, 64.0, 8, 0.9)
    assert (large.optimizer.learning_rate, large.fake.learning_rate, large.optimizer.beta1) == (1e-4, 5e-4, 0.0)
    assert (small.student.steps, small.scenes.sampling_steps, small.scenes.guidance) == (4, 8, 3.0)
    assert read_recipe("step_distill", ["model=a", "prompts=b.txt"]).prompts == "b.txt"


def test_the_report_is_written(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    scenes = replace(SCENES, clips=1, sampling_steps=1)
    recipe = scenes_recipe(steps=1, batch=1, held_out=1, student=StudentSettings(steps=1), scenes=scenes)
    figures = train(recipe, tmp_path / "runs" / "small", progress=False)
    step_distill_report.main(["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "page"), "--clips", "2"])
    text = (tmp_path / "page" / "step_distill.md").read_text()
    assert "teacher, 1 steps, guidance 2" in text and "small, 1 steps, no guidance" in text
    found = json.loads((tmp_path / "page" / "step_distill.json").read_text())
    assert [row["calls"] for row in found["rows"].values()] == [2.0, 1.0, 1.0, 1.0]
    (evaluations,) = found["evaluations"].values()
    assert [entry["step"] for entry in evaluations] == [0, 1]
    assert evaluations[1]["evaluation"]["motion_error"] == figures["after"]["motion_error"]
    assert (tmp_path / "page" / "step_distill.png").stat().st_size > 5_000
    with pytest.raises(ValueError, match="`runs` must hold a finished training, got none in"):
        step_distill_report.main(["--runs", str(tmp_path), "--output", str(tmp_path / "page")])
