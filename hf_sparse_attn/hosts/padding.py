"""Padded tokens are cut away instead of masked: exact, and no mask of tokens x tokens is ever made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse_attn.context import LayerInputs, TokenLayout
from hf_sparse_attn.method import Decline
from hf_sparse_attn.span import Span

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
# An additive mask of this or less leaves a key no weight: its exponential is 0 in every floating-point type.
_HIDDEN = -9000.0


def key_padding(mask: Tensor, batch: int, tokens: int) -> Tensor | None:
    """Valid keys of each row, bool [batch, tokens], of a mask that is the same for all heads and queries, else None.

    A mask of queries x keys is looked through, without another of its size, for it may say no more than that.

    Args:
        mask: as scaled_dot_product_attention takes it, bool (True is valid) or additive.
        batch, tokens: sizes of the call.
    """
    if mask.ndim == 2 and mask.shape[0] == 1:
        mask = mask[None, None]
    if mask.ndim != 4 or mask.shape[2:] not in ((1, tokens), (tokens, tokens)) or mask.shape[0] not in (1, batch):
        return None
    if mask.shape[2] > 1:
        # An expanded one is the same for all queries as it stands.
        least, most = (mask.all(2), mask.any(2)) if mask.dtype == torch.bool else (mask.amin(2), mask.amax(2))
        if mask.stride(2) != 0 and not torch.equal(least, most):
            return None
        mask = mask[:, :, :1]
    if mask.shape[1] > 1 and not bool((mask == mask[:, :1]).all()):
        return None
    mask = mask[:, 0, 0].expand(batch, tokens)
    if mask.dtype == torch.bool:
        return mask
    plain = (mask == 0) | (mask <= _HIDDEN)
    return mask == 0 if mask.is_floating_point() and bool(plain.all()) else None


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


def trim(valid: Tensor, layout: TokenLayout) -> Trim | Decline:
    """How rows of tokens are cut to their valid ones; looks at the values once.

    Args:
        valid: bool [batch, tokens].
        layout: all tokens of a row; its text may be padded, its video not.
    """
    lengths = [part.length for part in layout.parts]
    number = torch.arange(valid.shape[1], device=valid.device)
    first = torch.where(valid, number, valid.shape[1]).amin(1)
    last = torch.where(valid, number, -1).amax(1)
    counts = [part.sum(1) for part in valid.split(lengths, 1)]
    rows = torch.stack([first, last + 1, *counts], 1).tolist()
    holes = any(end - start != sum(own) for start, end, *own in rows if any(own))
    groups: dict[tuple[int, ...], list[int]] = {}
    for row, (start, _, *own) in enumerate(rows):
        if any(n != p.length for n, p in zip(own, layout.parts, strict=True) if p.kind == "video"):
            return Decline("the call has a mask that hides a part of the video")
        # A row without any token has no output to compute.
        if any(own):
            groups.setdefault((0 if holes else start, *own), []).append(row)
    spans = []
    for (start, *own), members in groups.items():
        parts = zip(layout.parts, own, strict=True)
        cut = tuple(p if p.length == n else replace(p, length=n) for p, n in parts if n)
        place = start, start + sum(own)
        spans.append(Span(tuple(members), place, place, TokenLayout(cut, layout.is_causal)))
    return Trim(tuple(spans), torch.argsort(~valid, dim=1, stable=True) if holes else None)
