"""Padded tokens are cut away instead of masked: exact, and no mask of tokens x tokens is ever made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse_attn.context import LayerInputs, TokenLayout
from hf_sparse_attn.method import Decline
from hf_sparse_attn.span import Span

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# An additive mask of this or less leaves a key no weight: its exponential is 0 in every floating-point type.
_HIDDEN = -9000.0
# Added to every key alike, what is not below this changes nothing but the last digits.
_NOTHING = -1e5
# Sequences apart from one another in one call that are worth a run each.
_MOST_GROUPS = 8
# Pairs of query and key that are looked at together.
_PIECE = 1 << 24


def key_padding(mask: Tensor, batch: int, tokens: int, queries: int | None = None) -> Tensor | Decline:
    """Which tokens see one another, for a mask that says no more than which are padding, or of separate sequences.

    Padding is what no query sees; all other queries must see the same keys (in causal order, all up to themselves),
    whatever the padding itself sees, or fall into groups that see all of themselves and nothing else. Only differences
    within a query's own keys count: what is added to all of them alike changes nothing. A mask of queries x keys is
    looked through in pieces, for it may be larger than all else.

    Args:
        mask: as scaled_dot_product_attention takes it, bool (True is valid) or additive; also whole numbers 0 and 1,
            which is how tokenizers write a bool mask.
        batch, tokens: sizes of the call.
        queries: the last so many tokens are queries, in causal order; None means that all are, and see both ways.

    Returns:
        bool [batch, tokens], the valid tokens; or, where they are of several groups, int64 [batch, tokens], the same
        number for those of a group and -1 for padding; or what the mask is besides.
    """
    if queries is None and mask.shape == (batch, tokens) and batch != tokens:
        mask = mask[:, None, None]
    while mask.ndim < 4:
        mask = mask[None]
    sizes = ((1, tokens), (tokens, tokens)) if queries is None else ((queries, tokens),)
    if mask.shape[2:] not in sizes or mask.shape[0] not in (1, batch):
        return Decline(f"mask {list(mask.shape)}, which is none of {batch} rows of {tokens} tokens")
    if not mask.is_floating_point():
        if mask.dtype != torch.bool and bool(((mask != 0) & (mask != 1)).any()):
            return Decline(f"mask of {mask.dtype} that is none of zeros and ones")
        mask = mask.bool()
    # Expanded heads and queries hold the same as the first.
    mask = mask[:, :1] if mask.stride(1) == 0 else mask
    mask = mask[:, :, :1] if mask.stride(2) == 0 and queries is None else mask
    constant = None
    if mask.is_floating_point():
        least, most = mask.amin((1, 2, 3)), mask.amax((1, 2, 3))
        constant = (least == most) & (least > _NOTHING)
    pieces = mask.split(max(_PIECE // tokens, 1), 2)
    seen, counts = torch.zeros_like(mask[:, 0, 0], dtype=torch.bool), []
    for number, piece in enumerate(pieces):
        visible = piece if constant is None else _visible(piece, constant)
        if visible is None:
            return Decline("float mask that is a bias on its logits")
        if queries is not None:
            first = tokens - queries + number * pieces[0].shape[2]
            if bool(visible.triu(first + 1).any()):
                return Decline("mask that is not causal")
        seen |= visible.any(2).any(1)
        counts.append(visible.sum(3, dtype=torch.int32))
    found = torch.cat(counts, 2)
    # What a query sees has been counted among all that is seen: as many are the same ones.
    wanted = seen.sum(1, keepdim=True) if queries is None else seen.cumsum(1)[:, tokens - queries :]
    alike = found == wanted[:, None]
    if mask.shape[2] > 1:
        alike |= ~seen[:, None, tokens - mask.shape[2] :]
    if bool(alike.all()):
        return seen.expand(batch, tokens)
    groups = _groups(pieces, constant, seen) if queries is None and mask.shape[2] > 1 else None
    return Decline("mask that differs from query to query") if groups is None else groups.expand(batch, tokens)


def _groups(pieces: Sequence[Tensor], constant: Tensor | None, seen: Tensor) -> Tensor | None:
    """Numbers of the groups of tokens that see all of themselves and nothing else, -1 for what nobody sees; or None.

    Args:
        pieces: the mask, cut along its queries.
        constant: see _visible; None where the mask is bool.
        seen: bool [batch, tokens], what any query sees.
    """

    def rows() -> Iterator[Tensor]:
        for piece in pieces:
            visible = piece if constant is None else _visible(piece, constant)
            assert visible is not None
            yield visible

    # The first token that each sees is the first of its group.
    first = torch.cat([visible.to(torch.uint8).argmax(3) for visible in rows()], 2)
    number, start = first[:, 0].where(seen, -1), 0
    for visible in rows():
        own = slice(start, start + visible.shape[2])
        start = own.stop
        same = number[:, None, own, None] == number[:, None, None]
        if bool(((visible != same) & seen[:, None, own, None]).any()):
            return None
    return number


def _visible(mask: Tensor, constant: Tensor) -> Tensor | None:
    """Which keys an additive mask lets each query see; None where it gives some of them more weight than others.

    Args:
        mask: [batch, heads, queries, keys].
        constant: bool [batch], rows of one value that hides nothing.
    """
    most = mask.amax(-1, keepdim=True)
    visible = mask == most
    below = mask - most
    if mask.requires_grad or not bool((visible | (below <= _HIDDEN)).all()) or bool((most == torch.inf).any()):
        return None
    return visible & ((most > _HIDDEN) | constant[:, None, None, None])


@dataclass(frozen=True)
class Trim:
    """The valid tokens of a batch.

    Args:
        spans: rows with their valid tokens, each with the layout of these tokens alone.
        order: int64 [batch, tokens], brings the valid tokens of each row to its front; the spans count from there.
            None where they follow one another as they are.
    """

    spans: tuple[Span, ...]
    order: Tensor | None = None

    def front(self, x: Tensor) -> Tensor:
        """x [batch, heads, tokens, dim] with the valid tokens of each row where the spans say."""
        return x if self.order is None else x.gather(2, self.order[:, None, :, None].expand_as(x))

    def front_inputs(self, inputs: LayerInputs | None) -> LayerInputs | None:
        """`front` of what else the layer had."""
        if inputs is None or self.order is None:
            return inputs
        hidden = None if inputs.hidden is None else self.front(inputs.hidden[:, None])[:, 0]
        q, k = (None if x is None else self.front(x) for x in (inputs.q, inputs.k))
        return LayerInputs(hidden, q, k)

    def back(self, x: Tensor) -> Tensor:
        """The inverse of `front`."""
        if self.order is None:
            return x
        return torch.zeros_like(x).scatter(2, self.order[:, None, :, None].expand_as(x), x)

    def dense(self, q: Tensor, k: Tensor, v: Tensor, attention: Attention) -> Tensor:
        """Dense attention of the valid tokens among themselves, in the order of `front`; 0 elsewhere.

        Args:
            q, k, v: [batch, heads, tokens, dim].
            attention: of q, k, v without a mask.
        """
        whole = [s for s in self.spans if (len(s.rows), s.q) == (q.shape[0], (0, q.shape[2]))]
        if whole:
            return attention(q, k, v)
        out = q.new_zeros(*q.shape[:3], v.shape[3])
        for span in self.spans:
            out[span.row_index, :, slice(*span.q)] = attention(*span.cut(q, k, v))
        return out


def trim(groups: Tensor, layout: TokenLayout) -> Trim | Decline:
    """How rows of tokens are cut to those that see one another; looks at the values once.

    Args:
        groups: bool [batch, tokens], the valid ones, or numbers of groups, -1 for what is not valid; see key_padding.
        layout: all tokens of a row; its text may be padded or apart, its video not.
    """
    if groups.dtype == torch.bool:
        groups = groups.long() - 1
    names = [name for name in groups.unique().tolist() if name >= 0]
    if len(names) > _MOST_GROUPS:
        return Decline(f"the call has a mask of {len(names)} separate sequences")
    lengths, tokens = [part.length for part in layout.parts], groups.shape[1]
    number = torch.arange(tokens, device=groups.device)
    found: list[tuple[int, list[int]]] = []
    for name in names:
        valid = groups == name
        first = torch.where(valid, number, tokens).amin(1)
        last = torch.where(valid, number, -1).amax(1)
        counts = [part.sum(1) for part in valid.split(lengths, 1)]
        found += enumerate(torch.stack([first, last + 1, *counts], 1).tolist())
    # A row without any token has no output to compute.
    found = [(row, places) for row, places in found if any(places[2:])]
    for at, part in enumerate(layout.parts):
        whole = [row for row, (_, _, *own) in found if own[at] == part.length]
        if part.kind == "video" and sorted(whole) != list(range(len(groups))):
            return Decline("the call has a mask that hides a part of the video")
    holes = any(end - start != sum(own) for _, (start, end, *own) in found)
    # Where each row is filled up to, if its tokens are to follow one another.
    filled = [0] * len(groups)
    members: dict[tuple[int, ...], list[int]] = {}
    for row, (start, _, *own) in found:
        members.setdefault((filled[row] if holes else start, *own), []).append(row)
        filled[row] += sum(own)
    spans = []
    for (start, *own), rows in members.items():
        parts = zip(layout.parts, own, strict=True)
        cut = tuple(p if p.length == n else replace(p, length=n) for p, n in parts if n)
        place = start, start + sum(own)
        spans.append(Span(tuple(rows), place, place, TokenLayout(cut, layout.is_causal)))
    return Trim(tuple(spans), groups.where(groups >= 0, tokens).argsort(dim=1, stable=True) if holes else None)
