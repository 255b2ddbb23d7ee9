"""A small method that decodes, with a memory that can be watched."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept, Memory, Step
from hf_sparse_attn.decoding_method import DecodingMethod
from hf_sparse_attn.method import Decline

SIZE = 4


class PageMeans:
    """Sums of the keys of pages, and of the first slot's place in each row, grown with the cache."""

    def __init__(self, seen: Counter[str]) -> None:
        self.seen = seen
        self.sums: Tensor | None = None
        self.length = 0

    def update(self, k: Tensor, first: Tensor | None) -> None:
        start, end = self.length, k.shape[2]
        new = k[:, :, start:].float()
        if first is not None:
            padding = torch.arange(start, end) < first[:, None]
            new = new.masked_fill(padding[:, None, :, None], 0)
        pages = -(-end // SIZE)
        sums = torch.zeros(*k.shape[:2], pages, k.shape[3])
        if self.sums is not None:
            sums[:, :, : self.sums.shape[2]] = self.sums
        self.sums = sums.index_add_(2, torch.arange(start, end) // SIZE, new)
        self.seen["slots"] += end - start
        self.seen["rebuilt"] += start == 0
        self.length = end

    def crop(self, length: int) -> None:
        # Sums cannot be undone: whole pages stay.
        if self.sums is not None and length < self.length:
            self.length = length // SIZE * SIZE
            self.sums = self.sums[:, :, : self.length // SIZE]
            self.seen["crops"] += 1

    def select(self, rows: Tensor) -> None:
        if self.sums is not None:
            self.sums = self.sums.index_select(0, rows)
            self.seen["selects"] += 1


@dataclass(frozen=True, kw_only=True)
class Pages(DecodingMethod):
    """The pages with the largest product of query and summed keys, the last one always; a list for each key head.

    Args:
        count: pages that are kept.
        declines: why it declines, or None.
        seen: what the memories did, counted.
        told: what layers handed on to those after them, as (layer, what the layers before it had put there).
    """

    name = "pages"
    count: int = 3
    declines: str | None = None
    seen: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    told: list[Any] = field(default_factory=list, compare=False, repr=False)

    def decode(self, step: Step) -> Kept | Decline | None:
        if self.declines is not None:
            return Decline(self.declines)
        self.told.append((step.layer, sorted(step.layers)))
        step.layers[step.layer] = True
        means = step.memory.of(self.name, lambda: PageMeans(self.seen))
        means.update(step.k, step.first)
        assert means.sums is not None
        batch, kv_heads, pages, dim = means.sums.shape
        if pages <= self.count:
            return None
        q = step.q.float().view(batch, kv_heads, -1, dim).sum(2)
        scores = (means.sums @ q[..., None])[..., 0]
        scores[:, :, -1] = torch.inf
        if step.first is not None:
            hidden = torch.arange(pages) < (step.first // SIZE)[:, None]
            scores = scores.masked_fill(hidden[:, None], -torch.inf)
        found = scores.topk(self.count, 2)
        chosen = found.indices.where(found.values > -torch.inf, -1)
        return Kept(chosen.sort(2, descending=True).values.int(), SIZE)


@dataclass(frozen=True, kw_only=True)
class Forgetful(Pages):
    """The same without a memory: all is made anew in every step."""

    def decode(self, step: Step) -> Kept | Decline | None:
        return super().decode(replace(step, memory=Memory()))
