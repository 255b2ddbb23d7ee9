"""Trajectory distribution matching: levels, draws, and gradients against closed forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hf_sparse_attn.training import trajectory_matching as tm
from hf_sparse_attn.training.flow_matching import sample_seed

SEEDS = [sample_seed(5, number) for number in range(6)]
SHAPE = (3, 2, 5)


def gaussian(mean: float, std: float):
    """The velocity of a flow whose clean samples are normal, and the log density of its states; both exact."""

    def velocity(state: Tensor, level: Tensor) -> Tensor:
        at = level.view(-1, *[1] * (state.ndim - 1))
        clean = mean + (1 - at) * std**2 / variance(at) * (state - (1 - at) * mean)
        return (state - clean) / at

    def variance(at: Tensor) -> Tensor:
        return ((1 - at) * std) ** 2 + at**2

    def log_density(state: Tensor, level: Tensor) -> Tensor:
        at = level.view(-1, *[1] * (state.ndim - 1))
        return -0.5 * (state - (1 - at) * mean).square() / variance(at) - 0.5 * variance(at).log()

    return velocity, log_density


# ---------------------------------------------------------------------- levels and draws


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0, 12.0])
@pytest.mark.parametrize("even", [True, False], ids=["even", "as by steps"])
def test_levels_are_those_of_the_scheduler(steps, shift, even):
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    if even:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    levels = tm.student_levels(steps, shift, even)
    assert levels.dtype == torch.float32 and levels[0] == 1 and levels[-1] == 0
    # Both are float64 until the end, the scheduler's lowest level float32 before.
    torch.testing.assert_close(levels, scheduler.sigmas, rtol=2e-7, atol=1e-7)


def test_wans_own_scheduler_has_the_even_levels_to_a_thousandth_and_can_take_euler_steps():
    from diffusers import UniPCMultistepScheduler

    euler = {"solver_order": 1, "disable_corrector": list(range(4))}
    scheduler = UniPCMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=3.0, **euler
    )
    scheduler.set_timesteps(4)
    assert (tm.student_levels(4, 3.0) - scheduler.sigmas).abs().max() < 1e-3
    state = there = torch.randn(1, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for step, time in enumerate(scheduler.timesteps):
        here, to = scheduler.sigmas[step : step + 2].split(1)
        state = scheduler.step((3 * state).sin(), time, state, return_dict=False)[0]
        there = tm.advance(there, (3 * there).sin(), here, to)
    # Its levels are float32.
    torch.testing.assert_close(state, there, rtol=1e-6, atol=1e-6)


def test_the_shift_has_a_way_back():
    plain = torch.linspace(0, 1, 7, dtype=torch.float64)
    torch.testing.assert_close(tm.shifted(tm.shifted(plain, 3.7), 1 / 3.7), plain, rtol=1e-12, atol=1e-15)


def test_a_draw_depends_on_its_seed_alone():
    levels = tm.student_levels(4, 3.0)
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    whole = tm.draw(SEEDS, SHAPE, levels, 3.0)
    again = tm.draw(SEEDS[3:5], SHAPE, levels, 3.0)
    for name in ("start", "step", "level", "again", "diffused"):
        assert torch.equal(getattr(whole, name)[3:5], getattr(again, name)), name
    assert again.seeds == tuple(SEEDS[3:5])
    assert torch.equal(before[0], torch.random.get_rng_state()) and (before[1] == np.random.get_state()[1]).all()
    assert len({float(row.flatten()[0]) for row in (*whole.start, *whole.again, *whole.diffused)}) == 18


@pytest.mark.parametrize("whole", [False, True], ids=["stretch", "whole"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_levels_are_drawn_in_the_stretch_of_their_step(shift, whole):
    levels = tm.student_levels(4, shift)
    drawn = tm.draw(range(4000), (), levels, shift, whole)
    plain = tm.shifted(drawn.level.double(), 1 / shift)
    for step, (high, low) in enumerate([(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]):
        mine = plain[drawn.step == step]
        # Four standard errors of a binomial of 4000 draws at 1/4.
        assert abs(len(mine) - 1000) < 4 * math.sqrt(750)
        low, high = max(low, 0.02), (1.0 if whole else high) - 0.01
        assert low - 1e-6 <= mine.min() < low + 0.01 * (high - low) + 0.005
        assert high + 1e-6 >= mine.max() > high - 0.02 * (high - low)
        # Uniform: standard error of the mean, times four.
        assert abs(mine.mean() - (low + high) / 2) < 4 * (high - low) / math.sqrt(12 * len(mine))
        assert (drawn.level[drawn.step == step] >= levels[step + 1]).all()


def test_a_stretch_that_is_nothing_but_its_margins_is_a_point():
    levels = torch.tensor([1.0, 0.015, 0.0])
    level = tm.draw(range(40), (), levels).level
    assert set((level[level < 0.03] * 1000).round().int().tolist()) == {20}


# ---------------------------------------------------------------------- the student's way


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_every_row_takes_its_own_steps(keep):
    levels = tm.student_levels(4, 3.0)
    velocity, _ = gaussian(0.4, 0.3)
    drawn = tm.draw(SEEDS, SHAPE, levels, 3.0)
    asked: list[int] = []

    def student(state: Tensor, level: Tensor, rows: Tensor) -> Tensor:
        assert not torch.is_grad_enabled() and len(state) == len(level) == len(rows)
        asked.extend(rows.tolist())
        return velocity(state, level)

    found = tm.rollout(student, drawn, levels, keep)
    assert sorted(asked) == sorted(row for row, step in enumerate(drawn.step.tolist()) for _ in range(step))
    assert drawn.step.min() == 0 and torch.equal(found[drawn.step == 0], drawn.start[drawn.step == 0])
    for row in range(len(SEEDS)):
        one = tm.draw(SEEDS[row : row + 1], SHAPE, levels, 3.0)
        assert torch.equal(tm.rollout(student, one, levels, keep)[0], found[row])
        if keep == 1:
            state = drawn.start[row : row + 1]
            for step in range(int(drawn.step[row])):
                here = levels[step].expand(1)
                state = state + (levels[step + 1] - levels[step]) * velocity(state, here)
            torch.testing.assert_close(found[row : row + 1], state)


def test_each_step_draws_new_noise_of_its_own():
    levels = torch.tensor([1.0, 0.7, 0.4, 0.2, 0.0])
    drawn = tm.draw([3, 4], (4000,), levels)._replace(step=torch.tensor([3, 3]))
    met = []

    def student(state: Tensor, level: Tensor, rows: Tensor) -> Tensor:
        met.append(state / level[:, None])
        # It says that there is nothing but noise: a state is then the level times what was drawn last.
        return state / level[:, None]

    met.append(tm.rollout(student, drawn, levels, 0.0) / 0.2)
    noises = torch.cat(met)
    # 4000 independent pairs: the standard deviation of a correlation is 0.016.
    assert (torch.corrcoef(noises) - torch.eye(8)).abs().max() < 0.08
    assert torch.equal(met[0], drawn.start)


def test_a_step_that_keeps_its_noise_is_an_euler_step_and_one_that_does_not_is_drawn_anew():
    state, velocity, fresh = (torch.randn(2, 3, dtype=torch.float64) for _ in range(3))
    here, there = torch.tensor([0.9, 0.5]), torch.tensor([0.6, 0.0])
    euler = tm.advance(state, velocity, here, there)
    torch.testing.assert_close(euler, state + (there - here)[:, None] * velocity)
    almost = tm.advance(state, velocity, here, there, fresh, 1 - 1e-14)
    torch.testing.assert_close(almost, euler, rtol=1e-6, atol=1e-6)
    new = tm.advance(state, velocity, here, there, fresh, 0.0)
    torch.testing.assert_close(new, (1 - there)[:, None] * tm.clean(state, velocity, here) + there[:, None] * fresh)


def test_diffused_states_are_distributed_as_at_the_higher_level():
    mean, std, count = 0.7, 0.4, 200_000
    draw = torch.Generator().manual_seed(0)
    sample, first, second = (torch.randn(count, generator=draw) for _ in range(3))
    here, there = torch.tensor([0.3]), torch.tensor([0.8])
    state = 0.7 * (mean + std * sample) + 0.3 * first
    found = tm.diffuse(state[None], here, there, second[None])
    variance = (0.2 * std) ** 2 + 0.8**2
    # Four standard errors.
    assert abs(found.mean() - 0.2 * mean) < 4 * math.sqrt(variance / count)
    assert abs(found.var() - variance) < 4 * variance * math.sqrt(2 / count)
    torch.testing.assert_close(tm.diffuse(state[None], here, here, second[None]), state[None])


# ---------------------------------------------------------------------- what is learned


def made(keep: float = 1.0):
    """A batch of a student whose velocity has a gradient, in float64."""
    levels = tm.student_levels(4, 3.0).double()
    drawn = tm.draw(SEEDS, SHAPE, levels, 3.0)
    drawn = drawn._replace(**{n: getattr(drawn, n).double() for n in ("start", "level", "again", "diffused")})
    velocity, _ = gaussian(0.1, 0.6)
    state = tm.rollout(lambda s, level, rows: velocity(s, level), drawn, levels, keep)
    guess = velocity(state, levels[drawn.step]).requires_grad_()
    return tm.reach(state, guess, drawn, levels, keep), guess, drawn, levels, state


@pytest.mark.parametrize("keep", [1.0, 0.9])
def test_what_a_step_reaches_is_a_plain_formulation(keep):
    reached, guess, drawn, levels, state = made(keep)
    for row, step in enumerate(drawn.step.tolist()):
        here, there, level = levels[step], levels[step + 1], drawn.level[row]
        sample = state[row] - here * guess[row]
        noise = keep * (state[row] + (1 - here) * guess[row]) + math.sqrt(1 - keep**2) * drawn.again[row]
        arrived = (1 - there) * sample + there * noise
        share = (1 - level) / (1 - there)
        diffused = share * arrived + (level**2 - share**2 * there**2).sqrt() * drawn.diffused[row]
        torch.testing.assert_close(reached.sample[row], sample)
        torch.testing.assert_close(reached.state[row], diffused)
    assert reached.sample.requires_grad and not reached.state.requires_grad


def test_the_gradient_is_that_of_the_divergence_of_two_normal_distributions():
    reached, guess, drawn, levels, _ = made()
    (taught, told), (faked, said) = gaussian(0.8, 0.3), gaussian(0.2, 0.5)
    teacher, fake = taught(reached.state, reached.level), faked(reached.state, reached.level)
    found = tm.matching_gradient(reached, teacher, fake)
    # The gradient of the divergence at a state is that of the log of the densities' ratio.
    at = reached.state.clone().requires_grad_()
    (ratio,) = torch.autograd.grad((said(at, reached.level) - told(at, reached.level)).sum(), at)
    level = reached.level.view(-1, 1, 1, 1)
    exact = level**2 / (1 - level) * ratio
    size = (reached.sample - (reached.state - level * teacher)).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (exact / size).detach(), rtol=1e-9, atol=1e-12)
    assert not found.requires_grad

    loss = tm.student_loss(reached, found)
    assert loss.shape == (len(SEEDS),)
    torch.testing.assert_close(loss, 0.5 * found.square().mean((1, 2, 3)))
    (got,) = torch.autograd.grad(loss.sum(), guess)
    here = levels[drawn.step].view(-1, 1, 1, 1)
    # A sample is its state less the level times the velocity.
    torch.testing.assert_close(got, -here * found / found[0].numel())


def test_a_student_that_is_its_teacher_is_not_moved():
    reached, *_ = made()
    velocity, _ = gaussian(0.8, 0.3)
    there = velocity(reached.state, reached.level)
    assert not tm.matching_gradient(reached, there, there).any()
    # Nothing is divided by 0 where even the samples are the same.
    at = reached.level.view(-1, 1, 1, 1)
    same = (reached.state - reached.sample.detach()) / at
    assert torch.isfinite(tm.matching_gradient(reached, same, same + 1)).all()


def test_guidance():
    told, plain = torch.tensor([2.0]), torch.tensor([1.0])
    assert [float(tm.guided(told, plain, scale)) for scale in (0.0, 1.0, 3.0)] == [1.0, 2.0, 4.0]


def test_the_fake_score_of_the_last_step_is_exact_for_normal_samples():
    # Samples of the last step are 0.3 + 0.5 z; of all affine velocities at a level the exact one has the least loss.
    mean, std, level = 0.3, 0.5, 0.4
    draw = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, 1, 400_000, generator=draw, dtype=torch.float64)
    sample = (mean + std * z).requires_grad_()
    at = torch.full((1,), level, dtype=torch.float64)
    state = tm.diffuse(sample.detach(), torch.zeros_like(at), at, noise)
    reached = tm.Reached(sample, state, at)
    slope = torch.tensor([0.0, 0.0], dtype=torch.float64, requires_grad=True)
    # The loss is quadratic: one Newton step is its minimum.
    for _ in range(2):
        loss = tm.fake_loss(reached, slope[0] + slope[1] * state).sum()
        (grad,) = torch.autograd.grad(loss, slope, create_graph=True)
        hessian = torch.stack([torch.autograd.grad(g, slope, retain_graph=True)[0] for g in grad])
        slope = (slope - torch.linalg.solve(hessian, grad)).detach().requires_grad_()
    velocity, _ = gaussian(mean, std)
    wanted = velocity(torch.tensor([[0.0], [1.0]], dtype=torch.float64), at.expand(2))
    exact = torch.stack([wanted[0, 0], wanted[1, 0] - wanted[0, 0]])
    # Six standard errors of a regression with a residual of about 1 over 400 000 samples.
    torch.testing.assert_close(slope.detach(), exact, rtol=0, atol=0.02)
    assert sample.grad is None and torch.autograd.grad(loss, sample, allow_unused=True)[0] is None


CENTRES, SPREAD = torch.tensor([[1.5, 0.0], [-1.5, 0.5]]), 0.2


def mixture(state: Tensor, level: Tensor) -> Tensor:
    """The exact velocity of a mixture of two normal distributions of equal weight."""
    at = level[:, None]
    variance = ((1 - at) * SPREAD) ** 2 + at**2
    away = state[:, None] - (1 - at)[:, :, None] * CENTRES
    share = torch.softmax(-0.5 * away.square().sum(2) / variance, 1)
    centre = CENTRES + ((1 - at) * SPREAD**2 / variance)[:, :, None] * away
    return (state - (share[:, :, None] * centre).sum(1)) / at


class Net(nn.Module):
    """The mixture's velocity, to which something is added that is 0 at first, as a new adapter is."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.body = nn.Sequential(nn.Linear(5, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
        nn.init.zeros_(self.body[-1].weight)
        nn.init.zeros_(self.body[-1].bias)

    def forward(self, state: Tensor, level: Tensor) -> Tensor:
        at = level[:, None]
        return mixture(state, level) + self.body(torch.cat([state, at, at**2, (6 * at).sin()], 1))


