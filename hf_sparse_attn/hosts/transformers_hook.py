"""The attention function and the mask function that transformers calls in a patched model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from hf_sparse_attn import recomputation
from hf_sparse_attn.autocast import cast_inputs
from hf_sparse_attn.compiled import in_program, refuse_program
from hf_sparse_attn.decoder import OWN
from hf_sparse_attn.hosts.transformers_decode import attend_few, attend_few_call, seen_at_once
from hf_sparse_attn.hosts.transformers_forward import began_before, forward_of, forward_with, runs_alone
from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.hosts.transformers_rules import LayerCall, decide, stays_dense
from hf_sparse_attn.hosts.transformers_switch import hold
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.selection import with_sinks
from hf_sparse_attn.session import Session
from hf_sparse_attn.transforms import are_transformed

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_cache import Caches
    from hf_sparse_attn.hosts.transformers_compile import CompiledLayer
    from hf_sparse_attn.hosts.transformers_encoder import Hints, Source
    from hf_sparse_attn.hosts.transformers_forward import Bound
    from hf_sparse_attn.hosts.transformers_inputs import LayerWatch
    from hf_sparse_attn.hosts.vision_layout import Tokens

# Keyword arguments that a family's hooks add to a call: what the tokens are (vision_layout.Tokens), and which runs of
# them see only themselves (vision_segments.Segments).
TOKENS, SEGMENTS = "hsa_tokens", "hsa_segments"
# One more that the hook of a model with shared layers adds: how often each of them ran in this forward, by its name.
RUNS = "hsa_runs"

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
        later: of a module that is several layers, the states of its second and later runs in a forward.
        bound: the layers of the patch; None where there is none, as for native names.
        caches: remembers what decoding keeps of the caches; None where it keeps nothing.
    """

    record: LayerRecord
    session: Session
    num_layers: int
    dense: str
    compiled: CompiledLayer | None = None
    hints: Hints | None = None
    source: Source | None = None
    watch: LayerWatch | None = None
    later: tuple[LayerState, ...] = ()
    bound: Bound | None = None
    caches: Caches | None = None

    def of_run(self, runs: dict[str, int] | None) -> LayerState:
        """The state of the run that begins, which is counted in `runs`; the first one's where nobody counts."""
        if runs is None or not self.later:
            return self
        run = runs[self.record.name] = runs.get(self.record.name, -1) + 1
        return self if run == 0 else self.later[min(run, len(self.later)) - 1]


Find = Callable[[nn.Module], "LayerState | None"]


def is_text_attention(module: nn.Module) -> bool:
    """Whether a module is a decoder's self-attention that goes through the attention interface.

    One whose config has is_causal=False counts: transformers tells every call of it what it is, as with the keyword.
    """
    config = getattr(module, "config", None)
    return (
        isinstance(config, PreTrainedConfig)
        and isinstance(getattr(module, "layer_idx", None), int)
        and getattr(module, "is_causal", False) is True
        and not getattr(module, "is_cross_attention", False)
        and "ALL_ATTENTION_FUNCTIONS" in code_names(type(module))
    )


def is_segment_attention(module: nn.Module) -> bool:
    """Whether a module is attention of a vision tower that is told by `cu_seqlens` where its segments end."""
    kind = type(module)
    return "ALL_ATTENTION_FUNCTIONS" in code_names(kind) and "cu_seqlens" in code_names(kind, "co_varnames")


def code_names(kind: type[nn.Module], field: str = "co_names") -> tuple[str, ...]:
    """Names in the code of a class's forward, in the order in which it uses them first."""
    return getattr(getattr(inspect.unwrap(kind.forward), "__code__", None), field, ())


@lru_cache(maxsize=256)
def _home(kind: Any) -> tuple[dict[str, Any], str]:
    """Globals of the file where the class's forward stands, and the name of its eager attention there."""
    forward = inspect.unwrap(kind.forward)
    # One file may hold several, for text and for images: the one that this forward names.
    named = [n for n in code_names(kind) if n.endswith("eager_attention_forward")]
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


def dense_function(name: str, module: nn.Module) -> Callable[..., Output]:
    """The function behind the implementation `name` for a module; eager attention is that of the module's file."""
    kind: Any = type(module)
    home, eager = _home(kind)
    found: Callable[..., Output] = home["ALL_ATTENTION_FUNCTIONS"].get_interface(name, home.get(eager))
    return found


def run_dense(
    name: str, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Output:
    """What the implementation `name` returns for the call, to the bit."""
    if isinstance(mask, MaskSpec):
        mask = mask.dense(name, q.device)
    own = _named(module, name) if "flash" in name else module
    return dense_function(name, module)(own, q, k, v, mask, **kwargs)


def _named(module: Any, name: str) -> Any:
    """The module with a config that names an implementation, by which the flash functions choose their kernel.

    A replica, for other threads read the config of the module.
    """
    config = copy.copy(module.config)
    config.__dict__["_attn_implementation_internal"] = name
    replica = module.__new__(type(module))
    replica.__dict__ = {**module.__dict__, "config": config}
    return replica


def attend_sparse(
    state: LayerState, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any],
    tokens: Tokens | None = None,
) -> Output | None:  # fmt: skip
    """Sparse attention of one layer, or None where it must run dense; counted either way.

    Raises:
        ValueError: the call is one rank's share of a sequence under context parallelism.
        DenseFallback: sparse attention has to be given up and the patch is strict.
    """
    q, k, v = cast_inputs(q, k, v)
    # Let go here whatever becomes of the call: a layer's activations must not wait for its next one.
    kept = None if state.watch is None else state.watch.release()
    call = LayerCall(state, module, q, k, v, mask, kwargs, tokens, kept)
    if state.session.stays_dense(state.record, decide(call), call.work):
        return None
    if call.decoding:
        return attend_few_call(call)
    end = call.plan.kv_end
    done = state.session.sparse(
        state.record, q, k[:, :, :end], v[:, :, :end], call.ctx, call.spans,
        lambda: run_dense(state.dense, module, q, k, v, mask, kwargs), call.by_shape.layout,
    )  # fmt: skip
    if done is None:
        return None
    out, lse = done
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        out = with_sinks(out, lse, sinks)[0]
    return out.transpose(1, 2).contiguous(), None


