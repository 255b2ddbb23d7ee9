"""Blocks by density: those of a head by one threshold at which it keeps a share of the visible pairs of tokens."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.selection import gather_rows, rank_descending


def share_missing(scores: Tensor, forced: Tensor, visible: Tensor) -> Tensor:
    """The share of its row that would still be missing when an element's turn comes, from the highest score on.

    Elements whose missing share exceeds 1 less a threshold are those that `covering` keeps for it.

    Args:
        scores, forced, visible: as in `covering`.

    Returns:
        bfloat16 [..., n]: infinite where forced and for the first of the order, which all thresholds keep, negative
        where not visible, else from 0 to 1.
    """
    order = rank_descending(scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf))
    # Summed from the lowest score, so that small shares do not drown in the sum of the others.
    left = scores.gather(-1, order).flip(-1).cumsum(-1).flip(-1)
    left = left / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    left[..., 0] = torch.inf
    found = torch.empty_like(left).scatter_(-1, order, left)
    return found.masked_fill(forced, torch.inf).masked_fill(~visible, -1.0).bfloat16()


def block_pairs(layout: TokenLayout, size: int, device: torch.device | str = "cpu") -> Tensor:
    """Visible pairs of tokens in every aligned block of `size` x `size`: int64 [query blocks, key blocks]."""
    query = torch.arange(-(-layout.q_len // size), device=device)[:, None] * size
    key = torch.arange(-(-layout.kv_len // size), device=device) * size
    queries, keys = (layout.q_len - query).clamp(max=size), (layout.kv_len - key).clamp(max=size)
    if not layout.is_causal:
        return queries * keys
    before = layout.query_start + query - key

    def seen(last: Tensor) -> Tensor:
        """Pairs of the queries up to the one that sees `last` keys from the first of the block on."""
        inside = last.clamp(min=0).minimum(keys)
        return inside * (inside + 1) // 2 + (last - keys).clamp(min=0) * keys

    return seen(before + queries) - seen(before)


def whole_map(
    value: Callable[[int, int], Tensor], shape: tuple[int, int, int, int], device: torch.device, weight: int = 1,
    strips: int = 1,
) -> Tensor:  # fmt: skip
    """A map of all blocks in bfloat16, [batch, heads, rows, key blocks]; only strips of rows are held in float32.

    Args:
        value: (first row, last row) -> [batch, heads, rows, key blocks].
        shape, weight, strips: as in `gather_rows`.
        device: of the result.
    """
    batch, heads, rows, cols = shape
    found = torch.empty(shape, dtype=torch.bfloat16, device=device)
    step = min(-(-rows // strips), at_a_time(batch * heads * cols * weight))
    for first in range(0, rows, step):
        found[:, :, first : first + step] = value(first, min(first + step, rows))
    return found


def gather_share(values: Tensor, pairs: Tensor, density: float) -> tuple[Tensor, Tensor]:
    """As `gather_rows`: the blocks of the highest values of each head that hold a share of the visible pairs.

    Args:
        values: bfloat16 [batch, heads, rows, key blocks]; infinite is kept, negative is not.
        pairs: int64 [rows, key blocks], visible pairs in each block.
        density: in (0, 1]; what is nearest to it is kept.
    """
    batch, heads, rows, cols = values.shape
    # The bits of positive numbers are ordered as the numbers are; those of negative ones are negative.
    rank = values.contiguous().view(torch.int16)
    wanted = density * float(pairs.sum())
    limits = torch.stack([_limit(one, pairs, wanted) for one in rank.flatten(0, 1)]).view(batch, heads, 1, 1)
    return gather_rows(lambda first, last: rank[:, :, first:last] >= limits, (batch, heads, rows, cols))


def _limit(rank: Tensor, pairs: Tensor, wanted: float) -> Tensor:
    """The least rank that is kept so that the pairs of all kept blocks are nearest to `wanted`."""
    most = torch.tensor(torch.inf, dtype=torch.bfloat16).view(torch.int16)
    held = torch.zeros(int(most) + 1, dtype=torch.int64, device=rank.device)
    may = rank >= 0
    held.scatter_add_(0, rank[may].long(), pairs[may])
    total = held.flip(0).cumsum(0).flip(0)
    return (total - wanted).abs().flip(0).argmin().neg().add(len(held) - 1).to(torch.int16)
