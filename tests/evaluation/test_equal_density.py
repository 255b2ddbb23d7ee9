"""Turning the knob of every method until its density is the one asked for."""

import math
from functools import lru_cache
from itertools import pairwise

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.bench.patterns import structured
from hf_sparse_attn.evaluation.equal_density import fit_density, mean_density
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.registry import METHODS

TURNABLE = sorted(name for name, cls in METHODS.items() if cls.knob is not None and not cls.reads)


def calls(name, count=2):
    """Attention calls that the method applies to, of an odd length."""
    video = METHODS.get(name).needs & {"bidirectional", "video grid"}
    layout = hsa.TokenLayout.video(7, 13, 11) if video else hsa.TokenLayout.causal(1000)
    ctx = hsa.Context(layout, num_heads=4, num_kv_heads=4, head_dim=16)
    return [Call(q, k, k, ctx) for q, k in (structured(layout.kv_len, 4, 16, seed) for seed in range(count))]


def smallest(name):
    """The method with the parameters of its first example, whose blocks are small."""
    return METHODS.get(name)(**METHODS.get(name).examples()[0])


def sweep(knob, count):
    """Values of a knob from one end to the other."""
    high = min(knob.high, 1000) if knob.integer else knob.high
    steps = [i / (count - 1) for i in range(count)]
    return [knob.low * (high / knob.low) ** s if knob.log else knob.low + (high - knob.low) * s for s in steps]


@lru_cache
def swept(name):
    """Densities of the method from one end of its knob to the other."""
    method, seen = smallest(name), calls(name)
    return [mean_density(method.turned(value), seen) for value in sweep(method.knob, 13)]


def test_every_budgeted_method_has_a_knob():
    assert {"block_topk", "radial", "sliding_window", "vertical_slash"} <= set(TURNABLE)
    assert METHODS.get("dense").knob is None


@pytest.mark.parametrize("name", TURNABLE)
def test_the_density_goes_one_way_with_the_knob(name):
    method, seen = smallest(name), calls(name, 1)
    densities = [mean_density(method.turned(value), seen) for value in sweep(method.knob, 7)]
    down = densities[0] > densities[-1]
    assert abs(densities[0] - densities[-1]) > 0.1
    for a, b in pairwise(densities):
        # Thresholds on real scores may go back by a block.
        assert (a - b if not down else b - a) <= 0.01


@pytest.mark.parametrize("density", [0.25, 0.5])
@pytest.mark.parametrize("name", TURNABLE)
def test_found_density_is_the_one_asked_for(name, density):
    seen = calls(name)
    fit = fit_density(smallest(name), density, seen)
    assert fit.density == pytest.approx(mean_density(fit.method, seen))
    # Whole blocks and tiles of short inputs leave few densities to choose from: none that is tried here is nearer.
    nearest = min(abs(other - density) for other in swept(name))
    assert abs(fit.density - density) <= max(nearest, 0.01 * density)


def test_what_cannot_be_reached_comes_back_as_near_as_it_gets():
    # Thirty verticals and fifty slashes are kept in any case.
    fit = fit_density(hsa.get_method("vertical_slash")(block_size=16), 0.001, calls("vertical_slash", 1))
    assert 0.05 < fit.density < 0.9
    assert fit.method.slash <= 50


def test_verticals_keep_their_proportion():
    turned = hsa.get_method("vertical_slash")(vertical=100, slash=400).turned(40)
    assert (turned.vertical, turned.slash) == (10, 40)


def test_turned_block_topk_leaves_its_number_of_blocks():
    assert hsa.get_method("block_topk")(topk=3).turned(0.5).params() == {
        "block_size": 128, "topk": None, "density": 0.5
    }  # fmt: skip


def test_no_more_tokens_are_tried_than_a_call_holds():
    fit = fit_density(hsa.get_method("sliding_window")(sink=0, block_size=16), 1.0, calls("sliding_window", 1))
    assert (fit.method.window, fit.density) == (1000, 1.0)


@pytest.mark.parametrize("density", [0, 1.5, math.nan])
def test_density_must_be_a_share(density):
    with pytest.raises(ValueError, match="`density`"):
        fit_density(smallest("block_topk"), density, calls("block_topk", 1))


def test_guards():
    with pytest.raises(TypeError, match="'dense' has no parameter that sets its density"):
        fit_density(METHODS.get("dense")(), 0.5, calls("dense", 1))
    with pytest.raises(TypeError, match="'dense' has no parameter"):
        METHODS.get("dense")().turned(0.5)
    with pytest.raises(ValueError, match="`calls` must hold at least one"):
        fit_density(smallest("block_topk"), 0.5, [])
    ctx = hsa.Context(hsa.TokenLayout.bidirectional(64), num_heads=2, num_kv_heads=2, head_dim=8)
    with pytest.raises(hsa.MethodDoesNotApply, match="vertical_slash needs a causal layout"):
        fit_density(smallest("vertical_slash"), 0.5, [Call(*torch.randn(3, 1, 2, 64, 8), ctx)])
