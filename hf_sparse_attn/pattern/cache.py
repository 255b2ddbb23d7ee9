"""What is made of patterns, kept: static ones by their layout, plans of kernels with the pattern they are of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from hf_sparse_attn.pattern.block_pattern import BlockPattern

T = TypeVar("T")


class RecentValues(Generic[T]):
    """The values that were used last, by key; safe to use from several threads.

    Args:
        size: how many are kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of a key, made where it is not there; made outside of the lock, for that may take long."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        made = make()
        with self._lock:
            self._values[key] = made
            while len(self._values) > self._size:
                self._values.popitem(last=False)
        return made


def derived(pattern: BlockPattern, name: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, made once for a pattern and kept as long as it; threads that come together get one of them.

    Args:
        pattern: what it is made of.
        name: what it is, with all that it depends on besides the pattern.
        make: called where it is not there yet.
    """
    known: dict[Hashable, Any] = pattern.derived
    if name not in known:
        known.setdefault(name, make())
    found: T = known[name]
    return found
