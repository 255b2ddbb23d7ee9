"""Regular expressions that a stranger may have written, matched in time that no expression can draw out."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from typing import Any

_LONGEST, _DEEPEST = 1000, 4
_CLASSES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdecimal,
    "SPACE": str.isspace,
    "WORD": lambda char: char == "_" or char.isalnum(),
}


class NamePattern:
    """A regular expression over whole names, as `re.fullmatch` matches it.

    `re` tries one way after the other, and an expression can have it try for years. Here all ways are followed at
    once: the places of a name that can be reached are the bits of a number.

    Args:
        text: literals, sets, groups, repetitions, alternatives, boundaries and looking ahead, as `re` writes them.

    Raises:
        ValueError: it is no regular expression; or has something else in it (what a group matched, looking behind,
            flags), more than 1000 characters, or repetitions more than four deep.
    """

    def __init__(self, text: str) -> None:
        if len(text) > _LONGEST:
            raise ValueError(f"a regular expression must have at most {_LONGEST} characters, got {len(text)}")
        try:
            parsed = _parser().parse(text)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it must be a regular expression: {error}") from error
        if parsed.state.flags & ~re.UNICODE:
            raise ValueError("a regular expression must have no flags")
        self._items = parsed
        _check(parsed)

    def matches(self, name: str) -> bool:
        """Whether it matches all of a name."""
        return bool(_follow(self._items, 1, name) >> len(name))


def _parser() -> Any:
    # It moved with Python 3.11.
    return importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")


def _check(items: Any, depth: int = 0) -> None:
    """Raises where something is not followed below."""
    for operation, value in items:
        name = str(operation)
        inner: list[Any] = []
        if name == "BRANCH":
            inner = list(value[1])
        elif name == "SUBPATTERN" and not value[1] and not value[2]:
            inner = [value[3]]
        elif name in ("ASSERT", "ASSERT_NOT") and value[0] > 0:
            inner = [value[1]]
        elif name in ("MAX_REPEAT", "MIN_REPEAT") and depth < _DEEPEST:
            inner = [value[2]]
        elif name not in ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT"):
            raise ValueError(
                "a regular expression must be made of characters, sets, groups, alternatives, looking ahead and "
                f"repetitions at most {_DEEPEST} deep, got {name.lower()}"
            )
        for part in inner:
            _check(part, depth + name.endswith("REPEAT"))


def _follow(items: Any, at: int, name: str) -> int:
    """The places that can be reached from some, each a bit; one for the end of the name besides its characters."""
    for operation, value in items:
        if not at:
            return 0
        at = _step(str(operation), value, at, name)
    return at


def _step(operation: str, value: Any, at: int, name: str) -> int:
    if operation == "BRANCH":
        reached = 0
        for part in value[1]:
            reached |= _follow(part, at, name)
        return reached
    if operation == "SUBPATTERN":
        return _follow(value[3], at, name)
    if operation.endswith("REPEAT"):
        least, most, part = value
        return _repeated(part, least, most, at, name)
    if operation == "AT":
        return at & _bits(len(name) + 1, lambda place: _is_at(str(value), place, name))
    if operation.startswith("ASSERT"):
        return at & _bits(
            len(name) + 1,
            lambda place: bool(_follow(value[1], at & 1 << place, name)) == (operation == "ASSERT"),
        )
    return (at & _bits(len(name), lambda place: _is_char(operation, value, name[place]))) << 1


def _repeated(items: Any, least: int, most: int, at: int, name: str) -> int:
    for _ in range(least):
        after = _follow(items, at, name)
        # Once more changes nothing, however often it is asked for.
        if after == at:
            break
        at = after
    new, tries = at, 0
    while new and tries < most - least:
        new, tries = _follow(items, new, name) & ~at, tries + 1
        at |= new
    return at


def _bits(count: int, has: Callable[[int], bool]) -> int:
    return sum(1 << place for place in range(count) if has(place))


def _is_at(what: str, place: int, name: str) -> bool:
    if what.startswith("AT_BEGINNING"):
        return place == 0
    if what.startswith("AT_END"):
        # What `re` has before a last line break, names of modules do not.
        return place == len(name)
    sides = [0 <= i < len(name) and _CLASSES["WORD"](name[i]) for i in (place - 1, place)]
    return (sides[0] != sides[1]) == (what == "AT_BOUNDARY")


def _is_char(operation: str, value: Any, char: str) -> bool:
    if operation in ("LITERAL", "NOT_LITERAL"):
        return (ord(char) == value) == (operation == "LITERAL")
    if operation == "ANY":
        return char != "\n"
    wanted = str(value[0][0]) != "NEGATE"
    return any(_is_in(str(kind), part, char) for kind, part in value) == wanted


def _is_in(kind: str, part: Any, char: str) -> bool:
    if kind == "LITERAL":
        return bool(ord(char) == part)
    if kind == "RANGE":
        return bool(part[0] <= ord(char) <= part[1])
    if kind == "CATEGORY":
        name = str(part).removeprefix("CATEGORY_")
        return _CLASSES[name.removeprefix("NOT_")](char) != name.startswith("NOT_")
    return False
