"""Measures which launch of the Triton kernels is the fastest on a GPU and keeps it; called explicitly."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from hf_sparse_attn.cost import tuning
from hf_sparse_attn.kernels import triton_block_sparse_parts as parts
from hf_sparse_attn.kernels.triton_common import Launch, padded
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

log = logging.getLogger(__name__)

# Milliseconds that a function takes.
Timer = Callable[[Callable[[], object]], float]


def tune(
    device: torch.device | str = "cuda",
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float16),
    dims: Iterable[int] = (64, 128),
    blocks: Iterable[tuple[int, int]] = ((128, 128), (64, 64)),
    *,
    tokens: int = 16384,
    heads: int = 8,
    density: float = 0.25,
    timer: Timer | None = None,
    limits: parts.Limits | None = None,
    name: str | None = None,
) -> list[dict[str, Any]]:
    """Times every candidate launch of every kernel and stores the best per shape class.

    Args:
        device: a GPU.
        dtypes, dims, blocks: shape classes; a block is (block_q, block_k).
        tokens, heads, density: the problem timed: enough programs to fill a GPU, whole and masked blocks.
        timer: in place of `triton.testing.do_bench`'s median.
        limits, name: in place of those of `device`.

    Returns:
        one record per kernel and shape class: kernel, shape, launch, milliseconds, and `tried`, the milliseconds of
        each launch as text, None for one the device has no room for.
    """
    device = torch.device(device)
    limits = limits or parts.limits_of(device)
    name = name or torch.cuda.get_device_name(device)
    timer = timer or _median
    records = []
    for dtype in dtypes:
        for dim in dims:
            for block_q, block_k in blocks:
                draw = torch.Generator().manual_seed(0)
                rows, columns = -(-tokens // block_q), -(-tokens // block_k)
                # A causal pattern: some of its blocks are partial, and its rows differ in length.
                keep = torch.rand(1, heads, rows, columns, generator=draw) < density
                keep |= torch.eye(rows, columns, dtype=torch.bool)
                pattern = BlockPattern.from_block_map(keep, block_q, block_k, tokens, tokens, causal=True).to(device)
                tensors = [torch.randn(1, heads, tokens, dim, generator=draw).to(device, dtype) for _ in range(4)]
                records += _tune_one(tensors, pattern, limits, name, timer)
    parts.forget_launches()
    return records


def _tune_one(
    tensors: Sequence[torch.Tensor], pattern: BlockPattern, limits: parts.Limits, name: str, timer: Timer
) -> list[dict[str, Any]]:
    q, k, v, grad = tensors
    dim = padded(q.shape[3])
    shape = parts.shape_class(q.dtype, dim, dim, pattern.block_q, pattern.block_k)
    scale = q.shape[3] ** -0.5
    # By its name: the backend itself calls this.
    backend: Any = BACKENDS.get("triton_block_sparse")
    out, lse = backend.forward(q, k, v, pattern, scale, 0.0)

    def forward() -> object:
        return backend.forward(q, k, v, pattern, scale, 0.0)

    def backward() -> object:
        return backend.backward(grad, None, q, k, v, out, lse, pattern, scale, 0.0)

    records = []
    for kernel in parts.KERNELS:
        tried: dict[Launch, float | None] = {}
        # The two kernels of the backward are timed together: one of them changes, the other stays as it is.
        run = forward if kernel == "forward" else backward
        for launch in parts.candidates(kernel, pattern.block_q, pattern.block_k, dim, dim, q.element_size(), limits):
            try:
                with parts.forced(kernel, launch):
                    run()
                    tried[launch] = timer(run)
            except OutOfResources as error:
                log.info("%s: no room for %s: %s", kernel, launch, error)
                tried[launch] = None
        timed = {launch: time for launch, time in tried.items() if time is not None}
        if not timed:
            log.warning("%s: no candidate runs on %s for %s; nothing is stored", kernel, name, shape)
            continue
        best = min(timed, key=lambda launch: timed[launch])
        tuning.store(name, parts.software(), kernel, shape, best._asdict(), timed[best])
        texts = {"/".join(map(str, launch)): time for launch, time in tried.items()}
        records.append(
            {"kernel": kernel, "shape": shape, "launch": best._asdict(), "milliseconds": timed[best], "tried": texts}
        )
    return records


def _median(run: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return float(do_bench(run, return_mode="median"))
