"""Teach a model with sparse attention, by LoRA, to do what it does with dense attention (distillation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import Expert
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.matching import AttentionMatch, LayerOutputs, layers_error, mean_error, teaching
from hf_sparse_attn.training.text.data import TextSettings
from hf_sparse_attn.training.video.data import VideoSettings
from hf_sparse_attn.training.video.material import FlowSettings
from hf_sparse_attn.training.video.scenes import SceneSettings


@dataclass(frozen=True, kw_only=True)
class MatchSettings:
    """What is matched, each with its weight in the loss.

    Args:
        output: of the divergence of the next-token distributions, or of the squared error of the velocity.
        layers: of the relative squared error of what every attention module returns, mean over them.
        attention: of the relative squared error of every sparse attention against dense attention on the same q, k
            and v, mean over the layers.
    """

    output: float = 0.0
    layers: float = 0.0
    attention: float = 0.0

    def __post_init__(self) -> None:
        for name in ("output", "layers", "attention"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"`match.{name}` must be 0 or more, got {getattr(self, name)}")
        if not (self.output or self.layers or self.attention):
            raise ValueError("`match` must have a weight more than 0, got none")


@dataclass(frozen=True, kw_only=True)
class DistillSparse(AdapterRecipe):
    """A sparse student learns from its dense self.

    The teacher is the same model without adapter and patch, in the same step: there is no second copy in memory.

    Args:
        data: text, for a language model.
        videos: videos or latents, for a pipeline of one of the families of video_models.py.
        scenes: for the shipped video model, or one that was trained like it. One of the three is given.
        match: "output", "layers", "attention", or several with weights. The first two hold against a forward of the
            teacher. "attention" needs none, and holds the student only to itself: dense attention on its own q, k and
            v. By itself it makes attention easy to approximate and lets the model forget what it was: give it one of
            the others beside it.
        temperature: of the next-token distributions that are matched.
        held_out: text to evaluate on; None takes the held-out part of the shipped text, and of other text its last
            samples, which are then not trained on.
        evaluation_samples: how many samples the figures are means over.
        flow: noise levels and dropped conditions, for video models.
        expert, guidance: for video models that take them; see video_models.py. A `guidance` should be the one that the
            model is sampled with.
    """

    data: TextSettings | None = None
    videos: VideoSettings | None = None
    scenes: SceneSettings | None = None
    match: Literal["output", "layers", "attention"] | MatchSettings = "output"
    temperature: float = 1.0
    held_out: TextSettings | None = None
    evaluation_samples: int = 4
    flow: FlowSettings = field(default_factory=FlowSettings)
    expert: Expert | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("evaluation_samples", self.evaluation_samples, 1)
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"`temperature` must be more than 0, got {self.temperature}")
        for name in ("sparse", "lora"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` must be given to distill, got none")
        given = [name for name in ("data", "videos", "scenes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"`data`, `videos` or `scenes` must be given, got {' and '.join(given) or 'none'}")
        if self.held_out is not None and self.data is None:
            raise ValueError("`held_out` must be left out for video, got one")
        for name in ("expert", "guidance"):
            if getattr(self, name) is not None and self.videos is None:
                raise ValueError(f"`{name}` must be left out without `videos`, got {getattr(self, name)!r}")

    @property
    def weights(self) -> MatchSettings:
        """What is matched, with weights."""
        return self.match if isinstance(self.match, MatchSettings) else MatchSettings(**{self.match: 1.0})

    def task(self, run: Run) -> DistillTask:
        return DistillTask(self, run)


# Makes a context within which the model is another: its own teacher, or the student run dense.
Mode = Callable[[], AbstractContextManager[None]]


class Student(Protocol):
    """A kind of model with its data: text or video.

    Attributes:
        model: on the device of the run, in evaluation mode.
    """

    model: nn.Module

    def attach(self, patch: Patch) -> None:
        """Called once sparse attention is on the model; may refuse how it is."""

    def bundle_parts(self) -> dict[str, Any]:
        """What belongs into the bundle besides adapter and sparse settings."""

    def batch(self, numbers: Sequence[int]) -> Any:
        """Samples by their numbers over the whole training, on the device."""

    def weights(self, batch: Any) -> Tensor:
        """Weight of each sample in the loss, [batch]."""

    def forward(self, batch: Any) -> Any:
        """What the model gives for a batch, for `output_loss`."""

    def output_loss(self, batch: Any, mine: Any, taught: Any, teacher: Mode) -> Tensor:
        """Sum over the samples of weight times what their outputs are apart."""

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
        """Figures on held-out samples."""


class DistillTask(AdapterTask):
    """See DistillSparse."""

    recipe: DistillSparse

    def __init__(self, recipe: DistillSparse, run: Run) -> None:
        self.student = open_student(recipe, run)
        super().__init__(recipe, run, self.student.model, base_model=recipe.model)
        try:
            self.student.attach(self._patch)
            self.match = AttentionMatch(self._patch, trains=recipe.weights.attention > 0)
            self.outputs = LayerOutputs(self._patch, wanted=recipe.weights.layers > 0)
        except BaseException:
            self.close()
            raise

    @property
    def _patch(self) -> Any:
        return self.patch

    def bundle_parts(self) -> dict[str, Any]:
        return self.student.bundle_parts()

    def teacher(self) -> AbstractContextManager[None]:
        """Within it the model is its own teacher."""
        return teaching(self.model, self._patch, self.adapter)

    def batch(self, step: int, samples: Sequence[int]) -> Any:
        return self.student.batch(self.numbers(step, samples))

    def weight(self, batch: Any) -> float:
        return float(self.student.weights(batch).sum())

    def loss(self, batch: Any) -> Tensor:
        wanted, weights = self.recipe.weights, self.student.weights(batch)
        taught, told = None, {}
        if wanted.output or wanted.layers:
            with self.teacher(), self.outputs.collecting() as told:
                taught = self.student.forward(batch)
        with self.match.collecting() as errors, self.outputs.collecting() as said:
            mine = self.student.forward(batch)
        self.check_sparse()
        loss = torch.zeros((), device=weights.device)
        if wanted.output:
            loss = loss + wanted.output * self.student.output_loss(batch, mine, taught, self.teacher)
        if wanted.layers:
            loss = loss + wanted.layers * (layers_error(said, told) * weights).sum()
        if wanted.attention:
            loss = loss + wanted.attention * (mean_error(errors, len(weights)) * weights).sum()
        return loss

    def evaluate(self) -> dict[str, float]:
        return self.student.evaluate(self.teacher, self._patch.paused, self.match)


def open_student(recipe: DistillSparse, run: Run) -> Student:
    """Model and data of a recipe, by the kind of its data."""
    if recipe.data is not None:
        from hf_sparse_attn.recipes.distill_sparse_language import LanguageStudent

        return LanguageStudent(recipe, recipe.data, run)
    from hf_sparse_attn.recipes.distill_sparse_video import VideoStudent

    return VideoStudent(recipe, run)


RECIPE = DistillSparse
