"""Flow matching: what a video model learns from, noisy latents, their noise levels and the velocities to predict.

Rectified flow (Liu et al. 2022, arXiv 2209.03003) as a case of flow matching (Lipman et al. 2022, arXiv 2210.02747):
with x the latents, e normal noise and s the level in (0, 1), the model sees (1 - s) x + s e and predicts e - x.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class FlowBatch(NamedTuple):
    """Samples to learn from.

    Args:
        noisy: what the model is given, the latents mixed with noise, like the latents.
        level: share of the noise in each, float32 [batch]; a pipeline's timestep is 1000 times it.
        velocity: noise minus latents, what the model is to predict, like the latents.
    """

    noisy: Tensor
    level: Tensor
    velocity: Tensor


def sample_seed(seed: int, number: int) -> int:
    """Seed of a sample, from that of the training and the sample's number in it; of 32 bits, as torch uses no more.

    Args:
        seed: of the training, 0 or more.
        number: of the sample over the whole training, 0 or more.
    """
    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def noise_levels(
    seeds: Sequence[int], shift: float = 1.0, spread: float = 1.0, bounds: tuple[float, float] = (0.0, 1.0)
) -> Tensor:
    """Draw a noise level for each sample.

    The logarithm of the odds of noise to latents, s / (1 - s), is normal (Esser et al. 2024, arXiv 2403.03206). A
    `shift` is the one of diffusers' flow matching schedulers, which multiplies those odds.

    Args:
        seeds: one for each sample.
        shift: middle of the odds; the higher, the noisier the samples. 1 is even.
        spread: standard deviation of the logarithm of the odds.
        bounds: only levels between these two are drawn, with the same proportions to one another.

    Returns:
        float32 [samples], on the CPU.

    Raises:
        ValueError: `shift` or `spread` is not positive, or `bounds` are not two rising numbers from 0 to 1.
    """
    for name, value in (("shift", shift), ("spread", spread)):
        if not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be more than 0, got {value}")
    if not 0 <= bounds[0] < bounds[1] <= 1:
        raise ValueError(f"`bounds` must be two rising levels from 0 to 1, got {bounds}")
    shares = [torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    if not shares:
        return torch.zeros(0)
    # The distribution cut at the bounds, by its inverse; in float64, as its tails come close to 0 and 1.
    log_odds = torch.tensor(bounds, dtype=torch.float64).logit()
    low, high = torch.special.ndtr((log_odds - math.log(shift)) / spread)
    share = (low + (high - low) * torch.stack(shares)).clamp(1e-6, 1 - 1e-6)
    level = torch.sigmoid(math.log(shift) + spread * torch.special.ndtri(share))
    return level.clamp(*bounds).float()


def flow_batch(
    latents: Tensor,
    seeds: Sequence[int],
    shift: float = 1.0,
    spread: float = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> FlowBatch:
    """Mix latents with noise.

    A sample depends on its latents and its seed alone, not on the rest of the batch or the device.

    Args:
        latents: [batch, ...], as the pipeline gives them to its model without noise.
        seeds: one for each sample, of its level and its noise.
        shift, spread, bounds: of the levels; see `noise_levels`.

    Returns:
        The batch, on the device of the latents; `noisy` and `velocity` in their dtype.

    Raises:
        ValueError: there are not as many seeds as samples, or see `noise_levels`.
    """
    if len(seeds) != len(latents):
        raise ValueError(f"`seeds` must be one for each of {len(latents)} samples, got {len(seeds)}")
    level = noise_levels(seeds, shift, spread, bounds).to(latents.device)
    clean = latents.float()
    noise = torch.empty_like(clean)
    for row, seed in zip(noise, seeds, strict=True):
        draw = torch.Generator().manual_seed(seed)
        # The first draw of this seed was the level's.
        torch.rand((), generator=draw, dtype=torch.float64)
        row.copy_(torch.randn(row.shape, generator=draw))
    at = level.view(-1, *[1] * (latents.ndim - 1))
    noisy = (1 - at) * clean + at * noise
    return FlowBatch(noisy.to(latents.dtype), level, (noise - clean).to(latents.dtype))


def flow_error(guess: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error of the velocity of each sample, in float32.

    Args:
        guess: [batch, ...], the model's.
        velocity: the true one, alike.

    Returns:
        [batch]; its sum is the loss of the samples together.

    Raises:
        ValueError: the shapes differ.
    """
    if guess.shape != velocity.shape:
        raise ValueError(f"`guess` must have the shape {tuple(velocity.shape)}, got {tuple(guess.shape)}")
    return (guess.float() - velocity.float()).square().flatten(1).mean(1)
