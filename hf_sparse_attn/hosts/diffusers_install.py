"""What a patch puts into transformers of diffusers: a backend of the dispatcher, and hooks that tell it where."""

from __future__ import annotations

import inspect
import itertools
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.diffusers_model import (
    DISPATCH_TABLES,
    NAME,
    NUMBER,
    PIPELINE_PARTS,
    DiffusersFamily,
    Layer,
    dispatcher,
    forward_parameters,
    pipeline_of,
)
from hf_sparse_attn.hosts.diffusers_run import Attention, CompiledLayer, CompiledModel
from hf_sparse_attn.hosts.diffusers_state import Forwards
from hf_sparse_attn.hosts.sdpa_hook import is_scoped, scoped_class
from hf_sparse_attn.patching import Patch

_NUMBERS = itertools.count()


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
        self.scoped: dict[type[Any], type[Any]] = {}

    def install(self) -> None:
        """See the function of that name."""
        dispatch, tables, backend_type = dispatcher()
        forwards = self.forwards
        for number, transformer in enumerate(self.patch.modules):
            self._collect(transformer, self._name(transformer, number))
        for module in (*forwards.attentions, *forwards.layers):
            forwards.names[type(module)] = forward_parameters(type(module))
        before = next((layer.backend for layer in forwards.layers.values()), None)
        self.attention = Attention(forwards, dispatch, before)
        self._register(tables, backend_type, before)
        for transformer, attentions in forwards.attentions.items():
            self._install_model(transformer)
            self._install_blocks(transformer)
            for attention in attentions:
                self._install_layer(attention)

    def _name(self, transformer: nn.Module, number: int) -> str:
        """Its name in the pipeline; a bare transformer is called like the pipeline's first, so that reports agree."""
        pipeline = pipeline_of(self.patch)
        for name in PIPELINE_PARTS:
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module) and any(m is transformer for m in part.modules()):
                return name
        return "transformer" if number == 0 else f"transformer_{number + 1}"

    def _collect(self, transformer: Any, name: str) -> None:
        places = list(self.family.places(transformer))
        num_layers = max((place.index for place in places), default=0) + 1
        self.forwards.attentions[transformer] = [place.attention for place in places]
        for place in places:
            processor, full_name = place.attention.processor, f"{name}.{place.path}"
            if place.way == "dispatcher" and not hasattr(processor, "_attention_backend"):
                raise ValueError(
                    f"`model` must reach attention through the dispatcher of diffusers, got a "
                    f"{type(processor).__name__} without `_attention_backend` at {full_name}"
                )
            before = getattr(processor, "_attention_backend", None)
            record = self.patch.session.record(full_name, place.index)
            self.forwards.layers[place.attention] = Layer(record, place.index, num_layers, before, place.way)

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
        for name in DISPATCH_TABLES:
            getattr(tables, name).pop(self.backend, None)

    def _install_model(self, transformer: nn.Module) -> None:
        forwards, model = self.forwards, CompiledModel(self.forwards, transformer)
        self.patch.set_attribute(transformer, NUMBER, opaque.enrol(model))
        self.compiled.append(model)
        told = forwards.clock.context_of(transformer)
        if told is not None:
            self.patch.set_attribute(transformer, "cache_context", told)
        self._hook(transformer, forwards.enter_forward, forwards.leave_forward)

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
        self.patch.set_attribute(attention, NUMBER, opaque.enrol(layer))
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
        processor = attention.processor
        if layer.way == "function":
            kind = type(processor)
            # Layers may share one processor.
            if not is_scoped(processor):
                scoped = self.scoped.setdefault(kind, scoped_class(kind, self.attention.answer_for))
                processor.__class__ = scoped
                self.patch.on_remove(setattr, processor, "__class__", kind)
            return
        stand_in = self.family.stand_in(processor, self.backend, self.patch.session)
        if stand_in is None:
            self.patch.set_attribute(processor, "_attention_backend", self.backend)
            return
        attention.processor = stand_in

        def restore() -> None:
            # A processor that was set since is not ours to take away.
            if attention.processor is stand_in:
                attention.processor = processor

        self.patch.on_remove(restore)

    def why_lost(self, attention: Any) -> str | None:
        """How what `_take_over` did was changed since, or None."""
        processor = attention.processor
        if self.forwards.layers[attention].way == "function":
            return None if is_scoped(processor) else f"processor changed after the patch to {type(processor).__name__}"
        now = getattr(processor, "_attention_backend", None)
        name = getattr(now, "value", now)
        return None if now is self.backend else f"attention backend changed after the patch to {name}"
