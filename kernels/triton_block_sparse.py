"""Block-sparse attention in Triton over the whole BlockPattern: the backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.backend import KernelBackend
from hf_sparse_attn.kernels import triton_common
from hf_sparse_attn.kernels.triton_block_sparse_backward import gradients
from hf_sparse_attn.kernels.triton_block_sparse_rows import run_rows
from hf_sparse_attn.kernels.triton_common import on_device, runs_interpreted
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@BACKENDS.register("triton_block_sparse")
class TritonBlockSparse(KernelBackend):
    """Reads only the kept key blocks and columns, forward and backward; float16, bfloat16, float32; NVIDIA and ROCm.

    Orders are read by index and grouped heads share their keys: nothing is permuted, repeated or gathered in memory.
    The gradients of keys and values come from the transposed lists of blocks, each key summed by one program in one
    order: no atomics, and two runs are bit-equal. Programs start longest first: see `schedule`, which says why.
    Measured: equality with the reference in Triton's interpreter on the CPU, all features, and compilation down to
    machine code for several targets. Not measured: anything on a GPU, so neither speed, nor whether the rule of
    `choose_launch` is good; `triton_block_sparse_tune.tune` finds better launches where there is a GPU.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {"cuda": 10}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        return triton_common.why_not(pattern, q, k, v, False, _DTYPES) or triton_common.why_not_blocks(pattern)

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """See backend.KernelBackend. Accumulates in float32, float32 products without TF32; two runs are bit-equal."""
        out = q.new_empty(*q.shape[:3], v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.float32)
        if lse.numel():
            with on_device(q):
                run_rows(q, k, v, out, pattern, scale, softcap, lse=lse)
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        pattern: BlockPattern, scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See backend.KernelBackend. Sums in float32 and in one order: two runs are bit-equal."""
        return gradients(grad_out, grad_lse, q, k, v, out, lse, pattern, scale, softcap)

    @staticmethod
    def calibrate(device: torch.device) -> list[dict[str, Any]]:
        """Finds and keeps the fastest launches on a GPU, for `hf-sparse-attn bench --calibrate`; nothing on a CPU."""
        from hf_sparse_attn.kernels.triton_block_sparse_tune import tune

        return tune(device) if device.type == "cuda" and not runs_interpreted() else []
