"""The tables of a benchmark run: columns and rows of each suite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hf_sparse_attn.bench.layers import UNPATCHED
from hf_sparse_attn.tables import Table

Record = dict[str, Any]

TITLES = {
    "targets": "What is promised of a GPU",
    "kernels": "Kernels: one attention call on random block patterns, against dense attention",
    "decode": "Decoding: one query, random key blocks",
    "patterns": "Patterns: building them, beside the sparse attention that they lead to",
    "layers": "Attention layers with their projections, forced to be sparse, against the same layer unpatched",
    "generation": "Steps of generated text: the model by itself, exact, and sparse",
    "auto": "Attention layers where the dispatcher chooses: patched over unpatched time",
}
NOTES = {
    "kernels": "Median of the rounds with the fastest and the slowest; speed-up over the best dense contestant; the "
    "limit is 1 / achieved density. First call: compiling and planning included, not part of the median.",
    "patterns": "Share: time per call over the attention time (cached call for static methods, build for dynamic "
    "ones); with plan: what the kernel prepares once per new pattern counted as well.",
    "decode": "As for the kernels.",
    "layers": "Ratio: median over the rounds of patched over unpatched time in the same round, with the spread, and "
    "that of the whole model; parameters that count tokens are scaled to the length; density is over all calls, a "
    "dense one counts 1.",
    "generation": "Seconds of one token of one text after a prompt of so many. Ratio: median over the rounds of the "
    "time of a step over that of transformers in the same round, with the spread; on one thread of a CPU the time of "
    "the process.",
    "auto": "Median over the rounds of patched over unpatched time in the same round (lowest..highest), and what "
    "the dispatcher chose; every method with its defaults. MISSED: above 1.02.",
    "targets": "Every point is listed; what could not be measured says why.",
}


def tables(result: dict[str, Any]) -> dict[str, Table]:
    """Columns and rows of each suite that ran."""
    return {name: _table(name, result[name]) for name in TITLES if name in result}


def _table(name: str, records: list[Record]) -> Table:
    if name == "auto":
        return _auto(records)
    columns = _COLUMNS[name]
    # Results of before have no figures of memory.
    shown = [title for title in columns if title != "peak" or any("bytes" in r for r in records)]
    return shown, [[columns[title](r) for title in shown] for r in records]


def _auto(records: list[Record]) -> Table:
    """One row per model and length: the ratio of each method."""
    names = list(dict.fromkeys(r["contestant"] for r in records if r.get("ratio") is not None))
    rows = []
    for point in dict.fromkeys(map(_model, records)):
        own = {r["contestant"]: r for r in records if _model(r) == point}
        cells = [_choice(own.get(name, {})) for name in names]
        rows.append([point, _seconds(own.get(UNPATCHED, {}).get("median")), *cells])
    return ["model", "unpatched", *names], rows


def _choice(r: Record) -> str:
    if r.get("ratio") is None:
        return "-"
    last, missed = "sparse" if r["sparse_last"] else "dense", "" if r["within"] else " MISSED"
    return f"{r['ratio']:.3f} ({r['ratios'][0]:.2f}..{r['ratios'][-1]:.2f}) {last}{missed}"


def _shape(r: Record) -> str:
    kind = "causal" if r["causal"] else "bidirectional"
    length = f"{r['queries']} of {r['tokens']}" if r["queries"] < r["tokens"] else f"{r['tokens']}"
    return f"{r['heads']} heads x {length} tokens x {r['dim']}, {r['dtype']}, block {r['block']}, {kind}, {r['pass']}"


def _model(r: Record) -> str:
    return f"{r['model']}, {r['tokens']} tokens, {r['heads']} heads x {r['dim']}, {r['dtype']}"


def _sparse(r: Record) -> str:
    calls = r.get("sparse_calls", 0) + r.get("dense_calls", 0)
    return f"{r['sparse_calls']}/{calls}" if calls else "-"


def _remark(r: Record) -> str:
    return r["reason"] or "; ".join([*r.get("backends", ()), *r.get("dense_because", ())])


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


def _range(r: Record) -> str:
    """Fastest and slowest, in one unit."""
    if "median" not in r:
        return "-"
    factor, unit = (1.0, "s") if r["max"] >= 1 else (1e3, "ms")
    return f"{r['min'] * factor:.3g}..{r['max'] * factor:.3g} {unit}"


def _spread(r: Record) -> str:
    return f"{r['ratios'][0]:.3f}..{r['ratios'][-1]:.3f}" if r.get("ratios") else "-"


_TIMES: dict[str, Callable[[Record], str]] = {
    "median": lambda r: _seconds(r.get("median")),
    "min..max": _range,
    "rounds": lambda r: str(r.get("rounds", "-")),
}
_KERNELS: dict[str, Callable[[Record], str]] = {
    "shape": _shape,
    "contestant": lambda r: r["contestant"],
    "density": lambda r: f"{r['achieved_density']:.4f}",
    **_TIMES,
    "first call": lambda r: _seconds(r.get("warmup_seconds")),
    "speed-up": lambda r: _ratio(r.get("speedup")),
    "share of limit": lambda r: _number(r.get("share_of_limit")),
    "peak": lambda r: f"{r['bytes'] / 2**20:.1f} MiB" if "bytes" in r else "-",
    "why not": lambda r: r["reason"] or "",
}
_COLUMNS: dict[str, dict[str, Callable[[Record], str]]] = {
    "kernels": _KERNELS,
    "decode": _KERNELS,
    "patterns": {
        "method": lambda r: r["method"],
        "tokens": lambda r: str(r["tokens"]),
        "density": lambda r: _number(r.get("density"), 3),
        "build": lambda r: _seconds(r.get("first_build_seconds") if r["static"] else r.get("build", {}).get("median")),
        "cached": lambda r: _seconds(r.get("cached_call_seconds")),
        "attention": lambda r: _seconds(r.get("run", {}).get("median")),
        "plan": lambda r: _seconds(r.get("plan_seconds")),
        "share": lambda r: _percent(r.get("share_of_attention")),
        "with plan": lambda r: _percent(r.get("share_with_plan")),
        "remark": lambda r: r["reason"] or ("static" if r["static"] else "dynamic"),
    },
    "layers": {
        "model": _model,
        "contestant": lambda r: r["contestant"],
        **_TIMES,
        "ratio": lambda r: _number(r.get("ratio"), 3),
        "spread": _spread,
        "whole model": lambda r: _number(r.get("forward_ratio"), 3),
        "sparse": _sparse,
        "density": lambda r: _number(r.get("density"), 3),
        "predicted": lambda r: _ratio(r.get("predicted_gain")),
        "first call": lambda r: _seconds(r.get("warmup_seconds")),
        "remark": _remark,
    },
    "generation": {
        "model": lambda r: f"{r['model']}, {r['tokens']} tokens, {r['dtype']}",
        "contestant": lambda r: r["contestant"],
        **_TIMES,
        "ratio": lambda r: _number(r.get("ratio"), 3),
        "spread": _spread,
        "density": lambda r: _number(r.get("density"), 3),
        "remark": lambda r: "; ".join(filter(None, [r.get("file"), _remark(r)])),
    },
    "targets": {
        "target": lambda r: r["target"],
        "point": lambda r: r["point"],
        "value": lambda r: _number(r["value"], 3),
        "wanted": lambda r: r["wanted"],
        "reached": lambda r: {True: "yes", False: "NO", None: "not measured"}[r["reached"]],
        "why not": lambda r: r["reason"] or "",
    },
}
