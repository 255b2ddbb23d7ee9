"""The attention function and the mask function that transformers calls in a patched model."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_sparse_attn import native
from hf_sparse_attn.autocast import cast_inputs
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.hosts.transformers_compile import CompiledLayer
from hf_sparse_attn.hosts.transformers_mask import MaskSpec, Plan, whole
from hf_sparse_attn.patching import LayerRecord, Session
from hf_sparse_attn.selection import with_sinks
from hf_sparse_attn.span import Span

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_encoder import Hints, Source
    from hf_sparse_attn.hosts.transformers_inputs import LayerWatch
    from hf_sparse_attn.hosts.vision_layout import Tokens

# Attribute of a patched attention module that holds its LayerState; plain, so that it is not in the state dict.
STATE_ATTRIBUTE = "_hsa_layer"
# Keyword arguments that a family's hooks add to a call: what the tokens are (vision_layout.Tokens), and which runs of
# them see only themselves (vision_segments.Segments).
TOKENS, SEGMENTS = "hsa_tokens", "hsa_segments"
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
        compiled: what stands for the module in compiled graphs, or None, which breaks them.
        hints: what is known of the tokens of a bidirectional layer, or None where they are text.
        source: tells whether a call's keys are of another sequence; None where they never are.
        watch: keeps what else the method reads of the layer; None where it reads nothing.
    """

    record: LayerRecord
    session: Session
    num_layers: int
    dense: str
    compiled: CompiledLayer | None = None
    hints: Hints | None = None
    source: Source | None = None
    watch: LayerWatch | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> LayerState:
        return self


def make_state(
    module: nn.Module, record: LayerRecord, session: Session, num_layers: int, dense: str,
    hints: Hints | None = None, source: Source | None = None, watch: LayerWatch | None = None,
) -> LayerState:  # fmt: skip
    """The state of a patched module, compiled graphs included; see LayerState."""
    kind: Any = type(module)
    home, eager = _home(kind)
    function = home["ALL_ATTENTION_FUNCTIONS"].get_interface(dense, home.get(eager))
    state = LayerState(record, session, num_layers, dense, hints=hints, source=source, watch=watch)
    return replace(state, compiled=CompiledLayer(state, module, function))


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


def is_segment_attention(module: nn.Module) -> bool:
    """Whether a module is attention of a vision tower that is told by `cu_seqlens` where its segments end."""
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return "ALL_ATTENTION_FUNCTIONS" in getattr(code, "co_names", ()) and "cu_seqlens" in getattr(
        code, "co_varnames", ()
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


def is_causal_call(module: nn.Module, dense: str, kwargs: dict[str, Any]) -> bool:
    """Whether the implementation `dense` would take a call without a mask for causal."""
    given = kwargs.get("is_causal")
    # The eager functions of transformers know masks alone; modules of old say nothing, which the others take for yes.
    return bool(getattr(module, "is_causal", dense != "eager") if given is None else given)


def why_not_sparse(
    module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: dict[str, Any], is_causal: bool = True
) -> str | None:
    """Which feature of the call sparse attention cannot honour, or None."""
    if isinstance(mask, MaskSpec):
        if mask.shape[0] != q.shape[0] or mask.shape[2:] != (q.shape[2], k.shape[2]):
            return f"mask for {list(mask.shape)} where the layer has {[q.shape[0], 1, q.shape[2], k.shape[2]]}"
    elif mask is not None:
        return f"mask given as a {type(mask).__name__}"
    elif is_causal:
        # Without a mask a causal layer may stand for one of several ranks, or hold a static cache.
        return "no mask was described to the layer"
    elif k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        return f"{q.shape[0]} x {q.shape[2]} queries for {k.shape[0]} x {k.shape[2]} keys"
    if kwargs.get("dropout"):
        return f"dropout of {kwargs['dropout']} on the attention weights"
    if kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False):
        return "output_attentions=True"
    if not isinstance(kwargs.get("scaling"), (int, float, type(None))):
        return f"scaling given as a {type(kwargs['scaling']).__name__}"
    for name, what in (
        ("position_bias", "position bias"),
        ("cache", "paged cache"),
    ):
        if kwargs.get(name) is not None:
            return what
    return None


