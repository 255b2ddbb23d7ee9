"""Vertical-slash (MInference): the columns and the diagonals that the last queries attend to."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Estimating, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import causal_tiles
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import amount_of, best_ascending, check_amount, check_block_size, last_query_sums

# First columns and nearest diagonals that are always kept, as in the published run-time code.
_FORCED_VERTICALS = 30
_FORCED_SLASHES = 100
_FEWEST_SLASHES = 50


@METHODS.register("vertical_slash")
@dataclass(frozen=True, kw_only=True)
class VerticalSlash(Estimating):
    """Each head keeps its best single columns (verticals) and its best diagonals (slashes); drops the rest.

    Both are ranked by the attention of the last queries: a vertical by the sum over these queries, a slash by the
    sum along the diagonal. The first 30 columns and the nearest 100 diagonals are always kept. Slashes are rounded to
    blocks of keys that need not be aligned, so that more than the diagonal itself is kept; verticals outside these
    blocks stay single columns. No key is counted twice.

    Deviations from the published code: grouped heads and batches are computed at once; any number of tokens; ties go
    to the lower column and the nearer diagonal; in chunked prefill the last queries of a chunk estimate for it.

    Formula:
        A = attention of the last `last_queries` queries; v(j) = sum over i of A(i, j), s(o) = sum of A(i, i - o)
        keep(i, j): j among the `vertical` best of v, or i - j among the `slash` best of s, rounded up to blocks

    When:
        Take it for long prompts that end in a question: what the question needs is what is kept. Leave it where
        earlier queries need other keys than the last ones, as in training on packed documents.

    Args:
        vertical: columns kept, at least 0 (30 are kept in any case); or, as a float in (0, 1), a share of the keys,
            which means the same at any length.
        slash: diagonals kept, at least 0 (50 are kept in any case), or a share of the keys like `vertical`.
        last_queries: queries that estimate, at least 1.
        block_size: queries in a row and keys in a block, a power of two from 16 to 256; 64 as published.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Jiang et al. 2024, MInference 1.0 (arXiv 2407.02490)"
    needs = frozenset({"causal"})
    knob = Knob("slash", 1, 1 << 30, log=True, integer=True)

    vertical: int | float = 1000
    slash: int | float = 6096
    last_queries: int = 64
    block_size: int = 64

    def __post_init__(self) -> None:
        check_amount("vertical", self.vertical, 0)
        check_amount("slash", self.slash, 0)
        check_int("last_queries", self.last_queries, 1)
        check_block_size(self.block_size)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Blocks along the slashes and columns between them; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: vertical_slash chooses by content, got None")
        return self.pattern_by(self.estimate(q, k, ctx), ctx)

    def estimate_key(self) -> Hashable:
        """The last queries; see Estimating."""
        return self.name, self.last_queries

    def estimate(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, ...]:
        """Attention of the last queries on each column and each diagonal: float32 [batch, heads, kv_len], both."""
        vertical, slash = last_query_sums(q, k, self.last_queries, ctx.softmax_scale, ctx.softcap)
        vertical[..., :_FORCED_VERTICALS] = torch.inf
        slash[..., :_FORCED_SLASHES] = torch.inf
        return vertical, slash

    def pattern_by(self, estimate: tuple[Tensor, ...], ctx: Context) -> BlockPattern:
        """Blocks along the slashes and columns between them; see Estimating."""
        layout = ctx.layout
        verticals, slashes = self._best(estimate)
        return build_pattern(verticals, slashes, layout.query_start, layout.q_len, layout.kv_len, self.block_size)

    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor]:
        """Columns and diagonals of each head, ascending: int64 [batch, heads, n] and [batch, heads, m]."""
        return self._best(self.estimate(q, k, ctx))

    def _best(self, estimate: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        vertical, slash = estimate
        n = vertical.shape[-1]
        columns = min(n, max(amount_of(self.vertical, n), _FORCED_VERTICALS))
        diagonals = min(n, max(amount_of(self.slash, n), _FEWEST_SLASHES))
        return best_ascending(vertical, columns), best_ascending(slash, diagonals)

    def turned(self, value: float) -> Method:
        """With that many slashes, and verticals in the proportion they have now; see Method.turned."""
        if isinstance(self.vertical, float) != isinstance(self.slash, float):
            # A number and a share have no proportion before the length is known.
            return replace(self, slash=round(value))
        most = max(1, self.slash) if isinstance(self.slash, int) else self.slash
        return replace(self, slash=round(value), vertical=round(value * self.vertical / most))

    def least_density(self, ctx: Context) -> float:
        """The diagonals alone, if they were the shortest; see Method.least_density."""
        n = ctx.layout.kv_len
        slash = min(n, max(amount_of(self.slash, n), _FEWEST_SLASHES))
        return 0.0 if ctx.layout.query_start else slash * (slash + 1) / (n * (n + 1))

    def choosing_pairs(self, ctx: Context) -> float:
        """Those of the estimating queries, once for columns and once for diagonals; see Method.choosing_pairs."""
        return 2.0 * self.last_queries * ctx.layout.kv_len

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """More columns than diagonals, which are rounded to blocks and so cost more; see Method.candidates."""
        parts = ((32, 128), (16, 64), (8, 64), (4, 32), (4, 16), (16, 16), (8, 8))
        return [{"vertical": 1 / vertical, "slash": 1 / slash} for vertical, slash in parts]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Few of both, more verticals, an odd number of estimating queries."""
        return [
            {"vertical": 10, "slash": 50, "block_size": 16},
            {"vertical": 70, "slash": 110, "block_size": 32, "last_queries": 7},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All diagonals."""
        return {"vertical": 1 << 20, "slash": 1 << 20, "block_size": 32}


def build_pattern(
    verticals: Tensor, slashes: Tensor, query_start: int, q_len: int, kv_len: int, size: int
) -> BlockPattern:
    """Blocks that cover the slashes row by row, and the verticals that they leave out.

    A row whose queries end before position e reads, for each diagonal o < e, the block of `size` keys that ends at
    max(e - o, size). From the far diagonals to the near ones: the next block begins where the last one ended if any
    of the remaining blocks reaches beyond it by no more than `size` keys, else where the nearest remaining one does.

    Args:
        verticals: int64 [batch, heads, n], ascending columns.
        slashes: int64 [batch, heads, m], ascending diagonals; must hold 0.
        query_start: position of the first query.
        q_len, kv_len: sizes.
        size: queries in a row and keys in a block.
    """
    batch, heads = slashes.shape[:2]
    device = slashes.device
    rows = -(-q_len // size)
    end = query_start + (torch.arange(rows, device=device) + 1) * size
    reach = int(end[-1])
    # In terms of the distance d from the end of a block to the end of its row, the next block is the same for all
    # rows: at distance d - size, or at the largest diagonal below d if that is nearer to the row.
    diagonal = torch.zeros(batch, heads, reach + 1, dtype=torch.int64, device=device)
    diagonal.scatter_(2, slashes, slashes)
    # below[d]: the largest chosen diagonal less than d.
    below = torch.nn.functional.pad(diagonal.cummax(-1).values, (1, 0))[..., :-1]
    furthest = below.gather(2, end.clamp(max=reach).expand(batch, heads, rows))
    # From here on distances are counted from -size. Where a block reaches the end of the row (d <= 0) it is the last,
    # and 0, which leads to itself, stands for none.
    step = torch.minimum(torch.arange(reach + 1, device=device), below + size)
    step = torch.nn.functional.pad(step[..., 1:], (size + 1, 0))
    far = torch.minimum(furthest + size, end.expand_as(furthest))[..., None]
    # Twice as many steps at each turn: those there are, and those that as many steps lead to.
    while bool((far[..., -1] > size).any()):
        far = torch.cat([far, step.gather(2, far.flatten(2)).view_as(far)], -1)
        step = step.gather(2, step)
    # [batch, heads, rows, steps]: distance of each block's end, absent where the row had ended.
    there = torch.ones_like(far, dtype=torch.bool)
    there[..., 1:] = far[..., :-1] > size
    far = far - size
    start = end[:, None] - far - size
    there &= start < kv_len
    starts = start[there]
    tile_ids, tiles = causal_tiles((end[:, None] - size - start)[there], size, size)
    counts, columns = _columns_between(verticals, start, there, size, kv_len)
    return BlockPattern.from_rows(there.sum(-1), starts, size, size, q_len, kv_len, tile_ids, tiles, counts, columns)


def _columns_between(verticals: Tensor, start: Tensor, there: Tensor, size: int, kv_len: int) -> tuple[Tensor, Tensor]:
    """Verticals before and between the blocks of each row: counts [batch, heads, rows] and the columns, row by row.

    Args:
        verticals: int64 [batch, heads, n], ascending.
        start: int64 [batch, heads, rows, steps], first key of each block, ascending where it is there.
        there: bool like `start`.
        size: keys in a block.
        kv_len: number of keys.
    """
    batch, heads, rows, steps = start.shape
    present = torch.zeros(batch, heads, kv_len, dtype=torch.int64, device=start.device)
    present.scatter_(2, verticals, 1)
    # before[x]: number of verticals less than x, so that a gap between blocks is a run of the ascending verticals.
    before = torch.nn.functional.pad(present.cumsum(-1), (1, 0))
    gap_end = before.gather(2, start.clamp(0, kv_len).flatten(2)).view_as(start)
    block_end = before.gather(2, (start + size).clamp(0, kv_len).flatten(2)).view_as(start)
    gap_start = torch.nn.functional.pad(block_end[..., :-1], (1, 0))
    length = ((gap_end - gap_start) * there).flatten()
    own = torch.arange(batch * heads, device=start.device).view(batch, heads, 1, 1) * verticals.shape[2]
    # From the place of a column in the result to its place among the verticals.
    shift = (gap_start + own).flatten() - (length.cumsum(0) - length)
    at = torch.repeat_interleave(shift, length)
    at += torch.arange(len(at), device=start.device)
    return length.view(batch, heads, rows, steps).sum(-1), verticals.flatten()[at]
