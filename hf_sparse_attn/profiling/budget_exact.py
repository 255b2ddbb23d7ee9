"""The budgeted choice solved exactly: dynamic programming between bounds, else integer programming."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.profiling.budget_problem import MOST_SETS, Floats, Found, Ints, Problem, fill, lagrangian

log = logging.getLogger(__name__)

# Partial choices kept: in the quick search that only improves the known damage, and in the proof.
_BEAM = 2_000
_MOST_STATES = 300_000
_ROUNDING = 1e-12
# HiGHS works to absolute tolerances of 1e-6 or 1e-7: numbers are scaled up to this before.
_MILP_SCALE = 1e4


class _Exploded(Exception):
    """More partial choices than are worth keeping."""


class _States(NamedTuple):
    cost: Floats
    damage: Floats
    # For each block passed: which state it came from, and the choices of the block's items.
    trail: list[tuple[Ints, NDArray[np.int16]]]


def exact(problem: Problem, time_limit: float) -> Found:
    """The best choice, proven: bound and damage are equal (unless integer programming is needed and out of time).

    1. The Lagrangian gives a choice and a lower bound; the gap between them is all that is left to win.
    2. What costs more than the gap by the bound's own prices can be in no better choice: such candidates, and such
       sets of candidates of a block, are dropped. Most items are settled here.
    3. The others one after the other: partial choices (cost, damage), less those another one beats in both (one
       budget), those that cannot be completed within the budgets, and those that no completion brings under the best
       known damage, by the bounds at several multipliers. First with few partial choices, which improves the best
       known, then with all.
    4. Where there are too many partial choices, `milp` decides among the candidates that are left.
    """
    if problem.number_of_sets > MOST_SETS:
        return milp(problem, time_limit)
    found = lagrangian(problem)
    if found.x is None:
        return milp(problem, time_limit, found)
    for most in (_BEAM, _MOST_STATES):
        if found.damage - found.bound <= _ROUNDING * abs(found.damage):
            return Found(found.x, found.damage, found.damage, found.multipliers)
        try:
            found = _search(problem, found, most, beam=most == _BEAM)
        except _Exploded:
            return milp(problem, time_limit, found, _survivors(problem, found))
    return found


def _tolerance(found: Found) -> float:
    return _ROUNDING * max(abs(found.damage), abs(found.bound))


def _excess(problem: Problem, multipliers: Floats) -> tuple[Floats, Floats]:
    """By how much a set is worse than the block's best [blocks, sets], and the prices [items, candidates]."""
    values = problem.weighted(multipliers)
    by_set = problem.by_set(values)
    return by_set - by_set.min(1, keepdims=True), values


def _survivors(problem: Problem, found: Found) -> NDArray[np.bool_]:
    """Candidates that may be in a choice as good as the best known one, [items, candidates]."""
    excess, values = _excess(problem, found.multipliers)
    gap = found.damage - found.bound + _tolerance(found)
    left = np.zeros(values.shape, bool)
    ends = np.r_[problem.starts[1:], len(values)]
    for b, (first, end) in enumerate(zip(problem.starts, ends, strict=True)):
        for s in np.flatnonzero(excess[b] <= gap):
            own = problem.sets[s]
            part = values[first:end][:, own]
            left[first:end, own] |= excess[b, s] + part - part.min(1, keepdims=True) <= gap
    return left & problem.allowed


