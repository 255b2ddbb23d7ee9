"""Distil a video model of many steps with guidance into one of a few without, with sparse attention in force.

    hf-sparse-attn train step_distill model=FOLDER_OR_ID prompts=prompts.txt --output DIR

Sparsity-aware step distillation (Gu et al. 2025, BLADE, arXiv 2508.10774): trajectory distribution matching (Luo et
al. 2025, TDM, arXiv 2503.06674; see training/trajectory_matching.py) of a student that is sparse while it
learns, from prompts alone. There is one model in memory: the student and the fake score are two adapters on it, and
the teacher is the model without both and without the patch. As in BLADE the fake score is sparse like the student, and
the teacher is dense.

The result is one adapter, to be sampled in as many steps as it was trained for and without guidance:
`pipe(prompt, num_inference_steps=8, guidance_scale=1.0)`. Steps, shift and levels are noted in the bundle under
`recipe["sampling"]`. The student's steps are Euler's. Wan's own scheduler (UniPC) goes through the same even levels to
a thousandth, in steps of second order; with `solver_order=1` and a `disable_corrector` of all steps they are Euler's.

Deviations from BLADE: sparse attention is any trainable method of the package (its ASA is none of them); the gradient
is divided by the mean distance of the samples, as in TDM and DMD2, where its code has a pseudo-Huber loss; levels are
drawn in the stretch of their step, as in TDM, unless `student.whole` is set; student and fake score learn from the
same draw, in one backward pass, so that the student meets the fake score of the step before.

moving_wan_distill.yaml does it to the small Wan that comes with the package, on a processor.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import HunyuanMaterial, WanMaterial, open_material
from hf_sparse_attn.settings import plain
from hf_sparse_attn.shipped.moving import CHANNELS_OUT, draw_classes
from hf_sparse_attn.training.adapter_task import AdapterRecipe
from hf_sparse_attn.training.video.latents import LatentSample
from hf_sparse_attn.training.video.material import Material
from hf_sparse_attn.training.video.prompts import PromptSettings
from hf_sparse_attn.training.video.scenes import MOVING_WAN, SceneMaterial, SceneSettings

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.step_distill_task import StepDistillTask


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
    """The videos that are made of the prompts; see PromptSettings.

    Args:
        frames, height, width: of a video, in pixels.
        tokens: longest prompt; None takes what the pipeline takes when it generates.
        negative: prompt of the teacher's guidance.
    """

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
        if self.scenes is not None and self.embedded is not None:
            raise ValueError(f"`embedded` must be none for scenes, got {self.embedded}")
        if self.scenes is not None and self.scenes.guidance != self.guidance:
            raise ValueError(
                f"`scenes.guidance` must be `guidance` = {self.guidance}, the same teacher's, "
                f"got {self.scenes.guidance}"
            )
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
        # It knows this module.
        from hf_sparse_attn.recipes.step_distill_task import StepDistillTask

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
            (SingleWan, HunyuanMaterial),
            held_out=self.held_out,
            seed=self.seed,
            drops=self.guidance != 1,
        )


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


RECIPE = StepDistill
