"""All pages: what each should hold, and how they are written and checked."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from hf_sparse_attn.documents import catalog
from hf_sparse_attn.documents.docstrings import read
from hf_sparse_attn.documents.drawing import draw
from hf_sparse_attn.documents.figures import figures
from hf_sparse_attn.documents.figures import read as read_figures
from hf_sparse_attn.documents.method_page import linked, page
from hf_sparse_attn.documents.settings_page import commands, recipe_keys, recipe_records
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS, Registry
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.tables import Table, markdown

_BLOCK = re.compile(r"<!-- generated: (\w+) -->\n.*?\n<!-- end -->", re.S)
# Pages that are kept: their prose is written by hand, their blocks are generated. The blocks that each must have.
KEPT = {
    "methods.md": ("methods_linked",),
    "presets.md": ("presets",),
    "recipes.md": ("recipes", "recipe_keys"),
    "families.md": ("families", "family_notes"),
    "backends.md": ("backends", "backend_notes"),
    "commands.md": ("commands",),
    "figures.md": (
        "kernels",
        "layers",
        "decoding",
        "quality",
        "longer_context",
        "longer_video",
        "few_steps",
        "coverage",
    ),
}


def pages(folder: Path, parser: argparse.ArgumentParser) -> dict[Path, str]:
    """What every page should hold, by its path.

    Args:
        folder: of the pages. Beside it are the files of measured figures and, two folders up, a README with generated
            blocks and the package with what `train RECIPE --help` shows: as .github/docs stands in the repository.
            Where they are not there they are left out.
        parser: of the command line.
    """
    records = recipe_records()
    blocks = {**_blocks(parser, records), **figures(folder.parent)}
    evaluation = read_figures(folder.parent / "eval" / "eval.json")
    found = {}
    for name, cls in METHODS.items():
        if catalog.is_own(cls):
            found[folder / "methods" / f"{name}.md"] = page(name, evaluation)
            if cls.has_pattern():
                found[folder / "methods" / f"{name}.svg"] = draw(cls(**cls.examples()[0]))
    for name, wanted in KEPT.items():
        found[folder / name] = _filled(_text(folder / name), blocks, name, wanted)
    readme = folder.parent.parent / "README.md"
    if _BLOCK.search(_text(readme)):
        found[readme] = _filled(_text(readme), blocks, "README.md", ())
    keys = readme.parent / "hf_sparse_attn" / "assets" / "recipe_keys.json"
    if keys.is_file():
        found[keys] = json.dumps(records, indent=1) + "\n"
    return found


def stale(wanted: dict[Path, str]) -> list[Path]:
    """The pages that are not as they should be."""
    return [path for path, text in wanted.items() if _text(path) != text]


def write(wanted: dict[Path, str]) -> list[Path]:
    """Writes the pages that are not as they should be, and returns their paths."""
    changed = stale(wanted)
    for path in changed:
        make_folder(path.parent)
        path.write_text(wanted[path], encoding="utf-8")
    return changed


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _filled(text: str, blocks: dict[str, str], name: str, wanted: tuple[str, ...]) -> str:
    """A page with its blocks as they should be; those that it lacks come last, a page that is empty gets a title.

    Raises:
        ValueError: a block that nothing is known of.
    """

    def block(name: str) -> str:
        return f"<!-- generated: {name} -->\n{blocks[name]}\n<!-- end -->"

    present = _BLOCK.findall(text)
    unknown = [n for n in present if n not in blocks]
    if unknown:
        raise ValueError(f"generated blocks of {name} must be among {', '.join(blocks)}; got {', '.join(unknown)}")
    text = _BLOCK.sub(lambda found: block(found[1]), text) or f"# {Path(name).stem.capitalize()}\n"
    lacking = [block(n) for n in wanted if n in blocks and n not in present]
    return "\n\n".join([text.rstrip("\n"), *lacking]) + "\n"


def _blocks(parser: argparse.ArgumentParser, records: dict[str, Any]) -> dict[str, str]:
    tables = {**catalog.tables(), "methods_linked": _methods_linked(), "methods": _methods_by_use()}
    texts = {
        "recipe_keys": recipe_keys(records),
        "family_notes": _notes(FAMILIES),
        "backend_notes": _notes(BACKENDS),
        "commands": commands(parser),
    }
    return {**{name: markdown(*table) for name, table in tables.items()}, **texts}


def _methods_linked() -> Table:
    """The table of the methods, each with a link to its page."""
    columns, rows = catalog.methods_table()
    return columns, [(f"[{row[0]}](methods/{row[0]}.md)", *row[1:-1], linked(row[-1])) for row in rows]


def _methods_by_use() -> Table:
    """What methods are for, for the README: each with a link to its page."""
    columns, rows = catalog.methods_by_use()
    return columns, [
        (use, ", ".join(f"[{name}](.github/docs/methods/{name}.md)" for name in names.split(", ")))
        for use, names in rows
    ]


def _notes(registry: Registry[Any]) -> str:
    """A section for each entry, with its docstring."""
    parts = []
    for name, text in catalog.docstrings(registry).items():
        doc = read(text)
        parts += [f"## {name}", doc.summary, *doc.paragraphs]
    return "\n\n".join(parts)
