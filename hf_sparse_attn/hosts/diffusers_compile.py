"""Patched transformers of diffusers in compiled graphs: what their operators do when the graph runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from weakref import ref

from torch import Tensor, nn

from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.hosts.diffusers_model import Asked, Layer, Tokens
from hf_sparse_attn.hosts.diffusers_run import Attention
from hf_sparse_attn.hosts.diffusers_state import Forwards
from hf_sparse_attn.method import Method
from hf_sparse_attn.record import LayerRecord


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
        reason: str, training: bool, again: bool,
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
        with attention.session.steadily(training):
            return attention.run(layer, call, asked).transpose(1, 2)
