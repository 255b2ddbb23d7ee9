"""The machine and the packages that something was measured with."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

from hf_sparse_attn.cost.table import cpu_name

_PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "diffusers",
    "peft",
    "accelerate",
    "safetensors",
    "matplotlib",
    "hf-sparse-attn",
)
# Triton comes under another name with some builds of torch.
_OTHER_NAMES = {"triton": ("pytorch-triton", "pytorch-triton-rocm", "triton-windows")}


def versions() -> dict[str, str | None]:
    """Installed version of each package that matters here; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = None
        for name in (package, *_OTHER_NAMES.get(package, ())):
            try:
                found[package] = metadata.version(name)
                break
            except metadata.PackageNotFoundError:
                continue
    # The build matters (cpu, cu130), and the package's metadata may leave it out.
    found["torch"] = str(torch.__version__)
    return found


def machine() -> dict[str, Any]:
    """The processor, the threads torch uses, and every accelerator with its capability and memory."""
    return {
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "devices": _accelerators(),
        "triton_interpreter": os.environ.get("TRITON_INTERPRET") == "1",
    }


def now() -> str:
    """Date and time, UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _accelerators() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        found.append(
            {
                "device": f"cuda:{i}",
                "kind": "CUDA" if torch.version.hip is None else "ROCm",
                "name": p.name,
                "capability": f"{p.major}.{p.minor}",
                "memory_gib": round(p.total_memory / 2**30, 1),
            }
        )
    if torch.backends.mps.is_available():
        found.append(
            {"device": "mps", "kind": "MPS", "name": platform.processor(), "capability": None, "memory_gib": None}
        )
    return found
