"""The budgeted choice: all solvers against brute force, bounds, options, several lengths, the Pareto front, guards."""

from __future__ import annotations

import itertools
import math
import time
from typing import Any

import numpy as np
import pytest

from hf_sparse_attn.profiling import budget_milp
from hf_sparse_attn.profiling.budget import BudgetError, choose, choose_elastic, pareto
from hf_sparse_attn.profiling.budget_problem import SLACK
from tests.support.processes import run_code

SOLVERS = ("exact", "milp", "lagrangian")
# HiGHS works to 1e-6 of numbers that are scaled to 1e4.
MILP = 1e-9


def small(rng: np.random.Generator, units: int, candidates: int, lengths: int = 1) -> tuple[Any, Any]:
    """Random figures with ties, zeros and candidates that are not allowed; dense (0, 1) first."""
    shape = (lengths, units, candidates)
    damage, cost = rng.random(shape), rng.random(shape)
    kind = rng.integers(4)
    if kind == 1:
        damage, cost = np.round(damage, 1), np.round(cost, 1)
    elif kind == 2:
        cost = np.broadcast_to(cost[:, :1], shape).copy()
    elif kind == 3:
        damage = np.round(1 - cost + 0.05 * damage, 2)
    damage[rng.random(shape) < 0.1] = np.inf
    cost[rng.random(shape) < 0.05] = np.inf
    damage[..., 0], cost[..., 0] = 0, 1
    return (damage, cost) if lengths > 1 else (damage[0], cost[0])


def brute(damage: Any, cost: Any, budgets: Any, valid: Any = lambda x: True) -> float | None:
    """The least damage of all choices, or None where there is none; figures [lengths, units, candidates]."""
    units, candidates = damage.shape[1:]
    at, best = np.arange(units), None
    for x in itertools.product(range(candidates), repeat=units):
        harm, spent = damage[:, at, x].sum(1), cost[:, at, x].mean(1)
        if not np.isfinite(harm).all() or (spent > np.asarray(budgets) * (1 + SLACK)).any() or not valid(x):
            continue
        if best is None or harm.mean() < best:
            best = float(harm.mean())
    return best


def check(damage: Any, cost: Any, budget: float, wanted: float | None, **options: Any) -> None:
    """Every solver against what brute force found."""
    for solver in SOLVERS:
        if wanted is None:
            with pytest.raises(ValueError):
                choose(damage, cost, budget, solver=solver, **options)
            continue
        got = choose(damage, cost, budget, solver=solver, **options)
        at = np.arange(len(damage))
        assert got.damage == pytest.approx(damage[at, got.candidate].sum(), abs=1e-12)
        assert got.cost == pytest.approx(cost[at, got.candidate].mean(), abs=1e-12)
        assert got.cost <= budget * (1 + SLACK)
        assert got.bound <= wanted + MILP and got.bound <= got.damage
        if solver == "lagrangian":
            assert got.damage >= wanted - 1e-12
        else:
            assert got.damage == pytest.approx(wanted, abs=MILP)
        if solver == "exact":
            assert got.bound == got.damage


@pytest.mark.parametrize("seed", range(60))
def test_every_solver_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    damage, cost = small(rng, int(rng.integers(1, 6)), int(rng.integers(1, 5)))
    budget = float(rng.choice([0.1, 0.2, 0.35, 0.5, 0.8, 1.0]))
    check(damage, cost, budget, brute(damage[None], cost[None], [budget]))


def over_whole_costs(damage: Any, cost: Any, budget: int) -> float:
    """The least damage at a total cost of at most `budget`, costs being whole numbers: the textbook's table."""
    best = np.zeros(budget + 1)
    for harms, costs in zip(damage, cost.astype(int), strict=True):
        options = [np.r_[np.full(min(c, budget + 1), np.inf), best[: max(0, budget + 1 - c)]] for c in costs]
        best = (np.stack(options) + harms[:, None]).min(0)
    return float(best[-1])


