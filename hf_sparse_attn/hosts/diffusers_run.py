"""Attention of one call of a diffusers transformer: the layer's own or not, sparse or dense, eager or in a graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast
from weakref import WeakValueDictionary, ref

import torch
from torch import Tensor, nn

from hf_sparse_attn import recomputation
from hf_sparse_attn.autocast import cast_inputs
from hf_sparse_attn.compiled import in_program
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.diffusers_clock import NO_SCHEDULE
from hf_sparse_attn.hosts.diffusers_model import NAME, NUMBER, Asked, Call, Layer, Tokens
from hf_sparse_attn.hosts.diffusers_state import Forwards, Running, innermost
from hf_sparse_attn.hosts.padding import Trim, trim
from hf_sparse_attn.hosts.sdpa_hook import Answer, watched_by
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.record import LayerRecord, Work
from hf_sparse_attn.transforms import are_transformed, step

_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")


# All that are alive, by the number of their forwards.
ATTENTIONS: WeakValueDictionary[int, Attention] = WeakValueDictionary()


class Attention:
    """What the layers of one patch run instead of their own attention.

    With the method "dense" the model runs as it did, to the bit. With any other, tokens that a mask hides from all
    queries are cut away instead of masked, in dense calls too: exact for the others, and 0 at the hidden places, which
    nothing reads.

    Args:
        forwards: know which layer and forward a call belongs to.
        dispatch: the dispatcher of diffusers.
        backend: what it is to take where it is not known whose call it is.
    """

    def __init__(self, forwards: Forwards, dispatch: Callable[..., Tensor], backend: Any) -> None:
        self.forwards = forwards
        self.session = forwards.session
        self.family = forwards.family
        self.dispatch = dispatch
        self.backend = backend
        ATTENTIONS[forwards.number] = self
        # Shares of a run mean nothing where nobody knows how long it is.
        self.needs_schedule = self.session.policy.by_steps or self.session.method.by_steps

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
        other = self._in_place_of_this()
        if other is not None:
            return other.attend(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config
            )
        has = {
            "dropout": dropout_p != 0.0,
            "causal order": is_causal,
            "context parallel plan": _parallel_config is not None,
            "mask that is no tensor": attn_mask is not None and not isinstance(attn_mask, Tensor),
        }
        odd = tuple(name for name, there in has.items() if there)
        running = self.forwards.layer
        if running is not None and not running.takes(query.shape[1], key.shape[1]):
            running = None
        before = self.backend if running is None or running.layer is None else running.layer.backend

        def own(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
            last = {"enable_gqa": enable_gqa, "parallel_config": _parallel_config, "backend": before}
            return self.dispatch(query, key, value, mask, dropout_p, is_causal, scale, **last)

        if in_program():
            self.session.check_program()
            return own(query, key, value, attn_mask)
        q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
        if not torch.compiler.is_compiling():

            def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return own(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask).transpose(1, 2)

            inputs = None if running is None else running.inputs
            return self.of(running, Asked(q, k, v, attn_mask, scale, odd, dense, inputs)).transpose(1, 2)
        attention, watched = self.forwards.thread.traced.attention, watched_by()
        if running is None or odd or watched:
            if running is not None:
                opaque.note(self.session.number, getattr(attention, NAME), watched or _not_supported(odd))
            return own(query, key, value, attn_mask)
        hidden = None if running.inputs is None else running.inputs.hidden
        extra = {"ticket": self.forwards.thread.traced.ticket, "mask": attn_mask, "hidden": hidden}
        factor, learns = query.shape[3] ** -0.5 if scale is None else scale, int(torch.is_grad_enabled())
        return opaque.attend(getattr(attention, NUMBER), q, k, v, extra, [learns], [factor])

    def _in_place_of_this(self) -> Attention | None:
        """That of another patch of this layer, under which the forward began that runs now; it was removed since."""
        running = None if torch.compiler.is_compiling() else innermost()
        if running is None or running.layer is None or running.owner == self.forwards.number:
            return None
        other = ATTENTIONS.get(running.owner)
        if other is None or not other.session.ended:
            return None
        return other if any(id(module) == running.module for module in self.forwards.layers) else None

    def answer_for(self, attention: Any) -> Answer | None:
        """What the processor of an attention gets where it calls PyTorch's function; see sdpa_hook.scoped_class."""
        if in_program():
            self.session.check_program()
            return None
        running, here = self.forwards.called(attention), innermost()
        if running is None or running.layer is None:
            return None
        watched = watched_by()
        if watched:
            # A function in the place of PyTorch's own may never come here.
            if not self.session.as_before(running.layer.record):
                self.session.give_up(running.layer.record, watched)
            return None

        def answer(func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
            # A model that is called inside of the processor asks for itself.
            if innermost() is not here:
                return func(*args, **kwargs)
            given = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            q, k, v, mask = (given.pop(name, None) for name in _ARGUMENTS[:4])

            def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
                return func(q, k, v, attn_mask=mask, **given)

            if q.ndim != 4 or (running.text and k.shape[2] == running.text):
                return dense(q, k, v, mask)
            has = {"dropout": given.get("dropout_p", 0.0) != 0.0, "causal order": given.get("is_causal", False)}
            odd = tuple(name for name, there in has.items() if there)
            return self.of(running, Asked(q, k, v, mask, given.get("scale"), odd, dense))

        return answer

    def of(self, running: Running | None, asked: Asked) -> Tensor:
        """Attention of the layer at work, or of nobody's."""
        if running is None or running.layer is None:
            return self._dense(asked)
        if running.call is None and recomputation.is_of_unknown(self.session):
            raise RuntimeError(
                "gradient checkpointing runs a layer again, and it cannot be told of which forward: use the form that "
                "is not reentrant (use_reentrant=False), and patch() before the forward"
            )
        recomputation.note(self.session)
        if are_transformed(asked.q, asked.k, asked.v, asked.mask):
            hidden = None if asked.inputs is None else asked.inputs.hidden
            return step(partial(self._again, running, asked), asked.q, asked.k, asked.v, asked.mask, hidden)[0]
        return self.run(running.layer, running.call, asked)

    def _again(
        self, running: Running, asked: Asked, q: Tensor, k: Tensor, v: Tensor, mask: Any, hidden: Tensor | None
    ) -> tuple[Tensor, ...]:
        """A call with other tensors; one with gradients is a backward's, and not counted."""
        layer = cast(Layer, running.layer)
        if torch.is_grad_enabled():
            layer = replace(layer, record=LayerRecord(layer.record.name, layer.index))
        inputs = None if hidden is None else LayerInputs(hidden)
        return (self.run(layer, running.call, replace(asked, q=q, k=k, v=v, mask=mask, inputs=inputs)),)

    def run(self, layer: Layer, call: Call | None, asked: Asked) -> Tensor:
        """Attention of one layer, sparse or dense, [batch, heads, tokens, dim]; dense calls are counted."""
        work = Work.of(asked.q, asked.k.shape[2], False, self.session.policy.min_queries)
        sparse = None if self.session.as_before(layer.record, work) else self._sparse(layer, call, asked, work)
        return self._dense(asked) if sparse is None else sparse

    def _dense(self, asked: Asked) -> Tensor:
        return asked.dense(asked.q, asked.k, asked.v, self.family.dense_mask(asked.mask, asked.k.shape[2]))

    def _sparse(self, layer: Layer, call: Call | None, asked: Asked, work: Work) -> Tensor | None:
        """Attention of the valid tokens, or None where the model must run its own on all, with the reason counted."""
        q, k, v = cast_inputs(asked.q, asked.k, asked.v)
        layout = self._layout(call, asked)
        cut = None if call is None or isinstance(layout, Decline) else self._trim(call, asked, layout)
        for found in (layout, cut):
            if isinstance(found, Decline):
                self.session.give_up(layer.record, found.reason, work)
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
        odd = watched_by() or (_not_supported(asked.odd) if asked.odd else None)
        if odd is not None:
            return Decline(odd)
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
            valid = self.family.valid(asked.mask, asked.q.shape[0], layout.kv_len)
            found = Decline(f"the call has a {valid.reason}") if isinstance(valid, Decline) else trim(valid, layout)
            call.trims[asked.mask] = found
        return found


def _not_supported(odd: tuple[str, ...]) -> str:
    return f"the call has a {' and a '.join(odd)}, which is not supported"


def _dispatcher_strides(out: Tensor) -> Tensor:
    """`out` [batch, heads, tokens, dim] laid out as the dispatcher's dense attention leaves it, so that graphs fit."""
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def trained_weights(method: Method) -> bool:
    """Whether a method has weights of its own that a gradient should reach."""
    modules = (value for value in method.params().values() if isinstance(value, nn.Module))
    return bool(method.reads) and any(p.requires_grad for module in modules for p in module.parameters())


class CompiledModel:
    """Stands for a patched transformer in compiled graphs; see opaque.Model."""

    def __init__(self, forwards: Forwards, transformer: nn.Module) -> None:
        self.forwards = forwards
        self.transformer = ref(transformer)

    def begin(self, given: list[Tensor], sizes: list[int]) -> int:
        """See opaque.Model."""
        return self.forwards.begin(self.transformer(), given[0] if given else None, Tokens.of_sizes(sizes))[0]


class CompiledLayer:
    """Stands for a patched attention in compiled graphs; see opaque.Layer."""

    def __init__(self, attention: Attention, layer: Layer) -> None:
        self.attention = attention
        self.layer = layer

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Mapping[str, Tensor], lengths: list[int], options: list[float],
        reason: str, again: bool,
    ) -> Tensor:  # fmt: skip
        """See opaque.Layer."""
        attention, layer, scale = self.attention, self.layer, options[0]
        # The operator hands gradients to its inputs, and the method's own weights are none.
        if lengths[0] and trained_weights(attention.session.method):
            raise RuntimeError("`gates` must not require gradients in a compiled model: it would give them none")
        if again:
            layer = replace(layer, record=LayerRecord(layer.record.name, layer.index))

        def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
            q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
            return attention.dispatch(q, k, v, mask, 0.0, False, scale, backend=layer.backend).transpose(1, 2)

        call = attention.forwards.find(extra["ticket"])
        hidden = extra.get("hidden")
        inputs = None if hidden is None else LayerInputs(hidden)
        asked = Asked(q, k, v, extra.get("mask"), scale, (), dense, inputs)
        return attention.run(layer, call, asked).transpose(1, 2)
