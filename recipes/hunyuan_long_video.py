"""Adapt a HunyuanVideo model to sparse attention and to longer videos, by LoRA.

    hf-sparse-attn train hunyuan_long_video videos.source=FOLDER extend=2 --output DIR

As wan_long_video, which see. Video and text attend jointly here; the adapter is on the video's projections, which in
the blocks of one stream are the text's as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.video_task import TIMES, PipelineMaterial, VideoRecipe, VideoTask, load_pipeline


@dataclass(frozen=True, kw_only=True)
class HunyuanLongVideo(VideoRecipe):
    """A HunyuanVideo text-to-video pipeline; see VideoRecipe for the rest.

    Args:
        guidance: the scale that the model is told while it learns, where it has an embedding of it. 1 stands for the
            plain velocities that flow matching teaches; sampling goes on to tell it more.
    """

    guidance: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.guidance < math.inf:
            raise ValueError(f"`guidance` must be 0 or more, got {self.guidance}")
        self.long_videos()

    def task(self, run: Run) -> VideoTask:
        return VideoTask(self, run, HunyuanMaterial(self, run, load_pipeline(self)))


class HunyuanMaterial(PipelineMaterial):
    """The transformer of a HunyuanVideo pipeline; see PipelineMaterial."""

    transformers = ("HunyuanVideoTransformer3DModel",)
    recipe: HunyuanLongVideo

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        config: Any = self.model.config
        given = {
            "hidden_states": noisy.to(self.dtype),
            "timestep": level * TIMES,
            "encoder_hidden_states": conditions["prompt_embeds"].to(self.dtype),
            "encoder_attention_mask": conditions["prompt_attention_mask"].to(self.dtype),
            "pooled_projections": conditions["pooled_prompt_embeds"].to(self.dtype),
        }
        if config.guidance_embeds:
            given["guidance"] = level.new_full(level.shape, self.recipe.guidance * TIMES).to(self.dtype)
        return given


RECIPE = HunyuanLongVideo
