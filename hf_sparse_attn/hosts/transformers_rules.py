"""The rules by which a call of a transformers layer stays dense: one table, for eager calls and for traced ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor, nn
from transformers import masking_utils

from hf_sparse_attn import decision
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.decision import SPARSE, Decision
from hf_sparse_attn.hosts.transformers_mask import MaskSpec, Plan, whole
from hf_sparse_attn.span import Span

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_hook import LayerState
    from hf_sparse_attn.hosts.vision_layout import Tokens

# The masks that a graph can hand over, by whether the layer is causal.
MASK_FUNCTIONS = {True: masking_utils.causal_mask_function, False: masking_utils.bidirectional_mask_function}


@dataclass(eq=False)
class LayerCall:
    """One call of a patched attention module, as the rules see it.

    Args:
        state: of the module.
        module: the attention module.
        q: [batch, heads, q_len, dim].
        k, v: [batch, kv_heads, kv_len, dim].
        mask: what the model hands over as the mask.
        kwargs: the other arguments of the attention function.
        tokens: what the tokens are, where the family tells.
        kept: what was kept of the layer for a method that reads it, or None.
    """

    state: LayerState
    module: nn.Module
    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    kwargs: dict[str, Any]
    tokens: Tokens | None = None
    kept: dict[str, Tensor] | None = None

    @property
    def causal(self) -> bool:
        """Whether the layer's dense implementation would take a call without a mask for causal."""
        given = self.kwargs.get("is_causal")
        # The eager functions of transformers know masks alone; modules of old say nothing, which others take for yes.
        return bool(getattr(self.module, "is_causal", self.state.dense != "eager") if given is None else given)

    @cached_property
    def by_shape(self) -> Context:
        """Where the call is, as far as the shapes of its tensors tell."""
        return Context(
            self._layout(self.k.shape[2], self.causal),
            layer=self.state.record.index,
            num_layers=self.state.num_layers,
            num_heads=self.q.shape[1],
            num_kv_heads=self.k.shape[1],
            head_dim=self.q.shape[3],
            scale=self.kwargs.get("scaling"),
            softcap=self.kwargs.get("softcap") or 0.0,
        )

    @property
    def ctx(self) -> Context:
        """Where the call is, with the keys that exist and what the method reads."""
        inputs = self.inputs if isinstance(self.inputs, LayerInputs) else None
        return replace(self.by_shape, layout=self._layout(self.plan.kv_end, self.plan.causal), inputs=inputs)

    @property
    def spans(self) -> tuple[Span, ...]:
        """The sequences of the batch."""
        plan = self.plan
        return plan.spans if self.tokens is None else self.tokens.describe(plan.spans, plan.kv_end)

    @cached_property
    def inputs(self) -> LayerInputs | str | None:
        """What else the method reads, or why it cannot be handed over; None where it reads nothing."""
        watch = self.state.watch
        return None if watch is None or self.kept is None else watch.inputs(self.kept, self.q, self.k)

    @cached_property
    def plan(self) -> Plan:
        """The sequences of the call, or why they cannot be told; looks at the values of the mask."""
        plan = with_cu_seq_lens(self._masked(), self.state.dense, self.q, self.kwargs)
        window = self.kwargs.get("sliding_window")
        # Where the mask cannot be read, more queries than the window is wide are enough to know that it hides some.
        reach = plan.reach if plan.reason is None else self.q.shape[2]
        if window is not None and reach > window and not plan.own:
            return replace(plan, reason=f"layer's own sliding window of {window}", own=True)
        return plan

    def _masked(self) -> Plan:
        """The plan of the mask, where layer and mask agree on what a token sees (eager functions know masks alone)."""
        if self.mask is None:
            batch, _, tokens, _ = self.q.shape
            return Plan(tokens, whole(batch, tokens, tokens), causal=False)
        plan: Plan = self.mask.plan()
        if plan.reason is None and plan.causal != self.causal and self.state.dense != "eager":
            causal = "bidirectional mask in a causal layer"
            return replace(plan, reason=causal if self.causal else "causal mask in a layer with is_causal=False")
        return plan

    def _layout(self, kv_len: int, causal: bool) -> TokenLayout:
        """The tokens of a whole row whose last are the queries."""
        hints = self.state.hints
        if causal:
            row = TokenLayout.causal(kv_len)
        else:
            row = TokenLayout.bidirectional(kv_len) if hints is None else hints.layout(self.q.shape[0], kv_len)
        return row.continued(kv_len - self.q.shape[2])


