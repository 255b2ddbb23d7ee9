"""Settings of a training recipe: a YAML file read into a dataclass, every key checked."""

from __future__ import annotations

import dataclasses
import typing
from pathlib import Path
from typing import Any, TypeVar

_Built = TypeVar("_Built")


def read_config(kind: type[_Built], path: Path) -> _Built:
    """Read the settings of a recipe.

    Args:
        kind: a dataclass whose fields are int, float, str, bool, other such dataclasses, or tuples of one of these.
        path: a YAML file with exactly the keys of `kind`.

    Returns:
        The settings.

    Raises:
        ValueError: a key is missing or unknown, or the dataclass refuses a value.
        TypeError: a value has the wrong type.
    """
    import yaml

    return _build(kind, yaml.safe_load(path.read_text(encoding="utf-8")), "config")


def _build(kind: type[_Built], values: object, where: str) -> _Built:
    if not isinstance(values, dict):
        raise TypeError(f"`{where}` must be a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    unknown, missing = sorted(set(values) - set(hints)), sorted(set(hints) - set(values))
    if unknown or missing:
        raise ValueError(f"`{where}` must have exactly the keys {sorted(hints)}, got unknown {unknown}, no {missing}")
    return kind(**{name: _convert(hint, values[name], f"{where}.{name}") for name, hint in hints.items()})


def _convert(hint: Any, value: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, value, where)
    if typing.get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise TypeError(f"`{where}` must be a list, got {value!r}")
        return tuple(_convert(typing.get_args(hint)[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise TypeError(f"`{where}` must be of type {hint.__name__}, got {value!r}")
    return value
