"""The suite of kernels: every backend on random block patterns, against dense attention and what else is installed.

What they allocate, and what it costs that the heads of a layer have patterns of several kinds, are told besides.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse_attn.bench.options import DTYPES, Options
from hf_sparse_attn.cost.timing import in_turns
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

DENSE = "dense"
# Contestants whose pattern no kernel has seen, as where a method chooses by content: of all heads, and of
# two kinds of heads with blocks of the same size and of unequal ones.
NEW = ("new pattern", "mixed", "unequal")
# The specification materialises all logits; it is timed only when asked for by name.
_NOT_TIMED = frozenset({"torch_reference"})
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
# SDPA's backends that exist on a device type; elsewhere torch chooses.
_SDPA_ON = {"cuda": ("flash", "efficient", "cudnn", "math"), "cpu": ("flash", "math")}
# "math" materialises logits and weights: it is left out where they are larger than this.
_MATH_BYTES = 2 << 30
# Exact and 8-bit attention of other packages: what they are called here, and the package.
_OTHERS = {"flash_attn": "flash_attn", "sageattention (8 bit)": "sageattention"}

Call = Callable[[], Any]


def kernels(options: Options) -> list[dict[str, Any]]:
    """Every backend on random block patterns against dense attention.

    All densities of a shape take turns with the dense runs of a round. Patterns are used again in each round, as a
    static method's are: planning and compiling stand in `warmup_seconds`. With `options.backward` a run is the forward
    and the backward pass, of the dense contestants too. Heads of two kinds are tried at the first density, head size
    and dtype.
    """
    first = (options.dims[0], options.dtypes[0])
    return [
        record
        for tokens in options.tokens
        for dim in options.dims
        for dtype in options.dtypes
        for record in kernel_point(options, tokens, dim, dtype, mixed=(dim, dtype) == first)
    ]


def kernel_point(
    options: Options,
    tokens: int,
    dim: int,
    dtype: str,
    *,
    queries: int | None = None,
    backward: bool | None = None,
    densities: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
    mixed: bool = False,
) -> list[dict[str, Any]]:
    """The records of one shape.

    Args:
        options: the rest.
        tokens, dim, dtype: the shape.
        queries: number of queries, the last tokens; None means all.
        backward, densities, names: instead of those of `options`; `names` of backends that are not there are listed.
        mixed: whether heads of two kinds are tried at the first density.
    """
    backward = options.backward if backward is None else backward
    densities = options.densities if densities is None else densities
    names = names or options.backends or [n for n in BACKENDS.known() if n not in _NOT_TIMED]
    queries = tokens if queries is None else queries
    made = torch.Generator().manual_seed(0)
    sizes = (queries, tokens, tokens)
    q, k, v = (torch.randn(1, options.heads, n, dim, generator=made).to(options.where, DTYPES[dtype]) for n in sizes)
    shape: dict[str, Any] = {
        "tokens": tokens,
        "queries": queries,
        "dim": dim,
        "dtype": dtype,
        "heads": options.heads,
        "block": options.block,
        "causal": options.causal,
        "pass": "forward + backward" if backward else "forward",
        "input_bytes": sum(x.nbytes for x in (q, k, v)),
    }
    calls: dict[tuple[str, float], Call] = {}
    reasons: dict[tuple[str, float], str] = {}
    achieved: dict[float, float] = {1.0: 1.0}
    for name, found in _dense_calls(q, k, v, options.causal, backward).items():
        if isinstance(found, str):
            reasons[name, 1.0] = found
        else:
            calls[name, 1.0] = found
    for density in densities:
        pattern = random_pattern(tokens, options.heads, options.block, density, options.causal, queries=queries)
        pattern = pattern.to(options.where)
        achieved[density] = pattern.density("causal" if options.causal else "full")
        for name in names:
            if name in BACKENDS.missing or name not in BACKENDS:
                reasons[name, density] = BACKENDS.why_missing(name) or "not registered in this version"
                continue
            reason = BACKENDS.get(name).why_not(pattern, q, k, v, backward)
            if reason is None:
                calls[name, density] = with_backward(sparse_call(name, q, k, v, pattern), (q, k, v), backward)
            else:
                reasons[name, density] = reason
        if mixed and density == densities[0] and options.heads > 1:
            for name, call in _mixed_calls(options, q, k, v, pattern, density).items():
                calls[name, density] = with_backward(call, (q, k, v), backward)
    title = f"{shape['pass']} {queries} x {tokens} x {dim} {dtype}"
    times, failed = in_turns(calls, options.where, options.repeats, options.seconds, title)
    reasons.update(failed)
    dense = min((t["median"] for (name, _), t in times.items() if name.startswith(DENSE)), default=None)
    records = []
    for key in [*calls, *(key for key in reasons if key not in calls)]:
        name, density = key
        record: dict[str, Any] = {**shape, "contestant": name, "density": density}
        record["achieved_density"] = achieved[density]
        record.update(times.get(key, {}), reason=reasons.get(key))
        if dense is not None and key in times:
            record["speedup"] = dense / times[key]["median"]
            record["share_of_limit"] = record["speedup"] * achieved[density]
        records.append(record)
    order = {d: i for i, d in enumerate((1.0, *(d for d in densities if d != 1.0)))}
    return sorted(records, key=lambda r: (not r["contestant"].startswith(DENSE), order[r["density"]]))


def with_backward(call: Callable[[], Any], inputs: Sequence[Tensor], backward: bool) -> Call:
    """The call, or the call and its backward pass from a gradient of ones."""
    if not backward:
        return call
    for x in inputs:
        x.requires_grad_(True)

    def both() -> Any:
        with torch.enable_grad():
            out = call()
            out = out[0] if isinstance(out, tuple) else out
            return torch.autograd.grad(out, inputs, torch.ones_like(out))

    return both


def _mixed_calls(
    options: Options, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, density: float
) -> dict[str, Call]:
    """One pattern for all heads, and two kinds for heads in turns: in one launch and in a launch for each."""
    scale, heads = q.shape[3] ** -0.5, options.heads
    own = [list(range(first, heads, 2)) for first in (0, 1)]
    order = [number // 2 + (number % 2) * len(own[0]) for number in range(heads)]

    def attend(found: BlockPattern, at: Sequence[int] | slice = slice(None)) -> Tensor:
        return run_pattern(q[:, at], k[:, at], v[:, at], replace(found), scale)[0]

    def one_launch(kinds: list[BlockPattern]) -> Tensor:
        return attend(BlockPattern.stack_heads(kinds, order))

    def two_launches(kinds: list[BlockPattern]) -> Tensor:
        return torch.cat([attend(one, at) for one, at in zip(kinds, own, strict=True)], 1)[:, order]

    calls: dict[str, Call] = {NEW[0]: lambda: attend(pattern)}
    for name, block in zip(NEW[1:], (options.block, max(16, options.block // 2)), strict=True):
        kinds = [
            random_pattern(pattern.kv_len, len(own[seed]), size, density, options.causal, seed).to(q.device)
            for seed, size in enumerate((options.block, block))
        ]
        calls[f"{name}, one launch"] = partial(one_launch, kinds)
        calls[f"{name}, two launches"] = partial(two_launches, kinds)
    return calls


def _dense_calls(q: Tensor, k: Tensor, v: Tensor, causal: bool, backward: bool) -> dict[str, Call | str]:
    """Dense attention by each backend of torch and by other packages, or why it cannot run."""

    def sdpa(backend: SDPBackend | None) -> Call:
        def dense() -> Tensor:
            # One query at the end sees everything.
            masked = causal and q.shape[2] > 1
            if backend is None:
                return scaled_dot_product_attention(q, k, v, is_causal=masked)
            with sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=masked)

        return with_backward(dense, (q, k, v), backward)

    found: dict[str, Call | str] = {}
    for name in _SDPA_ON.get(q.device.type, ()):
        found[f"{DENSE} {name}"] = sdpa(_SDPA[name])
        logits = 2 * q.shape[1] * q.shape[2] * k.shape[2] * max(4, q.element_size()) * (2 if backward else 1)
        if name == "math" and logits > _MATH_BYTES:
            found[f"{DENSE} math"] = f"needs {logits / 2**30:.0f} GiB for its logits"
    if not found:
        found[f"{DENSE} sdpa"] = sdpa(None)
    for name, package in _OTHERS.items():
        if find_spec(package) is None:
            found[name] = "not installed"
        elif q.device.type != "cuda":
            found[name] = "needs a CUDA device"
        elif backward and package == "sageattention":
            found[name] = "forward only"
        else:
            found[name] = with_backward(_other_call(package, q, k, v, causal), (q, k, v), backward)
    return found


def _other_call(package: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Call:
    if package == "sageattention":
        from sageattention import sageattn

        return lambda: sageattn(q, k, v, tensor_layout="HND", is_causal=causal)
    from flash_attn import flash_attn_func

    return lambda: flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)


def sparse_call(name: str, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Call:
    """The backend's call; without the log-sum-exp where it has a way to leave that out, as dense attention does."""
    backend: Any = BACKENDS.get(name)
    attend = getattr(backend, "attention_output", backend.attention)
    return lambda: attend(q, k, v, pattern, q.shape[3] ** -0.5)


