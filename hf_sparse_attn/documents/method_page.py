"""The page of one method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from hf_sparse_attn.documents import catalog
from hf_sparse_attn.documents.docstrings import Docstring, default_text, fields_of, read, type_text
from hf_sparse_attn.documents.drawing import layout_of
from hf_sparse_attn.method import NEEDS, READS, Method
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.tables import Table, markdown

_ARXIV = re.compile(r"\b(?:arXiv )?(\d{4}\.\d{5})\b")
# What an evaluation measures of every method, and of its kind of model: key, heading, format.
_MEASURED = (
    ("wanted", "asked", "{:.4g}"),
    ("density", "density", "{:.3f}"),
    ("recall", "recall", "{:.3f}"),
    ("output_error", "output error", "{:.3f}"),
    ("loss", "loss", "{:.3f}"),
    ("needles", "needles", "{:.2f}"),
    ("psnr", "PSNR (dB)", "{:.2f}"),
    ("ssim", "SSIM", "{:.4f}"),
    ("right", "motion right", "{:.2f}"),
)


def page(name: str, evaluation: dict[str, Any] | None) -> str:
    """The page of a method in Markdown; its picture stands beside it as NAME.svg.

    Args:
        name: of the method.
        evaluation: what `hf-sparse-attn eval` wrote, or None for a page without measured figures.
    """
    cls = METHODS.get(name)
    doc = read(cls.__doc__)
    parts = [
        f"<!-- Made by `hf-sparse-attn docs` from the docstring of {cls.__module__}. -->",
        f"# {name}",
        doc.summary,
        f"Paper: {linked(cls.paper)}." if cls.paper else "",
        _picture(cls) if cls.has_pattern() else "",
        *doc.chosen(deviations=False),
        _section("Formula", f"```text\n{doc.sections['Formula']}\n```" if "Formula" in doc.sections else ""),
        _section("When to take it", doc.sections.get("When", "")),
        _section("Parameters", _parameters(cls)),
        _section("Needs", _needs(cls)),
        _section("Deviations from what was published", "\n\n".join(doc.chosen(deviations=True))),
        _section("Presets", _presets(name)),
        _section("Measured", _measured(name, evaluation)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def linked(paper: str) -> str:
    """The name of a paper with its arXiv numbers as links."""
    return _ARXIV.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", paper)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _picture(cls: type[Method]) -> str:
    params = cls.examples()[0]
    plain = ", ".join(f"{name}={value}" for name, value in params.items() if not hasattr(value, "parameters"))
    return (
        f"![What {cls.name} keeps]({cls.name}.svg)\n\nKept pairs of made-up heads: {cls.name}({plain}) on "
        f"{layout_of(cls(**params))}. Queries go down, keys across; a spot is 8 x 8 tokens, darker where more is kept."
    )


def _parameters(cls: type[Method]) -> str:
    rows = [
        (f"`{field.name}`", f"`{type_text(hint)}`", f"`{default_text(field)}`", said)
        for field, hint, said in fields_of(cls)
    ]
    return markdown(("parameter", "type", "default", "meaning and range"), rows) if rows else "None."


def set_by(cls: type[Method]) -> list[str]:
    """Parameters that set the density of a method."""
    # What decodes alone has no knob, for it is the densities of prompts that are compared.
    return [cls.knob.name] if cls.knob else [name for name in ("density", "budget") if hasattr(cls, name)]


def _needs(cls: type[Method]) -> str:
    doc: Docstring = read(cls.__doc__)
    layouts = " and ".join(NEEDS[need] for need in sorted(cls.needs)) or "any layout"
    reads = " and ".join(READS[name] for name in sorted(cls.reads))
    knob = " or ".join(f"`{name}`" for name in set_by(cls)) or "no parameter"
    lines = [
        f"- Tokens: {layouts}.",
        f"- Reads queries and keys{f', and the {reads}' if reads else ''}." if not cls.static
        else "- Reads nothing of a call: the pattern is built once for a layout.",
        f"- A gradient {'may flow through it' if cls.trainable else 'may not flow through it'}.",
        f"- Its density is set by {knob}.",
    ]  # fmt: skip
    raised = doc.sections.get("Raises")
    return "\n".join([*lines, f"- Raises {' '.join(raised.split())}"] if raised else lines)


def _presets(name: str) -> str:
    columns, rows = catalog.presets_table()
    own = [(row[0], *row[2:]) for row in rows if row[1] == name]
    return markdown((columns[0], *columns[2:]), own) if own else ""


def measured(name: str, evaluation: dict[str, Any] | None) -> list[tuple[str, Table]]:
    """What was measured of a method beside dense attention: a setting in words and a table for each.

    Args:
        name: of the method.
        evaluation: as for `page`.
    """
    found = []
    for result in [] if evaluation is None else evaluation["results"]:
        rows = [dict(row) for row in result["rows"] if row["name"] in ("dense", name)]
        if not any(row["name"] == name and row["wanted"] is not None for row in rows):
            continue
        for row in rows:
            if "by_depth" in row:
                row["needles"] = sum(row["by_depth"]) / len(row["by_depth"])
        found.append((result["setting"], _rows(rows)))
    return found


def _measured(name: str, evaluation: dict[str, Any] | None) -> str:
    parts = ((f"{setting}:", markdown(*table)) for setting, table in measured(name, evaluation))
    return "\n\n".join(text for part in parts for text in part)


def _rows(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [column for column in _MEASURED if column[0] in rows[0]]
    cells = [
        [row["name"], *("-" if row[key] is None else form.format(row[key]) for key, _, form in columns)]
        for row in rows
    ]
    return ("method", *(heading for _, heading, _ in columns)), cells
