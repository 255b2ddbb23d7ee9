"""The benchmark: sparse against dense attention, all contestants of a point in one process and in turns."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch

from hf_sparse_attn import machine
from hf_sparse_attn.bench.generation import generation
from hf_sparse_attn.bench.gpu import gpu
from hf_sparse_attn.bench.kernels import kernels
from hf_sparse_attn.bench.layers import layers
from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.bench.patterns import patterns
from hf_sparse_attn.cost.timing import threads

VERSION = 2


def run(options: Options) -> dict[str, Any]:
    """Measures, and returns plain values ready for JSON.

    Returns:
        `version`, `date`, `machine`, `versions`, `options`, and lists of records: `kernels`, `patterns`, and of suite
        layers `layers` or, where the dispatcher chooses, `auto`; suite "decode" gives `generation`, suite "gpu"
        `kernels`, `decode`, `patterns` and `targets`. Times are in seconds. A timed contestant has `seconds` (all of
        them), `rounds`, `median`, `min`, `max`; every record has `reason`: None, or why it has no times.
    """
    suites = {"kernels": kernels, "patterns": patterns, "layers": layers, "decode": generation}
    keys = {"decode": "generation", **({"layers": "auto"} if options.min_tokens == "auto" else {})}
    with threads(options.threads), torch.no_grad():
        if options.suite == "gpu":
            records = gpu(options)
        else:
            chosen = ("kernels", "patterns", "layers") if options.suite == "quick" else (options.suite,)
            records = {keys.get(name, name): suites[name](options) for name in chosen}
        return {
            "version": VERSION,
            "date": machine.now(),
            "machine": machine.machine(),
            "versions": machine.versions(),
            "options": {**asdict(options), "device": str(options.where)},
            **records,
        }
