"""The best choice by integer programming, between the Lagrangian's bounds."""

from __future__ import annotations

import ctypes
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.extras import need, needing
from hf_sparse_attn.profiling.budget_problem import MOST_SETS, Found, Ints, Problem, fill, lagrangian

log = logging.getLogger(__name__)

# Sums of floats differ by less than the first share; what integer programming calls best is best to the second.
_ROUNDING, _PROVEN = 1e-12, 1e-9
# HiGHS works to absolute tolerances of 1e-6 or 1e-7: numbers are scaled up to this before.
_MILP_SCALE = 1e4


def exact(problem: Problem, time_limit: float) -> Found:
    """The Lagrangian's choice where its bound proves it; else the best of what the bound leaves, by `milp`.

    Where scipy is missing the Lagrangian's choice counts, and a warning tells how far from the best it may be.
    """
    if problem.number_of_sets > MOST_SETS:
        return milp(problem, time_limit)
    found = lagrangian(problem)
    if found.x is None:
        return milp(problem, time_limit, found)
    if found.damage - found.bound > _tolerance(found):
        if find_spec("scipy") is None:
            log.warning(
                "scipy is not installed: the choice may do up to %.2g %% more damage than the best one, which %s",
                100 * (found.damage / found.bound - 1) if found.bound > 0 else np.inf,
                need("scipy"),
            )
            return found
        found = milp(problem, time_limit, found, _survivors(problem, found))
    proven = found.damage - found.bound <= _PROVEN * abs(found.damage)
    return Found(found.x, found.damage, found.damage, found.multipliers) if proven else found


def _tolerance(found: Found) -> float:
    return _ROUNDING * max(abs(found.damage), abs(found.bound))


def _survivors(problem: Problem, found: Found) -> NDArray[np.bool_]:
    """Candidates that may be in a choice as good as the best known one, [items, candidates].

    What costs more than the gap to the bound, by the bound's own prices, can be in no better choice; nor can it by a
    set of candidates that does.
    """
    values = problem.weighted(found.multipliers)
    by_set = problem.by_set(values)
    excess = by_set - by_set.min(1, keepdims=True)
    gap = found.damage - found.bound + _tolerance(found)
    left = np.zeros(values.shape, bool)
    ends = np.r_[problem.starts[1:], len(values)]
    for b, (first, end) in enumerate(zip(problem.starts, ends, strict=True)):
        for s in np.flatnonzero(excess[b] <= gap):
            own = problem.sets[s]
            part = values[first:end][:, own]
            left[first:end, own] |= excess[b, s] + part - part.min(1, keepdims=True) <= gap
    return left & problem.allowed


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
    with needing("integer programming"):
        from scipy.optimize import Bounds, LinearConstraint
        from scipy.optimize import milp as solve
        from scipy.sparse import coo_array
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
