"""The small Wan model of moving scenes as material for the video recipes: samples are drawn, motion is checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.shipped.moving import (
    CHANNELS_OUT,
    check_motion,
    condition,
    load_moving_wan,
    sample,
    to_model,
    with_motion,
)
from hf_sparse_attn.shipped.moving_scenes import SceneClass, draw_classes, least_size, moving_clips
from hf_sparse_attn.training.video.latents import LatentSample
from hf_sparse_attn.training.video.material import TIMES, Material

# Name of the shipped model in a recipe.
MOVING_WAN = "moving_wan"
# The noise levels that the model was trained at last.
_SHIFT = 10.0


@dataclass(frozen=True, kw_only=True)
class SceneSettings:
    """Moving scenes, drawn anew for every sample; see `moving_scenes`.

    Args:
        frames: that the model was trained at.
        height, width: pixels, even.
        turn: frames after which the sprite turns back; None lets it go on, which needs a large picture.
        clips: clips that are sampled and checked in an evaluation; 0 for none.
        sampling_steps: Euler steps of these.
        guidance: of these.
        seed: of these: classes and noise.
    """

    frames: int = 12
    height: int = 24
    width: int = 24
    turn: int | None = 12
    clips: int = 4
    sampling_steps: int = 8
    guidance: float = 3.0
    seed: int = 1000

    def __post_init__(self) -> None:
        for name, least in (("frames", 2), ("clips", 0), ("sampling_steps", 1), ("seed", 0)):
            check_int(name, getattr(self, name), least)
        if self.turn is not None:
            check_int("turn", self.turn, 2)

    def check(self, frames: int) -> None:
        """Refuses a picture that is too small for clips of so many frames."""
        least = least_size(frames, self.turn)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % 2 or size < least:
                raise ValueError(f"`{name}` must be even and at least {least} for {frames} frames, got {size}")


class SceneMaterial(Material):
    """The shipped model, or one that was trained like it, and scenes.

    Args:
        run: where it runs.
        settings: the scenes.
        model: "moving_wan", or a folder with a transformer.
        dtype: of torch, or "auto".
        extend: clips have so many times the frames of the settings.

    Raises:
        ValueError: the picture is too small for the clips, or they are too long for the model.
        FileNotFoundError: the folder holds no model.
    """

    def __init__(
        self, run: Run, settings: SceneSettings, model: str = MOVING_WAN, dtype: Any = "auto", extend: int = 1
    ) -> None:
        self.settings, self.frames = settings, settings.frames * extend
        settings.check(self.frames)
        loaded = load_moving_wan() if model == MOVING_WAN else load_moving_wan(Path(model))
        longest = loaded.config.rope_max_seq_len
        if self.frames > longest:
            raise ValueError(f"`extend` must give at most {longest} frames, got {self.frames}")
        self.model = loaded.to(run.device, None if dtype == "auto" else dtype)
        self.dtype = loaded.dtype
        self.shift = _SHIFT
        self.nothing = self._conditions(None)

    def _conditions(self, scene: SceneClass | None) -> dict[str, Tensor]:
        size = self.settings
        empty = torch.zeros(1, CHANNELS_OUT, self.frames, size.height, size.width)
        motion = with_motion(empty, [scene], size.turn)[0, CHANNELS_OUT:]
        return {"prompt_embeds": condition([scene])[0], "motion": motion}

    def sample(self, number: int, seed: int) -> LatentSample:
        size = self.settings
        scene = draw_classes(1, seed)[0]
        clip = moving_clips([scene], self.frames, size.height, size.width, seed, size.turn)
        return LatentSample(to_model(clip)[0], self._conditions(scene))

    held_out = sample

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        return {
            "hidden_states": torch.cat([noisy, conditions["motion"]], dim=1).to(self.dtype),
            "timestep": level * TIMES,
            "encoder_hidden_states": conditions["prompt_embeds"].to(self.dtype),
        }

    def sampled(self) -> Tensor | None:
        size = self.settings
        return torch.cat([self.clip(place) for place in range(size.clips)]) if size.clips else None

    def clip_figures(self, clips: Tensor) -> dict[str, float]:
        """See motion_figures."""
        return motion_figures(clips, draw_classes(self.settings.clips, self.settings.seed), self.settings)

    def clip(self, place: int, **how: Any) -> Tensor:
        """Samples one of the clips of an evaluation, [1, frames, 3, height, width].

        Args:
            place: of the clip.
            how: steps, guidance and levels other than those of the settings, as `moving.sample` takes them.
        """
        size = self.settings
        scene = draw_classes(size.clips, size.seed)[place]
        given: dict[str, Any] = {"steps": size.sampling_steps, "guidance": size.guidance, **how}
        form: dict[str, Any] = {"frames": self.frames, "height": size.height, "width": size.width, "turn": size.turn}
        return sample(self.model, [scene], seed=size.seed + place, **form, **given)


def motion_figures(clips: Tensor, scenes: Sequence[SceneClass], settings: SceneSettings) -> dict[str, float]:
    """How well clips move: `right`, the share whose motion is right; `motion_error` in pixels, the mean, in which a
    clip that loses its sprite counts as off by half the picture; `seen`, the share that keeps it in every frame;
    `flicker` of the background.

    Args:
        clips: [clips, frames, 3, height, width] in [0, 1].
        scenes: what they should show.
        settings: of the scenes.
    """
    checks = [check_motion(clip, scene, settings.turn) for clip, scene in zip(clips, scenes, strict=True)]
    most = max(settings.height, settings.width) / 2
    return {
        "right": sum(check.right for check in checks) / len(checks),
        "motion_error": sum(min(check.error, most) for check in checks) / len(checks),
        "seen": sum(math.isfinite(check.error) for check in checks) / len(checks),
        "flicker": sum(check.flicker for check in checks) / len(checks),
    }
