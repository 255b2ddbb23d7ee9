"""Evaluation of any model: texts, images, speech or prompts of the user's own, against the dense model."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hf_sparse_attn.api import check_device
from hf_sparse_attn.context import check_int
from hf_sparse_attn.evaluation.compare import Subject, compare
from hf_sparse_attn.evaluation.outputs import FIGURES, Dense, Runner
from hf_sparse_attn.evaluation.result import Result, Row, difference
from hf_sparse_attn.evaluation.run import load_profile
from hf_sparse_attn.profiling.input_batches import read_text
from hf_sparse_attn.profiling.inputs import load, read_call
from hf_sparse_attn.profiling.observe import Call

# Inputs to score where nothing is said.
INPUTS = 4
# Inputs to fit and profile with, and to correct densities by, where there are enough besides those that are scored.
_CALIBRATION, _CORRECTION = 2, 1


@dataclass(frozen=True)
class ModelRow(Row):
    """See Row.

    Args:
        figures: means over the inputs, by name of FIGURES.
    """

    figures: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, **fields: Any) -> ModelRow:
        """A row of figures by name, and of the fields of Row."""
        figures = {name: fields.pop(name) for name in FIGURES if name in fields}
        return cls(figures=figures, **fields)

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
    inputs = args.inputs or INPUTS
    if args.profile is not None:
        # Before a model is loaded for it.
        load_profile(args.profile)
    model, batches, source = load(
        args.model,
        texts=_texts(args.texts),
        images=_paths(args.images),
        audio=_paths(args.audio),
        prompts=args.prompts,
        length=None if args.tokens is None else [args.tokens],
        size=args.size,
        count=inputs + _CALIBRATION + _CORRECTION,
        part=args.part,
        call=None if args.call is None else read_call(args.call),
        dtype=args.dtype,
        device=check_device(args.device),
        seed=check_int("seed", args.seed, 0),
        shorter=True,
    )
    calibration, correction, scored, said = _shared_out(batches, inputs)
    runner = Runner(model)

    def setting(calls: Sequence[Call]) -> str:
        layouts = " and ".join(dict.fromkeys(str(call.ctx.layout) for call in calls))
        number = f"{len(scored)} input" + ("" if len(scored) == 1 else "s")
        return f"{args.model}, {number} of {source} ({layouts}){said}"

    return compare(
        Subject(
            name="model",
            setting=setting,
            model=model,
            row=ModelRow.of,
            calibration=calibration,
            correction=correction,
            scored=scored,
            run=runner.alone,
            output=runner.output,
            kept=lambda out: Dense(out, len(scored)),
            figures=lambda out, dense: dense.figures(out),
            one_sided=("psnr",),
        ),
        names, densities, profiled, args.profile,
    )  # fmt: skip


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


def _texts(files: Sequence[str] | None) -> Any:
    """What stands in some files, or the one file or folder."""
    if files is None or len(files) == 1:
        return None if files is None else files[0]
    return [read_text("texts", file) for file in files]


def _paths(files: Sequence[str] | None) -> Any:
    """Some files, or the one file or folder."""
    return None if files is None else files[0] if len(files) == 1 else [Path(file) for file in files]
