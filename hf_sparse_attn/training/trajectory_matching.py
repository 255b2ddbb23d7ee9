"""Trajectory distribution matching: a few-step student learns the distributions that a flow model passes through.

Luo et al. 2025 (TDM, arXiv 2503.06674), as Gu et al. 2025 use it together with sparse attention (BLADE, arXiv
2508.10774). Nothing but noise and conditions goes in; there is no data. A student of K Euler steps runs a part of its
way without a gradient, then takes one step with a gradient, from level s to the next one, m. What it reached is
diffused to a level t between the two, where two velocities are compared: the teacher's, and that of a fake score, a
model that learns by flow matching what the student makes. The difference of the two is the gradient that moves the
student (Yin et al. 2024, DMD2, arXiv 2405.14867). Each step has its own stretch of levels, so that the fake score
meets one distribution at each of them.

The convention is that of flow_matching.py: with x the clean sample and e the noise, a state at level s is
(1 - s) x + s e and a velocity e - x; so x = state - s velocity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.context import check_int

# Predicts velocities [rows, ...] for some rows of a batch: their states, their levels [rows], their places [rows].
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]

# Levels, before the shift, that nothing is matched at: so near to the data there is nothing left to tell, and so near
# to the upper end of a stretch nothing of the student.
_LOWEST, _MARGIN = 0.02, 0.01
# What every number of a sample is drawn with, besides its seed.
_START, _CHOICE, _WAY, _AGAIN, _DIFFUSED = range(5)


def student_levels(steps: int, shift: float = 1.0, even: bool = True) -> Tensor:
    """The noise levels that a student goes through.

    They are those of diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)`. Given nothing but a number of steps,
    that scheduler makes the last level but one nearly 0: its last step does nothing. Given evenly spaced sigmas, as
    the pipeline of HunyuanVideo does, and as Wan's own scheduler spaces them, all steps count.

    Args:
        steps: Euler steps.
        shift: what the odds of noise are multiplied by.
        even: whether levels are evenly spaced before the shift, `set_timesteps(sigmas=linspace(1, 1 / steps, steps))`;
            else as `set_timesteps(steps)` has them.

    Returns:
        float32 [steps + 1], falling from 1 to 0.

    Raises:
        ValueError: `steps` is less than 1, or `shift` not positive.
    """
    check_int("steps", steps, 1)
    _check_shift(shift)
    lowest = 1 / steps if even else float(shifted(torch.tensor(1e-3, dtype=torch.float64), shift))
    levels = shifted(torch.from_numpy(np.linspace(1.0, lowest, steps)), shift)
    return torch.cat([levels, levels.new_zeros(1)]).float()


def shifted(levels: Tensor, shift: float) -> Tensor:
    """Levels with their odds of noise multiplied by `shift`; `shifted(levels, 1 / shift)` is the way back."""
    return shift * levels / (1 + (shift - 1) * levels)


class Draw(NamedTuple):
    """What is drawn for some samples; a row depends on its seed alone.

    Args:
        start: the noise that the student begins with, float32 [batch, ...].
        step: which of the student's steps is learned at, [batch].
        level: where it is matched, float32 [batch], between the level that the step leads to and the one it leaves.
        again: noise for the step, if it keeps not all of its own, like `start`.
        diffused: noise on the way up to `level`, like `start`.
        seeds: of the rows.
    """

    start: Tensor
    step: Tensor
    level: Tensor
    again: Tensor
    diffused: Tensor
    seeds: tuple[int, ...]


def draw(seeds: Sequence[int], shape: Sequence[int], levels: Tensor, shift: float = 1.0, whole: bool = False) -> Draw:
    """Draws steps, levels and noises.

    The step is any with the same chance. The level is uniform before the shift: between the level that the step leads
    to (at least 0.02) and the one that it leaves, less 0.01.

    Args:
        seeds: one for each sample.
        shape: of a sample, without a batch axis.
        levels: of the student, see `student_levels`.
        shift: of these levels.
        whole: whether the level may be anywhere above the one that the step leads to, as in BLADE's code. Then the
            fake score has to be right for the mean of several distributions at the same level.

    Raises:
        ValueError: the levels do not fall from at most 1 to 0, or `shift` is not positive.
    """
    falls = levels.ndim == 1 and len(levels) > 1 and bool((levels.diff() < 0).all())
    if not falls or levels[0] > 1 or levels[-1] != 0:
        raise ValueError(f"`levels` must fall from at most 1 to 0, got {levels.tolist()}")
    _check_shift(shift)
    plain = shifted(levels.double(), 1 / shift)
    steps, at = [], []
    for seed in seeds:
        dice = np.random.default_rng((seed, _CHOICE))
        step = int(dice.integers(len(levels) - 1))
        low = max(float(plain[step + 1]), _LOWEST)
        high = max((1.0 if whole else float(plain[step])) - _MARGIN, low)
        steps.append(step)
        at.append(low + (high - low) * dice.random())
    level = shifted(torch.tensor(at, dtype=torch.float64), shift).float()
    start, again, diffused = (_normal(seeds, shape, use) for use in (_START, _AGAIN, _DIFFUSED))
    return Draw(start, torch.tensor(steps, dtype=torch.long), level, again, diffused, tuple(seeds))


def _normal(seeds: Sequence[int], shape: Sequence[int], *use: int) -> Tensor:
    """Normal noise, float32 [seeds, ...]; on the CPU, as the same seed gives other numbers elsewhere."""
    found = torch.empty(len(seeds), *shape)
    for row, seed in zip(found, seeds, strict=True):
        mixed = int(np.random.SeedSequence((seed, *use)).generate_state(1)[0])
        row.copy_(torch.randn(tuple(shape), generator=torch.Generator().manual_seed(mixed)))
    return found


def rollout(student: Velocity, drawn: Draw, levels: Tensor, keep: float = 1.0) -> Tensor:
    """Where the student is when it takes the step that is learned at.

    Each row takes its own number of steps; no gradient is kept.

    Args:
        student: its velocity; only rows that have a step to take are asked.
        drawn: see `draw`, on the device of the model.
        levels: of the student.
        keep: see `advance`.

    Returns:
        float32 [batch, ...], at `levels[drawn.step]`.
    """
    state = drawn.start.clone()
    with torch.no_grad():
        for step in range(int(drawn.step.max()) if len(state) else 0):
            rows = (drawn.step > step).nonzero().squeeze(1)
            here, there = (levels[place].to(state).expand(len(rows)) for place in (step, step + 1))
            fresh = None
            if keep < 1:
                fresh = _normal([drawn.seeds[row] for row in rows.tolist()], state.shape[1:], _WAY, step).to(state)
            state[rows] = advance(state[rows], student(state[rows], here, rows), here, there, fresh, keep)
    return state


def advance(
    state: Tensor, velocity: Tensor, here: Tensor, there: Tensor, fresh: Tensor | None = None, keep: float = 1.0
) -> Tensor:
    """One step of the student: an Euler step, or one in which a part of the noise is drawn anew.

    Args:
        state: [batch, ...].
        velocity: alike.
        here: level that it is at, [batch].
        there: level that it goes to, [batch].
        fresh: new noise, like `state`; not needed where `keep` is 1.
        keep: how much of its noise a sample keeps, from 0 to 1, as a share of the standard deviation (eta of BLADE's
            code, 0.9 there). 1 is an Euler step.

    Raises:
        ValueError: `keep` is out of range, or less than 1 without `fresh`.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"`keep` must be from 0 to 1, got {keep}")
    at, to = _like(here, state), _like(there, state)
    if keep == 1:
        return state + (to - at) * velocity
    if fresh is None:
        raise ValueError(f"`fresh` must be given where `keep` is less than 1, got none and {keep}")
    noise = keep * (state + (1 - at) * velocity) + math.sqrt(1 - keep**2) * fresh
    return (1 - to) * clean(state, velocity, here) + to * noise


def clean(state: Tensor, velocity: Tensor, level: Tensor) -> Tensor:
    """The clean sample [batch, ...] that a velocity points to: state - level * velocity."""
    return state - _like(level, state) * velocity


def diffuse(state: Tensor, here: Tensor, there: Tensor, noise: Tensor) -> Tensor:
    """Adds noise to states [batch, ...] at a level, so that they are distributed as at a higher one.

    Raises:
        ValueError: a level falls, or is 1 at the beginning.
    """
    if bool((here >= 1).any()) or bool((there < here).any()):
        raise ValueError(f"`there` must be at least `here`, which must be less than 1, got {there} and {here}")
    at, to = _like(here, state), _like(there, state)
    share = (1 - to) / (1 - at)
    return share * state + (to.square() - (share * at).square()).clamp(min=0).sqrt() * noise


class Reached(NamedTuple):
    """Where a step of the student with a gradient led.

    Args:
        sample: the clean sample that it points to, [batch, ...], with a gradient.
        state: what it reached, diffused to `level`, alike; without a gradient.
        level: [batch].
    """

    sample: Tensor
    state: Tensor
    level: Tensor


def reach(state: Tensor, velocity: Tensor, drawn: Draw, levels: Tensor, keep: float = 1.0) -> Reached:
    """The step of the student that is learned at, and the state that teacher and fake score are asked about.

    Args:
        state: where the student is, see `rollout`.
        velocity: the student's there, with a gradient.
        drawn: see `draw`, on the device of `state`.
        levels: of the student.
        keep: see `advance`.
    """
    here, there = (levels.to(state)[drawn.step + more] for more in (0, 1))
    with torch.no_grad():
        arrived = advance(state, velocity.detach(), here, there, drawn.again, keep)
        diffused = diffuse(arrived, there, drawn.level, drawn.diffused)
    return Reached(clean(state, velocity, here), diffused, drawn.level)


def guided(told: Tensor, plain: Tensor, guidance: float) -> Tensor:
    """A velocity with classifier-free guidance: of the condition, and of none."""
    return plain + guidance * (told - plain)


def matching_gradient(reached: Reached, teacher: Tensor, fake: Tensor) -> Tensor:
    """Which way the student's samples are wrong: the clean sample of the fake score less that of the teacher.

    Divided by the mean distance of the student's sample from the teacher's, as in DMD2, so that no level outweighs
    the others. It points along the gradient of the Kullback-Leibler divergence of the student's distribution at that
    level from the teacher's.

    Args:
        reached: see `reach`.
        teacher: its velocity at `reached.state`, guided or not, [batch, ...].
        fake: that of the fake score.

    Returns:
        like `teacher`, in float32 or more, without a gradient.
    """
    with torch.no_grad():
        state = reached.state.to(torch.promote_types(reached.state.dtype, torch.float32))
        told = clean(state, teacher.to(state.dtype), reached.level)
        found = clean(state, fake.to(state.dtype), reached.level) - told
        size = (reached.sample - told).abs().flatten(1).mean(1)
        return found / _like(size.clamp(min=torch.finfo(size.dtype).eps), found)


def student_loss(reached: Reached, gradient: Tensor) -> Tensor:
    """Half the mean squared distance of each sample from where `gradient` would have it, [batch].

    Its own gradient is that of `matching_gradient`, over the count of numbers in a sample.
    """
    wanted = (reached.sample - gradient).detach()
    return 0.5 * (reached.sample - wanted).square().flatten(1).mean(1)


def fake_loss(reached: Reached, fake: Tensor) -> Tensor:
    """Flow matching of the fake score on the student's samples, [batch], as in BLADE's code.

    The velocity that it learns points from the student's clean sample to the diffused state. In the last step, and
    wherever a sample's noise is independent of it, the score of the student's distribution is exactly what minimises
    this. In earlier steps it is near to it. (TDM's code weighs samples besides, by the ratio of two densities.)

    Args:
        reached: see `reach`; no gradient goes to the student.
        fake: velocity of the fake score at `reached.state`, [batch, ...], with a gradient.
    """
    state, sample = reached.state, reached.sample.detach()
    wanted = (state - sample) / _like(reached.level, state)
    return (fake.to(wanted.dtype) - wanted).square().flatten(1).mean(1)


def _like(level: Tensor, state: Tensor) -> Tensor:
    return level.to(state).view(-1, *[1] * (state.ndim - 1))


def _check_shift(shift: float) -> None:
    if not 0 < shift < math.inf:
        raise ValueError(f"`shift` must be more than 0, got {shift}")
