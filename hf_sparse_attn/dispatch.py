"""Runs a pattern on its backend, eagerly or as an operator of the graph that is being traced."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_sparse_attn import compiled
from hf_sparse_attn.autocast import made_on_cpu
from hf_sparse_attn.backend import choose_backend, choose_decoder
from hf_sparse_attn.context import Context
from hf_sparse_attn.decoding import Kept, whole_pattern
from hf_sparse_attn.pattern.block_pattern import BlockPattern


def check_tensors(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises where q, k, v do not fit together, naming argument, rule and value."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"`{name}` must be a tensor [batch, heads, tokens, dim], got {type(t).__name__}")
        if t.ndim != 4:
            raise ValueError(f"`{name}` must be [batch, heads, tokens, dim], got shape {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"`{name}` must be floating point, got {t.dtype}")
        if t.dtype != q.dtype or t.device != q.device:
            raise ValueError(f"`{name}` must be {q.dtype} on {q.device} like `q`, got {t.dtype} on {t.device}")
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(f"`v` must be {list(k.shape[:3])} in batch, heads, tokens like `k`, got {list(v.shape[:3])}")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"`k` must have the batch and dim of `q` {list(q.shape)}, got {list(k.shape)}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"`k` must have a number of heads that divides {q.shape[1]}, got {k.shape[1]}")


def check_pattern(pattern: BlockPattern, q: Tensor, k: Tensor) -> None:
    """Raises where a pattern does not fit q and k."""
    want, got = (q.shape[2], k.shape[2]), (pattern.q_len, pattern.kv_len)
    if want != got:
        raise ValueError(f"`pattern` must be for {want[0]} queries and {want[1]} keys, got {got[0]} and {got[1]}")
    for name, size, limit in (("batch", pattern.batch, q.shape[0]), ("heads", pattern.heads, q.shape[1])):
        if size not in (1, limit):
            raise ValueError(f"`pattern` must have {name} 1 or {limit}, got {size}")


def run_pattern(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, backend: str = "auto", softcap: float = 0.0
) -> tuple[Tensor, Tensor, str]:
    """Output, log-sum-exp and the name of the backend that ran; see Backend.attention for shapes."""
    check_pattern(pattern, q, k)
    if not q.dtype == k.dtype == v.dtype:
        # A kernel would read numbers of one width as those of another.
        raise ValueError(f"`k` and `v` must be {q.dtype} like `q`, got {k.dtype} and {v.dtype}")
    if torch.compiler.is_compiling():
        return (*compiled.attend(q, k, v, pattern.to(q.device), scale, softcap, backend), backend)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    pattern = pattern.to(q.device)
    name, chosen = choose_backend(backend, pattern, q, k, v, needs_grad, softcap)
    out, lse = chosen.attention(q, k, v, pattern, scale, softcap)
    return out, lse, name


def dense_attention(q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
    """Exact attention: output [batch, heads, q_len, value dim] and log-sum-exp [batch, heads, q_len]."""
    whole = BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal, device=q.device)
    return run_pattern(q, k, v, whole, ctx.softmax_scale, softcap=ctx.softcap)[:2]


# More queries than these are no longer few: their pattern is worth making.
FEW_QUERIES = 16


def run_exact(
    q: Tensor, k: Tensor, v: Tensor, scale: float, softcap: float = 0.0, first: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, str]:  # fmt: skip
    """Attention of few queries to all keys: output, log-sum-exp and the name of the backend that ran.

    Args:
        q: [batch, heads, q_len, dim], the last tokens, each of which sees itself and what came before.
        k, v: [batch, kv_heads, length, dim], of all tokens.
        scale, softcap, backend: see `run_pattern`.
        first: int64 [batch], the first slot of each row that is no padding; None where none is.
    """
    done = _decode(q, k, v, None, scale, softcap, first, backend)
    if done is None:
        with made_on_cpu():
            pattern = whole_pattern(q.shape[2], k.shape[2], first, q.device)
            done = run_pattern(q, k, v, pattern, scale, backend, softcap)
    return done


def run_kept(
    q: Tensor, k: Tensor, v: Tensor, kept: Kept, scale: float, softcap: float = 0.0, first: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, str]:  # fmt: skip
    """Attention of one query of each row to the pages of a cache that are kept; arguments as of `run_exact`.

    Raises:
        ValueError: lists of pages that are not one for all heads or for each.
    """
    batch, lists = kept.pages.shape[:2]
    if batch != q.shape[0] or lists not in (1, k.shape[1], q.shape[1]):
        counts = sorted({1, k.shape[1], q.shape[1]})
        raise ValueError(
            f"`pages` must be [{q.shape[0]}, {' or '.join(map(str, counts))}, count], got {list(kept.pages.shape)}"
        )
    done = _decode(q, k, v, kept, scale, softcap, first, backend)
    if done is None:
        with made_on_cpu():
            pattern = kept.pattern(k.shape[2], q.shape[1], first)
            done = run_pattern(q, k, v, pattern, scale, backend, softcap)
    return done


def _decode(
    q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, scale: float, softcap: float, first: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, str] | None:  # fmt: skip
    """The call by a backend that needs no pattern; None where there is none, or the call is none of a step."""
    if not 0 < q.shape[2] <= min(FEW_QUERIES, k.shape[2]) or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return None
    if not q.dtype == k.dtype == v.dtype:
        return None
    found = choose_decoder(backend, q, k, v, kept)
    if found is None:
        return None
    return (*found[1].decode(q, k, v, kept, scale, softcap, first), found[0])
