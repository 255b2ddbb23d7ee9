"""Video models as the recipes know them: samples by number, noise on them, and what a model is given.

What differs between families stands in recipes/video_models.py; the small model of moving scenes in scenes.py.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.extras import needing
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.sharing.files import replace_file
from hf_sparse_attn.sharing.hub import loading
from hf_sparse_attn.training.flow_matching import flow_batch, sample_seed
from hf_sparse_attn.training.text.data import sample_order
from hf_sparse_attn.training.video.data import PromptData, PromptSettings, VideoSettings, open_prompts, open_videos
from hf_sparse_attn.training.video.latents import LatentData, LatentSample
from hf_sparse_attn.training.video.vae import TEXT_ENCODERS, encode_caption, parts_of, placed

# What the pipelines multiply noise levels by to have timesteps.
TIMES = 1000.0
_CLIPS = "clips-{:05}.safetensors"
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


class Material:
    """A video model and the samples that it learns from.

    Attributes:
        model: the transformer, on the device of the run.
        dtype: what it takes; read before an adapter of another dtype is on it.
        shift: middle of the odds of noise, where the recipe says none.
        bounds: noise levels that this transformer is responsible for.
        nothing: conditions that stand for none, by name; None where conditions cannot be dropped.
        part: name of the transformer in its pipeline, where that has two.
        given_frames: latent frames at the start that the model is given without noise, and need not predict.
    """

    model: nn.Module
    dtype: torch.dtype
    shift: float
    bounds: tuple[float, float] = (0.0, 1.0)
    nothing: dict[str, Tensor] | None = None
    part: str = ""
    given_frames: int = 0

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

    def sampled(self) -> Tensor | None:
        """Clips that the model makes as it is now, [clips, frames, 3, height, width] in [0, 1]; None where it makes
        none. The same noise every time.
        """
        return None

    def clip_figures(self, clips: Tensor) -> dict[str, float]:
        """Figures of what `sampled` gave."""
        return {}


class VideoBatch(NamedTuple):
    """Samples as the model takes them, and what it is to predict.

    Args:
        given: keyword arguments of its forward.
        velocity: the true one, [batch, channels, frames to predict, height, width].
    """

    given: dict[str, Any]
    velocity: Tensor

    def predicted(self, output: Tensor) -> Tensor:
        """What counts of the model's output, like `velocity`: not the frames that it is given."""
        return output[:, :, output.shape[2] - self.velocity.shape[2] :]


