"""PyTorch's FlexAttention over a BlockPattern, always compiled: for comparison, and where nothing else runs."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hf_sparse_attn.extras import install
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
# Graphs kept, one per shape, dtype and scale; Dynamo's default of 8 is too few for the lengths a model meets.
_MAX_GRAPHS = 256
# Logits held at a time while the log-sum-exp is computed beside FlexAttention.
_LOGITS_AT_A_TIME = 1 << 24

_LOCK = Lock()
# FlexAttention's block tables are dense over blocks and slow to build: kept as long as their pattern lives.
_MASKS: WeakKeyDictionary[BlockPattern, BlockMask] = WeakKeyDictionary()


@BACKENDS.register("flex_attention")
class FlexAttention:
    """Compiled FlexAttention on aligned key blocks without columns; CPU forward, GPU forward and backward.

    Every new shape is compiled (seconds); patterns of one shape share a graph. Queries and keys with an order are
    copied into it. FlexAttention gives no log-sum-exp on the CPU: `attention` computes it there from the logits of the
    kept blocks, which costs as much again; `attention_output` leaves it out. A NaN or infinite value that nobody reads
    reaches the queries of a partly kept block that holds it. Measured: equality with the reference on the CPU. Not
    measured: anything on a GPU.
    """

    auto_rank: ClassVar[Mapping[str, int]] = {}

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See backend.Backend."""
        if q.dtype not in _DTYPES:
            return f"needs float16, bfloat16 or float32, got {str(q.dtype).removeprefix('torch.')}"
        if softcap:
            return f"it has no soft cap on the logits, and {softcap} is wanted"
        from torch._dynamo import config

        if getattr(config, "disable", False):
            return "torch.compile is switched off"
        on_gpu = q.device.type == "cuda"
        reason = _why_not_gpu(pattern, q, v, needs_grad) if on_gpu else _why_not_cpu(q.device, needs_grad)
        if reason is not None or pattern is None:
            return reason
        if pattern.columns is not None and pattern.columns.numel():
            return "it reads whole key blocks only, and the pattern has single columns"
        if pattern.kv_range is not None:
            return "it takes no `kv_range`: cut the keys to their valid range first"
        if pattern.kv_order is not None and pattern.kv_order.shape[1] > 1 and k.shape[1] < q.shape[1]:
            return "an order of the keys per query head would repeat the grouped keys in memory"
        if pattern not in _MASKS and bool((pattern.starts % pattern.block_k != 0).any()):
            return f"needs key blocks that start at multiples of block_k = {pattern.block_k}"
        return None

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See backend.Backend."""
        q, k, v = _ordered(q, k, v, pattern)
        out, lse = _run(q, k, v, pattern, scale, with_lse=q.is_cuda)
        if lse is None:
            lse = _lse_of_blocks(q, k, pattern, scale)
        return _to_token_order(out, pattern), _to_token_order(lse, pattern)

    @staticmethod
    def attention_output(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> Tensor:
        """The output alone, all that FlexAttention itself computes on a CPU; shapes as in dispatch.Backend."""
        q, k, v = _ordered(q, k, v, pattern)
        return _to_token_order(_run(q, k, v, pattern, scale, with_lse=False)[0], pattern)


def _why_not_cpu(device: torch.device, needs_grad: bool) -> str | None:
    if device.type != "cpu":
        return f"needs a CPU or a CUDA or ROCm GPU, the tensors are on {device}"
    if needs_grad:
        return "it has no backward on the CPU, and a gradient is needed"
    # FlexAttention's C++ template is written for x86 vectors.
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith("AVX"):
        return f"needs an x86 CPU with AVX2, this one offers {capability}"
    return _why_no_compiler()


def _why_not_gpu(pattern: BlockPattern | None, q: Tensor, v: Tensor, needs_grad: bool) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return f"needs the package triton on a GPU {install('triton')}"
    for name, size in (("dim", q.shape[3]), ("value dim", v.shape[3])):
        if size < 16:
            return f"needs a {name} of at least 16 on a GPU, got {size}"
    if pattern is not None:
        for name, size in (("block_q", pattern.block_q), ("block_k", pattern.block_k)):
            if size < 16 or size & (size - 1):
                return f"needs `{name}` to be a power of two from 16 on, on a GPU, got {size}"
            if needs_grad and size % 128:
                return f"needs `{name}` to be a multiple of 128 for a gradient, got {size}"
    return None


@lru_cache(maxsize=1)
def _why_no_compiler() -> str | None:
    """Why torch.compile cannot make CPU code here, or None; asks for the compiler's version once, compiles nothing."""
    try:
        from torch._inductor.cpp_builder import get_cpp_compiler

        get_cpp_compiler()
    # Inductor raises its own errors, OSError or RuntimeError by platform: each of them means no compiler.
    except Exception as error:
        return f"needs a C++ compiler for torch.compile ({type(error).__name__})"
    return None


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, scale: float, options: Any, with_lse: bool) -> Any:
        aux = AuxRequest(lse=True) if with_lse else None
        grouped = q.shape[1] != k.shape[1]
        return flex_attention(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=grouped, kernel_options=options, return_aux=aux
        )

    # Symbolic shapes fail in the CPU template (torch 2.13: C++ errors and out-of-range indices), so shapes are static.
    # fullgraph: where compiling is impossible it raises instead of running eagerly.
    return torch.compile(flex, dynamic=False, fullgraph=True)


