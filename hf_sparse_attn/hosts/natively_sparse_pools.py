"""Choosing pools of keys for every query: the step that k-pool, QSA and CSA share, in strips of queries."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Bytes of scores, of all index heads, that are held at a time.
_SCORES = 1 << 23
# Queries of a strip, however short their scores.
_ROWS = 64


def strips(most: Tensor, bytes_each: int) -> Iterator[tuple[slice, int]]:
    """Strips of queries, each with the largest of their `most`.

    Args:
        most: int [batch or 1, q_len], of what each query may see.
        bytes_each: bytes of scores that a query needs.
    """
    queries = most.shape[1]
    rows = max(1, min(_ROWS, _SCORES // max(1, bytes_each)))
    padded = torch.nn.functional.pad(most.amax(0), (0, -queries % rows))
    for start, top in zip(range(0, queries, rows), padded.view(-1, rows).amax(1).tolist(), strict=True):
        yield slice(start, min(start + rows, queries)), top


def top_pools(
    q: Tensor, k: Tensor, weights: Tensor | None, seen: Tensor, topk: int, *, valid: Tensor | None = None,
    own_width: bool = False,
) -> Tensor:  # fmt: skip
    """The pools of the highest scores `sum over heads of weights * relu(q k)`, for each query.

    The choice among equal scores is that of torch.topk, which depends on how wide the row is.

    Args:
        q: index queries [batch, q_len, heads, dim], scaled.
        k: one key of each pool, [batch, pools, dim].
        weights: float32 [batch, q_len, heads]; None where all weigh 1.
        seen: int [batch or 1, q_len]: a query may choose among its first so many pools.
        topk: pools of a list.
        valid: bool [batch, pools], False where a pool is never chosen; None where each may be.
        own_width: whether a row ends with the last pool its query may choose, and not with the last one.

    Returns:
        int64 [batch, q_len, min(topk, pools)], -1 where there is no further pool.
    """
    batch, queries, heads, _ = q.shape
    pools = k.shape[1]
    topk = min(topk, pools)
    out = torch.full((batch, queries, topk), -1, dtype=torch.int64, device=q.device)
    place = torch.arange(pools, device=q.device)
    keys = k.float().transpose(1, 2)
    for rows, end in strips(seen.clamp(max=pools), 4 * batch * heads * pools):
        if end <= 0:
            continue
        may = place[:end] < seen[:, rows, None]
        if valid is not None:
            may = may & valid[:, None, :end]
        if end <= topk:
            out[:, rows, :end] = place[:end].where(may, -1)
            continue
        products = (q[:, rows].float().flatten(1, 2) @ keys[:, :, :end]).relu_().unflatten(1, (-1, heads))
        found = products.sum(2) if weights is None else (weights[:, rows, None] @ products)[:, :, 0]
        scores = found.new_full((*found.shape[:2], pools), -torch.inf)
        scores[:, :, :end] = found.masked_fill_(~may, -torch.inf)
        best, chosen = scores.topk(topk)
        if own_width:
            _choose_again(scores, best, chosen, seen[:, rows])
        out[:, rows] = chosen.where(best > -torch.inf, -1)
    return out


def _choose_again(scores: Tensor, best: Tensor, chosen: Tensor, seen: Tensor) -> None:
    """Chooses anew, in rows of their own width, where scores that are equal stand on both sides of the last place."""
    last = best[..., -1:]
    tied = (last > -torch.inf) & ((scores == last).sum(-1, keepdim=True) > (best == last).sum(-1, keepdim=True))
    wide = seen.expand(scores.shape[:2])
    for row, query in tied[..., 0].nonzero().tolist():
        own = scores[row, query, : int(wide[row, query])]
        chosen[row, query] = own.topk(best.shape[-1]).indices
