"""Which patch a forward of a transformers model began under, and what belongs to that forward alone."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import nn

from hf_sparse_attn.at_work import AtWork, Forward, runs_here
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.session import Session, Uncopied

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_hook import LayerState

# Attribute of a patched attention module that holds its LayerState; plain, so that it is not in the state dict.
STATE_ATTRIBUTE = "_hsa_layer"


@dataclass(eq=False)
class Bound(Uncopied):
    """The layers of one patch: what a forward that began under it goes on with, whatever becomes of the patch.

    Args:
        session: of the patch.
        at_work: its forwards.
        owners: the modules whose forwards are noted.
        states: by attention module; weak, for a forward must not keep a model alive.
        configs: ids of the configs that lead its layers here.
    """

    session: Session
    at_work: AtWork
    owners: tuple[ref[nn.Module], ...]
    states: WeakKeyDictionary[nn.Module, LayerState] = field(default_factory=WeakKeyDictionary)
    configs: set[int] = field(default_factory=set)

    def state_of(self, module: nn.Module) -> LayerState | None:
        """The state of an attention module, or of a replica of it, which shares its attributes; None for others'."""
        state: LayerState | None = module.__dict__.get(STATE_ATTRIBUTE)
        return state if state is not None and state.bound is self else self.states.get(module)

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        """Runs before an owner: a forward begins, under the patch where that is on and not paused."""
        if torch.compiler.is_compiling():
            return
        forward = Forward(ref(module), self, asleep=self.session.paused)
        # What is not noted is dense, too; in a pause the mask must know it, for who runs a layer again.
        if not (self.session.begun and self.at_work.begin(forward)):
            return
        # Without those that an interrupt has left behind, of whatever patch: torch calls no hook then.
        known = [f for f in _HERE.forwards if f.asleep or f in f.bound.at_work]
        _HERE.forwards = [*(f for f in known if runs_here([f.module()])), forward]

    def forget(self) -> None:
        """Forgets what an interrupt has left behind in this thread, when the patch goes."""
        _HERE.forwards = [f for f in _HERE.forwards if f.bound is not self]

    def after(self, module: nn.Module, *_: object) -> None:
        """Runs after an owner, also where it raised."""
        if torch.compiler.is_compiling():
            return
        forward = next((f for f in reversed(_HERE.forwards) if f.bound is self and f.module() is module), None)
        if forward is not None:
            _HERE.forwards = [f for f in _HERE.forwards if f is not forward]
            self.at_work.end(forward)


class _Here(threading.local):
    def __init__(self) -> None:
        self.forwards: list[Forward] = []
        # Of calls outside of any forward that is noted.
        self.values: dict[Any, Any] = {}


_HERE = _Here()


def bind(patch: Patch, modules: Iterable[nn.Module]) -> Bound:
    """Has the forwards of modules noted until a patch is removed."""
    owners = list(modules)
    bound = Bound(patch.session, patch.at_work, tuple(ref(module) for module in owners))
    patch.on_remove(bound.forget)
    for module in owners:
        patch.hook(module, "register_forward_pre_hook", bound.before)
        patch.hook(module, "register_forward_hook", bound.after, always_call=True)
    return bound


def forward_of(module: nn.Module) -> Forward | None:
    """The innermost forward of this thread that an attention module belongs to."""
    return next((f for f in reversed(_HERE.forwards) if f.bound.state_of(module) is not None), None)


def runs_alone(bound: Bound | None) -> bool:
    """Whether one forward runs in this thread, of the patch and awake."""
    forwards = _HERE.forwards
    return len(forwards) == 1 and forwards[0].bound is bound and not forwards[0].asleep


def forward_with(config: Any) -> Forward | None:
    """The innermost forward of this thread whose layers a config leads here; where there is none, of any config."""
    forwards = _HERE.forwards
    own = next((f for f in reversed(forwards) if id(config) in f.bound.configs), None)
    return own if own is not None or not forwards else forwards[-1]


def forwards_here() -> list[Forward]:
    """The forwards of this thread, the innermost first."""
    return _HERE.forwards[::-1]


def sleeps(bound: Bound) -> bool:
    """Whether what runs in this thread runs as without the patch; backward may run a part outside of any forward."""
    forward = next((f for f in reversed(_HERE.forwards) if f.bound is bound), None)
    if forward is None:
        return bound.session.ended or bound.session.paused or began_before(bound)
    return forward.asleep or bound.session.paused


def values_here() -> dict[Any, Any]:
    """What belongs to the innermost forward of this thread; outside of one, to the thread."""
    return _HERE.forwards[-1].values if _HERE.forwards else _HERE.values


def began_before(bound: Bound) -> bool:
    """Whether a forward of the patch's modules is at work in this thread that began before the patch."""
    return runs_here(owner() for owner in bound.owners)