def attend(
    find: Find, original: str | None, module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Any, **kwargs: Any,
) -> Output:  # fmt: skip
    """What transformers calls as the attention of a module; see `register` for `find` and `original`."""
    tokens, segments = kwargs.pop(TOKENS, None), kwargs.pop(SEGMENTS, None)
    if original is not None and segments is None and not torch.compiler.is_compiling():
        now = find(module)
        if now is not None and now.caches is not None:
            _note_keys(now, query, key, attention_mask)
        if (
            now is not None
            and not now.later
            and (now.source is None or not now.source.other)
            and runs_alone(now.bound)
        ):
            short = query.shape[2] < now.session.policy.min_queries and now.session.decoder is not OWN
            few = seen_at_once(now, module, query, key, value, attention_mask, kwargs) if short else None
            if few is not None or (not short and stays_dense(now, module, query, key, attention_mask, kwargs)):
                if few is not None and now.watch is not None:
                    now.watch.release()
                done = None if few is None else attend_few(now, query, key, value, few, kwargs)
                if done is not None:
                    return done
                kwargs.pop(RUNS, None)
                return run_dense(now.dense, module, query, key, value, attention_mask, kwargs)
    # By a native name the state is made here, which no graph follows.
    if original is None and in_program():
        refuse_program()
    now, runs = find(module), kwargs.pop(RUNS, None)
    if now is not None and not torch.compiler.is_compiling():
        # In a pause, too: what runs again in backward must meet the same.
        recomputation.note(now.session)
    state = state_here(now, module, attention_mask)
    if state is not None:
        state = state.of_run(runs)
    if state is not None and state.source is not None and state.source.other:
        # Cross-attention is never touched, nor counted.
        state = None
    if state is not None:
        state.session.check_program()
    described = attention_mask.wanted.values() if isinstance(attention_mask, MaskSpec) else ()
    # By a native name graphs break here.
    graph = torch.compiler.is_compiling() and original is not None
    if state is not None and state.compiled is not None and (graph or are_transformed(query, key, value, *described)):
        return state.compiled.traced(module, query, key, value, attention_mask, kwargs)
    if state is None:
        dense = original or default_dense(module)
    elif recomputation.is_of_before(state.session):
        dense = state.dense
    else:
        done = attend_sparse(state, module, query, key, value, attention_mask, kwargs, tokens)
        if done is not None:
            return done
        dense = state.dense
    if segments is not None:
        one = partial(run_dense, dense, module, mask=attention_mask, kwargs=kwargs)
        return segments.attend(one, dense, query, key, value), None
    return run_dense(dense, module, query, key, value, attention_mask, kwargs)


def _note_keys(state: LayerState, query: Tensor, key: Tensor, mask: Any) -> None:
    """Has the keys of a call known to whom remembers something of their cache."""
    new = query.shape[2]
    end = mask.plan.kv_end if isinstance(mask, MaskSpec) else 0
    if state.caches is not None:
        state.caches.note(state.record.index, key, end or key.shape[2], new)


def state_here(now: LayerState | None, module: nn.Module, mask: Any) -> LayerState | None:
    """The state by which a call runs, or None where it runs as without a patch: that of its forward when it began.

    Args:
        now: the state of the module.
        module, mask: of the call. Where backward runs a layer again, its mask tells the forward.
    """
    if torch.compiler.is_compiling() or (now is not None and now.bound is None):
        return now
    forward = forward_of(module)
    if forward is None and isinstance(mask, MaskSpec):
        forward = mask.forward
        if forward is not None and forward.bound.state_of(module) is None:
            forward = None
    if forward is not None:
        return None if forward.asleep else forward.bound.state_of(module)
    return None if now is None or now.bound is None or began_before(now.bound) else now


def describe_mask(original: str | None, kind: type[MaskSpec] = MaskSpec, **wanted: Any) -> Any:
    """What transformers calls to make a mask, of a kind of description; see `register`."""
    ready = wanted.get("attention_mask")
    # generate() makes the masks of a static cache ahead and passes them through here again.
    if isinstance(ready, MaskSpec):
        return ready
    # The eager form of a mask is one that every implementation takes.
    mask = kind(original or "eager", wanted)
    if original is None or torch.compiler.is_compiling():
        return mask
    config = wanted.get("config")
    mask.forward = forward_with(config)
    if mask.forward is None:
        known = hold(mask, config)
    else:
        known = not mask.forward.asleep
    return mask if known else mask.dense(original, mask.device)


def register(name: str, original: str | None, find: Find) -> None:
    """Makes `name` an attention implementation of transformers.

    Args:
        name: what stands in the config.
        original: the implementation it stands for, which modules without a state run; None means the model's default.
        find: the state of a module, or None.
    """
    AttentionInterface.register(name, partial(attend, find, original))
    AttentionMaskInterface.register(name, partial(describe_mask, original))
