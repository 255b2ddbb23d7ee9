"""Notebooks run without Jupyter: cells in order, in one namespace, with what they print and show.

`python -m tests.support.notebooks` runs those of `.github/notebooks` and writes their outputs into them.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(__file__).parents[2] / ".github" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def load(path: Path) -> dict[str, Any]:
    """The document of a notebook."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def source(cell: dict[str, Any]) -> str:
    """The text of a cell."""
    return "".join(cell["source"])


def run(document: dict[str, Any]) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each code cell and its outputs, as a notebook stores them; an error in a cell is raised.

    Args:
        document: the notebook.
    """
    # Dataclasses and pickles look for the module that they were made in.
    module = ModuleType("__notebook__")
    sys.modules[module.__name__] = module
    try:
        count = 0
        for cell in document["cells"]:
            if cell["cell_type"] == "code":
                count += 1
                yield cell, _outputs(source(cell), f"<cell {cell['id']}>", module.__dict__, count)
    finally:
        del sys.modules[module.__name__]


def _outputs(code: str, name: str, namespace: dict[str, Any], count: int) -> list[dict[str, Any]]:
    parsed = ast.parse(code, name)
    last = parsed.body.pop() if isinstance(parsed.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with contextlib.redirect_stdout(printed):
        exec(compile(parsed, name, "exec"), namespace)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), name, "eval"), namespace)
    made: list[dict[str, Any]] = []
    if printed.getvalue():
        made.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        shown = {"data": _data(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"}
        made.append(shown)
    return made


def _data(value: Any) -> dict[str, Any]:
    data: dict[str, Any] = {}
    if hasattr(value, "_repr_html_"):
        data["text/html"] = _lines(value._repr_html_())
    if hasattr(value, "_repr_png_"):
        data["image/png"] = base64.b64encode(value._repr_png_()).decode() + "\n"
    # Not where in memory it was: outputs are to change where something did.
    data["text/plain"] = _lines(str(value) if "text/html" in data else re.sub(" at 0x[0-9A-Fa-f]+", "", repr(value)))
    return data


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def write(path: Path) -> None:
    """Runs a notebook in a folder of its own, and writes it with its outputs."""
    document, here = load(path), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            for count, (cell, outputs) in enumerate(run(document), 1):
                cell.update(execution_count=count, outputs=outputs)
        finally:
            os.chdir(here)
    path.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    for notebook in NOTEBOOKS:
        write(notebook)
