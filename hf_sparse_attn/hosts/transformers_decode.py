"""Calls of a transformers layer where text is generated: few queries, all the keys before them, and no prompt."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import made_on_cpu, no_autocast
from hf_sparse_attn.backend import BackendUnavailable
from hf_sparse_attn.cost.decoding import pays_exact, sparse_gain
from hf_sparse_attn.decision import Decision
from hf_sparse_attn.decoder import EXACT
from hf_sparse_attn.decoding import Kept, Memory, Step
from hf_sparse_attn.dispatch import run_exact, run_kept
from hf_sparse_attn.hosts.transformers_forward import forwards_here, values_here
from hf_sparse_attn.hosts.transformers_mask import MaskSpec, ReadyMask
from hf_sparse_attn.hosts.transformers_rules import LayerCall, is_causal, is_undisturbed, wants_weights, who_took_it
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.record import Work
from hf_sparse_attn.selection import with_sinks

if TYPE_CHECKING:
    from hf_sparse_attn.hosts.transformers_hook import LayerState, Output

# Arguments of a call that must be absent where it is seen at once that nothing hinders it.
_HINDERING = ("dropout", "output_attentions", "position_bias", "cache", "cu_seq_lens_k")
# What the rows of a forward hand on from layer to layer, among the values of the forward.
_ROWS = "hsa decoding rows"


class Few(NamedTuple):
    """What the few queries of a call read, the last ones of all.

    Args:
        end: slots that are filled.
        starts: the first slot of each row that is no padding; None where none is.
        reach: the most slots that a row has.
        limited: whether the layer sees no more than a window or chunk of a longer text.
        rows: what layers hand on, by row of queries, where the mask is all that is known of a forward.
    """

    end: int
    starts: tuple[int, ...] | None
    reach: int
    limited: bool
    rows: list[dict[Any, Any]]


def read_few(mask: MaskSpec | ReadyMask) -> Few | str:
    """What a mask says of few queries, or why it is more than padding before them; worked out once for a mask."""
    known: dict[Any, Any] = mask.__dict__
    # A tensor that was given ready made may be given again, in another forward.
    if "few" not in known or isinstance(mask, ReadyMask):
        known["few"] = _read_few(mask)
    found: Few | str = known["few"]
    return found


def _read_few(mask: MaskSpec | ReadyMask) -> Few | str:
    plan, (batch, _, q_len, _) = mask.plan, mask.shape
    if plan.reason is not None:
        return plan.reason
    if not plan.causal:
        return "bidirectional mask"
    starts = {row: span.k[0] for span in plan.spans for row in span.rows}
    whole = all(span.q == (0, q_len) and span.k[1] == plan.kv_end for span in plan.spans)
    if plan.packed or not whole or len(starts) < batch or max(starts.values()) > plan.kv_end - q_len:
        return "padding among the queries"
    slots = tuple(starts[row] for row in range(batch))
    return Few(plan.kv_end, slots if any(slots) else None, plan.reach, plan.limited, [])


def seen_at_once(
    state: LayerState, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, kwargs: dict[str, Any]
) -> Few | None:
    """What a plain call of few queries reads; None where it takes a look by the rules.

    For a patched layer whose forward alone runs in this thread. `decide` comes to the same answer.
    """
    if (
        not isinstance(mask, MaskSpec)
        or not is_undisturbed(q)
        or any(kwargs.get(name) for name in _HINDERING)
        or not isinstance(kwargs.get("scaling"), (int, float, type(None)))
        or not is_causal(state, module, kwargs)
        or wants_weights(module, kwargs)
        or not q.dtype == k.dtype == v.dtype
    ):
        return None
    found = read_few(mask)
    if isinstance(found, str) or not _is_ours(state):
        return None
    window = kwargs.get("sliding_window")
    shape = (q.shape[0], 1, q.shape[2], k.shape[2])
    return found if mask.shape == shape and (window is None or found.reach <= window) else None


def _is_ours(state: LayerState) -> bool:
    """Whether nothing has taken the layer's own attention over; asked once in a forward."""
    values, key = values_here(), ("ours", state.dense)
    if key not in values:
        values[key] = who_took_it(state.dense) is None
    return bool(values[key])


def attend_few_call(call: LayerCall) -> Output | None:
    """`attend_few` for a call that no rule keeps dense."""
    mask, session = call.mask, call.session
    found = read_few(mask)
    why = found if isinstance(found, str) else None
    if torch.is_grad_enabled() and (call.q.requires_grad or call.k.requires_grad or call.v.requires_grad):
        why = "gradients where text is generated"
    if isinstance(found, str) or why is not None:
        session.stays_dense(call.state.record, Decision(f"decoding: {why}", fallback=call.strictly), call.work)
        return None
    with no_autocast(call.q.device), made_on_cpu():
        return attend_few(call.state, call.q, call.k, call.v, found, call.kwargs)


