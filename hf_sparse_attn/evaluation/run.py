"""`hf-sparse-attn eval`: all methods at equal density on the shipped models."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hf_sparse_attn.bench.patterns import scaled
from hf_sparse_attn.context import TokenLayout, check_int
from hf_sparse_attn.cost.timing import threads
from hf_sparse_attn.evaluation.equal_density import fit_density
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.result import PROFILED, SUBJECTS, estimate_share
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.profiling.budget import BudgetError
from hf_sparse_attn.profiling.candidates import block_for, tile_for
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

    Raises:
        ValueError: unknown name; or another method was asked for.
    """
    for name in wanted or ():
        if METHODS.get(name).knob is None:
            raise ValueError(f"`methods` must be such whose density can be set, got {name!r}")
        if METHODS.get(name).reads:
            raise ValueError(f"`methods` must be such that choose by q, k and v alone, got {name!r}")
    return list(wanted or (name for name, cls in METHODS.items() if cls.knob is not None and not cls.reads))


def fitted(
    names: Sequence[str], densities: Sequence[float], calls: Sequence[Call], skipped: dict[str, str], title: str
) -> Iterator[tuple[str, float, Method]]:
    """Every method at every density on captured calls, with a bar: (name, density asked for, the method turned to it).

    Args:
        names, densities: of the methods, and what they are turned to.
        calls: of the model.
        skipped: gets the reasons of what is left out, by method.
        title: of the bar.
    """
    with tqdm(total=len(names) * len(densities), desc=title, leave=False, disable=None) as bar:
        for name in names:
            method = base_method(name, calls[0].ctx.layout)
            reason = method.why_not(calls[0].ctx)
            if reason is not None:
                skipped[name] = reason
                bar.update(len(densities))
                continue
            known: dict[Method, float] = {}
            beyond: list[str] = []
            for density in densities:
                bar.set_postfix_str(f"{name} at {density:g}")
                found = fit_density(method, density, calls).method
                if found in known:
                    beyond.append(f"{density:g} is out of reach, the nearest is what is shown for {known[found]:g}")
                else:
                    known[found] = density
                    yield name, density, found
                bar.update()
            if beyond:
                skipped[name] = "; ".join(beyond)


def common_figures(method: Method, name: str, wanted: float | None, reference: Reference) -> dict[str, Any]:
    """The fields of Row that are measured on captured calls; density is left to the caller."""
    seen = reference.compare(method)
    return {
        "name": name,
        "label": label_of(method),
        "wanted": wanted,
        "recall": seen.recall,
        "output_error": seen.output_error,
        "estimate_share": estimate_share(method, reference.calls),
    }


def profiles_within(
    model: Any, batches: Sequence[Any], metric: str, densities: Sequence[float], skipped: dict[str, str]
) -> dict[float, HeadProfile]:
    """The choice for each density from one measurement; where no choice is as sparse, the reason goes to `skipped`."""
    measured = profile(model, batches, budget=1.0, metric=metric)
    assert measured.measurements is not None
    found = {}
    for density in densities:
        try:
            found[density] = from_measurements(measured.measurements, measured.model, density, metric)
        except BudgetError as error:
            skipped[f"{PROFILED} at {density:g}"] = str(error)
    return found


def dense_figures() -> dict[str, Any]:
    """The same for dense attention, which is what the others are compared with."""
    own = {"name": "dense", "label": "dense", "wanted": None}
    return {**own, "recall": 1.0, "output_error": 0.0, "estimate_share": 0.0}


def main(args: argparse.Namespace) -> str:
    """Runs the command; returns what is printed."""
    from hf_sparse_attn.evaluation import plot as evaluate_plot

    densities = args.densities or (0.0625, 0.125, 0.25)
    # What can be refused is refused before anything is measured.
    for density in densities:
        check_share("density", density)
    for name in ("documents", "clips", "tokens"):
        check_int(name, getattr(args, name), 1)
    output = None if args.output is None else Path(args.output)
    if output is not None:
        # A folder that cannot be made must not cost a result of many minutes.
        make_folder(output)
    names = turnable_methods(args.methods)
    with threads(args.threads):
        results = [
            import_module(f"hf_sparse_attn.evaluation.{subject}").evaluate(
                args, names, densities, not args.no_profile, output
            )
            for subject in SUBJECTS
            if args.model in (subject, "all")
        ]
    if output is not None:
        evaluate_plot.write(results, output)
    if args.json:
        return json.dumps([result.to_dict() for result in results], indent=2)
    return "\n\n".join(map(str, results))
