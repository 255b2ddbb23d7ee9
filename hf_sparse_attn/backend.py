"""What a backend is, how one with a backward of its own becomes differentiable, and which one runs a call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_sparse_attn.decoding import Kept
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS


class Backend(Protocol):
    """Runs attention over a BlockPattern. One file in kernels/, one class, registered by name.

    `auto_rank` says on which device types backend="auto" may take it: the lowest rank that can run a call is taken.
    A device type that is not named is one where it is right but no way to run models.
    """

    auto_rank: ClassVar[Mapping[str, int]]

    @staticmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """Why this call cannot run here, or None. `pattern` None asks about the device and sizes alone."""

    @staticmethod
    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """Attention over the keys of the pattern; differentiable where `why_not` lets a gradient pass.

        Args:
            q: [batch, heads, q_len, dim].
            k: [batch, kv_heads, kv_len, dim]; kv_heads divides heads.
            v: [batch, kv_heads, kv_len, value dim].
            pattern: batch 1 or batch, heads 1 or heads, on the device of `q`.
            scale: factor on the logits.
            softcap: the logits x, scaled, become softcap * tanh(x / softcap) (Gemma 2); 0 leaves them.

        Returns:
            output [batch, heads, q_len, value dim] in the dtype of `q` (0 where a query has no key), and log-sum-exp
            [batch, heads, q_len] in float32 (float64 for float64), natural logarithm, -inf where a query has no key.
        """


class Decoder(Protocol):
    """What a backend may have besides: attention of few queries to a cache for which no pattern is made; forward only.

    A model calls it once in every layer for every token, so what it does in Python counts.
    """

    @staticmethod
    def why_not_decode(q: Tensor, k: Tensor, v: Tensor, kept: Kept | None) -> str | None:
        """Why this call cannot run here, or None."""

    @staticmethod
    def decode(
        q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, scale: float, softcap: float, first: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attention over all keys, causal among the queries, which are the last tokens; or of one query over pages.

        Args:
            q: [batch, heads, q_len, dim]; q_len is 1 where pages are given.
            k: [batch, kv_heads, kv_len, dim]; kv_heads divides heads.
            v: [batch, kv_heads, kv_len, value dim].
            kept: pages of keys that are read, or None for all keys.
            scale, softcap: see Backend.attention.
            first: int64 [batch], the first key that is read of each row, or None.

        Returns:
            as Backend.attention; heads of a token of the output stand beside one another in memory.
        """


class KernelBackend(ABC):
    """A backend that gives its forward and its backward; `attention` is made from them, and so are the operators
    that stand for it under torch.compile (compiled.py)."""

    name: ClassVar[str]
    auto_rank: ClassVar[Mapping[str, int]] = {}

    @staticmethod
    @abstractmethod
    def why_not(
        pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
    ) -> str | None:
        """See Backend."""

    @staticmethod
    @abstractmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float
    ) -> tuple[Tensor, Tensor]:
        """See Backend.attention; no gradient is recorded."""

    @staticmethod
    @abstractmethod
    def backward(
        grad_out: Tensor, grad_lse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
        pattern: BlockPattern, scale: float, softcap: float,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Gradients of q, k and v, in their shapes and dtypes.

        Args:
            grad_out: gradient of the output, in any layout of memory.
            grad_lse: gradient of the log-sum-exp, or None.
            q, k, v, out, lse: inputs and results of the forward.
            pattern, scale, softcap: as in the forward.
        """

    @classmethod
    def attention(
        cls, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0
    ) -> tuple[Tensor, Tensor]:
        """See Backend.attention."""
        if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
            return _Attention.apply(q, k, v, pattern, scale, softcap, cls)
        return cls.forward(q, k, v, pattern, scale, softcap)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float,
        backend: type[KernelBackend],
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = backend.forward(q, k, v, pattern, scale, softcap)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = pattern, scale, softcap
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        grads = ctx.backend.backward(grad_out, grad_lse, q, k, v, out, lse, *ctx.rest)
        return (*grads, None, None, None, None)


# What a backend's `why_not` should not leave unsaid.
_UNSAID = "it does not say why"


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


def auto_order(device_type: str) -> list[str]:
    """Names of the backends that backend="auto" tries on a device type, in that order."""
    ranks = {name: found.auto_rank.get(device_type) for name, found in BACKENDS.items()}
    return sorted((n for n, rank in ranks.items() if rank is not None), key=lambda n: (ranks[n], n))


@lru_cache
def _decoders(backend: str, device_type: str, version: int) -> tuple[tuple[str, type[Decoder]], ...]:
    names = auto_order(device_type) if backend == "auto" else [backend]
    found: list[tuple[str, Any]] = [(name, BACKENDS.get(name)) for name in names]
    return tuple((name, one) for name, one in found if hasattr(one, "decode"))


def choose_decoder(
    backend: str, q: Tensor, k: Tensor, v: Tensor, kept: Kept | None
) -> tuple[str, type[Decoder]] | None:
    """Name and class of the backend that runs a call without a pattern; None where one must be made.

    Raises:
        ValueError: unknown backend.
    """
    for name, found in _decoders(backend, q.device.type, BACKENDS.version):
        if found.why_not_decode(q, k, v, kept) is None:
            return name, found
    return None


def choose_backend(
    backend: str, pattern: BlockPattern | None, q: Tensor, k: Tensor, v: Tensor, needs_grad: bool, softcap: float = 0.0
) -> tuple[str, type[Backend]]:
    """Name and class of the backend that runs the call.

    Raises:
        ValueError: unknown backend.
        BackendUnavailable: the backend asked for cannot run this call, or none can; with the reasons.
    """
    if backend != "auto":
        found = BACKENDS.get(backend)
        reason = found.why_not(pattern, q, k, v, needs_grad, softcap)
        if reason is not None:
            raise BackendUnavailable(f"`backend` {backend!r} cannot run this call: {reason or _UNSAID}")
        return backend, found
    device, reasons = q.device.type, []
    tried = auto_order(device)
    for name in tried:
        found = BACKENDS.get(name)
        reason = found.why_not(pattern, q, k, v, needs_grad, softcap)
        if reason is None:
            return name, found
        reasons.append(f"{name}: {reason or _UNSAID}")
    reasons += [f"{name}: not taken by itself on {device}" for name in BACKENDS.names() if name not in tried]
    reasons += [f"{file}: {why}" for file, why in BACKENDS.missing.items()]
    raise BackendUnavailable("no backend can run this call: " + ("; ".join(reasons) or "none is registered"))
