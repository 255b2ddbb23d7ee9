"""What Triton kernels share: loads, the online softmax, soft caps, why a device or a call does not suit them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_sparse_attn.pattern.block_pattern import BlockPattern

LOG2E = 1.4426950408889634
MAX_DIM = 256
# Triton supports NVIDIA GPUs from this compute capability on.
_MIN_CAPABILITY = (8, 0)
# Shared memory that every supported GPU has (ROCm's 64 KiB is the least).
_LEAST_SHARED = 64 * 1024


def runs_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (decided by Triton when their file was imported)."""
    return not isinstance(load_tokens, triton.JITFunction)


# The kernels' functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@triton.jit  # type: ignore[untyped-decorator]
def load_tokens(  # type: ignore[no-untyped-def]
    base, token, valid, stride_token, stride_dim, SIZE: tl.constexpr, PAD: tl.constexpr
):
    """Rows `token` of a [tokens, SIZE] matrix as [n, PAD]; zeros where not valid and beyond SIZE."""
    lane = tl.arange(0, PAD)
    # A head of a long cache passes 2**31 elements: token offsets are 64 bit.
    where = base + token.to(tl.int64)[:, None] * stride_token + lane[None, :] * stride_dim
    mask = valid[:, None]
    if SIZE != PAD:
        mask = mask & (lane < SIZE)[None, :]
    return tl.load(where, mask=mask, other=0.0)


@triton.jit
def accumulate(out, peak, total, logits, values):  # type: ignore[no-untyped-def]
    """One step of the online softmax in base 2."""
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    # While a query has seen no key its peak is -inf: 0 in its place gives weights 0, not NaN.
    shift = tl.where(new_peak == -float("inf"), 0.0, new_peak)
    weight = tl.exp2(logits - shift[:, None])
    decay = tl.exp2(peak - shift)
    total = total * decay + tl.sum(weight, 1)
    out = tl.dot(weight.to(values.dtype), values, out * decay[:, None], input_precision="ieee")
    return out, new_peak, total


@triton.jit
def cap_logits(logits, cap):  # type: ignore[no-untyped-def]
    """cap * tanh(logits / cap), for logits and cap in the same unit (both times log2(e), here)."""
    x = logits / cap
    small = x * x
    # Near 0 the quotient below cancels: the series is exact to float32 up to 1/4.
    series = x * (1 + small * (-1 / 3 + small * (2 / 15 + small * (-17 / 315 + small * (62 / 2835)))))
    decay = tl.exp2(tl.abs(x) * -2.8853900817779268)
    tail = (1 - decay) / (1 + decay)
    return cap * tl.where(tl.abs(x) < 0.25, series, tl.where(x < 0, -tail, tail))


def why_not(
    pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, dtypes: Sequence[torch.dtype]
) -> str | None:
    """Why a kernel for `dtypes` and dims up to MAX_DIM cannot run the call, or None.

    `needs_grad` is refused: a kernel with a backward asks with False.
    """
    if q.device.type != "cuda" and not (runs_interpreted() and q.device.type == "cpu"):
        where = f"the tensors are on {q.device}"
        return f"needs a CUDA or ROCm GPU, {where}; on the CPU only Triton's interpreter can run it"
    if q.device.type == "cuda" and torch.version.hip is None and not runs_interpreted():
        capability = torch.cuda.get_device_capability(q.device)
        if capability < _MIN_CAPABILITY:
            return f"needs compute capability 8.0 or more, {q.device} has {capability[0]}.{capability[1]}"
    if needs_grad:
        return "it is forward only, and a gradient is needed"
    if q.dtype not in dtypes:
        *most, last = (str(dtype).removeprefix("torch.") for dtype in dtypes)
        return f"needs {', '.join(most)} or {last}, got {str(q.dtype).removeprefix('torch.')}"
    for name, size in (("dim", q.shape[3]), ("value dim", v.shape[3])):
        if not 1 <= size <= MAX_DIM:
            return f"needs a {name} from 1 to {MAX_DIM}, got {size}"
    for name, device in (("k", k.device), ("v", v.device), ("pattern", pattern.device if pattern else q.device)):
        if device != q.device:
            return f"needs `{name}` on {q.device} like `q`, it is on {device}"
    return None


def rows_dense(t: Tensor) -> Tensor:
    """The tensor with its last dimension dense in memory; leading sizes that are only repeated stay so."""
    return t if t.stride(-1) == 1 else t.contiguous()


def lead_strides(t: Tensor | None) -> list[int]:
    """Strides over batch and heads; a size of 1 stands for all and gets stride 0, as does an absent tensor."""
    return [0, 0] if t is None else [t.stride(i) if t.shape[i] > 1 else 0 for i in (0, 1)]


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory that one program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0)) or _LEAST_SHARED
    return int(properties.multi_processor_count), shared
