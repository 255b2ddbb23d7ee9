"""Options of the benchmark, checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.api import check_device, default_device
from hf_sparse_attn.context import check_int
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.selection import check_block_size, check_share

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


# What each suite measures when nothing else is asked for; what is not named here has the default of Options.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "kernels": {},
    "patterns": {},
    "layers": {"tokens": (4096,), "dims": (64,), "dtypes": ("float32",)},
    "gpu": {
        "tokens": (32768, 65536, 131072),
        "dims": (128, 64),
        "dtypes": ("bfloat16",),
        "repeats": 7,
        "seconds": 5.0,
        "heads": 16,
    },
    "decode": {"tokens": (2048, 8192, 16384), "densities": (0.25, 0.125), "threads": 1},
    # A little of the first three.
    "quick": {"tokens": (4096,), "dims": (64,), "dtypes": ("float32",), "densities": (0.125,), "repeats": 3},
}
SUITES = tuple(_DEFAULTS)
# Suites of before, and what measures the same now.
_FORMER = {
    "model": "--suite layers",
    "auto": "--suite layers --min-tokens auto",
    "memory": "--suite kernels",
    "mixed": "--suite kernels",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; see `hf-sparse-attn bench --help`.

    Args:
        suite: one of SUITES.
        tokens: sequence lengths.
        dims: head sizes; the suites patterns and layers take the first.
        dtypes: names of dtypes; the suites patterns and layers take the first.
        densities: kept share of the visible pairs of tokens, in (0, 1].
        heads: number of heads.
        block: tokens in a block, a power of two from 16 to 256.
        causal: whether the kernels run under a causal mask.
        backward: whether the kernels are timed with their backward pass.
        backends: names, or None for all but the reference.
        min_tokens: of the patches of suite layers; "auto" has the dispatcher choose, and methods keep their defaults.
        repeats: rounds over the contestants of a point.
        seconds: time after which a point gets no further round once it has two.
        threads: CPU threads, or None for what torch chose.
        device: where to run, or None for CUDA where there is one, else the CPU.
        model: of suite decode, a folder or Hub id of a model of text; None means SmolLM2 where its package is
            installed, else a tiny one.
        gguf: of suite decode, a GGUF file of the same model, for OpenVINO GenAI and llama.cpp.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type.
    """

    suite: str = "kernels"
    tokens: tuple[int, ...] = (8192, 32768)
    dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    densities: tuple[float, ...] = (0.0625, 0.125, 0.25)
    heads: int = 8
    block: int = 128
    causal: bool = False
    backward: bool = False
    backends: tuple[str, ...] | None = None
    min_tokens: int | str = 0
    repeats: int = 5
    seconds: float = 60.0
    threads: int | None = None
    device: str | None = None
    model: str | None = None
    gguf: str | None = None

    def __post_init__(self) -> None:
        _check_suite(self.suite)
        Policy(min_tokens=self.min_tokens)
        for name in ("tokens", "dims", "dtypes", "densities"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must hold at least one value, got none")
        for tokens in self.tokens:
            check_int("tokens", tokens, 16)
        for dim in self.dims:
            check_int("dims", dim, 1)
        for dtype in self.dtypes:
            _check_one_of("dtypes", dtype, tuple(DTYPES))
        for density in self.densities:
            check_share("densities", density)
        check_int("heads", self.heads, 1)
        check_block_size(self.block, "block")
        check_int("repeats", self.repeats, 1)
        if not self.seconds > 0:
            raise ValueError(f"`seconds` must be more than 0, got {self.seconds}")
        if self.threads is not None:
            check_int("threads", self.threads, 1)
        for name in self.backends or ():
            if name not in BACKENDS.missing:
                BACKENDS.get(name)
        check_device(self.device)
        if self.gguf is not None and not Path(self.gguf).is_file():
            raise ValueError(f"`gguf` must be a file, got {self.gguf!r}")
        for name in ("model", "gguf"):
            if getattr(self, name) is not None and self.suite != "decode":
                raise ValueError(f"`{name}` must be left out of suite {self.suite}, got {getattr(self, name)!r}")
        if self.suite == "gpu" and self.device is None and self.where.type != "cuda":
            raise ValueError(
                "`suite` 'gpu' needs a CUDA device, none was found; --device cpu --tokens 256 tries it out"
            )

    @property
    def where(self) -> torch.device:
        """The device to run on."""
        return default_device() if self.device is None else torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The first dtype."""
        return DTYPES[self.dtypes[0]]


def make_options(**given: Any) -> Options:
    """Options with the defaults of their suite."""
    suite = given.get("suite", "quick")
    _check_suite(suite)
    return Options(**{"suite": suite, **_DEFAULTS[suite], **given})


def _check_suite(name: str) -> None:
    if name in _FORMER:
        raise ValueError(f"`suite` {name!r} is measured by another one now: {_FORMER[name]}")
    _check_one_of("suite", name, SUITES)


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}{nearest(value, known)}")
