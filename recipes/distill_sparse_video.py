"""Video models for recipe distill_sparse: velocities that are matched, and clips that are sampled."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.evaluate_video import share_right
from hf_sparse_attn.fidelity import psnr, ssim
from hf_sparse_attn.flow_matching import FlowBatch, flow_batch, flow_error, sample_seed
from hf_sparse_attn.matching import AttentionMatch, layer_figures
from hf_sparse_attn.moving import condition, draw_classes, load_moving_wan, moving_clips, sample, to_model, with_motion
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_latents import INDEX, LatentData
from hf_sparse_attn.train_text import sample_order
from hf_sparse_attn.train_videos import VideoSettings, open_videos
from hf_sparse_attn.video_task import HELD_OUT, TIMES, VideoBatch

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.distill_sparse import DistillSparse, Mode, SceneSettings

# Steps of a schedule that no run has as many of.
_STEPS = 1000


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

    def dropped(self, seeds: Sequence[int], share: float) -> list[bool]:
        """Which samples go without their condition."""
        return [float(np.random.default_rng((seed, 2)).random()) < share for seed in seeds]

    def weights(self, batch: VideoBatch) -> Tensor:
        return torch.ones(len(batch.velocity), device=batch.velocity.device)

    def run(self, batch: VideoBatch) -> Tensor:
        # Where the patch keeps some steps dense it must be told that this is none of them.
        told = {"step_index": self.step, "num_inference_steps": _STEPS} if self.step is not None else {}
        model: Any = self.model
        with model.cache_context("cond", **told) if told else nullcontext():
            found: Tensor = model(**batch.given, return_dict=False)[0]
        return found

    @property
    def bounds(self) -> tuple[float, float]:
        """Noise levels at which the patch is sparse, by a schedule shifted as the noise is."""
        start, end = self._dense_steps
        shift = self.recipe.noise.shift

        def level(left: float) -> float:
            return shift * left / (1 + (shift - 1) * left)

        return level(end), level(1 - start)

    @property
    def step(self) -> int | None:
        """A step of a long schedule that is sparse; None where all are."""
        start, end = self._dense_steps
        return round(_STEPS * (start + 1 - end) / 2) if start or end else None

    @property
    def _dense_steps(self) -> tuple[float, float]:
        given = self.recipe.sparse.dense_steps if self.recipe.sparse is not None else None
        shares = given if isinstance(given, tuple) else (given or 0.0, 0.0)
        start, end = (*shares, 0.0, 0.0)[:2]
        if start + end >= 1:
            raise ValueError(f"`sparse.dense_steps` must leave steps to be sparse, got {given}")
        return start, end

    def mixed(self, latents: Tensor, seeds: Sequence[int]) -> FlowBatch:
        """Latents with noise, at levels at which the patch is sparse."""
        noise = self.recipe.noise
        return flow_batch(latents, seeds, noise.shift, noise.spread, self.bounds)

    def output_loss(self, batch: VideoBatch, mine: Tensor, taught: Tensor, teacher: Mode) -> Tensor:
        return flow_error(mine, taught).sum()

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
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

    def __init__(self, recipe: DistillSparse, settings: SceneSettings, run: Run) -> None:
        self.recipe, self.device, self.base_model, self.settings = recipe, run.device, recipe.model, settings
        model = (
            load_moving_wan() if recipe.model == "moving_wan" else load_transformer(recipe.model, recipe.torch_dtype)
        )
        self.model = (model if recipe.dtype == "auto" else model.to(recipe.torch_dtype)).to(run.device)

    def batch(self, numbers: Sequence[int]) -> VideoBatch:
        seeds, size = self.seeds(numbers), self.settings
        scenes = [draw_classes(1, seed)[0] for seed in seeds]
        drawn = zip(scenes, seeds, strict=True)
        clips = torch.cat([moving_clips([scene], size.frames, size.height, size.width, seed) for scene, seed in drawn])
        flow = self.mixed(to_model(clips), seeds)
        told = [None if drop else scene for scene, drop in zip(scenes, self.dropped(seeds, size.drop), strict=True)]
        weight = next(self.model.parameters())
        given = {
            "hidden_states": with_motion(flow.noisy, told).to(weight),
            "timestep": (flow.level * TIMES).to(self.device),
            "encoder_hidden_states": condition(told).to(weight),
        }
        return VideoBatch(given, flow.velocity.to(self.device))

    def held_out(self, number: int) -> VideoBatch:
        return self.batch([HELD_OUT + number])

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
        """Besides: `psnr` (dB) and `ssim` of sampled clips against the teacher's of the same seed, and the share of
        clips whose motion is `right`, and `right_dense` of the teacher's.
        """
        figures, size = super().evaluate(teacher, dense, match), self.settings
        seed = sample_seed(self.recipe.seed, 2 * HELD_OUT)
        scenes = draw_classes(size.clips, seed)
        wanted: dict[str, Any] = {
            "frames": size.frames,
            "height": size.height,
            "width": size.width,
            "steps": size.sampling_steps,
        }
        with teacher():
            told = sample(self.model, scenes, seed=seed, **wanted)
        mine = sample(self.model, scenes, seed=seed, **wanted)
        compared = {"psnr": psnr(mine, told), "ssim": ssim(mine, told)}
        return {**figures, **compared, "right": share_right(mine, scenes), "right_dense": share_right(told, scenes)}


class LatentMaterial(FlowMaterial):
    """A Wan pipeline in a folder or on the Hub and videos, or latents that were made of some."""

    def __init__(self, recipe: DistillSparse, settings: VideoSettings, run: Run) -> None:
        self.recipe, self.device, self.base_model = recipe, run.device, recipe.model
        transformer, self.data = self._opened(settings, run)
        if type(transformer).__name__ != "WanTransformer3DModel":
            raise TypeError(f"`model` must be a Wan transformer or pipeline, got a {type(transformer).__name__}")
        if len(self.data) <= recipe.evaluation_samples:
            raise ValueError(
                f"`evaluation_samples` must be less than the {len(self.data)} videos, got {recipe.evaluation_samples}"
            )
        self.model = transformer.eval().to(run.device)

    def _opened(self, settings: VideoSettings, run: Run) -> tuple[Any, LatentData]:
        recipe, source = self.recipe, Path(settings.source).expanduser()
        alone = not (Path(recipe.model) / "model_index.json").is_file() and Path(recipe.model).is_dir()
        if alone:
            if not (source / INDEX).is_file():
                raise ValueError(f"`model` must be a whole pipeline to encode videos, got {recipe.model}")
            return load_transformer(recipe.model, recipe.torch_dtype), LatentData(source)
        from diffusers import DiffusionPipeline

        given = {} if recipe.dtype == "auto" else {"torch_dtype": recipe.torch_dtype}
        pipe = DiffusionPipeline.from_pretrained(recipe.model, **given)
        return pipe.transformer, open_videos(settings, pipe, cache=run.output / "cache", run=run, family="wan")

    def batch(self, numbers: Sequence[int]) -> VideoBatch:
        # The last videos are kept to evaluate on.
        size = len(self.data) - self.recipe.evaluation_samples
        return self._made([sample_order(self.recipe.seed, size, number) for number in numbers], self.seeds(numbers))

    def held_out(self, number: int) -> VideoBatch:
        first = len(self.data) - self.recipe.evaluation_samples
        return self._made([first + number], self.seeds([HELD_OUT + number]))

    def _made(self, indices: Sequence[int], seeds: Sequence[int]) -> VideoBatch:
        samples = [self.data[index] for index in indices]
        weight = next(self.model.parameters())
        latents, texts = (
            torch.stack(parts).to(self.device)
            for parts in zip(*((s.latents, s.conditions["prompt_embeds"]) for s in samples), strict=True)
        )
        flow = self.mixed(latents.float(), seeds)
        given = {
            "hidden_states": flow.noisy.to(weight.dtype),
            "timestep": flow.level * TIMES,
            "encoder_hidden_states": texts.to(weight.dtype),
        }
        return VideoBatch(given, flow.velocity)


def load_transformer(source: str, dtype: Any) -> Any:
    """The transformer of a video pipeline in a folder or on the Hub, or one that stands there by itself."""
    from diffusers import AutoModel

    given = {} if dtype == "auto" else {"torch_dtype": dtype}
    try:
        return AutoModel.from_pretrained(source, subfolder="transformer", **given).eval()
    except OSError:
        return AutoModel.from_pretrained(source, **given).eval()
