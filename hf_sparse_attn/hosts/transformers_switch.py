"""Configs that point at the hook: as long as a patch wants it, or a mask lives that only the hook can read."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from hf_sparse_attn.hosts import PATCHED_PREFIX, SELECTING
from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.overlay import ABSENT, put_back

log = logging.getLogger(__name__)

_FIELD = "_attn_implementation_internal"


@dataclass
class _Switch:
    """A config that points at the hook, how many patches want that, what it held before, and masks that need it."""

    config: weakref.ref[Any]
    patches: int
    before: Any
    masks: weakref.WeakSet[MaskSpec] = field(default_factory=weakref.WeakSet)


_SWITCHES: dict[int, _Switch] = {}
_LOCK = Lock()


def is_switched(config: Any) -> bool:
    """Whether a config points at the hook now."""
    return str(config._attn_implementation).startswith(PATCHED_PREFIX)


def original(config: Any) -> str:
    """The implementation a config names, also when it points at the hook already."""
    return str(config._attn_implementation or "eager").removeprefix(PATCHED_PREFIX).removeprefix(SELECTING)


def switch_on(config: Any, register: Callable[[str, str], object], prefix: str = PATCHED_PREFIX) -> None:
    """Lets a config point at the hook, once more.

    Args:
        config: the config.
        register: makes a name known to transformers, given the name of the implementation that it stands for.
        prefix: what the name begins with, by which the hook is told.
    """
    with _LOCK:
        known = _SWITCHES.get(id(config))
        if known is not None:
            known.patches += 1
            return
        key, own = id(config), original(config)
        name = f"{prefix}{own}"
        register(name, own)
        gone = weakref.ref(config, lambda _: _SWITCHES.pop(key, None))
        _SWITCHES[key] = _Switch(gone, 1, config.__dict__.get(_FIELD, ABSENT))
        config.__dict__[_FIELD] = name


def switch_off(config: Any) -> None:
    """Ends what one `switch_on` began."""
    with _LOCK:
        _SWITCHES[id(config)].patches -= 1
        _settle(id(config))


def hold(mask: MaskSpec, config: Any) -> bool:
    """Lets a config point at the hook as long as a mask lives; False where it does not any more."""
    if config is None:
        return True
    with _LOCK:
        known = _SWITCHES.get(id(config))
        if known is None:
            return False
        if mask not in known.masks:
            known.masks.add(mask)
            weakref.finalize(mask, _gone, id(config)).atexit = False
        return True


def _gone(key: int) -> None:
    # A collection may run within a change of the switches; the next mask or patch to go settles it then.
    if _LOCK.acquire(blocking=False):
        try:
            _settle(key)
        finally:
            _LOCK.release()


def _settle(key: int) -> None:
    """Gives a config back what it held, where nobody needs it to point at the hook."""
    known = _SWITCHES.get(key)
    # Those that are alive, for the set may not have heard yet.
    if known is None or known.patches or list(known.masks):
        return
    del _SWITCHES[key]
    config = known.config()
    if config is None:
        return
    now = str(config.__dict__.get(_FIELD))
    if not now.startswith(PATCHED_PREFIX):
        log.warning("attn_implementation was set to %r while the model was patched; it is left so", now)
    else:
        put_back(config, _FIELD, known.before)


def mend_copy(config: Any, memo: dict[int, Any]) -> None:
    """Lets the copy of a config, if the memo of a deep copy has one, hold what the config held before."""
    known, made = _SWITCHES.get(id(config)), memo.get(id(config))
    if known is not None and made is not None and is_switched(made):
        put_back(made, _FIELD, known.before)