def draw_batch(
    material: Material,
    numbers: Sequence[int],
    flow: FlowSettings,
    seed: int,
    device: torch.device,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> VideoBatch:
    """Samples with noise. Those from HELD_OUT on are held out, and keep their conditions.

    Args:
        material: model and samples.
        numbers: of the samples.
        flow: noise levels and dropped conditions.
        seed: of the training.
        device: of the model.
        bounds: noise levels that are wanted, of those that the model is responsible for.

    Raises:
        ValueError: the model is responsible for none of the wanted levels.
    """
    low, high = max(bounds[0], material.bounds[0]), min(bounds[1], material.bounds[1])
    if not low < high:
        raise ValueError(f"`bounds` must have levels from {material.bounds[0]} to {material.bounds[1]}, got {bounds}")
    seeds = [sample_seed(seed, number) for number in numbers]
    drawn = take(material, numbers, seeds)
    shift = material.shift if flow.shift is None else flow.shift
    noise = flow_batch(torch.stack([s.latents for s in drawn]).float(), seeds, shift, flow.spread, (low, high))
    told = [sample.conditions for sample in drawn]
    if flow.drop and material.nothing is not None:
        nothing = material.nothing
        dropped = [
            number < HELD_OUT and np.random.default_rng((own, 1)).random() < flow.drop
            for number, own in zip(numbers, seeds, strict=True)
        ]
        # An image stays when the text is dropped, as in the pipelines.
        told = [{**held, **nothing} if drop else held for held, drop in zip(told, dropped, strict=True)]
    given = material.inputs(noise.noisy.to(device), noise.level.to(device), stacked(told, device))
    return VideoBatch(given, noise.velocity[:, :, material.given_frames :].to(device))


def take(material: Material, numbers: Sequence[int], seeds: Sequence[int]) -> list[LatentSample]:
    """Samples by their numbers, each with a seed of its own; those from HELD_OUT on are held out."""
    return [
        material.sample(number, seed) if number < HELD_OUT else material.held_out(number - HELD_OUT, seed)
        for number, seed in zip(numbers, seeds, strict=True)
    ]


def stacked(conditions: Sequence[Mapping[str, Tensor]], device: torch.device) -> dict[str, Tensor]:
    """Conditions of samples by name, with a batch axis."""
    return {name: torch.stack([one[name] for one in conditions]).to(device) for name in conditions[0]}


def keep_clips(clips: Tensor, run: Run, step: int) -> None:
    """Keeps sampled clips in the folder of a run, in 8 bits; nothing where the folder is not there.

    Args:
        clips: [clips, frames, 3, height, width] in [0, 1].
        run: whose.
        step: after which they were sampled.
    """
    if run.output.is_dir():
        from safetensors.torch import save_file

        pixels = {"clips": (clips * 255).round().byte().contiguous()}
        replace_file(run.output / _CLIPS.format(step), partial(save_file, pixels))


def check_drop(flow: FlowSettings, material: Material) -> None:
    """Raises where conditions shall be dropped and nothing is known to put in their place.

    Raises:
        ValueError: the model's pipeline has no text encoder.
    """
    if flow.drop and material.nothing is None:
        raise ValueError(f"`flow.drop` must be 0 where the pipeline cannot encode an empty prompt, got {flow.drop}")


def sparse_span(patch: Patch | None) -> tuple[float, float]:
    """From which share of a sampler's steps to which attention is sparse, by `dense_steps`; 0 to 1 without a patch.

    Raises:
        ValueError: no step is left.
    """
    asked: Any = None if patch is None else patch.session.policy.dense_steps
    start, end = asked if isinstance(asked, tuple) else (asked or 0.0, 0.0)
    if math.ceil(start * TIMES) + math.ceil(end * TIMES) >= TIMES:
        raise ValueError(f"`sparse.dense_steps` must leave some steps sparse, got {asked}")
    return start, 1.0 - end


def announced(model: Any, patch: Patch | None) -> AbstractContextManager[Any]:
    """Tells a patched model that this is a step in which attention is sparse; training has no schedule of its own."""
    if patch is None:
        return nullcontext()
    middle = int(sum(sparse_span(patch)) / 2 * TIMES)
    told: AbstractContextManager[Any] = model.cache_context("cond", step_index=middle, num_inference_steps=int(TIMES))
    return told


class PipelineMaterial(Material):
    """A transformer of a video pipeline, and videos or prompts encoded by its VAE and text encoders.

    The last `held_out` of them are kept for evaluation. All of the pipeline but the transformer is let go.

    Args:
        run: where it runs; what is encoded is kept in its folder.
        pipe: the pipeline.
        videos: what it learns from; or prompts alone, whose samples have no latents.
        held_out: samples that are kept for evaluation.
        seed: of the order of the others.
        drops: whether conditions are dropped, so that those which stand for none are needed.
        name: of the transformer in the pipeline.
        first_frame: whether conditions of the first frame are wanted besides the text's.

    Raises:
        ValueError: too few videos, or a transformer that takes other channels; see also `open_videos` and
            `open_prompts`.
    """

    # Names of classes, and of the keyword arguments that only this family takes.
    transformers: ClassVar[tuple[str, ...]] = ()
    options: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        run: Run,
        pipe: Any,
        videos: VideoSettings | PromptSettings,
        *,
        held_out: int,
        seed: int,
        drops: bool = True,
        name: str = "transformer",
        first_frame: bool = False,
    ) -> None:
        self.seed = seed
        model = getattr(pipe, name)
        self.shift = scheduler_shift(pipe.scheduler)
        self.data = _open(videos, pipe, run, first_frame)
        channels, wanted = self.channels(self.data[0].latents.shape[0], pipe), model.config.in_channels
        if channels != wanted:
            raise ValueError(f"`model` must take the {channels} channels that its pipeline gives, got one of {wanted}")
        self.trained = len(self.data) - held_out
        if self.trained < 1:
            raise ValueError(f"`held_out` must leave some of the {len(self.data)} videos to train on, got {held_out}")
        if drops and getattr(pipe, "text_encoder", None) is not None:
            told = videos.negative if isinstance(videos, PromptSettings) else ""
            self.nothing = _nothing(pipe, told, videos.tokens, run.device)
        self.model, self.dtype = model.to(run.device).eval(), model.dtype

    def channels(self, latents: int, pipe: Any) -> int:
        """How many channels the model is given, where latents have so many."""
        return latents

    def sample(self, number: int, seed: int) -> LatentSample:
        return self.data[sample_order(self.seed, self.trained, number)]

    def held_out(self, number: int, seed: int) -> LatentSample:
        return self.data[self.trained + number]


