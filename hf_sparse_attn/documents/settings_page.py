"""Every key of every recipe, and the options of every command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sparse_attn.documents import catalog
from hf_sparse_attn.documents.docstrings import dataclasses_in, default_text, fields_of, read, type_text
from hf_sparse_attn.recipe import recipe_class, recipe_modules
from hf_sparse_attn.tables import markdown

_COLUMNS = ("key", "type", "default", "meaning")


def recipe_keys() -> str:
    """A section for each recipe, the files that ship for it first, then one for each group of keys they share."""
    files: dict[str, list[str]] = {}
    for record in catalog.recipes():
        kind = catalog.recipe_of(Path(record["file"]))
        files.setdefault(kind, []).append(f"- `{record['recipe']}`: {record['summary']}")
    parts: list[str] = []
    groups: dict[str, type[Any]] = {}
    for name in recipe_modules():
        recipe = recipe_class(name)
        doc = read(recipe.__doc__)
        parts += [f"### {name}", doc.summary, *doc.paragraphs, "Files:", "\n".join(files.get(name, ["- none"]))]
        parts += [_keys(recipe, groups)]
    done: set[str] = set()
    while left := [name for name in groups if name not in done]:
        for name in left:
            doc = read(groups[name].__doc__)
            parts += [f"### {name}", doc.summary, *doc.paragraphs, _keys(groups[name], groups)]
            done.add(name)
    return "\n\n".join(part for part in parts if part)


def commands(parser: argparse.ArgumentParser) -> str:
    """A section for each command with a table of its arguments.

    Args:
        parser: the program's.
    """
    parts = ["All take `--json` (one JSON document instead of tables) and `--debug` (tracebacks and debug logs)."]
    for name, command in _commands(parser).items():
        about = str(command.description)
        actions = [action for action in command._actions if action.dest not in ("help", "json", "debug")]
        rows = [(_spelled(action), _default(action), action.help or "") for action in actions]
        parts += [f"## {parser.prog} {name}", f"{about[0].upper()}{about[1:]}."]
        parts += [markdown(("argument", "default", "meaning"), rows)] if rows else []
    return "\n\n".join(parts)


def _keys(kind: type[Any], groups: dict[str, type[Any]]) -> str:
    """The keys of a dataclass; those that are groups of keys are noted in `groups`."""
    rows = []
    for field, hint, said in fields_of(kind):
        names = [_group_name(group, groups) for group in dataclasses_in(hint)]
        links = "".join(f" ([keys](#{name.lower()}))" for name in names)
        rows.append((f"`{field.name}`", f"`{type_text(hint)}`{links}", f"`{default_text(field)}`", said))
    return markdown(_COLUMNS, rows) if rows else ""


def _group_name(group: type[Any], groups: dict[str, type[Any]]) -> str:
    """The heading of a group of keys; two recipes may have groups of one name and different keys."""
    name = group.__name__
    if groups.setdefault(name, group) is not group:
        name = f"{name}-{group.__module__.rpartition('.')[2]}"
        groups.setdefault(name, group)
    return name


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    found = next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(found.choices)


def _spelled(action: argparse.Action) -> str:
    value = action.metavar if action.choices is None else "|".join(map(str, action.choices))
    if not action.option_strings:
        return f"`{value or action.dest}`"
    flags = "`, `".join(action.option_strings)
    return f"`{flags}`" if action.nargs == 0 else f"`{flags} {value or action.dest.upper()}`"


def _default(action: argparse.Action) -> str:
    plain = isinstance(action.default, (str, int, float)) and not isinstance(action.default, bool)
    return f"`{action.default}`" if plain else ""