def _search(problem: Problem, found: Found, most: int, beam: bool) -> Found:
    """Dynamic programming over the blocks; with `beam` only the most promising partial choices are kept."""
    gap = found.damage - found.bound + _tolerance(found)
    excess, values = _excess(problem, found.multipliers)
    factors = (1.0,) if not found.multipliers.any() else (1.0, 0.0, 0.5, 0.8, 0.95, 1.05, 1.25, 2.0)
    prices = np.array([f * found.multipliers for f in factors])
    priced = [problem.by_set(problem.weighted(p)).min(1) for p in prices]
    cheapest = [problem.by_set(np.where(problem.allowed, c, np.inf)).min(1) for c in problem.cost]
    # Blocks with near-equal alternatives come last, so that there are few states for long.
    left = _survivors(problem, found)
    open_ = np.maximum.reduceat(left.sum(1), problem.starts) > 1
    order = np.argsort(-_second(problem, excess, values), kind="stable")
    order = order[open_[order]]
    # Blocks with one choice left are settled, and counted from the start.
    settled = ~np.repeat(open_, np.diff(np.r_[problem.starts, len(values)]))
    x = left.argmax(1)
    spent = problem.cost[:, np.arange(len(x)), x][:, settled].sum(1)
    harm = problem.damage[np.arange(len(x)), x][settled].sum()
    rest = np.array([_after(p, order) for p in priced])
    least = np.array([_after(c, order) for c in cheapest])
    ends = np.r_[problem.starts[1:], len(values)]
    states = _States(spent[:, None], np.array([harm]), [])
    for at, b in enumerate(order):
        grown: list[tuple[Floats, Floats, Ints, NDArray[np.int16]]] = []
        for s in np.flatnonzero(excess[b] <= gap):
            own = problem.sets[s]
            cost, damage = states.cost, states.damage
            came = np.arange(len(damage))
            picks = np.zeros((len(damage), 0), np.int16)
            spare = gap - excess[b, s]
            items = range(int(problem.starts[b]), int(ends[b]))
            for u in items:
                part = values[u, own]
                kept = own[(part - part.min() <= spare) & problem.allowed[u, own]]
                cost = (cost[:, :, None] + problem.cost[:, u, kept][:, None]).reshape(len(cost), -1)
                damage = (damage[:, None] + problem.damage[u, kept]).ravel()
                came = np.repeat(came, len(kept))
                picks = np.concatenate(
                    [np.repeat(picks, len(kept), 0), np.tile(kept, len(picks)).astype(np.int16)[:, None]], 1
                )
                if len(kept) > 1 or u == items[-1]:
                    # What the block's other items add at least counts too, when they use this set.
                    after = problem.damage[u + 1 : ends[b], own]
                    spent = problem.cost[:, u + 1 : ends[b]][:, :, own]
                    low = (after + np.tensordot(prices, spent, 1)).min(2, initial=np.inf).sum(1)
                    bounds = damage + prices @ cost - (prices @ problem.limit)[:, None]
                    bounds += (rest[:, at + 1] + low)[:, None]
                    good = (bounds <= found.damage + _tolerance(found)).all(0)
                    good &= (cost + least[:, at + 1, None] <= problem.limit[:, None]).all(0)
                    good = np.flatnonzero(good)
                    good = good[_undominated(cost[:, good], damage[good])]
                    if len(good) > most:
                        if not beam:
                            raise _Exploded
                        good = np.sort(good[np.argsort(bounds[0, good], kind="stable")[:most]])
                    cost, damage, came, picks = cost[:, good], damage[good], came[good], picks[good]
            grown.append((cost, damage, came, picks))
        if not grown or not any(len(g[1]) for g in grown):
            return found if beam else Found(found.x, found.damage, found.damage, found.multipliers)
        cost, damage = np.concatenate([g[0] for g in grown], 1), np.concatenate([g[1] for g in grown])
        came, picks = np.concatenate([g[2] for g in grown]), np.concatenate([g[3] for g in grown])
        good = _undominated(cost, damage)
        if len(good) > most:
            if not beam:
                raise _Exploded
            good = np.sort(good[np.argsort(damage[good] + prices[0] @ cost[:, good], kind="stable")[:most]])
        states = _States(cost[:, good], damage[good], [*states.trail, (came[good], picks[good])])
    return _best_of(problem, found, states, order, x, beam)


def _best_of(problem: Problem, found: Found, states: _States, order: Ints, settled: Ints, beam: bool) -> Found:
    """The least damage among whole choices and the one known; near-equal ones: the cheaper."""
    assert found.x is not None
    known = problem.total_cost[np.arange(len(found.x)), found.x].sum()
    tolerance = _tolerance(found)
    # Where all blocks are settled nothing has asked yet whether that is within the budgets.
    fits = (states.cost <= problem.limit[:, None]).all(0)
    total = np.where(fits, (states.cost / problem.unit[:, None]).sum(0), np.inf)
    least = np.where(fits, states.damage, np.inf).min()
    at = int(np.where(states.damage <= least + tolerance, total, np.inf).argmin())
    x, damage = found.x, found.damage
    if not fits.any():
        return Found(x, damage, found.bound if beam else damage, found.multipliers)
    if states.damage[at] < damage - tolerance or (states.damage[at] <= damage + tolerance and total[at] < known):
        x = settled.copy()
        ends = np.r_[problem.starts[1:], len(x)]
        for b, (came, picks) in zip(order[::-1], states.trail[::-1], strict=True):
            x[problem.starts[b] : ends[b]] = picks[at]
            at = int(came[at])
        damage = problem.damage_of(x)
    return Found(x, damage, found.bound if beam else damage, found.multipliers)


def _second(problem: Problem, excess: Floats, values: Floats) -> Floats:
    """How much worse a block's second best choice is."""
    if problem.number_of_sets > 1:
        return np.partition(excess, 1, 1)[:, 1]
    if values.shape[1] == 1:
        return np.zeros(len(problem.starts))
    two = np.partition(values, 1, 1)
    return np.minimum.reduceat(two[:, 1] - two[:, 0], problem.starts)


def _after(values: Floats, order: Ints) -> Floats:
    """Sums of what comes at each place of the order and later, [blocks + 1]."""
    return np.r_[np.cumsum(values[order][::-1])[::-1], 0.0]


def _undominated(cost: Floats, damage: Floats) -> Ints:
    """States that no other one beats in cost and damage, ascending; where there are several budgets, distinct ones."""
    if len(cost) > 1:
        return np.sort(np.unique(np.stack([damage, *cost]), axis=1, return_index=True)[1])
    order = np.lexsort((damage, cost[0]))
    sorted_ = damage[order]
    before = np.r_[np.inf, np.minimum.accumulate(sorted_)][:-1]
    return np.sort(order[sorted_ < before])


