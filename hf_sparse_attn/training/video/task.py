"""Recipes that adapt a video model to sparse attention and to longer videos: flow matching, LoRA, any sparse method.

What a model is given and which of its transformers is trained stands in recipes/video_models.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.flow_matching import flow_error
from hf_sparse_attn.training.video.data import VideoSettings
from hf_sparse_attn.training.video.material import (
    HELD_OUT,
    FlowSettings,
    Material,
    VideoBatch,
    announced,
    check_drop,
    draw_batch,
    keep_clips,
    sparse_span,
)


@dataclass(frozen=True, kw_only=True)
class VideoRecipe(AdapterRecipe):
    """A pretrained video model adapted to sparse attention and to longer videos; see AdapterRecipe for the rest.

    Args:
        videos: what to learn from. Its `frames` are those that the model was trained at.
        extend: the samples have so many times the frames of the data's settings; in a video, times the steps from
            frame to frame, so that 81 frames become 161 and 321.
        flow: noise levels and dropped conditions.
        held_out: samples that are kept for evaluation.
    """

    # False where something else is trained.
    needs_lora: ClassVar[bool] = True

    videos: VideoSettings | None = None
    extend: int = 1
    flow: FlowSettings = field(default_factory=FlowSettings)
    held_out: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("extend", self.extend, 1)
        check_int("held_out", self.held_out, 1)
        if self.lora is None and self.needs_lora:
            raise ValueError("`lora` must say what is trained, got none")

    def long_videos(self) -> VideoSettings:
        """`videos` with the frames that are trained at.

        Raises:
            ValueError: there are none.
        """
        if self.videos is None:
            raise ValueError(f"`videos` must say what model {self.model!r} learns from, got none")
        return dataclasses.replace(self.videos, frames=(self.videos.frames - 1) * self.extend + 1)


class VideoTask(AdapterTask):
    """Flow matching with a LoRA adapter and sparse attention in force.

    Training knows no schedule, so sparse attention is in force at every noise level; `dense_steps` counts when the
    adapted model samples.

    Args:
        recipe: the settings.
        run: where it runs.
        material: model and samples.

    Raises:
        ValueError: see AdapterTask; or conditions shall be dropped and the model's text encoder is not there; or
            `dense_steps` leaves no step sparse.
    """

    recipe: VideoRecipe

    def __init__(self, recipe: VideoRecipe, run: Run, material: Material) -> None:
        check_drop(recipe.flow, material)
        super().__init__(recipe, run, material.model, base_model=recipe.model)
        self.material, self.done = material, 0
        try:
            sparse_span(self.patch)
        except ValueError:
            self.close()
            raise

    def batch(self, step: int, samples: Sequence[int]) -> VideoBatch:
        return self.draw(self.numbers(step, samples))

    def draw(self, numbers: Sequence[int]) -> VideoBatch:
        """Samples by their numbers over the whole training, with noise; see draw_batch."""
        recipe = self.recipe
        return draw_batch(self.material, numbers, recipe.flow, recipe.seed, self.run.device)

    def weight(self, batch: VideoBatch) -> float:
        return float(len(batch.velocity))

    def loss(self, batch: VideoBatch) -> Tensor:
        with announced(self.model, self.patch):
            guess = self.model(**batch.given, return_dict=False)[0]
        return flow_error(batch.predicted(guess), batch.velocity).sum()

    def bundle_parts(self) -> dict[str, Any]:
        return {"part": self.material.part}

    def end_step(self, step: int) -> None:
        super().end_step(step)
        self.done = step + 1

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["done"])

    def evaluate(self) -> dict[str, float]:
        """`flow_loss` on the held-out samples, each with a level and noise of its own, the same in every run with the
        same seed; `density` where attention is sparse; and what the material measures of sampled clips, which are kept
        in the folder of the run.
        """
        figures = {"flow_loss": self.held_out_loss()}
        if self.patch is not None:
            figures["density"] = self.patch.report().density
        clips = self.material.sampled()
        if clips is None:
            return figures
        keep_clips(clips, self.run, self.done)
        return {**figures, **self.material.clip_figures(clips)}

    def held_out_loss(self) -> float:
        """Mean loss of the held-out samples."""
        numbers = range(HELD_OUT, HELD_OUT + self.recipe.held_out)
        return sum(float(self.loss(self.draw([number])).detach()) for number in numbers) / len(numbers)