@pytest.mark.parametrize("seed", range(60))
def test_exact_where_the_multiplier_alone_falls_short(seed: int) -> None:
    rng = np.random.default_rng(5000 + seed)
    units, candidates = int(rng.integers(5, 40)), int(rng.integers(2, 6))
    cost = rng.integers(1, 25, (units, candidates)).astype(float)
    # Damage that follows the cost closely is what makes a knapsack hard.
    damage = np.maximum(30 - cost + rng.normal(0, rng.choice([0.1, 2]), cost.shape), 0)
    budget = int(cost.min(1).sum() + rng.integers(1, 4 * units))
    wanted = over_whole_costs(damage, cost, budget)
    best = choose(damage, cost, budget / units)
    quick = choose(damage, cost, budget / units, solver="lagrangian")
    assert best.damage == best.bound == pytest.approx(wanted, rel=1e-12)
    assert quick.bound <= wanted * (1 + 1e-12) and wanted <= quick.damage * (1 + 1e-12)
    assert best.cost * units <= budget * (1 + SLACK)


@pytest.mark.parametrize("seed", range(40))
def test_groups_take_one_candidate(seed: int) -> None:
    rng = np.random.default_rng(1000 + seed)
    units = int(rng.integers(2, 6))
    damage, cost = small(rng, units, 4)
    groups = rng.integers(0, 3, units)
    # Numbers of groups are only names.
    names = np.array([70, -5, 12])[groups]

    def tied(x: tuple[int, ...]) -> bool:
        return all(x[i] == x[j] for i in range(units) for j in range(units) if groups[i] == groups[j])

    check(damage, cost, 0.6, brute(damage[None], cost[None], [0.6], tied), groups=names)
    got = choose(damage, cost, 1.0, groups=names)
    assert tied(tuple(got.candidate))


@pytest.mark.parametrize("seed", range(60))
def test_at_most_k_candidates_per_layer(seed: int) -> None:
    rng = np.random.default_rng(2000 + seed)
    units, most = int(rng.integers(2, 6)), int(rng.integers(1, 4))
    damage, cost = small(rng, units, 4)
    # Layers in no order, and with other names than 0, 1, 2.
    layers = rng.choice([9, 3], units)
    groups = np.arange(units)
    if seed % 2:
        groups = np.array([layers[i] * 10 + i % 2 for i in range(units)])

    def valid(x: tuple[int, ...]) -> bool:
        few = all(len({x[i] for i in range(units) if layers[i] == at}) <= most for at in layers)
        return few and all(x[i] == x[j] for i in range(units) for j in range(units) if groups[i] == groups[j])

    wanted = brute(damage[None], cost[None], [0.5], valid)
    check(damage, cost, 0.5, wanted, layers=layers, max_plans_per_layer=most, groups=groups)
    if wanted is not None:
        for solver in SOLVERS:
            options = {"layers": layers, "max_plans_per_layer": most, "groups": groups}
            assert valid(tuple(choose(damage, cost, 0.5, solver=solver, **options).candidate))


def test_dense_is_allowed_whatever_the_floor() -> None:
    """Its own damage is what the metric leaves of rounding, or a metric in which dense is not 0."""
    damage, cost = [[0.5, 0.2], [0.05, 0.05]], [[1.0, 0.1], [1.0, 0.1]]
    assert choose(damage, cost, 1.0, floor=0.1).candidate.tolist() == [0, 1]


@pytest.mark.parametrize("seed", range(40))
def test_a_floor_leaves_dense_where_no_candidate_is_good_enough(seed: int) -> None:
    rng = np.random.default_rng(3000 + seed)
    damage, cost = small(rng, 4, 4)
    floor = 0.3 if seed % 2 else rng.random(4) / 2
    limited = np.where(damage <= np.broadcast_to(floor, 4)[:, None], damage, np.inf)
    limited[:, 0] = damage[:, 0]
    check(damage, cost, 0.7, brute(limited[None], cost[None], [0.7]), floor=floor)
    forced = ~np.isfinite(limited[:, 1:]).any(1)
    assert (choose(damage, cost, 1.0, floor=floor).candidate[forced] == 0).all()


