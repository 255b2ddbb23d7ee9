"""Random block patterns with every feature, inputs for them, and what a kernel must give for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern

# Keyword arguments of random_pattern() by readable name, for pytest.mark.parametrize.
FEATURES: dict[str, dict[str, Any]] = {
    "aligned": {"aligned": True, "tiles": 0},
    "aligned_tiles": {"aligned": True},
    "unaligned": {"tiles": 0},
    "tiles": {},
    "columns": {"columns": 21},
    "columns_only": {"columns": 40, "keep": 0.0},
    "q_order": {"q_order": (1, 1)},
    "kv_order": {"kv_order": (1, 1)},
    "kv_range": {"kv_range": True},
    "empty_rows": {"empty_rows": (0, 2)},
    "nothing": {"keep": 0.0},
    "all": {
        "columns": 9, "q_order": (1, 1), "kv_order": (1, 1), "kv_range": True, "empty_rows": (1,),
    },
}  # fmt: skip


def random_pattern(
    q_len: int,
    kv_len: int,
    *,
    block_q: int = 32,
    block_k: int = 32,
    batch: int = 1,
    heads: int = 1,
    keep: float = 0.6,
    aligned: bool = False,
    tiles: int = 4,
    columns: int = 0,
    q_order: tuple[int, int] | None = None,
    kv_order: tuple[int, int] | None = None,
    kv_range: bool | list[tuple[int, int]] = False,
    empty_rows: tuple[int, ...] = (),
    seed: int = 0,
) -> BlockPattern:
    """A valid pattern whose rows hold random, disjoint key blocks.

    Args:
        q_len, kv_len, block_q, block_k, batch, heads: as in BlockPattern.
        keep: share of the possible blocks that a row keeps.
        aligned: starts are multiples of `block_k`.
        tiles: number of random partial tiles, the last of which keeps nothing; 0 for whole blocks.
        columns: most single keys of a row, drawn among the keys in no block of it.
        q_order, kv_order: leading sizes of a random order, or None.
        kv_range: a random range per batch row, or the ranges.
        empty_rows: rows without any block or column.
        seed: of the random draws.
    """
    draw = torch.Generator().manual_seed(seed)

    def below(high: int) -> int:
        return int(torch.randint(high, (), generator=draw))

    rows = -(-q_len // block_q)
    counts, starts = torch.zeros(batch, heads, rows, dtype=torch.int64), []
    column_counts, chosen = torch.zeros_like(counts), []
    for item in range(batch * heads * rows):
        if item % rows in empty_rows:
            continue
        free = torch.ones(kv_len, dtype=torch.bool)
        at = 0 if aligned else below(block_k)
        while at < kv_len:
            if float(torch.rand((), generator=draw)) < keep:
                starts.append(at)
                counts.view(-1)[item] += 1
                free[at : at + block_k] = False
                at += block_k + (0 if aligned else below(5))
            else:
                at += block_k if aligned else 1 + below(block_k)
        if columns:
            candidates = free.nonzero()[:, 0]
            mine = candidates[torch.randperm(len(candidates), generator=draw)[: below(columns + 1)]]
            column_counts.view(-1)[item] = len(mine)
            chosen.append(mine)
    first = torch.tensor(starts, dtype=torch.int64)
    table = torch.rand(tiles, block_q, block_k, generator=draw) < 0.5
    if tiles:
        table[-1] = False
    table = torch.cat([torch.ones(1, block_q, block_k, dtype=torch.bool), table])
    pattern = BlockPattern.from_rows(
        counts, first, block_q, block_k, q_len, kv_len, torch.randint(tiles + 1, first.shape, generator=draw), table,
        column_counts if columns else None, torch.cat([first[:0], *chosen]) if columns else None,
    )  # fmt: skip

    def order(lead: tuple[int, int] | None, length: int) -> Tensor | None:
        return None if lead is None else torch.rand(*lead, length, generator=draw).argsort(-1)

    if kv_range is True:
        ends = [sorted((below(kv_len + 1), below(kv_len + 1))) for _ in range(batch)]
        kv_range = [(low, high) for low, high in ends]
    return replace(
        pattern,
        q_order=order(q_order, q_len),
        kv_order=order(kv_order, kv_len),
        kv_range=torch.tensor(kv_range, dtype=torch.int32) if kv_range else None,
    ).validate()


def random_inputs(
    pattern: BlockPattern,
    *,
    batch: int = 1,
    heads: int = 1,
    kv_heads: int | None = None,
    dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v for a pattern, as a model makes them: views of [batch, tokens, heads, dim]."""
    draw = torch.Generator().manual_seed(seed)
    kv_heads = heads if kv_heads is None else kv_heads

    def tensor(tokens: int, heads: int, dim: int) -> Tensor:
        return torch.randn(batch, tokens, heads, dim, generator=draw).to(dtype).transpose(1, 2)

    value_dim = dim if value_dim is None else value_dim
    return (
        tensor(pattern.q_len, heads, dim),
        tensor(pattern.kv_len, kv_heads, dim),
        tensor(pattern.kv_len, kv_heads, value_dim),
    )


class Expected(NamedTuple):
    """The float64 reference and how far plain torch in the precision of the inputs is from it, by a small factor."""

    out: Tensor
    lse: Tensor
    out_tolerance: float
    lse_tolerance: float

    def check(self, out: Tensor, lse: Tensor) -> None:
        """Fails where an output or its log-sum-exp is further from the reference than the tolerance."""
        out, lse = out.cpu(), lse.cpu()
        assert out.shape == self.out.shape and lse.shape == self.lse.shape
        assert not out.isnan().any() and not lse.isnan().any()
        empty = self.lse == -torch.inf
        assert torch.equal(lse == -torch.inf, empty)
        assert bool((out[empty] == 0).all())
        assert _distance(out, self.out) <= self.out_tolerance
        assert _distance(lse[~empty], self.lse[~empty]) <= self.lse_tolerance


def expected(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, factor: float = 3.0) -> Expected:
    """What a backend must give, by torch_reference in float64.

    The tolerance is `factor` times the error of plain masked attention in the precision of the inputs, and no less
    than `factor` roundings of the largest output (with one key plain attention has no error at all).
    """
    q, k, v, pattern = q.cpu(), k.cpu(), v.cpu(), pattern.to("cpu")
    out, lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, scale)
    group = q.shape[1] // k.shape[1]
    logits = (q @ k.repeat_interleave(group, 1).mT).float() * scale
    logits = logits.masked_fill(~pattern.to_dense(), -torch.inf)
    low_out = logits.softmax(-1).nan_to_num().to(v.dtype) @ v.repeat_interleave(group, 1)
    exact_inputs = (q.float() @ k.float().repeat_interleave(group, 1).mT) * scale
    low_lse = exact_inputs.masked_fill(~pattern.to_dense(), -torch.inf).logsumexp(-1)
    some = lse > -torch.inf
    if not bool(some.any()):
        return Expected(out, lse, 0.0, 0.0)
    out_error = max(_distance(low_out, out), torch.finfo(q.dtype).eps * float(out.abs().max()))
    lse_error = max(_distance(low_lse[some], lse[some]), torch.finfo(torch.float32).eps * float(lse[some].abs().max()))
    return Expected(out, lse, factor * out_error, factor * lse_error)


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator makes, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else (result,):
            # A view of overlapping windows is as large as what it is a view of.
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result
