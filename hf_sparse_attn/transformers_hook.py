"""The attention function and the mask function that transformers calls in a patched model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.patching import LayerRecord, Session, Span
from hf_sparse_attn.transformers_mask import MaskSpec, Plan

# Attribute of a patched attention module that holds its LayerState; plain, so that it is not in the state dict.
STATE_ATTRIBUTE = "_hsa_layer"
NATIVE_PREFIX = "hsa:"
# The implementation that was replaced is part of the name: a copied or shared config still tells what to fall back to.
PATCHED_PREFIX = "hsa:patched+"

Output = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class LayerState:
    """What an attention module needs to run sparse.

    Args:
        record: the layer's record.
        session: the session of the patch.
        num_layers: layers of the model.
        dense: name of the implementation that runs where the call stays dense.
    """

    record: LayerRecord
    session: Session
    num_layers: int
    dense: str

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        return self


def is_text_attention(module: nn.Module) -> bool:
    """Whether a module is causal self-attention that goes through the attention interface."""
    config = getattr(module, "config", None)
    return (
        isinstance(config, PreTrainedConfig)
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
        and getattr(config, "is_causal", True) is not False
        and not getattr(module, "is_cross_attention", False)
        and "ALL_ATTENTION_FUNCTIONS" in _names(inspect.unwrap(type(module).forward))
    )


def _names(function: Any) -> tuple[str, ...]:
    return getattr(getattr(function, "__code__", None), "co_names", ())


@lru_cache(maxsize=256)
def _home(kind: Any) -> tuple[dict[str, Any], str]:
    """Globals of the file where the class's forward stands, and the name of its eager attention there."""
    forward = inspect.unwrap(kind.forward)
    # One file may hold several, for text and for images: the one that this forward names.
    named = [n for n in _names(forward) if n.endswith("eager_attention_forward")]
    return forward.__globals__, named[0] if named else "eager_attention_forward"


def default_dense(module: nn.Module) -> str:
    """The implementation transformers would choose by itself: "sdpa" where the model can use it, else "eager"."""
    kind: Any = type(module)
    return _default_of(kind)


