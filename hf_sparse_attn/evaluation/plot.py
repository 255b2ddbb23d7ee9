"""Files of `hf-sparse-attn eval`: JSON, a Markdown page, and fidelity against density."""

from __future__ import annotations

import json
import logging
import platform
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.cost.table import device_name
from hf_sparse_attn.evaluation.result import PROFILED, Result, Row
from hf_sparse_attn.extras import need
from hf_sparse_attn.profiling.run import library_versions

log = logging.getLogger(__name__)

# Colours that are told apart without red and green (Okabe and Ito), and a marker for each besides.
_COLOURS = "#0072B2 #E69F00 #009E73 #CC79A7 #56B4E9 #D55E00 #8C6D1F #7F7F7F #332288 #44AA99".split()
_MARKERS = "osD^vP<>X*"


_BARS = "bars: standard error of the difference from dense; signs where inputs do not agree on it (+ more than dense)"


def machine() -> dict[str, str]:
    """Device, versions and date of the figures."""
    found = {"device": device_name(torch.device("cpu")), "threads": str(torch.get_num_threads())}
    return {**found, "python": platform.python_version(), **library_versions(), "date": date.today().isoformat()}


def write(results: Sequence[Result], folder: Path) -> list[Path]:
    """Writes eval.json, eval.md and, where matplotlib is installed, a plot for each model.

    Returns:
        the files.
    """
    where = machine()
    files = [folder / "eval.json", folder / "eval.md"]
    document: dict[str, Any] = {"machine": where, "results": [result.to_dict() for result in results]}
    files[0].write_text(json.dumps(document, indent=1) + "\n")
    said = ", ".join(f"{name} {value}" for name, value in where.items())
    parts = [f"# Methods at equal density\n\n{said}\n"]
    parts += [f"## {result.subject}\n\n```\n{result}\n```\n" for result in results]
    files[1].write_text("\n".join(parts))
    return files + [file for result in results if (file := draw(result, folder)) is not None]


def _error(row: Row, attribute: str) -> float:
    """Half the length of a bar."""
    found = row.paired.get(attribute)
    return 0.0 if found is None or found.error is None else found.error


def draw(result: Result, folder: Path) -> Path | None:
    """Fidelity against density, a panel for each figure; None, told in the log, where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        log.warning("the plot of fidelity %s", need("matplotlib"))
        return None
    plots = result.rows[0].own_plots()
    names = list(dict.fromkeys(row.name for row in result.rows if row.wanted is not None))
    figure = Figure(figsize=(3.6 * len(plots), 4.6), layout="constrained")
    for ax, (attribute, label, larger) in zip(figure.subplots(1, len(plots), squeeze=False)[0], plots, strict=True):
        for i, name in enumerate(names):
            own = sorted((row for row in result.rows if row.name == name), key=lambda row: row.density)
            x, y = [row.density for row in own], [row.value(attribute) for row in own]
            colour = "black" if name == PROFILED else _COLOURS[i % len(_COLOURS)]
            marker = _MARKERS[i % len(_MARKERS)]
            ax.errorbar(
                x, y, [_error(row, attribute) for row in own], label=name, color=colour, marker=marker,
                linewidth=2.4 if name == PROFILED else 1.4, markersize=6, alpha=0.9, capsize=2, elinewidth=0.9,
            )  # fmt: skip
            for at, height, row in zip(x, y, own, strict=True):
                if attribute in row.paired and not row.paired[attribute].agreed:
                    ax.annotate(row.paired[attribute].signs, (at, height), fontsize=6, color=colour, xytext=(3, 3),
                                textcoords="offset points")  # fmt: skip
        dense = result.rows[0].value(attribute)
        # Equal clips have no finite PSNR: a line for it would press all others together.
        if attribute != "psnr":
            ax.axhline(dense, color="black", linewidth=0.8, linestyle=":")
            ax.annotate("dense", (0.01, dense), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        ax.set_xscale("log", base=2)
        ticks = sorted({row.wanted for row in result.rows if row.wanted is not None})
        ax.set_xticks(ticks, [f"{t:.4g}" for t in ticks])
        ax.minorticks_off()
        ax.set_xlabel("density")
        ax.set_ylabel(f"{label} ({'higher' if larger else 'lower'} is better)", fontsize=9)
        ax.grid(alpha=0.25)
        ax.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(names)), frameon=False, fontsize=9)
    figure.suptitle(f"{result.setting}\n{_BARS}", fontsize=9)
    file = folder / f"eval_{result.subject}.png"
    figure.savefig(file, dpi=120)
    return file