def attend_few(state: LayerState, q: Tensor, k: Tensor, v: Tensor, few: Few, kwargs: dict[str, Any]) -> Output | None:
    """Attention of few queries, exact or by the session's decoder; None where the model's own is to run; counted.

    Args:
        state: of the layer.
        q, k, v, kwargs: what transformers hands to an attention function.
        few: what the queries read.

    Raises:
        DenseFallback: the method declines and the patch is strict.
    """
    session, record = state.session, state.record
    if few.end < k.shape[2]:
        k, v = k[:, :, : few.end], v[:, :, : few.end]
    first = None if few.starts is None else _first_slots(few.starts, q.device)
    scale, softcap = kwargs.get("scaling"), kwargs.get("softcap") or 0.0
    work = Work.of(q, few.end, True, session.policy.min_queries)
    one = _Call(state, q, k, v, first, q.shape[3] ** -0.5 if scale is None else scale, softcap, work)
    done, method = None, session.decoder.method
    if method is not None:
        why = _why_whole(one, few, kwargs)
        gain = sparse_gain(k, v, getattr(method, "density", None)) if why is None else 0.0
        if why is None and session.policy.min_tokens == "auto" and gain <= 1:
            why = "predicted slower than reading all keys"
        if why is None:
            done = _by_method(one, method, gain, _layers_of_rows(few, q.shape[2]))
        else:
            record.count(record.partly_dense, f"decoding: {why}")
    if done is None:
        if not pays_exact(q, k.shape[1], few.end):
            record.count_dense(Decision(f"decoding: fewer than {session.policy.min_queries} queries"), work)
            return None
        try:
            out, lse, name = run_exact(q, k, v, one.scale, softcap, first, session.backend)
        except BackendUnavailable as error:
            record.count_dense(Decision(f"decoding: {error}"), work)
            return None
        record.count_decode(EXACT.kind, work, 1.0, name)
    else:
        out, lse = done
    sinks = kwargs.get("s_aux")
    if sinks is not None:
        out = with_sinks(out, lse, sinks)[0]
    return out.transpose(1, 2).contiguous(), None


class _Call(NamedTuple):
    state: LayerState
    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor | None
    scale: float
    softcap: float
    work: Work


def _why_whole(call: _Call, few: Few, kwargs: dict[str, Any]) -> str | None:
    """Why every query reads all its keys though the decoder chooses some elsewhere, or None."""
    policy, q_len = call.state.session.policy, call.q.shape[2]
    if few.limited or kwargs.get("sliding_window") is not None:
        return "sliding"
    if policy.is_dense_layer(call.state.record.index):
        return "dense_layers"
    if q_len > 1 and q_len == few.end:
        return "a prompt"
    least = policy.min_tokens
    return f"fewer than {least} keys (min_tokens={least})" if least != "auto" and few.end < int(least) else None


def _by_method(call: _Call, method: Method, gain: float, rows: list[dict[Any, Any]]) -> tuple[Tensor, Tensor] | None:
    """Output and log-sum-exp by the method of the decoder, one row after the other; None where all rows read all."""
    state, q, k, v, first, scale, softcap, work = call
    session, record = state.session, state.record
    end, new = k.shape[2], q.shape[2]
    memory = Memory() if state.caches is None else state.caches.memory(record.index)
    steps: list[Step] = []
    kept: list[Kept | None] = []
    for i, layers in enumerate(rows):
        last = end - new + 1 + i
        row = (q, k, v) if new == 1 else (q[:, :, i : i + 1], k[:, :, :last], v[:, :, :last])
        steps.append(Step(*row, first, record.index, state.num_layers, scale, memory, layers, softcap))
        found = method.decode(steps[-1])
        if isinstance(found, Decline):
            session.give_up(record, found.reason)
            found = None
        kept.append(found)
    if not any(kept):
        return None
    parts = [_run(step, one, session.backend) for step, one in zip(steps, kept, strict=True)]
    out = parts[0][0] if new == 1 else torch.cat([part[0] for part in parts], 2)
    lse = parts[0][1] if new == 1 else torch.cat([part[1] for part in parts], 2)
    counts = [_count(step, one) for step, one in zip(steps, kept, strict=True)]
    pages, pairs = (sum(column) for column in zip(*counts, strict=True))
    record.count_decode(method.name, work, pairs / work.pairs, parts[0][2], pages, gain)
    return out, lse


def _run(step: Step, kept: Kept | None, backend: str) -> tuple[Tensor, Tensor, str]:
    if kept is None:
        return run_exact(step.q, step.k, step.v, step.scale, step.softcap, step.first, backend)
    return run_kept(step.q, step.k, step.v, kept, step.scale, step.softcap, step.first, backend)


def _count(step: Step, kept: Kept | None) -> tuple[int, int]:
    """Pages that a step reads, and pairs of query and key; on a GPU, which is not waited for, at most so many."""
    heads = step.q.shape[0] * step.q.shape[1]
    if kept is None:
        return 0, heads * step.length
    pages = kept.pages
    if pages.device.type != "cpu":
        return pages.numel(), heads * min(step.length, pages.shape[2] * kept.size)
    read, last = int((pages >= 0).sum()), (step.length - 1) // kept.size
    short = (last + 1) * kept.size - step.length
    slots = read * kept.size - (int((pages == last).sum()) * short if short else 0)
    return read, slots * (step.q.shape[1] // pages.shape[1])


def _layers_of_rows(few: Few, rows: int) -> list[dict[Any, Any]]:
    """What the layers of this forward hand on, a dictionary for each row of queries."""
    # By a native name a mask is all that the layers of a forward have in common.
    found: list[dict[Any, Any]] = values_here().setdefault(_ROWS, []) if forwards_here() else few.rows
    found.extend({} for _ in range(rows - len(found)))
    return found[:rows]


@lru_cache(maxsize=64)
def _first_slots(starts: tuple[int, ...], device: torch.device) -> Tensor:
    """Step.first, the same tensor for every layer and step: a GPU is not waited for."""
    with torch.inference_mode(False):
        return torch.tensor(starts, dtype=torch.int64, device=device)
