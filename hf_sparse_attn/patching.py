"""Patch: what was replaced in a model and how to put it back."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from weakref import ref

from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse_attn.context import check_int
from hf_sparse_attn.method import Method
from hf_sparse_attn.report import Report
from hf_sparse_attn.session import Session, Uncopied

log = logging.getLogger(__name__)

# Where a patched module keeps its Patch; absent from modules that are not patched.
PATCH_ATTRIBUTE = "_hf_sparse_attn_patch"
# What the modules `copy` and `pickle` look for in an object itself before they look in its class.
_ANSWERED = "__deepcopy__", "__reduce_ex__"
# What stands there in a deep copy.
_COPY = "deep copy of a patched module, dense"
_ABSENT = object()
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)  # fmt: skip


class _Unpicklable:
    def __reduce__(self) -> Any:
        raise TypeError("a patched model must not be pickled: unpatch() it first, or save its state_dict()")


class Patch(_Unpicklable, Uncopied, AbstractContextManager["Patch"]):
    """A reversible change of a model, made by `patch()`; `remove()` or the end of `with` leaves it as it was."""

    def __init__(self, family: str, session: Session, modules: Sequence[nn.Module], model: object) -> None:
        self.family = family
        self.session = session
        self.modules = list(modules)
        # Weak, for the modules hold the patch: a transformer kept alone must not keep its pipeline alive.
        self._model = ref(model)
        self._undo = ExitStack()
        self._removed = self._copied = False
        self._changes: dict[int, _Changes] = {}
        self._on_copy: list[Callable[[dict[int, Any]], object]] = []
        for module in self.modules:
            self.set_attribute(module, PATCH_ATTRIBUTE, self)
        watched = [ref(module) for module in self.modules]
        session.in_training = lambda: any(m.training for one in watched if (m := one()) is not None)

    @property
    def model(self) -> Any:
        """What `patch()` was given, the pipeline or model; None when it is gone."""
        return self._model()

    @property
    def removed(self) -> bool:
        """Whether `remove()` was called."""
        return self._removed

    @property
    def method(self) -> Method:
        """The method in force."""
        return self.session.method

    def on_remove(self, call: Callable[..., object], *args: Any) -> None:
        """Registers what puts something back; called in reverse order."""
        self._undo.callback(call, *args)

    def on_copy(self, call: Callable[[dict[int, Any]], object]) -> None:
        """Registers what mends a deep copy of a patched module; given the memo of the copy."""
        self._on_copy.append(call)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an instance attribute; `remove()` restores the value or the absence it had, a deep copy has it, too."""
        if isinstance(owner, nn.Module):
            self._changed(owner).attributes.setdefault(name, owner.__dict__.get(name, _ABSENT))
        self._set(owner, name, value)

    def hook(self, module: nn.Module, kind: str, call: Callable[..., object], **options: bool) -> RemovableHandle:
        """Registers a hook that `remove()` takes off, and that a deep copy does not have.

        Args:
            module: the module.
            kind: name of the method that registers it.
            call: the hook.
            options: of that method.
        """
        handle: RemovableHandle = getattr(module, kind)(call, **options)
        self._changed(module).hooks.add(handle.id)
        self.on_remove(handle.remove)
        return handle

    def _set(self, owner: Any, name: str, value: Any) -> None:
        self.on_remove(restoring(owner, name))
        owner.__dict__[name] = value

    def _changed(self, module: nn.Module) -> _Changes:
        """What this patch changed of a module; from the first change on copies of it are made without."""
        if id(module) not in self._changes:
            changes = self._changes[id(module)] = _Changes()
            for name, answer in self._answers(module, changes).items():
                self._set(module, name, answer)
        return self._changes[id(module)]

    def _answers(self, module: nn.Module, changes: _Changes) -> dict[str, Any]:
        """What stands in a module so that copies of it are made here."""
        return dict(
            zip(_ANSWERED, (partial(f, module, changes) for f in (self._deep_copy, self._shallow_copy)), strict=True)
        )

    def _shallow_copy(self, module: nn.Module, changes: _Changes, protocol: Any) -> tuple[Any, ...]:
        """What a shallow copy is made of; it shares the patch, and is unpatched with the module."""
        make, args, state, *_ = type(module).__reduce_ex__(module, protocol)
        if self.removed:
            return make, args, changes.undone(state)
        made = make(*args)
        return _Made(made), (), {**state, **self._answers(made, changes)}

    def _deep_copy(self, module: nn.Module, changes: _Changes, memo: dict[int, Any]) -> nn.Module:
        """A deep copy of a module as it would be without the patch, of which it only knows that there was one."""
        if not self._copied:
            self._copied = True
            log.warning("a deep copy of a patched model is dense: call patch() on the copy")
        kind = type(module)
        own = getattr(kind, "__deepcopy__", None)
        if own is None:
            make, args, state, *_ = kind.__reduce_ex__(module, 4)
            made: nn.Module = make(*args)
            memo[id(module)] = made
            made.__setstate__(copy.deepcopy(changes.undone(state), memo))
        else:
            # A class that forbids it raises here (fully_shard).
            made = own(module, memo)
            state = changes.undone(made.__dict__)
            made.__dict__.clear()
            made.__dict__.update(state)
        for mend in self._on_copy:
            mend(memo)
        return made

    def report(self) -> Report:
        """What every patched layer did so far."""
        session = self.session
        records = sorted(session.records.values(), key=lambda r: (r.exact, r.index, r.name))
        layers = [r.report(session.method.requested_density(r.index)) for r in records]
        return Report(session.method.name, session.method.params(), self.family, layers, self.notes)

    def note(self, text: str) -> None:
        """Tells something of this patch once: a warning in the log, and a line under the table of `report()`."""
        self.session.notes.add(text)

    @property
    def notes(self) -> tuple[str, ...]:
        """What was told of this patch so far."""
        return tuple(self.session.notes)

    def measure(self, calls: int = 1) -> None:
        """Has the next sparse calls of each layer measured: the model's own dense attention is run beside them.

        Each measured call runs both attentions a few times more, in turns and without gradients; its output stays the
        sparse one. `report()` then shows the gain. A layer whose host does not say how it runs dense shows none.

        Args:
            calls: how many sparse calls of each layer.

        Raises:
            ValueError, TypeError: `calls` is not a number from 0 on.
        """
        check_int("calls", calls, 0)
        for record in self.session.records.values():
            record.to_measure = calls

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model runs its own dense attention, to the bit, as if it had no patch; nothing is counted.

        Gradient checkpointing runs layers again in backward: what was run within it that way must have its backward
        within it, and what was not, outside of it. Else backward raises.
        """
        self.session.pauses += 1
        try:
            yield
        finally:
            self.session.pauses -= 1

    def remove(self) -> None:
        """Puts back everything that was replaced. A second call does nothing."""
        if not self._removed:
            self._removed = True
            self._undo.close()

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.session.records)} layers"
        return f"Patch({self.session.method!r} on {self.family}, {state})"


def restoring(owner: Any, name: str) -> Callable[[], None]:
    """What gives an instance attribute the value back, or the absence, that it has now."""
    before = owner.__dict__.get(name, _ABSENT)

    def restore() -> None:
        if before is _ABSENT:
            owner.__dict__.pop(name, None)
        else:
            owner.__dict__[name] = before

    return restore


@dataclass
class _Changes:
    """What a patch changed of a module: attributes, with the values they had, and hooks, by their ids."""

    attributes: dict[str, Any] = field(default_factory=dict)
    hooks: set[int] = field(default_factory=set)

    def undone(self, state: dict[str, Any]) -> dict[str, Any]:
        """The attributes of the module, or of a copy of it, as they would be without the patch."""
        before = {**state, **self.attributes}
        for name in _HOOKS:
            before[name] = type(state[name])((k, v) for k, v in state[name].items() if k not in self.hooks)
        if PATCH_ATTRIBUTE in self.attributes:
            before[PATCH_ATTRIBUTE] = _COPY
        return {name: value for name, value in before.items() if value is not _ABSENT and name not in _ANSWERED}


@dataclass
class _Made(_Unpicklable):
    """Gives a shallow copy to the module `copy`; the module `pickle` would keep it, and is refused."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        return self.module


@contextmanager
def changed(owners: Iterable[Any], name: str, value: Any) -> Iterator[None]:
    """Within it an attribute of some objects has another value."""
    before = [(owner, getattr(owner, name)) for owner in owners]
    try:
        for owner, _ in before:
            setattr(owner, name, value)
        yield
    finally:
        for owner, was in before:
            setattr(owner, name, was)


def active_patch(module: object) -> Patch | None:
    """The patch on a module, or None."""
    found = getattr(module, "__dict__", {}).get(PATCH_ATTRIBUTE)
    return found if isinstance(found, Patch) and not found.removed else None


def forget_copies(modules: Iterable[nn.Module]) -> bool:
    """Takes the marks of deep copies off modules; whether there were any."""
    copies = [module for module in modules if module.__dict__.get(PATCH_ATTRIBUTE) == _COPY]
    for module in copies:
        del module.__dict__[PATCH_ATTRIBUTE]
    return bool(copies)
