"""Settings of a training recipe: a YAML file read into a dataclass, every key and type checked."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from hf_sparse_attn.nearest import nearest

_Built = TypeVar("_Built")


def read_yaml(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The keys of a recipe file, with some of them set anew.

    Args:
        path: the file.
        overrides: "key=value" each; a key inside another is written with a dot, "optimizer.learning_rate=1e-4", and
            the value as in YAML.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not YAML, or an override is not of that form.
        TypeError: the file holds no mapping, or an override goes into a value that is none.
    """
    import yaml

    if not path.is_file():
        raise FileNotFoundError(f"the recipe must be a YAML file, got {path}, which is not there")
    try:
        values = _load(path.read_text(encoding="utf-8"))
        parts = [(text, *text.partition("=")[::2]) for text in overrides]
        changes = [(text, key.strip(), _load(value)) for text, key, value in parts]
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"the recipe and its overrides must be YAML, got {path}: {error}") from error
    if not isinstance(values, dict):
        raise TypeError(f"`{path}` must hold a mapping of settings, got {values!r}")
    for text, key, value in changes:
        if "=" not in text or not all(part.isidentifier() for part in key.split(".")):
            raise ValueError(f"an override must be key=value, such as optimizer.learning_rate=1e-4, got {text!r}")
        _set(values, key, value)
    return values


def build_config(kind: type[_Built], values: object, where: str = "config") -> _Built:
    """Make settings from plain values.

    Args:
        kind: a dataclass whose fields are int, float, str, bool, Path, Any, Literals, other such dataclasses, tuples
            or dicts of these, or unions of these. Fields with a default may be left out.
        values: a mapping, as YAML gives it.
        where: what the mapping is called in errors.

    Raises:
        ValueError: a key is missing or unknown, or the dataclass refuses a value.
        TypeError: a value has the wrong type.
    """
    if not isinstance(values, dict):
        raise TypeError(f"`{where}` must be a mapping, got {values!r}")
    hints = typing.get_type_hints(kind)
    known = {field.name: field for field in dataclasses.fields(kind) if field.init}  # type: ignore[arg-type]
    needed = {name for name, field in known.items() if _has_no_default(field)}
    unknown, missing = sorted(set(values) - set(known), key=str), sorted(needed - set(values))
    if unknown or missing:
        said = [f"unknown {unknown}{nearest(unknown, known)}"] if unknown else []
        said += [f"no {missing}"] if missing else []
        raise ValueError(f"`{where}` must have keys out of {sorted(known)}, got {', '.join(said)}")
    return kind(**{name: _convert(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def plain(config: Any) -> Any:
    """Settings as plain values again, for JSON and YAML."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}
    if isinstance(config, (tuple, list)):
        return [plain(item) for item in config]
    if isinstance(config, dict):
        return {key: plain(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def _has_no_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _load(text: str) -> Any:
    """What YAML text says; a key that is given twice, of which YAML itself would take the last, is refused."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            names = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                said = f"keys must be given once, got {twice!r} twice"
                raise yaml.constructor.ConstructorError(None, None, said, node.start_mark)
            return super().construct_mapping(node, deep)

    return yaml.load(text, Loader)


def _set(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    for name in parents:
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise TypeError(f"`{key}` must be a key inside a mapping, got {values!r} at {name}")
    values[last] = value


def _convert(hint: Any, value: object, where: str) -> Any:
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _first_that_fits(inner, value, where)
    if origin is Literal:
        if not any(type(value) is type(choice) and value == choice for choice in inner):
            raise ValueError(
                f"`{where}` must be one of {', '.join(map(str, inner))}, got {value!r}{nearest(value, inner)}"
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build_config(hint, value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"`{where}` must be a list, got {value!r}")
        return tuple(_convert(inner[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is dict:
        if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
            raise TypeError(f"`{where}` must be a mapping with names as keys, got {value!r}")
        return {key: _convert(inner[1], item, f"{where}.{key}") for key, item in value.items()}
    return _plain_value(hint, value, where)


def _first_that_fits(kinds: tuple[Any, ...], value: object, where: str) -> Any:
    """The value as the first kind of a union that takes it."""
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    errors: list[Exception] = []
    for kind in others:
        try:
            return _convert(kind, value, where)
        except (TypeError, ValueError) as error:
            errors.append(error)
    if len(errors) == 1 or isinstance(value, (list, dict)):
        # Lists and mappings stand last in a union: what is inside of them is wrong.
        raise errors[-1]
    raise type(errors[-1])("; or ".join(str(error) for error in errors))


def _plain_value(hint: type, value: object, where: str) -> Any:
    if hint is float and type(value) is int:
        return float(value)
    # YAML reads 1e-4 as text: it wants a point and a sign in front of the exponent's digits.
    if hint is float and type(value) is str:
        try:
            return float(value)
        except ValueError:
            pass
    if hint is Path and type(value) is str:
        return Path(value)
    if type(value) is not hint:
        raise TypeError(f"`{where}` must be of type {hint.__name__}, got {value!r}")
    return value
