"""What a patch puts into transformers of diffusers: a backend of the dispatcher, and hooks that tell it where."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, NamedTuple, cast
from weakref import ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.at_work import runs_anywhere
from hf_sparse_attn.decision import as_before
from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.diffusers_model import (
    DISPATCH_TABLES,
    NAME,
    NUMBER,
    DiffusersFamily,
    Layer,
    dispatcher,
    forward_parameters,
    networks,
    pipeline_of,
)
from hf_sparse_attn.hosts.diffusers_pipeline import watch
from hf_sparse_attn.hosts.diffusers_run import Attention, CompiledLayer, CompiledModel
from hf_sparse_attn.hosts.diffusers_state import Forwards
from hf_sparse_attn.hosts.sdpa_hook import is_scoped, scoped_class, unscope
from hf_sparse_attn.overlay import own_value
from hf_sparse_attn.patching import Patch, submodule_at

_NUMBERS = itertools.count()


class _Gone(NamedTuple):
    """A backend whose patch is off, and which a call on its way to the dispatcher may still have read."""

    backend: Any
    transformers: list[ref[nn.Module]]


_GONE: list[_Gone] = []
# A server may never be idle: more of them than calls can be on their way are not kept.
_MOST_GONE = 16


def _forget_gone(tables: Any) -> None:
    """Takes the backends of patches that are off out of the tables, but for those whose transformers run now."""
    for gone in list(_GONE):
        if len(_GONE) > _MOST_GONE or not runs_anywhere(one() for one in gone.transformers):
            for name in DISPATCH_TABLES:
                getattr(tables, name).pop(gone.backend, None)
            _GONE[:] = [other for other in _GONE if other is not gone]


def install(patch: Patch, family: type[DiffusersFamily]) -> None:
    """Adds backend, hooks and records; every step is undone by the patch.

    Raises:
        RuntimeError: this version of diffusers has another dispatcher.
        ValueError: a self-attention layer has a processor of its own that does not use the dispatcher.
    """
    _Installation(patch, family).install()


class _Installation:
    """The dispatcher is told neither module nor grid; hooks note both."""

    def __init__(self, patch: Patch, family: type[DiffusersFamily]) -> None:
        self.patch = patch
        self.family = family
        self.forwards = Forwards(patch, family, self.why_lost)
        self.compiled: list[CompiledModel | CompiledLayer] = []
        self.scoped: dict[int, type[Any]] = {}
        self.tickets: list[Tensor] = []

    def install(self) -> None:
        """See the function of that name."""
        dispatch, tables, backend_type = dispatcher()
        _forget_gone(tables)
        forwards = self.forwards
        for number, transformer in enumerate(self.patch.modules):
            self._collect(transformer, self._name(transformer, number))
        for module in (*forwards.attentions, *forwards.layers):
            forwards.names[type(module)] = forward_parameters(type(module))
        before = next((layer.backend for layer in forwards.layers.values()), None)
        self.attention = Attention(forwards, dispatch, before)
        self._register(tables, backend_type, before)
        self.patch.on_remove(forwards.forget)
        for transformer, attentions in forwards.attentions.items():
            self._install_model(transformer)
            self._install_blocks(transformer)
            for attention in attentions:
                self._install_layer(attention)
        watch(self.patch)

    def _name(self, transformer: nn.Module, number: int) -> str:
        """Its name in the pipeline; a bare transformer is called like the pipeline's first, so that reports agree."""
        pipeline = pipeline_of(self.patch)
        for name, part in {} if pipeline is None else networks(pipeline).items():
            if any(m is transformer for m in part.modules()):
                return name
        return "transformer" if number == 0 else f"transformer_{number + 1}"

    def _collect(self, transformer: Any, name: str) -> None:
        places = list(self.family.places(transformer))
        num_layers = max((place.index for place in places), default=0) + 1
        self.forwards.attentions[transformer] = [place.attention for place in places]
        for place in places:
            # Below what a patch has laid over them that was removed, while a forward of it is still at work.
            processor, full_name = own_value(place.attention, "processor"), f"{name}.{place.path}"
            if place.way == "dispatcher" and not hasattr(processor, "_attention_backend"):
                raise ValueError(
                    f"`model` must reach attention through the dispatcher of diffusers, got a "
                    f"{type(processor).__name__} without `_attention_backend` at {full_name}"
                )
            before = own_value(processor, "_attention_backend")
            record = self.patch.session.record(full_name, place.index)
            self.forwards.layers[place.attention] = Layer(
                place.path, record, place.index, num_layers, before, place.way
            )

    def _register(self, tables: Any, backend_type: Any, before: Any) -> None:
        """A backend that the Enum does not list: isinstance and table look-ups are all that is asked of it."""
        self.backend = member = str.__new__(backend_type, value := f"hf_sparse_attn_{next(_NUMBERS)}")
        member._name_ = member._value_ = value
        # A deep copy (EMA weights) may outlive the patch: it gets back the backend from before.
        member.__deepcopy__ = lambda memo: before
        # The tables live as long as the process and must not keep a model alive that is dropped while patched; the
        # small entry then stays, for a finalizer could change the tables while dynamo or a dispatch reads them.
        attention, names = ref(self.attention), set(inspect.signature(Attention.attend).parameters)

        def attend(**given: Any) -> Tensor:
            return cast(Attention, attention()).attend(**given)

        for name, entry in zip(DISPATCH_TABLES, (attend, [], names), strict=True):
            getattr(tables, name)[member] = entry
        # The patch keeps what was installed alive by this, too.
        self.patch.on_remove(self._unregister, tables)

    def _unregister(self, tables: Any) -> None:
        dispatch, family, before = self.attention.dispatch, self.family, self.attention.backend

        def late(**given: Any) -> Tensor:
            mask, plan = given.pop("attn_mask", None), given.pop("_parallel_config", None)
            mask = family.dense_mask(mask, given["key"].shape[1])
            return dispatch(**given, attn_mask=mask, parallel_config=plan, backend=before)

        getattr(tables, DISPATCH_TABLES[0])[self.backend] = late
        _GONE.append(_Gone(self.backend, [ref(transformer) for transformer in self.forwards.attentions]))
        _forget_gone(tables)

    def _install_model(self, transformer: nn.Module) -> None:
        forwards, model = self.forwards, CompiledModel(self.forwards, transformer)
        self._enrol(transformer, model)
        self.compiled.append(model)
        told = forwards.clock.context_of(transformer)
        if told is not None:
            self.patch.set_attribute(transformer, "cache_context", told)
        self._hook(transformer, forwards.enter_forward, forwards.leave_forward)

    def _enrol(self, module: nn.Module, one: CompiledModel | CompiledLayer) -> None:
        ticket = opaque.enrol(one)
        self.forwards.originals[id(ticket)] = module
        # Kept with the original: the id of a tensor that is gone may be another's.
        self.tickets.append(ticket)
        self.patch.set_attribute(module, NUMBER, ticket)

    def _install_blocks(self, transformer: nn.Module) -> None:
        forwards = self.forwards
        enter, leave = forwards.enter_block, forwards.leave_block
        if any(forwards.layers[attention].way == "function" for attention in forwards.attentions[transformer]):
            # These end graphs anyway, and a compiled graph has no other way to tell them the forward.
            enter, leave = torch.compiler.disable(enter), torch.compiler.disable(leave)
        for path in self.family.blocks(transformer):
            self._hook(transformer.get_submodule(path), enter, leave)

    def _install_layer(self, attention: nn.Module) -> None:
        layer = CompiledLayer(self.attention, self.forwards.layers[attention])
        self._enrol(attention, layer)
        self.patch.set_attribute(attention, NAME, layer.layer.record.name)
        self.compiled.append(layer)
        self._take_over(attention, layer.layer)
        # One that is always called is a reason to compile every layer anew.
        self._hook(attention, self.forwards.enter_layer, self.forwards.leave_layer, always=False)

    def _hook(self, module: nn.Module, enter: Any, leave: Any, always: bool = True) -> None:
        self.patch.hook(module, "register_forward_pre_hook", enter, with_kwargs=True)
        self.patch.hook(module, "register_forward_hook", leave, always_call=always)

    def _take_over(self, attention: Any, layer: Layer) -> None:
        """Leads the attention of a module here."""
        processor = own_value(attention, "processor")
        if layer.way == "function":
            kind = type(processor)
            # Layers may share one processor; a scoped class is equal to the one that it stands for.
            if not any(kind is scoped for scoped in self.scoped.values()):
                if id(kind) not in self.scoped:
                    self.scoped[id(kind)] = scoped_class(kind, self.attention.answer_for)
                processor.__class__ = scoped = self.scoped[id(kind)]
                self.patch.on_remove(unscope, processor, scoped)
            return
        stand_in = self.family.stand_in(processor, self.backend, self.patch.session)
        if stand_in is None:
            self.patch.set_attribute(processor, "_attention_backend", self.backend)
            return
        # A processor that is set later is not ours to take away.
        self.patch.set_attribute(attention, "processor", stand_in, yields=True)

    def why_lost(self, transformer: nn.Module, attention: Any) -> str | None:
        """How what `_take_over` did was changed since, or None."""
        layer = self.forwards.layers[attention]
        if as_before(self.patch.session).reason is not None:
            return None
        if not _holds(transformer, layer.path, attention):
            return "attention module replaced after the patch"
        processor = attention.processor
        if layer.way == "function":
            return None if is_scoped(processor) else f"processor changed after the patch to {type(processor).__name__}"
        now = getattr(processor, "_attention_backend", None)
        name = getattr(now, "value", now)
        return None if now is self.backend else f"attention backend changed after the patch to {name}"


def _holds(transformer: nn.Module, path: str, attention: nn.Module) -> bool:
    """Whether an attention is still a part of a transformer, be it inside of what wraps a block."""
    return submodule_at(transformer, path) is attention or any(m is attention for m in transformer.modules())