def _open(videos: VideoSettings | PromptSettings, pipe: Any, run: Run, first_frame: bool) -> LatentData | PromptData:
    cache = run.output / "latents"
    if not isinstance(videos, PromptSettings):
        return open_videos(videos, pipe, cache=cache, run=run, first_frame=first_frame)
    if first_frame:
        raise ValueError(
            "`prompts` must be for a model that makes videos of text alone, got one that starts from images"
        )
    return open_prompts(videos, pipe, cache=cache, run=run)


def _nothing(pipe: Any, told: str, tokens: int | None, device: torch.device) -> dict[str, Tensor]:
    with placed(parts_of(pipe, TEXT_ENCODERS), device):
        found = encode_caption(pipe, told, device, tokens)
    return {name: value.cpu() for name, value in found.items()}


def load_pipeline(model: str, dtype: Any = "auto", **parts: Any) -> Any:
    """A pipeline of diffusers from a folder or the Hub.

    Args:
        model: folder or Hub id; or a folder with a transformer alone, which is enough to learn from latents.
        dtype: of torch; "auto" is bfloat16 where there is an accelerator, else float32. A VAE is always in float32: it
            encodes once, and Wan's loses in less.
        parts: components in place of those that the folder names.

    Raises:
        TypeError: a transformer alone that is not of Wan.
        ValueError, OSError: no model that can be loaded.
        MissingExtra: diffusers is not installed.
    """
    with needing("a pipeline"):
        from diffusers import DiffusionPipeline

    other = torch.accelerator.is_available()
    if dtype == "auto":
        dtype = torch.bfloat16 if other else torch.float32
    kinds = {"default": dtype, "vae": torch.float32}
    folder = Path(model)
    if (folder / "config.json").is_file() and not (folder / "model_index.json").is_file():
        return _bare_pipeline(model, dtype)
    with warnings.catch_warnings():
        # Its new name is not known to the oldest versions that are supported.
        warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
        with loading(model):
            return DiffusionPipeline.from_pretrained(model, torch_dtype=kinds, **parts)


def _bare_pipeline(model: str, dtype: torch.dtype) -> Any:
    from diffusers import AutoModel, WanPipeline

    with loading(model):
        transformer = AutoModel.from_pretrained(model, torch_dtype=dtype)
    if type(transformer).__name__ != "WanTransformer3DModel":
        raise TypeError(
            f"`model` must be a whole pipeline, or a Wan transformer; got a {type(transformer).__name__} by itself"
        )
    return WanPipeline(tokenizer=None, text_encoder=None, vae=None, scheduler=None, transformer=transformer)


def scheduler_shift(scheduler: Any) -> float:
    """How far a flow matching scheduler leans towards noise; 1 where there is none, or its config says nothing."""
    config = {} if scheduler is None else scheduler.config
    told = (config.get(name) for name in ("flow_shift", "shift"))
    return float(next((value for value in told if value is not None), 1.0))
