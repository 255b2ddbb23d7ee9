"""Recipes that adapt a video model to sparse attention and to longer videos: flow matching, LoRA, any sparse method.

What the families have in common; what a model is given and which of its transformers is trained stands with the
recipes (recipes/wan_long_video.py, recipes/hunyuan_long_video.py).
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.context import check_int
from hf_sparse_attn.flow_matching import flow_batch, flow_error, sample_seed
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_latents import LatentSample
from hf_sparse_attn.train_text import sample_order
from hf_sparse_attn.train_videos import VideoSettings, open_videos
from hf_sparse_attn.video_vae import encode_caption, placed

# What the pipelines multiply noise levels by to have timesteps.
TIMES = 1000.0
# Numbers of samples from here on are for evaluation; no training gets so far.
HELD_OUT = 1 << 40


@dataclass(frozen=True, kw_only=True)
class FlowSettings:
    """What is learned from a video; see `flow_matching.flow_batch`.

    Args:
        shift: middle of the odds of noise to latents; None takes the shift of the pipeline's scheduler.
        spread: standard deviation of the logarithm of the odds.
        drop: share of the samples that are trained without their condition, for classifier-free guidance.
    """

    shift: float | None = None
    spread: float = 1.0
    drop: float = 0.1

    def __post_init__(self) -> None:
        for name in ("shift", "spread"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be more than 0, got {value}")
        if not 0 <= self.drop < 1:
            raise ValueError(f"`drop` must be at least 0 and less than 1, got {self.drop}")


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


class Material:
    """A video model and the samples that it learns from.

    Attributes:
        model: the transformer, on the device of the run.
        dtype: what it takes; read before an adapter of another dtype is on it.
        shift: middle of the odds of noise, where the recipe says none.
        bounds: noise levels that this transformer is responsible for.
        nothing: conditions that stand for none, by name; None where conditions cannot be dropped.
        part: name of the transformer in its pipeline, where that has two.
    """

    model: nn.Module
    dtype: torch.dtype
    shift: float
    bounds: tuple[float, float] = (0.0, 1.0)
    nothing: dict[str, Tensor] | None = None
    part: str = ""

    def sample(self, number: int, seed: int) -> LatentSample:
        """The training sample of a number over the whole training, and a seed of its own."""
        raise NotImplementedError

    def held_out(self, number: int, seed: int) -> LatentSample:
        """A sample that training never sees."""
        raise NotImplementedError

    def inputs(self, noisy: Tensor, level: Tensor, conditions: Mapping[str, Tensor]) -> dict[str, Any]:
        """Keyword arguments of the model's forward, as its pipeline gives them.

        Args:
            noisy: float32 [batch, channels, frames, height, width].
            level: float32 [batch], share of noise.
            conditions: by name, with a batch axis.
        """
        raise NotImplementedError

    def evaluate(self, task: VideoTask) -> dict[str, float]:
        """Figures besides the loss."""
        return {}


class VideoBatch(NamedTuple):
    """Samples as the model takes them, and the true velocity [batch, channels, frames, height, width]."""

    given: dict[str, Any]
    velocity: Tensor


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
        if recipe.flow.drop and material.nothing is None:
            raise ValueError(
                f"`flow.drop` must be 0 where the pipeline cannot encode an empty prompt, got {recipe.flow.drop}"
            )
        super().__init__(recipe, run, material.model, base_model=recipe.model)
        self.material, self.done = material, 0
        try:
            self._sparse_step = self._first_sparse()
        except ValueError:
            self.close()
            raise

    def _first_sparse(self) -> int:
        """A step out of TIMES that is not dense by `dense_steps`."""
        asked: Any = None if self.patch is None else self.patch.session.policy.dense_steps
        start, end = asked if isinstance(asked, tuple) else (asked or 0.0, 0.0)
        first, last = math.ceil(start * TIMES), int(TIMES) - 1 - math.ceil(end * TIMES)
        if first > last:
            raise ValueError(f"`sparse.dense_steps` must leave some steps sparse, got {asked}")
        return (first + last) // 2

    def batch(self, step: int, samples: Sequence[int]) -> VideoBatch:
        return self.draw(self.numbers(step, samples), self.material.sample, self.recipe.flow.drop)

    def draw(self, numbers: Sequence[int], source: Any, drop: float) -> VideoBatch:
        """Samples with noise.

        Args:
            numbers: of the samples.
            source: gives a sample for a number and a seed.
            drop: share without their condition.
        """
        recipe, material, device = self.recipe, self.material, self.run.device
        seeds = [sample_seed(recipe.seed, number) for number in numbers]
        drawn = [source(number, seed) for number, seed in zip(numbers, seeds, strict=True)]
        shift = material.shift if recipe.flow.shift is None else recipe.flow.shift
        latents = torch.stack([sample.latents for sample in drawn]).float()
        flow = flow_batch(latents, seeds, shift, recipe.flow.spread, material.bounds)
        told = [sample.conditions for sample in drawn]
        if drop and material.nothing is not None:
            dropped = [np.random.default_rng((seed, 1)).random() < drop for seed in seeds]
            told = [material.nothing if drop else held for held, drop in zip(told, dropped, strict=True)]
        conditions = {name: torch.stack([held[name] for held in told]).to(device) for name in told[0]}
        given = material.inputs(flow.noisy.to(device), flow.level.to(device), conditions)
        return VideoBatch(given, flow.velocity.to(device))

    def weight(self, batch: VideoBatch) -> float:
        return float(len(batch.velocity))

    def loss(self, batch: VideoBatch) -> Tensor:
        with self.announced():
            guess = self.model(**batch.given, return_dict=False)[0]
        return flow_error(guess, batch.velocity).sum()

    def announced(self) -> AbstractContextManager[Any]:
        """Tells a patched model that this is a step in which attention is sparse."""
        if self.patch is None:
            return nullcontext()
        model: Any = self.model
        told: AbstractContextManager[Any] = model.cache_context(
            "cond", step_index=self._sparse_step, num_inference_steps=int(TIMES)
        )
        return told

    def bundle_parts(self) -> dict[str, Any]:
        return {"part": self.material.part}

    def end_step(self, step: int) -> None:
        self.done = step + 1

    def state(self) -> dict[str, Tensor]:
        return {"done": torch.tensor(self.done)}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.done = int(state["done"])

    def evaluate(self) -> dict[str, float]:
        """`flow_loss` on the held-out samples, each with a level and noise of its own, the same in every run with the
        same seed; `density` where attention is sparse; and what the material measures.
        """
        figures = {"flow_loss": self.held_out_loss()}
        if self.patch is not None:
            figures["density"] = self.patch.report().density
        return {**figures, **self.material.evaluate(self)}

    def held_out_loss(self) -> float:
        """Mean loss of the held-out samples."""
        total = 0.0
        for number in range(self.recipe.held_out):
            batch = self.draw([HELD_OUT + number], self._kept_out, 0.0)
            total += float(self.loss(batch).detach())
        return total / self.recipe.held_out

    def _kept_out(self, number: int, seed: int) -> LatentSample:
        return self.material.held_out(number - HELD_OUT, seed)


# ---------------------------------------------------------------------- models of a pipeline


class PipelineMaterial(Material):
    """A transformer of a text-to-video pipeline, and videos encoded by its VAE and text encoders.

    The last `held_out` videos are kept for evaluation. All of the pipeline but the transformer is let go.

    Args:
        recipe: the settings.
        run: where it runs.
        pipe: the pipeline.
        name: of the transformer in it.

    Raises:
        ValueError: too few videos, or a transformer that takes more than latents and text; see also `open_videos`.
    """

    transformers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, recipe: VideoRecipe, run: Run, pipe: Any, name: str = "transformer") -> None:
        self.recipe, self.run = recipe, run
        model = getattr(pipe, name)
        if type(model).__name__ not in self.transformers:
            raise ValueError(
                f"`model` must be a pipeline with a {' or '.join(self.transformers)}, got {type(model).__name__}"
            )
        self.shift = scheduler_shift(pipe.scheduler)
        self.data = open_videos(recipe.long_videos(), pipe, cache=run.output / "latents", run=run)
        channels, wanted = self.data[0].latents.shape[0], model.config.in_channels
        if channels != wanted:
            raise ValueError(
                f"`model` must take latents and text alone, of {channels} channels; got one of {wanted} channels"
            )
        self.trained = len(self.data) - recipe.held_out
        if self.trained < 1:
            raise ValueError(
                f"`held_out` must leave some of the {len(self.data)} videos to train on, got {recipe.held_out}"
            )
        if recipe.flow.drop and getattr(pipe, "text_encoder", None) is not None:
            self.nothing = self._nothing(pipe)
        self.model, self.dtype = model.to(run.device).eval(), model.dtype

    def _nothing(self, pipe: Any) -> dict[str, Tensor]:
        tokens, device = self.recipe.long_videos().tokens, self.run.device
        encoders = (getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2"))
        with placed([encoder for encoder in encoders if encoder is not None], device):
            found = encode_caption(pipe, "", device, tokens)
        return {name: value.cpu() for name, value in found.items()}

    def sample(self, number: int, seed: int) -> LatentSample:
        return self.data[sample_order(self.recipe.seed, self.trained, number)]

    def held_out(self, number: int, seed: int) -> LatentSample:
        return self.data[self.trained + number]


def load_pipeline(recipe: VideoRecipe, **parts: Any) -> Any:
    """A pipeline of diffusers from a folder or the Hub.

    Args:
        recipe: `model` and `dtype`; "auto" is bfloat16 where there is an accelerator, else float32. A VAE is always
            in float32: it encodes once, and Wan's loses in less.
        parts: components in place of those that the folder names.
    """
    from diffusers import DiffusionPipeline

    other = torch.accelerator.is_available()
    dtype = (torch.bfloat16 if other else torch.float32) if recipe.dtype == "auto" else recipe.torch_dtype
    kinds = {"default": dtype, "vae": torch.float32}
    with warnings.catch_warnings():
        # Its new name is not known to the oldest versions that are supported.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        return DiffusionPipeline.from_pretrained(recipe.model, torch_dtype=kinds, **parts)


def scheduler_shift(scheduler: Any) -> float:
    """How far a flow matching scheduler leans towards noise; 1 where its config says nothing."""
    config = scheduler.config
    for name in ("flow_shift", "shift"):
        value = config.get(name)
        if value is not None:
            return float(value)
    return 1.0
