"""A head profile as one HTML page that needs nothing but itself, with its pictures as files.

The page loads nothing: its one style sheet and its one script stand in it, and its policy lets no others run.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse_attn.extras import needing
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.attention import CAPTION, heads
from hf_sparse_attn.profiling.view.chart import chart
from hf_sparse_attn.profiling.view.colours import style_sheet
from hf_sparse_attn.profiling.view.curves import attention_picture, pareto_picture, single_styles
from hf_sparse_attn.profiling.view.grids import Links, cell_id, figure_grid, method_grid, named
from hf_sparse_attn.profiling.view.plots import Picture, figure_map, method_map
from hf_sparse_attn.profiling.view.report import (
    evaluation_table,
    layer_table,
    number,
    render,
    short_labels,
    summary,
    words,
    worst_table,
)
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.tables import Markup, escape, html

PAGE = "report.html"
_MOST_PLANS = 12
_ASSETS = Path(__file__).parents[2] / "assets" / "report"
_NO_BUDGETS = "No other budgets were tried, and no measurements are stored with the profile."
_NO_QUALITY = "What the profile does to the whole model was not measured."
_NO_MAPS = "This part needs measurements with attention maps (measurements.safetensors beside the profile)."
_SECTIONS = {
    "quality": "Whole model",
    "methods": "Methods",
    "heads": "Layers and heads",
    "budgets": "What a budget buys",
    "attention": "Attention of some heads",
    "worst": "Worst heads",
    "layers": "Layers",
    "made": "How it was made",
}


def write(profile: HeadProfile, folder: Path | str, worst: int = 10) -> list[Path]:
    """Writes the page (one file that needs no other), its pictures as PNG, and `report.json`.

    Args:
        profile: the profile; without measurements the page says which parts need them.
        folder: made if it is not there.
        worst: heads in the table.

    Returns:
        the files, the page first.

    Raises:
        MissingExtra: matplotlib is not installed.
        OSError: the folder cannot be written.
    """
    document = summary(profile, worst)
    drawn = pictures(profile)
    folder = make_folder(folder)
    files = {PAGE: page(profile, document).encode(), **{f"{p.name}.png": p.png for p in drawn}}
    files["report.json"] = (json.dumps(document, indent=2) + "\n").encode()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return [folder / name for name in files]


def main(args: argparse.Namespace, width: int) -> tuple[str, list[str]]:
    """`hf-sparse-attn report`: what to print, and a line about each file.

    Args:
        args: profile (folder or Hub id), output (folder or None), worst (int), json (bool).
        width: of the terminal.
    """
    profile = HeadProfile.from_pretrained(args.profile)
    files = [] if args.output is None else write(profile, args.output, args.worst)
    document = summary(profile, args.worst)
    text = json.dumps({**document, "files": list(map(str, files))}, indent=2) if args.json else render(document, width)
    return text, [f"wrote {file}" for file in files]


def pictures(profile: HeadProfile) -> list[Picture]:
    """All pictures there is data for.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    with needing("the page"):
        import matplotlib  # noqa: F401

    drawn = []
    many = len(profile.plans) > 1
    for at, plan in enumerate(profile.plans[:_MOST_PLANS]):
        name = f"_{at}" if many else ""
        drawn.append(method_map(profile, plan.choice, f"methods{name}", _title("method", profile, at)))
        drawn += [
            figure_map(profile, figure, at, f"{figure}{name}", _title(figure, profile, at))
            for figure in _known(profile, at)
        ]
    drawn += [p for p in (pareto_picture(profile), attention_picture(profile)) if p is not None]
    return drawn


def page(profile: HeadProfile, document: dict[str, Any]) -> str:
    """The page.

    Args:
        profile: what it shows.
        document: `report.summary` of it.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    model = profile.model
    title = f"Head profile of {model.model_class}"
    drawn = min(len(profile.plans), _MOST_PLANS)
    shown = heads(profile, drawn)
    links = {} if shown is None else shown.links
    parts = {
        "quality": _quality(document),
        "methods": _methods(profile, document),
        "heads": _maps(profile, drawn, links),
        "budgets": chart(profile)
        or _note("No other budgets were tried, and no measurements are stored with the profile."),
        "attention": _note(
            "This part needs measurements with attention maps (measurements.safetensors beside the profile)."
        )
        if shown is None
        else f'<p class="faint">{escape(CAPTION)}</p>{shown.html}',
        "worst": _worst(profile, document, drawn, links),
        "layers": _table(*layer_table(document), numeric=(0, 1, 2), kind="sort layers"),
        "made": _origin(profile, document),
    }
    sections = "\n".join(
        f'<section><h2 id="{name}">{text}</h2>\n{parts[name]}</section>' for name, text in _SECTIONS.items()
    )
    places = "".join(f'<a href="#{name}">{text}</a>' for name, text in _SECTIONS.items())
    style = (_ASSETS / "page.css").read_text(encoding="utf-8") + style_sheet(
        profile.methods, [colour for colour, _ in single_styles(profile).values()]
    )
    script = (_ASSETS / "page.js").read_text(encoding="utf-8")
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_policy(style, script)}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>{escape(title)}</h1>
<p class="faint">{model.layers} layers × {model.heads} heads, family {escape(model.family)}.
Which sparse attention method each head runs, and what that costs.</p>
{_tiles(document)}
<nav aria-label="Sections">{places}</nav>
{sections}
</main>
<script>{script}</script>
</body>
</html>
"""


