"""Putting the hook into transformers models: which modules are text attention, their state, the switch of configs."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from threading import Lock
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hf_sparse_attn.hosts import NATIVE_PREFIX, PATCHED_PREFIX
from hf_sparse_attn.hosts.transformers_compile import CompiledLayer
from hf_sparse_attn.hosts.transformers_hook import (
    STATE_ATTRIBUTE,
    LayerState,
    default_dense,
    dense_function,
    is_text_attention,
    register,
)
from hf_sparse_attn.hosts.transformers_inputs import watch_layer
from hf_sparse_attn.patching import Patch

log = logging.getLogger(__name__)

_FIELD = "_attn_implementation_internal"
_ABSENT: Any = object()


Wanted = Callable[[nn.Module, str], bool]


def _is_text(module: nn.Module, name: str) -> bool:
    return is_text_attention(module)


def attention_modules(model: nn.Module, wanted: Wanted = _is_text) -> list[tuple[str, Any, Any]]:
    """(name, attention module, innermost transformers model that holds it) in the order of the model.

    Args:
        model: any module.
        wanted: which modules, by themselves and their name; causal text attention if not given.
    """
    owners: dict[str, PreTrainedModel] = {}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        elif wanted(module, name):
            above = [name[:i] for i in range(len(name)) if i == 0 or name[i] == "."]
            owner = next((owners[n] for n in reversed(above) if n in owners), None)
            if owner is not None:
                found.append((name, module, owner))
    return found


def install_text(
    patch: Patch,
    owners: Iterable[tuple[str, Any]],
    wanted: Wanted = _is_text,
    known: Callable[[Any, Any], dict[str, Any]] = lambda module, owner: {},
) -> None:
    """Gives every attention module its state and lets the configs point at the hook.

    Args:
        patch: undoes it.
        owners: (prefix of its layers' names in the report, transformers model that owns attention).
        wanted: which modules; see attention_modules.
        known: what else the state of an attention module with its owner holds; see LayerState.
    """
    configs: dict[int, Any] = {}
    for prefix, owner in owners:
        found = [(name, module) for name, module, holder in attention_modules(owner, wanted) if holder is owner]
        # Layers of encoders have no number of their own.
        own = [getattr(module, "layer_idx", None) for _, module in found]
        numbers = [place if index is None else index for place, index in enumerate(own)]
        for (name, module), index in zip(found, numbers, strict=True):
            for config in (owner.config, module.config):
                configs.setdefault(id(config), config)
            record = patch.session.record(f"{prefix}{name}", index)
            extra = known(module, owner)
            if patch.session.reads:
                extra["watch"] = watch_layer(patch, module, name)
            dense = dense_name(module)
            state = LayerState(record, patch.session, max(numbers) + 1, dense, **extra)
            compiled = CompiledLayer(state, module, dense_function(dense, module))
            patch.set_attribute(module, STATE_ATTRIBUTE, replace(state, compiled=compiled))
    for config in configs.values():
        switch(patch, config)


def dense_name(module: Any) -> str:
    """The implementation a module runs where nothing is made sparse."""
    original = _original(module.config)
    # A native name is sparse itself: dense then means what the model would have run without it.
    return default_dense(module) if original.startswith(NATIVE_PREFIX) else original


def switch(patch: Patch, config: Any) -> None:
    """Lets a config point at the hook until the patch is removed."""
    _switch_on(config)
    patch.on_remove(_switch_off, config)
    patch.on_copy(partial(_mend_copy, config))


def is_switched(config: Any) -> bool:
    """Whether a config points at the hook now."""
    return str(config._attn_implementation).startswith(PATCHED_PREFIX)


@dataclass
class _Switch:
    """A config that points at the hook, how many patches want that, and what it held before."""

    config: weakref.ref[Any]
    patches: int
    before: Any


_SWITCHES: dict[int, _Switch] = {}
_LOCK = Lock()


def _original(config: Any) -> str:
    """The implementation a config names, also when it points at the hook already."""
    return str(config._attn_implementation or "eager").removeprefix(PATCHED_PREFIX)


def _switch_on(config: Any) -> None:
    with _LOCK:
        known = _SWITCHES.get(id(config))
        if known is not None:
            known.patches += 1
            return
        key, original = id(config), _original(config)
        name = f"{PATCHED_PREFIX}{original}"
        register(name, original, lambda module: module.__dict__.get(STATE_ATTRIBUTE))
        gone = weakref.ref(config, lambda _: _SWITCHES.pop(key, None))
        _SWITCHES[key] = _Switch(gone, 1, config.__dict__.get(_FIELD, _ABSENT))
        config.__dict__[_FIELD] = name


def _mend_copy(config: Any, memo: dict[int, Any]) -> None:
    """Lets the copy of a config, if the memo of a deep copy has one, hold what the config held before."""
    known, made = _SWITCHES.get(id(config)), memo.get(id(config))
    if known is not None and made is not None and is_switched(made):
        _restore(made, known.before)


def _restore(config: Any, before: Any) -> None:
    if before is _ABSENT:
        config.__dict__.pop(_FIELD, None)
    else:
        config.__dict__[_FIELD] = before


def _switch_off(config: Any) -> None:
    with _LOCK:
        known = _SWITCHES[id(config)]
        known.patches -= 1
        if known.patches:
            return
        del _SWITCHES[id(config)]
        now = str(config.__dict__.get(_FIELD))
        if not now.startswith(PATCHED_PREFIX):
            log.warning("attn_implementation was set to %r while the model was patched; it is left so", now)
        else:
            _restore(config, known.before)
