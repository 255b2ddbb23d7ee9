"""Who imports whom: no cycle between files, and no room above the one that a file stands in; lazy imports count."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "hf_sparse_attn"
LINKED = ("kernels", "patches", "recipes")
SHIMS = ("corpus", "demo", "published_profiles")


@cache
def files() -> dict[str, Path]:
    """Every file of the package by the name it is imported by."""
    found = [
        p for p in (ROOT / PACKAGE).rglob("*.py") if not (ROOT / PACKAGE / p.relative_to(ROOT).parts[1]).is_symlink()
    ]
    found += [p for folder in LINKED for p in (ROOT / folder).rglob("*.py")]
    return {name_of(p): p for p in found}


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == PACKAGE else (PACKAGE, *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def executed(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below one, without what stands under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from executed(child)


def imported(source: str, known: dict[str, Path]) -> set[str]:
    """The files that a source imports, at its top or within functions."""
    found = set()
    for node in executed(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            below = (f"{node.module}.{alias.name}" for alias in node.names)
            found.update(name if name in known else node.module for name in below)
    return found & known.keys()


@cache
def graph() -> dict[str, set[str]]:
    known = files()
    return {name: imported(path.read_text(), known) - {name} for name, path in known.items()}


@cache
def levels() -> dict[str, tuple[int, int]]:
    """Level and row of every room in the table of ARCHITECTURE.md, by the name of a file or a folder with its dot."""
    text = (ROOT / ".github" / "ARCHITECTURE.md").read_text()
    found = {}
    for row, line in enumerate(re.findall(r"^\| (`.*?) \| (\d+) \|", text, re.M)):
        for room in re.findall(r"`([^`]+)`", line[0]):
            found[room.replace("/", ".")] = int(line[1]), row
    return found


def place(name: str) -> tuple[int, int]:
    """Level and row of a file: those of its own name, or of the innermost folder that the table knows."""
    inner = name.removeprefix(PACKAGE).lstrip(".") or "__init__"
    table, parts = levels(), inner.split(".")
    options = [inner, *(".".join(parts[:i]) + "." for i in range(len(parts), 0, -1))]
    for option in options:
        if option in table:
            return table[option]
    raise KeyError(f"ARCHITECTURE.md has no room for {name}")


def test_no_two_files_import_each_other() -> None:
    try:
        TopologicalSorter(graph()).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_room_imports_its_own_level_or_one_above() -> None:
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if place(other)[1] != place(name)[1] and place(other)[0] >= place(name)[0]
    ]
    assert not wrong


def test_every_room_of_the_table_is_there() -> None:
    names = {name.removeprefix(f"{PACKAGE}.") for name in files()}
    for room in levels():
        assert room == "__init__" or room in names or any(f"{name}.".startswith(room) for name in names), room


def test_shims_are_short_and_nothing_of_the_package_uses_them() -> None:
    for name in SHIMS:
        assert len(files()[f"{PACKAGE}.{name}"].read_text().splitlines()) <= 3
        assert not [user for user, used in graph().items() if f"{PACKAGE}.{name}" in used]


def test_imports_are_found_wherever_they_stand() -> None:
    known = dict.fromkeys(("a.b", "a.c", "a.d"), Path())
    source = "if TYPE_CHECKING:\n    import a.c\nimport a.b\ndef f():\n    from a import d, e\n"
    assert imported(source, known) == {"a.b", "a.d"}
