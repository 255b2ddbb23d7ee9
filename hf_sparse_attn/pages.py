"""Pages of a cache: what is remembered of their keys while text is generated, and which of them are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept, Step, kept_tokens
from hf_sparse_attn.selection import amount_of, best_ascending, rank_descending

# Keys whose logits are computed at a time: those of a half precision are widened for it.
_KEYS_AT_A_TIME = 4096


def check_page_size(size: object, name: str = "page_size") -> int:
    """Returns a size of pages: a power of two from 8 to 64."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"`{name}` must be an int, got {size!r} of type {type(size).__name__}")
    if not 8 <= size <= 64 or size & (size - 1):
        raise ValueError(f"`{name}` must be a power of two from 8 to 64, got {size}")
    return size


class PageRows:
    """One row of numbers for each page of a cache, in float32, grown with it; see decoding.Remembered.

    What is new costs what its own pages cost: the last page, where it was not full, is computed again with them. So
    the rows are those that all keys at once would give, to the bit. Slots that are padding count for nothing; a page
    of padding alone is 0.

    Args:
        size: slots of a page.
    """

    # Numbers of a row for each number of a key.
    width: ClassVar[int] = 1

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self._first: Tensor | None = None
        self._rows = torch.zeros(0, 0, 0, 0)

    @property
    def rows(self) -> Tensor:
        """Float32 [batch, kv_heads, pages, width * dim]."""
        return self._rows[:, :, : -(-self.length // self.size)]

    def update(self, k: Tensor, first: Tensor | None) -> None:
        """Takes in the slots that are new; see decoding.Remembered."""
        length, size = k.shape[2], self.size
        if not self._goes_on(k, first):
            self.length = 0
        self._first = first
        if length == self.length:
            return
        begin = min(self.length, length) // size
        self._make_room(k, begin, -(-length // size))
        whole = length // size
        if whole > begin:
            pages = k[:, :, begin * size : whole * size].unflatten(2, (whole - begin, size))
            self._rows[:, :, begin:whole] = self._of(pages, self._real(begin * size, whole * size, size))
        if length > whole * size:
            rest = k[:, :, None, whole * size :]
            self._rows[:, :, whole : whole + 1] = self._of(
                rest, self._real(whole * size, length, length - whole * size)
            )
        self.length = length

    def crop(self, length: int) -> None:
        """Forgets the slots from `length` on; see decoding.Remembered."""
        # Of the page that was cut the keys that are left tell the rows anew.
        self.length = min(self.length, length // self.size * self.size)

    def select(self, rows: Tensor) -> None:
        """Row i becomes what row `rows[i]` was; see decoding.Remembered."""
        rows = rows.to(self._rows.device)
        self._rows = self._rows.index_select(0, rows)
        if self._first is not None:
            self._first = self._first.index_select(0, rows.to(self._first.device))

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """The rows of pages.

        Args:
            pages: [batch, kv_heads, pages, slots, dim].
            real: bool [batch, 1, pages, slots, 1], which slots are no padding, or None where none is.

        Returns:
            float32 [batch, kv_heads, pages, width * dim]; of pages of padding alone any.
        """
        raise NotImplementedError

    def _of(self, pages: Tensor, real: Tensor | None) -> Tensor:
        found = self.summary(pages.detach(), real)
        return found if real is None else found.masked_fill(~real.any(3), 0.0)

    def _real(self, begin: int, end: int, slots: int) -> Tensor | None:
        """Which of the slots from `begin` to `end` are no padding, as `summary` takes it."""
        if self._first is None:
            return None
        slot = torch.arange(begin, end, device=self._first.device)
        return (slot >= self._first[:, None]).view(len(self._first), 1, -1, slots, 1).to(self._rows.device)

    def _goes_on(self, k: Tensor, first: Tensor | None) -> bool:
        """Whether the keys are those that are known, and more: of as many rows, on one device, of the same padding."""
        known = self._rows
        if known.shape[:2] != k.shape[:2] or known.shape[3] != self.width * k.shape[3] or known.device != k.device:
            return False
        if first is None or self._first is None:
            return first is self._first
        return first is self._first or torch.equal(first, self._first)

    def _make_room(self, k: Tensor, kept: int, pages: int) -> None:
        """Has room for so many pages; those that are `kept` stay. Grown by halves, so that a step copies nothing."""
        batch, heads, room = self._rows.shape[:3]
        fits = (batch, heads, self._rows.shape[3]) == (k.shape[0], k.shape[1], self.width * k.shape[3])
        if fits and room >= pages and self._rows.device == k.device:
            return
        grown = torch.zeros(
            k.shape[0], k.shape[1], max(pages, room * 3 // 2), self.width * k.shape[3], device=k.device
        )
        if kept:
            grown[:, :, :kept] = self._rows[:, :, :kept]
        self._rows = grown


class PageBounds(PageRows):
    """The largest number of each channel of the keys of a page, and after them the smallest: [hi | lo]."""

    width = 2

    def update(self, k: Tensor, first: Tensor | None) -> None:
        """One more slot of a page that is there needs no look at the others; see PageRows.update."""
        length, inside = self.length, self.length % self.size
        if first is not None or k.shape[2] != length + 1 or not inside or not self._goes_on(k, first):
            super().update(k, first)
            return
        page, key = self._rows[:, :, length // self.size].unflatten(2, (2, -1)), k.detach()[:, :, -1]
        torch.maximum(page[:, :, 0], key, out=page[:, :, 0])
        torch.minimum(page[:, :, 1], key, out=page[:, :, 1])
        self.length = length + 1

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """See PageRows.summary."""
        high, low = pages, pages
        if real is not None:
            high, low = pages.masked_fill(~real, -torch.inf), pages.masked_fill(~real, torch.inf)
        return torch.cat([high.amax(3), low.amin(3)], -1).float()


class PageMeans(PageRows):
    """The mean key of a page."""

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """See PageRows.summary."""
        if real is None:
            return pages.mean(3, dtype=torch.float32)
        return pages.masked_fill(~real, 0.0).sum(3, dtype=torch.float32) / real.sum(3).clamp(min=1)


def remembered_rows(step: Step, kind: type[PageRows], size: int) -> Tensor:
    """The rows of all pages of the step's cache, with the slots that are new; see PageRows.rows."""
    known = step.memory.of((kind, size), lambda: kind(size))
    known.update(step.k, step.first)
    return known.rows


def grouped(step: Step, share: str) -> Tensor:
    """The queries in float32 by the list of pages that they read: [batch, kv_heads, lists, queries, dim].

    Args:
        step: the queries.
        share: "group": one list for all heads of queries of a head of keys; "head": one for each.
    """
    q = step.q.detach().float().unflatten(1, (step.k.shape[1], -1))
    return q.transpose(2, 3) if share == "group" else q


def bound_weights(q: Tensor) -> Tensor:
    """What a query is multiplied with a row of PageBounds by to get the most that its product with a key can be.

    Linear in the sum: the weights of several queries, added up, give the sum of their bounds.

    Args:
        q: [..., dim].
    """
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], -1)


def check_sharing(share: object) -> str:
    """Returns which heads read the same pages: "group" or "head"."""
    if share not in ("group", "head"):
        raise ValueError(f"`share` must be 'group' or 'head', got {share!r}")
    return str(share)


def step_logits(step: Step) -> Tensor:
    """Logits of every query and slot in float32, -inf for padding: [batch, kv_heads, group, length]."""
    q = step.q.detach().float().unflatten(1, (step.k.shape[1], -1))[:, :, :, 0] * step.scale
    parts = [q @ part.float().mT for part in step.k.detach().split(_KEYS_AT_A_TIME, 2)]
    found = torch.cat(parts, -1)
    if step.softcap:
        found = step.softcap * torch.tanh(found / step.softcap)
    if step.first is not None:
        slot = torch.arange(step.length, device=found.device)
        found = found.masked_fill(slot < step.first.to(found.device)[:, None, None, None], -torch.inf)
    return found


def keep_best(
    step: Step, scores: Tensor, size: int, amount: Callable[[int], int], sink: int = 0, recent: int = 0,
    least: int = 1,
) -> Kept | None:  # fmt: skip
    """The pages with the highest scores, ties to the earlier ones; None where that is all of them.

    Args:
        step: where.
        scores: float32 [batch, lists, pages]; may be written to.
        size: slots of a page.
        amount: from the number of tokens of a row the number of tokens that it keeps, in whole pages rounded down;
            all where that is as many as there are.
        sink, recent: first and last pages of a row that are kept in any case, within the number.
        least: fewest pages.
    """
    length, total = step.length, scores.shape[2]
    forced = max(least, sink + recent)

    def count(tokens: int, pages: int) -> int:
        wanted = amount(tokens)
        return pages if wanted >= tokens else min(pages, max(forced, wanted // size))

    most = count(length, total)
    if most >= total:
        return None
    if recent:
        scores[..., -recent:] = torch.inf
    if step.first is None:
        scores[..., :sink] = torch.inf
        return Kept(best_ascending(scores, most).int(), size)
    home = (step.first.to(scores.device) // size)[:, None, None]
    page = torch.arange(total, device=scores.device)
    scores.masked_fill_((page >= home) & (page < home + sink), torch.inf).masked_fill_(page < home, -torch.inf)
    # Told once for all layers: to look at the paddings waits for the device.
    known = step.layers.get((keep_best, amount, size, length))
    if known is None:
        counts = [count(length - first, total - first // size) for first in step.first.tolist()]
        known = torch.tensor(counts, device=scores.device)[:, None, None]
        step.layers[keep_best, amount, size, length] = known
    best = rank_descending(scores)[..., :most]
    return Kept(best.masked_fill(torch.arange(most, device=scores.device) >= known, -1).int(), size)


def sink_and_recent(step: Step, sink: int | float, recent: int | float, besides: int = 0) -> Kept | None:
    """The first tokens of each row and its last ones, one list for all heads; None where that is all of them.

    Args:
        step: where.
        sink, recent: tokens, or shares of those of the row.
        besides: last tokens in addition to `recent`.
    """
    length, device = step.length, step.k.device

    def amounts(tokens: int) -> tuple[int, int]:
        first = min(amount_of(sink, tokens), tokens)
        return first, min(amount_of(recent, tokens) + besides, tokens - first)

    starts = [0] if step.first is None else step.first.tolist()
    parts = [(start, *amounts(length - start)) for start in starts]
    if all(first + last >= length - start for start, first, last in parts):
        return None

    def tokens(begin: int, end: int) -> Tensor:
        return torch.arange(begin, end, device=device)

    rows = [
        torch.cat([tokens(start, start + first), tokens(length - last, length)])[None] for start, first, last in parts
    ]
    return kept_tokens(rows, step.q.shape[0])