@pytest.mark.parametrize("seed", range(50))
def test_elastic_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(4000 + seed)
    lengths = int(rng.integers(2, 4))
    damage, cost = small(rng, int(rng.integers(1, 5)), 4, lengths)
    budgets = rng.choice([0.3, 0.5, 0.7], lengths)
    allowed = (np.isfinite(damage) & np.isfinite(cost)).all(0)
    means = damage[:, allowed].mean(1)
    alike = np.where(allowed, np.where(allowed, damage, 0) * (means.mean() / means)[:, None, None], np.inf)
    wanted = brute(alike, cost, budgets)
    for solver in SOLVERS:
        if wanted is None:
            with pytest.raises(BudgetError):
                choose_elastic(damage, cost, budgets, solver=solver)
            continue
        got = choose_elastic(damage, cost, budgets, solver=solver)
        spent = cost[:, np.arange(damage.shape[1]), got.candidate].mean(1)
        assert (spent <= budgets * (1 + SLACK)).all()
        assert got.cost == pytest.approx(spent.mean())
        assert got.bound <= wanted + MILP
        if solver == "lagrangian":
            assert got.damage >= wanted - 1e-12
        else:
            assert got.damage == pytest.approx(wanted, abs=MILP)


@pytest.mark.parametrize("solver", SOLVERS)
def test_one_length_is_the_plain_choice(solver: str) -> None:
    damage, cost = small(np.random.default_rng(5), 30, 6)
    plain = choose(damage, cost, 0.4, solver=solver, floor=0.8)
    one = choose_elastic(damage[None], cost[None], [0.4], solver=solver, floor=0.8)
    assert (plain.candidate == one.candidate).all() and plain[1:] == one[1:]
    # The same figures at two lengths, in other units, say nothing new.
    two = choose_elastic(np.stack([damage, 7 * damage]), np.stack([cost, cost]), [0.4, 0.4], solver="exact")
    assert two.damage == pytest.approx(4 * choose(damage, cost, 0.4).damage)


def realistic(seed: int, units: int = 1024, candidates: int = 16) -> tuple[Any, Any]:
    """Heads of very different needs: damage falls with cost, each head at its own rate."""
    rng = np.random.default_rng(seed)
    cost = np.geomspace(0.02, 0.6, candidates) * rng.lognormal(0, 0.1, (units, candidates))
    rate, scale = rng.uniform(1.5, 15, (units, 1)), rng.lognormal(-2, 1.2, (units, 1))
    damage = scale * np.exp(-rate * cost) * rng.lognormal(0, 0.2, cost.shape)
    damage[rng.random(damage.shape) < 0.05] = np.inf
    damage[:, 0], cost[:, 0] = 0, 1
    return damage, cost


@pytest.mark.parametrize(("seed", "budget"), [(0, 0.125), (1, 0.25), (2, 0.5)])
def test_lagrangian_is_within_one_per_cent_and_fast(seed: int, budget: float) -> None:
    damage, cost = realistic(seed)
    best = choose(damage, cost, budget)
    times = []
    for _ in range(3):
        start = time.process_time()
        quick = choose(damage, cost, budget, solver="lagrangian")
        times.append(time.process_time() - start)
    assert best.bound == best.damage
    assert best.damage <= quick.damage <= 1.01 * best.damage
    assert 0.99 * best.damage <= quick.bound <= best.damage
    assert max(best.cost, quick.cost) <= budget * (1 + SLACK)
    assert min(times) < 0.2


def test_exact_is_as_good_as_integer_programming_on_many_units() -> None:
    damage, cost = realistic(7, units=200)
    assert choose(damage, cost, 0.25).damage == pytest.approx(choose(damage, cost, 0.25, solver="milp").damage, 1e-9)