@lru_cache(maxsize=256)
def _default_of(kind: Any) -> str:
    home = _home(kind)[0]
    owners = [c for c in home.values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
    own = [c for c in owners if c.__module__ == home.get("__name__")]
    return "sdpa" if all(getattr(c, "_supports_sdpa", False) for c in own) else "eager"


def run_dense(
    name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Output:
    """What the implementation `name` returns for the call, to the bit."""
    kind: Any = type(module)
    home, eager = _home(kind)
    attention = home["ALL_ATTENTION_FUNCTIONS"].get_interface(name, home.get(eager))
    if isinstance(mask, MaskSpec):
        mask = mask.dense(name, q.device)
    with _named(module.config, name) if "flash" in name else _AS_IT_IS:
        done: Output = attention(module, q, k, v, mask, **kwargs)
    return done


_AS_IT_IS = nullcontext()


@contextmanager
def _named(config: Any, name: str) -> Iterator[None]:
    """Lets `config` give `name` as its implementation: the flash functions choose their kernel by it."""
    before, config._attn_implementation_internal = config._attn_implementation_internal, name
    try:
        yield
    finally:
        config._attn_implementation_internal = before


def why_not_sparse(module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: dict[str, Any]) -> str | None:
    """Which feature of the call sparse attention cannot honour, or None."""
    if not isinstance(mask, MaskSpec):
        return "no mask was described to the layer" if mask is None else f"mask given as a {type(mask).__name__}"
    if mask.shape[0] != q.shape[0] or mask.shape[2:] != (q.shape[2], k.shape[2]):
        return f"mask for {list(mask.shape)} where the layer has {[q.shape[0], 1, q.shape[2], k.shape[2]]}"
    if kwargs.get("is_causal") is False:
        return "bidirectional attention (is_causal=False)"
    if kwargs.get("dropout"):
        return f"dropout of {kwargs['dropout']} on the attention weights"
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return "output_attentions=True"
    if not isinstance(kwargs.get("scaling"), (int, float, type(None))):
        return f"scaling given as a {type(kwargs['scaling']).__name__}"
    for name, what in (
        ("softcap", "soft cap on the logits"),
        ("position_bias", "position bias"),
        ("cache", "paged cache"),
    ):
        if kwargs.get(name) is not None:
            return what
    return None


def attend_sparse(
    state: LayerState, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Output | None:
    """Sparse attention of one layer, or None where it must run dense; counted either way.

    Raises:
        ValueError: the call is one rank's share of a sequence under context parallelism.
        DenseFallback: sparse attention has to be given up and the patch is strict.
    """
    session, record = state.session, state.record
    q_len, kv_len = q.shape[2], k.shape[2]
    if session.method.name == "dense":
        record.dense_reasons["method dense"] += 1
        return None
    if mask is None and kwargs.get("is_causal") is True:
        raise ValueError(
            "`attention_mask` must describe the whole sequence, got None with is_causal=True, as accelerate's context "
            "parallelism sends it: a layer then sees one rank's share of the tokens. Use data parallelism or unpatch()"
        )
    if kv_len < q_len:
        session.give_up(record, f"{q_len} queries for {kv_len} keys")
        return None
    ctx = Context(
        TokenLayout.causal(kv_len).continued(kv_len - q_len),
        layer=record.index,
        num_layers=state.num_layers,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        scale=kwargs.get("scaling"),
    )
    # First, because it needs no look at the mask: decoding and short texts pay nothing for the patch.
    reason = session.policy.why_dense(ctx, q.device)
    if reason is not None:
        record.dense_reasons[reason] += 1
        return None
    reason = why_not_sparse(module, q, k, mask, kwargs)
    if reason is not None:
        session.give_up(record, reason)
        return None
    plan = with_cu_seq_lens(mask.plan(), state.dense, q, kwargs)
    window = kwargs.get("sliding_window")
    if plan.reason is None and window is not None and plan.reach > window:
        plan = replace(plan, reason=f"layer's own sliding window of {window}", own=True)
    if plan.reason is not None and plan.own:
        record.dense_reasons[plan.reason] += 1
        return None
    if plan.reason is not None:
        session.give_up(record, plan.reason)
        return None
    ctx = replace(ctx, layout=TokenLayout.causal(plan.kv_end).continued(plan.kv_end - q_len))
    k, v = k[:, :, : plan.kv_end], v[:, :, : plan.kv_end]
    done = session.sparse(record, q, k, v, ctx, plan.spans)
    if done is None:
        return None
    out, lse = done
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        # A sink is one more logit with value 0: it takes exp(sink) / (exp(lse) + exp(sink)) of the weight.
        kept = torch.sigmoid(lse - sinks.to(lse.dtype).view(1, -1, 1))
        out = (out * kept[..., None]).to(out.dtype)
    return out.transpose(1, 2).contiguous(), None


def with_cu_seq_lens(plan: Plan, dense: str, q: Tensor, kwargs: dict[str, Any]) -> Plan:
    """The plan where boundaries of packed sequences come beside the mask, as for flash attention."""
    edges = kwargs.get("cu_seq_lens_k")
    if edges is None or plan.packed or plan.reason is not None or len(edges) <= 2:
        return plan
    if "flash" not in dense:
        return replace(plan, reason=f"cu_seq_lens_k tells of {len(edges) - 1} sequences, the mask of one")
    edges, own = edges.tolist(), kwargs.get("cu_seq_lens_q")
    whole = q.shape[0] == 1 and edges[0] == 0 and edges[-1] == q.shape[2] == plan.kv_end
    if not whole or own is None or own.tolist() != edges:
        return replace(plan, reason="cu_seq_lens of a batch or of cached keys")
    pairs = [(a, b) for a, b in pairwise(edges) if b > a]
    return replace(plan, spans=tuple(Span((0,), pair, pair) for pair in pairs), packed=True)


def register(name: str, original: str | None, find: Callable[[nn.Module], LayerState | None]) -> None:
    """Makes `name` an attention implementation of transformers.

    Args:
        name: what stands in the config.
        original: the implementation it stands for, which modules without a state run; None means the model's default.
        find: the state of a module, or None.
    """

    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> Output:
        state = find(module)
        if state is None:
            dense = original or default_dense(module)
        else:
            done = attend_sparse(state, module, query, key, value, attention_mask, kwargs)
            if done is not None:
                return done
            dense = state.dense
        return run_dense(dense, module, query, key, value, attention_mask, kwargs)

    def mask(**wanted: Any) -> Any:
        ready = wanted.get("attention_mask")
        # generate() makes the masks of a static cache ahead and passes them through here again.
        # The eager form of a mask is one that every implementation takes.
        return ready if isinstance(ready, MaskSpec) else MaskSpec(original or "eager", wanted)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