def random_pattern(
    tokens: int, heads: int, block: int, density: float, causal: bool, seed: int = 0, queries: int | None = None
) -> BlockPattern:
    """Random blocks, other ones for each head; the diagonal is kept, and every row has the same number where it can.

    Args:
        tokens: queries and keys.
        heads: number of heads.
        block: tokens in a block.
        density: share of the visible pairs of tokens to keep; reached as nearly as whole blocks allow.
        causal: whether keys after the query are dropped.
        seed: of the draw.
        queries: fewer queries, the last ones; then every row keeps the same number of blocks, drawn among all.
    """
    number = -(-tokens // block)
    if queries is not None and queries < tokens:
        score = torch.rand(heads, -(-queries // block), number, generator=torch.Generator().manual_seed(seed))
        score[..., -1] = 2.0
        keep = score >= score.topk(max(1, round(density * number)), -1).values[..., -1:]
        return BlockPattern.from_block_map(keep[None], block, block, queries, tokens, causal)
    row = torch.arange(number)
    visible = row + 1 if causal else torch.full_like(row, number)
    # Under a causal mask the diagonal block costs a whole block and keeps half of its pairs.
    lost = (block - 1) / (2 * block) if causal else 0.0
    wanted = density * float((visible - lost).sum())

    def counts(mean: float) -> Tensor:
        # Spread evenly: some rows have one block more than others where the mean is no whole number.
        share = torch.floor((row + 1) * mean + 1e-9) - torch.floor(row * mean + 1e-9)
        return torch.minimum(share.long().clamp(min=1), visible)

    low, high = 1.0, float(number)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if float((counts(middle) - lost).sum()) >= wanted else (middle, high)
    score = torch.rand(heads, number, number, generator=torch.Generator().manual_seed(seed))
    score[:, row, row] = 2.0
    if causal:
        score.masked_fill_(torch.ones(number, number, dtype=torch.bool).triu(1), -1.0)
    rank = torch.argsort(score, dim=-1, descending=True, stable=True).argsort(-1)
    keep = rank < counts(high)[:, None]
    return BlockPattern.from_block_map(keep[None], block, block, tokens, tokens, causal)
