"""Result: what methods gave at equal density, as a value and a table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.tables import table

PROFILED = "per-head profile"
HELD_OUT, SCORED = "held out", "scored"
# What stands in a column of differences.
EXPLAINED = "mean difference ± standard error; + more, - less, = as much as dense, a sign for each input"
# Shipped models and how they are called as models.
SHIPPED_AS = {"language": "byte_llama", "video": "moving_wan"}
SUBJECTS = tuple(SHIPPED_AS)


@dataclass(frozen=True)
class Row:
    """One method at one density, or dense.

    Args:
        name: the method, or PROFILED.
        label: the method with its parameters.
        wanted: density asked for; None for dense.
        density: kept share of the visible pairs of query and key in the runs that were scored, by their reports.
        recall: share of the dense attention mass on kept keys.
        output_error: relative error of the attention output on the dense model's own q, k, v.
        estimate_share: part of the time of a sparse call that goes into choosing what to keep.
        paired: differences from dense on the same inputs, by figure.
        limit: why the density is not the one asked for; "" where it is, within 2 % of it.
        turned_by: HELD_OUT or SCORED, the inputs by whose runs the density was corrected last; "" where it was not.
    """

    name: str
    label: str
    wanted: float | None
    density: float
    recall: float
    output_error: float
    estimate_share: float
    paired: Mapping[str, Paired] = field(default_factory=dict, kw_only=True)
    limit: str = field(default="", kw_only=True)
    turned_by: str = field(default="", kw_only=True)

    # Columns of the table behind those that all rows have: heading, and what stands there.
    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = ()
    # What is plotted against density: attribute, axis label, whether larger is better.
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = ()

    def own_columns(self) -> Sequence[tuple[str, Callable[[Any], str]]]:
        """`columns`, by which a table of such rows is drawn."""
        return self.columns

    def own_plots(self) -> Sequence[tuple[str, str, bool]]:
        """`plots` of such rows."""
        return self.plots

    def value(self, figure: str) -> float:
        """A figure by its name."""
        return float(getattr(self, figure))


@dataclass(frozen=True)
class Result:
    """What one evaluation found.

    Args:
        subject: a word, of which files of it are named.
        setting: what was run, in words.
        dense: what all rows are compared with, in words.
        rows: dense first, then method by method.
        skipped: reasons by method.
        seconds: what it took.
    """

    subject: str
    setting: str
    dense: str
    rows: Sequence[Row]
    skipped: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    def __str__(self) -> str:
        own = self.rows[0].own_columns()
        names = ["method", "asked", "density", "recall", "error", *(name for name, _ in own), "choosing"]
        lines = [
            [
                row.name,
                "" if row.wanted is None else f"{row.wanted:.4g}",
                f"{row.density:.3f}{'*' if row.limit else ''}",
                f"{row.recall:.3f}",
                f"{row.output_error:.3f}",
                *(show(row) for _, show in own),
                f"{row.estimate_share:.0%}",
            ]
            for row in self.rows
        ]
        text = table(names, lines, title=self.setting, width=150)
        said = [f"against {self.dense}, input by input: {EXPLAINED}"] if any(row.paired for row in self.rows) else []
        said += [
            f"* {row.name} at {row.wanted:.4g}: {row.density:.3g} is the nearest, for {row.limit}"
            for row in self.rows
            if row.limit and row.wanted is not None
        ]
        by_scored = [f"{row.name} at {row.wanted:.4g}" for row in self.rows if row.turned_by == SCORED and row.wanted]
        if by_scored:
            said.append(f"turned once more by the density of the scored runs: {', '.join(by_scored)}")
        return "\n".join([text, *said, *(f"{name}: left out, {why}" for name, why in self.skipped.items())])


def difference(row: Row, figure: str, digits: int = 4) -> str:
    """The cell of a figure's difference from dense."""
    return row.paired[figure].shown(digits) if figure in row.paired else ""


def estimate_share(method: Method, calls: Sequence[Call]) -> float:
    """Part of the time of sparse attention that goes into the pattern; what is cached for a layout costs nothing.

    Args:
        method: with its parameters.
        calls: timed one after another, after one run that is not timed.
    """
    choosing, attending = 0.0, 0.0
    for _ in range(2):
        choosing, attending = 0.0, 0.0
        for q, k, v, ctx in calls:
            begin = time.perf_counter()
            pattern = method.pattern_for(q, k, ctx)
            middle = time.perf_counter()
            if isinstance(pattern, Decline):
                continue
            run_pattern(q, k, v, pattern, ctx.softmax_scale, softcap=ctx.softcap)
            choosing, attending = choosing + middle - begin, attending + time.perf_counter() - middle
    return choosing / (choosing + attending) if choosing else 0.0
