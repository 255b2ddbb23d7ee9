"""FlexPrefill: how much of the attention to keep is fixed, how many blocks that takes is found out for each head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import (
    amount_of,
    check_amount,
    check_block_size,
    check_share,
    gather_rows,
    last_query_sums,
    least_of_row_blocks,
    pattern_of_rows,
    pool_blocks,
    rank_descending,
    row_blocks,
)


@METHODS.register("flexprefill")
@dataclass(frozen=True, kw_only=True)
class FlexPrefill(Method):
    """Each head keeps as many blocks as hold a share of its attention, chosen in one of two ways; drops the rest.

    The last block of queries estimates. If block means of the keys would have told its attention (square root of the
    Jensen-Shannon divergence below `tau`), the head is query-aware: means of queries and of keys are compared for all
    rows, and the best blocks of all rows together are kept until they hold `gamma` of the attention. Otherwise it is a
    vertical-slash head: it keeps the best columns and diagonals of blocks, as many as single columns and diagonals
    hold `gamma`. Every head keeps the first block, the row's own, and columns and diagonals of `min_budget`. Ties go
    to the earlier block and to the nearer diagonal.

    Deviations from the published code: batches and grouped heads at once; the divergence is finite where a share is 0
    (there it is NaN, which makes the head vertical-slash); blocks of diagonals are counted from the main diagonal (at
    lengths that are no multiple of the block they are off by up to a block there); shares become numbers of blocks by
    the size of the block (there by 128 at any size: `unit`); block means are over the tokens there are; at gamma 1
    everything is kept; short prompts need no rule of their own. In chunked prefill the last queries of a chunk
    estimate for it. One head's map of blocks is held at a time, for query-aware heads as float32.

    Formula:
        P = softmax of the last block of queries, p(c) = mean of P over these queries, added up by key blocks
        query-aware where sqrt(JSD(softmax(mean(Q_last) . mean(K_c)), p)) < tau
        query-aware: the best blocks (r, c) by softmax(mean(Q_r) . mean(K_c)) while they hold at most gamma of it
        else: the best n // unit + 1 columns and diagonals of blocks; n single ones hold gamma of P

    When:
        Take it for long prompts whose need of keys differs from one to the next: the budget follows the prompt.
        Leave it where the density must be known ahead, or where many questions stand before the last queries.

    Args:
        gamma: share of the estimated attention that is kept, in (0, 1].
        tau: largest distance of a query-aware head, at least 0 (none is); from 0.84 on all are.
        min_budget: tokens of columns, and of diagonals, that every head keeps, at least 1; 1024 in the code, 512 in
            its README. Or, as a float in (0, 1), a share of the keys, which means the same at any length.
        max_budget: tokens of columns, and of diagonals, that a vertical-slash head keeps at most, not less than
            `min_budget`, or a share of the keys like it; None for no limit.
        block_size: tokens in a block of queries and of keys, a power of two from 16 to 256.
        unit: columns or diagonals that count as one block, at least 1; None means `block_size`.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Lai et al. 2025, FlexPrefill (arXiv 2502.20766)"
    needs = frozenset({"causal"})
    knob = Knob("gamma", 0.01, 1.0)

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int | float = 1024
    max_budget: int | float | None = None
    block_size: int = 128
    unit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gamma", check_share("gamma", self.gamma))
        if isinstance(self.tau, bool) or not isinstance(self.tau, (int, float)):
            raise TypeError(f"`tau` must be a number, got {self.tau!r} of type {type(self.tau).__name__}")
        if not self.tau >= 0:
            raise ValueError(f"`tau` must be at least 0, got {self.tau}")
        check_amount("min_budget", self.min_budget, 1)
        if self.max_budget is not None:
            alike = isinstance(self.max_budget, float) == isinstance(self.min_budget, float)
            check_amount("max_budget", self.max_budget, int(self.min_budget) if alike else 1)
            if alike and self.max_budget < self.min_budget:
                raise ValueError(f"`max_budget` must be at least {self.min_budget}, got {self.max_budget}")
        check_block_size(self.block_size)
        if self.unit is not None:
            check_int("unit", self.unit, 1)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Columns, diagonals and single blocks of each head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: flexprefill chooses by content, got None")
        layout, size, device = ctx.layout, self.block_size, q.device
        queries, keys = pool_blocks(q.detach(), size).flatten(0, 1), pool_blocks(k.detach(), size).flatten(0, 1)
        rows, cols, group = queries.shape[1], keys.shape[1], q.shape[1] // k.shape[1]
        columns, diagonals, aware = (x.flatten(0, 1) for x in self.choose(q.detach(), k.detach(), ctx))
        low, high = row_blocks(layout, size, device)
        block = torch.arange(cols, device=device)
        parts = []
        step = at_a_time(rows * cols)
        for head in range(0, len(queries), step):
            some = slice(head, min(head + step, len(queries)))
            single: Tensor | None = None
            if bool(aware[some].any()):
                key = keys[torch.arange(some.start, some.stop, device=device) // group]
                single = self._single_blocks(queries[some] @ key.mT, block <= high[:, None], ctx)
                single &= aware[some, None, None]

            def keep(first: int, last: int, some: slice = some, single: Tensor | None = single) -> Tensor:
                kept = columns[some, None] | diagonals[some][:, (low[first:last, None] - block).clamp(min=0)]
                kept = kept | diagonals[some][:, (high[first:last, None] - block).clamp(min=0)]
                if single is not None:
                    kept = kept | single[:, first:last]
                return (kept & (block <= high[first:last, None]))[None]

            parts.append(gather_rows(keep, (1, some.stop - some.start, rows, cols)))
        counts = torch.cat([count for count, _ in parts], 1).view(*q.shape[:2], rows)
        return pattern_of_rows(counts, torch.cat([blocks for _, blocks in parts]), size, layout)

    def choose(self, q: Tensor, k: Tensor, ctx: Context) -> tuple[Tensor, Tensor, Tensor]:
        """Kept columns and diagonals of blocks, both bool [batch, heads, key blocks], and which heads are query-aware.

        Args:
            q: [batch, heads, q_len, dim].
            k: [batch, kv_heads, kv_len, dim].
            ctx: the call.
        """
        size, last = self.block_size, min(self.block_size, q.shape[2])
        sums = last_query_sums(q, k, last, ctx.softmax_scale, ctx.softcap)
        vertical, slash = (share / last for share in sums)
        by_column, by_diagonal = (
            torch.nn.functional.pad(share, (0, -share.shape[-1] % size)).unflatten(-1, (-1, size)).sum(-1)
            for share in (vertical, slash)
        )
        mean = q[:, :, -last:].mean(2, dtype=torch.float32).unflatten(1, (k.shape[1], -1))
        guess = self._logits(mean @ pool_blocks(k, size).mT, ctx).softmax(-1).flatten(1, 2)
        aware = js_distance(guess, by_column) < self.tau
        blocks = by_column.shape[-1]
        fewest = -(-amount_of(self.min_budget, k.shape[2]) // size)
        most = blocks if self.max_budget is None else min(blocks, -(-amount_of(self.max_budget, k.shape[2]) // size))
        kept = []
        for share, pooled in ((vertical, by_column), (slash, by_diagonal)):
            needed = (share.sort(dim=-1, descending=True).values.cumsum(-1) <= self.gamma).sum(-1) + 1
            count = (needed // (self.unit or size) + 1).clamp(fewest, max(fewest, most))
            if self.gamma == 1:
                count = torch.full_like(count, max(fewest, most))
            count = count.masked_fill(aware, fewest)
            # The first column of blocks and the main diagonal.
            pooled[..., 0] = torch.inf
            place = torch.arange(blocks, device=q.device) < count[..., None]
            kept.append(torch.zeros_like(place).scatter_(-1, rank_descending(pooled), place))
        return kept[0], kept[1], aware

    def _logits(self, product: Tensor, ctx: Context) -> Tensor:
        logits = product * ctx.softmax_scale
        return ctx.softcap * torch.tanh(logits / ctx.softcap) if ctx.softcap else logits

    def _single_blocks(self, product: Tensor, visible: Tensor, ctx: Context) -> Tensor:
        """The best blocks of all rows together: bool [heads, rows, key blocks].

        Args:
            product: mean queries times mean keys, float32 [heads, rows, key blocks].
            visible: bool [rows, key blocks].
            ctx: the call.
        """
        if self.gamma == 1:
            return visible.expand_as(product).clone()
        shares = self._logits(product, ctx).masked_fill(~visible, -torch.inf).softmax(-1)
        share, order = shares.flatten(1).sort(dim=-1, descending=True, stable=True)
        kept = share.cumsum(-1) <= self.gamma * shares.shape[1]
        return torch.zeros_like(kept).scatter_(-1, order, kept).view_as(shares)

    def least_density(self, ctx: Context) -> float:
        """The first block and the query's own; see Method.least_density."""
        return least_of_row_blocks(ctx, self.block_size)

    def choosing_pairs(self, ctx: Context) -> float:
        """Those of the last block of queries; see Method.choosing_pairs."""
        return float(self.block_size * ctx.layout.kv_len)

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Shares of the attention that are held; see Method.candidates."""
        return [{"gamma": held, "min_budget": 1 / 32} for held in (0.6, 0.9)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Vertical-slash heads, query-aware ones, and the switch between them."""
        return [
            {"gamma": 0.3, "tau": 0.0, "min_budget": 16, "block_size": 16},
            {"gamma": 0.6, "tau": 1.0, "min_budget": 32, "block_size": 32},
            {"gamma": 0.8, "tau": 0.25, "min_budget": 16, "max_budget": 64, "block_size": 16, "unit": 64},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """The whole attention."""
        return {"gamma": 1.0, "block_size": 32}


def js_distance(p: Tensor, q: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence (natural logarithm) over the last dimension.

    Args:
        p, q: float32 [..., n], shares that add up to 1; zeros are allowed.
    """
    middle = ((p + q) / 2).clamp(min=torch.finfo(p.dtype).tiny)
    # xlogy is 0 where the share is 0, as the limit is; p * log(p / middle) is NaN there.
    total = torch.special.xlogy(p, p / middle) + torch.special.xlogy(q, q / middle)
    return (total.sum(-1) / 2).clamp(min=0).sqrt()
