"""Distil a video model of many steps with guidance into one of a few without, with sparse attention in force.

    hf-sparse-attn train step_distill model=FOLDER_OR_ID prompts=prompts.txt --output DIR

Sparsity-aware step distillation (Gu et al. 2025, BLADE, arXiv 2508.10774): trajectory distribution matching (Luo et al.
2025, TDM, arXiv 2503.06674; see hf_sparse_attn/trajectory_matching.py) of a student that is sparse while it learns,
from prompts alone. There is one model in memory: the student and the fake score are two adapters on it, and the
teacher is the model without both and without the patch. As in BLADE the fake score is sparse like the student, and the
teacher is dense. The result is one adapter, sampled in as many steps as it was trained for, without guidance.

Deviations from BLADE: sparse attention is any trainable method of the package (its ASA is none of them); the gradient
is divided by the mean distance of the samples, as in TDM and DMD2, where its code has a pseudo-Huber loss; levels are
drawn in the stretch of their step, as in TDM, unless `student.whole` is set; student and fake score learn from the same
draw, in one backward pass, so that the student meets the fake score of the step before.

moving_wan_distill.yaml does it to the small Wan that comes with the package, on a processor.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn import trajectory_matching as tm
from hf_sparse_attn.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.context import check_int
from hf_sparse_attn.flow_matching import flow_error, sample_seed
from hf_sparse_attn.lora_companion import Companion, add_companion
from hf_sparse_attn.matching import teaching
from hf_sparse_attn.moving import CHANNELS_OUT, draw_classes, sample
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipe_config import plain
from hf_sparse_attn.recipes.video_models import open_material
from hf_sparse_attn.train_latents import LatentSample
from hf_sparse_attn.video_material import HELD_OUT, Material, announced
from hf_sparse_attn.video_prompts import PromptSettings
from hf_sparse_attn.video_scenes import MOVING_WAN, SceneMaterial, SceneSettings, motion_figures

_CLIPS = "clips-{:05}.safetensors"


@dataclass(frozen=True, kw_only=True)
class StudentSettings:
    """How the student samples, and where it is matched; see trajectory_matching.

    Args:
        steps: of the student.
        shift: of its noise levels; None takes that of the pipeline's scheduler.
        even: whether the levels are evenly spaced before the shift, see `student_levels`.
        keep: share of its noise that a sample keeps in a step of training, see `advance`.
        whole: whether levels are drawn beyond the stretch of their step, see `draw`.
        imitate: so many steps at the beginning hold the student's velocity, where it comes by, to the teacher's with
            guidance, while the fake score learns what the student makes already. Neither TDM nor BLADE do.
    """

    steps: int = 4
    shift: float | None = None
    even: bool = True
    keep: float = 1.0
    whole: bool = False
    imitate: int = 0

    def __post_init__(self) -> None:
        check_int("steps", self.steps, 1)
        check_int("imitate", self.imitate, 0)
        if self.shift is not None and not 0 < self.shift < math.inf:
            raise ValueError(f"`student.shift` must be more than 0, or none, got {self.shift}")
        if not 0 <= self.keep <= 1:
            raise ValueError(f"`student.keep` must be from 0 to 1, got {self.keep}")


@dataclass(frozen=True, kw_only=True)
class FakeSettings:
    """How the fake score learns.

    Args:
        learning_rate: its highest; the rest is as in `optimizer`.
        updates: of the fake score for each of the student: the student learns in every so many steps.
        anchor: weight of its squared distance from the teacher without guidance (lambda_reg of BLADE's code).
    """

    learning_rate: float = 5e-4
    updates: int = 1
    anchor: float = 0.0

    def __post_init__(self) -> None:
        check_int("updates", self.updates, 1)
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"`fake.learning_rate` must be more than 0, got {self.learning_rate}")
        if not 0 <= self.anchor < math.inf:
            raise ValueError(f"`fake.anchor` must be 0 or more, got {self.anchor}")


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """The videos that are made of the prompts; see PromptSettings."""

    frames: int
    height: int
    width: int
    tokens: int | None = None
    negative: str = ""


@dataclass(frozen=True, kw_only=True)
class StepDistill(AdapterRecipe):
    """A student of a few steps without guidance; see AdapterRecipe for the rest.

    Args:
        prompts: a text file with a prompt a line, for the pipeline of a Wan or HunyuanVideo model.
        clip: size of the videos that are made of them.
        scenes: for "moving_wan", or a model that was trained like it, in place of prompts. Their `sampling_steps` and
            `guidance` are the teacher's.
        guidance: the teacher's, classifier-free; 1 is none.
        embedded: the scale that a model with an embedding of it is told, teacher and student alike.
        student: steps and levels.
        fake: the fake score.
        held_out: prompts that are kept for evaluation.
    """

    prompts: str | None = None
    clip: ClipSettings | None = None
    scenes: SceneSettings | None = None
    guidance: float = 5.0
    embedded: float | None = None
    student: StudentSettings = field(default_factory=StudentSettings)
    fake: FakeSettings = field(default_factory=FakeSettings)
    held_out: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("held_out", self.held_out, 1)
        if (self.prompts is None) == (self.scenes is None):
            raise ValueError(f"`prompts` or `scenes` must say what is made, got {self.prompts!r} and {self.scenes!r}")
        if (self.prompts is None) != (self.clip is None):
            raise ValueError(f"`clip` must go with `prompts`, got {self.clip!r} and {self.prompts!r}")
        if self.model == MOVING_WAN and self.scenes is None:
            raise ValueError(f"`scenes` must say what model {self.model!r} makes, got none")
        if not 0 < self.guidance < math.inf:
            raise ValueError(f"`guidance` must be more than 0, got {self.guidance}")
        if self.embedded is not None and self.scenes is not None:
            raise ValueError(f"`embedded` must be none for scenes, got {self.embedded}")
        if self.lora is None:
            raise ValueError("`lora` must say what is trained, got none")
        if self.lora.trained or self.lora.dropout:
            raise ValueError(
                "`lora` must train low-rank matrices alone, without dropout, for there are two adapters in turn; got "
                f"trained {list(self.lora.trained)}, dropout {self.lora.dropout}"
            )
        if self.sparse is not None and self.sparse.dense_steps:
            raise ValueError(
                "`sparse.dense_steps` must be none, for each of the few steps is trained sparse; got "
                f"{self.sparse.dense_steps}"
            )

    def task(self, run: Run) -> StepDistillTask:
        return StepDistillTask(self, run, self._material(run))

    def _material(self, run: Run) -> Material:
        if self.scenes is not None:
            return SceneMaker(run, self.scenes, self.model, self.torch_dtype)
        wanted = PromptSettings(source=str(self.prompts), **plain(self.clip))
        return open_material(
            run,
            self.model,
            self.torch_dtype,
            wanted,
            {"guidance": self.embedded},
            held_out=self.held_out,
            seed=self.seed,
            drops=self.guidance != 1,
        )


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
        size = self.settings
        own: dict[str, Any] = {"steps": size.sampling_steps, "guidance": size.guidance}
        if student is not None:
            own = {"steps": student.steps, "guidance": 1.0, "shift": shift, "even": student.even}
        scenes, began = draw_classes(size.clips, size.seed), time.process_time()
        clips = [
            sample(self.model, [scene], self.frames, size.height, size.width, seed=size.seed + place, turn=size.turn, **own)
            for place, scene in enumerate(scenes)
        ]
        seconds = (time.process_time() - began) / len(clips)
        calls = own["steps"] * (1 if own["guidance"] == 1 else 2)
        made = torch.cat(clips)
        return made, {**motion_figures(made, scenes, size), "seconds": seconds, "calls": float(calls)}


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
        ValueError: see AdapterTask; or guidance is asked for and an empty prompt cannot be encoded; or the model is one
            of two for different noise levels.
    """

    recipe: StepDistill

    def __init__(self, recipe: StepDistill, run: Run, material: Material) -> None:
        if recipe.guidance != 1 and material.nothing is None:
            raise ValueError(
                f"`guidance` must be 1 where the pipeline cannot encode an empty prompt, got {recipe.guidance}"
            )
        self.shift = _shift(recipe, material)
        self.levels = tm.student_levels(recipe.student.steps, self.shift, recipe.student.even).to(run.device)
        super().__init__(recipe, run, material.model, base_model=recipe.model)
        self.material = material
        self._learns, self._imitates, self._sparse, self.done = True, False, recipe.sparse is None, 0
        self._taught: dict[str, float] | None = None
        try:
            self.companion: Companion = add_companion(self.adapter)
            self._undo.callback(self.companion.remove)
            if recipe.gradient_checkpointing:
                # What is computed again for the backward pass is so with the adapter that it was computed with.
                self.model.enable_gradient_checkpointing(self._checkpoint)
        except BaseException:
            self.close()
            raise

    def _checkpoint(self, module: Any, *args: Any) -> Any:
        return checkpoint(self.companion.bound(module.__call__), *args, use_reentrant=False)

    # ------------------------------------------------------------------ weights

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
        self._free(self._learns)

    def end_step(self, step: int) -> None:
        self._free(True)
        self.done = step + 1

    def _free(self, learns: bool) -> None:
        for parameter in self.adapter.parameters().values():
            parameter.requires_grad_(learns)

    # ------------------------------------------------------------------ a step

    def batch(self, step: int, samples: Sequence[int]) -> PromptBatch:
        return self.draw(self.numbers(step, samples))

    def draw(self, numbers: Sequence[int]) -> PromptBatch:
        """Samples by their numbers over the whole training; those from HELD_OUT on are held out."""
        material, device = self.material, self.run.device
        seeds = [sample_seed(self.recipe.seed, number) for number in numbers]
        held = [
            material.sample(number, seed) if number < HELD_OUT else material.held_out(number - HELD_OUT, seed)
            for number, seed in zip(numbers, seeds, strict=True)
        ]
        drawn = tm.draw(seeds, held[0].latents.shape, self.levels.cpu(), self.shift, self.recipe.student.whole)
        dtype = torch.promote_types(material.dtype, torch.float32)
        on = {n: getattr(drawn, n).to(device, dtype) for n in ("start", "level", "again", "diffused")}
        told = [s.conditions for s in held]
        conditions = {name: torch.stack([one[name] for one in told]).to(device) for name in told[0]}
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
        with torch.set_grad_enabled(self._learns and torch.is_grad_enabled()):
            velocity = self.velocity(state, here, conditions)
        self._check_sparse()
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

    @contextmanager
    def teacher(self) -> Iterator[None]:
        """Within it the model is its own teacher: dense, and without both adapters."""
        with teaching(self.model, self.patch, self.adapter):
            yield

    def _check_sparse(self) -> None:
        """Raises where the first batch ran dense: what comes out would not be what was asked for."""
        if self._sparse or self.patch is None:
            return
        layers = self.patch.report().layers
        if not any(layer.sparse_calls for layer in layers):
            reasons = sorted({reason for layer in layers for reason in layer.reasons})
            raise ValueError(f"`sparse` must make a layer sparse, all were dense: {'; '.join(reasons)}")
        self._sparse = True

    # ------------------------------------------------------------------ figures

    def evaluate(self) -> dict[str, float]:
        """`teacher_error`: mean squared distance of the student's velocity from the teacher's with guidance, along the
        student's way, over the held-out prompts; `density` where attention is sparse. Of scenes besides what
        `motion_figures` tells of clips as the student samples them, and as the teacher does (`teacher_right`, ...),
        with processor seconds and calls of the model for a clip. The student's clips are kept in the folder of the run.
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
        if self.run.output.is_dir():
            from safetensors.torch import save_file

            save_file({"clips": (clips * 255).round().byte().contiguous()}, self.run.output / _CLIPS.format(self.done))
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


def _shift(recipe: StepDistill, material: Material) -> float:
    if material.bounds != (0.0, 1.0):
        raise ValueError(f"`model` must have one transformer for all noise levels, got one for {material.bounds}")
    return material.shift if recipe.student.shift is None else recipe.student.shift


RECIPE = StepDistill
