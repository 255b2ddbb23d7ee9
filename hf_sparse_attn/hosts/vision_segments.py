"""Attention of a vision tower, whose frames or windows see only themselves: a few calls instead of one for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby, pairwise

import torch
from torch import Tensor

from hf_sparse_attn.record import LayerRecord

# Gathering all tokens by the length of their segment costs four small kernels; it has to save more calls than that.
_CALLS_FOR_AN_ORDER = 4
# A CUDA grid takes at most 65535 sequences in its last dimensions.
_MOST_AT_ONCE = 1 << 15


@dataclass(frozen=True)
class Cut:
    """Where a row of tokens is cut into segments.

    Args:
        lengths: tokens of each segment, none of them 0.
    """

    lengths: tuple[int, ...]
    _orders: dict[torch.device, tuple[Tensor, Tensor]] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def at(cls, edges: Tensor) -> Cut:
        """From int [segments + 1], where segments begin and end."""
        return cls(tuple(b - a for a, b in pairwise(edges.tolist()) if b > a))

    @cached_property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """(number, length) of neighbouring segments of one length, which are one call."""
        runs = []
        for length, same in groupby(self.lengths):
            number = len(list(same))
            full, rest = divmod(number, _MOST_AT_ONCE)
            runs += [(_MOST_AT_ONCE, length)] * full + [(rest, length)] * bool(rest)
        return tuple(runs)

    @cached_property
    def by_length(self) -> Cut:
        """The same segments in order of their length."""
        return Cut(tuple(sorted(self.lengths)))

    def order(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [tokens], the token at each place once segments stand in order of their length; and the way back."""
        if device not in self._orders:
            lengths = torch.tensor(self.lengths)
            starts = lengths.cumsum(0) - lengths
            sorted_lengths, by = lengths.sort(stable=True)
            shift = starts[by] - (sorted_lengths.cumsum(0) - sorted_lengths)
            order = torch.arange(int(lengths.sum())) + shift.repeat_interleave(sorted_lengths)
            self._orders[device] = order.to(device), order.argsort().to(device)
        return self._orders[device]


@dataclass(frozen=True)
class Segments:
    """The segments of one attention call, and the record of the layer that asks.

    Neighbouring segments of one length are a view, which SDPA takes as a batch: nothing is copied, and each segment is
    computed as it would be alone. On a GPU, where a call costs more than a copy, they are put in order of their length
    first if that saves calls; on a CPU that copy was measured to cost more than the calls (0.8 of the speed).
    """

    cut: Cut
    record: LayerRecord

    def attend(self, one: Callable[..., tuple[Tensor, object]], name: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention within each segment.

        Args:
            one: takes q, k, v [segments, heads, tokens, dim], returns (output [segments, tokens, heads, dim], _).
            name: what `one` is called in the report.
            q, k, v: [1, heads, tokens, dim].

        Returns:
            output [1, tokens, heads, value dim].
        """
        cut = self.cut
        if _pays_to_order(cut, q.device):
            cut = cut.by_length
        self.record.count_exact(len(cut.lengths), len(cut.runs), name)
        if cut is self.cut:
            return attend_runs(cut, one, q, k, v)
        order, back = self.cut.order(q.device)
        # The tokens stand one after the other in memory, heads within them: whole tokens are gathered.
        q, k, v = (t.transpose(1, 2)[:, order].transpose(1, 2) for t in (q, k, v))
        return attend_runs(cut, one, q, k, v)[:, back]


def _pays_to_order(cut: Cut, device: torch.device) -> bool:
    return device.type != "cpu" and len(cut.runs) - len(cut.by_length.runs) > _CALLS_FOR_AN_ORDER


def attend_runs(cut: Cut, one: Callable[..., tuple[Tensor, object]], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One call for every run of segments of one length; see Segments.attend."""
    outs, start = [], 0
    for number, length in cut.runs:
        stop = start + number * length
        batch = (t[0, :, start:stop].unflatten(1, (number, length)).transpose(0, 1) for t in (q, k, v))
        out, _ = one(*batch)
        outs.append(out.reshape(1, number * length, *out.shape[2:]))
        start = stop
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1)
