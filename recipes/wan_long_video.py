"""Adapt a Wan model to sparse attention and to longer videos, by LoRA.

    hf-sparse-attn train wan_long_video model=FOLDER_OR_ID videos.source=FOLDER extend=2 --output DIR

Radial attention's way to longer videos (Li et al. 2025, arXiv 2506.19852): only a LoRA of rank 128 on the queries,
keys, values and outputs of self-attention is trained, by flow matching at the longer length, with the sparse pattern
in force. Any trainable method of the package can take radial's place. The paper gives neither learning rate nor
steps; those of wan_long_video.yaml are ours. moving_wan_long.yaml does it to the small Wan that comes with the
package, on a processor.
"""

from __future__ import annotations

from dataclasses import dataclass

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.video_models import Expert, WanMaterial, long_material
from hf_sparse_attn.training.video.material import Material
from hf_sparse_attn.training.video.scenes import MOVING_WAN, SceneMaterial, SceneSettings
from hf_sparse_attn.training.video.task import VideoRecipe, VideoTask


@dataclass(frozen=True, kw_only=True)
class WanLongVideo(VideoRecipe):
    """A Wan pipeline for text or image to video (2.1, 2.2, TI2V-5B), or "moving_wan"; see VideoRecipe for the rest.

    Args:
        scenes: what "moving_wan" learns from, in place of `videos`.
        expert: which transformer of Wan 2.2 is trained, the one for much noise ("high") or for little ("low"), each at
            the noise levels it is responsible for; None where there is only one.
        image_to_video: whether the first frame is given; None goes by the class of the pipeline. Only TI2V-5B can do
            both.
    """

    scenes: SceneSettings | None = None
    expert: Expert | None = None
    image_to_video: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted, other = ("scenes", "videos") if self.model == MOVING_WAN else ("videos", "scenes")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"`{wanted}` must say what model {self.model!r} learns from, and `{other}` must be none")
        for name in ("expert", "image_to_video"):
            if getattr(self, name) is not None and self.model == MOVING_WAN:
                raise ValueError(f"`{name}` must be none for model 'moving_wan', got {getattr(self, name)!r}")

    def task(self, run: Run) -> VideoTask:
        return VideoTask(self, run, self._material(run))

    def _material(self, run: Run) -> Material:
        if self.scenes is not None:
            return SceneMaterial(run, self.scenes, dtype=self.torch_dtype, extend=self.extend)
        return long_material(self, run, WanMaterial, expert=self.expert, image_to_video=self.image_to_video)


RECIPE = WanLongVideo
