"""Patch: what was replaced in a model and how to put it back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.cost.timing import compare
from hf_sparse_attn.decision import FULL
from hf_sparse_attn.method import Method
from hf_sparse_attn.report import Report
from hf_sparse_attn.session import Session, Uncopied

# Where a patched module keeps its Patch; absent from modules that are not patched.
PATCH_ATTRIBUTE = "_hf_sparse_attn_patch"
_ABSENT = object()


class Patch(Uncopied, AbstractContextManager["Patch"]):
    """A reversible change of a model, made by `patch()`; `remove()` or the end of `with` leaves it as it was."""

    def __init__(self, family: str, session: Session, modules: Sequence[nn.Module], model: object) -> None:
        self.family = family
        self.session = session
        self.modules = list(modules)
        # Weak, for the modules hold the patch: a transformer kept alone must not keep its pipeline alive.
        self._model = ref(model)
        self._undo = ExitStack()
        self._removed = False
        self._model_gain: float | None = None
        # Whether the model runs in denoising steps; families whose models never do say so.
        self.has_steps = True
        for module in self.modules:
            self.set_attribute(module, PATCH_ATTRIBUTE, self)
        watched = [ref(module) for module in self.modules]
        session.in_training = lambda: any(m.training for one in watched if (m := one()) is not None)

    def __reduce__(self) -> Any:
        raise TypeError("a patched model must not be pickled: unpatch() it first, or save its state_dict()")

    @property
    def model(self) -> Any:
        """What `patch()` was given, the pipeline or model; None when it is gone."""
        return self._model()

    @property
    def method(self) -> Method:
        """The method in force."""
        return self.session.method

    def on_remove(self, call: Callable[..., object], *args: Any) -> None:
        """Registers what puts something back; called in reverse order."""
        self._undo.callback(call, *args)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Sets an instance attribute; `remove()` restores the value or the absence it had."""
        self.on_remove(restoring(owner, name))
        owner.__dict__[name] = value

    def report(self) -> Report:
        """What every patched layer did so far."""
        session = self.session
        records = sorted(session.records.values(), key=lambda r: (r.exact, r.index, r.name))
        layers = [r.report(session.method.requested_density(r.index)) for r in records]
        if any(layer.density is not None and layer.density >= FULL for layer in layers):
            session.tell_full()
        return Report(session.method.name, session.method.params(), self.family, layers, self.notes, self._model_gain)

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

        What is run within it with gradient checkpointing must have its backward within it, too.
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
    # A deep copy of a patched module carries the attribute over, but is not what the patch changed.
    return found if isinstance(found, Patch) and any(own is module for own in found.modules) else None
