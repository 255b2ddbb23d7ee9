"""Spending a budget: which candidate every head gets, so that the total predicted damage is least."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.profiling.budget_milp import exact, milp
from hf_sparse_attn.profiling.budget_problem import MOST_SETS, Floats, Found, Problem, lagrangian

SOLVERS: dict[str, Callable[[Problem, float], Found]] = {"exact": exact, "milp": milp, "lagrangian": lagrangian}


class BudgetError(ValueError):
    """The budget cannot be met.

    Args:
        message: what was asked for and what is possible.
        least: the least possible mean cost per unit; for several lengths, of each length by itself.
    """

    def __init__(self, message: str, least: tuple[float, ...]) -> None:
        super().__init__(message)
        self.least = least


class Choice(NamedTuple):
    """One candidate for every unit.

    Args:
        candidate: int [units].
        cost: mean cost per unit (for several lengths, the mean over them).
        damage: summed over the units.
        bound: no choice within the budget does less damage than this.
    """

    candidate: NDArray[np.int64]
    cost: float
    damage: float
    bound: float


def choose(
    damage: ArrayLike,
    cost: ArrayLike,
    budget: float,
    *,
    solver: str = "exact",
    layers: ArrayLike | None = None,
    max_plans_per_layer: int | None = None,
    groups: ArrayLike | None = None,
    floor: ArrayLike | None = None,
    time_limit: float = 60.0,
) -> Choice:
    """The candidate of every unit with the least total damage at a mean cost within the budget.

    A unit is a head, or a key/value group. This is the multiple-choice knapsack. The result depends on nothing but
    the arguments; a candidate that does as much damage as another one is taken only where it is cheaper, or as cheap
    and earlier. Sums are of floats, so a budget counts as met when it is to one part in 1e9.

    Args:
        damage: [units, candidates], 0 or more; infinite where a candidate is not allowed. Candidate 0 is dense.
        cost: [units, candidates], 0 or more, in the unit of `budget`; infinite where a candidate is not allowed.
        budget: largest mean cost per unit.
        solver: "exact": the Lagrangian's choice where its bound proves it, else integer programming among what the
            bound leaves (without scipy the Lagrangian's choice, and a warning that says how good it is); "milp":
            scipy's integer programming (HiGHS) alone, exact to its own tolerances; "lagrangian": the best multiplier
            and greedy repair, fast, with a bound that tells how good it is.
        layers: int [units], the layer of each unit; needed for `max_plans_per_layer`.
        max_plans_per_layer: largest number of distinct candidates in one layer, dense counted; for "lagrangian" the
            multiplier prices whole sets of candidates, and the greedy steps keep within the limit.
        groups: int [units]; units with the same number get the same candidate.
        floor: largest damage allowed for a unit, a number or [units]; a unit with no sparse candidate within it is
            dense. Dense itself is always allowed.
        time_limit: seconds that integer programming may take; a choice that is not proven by then is logged as a
            warning, and its `bound` is below its damage.

    Raises:
        BudgetError: the budget cannot be met; the message names the least possible mean cost.
        ValueError: wrong shapes or values, a unit without any allowed candidate, an unknown solver.
        MissingExtra: the solver needs scipy, which is not installed.
        TimeoutError: integer programming found nothing in time.
    """
    harm, price = _tables(damage, cost, ("units", "candidates"))
    limits = None if floor is None else np.asarray(floor, np.float64)[None]
    given = harm[None], price[None], [budget], "budget"
    return _choose(*given, solver, layers, max_plans_per_layer, groups, limits, time_limit)


def choose_elastic(
    damage: ArrayLike, cost: ArrayLike, budgets: ArrayLike, *, floor: ArrayLike | None = None, **options: Any
) -> Choice:
    """One choice for several lengths, within each length's budget (MoA's elastic rule, arXiv 2406.14909).

    What is least is the sum of the damages over the lengths, each length's divided by its mean over all units and
    allowed candidates, so that lengths weigh alike; `Choice.damage` is that sum times the mean over everything,
    divided by the number of lengths, so that it is in the unit of `damage`, and for one length this is `choose`.
    (MoA keeps a vector of losses, draws the front by fixing bounds on all lengths but one, and picks by validation
    loss; the sum gives one point of that front, without a validation run. MoA also asks for 0.9 of the budget to be
    spent; here less is spent where more does no good.)

    Args:
        damage, cost: [lengths, units, candidates]; a candidate is allowed where it is finite at every length.
        budgets: [lengths], largest mean cost per unit at each length.
        floor: largest damage allowed for a unit at any length: a number, [lengths, 1] or [lengths, units].
        options: solver, layers, max_plans_per_layer, groups, time_limit: as in `choose`.

    Raises:
        BudgetError, ValueError, MissingExtra: as in `choose`.
    """
    harm, price = _tables(damage, cost, ("lengths", "units", "candidates"))
    limits = np.atleast_1d(np.asarray(budgets, np.float64))
    if limits.shape != harm.shape[:1]:
        raise ValueError(f"`budgets` must be [{len(harm)}], one for each length, got shape {list(limits.shape)}")
    return _choose(harm, price, limits, "budgets", floor=None if floor is None else np.asarray(floor), **options)


def pareto(
    damage: ArrayLike, cost: ArrayLike, points: int = 20, *, solver: str = "lagrangian", **options: Any
) -> list[tuple[float, float]]:
    """What a budget buys: (mean cost per unit, total damage), none beaten in both, by ascending cost.

    Budgets are spaced by equal factors where the range allows it, from the least possible to that of no damage that
    could be saved; each is solved, so that between two corners of the convex hull (the choices that a multiplier
    alone can find) the rest of the budget is spent too.

    Args:
        damage, cost: as in `choose`.
        points: budgets that are tried, at least 2; equal results are listed once.
        solver, options: as in `choose`.

    Raises:
        ValueError, MissingExtra: as in `choose`.
    """
    if isinstance(points, bool) or not isinstance(points, (int, np.integer)) or points < 2:
        raise ValueError(f"`points` must be an int of at least 2, got {points!r}")
    best = choose(damage, cost, math.inf, solver=solver, **options)
    try:
        low = choose(damage, cost, 0.0, solver=solver, **options).cost
    except BudgetError as error:
        low = error.least[0]
    spaced = np.geomspace(low, best.cost, points) if low > 0 else np.linspace(low, best.cost, points)
    found = [choose(damage, cost, float(b), solver=solver, **options) for b in spaced[:-1]]
    front: list[tuple[float, float]] = []
    for at in sorted((c.cost, c.damage) for c in [*found, best]):
        if not front or at[1] < front[-1][1]:
            front.append(at)
    return front


def _tables(damage: ArrayLike, cost: ArrayLike, axes: tuple[str, ...]) -> list[Floats]:
    tables = [np.asarray(damage, np.float64), np.asarray(cost, np.float64)]
    for name, values in zip(("damage", "cost"), tables, strict=True):
        if values.ndim != len(axes):
            raise ValueError(f"`{name}` must be [{', '.join(axes)}], got shape {list(values.shape)}")
    return tables


def _choose(
    damage: Floats,
    cost: Floats,
    budgets: ArrayLike,
    name: str,
    solver: str = "exact",
    layers: ArrayLike | None = None,
    max_plans_per_layer: int | None = None,
    groups: ArrayLike | None = None,
    floor: Floats | None = None,
    time_limit: float = 60.0,
) -> Choice:
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}; got {solver!r}{nearest(solver, SOLVERS)}")
    if not time_limit > 0:
        raise ValueError(f"`time_limit` must be more than 0 seconds, got {time_limit}")
    limits = np.asarray(budgets, np.float64)
    if np.isnan(limits).any() or (limits < 0).any():
        raise ValueError(f"`{name}` must be 0 or more, got {limits.tolist()}")
    allowed = _checked(damage, cost) & _within(damage, floor)
    units = damage.shape[1]
    if not np.any(allowed, 1).all():
        bad = _first(np.any(allowed, 1))
        raise ValueError(f"`damage` must allow a candidate for every unit, got none for {bad}")
    total, same = _one_damage(damage, allowed), _labels("groups", groups, units)
    layer = _labels("layers", layers, units)
    most = _most_plans(max_plans_per_layer, layers)
    # Items: the groups, in the order of their layers and of their first units.
    _, first, item = np.unique(same, return_index=True, return_inverse=True)
    if most is not None and (layer != layer[first][item]).any():
        raise ValueError("`groups` must each lie within one layer where `max_plans_per_layer` is given")
    order = np.lexsort((first, layer[first])) if most is not None else np.argsort(first)
    item = np.argsort(order)[item]
    problem = Problem(
        damage=_summed(np.where(allowed, total, np.inf), item),
        cost=np.stack([_summed(np.where(allowed, c, 0.0), item) for c in cost]),
        # A budget above all costs is as good as infinite, and keeps the sums finite.
        budget=np.minimum(limits * units, 2 * np.where(allowed, cost, 0.0).max(2).sum(1) + 1),
        block=layer[first][order] if most is not None else np.arange(len(first)),
        most=most,
    )
    possible = np.asarray(np.isfinite(problem.damage).any(1))
    if not possible.all():
        bad = _first(possible[item])
        raise ValueError(f"`groups` must leave a candidate that all units of a group allow, got none for {bad}")
    found = _solved(problem, solver, name, limits, units, time_limit)
    assert found.x is not None
    x = found.x[item]
    spent = float(cost[:, np.arange(units), x].mean())
    harm = float(total[np.arange(units), x].sum())
    # Summed in another order the damage differs in its last digit.
    proven = found.bound >= found.damage
    return Choice(x, spent, harm, harm if proven else min(found.bound, harm))


def _solved(problem: Problem, solver: str, name: str, limits: Floats, units: int, time_limit: float) -> Found:
    if problem.number_of_sets <= MOST_SETS:
        if not np.isfinite(problem.by_set(problem.damage)).any(1).all():
            raise ValueError(
                f"`max_plans_per_layer` must leave a candidate for every unit, got {problem.most}: "
                "some layer's units have too few allowed candidates in common"
            )
        least = tuple(problem.least_cost(i)[1] / units for i in range(len(limits)))
        if (np.array(least) * units > problem.limit).any():
            raise BudgetError(f"`{name}` must be at least {_words(least)}, got {_words(limits)}", least)
    elif solver == "lagrangian":
        raise ValueError(
            f"`max_plans_per_layer` must leave at most {MOST_SETS} sets of candidates for solver='lagrangian', "
            f"got {problem.number_of_sets}; solver='milp' lists no sets"
        )
    else:
        least = tuple(float(c.min(1).sum()) / units for c in np.where(problem.allowed, problem.cost, np.inf))
    found = SOLVERS[solver](problem, time_limit)
    if found.x is None and solver == "lagrangian":
        # Several budgets, each of them possible: whether all of them together are takes more than a heuristic.
        found = milp(problem, time_limit)
    if found.x is None:
        raise BudgetError(
            f"`{name}` must be such that one choice meets all limits; got {_words(limits)}, and the least possible "
            f"of each by itself is {_words(least)}",
            least,
        )
    return found


def _checked(damage: Floats, cost: Floats) -> NDArray[np.bool_]:
    """Which candidates are finite at all lengths, [units, candidates]."""
    if damage.shape != cost.shape or not damage.size:
        raise ValueError(
            f"`damage` and `cost` must have one shape, not empty, got {list(damage.shape)} and {list(cost.shape)}"
        )
    for name, values in (("damage", damage), ("cost", cost)):
        if np.isnan(values).any() or (values < 0).any():
            raise ValueError(f"`{name}` must be 0 or more (infinite: not allowed), got {values.min()}")
    allowed: NDArray[np.bool_] = np.asarray((np.isfinite(damage) & np.isfinite(cost)).all(0))
    return allowed


def _within(damage: Floats, floor: Floats | None) -> NDArray[np.bool_]:
    """Which candidates are within the quality floor, [units, candidates]; dense is."""
    if floor is None:
        return np.ones(damage.shape[1:], bool)
    try:
        limit = np.broadcast_to(floor, damage.shape[:2])
    except ValueError:
        units = list(damage.shape[:2])
        raise ValueError(f"`floor` must be a number or one for each unit {units}, got {list(floor.shape)}") from None
    if np.isnan(limit).any() or (limit < 0).any():
        raise ValueError(f"`floor` must be 0 or more, got {limit.min()}")
    kept = np.asarray((damage <= limit[:, :, None]).all(0))
    kept[:, 0] = True
    return kept


def _one_damage(damage: Floats, allowed: NDArray[np.bool_]) -> Floats:
    """Damages of all lengths in one number, [units, candidates], lengths weighing alike."""
    if len(damage) == 1:
        return damage[0]
    means = damage[:, allowed].mean(1)
    weights = np.divide(means.mean(), means, out=np.ones(len(means)), where=means > 0)
    return np.where(allowed, np.tensordot(weights, np.where(allowed, damage, 0), 1) / len(damage), np.inf)


def _labels(name: str, values: ArrayLike | None, units: int) -> NDArray[np.int64]:
    if values is None:
        return np.arange(units)
    labels = np.asarray(values)
    if labels.shape != (units,) or labels.dtype.kind not in "iu":
        raise ValueError(f"`{name}` must be ints [{units}], got {labels.dtype} {list(labels.shape)}")
    return labels.astype(np.int64)


def _most_plans(most: int | None, layers: ArrayLike | None) -> int | None:
    if most is None:
        return None
    if isinstance(most, bool) or not isinstance(most, (int, np.integer)) or most < 1:
        raise ValueError(f"`max_plans_per_layer` must be an int of at least 1, got {most!r}")
    if layers is None:
        raise ValueError("`layers` must be given for `max_plans_per_layer`, got None")
    return int(most)


def _summed(values: Floats, item: NDArray[np.int64]) -> Floats:
    """Sums over the units of an item, [items, candidates]."""
    total = np.zeros((int(item.max()) + 1, values.shape[1]))
    np.add.at(total, item, values)
    return total


def _words(values: tuple[float, ...] | Floats) -> str:
    return ", ".join(f"{v:.6g}" for v in values)


def _first(good: Any) -> str:
    """Names the first unit that is not good, and how many others are not."""
    where = np.flatnonzero(~np.asarray(good, bool))
    return f"unit {where[0]}" + (f" and {len(where) - 1} more" if len(where) > 1 else "")
