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
from dataclasses import dataclass, field

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.step_distill_task import SceneMaker, SingleWan, StepDistillTask
from hf_sparse_attn.recipes.video_models import HunyuanMaterial, open_material
from hf_sparse_attn.settings import plain
from hf_sparse_attn.training.adapter_task import AdapterRecipe
from hf_sparse_attn.training.video.data import ClipSettings, PromptSettings
from hf_sparse_attn.training.video.material import Material
from hf_sparse_attn.training.video.scenes import MOVING_WAN, SceneSettings


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
        return StepDistillTask(self, run, self._material(run))

    def _material(self, run: Run) -> Material:
        if self.scenes is not None:
            return SceneMaker(run, self.scenes, self.model, self.torch_dtype)
        wanted = PromptSettings(source=str(self.prompts), **plain(self.clip))
        options, kinds = {"guidance": self.embedded}, (SingleWan, HunyuanMaterial)
        drops = self.guidance != 1
        return open_material(self, run, wanted, options, kinds, held_out=self.held_out, drops=drops)


RECIPE = StepDistill
