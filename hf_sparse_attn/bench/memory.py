"""The suite of memory: the most that one attention call allocates, output included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hf_sparse_attn.bench.kernels import DENSE, random_pattern, sparse_call, with_backward
from hf_sparse_attn.bench.options import DTYPES, Options
from hf_sparse_attn.cli import doctor
from hf_sparse_attn.cost.timing import allocated, failure, synchronize
from hf_sparse_attn.registry import BACKENDS


def memory(options: Options) -> list[dict[str, Any]]:
    """Peak bytes of a call by every backend at every density, forward and forward with backward, and of dense SDPA.

    `bytes` counts what is allocated during the call on top of its inputs, in its second run: tables that are kept for
    a pattern are there by then and stand in `first_bytes`.
    """
    records = []
    dtype = options.dtypes[0]
    for tokens in options.tokens:
        for backward in (False, True):
            for density in (1.0, *options.densities):
                records += _point(options, tokens, options.dims[0], dtype, density, backward)
    return records


def _point(
    options: Options, tokens: int, dim: int, dtype: str, density: float, backward: bool
) -> list[dict[str, Any]]:
    device = options.where
    made = torch.Generator().manual_seed(0)
    shape = (1, options.heads, tokens, dim)
    q, k, v = (torch.randn(shape, generator=made).to(device, DTYPES[dtype]) for _ in range(3))
    calls: dict[str, Callable[[], Any]] = {}
    reasons: dict[str, str] = {}
    if density == 1.0:
        call = torch.nn.functional.scaled_dot_product_attention
        calls[f"{DENSE} sdpa"] = lambda: call(q, k, v, is_causal=options.causal)
    else:
        pattern = random_pattern(tokens, options.heads, options.block, density, options.causal).to(device)
        names = options.backends or [n for n in doctor.known_backends() if n != "torch_reference"]
        for name in names:
            reason = BACKENDS.missing.get(name) or BACKENDS.get(name).why_not(pattern, q, k, v, backward)
            if reason is None:
                calls[name] = sparse_call(name, q, k, v, pattern)
            else:
                reasons[name] = reason
    records = []
    for name in [*calls, *reasons]:
        record: dict[str, Any] = {
            "contestant": name,
            "tokens": tokens,
            "heads": options.heads,
            "dim": dim,
            "dtype": dtype,
            "causal": options.causal,
            "pass": "forward + backward" if backward else "forward",
            "density": density,
            "input_bytes": 3 * q.numel() * q.element_size(),
            "reason": reasons.get(name),
        }
        if name in calls:
            call_once = with_backward(calls[name], (q, k, v), backward)
            try:
                record["first_bytes"] = peak_bytes(call_once, device)
                record["bytes"] = peak_bytes(call_once, device)
            except Exception as error:
                record["reason"] = failure(error)
        records.append(record)
    return records


def peak_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """Most bytes that were allocated at one time during a call, on top of what was before."""
    if device.type == "cuda":
        synchronize(device)
        before = allocated(device) or 0
        call()
        synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    # The CPU's allocator has no counters, but its profiler sees every allocation, also those inside of operators.
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        call()
    recorded: Any = seen.profiler
    events = [e for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
