"""Patched layers of transformers under torch.compile: what is decided while tracing, and what when the graph runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.transformers_hook import LayerState, Output, attend_sparse, run_dense
from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.hosts.transformers_rules import MASK_FUNCTIONS, LayerCall, decide
from hf_sparse_attn.record import LayerRecord


class CompiledLayer:
    """Stands for a patched attention module in compiled graphs; see opaque.Layer.

    What is known to be dense while tracing is the model's own attention in the graph: decoding and the method "dense",
    which are not counted then, and masks that a graph cannot hand over, counted once per graph. Everything else is
    one operator, which decides and counts when it runs. Gradients run the sparse attention twice, for a graph keeps
    no pattern for its backward.
    """

    def __init__(self, state: LayerState, module: nn.Module, dense: Callable[..., Output]) -> None:
        self.state = state
        self.module = weakref.ref(module)
        self.dense = dense
        self.number = opaque.enrol(self)
        # Attention functions read parameters from the module (sinks); an operator is given what it differentiates.
        self.parameters = tuple(name for name, p in module._parameters.items() if p is not None)

    def traced(self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]) -> Output:
        """What stands in the graph for one call."""
        session, call = self.state.session, LayerCall(self.state, module, q, k, v, mask, kwargs)
        found, causal = decide(call, traced=True), call.causal
        reason = "" if found.reason is None else str(found.reason)
        if reason and not (session.strict and found.fallback):
            if found.counted:
                opaque.note(session.number, self.state.record.name, reason)
            ready = mask.dense(self.state.dense, q.device) if isinstance(mask, MaskSpec) else mask
            return self.dense(module, q, k, v, ready, **kwargs)
        extra: dict[str, Tensor | None] = {"sinks": kwargs.get("s_aux")}
        hints = self.state.hints
        grid = () if causal or hints is None or hints.grid is None else hints.grid
        lengths = [0, 0, causal, mask is None, *grid]
        if not reason and mask is not None:
            offset = mask.wanted["q_offset"]
            extra["padding"] = mask.wanted.get("attention_mask")
            extra["offset"] = offset if isinstance(offset, Tensor) else None
            lengths[:2] = [0 if isinstance(offset, Tensor) else offset, mask.wanted.get("kv_offset", 0)]
        for name in self.parameters:
            extra[f"parameter {name}"] = module._parameters[name]
        scale, softcap = kwargs.get("scaling"), kwargs.get("softcap")
        options = [q.shape[3] ** -0.5 if scale is None else scale, softcap or 0.0]
        return opaque.attend(self.number, q, k, v, extra, lengths, options, reason), None

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Mapping[str, Tensor], lengths: list[int],
        options: list[float], reason: str, training: bool, again: bool,
    ) -> Tensor:  # fmt: skip
        """See opaque.Layer."""
        module = self.module()
        if module is None:
            raise RuntimeError("the attention module of this compiled graph is gone")
        state = self.state
        if again:
            state = replace(state, record=LayerRecord(state.record.name, state.record.index))
        if reason:
            # Only where the patch is strict: this raises.
            state.session.give_up(state.record, reason)
        if state.hints is not None:
            state = replace(state, hints=replace(state.hints, grid=tuple(lengths[4:]) or None))
        kwargs: dict[str, Any] = {"scaling": options[0], "dropout": 0.0, "is_causal": bool(lengths[2])}
        if options[1]:
            kwargs["softcap"] = options[1]
        if "sinks" in extra:
            kwargs["s_aux"] = extra["sinks"]
        mask = None if lengths[3] else _mask_of(q, k, extra, lengths, state.dense)
        with state.session.steadily(training):
            done = attend_sparse(state, module, q, k, v, mask, kwargs)
        if done is None:
            with _parameters(module, {n: extra[f"parameter {n}"] for n in self.parameters}):
                done = run_dense(state.dense, module, q, k, v, mask, kwargs)
        return done[0]


@contextmanager
def _parameters(module: nn.Module, given: dict[str, Tensor]) -> Iterator[None]:
    """Lets a module read other tensors as its own parameters."""
    before = {name: module._parameters[name] for name in given}
    try:
        module._parameters.update(given)  # type: ignore[arg-type]
        yield
    finally:
        module._parameters.update(before)


def _mask_of(q: Tensor, k: Tensor, extra: Mapping[str, Tensor], lengths: list[int], original: str) -> MaskSpec:
    """The mask that was described while tracing, with the values of this run."""
    wanted = {
        "batch_size": q.shape[0],
        "q_length": q.shape[2],
        "kv_length": k.shape[2],
        "q_offset": extra.get("offset", lengths[0]),
        "kv_offset": lengths[1],
        "mask_function": MASK_FUNCTIONS[bool(lengths[2])],
        "attention_mask": extra.get("padding"),
        "device": q.device,
        "dtype": q.dtype,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
    }
    return MaskSpec(original, wanted)
