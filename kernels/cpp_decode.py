"""Attention of few queries over a long cache on CPUs in C++: every key, pages of keys or a BlockPattern; forward only.

All heads that share a head of keys are computed together, so that keys and values are read once: what limits decoding
is memory. See cpp_decode.cpp for how; compiled on first use, as cpp_block_sparse is.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept
from hf_sparse_attn.kernels import cpp_block_sparse_build as build
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.registry import BACKENDS

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Above this many queries keys are no longer what costs, and cpp_block_sparse multiplies faster.
_MAX_QUERIES = 16
# Call of cpp_decode_keys.h: four tensors of 4 words, then words up to the lists of pages, those of a pattern, doubles.
_CALL = struct.Struct("16q 9q 5q 21q 2d")
_NO_KEPT = (0,) * 4
_NO_PATTERN = (0,) * 21

_libraries: dict[torch.dtype, Callable[[bytes], int]] = {}


@BACKENDS.register("cpp_decode")
class CppDecode:
    """Decoding on the CPU in C++: at most 16 queries, float16 to float32, the whole pattern; forward only.

    Query heads that share a key/value head and the pattern read each key once, together. Results are the same for any
    number of threads. Compiled in seconds on first use.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {"cpu": 3}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend. Compiles what a call with this pattern needs; without a pattern nothing."""
        if q.device.type != "cpu":
            return f"needs a CPU, the tensors are on {q.device}"
        if q.shape[2] > _MAX_QUERIES:
            return f"needs at most {_MAX_QUERIES} queries, got {q.shape[2]}"
        if needs_grad:
            return "it is forward only, and a gradient is needed"
        return _why_not(q.dtype, pattern is not None)

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend."""
        words, _ = derived(pattern, "cpp_decode", lambda: _words(pattern))
        return _run(q, k, v, _NO_KEPT, words, scale, softcap, None)

    @staticmethod
    def why_not_decode(q: Tensor, k: Tensor, v: Tensor, kept: Kept | None) -> str | None:
        """See backend.Decoder."""
        return _why_not(q.dtype, True) if q.is_cpu else f"needs a CPU, the tensors are on {q.device}"

    @staticmethod
    def decode(
        q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, scale: float, softcap: float, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """See backend.Decoder."""
        if first is not None and not (first.dtype == torch.int64 and first.is_contiguous()):
            first = first.to(torch.int64).contiguous()
        if kept is None:
            return _run(q, k, v, _NO_KEPT, _NO_PATTERN, scale, softcap, first)
        pages = kept.pages
        if not (pages.dtype == torch.int32 and pages.is_contiguous()):
            pages = pages.to(torch.int32).contiguous()
        words = (pages.data_ptr(), pages.shape[1], pages.shape[2], kept.size)
        return _run(q, k, v, words, _NO_PATTERN, scale, softcap, first)


def _words(p: BlockPattern) -> tuple[tuple[int, ...], list[Tensor]]:
    """A pattern as words of a call, and the tensors that they point to."""
    wide, narrow = (p.indptr, p.column_indptr, p.q_order, p.kv_order), (p.starts, p.tile_ids, p.columns, p.kv_range)
    held: list[Tensor] = []

    def point(x: Tensor | None, dtype: torch.dtype) -> int:
        if x is None:
            return 0
        # A pattern that was never validated must not be read as what it is not.
        held.append(x.to(dtype).contiguous())
        return held[-1].data_ptr()

    pointers = (
        *(point(x, torch.int64) for x in wide),
        *(point(x, torch.int32) for x in narrow),
        point(p.tiles, torch.bool),
    )
    lead = [size for x in wide for size in ((0, 0) if x is None else x.shape[:2])]
    batches = 0 if p.kv_range is None else len(p.kv_range)
    return (*pointers, p.block_q, p.block_k, p.rows, *lead, batches), held


def _why_not(dtype: torch.dtype, compiling: bool) -> str | None:
    if dtype in _libraries:
        return None
    if dtype not in _DTYPES:
        return f"needs float32, bfloat16 or float16, got {str(dtype).removeprefix('torch.')}"
    return _cannot_build(dtype, compiling)


# While torch.compile traces a call the answer is a constant, whatever it takes to find it. (Torch leaves it untyped.)
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _cannot_build(dtype: torch.dtype, compiling: bool) -> str | None:
    reason = build.why_not(dtype)
    if reason is None and compiling:
        try:
            _library(dtype)
        except build.CannotBuild as error:
            return str(error)
    return reason


def _library(dtype: torch.dtype) -> Callable[[bytes], int]:
    """The function of the library for a dtype, which takes a packed Call."""
    found = _libraries.get(dtype)
    if found is None:
        made = build.library(dtype, "decode")
        if made.hsa_call_bytes() != _CALL.size:
            raise RuntimeError(f"`_CALL` must have {made.hsa_call_bytes()} bytes, got {_CALL.size}")
        found = _libraries[dtype] = made.hsa_run
    return found


def _run(
    q: Tensor, k: Tensor, v: Tensor, kept: tuple[int, ...], pattern: tuple[int, ...], scale: float, softcap: float,
    first: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Output and log-sum-exp; `kept` and `pattern` are words of the call, zeros where there is none."""
    q, k, v = (x if x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, q_len, dim = q.shape
    kv_heads, kv_len, value_dim = v.shape[1:]
    # Heads of a token beside one another, as a model wants them back.
    out = q.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    lse = q.new_empty(batch, heads, q_len, dtype=torch.float32)
    call = _CALL.pack(
        q.data_ptr(), *q.stride()[:3], k.data_ptr(), *k.stride()[:3], v.data_ptr(), *v.stride()[:3],
        out.data_ptr(), q_len * heads * value_dim, value_dim, heads * value_dim,
        lse.data_ptr(), torch.get_num_threads(), batch, heads, kv_heads, q_len, kv_len, dim, value_dim,
        0 if first is None else first.data_ptr(), *kept, *pattern, scale, softcap,
    )  # fmt: skip
    if _library(q.dtype)(call):
        raise MemoryError("cpp_decode found no memory for its scratch space")
    return out, lse
