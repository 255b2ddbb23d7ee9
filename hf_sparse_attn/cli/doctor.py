"""What this machine has, which backends can run on it and why others cannot, and whether those that run are right."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.api import default_device
from hf_sparse_attn.machine import machine, now, versions
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.tables import table

log = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
_REFERENCE = "torch_reference"
# What a backend may be off, in units of what PyTorch's own masked attention in the same dtype is off.
_ALLOWED = 4.0
_TOKENS, _BLOCK, _HEADS, _KV_HEADS, _DIM = 300, 64, 4, 2, 64


def examine(backends: Sequence[str] | None = None) -> dict[str, Any]:
    """All of it: versions, machine, and every backend tried in float32 and bfloat16, forward and backward.

    Args:
        backends: names to try; None means all. FlexAttention compiles when it is tried, which takes seconds.

    Returns:
        plain values: `versions`, `machine`, `device`, `backends` (one record per backend, dtype and pass), `ok`.

    Raises:
        ValueError: an unknown backend.
    """
    names = BACKENDS.known() if backends is None else list(backends)
    for name in names:
        if name not in BACKENDS.missing:
            BACKENDS.get(name)
    device = default_device()
    records = [record for name in names for record in _try_backend(name, device)]
    ok = all(r["agrees"] is not False for r in records)
    where = {"date": now(), "versions": versions(), "machine": machine(), "device": str(device)}
    return {**where, "backends": records, "ok": ok}


def render(found: dict[str, Any], width: int = 110) -> str:
    """The result of `examine` as text."""
    at = found["machine"]
    rows = [(name, version or "not installed") for name, version in found["versions"].items()]
    rows += [
        ("system", at["system"]),
        ("cpu", f"{at['cpu']}, {at['cpu_capability']}, {at['cores']} cores, torch uses {at['threads']} threads"),
        ("triton interpreter", "on" if at["triton_interpreter"] else "off"),
    ]
    for d in at["devices"]:
        rows.append((d["device"], ", ".join(f"{k} {v}" for k, v in d.items() if k != "device" and v is not None)))
    if not at["devices"]:
        rows.append(("accelerator", "none found (CUDA, ROCm, MPS)"))
    title = f"Backends on {found['device']}; errors are the largest against {_REFERENCE} in float64"
    columns = ("backend", "dtype", "pass", "result")
    verdict = "All backends that run here agree with the reference."
    if not found["ok"]:
        verdict = "A BACKEND DISAGREES WITH THE REFERENCE: do not use it here, and report this output."
    tables = (
        table(("what", "found"), rows, width=width),
        table(columns, _backend_rows(found["backends"]), title, width),
    )
    return "\n\n".join([*(text.strip("\n") for text in tables), verdict])


def _backend_rows(records: list[dict[str, Any]]) -> list[tuple[str, str, str, str]]:
    """One row per record; a reason that holds for a whole backend takes one row."""
    rows = []
    for name in dict.fromkeys(r["backend"] for r in records):
        own = [r for r in records if r["backend"] == name]
        if len({r["reason"] for r in own}) == 1 and own[0]["reason"]:
            rows.append((name, "all", "all", f"cannot run: {own[0]['reason']}"))
            continue
        rows += [(name, r["dtype"], r["pass"], _verdict(r)) for r in own]
    return rows


def _verdict(r: dict[str, Any]) -> str:
    if not r["runs"]:
        return f"cannot run: {r['reason']}"
    if r["error"] is None:
        return f"FAILED: {r['reason']}"
    return f"{'agrees' if r['agrees'] else 'DISAGREES'}: error {r['error']:.1e}, allowed {r['allowed']:.1e}"


def _try_backend(name: str, device: torch.device) -> list[dict[str, Any]]:
    records = []
    for dtype in _DTYPES:
        for backward in (False, True):
            record: dict[str, Any] = {
                "backend": name,
                "dtype": str(dtype).removeprefix("torch."),
                "pass": "backward" if backward else "forward",
                "runs": False,
                "reason": BACKENDS.why_missing(name),
                **dict.fromkeys(("error", "allowed", "agrees", "seconds")),
            }
            records.append(record)
            if name in BACKENDS.missing:
                continue
            backend = BACKENDS.get(name)
            q, k, v = inputs = _inputs(dtype, device)
            pattern = _pattern(device)
            record["reason"] = backend.why_not(None, q, k, v, backward) or backend.why_not(pattern, q, k, v, backward)
            if record["reason"] is not None:
                continue
            record["runs"] = True
            log.info("trying %s in %s, %s", name, record["dtype"], record["pass"])
            begin = time.perf_counter()
            try:
                got = _results(backend.attention, inputs, pattern, backward)
            # Whatever a backend raises here is what the user wants to be told.
            except Exception as error:
                log.debug("%s failed", name, exc_info=True)
                record["reason"] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
                record["agrees"] = False
                continue
            record["seconds"] = time.perf_counter() - begin
            inexact = getattr(backend, "inexact", 0.0)
            record["error"], record["allowed"] = _compare(got, inputs, pattern, backward, inexact)
            # A NaN compares false: it disagrees.
            record["agrees"] = record["error"] <= record["allowed"]
    return records


def _inputs(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """q, k, v with grouped heads and a short last block, and the gradient of the output; seeded."""
    made = torch.Generator().manual_seed(0)
    shapes = ((1, _HEADS, _TOKENS, _DIM), (1, _KV_HEADS, _TOKENS, _DIM), (1, _KV_HEADS, _TOKENS, _DIM))
    return [torch.randn(shape, generator=made).to(device, dtype) for shape in shapes]


def _pattern(device: torch.device) -> BlockPattern:
    """Two of every three blocks under the diagonal, and the diagonal, another third for each head."""
    blocks = -(-_TOKENS // _BLOCK)
    head, row, col = torch.meshgrid(torch.arange(_HEADS), torch.arange(blocks), torch.arange(blocks), indexing="ij")
    keep = ((head + row + col) % 3 > 0) | (row == col)
    return BlockPattern.from_block_map(keep[None], _BLOCK, _BLOCK, _TOKENS, _TOKENS, causal=True).to(device)


def _results(
    attention: Callable[..., tuple[Tensor, ...]], inputs: Sequence[Tensor], pattern: BlockPattern, backward: bool
) -> list[Tensor]:
    """The output, or the gradients of q, k and v."""
    q, k, v = (t.detach().requires_grad_(backward) for t in inputs)
    with torch.set_grad_enabled(backward):
        out = attention(q, k, v, pattern, _DIM**-0.5)[0]
    return list(torch.autograd.grad(out, (q, k, v), torch.ones_like(out))) if backward else [out]


def _masked(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float) -> tuple[Tensor]:
    """PyTorch's own attention under the pattern's token mask: the measure of what a dtype allows."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    return (torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=pattern.to_dense(), scale=scale),)


def _compare(
    got: list[Tensor], inputs: Sequence[Tensor], pattern: BlockPattern, backward: bool, inexact: float = 0.0
) -> tuple[float, float]:
    """Largest error against float64 on the CPU, and the largest allowed: rounding, and `inexact` of the output."""
    pattern = pattern.to("cpu")
    inputs = [t.cpu() for t in inputs]
    exact = _results(BACKENDS.get(_REFERENCE).attention, [t.double() for t in inputs], pattern, backward)
    rough = _results(_masked, inputs, pattern, backward)
    error, rounding = _distance(got, exact), _distance(rough, exact)
    largest = max(float(t.abs().max()) for t in exact)
    return error, _ALLOWED * rounding + (torch.finfo(inputs[0].dtype).eps + inexact) * largest


def _distance(found: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    """Largest difference; NaN if there is one, which Python's max() would drop."""
    each = [(a.detach().cpu().double() - b).abs().max() for a, b in zip(found, exact, strict=True)]
    return float(torch.stack(each).max())