def test_a_small_student_of_four_steps_learns_a_mixture():
    levels = tm.student_levels(4, 1.0)
    student, fake = Net(0), Net(0)
    rates = [(student, 1e-3), (fake, 1e-2)]
    optimizers = [torch.optim.Adam(net.parameters(), rate, betas=(0.0, 0.95)) for net, rate in rates]
    count, steps = 128, 300
    for step in range(steps):
        drawn = draws(step, count, levels)
        state = tm.rollout(lambda s, level, rows: student(s, level), drawn, levels)
        reached = tm.reach(state, student(state, levels[drawn.step]), drawn, levels)
        guess = fake(reached.state, reached.level)
        gradient = tm.matching_gradient(reached, mixture(reached.state, reached.level), guess.detach())
        loss = tm.student_loss(reached, gradient) + tm.fake_loss(reached, guess)
        for optimizer, (_, rate) in zip(optimizers, rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
            optimizer.zero_grad()
        loss.mean().backward()
        for optimizer in optimizers:
            optimizer.step()
    start = torch.randn(4000, 2, generator=torch.Generator().manual_seed(9))
    (first, narrow, _), (centre, spread, share) = (clusters(sampled(net, start, levels)) for net in (mixture, student))
    # In four steps the teacher comes short of the centres, and its clusters are a fifth too narrow.
    assert (first.norm(dim=1) < CENTRES.norm(dim=1) - 0.1).all() and (narrow < SPREAD - 0.03).all(), (first, narrow)
    assert (centre - CENTRES).norm(dim=1).max() < 0.17, centre
    assert (spread - SPREAD).abs().max() < 0.03, spread
    assert abs(share - 0.5) < 0.04


def draws(step: int, count: int, levels: Tensor) -> tm.Draw:
    """As `draw`, but of one generator for the batch, which is a hundred times as fast."""
    draw = torch.Generator().manual_seed(step)
    at = torch.randint(len(levels) - 1, (count,), generator=draw)
    low, high = levels[at + 1].clamp(min=0.02), levels[at] - 0.01
    level = low + (high - low) * torch.rand(count, generator=draw)
    start, again, diffused = torch.randn(3, count, 2, generator=draw)
    return tm.Draw(start, at, level, again, diffused, tuple(range(count)))


@torch.no_grad()
def sampled(velocity, start: Tensor, levels: Tensor) -> Tensor:
    """Where a velocity leads in Euler steps."""
    for here, there in itertools.pairwise(levels):
        start = start + (there - here) * velocity(start, here.expand(len(start)))
    return start


def clusters(points: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean and standard deviation (of both axes together) of the points on either side, and the share of the first."""
    sides = [points[points[:, 0] > 0], points[points[:, 0] <= 0]]
    spread = torch.stack([side.var(0).mean().sqrt() for side in sides])
    return torch.stack([side.mean(0) for side in sides]), spread, len(sides[0]) / len(points)


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tm.student_levels(0), "`steps` must be"),
        (lambda: tm.student_levels(4, 0.0), "`shift` must be more than 0, got 0.0"),
        (lambda: tm.student_levels(4, math.inf), "`shift` must be more than 0, got inf"),
        (lambda: tm.draw([1], (2,), torch.tensor([1.0, 0.5, 0.5, 0.0])), "`levels` must fall"),
        (lambda: tm.draw([1], (2,), torch.tensor([1.5, 0.0])), "`levels` must fall"),
        (lambda: tm.draw([1], (2,), torch.tensor([1.0, 0.5])), "`levels` must fall"),
        (lambda: tm.draw([1], (2,), tm.student_levels(2), shift=-1.0), "`shift` must be more than 0, got -1.0"),
        (lambda: step_of(keep=1.1), "`keep` must be from 0 to 1, got 1.1"),
        (lambda: step_of(keep=0.5), "`fresh` must be given where `keep` is less than 1, got none and 0.5"),
        (lambda: noise_of(0.6, 0.5), "`there` must be at least `here`"),
        (lambda: noise_of(1.0, 1.0), "which must be less than 1"),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def step_of(keep: float) -> Tensor:
    state = torch.zeros(1, 2)
    return tm.advance(state, state, torch.ones(1), torch.zeros(1), None, keep)


def noise_of(here: float, there: float) -> Tensor:
    state = torch.zeros(1, 2)
    return tm.diffuse(state, torch.tensor([here]), torch.tensor([there]), state)
