"""Adapt a Wan model to sparse attention and to longer videos, by LoRA.

    hf-sparse-attn train wan_long_video model=FOLDER_OR_ID videos.source=FOLDER extend=2 --output DIR

Radial attention's way to longer videos (Li et al. 2025, arXiv 2506.19852): only a LoRA of rank 128 on the queries,
keys, values and outputs of self-attention is trained, by flow matching at the longer length, with the sparse pattern
in force. Any trainable method of the package can take radial's place. The paper gives neither learning rate nor
steps; those of wan_long_video.yaml are ours. moving_wan_long.yaml does it to the small Wan that comes with the
package, on a processor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.video_scenes import SceneMaterial, SceneSettings
from hf_sparse_attn.video_task import TIMES, Material, PipelineMaterial, VideoRecipe, VideoTask, load_pipeline


@dataclass(frozen=True, kw_only=True)
class WanLongVideo(VideoRecipe):
    """A Wan text-to-video pipeline (2.1, 2.2, TI2V-5B), or "moving_wan"; see VideoRecipe for the rest.

    Args:
        scenes: what "moving_wan" learns from, in place of `videos`.
        expert: which transformer of Wan 2.2 is trained, the one for much noise ("high") or for little ("low"), each at
            the noise levels it is responsible for; None where there is only one.
    """

    scenes: SceneSettings | None = None
    expert: Literal["high", "low"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        wanted, other = ("scenes", "videos") if self.model == "moving_wan" else ("videos", "scenes")
        if getattr(self, wanted) is None or getattr(self, other) is not None:
            raise ValueError(f"`{wanted}` must say what model {self.model!r} learns from, and `{other}` must be none")
        if self.expert is not None and self.model == "moving_wan":
            raise ValueError(f"`expert` must be none for model 'moving_wan', got {self.expert!r}")

    def task(self, run: Run) -> VideoTask:
        return VideoTask(self, run, self._material(run))

    def _material(self, run: Run) -> Material:
        if self.scenes is not None:
            return SceneMaterial(self, run, self.scenes)
        return WanMaterial(self, run, load_pipeline(self), self.expert)


class WanMaterial(PipelineMaterial):
    """A transformer of a Wan pipeline.

    Args:
        recipe: the settings.
        run: where it runs.
        pipe: the pipeline.
        expert: see WanLongVideo.

    Raises:
        ValueError: `expert` does not fit the pipeline; see also PipelineMaterial.
    """

    transformers = ("WanTransformer3DModel",)

    def __init__(self, recipe: VideoRecipe, run: Run, pipe: Any, expert: Literal["high", "low"] | None = None) -> None:
        boundary = pipe.config.get("boundary_ratio")
        if (expert is None) != (boundary is None):
            rule = "none for a model with one transformer" if boundary is None else '"high" or "low" for Wan 2.2'
            raise ValueError(f"`expert` must be {rule}, got {expert!r}")
        name = "transformer_2" if expert == "low" else "transformer"
        if boundary is not None:
            self.part = name
            self.bounds = (boundary, 1.0) if expert == "high" else (0.0, min(boundary, 1.0))
            if not 0 <= self.bounds[0] < self.bounds[1]:
                raise ValueError(f"`expert` must be one that the pipeline asks, got {expert!r} of boundary {boundary}")
        # TI2V-5B: a timestep for each token.
        self.by_token = bool(pipe.config.get("expand_timesteps"))
        super().__init__(recipe, run, pipe, name)

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        config: Any = self.model.config
        time = level * TIMES
        if self.by_token:
            tokens = 1
            for size, patch in zip(noisy.shape[2:], config.patch_size, strict=True):
                tokens *= size // patch
            time = time[:, None].expand(-1, tokens)
        return {
            "hidden_states": noisy.to(self.dtype),
            "timestep": time,
            "encoder_hidden_states": conditions["prompt_embeds"].to(self.dtype),
        }


RECIPE = WanLongVideo
