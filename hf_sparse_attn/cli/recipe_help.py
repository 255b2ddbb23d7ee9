"""`hf-sparse-attn train RECIPE --help`: every key of a recipe, read from a file: no torch and no extra is imported."""

from __future__ import annotations

import importlib.util
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import hf_sparse_attn
from hf_sparse_attn.extras import need
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.settings import read_yaml

# Made by `hf-sparse-attn docs`; see documents/settings_page.py.
_KEYS = Path(hf_sparse_attn.__file__).parent / "assets" / "recipe_keys.json"
_PACKAGES = ("hf_sparse_attn.recipes", "hf_sparse_attn.recipes.shipped")
# Characters of a value of the file that are shown.
_LONGEST = 60


def keys_of(source: str, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Every key of a recipe, those inside of others written with dots, as `train` takes them.

    Args:
        source: a YAML file, or the name of one that comes with the package.
        overrides: settings in place of the file's, "optimizer.learning_rate=1e-4".

    Returns:
        `recipe`, `source`, `about` (paragraphs), `read` (whether the file was) and `groups`, each with `title`,
        `about` and `keys`: records of key, type, default, meaning, and value where the file sets it.

    Raises:
        ValueError, TypeError, OSError: no such recipe, or a file that is none.
    """
    records = json.loads(_KEYS.read_text(encoding="utf-8"))
    file, values = _file(source, records["files"]), None
    if file is not None and importlib.util.find_spec("yaml") is not None:
        values = read_yaml(file, overrides)
    name = records["files"][source]["recipe"] if values is None else values.pop("recipe", None)
    if name not in records["recipes"]:
        known = records["recipes"]
        raise ValueError(f"`recipe` must be one of {', '.join(known)}; got {name!r}{nearest(name, known)}")
    recipe, shared = records["recipes"][name], records["groups"]
    groups = _groups(f"Keys of {name}", recipe["keys"], "", values or {}, shared)
    groups += _groups("Keys of every recipe", records["common"], "", values or {}, shared)
    said = records["files"].get(source, {}).get("summary")
    about = list(dict.fromkeys([*([said] if said else []), recipe["summary"], *recipe["paragraphs"]]))
    return {"recipe": name, "source": source, "about": about, "read": values is not None, "groups": groups}


def render(found: dict[str, Any], width: int) -> str:
    """The keys as text, a group after the other.

    Args:
        found: as `keys_of` gives it.
        width: columns of the terminal.
    """

    def wrapped(text: str, indent: str = "") -> str:
        further = f"{indent}  " if indent == "  " else indent
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=further, break_on_hyphens=False)

    source = found["source"]
    here = f'"here" is what {source} sets' if found["read"] else f"what {source} sets {need('PyYAML')}"
    parts = [
        wrapped(f"usage: hf-sparse-attn train {source} [key=value ...] --output DIR [--resume] [--json]"),
        *map(wrapped, found["about"]),
        wrapped(f"After each key: its type and its default, or that it is required; {here}."),
    ]
    for group in found["groups"]:
        lines = [group["title"], *(wrapped(text) for text in group["about"])]
        for key in group["keys"]:
            default = key["default"] if key["default"] == "required" else f"default {key['default']}"
            value = f"; here {_shortened(key['value'])}" if "value" in key else ""
            below = " Its keys are below." if key["groups"] else ""
            lines.append(wrapped(f"{key['key']}: {key['type']}, {default}{value}", "  "))
            lines.append(wrapped(f"{key['meaning']}{below}", " " * 6))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _file(source: str, shipped: dict[str, Any]) -> Path | None:
    """The file of a recipe; None for one that comes with the package elsewhere, but not here (see recipe.py)."""
    if source.endswith((".yaml", ".yml")):
        if importlib.util.find_spec("yaml") is None:
            raise ImportError(f"a recipe {need('PyYAML')}")
        return Path(source)
    if source not in shipped:
        said = f"the recipe must be a .yaml file or one of {', '.join(shipped)}; got {source!r}"
        raise ValueError(said + nearest(source, shipped))
    specs = filter(None, map(importlib.util.find_spec, _PACKAGES))
    places = [Path(place) / f"{source}.yaml" for spec in specs for place in spec.submodule_search_locations or ()]
    return next((place for place in places if place.is_file()), None)


def _groups(
    title: str, keys: list[dict[str, Any]], prefix: str, values: Any, shared: dict[str, Any]
) -> list[dict[str, Any]]:
    """Keys as a group, and after it a group for each of them that holds keys itself.

    Args:
        title: of the group.
        keys: records of the file.
        prefix: what stands before each name, "optimizer.".
        values: what the recipe's file sets of them, if it is a mapping.
        shared: the records of groups by name.
    """
    own: list[dict[str, Any]] = []
    inner: list[dict[str, Any]] = []
    for key in keys:
        record = {**key, "key": prefix + key["key"]}
        set_here = isinstance(values, dict) and key["key"] in values
        value = values[key["key"]] if set_here else None
        of = key["groups"]
        if set_here and not (of and isinstance(value, dict)):
            record["value"] = value
        own.append(record)
        for name in of:
            path = record["key"] + ("[]" if key["type"].startswith("tuple") else "")
            found = _groups(f"{path}: {name}", shared[name]["keys"], f"{path}.", value, shared)
            found[0]["about"] = [shared[name]["summary"], *shared[name]["paragraphs"]]
            inner += found
    return [{"title": title, "about": [], "keys": own}, *inner]


def _shortened(value: Any) -> str:
    said = json.dumps(value, default=str)
    return said if len(said) <= _LONGEST else f"{said[: _LONGEST - 3]}..."
