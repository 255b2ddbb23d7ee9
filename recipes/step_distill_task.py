"""The training of recipe step_distill: a student and a fake score as two adapters on one model, and what is made."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import WanMaterial
from hf_sparse_attn.settings import plain
from hf_sparse_attn.shipped.moving import CHANNELS_OUT
from hf_sparse_attn.shipped.moving_scenes import draw_classes
from hf_sparse_attn.training import trajectory_matching as tm
from hf_sparse_attn.training.adapter_task import AdapterTask
from hf_sparse_attn.training.flow_matching import flow_error, sample_seed
from hf_sparse_attn.training.lora.companion import Companion, add_companion
from hf_sparse_attn.training.matching import teaching
from hf_sparse_attn.training.video.latents import LatentSample
from hf_sparse_attn.training.video.material import HELD_OUT, Material, announced, keep_clips, stacked, take
from hf_sparse_attn.training.video.scenes import SceneMaterial

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.step_distill import StepDistill, StudentSettings


class PromptBatch(NamedTuple):
    """What some samples begin with: draws, and conditions by name, with a batch axis."""

    drawn: tm.Draw
    conditions: dict[str, Tensor]


class StepDistillTask(AdapterTask):
    """See StepDistill.

    Args:
        recipe: the settings.
        run: where it runs.
        material: model and prompts.

    Raises:
        ValueError: see AdapterTask; or guidance is asked for and no other prompt can be encoded.
    """

    recipe: StepDistill

    def __init__(self, recipe: StepDistill, run: Run, material: Material) -> None:
        if recipe.guidance != 1 and material.nothing is None:
            raise ValueError(
                f"`guidance` must be 1 where the pipeline cannot encode an empty prompt, got {recipe.guidance}"
            )
        self.shift = material.shift if recipe.student.shift is None else recipe.student.shift
        self.levels = tm.student_levels(recipe.student.steps, self.shift, recipe.student.even).to(run.device)
        super().__init__(recipe, run, material.model, base_model=recipe.model)
        self.material = material
        self._learns, self._imitates, self.done = True, False, 0
        self._taught: dict[str, float] | None = None
        try:
            self.companion: Companion = add_companion(self.adapter)
            self._undo.callback(self.companion.remove)
            if recipe.gradient_checkpointing:
                # What is computed again for the backward pass is so with the adapter that it was computed with.
                host: Any = self.model
                host.enable_gradient_checkpointing(self._checkpoint)
        except BaseException:
            self.close()
            raise

    def _checkpoint(self, module: Any, *args: Any) -> Any:
        return checkpoint(self.companion.bound(module.__call__), *args, use_reentrant=False)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        student, fake = self.gradient_groups(self.trained())
        own = self.recipe.optimizer
        other = dataclasses.replace(own, learning_rate=self.recipe.fake.learning_rate)
        return [own.make(student), other.make(fake)]

    def gradient_groups(self, weights: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """Those of the student, and those of the fake score."""
        fake = set(self.companion.parameters())
        return [[p for name, p in weights.items() if (name in fake) == wanted] for wanted in (False, True)]

    def begin_step(self, step: int) -> None:
        self._imitates = step < self.recipe.student.imitate
        self._learns = self._imitates or step % self.recipe.fake.updates == self.recipe.fake.updates - 1

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self.done = step + 1

    def batch(self, step: int, samples: Sequence[int]) -> PromptBatch:
        return self.draw(self.numbers(step, samples))

    def draw(self, numbers: Sequence[int]) -> PromptBatch:
        """Samples by their numbers over the whole training; those from HELD_OUT on are held out."""
        material, device = self.material, self.run.device
        seeds = [sample_seed(self.recipe.seed, number) for number in numbers]
        held = take(material, numbers, seeds)
        drawn = tm.draw(seeds, held[0].latents.shape, self.levels.cpu(), self.shift, self.recipe.student.whole)
        dtype = torch.promote_types(material.dtype, torch.float32)
        on = {n: getattr(drawn, n).to(device, dtype) for n in ("start", "level", "again", "diffused")}
        conditions = stacked([sample.conditions for sample in held], device)
        return PromptBatch(drawn._replace(step=drawn.step.to(device), **on), conditions)

    def weight(self, batch: PromptBatch) -> float:
        return float(len(batch.drawn.step))

    def loss(self, batch: PromptBatch) -> Tensor:
        recipe, (drawn, conditions) = self.recipe, batch
        keep = recipe.student.keep
        state = tm.rollout(
            lambda some, level, rows: self.velocity(some, level, {n: t[rows] for n, t in conditions.items()}),
            drawn,
            self.levels,
            keep,
        )
        here = self.levels.to(state)[drawn.step]
        # In a step in which it does not learn no gradient reaches the student, and its optimizer leaves it.
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            velocity = self.velocity(state, here, conditions)
        self.check_sparse()
        reached = tm.reach(state, velocity, drawn, self.levels, keep)
        with self.companion.active():
            guess = self.velocity(reached.state, reached.level, conditions)
        loss = tm.fake_loss(reached, guess)
        if recipe.fake.anchor or (self._learns and not self._imitates):
            told, wanted = self.taught(reached.state, reached.level, conditions)
            if recipe.fake.anchor:
                loss = loss + recipe.fake.anchor * (guess - told).square().flatten(1).mean(1)
            if self._learns and not self._imitates:
                loss = loss + tm.student_loss(reached, tm.matching_gradient(reached, wanted, guess.detach()))
        if self._imitates:
            loss = loss + (velocity - self.taught(state, here, conditions)[1]).square().flatten(1).mean(1)
        return loss.sum()

    def velocity(self, state: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """What the model predicts as it is now, in the precision of the states."""
        given = self.material.inputs(state, level, conditions)
        with announced(self.model, self.patch):
            found: Tensor = self.model(**given, return_dict=False)[0]
        return found.to(state.dtype)

    def taught(self, state: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """What the teacher predicts: without guidance and with it."""
        with self.teacher():
            told = self.velocity(state, level, conditions)
            nothing = self.material.nothing
            if self.recipe.guidance == 1 or nothing is None:
                return told, told
            none = {n: t.to(state.device).expand(len(state), *t.shape) for n, t in nothing.items()}
            return told, tm.guided(told, self.velocity(state, level, none), self.recipe.guidance)

    def teacher(self) -> AbstractContextManager[None]:
        """Within it the model is its own teacher: dense, and without both adapters."""
        return teaching(self.model, self.patch, self.adapter)

    def evaluate(self) -> dict[str, float]:
        """`teacher_error`: mean squared distance of the student's velocity from the teacher's with guidance, along the
        student's way, over the held-out prompts; `density` where attention is sparse. Of scenes besides what
        `motion_figures` tells of clips as the student samples them, and as the teacher does (`teacher_right`, ...),
        with processor seconds and calls of the model for a clip. The student's clips are kept in the run's folder.
        """
        figures = {"teacher_error": self._teacher_error()}
        if self.patch is not None:
            figures["density"] = self.patch.report().density
        material = self.material
        if not isinstance(material, SceneMaker) or not material.settings.clips:
            return figures
        if self._taught is None:
            with self.teacher():
                self._taught = {f"teacher_{name}": value for name, value in material.made()[1].items()}
        clips, found = material.made(self.recipe.student, self.shift)
        keep_clips(clips, self.run, self.done)
        return {**figures, **found, **self._taught}

    def _teacher_error(self) -> float:
        total = 0.0
        for number in range(self.recipe.held_out):
            (drawn, conditions) = self.draw([HELD_OUT + number])
            state = drawn.start
            for step in range(self.recipe.student.steps):
                here, there = (self.levels[place].to(state).expand(1) for place in (step, step + 1))
                velocity = self.velocity(state, here, conditions)
                total += float(flow_error(velocity, self.taught(state, here, conditions)[1]))
                state = tm.advance(state, velocity, here, there)
        return total / (self.recipe.held_out * self.recipe.student.steps)

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["done"])

    def bundle_parts(self) -> dict[str, Any]:
        recipe = self.recipe
        sampling = {
            "num_inference_steps": recipe.student.steps,
            "guidance_scale": 1.0 if recipe.embedded is None else recipe.embedded,
            "flow_shift": self.shift,
            "levels": [round(level, 6) for level in self.levels.tolist()],
        }
        return {"part": self.material.part, "recipe": {"recipe": recipe.name, "sampling": sampling, **plain(recipe)}}


class SingleWan(WanMaterial):
    """A Wan pipeline with one transformer for all noise levels."""

    def __init__(self, run: Run, pipe: Any, videos: Any, **samples: Any) -> None:
        boundary = pipe.config.get("boundary_ratio")
        if boundary is not None:
            raise ValueError(
                f"`model` must have one transformer for all noise levels, got a pipeline with two, from {boundary} on"
            )
        super().__init__(run, pipe, videos, **samples)


class SceneMaker(SceneMaterial):
    """Scenes that are asked for and never drawn."""

    def sample(self, number: int, seed: int) -> LatentSample:
        size = self.settings
        shape = (CHANNELS_OUT, self.frames, size.height, size.width)
        return LatentSample(torch.zeros(()).expand(shape), self._conditions(draw_classes(1, seed)[0]))

    held_out = sample

    def made(self, student: StudentSettings | None = None, shift: float = 1.0) -> tuple[Tensor, dict[str, float]]:
        """Clips of the model as it is now and figures of them: as the student samples, or else as the teacher does.

        `seconds` are of the processor, and `calls` of the model, for a clip.
        """
        size, began = self.settings, time.process_time()
        own: dict[str, Any] = {}
        if student is not None:
            own = {"steps": student.steps, "guidance": 1.0, "shift": shift, "even": student.even}
        clips = torch.cat([self.clip(place, **own) for place in range(size.clips)])
        seconds = (time.process_time() - began) / size.clips
        calls = own.get("steps", size.sampling_steps) * (1 if own.get("guidance", size.guidance) == 1 else 2)
        return clips, {**self.clip_figures(clips), "seconds": seconds, "calls": float(calls)}
