"""The rules by which a call of a transformers layer stays dense: one table, for eager calls and for traced ones."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_sparse_attn import recomputation
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.decision import SPARSE, Decision, as_before, by_shape, known_dense
from hf_sparse_attn.decoder import OWN
from hf_sparse_attn.hosts.sdpa_hook import SDPA, is_context_parallel, watched_by
from hf_sparse_attn.hosts.transformers_mask import MaskSpec, Plan, ReadyMask, read_ready, whole
from hf_sparse_attn.record import Work
from hf_sparse_attn.span import Span

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_hook import LayerState
    from hf_sparse_attn.hosts.vision_layout import Tokens
    from hf_sparse_attn.session import Session

# The masks that a graph can hand over, by whether the layer is causal.
MASK_FUNCTIONS = {True: masking_utils.causal_mask_function, False: masking_utils.bidirectional_mask_function}


# Names of implementations that transformers defines itself.
_BY_TRANSFORMERS = re.compile(r"(paged\|)?(eager|sdpa|flex_attention|flash_attention_\d)")


@dataclass(eq=False)
class LayerCall:
    """One call of a patched attention module, as the rules see it.

    Args:
        state, module: the layer.
        q, k, v, mask, kwargs: what transformers hands to an attention function.
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
    def session(self) -> Session:
        """The session of the patch."""
        return self.state.session

    @cached_property
    def known(self) -> Decision:
        """What is known of all calls of this shape."""
        hints = None if self.state.hints is None else self.state.hints.grid
        tokens = self.causal, hints
        return by_shape(self.session, self.state.record, self.q, self.k.shape[2], lambda: self.by_shape, tokens)

    @property
    def causal(self) -> bool:
        """Whether the layer's dense implementation would take a call without a mask for causal."""
        return is_causal(self.state, self.module, self.kwargs)

    @property
    def decoding(self) -> bool:
        """Whether the call is for the session's decoder: few queries, as where text is generated."""
        if self.session.decoder is OWN:
            return False
        return self.q.shape[2] < self.session.policy.min_queries and self.causal

    @property
    def strictly(self) -> bool:
        """Whether it is a fallback if the call stays dense against the rules: exact attention loses nothing by it."""
        session = self.session
        return session.decoder.method is not None if self.decoding else not session.method.keeps_all

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
    def work(self) -> Work:
        """What there is to compute, as far as it is told without a look at the values of the mask."""
        keys = self.mask.kv_end if isinstance(self.mask, MaskSpec) else self.k.shape[2]
        window = self.kwargs.get("sliding_window")
        return Work.of(self.q, keys, self.causal, self.session.policy.min_queries, window)

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
    def unread(self) -> str | None:
        """Why a mask that was given ready made cannot be followed, or None; one that can is read then."""
        if isinstance(self.mask, Tensor) and self.state.dense in ("eager", "sdpa"):
            # Eager attention adds what it is given, also True and 1.
            added = self.mask.to(self.q.dtype) if self.state.dense == "eager" else self.mask
            found = read_ready(added, (self.q.shape[0], 1, self.q.shape[2], self.k.shape[2]), self.causal)
            if isinstance(found, str):
                return f"mask given as a Tensor: {found}"
            self.mask = found
        known = self.mask is None or isinstance(self.mask, (MaskSpec, ReadyMask))
        return None if known else f"mask given as a {type(self.mask).__name__}"

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
        plan: Plan = self.mask.plan
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


class Rule(NamedTuple):
    """One reason for which a call stays dense.

    Args:
        name: what the rule looks at.
        holds: whether the call is dense by it.
        says: the reason, or the whole Decision.
        fallback: nobody asked for dense attention: with strict=True it is an error.
        eager: whether the rule is for calls that run.
        traced: whether it is for calls of a graph that is being traced, or what it says there. A graph can neither
            look at values nor name its sizes: what needs them is decided when its operator runs.
        noted: whether a graph tells of it; that makes a graph for each layer.
    """

    name: str
    holds: Callable[[LayerCall], bool]
    says: str | Callable[[LayerCall], Decision | str]
    fallback: bool = True
    eager: bool = True
    traced: bool | str = True
    noted: bool = True


def _given(argument: str) -> Callable[[LayerCall], bool]:
    return lambda call: call.kwargs.get(argument) is not None


