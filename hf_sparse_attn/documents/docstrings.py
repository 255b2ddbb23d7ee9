"""Docstrings and type hints of this package as parts that a page can be made of."""

from __future__ import annotations

import inspect
import re
import textwrap
import types
from collections.abc import Iterable
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

_HEADING = re.compile(r"(Formula|When|Args|Attributes|Returns|Raises):$")
_ARGUMENT = re.compile(r"(\w+(?:, \w+)*):\s+(.*)")


@dataclass(frozen=True)
class Docstring:
    """A docstring in parts.

    Args:
        summary: the first line.
        paragraphs: what follows, up to the first section.
        sections: text by heading ("Formula", "When", "Args", ...), without its indentation.
    """

    summary: str
    paragraphs: tuple[str, ...]
    sections: dict[str, str]

    @property
    def arguments(self) -> dict[str, str]:
        """What "Args" says of each name; names that share a line share its text."""
        said: dict[str, str] = {}
        names: list[str] = []
        for line in self.sections.get("Args", "").splitlines():
            found = _ARGUMENT.match(line)
            if found:
                names = found[1].split(", ")
                said.update(dict.fromkeys(names, found[2]))
            else:
                said.update({name: f"{said[name]} {line.strip()}" for name in names})
        return said

    def chosen(self, *, deviations: bool) -> list[str]:
        """The paragraphs that tell deviations from what was published, or the others."""
        return [text for text in self.paragraphs if text.startswith("Deviation") == deviations]


def read(doc: str | None) -> Docstring:
    """The parts of a docstring; paragraphs that are indented become blocks of code."""
    parts = re.split(r"\n\n+", inspect.cleandoc(doc or ""))
    paragraphs: list[str] = []
    sections: dict[str, str] = {}
    for part in parts[1:]:
        heading, _, rest = part.partition("\n")
        if _HEADING.match(heading):
            sections[heading[:-1]] = textwrap.dedent(rest)
        elif part.startswith("    "):
            paragraphs.append(f"```bash\n{textwrap.dedent(part)}\n```")
        else:
            paragraphs.append(part)
    return Docstring(parts[0], tuple(paragraphs), sections)


def fields_of(kind: type[Any]) -> list[tuple[Field[Any], Any, str]]:
    """The fields of a dataclass with their types and what the docstrings of it and its bases say of them."""
    said: dict[str, str] = {}
    for base in reversed(kind.__mro__):
        # A dataclass without a docstring has its signature for one.
        if is_dataclass(base):
            said.update(read(base.__doc__).arguments)
    hints = get_type_hints(kind)
    return [(field, hints[field.name], said.get(field.name, "")) for field in fields(kind) if field.init]


def type_text(hint: Any) -> str:
    """A type as Python writes it, aliases resolved: `int | None`, `"wan" | "hunyuan"`."""
    if hint is type(None):
        return "None"
    if get_origin(hint) is Literal:
        return " | ".join(f'"{value}"' for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(type_text, get_args(hint))))
    if get_origin(hint) is not None:
        inner = ", ".join("..." if part is Ellipsis else type_text(part) for part in get_args(hint))
        return f"{get_origin(hint).__name__}[{inner}]"
    return getattr(hint, "__name__", str(hint))


def dataclasses_in(hint: Any) -> list[type[Any]]:
    """The dataclasses that a type is made of, in order."""
    if is_dataclass(hint) and isinstance(hint, type):
        return [hint]
    return list(_each(dataclasses_in(part) for part in get_args(hint)))


def default_text(field: Field[Any]) -> str:
    """The default of a field, or "required"."""
    if field.default is not MISSING:
        return f'"{field.default}"' if isinstance(field.default, str) else str(field.default)
    if field.default_factory is MISSING:
        return "required"
    made = field.default_factory()
    return "its defaults" if is_dataclass(made) else str(made)


def _each(lists: Iterable[list[type[Any]]]) -> dict[type[Any], None]:
    return {item: None for items in lists for item in items}
