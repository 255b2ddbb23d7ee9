"""Probe: the figures of candidates on one attention call, head by head, against dense attention of the same call."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hf_sparse_attn.backend import choose_backend
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import causal_tiles
from hf_sparse_attn.pattern.rows import head_densities
from hf_sparse_attn.profiling.observe import Seen

# Queries are sampled in runs of this many, so that whole blocks of most methods are sampled.
UNIT = 128
# Runs sampled where nothing else is asked for; shorter inputs are measured whole.
MOST_UNITS = 32

Pair = tuple[Tensor, Tensor]
# (positions that ask, positions of what they should find) of one needle.
Needle = tuple[Sequence[int], Sequence[int]]


def sample_units(q_len: int, query_blocks: int | None, seed: int) -> Tensor | None:
    """Runs of UNIT queries to measure, one drawn from each of `query_blocks` equal parts; None means all.

    Args:
        q_len: number of queries.
        query_blocks: how many; None means MOST_UNITS.
        seed: of the draw.

    Returns:
        int64 [units], ascending, or None.
    """
    wanted, units = MOST_UNITS if query_blocks is None else query_blocks, -(-q_len // UNIT)
    if units <= wanted:
        return None
    edge = torch.arange(wanted + 1) * units // wanted
    draw = torch.rand(wanted, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return edge[:-1] + (draw * edge.diff()).long()


def places_of(units: Tensor, q_len: int) -> Tensor:
    """The places of the queries in runs of UNIT."""
    found = (units[:, None] * UNIT + torch.arange(UNIT, device=units.device)).flatten()
    return found[found < q_len]


def dense_rows(layout: TokenLayout, units: Tensor) -> BlockPattern:
    """Dense attention of some runs of UNIT queries; nothing is built for the others."""
    keys = -(-layout.kv_len // UNIT)
    first = layout.query_start + units * UNIT
    last = (first + UNIT - 1).clamp(max=layout.kv_len - 1)
    counts = last // UNIT + 1 if layout.is_causal else torch.full_like(units, keys)
    row = torch.repeat_interleave(torch.arange(len(units), device=units.device), counts)
    starts = (torch.arange(len(row), device=units.device) - (counts.cumsum(0) - counts)[row]) * UNIT
    ids, tiles = causal_tiles(first[row] - starts, UNIT, UNIT) if layout.is_causal else (None, None)
    queries = int((last - first + 1).sum())
    return BlockPattern.from_rows(counts[None, None], starts, UNIT, UNIT, queries, layout.kv_len, ids, tiles)


@dataclass
class Trial:
    """What one candidate gave: figures by name [heads], and the patterns that ran."""

    figures: dict[str, Tensor]
    patterns: list[BlockPattern]


class _Whole(Exception):
    """Raised where sampled rows of a candidate cannot be compared with dense ones: all rows are run then."""


class Probe:
    """Dense attention of one call, computed once, and the figures of any candidate against it.

    Recall needs no attention map: with the log-sum-exp `a` of the logits of the kept keys and `b` of all keys,
    exp(a - b) is the sum of the dense softmax over the kept keys, exactly. Nothing here is larger than q, k, v but for
    the pattern of the candidate.

    Args:
        seen: the call.
        units: runs of UNIT queries that are measured, None for all.
        needles: for the retrieval score; of the only row of an unpadded batch.

    Raises:
        ValueError: needles for a call they do not fit.
    """

    def __init__(self, seen: Seen, units: Tensor | None = None, needles: Sequence[Needle] = ()) -> None:
        self.seen, self.ctx = seen, seen.ctx
        self.units = None if units is None else units.to(seen.q.device)
        # The tokens of an order (None: as they are) with the dense output and log-sum-exp of these.
        self._known: list[tuple[Tensor | None, Tensor | None, Pair]] = []
        self.needles = _Needles(seen, needles) if needles else None
        self.table = cost.table_for(seen.q.device)
        # One batch row: seconds must not depend on how many prompts are measured together.
        self.shape = cost.shape_of(seen.q[:1], seen.ctx)

    def dense(self) -> dict[str, Tensor]:
        """The figures of dense attention, by definition."""
        heads = self.seen.q.shape[1]
        one, zero = torch.ones(heads, dtype=torch.float64), torch.zeros(heads, dtype=torch.float64)
        found = {"density": one, "recall": one, "output_error": zero, "output_error_p95": zero}
        found |= {"layer_error": zero, "video_mse": zero}
        found["seconds"] = one * self.table.dense_seconds(self.shape) / heads
        if self.seen.grad is not None:
            found["influence"] = zero
        if self.needles is not None:
            found["retrieval_score"] = one
        return found

    def measure(self, method: Method) -> Trial | Decline:
        """The figures of a candidate, or why it does not apply here."""
        try:
            return self._measure(method, self.units)
        except _Whole:
            return self._measure(method, None)

    def _measure(self, method: Method, units: Tensor | None) -> Trial | Decline:
        # A pattern chosen by content is planned anew at each call.
        run = _Run(self, units, new=not method.static)
        done = method.attention(self.seen.q, self.seen.k, self.seen.v, self.ctx, run)
        if isinstance(done, Decline):
            return done
        tokens, reference = self._reference(run.order, units)
        out, lse = (take(t, tokens).float() for t in done)
        figures = self._compare((out, lse), reference, tokens)
        figures["density"], figures["seconds"] = run.density.clamp(max=1.0), run.seconds
        if self.needles is not None:
            figures["retrieval_score"] = self.needles.score(run.found)
        return Trial({name: value.double().cpu() for name, value in figures.items()}, run.patterns)

    def _compare(self, sparse: Pair, dense: Pair, tokens: Tensor | None) -> dict[str, Tensor]:
        difference = sparse[0] - dense[0]
        error = difference.norm(dim=-1) / dense[0].norm(dim=-1).clamp(min=torch.finfo(torch.float32).tiny)
        ranked = error.transpose(0, 1).flatten(1).sort(-1).values
        rows, whole = ranked.shape[1], dense[0].square().sum()
        found = {
            "recall": (sparse[1] - dense[1]).exp().clamp(max=1.0).mean((0, 2)),
            "output_error": ranked[:, (rows - 1) // 2],
            "output_error_p95": ranked[:, min(rows - 1, int(0.95 * rows))],
            "layer_error": difference.square().sum((0, 2, 3)) / whole.clamp(min=torch.finfo(torch.float32).tiny),
            "video_mse": difference.square().mean((0, 2, 3)),
        }
        if self.seen.grad is not None:
            effect = (take(self.seen.grad, tokens).float() * difference).sum(-1)
            # Sampled rows stand for the others, too.
            found["influence"] = effect.sum((0, 2)).abs() * (self.seen.q.shape[2] / difference.shape[2])
        return found

    def _reference(self, order: Tensor | None, units: Tensor | None) -> tuple[Tensor | None, Pair]:
        """Tokens [batch or 1, heads or 1, n] that are compared (None: all), dense output and log-sum-exp of these."""
        q, k, v = self.seen.q, self.seen.k, self.seen.v
        if units is None:
            order = None
        for known, tokens, pair in self._known:
            if _same(known, order) and (tokens is None) == (units is None):
                return tokens, pair
        layout = self.ctx.layout
        if units is None:
            chosen = torch.arange(-(-layout.q_len // UNIT), device=q.device)
            tokens, pattern = None, dense_rows(layout, chosen)
        elif order is None:
            tokens, pattern = places_of(units, layout.q_len)[None, None], dense_rows(layout, units)
        else:
            # Every query sees every key, so that the order of the queries does not matter.
            tokens = order[:, :, places_of(units, layout.q_len)]
            n, keys = tokens.shape[2], layout.kv_len
            chosen = torch.arange(-(-n // UNIT), device=q.device)
            pattern = dense_rows(TokenLayout.bidirectional(keys).continued(keys - n), chosen)
        out, lse, _ = run_pattern(take(q, tokens), k, v, pattern, self.ctx.softmax_scale, softcap=self.ctx.softcap)
        self._known.append((order, tokens, (out.float(), lse.float())))
        return tokens, self._known[-1][2]


class _Run:
    """What a method calls to run a pattern: only the sampled rows are run, the others get log-sum-exp -inf."""

    def __init__(self, probe: Probe, units: Tensor | None, new: bool) -> None:
        self.probe, self.units, self.new = probe, units, new
        self.order: Tensor | None = None
        self.patterns: list[BlockPattern] = []
        heads = probe.seen.q.shape[1]
        self.density = torch.zeros(heads, dtype=torch.float64, device=probe.seen.q.device)
        self.seconds = torch.zeros(heads, dtype=torch.float64)
        self.found: Tensor | float = 0.0

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Pair:
        probe, ctx = self.probe, self.probe.ctx
        pattern = pattern.to(q.device)
        if self.patterns and not _same(self.order, pattern.q_order) and self.units is not None:
            raise _Whole
        self.order = pattern.q_order
        self.patterns.append(pattern)
        heads = q.shape[1]
        self.density = self.density + head_densities(pattern, ctx.layout.density_count).mean(0).expand(heads)
        self.seconds = self.seconds + _seconds(probe, pattern, q, k, v, self.new)
        own_keys = k.shape[2] == probe.seen.k.shape[2]
        if probe.needles is not None and own_keys:
            self.found = self.found + probe.needles.kept(q, k, pattern)
        if self.units is None or q.shape[2] != probe.seen.q.shape[2]:
            return run_pattern(q, k, v, pattern, ctx.softmax_scale, softcap=ctx.softcap)[:2]
        if pattern.q_order is not None and ctx.layout.is_causal:
            raise _Whole
        rows = (places_of(self.units, q.shape[2]) // pattern.block_q).unique()
        return run_rows(q, k, v, pattern, rows, ctx.softmax_scale, ctx.softcap)


def run_rows(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, rows: Tensor, scale: float, softcap: float
) -> Pair:
    """Attention of some rows of a pattern; output 0 and log-sum-exp -inf for the queries of the others."""
    tokens = pattern.row_tokens(rows)
    one, two, _ = run_pattern(take(q, tokens), k, v, pattern.query_rows(rows), scale, softcap=softcap)
    out = one.new_zeros(*q.shape[:3], one.shape[3])
    lse = two.new_full(q.shape[:3], -torch.inf)
    index = tokens.expand(*q.shape[:2], -1)
    out.scatter_(2, index[..., None].expand_as(one), one)
    return out, lse.scatter_(2, index, two)


def take(x: Tensor, tokens: Tensor | None) -> Tensor:
    """The places `tokens` [batch or 1, heads or 1, n] of x [batch, heads, length, ...]; None means all."""
    if tokens is None:
        return x
    index = tokens.expand(*x.shape[:2], -1)
    if x.ndim == 4:
        return x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3]))
    return x.gather(2, index)


def _same(one: Tensor | None, two: Tensor | None) -> bool:
    if one is None or two is None:
        return one is two
    return one is two or torch.equal(one, two)


def _seconds(probe: Probe, pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor, new: bool) -> Tensor:
    """What each head would add to a launch, predicted: that of a launch of heads all like it, by their number."""
    heads = q.shape[1]
    name, _ = choose_backend("auto", pattern, q, k, v, False, probe.ctx.softcap)
    tiled = (pattern.tile_ids != 0).long().cumsum(0)
    tiled = torch.nn.functional.pad(tiled, (1, 0))

    def per_head(counts: Tensor) -> Tensor:
        return counts.double().mean(0).expand(heads)

    first, last = pattern.indptr[..., 0], pattern.indptr[..., -1]
    blocks, masked = per_head(last - first), per_head(tiled[last] - tiled[first])
    columns = torch.zeros(heads, dtype=torch.float32)
    if pattern.column_indptr is not None:
        columns = per_head(pattern.column_indptr[..., -1] - pattern.column_indptr[..., 0])
    area = pattern.block_q * pattern.block_k
    found = []
    for n, m, c in zip(blocks.tolist(), masked.tolist(), columns.tolist(), strict=True):
        work = cost.Work(
            heads, heads * pattern.rows, heads * pattern.kv_len, heads * n, heads * c,
            heads * (n - m) * area, heads * m * area, heads * c * pattern.block_q,
        )  # fmt: skip
        found.append(probe.table.sparse_seconds(name, work, probe.shape, new) / heads)
    return torch.tensor(found, dtype=torch.float64)


class _Needles:
    """How much of the attention of asking queries falls on what they ask for, dense and on kept keys.

    The values of a second attention are 1 at the keys of a needle and 0 elsewhere, one column per needle: its output
    is the weight on these keys, whatever ran it.
    """

    def __init__(self, seen: Seen, needles: Sequence[Needle]) -> None:
        layout, q = seen.ctx.layout, seen.q
        most = max(max(*asked, *stated) for asked, stated in needles)
        if q.shape[0] != 1 or layout.q_len != layout.kv_len or most >= layout.kv_len:
            raise ValueError(
                f"`needles` must lie in one unpadded row of {layout.kv_len} tokens read at once, "
                f"got {q.shape[0]} rows, {layout.q_len} queries and position {most}"
            )
        self.ctx = seen.ctx
        keys = seen.k.shape[2]
        self.values = seen.v.new_zeros(1, seen.k.shape[1], keys, len(needles))
        for i, (_, stated) in enumerate(needles):
            self.values[:, :, list(stated), i] = 1
        self.asked = torch.tensor([n for asked, _ in needles for n in asked], device=q.device)
        self.which = torch.tensor([i for i, (asked, _) in enumerate(needles) for _ in asked], device=q.device)
        units = (self.asked // UNIT).unique()
        out, self.lse = run_rows(
            q, seen.k, self.values, _at_units(dense_rows(layout, units), units, layout.q_len),
            torch.arange(len(units), device=q.device), seen.ctx.softmax_scale, seen.ctx.softcap,
        )  # fmt: skip
        self.mass = self._mass(out, self.lse)

    def _mass(self, out: Tensor, lse: Tensor) -> Tensor:
        """Dense weight of the keys that `out` and `lse` saw, [heads, asking queries]."""
        weight = out[0, :, self.asked, self.which].double()
        share = (lse[0, :, self.asked] - self.lse[0, :, self.asked]).double().exp()
        return weight * share

    def kept(self, q: Tensor, k: Tensor, pattern: BlockPattern) -> Tensor:
        """What a pattern keeps of it, [heads, asking queries]."""
        if pattern.q_order is None:
            rows = (self.asked // pattern.block_q).unique()
        else:
            rows = torch.arange(pattern.rows, device=q.device)
        return self._mass(*run_rows(q, k, self.values, pattern, rows, self.ctx.softmax_scale, self.ctx.softcap))

    def score(self, kept: Tensor | float) -> Tensor:
        """1 less the dense weight on the needles that is lost, mean over asking queries, [heads]."""
        return 1 - (self.mass - kept).clamp(min=0).mean(-1)


def _at_units(pattern: BlockPattern, units: Tensor, q_len: int) -> BlockPattern:
    """A pattern of rows cut out, with the tokens these rows had as its order; for `run_rows` of all its rows."""
    return replace(pattern, q_order=places_of(units, q_len)[None, None])
