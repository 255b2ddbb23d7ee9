"""The tables of a benchmark run: columns and rows of each suite."""

from __future__ import annotations

from typing import Any

from hf_sparse_attn.bench.models import UNPATCHED
from hf_sparse_attn.tables import Table

TITLES = {
    "kernels": "Kernels: one attention call on random block patterns, against dense attention",
    "patterns": "Patterns: building them, beside the sparse attention that they lead to",
    "decode": "Decoding: one query, random key blocks",
    "layers": "Attention layers with their projections, forced to be sparse, against the same layer unpatched",
    "auto": "Attention layers where the dispatcher chooses: patched over unpatched time",
    "memory": "Memory: the most that one attention call allocates, output included",
    "mixed": "One layer whose heads run several methods, against one method at the same density",
    "targets": "What is promised of a GPU",
    "model": "Whole tiny models with random weights, against the same model without a patch",
}
NOTES = {
    "kernels": "Median of the rounds with the fastest and the slowest; speed-up over the best dense contestant; the "
    "limit is 1 / achieved density. First call: compiling and planning included, not part of the median.",
    "patterns": "Share: time per call over the attention time (cached call for static methods, build for dynamic "
    "ones); with plan: what the kernel prepares once per new pattern counted as well.",
    "decode": "As for the kernels.",
    "layers": "Ratio: median over the rounds of patched over unpatched time in the same round, with the spread; "
    "parameters that count tokens are scaled to the length.",
    "auto": "Median over the rounds of patched over unpatched time in the same round (lowest..highest), after 6 calls "
    "from which the dispatcher learns, and what it chose at last; every method with its defaults. MISSED: above 1.02.",
    "memory": "Second run; in the first one tables that are kept for a pattern are made besides.",
    "mixed": "Medians. Pattern: estimation and putting side by side; attention: first run of a new pattern, planning "
    "included; of one: total over that of one method.",
    "targets": "Every point is listed; what could not be measured says why.",
    "model": "Parameters that count tokens are scaled to the length; density is over all calls, a dense one counts 1.",
}


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Columns and rows of each suite that ran."""
    make = {
        "targets": _targets,
        "kernels": _kernels,
        "decode": _kernels,
        "patterns": _patterns,
        "layers": _layers,
        "model": _model,
        "memory": _memory,
        "mixed": _mixed,
        "auto": _auto,
    }
    return {name: made(result[name]) for name, made in make.items() if name in result}


def _kernels(records: list[dict[str, Any]]) -> Table:
    columns = ("shape", "contestant", "density", "median", "min..max", "rounds", "first call", "speed-up",
               "share of limit", "why not")  # fmt: skip
    rows = []
    for r in records:
        kind = "causal" if r["causal"] else "bidirectional"
        few = r["queries"] < r["tokens"]
        length = f"{r['queries']} of {r['tokens']}" if few else f"{r['tokens']}"
        rows.append(
            (
                f"{r['heads']} heads x {length} tokens x {r['dim']}, {r['dtype']}, block {r['block']}, "
                f"{kind}, {r['pass']}",
                r["contestant"],
                f"{r['achieved_density']:.4f}",
                *_times(r),
                _seconds(r.get("warmup_seconds")),
                _ratio(r.get("speedup")),
                _number(r.get("share_of_limit")),
                r["reason"] or "",
            )
        )
    return columns, rows


def _patterns(records: list[dict[str, Any]]) -> Table:
    columns = ("method", "tokens", "density", "build", "cached", "attention", "plan", "share", "with plan", "remark")
    rows = []
    for r in records:
        rows.append(
            (
                r["method"],
                str(r["tokens"]),
                _number(r.get("density"), 3),
                _seconds(r.get("first_build_seconds") if r["static"] else r.get("build", {}).get("median")),
                _seconds(r.get("cached_call_seconds")),
                _seconds(r.get("run", {}).get("median")),
                _seconds(r.get("plan_seconds")),
                _percent(r.get("share_of_attention")),
                _percent(r.get("share_with_plan")),
                r["reason"] or ("static" if r["static"] else "dynamic"),
            )
        )
    return columns, rows


def _model(records: list[dict[str, Any]]) -> Table:
    columns = ("model", "contestant", "median", "min..max", "rounds", "speed-up", "density", "remark")
    rows = []
    for r in records:
        remark = r["reason"] or "; ".join([*r.get("backends", ()), *r.get("dense_because", ())])
        rows.append(
            (
                _model_name(r),
                r["contestant"],
                *_times(r),
                _ratio(r.get("speedup")),
                _number(r.get("density"), 3),
                remark,
            )
        )
    return columns, rows


def _layers(records: list[dict[str, Any]]) -> Table:
    columns = ("model", "contestant", "median", "min..max", "rounds", "ratio", "spread", "sparse", "density",
               "predicted", "first call", "remark")  # fmt: skip
    rows = []
    for r in records:
        remark = r["reason"] or "; ".join([*r.get("backends", ()), *r.get("dense_because", ())])
        ratios = r.get("ratios")
        calls = r.get("sparse_calls", 0) + r.get("dense_calls", 0)
        rows.append(
            (
                _model_name(r),
                r["contestant"],
                *_times(r),
                _number(r.get("ratio"), 3),
                "-" if not ratios else f"{ratios[0]:.3f}..{ratios[-1]:.3f}",
                f"{r['sparse_calls']}/{calls}" if calls else "-",
                _number(r.get("density"), 3),
                _ratio(r.get("predicted_gain")),
                _seconds(r.get("warmup_seconds")),
                remark,
            )
        )
    return columns, rows


def _auto(records: list[dict[str, Any]]) -> Table:
    """One row per model and length: the ratio of each method."""
    names = list(dict.fromkeys(r["contestant"] for r in records if r.get("ratio") is not None))
    columns = ("model", "unpatched", *names)
    rows = []
    for point in dict.fromkeys(_model_name(r) for r in records):
        own = {r["contestant"]: r for r in records if _model_name(r) == point}
        cells = [point, _seconds(own.get(UNPATCHED, {}).get("median"))]
        for name in names:
            r = own.get(name, {})
            if r.get("ratio") is None:
                cells.append("-")
                continue
            last = "sparse" if r["sparse_last"] else "dense"
            missed = "" if r["within"] else " MISSED"
            cells.append(f"{r['ratio']:.3f} ({r['ratios'][0]:.2f}..{r['ratios'][-1]:.2f}) {last}{missed}")
        rows.append(tuple(cells))
    return columns, rows


def _memory(records: list[dict[str, Any]]) -> Table:
    columns = ("shape", "contestant", "density", "peak", "over inputs", "first run", "why not")
    rows = []
    for r in records:
        kind = "causal" if r["causal"] else "bidirectional"
        share = r["bytes"] / r["input_bytes"] if "bytes" in r else None
        rows.append(
            (
                f"{r['heads']} heads x {r['tokens']} tokens x {r['dim']}, {r['dtype']}, {kind}, {r['pass']}",
                r["contestant"],
                f"{r['density']:g}",
                _bytes(r.get("bytes")),
                _ratio(share),
                _bytes(r.get("first_bytes")),
                r["reason"] or "",
            )
        )
    return columns, rows


def _mixed(records: list[dict[str, Any]]) -> Table:
    columns = ("shape", "contestant", "density", "blocks", "pattern", "attention", "total", "of one", "why not")
    rows = []
    for r in records:
        shape = f"{r['heads']} heads x {r['tokens']} tokens x {r['dim']}, {r['dtype']}, causal"
        times = (_seconds(r.get(name, {}).get("median")) for name in ("pattern", "attention", "total"))
        block = "-" if "block" not in r else str(r["block"])
        cells = (_number(r.get("achieved_density"), 3), block, *times, _ratio(r.get("ratio")))
        rows.append((shape, r["contestant"], *cells, r["reason"] or ""))
    return columns, rows


def _targets(records: list[dict[str, Any]]) -> Table:
    columns = ("target", "point", "value", "wanted", "reached", "why not")
    said = {True: "yes", False: "NO", None: "not measured"}
    rows = [
        (r["target"], r["point"], _number(r["value"], 3), r["wanted"], said[r["reached"]], r["reason"] or "")
        for r in records
    ]
    return columns, rows


def _model_name(r: dict[str, Any]) -> str:
    return f"{r['model']}, {r['tokens']} tokens, {r['heads']} heads x {r['dim']}, {r['dtype']}"


def _bytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def _times(r: dict[str, Any]) -> tuple[str, str, str]:
    """Median, spread in one unit, and rounds."""
    if "median" not in r:
        return "-", "-", "-"
    factor, unit = (1.0, "s") if r["max"] >= 1 else (1e3, "ms")
    return _seconds(r["median"]), f"{r['min'] * factor:.3g}..{r['max'] * factor:.3g} {unit}", str(r["rounds"])


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.0f} µs"


def _number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.2f} %"
