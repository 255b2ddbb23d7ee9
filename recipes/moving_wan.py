"""Train the small Wan transformer that video attention is measured on.

    python -m hf_sparse_attn.recipes.moving_wan --config recipes/moving_wan.yaml --output DIR

The model learns by flow matching to draw moving scenes (`hf_sparse_attn.moving_scenes`) of a given class, in pixels,
in stages of growing clips. It runs on one processor core in about an hour, saves as it goes, and goes on from its
last checkpoint with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from hf_sparse_attn.moving import (
    CHANNELS_IN,
    CHANNELS_OUT,
    TEXT_DIM,
    condition,
    draw_classes,
    least_size,
    moving_clips,
    to_model,
    with_motion,
)
from hf_sparse_attn.recipe_config import read_config
from hf_sparse_attn.recipes.moving_wan_muon import Muon

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer; the names are those of `diffusers.WanTransformer3DModel`.

    `gate` is added to the start of the gates of attention and feed-forward; near zero, the usual start, a short run
    learns more slowly.
    """

    num_layers: int
    num_attention_heads: int
    attention_head_dim: int
    ffn_dim: int
    freq_dim: int
    rope_max_seq_len: int
    gate: float


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training.

    Args:
        steps: how many steps.
        clips: clips in each.
        frames: frames per clip.
        height: pixels per frame, even.
        width: pixels per frame, even.
        shift: middle of the odds of noise to picture; the higher, the more the model learns of what is decided
            first, where the sprite goes, and the less of detail.
        spread: standard deviation of the logarithm of those odds.
        rate: factor on the learning rates.
        motion: whether the model is told the motion; else zeros stand in those channels.
    """

    steps: int
    clips: int
    frames: int
    height: int
    width: int
    shift: float
    spread: float
    rate: float
    motion: bool

    def __post_init__(self) -> None:
        least = least_size(self.frames)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % 2 or size < least:
                raise ValueError(f"`{name}` must be even and at least {least} for {self.frames} frames, got {size}")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon for the matrices of the blocks, AdamW for the rest; a linear warm-up, then a cosine down to a fraction."""

    matrix_rate: float
    learning_rate: float
    warmup_steps: int
    final_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    gradient_clip: float


@dataclass(frozen=True)
class FlowConfig:
    """Share of the clips trained without their class, and decay of the moving average of the weights that is kept."""

    drop: float
    average: float


@dataclass(frozen=True)
class RunConfig:
    """How the run goes about its work, which does not change what it computes."""

    threads: int
    report_every: int
    save_every_seconds: float


@dataclass(frozen=True)
class TrainConfig:
    """Everything the weights depend on, and how to run it."""

    seed: int
    model: ModelConfig
    optimizer: OptimizerConfig
    flow: FlowConfig
    stages: tuple[StageConfig, ...]
    run: RunConfig

    @property
    def total_steps(self) -> int:
        """Steps of all the stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> StageConfig:
        """The stage that the step counted from 0 belongs to."""
        left = step
        for stage in self.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        raise ValueError(f"`step` must be less than {self.total_steps}, got {step}")


def load_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Args:
        path: a YAML file with exactly the keys of `TrainConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: a key is missing or unknown.
        TypeError: a value has the wrong type.
    """
    return read_config(TrainConfig, path)


def build_model(config: TrainConfig) -> Any:
    """Make the model with its starting weights, in float32.

    Args:
        config: the shape and the seed.

    Returns:
        The `WanTransformer3DModel`.
    """
    shape = dataclasses.asdict(config.model)
    gate = shape.pop("gate")
    torch.manual_seed(config.seed)
    model: Any = WanTransformer3DModel(in_channels=CHANNELS_IN, out_channels=CHANNELS_OUT, text_dim=TEXT_DIM, **shape)
    with torch.no_grad():
        model.proj_out.weight.zero_()
        model.patch_embedding.weight[:, CHANNELS_OUT:].zero_()
        for block in model.blocks:
            # Rows 2 and 5 gate the attention and the feed-forward.
            block.scale_shift_table[:, [2, 5]] += gate
    return model


@dataclass(frozen=True)
class Batch:
    """What the model is given, [clips, 6, frames, height, width], its noise levels in [0, 1] and conditions, and the
    true velocities, [clips, 3, frames, height, width].
    """

    given: Tensor
    level: Tensor
    condition: Tensor
    velocity: Tensor


def training_batch(config: TrainConfig, step: int) -> Batch:
    """Draw the batch of one step, which depends on the seed and the step alone.

    Args:
        config: the stages, the noise and the seed.
        step: counted from 0 over all the stages.

    Returns:
        The batch.
    """
    stage = config.stage_at(step)
    seed = config.seed * 1_000_003 + step
    draw = torch.Generator().manual_seed(seed)
    classes = draw_classes(stage.clips, seed)
    clips = to_model(moving_clips(classes, stage.frames, stage.height, stage.width, seed))
    kept = torch.rand(stage.clips, generator=draw) >= config.flow.drop
    # One level from each of so many equal shares of the distribution: less noise from batch to batch.
    share = (torch.arange(stage.clips) + torch.rand(stage.clips, generator=draw)) / stage.clips
    odds = stage.shift * (stage.spread * torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4))).exp()
    level = odds / (1 + odds)
    noise = torch.randn(clips.shape, generator=draw)
    mix = level[torch.randperm(stage.clips, generator=draw)]
    at = mix[:, None, None, None, None]
    told = [scene if keep else None for scene, keep in zip(classes, kept.tolist(), strict=True)]
    given = with_motion((1 - at) * clips + at * noise, told)
    if not stage.motion:
        given[:, CHANNELS_OUT:] = 0.0
    return Batch(given, mix, condition(told), noise - clips)


