"""A head profile as one HTML page that needs nothing but itself (no scripts, no fonts), with its pictures as files."""

from __future__ import annotations

import argparse
import base64
import json
from collections.abc import Iterable, Sequence
from html import escape as escape_html
from pathlib import Path
from typing import Any

import numpy as np

from hf_sparse_attn.extras import needing
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.curves import attention_picture, pareto_picture
from hf_sparse_attn.profiling.view.plots import Picture, figure_map, method_map, method_styles
from hf_sparse_attn.profiling.view.report import layer_table, number, render, short_labels, summary, words, worst_table
from hf_sparse_attn.sharing.files import make_folder

PAGE = "report.html"
_MOST_PLANS = 12
# Even a browser that finds an address in the page may not load it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { --ink: #1f2328; --faint: #5f6773; --line: #e3e6ea; --soft: #f6f7f9; --accent: #0b5cad; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 40px 24px 80px; }
h1 { font-size: 28px; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 12px; padding-top: 20px; border-top: 1px solid var(--line); }
p { max-width: 72ch; margin: 8px 0; }
.faint, figcaption { color: var(--faint); font-size: 14px; }
.tiles { display: flex; flex-wrap: wrap; gap: 12px; margin: 24px 0 0; }
.tile { flex: 1 1 150px; background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 16px; }
.tile b { display: block; font-size: 24px; font-weight: 600; font-variant-numeric: tabular-nums; }
.tile span { color: var(--faint); font-size: 13px; }
.figures { display: flex; flex-wrap: wrap; gap: 28px; align-items: flex-start; }
figure { margin: 12px 0; max-width: 100%; }
figure img { display: block; max-width: 100%; height: auto; }
figcaption { max-width: 72ch; margin-top: 6px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; margin: 8px 0; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 600; color: var(--faint); white-space: nowrap; }
td { overflow-wrap: anywhere; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.chip { display: inline-block; min-width: 20px; height: 20px; border-radius: 4px; margin-right: 8px;
  text-align: center; font-size: 12px; line-height: 20px; border: 1px solid rgba(0, 0, 0, 0.12); }
.columns { display: flex; flex-wrap: wrap; gap: 8px 56px; }
.columns > div { flex: 1 1 320px; min-width: 0; }
h3 { font-size: 16px; margin: 20px 0 4px; }
@media print { main { padding: 0; } figure, tr { break-inside: avoid; } }
"""


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
    files = {PAGE: page(profile, document, drawn).encode(), **{f"{p.name}.png": p.png for p in drawn}}
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
    for at, plan in enumerate(profile.plans[:_MOST_PLANS]):
        many = len(profile.plans) > 1
        name, where = (f"_{at}", f", steps {plan.steps[0]:g} to {plan.steps[1]:g}") if many else ("", "")
        drawn.append(method_map(profile, plan.choice, f"methods{name}", f"Method of each head{where}"))
        for figure in ("density", "damage"):
            if figure in profile.figures and not np.isnan(profile.figures[figure][at]).all():
                title = f"{words(figure).capitalize()} of each head{where}"
                drawn.append(figure_map(profile, figure, at, f"{figure}{name}", title))
    drawn += [p for p in (pareto_picture(profile), attention_picture(profile)) if p is not None]
    return drawn


def page(profile: HeadProfile, document: dict[str, Any], pictures: Sequence[Picture]) -> str:
    """The page.

    Args:
        profile: what it shows.
        document: `report.summary` of it.
        pictures: `pictures` of it.
    """
    model = profile.model
    size = f"{model.layers} layers × {model.heads} heads"
    title = f"Head profile of {model.model_class}"
    maps = [p for p in pictures if p.name not in ("pareto", "attention")]
    by_name = {p.name: p for p in pictures}
    drawn, many = sum(p.name.startswith("methods") for p in maps), len(profile.plans)
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="faint">{escape(size)}, family {escape(model.family)}. '
        "Which sparse attention method each head runs, and what that costs.</p>",
        _tiles(document),
        "<h2>Methods</h2>",
        _methods(profile, document),
        "<h2>Layers and heads</h2>",
        f"<p>The first {drawn} of {many} step ranges are drawn.</p>" if drawn < many else "",
        _figures(maps),
        "<h2>What a budget buys</h2>",
        _or_note(
            by_name.get("pareto"), "No other budgets were tried, and no measurements are stored with the profile."
        ),
        "<h2>Attention of some heads</h2>",
        _or_note(
            by_name.get("attention"),
            "This part needs measurements with attention maps (measurements.safetensors beside the profile).",
        ),
        "<h2>Worst heads</h2>",
        _worst(profile, document),
        "<h2>Layers</h2>",
        _table(*layer_table(document), numeric=(0, 1, 2)),
        "<h2>How it was made</h2>",
        _origin(profile, document),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
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
    inner = "".join(f'<div class="tile"><b>{escape(v)}</b><span>{escape(t)}</span></div>' for v, t in tiles)
    return f'<div class="tiles">{inner}</div>'


def _methods(profile: HeadProfile, document: dict[str, Any]) -> str:
    styles = dict(zip(profile.labels(), method_styles(profile.methods), strict=True))
    figures = [n for n in ("density", "recall", "output_error", "output_error_p95", "damage") if n in profile.figures]
    steps = document["steps"]
    ranges = [f"heads, steps {a:g} to {b:g}" for a, b in steps] if len(steps) > 1 else ["heads"]
    rows = []
    for entry in document["methods"]:
        cells = [_chip(*styles[entry["label"]]) + escape(entry["label"])]
        cells += [str(n) for n in entry["heads_by_steps"]]
        cells += [escape(number(entry["figures"].get(n))) for n in figures]
        rows.append(cells)
    columns = ["method", *ranges, *(f"{words(n)}" for n in figures)]
    return _table(columns, rows, numeric=range(1, len(columns)), escaped=True) + (
        '<p class="faint">Figures are means over the heads that run the method.</p>'
    )


def _worst(profile: HeadProfile, document: dict[str, Any]) -> str:
    if not document["worst"]:
        return "<p>No figure tells heads apart.</p>"
    columns, rows = worst_table(document)
    styles = dict(zip(short_labels(profile.methods), method_styles(profile.methods), strict=True))
    at = columns.index("method")
    shown = []
    for row in rows:
        cells = [escape(cell) for cell in row]
        cells[at] = _chip(*styles[row[at]]) + cells[at]
        shown.append(cells)
    numeric = [i for i in range(len(columns)) if i != at and columns[i] != "steps"]
    return _table(columns, shown, numeric, escaped=True)


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


def _or_note(picture: Picture | None, note: str) -> str:
    return f'<p class="faint">{escape(note)}</p>' if picture is None else _figures([picture])


def _figures(pictures: Iterable[Picture]) -> str:
    made = []
    for p in pictures:
        data = base64.b64encode(p.png).decode()
        made.append(
            f'<figure><img alt="{escape(p.title)}" width="{p.width}" src="data:image/png;base64,{data}">'
            f"<figcaption>{escape(p.caption)}</figcaption></figure>"
        )
    return f'<div class="figures">{"".join(made)}</div>'


def _chip(colour: str, letter: str) -> str:
    dark = sum(int(colour[i : i + 2], 16) * w for i, w in ((1, 0.299), (3, 0.587), (5, 0.114))) < 140
    return f'<span class="chip" style="background:{colour};color:{"#fff" if dark else "#1f2328"}">{letter}</span>'


def _table(
    columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Iterable[int] = (), escaped: bool = False
) -> str:
    right, right_class = set(numeric), ' class="n"'

    def cell(tag: str, i: int, text: str) -> str:
        return f"<{tag}{right_class if i in right else ''}>{text}</{tag}>"

    head = "".join(cell("th", i, escape(c)) for i, c in enumerate(columns)) if any(columns) else ""
    body = "".join(
        "<tr>" + "".join(cell("td", i, c if escaped else escape(c)) for i, c in enumerate(row)) + "</tr>"
        for row in rows
    )
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def escape(text: str) -> str:
    """Text for the page: no tags, and no characters that only control or turn the others."""
    return escape_html("".join(c if c.isprintable() else "\ufffd" for c in text))


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "" if value is None else str(value)
