"""SeerAttention: key blocks by a small trained gate on pooled queries and keys."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Knob, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import (
    check_block_size,
    check_share,
    gather_rows,
    pattern_of_rows,
    pool_blocks,
    row_blocks,
    top_blocks,
)
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.gates import Gates, GateSet, checked_gates, find_gates, gate_of, unknown_settings

# Rows of query blocks at the end of a call that keep everything.
_DENSE_ROWS = 2


@METHODS.register("seer_attention")
@dataclass(frozen=True, kw_only=True)
class SeerAttention(Method):
    """Each block of queries keeps the key blocks that a trained gate gives most of its attention; drops the rest.

    The gate of a layer (Qavg_Kmaxminavg) pools queries by their mean and keys by their maximum, minimum and mean,
    all before positions are put in, projects them with matrices of each head, rotates them by the position of the
    first token of their block, and takes a softmax over the key blocks that the query block sees. It is trained by
    `hf-sparse-attn train seer_gate`, with the model left as it is. Kept besides: the block of the query itself, and
    everything for the last two blocks of queries. Ties go to the earlier block.

    Deviations from the published code: the query's own block is always kept, without which a query could have no key;
    everything in float32; queries are projected whenever the gate is not as wide as a head (there also on request);
    of the model's RoPE the gate takes the base alone, no scaling. A part of a prompt whose earlier keys come from a
    cache is dense: a cache holds them with positions.

    Formula:
        a(r, c) = softmax over c of rope(W_q mean(Q_r)) . rope(W_k [max(K_c), min(K_c), mean(K_c)]) / sqrt(hidden)
        keep(r) = own block, and the best (1 - sqrt(1 - density)) * n of n blocks, or those with a > threshold

    When:
        Take it for a decoder that you can spend minutes of training on: its gates choose better than untrained means
        do. Leave it where there are no gates for the very model, and for prompts continued from a cache.

    Args:
        gates: folder or Hub id of trained gates, or a GateSet.
        density: share of the causal blocks of a prompt of n blocks, in (0, 1]: every row keeps its best
            (1 - sqrt(1 - density)) * n, as published; or
        threshold: share of a row's attention, in [0, 1), above which a block is kept (published: 0.0005 to 0.005);
            one of the two, density 0.25 if neither is given.

    Raises:
        ValueError, TypeError: both given, or a value out of range or of the wrong type.
    """

    paper = "Gao et al. 2024, SeerAttention (arXiv 2410.13276)"
    needs = frozenset({"causal"})
    reads = frozenset({"q", "k"})
    knob = Knob("density", 1e-4, 1.0, log=True)

    gates: Gates = ""
    density: float | None = None
    threshold: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "gates", checked_gates(self.gates, "seer_attention"))
        if self.threshold is None:
            object.__setattr__(self, "density", check_share("density", 0.25 if self.density is None else self.density))
            return
        if self.density is not None:
            raise ValueError(f"`density` must be None when `threshold` is given, got {self.density}, {self.threshold}")
        if isinstance(self.threshold, bool) or not isinstance(self.threshold, (int, float)):
            raise TypeError(f"`threshold` must be a number, got {self.threshold!r}")
        if not 0 <= self.threshold < 1:
            raise ValueError(f"`threshold` must be at least 0 and less than 1, got {self.threshold}")

    @classmethod
    def make_gates(cls, model: Fingerprint, settings: Mapping[str, Any]) -> Sequence[nn.Module]:
        """One AttnGate for each layer; see Method.make_gates.

        Args:
            model: sizes of the model.
            settings: `block_size` (64), `hidden` (width of the gate, even; 128) and `rope_theta` (10000.0).
        """
        unknown_settings(cls.name, settings, ("block_size", "hidden", "rope_theta"))
        size = check_block_size(settings.get("block_size", 64))
        hidden = check_int("hidden", settings.get("hidden", 128), 2)
        theta = settings.get("rope_theta", 10000.0)
        if hidden % 2:
            raise ValueError(f"`hidden` must be even, got {hidden}")
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 1:
            raise ValueError(f"`rope_theta` must be a number more than 1, got {theta!r}")
        return [AttnGate(model.heads, model.head_dim, hidden, size, float(theta)) for _ in range(model.layers)]

    def check_model(self, model: Any) -> None:
        """Refuses missing gates and those of another model; see Method.check_model."""
        find_gates(self.gates, self.name).check(model)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The blocks that the gate chooses for each head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: seer_attention chooses by content, got None")
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        assert ctx.inputs is not None and ctx.inputs.q is not None and ctx.inputs.k is not None
        early_q, early_k, layout = ctx.inputs.q.detach(), ctx.inputs.k.detach(), ctx.layout
        if early_k.shape[2] != layout.kv_len:
            return Decline(
                f"seer_attention reads keys before positions, of which the layer has the last {early_k.shape[2]} "
                f"of {layout.kv_len}: the others are in a cache"
            )
        gate = gate_of(self.gates, self.name, ctx.layer, q)
        assert isinstance(gate, AttnGate)
        if gate.key.shape[0] != ctx.num_heads:
            return Decline(f"the gates are of {gate.key.shape[0]} heads, the call is of {ctx.num_heads}")
        with torch.no_grad():
            return self._choose(gate, early_q, early_k, ctx)

    def _choose(self, gate: AttnGate, q: Tensor, k: Tensor, ctx: Context) -> BlockPattern:
        layout, size = ctx.layout, gate.block_size
        queries, keys = gate.queries(q, layout.query_start), gate.keys(k).mT
        shape = (q.shape[0], q.shape[1], queries.shape[2], keys.shape[3])
        low, high = row_blocks(layout, size, q.device)
        block = torch.arange(shape[3], device=q.device)
        row = torch.arange(shape[2], device=q.device)
        # As published: the end of a prompt is the question about it.
        whole = row >= shape[2] - _DENSE_ROWS

        def logits(first: int, last: int) -> tuple[Tensor, Tensor]:
            """Logits of some rows, -inf where not visible, and the row's own blocks."""
            begin, end = low[first:last, None], high[first:last, None]
            found = (queries[:, :, first:last] @ keys).masked_fill(block > end, -torch.inf)
            return found, (block == begin) | (block == end)

        if self.threshold is not None:
            least = self.threshold

            def keep(first: int, last: int) -> Tensor:
                found, own = logits(first, last)
                everything = whole[first:last, None] & (block <= high[first:last, None])
                return (found.softmax(-1) > least) | own | everything

            return pattern_of_rows(*gather_rows(keep, shape), size, layout)
        assert self.density is not None
        visible = high + 1
        # The small term: shares like 1 / 4 must not lose a block to rounding.
        most = max(1, int((1 - math.sqrt(1 - self.density)) * shape[3] + 1e-6))
        counts = torch.minimum(torch.maximum(torch.full_like(visible, most), high - low + 1), visible)
        counts = torch.where(whole, visible, counts)

        def score(first: int, last: int) -> Tensor:
            found, own = logits(first, last)
            return found.masked_fill(own, torch.inf)

        blocks = top_blocks(score, counts, shape).flatten()
        return pattern_of_rows(counts.expand(shape[:3]), blocks, size, layout)

    def turned(self, value: float) -> Method:
        """With `density` at the value, in place of `threshold`; see Method.turned."""
        return replace(self, density=value, threshold=None)

    def least_density(self, ctx: Context) -> float:
        """What the best blocks and the last rows of a whole prompt come to; see Method.least_density."""
        return 0.0 if self.density is None else self.density / 2

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """None: it needs gates that were trained for the model; see Method.candidates."""
        return []

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """By share and by threshold, with untrained gates for one layer of four heads of 16."""
        small, wide = _example(16, 16), _example(32, 24)
        return [{"gates": small, "density": 0.4}, {"gates": wide, "threshold": 0.1}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All blocks."""
        return {"gates": _example(32, 24), "density": 1.0}


class AttnGate(nn.Module):
    """The gate of one layer: features of query blocks and of key blocks whose products are the logits of the blocks.

    Args:
        heads: query heads.
        dim: size of a head.
        hidden: size of the features, even.
        block_size: tokens in a block.
        theta: base of the rotation.
    """

    def __init__(self, heads: int, dim: int, hidden: int, block_size: int, theta: float) -> None:
        super().__init__()
        self.block_size, self.theta, self.hidden = block_size, theta, hidden
        self.key = nn.Parameter(_uniform(heads, 3 * dim, hidden))
        # A gate as wide as a head reads the pooled queries as they are.
        self.query = nn.Parameter(_uniform(heads, dim, hidden)) if hidden != dim else None

    def queries(self, q: Tensor, start: int = 0) -> Tensor:
        """Features of query blocks, scaled: float32 [batch, heads, blocks, hidden].

        Args:
            q: [batch, heads, tokens, dim] before positions.
            start: position of the first token.
        """
        with torch.autocast(q.device.type, enabled=False):
            pooled = pool_blocks(q, self.block_size)
            if self.query is not None:
                pooled = pooled @ self.query
            return self._rotated(pooled, start) * self.hidden**-0.5

    def keys(self, k: Tensor) -> Tensor:
        """Features of key blocks for every query head: float32 [batch, heads, blocks, hidden].

        Args:
            k: [batch, kv_heads, tokens, dim] before positions, of all tokens.
        """
        with torch.autocast(k.device.type, enabled=False):
            pooled = torch.cat([*_extremes(k, self.block_size), pool_blocks(k, self.block_size)], dim=-1)
            # Keys are not repeated; the matrices of the heads that share them stand side by side.
            found = pooled[:, :, None] @ self.key.unflatten(0, (k.shape[1], -1))
            return self._rotated(found.flatten(1, 2), 0)

    def _rotated(self, x: Tensor, start: int) -> Tensor:
        """Features rotated by the position of the first token of their block, halves against each other."""
        half, device = self.hidden // 2, x.device
        # Angles of a million tokens are too large for float32.
        speed = self.theta ** -(torch.arange(half, dtype=torch.float64, device=device) / half)
        position = start + torch.arange(x.shape[2], dtype=torch.float64, device=device) * self.block_size
        angle = position[:, None] * speed
        cos, sin = angle.cos().float(), angle.sin().float()
        one, two = x[..., :half], x[..., half:]
        return torch.cat([one * cos - two * sin, two * cos + one * sin], dim=-1)


def _extremes(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Largest and smallest values of each block in float32, each [batch, heads, blocks, dim]."""
    whole = x.shape[2] // size * size
    blocks = x[:, :, :whole].unflatten(2, (-1, size))
    found = [blocks.amax(3), blocks.amin(3)] if whole else [x[:, :, :0], x[:, :, :0]]
    if whole < x.shape[2]:
        rest = x[:, :, whole:]
        found = [torch.cat([found[0], rest.amax(2, True)], 2), torch.cat([found[1], rest.amin(2, True)], 2)]
    return found[0].float(), found[1].float()


def _uniform(heads: int, rows: int, columns: int) -> Tensor:
    """Starting weights of one matrix per head (Glorot and Bengio 2010)."""
    bound = math.sqrt(6 / (rows + columns))
    return torch.empty(heads, rows, columns).uniform_(-bound, bound)


def _example(block_size: int, hidden: int) -> GateSet:
    """Untrained gates, the same for all heads."""
    model = Fingerprint("example", "llama", 1, 4, 2, 16, "", "")
    found = GateSet("seer_attention", model, {"block_size": block_size, "hidden": hidden}, seed=1)
    with torch.no_grad():
        for weight in found.parameters():
            weight.copy_(weight[:1].expand_as(weight).clone())
    return found