@pytest.mark.parametrize("most", [2, 3])
def test_few_plans_per_layer_on_many_units(most: int) -> None:
    damage, cost = realistic(3, units=240, candidates=9)
    options: dict[str, Any] = {"layers": np.arange(240) // 16, "max_plans_per_layer": most}
    best = choose(damage, cost, 0.3, **options)
    quick = choose(damage, cost, 0.3, solver="lagrangian", **options)
    assert best.bound == best.damage
    assert best.damage <= quick.damage <= 1.01 * best.damage
    for found in (best, quick):
        assert max(len(set(found.candidate[i : i + 16])) for i in range(0, 240, 16)) == most


def test_elastic_on_many_units() -> None:
    damage, cost = realistic(4, units=512)
    rng = np.random.default_rng(4)
    damages = np.stack([damage, 5 * damage * rng.lognormal(0, 0.3, damage.shape)])
    costs = np.stack([cost, np.where(cost == 1, 1, 0.8 * cost)])
    quick = choose_elastic(damages, costs, [0.25, 0.18], solver="lagrangian")
    assert quick.damage <= 1.01 * quick.bound
    spent = costs[:, np.arange(512), quick.candidate].mean(1)
    assert (spent <= np.array([0.25, 0.18]) * (1 + SLACK)).all()


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("of", ["choose", "elastic"])
def test_units_that_are_all_alike(solver: str, of: str) -> None:
    damage = np.tile([0.0, 0.5, 0.2, 0.1], (33, 1))
    cost = np.tile([1.0, 0.1, 0.3, 0.4], (33, 1))
    if of == "choose":
        got = choose(damage, cost, 0.25, solver=solver)
    else:
        got = choose_elastic(damage[None].repeat(2, 0), cost[None].repeat(2, 0), [0.25, 0.5], solver=solver)
    # 33 x 0.25 = 8.25 buys 24 heads at 0.3 (7.2) and 9 at 0.1 (0.9), with 0.15 to spare: 23, 1 and 9 (0.4) is 8.2.
    assert got.damage == pytest.approx(9 * 0.5 + 23 * 0.2 + 0.1)


def test_the_same_again() -> None:
    damage, cost = realistic(11, units=300)
    for solver in ("exact", "lagrangian"):
        first, second = (choose(damage, cost, 0.2, solver=solver) for _ in range(2))
        assert (first.candidate == second.candidate).all() and first[1:] == second[1:]


@pytest.mark.parametrize("solver", SOLVERS)
def test_ties_go_to_the_cheaper_then_the_earlier(solver: str) -> None:
    damage = np.array([[0.0, 0.0, 0.0, 0.5], [0.0, 0.3, 0.3, 0.3]])
    cost = np.array([[1.0, 0.2, 0.2, 0.1], [1.0, 0.2, 0.1, 0.1]])
    assert choose(damage, cost, 1.0, solver=solver).candidate[0] == 1
    assert choose(damage, cost, 0.15, solver=solver).candidate.tolist() == [1, 2]


def test_a_budget_that_sums_only_in_decimals() -> None:
    # 0.1 + 0.1 + 0.1 is more than 0.3 in floats.
    damage, cost = np.tile([0.0, 0.1], (3, 1)), np.tile([1.0, 0.1], (3, 1))
    for solver in SOLVERS:
        assert choose(damage, cost, 0.1, solver=solver).candidate.tolist() == [1, 1, 1]


@pytest.mark.parametrize("unit", [1e-6, 1.0, 1e5])
def test_any_unit_of_cost_and_damage(unit: float) -> None:
    damage, cost = realistic(13, units=60, candidates=6)
    wanted = choose(damage, cost, 0.3)
    for solver in ("exact", "milp"):
        got = choose(damage / unit, cost * unit, 0.3 * unit, solver=solver)
        assert got.damage * unit == pytest.approx(wanted.damage, rel=1e-9)


def test_integer_programming_is_asked_only_what_the_bounds_leave(monkeypatch: pytest.MonkeyPatch) -> None:
    damage, cost = realistic(17, units=120, candidates=8)
    wanted = choose(damage, cost, 0.2, solver="milp")
    calls = []
    real = budget_milp.milp
    monkeypatch.setattr(budget_milp, "milp", lambda *args: calls.append(args) or real(*args))
    got = choose(damage, cost, 0.2)
    assert got.bound == got.damage == pytest.approx(wanted.damage, rel=1e-9)
    assert len(calls) == 1 and calls[0][3].sum() < np.isfinite(damage).sum() / 2
    # Where nothing is left to win nothing is asked.
    assert choose(damage, cost, 1.0).damage == 0 and len(calls) == 1


def test_out_of_time_is_said(caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    cost = rng.random((300, 12))
    cost[:, 0] = 1
    # Damage that is all a matter of cost: nothing tells one choice from the other but the last digits.
    got = choose(1 - cost, cost, 0.25, time_limit=0.3, solver="milp")
    assert "ended after 0.3 s" in caplog.text
    assert 0 <= got.bound <= got.damage <= 1.01 * 225 and got.cost <= 0.25 * (1 + SLACK)
    assert capfd.readouterr().out == ""


def test_pareto_goes_from_the_cheapest_to_no_damage() -> None:
    damage, cost = realistic(19, units=150, candidates=8)
    front = pareto(damage, cost, points=12)
    costs, damages = zip(*front, strict=True)
    assert 2 <= len(front) <= 12
    assert all(a < b for a, b in itertools.pairwise(costs)) and all(a > b for a, b in itertools.pairwise(damages))
    allowed = np.where(np.isfinite(damage), cost, np.inf)
    assert costs[0] == pytest.approx(allowed.min(1).mean()) and damages[-1] == 0
    for spent, harm in front:
        assert harm <= 1.01 * choose(damage, cost, spent).damage
    assert pareto(damage, cost, 5, floor=0.1)[-1][1] == 0


def test_pareto_of_one_choice_is_one_point() -> None:
    assert pareto([[0.0, 1.0]], [[1.0, 1.0]]) == [(1.0, 0.0)]
    assert pareto([[0.0, 1.0]], [[1.0, 0.0]], points=3) == [(0.0, 1.0), (1.0, 0.0)]


ONE = np.array([[0.0, 0.5], [0.0, 0.4]]), np.array([[1.0, 0.2], [1.0, 0.4]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_least_possible_budget_is_named(solver: str) -> None:
    with pytest.raises(BudgetError, match=r"`budget` must be at least 0\.3, got 0\.25") as caught:
        choose(*ONE, 0.25, solver=solver)
    assert caught.value.least == pytest.approx((0.3,))
    with pytest.raises(BudgetError, match=r"at least 0\.7, got 0\.6"):
        choose(*ONE, 0.6, solver=solver, floor=[0.1, 0.45])
    with pytest.raises(BudgetError, match=r"`budgets` must be at least 0\.3, 0\.15, got 0\.3, 0\.1"):
        choose_elastic(np.stack([ONE[0]] * 2), np.stack([ONE[1], ONE[1] / 2]), [0.3, 0.1], solver=solver)


@pytest.mark.parametrize("solver", SOLVERS)
def test_lengths_that_are_possible_only_apart(solver: str) -> None:
    damage = np.zeros((2, 1, 2))
    cost = np.array([[[0.1, 0.9]], [[0.9, 0.1]]])
    with pytest.raises(BudgetError, match=r"one choice meets all limits.*0\.5, 0\.5.*by itself is 0\.1, 0\.1"):
        choose_elastic(damage, cost, [0.5, 0.5], solver=solver)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "greedy"}, "`solver` must be one of exact, milp, lagrangian; got 'greedy'"),
        ({"budget": math.nan}, r"`budget` must be 0 or more, got \[nan\]"),
        ({"budget": -0.1}, "`budget` must be 0 or more"),
        ({"damage": [0.0, 1.0]}, r"`damage` must be \[units, candidates\], got shape \[2\]"),
        ({"cost": np.ones((2, 2, 2))}, r"`cost` must be \[units, candidates\], got shape \[2, 2, 2\]"),
        ({"cost": np.ones((2, 3))}, r"must have one shape, not empty, got \[1, 2, 2\] and \[1, 2, 3\]"),
        ({"damage": np.ones((0, 3)), "cost": np.ones((0, 3))}, "not empty"),
        ({"damage": [[0, math.nan], [0, 1]]}, "`damage` must be 0 or more .*, got nan"),
        ({"cost": [[1, -1], [1, 1]]}, "`cost` must be 0 or more .*, got -1"),
        ({"damage": [[0, 1], [math.inf, math.inf]]}, "must allow a candidate for every unit, got none for unit 1"),
        (
            {"damage": [[0, math.inf], [math.inf, 0]], "groups": [4, 4]},
            "`groups` must leave a candidate.*unit 0 and 1",
        ),
        ({"groups": [0.5, 1.0]}, r"`groups` must be ints \[2\], got float64 \[2\]"),
        ({"groups": [1]}, r"`groups` must be ints \[2\], got int64 \[1\]"),
        ({"max_plans_per_layer": 1}, "`layers` must be given for `max_plans_per_layer`"),
        ({"max_plans_per_layer": 0, "layers": [0, 0]}, "`max_plans_per_layer` must be an int of at least 1, got 0"),
        ({"max_plans_per_layer": True, "layers": [0, 0]}, "at least 1, got True"),
        ({"max_plans_per_layer": 1, "layers": [0, 1], "groups": [0, 0]}, "`groups` must each lie within one layer"),
        (
            {"damage": [[0, math.inf], [math.inf, 0]], "max_plans_per_layer": 1, "layers": [0, 0]},
            "`max_plans_per_layer` must leave a candidate for every unit, got 1",
        ),
        ({"floor": -1.0}, "`floor` must be 0 or more, got -1"),
        ({"floor": math.nan}, "`floor` must be 0 or more, got nan"),
        ({"floor": [1.0, 1.0, 1.0]}, r"`floor` must be a number or one for each unit \[1, 2\], got \[1, 3\]"),
        ({"time_limit": 0}, "`time_limit` must be more than 0 seconds, got 0"),
    ],
)
def test_guards(options: dict[str, Any], message: str) -> None:
    given = {"damage": ONE[0], "cost": ONE[1], "budget": 0.5, **options}
    with pytest.raises(ValueError, match=message):
        choose(**given)


