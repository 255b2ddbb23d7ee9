"""ProfiledMethod: every head runs the method that a HeadProfile gives it, all heads in one launch."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Decline, Estimating, Method, PartlyDense, Run
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.pattern.stack import stack_heads, union_heads
from hf_sparse_attn.profiles.head_parts import (
    Estimate,
    equal_groups,
    estimate_key_of,
    of_heads,
    part,
    shared_estimates,
)

if TYPE_CHECKING:
    from hf_sparse_attn.profiles.head_profile import HeadProfile

# Bytes of the patterns of layers whose methods are all static that one profile keeps.
_KEPT_BYTES = 1 << 28
_LOCK = Lock()


class Mix(NamedTuple):
    """The pattern of all heads of a call.

    Args:
        pattern: of all heads; those that are not asked for keep nothing.
        reasons: why heads are dense against the profile.
        sparse: whether any head is not dense.
    """

    pattern: BlockPattern
    reasons: tuple[str, ...]
    sparse: bool


@dataclass(frozen=True, kw_only=True)
class ProfiledMethod(Method):
    """Each head keeps what the method chosen for it by a profile keeps, at this layer and denoising step.

    Heads of one method are estimated together. Where they are not equally many in every key/value group, groups with
    equally many go together: key/value heads are never repeated. All patterns then become one, cut to a common block
    size, for one launch. Methods with an extra branch run by themselves on their heads. A head whose method declines
    a call is dense, which is reported. With `same_in_group`, all query heads of a key/value head read the union of
    their patterns; blocks that are not aligned and single columns are widened to whole blocks for that, and heads
    with token orders of their own that would have to share decline. Methods with an extra branch are left out of it.

    Args:
        profile: which method runs where.
    """

    name: ClassVar[str] = "head_profile"
    paper: ClassVar[str] = "per-head choice as in MInference (arXiv 2407.02490) and MoA (arXiv 2406.14909)"

    profile: HeadProfile
    _kept: OrderedDict[Hashable, Mix] = field(default_factory=OrderedDict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        used = [self.profile.methods[i] for i in sorted({int(i) for p in self.profile.plans for i in p.choice.flat})]
        # What other methods say of their class is a matter of the profile here.
        object.__setattr__(self, "static", all(m.static and not _has_branch(m) for m in used))
        object.__setattr__(self, "trainable", all(m.trainable for m in used))
        object.__setattr__(self, "needs", frozenset().union(*(m.needs for m in used)))
        object.__setattr__(self, "reads", frozenset().union(*(m.reads for m in used)))
        object.__setattr__(self, "by_steps", len(self.profile.plans) > 1 or any(m.by_steps for m in used))

    def check_model(self, model: Any) -> None:
        """As each of its methods; see Method.check_model."""
        for method in self.profile.methods:
            method.check_model(model)

    def params(self) -> dict[str, Any]:
        """The profile in words, for reports."""
        return {
            "model": self.profile.model.model_class,
            "density": round(self.profile.density, 4),
            "methods": len(self.profile.methods),
            "same_in_group": self.profile.same_in_group,
        }

    def remark(self, ctx: Context) -> str | None:
        """Of a length far from those that were measured; see Method.remark."""
        return self.profile.remark(ctx.layout.kv_len)

    def requested_density(self, layer: int) -> float | None:
        """Mean over the heads of the layer; see Method.requested_density."""
        if layer >= self.profile.model.layers:
            return None
        density = self.profile.layer_density(layer)
        return None if math.isnan(density) else density

    def call_key(self, ctx: Context) -> Hashable:
        """The choice of the layer at the step; see Method.call_key."""
        return self._row(ctx)

    def why_not(self, ctx: Context) -> str | None:
        """Whether the profile has a choice for the call; its methods are asked by themselves."""
        model = self.profile.model
        if ctx.layer >= model.layers or ctx.num_heads != model.heads:
            return (
                f"the profile has {model.layers} layers of {model.heads} heads, "
                f"the call is of layer {ctx.layer} with {ctx.num_heads} heads"
            )
        return None

    def dense_here(self, ctx: Context) -> str | None:
        """Layers and steps that the profile leaves dense; see Method.dense_here."""
        return "dense by the profile" if self.why_not(ctx) is None and not any(self._row(ctx)) else None

    def least_density(self, ctx: Context) -> float:
        """Mean over the heads; see Method.least_density."""
        if self.why_not(ctx) is not None:
            return 0.0
        row = self._row(ctx)
        least = {i: self.profile.methods[i].least_density(ctx) if i else 1.0 for i in set(row)}
        return sum(least[i] for i in row) / len(row)

    def choosing_pairs(self, ctx: Context) -> float:
        """Mean over the heads; see Method.choosing_pairs."""
        if self.why_not(ctx) is not None:
            return 0.0
        row = self._row(ctx)
        own = {i: 0.0 if (m := self.profile.methods[i]).static else m.choosing_pairs(ctx) for i in set(row)}
        return sum(own[i] for i in row) / len(row)

    def choices(self, ctx: Context) -> int:
        """Two for each dynamic method: its own, and its pattern is put beside the others'; see Method.choices."""
        if self.why_not(ctx) is not None:
            return 1
        dynamic = [i for i in set(self._row(ctx)) if not self.profile.methods[i].static]
        return 2 * len(dynamic) if len(dynamic) > 1 else 1

    def pattern_for(self, q: Tensor, k: Tensor, ctx: Context) -> BlockPattern | Decline:
        """One pattern for all heads; layers whose methods are all static keep theirs by layout."""
        return self.pattern(q, k, ctx)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """What every head reads, methods with an extra branch without it; see Method.pattern."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        mix = self._mix(q, k, ctx, dict(enumerate(self._row(ctx))))
        return mix if isinstance(mix, Decline) else mix.pattern

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """One launch for all heads but those with an extra branch; see Method.attention."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        row = self._row(ctx)
        methods = self.profile.methods
        if len(set(row)) == 1 and (methods[row[0]].static or not self.profile.same_in_group):
            return methods[row[0]].attention(q, k, v, ctx, run)
        chosen: dict[int, int] = dict(enumerate(row))
        apart: list[tuple[list[int], Tensor, Tensor]] = []
        reasons: list[str] = []
        for index in sorted({i for i in row if _has_branch(methods[i])}):
            for heads, kv_heads in equal_groups([h for h, i in chosen.items() if i == index], ctx):
                own = of_heads(ctx, heads, kv_heads)
                done = methods[index].attention(part(q, heads), part(k, kv_heads), part(v, kv_heads), own, run)
                if isinstance(done, Decline):
                    reasons.append(_told(heads, done.reason))
                    chosen.update(dict.fromkeys(heads, 0))
                    continue
                apart.append((heads, done[0], done[1]))
                for head in heads:
                    del chosen[head]
        parts = [*apart]
        if chosen:
            mix = self._mix(q, k, ctx, chosen)
            if isinstance(mix, Decline):
                return mix
            reasons += mix.reasons
            if not (apart or mix.sparse):
                return Decline("; ".join(reasons) or "dense by the profile")
            out, lse = run(q, k, v, mix.pattern)
            if not apart and not reasons:
                return out, lse
            heads = sorted(chosen)
            parts.append((heads, part(out, heads), part(lse, heads)))
        result = PartlyDense(_joined(parts))
        result.reasons = tuple(reasons)
        return result

    def _row(self, ctx: Context) -> tuple[int, ...]:
        """Index of the method of every head at the layer and step."""
        return tuple(self.profile.plan_at(ctx).choice[ctx.layer].tolist())

    def _mix(self, q: Tensor | None, k: Tensor | None, ctx: Context, chosen: dict[int, int]) -> Mix | Decline:
        """The pattern of the `chosen` heads (head: index of its method), kept where all their methods are static."""
        used = [self.profile.methods[i] for i in sorted(set(chosen.values()))]
        device = torch.device("cpu") if q is None else q.device
        if not all(m.static for m in used):
            return self._build(q, k, ctx, chosen, device)
        row = tuple(chosen.get(h, -1) for h in range(ctx.num_heads))
        key = (row, ctx.layout, ctx.num_kv_heads, tuple(m.cache_key(ctx) for m in used), device)
        with _LOCK:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        found = self._build(q, k, ctx, chosen, device)
        if isinstance(found, Decline):
            return found
        with _LOCK:
            self._kept[key] = found
            total = sum(mix.pattern.nbytes for mix in self._kept.values())
            while total > _KEPT_BYTES and len(self._kept) > 1:
                total -= self._kept.popitem(last=False)[1].pattern.nbytes
        return found

    def _build(
        self, q: Tensor | None, k: Tensor | None, ctx: Context, chosen: dict[int, int], device: torch.device
    ) -> Mix | Decline:
        """`_mix`, built anew."""
        found: list[tuple[list[int], BlockPattern]] = []
        dense, reasons = [h for h, i in chosen.items() if i == 0], []
        used = {
            self.profile.methods[index]: sorted(h for h, i in chosen.items() if i == index)
            for index in sorted(set(chosen.values()) - {0})
        }
        estimates = {} if q is None or k is None else shared_estimates(used, q, k, ctx)
        for method, heads in used.items():
            known = estimates.get(estimate_key_of(method))
            for own, pattern in _patterns(method, heads, q, k, ctx, device, known):
                if isinstance(pattern, Decline):
                    dense += own
                    reasons.append(_told(own, pattern.reason))
                else:
                    found.append((own, pattern))
        if not found:
            return Mix(_dense(ctx.layout, 128, 128, device), tuple(reasons), sparse=False)
        sizes = [math.gcd(*(getattr(p, name) for _, p in found)) for name in ("block_q", "block_k")]
        if dense:
            found.append((dense, _dense(ctx.layout, sizes[0], sizes[1], device)))
        absent = [h for h in range(ctx.num_heads) if h not in chosen]
        if absent:
            found.append((absent, _nothing(ctx, sizes[0], sizes[1], device)))
        pattern = _side_by_side(found, ctx.num_heads)
        group = ctx.num_heads // ctx.num_kv_heads
        if self.profile.same_in_group and group > 1:
            try:
                shared = union_heads(pattern, group, ctx.layout.query_start if ctx.layout.is_causal else None)
            except ValueError as error:
                return Decline(f"same_in_group: {error}")
            order = [h // group if shared.heads > 1 else 0 for h in range(ctx.num_heads)]
            last = _heads(shared)
            pattern = stack_heads(
                [shared, _nothing(ctx, sizes[0], sizes[1], device)],
                [last if h in absent else place for h, place in enumerate(order)],
            )
        return Mix(pattern, tuple(reasons), sparse=True)


def _patterns(
    method: Method, heads: list[int], q: Tensor | None, k: Tensor | None, ctx: Context, device: torch.device,
    known: Estimate | None = None,
) -> list[tuple[list[int], BlockPattern | Decline]]:  # fmt: skip
    """Patterns of one method for some heads: lists of heads, each with the pattern of those."""
    if known is not None:
        assert isinstance(method, Estimating)
        return [(heads, method.pattern_by(known.of(heads), ctx))]
    if method.static:
        # Built for all heads, so that it is the same in all layers, and a method may tell heads apart by number.
        reason = method.why_not(ctx)
        found = Decline(reason) if reason is not None else method.static_pattern(ctx, device)
        if isinstance(found, BlockPattern) and _heads(found) > 1:
            every: BlockPattern = found
            # Made once for a pattern that is kept.
            found = derived(every, ("heads", tuple(heads)), lambda: stack_heads([every], heads))
        return [(heads, found)]
    if q is None or k is None:
        raise TypeError(f"`q` and `k` must be tensors: {method.name} chooses by content, got None")
    return [
        (own, method.pattern_for(part(q, own), part(k, kv_heads), of_heads(ctx, own, kv_heads)))
        for own, kv_heads in equal_groups(heads, ctx)
    ]


def _side_by_side(found: list[tuple[list[int], BlockPattern]], num_heads: int) -> BlockPattern:
    """One pattern for all heads from those of some heads each."""
    order, offset = [0] * num_heads, 0
    for heads, pattern in found:
        many = _heads(pattern) > 1
        for place, head in enumerate(heads):
            order[head] = offset + (place if many else 0)
        offset += _heads(pattern)
    if len(found) == 1 and (offset == 1 or order == list(range(offset))):
        return found[0][1]
    return stack_heads([pattern for _, pattern in found], order)


def _heads(pattern: BlockPattern) -> int:
    """Heads that a pattern tells apart, by its blocks, columns or orders."""
    lead = (pattern.indptr, pattern.column_indptr, pattern.q_order, pattern.kv_order)
    return max(t.shape[1] for t in lead if t is not None)


@lru_cache(maxsize=16)
def _dense(layout: TokenLayout, block_q: int, block_k: int, device: torch.device) -> BlockPattern:
    """All keys, in blocks of the size of the other heads'."""
    q_len, kv_len = layout.q_len, layout.kv_len
    keep = torch.ones(1, 1, -(-q_len // block_q), -(-kv_len // block_k), dtype=torch.bool, device=device)
    return BlockPattern.from_block_map(keep, block_q, block_k, q_len, kv_len, layout.is_causal)


def _nothing(ctx: Context, block_q: int, block_k: int, device: torch.device) -> BlockPattern:
    """No key: for heads that run by themselves."""
    counts = torch.zeros(1, 1, -(-ctx.layout.q_len // block_q), dtype=torch.int64, device=device)
    none = counts.flatten()[:0]
    return BlockPattern.from_rows(counts, none, block_q, block_k, ctx.layout.q_len, ctx.layout.kv_len)


def _has_branch(method: Method) -> bool:
    """Whether the method does more than run its pattern."""
    return type(method).attention is not Method.attention


def _joined(parts: Sequence[tuple[list[int], Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Outputs and log-sum-exps of all heads, in order."""
    if len(parts) == 1:
        return parts[0][1], parts[0][2]
    order = [head for heads, _, _ in parts for head in heads]
    index = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=parts[0][1].device)
    return torch.cat([out for _, out, _ in parts], 1)[:, index], torch.cat([lse for _, _, lse in parts], 1)[:, index]


def _told(heads: list[int], reason: str) -> str:
    return f"{'heads' if len(heads) > 1 else 'head'} {', '.join(map(str, heads))} dense: {reason}"
