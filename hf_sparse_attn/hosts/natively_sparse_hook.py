"""The attention function of models that select their own keys: over their lists, or as transformers runs them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_sparse_attn import recomputation
from hf_sparse_attn.autocast import made_on_cpu
from hf_sparse_attn.decision import Decision
from hf_sparse_attn.hosts import compiled_layer as opaque
from hf_sparse_attn.hosts.natively_sparse_kind import Attended, Kind, OwnCall, SelectingLayer, awake, layer_of
from hf_sparse_attn.hosts.natively_sparse_mask import SelectingMask
from hf_sparse_attn.hosts.transformers_hook import Output, dense_function, describe_mask
from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import Done, LayerRecord, Work


def register(name: str, original: str, kind: Kind) -> None:
    """Makes `name` an attention implementation of transformers.

    Args:
        name: what stands in the config.
        original: the implementation it stands for.
        kind: of the models.
    """
    AttentionInterface.register(name, partial(attend, original, kind))
    AttentionMaskInterface.register(name, partial(_describe, original))


def _describe(original: str, **wanted: Any) -> Any:
    mask = describe_mask(original, SelectingMask, **wanted)
    # A graph cannot hand an object over, and runs the model's own way.
    if torch.compiler.is_compiling() and isinstance(mask, MaskSpec):
        return mask.dense(original, mask.device)
    return mask


def attend(
    original: str, kind: Kind, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any,
    **kwargs: Any,
) -> Output:  # fmt: skip
    """What transformers calls as the attention of a module; see `register`."""
    call = OwnCall(query, key, value, attention_mask, kwargs)
    state = layer_of(module)
    if state is None:
        # Put in since the patch: it has no seams, and nobody counts it.
        return _run_own(original, kind, module, call, active=False)
    session, compiling = state.session, torch.compiler.is_compiling()
    if not compiling:
        recomputation.note(session)
    active = awake(module)
    if not active:
        if compiling and not session.paused:
            _tell_graph(state)
        return _run_own(state.dense, kind, module, call, active and state.own_sparsity is None)
    session.check_program()
    found = _decide(state, call)
    if found.reason is None:
        with made_on_cpu():
            done = kind.attend(state, module, *call)
        if isinstance(done, Attended):
            _count(state.record, call, done, session.policy.min_queries)
            return done.out, None
        found = Decision(done, fallback=True)
    session.stays_dense(state.record, found, _work(call, session.policy.min_queries))
    narrow = None if state.own_sparsity is None else kind.narrow(module, call)
    if narrow is not None:
        return narrow, None
    return _run_own(state.dense, kind, module, call, active and state.own_sparsity is None)


def _run_own(original: str, kind: Kind, module: nn.Module, call: OwnCall, active: bool) -> Output:
    """What transformers gives for a call, to the bit."""
    mask = call.mask
    if isinstance(mask, MaskSpec):
        mask = mask.dense(original, call.q.device)
    q, k, v, mask, kwargs = kind.own(module, call._replace(mask=mask), active)
    return dense_function(original, module)(module, q, k, v, mask, **kwargs)


def _tell_graph(state: SelectingLayer) -> None:
    """Counts, once for a graph, that a layer runs the model's own way there."""
    reason = "the model's own selection is not read under torch.compile"
    if state.session.strict:
        state.session.give_up(state.record, reason)
    opaque.note(state.session.number, state.record.name, reason)


def _decide(state: SelectingLayer, call: OwnCall) -> Decision:
    """Whether a call runs as transformers runs it, whatever its selection."""
    if state.own_sparsity is not None:
        return Decision(state.own_sparsity)
    policy, index, keys = state.session.policy, state.record.index, call.k.shape[2]
    if _asked_dense(policy, index):
        return Decision("dense_layers")
    if policy.min_tokens != "auto" and keys < int(policy.min_tokens):
        return Decision(f"fewer than {policy.min_tokens} keys (min_tokens={policy.min_tokens})")
    dropout, scaling = call.kwargs.get("dropout"), call.kwargs.get("scaling")
    if dropout:
        return Decision(f"dropout of {dropout} on the attention weights", fallback=True)
    if call.kwargs.get("output_attentions"):
        return Decision("output_attentions=True", fallback=True)
    if not isinstance(scaling, (int, float)):
        return Decision(f"scaling given as a {type(scaling).__name__}", fallback=True)
    return Decision()


def _asked_dense(policy: Policy, index: int) -> bool:
    layers = policy.dense_layers
    return layers is not None and (index < layers if isinstance(layers, int) else index in layers)


def _work(call: OwnCall, min_queries: int) -> Work:
    keys = call.mask.kv_end if isinstance(call.mask, MaskSpec) else call.k.shape[2]
    return Work.of(call.q, keys, True, min_queries, call.kwargs.get("sliding_window"))


def _count(record: LayerRecord, call: OwnCall, done: Attended, min_queries: int) -> None:
    """Counts a call by its lists; one that shows no key at all weighs nothing."""
    work = Work(done.visible, call.q.shape[2] < min_queries)
    record.count(record.backends, done.backend)
    density = done.listed / max(done.visible, 1)
    record.count_sparse([Done(done.out, done.out, density, 0.0, work)])
