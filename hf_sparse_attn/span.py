"""Spans: the valid sequences in a padded or packed batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from hf_sparse_attn.context import Context, LayerInputs, TokenLayout


@dataclass(frozen=True)
class Span:
    """Batch rows whose valid tokens stand at the same places: one sequence without padding or neighbours.

    Args:
        rows: indices into the batch.
        q: (start, end) among the queries.
        k: (start, end) among the keys; ends where the queries end.
        layout: the tokens of the sequence; None where they are text like the rest of the row.
    """

    rows: tuple[int, ...]
    q: tuple[int, int]
    k: tuple[int, int]
    layout: TokenLayout | None = None

    @property
    def row_index(self) -> slice | list[int]:
        """The rows as an index; a slice where they follow one another, which copies nothing."""
        first, last = self.rows[0], self.rows[-1]
        return slice(first, last + 1) if last - first + 1 == len(self.rows) else list(self.rows)

    def cut(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The queries, keys and values of the span alone."""
        rows = self.row_index
        return q[rows, :, slice(*self.q)], k[rows, :, slice(*self.k)], v[rows, :, slice(*self.k)]

    def cut_inputs(self, inputs: LayerInputs | None) -> LayerInputs | None:
        """What else the layer had of the span's queries; it has nothing of keys from a cache."""
        if inputs is None:
            return None
        rows, own = self.row_index, slice(*self.q)
        hidden = None if inputs.hidden is None else inputs.hidden[rows, own]
        q, k = (None if x is None else x[rows, :, own] for x in (inputs.q, inputs.k))
        return LayerInputs(hidden, q, k)

    def context(self, whole: Context) -> Context:
        """Where the span's call is, from the context of whole rows."""
        return replace(whole, layout=self._own_layout(whole.layout), inputs=self.cut_inputs(whole.inputs))

    def is_whole(self, q: Tensor, k: Tensor) -> bool:
        """Whether the span is the batch itself."""
        return len(self.rows) == q.shape[0] and self.q == (0, q.shape[2]) and self.k == (0, k.shape[2])

    def _own_layout(self, layout: TokenLayout) -> TokenLayout:
        """The layout of the sequence: its own, else that of text."""
        if self.layout is not None:
            return self.layout
        n = self.k[1] - self.k[0]
        whole = TokenLayout.causal(n) if layout.is_causal else TokenLayout.bidirectional(n)
        return whole.continued(n - (self.q[1] - self.q[0]))