def _policy(style: str, script: str) -> str:
    """Nothing is loaded, even where a browser finds an address in the page; this one style and script are let run."""

    def source(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {source(style)}; script-src {source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _tiles(document: dict[str, Any]) -> str:
    sparse = sum(m["heads"] for m in document["methods"] if m["method"] != "dense")
    budget = ", ".join(f"{value:g}" for value in document["budget"].values()) or "none"
    kinds = " and ".join(document["budget"]) or "density"
    tiles = [
        (budget, f"budget ({kinds})"),
        (number(document["density"]), "achieved density"),
        (number(document["damage"]), f"total damage ({words(document['metric'])})"),
        (
            f"{sparse} of {document['heads']}",
            "heads sparse" + (", all step ranges" if len(document["steps"]) > 1 else ""),
        ),
        (str(len(document["methods"])), "methods in use"),
    ]
    inner = "".join(f"<div><dt>{escape(text)}</dt><dd>{escape(value)}</dd></div>" for value, text in tiles)
    return f'<dl class="tiles">{inner}</dl>'


def _quality(document: dict[str, Any]) -> str:
    if not document["evaluation"]:
        return _note(_NO_QUALITY)
    columns, rows = evaluation_table(document)
    numeric = [i for i, name in enumerate(columns) if name != "figure"]
    said = "Dense and sparse, on inputs that the profile was not made from, by their length in tokens."
    return _note(said) + _table(columns, rows, numeric, "sort")


def _methods(profile: HeadProfile, document: dict[str, Any]) -> str:
    labels = profile.labels()
    shown = dict(zip(labels, named(profile, labels), strict=True))
    figures = [n for n in ("density", "recall", "output_error", "output_error_p95", "damage") if n in profile.figures]
    steps = document["steps"]
    ranges = [f"heads, steps {a:g} to {b:g}" for a, b in steps] if len(steps) > 1 else ["heads"]
    rows = []
    for entry in document["methods"]:
        counts = [str(n) for n in entry["heads_by_steps"]]
        rows.append([shown[entry["label"]], *counts, *(number(entry["figures"].get(n)) for n in figures)])
    columns = ["method", *ranges, *(words(n) for n in figures)]
    said = '<p class="faint">Figures are means over the heads that run the method.</p>'
    return _table(columns, rows, range(1, len(columns)), "sort") + said


def _maps(profile: HeadProfile, drawn: int, links: Links) -> str:
    many = len(profile.plans)
    parts = [f"<p>The first {drawn} of {many} step ranges are drawn.</p>"] if drawn < many else []
    for at in range(drawn):
        start, end = profile.plans[at].steps
        parts += [f"<h3>Steps {start:g} to {end:g}</h3>"] if many > 1 else []
        made = [method_grid(profile, at, links), *(figure_grid(profile, name, at) for name in _known(profile, at))]
        parts.append(f'<div class="figures">{"".join(made)}</div>')
    return "\n".join(parts)


def _title(what: str, profile: HeadProfile, plan: int) -> str:
    start, end = profile.plans[plan].steps
    where = f", steps {start:g} to {end:g}" if len(profile.plans) > 1 else ""
    return f"{words(what).capitalize()} of each head{where}"


def _known(profile: HeadProfile, plan: int) -> list[str]:
    """The figures that have maps."""
    names = [n for n in ("density", "damage") if n in profile.figures]
    return [n for n in names if not np.isnan(profile.figures[n][plan]).all()]


def _worst(profile: HeadProfile, document: dict[str, Any], drawn: int, links: Links) -> str:
    if not document["worst"]:
        return "<p>No figure tells heads apart.</p>"
    columns, rows = worst_table(document)
    labels = short_labels(profile.methods)
    shown = dict(zip(labels, named(profile, labels), strict=True))
    at = columns.index("method")
    plans = {p.steps: i for i, p in enumerate(profile.plans)}
    made = []
    for row, head in zip(rows, document["worst"], strict=True):
        place = plans[tuple(head["steps"])], head["layer"], head["head"]
        cells = list(row)
        cells[at] = shown[row[at]]
        if place[0] < drawn:
            cells[1] = Markup(f'<a href="#{cell_id(*place)}">{escape(row[1])}</a>')
        made.append([*cells, Markup(f'<a href="#{links[place]}">see</a>') if place in links else "-"])
    numeric = [i for i in range(len(columns)) if i != at and columns[i] != "steps"]
    return _table([*columns, "attention"], made, numeric, "sort")


def _origin(profile: HeadProfile, document: dict[str, Any]) -> str:
    groups = "read the union of their patterns" if profile.same_in_group else "each read their own pattern"
    calibration: dict[str, Any] = {"metric": words(profile.metric), **document["calibration"]}
    calibration["query heads of a group"] = groups
    declined = {} if profile.measurements is None else dict(profile.measurements.declined)
    parts = [
        ("Calibration", ("", ""), calibration),
        ("Model fingerprint", ("field", "value"), document["model"]),
        ("Versions", ("library", "version"), document["versions"]),
        ("Candidates that declined", ("candidate", "reason"), declined),
    ]
    made = [
        f"<div><h3>{escape(title)}</h3>{_table(columns, [[str(k), _plain(v)] for k, v in values.items()])}</div>"
        for title, columns, values in parts
        if values
    ]
    return f'<div class="columns">{"".join(made)}</div>'


def _note(text: str) -> str:
    return f'<p class="faint">{escape(text)}</p>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[int] = (), kind: str = "") -> str:
    return f'<div class="scroll">{html(columns, rows, numeric, kind)}</div>'


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
