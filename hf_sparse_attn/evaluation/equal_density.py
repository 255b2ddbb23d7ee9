"""Methods at equal density: the knob of a method is turned until its patterns keep the share of pairs asked for.

In two parts: fitted on attention calls of a dense run, which cost little, and then corrected by what runs of the
sparse model keep on inputs of their own, for later layers see what earlier ones changed, and other inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from hf_sparse_attn.method import Decline, Method, MethodDoesNotApply
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.selection import check_share

_ROUNDS = 24
# A density this close to the one asked for, as a share of it, ends the search.
_CLOSE = 0.005
# Runs of the model that a correction takes at most.
_RUNS = 7
# Up to this share a density counts as the one that was asked for.
TOLERANCE = 0.02
# Why a density is not the one that was asked for.
END, COARSE, VARIES = "the end of its range", "its steps are coarse", "it differs from input to input"


class Fit(NamedTuple):
    """A method whose knob was turned.

    Args:
        method: the method with the parameter that was found.
        density: mean kept share of the visible pairs, over calls or in runs.
        limit: why that is not the density asked for; "" where it is within TOLERANCE.
        value: of the knob.
    """

    method: Method
    density: float
    limit: str = ""
    value: float = math.nan


@dataclass(frozen=True)
class Dial:
    """What sets a density: the knob of a method, or the budget of a profile.

    Args:
        make: the method at a value.
        low, high: the range of values.
        log, integer: as in Knob.
        rising: whether more is kept at a larger value.
    """

    make: Callable[[float], Method]
    low: float
    high: float
    log: bool = False
    integer: bool = False
    rising: bool = True

    def place(self, value: float) -> float:
        """Where a value is on the scale that is searched."""
        return math.log(value) if self.log else value

    def value(self, place: float) -> float:
        """The value at a place, within the range."""
        value = math.exp(place) if self.log else place
        value = min(self.high, max(self.low, value))
        return float(round(value)) if self.integer else value


class DensityCurve:
    """How the density of a method goes with its knob on some calls; what was tried once is remembered.

    Args:
        method: with its other parameters as wanted.
        calls: as in `mean_density`; those of several layers and inputs make a fit to the model.

    Raises:
        TypeError: the method has no knob.
    """

    def __init__(self, method: Method, calls: Sequence[Call]) -> None:
        knob = method.knob
        if knob is None:
            raise TypeError(f"method {method.name!r} has no parameter that sets its density")
        # No call has a use for more tokens than it holds.
        most = max((call.ctx.layout.kv_len for call in calls), default=1)
        high = min(knob.high, max(knob.low, most)) if knob.integer else knob.high
        self.calls = calls
        self.known: dict[float, Fit] = {}
        self.dial = Dial(method.turned, float(knob.low), float(high), knob.log, knob.integer)
        self.dial = replace(self.dial, rising=self.at(self.dial.high).density >= self.at(self.dial.low).density)

    def at(self, value: float) -> Fit:
        """The method with its knob at a value."""
        if value not in self.known:
            turned = self.dial.make(value)
            self.known[value] = Fit(turned, mean_density(turned, self.calls), value=value)
        return self.known[value]

    def nearest(self, density: float) -> float:
        """The value at which the density is nearest to the one asked for."""
        dial = self.dial
        low, high = dial.low, dial.high
        tried = [low, high]
        for _ in range(_ROUNDS):
            best = min(tried, key=lambda value: abs(self.at(value).density - density))
            if abs(self.at(best).density - density) <= _CLOSE * density or (dial.integer and high - low <= 1):
                break
            middle = dial.value((dial.place(low) + dial.place(high)) / 2)
            tried.append(middle)
            if (self.at(middle).density < density) == dial.rising:
                low = middle
            else:
                high = middle
        return min(tried, key=lambda value: abs(self.at(value).density - density))


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
    curve = DensityCurve(method, calls)
    return curve.at(curve.nearest(density))


def correct_density(
    dial: Dial, start: float, density: float, measure: Callable[[Method], float], step: Callable[[float], float]
) -> Fit:
    """Turns a dial until runs keep the density asked for, by at most seven runs.

    The first correction goes by `step`, those after it by what the runs kept.

    Args:
        dial: what is turned.
        start: value to begin with.
        density: kept share of the visible pairs, in (0, 1].
        measure: runs the model with a method and gives what was kept.
        step: the value at which a density is to be expected, by what is known without a run.

    Returns:
        the nearest of what was run, with what was kept and what hindered.
    """
    check_share("density", density)
    tried: dict[float, Fit] = {}
    kept_by: dict[Method, float] = {}
    value, aimed, limit = dial.value(dial.place(start)), density, COARSE
    for _ in range(_RUNS):
        method = dial.make(value)
        # Values that round to one method need no further run.
        if method not in kept_by:
            kept_by[method] = measure(method)
        kept = kept_by[method]
        tried[value] = Fit(method, kept, value=value)
        if abs(kept - density) <= _CLOSE * density:
            break
        if min(kept_by.values()) < density <= max(kept_by.values()):
            value = _between(dial, tried, density)
        else:
            aimed = min(1.0, aimed * density / kept) if kept else 1.0
            value = dial.value(dial.place(step(aimed))) if len(kept_by) == 1 else _along(dial, tried, density)
            if value in tried:
                value = _beyond(dial, list(tried), kept < density)
                limit = END if value in tried else COARSE
        if value in tried:
            break
    best = min(tried.values(), key=lambda fit: abs(fit.density - density))
    return best if is_near(best.density, density) else best._replace(limit=limit)


def is_near(density: float, wanted: float) -> bool:
    """Whether a density counts as the one that was asked for."""
    return abs(density - wanted) <= TOLERANCE * wanted


def _between(dial: Dial, tried: dict[float, Fit], density: float) -> float:
    """A value between the nearest that kept less and the nearest that kept more; one of `tried` if there is none."""
    low = max((v for v in tried if tried[v].density < density), key=lambda v: tried[v].density)
    high = min((v for v in tried if tried[v].density >= density), key=lambda v: tried[v].density)
    less, more = max(tried[low].density, 1e-9), tried[high].density
    # A curve that jumps is halved in the end.
    part = min(0.85, max(0.15, math.log(density / less) / math.log(more / less)))
    value = dial.value(dial.place(low) + part * (dial.place(high) - dial.place(low)))
    if dial.integer and value in tried and abs(high - low) > 1:
        value = low + math.copysign(1, high - low) if value == low else high + math.copysign(1, low - high)
    return value


def _along(dial: Dial, tried: dict[float, Fit], density: float) -> float:
    """A value on the line through the two nearest, at most half of the range away."""
    near, far = sorted(tried, key=lambda v: abs(tried[v].density - density))[:2]
    a, b = (max(tried[v].density, 1e-9) for v in (near, far))
    if a == b:
        return near
    half = abs(dial.place(dial.high) - dial.place(dial.low)) / 2
    move = (dial.place(near) - dial.place(far)) * math.log(density / a) / math.log(a / b)
    return dial.value(dial.place(near) + min(half, max(-half, move)))


def _beyond(dial: Dial, tried: Sequence[float], more: bool) -> float:
    """A value beyond all that were tried, a tenth of the range further where more, or less, is kept."""
    up = more == dial.rising
    width = (dial.place(dial.high) - dial.place(dial.low)) / 10
    last = max(tried) if up else min(tried)
    value = dial.value(dial.place(last) + (width if up else -width))
    if dial.integer and value == last:
        value = min(dial.high, max(dial.low, last + (1 if up else -1)))
    return value
