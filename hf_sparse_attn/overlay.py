"""Attributes that patches lay over an object's own, in whatever order the patches come and go."""

from __future__ import annotations

from threading import RLock
from typing import Any
from weakref import WeakValueDictionary

ABSENT: Any = object()
# A collection that ends an overlay may run within another's change.
_LOCK = RLock()
# The topmost of each attribute; those who can lift an overlay keep it, and it keeps its owner.
_TOP: WeakValueDictionary[tuple[int, str], Overlay] = WeakValueDictionary()


class Overlay:
    """One value laid over an instance attribute; `lift` takes it off, and what is below, or was before, shows again.

    Args:
        owner: the object.
        name: the attribute.
        value: the value.
        yields: whether another value that was set since is left as it is.
    """

    def __init__(self, owner: Any, name: str, value: Any, yields: bool = False) -> None:
        self.owner, self.name, self.value, self.yields = owner, name, value, yields
        self.lifted = False
        self.above: Overlay | None = None
        with _LOCK:
            self.below: Overlay | None = _TOP.get((id(owner), name))
            self.before = owner.__dict__.get(name, ABSENT)
            if self.below is not None:
                self.below.above = self
            _TOP[id(owner), name] = self
            owner.__dict__[name] = value

    def lift(self) -> None:
        """Takes the value off; a second call does nothing."""
        with _LOCK:
            if self.lifted:
                return
            self.lifted = True
            if self.above is not None:
                # What shows now is another's, who goes on with what is below this one.
                self.above.below, self.above.before = self.below, self.before
                if self.below is not None:
                    self.below.above = self.above
                return
            if self.below is not None:
                self.below.above = None
                _TOP[id(self.owner), self.name] = self.below
            else:
                _TOP.pop((id(self.owner), self.name), None)
            if self.yields and self.owner.__dict__.get(self.name) is not self.value:
                return
            put_back(self.owner, self.name, self.before)


def put_back(owner: Any, name: str, before: Any) -> None:
    """Gives an instance attribute a value back, or with ABSENT its absence."""
    if before is ABSENT:
        owner.__dict__.pop(name, None)
    else:
        owner.__dict__[name] = before


def value_before(owner: Any, name: str) -> Any:
    """An attribute as it is below all overlays; ABSENT where the object itself has none."""
    with _LOCK:
        lowest = _TOP.get((id(owner), name))
        while lowest is not None and lowest.below is not None:
            lowest = lowest.below
        return owner.__dict__.get(name, ABSENT) if lowest is None else lowest.before


def own_value(owner: Any, name: str) -> Any:
    """As getattr(owner, name, None) would find it below all overlays."""
    found = value_before(owner, name) if hasattr(owner, "__dict__") else ABSENT
    if found is not ABSENT:
        return found
    return getattr(owner if (id(owner), name) not in _TOP else type(owner), name, None)
