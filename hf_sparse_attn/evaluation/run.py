"""`hf-sparse-attn eval`: all methods at equal density, on the shipped models and on any other."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from hf_sparse_attn.bench.patterns import scaled
from hf_sparse_attn.context import TokenLayout, check_int
from hf_sparse_attn.cost.timing import threads
from hf_sparse_attn.evaluation.equal_density import VARIES, DensityCurve, Dial, Fit, correct_density, is_near
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.result import HELD_OUT, PROFILED, SCORED, SHIPPED_AS, SUBJECTS, estimate_share
from hf_sparse_attn.family import find_family
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.pretrained import NAMES
from hf_sparse_attn.profiles.head_profile import HeadProfile, find_profile
from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.profiling.budget import BudgetError
from hf_sparse_attn.profiling.candidates import block_for, tile_for
from hf_sparse_attn.profiling.inputs import check_dtype
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.profiling.run import from_measurements, profile
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.sharing.files import make_folder


def base_method(name: str, layout: TokenLayout) -> Method:
    """A method with its defaults, brought down to a short input: smaller blocks, and counts of tokens in proportion.

    Args:
        name: of the method.
        layout: the tokens of a call.
    """
    tokens = layout.kv_len
    made = scaled(METHODS.get(name), tokens)
    known = {f.name for f in fields(made)}
    given: dict[str, Any] = {}
    if "block_size" in known:
        given["block_size"] = block_for(tokens)
    if "tile" in known:
        given["tile"] = tile_for(layout)
    if "local" in known:
        # Blocks around the query; the default of 16 is a quarter of the input now.
        given["local"] = 1
    # Sinks of tokens shrink; those of blocks, and switches of this name, stay.
    sink = made.params().get("sink")
    if type(sink) is int and sink > 16:
        given["sink"] = 16
    return replace(made, **given)


def turnable_methods(wanted: Sequence[str] | None) -> list[str]:
    """Names of the methods with a knob that choose by q, k and v alone, or those of `wanted`.

    Those without a knob that are wanted are scored as they are.

    Raises:
        ValueError: unknown name; or another method was asked for.
    """
    for name in wanted or ():
        if METHODS.get(name).name == "dense":
            raise ValueError(f"`methods` must be such whose density can be set, got {name!r}")
        if METHODS.get(name).reads:
            raise ValueError(f"`methods` must be such that choose by q, k and v alone, got {name!r}")
    return list(wanted or (name for name, cls in METHODS.items() if cls.knob is not None and not cls.reads))


# Runs the model with a method on inputs that are not scored; gives the density that its report tells.
Measure = Callable[[Method], float]


class Contestant(NamedTuple):
    """A method, or the mix of a profile, that is to be scored.

    Args:
        name: the method, or PROFILED.
        wanted: density asked for; None for what is scored as it is.
        fit: the method turned to it.
        dial: what it was turned by; None for what has no such thing.
        step: as in `correct_density`.
        turned_by: as in Row.
    """

    name: str
    wanted: float | None
    fit: Fit
    dial: Dial | None = None
    step: Callable[[float], float] = lambda density: density
    turned_by: str = ""


class Trial(NamedTuple):
    """What the scored runs of a method gave.

    Args:
        density: by their reports.
        figures: fields of the row, `paired` among them.
    """

    density: float
    figures: dict[str, Any]


def fitted(
    names: Sequence[str], densities: Sequence[float], calls: Sequence[Call], measure: Measure, skipped: dict[str, str],
    title: str,
) -> Iterator[Contestant]:  # fmt: skip
    """Every method at every density, fitted on captured calls and corrected by runs, with a bar.

    Args:
        names, densities: of the methods, and what they are turned to.
        calls: of the model.
        measure: gives what a method keeps in runs.
        skipped: gets the reasons of what is left out, by method.
        title: of the bar.
    """
    with tqdm(total=len(names) * len(densities), desc=title, leave=False, disable=None) as bar:
        for name in names:
            method = base_method(name, calls[0].ctx.layout)
            # Of several kinds of calls the method may apply to some.
            own = [call for call in calls if method.why_not(call.ctx) is None]
            if not own:
                skipped[name] = str(method.why_not(calls[0].ctx))
                bar.update(len(densities))
                continue
            if method.knob is None:
                yield Contestant(name, None, Fit(method, measure(method)))
                bar.update(len(densities))
                continue
            curve = DensityCurve(method, own)
            known: dict[Method, float] = {}
            beyond: list[str] = []
            for density in densities:
                bar.set_postfix_str(f"{name} at {density:g}")
                found = correct_density(curve.dial, curve.nearest(density), density, measure, curve.nearest)
                if found.method in known:
                    shown = known[found.method]
                    beyond.append(f"{density:g} is out of reach, the nearest is what is shown for {shown:g}")
                else:
                    known[found.method] = density
                    yield Contestant(name, density, found, curve.dial, curve.nearest, HELD_OUT)
                bar.update()
            if beyond:
                skipped[name] = "; ".join(beyond)


def settled(contestant: Contestant, run: Callable[[Method], Trial]) -> tuple[Contestant, Trial]:
    """The scored runs of a contestant, at the density asked for.

    What differs from input to input may keep more or less of those that are scored than of the one by which it was
    corrected. It is then turned once more by what the scored runs keep; no figure of quality is looked at.

    Args:
        contestant: fitted and corrected on other inputs.
        run: runs the model with a method on all inputs.

    Returns:
        the contestant as it was scored, and what that gave.
    """
    trials: dict[Method, Trial] = {}

    def kept(method: Method) -> float:
        if method not in trials:
            trials[method] = run(method)
        return trials[method].density

    fit, wanted = contestant.fit, contestant.wanted
    density = kept(fit.method)
    if wanted is None:
        return contestant, trials[fit.method]
    if contestant.dial is not None and not fit.limit and not is_near(density, wanted):
        fit = correct_density(contestant.dial, fit.value, wanted, kept, contestant.step)
        fit = fit._replace(limit=fit.limit and VARIES)
        contestant = contestant._replace(fit=fit, turned_by=SCORED)
    return contestant, trials[fit.method]


def measured_density(applied: Patch) -> float:
    """The share of the visible pairs that the runs under a patch computed, by its report; of prefill alone."""
    found = applied.report().prefill_density
    return 1.0 if found is None else found


def common_figures(contestant: Contestant, trial: Trial, reference: Reference) -> dict[str, Any]:
    """The fields of a row: those that every row has, and what the scored runs gave.

    Args:
        contestant, trial: what was scored, and what that gave.
        reference: captured calls to measure fidelity on.
    """
    name, wanted, fit = contestant[:3]
    seen = reference.compare(fit.method)
    limit = "" if wanted is None or is_near(trial.density, wanted) else fit.limit or VARIES
    return {
        "name": name,
        "label": label_of(fit.method),
        "wanted": wanted,
        "density": trial.density,
        "recall": seen.recall,
        "output_error": seen.output_error,
        "estimate_share": estimate_share(fit.method, reference.calls),
        "limit": limit,
        "turned_by": contestant.turned_by,
        **trial.figures,
    }


def profiles_within(
    model: Any, batches: Sequence[Any], metric: str, densities: Sequence[float], skipped: dict[str, str],
    measure: Measure,
) -> Iterator[Contestant]:  # fmt: skip
    """The choice for each density from one measurement; where no choice is as sparse, the reason goes to `skipped`.

    Args:
        model, batches, metric: as in `profile`.
        densities: budgets.
        skipped: gets reasons.
        measure: gives what a method keeps in runs, by which the budget is corrected.
    """
    measured = profile(model, batches, budget=1.0, metric=metric)

    @cache
    def chosen(budget: float) -> Method:
        assert measured.measurements is not None
        return from_measurements(measured.measurements, measured.model, budget, metric).method()

    low = 1e-6
    try:
        chosen(low)
    except BudgetError as error:
        low = max(error.least) * (1 + 1e-6)
    dial = Dial(chosen, low, 1.0)
    for density in densities:
        try:
            chosen(density)
        except BudgetError as error:
            skipped[f"{PROFILED} at {density:g}"] = str(error)
            continue
        fit = correct_density(dial, density, density, measure, lambda budget: budget)
        yield Contestant(PROFILED, density, fit, dial, turned_by=HELD_OUT)


def load_profile(source: str) -> HeadProfile:
    """The profile to score.

    Raises:
        ValueError: there is none.
    """
    found = find_profile(source)
    if found is None:
        raise ValueError(f"`profile` must be the folder or Hub id of a head profile, got {source!r}")
    return found


def saved(source: str, model: Any) -> Contestant:
    """A finished profile among what is scored.

    Raises:
        ValueError: there is none, or it is of another model.
    """
    found = load_profile(source)
    found.check(model)
    return Contestant(f"profile {source}", None, Fit(found.method(), found.density))


def dense_figures() -> dict[str, Any]:
    """The same for dense attention, which is what the others are compared with."""
    own = {"name": "dense", "label": "dense", "wanted": None, "density": 1.0}
    return {**own, "recall": 1.0, "output_error": 0.0, "estimate_share": 0.0}


def dense_of(model: Any) -> str:
    """What runs where nothing is sparse, in words: the attention that a model has without a patch."""
    modules = find_family(model)[2]
    used = {getattr(getattr(module, "config", None), "_attn_implementation", None) for module in modules} - {None}
    said = f" ({' and '.join(sorted(map(str, used)))} attention)" if used else ""
    return f"the unpatched {type(model).__name__}{said}"


def main(args: argparse.Namespace) -> str:
    """Runs the command; returns what is printed."""
    from hf_sparse_attn.evaluation import plot as evaluate_plot

    args.model = _model(args.name, args.model)
    densities = args.densities or (0.0625, 0.125, 0.25)
    # What can be refused is refused before anything is measured.
    for density in densities:
        check_share("density", density)
    for name in ("documents", "clips", "inputs", "tokens"):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name), 1)
    check_dtype(args.dtype)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        # A folder that cannot be made must not cost a result of many minutes.
        make_folder(output)
    names = turnable_methods(args.methods)
    subjects = [subject for subject in SUBJECTS if args.model in (subject, "all")]
    if args.model in NAMES:
        subjects = [args.model]
    if subjects:
        _refuse_inputs(args, _TAKEN.get(args.model, ("tokens",)))
    with threads(args.threads):
        results = [
            import_module(f"hf_sparse_attn.evaluation.{subject}").evaluate(
                args, names, densities, not args.no_profile, output
            )
            for subject in subjects or ["any_model"]
        ]
    if output is not None:
        evaluate_plot.write(results, output)
    if args.json:
        return json.dumps([result.to_dict() for result in results], indent=2)
    return "\n\n".join(map(str, results))


def _model(first: str | None, named: str | None) -> str:
    """The model, which may be given either way."""
    if first is not None and named is not None and first != named:
        raise ValueError(f"`model` must be given once, got {first!r} and {named!r}")
    model = first or named or "all"
    return {name: subject for subject, name in SHIPPED_AS.items()}.get(model, model)


# What models with inputs of their own take of the options for any model; all of them together take "tokens".
_TAKEN = {
    "language": ("tokens", "profile"), "video": ("profile",),
    "smollm2": ("inputs", "tokens", "profile", "dtype"), "dinov2": ("inputs", "size", "profile"),
    "whisper": ("inputs", "profile"),
}  # fmt: skip


def _refuse_inputs(args: argparse.Namespace, taken: Sequence[str]) -> None:
    """Options that would be ignored for a model with inputs of its own."""
    own = ("texts", "images", "audio", "prompts", "inputs", "profile", "tokens", "size", "part", "call", "device",
           "dtype", "seed")  # fmt: skip
    nothing = {"dtype": "auto", "seed": 0}
    given = [f"--{name}" for name in own if name not in taken and getattr(args, name) != nothing.get(name)]
    if given:
        raise ValueError(f"{' and '.join(given)} must be left out for {args.model}, which has inputs of its own")