def _share_of_a_rank(call: LayerCall) -> bool:
    got = "None with is_causal=True, as accelerate's context parallelism sends it"
    if is_context_parallel():
        got = "a call under torch's context parallelism"
    elif call.mask is not None or call.kwargs.get("is_causal") is not True or not getattr(call.module, "is_causal", 0):
        return False
    raise ValueError(
        f"`attention_mask` must describe the whole sequence, got {got}: a layer then sees one rank's share of the "
        "tokens. Use data parallelism or unpatch()"
    )


def _as_before(call: LayerCall) -> Decision:
    """decision.as_before of a prompt; what reads a prompt is no matter where text is generated, a pause is."""
    found = as_before(call.session)
    return SPARSE if found.reason is not None and found.counted and call.decoding else found


def who_took_it(name: str) -> str | None:
    """What has taken the attention called `name` over or must see it, in words, or None."""
    if _BY_TRANSFORMERS.fullmatch(name):
        for what, known in (("attention", ALL_ATTENTION_FUNCTIONS), ("mask", ALL_MASK_ATTENTION_FUNCTIONS)):
            now = known.get(name)
            # functools.wraps copies the name of a module, not its globals.
            home = str(getattr(now, "__globals__", {}).get("__name__"))
            if now is not None and home.partition(".")[0] != "transformers":
                other = getattr(now, "__qualname__", type(now).__qualname__)
                return f"{what} function of {name!r} was replaced by {other}"
    return watched_by()


def _misfit(call: LayerCall) -> bool:
    q, k, mask = call.q.shape, call.k.shape, call.mask
    return mask is not None and (mask.shape[0] != q[0] or mask.shape[2:] != (q[2], k[2]))


