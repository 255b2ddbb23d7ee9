"""Teach a model with sparse attention, by LoRA, to do what it does with dense attention (distillation)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from hf_sparse_attn.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.context import check_int
from hf_sparse_attn.matching import AttentionMatch, LayerOutputs, layers_error, mean_error, teaching
from hf_sparse_attn.moving_scenes import least_size
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_text import TextSettings
from hf_sparse_attn.train_videos import VideoSettings


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
class SceneSettings:
    """Moving scenes for the shipped video model, drawn as they are asked for; see moving_scenes.

    Args:
        frames, height, width: of a clip, in pixels; even.
        drop: share of the samples without their condition, for guidance.
        clips: clips that are sampled for the figures.
        sampling_steps: of each.
    """

    frames: int = 12
    height: int = 24
    width: int = 24
    drop: float = 0.1
    clips: int = 4
    sampling_steps: int = 8

    def __post_init__(self) -> None:
        if not 0 <= self.drop <= 1:
            raise ValueError(f"`scenes.drop` must be from 0 to 1, got {self.drop}")
        check_int("clips", self.clips, 1)
        check_int("sampling_steps", self.sampling_steps, 1)
        least = least_size(check_int("frames", self.frames, 2))
        for name in ("height", "width"):
            size = check_int(name, getattr(self, name), 1)
            if size % 2 or size < least:
                raise ValueError(f"`scenes.{name}` must be even and at least {least}, got {size}")


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """Noise levels that a video model is asked at; see flow_matching.noise_levels.

    Args:
        shift: middle of the odds of noise to latents.
        spread: standard deviation of the logarithm of the odds.
    """

    shift: float = 3.0
    spread: float = 1.6

    def __post_init__(self) -> None:
        for name in ("shift", "spread"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`noise.{name}` must be more than 0, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DistillSparse(AdapterRecipe):
    """A sparse student learns from its dense self.

    The teacher is the same model without adapter and patch, in the same step: there is no second copy in memory.

    Args:
        data: text, for a language model.
        videos: videos or latents, for a Wan pipeline.
        scenes: for the shipped video model, or one that was trained like it. One of the three is given.
        match: "output", "layers", "attention", or several with weights. The first two hold against a forward of the
            teacher. "attention" needs none, and holds the student only to itself: dense attention on its own q, k and
            v. By itself it makes attention easy to approximate and lets the model forget what it was: give it one of
            the others beside it.
        temperature: of the next-token distributions that are matched.
        held_out: text to evaluate on; None takes the held-out part of the shipped text, and of other text its last
            samples, which are then not trained on.
        evaluation_samples: how many samples the figures are means over.
        noise: for video models.
    """

    data: TextSettings | None = None
    videos: VideoSettings | None = None
    scenes: SceneSettings | None = None
    match: Literal["output", "layers", "attention"] | MatchSettings = "output"
    temperature: float = 1.0
    held_out: TextSettings | None = None
    evaluation_samples: int = 4
    noise: NoiseSettings = NoiseSettings()

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

    @property
    def weights(self) -> MatchSettings:
        """What is matched, with weights."""
        return self.match if isinstance(self.match, MatchSettings) else MatchSettings(**{self.match: 1.0})

    def task(self, run: Run) -> DistillTask:
        return DistillTask(self, run)


# Makes a context within which the model is another: its own teacher, or the student run dense.
Mode = Callable[[], AbstractContextManager[None]]


class Material(Protocol):
    """A kind of model with its data: text or video.

    Attributes:
        model: on the device of the run, in evaluation mode.
        base_model: folder or Hub id that it came from.
    """

    model: nn.Module
    base_model: str

    def batch(self, numbers: Sequence[int]) -> Any:
        """Samples by their numbers over the whole training, on the device."""

    def weights(self, batch: Any) -> Tensor:
        """Weight of each sample in the loss, [batch]."""

    def run(self, batch: Any) -> Any:
        """What the model gives for a batch, for `output_loss`."""

    def output_loss(self, batch: Any, mine: Any, taught: Any, teacher: Mode) -> Tensor:
        """Sum over the samples of weight times what their outputs are apart."""

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
        """Figures on held-out samples."""


class DistillTask(AdapterTask):
    """See DistillSparse."""

    recipe: DistillSparse

    def __init__(self, recipe: DistillSparse, run: Run) -> None:
        self.material = material(recipe, run)
        super().__init__(recipe, run, self.material.model, base_model=self.material.base_model)
        try:
            self.match = AttentionMatch(self._patch, trains=recipe.weights.attention > 0)
            self.outputs = LayerOutputs(self._patch, wanted=recipe.weights.layers > 0)
        except BaseException:
            self.close()
            raise
        self._sparse = False

    @property
    def _patch(self) -> Any:
        return self.patch

    def teacher(self) -> AbstractContextManager[None]:
        """Within it the model is its own teacher."""
        return teaching(self.model, self._patch, self.adapter)

    def batch(self, step: int, samples: Sequence[int]) -> Any:
        return self.material.batch(self.numbers(step, samples))

    def weight(self, batch: Any) -> float:
        return float(self.material.weights(batch).sum())

    def loss(self, batch: Any) -> Tensor:
        wanted, weights = self.recipe.weights, self.material.weights(batch)
        taught, told = None, {}
        if wanted.output or wanted.layers:
            with self.teacher(), self.outputs.collecting() as told:
                taught = self.material.run(batch)
        with self.match.collecting() as errors, self.outputs.collecting() as said:
            mine = self.material.run(batch)
        self._check_sparse()
        loss = torch.zeros((), device=weights.device)
        if wanted.output:
            loss = loss + wanted.output * self.material.output_loss(batch, mine, taught, self.teacher)
        if wanted.layers:
            loss = loss + wanted.layers * (layers_error(said, told) * weights).sum()
        if wanted.attention:
            loss = loss + wanted.attention * (mean_error(errors, len(weights)) * weights).sum()
        return loss

    def _check_sparse(self) -> None:
        """Raises where the first batch ran dense: there would be nothing to learn."""
        if self._sparse:
            return
        layers = self._patch.report().layers
        if not any(layer.sparse_calls for layer in layers):
            reasons = sorted({reason for layer in layers for reason in layer.reasons})
            raise ValueError(f"`sparse` must make a layer sparse, all were dense: {'; '.join(reasons)}")
        self._sparse = True

    def evaluate(self) -> dict[str, float]:
        return self.material.evaluate(self.teacher, self._patch.paused, self.match)


def material(recipe: DistillSparse, run: Run) -> Material:
    """Model and data of a recipe, by the kind of its data."""
    if recipe.data is not None:
        from hf_sparse_attn.recipes.distill_sparse_language import LanguageMaterial

        return LanguageMaterial(recipe, recipe.data, run)
    from hf_sparse_attn.recipes.distill_sparse_video import LatentMaterial, SceneMaterial

    if recipe.scenes is not None:
        return SceneMaterial(recipe, recipe.scenes, run)
    assert recipe.videos is not None
    return LatentMaterial(recipe, recipe.videos, run)


RECIPE = DistillSparse