def _run(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, with_lse: bool
) -> tuple[Tensor, Tensor | None]:
    from torch._dynamo import config

    mask = _MASKS.get(pattern)
    if mask is None:
        mask = _MASKS[pattern] = replace(pattern, tiles=_padded_tiles(pattern.tiles)).to_flex()
    options = None
    if q.is_cuda:
        if pattern.block_q % 128 or pattern.block_k % 128:
            # FlexAttention's own choice of pieces is made for blocks of 128 and refuses smaller ones.
            options = {"fwd_BLOCK_M": min(pattern.block_q, 64), "fwd_BLOCK_N": min(pattern.block_k, 64)}
    else:
        # The CPU path refuses tensors that require a gradient even where none is recorded.
        q, k, v = q.detach(), k.detach(), v.detach()
    # The settings of the compiler are those of all threads.
    with _LOCK, config.patch(recompile_limit=_MAX_GRAPHS, accumulated_recompile_limit=4 * _MAX_GRAPHS):
        found = _compiled()(q, k, v, mask, scale, options, with_lse)
    return (found[0], found[1].lse) if with_lse else (found, None)


def _padded_tiles(tiles: Tensor) -> Tensor:
    """Unused tiles up to a power of two, at least 16: the size of the table is part of the graph."""
    size = max(16, 1 << (len(tiles) - 1).bit_length())
    return torch.cat([tiles, tiles.new_zeros(size - len(tiles), *tiles.shape[1:])])


def _ordered(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in the pattern's orders."""

    def take(x: Tensor, order: Tensor | None) -> Tensor:
        return x if order is None else x.gather(2, order[..., None].expand(*x.shape))

    return take(q, pattern.q_order), take(k, pattern.kv_order), take(v, pattern.kv_order)


def _to_token_order(x: Tensor, pattern: BlockPattern) -> Tensor:
    """[batch, heads, q_len, ...] from places of the query order back to tokens."""
    if pattern.q_order is None:
        return x
    index = pattern.q_order.view(*pattern.q_order.shape, *(1,) * (x.ndim - 3)).expand_as(x)
    return torch.empty_like(x).scatter(2, index, x)


def _lse_of_blocks(q: Tensor, k: Tensor, p: BlockPattern, scale: float) -> Tensor:
    """Exact log-sum-exp of the kept blocks in float32, [batch, heads, q_len]; q and k are in the pattern's orders."""
    batch, heads, q_len, _ = q.shape
    cols = -(-p.kv_len // p.block_k)
    lse = torch.full((batch, heads, p.rows, p.block_q), -torch.inf, dtype=torch.float32)
    key_exists = (torch.arange(cols * p.block_k) < p.kv_len).view(cols, p.block_k)
    step = max(1, _LOGITS_AT_A_TIME // (p.block_q * p.block_k))

    def blocks(x: Tensor, size: int, number: int) -> Tensor:
        return torch.nn.functional.pad(x.float(), (0, 0, 0, size * number - len(x))).view(number, size, -1)

    for b in range(batch):
        for h in range(heads):
            queries = blocks(q[b, h], p.block_q, p.rows) * scale
            keys = blocks(k[b, h * k.shape[1] // heads], p.block_k, cols)
            own = p.indptr[b if p.batch > 1 else 0, h if p.heads > 1 else 0]
            row_of = torch.repeat_interleave(torch.arange(p.rows), own.diff())
            for i in range(0, len(row_of), step):
                row = row_of[i : i + step]
                chosen = slice(int(own[0]) + i, int(own[0]) + i + len(row))
                col = p.starts[chosen].long() // p.block_k
                logits = queries[row] @ keys[col].mT
                keep = p.tiles[p.tile_ids[chosen].long()] & key_exists[col][:, None]
                part = logits.masked_fill(~keep, -torch.inf).logsumexp(-1)
                lse[b, h] = _logaddexp_rows(lse[b, h], row, part)
    return lse.flatten(2)[:, :, :q_len]


def _logaddexp_rows(lse: Tensor, row: Tensor, part: Tensor) -> Tensor:
    """Adds the parts [n, block_q] in the log domain to the rows [rows, block_q] that they belong to."""
    peak = lse.scatter_reduce(0, row[:, None].expand_as(part), part, "amax")
    # Where nothing was kept yet the peak is -inf: subtracting 0 instead gives sums 0, not NaN.
    shift = peak.masked_fill(peak == -torch.inf, 0.0)
    total = (lse - shift).exp().index_add(0, row, (part - shift[row]).exp())
    return total.log() + shift
