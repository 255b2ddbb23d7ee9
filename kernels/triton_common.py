"""What Triton kernels share: loads, the online softmax, soft caps, arguments, why a device or a call does not suit."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

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
# Arguments whose value must not compile a kernel anew: lengths, and strides that follow from lengths alone.
LENGTHS = (
    "batch_size", "heads", "kv_heads", "group", "rows", "strips", "splits", "spots", "chunks", "block_q", "q_len",
    "kv_len", "read_rows", "tiles_of_keys", "merged", "repeats", "offset", "indptr_batch", "indptr_head",
    "column_batch", "column_head", "lead_batch", "lead_head", "q_order_batch", "q_order_head", "kv_order_batch",
    "kv_order_head", "range_batch", "lists", "page_count", "spare", "s_batch", "s_head", "s_token",
)  # fmt: skip


class Launch(NamedTuple):
    """How one program of a kernel is cut and run: queries and keys at a time, warps, pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


def runs_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter (decided by Triton when their file was imported)."""
    return not isinstance(load_tokens, triton.JITFunction)


def jit(function: Any) -> Any:
    """triton.jit that never specialises on a length: one that is a multiple of 16, or 1, is no other kernel."""
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    return triton.jit(do_not_specialize=[n for n in names if n in LENGTHS])(function)


# The kernels' functions are not typed (type: ignore below): their arguments are values of Triton, not of Python.


@triton.jit  # type: ignore[untyped-decorator]
def load_tokens(  # type: ignore[no-untyped-def]
    base, first, token, valid, stride_token, stride_dim,
    SIZE: tl.constexpr, PAD: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Rows `first + token` of a [tokens, SIZE] matrix as [n, PAD]; zeros beyond SIZE and, if MASKED, where not valid.

    `first` is one place for all rows, so that the offsets of consecutive tokens are the same at every step of a loop;
    they are 32 bit unless WIDE: a head of a long video passes 2**31 elements, a block seldom.
    """
    lane = tl.arange(0, PAD)
    offset = token[:, None].to(tl.int64) * stride_token if WIDE else token[:, None] * stride_token
    where = base + first.to(tl.int64) * stride_token + (offset + lane[None, :] * stride_dim)
    if MASKED and SIZE != PAD:
        x = tl.load(where, mask=valid[:, None] & (lane < SIZE)[None, :], other=0.0)
    elif MASKED:
        x = tl.load(where, mask=valid[:, None], other=0.0)
    elif SIZE != PAD:
        x = tl.load(where, mask=(lane < SIZE)[None, :], other=0.0)
    else:
        x = tl.load(where)
    # Triton's interpreter multiplies the raw bits of bfloat16 in tl.dot.
    if UPCAST:
        x = x.to(tl.float32)
    return x


