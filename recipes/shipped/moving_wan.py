"""Train the small Wan transformer that video attention is measured on.

    hf-sparse-attn train moving_wan --output DIR

The model learns by flow matching to draw moving scenes (shipped/moving_scenes.py) of a given class, in pixels, in
stages of growing clips. It runs on one processor core in about an hour.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import OptimizerSettings, Run, Task
from hf_sparse_attn.recipes.shipped.moving_wan_muon import Muon
from hf_sparse_attn.recipes.shipped.staged import StagedRecipe
from hf_sparse_attn.shipped.moving import CHANNELS_IN, CHANNELS_OUT, TEXT_DIM, condition, to_model, with_motion
from hf_sparse_attn.shipped.moving_scenes import draw_classes, least_size, moving_clips

# Seeds of the held-out clips; those of training are small multiples of another number.
_HELD_OUT, _HELD_OUT_CLIPS = 77_000_000, 8


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the transformer; the names are those of `diffusers.WanTransformer3DModel`.

    Args:
        num_layers: blocks.
        num_attention_heads: heads.
        attention_head_dim: width of a head.
        ffn_dim: width inside a feed-forward layer.
        freq_dim: width of the embedding of the noise level.
        rope_max_seq_len: places that rotary positions are made for.
        gate: is added to the start of the gates of attention and feed-forward; near zero, the usual start, a short
            run learns more slowly.
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
        for name in ("steps", "clips", "frames"):
            check_int(name, getattr(self, name), 1)
        for name in ("shift", "spread", "rate"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be more than 0, got {getattr(self, name)}")
        least = least_size(self.frames)
        for name in ("height", "width"):
            size = getattr(self, name)
            if size % 2 or size < least:
                raise ValueError(f"`{name}` must be even and at least {least} for {self.frames} frames, got {size}")


@dataclass(frozen=True, kw_only=True)
class MuonSettings(OptimizerSettings):
    """Muon at another rate for the matrices of the blocks, AdamW for the rest; see OptimizerSettings.

    Args:
        matrix_rate: highest learning rate of Muon.
    """

    matrix_rate: float

    def make_both(self, model: Any) -> list[torch.optim.Optimizer]:
        """Both optimizers."""
        matrices = [p for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2]
        chosen = {id(p) for p in matrices}
        rest = [p for p in model.parameters() if id(p) not in chosen]
        muon = Muon(matrices, lr=self.matrix_rate, weight_decay=self.weight_decay)
        adam = torch.optim.AdamW(rest, lr=self.learning_rate, betas=(self.beta1, self.beta2), weight_decay=0.0)
        return [muon, adam]


@dataclass(frozen=True)
class FlowConfig:
    """What else flow matching takes.

    Args:
        drop: share of the clips that are trained without their class.
        average: decay of the moving average of the weights that is kept.
    """

    drop: float
    average: float


@dataclass(frozen=True, kw_only=True)
class MovingWan(StagedRecipe):
    """The model, the clips it sees, and how long.

    Args:
        model: the shape.
        optimizer: Muon and AdamW.
        flow: classes that are left out, and the average of the weights that is kept.
        stages: what is seen, one after the other.
    """

    model: ModelConfig
    optimizer: MuonSettings
    flow: FlowConfig
    stages: tuple[StageConfig, ...]

    def task(self, run: Run) -> Task:
        return MovingWanTask(self, run)


def build_model(config: MovingWan) -> Any:
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

    def rows(self, chosen: Sequence[int], device: torch.device) -> Batch:
        """Some of its clips, on a device."""
        index = list(chosen)
        return Batch(*(getattr(self, field.name)[index].to(device) for field in dataclasses.fields(self)))


def training_batch(config: MovingWan, step: int) -> Batch:
    """Draw the batch of one step, which depends on the seed and the step alone.

    Args:
        config: the stages, the noise and the seed.
        step: counted from 0 over all the stages.

    Returns:
        The batch.
    """
    return _draw(config, config.stage_at(step), config.seed * 1_000_003 + step)


def _draw(config: MovingWan, stage: StageConfig, seed: int) -> Batch:
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


class MovingWanTask(Task):
    """All weights of the model, from the start, and their moving average, which is the result."""

    def __init__(self, recipe: MovingWan, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.module = build_model(recipe).to(run.device)
        self.average = build_model(recipe).to(run.device).eval()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self.recipe.optimizer.make_both(self.module)

    def rate(self, step: int) -> float:
        recipe = self.recipe
        return float(recipe.stage_at(step).rate) * recipe.optimizer.factor(step, recipe.total_steps)

    def gradient_clip(self) -> float | None:
        return self.recipe.optimizer.gradient_clip

    def samples(self, step: int) -> int:
        return int(self.recipe.stage_at(step).clips)

    def batch(self, step: int, samples: Sequence[int]) -> Batch:
        # The clips of a step come from one generator: all are drawn, and these taken.
        return training_batch(self.recipe, step).rows(samples, self.run.device)

    def weight(self, batch: Batch) -> float:
        return len(batch.given)

    def loss(self, batch: Batch) -> Tensor:
        return self._error(self.module, batch)

    def end_step(self, step: int) -> None:
        # Short at first, or the random start would stay in the average for long.
        decay = min(self.recipe.flow.average, (2 + step) / (11 + step))
        with torch.no_grad():
            for slow, fast in zip(self.average.parameters(), self.module.parameters(), strict=True):
                slow.lerp_(fast, 1 - decay)

    def evaluate(self) -> dict[str, float]:
        """Error of the averaged weights on clips that no step draws, of the size of the last stage."""
        stage = dataclasses.replace(self.recipe.stages[-1], clips=_HELD_OUT_CLIPS)
        batch = _draw(self.recipe, stage, _HELD_OUT).rows(range(_HELD_OUT_CLIPS), self.run.device)
        return {"velocity error": float(self._error(self.average, batch)) / _HELD_OUT_CLIPS}

    def state(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.average.named_parameters()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, value in self.average.named_parameters():
                value.copy_(state[name])

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        self.average.save_pretrained(folder)

    @staticmethod
    def _error(model: Any, batch: Batch) -> Tensor:
        """Mean squared error of the velocity, summed over the clips."""
        guess = model(batch.given, batch.level * 1000, batch.condition, return_dict=False)[0]
        return (guess - batch.velocity).square().mean((1, 2, 3, 4)).sum()


RECIPE = MovingWan
