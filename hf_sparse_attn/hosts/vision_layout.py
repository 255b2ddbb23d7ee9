"""What the tokens of a model of images, videos and text are, row by row, carried from call to call by its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Segment, TokenLayout
from hf_sparse_attn.session import Uncopied
from hf_sparse_attn.span import Span

Row = tuple[Segment, ...]

# What a token is, in a tensor of kinds.
TEXT, IMAGE, VIDEO = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Tokens(Uncopied):
    """What the tokens of a call and of its cache are, padding included, or why nobody can tell.

    Args:
        rows: the segments of each row of the batch.
        unknown: the reason why they cannot be told, or None; `rows` is then empty.
    """

    rows: tuple[Row, ...]
    unknown: str | None = None
    _described: dict[Any, tuple[Span, ...]] = field(default_factory=dict, repr=False)

    @property
    def length(self) -> int:
        """Tokens of a row."""
        return sum(part.length for part in self.rows[0]) if self.rows else 0

    def cropped(self, length: int) -> Tokens:
        """The first `length` tokens of every row."""
        cut = [TokenLayout(row, is_causal=True).cut(0, length) for row in self.rows]
        if any(layout is None for layout in cut):
            return Tokens((), "cache cropped inside an image or video")
        return Tokens(tuple(layout.parts for layout in cut if layout is not None))

    def then(self, more: Tokens) -> Tokens:
        """These tokens, then `more`; clips are counted on."""
        unknown = self.unknown or more.unknown
        if unknown is not None:
            return Tokens((), unknown)
        return Tokens(tuple(_join(a, b) for a, b in zip(self.rows, more.rows, strict=True)))

    def describe(self, spans: Sequence[Span], kv_end: int) -> tuple[Span, ...]:
        """The same sequences with what their tokens are; rows of one span that differ get spans of their own.

        Args:
            spans: sequences in a batch of causal text.
            kv_end: keys of a row; where there are others than these tokens, as with a cache that forgets, or where a
                sequence is cut out of an image, it stays text.
        """
        if self.unknown is not None or self.length != kv_end:
            return tuple(spans)
        key = tuple(spans)
        if key not in self._described:
            self._described[key] = tuple(own for span in spans for own in self._describe(span))
        return self._described[key]

    def _describe(self, span: Span) -> Iterator[Span]:
        rows: dict[TokenLayout | None, list[int]] = {}
        for row in span.rows:
            layout = TokenLayout(self.rows[row], is_causal=True).cut(*span.k)
            if layout is not None:
                layout = layout.continued(layout.kv_len - (span.q[1] - span.q[0]))
            rows.setdefault(layout, []).append(row)
        for layout, own in rows.items():
            yield replace(span, rows=tuple(own), layout=layout)


def text_tokens(batch: int, length: int) -> Tokens:
    """Rows of nothing but text."""
    return Tokens((((Segment("text", length),) if length else ()),) * batch)


def read_tokens(kinds: Tensor, grids: dict[int, Tensor | None], merge: int) -> Tokens:
    """What the tokens are, from which of them stand for images and videos and from the grids of these.

    The k-th image token of the batch, row by row, is the k-th cell of all image grids in order, and so for videos:
    the model puts its features in by the same rule. Text may stand between the frames of a video.

    Args:
        kinds: int [batch, tokens] of TEXT, IMAGE and VIDEO.
        grids: for IMAGE and VIDEO, int [clips, 3] of (frames, height, width) in patches, or None.
        merge: patches per token in height and in width.
    """
    kinds = kinds.to(torch.int8).cpu()
    if not bool(kinds.any()):
        return text_tokens(*kinds.shape)
    sizes = {kind: iter(grid.tolist() if grid is not None else []) for kind, grid in grids.items()}
    rows = []
    for row in kinds:
        parts: list[Segment] = []
        # A clip whose frames have not all come yet, by kind: number, frames that came, grid.
        begun: dict[int, tuple[int, int, tuple[int, int, int]]] = {}
        clips = 0
        values, lengths = torch.unique_consecutive(row, return_counts=True)
        for kind, length in zip(values.tolist(), lengths.tolist(), strict=True):
            if kind == TEXT:
                parts.append(Segment("text", length))
            while kind != TEXT and length:
                if kind not in begun:
                    size = next(sizes.get(kind, iter(())), None)
                    if size is None:
                        return Tokens((), "more image or video tokens than the grids have cells")
                    begun[kind] = (clips, 0, (size[0], size[1] // merge, size[2] // merge))
                    clips += 1
                clip, frame, (frames, height, width) = begun.pop(kind)
                came = min(length // (height * width), frames - frame)
                if came == 0:
                    return Tokens((), "image or video tokens that end inside a frame")
                parts.append(Segment("video", came * height * width, (came, height, width), clip, frame))
                length -= came * height * width
                if frame + came < frames:
                    begun[kind] = (clip, frame + came, (frames, height, width))
        if begun:
            return Tokens((), "a video without all its frames")
        rows.append(tuple(parts))
    if any(next(rest, None) is not None for rest in sizes.values()):
        return Tokens((), "fewer image or video tokens than the grids have cells")
    return Tokens(tuple(rows))


def _join(before: Row, after: Row) -> Row:
    clips = max((part.clip for part in before if part.clip is not None), default=-1) + 1
    more = [part if part.clip is None else replace(part, clip=part.clip + clips) for part in after]
    if before and more and before[-1].kind == more[0].kind == "text":
        more[0] = Segment("text", before[-1].length + more[0].length)
        before = before[:-1]
    return (*before, *more)
