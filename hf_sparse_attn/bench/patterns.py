"""The suite of patterns: what it costs to build each method's, beside the sparse attention that it leads to."""

from __future__ import annotations

import math
import time
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_sparse_attn.backend import BackendUnavailable
from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.cost.timing import FEWEST_ROUNDS, summary, timed
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS

# Methods come with defaults for long inputs: below this length, parameters that count tokens shrink with it.
_LENGTH_OF_DEFAULTS = 32768
# No block is larger; an integer default above it counts tokens.
_LARGEST_BLOCK = 256
# Nobody runs a pattern that keeps more than this; its attention is not timed.
_DENSEST = 0.9


def scaled(cls: type[Method], tokens: int) -> Method:
    """The method with its defaults, those that count tokens in proportion to a short input."""
    factor = min(1.0, tokens / _LENGTH_OF_DEFAULTS)
    params = {
        f.name: max(1, round(f.default * factor))
        for f in fields(cls)
        if type(f.default) is int and f.default > _LARGEST_BLOCK
    }
    return cls(**params)


def video_grid(tokens: int) -> tuple[int, int, int]:
    """Frames, height and width of about `tokens` tokens: squares of at most 32, and at least 4 frames."""
    side = 32
    while side > 1 and 4 * side * side > tokens:
        side //= 2
    return max(1, tokens // (side * side)), side, side


def structured(tokens: int, heads: int, dim: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries and keys [1, heads, tokens, dim] with what real heads have: neighbours and a few heavy columns.

    Angles that grow with the position make near tokens alike; the first keys and a few random ones share a direction
    with all queries. Noise alone would have methods choose between equals, and would show other costs.
    """
    made = torch.Generator().manual_seed(seed)
    position = torch.arange(tokens, dtype=torch.float64)[:, None]
    # Wavelengths from 32 tokens to the whole length.
    half = max(1, dim // 2)
    waves = 2 * math.pi / torch.logspace(5, math.log2(max(64, tokens)), half, base=2, dtype=torch.float64)
    # Logits of about 8 for both, after the usual factor dim ** -0.5.
    near, strong = (16 / dim**0.5) ** 0.5, (8 * dim**0.5) ** 0.5
    q, k = (torch.randn(heads, tokens, dim, generator=made) * 0.5 for _ in range(2))
    for head in range(heads):
        angle = position * waves + torch.rand(half, generator=made, dtype=torch.float64) * 2 * math.pi
        local = near * torch.cat([angle.cos(), angle.sin()], -1).float()
        heavy = strong * torch.nn.functional.normalize(torch.randn(dim, generator=made), dim=-1)
        columns = torch.randint(0, tokens, (max(2, tokens // 1024),), generator=made)
        columns[0] = 0
        q[head] += heavy
        q[head, :, : 2 * half] += local[:, :dim]
        k[head, :, : 2 * half] += local[:, :dim]
        k[head, columns] += heavy
    return q[None], k[None]


def patterns(options: Options) -> list[dict[str, Any]]:
    """What it costs to build each method's pattern, beside the sparse attention that the pattern leads to.

    `build` is the method's own work; `plan` is what the kernel does once for a new pattern (its first run less a
    second one). A dynamic method pays both in every call, a static one once for each layout.
    """
    points = [(tokens, name, cls) for tokens in options.tokens for name, cls in METHODS.items()]
    return [_pattern_point(options, tokens, name, cls) for tokens, name, cls in tqdm(points, "patterns", disable=None)]


def _pattern_point(options: Options, tokens: int, name: str, cls: type[Method]) -> dict[str, Any]:
    device, heads, dim = options.where, options.heads, options.dims[0]
    layout = TokenLayout.causal(tokens)
    if cls.needs & {"bidirectional", "video grid"}:
        layout = TokenLayout.video(*video_grid(tokens))
    record: dict[str, Any] = {
        "method": name,
        "layout": str(layout),
        "tokens": layout.kv_len,
        "heads": heads,
        "dim": dim,
        "dtype": options.dtypes[0],
        "static": cls.static,
        "reason": None,
    }
    try:
        method = scaled(cls, layout.kv_len)
    except (TypeError, ValueError) as error:
        return {**record, "reason": f"needs parameters: {error}"}
    record["params"] = method.params()
    if not method.reads_prompts:
        return {**record, "reason": f"{name} reads prompts whole"}
    ctx = Context(layout, num_heads=heads, num_kv_heads=heads, head_dim=dim)
    reason = method.why_not(ctx)
    if reason is not None:
        return {**record, "reason": reason}
    q, k = (t.to(device, options.dtype) for t in structured(layout.kv_len, heads, dim))
    v = torch.randn_like(k)

    def build() -> BlockPattern | Decline:
        found = method.pattern(None, None, ctx) if method.static else method.pattern(q, k, ctx)
        return found.to(device) if isinstance(found, BlockPattern) else found

    record["first_build_seconds"], found = timed(build, device)
    if isinstance(found, Decline):
        return {**record, "reason": found.reason}
    if method.static:
        timed(lambda: method.pattern_for(q, k, ctx), device)
        record["cached_call_seconds"] = timed(lambda: method.pattern_for(q, k, ctx), device)[0]
    count = layout.density_count
    record["density"] = found.density(count)
    record["blocks"], record["bytes"] = found.starts.numel(), found.nbytes
    times: dict[str, list[float]] = {"build": [], "first_run": [], "run": []}
    attend = record["density"] <= _DENSEST
    try:
        # The first round warms up and is not counted.
        begin = time.perf_counter()
        for done in range(options.repeats + 1):
            if done > FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
                break
            seconds, fresh = timed(build, device)
            assert isinstance(fresh, BlockPattern)
            times["build"].append(seconds)
            if attend:
                for part in ("first_run", "run"):
                    seconds, record["backend"] = timed(partial(_attend, q, k, v, fresh, ctx), device)
                    times[part].append(seconds)
    except BackendUnavailable as error:
        return {**record, "reason": str(error)}
    record["build"] = {"seconds": times["build"][1:], **summary(times["build"][1:])}
    if not attend:
        record["reason"] = f"attention not timed: density above {_DENSEST}"
        return record
    for part in ("first_run", "run"):
        record[part] = {"seconds": times[part][1:], **summary(times[part][1:])}
    plan = max(0.0, record["first_run"]["median"] - record["run"]["median"])
    record["plan_seconds"] = plan
    per_call = record["cached_call_seconds"] if method.static else record["build"]["median"]
    record["share_of_attention"] = per_call / record["run"]["median"]
    record["share_with_plan"] = (per_call + (0.0 if method.static else plan)) / record["run"]["median"]
    return record


def _attend(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, ctx: Context) -> str:
    """Runs the attention; returns the backend's name."""
    return run_pattern(q, k, v, pattern, ctx.softmax_scale)[2]
