"""Block-sparse attention on CPUs in C++, forward and backward, compiled on first use for the machine it runs on.

The kernel multiplies keys and values straight from where they lie: nothing is gathered or planned, so that a pattern
costs the same the first time, unaligned blocks and single columns cost no more than aligned blocks, and a row is as
long as it is. See cpp_block_sparse.cpp for how.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.backend import KernelBackend
from hf_sparse_attn.cost.table import cpu_features
from hf_sparse_attn.kernels import cpp_block_sparse_build as build
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.registry import BACKENDS

# Queries whose bits of a tile stand in one word.
_PANEL = 64
# Numbers that gradients of keys and values are padded to a multiple of: the longest vector holds 16.
_LANES = 16
# Gradients of keys are summed in this many places at a time, or one per head of keys where there are more. The number
# is fixed so that results do not depend on the threads.
_PLACES = 16


# What the kernel reads of a pattern, in the types of BlockPattern.
_PARTS = {
    **dict.fromkeys(("indptr", "column_indptr", "q_order", "kv_order"), torch.int64),
    **dict.fromkeys(("starts", "tile_ids", "columns", "kv_range"), torch.int32),
}


class _Tensor4(ctypes.Structure):
    _fields_: ClassVar = [("data", ctypes.c_void_p), *((n, ctypes.c_int64) for n in ("batch", "head", "token"))]


_TENSORS = ("q", "k", "v", "out", "grad_out", "grad_q")
_POINTERS = (
    "lse", "shift", "grad_k", "grad_v", "indptr", "column_indptr", "q_order", "kv_order", "starts", "tile_ids",
    "columns", "kv_range", "tiles",
)  # fmt: skip
_SIZES = (
    "threads", "splits", "batch", "heads", "kv_heads", "q_len", "kv_len", "dim", "value_dim", "dim_pad",
    "value_dim_pad", "block_q", "block_k", "rows", "blocks_batch", "blocks_heads", "columns_batch", "columns_heads",
    "q_order_batch", "q_order_heads", "kv_order_batch", "kv_order_heads", "kv_range_batch",
)  # fmt: skip


class _Call(ctypes.Structure):
    """Call of cpp_block_sparse_items.h."""

    _fields_: ClassVar = [
        *((name, _Tensor4) for name in _TENSORS),
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _SIZES),
        ("scale", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


@BACKENDS.register("cpp_block_sparse")
class CppBlockSparse(KernelBackend):
    """A C++ kernel for the CPU, forward and backward, float16 to float64; compiled in seconds on first use."""

    auto_rank: ClassVar[Mapping[str, int]] = {"cpu": 5}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend. Compiles what a call with this pattern needs; without a pattern nothing."""
        if q.device.type != "cpu":
            return f"needs a CPU, the tensors are on {q.device}"
        return _why_not(q.dtype, pattern is not None, needs_grad)

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """See backend.KernelBackend."""
        batch, heads, queries, _ = q.shape
        if q.stride(1) < q.stride(2):
            # Heads of a token beside one another like the queries', as a model wants it back.
            out = q.new_empty(batch, queries, heads, v.shape[3]).transpose(1, 2)
        else:
            out = q.new_empty(batch, heads, queries, v.shape[3])
        lse = q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))
        _run(q, k, v, pattern, scale, softcap, {"out": out, "lse": lse})
        return out, lse

    @staticmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        pattern: BlockPattern, scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See backend.KernelBackend."""
        compute = lse.dtype
        # d(logit) = weight * (d(weight) - sum(grad_out * out) + grad_lse).
        shift = (grad_out.to(compute) * out.to(compute)).sum(-1)
        if grad_lse is not None:
            shift = shift - grad_lse.to(compute)
        splits = max(1, min(pattern.rows, _PLACES // (k.shape[0] * k.shape[1])))
        # Every split of the rows adds to gradients of its own: in an order that is always the same.
        dk, dv = (torch.zeros(splits, *x.shape[:3], -(-x.shape[3] // _LANES) * _LANES, dtype=compute) for x in (k, v))
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        _run(
            q, k, v, pattern, scale, softcap,
            {"grad_out": grad_out, "grad_q": dq, "lse": lse, "shift": shift, "grad_k": dk, "grad_v": dv},
        )  # fmt: skip
        dk, dv = (x[0] if splits == 1 else x.sum(0) for x in (dk, dv))
        return dq, (dk[..., : k.shape[3]] * scale).to(k.dtype), dv[..., : v.shape[3]].to(v.dtype)


# While torch.compile traces a call the answer is a constant, whatever it takes to find it. (Torch leaves it untyped.)
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _why_not(dtype: torch.dtype, compiling: bool, needs_grad: bool) -> str | None:
    reason = build.why_not(dtype)
    if reason is None and needs_grad and dtype == torch.bfloat16 and "amx_bf16" in cpu_features():
        return "this CPU multiplies bfloat16 in tiles (AMX): PyTorch's operators use them, this backward does not"
    if reason is None and compiling:
        try:
            for kernel in ("forward", "backward")[: 1 + needs_grad]:
                build.library(dtype, kernel)
        except build.CannotBuild as error:
            return str(error)
    return reason


def _run(
    q: Tensor, k: Tensor, v: Tensor, p: BlockPattern, scale: float, softcap: float, tensors: dict[str, Tensor]
) -> None:
    """Fills the results among `tensors`; the rest of them is read."""
    library = build.library(q.dtype, "backward" if "grad_q" in tensors else "forward")
    call = _Call()
    if library.hsa_call_bytes() != ctypes.sizeof(call):
        raise RuntimeError(f"`_Call` must have {library.hsa_call_bytes()} bytes, got {ctypes.sizeof(call)}")
    # What the kernel reads must live until it returns.
    held: list[Tensor] = []

    def hold(x: Tensor) -> int:
        held.append(x)
        return x.data_ptr()

    for name, x in {"q": q, "k": k, "v": v, **tensors}.items():
        if name in _TENSORS:
            x = x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()
            setattr(call, name, _Tensor4(hold(x), *x.stride()[:3]))
        else:
            setattr(call, name, hold(x.contiguous()))
    parts = {"blocks": p.indptr, "columns": p.column_indptr, "q_order": p.q_order, "kv_order": p.kv_order}
    for name, part in parts.items():
        if part is not None:
            setattr(call, f"{name}_batch", part.shape[0])
            setattr(call, f"{name}_heads", part.shape[1])
    if p.kv_range is not None:
        call.kv_range_batch = p.kv_range.shape[0]
    call.tiles = hold(_tile_words(p, library))
    for name, dtype in _PARTS.items():
        part = getattr(p, name)
        if part is not None:
            # A pattern that was never validated must not be read as what it is not.
            setattr(call, name, hold(part.to(dtype).contiguous()))
    call.threads = torch.get_num_threads()
    call.batch, call.heads, call.q_len, call.dim = q.shape
    call.kv_heads, call.kv_len, call.value_dim = v.shape[1:]
    call.block_q, call.block_k, call.rows = p.block_q, p.block_k, p.rows
    call.scale, call.softcap = scale, softcap
    if "grad_k" in tensors:
        call.splits, call.dim_pad = len(tensors["grad_k"]), tensors["grad_k"].shape[4]
        call.value_dim_pad = tensors["grad_v"].shape[4]
    if library.hsa_run(ctypes.byref(call)):
        raise MemoryError("cpp_block_sparse found no memory for its scratch space")


def _tile_words(p: BlockPattern, library: ctypes.CDLL) -> Tensor:
    """The tiles as the kernel reads them, int64 [tiles, panels of a row, block_k]: a bit for each query."""

    def make() -> Tensor:
        words = torch.empty(len(p.tiles), -(-p.block_q // _PANEL), p.block_k, dtype=torch.int64)
        # Tile 0 keeps everything and is not looked up.
        if len(p.tiles) > 1:
            tiles = p.tiles.contiguous()
            sizes = (ctypes.c_int64(n) for n in tiles.shape)
            library.hsa_tile_words(ctypes.c_void_p(tiles.data_ptr()), *sizes, ctypes.c_void_p(words.data_ptr()))
        return words

    return derived(p, ("cpp", "tiles"), make)
