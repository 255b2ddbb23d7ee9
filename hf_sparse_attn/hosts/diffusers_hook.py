"""What a patch puts into the transformers of diffusers: a backend of the dispatcher, and hooks that tell it where."""

from __future__ import annotations

import inspect
import itertools
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any, cast
from weakref import ref

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import cast_inputs
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.diffusers_clock import NO_SCHEDULE, Clock, run_length
from hf_sparse_attn.hosts.diffusers_compile import CompiledLayer, CompiledModel
from hf_sparse_attn.hosts.diffusers_model import (
    DISPATCH_TABLES,
    PIPELINE_PARTS,
    Asked,
    Call,
    Layer,
    Place,
    Tokens,
    dispatcher,
    forward_parameters,
    rotary_table,
)
from hf_sparse_attn.hosts.padding import Trim, key_padding, trim
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch

log = logging.getLogger(__name__)

_NUMBERS = itertools.count()
_TICKETS = itertools.count()
_MOST_TICKETS = 256
# Attribute of a patched module: its number as a tensor, which is how a compiled graph knows it.
_NUMBER = "_hsa_number"
_NAME = "_hsa_name"


class DiffusersHooks:
    """What one patch puts into its transformers. The dispatcher is told neither module nor grid; hooks note both.

    A family says where self-attention is (`places`) and what its tokens are (`tokens`). With the method "dense" the
    model runs as it did, to the bit. With any other, tokens that a mask hides from all queries are cut away instead of
    masked, in dense calls too: exact for the others, and 0 at the hidden places, which nothing reads.
    """

    def __init__(self, patch: Patch) -> None:
        self.patch = patch
        self.session = patch.session
        self.layers: dict[nn.Module, Layer] = {}
        self.attentions: dict[nn.Module, list[nn.Module]] = {}
        # Looked up before, because dynamo cannot follow how.
        self.names: dict[type[nn.Module], list[str]] = {}
        self.clock = Clock()
        self.call: Call | None = None
        self.active: tuple[Layer, Call | None] | None = None
        # Besides, the sizes of the layer's first call: differential attention makes two of one size.
        self.before: tuple[tuple[Layer, Call | None], tuple[int, int]] | None = None
        # What the layer at work was given, where the method reads it.
        self.inputs: LayerInputs | None = None
        # What compiled graphs know of both: tensors, for a number is a reason to compile anew.
        self.ticket = opaque.ticket(-1)
        self.traced: Any = None
        self.traced_before: tuple[Any, tuple[Any, Any]] | None = None
        self.tickets: OrderedDict[int, Call] = OrderedDict()
        # Backward may recompute a layer long after its forward, or after another one: its rotary tensor, which
        # checkpointing hands over unchanged and every forward makes anew, says which forward it was.
        from torch.utils.weak import WeakTensorKeyDictionary

        self.by_tensor = WeakTensorKeyDictionary
        self.calls = WeakTensorKeyDictionary()
        self.warned: set[str] = set()
        self.compiled: list[CompiledModel | CompiledLayer] = []
        policy = patch.session.policy
        self.needs_schedule = policy.dense_steps is not None and policy.dense_steps not in (0, (0, 0))

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusersHooks:
        # A copied model takes the hooks along; they know by the module that it is a copy.
        return self

    def by_name(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of a forward by name."""
        return {**dict(zip(self.names[type(module)], args, strict=False)), **kwargs}

    def places(self, transformer: Any) -> Iterable[Place]:
        """The self-attention modules of a transformer, in the order they run."""
        raise NotImplementedError

    def tokens(self, transformer: Any, inputs: Mapping[str, Any]) -> Tokens:
        """What the tokens of a forward are, from its arguments by name."""
        raise NotImplementedError

    def layer_inputs(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> LayerInputs | None:
        """What a method that reads more than q, k and v is handed, from the arguments of an attention layer."""
        return None

    def valid(self, mask: Tensor, batch: int, tokens: int) -> Tensor | None:
        """Valid keys of each row, bool [batch, tokens], or None where the mask says more than that."""
        return key_padding(mask, batch, tokens)

    def dense_mask(self, mask: Tensor | None, tokens: int) -> Tensor | None:
        """The mask that the model's own attention is given."""
        return mask

    def install(self) -> None:
        """Adds backend, hooks and records; every step is undone by the patch."""
        self.dispatch, tables, backend_type = dispatcher()
        for number, transformer in enumerate(self.patch.modules):
            self._collect(transformer, self._name(transformer, number))
        for module in (*self.attentions, *self.layers):
            self.names[type(module)] = forward_parameters(type(module))
        self.member = self._register(tables, backend_type)
        for transformer, attentions in self.attentions.items():
            model = CompiledModel(self, transformer)
            self.patch.set_attribute(transformer, _NUMBER, opaque.enrol(model))
            self.compiled.append(model)
            told = self.clock.context_of(transformer)
            if told is not None:
                self.patch.set_attribute(transformer, "cache_context", told)
            self.hold(transformer.register_forward_pre_hook(self.enter_forward, with_kwargs=True))
            self.hold(transformer.register_forward_hook(self.leave_forward, always_call=True))
            for attention in attentions:
                layer = CompiledLayer(self, self.layers[attention])
                self.patch.set_attribute(attention, _NUMBER, opaque.enrol(layer))
                self.patch.set_attribute(attention, _NAME, layer.layer.record.name)
                self.compiled.append(layer)
                self.take_over(attention)
                self.hold(attention.register_forward_pre_hook(self.enter_layer, with_kwargs=True))
                self.hold(attention.register_forward_hook(self.leave_layer))

    def take_over(self, attention: Any) -> None:
        """Leads the attention of a module here."""
        self.patch.set_attribute(attention.processor, "_attention_backend", self.member)

    def why_lost(self, attention: Any) -> str | None:
        """How what `take_over` did was changed since, or None."""
        now = getattr(attention.processor, "_attention_backend", None)
        name = getattr(now, "value", now)
        return None if now is self.member else f"attention backend changed after the patch to {name}"

    @property
    def pipeline(self) -> Any:
        """The pipeline that was patched, which alone knows how many steps a run has; None for a bare transformer."""
        return None if isinstance(self.patch.model, nn.Module) else self.patch.model

    def hold(self, handle: Any) -> None:
        """Removes a hook with the patch."""
        self.patch.on_remove(handle.remove)

    def _name(self, transformer: nn.Module, number: int) -> str:
        """Its name in the pipeline; a bare transformer is called like the pipeline's first, so that reports agree."""
        pipeline = self.pipeline
        for name in PIPELINE_PARTS:
            part = getattr(pipeline, name, None)
            if isinstance(part, nn.Module) and any(m is transformer for m in part.modules()):
                return name
        return "transformer" if number == 0 else f"transformer_{number + 1}"

    def _collect(self, transformer: Any, name: str) -> None:
        places = list(self.places(transformer))
        num_layers = max((place.index for place in places), default=0) + 1
        self.attentions[transformer] = []
        for place in places:
            attention, full_name = place.attention, f"{name}.{place.path}"
            self.check_place(attention, full_name)
            before = getattr(attention.processor, "_attention_backend", None)
            record = self.session.record(full_name, place.index)
            self.layers[attention] = Layer(record, place.index, num_layers, before)
            self.attentions[transformer].append(attention)

    def check_place(self, attention: Any, name: str) -> None:
        """Raises ValueError where a module cannot be taken over."""
        if not hasattr(attention.processor, "_attention_backend"):
            raise ValueError(
                f"`model` must reach attention through the dispatcher of diffusers, got a "
                f"{type(attention.processor).__name__} without `_attention_backend` at {name}"
            )

    def _register(self, tables: Any, backend_type: Any) -> Any:
        """A backend that the Enum does not list: isinstance and table look-ups are all that is asked of it."""
        member = str.__new__(backend_type, value := f"hf_sparse_attn_{next(_NUMBERS)}")
        member._name_ = member._value_ = value
        # A deep copy (EMA weights) may outlive the patch: it gets back the backend from before.
        first = self.first_backend = next((layer.backend for layer in self.layers.values()), None)
        member.__deepcopy__ = lambda memo: first
        # The tables live as long as the process and must not keep a model alive that is dropped while patched; the
        # small entry then stays, for a finalizer could change the tables while dynamo or a dispatch reads them.
        hooks, names = ref(self), set(inspect.signature(DiffusersHooks.attend).parameters)

        def attend(**given: Any) -> Tensor:
            return cast(DiffusersHooks, hooks()).attend(**given)

        for name, entry in zip(DISPATCH_TABLES, (attend, [], names), strict=True):
            getattr(tables, name)[member] = entry
            self.patch.on_remove(getattr(tables, name).pop, member, None)
        return member

    def enter_forward(self, transformer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes tokens, step and branch before a transformer runs, and looks whether it still comes here."""
        inputs = self.by_name(transformer, args, kwargs)
        time = inputs.get("timestep")
        if torch.compiler.is_compiling():
            given, tokens = [time] if isinstance(time, Tensor) else [], self.tokens(transformer, inputs)
            self.ticket = opaque.begin(getattr(transformer, _NUMBER), given, tokens.sizes())
            return
        self.call = self.active = self.before = self.inputs = None
        if transformer not in self.attentions:
            self._warn("a deep copy of a patched model runs dense: make the copy first and patch it")
            return
        self.ticket = opaque.ticket(self.begin(transformer, time, self.tokens(transformer, inputs)))

    def begin(self, transformer: Any, time: Any, tokens: Tokens) -> int:
        """Notes a forward, and the number under which compiled layers find it."""
        step = self.clock.step(time)
        num_steps = self.clock.announced[1] or run_length(self.pipeline)
        step = step if num_steps is None else min(step, num_steps - 1)
        for attention in self.attentions[transformer]:
            reason = self.why_lost(attention)
            if reason is not None:
                self._warn(f"{reason}: set the backend first, then call patch()")
                self.session.give_up(self.layers[attention].record, reason)
        self.call = Call(tokens, step, num_steps, self.clock.branch, self.by_tensor())
        number = next(_TICKETS)
        self.tickets[number] = self.call
        # A backward asks for the forwards of the steps whose gradients it adds up, and not for older ones.
        while len(self.tickets) > _MOST_TICKETS:
            self.tickets.popitem(last=False)
        return number

    def leave_forward(self, *_: object) -> None:
        """Ends what `enter_forward` began; runs after an exception too."""
        if torch.compiler.is_compiling():
            return
        self.call = self.active = self.before = self.inputs = None

    def enter_layer(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Notes which layer asks for attention next; in a recomputation also which forward it belongs to."""
        if self.session.reads:
            self.inputs = self.layer_inputs(attention, args, kwargs)
        if torch.compiler.is_compiling():
            self.traced = attention
            return
        layer, call, rotary = self.layers.get(attention), self.call, rotary_table(args, kwargs)
        if rotary is not None and call is None:
            call = self.calls.get(rotary)
        elif rotary is not None:
            self.calls[rotary] = call
        self.active = None if layer is None else (layer, call)

    def leave_layer(self, *_: object) -> None:
        """Ends what `enter_layer` began where a step cache gave the output and attention was never asked."""
        self.active = self.traced = self.before = self.traced_before = self.inputs = None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        _parallel_config: Any = None,
    ) -> Tensor:
        """What the dispatcher calls instead of a backend; the names of the arguments say which it passes."""
        has = {
            "dropout": dropout_p != 0.0,
            "causal order": is_causal,
            "context parallel plan": _parallel_config is not None,
            "mask that is no tensor": attn_mask is not None and not isinstance(attn_mask, Tensor),
        }
        odd = tuple(name for name, there in has.items() if there)
        sizes = query.shape[1], key.shape[1]
        if torch.compiler.is_compiling():
            attention, self.traced = self.traced, None
            if attention is not None:
                self.traced_before = attention, sizes
            elif self.traced_before is not None and self.traced_before[1] == sizes:
                attention = self.traced_before[0]
            if attention is None or odd:
                if attention is not None:
                    reason = f"the call has a {' and a '.join(odd)}, which is not supported"
                    opaque.note(self.session.number, getattr(attention, _NAME), reason)
                return self.dispatch(
                    query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa=enable_gqa,
                    parallel_config=_parallel_config, backend=self.first_backend,
                )  # fmt: skip
            q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            factor = query.shape[3] ** -0.5 if scale is None else scale
            extra = {"ticket": self.ticket, "mask": attn_mask, "hidden": getattr(self.inputs, "hidden", None)}
            learns = int(torch.is_grad_enabled())
            return opaque.attend(getattr(attention, _NUMBER), q, k, v, extra, [learns], [factor])
        # Taken, not read: another attention inside the layer (an adapter's) must not pass for its self-attention.
        active, self.active = self.active, None
        if active is not None:
            self.before = active, sizes
        elif self.before is not None and self.before[1] == sizes:
            active = self.before[0]
        before = self.first_backend if active is None else active[0].backend
        last = {"enable_gqa": enable_gqa, "parallel_config": _parallel_config}

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            out = self.dispatch(q, k, v, mask, dropout_p, is_causal, scale, backend=before, **last)
            return out.transpose(1, 2)

        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        inputs = None if active is None else self.inputs
        return self.run(active, Asked(q, k, v, attn_mask, scale, odd, dense, inputs)).transpose(1, 2)

    def run(self, active: tuple[Layer, Call | None] | None, asked: Asked) -> Tensor:
        """Attention of one layer, sparse or dense, [batch, heads, tokens, dim]; dense calls are counted."""
        if active is not None and not self.session.as_before(active[0].record):
            found = self._sparse(*active, asked)
            if found is not None:
                return found
        mask = self.dense_mask(asked.mask, asked.k.shape[2])
        return asked.dense(asked.q, asked.k, asked.v, mask)

    def _sparse(self, layer: Layer, call: Call | None, asked: Asked) -> Tensor | None:
        """Attention of the valid tokens, or None where the model must run its own on all, with the reason counted."""
        q, k, v = cast_inputs(asked.q, asked.k, asked.v)
        layout = self._layout(call, asked)
        cut = None if call is None or isinstance(layout, Decline) else self._trim(call, asked, layout)
        for found in (layout, cut):
            if isinstance(found, Decline):
                self.session.give_up(layer.record, found.reason)
                return None
        assert call is not None and isinstance(layout, TokenLayout) and not isinstance(cut, Decline)
        context = Context(
            layout,
            layer=layer.index,
            num_layers=layer.num_layers,
            step=call.step,
            num_steps=call.step + 1 if call.num_steps is None else call.num_steps,
            num_heads=q.shape[1],
            num_kv_heads=k.shape[1],
            head_dim=q.shape[3],
            scale=asked.scale,
            branch=call.branch,
            inputs=asked.inputs if cut is None else cut.front_inputs(asked.inputs),
        )
        if cut is None:
            done = self.session.sparse(layer.record, q, k, v, context, dense=lambda: asked.dense(q, k, v, asked.mask))
            return None if done is None else _dispatcher_strides(done[0])
        q, k, v = cut.front(q), cut.front(k), cut.front(v)

        def dense() -> Tensor:
            return cut.dense(q, k, v, lambda q, k, v: asked.dense(q, k, v, None))

        done = self.session.sparse(layer.record, q, k, v, context, cut.spans, dense)
        out = dense() if done is None else done[0]
        return _dispatcher_strides(cut.back(out))

    def _layout(self, call: Call | None, asked: Asked) -> TokenLayout | Decline:
        """The tokens of a call, or what about it sparse attention cannot honour."""
        queries, keys = asked.q.shape[2], asked.k.shape[2]
        if asked.odd:
            return Decline(f"the call has a {' and a '.join(asked.odd)}, which is not supported")
        if call is None:
            return Decline("called outside of the transformer's forward: grid and step are unknown")
        layout = call.tokens.layout(queries) if queries == keys else None
        if layout is None:
            return Decline(f"{queries} queries and {keys} keys do not fit the grid {call.tokens}")
        return Decline(NO_SCHEDULE) if self.needs_schedule and call.num_steps is None else layout

    def _trim(self, call: Call, asked: Asked, layout: TokenLayout) -> Trim | Decline | None:
        """How the call is cut to its valid tokens, None where it has no mask."""
        if asked.mask is None:
            return None
        found: Trim | Decline | None = call.trims.get(asked.mask)
        if found is None:
            valid = self.valid(asked.mask, asked.q.shape[0], layout.kv_len)
            found = Decline("the call has a mask that differs from query to query") if valid is None else None
            found = found or trim(cast(Tensor, valid), layout)
            call.trims[asked.mask] = found
        return found

    def _warn(self, text: str) -> None:
        if text not in self.warned:
            self.warned.add(text)
            log.warning("%s", text)


def _dispatcher_strides(out: Tensor) -> Tensor:
    """`out` [batch, heads, tokens, dim] laid out as the dispatcher's dense attention leaves it, so that graphs fit."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)