def attend_sparse(
    state: LayerState,
    module: nn.Module,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Any,
    kwargs: dict[str, Any],
    tokens: Tokens | None = None,
) -> Output | None:
    """Sparse attention of one layer, or None where it must run dense; counted either way.

    Raises:
        ValueError: the call is one rank's share of a sequence under context parallelism.
        DenseFallback: sparse attention has to be given up and the patch is strict.
    """
    session, record = state.session, state.record
    q, k, v = cast_inputs(q, k, v)
    # Let go here whatever becomes of the call: a layer's activations must not wait for its next one.
    kept = None if state.watch is None else state.watch.release()
    q_len, kv_len = q.shape[2], k.shape[2]
    if session.as_before(record):
        return None
    if mask is None and kwargs.get("is_causal") is True and getattr(module, "is_causal", False):
        raise ValueError(
            "`attention_mask` must describe the whole sequence, got None with is_causal=True, as accelerate's context "
            "parallelism sends it: a layer then sees one rank's share of the tokens. Use data parallelism or unpatch()"
        )
    if kv_len < q_len:
        session.give_up(record, f"{q_len} queries for {kv_len} keys")
        return None
    # Decoding and short texts pay nothing for the patch: no look at the mask, and none at what is known of the shape.
    steady = session.steady(q, k, v)
    if record.dense_at_once((q.shape, kv_len, q.dtype), steady):
        return None
    causal = is_causal_call(module, state.dense, kwargs)
    ctx = Context(
        _layout(state, q, kv_len, causal),
        layer=record.index,
        num_layers=state.num_layers,
        num_heads=q.shape[1],
        num_kv_heads=k.shape[1],
        head_dim=q.shape[3],
        scale=kwargs.get("scaling"),
        softcap=kwargs.get("softcap") or 0.0,
    )
    known = session.why_dense(record, q, ctx, steady)
    if known is not None:
        record.count_dense(*known)
        return None
    reason = why_not_sparse(module, q, k, mask, kwargs, causal)
    if reason is not None:
        session.give_up(record, reason)
        return None
    plan = with_cu_seq_lens(_plan(mask, q, causal, state.dense), state.dense, q, kwargs)
    causal = plan.causal if plan.reason is None else causal
    window = kwargs.get("sliding_window")
    # Where the mask cannot be read, more queries than the window is wide are enough to know that it hides some.
    reach = plan.reach if plan.reason is None else q_len
    if window is not None and reach > window and not plan.own:
        plan = replace(plan, reason=f"layer's own sliding window of {window}", own=True)
    if plan.reason is not None and plan.own:
        record.dense_reasons[plan.reason] += 1
        return None
    if plan.reason is not None:
        session.give_up(record, plan.reason)
        return None
    ctx = replace(ctx, layout=_layout(state, q, plan.kv_end, causal))
    if state.watch is not None and kept is not None:
        inputs = state.watch.inputs(kept, q, k)
        if isinstance(inputs, str):
            session.give_up(record, inputs)
            return None
        ctx = replace(ctx, inputs=inputs)
    spans = plan.spans
    if tokens is not None:
        if tokens.unknown is not None and "video grid" in session.method.needs:
            session.give_up(record, f"vision tokens unknown: {tokens.unknown}")
            return None
        spans = tokens.describe(plan.spans, plan.kv_end)
    keys, values = k[:, :, : plan.kv_end], v[:, :, : plan.kv_end]
    done = session.sparse(
        record, q, keys, values, ctx, spans, lambda: run_dense(state.dense, module, q, k, v, mask, kwargs)
    )
    if done is None:
        return None
    out, lse = done
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        out = with_sinks(out, lse, sinks)[0]
    return out.transpose(1, 2).contiguous(), None


def _layout(state: LayerState, q: Tensor, kv_len: int, causal: bool) -> TokenLayout:
    """The tokens of a whole row whose last are the queries."""
    if causal:
        return TokenLayout.causal(kv_len).continued(kv_len - q.shape[2])
    whole = TokenLayout.bidirectional(kv_len) if state.hints is None else state.hints.layout(q.shape[0], kv_len)
    return whole.continued(kv_len - q.shape[2])


def _plan(mask: MaskSpec | None, q: Tensor, causal: bool, dense: str) -> Plan:
    """The sequences of a call, where mask and layer agree on what a token sees (eager functions know masks alone)."""
    if mask is None:
        return Plan(q.shape[2], whole(q.shape[0], q.shape[2], q.shape[2]), causal=False)
    plan = mask.plan()
    if plan.reason is None and plan.causal != causal and dense != "eager":
        said = "bidirectional mask in a causal layer" if causal else "causal mask in a layer with is_causal=False"
        return replace(plan, reason=said)
    return plan


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
        tokens, segments = kwargs.pop(TOKENS, None), kwargs.pop(SEGMENTS, None)
        state = find(module)
        if state is not None and state.source is not None and state.source.other:
            # Cross-attention is never touched, nor counted.
            state = None
        if state is not None and state.compiled is not None and torch.compiler.is_compiling():
            return state.compiled.traced(module, query, key, value, attention_mask, kwargs)
        if state is None:
            dense = original or default_dense(module)
        else:
            done = attend_sparse(state, module, query, key, value, attention_mask, kwargs, tokens)
            if done is not None:
                return done
            dense = state.dense
        if segments is not None:
            one = partial(run_dense, dense, module, mask=attention_mask, kwargs=kwargs)
            return segments.attend(one, dense, query, key, value), None
        return run_dense(dense, module, query, key, value, attention_mask, kwargs)

    def mask(**wanted: Any) -> Any:
        ready = wanted.get("attention_mask")
        # generate() makes the masks of a static cache ahead and passes them through here again.
        # The eager form of a mask is one that every implementation takes.
        return ready if isinstance(ready, MaskSpec) else MaskSpec(original or "eager", wanted)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


# Where this file was the first to import transformers, the names of the methods are still to be registered.
native.install()