def test_guards_of_several_lengths_and_the_front() -> None:
    with pytest.raises(ValueError, match=r"`damage` must be \[lengths, units, candidates\], got shape \[2, 2\]"):
        choose_elastic(*ONE, [0.5])
    with pytest.raises(ValueError, match=r"`budgets` must be \[1\], one for each length, got shape \[2\]"):
        choose_elastic(ONE[0][None], ONE[1][None], [0.5, 0.5])
    for points in (1, 2.5, True):
        with pytest.raises(ValueError, match="`points` must be an int of at least 2"):
            pareto(*ONE, points=points)


def test_too_many_sets_of_candidates() -> None:
    rng = np.random.default_rng(0)
    damage, cost = rng.random((6, 40)), rng.random((6, 40))
    options: dict[str, Any] = {"layers": [0, 0, 0, 1, 1, 1], "max_plans_per_layer": 8}
    with pytest.raises(ValueError, match=r"sets of candidates for solver='lagrangian', got \d+; solver='milp'"):
        choose(damage, cost, 0.3, solver="lagrangian", **options)
    # With three units in a layer eight plans are no limit.
    assert choose(damage, cost, 0.3, **options).damage == pytest.approx(choose(damage, cost, 0.3).damage)


def test_without_scipy_the_lagrangian_chooses_and_says_so() -> None:
    code = (
        "import logging, sys; sys.modules.update({'scipy': None, 'scipy.optimize': None})\n"
        "logging.basicConfig(stream=sys.stdout, format='%(message)s')\n"
        "from hf_sparse_attn.profiling.budget import choose\n"
        "print(choose([[0, .5], [0, .4]], [[1, .2], [1, .4]], 1).candidate.tolist())\n"
        "found = choose([[0, .1, .5], [0, .3, .5]], [[1, .5, .1], [1, .6, .1]], .5)\n"
        "print(found.candidate.tolist(), found.bound < found.damage)\n"
        "try: choose([[0, .5]], [[1, .2]], .5, solver='milp')\n"
        "except ImportError as error: print(error)"
    )
    done = run_code(code)
    assert done.stderr == ""
    proven, warned, best, missing = done.stdout.splitlines()
    assert proven == "[0, 0]" and best == "[1, 2] True"
    assert warned.startswith("scipy is not installed") and "the choice may do up to" in warned
    assert missing == "integer programming needs scipy (pip install 'hf-sparse-attn[report]')"
