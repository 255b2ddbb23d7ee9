"""Every key of every recipe, and the options of every command."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hf_sparse_attn.documents import catalog
from hf_sparse_attn.documents.docstrings import dataclasses_in, default_text, fields_of, read, type_text
from hf_sparse_attn.recipe import Recipe, recipe_class, recipe_modules
from hf_sparse_attn.tables import markdown

_COLUMNS = ("key", "type", "default", "meaning")


def recipe_records() -> dict[str, Any]:
    """Every recipe and every group of keys that recipes share, as they also stand in assets/recipe_keys.json.

    Returns:
        `common`, the keys that every recipe has; `recipes` and `groups`, each by name: summary, paragraphs, and keys
        (those of a recipe without the common ones) with type, default, meaning and the names of the groups that they
        hold; and `files`: recipe and summary of each file that comes with the package.
    """
    groups: dict[str, type[Any]] = {}
    common = _record(Recipe, groups)["keys"]
    found: dict[str, Any] = {"common": common, "recipes": {}, "groups": {}}
    for name in recipe_modules():
        record = _record(recipe_class(name), groups)
        record["keys"] = [key for key in record["keys"] if key not in common]
        found["recipes"][name] = record
    while left := [name for name in groups if name not in found["groups"]]:
        for name in left:
            found["groups"][name] = _record(groups[name], groups)
    found["files"] = {
        record["recipe"]: {"recipe": catalog.recipe_of(Path(record["file"])), "summary": record["summary"]}
        for record in catalog.recipes()
    }
    return found


def recipe_keys(records: dict[str, Any]) -> str:
    """A section for each recipe, the files that ship for it first, then one for each group of keys they share.

    Args:
        records: as `recipe_records` gives them.
    """
    parts: list[str] = []
    for name, record in records["recipes"].items():
        files = [f"- `{file}`: {of['summary']}" for file, of in records["files"].items() if of["recipe"] == name]
        about = [record["summary"], *record["paragraphs"]]
        parts += [
            f"### {name}",
            *about,
            "Files:",
            "\n".join(files or ["- none"]),
            _keys(records["common"] + record["keys"]),
        ]
    for name, record in records["groups"].items():
        parts += [f"### {name}", record["summary"], *record["paragraphs"], _keys(record["keys"])]
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


def _record(kind: type[Any], groups: dict[str, type[Any]]) -> dict[str, Any]:
    """What a dataclass is and its keys; those that are groups of keys are noted in `groups`."""
    doc = read(kind.__doc__)
    keys = [
        {
            "key": field.name,
            "type": type_text(hint),
            "default": default_text(field),
            "meaning": said,
            "groups": [_group_name(group, groups) for group in dataclasses_in(hint)],
        }
        for field, hint, said in fields_of(kind)
    ]
    return {"summary": doc.summary, "paragraphs": list(doc.paragraphs), "keys": keys}


def _keys(keys: list[dict[str, Any]]) -> str:
    rows = [
        (
            f"`{key['key']}`",
            f"`{key['type']}`{''.join(f' ([keys](#{name.lower()}))' for name in key['groups'])}",
            f"`{key['default']}`",
            key["meaning"],
        )
        for key in keys
    ]
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
