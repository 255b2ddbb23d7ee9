"""Decoding: what a method sees of a step in which text is generated, what it keeps of a cache, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from hf_sparse_attn.pattern.block_pattern import BlockPattern


@dataclass(frozen=True)
class Kept:
    """The keys that the one query of each row of a batch reads: pages of a cache, by number.

    Args:
        pages: int32 [batch, lists, count], numbers of pages, -1 where a list has no more; none twice. There is 1 list
            for all heads, one for each head of keys, or one for each head of queries.
        size: slots of a page: page p has slots p * size to (p + 1) * size - 1, of the last one those that exist.
    """

    pages: Tensor
    size: int = 1

    def pattern(self, kv_len: int, heads: int, first: Tensor | None = None) -> BlockPattern:
        """The same keys for a row of one query, as any backend reads it.

        Args:
            kv_len: slots of the cache.
            heads: of queries.
            first: int64 [batch], the first slot of each row that is no padding, or None.
        """
        lists = self.pages.repeat_interleave(heads // self.pages.shape[1], 1)
        valid = lists >= 0
        counts = valid.sum(2, keepdim=True)
        found = BlockPattern.from_rows(counts, lists[valid] * self.size, 1, self.size, 1, kv_len)
        return found if first is None else found.with_kv_range(_range(first, kv_len))


def token_lists(mask: Tensor) -> Tensor:
    """The tokens that a mask keeps, ascending, and -1 where a row has no more: int64 [rows, most of any row].

    Args:
        mask: bool [rows, tokens].
    """
    counts = mask.sum(1, keepdim=True)
    most = int(counts.max())
    order = mask.int().sort(dim=1, descending=True, stable=True).indices[:, :most]
    return order.masked_fill(torch.arange(most, device=mask.device) >= counts, -1)


def kept_tokens(rows: Sequence[Tensor], batch: int) -> Kept:
    """Single tokens as pages.

    Args:
        rows: int [lists, count] for every row of the batch, or for one that stands for all; -1 for none.
        batch: number of rows.
    """
    most = max(row.shape[1] for row in rows)
    padded = [torch.nn.functional.pad(row, (0, most - row.shape[1]), value=-1) for row in rows]
    return Kept(torch.stack(padded).int().expand(batch, -1, -1))


def whole_pattern(q_len: int, kv_len: int, first: Tensor | None, device: torch.device) -> BlockPattern:
    """All keys for the last `q_len` of `kv_len` tokens; see Kept.pattern for `first`."""
    found = BlockPattern.dense(q_len, kv_len, True, device=device)
    return found if first is None else found.with_kv_range(_range(first, kv_len))


def _range(first: Tensor, kv_len: int) -> Tensor:
    return torch.stack([first, torch.full_like(first, kv_len)], 1)


class Remembered(Protocol):
    """What is remembered of the keys of one layer of a cache, grown with it and never made anew."""

    def update(self, k: Tensor, first: Tensor | None) -> None:
        """Takes in the slots that are new.

        Args:
            k: [batch, kv_heads, length, dim], all keys; those before the length of the last update are as they were.
            first: int64 [batch], first slots that are no padding, or None.
        """

    def crop(self, length: int) -> None:
        """Forgets the slots from `length` on."""

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was (beams, repeated and chosen rows)."""


R = TypeVar("R", bound=Remembered)


@dataclass
class Memory:
    """What decoding keeps of one layer of a cache; it goes with the cache.

    Whoever owns the cache calls `crop`, `select` and `clear` as they happen to it; what was remembered follows.
    """

    kept: dict[Any, Any] = field(default_factory=dict)

    def of(self, key: Any, make: Callable[[], R]) -> R:
        """What is remembered under a key, made at first use."""
        found = self.kept.get(key)
        if found is None:
            found = self.kept[key] = make()
        return found

    def crop(self, length: int) -> None:
        """The cache has lost its slots from `length` on."""
        for one in self.kept.values():
            one.crop(length)

    def select(self, rows: Tensor) -> None:
        """Row i of the cache is what row `rows[i]` was."""
        for one in self.kept.values():
            one.select(rows)

    def clear(self) -> None:
        """The cache was emptied, or changed in a way that nobody told."""
        self.kept.clear()


@dataclass(frozen=True)
class Step:
    """One query of each row of a batch, in one layer.

    Args:
        q: [batch, heads, 1, dim].
        k, v: [batch, kv_heads, length, dim], all slots up to the query's own, which is the last.
        first: int64 [batch], the first slot of each row that is no padding; None where none is padding.
        layer, num_layers: which layer, of how many.
        scale: factor on the logits.
        memory: of this layer and cache; empty where nobody knows of a cache.
        layers: what the layers of one forward hand on to those after them, by any key.
        softcap: see Context.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    first: Tensor | None
    layer: int
    num_layers: int
    scale: float
    memory: Memory = field(default_factory=Memory)
    layers: dict[Any, Any] = field(default_factory=dict)
    softcap: float = 0.0

    @property
    def length(self) -> int:
        """Slots of the cache, the query's own among them."""
        return self.k.shape[2]