def with_cu_seq_lens(plan: Plan, dense: str, q: Tensor, kwargs: dict[str, Any]) -> Plan:
    """The plan where boundaries of packed sequences come beside the mask, as for flash attention."""
    edges = kwargs.get("cu_seq_lens_k")
    if edges is None or plan.packed or plan.reason is not None or len(edges) <= 2:
        return plan
    if "flash" not in dense:
        return replace(plan, reason=f"cu_seq_lens_k tells of {len(edges) - 1} sequences, the mask of one")
    edges, own = edges.tolist(), kwargs.get("cu_seq_lens_q")
    one_row = q.shape[0] == 1 and edges[0] == 0 and edges[-1] == q.shape[2] == plan.kv_end
    if not one_row or own is None or own.tolist() != edges:
        return replace(plan, reason="cu_seq_lens of a batch or of cached keys")
    pairs = [(a, b) for a, b in pairwise(edges) if b > a]
    return replace(plan, spans=tuple(Span((0,), pair, pair) for pair in pairs), packed=True)


# ---------------------------------------------------------------------- what a rule looks at, and what it says


def _as_before(call: LayerCall) -> Decision:
    return decision.as_before(call.state.session)


def _share_of_a_rank(call: LayerCall) -> None:
    if call.mask is None and call.kwargs.get("is_causal") is True and getattr(call.module, "is_causal", False):
        raise ValueError(
            "`attention_mask` must describe the whole sequence, got None with is_causal=True, as accelerate's context "
            "parallelism sends it: a layer then sees one rank's share of the tokens. Use data parallelism or unpatch()"
        )


def _fewer_keys(call: LayerCall) -> str | None:
    q_len, kv_len = call.q.shape[2], call.k.shape[2]
    return f"{q_len} queries for {kv_len} keys" if kv_len < q_len else None


def _by_shape(call: LayerCall) -> Decision:
    # Decoding and short texts pay nothing for the patch: no look at the mask, and none at what is known of the shape.
    state = call.state
    return decision.by_shape(state.session, state.record, call.q, call.k, call.v, lambda: call.by_shape)


def _decoding(call: LayerCall) -> str | None:
    return "decoding" if call.q.shape[2] < call.state.session.policy.min_queries else None


def _reads(call: LayerCall) -> str | None:
    session = call.state.session
    return f"method {session.method.name} reads more of a layer than a graph hands over" if session.reads else None


def _no_mask(call: LayerCall) -> str | None:
    # Without a mask a causal layer may stand for one of several ranks, or hold a static cache.
    return "no mask was described to the layer" if call.mask is None and call.causal else None


def _other_sizes(call: LayerCall) -> str | None:
    q, k, mask = call.q, call.k, call.mask
    if isinstance(mask, MaskSpec) and (mask.shape[0] != q.shape[0] or mask.shape[2:] != (q.shape[2], k.shape[2])):
        return f"mask for {list(mask.shape)} where the layer has {[q.shape[0], 1, q.shape[2], k.shape[2]]}"
    if _other_tokens(call):
        return f"{q.shape[0]} x {q.shape[2]} queries for {k.shape[0]} x {k.shape[2]} keys"
    return None


def _other_tokens(call: LayerCall) -> str | None:
    q, k = call.q, call.k
    if call.mask is None and (k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]):
        return "queries of another sequence than the keys"
    return None


def _ready_mask(call: LayerCall) -> str | None:
    known = call.mask is None or isinstance(call.mask, MaskSpec)
    return None if known else f"mask given as a {type(call.mask).__name__}"


def _dropout(call: LayerCall) -> str | None:
    share = call.kwargs.get("dropout")
    return f"dropout of {share} on the attention weights" if share else None


def _output_attentions(call: LayerCall) -> str | None:
    wanted = call.kwargs.get("output_attentions") or getattr(call.module.config, "output_attentions", False)
    return "output_attentions=True" if wanted else None


def _scaling(call: LayerCall) -> str | None:
    scaling = call.kwargs.get("scaling")
    return None if isinstance(scaling, (int, float, type(None))) else f"scaling given as a {type(scaling).__name__}"


def _position_bias(call: LayerCall) -> str | None:
    return None if call.kwargs.get("position_bias") is None else "position bias"


