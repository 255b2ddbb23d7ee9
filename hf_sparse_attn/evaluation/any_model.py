"""Evaluation of any model: texts, images, speech or prompts of the user's own, against the dense model."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

from hf_sparse_attn.api import check_device, patch
from hf_sparse_attn.context import check_int
from hf_sparse_attn.evaluation.equal_density import Fit
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.outputs import FIGURES, Dense, Runner, captured
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import PROFILED, Result, Row, difference
from hf_sparse_attn.evaluation.run import (
    Contestant,
    Measure,
    Trial,
    common_figures,
    dense_figures,
    dense_of,
    fitted,
    measured_density,
    profiles_within,
    settled,
)
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import HeadProfile, find_profile
from hf_sparse_attn.profiling.inputs import load, read_call, read_text
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.shipped.byte_llama import default_metric

# Inputs to fit and profile with, and to correct densities by, where there are enough besides those that are scored.
_CALIBRATION, _CORRECTION = 2, 1
# Attention calls that densities are fitted on, and such that fidelity is measured on.
_FITTED, _LOOKED_AT = 12, 8


@dataclass(frozen=True)
class ModelRow(Row):
    """See Row.

    Args:
        figures: means over the inputs, by name of FIGURES.
    """

    figures: dict[str, float] = field(default_factory=dict)

    def own_columns(self) -> Sequence[tuple[str, Callable[[Any], str]]]:
        """A column for each figure, and another for the difference where dense has a figure of its own."""
        made: list[tuple[str, Callable[[Any], str]]] = []
        for name in self.figures:
            about = FIGURES[name]
            made.append((about.heading, partial(_cell, name)))
            if about.dense is None:
                made.append(("over dense", partial(difference, figure=name, digits=about.digits)))
        return made

    def own_plots(self) -> Sequence[tuple[str, str, bool]]:
        """A panel for each figure, and fidelity of attention."""
        own = [(name, FIGURES[name].label, FIGURES[name].larger) for name in self.figures]
        return [*own, ("recall", "attention recall", True), ("output_error", "relative attention error", False)]

    def value(self, figure: str) -> float:
        """A figure of the model, or one that all rows have."""
        return self.figures[figure] if figure in self.figures else super().value(figure)


def _cell(name: str, row: ModelRow) -> str:
    digits = FIGURES[name].digits
    spread = row.paired[name].spread(digits) if FIGURES[name].dense is not None and row.paired else ""
    return f"{row.figures[name]:.{digits}f}{spread}"


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores methods on a model from a folder, the Hub, a GGUF file or a pipeline.

    Args:
        args: of the command.
        names: methods; those without a knob are scored as they are.
        densities: kept shares of the visible pairs.
        profiled: also score the mix that the profiler chooses at each density.
        output: unused; what a model gives is kept nowhere.

    Raises:
        ValueError, OSError: as `load`; or inputs that no attention is seen on.
    """
    begin = time.perf_counter()
    known = None if args.profile is None else _profile(args.profile)
    model, batches, source = load(
        args.model,
        texts=_texts(args.texts),
        images=_paths(args.images),
        audio=_paths(args.audio),
        prompts=args.prompts,
        length=None if args.tokens is None else [args.tokens],
        size=args.size,
        count=check_int("inputs", args.inputs, 1) + _CALIBRATION + _CORRECTION,
        part=args.part,
        call=None if args.call is None else read_call(args.call),
        dtype=args.dtype,
        device=check_device(args.device),
        seed=check_int("seed", args.seed, 0),
        shorter=True,
    )
    if known is not None:
        known.check(model)
    calibration, correction, scored, said = _shared_out(batches, args.inputs)
    runner = Runner(model)
    calls = captured(model, lambda: runner.alone(calibration[0]), _FITTED)
    held_out = Reference(captured(model, lambda: runner.alone(scored[0]), _LOOKED_AT))
    first = [runner.output(batch) for batch in scored]
    dense = [Dense(out, len(scored)) for out in first]
    whole = [one.figures(out) for one, out in zip(dense, first, strict=True)]
    del first
    skipped: dict[str, str] = {}

    def measure(method: Method) -> float:
        with patch(model, method, min_tokens=0) as applied:
            runner.alone(correction)
        return measured_density(applied)

    def run(method: Method) -> Trial:
        with patch(model, method, min_tokens=0) as applied:
            found = [one.figures(runner.output(batch)) for one, batch in zip(dense, scored, strict=True)]
        return Trial(measured_density(applied), {"figures": _means(found), "paired": _paired(found, whole)})

    rows: list[Row] = [ModelRow(figures=_means(whole), **dense_figures())]
    contestants = fitted(names, densities, calls, measure, skipped, Path(args.model).name)
    if known is not None:
        own: Iterator[Contestant] = iter([Contestant(f"profile {args.profile}", None, Fit(known.method(), 0.0))])
    else:
        own = _mixes(args.model, model, calibration, densities, skipped, measure) if profiled else iter(())
    for contestant in chain(contestants, own):
        rows.append(ModelRow(**common_figures(*settled(contestant, run), held_out)))
    layouts = " and ".join(dict.fromkeys(str(call.ctx.layout) for call in calls))
    setting = f"{args.model}, {_counted(len(scored), 'input')} of {source} ({layouts}){said}"
    return Result("model", setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def _profile(source: str) -> HeadProfile:
    found = find_profile(source)
    if found is None:
        raise ValueError(f"`profile` must be the folder or Hub id of a head profile, got {source!r}")
    return found


def _shared_out(batches: Sequence[Any], scored: int) -> tuple[Sequence[Any], Any, Sequence[Any], str]:
    """Inputs to fit on, one to correct by, those to score, and what is to be said of them.

    Args:
        batches: all there are.
        scored: as many are to be scored.
    """
    if len(batches) <= 2:
        what = "what is scored, for there is nothing else" if len(batches) == 1 else "the other one"
        return batches[:1], batches[0], batches[-1:], f"; densities fitted on {what}"
    fit = min(_CALIBRATION, max(1, len(batches) - _CORRECTION - scored))
    return batches[:fit], batches[fit], batches[fit + _CORRECTION :], ""


def _mixes(
    name: str,
    model: Any,
    batches: Sequence[Any],
    densities: Sequence[float],
    skipped: dict[str, str],
    measure: Measure,
) -> Iterator[Contestant]:
    """What the profiler chooses; a model of several parts has no profile as a whole, which is said."""
    try:
        Fingerprint.of(model)
    except ValueError as error:
        skipped[PROFILED] = str(error)
        return
    yield from profiles_within(model, batches, default_metric(name), densities, skipped, measure)


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(one[name] for one in found) for name in found[0]}


def _paired(found: Sequence[dict[str, float]], whole: Sequence[dict[str, float]]) -> dict[str, Paired]:
    """Differences from dense; a PSNR has none, for that of equal pictures is no number."""
    made = {}
    for name in found[0]:
        dense = None if name == "psnr" else [one[name] for one in whole]
        made[name] = Paired.of([one[name] for one in found], dense)
    return made


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def _texts(files: Sequence[str] | None) -> Any:
    """What stands in some files, or the one file or folder."""
    if files is None or len(files) == 1:
        return None if files is None else files[0]
    return [read_text("texts", file) for file in files]


def _paths(files: Sequence[str] | None) -> Any:
    """Some files, or the one file or folder."""
    return None if files is None else files[0] if len(files) == 1 else [Path(file) for file in files]