@triton.jit  # type: ignore[untyped-decorator]
def tokens_at(order, place, valid, HAS_ORDER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Tokens at places of an order, or the places themselves."""
    token = place
    if HAS_ORDER:
        token = tl.load(order + place, mask=valid, other=0)
    return token


@triton.jit  # type: ignore[untyped-decorator]
def valid_range(kv_range, batch, range_batch, kv_len, HAS_RANGE: tl.constexpr):  # type: ignore[no-untyped-def]
    """First and last + 1 of the valid key tokens of a batch item."""
    low = 0
    high = kv_len
    if HAS_RANGE:
        low = tl.load(kv_range + batch * range_batch)
        high = tl.load(kv_range + batch * range_batch + 1)
    return low, high


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


@triton.jit  # type: ignore[untyped-decorator]
def store_split(  # type: ignore[no-untyped-def]
    out, lse, result, peak, total, spot, exists, VALUE_DIM: tl.constexpr, VALUE_PAD: tl.constexpr, SPLIT: tl.constexpr
):
    """Stores what `accumulate` came to at the spots of its queries; the log-sum-exp of a split is in base 2."""
    # A query without a key has total 0 and peak -inf: output 0 / 1, log-sum-exp -inf + 0.
    total = tl.where(total == 0.0, 1.0, total)
    unit_of_lse = 1.0
    if not SPLIT:
        unit_of_lse = 0.6931471805599453
    value_lane = tl.arange(0, VALUE_PAD)
    to = out + (spot * VALUE_DIM)[:, None] + value_lane[None, :]
    stored = exists[:, None] & (value_lane < VALUE_DIM)[None, :]
    tl.store(to, (result / total[:, None]).to(out.dtype.element_ty), mask=stored)
    tl.store(lse + spot, (peak + tl.log2(total)) * unit_of_lse, mask=exists)


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    """To a few roundings everywhere; triton.language has none that the interpreter and all targets run."""
    y = x * x
    # (tanh(x) / x - 1) / x**2, fitted for |x| <= 0.625, where 1 - 2 / (e**2x + 1) would cancel.
    near = 0.021003641590235923 - 0.006104948430300937 * y
    near = 0.13332782265185966 + y * (-0.05385249757731087 + y * near)
    near = x + x * y * (-0.3333332909965273 + y * near)
    # e**2x may overflow to infinity: 1 - 2 / inf is 1, as it should be.
    far = 1.0 - 2.0 / (tl.exp2(x * 2.8853900817779268) + 1.0)
    return tl.where(tl.abs(x) < 0.625, near, far)


@triton.jit  # type: ignore[untyped-decorator]
def logits_of(a, b, factor, cap, HAS_CAP: tl.constexpr):  # type: ignore[no-untyped-def]
    """Logits in base 2 of the rows of `a` and of `b`, and tanh where they are capped (else the logits again).

    Without a cap `factor` is scale * log2(e); with one it is scale / softcap, and `cap` is softcap * log2(e).
    """
    x = tl.dot(a, tl.trans(b), input_precision="ieee") * factor
    bounded = x
    if HAS_CAP:
        bounded = tanh(x)
        x = bounded * cap
    return x, bounded


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


def padded(size: int) -> int:
    """A head dim as the kernels hold it."""
    return max(16, int(triton.next_power_of_2(size)))


def on_device(x: Tensor) -> Any:
    """Triton launches on the current device, which need not be that of the tensors."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def why_not_blocks(pattern: BlockPattern | None) -> str | None:
    """Why a kernel that cuts blocks in pieces cannot take those of a pattern, or None."""
    for name in ("block_q", "block_k") if pattern is not None else ():
        size = getattr(pattern, name)
        if size < 16 or size & (size - 1):
            return f"needs `{name}` to be a power of two from 16 on, got {size}"
    return None


def rows_dense(t: Tensor) -> Tensor:
    """The tensor with its last dimension dense in memory; leading sizes that are only repeated stay so."""
    return t if t.stride(-1) == 1 else t.contiguous()


def lead_strides(t: Tensor | None) -> list[int]:
    """Strides over batch and heads; a size of 1 stands for all and gets stride 0, as does an absent tensor."""
    return [0, 0] if t is None else [t.stride(i) if t.shape[i] > 1 else 0 for i in (0, 1)]


def constants_of(q: Tensor, v: Tensor, p: BlockPattern, softcap: float) -> dict[str, int | bool]:
    """Constants that the kernels share."""
    return {
        "DIM": q.shape[3], "DIM_PAD": padded(q.shape[3]), "VALUE_DIM": v.shape[3], "VALUE_PAD": padded(v.shape[3]),
        "HAS_Q_ORDER": p.q_order is not None, "HAS_KV_ORDER": p.kv_order is not None,
        "HAS_RANGE": p.kv_range is not None, "HAS_CAP": bool(softcap), "UPCAST": runs_interpreted(),
    }  # fmt: skip


def factors(scale: float, softcap: float) -> tuple[float, float, float]:
    """`factor` and `cap` of logits_of, and the scale."""
    return (scale / softcap, softcap * LOG2E, scale) if softcap else (scale * LOG2E, 0.0, scale)


def lists_of(p: BlockPattern) -> tuple[list[Tensor], list[int]]:
    """A pattern as kernels read it that walk its lists as they are.

    Returns:
        `indptr`, `starts`, `tile_ids`, `tiles`, `column_indptr`, `columns`, `q_order`, `kv_order` and `kv_range`,
        dense in memory or in their last dimension, another one in place of what the pattern lacks; and the strides
        over batch and heads of the four lists and orders, and over the batch of the range.
    """
    indptr = rows_dense(p.indptr)
    dense = [None if t is None else rows_dense(t) for t in (p.column_indptr, p.q_order, p.kv_order, p.kv_range)]
    column_indptr, q_order, kv_order, kv_range = (indptr if t is None else t for t in dense)
    starts, tiles = p.starts.contiguous(), p.tiles.contiguous().view(torch.uint8)
    columns = starts if p.columns is None else p.columns.contiguous()
    tensors = [indptr, starts, p.tile_ids.contiguous(), tiles, column_indptr, columns, q_order, kv_order, kv_range]
    return tensors, [stride for t in (indptr, *dense) for stride in lead_strides(t)][:-1]


@lru_cache(maxsize=64)
def device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors of a GPU, and bytes of shared memory that one program may use."""
    properties: Any = torch.cuda.get_device_properties(device)
    shared = int(getattr(properties, "shared_memory_per_block_optin", 0)) or _LEAST_SHARED
    return int(properties.multi_processor_count), shared
