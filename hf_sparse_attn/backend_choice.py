"""Which backend runs a pattern, and why the others do not."""

from __future__ import annotations

from torch import Tensor

from hf_sparse_attn.backend import Backend
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS


class BackendUnavailable(RuntimeError):
    """A backend was asked for by name and cannot run the call."""


def auto_order(device_type: str) -> list[str]:
    """Names of the backends that backend="auto" tries on a device type, in that order."""
    ranks = {name: getattr(found, "auto_rank", {}).get(device_type) for name, found in BACKENDS.items()}
    return sorted((n for n, rank in ranks.items() if rank is not None), key=lambda n: (ranks[n], n))


def choose_backend(
    backend: str,
    pattern: BlockPattern | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    needs_grad: bool,
    softcap: float = 0.0,
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
            raise BackendUnavailable(f"`backend` {backend!r} cannot run this call: {reason}")
        return backend, found
    reasons = []
    for name in auto_order(q.device.type):
        found = BACKENDS.get(name)
        reason = found.why_not(pattern, q, k, v, needs_grad, softcap)
        if reason is None:
            return name, found
        reasons.append(f"{name}: {reason}")
    raise BackendUnavailable("no backend can run this call: " + "; ".join(reasons))
