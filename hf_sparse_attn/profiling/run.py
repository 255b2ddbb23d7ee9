"""profile(): measures every head, spends a budget where it matters, and returns the HeadProfile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.family import pretrained_models
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.pattern.rows import head_densities
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import DEFAULT_METRIC, Measurements, weights_of
from hf_sparse_attn.profiles.step_plan import StepPlan
from hf_sparse_attn.profiling.budget import SOLVERS, BudgetError, Choice, choose, choose_elastic, pareto
from hf_sparse_attn.profiling.density import keep_in_use
from hf_sparse_attn.profiling.evaluate import evaluate
from hf_sparse_attn.profiling.measure import Batch, longest, measure
from hf_sparse_attn.profiling.tally import Steps, longest_of_class
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.sharing.fingerprint import Fingerprint

Floats = NDArray[np.float64]
Per = Literal["density", "time"]
_LIBRARIES = ("hf_sparse_attn", "torch", "transformers", "diffusers")


def profile(
    model: Any,
    batches: Iterable[Batch],
    candidates: Sequence[str | Method] | None = None,
    budget: float = 0.25,
    metric: str = DEFAULT_METRIC,
    *,
    per: Per = "density",
    solver: str = "exact",
    same_in_group: bool = False,
    max_plans_per_layer: int | None = None,
    floor: float | None = None,
    passes: int = 1,
    metrics: Sequence[str] = (),
    steps: Sequence[Steps] | None = None,
    query_blocks: int | None = None,
    maps: int = 16,
    state: Path | str | None = None,
    seed: int = 0,
    progress: bool = True,
    source: str = "",
    held_out: Iterable[Batch] | None = None,
) -> HeadProfile:
    """Finds out which method each head tolerates, and chooses one for every head within a budget.

    The model runs densely on the batches while every candidate is measured on its q, k and v (see `measure`); then
    the choice with the least total damage is made (see budget.choose). The model is left as it was.

    Args:
        model: a transformers model, a diffusers transformer, or a diffusers pipeline; not patched. Of one whose parts
            differ, a part: an encoder by itself, a decoder with callables that run the whole model.
        batches: calibration inputs, as for `measure`; lengths that are nearest to different powers of two are
            measured apart, and the choice then keeps within the budget at each (MoA's elastic rule).
        candidates: methods or names of methods to choose from; None means sensible ones for the kind of tokens.
        budget: share in (0, 1] of the dense cost.
        metric: what damage is: "output_error", "layer_error", "recall", "influence", "retrieval_score" or "video_mse"
            (`measure` says what each needs of the batches), or a sum such as "layer_error + 0.1 * retrieval_score".
        per: "density", the kept share of the visible pairs of tokens, mean over heads, is within the budget, in sparse
            runs of the model on the batches where these are a sequence, else by the dense model's q and k; "time", the
            attention's time by the cost model of this device.
        solver: "exact", "milp" or "lagrangian".
        same_in_group: the query heads of a key/value head get one method and read the union of their patterns; the
            damage of a group is the sum over its heads.
        max_plans_per_layer: most distinct methods in a layer, dense counted; None means any number.
        floor: largest damage allowed for a head; one without a candidate within it is dense.
        passes: 1, or 2: after the choice all is measured again, each layer with the choice in force in the layers
            before it, and chosen anew; twice the time.
        metrics: more to measure, for the report.
        steps: (start, end) ranges of denoising steps that get a choice of their own, from 0 to 1 without a gap.
        query_blocks, maps, seed: as in `measure`.
        state: a file to keep what was measured in after every batch; a killed profile goes on from there.
        progress: whether to show a bar on stderr.
        source: what the batches are, in words, for the file.
        held_out: inputs that the profile is not made from, of any lengths: the finished profile is run on them beside
            dense attention, and has the figures of the whole model as its `evaluation`.

    Raises:
        TypeError: a model of no known family, or batches of another type.
        ValueError: a value out of range, a metric the batches do not allow, a budget that cannot be met, or a patched
            model. The model is then untouched.
    """
    check_settings(
        budget, metric, per=per, solver=solver, max_plans_per_layer=max_plans_per_layer, passes=passes, steps=steps
    )
    if steps is not None and len(steps) > 1 and pretrained_models(model):
        raise ValueError(f"`steps` must be left out for a model without denoising steps, got {list(steps)}")
    terms = tuple(weights_of(metric))
    if passes > 1 and not isinstance(batches, Sequence):
        batches = list(batches)
    model_print = Fingerprint.of(model)
    settings: dict[str, Any] = {"solver": solver, "max_plans_per_layer": max_plans_per_layer, "floor": floor}
    options: dict[str, Any] = {"query_blocks": query_blocks, "seed": seed, "steps": steps, "progress": progress}
    made: HeadProfile | None = None
    for number in range(passes):
        path = state if number == 0 or state is None else Path(f"{state}.pass{number + 1}")
        found = measure(
            model, batches, candidates, (*terms, *metrics), maps=maps, state=path,
            method=None if made is None else made.method(),
            foresee=partial(_check_reach, budget, longest(batches)) if per == "density" else None,
            budget=budget if per == "density" else 1.0, **options,
        )  # fmt: skip
        # What was chosen from by default must be so again.
        candidates = found.candidates
        said: dict[str, Any] = {"tokens": [c.tokens for c in found.cases], "seed": seed, "passes": number + 1}
        if isinstance(batches, Sequence):
            said["batches"] = len(batches)
        said["longest"] = longest(batches) or max(c.tokens for c in found.cases)
        if query_blocks is not None:
            said["query_blocks"] = query_blocks
        if source:
            said["source"] = source
        made = from_measurements(
            found, model_print, budget, metric, per=per, same_in_group=same_in_group, calibration=said, **settings
        )
    assert made is not None
    # An iterator has been used up by now.
    known = batches if isinstance(batches, Sequence) else ()
    return _in_use(model, made, known, held_out, settings)


def at_budget(
    model: Any,
    made: HeadProfile,
    batches: Sequence[Batch],
    budget: float,
    held_out: Iterable[Batch] | None = None,
    **settings: Any,
) -> HeadProfile:
    """`profile` at another budget, from what was measured for one.

    Args:
        model, batches, held_out: as in `profile`, and as they were for `made`.
        made: a profile with its measurements, of a budget of density.
        budget: share in (0, 1] of the dense density.
        **settings: solver, max_plans_per_layer and floor, as in `profile`.

    Raises:
        ValueError: a profile without measurements, or a budget that cannot be met.
    """
    if made.measurements is None or "density" not in made.budget:
        raise ValueError(f"`made` must have its measurements and a budget of density, got {made!r}")
    again = from_measurements(
        made.measurements, made.model, budget, made.metric, same_in_group=made.same_in_group,
        calibration=made.calibration, **settings,
    )  # fmt: skip
    return _in_use(model, again, batches, held_out, settings)


def _in_use(
    model: Any, made: HeadProfile, batches: Sequence[Batch], held_out: Iterable[Batch] | None, settings: dict[str, Any]
) -> HeadProfile:
    """A choice, kept to a budget of density in sparse runs on the batches, with its figures on other inputs."""
    if "density" in made.budget and batches:
        assert made.measurements is not None
        choose = partial(
            from_measurements, made.measurements, made.model, metric=made.metric, same_in_group=made.same_in_group,
            calibration=made.calibration, **settings,
        )  # fmt: skip
        made = keep_in_use(model, made, batches, choose)
    return made if held_out is None else replace(made, evaluation=evaluate(model, made, held_out))


def check_settings(
    budget: float, metric: str, *, per: str = "density", solver: str = "exact",
    max_plans_per_layer: int | None = None, passes: int = 1, steps: Sequence[Steps] | None = None,
) -> None:  # fmt: skip
    """Refuses settings of `profile` that no model could have.

    Raises:
        TypeError, ValueError: a value out of range, or an unknown name.
    """
    weights_of(metric)
    if per not in ("density", "time"):
        raise ValueError(f"`per` must be 'density' or 'time', got {per!r}")
    check_share("budget", budget)
    if solver not in SOLVERS:
        raise ValueError(f"`solver` must be one of {', '.join(SOLVERS)}; got {solver!r}{nearest(solver, SOLVERS)}")
    if max_plans_per_layer is not None:
        check_int("max_plans_per_layer", max_plans_per_layer, 1)
    if check_int("passes", passes, 1) > 2:
        raise ValueError(f"`passes` must be 1 or 2, got {passes}")
    if steps is not None:
        edges = [float(edge) for pair in steps for edge in pair]
        follow = edges and edges[0] == 0 and edges[-1] == 1 and edges[1:-1:2] == edges[2:-1:2]
        if not follow or edges != sorted(edges) or len(set(edges)) < len(steps) + 1:
            raise ValueError(f"`steps` must follow one another from 0 to 1, got {list(steps)}")


def _check_reach(budget: float, most: int, candidates: Sequence[Method], ctx: Context) -> None:
    """Refuses a budget that no candidate can meet at the length of a call, before anything is measured.

    Of text the longest length counts that shares its figures with the call's: the longer, the less is kept.

    Args:
        budget: density.
        most: tokens of the longest batch, 0 where that is unknown.
        candidates: methods to choose from.
        ctx: of the call.

    Raises:
        BudgetError: tells the least density.
    """
    layout = ctx.layout
    if all(part.kind == "text" for part in layout.parts) and not layout.query_start:
        length = max(layout.kv_len, min(most, longest_of_class(layout.kv_len)))
        layout = (TokenLayout.causal if layout.is_causal else TokenLayout.bidirectional)(length)
        ctx = replace(ctx, layout=layout)
    least = min(_least_density(method, ctx) for method in candidates)
    if least > budget:
        raise BudgetError(
            f"`budget` must be at least {least:.3g}, the least that a candidate keeps of {layout}, got {budget}",
            (least,),
        )


def _least_density(method: Method, ctx: Context) -> float:
    """The least share of the pairs that a head keeps by a method, as far as that is known without looking at it."""
    if method.name == "dense" or method.why_not(ctx) is not None:
        return 1.0
    if not method.static:
        # Blocks at the diagonal are cut, so that less than the density asked for may be kept.
        return 0.9 * method.least_density(ctx)
    found = method.static_pattern(ctx, torch.device("cpu"))
    return 1.0 if isinstance(found, Decline) else float(head_densities(found, ctx.layout.density_count).min())


def from_measurements(
    found: Measurements,
    model: Fingerprint,
    budget: float = 0.25,
    metric: str = DEFAULT_METRIC,
    *,
    per: Per = "density",
    solver: str = "exact",
    same_in_group: bool = False,
    max_plans_per_layer: int | None = None,
    floor: float | None = None,
    calibration: Mapping[str, Any] | None = None,
) -> HeadProfile:
    """The choice for a budget from what was measured before: another budget or metric needs no new run.

    Args:
        found: what `measure` gave, or a profile's `measurements`.
        model: what was measured.
        budget, metric, per, solver, same_in_group, max_plans_per_layer, floor: as in `profile`.
        calibration: what was measured on, for the file.

    Raises:
        ValueError: a metric that was not measured, or a budget that cannot be met.
    """
    check_share("budget", budget)
    problem = _Problem(found, metric, per, same_in_group)
    options: dict[str, Any] = {"solver": solver, "max_plans_per_layer": max_plans_per_layer}
    options |= {"layers": problem.layers, "groups": problem.groups}
    if floor is not None:
        # Damage is weighed by the share of the steps, so that the floor is, too.
        options["floor"] = floor * problem.weight
    chosen = problem.choose(budget, options)
    choice = problem.spread(chosen.candidate)
    used = sorted({0, *choice.flatten().tolist()})
    number = {candidate: i for i, candidate in enumerate(used)}
    renamed = np.vectorize(number.__getitem__, otypes=[np.int16])(choice)
    front = pareto(problem.damage.mean(0), problem.cost.mean(0), **{**options, "solver": "lagrangian"})
    return HeadProfile(
        model=model,
        methods=tuple(found.candidates[i] for i in used),
        plans=tuple(StepPlan(steps, plan) for steps, plan in zip(problem.steps, renamed, strict=True)),
        figures=problem.figures(choice),
        metric=metric,
        budget={per: budget},
        calibration=dict(calibration or {}),
        pareto=tuple(front),
        same_in_group=same_in_group,
        versions=library_versions(),
        measurements=found,
    )


class _Problem:
    """Measurements as the tables that a budget is spent by: units are the heads of all layers and step ranges.

    Units of layers that never attended are left out; their heads are dense.
    """

    def __init__(self, found: Measurements, metric: str, per: Per, same_in_group: bool) -> None:
        self.found, self.metric = found, metric
        self.steps = sorted({case.steps for case in found.cases})
        lengths = _lengths(found, self.steps)
        # [lengths, plans, layers, heads, candidates].
        damage = found.damage(metric)[lengths]
        cost = found.figures["density"].astype(np.float64)[lengths]
        if per == "time":
            cost = found.figures["seconds"].astype(np.float64)[lengths]
            dense = cost[..., :1]
            cost = cost / np.nanmean(dense, axis=(1, 2, 3, 4), keepdims=True)
        share = np.array([end - start for start, end in self.steps])[None, :, None, None, None] * len(self.steps)
        seen = np.isfinite(damage[..., 0]).all(0)
        self.places = np.argwhere(seen)
        plan, layer, head = self.places.T
        self.shape = (*seen.shape,)
        self.damage: Floats = (damage * share)[:, plan, layer, head]
        self.cost: Floats = (cost * share)[:, plan, layer, head]
        self.weight: Floats = np.broadcast_to(share[..., 0], (1, *seen.shape))[0][plan, layer, head]
        self.cost[~np.isfinite(self.damage)] = np.inf
        self.layers = plan * seen.shape[1] + layer
        group = head // (found.heads // found.kv_heads)
        self.groups = self.layers * found.kv_heads + group if same_in_group else None
        self.lengths = lengths

    def choose(self, budget: float, options: Mapping[str, Any]) -> Choice:
        """The best choice within the budget at every length."""
        if len(self.damage) == 1:
            return choose(self.damage[0], self.cost[0], budget, **options)
        if "floor" in options:
            options = {**options, "floor": np.broadcast_to(options["floor"], self.damage.shape[:2])}
        try:
            return choose_elastic(self.damage, self.cost, [budget] * len(self.damage), **options)
        except BudgetError as error:
            least = f"at least {max(error.least):g}" if max(error.least) > budget else "such that all lengths meet it"
            said = f"`budget` must be {least}, got {budget} for lengths whose least is"
            raise BudgetError(f"{said} {', '.join(f'{x:g}' for x in error.least)}", error.least) from error

    def spread(self, candidate: NDArray[np.int64]) -> NDArray[np.int64]:
        """Candidates of units as [plans, layers, heads]; dense where nothing was seen."""
        out = np.zeros(self.shape, np.int64)
        out[tuple(self.places.T)] = candidate
        return out

    def figures(self, choice: NDArray[np.int64]) -> dict[str, NDArray[np.float32]]:
        """What was measured of the chosen, mean over lengths, [plans, layers, heads]."""
        figures = {**self.found.figures, "damage": self.found.damage(self.metric)}
        picked = {}
        for name, values in figures.items():
            every: Floats = np.asarray(values, np.float64)[self.lengths]
            index = np.broadcast_to(choice[None, ..., None], (*every.shape[:-1], 1))
            picked[name] = np.take_along_axis(every, index, -1)[..., 0].mean(0)
            picked[name] = np.where(np.isfinite(picked[name]), picked[name], np.nan).astype(np.float32)
        return picked


def _lengths(found: Measurements, steps: Sequence[Steps]) -> NDArray[np.int64]:
    """Numbers of the cases, [lengths, step ranges].

    Raises:
        ValueError: a length that was not seen at all step ranges, or ranges that leave a gap.
    """
    if steps[0][0] != 0 or steps[-1][1] != 1 or any(a[1] != b[0] for a, b in pairwise(steps)):
        raise ValueError(f"`batches` must reach every range of steps from 0 to 1, got calls in {list(steps)} alone")
    by_steps = [[i for i, case in enumerate(found.cases) if case.steps == s] for s in steps]
    if len({len(numbers) for numbers in by_steps}) > 1:
        raise ValueError(f"`batches` must have every length at every range of steps, got {list(found.cases)}")
    ordered = [sorted(numbers, key=lambda i: found.cases[i].tokens) for numbers in by_steps]
    return np.array(ordered, np.int64).T


def library_versions() -> dict[str, str]:
    """Installed versions of this package and of those a profile depends on."""
    found = {}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