def milp(
    problem: Problem, time_limit: float, known: Found | None = None, left: NDArray[np.bool_] | None = None
) -> Found:
    """The best choice by `scipy.optimize.milp` (HiGHS) with no gap allowed, to the solver's own tolerances.

    Args:
        problem: what to solve.
        time_limit: seconds, after which the best choice found counts, with the bound proven so far.
        known: a choice within the budgets, returned where the solver finds none that is better.
        left: candidates to choose from; None means all that are allowed.

    Raises:
        MissingExtra: scipy is not installed.
        TimeoutError: nothing was found in time, and there are too many sets of candidates for the Lagrangian.
    """
    try:
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.optimize import milp as solve
        from scipy.sparse import coo_array
    except ImportError as error:
        raise MissingExtra("integer programming", "scipy", "report") from error
    left = problem.allowed if left is None else left
    item, candidate = np.nonzero(left)
    n, items = len(item), len(problem.damage)
    block = np.repeat(np.arange(len(problem.starts)), np.diff(np.r_[problem.starts, items]))
    limited = problem.most is not None and problem.number_of_sets > 1
    # A variable per candidate of a block too, whether any of its items uses it.
    pairs, which = np.unique(np.stack([block[item], candidate]), axis=1, return_inverse=True)
    extra = pairs.shape[1] if limited else 0
    ones = np.ones(n)
    rows = [LinearConstraint(coo_array((ones, (item, np.arange(n))), shape=(items, n + extra)), 1, 1)]
    cost = problem.cost[:, item, candidate]
    size = problem.unit / _MILP_SCALE
    if limited:
        links = np.r_[np.arange(n), np.arange(n)], np.r_[np.arange(n), n + which.ravel()]
        rows.append(LinearConstraint(coo_array((np.r_[ones, -ones], links), shape=(n, n + extra)), ub=0))
        count = coo_array((np.ones(extra), (pairs[0], n + np.arange(extra))), shape=(len(problem.starts), n + extra))
        rows.append(LinearConstraint(count, ub=problem.most))
    damage = problem.damage[item, candidate]
    base = np.full(items, np.inf)
    np.minimum.at(base, item, damage)
    more = damage - base[item]
    scale = _MILP_SCALE / (more.max() or 1.0)
    objective = np.r_[more * scale, np.zeros(extra)]
    rounds, limit = 4, problem.limit
    bound = float(base.sum()) if known is None else known.bound
    best = known if known is not None and known.x is not None else None
    multipliers = np.zeros(len(problem.budget)) if known is None else known.multipliers
    for _ in range(rounds):
        spending = np.concatenate([cost / size[:, None], np.zeros((len(cost), extra))], 1)
        constraints = [*rows, LinearConstraint(spending, ub=limit / size)]
        options = {"mip_rel_gap": 0.0, "time_limit": time_limit}
        whole = np.ones(n + extra)
        with _stdout_to_stderr():
            done = solve(objective, integrality=whole, bounds=Bounds(0, 1), constraints=constraints, options=options)
        if done.status == 1:
            log.warning("integer programming ended after %g s: the choice may not be the best one", time_limit)
        if done.x is None:
            break
        if limit is problem.limit and done.mip_dual_bound is not None:
            bound = max(bound, float(base.sum() + done.mip_dual_bound / scale))
        x = np.zeros(items, np.int64)
        chosen = done.x[:n] > 0.5
        x[item[chosen]] = candidate[chosen]
        if problem.fits(x):
            x = _settled_ties(problem, x)
            value = problem.damage_of(x)
            if best is None or value < best.damage:
                best = Found(x, value, value, multipliers)
            break
        # Within the solver's tolerance but not within the budget: once more with so much less to spend.
        limit = limit - 2 * np.maximum(problem.cost_of(x) - problem.limit, 0)
    if best is None and done.status == 1:
        if problem.number_of_sets > MOST_SETS:
            raise TimeoutError(f"`time_limit` must let a choice be found, got {time_limit:g} s")
        best = lagrangian(problem)
    if best is None or best.x is None:
        return Found(None, np.inf, bound, multipliers)
    return Found(best.x, best.damage, min(bound, best.damage), multipliers)


def _settled_ties(problem: Problem, x: Ints) -> Ints:
    """As good a choice, of candidates that tie the cheaper ones, then the earlier."""
    x = fill(problem, x)
    if problem.number_of_sets == 1:
        at = np.arange(len(x))
        alike = (problem.damage == problem.damage[at, x][:, None]) & (
            problem.cost == problem.cost[:, at, x][:, :, None]
        ).all(0)
        x = alike.argmax(1)
    return x


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """HiGHS leaves debugging lines on the process's standard output, which may be a document for a program."""
    sys.stdout.flush()
    try:
        libc = ctypes.CDLL(None)
        kept = os.dup(1)
    except (OSError, TypeError):
        # No such library, as on Windows, or no standard output at all.
        yield
        return
    try:
        libc.fflush(None)
        os.dup2(2, 1)
        yield
    finally:
        libc.fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