def wants_weights(module: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a call is to return its weights."""
    return bool(kwargs.get("output_attentions") or getattr(module.config, "output_attentions", False))


def _odd_mask(call: LayerCall) -> bool:
    return call.mask is not None and call.mask.wanted.get("mask_function") is not MASK_FUNCTIONS[call.causal]


def _unknown_tokens(call: LayerCall) -> bool:
    return call.tokens is not None and call.tokens.unknown is not None and "video grid" in call.session.method.needs


# In the order in which they are asked. What is known of a shape comes before a look at the mask: decoding and short
# texts are to pay nothing for the patch.
RULES = (
    Rule("patch", lambda c: _as_before(c).reason is not None, _as_before, noted=False),
    Rule("context parallelism", _share_of_a_rank, "", traced=False),
    Rule("not ours", lambda c: who_took_it(c.state.dense) is not None, lambda c: who_took_it(c.state.dense) or ""),
    Rule("fewer keys", lambda c: c.k.shape[2] < c.q.shape[2],
         lambda c: f"{c.q.shape[2]} queries for {c.k.shape[2]} keys", traced=False),
    Rule("shape", lambda c: not c.decoding and c.known.reason is not None, lambda c: c.known, traced=False),
    Rule("decoding", lambda c: c.q.shape[2] < c.session.policy.min_queries, "decoding",
         fallback=False, eager=False, noted=False),
    Rule("reads", lambda c: bool(c.session.reads),
         lambda c: f"method {c.session.method.name} reads more of a layer than a graph hands over", eager=False),
    # Without a mask a causal layer may stand for one of several ranks, or hold a static cache.
    Rule("no mask", lambda c: c.mask is None and c.causal, "no mask was described to the layer"),
    Rule("ready mask", lambda c: c.unread is not None, lambda c: c.unread or "", traced=False),
    Rule("ready mask", lambda c: c.mask is not None and not isinstance(c.mask, MaskSpec),
         lambda c: f"mask given as a {type(c.mask).__name__}", eager=False),
    Rule("mask of other sizes", _misfit, lambda c: f"mask for {list(c.mask.shape)} where the layer has "
         f"{[c.q.shape[0], 1, c.q.shape[2], c.k.shape[2]]}", traced=False),
    Rule("other tokens", lambda c: c.mask is None and (c.k.shape[0] != c.q.shape[0] or c.k.shape[2] != c.q.shape[2]),
         lambda c: f"{c.q.shape[0]} x {c.q.shape[2]} queries for {c.k.shape[0]} x {c.k.shape[2]} keys",
         traced="queries of another sequence than the keys"),
    Rule("dropout", lambda c: bool(c.kwargs.get("dropout")),
         lambda c: f"dropout of {c.kwargs['dropout']} on the attention weights",
         traced="dropout on the attention weights"),
    Rule("weights", lambda c: wants_weights(c.module, c.kwargs), "output_attentions=True"),
    Rule("scaling", lambda c: not isinstance(c.kwargs.get("scaling"), (int, float, type(None))),
         lambda c: f"scaling given as a {type(c.kwargs['scaling']).__name__}"),
    Rule("position bias", _given("position_bias"), "position bias", traced="position_bias under torch.compile"),
    Rule("paged cache", _given("cache"), "paged cache", traced="cache under torch.compile"),
    Rule("own mask", lambda c: c.plan.own, lambda c: c.plan.reason or "", fallback=False, traced=False),
    Rule("own mask", lambda c: c.kwargs.get("sliding_window") is not None and _odd_mask(c), "layer's own mask",
         fallback=False, eager=False),
    Rule("mask", lambda c: c.plan.reason is not None, lambda c: c.plan.reason or "", traced=False),
    Rule("mask", _odd_mask, lambda c: f"mask other than {'causal' if c.causal else 'bidirectional'} under "
         "torch.compile (give an attention_mask of ones where nothing is packed)", eager=False),
    Rule("packing", _given("cu_seq_lens_k"), "cu_seq_lens_k under torch.compile", eager=False),
    Rule("inputs", lambda c: not c.decoding and isinstance(c.inputs, str), lambda c: str(c.inputs), traced=False),
    Rule("tokens", lambda c: not c.decoding and _unknown_tokens(c),
         lambda c: f"vision tokens unknown: {c.tokens and c.tokens.unknown}", traced=False),
)  # fmt: skip
_EAGER = tuple(rule for rule in RULES if rule.eager)
_TRACED = tuple(rule for rule in RULES if rule.traced)


def stays_dense(state: LayerState, module: nn.Module, q: Tensor, k: Tensor, mask: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a plain call is dense as every call of its shape, which is then counted; False where it takes a look.

    What most calls of short texts come to: they are to pay next to nothing for the patch. `decide` comes to the same
    answer, if in some cases for a reason that it asks about before the shape.
    """
    session = state.session
    if session.strict or session.method.name == "dense" or session.paused or not is_undisturbed(q):
        return False
    causal = is_causal(state, module, kwargs)
    keys = k.shape[2]
    if keys < q.shape[2] or not (isinstance(mask, MaskSpec) or (mask is None and not causal)):
        return False
    hints = None if state.hints is None else state.hints.grid
    found = known_dense(state.record, q, keys, (causal, hints))
    if found is None:
        return False
    if state.watch is not None:
        state.watch.release()
    keys = keys if mask is None else mask.kv_end
    state.record.count_dense(found, Work.of(q, keys, causal, session.policy.min_queries, kwargs.get("sliding_window")))
    return True


def is_undisturbed(q: Tensor) -> bool:
    """Whether no function of torch is watched or replaced, nor a transform, trace, autocast or gradient at work."""
    return not (
        torch._C._len_torch_function_stack()
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or F.scaled_dot_product_attention is not SDPA
        or torch.is_autocast_enabled(q.device.type)
        or not recomputation.is_quiet()
    )


def is_causal(state: LayerState, module: nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether the layer's dense implementation would take a call without a mask for causal."""
    given = kwargs.get("is_causal")
    # The eager functions of transformers know masks alone; modules of old say nothing, which others take for yes.
    return bool(getattr(module, "is_causal", state.dense != "eager") if given is None else given)


def decide(call: LayerCall, traced: bool = False) -> Decision:
    """Whether a call is dense by any rule, or with `traced` as far as tracing can tell.

    Raises:
        ValueError: the call is one rank's share of a sequence under context parallelism.
    """
    for rule in _TRACED if traced else _EAGER:
        if rule.holds(call):
            says = rule.traced if traced and isinstance(rule.traced, str) else rule.says
            said = says if isinstance(says, str) else says(call)
            if isinstance(said, str):
                return Decision(said, fallback=rule.fallback and call.strictly, counted=rule.noted or not traced)
            return Decision(said.reason, counted=False) if traced else said
    return SPARSE
