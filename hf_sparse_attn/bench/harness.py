"""The benchmark: sparse against dense attention, all contestants of a point in one process and in turns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from hf_sparse_attn import machine
from hf_sparse_attn.bench.options import Options

VERSION = 2
# What "quick" runs a little of.
_QUICK = ("kernels", "patterns", "model")


def run(options: Options) -> dict[str, Any]:
    """Measures, and returns plain values ready for JSON.

    Returns:
        `version`, `date`, `machine`, `versions`, `options`, and a list of records per suite that ran, named as in
        SUITES; suite "gpu" also gives `targets`. Times are in seconds. A timed contestant has `seconds` (all of them),
        `rounds`, `median`, `min`, `max`; every record has `reason`: None, or why it has no times.
    """
    from hf_sparse_attn.bench import gpu as bench_gpu
    from hf_sparse_attn.bench import kernels as bench_kernels
    from hf_sparse_attn.bench import memory as bench_memory
    from hf_sparse_attn.bench import mixed as bench_mixed
    from hf_sparse_attn.bench import models as bench_models
    from hf_sparse_attn.bench import patterns as bench_patterns

    before = torch.get_num_threads()
    torch.set_num_threads(before if options.threads is None else options.threads)
    suites: dict[str, Callable[[Options], list[dict[str, Any]]]] = {
        "kernels": bench_kernels.kernels,
        "patterns": bench_patterns.patterns,
        "layers": bench_models.layers,
        "model": bench_models.model,
        "memory": bench_memory.memory,
        "mixed": bench_mixed.mixed,
        "auto": bench_models.auto,
    }
    try:
        result = {
            "version": VERSION,
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "options": {**asdict(options), "device": str(options.where)},
        }
        with torch.no_grad():
            if options.suite == "gpu":
                result.update(bench_gpu.gpu(options))
            for name, suite in suites.items():
                if options.suite == name or (options.suite == "quick" and name in _QUICK):
                    result[name] = suite(options)
    finally:
        torch.set_num_threads(before)
    return result
