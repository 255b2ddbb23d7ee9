"""The suite of mixed heads: what it costs that the heads of a layer run several methods."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.bench.patterns import structured
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.cost.timing import FEWEST_ROUNDS, summary, timed
from hf_sparse_attn.dispatch import BackendUnavailable, run_pattern
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.profiles.head_profile import PUBLISHED, HeadProfile, StepPlan
from hf_sparse_attn.profiles.profiled_method import _joined, _part
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.fingerprint import Fingerprint

ONE = "one method"
Step = tuple[float, float, list[BlockPattern]]


def mixed(options: Options) -> list[dict[str, Any]]:
    """One layer with heads of two methods in turns: in one launch, with unequal blocks, and in a launch for each.

    All keep the same share of the keys: block_topk chooses by content, sliding_window is static. Each round builds
    the pattern anew where it depends on content, as every call of a model does.
    """
    points = [(tokens, density) for tokens in options.tokens for density in options.densities]
    return [record for point in tqdm(points, "mixed", disable=None) for record in _point(options, *point)]


def _point(options: Options, tokens: int, density: float) -> list[dict[str, Any]]:
    device, heads, dim = options.where, options.heads, options.dims[0]
    ctx = Context(TokenLayout.causal(tokens), num_heads=heads, num_kv_heads=heads, head_dim=dim)
    q, k = (t.to(device, options.dtype) for t in structured(tokens, heads, dim))
    v = torch.randn_like(k)
    # The share of a causal triangle that a window covers is 1 - (1 - window / tokens) ** 2.
    window = max(1, round(tokens * (1 - math.sqrt(1 - density))))
    chosen = make_method("block_topk", {"density": density, "block_size": options.block})
    half = make_method("block_topk", {"density": density, "block_size": max(16, options.block // 2)})
    static = make_method("sliding_window", {"window": window, "sink": 0, "block_size": options.block})
    contestants: dict[str, Callable[[], Step]] = {
        ONE: lambda: _together(chosen, q, k, v, ctx),
        "two methods, one launch": lambda: _together(_mix(heads, chosen, static), q, k, v, ctx),
        "two methods, two launches": lambda: _apart((chosen, static), q, k, v, ctx),
        "unequal blocks, one launch": lambda: _together(_mix(heads, half, static), q, k, v, ctx),
        "unequal blocks, two launches": lambda: _apart((half, static), q, k, v, ctx),
    }
    if heads == 1:
        contestants = {ONE: contestants[ONE]}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contestants}
    patterns: dict[str, list[BlockPattern]] = {}
    reasons: dict[str, str] = {}
    begin = time.perf_counter()
    # The first round warms up and is not counted.
    for done in range(options.repeats + 1):
        if done > FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        for name, run in contestants.items():
            if name in reasons:
                continue
            try:
                *seconds, patterns[name] = run()
                times[name].append((seconds[0], seconds[1]))
            except BackendUnavailable as error:
                reasons[name] = str(error)
    point = {"tokens": tokens, "heads": heads, "dim": dim, "dtype": options.dtypes[0], "density": density}
    records = [_record({**point, "contestant": n, "reason": reasons.get(n)}, times[n], patterns) for n in contestants]
    one = records[0].get("total", {}).get("median")
    for record in records:
        if one and "total" in record:
            record["ratio"] = record["total"]["median"] / one
    return records


def _record(
    record: dict[str, Any], times: list[tuple[float, float]], patterns: dict[str, list[BlockPattern]]
) -> dict[str, Any]:
    if record["reason"] is not None:
        return record
    own = patterns[record["contestant"]]
    record["achieved_density"] = sum(p.density("causal") for p in own) / len(own)
    record["block"] = min(p.block_k for p in own)
    columns = {"pattern": [a for a, _ in times[1:]], "attention": [b for _, b in times[1:]]}
    columns["total"] = [a + b for a, b in times[1:]]
    for name, seconds in columns.items():
        record[name] = {"seconds": seconds, **summary(seconds)}
    return record


def _mix(heads: int, *methods: Method) -> Method:
    """The methods on the heads in turns."""
    model = Fingerprint("bench", "bench", 1, heads, heads, 1, "", "")
    choice = np.array([[1 + head % len(methods) for head in range(heads)]])
    figures = {"density": np.full((1, 1, heads), np.nan)}
    plan = StepPlan((0.0, 1.0), choice)
    return HeadProfile(model, (make_method("dense", {}), *methods), (plan,), figures, PUBLISHED, {}, {}).method()


def _together(method: Method, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Step:
    """Seconds of the pattern and of attention, and the pattern."""
    building, pattern = timed(lambda: method.pattern_for(q, k, ctx), q.device)
    assert isinstance(pattern, BlockPattern)
    attending, _ = timed(lambda: run_pattern(q, k, v, pattern, ctx.softmax_scale), q.device)
    return building, attending, [pattern]


def _apart(methods: tuple[Method, ...], q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Step:
    """The same with a launch for each method, on its heads; their outputs put together count as attention."""
    building, attending, parts, patterns = 0.0, 0.0, [], []
    for turn, method in enumerate(methods):
        heads = list(range(turn, ctx.num_heads, len(methods)))
        own = replace(ctx, num_heads=len(heads), num_kv_heads=len(heads))
        one, two, three = (_part(t, heads) for t in (q, k, v))
        seconds, pattern = timed(partial(method.pattern_for, one, two, own), q.device)
        assert isinstance(pattern, BlockPattern)
        building += seconds
        seconds, (out, lse, _) = timed(partial(run_pattern, one, two, three, pattern, ctx.softmax_scale), q.device)
        attending += seconds
        parts.append((heads, out, lse))
        patterns.append(pattern)
    seconds, _ = timed(lambda: _joined(parts), q.device)
    return building, attending + seconds, patterns
