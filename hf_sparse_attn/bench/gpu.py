"""The suite for a GPU: all that is promised of one, measured by one command, and whether each promise is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.bench.kernels import DENSE, kernel_point
from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.bench.patterns import patterns

# Speed over the best dense backend at density 1, and shares of 1 / density below.
DENSE_RATE, FORWARD, TRAINING = 0.8, 0.8, 0.7
# Up to this density and from this many tokens the shares are promised.
SPARSE, LONG = 0.25, 32768
EIGHT_BIT, BUILDING = 1.25, 0.12
_FLEX, _EIGHT_BIT, _DECODE = "flex_attention", "triton_int8", "triton_decode"
# No further point is begun after this many seconds: a machine that is lent does not wait.
BUDGET = 400.0


def gpu(options: Options) -> dict[str, Any]:
    """Everything that is promised of a GPU.

    Returns:
        records by suite: `kernels` (forward, and forward with backward), `decode` (one query), `patterns`; `targets`:
        what was promised, at which point, the value, and whether it was reached, None where it could not be measured.
    """
    own = next(iter(options.backends or auto_order(options.where.type, prompts=True)), "none")
    names = tuple(dict.fromkeys((*(options.backends or (own, _FLEX)), _EIGHT_BIT)))
    dtype, begin = options.dtypes[0], time.perf_counter()
    # What matters most comes first.
    shapes = [(options.tokens[0], options.dims[0])]
    shapes += [(n, options.dims[0]) for n in options.tokens[1:]] + [(options.tokens[0], d) for d in options.dims[1:]]
    kernels: list[dict[str, Any]] = []
    left_out = []
    for tokens, dim in tqdm(shapes, "gpu", disable=None):
        for backward in (False, True):
            if time.perf_counter() - begin > BUDGET:
                left_out.append(f"{tokens} x {dim}, {'forward + backward' if backward else 'forward'}")
                continue
            densities = (*options.densities, *(() if backward else (1.0,)))
            kernels += kernel_point(options, tokens, dim, dtype, backward=backward, densities=densities, names=names)
    decode = kernel_point(
        options, max(options.tokens), options.dims[0], dtype, queries=1, backward=False, names=(_DECODE, own)
    )
    built = patterns(replace(options, tokens=options.tokens[:1]))
    targets = [*_kernel_targets(kernels, own), *_pattern_targets(built)]
    targets += [_target("not begun: the time was over", point, None, None) for point in left_out]
    return {"kernels": kernels, "decode": decode, "patterns": built, "targets": targets}


def _kernel_targets(records: list[dict[str, Any]], own: str) -> Iterator[dict[str, Any]]:
    """What is promised of the kernel `own` at every point that was measured."""
    found = {(_shape(r), r["density"], r["contestant"]): r for r in records if not r["contestant"].startswith(DENSE)}
    for (shape, density, name), r in found.items():
        if name != own:
            continue
        point = f"{shape}, density {density:g}"
        why = r["reason"]
        if density == 1.0:
            yield _target("speed over the best dense SDPA at density 1", point, r.get("speedup"), DENSE_RATE, why)
        elif density <= SPARSE and r["tokens"] >= LONG:
            wanted = TRAINING if "backward" in r["pass"] else FORWARD
            yield _target(f"share of 1/density, {r['pass']}", point, r.get("share_of_limit"), wanted, why)
        flex = found.get((shape, density, _FLEX), {"reason": "not measured"})
        yield _target("speed over compiled FlexAttention", point, _ratio(flex, r), 1.0, why or flex["reason"])
        if "backward" not in r["pass"]:
            eight = found.get((shape, density, _EIGHT_BIT), {"reason": "not measured"})
            yield _target("8-bit over 16-bit kernel", point, _ratio(r, eight), EIGHT_BIT, why or eight["reason"])


def _pattern_targets(records: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Building a dynamic pattern is cheap beside its attention."""
    for r in records:
        if r["static"]:
            continue
        share = r.get("share_of_attention")
        point = f"{r['method']}, {r['tokens']} tokens"
        yield _target("pattern building over its attention", point, share, BUILDING, r["reason"], at_most=True)


def _shape(r: dict[str, Any]) -> str:
    mask = ", causal" if r["causal"] else ""
    return f"{r['tokens']} x {r['dim']} {r['dtype']}{mask}, {r['pass']}"


def _ratio(slow: dict[str, Any], fast: dict[str, Any]) -> float | None:
    return slow["median"] / fast["median"] if "median" in slow and "median" in fast else None


def _target(
    name: str, point: str, value: float | None, wanted: float | None, reason: str | None = None, at_most: bool = False
) -> dict[str, Any]:
    reached = None
    if value is not None and wanted is not None:
        reached = value <= wanted if at_most else value >= wanted
    limit = "" if wanted is None else f"{'at most' if at_most else 'at least'} {wanted:g}"
    return {"target": name, "point": point, "value": value, "wanted": limit, "reached": reached, "reason": reason}
