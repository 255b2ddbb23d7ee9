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

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from hf_sparse_attn.at_work import AtWork
from hf_sparse_attn.context import check_int
from hf_sparse_attn.cost.timing import compare
from hf_sparse_attn.decision import FULL
from hf_sparse_attn.method import Method
from hf_sparse_attn.overlay import ABSENT, Overlay, put_back, value_before
from hf_sparse_attn.report import Report
from hf_sparse_attn.session import Session, Uncopied

log = logging.getLogger(__name__)

# Where a patched module keeps its Patch; absent from modules that are not patched.
PATCH_ATTRIBUTE = "_hf_sparse_attn_patch"
# What the modules `copy` and `pickle` ask an object itself, before its class. Not `__deepcopy__`, which wrappers that
# hand on what they lack (PEFT, torch.compile) would take for their own.
_REDUCE = "__reduce_ex__"
# What stands there in a deep copy.
_COPY = "deep copy of a patched module, dense"
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
        self.at_work = AtWork()
        self._model_gain: float | None = None
        # Whether the model runs in denoising steps; families whose models never do say so.
        self.has_steps = True
        # Whether the session's decoder is for it.
        self.generates_text = False
        # What `patch()` chose where no method was named (auto.Choice), or None.
        self.choice: Any = None
        for module in self.modules:
            self.set_attribute(module, PATCH_ATTRIBUTE, self)

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
        return self.session.asked

    def on_remove(self, call: Callable[..., object], *args: Any) -> None:
        """Registers what puts something back; called in reverse order."""
        self._undo.callback(call, *args)

    def on_copy(self, call: Callable[[dict[int, Any]], object]) -> None:
        """Registers what mends a deep copy of a patched module; given the memo of the copy."""
        self._on_copy.append(call)

    def set_attribute(self, owner: Any, name: str, value: Any, yields: bool = False) -> None:
        """Sets an instance attribute; `remove()` restores the value or the absence it had, a deep copy has it, too.

        With `yields`, another value that is set meanwhile is left as it is.
        """
        if isinstance(owner, nn.Module):
            self._changed(owner).attributes.setdefault(name, value_before(owner, name))
        self._set(owner, name, value, yields)

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

    def _set(self, owner: Any, name: str, value: Any, yields: bool = False) -> None:
        self.on_remove(Overlay(owner, name, value, yields).lift)

    def _changed(self, module: nn.Module) -> _Changes:
        """What this patch changed of a module; from the first change on copies of it are made without."""
        if id(module) not in self._changes:
            changes = self._changes[id(module)] = _Changes()
            self._set(module, _REDUCE, partial(self._reduce, module, changes))
        return self._changes[id(module)]

    def _reduce(self, module: nn.Module, changes: _Changes, protocol: Any) -> tuple[Any, ...]:
        """What a copy of a module is made of: a shallow one shares the patch, a deep one is as without it."""
        made_of: Any = type(module).__reduce_ex__(module, protocol)
        make, args, state, *_ = made_of
        if self.removed:
            return make, args, changes.undone(state)
        made = make(*args)
        shared = {**state, _REDUCE: partial(self._reduce, made, changes)}
        return _Made(made), (), _State(shared, partial(self._deep_copy, state, changes))

    def _deep_copy(self, state: dict[str, Any], changes: _Changes, memo: dict[int, Any]) -> dict[str, Any]:
        """The attributes of a deep copy of a module, which knows only that there was a patch."""
        if not self._copied:
            self._copied = True
            log.warning("a deep copy of a patched model is dense: call patch() on the copy")
        copied = copy.deepcopy(changes.undone(state), memo)
        for mend in self._on_copy:
            mend(memo)
        return copied

    def report(self) -> Report:
        """What every patched layer did so far."""
        session = self.session
        records = sorted(session.records.values(), key=lambda r: (r.exact, r.index, r.name))
        layers = [r.report(session.asked.requested_density(r.index)) for r in records]
        if any(layer.density is not None and layer.density >= FULL for layer in layers):
            session.tell_full()
        decode = str(session.decoder) if self.generates_text else ""
        method = session.asked
        return Report(method.name, method.params(), self.family, layers, self.notes, self._model_gain, decode)

    def note(self, text: str, level: int = logging.WARNING) -> None:
        """Tells something of this patch once: in the log at a level, and in a line under the table of `report()`."""
        self.session.notes.add(text, level)

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

    def measure_model(self, run: Callable[[], object], rounds: int = 3) -> float:
        """Wall-clock gain of the whole model: its seconds with its own dense attention over those with the patch.

        Both are run in turns without gradients, `rounds` times after one of each that is not timed; the medians count.
        `report()` shows the last gain. The runs with the patch are counted in the report like any others.

        Args:
            run: runs the model once, `lambda: model(**inputs)`, alike each time.
            rounds: timed runs of each.

        Raises:
            ValueError, TypeError: `rounds` is not a number from 1 on, or the patch was removed.
        """
        check_int("rounds", rounds, 1)
        if self._removed:
            raise ValueError("`measure_model` must be called while the patch is on, got one that was removed")

        def dense() -> None:
            with self.paused():
                run()

        weight = next((p for module in self.modules for p in module.parameters()), None)
        device = torch.device("cpu") if weight is None else weight.device
        sparse, own = compare(run, dense, device, rounds)
        self._model_gain = own / sparse
        return self._model_gain

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within it the model runs its own dense attention, to the bit, as if it had no patch; nothing is counted.

        Calls of other threads and tasks are not paused. What is run within it with gradient checkpointing must have
        its backward within it, too.
        """
        with self.session.pause():
            yield

    def remove(self) -> None:
        """Puts back everything that was replaced. A second call does nothing.

        Forwards that are at work then, in whatever thread, end as they began, and the last of them puts back; those
        that begin after run as without the patch.
        """
        if not self._removed:
            self._removed = self.session.ended = True
            self.at_work.close(self._undo.close)

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.session.records)} layers"
        return f"Patch({self.method!r} on {self.family}, {state})"


def restoring(owner: Any, name: str) -> Callable[[], None]:
    """What gives an instance attribute the value back, or the absence, that it has now."""
    return partial(put_back, owner, name, owner.__dict__.get(name, ABSENT))


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
        return {name: value for name, value in before.items() if value is not ABSENT and name != _REDUCE}


class _State(dict[str, Any]):
    """The attributes of a shallow copy; a deep copy has others."""

    def __init__(self, shared: dict[str, Any], deep: Callable[[dict[int, Any]], dict[str, Any]]) -> None:
        super().__init__(shared)
        self.deep = deep

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return self.deep(memo)


@dataclass
class _Made(_Unpicklable):
    """Gives a copy to the module `copy`; the module `pickle` would keep it, and is refused."""

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


def submodule_at(owner: nn.Module, path: str) -> nn.Module | None:
    """The submodule of a path, or None; quicker than get_submodule, for it is asked in every decoding step."""
    at: nn.Module | None = owner
    for part in path.split("."):
        at = None if at is None else at._modules.get(part)
    return at


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
