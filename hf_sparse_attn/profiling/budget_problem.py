"""The budgeted choice as a problem of numbers: one candidate per item, least damage, and the Lagrangian heuristic."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# A sum of a thousand floats is off by this much at most, and a budget that is met to this share is met.
SLACK = 1e-9
# Sets of candidates a layer may use are listed one by one up to this many.
MOST_SETS = 20_000
_SUBGRADIENT_STEPS = 250
_CHUNK = 8_000_000


@dataclass(frozen=True, eq=False)
class Problem:
    """Choose one candidate for every item: least total damage, every total cost within its budget.

    Args:
        damage: float64 [items, candidates], infinite where a candidate is not allowed.
        cost: float64 [budgets, items, candidates], finite everywhere.
        budget: float64 [budgets], largest total cost.
        block: int [items], ascending: items of one block share a set of candidates.
        most: largest number of distinct candidates in a block; None means any number.
    """

    damage: Floats
    cost: Floats
    budget: Floats
    block: Ints
    most: int | None = None
    allowed: NDArray[np.bool_] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "allowed", np.isfinite(self.damage))

    @cached_property
    def starts(self) -> Ints:
        """The first item of each block."""
        return np.flatnonzero(np.r_[True, np.diff(self.block) > 0])

    @cached_property
    def number_of_sets(self) -> int:
        """How many sets of candidates a block may use."""
        used = int(self.allowed.any(0).sum())
        return 1 if self.most is None or self.most >= used else comb(used, self.most)

    @cached_property
    def sets(self) -> Ints:
        """The sets of candidates that a block may use, [sets, size]."""
        used = np.flatnonzero(self.allowed.any(0))
        if self.number_of_sets == 1:
            return used[None]
        return np.array(list(combinations(used.tolist(), self.most or len(used))), np.int64)

    @cached_property
    def unit(self) -> Floats:
        """What costs of each budget are counted in where they are added up."""
        return np.where(self.limit > 0, self.limit, 1.0)

    @cached_property
    def total_cost(self) -> Floats:
        """Cost summed over the budgets, each counted in its own unit, [items, candidates]; it breaks ties."""
        return (self.cost / self.unit[:, None, None]).sum(0)

    @cached_property
    def limit(self) -> Floats:
        """The budgets with the room for rounding."""
        return self.budget + SLACK * np.abs(self.budget)

    def weighted(self, multipliers: Floats) -> Floats:
        """Damage plus priced cost, [items, candidates]."""
        return self.damage + np.tensordot(multipliers, self.cost, 1)

    def by_set(self, values: Floats) -> Floats:
        """Least sum over a block's items when it uses a set, [blocks, sets]."""
        if self.number_of_sets == 1:
            return np.add.reduceat(values[:, self.sets[0]].min(1), self.starts)[:, None]
        step = max(1, _CHUNK // (len(values) * self.sets.shape[1]))
        parts = []
        for i in range(0, len(self.sets), step):
            part = values[:, self.sets[i : i + step]].min(2)
            parts.append(np.add.reduceat(part, self.starts))
        return np.concatenate(parts, 1)

    def least_of(self, values: Floats) -> Ints:
        """The choice with the least sum of `values`; ties go to the cheaper, then the earlier candidate."""
        open_ = np.zeros(values.shape, bool)
        if self.number_of_sets == 1:
            open_[:, self.sets[0]] = True
        else:
            best = self.by_set(values).argmin(1)
            per_item = np.repeat(best, np.diff(np.r_[self.starts, len(values)]))
            np.put_along_axis(open_, self.sets[per_item], True, 1)
        values = np.where(open_, values, np.inf)
        tied = values == values.min(1, keepdims=True)
        return np.where(tied & self.allowed, self.total_cost, np.inf).argmin(1)

    def damage_of(self, x: Ints) -> float:
        """Total damage of a choice."""
        return float(self.damage[np.arange(len(x)), x].sum())

    def cost_of(self, x: Ints) -> Floats:
        """Total costs of a choice, [budgets]."""
        return self.cost[:, np.arange(len(x)), x].sum(1)

    def fits(self, x: Ints) -> bool:
        """Whether a choice is within every budget."""
        return bool((self.cost_of(x) <= self.limit).all())

    def dual(self, multipliers: Floats, x: Ints) -> float:
        """Lower bound on the damage: what the priced problem, whose best choice is `x`, comes to."""
        return self.damage_of(x) + float(multipliers @ (self.cost_of(x) - self.limit))

    def least_cost(self, which: int) -> tuple[Ints, float]:
        """The cheapest choice by one of the budgets, and its total cost."""
        x = self.least_of(np.where(self.allowed, self.cost[which], np.inf))
        return x, float(self.cost_of(x)[which])


@dataclass(frozen=True, eq=False)
class Found:
    """A choice within the budgets, or None, with a lower bound on the damage and the multipliers that gave it."""

    x: Ints | None
    damage: float
    bound: float
    multipliers: Floats


def lagrangian(problem: Problem, time_limit: float = 0.0) -> Found:
    """Prices the cost: the multiplier by bisection (several budgets: by subgradients), then greedy repair and fill.

    With one budget the multiplier is the best one: each step tries the slope between the cheapest choice known that
    is too dear and the dearest that is within the budget, until no choice lies below their line. (It takes no time
    worth a limit: the argument is there because all solvers are called alike.)
    """
    zero = np.zeros(len(problem.budget))
    free = problem.least_of(problem.damage)
    if problem.fits(free):
        damage = problem.damage_of(free)
        return Found(free, damage, damage, zero)
    return _one_budget(problem, free) if len(zero) == 1 else _several_budgets(problem, free)


def _one_budget(problem: Problem, over: Ints) -> Found:
    under, _ = problem.least_cost(0)
    multiplier, bound = 0.0, problem.damage_of(over)
    for _ in range(200):
        rise = problem.cost_of(over)[0] - problem.cost_of(under)[0]
        multiplier = (problem.damage_of(under) - problem.damage_of(over)) / rise
        prices = np.array([multiplier])
        x = problem.least_of(problem.weighted(prices))
        value, line = problem.dual(prices, x), problem.dual(prices, under)
        if value >= line - 1e-13 * max(abs(line), abs(problem.damage_of(under))):
            bound = max(bound, min(value, line))
            break
        bound = max(bound, value)
        if problem.fits(x):
            under = x
        else:
            over = x
    x = fill(problem, _move_over(problem, under, over))
    other = repair(problem, over)
    if other is not None:
        other = fill(problem, other)
        if _better(problem, other, x):
            x = other
    damage = problem.damage_of(x)
    return Found(x, damage, min(bound, damage), np.array([multiplier]))


def _several_budgets(problem: Problem, free: Ints) -> Found:
    unit = problem.unit
    prices = np.zeros(len(unit))
    bound, best_prices = problem.damage_of(free), prices
    best: Ints | None = None
    for x in (problem.least_cost(i)[0] for i in range(len(unit))):
        if problem.fits(x) and (best is None or _better(problem, x, best)):
            best = x
    # Polyak's step: as far as the best known damage allows. Costs count in units of their budgets.
    share, stuck = 1.0, 0
    for _ in range(_SUBGRADIENT_STEPS):
        x = problem.least_of(problem.weighted(prices / unit))
        value = problem.dual(prices / unit, x)
        if value > bound:
            bound, best_prices, stuck = value, prices, 0
        else:
            stuck += 1
        if stuck >= 8:
            share, stuck = share / 2, 0
        if problem.fits(x) and (best is None or _better(problem, x, best)):
            best = x
        slope = (problem.cost_of(x) - problem.limit) / unit
        goal = problem.damage_of(best) if best is not None else bound + max(abs(bound), 1e-12)
        length = float(slope @ slope)
        if length == 0 or goal - bound <= 1e-12 * abs(goal):
            break
        prices = np.maximum(prices + share * (goal - value) / length * slope, 0)
    priced = problem.least_of(problem.weighted(best_prices / unit))
    tried = [repair(problem, priced), best]
    if all(x is None for x in tried):
        tried = [repair(problem, free), *(repair(problem, problem.least_cost(i)[0]) for i in range(len(unit)))]
    best = None
    for known in tried:
        filled = None if known is None else fill(problem, known)
        if filled is not None and (best is None or _better(problem, filled, best)):
            best = filled
    if best is None:
        return Found(None, np.inf, bound, best_prices / unit)
    damage = problem.damage_of(best)
    return Found(best, damage, min(bound, damage), best_prices / unit)


def _better(problem: Problem, x: Ints, y: Ints) -> bool:
    """Whether x does less damage than y, or as much for less."""
    a, b = problem.damage_of(x), problem.damage_of(y)
    return a < b or (a == b and _priced(problem, x) < _priced(problem, y))


def _priced(problem: Problem, x: Ints) -> float:
    return float(problem.total_cost[np.arange(len(x)), x].sum())


def _move_over(problem: Problem, under: Ints, over: Ints) -> Ints:
    """`under` with as many blocks as fit taken from `over`, the best bargains first (one budget)."""
    at = np.arange(len(under))
    more = np.add.reduceat(problem.cost[0, at, over] - problem.cost[0, at, under], problem.starts)
    less = np.add.reduceat(problem.damage[at, under] - problem.damage[at, over], problem.starts)
    room = problem.limit[0] - problem.cost_of(under)[0]
    x = under.copy()
    ends = np.r_[problem.starts[1:], len(under)]
    with np.errstate(divide="ignore", invalid="ignore"):
        worth = np.where(more > 0, less / more, np.where(less > 0, np.inf, -np.inf))
    for b in np.argsort(-worth, kind="stable"):
        if less[b] > 0 and more[b] <= room:
            room -= more[b]
            x[problem.starts[b] : ends[b]] = over[problem.starts[b] : ends[b]]
    return x if problem.fits(x) else under


def _open(problem: Problem, x: Ints) -> NDArray[np.bool_]:
    """Which single changes keep a block's number of distinct candidates, [items, candidates]."""
    if problem.number_of_sets == 1:
        return problem.allowed
    block = np.repeat(np.arange(len(problem.starts)), np.diff(np.r_[problem.starts, len(x)]))
    count = np.zeros((len(problem.starts), problem.damage.shape[1]), np.int64)
    np.add.at(count, (block, x), 1)
    distinct = (count > 0).sum(1)
    # The only item with its candidate may take that one place along.
    alone = count[block, x] == 1
    room = distinct[block] - alone < (problem.most or 0)
    return problem.allowed & ((count[block] > 0) | room[:, None])


def fill(problem: Problem, x: Ints) -> Ints:
    """Spends what is left of the budgets: the changes with the most damage saved per cost that fit, in rounds.

    A round takes the best change of each item, the best first, down to half as good as the best of all.
    """
    x, at = x.copy(), np.arange(len(x))
    for _ in range(4 * len(x)):
        saved = problem.damage[at, x][:, None] - problem.damage
        more = problem.cost - problem.cost[:, at, x][:, :, None]
        room = problem.limit - problem.cost_of(x)
        total = (more / problem.unit[:, None, None]).sum(0)
        fits = (more <= room[:, None, None]).all(0) & _open(problem, x)
        fits &= (saved > 0) | ((saved == 0) & (total < 0) & (more <= 0).all(0))
        if not fits.any():
            break
        # What costs nothing is taken first, the largest saving before the smaller.
        with np.errstate(divide="ignore", invalid="ignore"):
            worth = np.where(total > 0, saved / total, np.inf)
        change, ordered = _best_changes(np.where(fits, -worth, np.inf), -saved)
        ordered = ordered[worth[ordered, change[ordered]] >= worth[ordered[0], change[ordered[0]]] / 2]
        spent = np.cumsum(more[:, ordered, change[ordered]], 1)
        over = np.flatnonzero((spent > room[:, None]).any(0))
        ordered = _at_once(problem, ordered, over[0] if len(over) else len(ordered))
        x[ordered] = change[ordered]
    return x


def repair(problem: Problem, x: Ints) -> Ints | None:
    """Brings a choice within the budgets: the changes with the least damage per excess removed, in rounds too."""
    x, at = x.copy(), np.arange(len(x))
    for _ in range(4 * len(x)):
        if problem.fits(x):
            return x
        room = problem.limit - problem.cost_of(x)
        more = problem.cost - problem.cost[:, at, x][:, :, None]
        before = float((np.maximum(-room, 0) / problem.unit).sum())
        excess = (np.maximum(more - room[:, None, None], 0) / problem.unit[:, None, None]).sum(0)
        removed = np.where(_open(problem, x), before - excess, -1.0)
        if not (removed > 0).any():
            return None
        harm = problem.damage - problem.damage[at, x][:, None]
        with np.errstate(divide="ignore", invalid="ignore"):
            price = np.where(removed > 0, np.where(harm > 0, harm / removed, harm), np.inf)
        change, ordered = _best_changes(price, -removed)
        prices = price[ordered, change[ordered]]
        ordered = ordered[prices <= max(2 * prices[0], 0)]
        spent = np.cumsum(more[:, ordered, change[ordered]], 1)
        # Each change may help one budget and hurt another: no further than all are met, or the excess grows again.
        left = (np.maximum(spent - room[:, None], 0) / problem.unit[:, None]).sum(0)
        stop = np.flatnonzero((left == 0) | (np.diff(left, append=np.inf) >= 0))
        ordered = _at_once(problem, ordered, int(stop[0]) + 1)
        x[ordered] = change[ordered]
    return None


def _best_changes(rank: Floats, second: Floats) -> tuple[Ints, Ints]:
    """The change with the lowest rank of each item, and the items that have one, in the order of their ranks."""
    tied = rank == rank.min(1, keepdims=True)
    change = np.where(tied, second, np.inf).argmin(1)
    at = np.arange(len(rank))
    ordered = np.lexsort((second[at, change], rank[at, change]))
    return change, ordered[rank[ordered, change[ordered]] < np.inf]


def _at_once(problem: Problem, ordered: Ints, many: int) -> Ints:
    """The first of the ordered changes: several may together use too many distinct candidates."""
    return ordered[: max(1, many if problem.number_of_sets == 1 else 1)]
