"""Exact attention of queries over lists of single keys, each list shared by the heads that share keys.

What models that select their own keys compute (DeepSeek sparse attention and its kin): every query has one list, read
by all heads, or one for each group of heads. Rows of queries run in strips, so that memory grows with the number of
keys and of queries, never with their product; the backward computes the weights again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.autocast import no_autocast

# Bytes of scores or gathered keys that a strip of queries holds at a time.
_STRIP = 1 << 23
# Queries of a strip that reads its keys whole.
_ROWS = 64
# Exponentials are taken to base 2, for those to base e of torch are slow on a CPU where a logit is -inf.
_LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Visible:
    """Which keys each query sees: its mask, where there is one, else those up to its own that are no padding.

    Args:
        first: slot of the first query among the keys.
        padding: bool [batch, kv_len], False where a key is padding; None where none is.
        mask: bool [batch or 1, q_len, kv_len], which then says it all, or None.
    """

    first: int = 0
    padding: Tensor | None = None
    mask: Tensor | None = None

    def end(self, stop: int, keys: int) -> int:
        """Keys up to the last that one of the first `stop` queries may see, out of `keys`."""
        return keys if self.mask is not None else max(0, min(keys, self.first + stop))

    def rows(self, start: int, stop: int, end: int, device: torch.device) -> Tensor:
        """Whether queries from `start` to `stop` see the first `end` keys: bool [batch or 1, queries, end]."""
        if self.mask is not None:
            return self.mask[:, start:stop, :end].to(device)
        query = torch.arange(self.first + start, self.first + stop, device=device)
        seen = (torch.arange(end, device=device) <= query[:, None])[None]
        return seen if self.padding is None else seen & self.padding[:, None, :end].to(device)

    def of(self, lists: Tensor) -> Tensor:
        """Lists int [batch, q_len, n] with -1 in place of keys that their query does not see.

        Args:
            lists: slots of keys; negative ones are none.
        """
        if self.mask is not None:
            seen = self.mask.expand(lists.shape[0], -1, -1).gather(2, lists.clamp(min=0).long())
        else:
            query = torch.arange(self.first, self.first + lists.shape[1], device=lists.device)
            seen = lists <= query[:, None]
            if self.padding is not None:
                rows = torch.arange(lists.shape[0], device=lists.device)[:, None, None]
                seen = seen & self.padding[rows, lists.clamp(0, self.padding.shape[1] - 1).long()]
        return lists.where(seen & (lists >= 0), -1)

    def pairs(self, batch: int, queries: int, keys: int) -> int:
        """Visible pairs of query and key in the whole batch."""
        if self.mask is not None:
            return int(self.mask.sum()) * (batch // self.mask.shape[0])
        if self.padding is None:
            # The last queries of a static buffer that is full see all of it.
            over = max(0, self.first + queries - keys)
            return batch * (queries * self.first + queries * (queries + 1) // 2 - over * (over + 1) // 2)
        seen = self.padding.cumsum(1)
        last = torch.arange(self.first, self.first + queries, device=seen.device).clamp(max=keys - 1)
        return int(seen[:, last].sum())


def listed_attention(
    q: Tensor, k: Tensor, v: Tensor, lists: Tensor, scaling: float, sinks: Tensor | None = None,
    further: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of every query over the keys of its list, softmax over these alone; differentiable.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim]; kv_heads divides heads.
        v: [batch, kv_heads, kv_len, value dim]; may be `k` itself.
        lists: int [batch, 1 or kv_heads, q_len, n], slots of keys without duplicates; negative ones are none. A query
            without any key gets output 0.
        scaling: factor on the logits.
        sinks: [heads], one more logit per head whose value is 0; or None.
        further: (queries [batch, heads, q_len, more], keys [batch, kv_heads, kv_len, more]), further channels of
            queries and keys that are kept apart, as the rotated ones of latent attention are; or None.

    Returns:
        output [batch, heads, q_len, value dim] in the dtype of `q`, and the log-sum-exp of the logits, sinks included,
        [batch, heads, q_len], which has no gradient. Half precision is computed in float32.

    Raises:
        ValueError: shapes that do not fit.
    """
    batch, heads, queries, _ = q.shape
    groups = k.shape[1]
    if heads % groups or v.shape[:3] != k.shape[:3] or k.shape[0] != batch:
        raise ValueError(
            f"`k` and `v` must be [{batch}, a divisor of {heads}, ...], got {[*k.shape]} and {[*v.shape]}"
        )
    if lists.ndim != 4 or lists.shape[:3] not in ((batch, 1, queries), (batch, groups, queries)):
        raise ValueError(f"`lists` must be [{batch}, 1 or {groups}, {queries}, n], got {[*lists.shape]}")
    if lists.shape[3] == 0:
        lists = lists.new_full((*lists.shape[:3], 1), -1)
    q2, k2 = (None, None) if further is None else further
    with no_autocast(q.device):
        out, lse = _Listed.apply(q, k, None if v is k else v, q2, k2, sinks, lists, float(scaling))
    return out, lse


