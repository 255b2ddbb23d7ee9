"""Coverage as files: one JSON document, the page made from it, and the part of the page that the README holds too."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_sparse_attn.coverage.listing import Coverage, coverage_counts, coverage_summary, coverage_table
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.tables import markdown

Document = Mapping[str, Any]
# What the names of all classes end in.
_KIND = re.compile(r"(Transformer)?([123]D)?(Model)?$")
_VERIFIED = """\
"verified": a tiny random instance was run. Method `dense` gives its output to the bit; with every key kept it is equal
up to rounding, with a short window it is not; without the patch it is as before, to the bit. "patched": can be
patched, and was not verified for the reason given."""


def document(found: Sequence[Coverage], versions: Mapping[str, str]) -> dict[str, Any]:
    """What `hf-sparse-attn coverage --json` prints.

    Args:
        found: the classes.
        versions: package -> version that they are of.
    """
    classes = [{**asdict(c), "status": c.status} for c in sorted(found, key=lambda c: (c.library, c.name))]
    return {"versions": dict(versions), "counts": coverage_counts(found), "classes": classes}


def summary(document: Document) -> str:
    """Counts by library and kind in Markdown, and the verified classes of diffusers by name."""
    columns = ("classes", "listed", "can be patched", "verified", "declined", "could not be built")
    rows = []
    for name, c in document["counts"].items():
        numbers = (c["classes"], c["verified"] + c["patched"], c["verified"], c["declined"], c["not built"])
        rows.append((name, *map(str, numbers)))
    said = ", ".join(f"{name} {version}" for name, version in document["versions"].items())
    parts = [markdown(columns, rows), f"With {said}."]
    names = [c["name"] for c in document["classes"] if c["library"] == "diffusers" and c["status"] == "verified"]
    if names:
        listed = ", ".join(sorted({_KIND.sub("", name) or name for name in names}, key=str.lower))
        head = f"<details><summary>The {len(names)} verified classes of diffusers</summary>"
        parts += [f"{head}\n\n{textwrap.fill(listed, 119, break_on_hyphens=False)}\n\n</details>"]
    return "\n\n".join(parts)


def page(document: Document) -> str:
    """The whole list in Markdown, the summary first."""
    found = [Coverage(**{k: v for k, v in c.items() if k != "status"}) for c in document["classes"]]
    parts = [
        "# Coverage",
        "Model classes that can be patched, written by `python -m tests.coverage.verify --output .github`.",
        f"<!-- generated: coverage -->\n{summary(document)}\n<!-- end -->",
        "\n".join(f"- {line}" for line in coverage_summary(found)),
        _VERIFIED,
        markdown(*coverage_table(found)),
    ]
    return "\n\n".join(parts) + "\n"


def write(document: Document, folder: str | Path) -> list[Path]:
    """Writes coverage.json, a class on each line, and coverage.md into a folder."""
    classes = ",\n".join(f"  {json.dumps(c)}" for c in document["classes"])
    head = json.dumps({k: v for k, v in document.items() if k != "classes"}, indent=1)
    texts = {"coverage.json": f'{head[:-2]},\n "classes": [\n{classes}\n ]\n}}\n', "coverage.md": page(document)}
    make_folder(folder)
    for name, text in texts.items():
        (Path(folder) / name).write_text(text)
    return [Path(folder) / name for name in texts]
