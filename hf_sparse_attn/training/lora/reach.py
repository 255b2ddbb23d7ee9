"""Whether a model calls the modules that have an adapter: where it passes one by, the adapter has no effect."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from hf_sparse_attn.patching import restoring

_log = logging.getLogger(__name__)
# What diffusers makes of several projections, and those it then calls no more.
_FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"),
    "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"),
    "to_added_kv": ("add_k_proj", "add_v_proj"),
}


def check_called(model: nn.Module, argument: str, names: Iterable[str]) -> None:
    """Raises where the projections of an attention are fused: the module of a name is then not called.

    Raises:
        ValueError: naming the first such module.
    """
    for name in names:
        parent, _, last = name.rpartition(".")
        if last in _passed_by(model.get_submodule(parent)):
            raise ValueError(
                f"`{argument}` must be modules that the model calls, got {name}, whose projections are fused: call "
                "unfuse_qkv_projections() of the model first"
            )


def _passed_by(attention: nn.Module) -> set[str]:
    """Projections that an attention does not call, since it calls what they were fused to."""
    if not getattr(attention, "fused_projections", False) or not _asks_for_fused(attention):
        return set()
    return {name for fused, names in _FUSED.items() if fused in attention._modules for name in names}


def _asks_for_fused(attention: nn.Module) -> bool:
    """Whether the processor of an attention knows of fused projections.

    Some never do, and call the single ones whether or not they are fused; and older classes, when they are unfused,
    get their former processor back and keep all else.
    """
    kind = type(getattr(attention, "processor", None))
    todo: list[Any] = [next((vars(own)["__call__"] for own in kind.__mro__ if "__call__" in vars(own)), None)]
    seen: set[Any] = set()
    while todo:
        function = inspect.unwrap(todo.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen or function.__module__ != kind.__module__:
            continue
        if not _FUSED.keys().isdisjoint(code.co_names):
            return True
        seen.add(code)
        # What the processor calls to project.
        todo += [called for name in code.co_names if callable(called := function.__globals__.get(name))]
    return False


def keep_unfused(parts: Iterable[tuple[str, nn.Module]], model: nn.Module) -> list[Callable[[], None]]:
    """Has attentions refuse to fuse or unfuse projections that have an adapter: it would be left out, or deleted.

    Fusing what the adapter is merged into is left to them.

    Args:
        parts: modules with an adapter, by their names.
        model: what they are in.

    Returns:
        what undoes it.
    """
    undo = []
    for where in dict.fromkeys(name.rpartition(".")[0] for name, _ in parts):
        attention = model.get_submodule(where)
        for change in ("fuse_projections", "unfuse_projections"):
            if hasattr(type(attention), change):
                undo.append(restoring(attention, change))
                attention.__dict__[change] = functools.partial(_change, attention, change, where)
    return undo


def _change(attention: Any, change: str, where: str, *args: Any, **kwargs: Any) -> Any:
    """Stands for `fuse_projections` and `unfuse_projections` of an attention with an adapter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    kind = type(attention)
    unfuses = change == "unfuse_projections"
    if unfuses:
        names = set(_FUSED)
    elif hasattr(kind, "unfuse_projections") and not _asks_for_fused(attention):
        names = set()
    else:
        own = "to_kv" if getattr(attention, "is_cross_attention", False) else "to_qkv"
        names = {*_FUSED[own], *_FUSED["to_added_qkv"]}
    parts = [(name, part) for name, part in attention._modules.items() if name in names]
    lost = [name for name, part in parts if isinstance(part, BaseTunerLayer) and (unfuses or not part.merged)]
    if lost:
        way = "" if unfuses else ", or merge it with fuse_lora() of the model"
        raise ValueError(
            f"`{change}` must leave out no adapter, {where} has one on {', '.join(lost)}: remove it first{way}"
        )
    return getattr(kind, change)(attention, *args, **kwargs)


class FirstCall:
    """Watches the first forward of a model, and warns of modules with an adapter that it did not call.

    Args:
        model: what is called.
        parts: modules with an adapter, by their names.
    """

    def __init__(self, model: nn.Module | None = None, parts: Iterable[tuple[str, nn.Module]] = ()) -> None:
        found = dict(parts)
        self._missing, self._of = set(found), len(found)
        self._handles = [
            part.register_forward_pre_hook(functools.partial(self._called, name)) for name, part in found.items()
        ]
        if model is not None:
            self._handles.append(model.register_forward_hook(self._done))

    def __reduce__(self) -> Any:
        # A copy of the model, or a pickled one, is not watched.
        return FirstCall, ()

    def _called(self, name: str, *_: object) -> None:
        if not torch.compiler.is_compiling():
            self._missing.discard(name)

    def _done(self, *_: object) -> None:
        if torch.compiler.is_compiling() or not self._handles:
            return
        self.stop()
        if self._missing:
            first = sorted(self._missing)
            _log.warning(
                "an adapter has no effect on modules that the model does not call: its first forward called %d of %d, "
                "not %s%s",
                self._of - len(first),
                self._of,
                ", ".join(first[:3]),
                " ..." if len(first) > 3 else "",
            )

    def stop(self) -> None:
        """Watches no longer."""
        while self._handles:
            self._handles.pop().remove()