def gathered_cost(each: int, dim: int) -> float:
    """What a pair of query and key costs where keys are gathered for every query, over what it costs in a product of
    all keys with a strip of queries; fitted to times on a CPU with AVX-512, of 4 to 128 heads and 28 to 576 channels.

    Args:
        each: query heads that share a key.
        dim: channels of a key and its value, as they are stored.
    """
    return 1 + (60 + dim) / (each * (6 + dim / 24))


def pairs_computed(lists: Tensor, keys: int, cost: float) -> tuple[float, float]:
    """How many pairs of query and key a call costs, as if all were in products of keys that are read whole.

    Args:
        lists: as of listed_attention.
        keys: how many there are.
        cost: of a pair whose key is gathered; see gathered_cost.

    Returns:
        what the lists cost by the cheaper way of each strip, and what they cost with all keys up to their last.
    """
    batch, _, queries, n = lists.shape
    by_list = whole = 0.0
    for start, end in zip(range(0, queries, _ROWS), _ends(lists), strict=True):
        rows = batch * min(_ROWS, queries - start)
        by_list += rows * min(float(end), cost * n)
        whole += rows * min(end, keys)
    return by_list, whole


@dataclass(frozen=True)
class _Strip:
    """Some queries of a call, some heads of keys, and the keys that they read.

    Args:
        rows: the queries.
        groups: the heads of keys.
        each: query heads of each.
        end: the first so many keys are read whole, with a mask; 0 where keys are gathered by the lists.
    """

    rows: slice
    groups: slice
    each: int
    end: int

    def heads(self, x: Tensor) -> Tensor:
        """The rows of x [batch, heads, q_len, dim] in its query heads."""
        return x[:, self.groups.start * self.each : self.groups.stop * self.each, self.rows]


