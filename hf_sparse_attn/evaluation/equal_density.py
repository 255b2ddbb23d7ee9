"""Methods at equal density: the knob of a method is turned until its patterns keep the share of pairs asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from hf_sparse_attn.method import Decline, Method, MethodDoesNotApply
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.selection import check_share

_ROUNDS = 24
# A density this close to the one asked for, as a share of it, ends the search.
_CLOSE = 0.005


class Fit(NamedTuple):
    """A method whose knob was turned.

    Args:
        method: the method with the parameter that was found.
        density: mean kept share of the visible pairs over the calls.
    """

    method: Method
    density: float


def mean_density(method: Method, calls: Sequence[Call]) -> float:
    """Mean kept share of the visible pairs of tokens, over calls and heads.

    Args:
        method: makes one pattern per call; extra branches are not counted.
        calls: attention calls; their values are not looked at.

    Raises:
        ValueError: no call is given.
        MethodDoesNotApply: the method declines a call.
    """
    if not calls:
        raise ValueError("`calls` must hold at least one attention call, got none")
    found = []
    for q, k, _, ctx in calls:
        pattern = method.pattern_for(q, k, ctx)
        if isinstance(pattern, Decline):
            raise MethodDoesNotApply(f"`method` {method.name!r} does not apply: {pattern.reason}")
        found.append(pattern.density(ctx.layout.density_count))
    return sum(found) / len(found)


def fit_density(method: Method, density: float, calls: Sequence[Call]) -> Fit:
    """Turns the knob of a method until its mean density over some calls is nearest to `density`.

    The search halves the range of the knob, which the density goes up or down with, at most 24 times. Where a method
    cannot keep as few or as many keys as asked for, the nearest it can do comes back: look at the density of the
    answer.

    Args:
        method: with its other parameters as wanted.
        density: kept share of the visible pairs, in (0, 1].
        calls: as in `mean_density`; those of several layers and inputs make the fit a fit to the model.

    Raises:
        TypeError: the method has no knob.
        ValueError, MethodDoesNotApply: as `mean_density`, or `density` out of range.
    """
    check_share("density", density)
    knob = method.knob
    if knob is None:
        raise TypeError(f"method {method.name!r} has no parameter that sets its density")
    # No call has a use for more tokens than it holds.
    most = max((call.ctx.layout.kv_len for call in calls), default=1)
    high = min(knob.high, max(knob.low, most)) if knob.integer else knob.high

    def at(value: float) -> Fit:
        turned = method.turned(value)
        return Fit(turned, mean_density(turned, calls))

    def middle(a: float, b: float) -> float:
        return math.sqrt(a * b) if knob.log else (a + b) / 2

    low_value, high_value = float(knob.low), float(high)
    ends = at(low_value), at(high_value)
    best = min(ends, key=lambda fit: abs(fit.density - density))
    rising = ends[1].density >= ends[0].density
    for _ in range(_ROUNDS):
        if abs(best.density - density) <= _CLOSE * density:
            break
        if knob.integer and high_value - low_value <= 1:
            break
        value = middle(low_value, high_value)
        fit = at(value)
        best = min(best, fit, key=lambda fit: abs(fit.density - density))
        if (fit.density < density) == rising:
            low_value = value
        else:
            high_value = value
    return best
