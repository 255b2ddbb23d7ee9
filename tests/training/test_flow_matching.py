"""Flow matching: mixtures, levels and velocities, drawn sample by sample."""

import math

import pytest
import torch

from hf_sparse_attn.training.flow_matching import flow_batch, flow_error, noise_levels, sample_seed

MANY = [sample_seed(3, number) for number in range(4000)]


def test_noisy_latents_minus_the_velocitys_share_are_the_latents():
    latents = torch.randn(5, 3, 2, 7, 9, generator=torch.Generator().manual_seed(0))
    noisy, level, velocity = flow_batch(latents, [11, 12, 13, 14, 15], shift=3.0)
    assert noisy.shape == velocity.shape == latents.shape and level.shape == (5,)
    at = level[:, None, None, None, None]
    # (1 - s) x + s e = x + s (e - x), up to the rounding of three float32 operations.
    torch.testing.assert_close(noisy - at * velocity, latents, atol=2e-6, rtol=0)
    torch.testing.assert_close(noisy + (1 - at) * velocity, velocity + latents, atol=2e-6, rtol=0)


def test_noise_is_normal_and_of_each_seed_its_own():
    latents = torch.zeros(2, 40_000)
    noise = flow_batch(latents, [1, 2]).velocity
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    # 40 000 independent pairs: the correlation's standard deviation is 1 / 200.
    assert abs(torch.corrcoef(noise)[0, 1]) < 0.025


def test_a_sample_does_not_depend_on_the_batch():
    latents = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    whole = flow_batch(latents, [5, 6, 7, 8])
    for row in range(4):
        alone = flow_batch(latents[row : row + 1], [5 + row])
        assert all(torch.equal(one[0], all_[row]) for one, all_ in zip(alone, whole, strict=True))


@pytest.mark.parametrize("shift", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("spread", [0.7, 1.6])
def test_log_odds_are_normal_about_the_shift(shift, spread):
    odds = noise_levels(MANY, shift, spread).double().logit()
    # Standard errors of the mean and of the deviation of 4000 draws, times four.
    assert abs(odds.mean() - math.log(shift)) < 4 * spread / math.sqrt(4000)
    assert abs(odds.std() - spread) < 4 * spread / math.sqrt(8000)


def test_bounds_cut_the_distribution_and_keep_its_proportions():
    free = noise_levels(MANY, 5.0, 1.0)
    for bounds in ((0.0, 0.875), (0.875, 1.0)):
        cut = noise_levels(MANY, 5.0, 1.0, bounds)
        inside = free[(free >= bounds[0]) & (free <= bounds[1])]
        assert cut.min() >= bounds[0] and cut.max() <= bounds[1]
        shares = torch.tensor([0.25, 0.5, 0.75])
        assert (cut.quantile(shares) - inside.quantile(shares)).abs().max() < 0.03


def test_levels_far_in_a_tail_are_finite():
    levels = noise_levels(MANY[:50], 1.0, 0.1, (0.99, 1.0))
    assert torch.isfinite(levels).all() and levels.min() >= 0.99 and levels.max() <= 1.0


def test_low_precision_latents_are_mixed_in_float32():
    latents = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, coarse = flow_batch(latents.float(), [1, 2]), flow_batch(latents, [1, 2])
    assert coarse.noisy.dtype == torch.bfloat16 and coarse.level.dtype == torch.float32
    assert torch.equal(coarse.noisy, exact.noisy.bfloat16()) and torch.equal(coarse.level, exact.level)


def test_flow_error_is_one_mean_for_each_sample():
    velocity = torch.zeros(2, 3, 4)
    guess = torch.stack([torch.full((3, 4), 2.0), torch.full((3, 4), 3.0)]).bfloat16()
    assert flow_error(guess, velocity).tolist() == [4.0, 9.0]


def test_seeds_of_samples_differ():
    assert len(set(MANY)) == len(MANY) and sample_seed(0, 1) != sample_seed(1, 0)


def test_no_samples_are_no_levels():
    assert flow_batch(torch.zeros(0, 3), []).level.shape == (0,)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"seeds": [1]}, "`seeds` must be one for each of 2 samples, got 1"),
        ({"shift": 0.0}, "`shift` must be more than 0"),
        ({"spread": math.inf}, "`spread` must be more than 0"),
        ({"bounds": (0.5, 0.5)}, "`bounds` must be two rising levels"),
        ({"bounds": (-0.1, 0.5)}, "`bounds` must be two rising levels"),
    ],
)
def test_what_cannot_be_is_refused(given, words):
    with pytest.raises(ValueError, match=words):
        flow_batch(torch.zeros(2, 3), **{"seeds": [1, 2], **given})


def test_error_of_other_shapes_is_refused():
    with pytest.raises(ValueError, match="`guess` must have the shape"):
        flow_error(torch.zeros(2, 3), torch.zeros(2, 4))
