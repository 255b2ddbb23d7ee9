"""Adapt a HunyuanVideo model to sparse attention and to longer videos, by LoRA.

    hf-sparse-attn train hunyuan_long_video videos.source=FOLDER extend=2 --output DIR

As wan_long_video, which see. Video and text attend jointly here; the adapter is on the video's projections, which in
the blocks of one stream are the text's as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import HunyuanMaterial, long_material
from hf_sparse_attn.training.video.task import VideoRecipe, VideoTask


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
        return VideoTask(self, run, long_material(self, run, HunyuanMaterial, guidance=self.guidance))


RECIPE = HunyuanLongVideo
