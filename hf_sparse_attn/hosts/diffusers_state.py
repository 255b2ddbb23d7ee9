"""What is running: a forward of a transformer, and in it an attention layer. Each thread knows of its own alone."""

from __future__ import annotations

import itertools
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from hf_sparse_attn.at_work import Forward, calls_here, runs_here
from hf_sparse_attn.compiled import in_program
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.diffusers_clock import GUESSED, Clock
from hf_sparse_attn.hosts.diffusers_model import (
    NUMBER,
    Call,
    DiffusersFamily,
    Layer,
    Tokens,
    pipeline_of,
    rotary_table,
)
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.transforms import plain

log = logging.getLogger(__name__)

_NUMBERS = itertools.count()
_TICKETS = itertools.count()
_MOST_TICKETS = 256
# Names under which transformers take the time.
TIMES = ("timestep", "timesteps", "t")
# What no call of attention has.
_NO_SIZES = -1, -1


@dataclass
class Running:
    """A module at work: a transformer, a block that backward runs again, or an attention layer.

    It keeps no model alive, for an interrupt, or an error in backward, leaves it behind: torch calls no hook then.

    Args:
        owner: number of the Forwards it belongs to.
        module: its id.
        call: what its forward is; None where nobody knows, as in a copy of a patched model.
        ticket: of a transformer, by which compiled layers find the call.
        layer: of an attention; while torch.compile traces it is not asked.
        inputs: what the attention was given, where the method reads it.
        text: how many keys are the text alone; see DiffusersFamily.text_keys.
        outer: what it runs inside of, of any patch.
        forward: of a transformer, what keeps the patch from being taken off.
    """

    owner: int
    module: int
    call: Call | None = None
    ticket: Tensor | None = None
    layer: Layer | None = None
    inputs: LayerInputs | None = None
    text: int = 0
    outer: Running | None = None
    sizes: tuple[int, int] | None = None
    forward: Forward | None = None

    def takes(self, queries: int, keys: int) -> bool:
        """Whether a call of attention is the layer's own: its first one, and others of those sizes.

        Differential attention makes two of one size; another attention inside the layer (an adapter's) must not pass
        for its self-attention.
        """
        if self.text and keys == self.text:
            self.sizes = _NO_SIZES
        elif self.sizes is None:
            self.sizes = queries, keys
        return self.sizes == (queries, keys)


_RUNNING: ContextVar[Running | None] = ContextVar("hf_sparse_attn_running", default=None)


def innermost() -> Running | None:
    """The innermost module at work, of any patch."""
    return _RUNNING.get()


def _around(owner: int, module: nn.Module) -> Running | None:
    """What a module runs inside of; where it does not run for that owner, what runs."""
    top = innermost()
    own = _noted(owner, module)
    return top if own is None else own.outer


def _noted(owner: int, module: nn.Module) -> Running | None:
    """What an owner has noted of a module at work."""
    at = innermost()
    while at is not None and (at.owner, at.module) != (owner, id(module)):
        at = at.outer
    return at


def _enter(module: nn.Module, running: Running) -> None:
    before = _noted(running.owner, module)
    times, at = 0, before
    while at is not None:
        times += (at.owner, at.module) == (running.owner, id(module))
        at = at.outer
    # Around it, not in what runs, where that was left behind and does not run.
    running.outer = before.outer if before is not None and calls_here(module) <= times else innermost()
    _RUNNING.set(running)


class Traced:
    """The same while torch.compile traces, which knows no context variables but does read and write attributes.

    What a graph reads when it runs is the ticket, a tensor, for a number is a reason to compile anew: that of the
    thread's last forward, for a compiled layer that backward runs again has no other way to tell which it was.
    """

    def __init__(self) -> None:
        self.ticket = opaque.ticket(-1)
        self.attention: nn.Module | None = None
        self.layer: Running | None = None
        # Whether a forward runs whose beginning is part of a graph.
        self.began = False


class _Thread(threading.local):
    # An object of its own, for what graphs write to the local storage itself is lost.
    def __init__(self) -> None:
        self.traced = Traced()


