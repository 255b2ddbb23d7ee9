"""Pages of a cache: what is remembered of their keys while text is generated, and which of them are kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept, Step, kept_tokens
from hf_sparse_attn.selection import amount_of, best_ascending, rank_descending

# Keys whose logits are computed at a time: those of a half precision are widened for it.
_KEYS_AT_A_TIME = 4096
# Pages that there is room for besides those that are needed.
_ROOM = 32


def check_page_size(size: object, name: str = "page_size") -> int:
    """Returns a size of pages: a power of two from 8 to 64."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"`{name}` must be an int, got {size!r} of type {type(size).__name__}")
    if not 8 <= size <= 64 or size & (size - 1):
        raise ValueError(f"`{name}` must be a power of two from 8 to 64, got {size}")
    return size


class PageRows(ABC):
    """One row of numbers for each page of a cache, grown with it; see decoding.Remembered.

    What is new costs what its own pages cost: the last page, where it was not full, is computed again with them. So
    the rows are those that all keys at once would give, to the bit. Slots that are padding count for nothing; a page
    of padding alone is 0.

    Args:
        size: slots of a page.
    """

    # Numbers of a row for each number of a key, and their precision.
    width: ClassVar[int] = 1
    dtype: ClassVar[torch.dtype] = torch.float32
    # Whether the page that is not full has a row, too, which is made anew with every key.
    partial: ClassVar[bool] = True

    def __init__(self, size: int) -> None:
        self.size = size
        self.length = 0
        self._first: Tensor | None = None
        self._rows = torch.zeros(0, 0, 0, 0, dtype=self.dtype)

    @property
    def pages(self) -> int:
        """Pages that have a row."""
        return -(-self.length // self.size) if self.partial else self.length // self.size

    @property
    def rows(self) -> Tensor:
        """[batch, kv_heads, pages, width * dim]."""
        return self._rows[:, :, : self.pages]

    def products(self, weights: Tensor) -> Tensor:
        """The products of weights with the rows, in float32: [batch, kv_heads, lists, queries, pages].

        Args:
            weights: [batch, kv_heads, lists, queries, width * dim].
        """
        lead = weights.flatten(2, 3).to(self.dtype)
        # With the room behind the pages, for of a part of the rows a copy would be made, and the way that reads them
        # fastest on a CPU.
        found = lead @ self._rows.mT if self.dtype == torch.float32 else (self._rows @ lead.mT).mT
        return found[..., : self.pages].float().unflatten(2, weights.shape[2:4])

    def update(self, k: Tensor, first: Tensor | None) -> None:
        """Takes in the slots that are new; see decoding.Remembered."""
        length, size = k.shape[2], self.size
        if not self._goes_on(k, first):
            self.length = 0
        self._first = first
        begin, whole = min(self.length, length) // size, length // size
        new, self.length = length != self.length, length
        if not new:
            return
        self._make_room(k, begin)
        if whole > begin:
            pages = k[:, :, begin * size : whole * size].unflatten(2, (whole - begin, size))
            self._rows[:, :, begin:whole] = self._of(pages, self._real(begin * size, whole * size, size))
        if self.pages > whole:
            begin = whole * size
            rest = k[:, :, None, begin:]
            self._rows[:, :, whole : whole + 1] = self._of(rest, self._real(begin, length, length - begin))

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

    @abstractmethod
    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """The rows of pages.

        Args:
            pages: [batch, kv_heads, pages, slots, dim].
            real: bool [batch, 1, pages, slots, 1], which slots are no padding, or None where none is.

        Returns:
            float32 [batch, kv_heads, pages, width * dim]; of pages of padding alone any.
        """

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

    def _make_room(self, k: Tensor, kept: int) -> None:
        """Has room for the pages, of which those that are `kept` stay; some more, so that a step copies nothing."""
        room, shape = self._rows.shape[2], (*k.shape[:2], self.width * k.shape[3])
        fits = (*self._rows.shape[:2], self._rows.shape[3]) == shape and self._rows.device == k.device
        if fits and room >= self.pages:
            return
        more = max(self.pages, room + room // 16) + _ROOM
        grown = torch.zeros(*shape[:2], more, shape[2], dtype=self.dtype, device=k.device)
        if kept:
            grown[:, :, :kept] = self._rows[:, :, :kept]
        self._rows = grown


class PageBounds(PageRows):
    """The largest number of each channel of the keys of a page, and after them the smallest: [hi | lo]."""

    width = 2

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """See PageRows.summary."""
        return torch.cat(_bounds(pages, real), -1).float()


class PageMeans(PageRows):
    """The mean key of a page that is full. In half precision, which tells pages apart as well and is read sooner."""

    dtype = torch.bfloat16
    partial = False

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """See PageRows.summary."""
        if real is None:
            return pages.mean(3, dtype=torch.float32)
        return pages.masked_fill(~real, 0.0).sum(3, dtype=torch.float32) / real.sum(3).clamp(min=1)


class PageSpreads(PageMeans):
    """The mean key of a page that is full, and after it how far its keys are apart: half the range of each channel."""

    width = 2

    def summary(self, pages: Tensor, real: Tensor | None) -> Tensor:
        """See PageRows.summary."""
        high, low = _bounds(pages, real)
        return torch.cat([super().summary(pages, real), (high.float() - low.float()) / 2], -1)


def _bounds(pages: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest and the smallest number of each channel of the keys of pages, arguments as of PageRows.summary."""
    if real is None:
        return pages.amax(3), pages.amin(3)
    return pages.masked_fill(~real, -torch.inf).amax(3), pages.masked_fill(~real, torch.inf).amin(3)


def remembered(step: Step, kind: type[PageRows], size: int) -> PageRows:
    """What is remembered of the pages of the step's cache, with the slots that are new."""
    known = step.memory.of((kind, size), lambda: kind(size))
    known.update(step.k, step.first)
    return known


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


def share_of_heads(step: Step, logits: Tensor, size: int) -> Tensor:
    """The weight that the queries of a list give each page, in all: float32 [batch, lists, pages].

    A last page without a logit has the weight inf.

    Args:
        step: where.
        logits: of queries and pages, or tokens, before the cap: float32 [batch, kv_heads, lists, queries, pages].
        size: slots of a page.
    """
    if step.softcap:
        logits = step.softcap * torch.tanh(logits / step.softcap)
    if step.first is None:
        found = logits.softmax(-1).sum(3)
    else:
        page = torch.arange(logits.shape[4], device=logits.device)
        real = page >= (step.first.to(page.device) // size).view(-1, 1, 1, 1, 1)
        # A row that is padding up to here has no weights.
        found = logits.masked_fill(~real, -torch.inf).softmax(-1).nan_to_num(0.0).sum(3)
    missing = -(-step.length // size) - logits.shape[4]
    found = found.flatten(1, 2)
    return torch.nn.functional.pad(found, (0, missing), value=torch.inf) if missing else found


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