def _strips(lists: Tensor, heads: int, groups: int, dim: int) -> Iterator[_Strip]:
    """Cuts a call into strips, each run in the cheaper of two ways.

    Args:
        lists: [batch, lists, q_len, n].
        heads, groups: query heads, and heads of keys.
        dim: channels of a gathered key and value.
    """
    batch, _, queries, n = lists.shape
    each = heads // groups
    gathered = n * gathered_cost(each, dim)
    for start, end in zip(range(0, queries, _ROWS), _ends(lists), strict=True):
        stop = min(start + _ROWS, queries)
        if 0 < end <= gathered:
            some = max(1, _STRIP // (4 * batch * each * (stop - start) * end))
            for first in range(0, groups, some):
                yield _Strip(slice(start, stop), slice(first, min(first + some, groups)), each, end)
            continue
        rows = max(1, _STRIP // (4 * batch * groups * n * dim))
        for first in range(start, stop, rows):
            yield _Strip(slice(first, min(first + rows, stop)), slice(0, groups), each, 0)


def _ends(lists: Tensor) -> list[int]:
    """One more than the last key of every _ROWS queries; one look at the lists for all of them."""
    last = torch.nn.functional.pad(lists.amax((0, 1, 3)), (0, -lists.shape[2] % _ROWS), value=-1)
    ends: list[int] = (last.view(-1, _ROWS).amax(1) + 1).tolist()
    return ends


class _Keys:
    """Keys and values of one strip: all that there are up to its end, or those listed.

    `hidden` is added to logits: 0 for keys that are listed, else -inf.
    """

    def __init__(self, strip: _Strip, lists: Tensor, keys: int, dtype: torch.dtype) -> None:
        self.strip, self.end, groups = strip, strip.end, strip.groups
        own = lists[:, groups if lists.shape[1] > 1 else slice(None), strip.rows].long()
        batch, many, rows, n = own.shape
        if strip.end:
            hidden = own.new_full((batch, many, rows, strip.end + 1), -torch.inf, dtype=dtype)
            hidden.scatter_(3, own.where(own >= 0, strip.end), 0)
            # [batch, lists, 1, rows, keys]
            self.hidden = hidden[:, :, None, :, :-1]
            return
        # [batch, lists, rows, 1, n]
        self.hidden = own.new_zeros(own.shape, dtype=dtype).masked_fill_(own < 0, -torch.inf)[:, :, :, None]
        base = torch.arange(batch * groups.stop, device=own.device).view(batch, groups.stop, 1, 1) * keys
        self.index = (own.clamp(min=0) + base).reshape(-1)
        self.shape = (batch, groups.stop, rows, n)

    def take(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Those of x [batch, groups, keys, dim]: [batch, groups, end, dim], or [batch, groups, rows, n, dim]."""
        if self.end:
            return x[:, self.strip.groups, : self.end].to(dtype)
        flat = x.reshape(-1, x.shape[3]).index_select(0, self.index)
        return flat.view(*self.shape, x.shape[3]).to(dtype)

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Products of queries as `queries` gives them with keys as `take` does."""
        if not self.end:
            return q @ k.transpose(3, 4)
        return (q.flatten(2, 3) @ k.transpose(2, 3)).unflatten(2, q.shape[2:4])

    def values(self, p: Tensor, v: Tensor) -> Tensor:
        """Weights times values, in the order of `queries`."""
        return (p.flatten(2, 3) @ v).unflatten(2, p.shape[2:4]) if self.end else p @ v

    def queries(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of x [batch, heads, q_len, dim] by group: heads before rows where keys are read whole, else after."""
        own = self.strip.heads(x).to(dtype).unflatten(1, (-1, self.strip.each))
        return own if self.end else own.transpose(2, 3)

    def put(self, into: Tensor, x: Tensor) -> None:
        """The inverse of `queries`."""
        self.strip.heads(into).copy_((x if self.end else x.transpose(2, 3)).flatten(1, 2))

    def add(self, into: Tensor, weights: Tensor, x: Tensor) -> None:
        """Adds, to the keys' gradient [batch, groups, keys, dim], weights transposed times rows of queries."""
        if self.end:
            own = into[:, self.strip.groups, : self.end]
            own += weights.flatten(2, 3).transpose(2, 3) @ x.flatten(2, 3)
            return
        # A listed key that is none has weight 0.
        into.view(-1, into.shape[3]).index_add_(0, self.index, (weights.transpose(3, 4) @ x).flatten(0, 3))

    def sinks(self, sinks: Tensor, dtype: torch.dtype) -> Tensor:
        """Sinks [heads] beside logits."""
        own = sinks.to(dtype).unflatten(0, (-1, self.strip.each))[self.strip.groups, :, None, None]
        return own if self.end else own.transpose(1, 2)


class _Listed(torch.autograd.Function):
    """See listed_attention."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor | None, q2: Tensor | None, k2: Tensor | None,
        sinks: Tensor | None, lists: Tensor, scaling: float,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, heads, queries, _ = q.shape
        work = _work_dtype(q)
        out = q.new_empty(batch, heads, queries, (k if v is None else v).shape[3])
        lse = torch.empty(batch, heads, queries, dtype=work, device=q.device)
        for strip in _strips(lists, heads, k.shape[1], _dim(k, v, k2)):
            keys = _Keys(strip, lists, k.shape[2], work)
            scores, kk, _ = _scores(keys, q, k, q2, k2, scaling, work)
            top = scores.amax(-1, keepdim=True)
            sink = None if sinks is None else keys.sinks(sinks, work) * _LOG2E
            top = top if sink is None else torch.maximum(top, sink)
            # Of a query without any key.
            top = top.where(top > -torch.inf, 0)
            weights = scores.sub_(top).exp2_()
            total = weights.sum(-1, keepdim=True)
            total = total if sink is None else total + (sink - top).exp2()
            values = kk if v is None else keys.take(v, work)
            own = keys.values(weights, values).div_(total.where(total > 0, 1))
            keys.put(out, own)
            keys.put(lse[..., None], top / _LOG2E + total.log())
        ctx.save_for_backward(q, k, v, q2, k2, sinks, lists, out, lse)
        ctx.scaling = scaling
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
        with no_autocast(grad.device):
            return _Listed._gradients(ctx, grad)

    @staticmethod
    def _gradients(ctx: Any, grad: Tensor) -> Any:
        q, k, v, q2, k2, sinks, lists, out, lse = ctx.saved_tensors
        work, scaling = _work_dtype(q), ctx.scaling
        wanted = ctx.needs_input_grad
        dq, dq2 = torch.empty_like(q), None if q2 is None else torch.empty_like(q2)
        dk = torch.zeros(k.shape, dtype=work, device=k.device)
        # Where the values are the keys, so is their gradient.
        dv = dk if v is None else torch.zeros(v.shape, dtype=work, device=v.device)
        dk2 = None if k2 is None else torch.zeros(k2.shape, dtype=work, device=k2.device)
        dsinks = None if sinks is None else torch.zeros(sinks.shape, dtype=work, device=q.device)
        for strip in _strips(lists, q.shape[1], k.shape[1], _dim(k, v, k2)):
            keys = _Keys(strip, lists, k.shape[2], work)
            scores, kk, kk2 = _scores(keys, q, k, q2, k2, scaling, work)
            own_lse = keys.queries(lse[..., None], work)
            weights = scores.sub_(own_lse.where(own_lse > -torch.inf, 0) * _LOG2E).exp2_()
            go = keys.queries(grad, work)
            delta = (go * keys.queries(out, work)).sum(-1, keepdim=True)
            keys.add(dv, weights, go)
            if sinks is not None and dsinks is not None:
                lost = (keys.sinks(sinks, work) - own_lse).exp() * delta
                own = dsinks.unflatten(0, (-1, strip.each))[strip.groups]
                own -= lost.sum((0, 3 if strip.end else 2, 4))
            values = kk if v is None else keys.take(v, work)
            slope = keys.scores(go, values).sub_(delta).mul_(weights).mul_(scaling)
            keys.put(dq, keys.values(slope, kk))
            keys.add(dk, slope, keys.queries(q, work))
            if q2 is not None and kk2 is not None and dq2 is not None and dk2 is not None:
                keys.put(dq2, keys.values(slope, kk2))
                keys.add(dk2, slope, keys.queries(q2, work))
        pairs = ((dq, q), (dk, k), (None if v is None else dv, v), (dq2, q2), (dk2, k2), (dsinks, sinks))
        grads = (None if g is None or x is None else g.to(x.dtype) for g, x in pairs)
        return (*(g if need else None for g, need in zip(grads, wanted, strict=False)), None, None)


def _scores(
    keys: _Keys, q: Tensor, k: Tensor, q2: Tensor | None, k2: Tensor | None, scaling: float, work: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits of a strip in units of log 2, -inf where a key is not listed, with the keys that they are of."""
    kk = keys.take(k, work)
    scores = keys.scores(keys.queries(q, work), kk)
    kk2 = None
    if q2 is not None and k2 is not None:
        kk2 = keys.take(k2, work)
        scores += keys.scores(keys.queries(q2, work), kk2)
    return scores.mul_(scaling * _LOG2E).add_(keys.hidden), kk, kk2


def _dim(k: Tensor, v: Tensor | None, k2: Tensor | None) -> int:
    """Channels that a gathered key takes."""
    return k.shape[3] + sum(x.shape[3] for x in (v, k2) if x is not None)


def _work_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