class Forwards:
    """The forwards of the transformers of one patch, and the hooks that note them; these know of a copy by its module.

    Args:
        why_lost: how an attention was changed since it was taken over, or None.
    """

    def __init__(
        self, patch: Patch, family: type[DiffusersFamily], why_lost: Callable[[Any, Any], str | None]
    ) -> None:
        self.patch = patch
        self.session = patch.session
        self.family = family
        self.why_lost = why_lost
        self.layers: dict[nn.Module, Layer] = {}
        # Transformers and attentions by the id of their ticket, which a replica shares and a deep copy does not.
        self.originals: dict[int, nn.Module] = {}
        self.attentions: dict[nn.Module, list[nn.Module]] = {}
        # Arguments of the forwards; looked up before, because dynamo cannot follow how.
        self.names: dict[type[nn.Module], list[str]] = {}
        self.clock = Clock()
        self.thread = _Thread()
        self.tickets: OrderedDict[int, Call] = OrderedDict()
        self.last_ticket = -1
        # Backward may recompute a layer in a thread of its own, long after its forward or after another one: its
        # rotary tensor, which checkpointing hands over unchanged and every forward makes anew, says which it was.
        self.calls = WeakTensorKeyDictionary()
        self.number = next(_NUMBERS)
        self.warned: set[str] = set()

    def by_name(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by name."""
        names = self.names.get(type(module))
        if names is None:
            # A module that was sharded since has a class of its own, made from the one it had.
            names = next(self.names[kind] for kind in type(module).__mro__ if kind in self.names)
        return {**dict(zip(names, args, strict=False)), **kwargs}

    def enter_forward(self, transformer: Any, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Notes tokens, step and branch before a transformer runs, and looks whether it still comes here."""
        # Without them torch calls a hook that another thread is just taking off.
        # In a program the model runs as before, or recomputation.watch has refused it.
        if kwargs is None or in_program():
            return
        inputs = self.by_name(transformer, args, kwargs)
        time = next((inputs[name] for name in TIMES if inputs.get(name) is not None), None)
        if torch.compiler.is_compiling():
            given, tokens = [time] if isinstance(time, Tensor) else [], self.family.tokens(transformer, inputs)
            traced = self.thread.traced
            traced.ticket = opaque.begin(getattr(transformer, NUMBER), given, tokens.sizes())
            traced.began = True
            return
        own = self.original(transformer)
        if own not in self.attentions:
            self._warn("a deep copy of a patched model runs dense: make the copy first and patch it")
            _enter(transformer, self._running(transformer))
            return
        forward = Forward(ref(transformer))
        if not (self.session.begun and self.patch.at_work.begin(forward)):
            return
        try:
            number, call = self.begin(own, plain(time), self.family.tokens(transformer, inputs))
        except BaseException:
            self.patch.at_work.end(forward)
            raise
        ticket = self.thread.traced.ticket = opaque.ticket(number)
        _enter(transformer, self._running(transformer, call, ticket=ticket, forward=forward))

    def original(self, module: Any) -> Any:
        """The module itself, or what it is a replica of (nn.DataParallel runs each batch in new ones)."""
        return self.originals.get(id(module.__dict__.get(NUMBER)), module)

    def begin(self, transformer: Any, time: Any, tokens: Tokens) -> tuple[int, Call]:
        """Notes a forward, and the number under which compiled layers find it."""
        moment = self.clock.moment(time, pipeline_of(self.patch))
        if moment.guessed and (self.session.policy.by_steps or self.session.method.by_steps):
            self.session.notes.add(GUESSED)
        for attention in self.attentions[transformer]:
            reason = self.why_lost(transformer, attention)
            # Another thread may just have removed the patch and put on the next.
            if reason is not None and not self.session.ended:
                self._warn(f"{reason}: call patch() after such changes")
                self.session.give_up(self.layers[attention].record, reason)
        branch = self.clock.generation.branch
        call = Call(tokens, moment.step, moment.num_steps, branch, WeakTensorKeyDictionary())
        number = next(_TICKETS)
        self.tickets[number] = call
        self.last_ticket = number
        # A backward asks for the forwards of the steps whose gradients it adds up, and not for older ones.
        while len(self.tickets) > _MOST_TICKETS:
            self.tickets.popitem(last=False)
        return number, call

    def leave_forward(self, transformer: nn.Module, *_: object) -> None:
        """Ends what `enter_forward` began; runs after an exception too."""
        self.thread.traced.began = False
        if torch.compiler.is_compiling():
            return
        own = _noted(self.number, transformer)
        _RUNNING.set(_around(self.number, transformer))
        if own is not None and own.forward is not None:
            self.patch.at_work.end(own.forward)
        outer = self._innermost(layers=False)
        if outer is not None and outer.ticket is not None:
            self.thread.traced.ticket = outer.ticket

    def forget(self) -> None:
        """Forgets what an interrupt has left behind in this thread, when the patch goes."""
        running = innermost()
        while running is not None and running.owner == self.number:
            running = running.outer
        _RUNNING.set(running)

    def enter_block(self, block: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Notes the tensors of a block, by which its recomputation in backward is known again."""
        if torch.compiler.is_compiling() or kwargs is None:
            return
        tensors, call = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)], self.call
        if call is None:
            call = next((known for t in tensors if (known := self.calls.get(t)) is not None), None)
            _enter(block, self._running(block, call))
        else:
            for tensor in tensors:
                self.calls[tensor] = call

    def leave_block(self, block: nn.Module, *_: object) -> None:
        """Ends what `enter_block` began."""
        if not torch.compiler.is_compiling():
            _RUNNING.set(_around(self.number, block))

    def enter_layer(self, attention: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Notes which layer asks for attention next; in a recomputation also which forward it belongs to."""
        if kwargs is None:
            return
        given = self.by_name(attention, args, kwargs)
        inputs = self.family.layer_inputs(given) if self.session.reads else None
        text = self.family.text_keys(given)
        if torch.compiler.is_compiling():
            traced = self.thread.traced
            traced.attention, traced.layer = attention, Running(self.number, 0, inputs=inputs, text=text)
            return
        layer, call, rotary = self.layers.get(self.original(attention)), self.call, rotary_table(args, kwargs)
        if layer is None:
            return
        if rotary is not None and call is None:
            call = self.calls.get(rotary)
        elif rotary is not None:
            self.calls[rotary] = call
        if call is None and self.is_of_no_forward():
            return
        _enter(attention, self._running(attention, call, layer=layer, inputs=inputs, text=text))

    def leave_layer(self, attention: nn.Module, *_: object) -> None:
        """Ends what `enter_layer` began, also where a step cache gave the output and attention was never asked."""
        if torch.compiler.is_compiling():
            self.thread.traced.attention = self.thread.traced.layer = None
        else:
            _RUNNING.set(_around(self.number, attention))

    def is_of_no_forward(self) -> bool:
        """Whether what runs in this thread, in no forward that is known, runs as without the patch.

        It does where the patch was removed, and in a forward that began before the patch.
        """
        return self.session.ended or runs_here(self.attentions)

    @property
    def layer(self) -> Running | None:
        """The attention layer at work."""
        if torch.compiler.is_compiling():
            return self.thread.traced.layer
        running = self._innermost()
        return None if running is None or running.layer is None else running

    def called(self, attention: nn.Module) -> Running | None:
        """An attention whose processor runs, which no graph does; None where it is not ours, as in a deep copy."""
        layer, running = self.layers.get(self.original(attention)), self._innermost()
        if layer is None:
            return None
        if running is not None and running.module == id(attention):
            return running
        if self.call is None and self.is_of_no_forward():
            return None
        # The hooks before it were part of a graph.
        traced = self.thread.traced
        text = traced.layer.text if traced.layer is not None and traced.attention is attention else 0
        return self._running(attention, self.call, layer=layer, text=text)

    @property
    def call(self) -> Call | None:
        """The forward that runs or is run again, where it is known; not for graphs that are being traced."""
        running = self._innermost(layers=False)
        if running is not None:
            return running.call
        return self.find(self.thread.traced.ticket) if self.thread.traced.began else None

    def find(self, ticket: Tensor) -> Call | None:
        """The forward of a ticket; where its thread never ran one, as those of autograd, the last one of all."""
        number = int(ticket)
        return self.tickets.get(self.last_ticket if number < 0 else number)

    def _innermost(self, layers: bool = True) -> Running | None:
        """The innermost module at work that is of this patch, and no layer where these are not asked for."""
        running = innermost()
        while running is not None and (running.owner != self.number or not (layers or running.layer is None)):
            running = running.outer
        return running

    def _running(self, module: nn.Module, call: Call | None = None, **more: Any) -> Running:
        return Running(self.number, id(module), call, **more)

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning("%s", text)
