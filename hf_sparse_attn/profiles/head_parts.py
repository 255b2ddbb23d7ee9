"""Some heads of a call: which go together, their tensors, and the estimates that several methods choose by."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Estimating, Method

# Heads that may be estimated for one that needs it.
_MORE_HEADS = 2


class Estimate(NamedTuple):
    """An estimate that several methods choose by, of some heads in ascending order."""

    heads: list[int]
    tensors: tuple[Tensor, ...]

    def of(self, heads: list[int]) -> tuple[Tensor, ...]:
        """That of some of its heads."""
        at = [self.heads.index(head) for head in heads]
        return tuple(part(t, at) for t in self.tensors)


def estimate_key_of(method: Method) -> Hashable:
    return method.estimate_key() if isinstance(method, Estimating) else None


def shared_estimates(used: dict[Method, list[int]], q: Tensor, k: Tensor, ctx: Context) -> dict[Hashable, Estimate]:
    """The estimates of methods that choose by one, made once for the heads of all that share it."""
    wanted: dict[Hashable, list[tuple[Estimating, list[int]]]] = {}
    for method, heads in used.items():
        if isinstance(method, Estimating) and method.estimate_key() is not None and method.why_not(ctx) is None:
            wanted.setdefault(method.estimate_key(), []).append((method, heads))
    found = {}
    group = ctx.num_heads // ctx.num_kv_heads
    for key, sharing in wanted.items():
        heads = sorted(h for _, own in sharing for h in own)
        kv_heads = sorted({head // group for head in heads})
        every = [kv_head * group + i for kv_head in kv_heads for i in range(group)]
        parts = equal_groups(heads, ctx)
        # One call for some heads more is cheaper than several calls.
        if len(parts) > 1 and len(every) <= _MORE_HEADS * len(heads):
            parts = [(every, kv_heads)]
        made = [
            sharing[0][0].estimate(part(q, own), part(k, own_kv), of_heads(ctx, own, own_kv)) for own, own_kv in parts
        ]
        order = [head for own, _ in parts for head in own]
        index = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=q.device)
        joined = made[0] if len(made) == 1 else tuple(torch.cat(x, 1)[:, index] for x in zip(*made, strict=True))
        found[key] = Estimate(sorted(order), joined)
    return found


def equal_groups(heads: list[int], ctx: Context) -> list[tuple[list[int], list[int]]]:
    """The heads, and their key/value heads, in parts in which each key/value head has equally many of them."""
    group = ctx.num_heads // ctx.num_kv_heads
    by_kv: dict[int, list[int]] = {}
    for head in sorted(heads):
        by_kv.setdefault(head // group, []).append(head)
    parts: dict[int, tuple[list[int], list[int]]] = {}
    for kv_head, own in by_kv.items():
        both = parts.setdefault(len(own), ([], []))
        both[0].extend(own)
        both[1].append(kv_head)
    return list(parts.values())


def of_heads(ctx: Context, heads: list[int], kv_heads: list[int]) -> Context:
    return replace(ctx, num_heads=len(heads), num_kv_heads=len(kv_heads))


def part(t: Tensor, heads: list[int]) -> Tensor:
    """Some heads of [batch, heads, ...]: a view where they are evenly spaced."""
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    if all(b - a == step for a, b in pairwise(heads)):
        return t[:, heads[0] : heads[-1] + 1 : step]
    # Runs of neighbours at once: the heads of a model's own tensors lie between one another in memory.
    edges = [i for i, (a, b) in enumerate(pairwise(heads), 1) if b - a != 1]
    runs = zip([0, *edges], [*edges, len(heads)], strict=True)
    return torch.cat([t[:, heads[i] : heads[j - 1] + 1] for i, j in runs], 1)
