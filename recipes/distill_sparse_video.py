"""Video models for recipe distill_sparse: velocities that are matched, and clips that are sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.evaluate_video import share_right
from hf_sparse_attn.fidelity import psnr, ssim
from hf_sparse_attn.flow_matching import flow_batch, flow_error, sample_seed
from hf_sparse_attn.matching import AttentionMatch, layer_figures
from hf_sparse_attn.moving import condition, draw_classes, load_moving_wan, moving_clips, sample, to_model, with_motion
from hf_sparse_attn.recipe import Run

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.distill_sparse import Context, DistillSparse

# Numbers of samples from here on are for evaluation; no training gets so far.
_HELD_OUT = 1 << 40
_TIMES = 1000


class VideoBatch(NamedTuple):
    """Noisy latents as the model takes them.

    Args:
        given: keyword arguments of the model's forward.
        velocity: the true one, [batch, channels, frames, height, width].
    """

    given: dict[str, Any]
    velocity: Tensor


class FlowMaterial:
    """A video model that learns by flow matching; see distill_sparse.Material. Subclasses draw the batches."""

    model: nn.Module
    base_model: str
    recipe: DistillSparse
    device: torch.device

    def batch(self, numbers: Sequence[int]) -> VideoBatch:
        """Samples by their numbers over the whole training."""
        raise NotImplementedError

    def held_out(self, number: int) -> VideoBatch:
        """A sample to evaluate on."""
        raise NotImplementedError

    def seeds(self, numbers: Sequence[int]) -> list[int]:
        """One seed for each sample, of all that is drawn for it."""
        return [sample_seed(self.recipe.seed, number) for number in numbers]

    def dropped(self, seeds: Sequence[int]) -> list[bool]:
        """Which samples go without their condition."""
        return [float(np.random.default_rng((seed, 2)).random()) < self.recipe.noise.drop for seed in seeds]

    def weights(self, batch: VideoBatch) -> Tensor:
        return torch.ones(len(batch.velocity), device=batch.velocity.device)

    def run(self, batch: VideoBatch) -> Tensor:
        found: Tensor = self.model(**batch.given, return_dict=False)[0]
        return found

    def output_loss(self, batch: VideoBatch, mine: Tensor, taught: Tensor, teacher: Context) -> Tensor:
        return flow_error(mine, taught).sum()

    def evaluate(self, teacher: Context, dense: Context, match: AttentionMatch) -> dict[str, float]:
        """Means over held-out samples.

        `loss`: squared error of the velocity of the sparse student; `loss_dense` of the teacher, `loss_run_dense` of
        the student run dense. `output_error`: squared error between student and teacher. `attention_error`: root of
        the relative squared error, by layer and mean.
        """
        sums: dict[str, float] = defaultdict(float)
        errors: list[tuple[int, Tensor]] = []
        samples = self.recipe.evaluation_samples
        for number in range(samples):
            batch = self.held_out(number)
            with teacher():
                taught = self.run(batch)
            with match.collecting() as found:
                mine = self.run(batch)
            errors += found
            with dense():
                run_dense = self.run(batch)
            sums["loss"] += float(flow_error(mine, batch.velocity).sum()) / samples
            sums["loss_dense"] += float(flow_error(taught, batch.velocity).sum()) / samples
            sums["loss_run_dense"] += float(flow_error(run_dense, batch.velocity).sum()) / samples
            sums["output_error"] += float(flow_error(mine, taught).sum()) / samples
        return {**sums, **layer_figures(errors)}


class SceneMaterial(FlowMaterial):
    """The shipped video model, or one in a folder that was trained like it, and moving scenes."""

    def __init__(self, recipe: DistillSparse, run: Run) -> None:
        self.recipe, self.device, self.base_model = recipe, run.device, recipe.model
        self.settings: Any = recipe.data
        model = load_moving_wan() if recipe.model == "moving_wan" else load_transformer(recipe.model, recipe.torch_dtype)
        self.model = (model if recipe.dtype == "auto" else model.to(recipe.torch_dtype)).to(run.device)

    def batch(self, numbers: Sequence[int]) -> VideoBatch:
        seeds, size = self.seeds(numbers), self.settings
        scenes = [draw_classes(1, seed)[0] for seed in seeds]
        drawn = zip(scenes, seeds, strict=True)
        clips = torch.cat([moving_clips([scene], size.frames, size.height, size.width, seed) for scene, seed in drawn])
        flow = flow_batch(to_model(clips), seeds, self.recipe.noise.shift, self.recipe.noise.spread)
        told = [None if drop else scene for scene, drop in zip(scenes, self.dropped(seeds), strict=True)]
        weight = next(self.model.parameters())
        given = {
            "hidden_states": with_motion(flow.noisy, told).to(weight),
            "timestep": (flow.level * _TIMES).to(self.device),
            "encoder_hidden_states": condition(told).to(weight),
        }
        return VideoBatch(given, flow.velocity.to(self.device))

    def held_out(self, number: int) -> VideoBatch:
        return self.batch([_HELD_OUT + number])

    def evaluate(self, teacher: Context, dense: Context, match: AttentionMatch) -> dict[str, float]:
        """Besides: `psnr` (dB) and `ssim` of sampled clips against the teacher's of the same seed, and the share of
        clips whose motion is `right`, and `right_dense` of the teacher's.
        """
        figures, size = super().evaluate(teacher, dense, match), self.settings
        seed = sample_seed(self.recipe.seed, 2 * _HELD_OUT)
        scenes = draw_classes(size.clips, seed)
        wanted = {"frames": size.frames, "height": size.height, "width": size.width, "steps": size.sampling_steps}
        with teacher():
            told = sample(self.model, scenes, seed=seed, **wanted)
        mine = sample(self.model, scenes, seed=seed, **wanted)
        compared = {"psnr": psnr(mine, told), "ssim": ssim(mine, told)}
        return {**figures, **compared, "right": share_right(mine, scenes), "right_dense": share_right(told, scenes)}


def load_transformer(source: str, dtype: Any) -> Any:
    """The transformer of a video pipeline in a folder or on the Hub, or one that stands there by itself."""
    from diffusers import AutoModel

    given = {} if dtype == "auto" else {"torch_dtype": dtype}
    try:
        return AutoModel.from_pretrained(source, subfolder="transformer", **given).eval()
    except OSError:
        return AutoModel.from_pretrained(source, **given).eval()