def _paged_cache(call: LayerCall) -> str | None:
    return None if call.kwargs.get("cache") is None else "paged cache"


def _cu_seq_lens(call: LayerCall) -> str | None:
    return None if call.kwargs.get("cu_seq_lens_k") is None else "cu_seq_lens_k under torch.compile"


def _own_mask(call: LayerCall) -> str | None:
    return call.plan.reason if call.plan.own else None


def _own_mask_traced(call: LayerCall) -> str | None:
    return "layer's own mask" if _odd_mask(call) and call.kwargs.get("sliding_window") is not None else None


def _unread_mask(call: LayerCall) -> str | None:
    return call.plan.reason


def _unread_mask_traced(call: LayerCall) -> str | None:
    kind = "causal" if call.causal else "bidirectional"
    said = f"mask other than {kind} under torch.compile (give an attention_mask of ones where nothing is packed)"
    return said if _odd_mask(call) else None


def _odd_mask(call: LayerCall) -> bool:
    mask = call.mask
    return mask is not None and mask.wanted.get("mask_function") is not MASK_FUNCTIONS[call.causal]


def _unread_inputs(call: LayerCall) -> str | None:
    return call.inputs if isinstance(call.inputs, str) else None


def _unknown_tokens(call: LayerCall) -> str | None:
    unknown = None if call.tokens is None else call.tokens.unknown
    needed = unknown is not None and "video grid" in call.state.session.method.needs
    return f"vision tokens unknown: {unknown}" if needed else None


# ---------------------------------------------------------------------- the table


class Rule(NamedTuple):
    """One reason for which a call stays dense.

    Args:
        why: says it, or None; a Decision where it is more than a reason, such as a prediction.
        fallback: nobody asked for dense attention: with strict=True it is an error.
        eager: whether the rule is for calls that run.
        traced: whether it is for calls of a graph that is being traced, or what it is called there. A graph cannot
            look at values nor name its sizes: what needs them is decided when its operator runs.
        noted: whether a graph tells of it, which makes a graph for each layer.
    """

    why: Callable[[LayerCall], Decision | str | None]
    fallback: bool = True
    eager: bool = True
    traced: bool | str = True
    noted: bool = True


# In the order in which they are asked: first what is cheap to know.
RULES = (
    Rule(_as_before, fallback=False, noted=False),
    Rule(_share_of_a_rank, traced=False),
    Rule(_fewer_keys, traced=False),
    Rule(_by_shape, fallback=False, traced=False),
    Rule(_decoding, fallback=False, eager=False, noted=False),
    Rule(_reads, eager=False),
    Rule(_no_mask),
    Rule(_other_sizes, traced=False),
    Rule(_other_tokens, eager=False),
    Rule(_ready_mask),
    Rule(_dropout, traced="dropout on the attention weights"),
    Rule(_output_attentions),
    Rule(_scaling),
    Rule(_position_bias, traced="position_bias under torch.compile"),
    Rule(_paged_cache, traced="cache under torch.compile"),
    Rule(_own_mask, fallback=False, traced=False),
    Rule(_own_mask_traced, fallback=False, eager=False),
    Rule(_unread_mask, traced=False),
    Rule(_unread_mask_traced, eager=False),
    Rule(_cu_seq_lens, eager=False),
    Rule(_unread_inputs, traced=False),
    Rule(_unknown_tokens, traced=False),
)


def decide(call: LayerCall) -> Decision:
    """Whether a call is dense by any rule.

    Raises:
        ValueError: the call is one rank's share of a sequence under context parallelism.
    """
    for rule in _EAGER:
        found = rule.why(call)
        if isinstance(found, str):
            return Decision(found, fallback=rule.fallback)
        if found is not None and found.reason is not None:
            return found
    return SPARSE


def decide_traced(call: LayerCall) -> Decision:
    """Whether a call is dense as far as tracing can tell."""
    for rule in _TRACED:
        found = rule.why(call)
        reason = found.reason if isinstance(found, Decision) else found
        if reason is not None:
            text = rule.traced if isinstance(rule.traced, str) else reason
            return Decision(text, fallback=rule.fallback, counted=rule.noted)
    return SPARSE


_EAGER = tuple(rule for rule in RULES if rule.eager)
_TRACED = tuple(rule for rule in RULES if rule.traced)
