"""Forwards that began under a patch and have not ended: what they run on is not taken away from under them."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any
from weakref import ref

from torch import nn

_CALL = nn.Module._call_impl.__code__


@dataclass(eq=False)
class Forward:
    """One forward of a patched module.

    Args:
        module: what runs, weakly.
        bound: what its layers belong to.
        asleep: whether they run as without a patch.
        thread: where it runs.
        values: what belongs to this forward alone, by whoever keeps it.
    """

    module: ref[nn.Module]
    bound: Any = None
    asleep: bool = False
    thread: int = field(default_factory=threading.get_ident)
    values: dict[Any, Any] = field(default_factory=dict)


class AtWork:
    """The forwards of one patch in all threads, and what is to be done when there are none any more."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._forwards: list[Forward] = []
        self._last: Callable[[], object] | None = None
        self.closed = False

    def begin(self, forward: Forward) -> bool:
        """Notes a forward, one that is asleep keeps nothing waiting; False after `close`, when none begins any more.

        What an interrupt left behind of the same module in this thread is forgotten.
        """
        module = forward.module()
        with self._lock:
            if self.closed or forward.asleep:
                return not self.closed
            own = [f for f in self._forwards if f.thread == forward.thread and f.module() is module]
            if own and len(own) >= sum(_calls_of(sys._getframe(), [module])):
                self._forwards = [f for f in self._forwards if f not in own]
            self._forwards.append(forward)
            return True

    def __contains__(self, forward: Forward) -> bool:
        return forward in self._forwards

    def end(self, forward: Forward) -> None:
        """Forgets a forward; for the hook that runs after its module, the last of the patch's own there."""
        with self._lock:
            if forward in self._forwards:
                self._forwards.remove(forward)
            last = self._take_last()
        if last is None:
            return
        if sys._getframe(2).f_code is _CALL:
            # After an exception torch goes through the hooks that stand in the module now: none may be taken off yet.
            threading.Thread(target=_after, args=(forward, last)).start()
        else:
            last()

    def close(self, last: Callable[[], object]) -> None:
        """Has `last` called once no forward is at work that began before, which may be now."""
        with self._lock:
            self.closed, self._last = True, last
            # After an interrupt torch calls no hook.
            frames = sys._current_frames()
            self._forwards = [f for f in self._forwards if any(_calls_of(frames.get(f.thread), [f.module()]))]
            now = self._take_last()
        if now is not None:
            now()

    def _take_last(self) -> Callable[[], object] | None:
        if self._forwards:
            return None
        last, self._last = self._last, None
        return last


def _after(forward: Forward, last: Callable[[], object]) -> None:
    """Calls `last` once the module of a forward is no longer being called in its thread."""
    while any(_calls_of(sys._current_frames().get(forward.thread), [forward.module()])):
        time.sleep(1e-3)
    last()


def runs_here(modules: Iterable[nn.Module | None]) -> bool:
    """Whether one of some modules is being called in this thread, noted or not."""
    return any(_calls_of(sys._getframe(), modules))


def calls_here(module: nn.Module) -> int:
    """How often a module is being called in this thread, one call inside of another."""
    return sum(_calls_of(sys._getframe(), [module]))


def runs_anywhere(modules: Iterable[nn.Module | None]) -> bool:
    """Whether one of some modules is being called in any thread, noted or not."""
    modules = list(modules)
    return any(any(_calls_of(frame, modules)) for frame in sys._current_frames().values())


def _calls_of(frame: FrameType | None, modules: Iterable[nn.Module | None]) -> Iterator[bool]:
    """True for each call of one of some modules on a stack."""
    wanted = {id(module) for module in modules if module is not None}
    while frame is not None:
        if frame.f_code is _CALL and id(frame.f_locals.get("self")) in wanted:
            yield True
        frame = frame.f_back
