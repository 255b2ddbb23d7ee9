"""What a benchmark run looks like: tables, Markdown, JSON and the picture of speed-up against density."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from hf_sparse_attn.bench.kernels import DENSE, NEW
from hf_sparse_attn.bench.tables import NOTES, TITLES, tables
from hf_sparse_attn.extras import need
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.tables import markdown, table


def header(result: dict[str, Any]) -> str:
    """One line: machine, versions, date."""
    at, versions = result["machine"], result["versions"]
    devices = ", ".join(str(d["name"]) for d in at["devices"])
    place = f"{devices} ({result['options']['device']}), " if result["options"]["device"] != "cpu" else ""
    kept = ("torch", "triton", "transformers", "diffusers", "hf-sparse-attn")
    found = ", ".join(f"{name} {versions[name]}" for name in kept if versions[name])
    threads = f"{at['cores']} cores, {at['threads']} threads"
    return f"{place}{at['cpu']} ({at['cpu_capability']}, {threads}); {found}; {result['date']}"


def render(result: dict[str, Any], width: int = 110) -> str:
    """The result as text tables."""
    parts = [header(result)]
    for name, (columns, rows) in tables(result).items():
        parts.append(TITLES[name])
        if columns[0] not in ("shape", "model") or name == "auto":
            parts.append(table(columns, rows, width=width).strip("\n"))
        else:
            # What all rows of a point share stands above them: the terminal has no room to repeat it.
            for point in dict.fromkeys(row[0] for row in rows):
                own = [row[1:] for row in rows if row[0] == point]
                parts.append(table(columns[1:], own, point, width).strip("\n"))
        parts.append(textwrap.fill(NOTES[name], width))
    return "\n\n".join(parts)


def as_markdown(result: dict[str, Any]) -> str:
    """The result as a Markdown document."""
    options = ", ".join(f"{k} {_plain(v)}" for k, v in result["options"].items() if v is not None)
    parts = ["# hf-sparse-attn bench", f"Machine: {header(result)}", f"Options: {options}"]
    for name, (columns, rows) in tables(result).items():
        parts += [f"## {TITLES[name]}", NOTES[name], markdown(columns, rows)]
    return "\n\n".join(parts) + "\n"


def write(result: dict[str, Any], directory: str | Path) -> list[str]:
    """Writes bench.json, bench.md and, where kernels ran and matplotlib is there, speedup.png.

    Returns:
        one line about each file, or why it is not there.
    """
    folder = Path(directory)
    make_folder(folder)
    (folder / "bench.json").write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")
    (folder / "bench.md").write_text(as_markdown(result), encoding="utf-8")
    notes = [f"wrote {folder / name}" for name in ("bench.json", "bench.md")]
    if "kernels" in result:
        notes.append(plot(result, folder / "speedup.png"))
    return notes


def plot(result: dict[str, Any], path: Path) -> str:
    """Draws speed-up against density, one panel per shape and dtype; returns one line about what came of it."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return f"no speedup.png: it {need('matplotlib')}"
    measured = [r for r in result["kernels"] if "speedup" in r and not r["contestant"].startswith((DENSE, *NEW))]
    if not measured:
        return "no speedup.png: no sparse contestant ran"

    def panel_of(r: dict[str, Any]) -> tuple[Any, ...]:
        return r["tokens"], r["dim"], r["dtype"], r["pass"]

    panels = list(dict.fromkeys(map(panel_of, measured)))
    names = sorted({r["contestant"] for r in measured})
    columns = min(4, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(1.2 + 3.3 * columns, 1.3 + 2.9 * lines), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    densities = sorted({r["achieved_density"] for r in measured})
    ends = [densities[0] / 1.3, min(1.0, densities[-1] * 1.3)]
    for at, panel in enumerate(panels):
        ax = axes[at // columns][at % columns]
        ax.plot(ends, [1 / d for d in ends], color="0.4", linestyle="--", linewidth=1, label="limit: 1 / density")
        ax.axhline(1.0, color="0.4", linewidth=1, label="dense attention")
        for number, name in enumerate(names):
            own = [r for r in measured if r["contestant"] == name]
            own = sorted((r for r in own if panel_of(r) == panel), key=lambda r: r["achieved_density"])
            if not own:
                continue
            x, y = [r["achieved_density"] for r in own], [r["speedup"] for r in own]
            # The spread of the contestant itself: its slowest and its fastest round.
            low = [r["speedup"] * (1 - r["median"] / r["max"]) for r in own]
            high = [r["speedup"] * (r["median"] / r["min"] - 1) for r in own]
            style = {"color": f"C{number}", "marker": "osD^v"[number % 5], "markersize": 4, "capsize": 2}
            ax.errorbar(x, y, yerr=[low, high], linewidth=1.2, label=name, **style)
        passes = "" if panel[3] == "forward" else f"\n{panel[3]}"
        ax.set_title(f"{panel[0]:,} tokens, dim {panel[1]}, {panel[2]}{passes}", fontsize=9)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log", base=2)
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}" if value >= 1 else f"1/{1 / value:g}")
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        ax.grid(True, color="0.9", linewidth=0.6)
        ax.tick_params(labelsize=8)
    for empty in range(len(panels), lines * columns):
        axes[empty // columns][empty % columns].set_visible(False)
    figure.supxlabel("density (kept share of visible token pairs)", fontsize=9)
    figure.supylabel("speed-up over dense attention", fontsize=9)
    handles = {}
    for ax in axes.flat:
        handles.update(dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True)))
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper center", ncols=min(len(handles), 2 * columns), fontsize=8
    )
    figure.savefig(path, dpi=150)
    return f"wrote {path}"


def _plain(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
