"""JSON that strangers may have written, every key, type and size checked; and files written whole or not at all."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np

# Lists in lists of a parameter.
_DEEPEST = 4
# Far above what a figure can be, far below what a float can hold.
_HUGE = 1e300


def finite(name: str, value: Any) -> float:
    """The value, a finite number, as a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.floating, np.integer)):
        raise TypeError(f"`{name}` must be a number, got {shortened(value)} of type {type(value).__name__}")
    # Compared before it is converted: a whole number may be too large for that.
    if not -_HUGE < value < _HUGE:
        raise ValueError(f"`{name}` must be a finite number, got {shortened(value)}")
    return float(value)


def shortened(value: Any) -> str:
    """A value as it is shown in an error: at most 80 characters."""
    # The digits of a huge number are not even made.
    if isinstance(value, int) and value.bit_length() > 256:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def as_dict(name: str, value: Any) -> dict[str, Any]:
    """The value, an object."""
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be an object, got {shortened(value)}")
    return value


def as_list(name: str, value: Any, most: int) -> list[Any]:
    """The value, a list of at most so many entries."""
    if not isinstance(value, list):
        raise TypeError(f"`{name}` must be a list, got {shortened(value)}")
    if len(value) > most:
        raise ValueError(f"`{name}` must have at most {most} entries, got {len(value)}")
    return value


def as_text(name: str, value: Any) -> str:
    """The value, a text."""
    if not isinstance(value, str):
        raise TypeError(f"`{name}` must be a text, got {shortened(value)}")
    return value


def as_pair(name: str, value: Any) -> tuple[float, float]:
    """The value, two finite numbers."""
    both = as_list(name, value, 2)
    if len(both) != 2:
        raise ValueError(f"`{name}` must be pairs of numbers, got {shortened(both)}")
    return finite(name, both[0]), finite(name, both[1])


def check_keys(name: str, value: Any, keys: tuple[str, ...]) -> None:
    """Raises where an object has other keys than these."""
    given = set(as_dict(name, value))
    if given - set(keys):
        raise ValueError(f"`{name}` must have the keys {', '.join(keys)}; got {_names(given - set(keys))} besides")
    if set(keys) - given:
        raise ValueError(f"`{name}` must have the keys {', '.join(keys)}; {_names(set(keys) - given)} missing")


def _names(keys: set[str]) -> str:
    return ", ".join(shortened(k) for k in sorted(keys)[:8])


def read_document(
    text: str, what: str, form: str, version: int, keys: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The object in a text of a known format, with exactly these keys; `what` names it in errors.

    Those that are optional may be there besides.

    Raises:
        ValueError, TypeError: the text is not JSON, or of another format, version or keys.
    """
    try:
        value = read_object(text)
    except RecursionError:
        raise ValueError(f"the text must be a {what}, got lists within lists without end") from None
    found = value.get("format"), value.get("version")
    if found[0] != form or type(found[1]) is not int or found[1] != version:
        raise ValueError(f"the format must be {form} version {version}, got {shortened(found)}")
    check_keys(what, value, (*keys, *(key for key in optional if key in value)))
    return value


def read_object(text: str) -> dict[str, Any]:
    """The object in a text.

    Raises:
        ValueError: it is no JSON, gives a key twice or a number that is not finite, or holds something else.
        RecursionError: lists within lists without end.
    """
    value = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_word)
    if not isinstance(value, dict):
        raise ValueError(f"the text must be a JSON object, got {shortened(value)}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """`object_pairs_hook` of json.loads: a key that is given twice is refused."""
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(
            f"keys must be given once, got {shortened(next(n for n in names if names.count(n) > 1))} twice"
        )
    return made


def _refuse_word(word: str) -> Any:
    """`parse_constant` of json.loads: NaN and infinity are refused."""
    raise ValueError(f"numbers must be finite, got {word}")


def encode(name: str, value: Any) -> Any:
    """A parameter as JSON; infinity, which JSON lacks, by name."""
    if isinstance(value, (list, tuple)):
        return [encode(name, v) for v in value]
    if isinstance(value, float) and math.isinf(value):
        return {"float": "inf" if value > 0 else "-inf"}
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and not math.isnan(value)):
        return value
    raise TypeError(f"parameter {name!r} must be numbers, texts or tuples of them to be saved, got {value!r}")


def decode(name: str, value: Any, depth: int = 0) -> Any:
    """The inverse of `encode`; lists become tuples, for parameters are hashable."""
    if isinstance(value, list) and depth < _DEEPEST:
        return tuple(decode(name, v, depth + 1) for v in value)
    if value in ({"float": "inf"}, {"float": "-inf"}):
        return float(value["float"])
    if isinstance(value, (list, dict)):
        raise ValueError(f"`{name}` must be numbers, texts or lists of them, got {shortened(value)}")
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        finite(name, value)
    return value