def _rate(config: TrainConfig, step: int) -> float:
    """Share of the peak learning rate at a step."""
    optimizer, factor = config.optimizer, config.stage_at(step).rate
    if step < optimizer.warmup_steps:
        return factor * (step + 1) / optimizer.warmup_steps
    done = (step - optimizer.warmup_steps) / max(1, config.total_steps - optimizer.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * done))
    return factor * (optimizer.final_fraction + (1 - optimizer.final_fraction) * cosine)


def _make_optimizers(model: Any, config: OptimizerConfig) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    muon = Muon(matrices, lr=config.matrix_rate, weight_decay=config.weight_decay)
    adam = torch.optim.AdamW(rest, lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return optimizers


class Trainer:
    """A model in training: its weights, their moving average, the optimizers and how far it is.

    Args:
        config: what to train and how.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.model = build_model(config)
        self.average = build_model(config)
        self.optimizers = _make_optimizers(self.model, config.optimizer)
        self.step = 0
        self.seconds = 0.0

    def train_step(self) -> float:
        """Take one step; returns the mean squared error of the velocity."""
        batch = training_batch(self.config, self.step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * _rate(self.config, self.step)
            optimizer.zero_grad(set_to_none=True)
        guess = self.model(batch.given, batch.level * 1000, batch.condition, return_dict=False)[0]
        loss = torch.nn.functional.mse_loss(guess, batch.velocity)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.gradient_clip)
        for optimizer in self.optimizers:
            optimizer.step()
        self.step += 1
        self._follow()
        return float(loss.detach())

    @torch.no_grad()
    def _follow(self) -> None:
        # Short at first, or the random start would stay in the average for long.
        decay = min(self.config.flow.average, (1 + self.step) / (10 + self.step))
        for slow, fast in zip(self.average.parameters(), self.model.parameters(), strict=True):
            slow.lerp_(fast, 1 - decay)

    def save(self, output: Path) -> None:
        """Replace the files in a folder one by one by finished ones, so that an interruption leaves none half written.

        Args:
            output: the folder; it gets the averaged weights as a model and a checkpoint to go on from.
        """
        with tempfile.TemporaryDirectory(dir=output) as scratch:
            self.average.save_pretrained(scratch)
            state = {
                "model": self.model.state_dict(),
                "average": self.average.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                "step": self.step,
                "seconds": self.seconds,
            }
            torch.save(state, Path(scratch) / "checkpoint.pt")
            for path in Path(scratch).iterdir():
                os.replace(path, output / path.name)

    def load(self, checkpoint: Path) -> None:
        """Go on from a checkpoint that `save` made."""
        state: dict[str, Any] = torch.load(checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        for optimizer, kept in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(kept)
        self.step, self.seconds = state["step"], state["seconds"]


def train(config: TrainConfig, output: Path, resume: bool = False) -> Any:
    """Train the model and keep it, with a checkpoint to go on from, in a folder.

    Args:
        config: what to train and how.
        output: folder for the weights, made if missing.
        resume: go on from the checkpoint in the folder where there is one.

    Returns:
        The model with the averaged weights.
    """
    output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.run.threads)
    trainer = Trainer(config)
    checkpoint = output / "checkpoint.pt"
    if resume and checkpoint.exists():
        trainer.load(checkpoint)
    _LOG.info("%d parameters, %d steps from %d", trainer.model.num_parameters(), config.total_steps, trainer.step)
    began = saved = time.monotonic()
    before, losses = trainer.seconds, []
    while trainer.step < config.total_steps:
        losses.append(trainer.train_step())
        trainer.seconds = before + time.monotonic() - began
        if trainer.step % config.run.report_every == 0 or trainer.step == config.total_steps:
            mean = sum(losses) / len(losses)
            _LOG.info("step %d/%d, %.0f s: loss %.4f", trainer.step, config.total_steps, trainer.seconds, mean)
            losses = []
        if time.monotonic() - saved > config.run.save_every_seconds:
            trainer.save(output)
            saved = time.monotonic()
    trainer.save(output)
    return trainer.average


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    default = Path(__file__).with_suffix(".yaml")
    parser = argparse.ArgumentParser(description="Train the small Wan transformer of the video comparisons.")
    parser.add_argument("--config", type=Path, default=default, help="YAML file with every setting")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(load_config(options.config), options.output, resume=options.resume)


if __name__ == "__main__":
    main()
