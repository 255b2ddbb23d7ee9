"""Video sparse attention: the tiles of a video that fit best, and a pooled branch that a trained gate weighs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.family import find_family
from hf_sparse_attn.method import Decline, Knob, Method, Run
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.video_tiles import Sizes, VideoTiles, check_sizes, tile_pattern, video_tiles
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_share, rank_descending
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.gates import Gates, checked_gates, find_gates, gate_of, unknown_settings


@METHODS.register("vsa")
@dataclass(frozen=True, kw_only=True)
class Vsa(Method):
    """Each tile of a video reads the tiles whose mean key fits its mean query best; the rest comes in pooled.

    The canvas is cut into tiles of frames x height x width. Fine branch: with q_c and k_c the means over the tokens
    of a tile, in float32, S = q_c k_c^T * scale is ranked as it is, without a softmax, and each tile of queries and
    head keeps the k = ceil(density * n) tiles of keys with the highest S, of n; the rest is dropped. Ties go to the
    earlier tile. Coarse branch: O_c = softmax(S) v_c, the same for all tokens of a tile. The output is
    G * O_c + O_f, element by element, where the gate G is a linear function of what the layer's projections read. A
    gate of zero weights, as training starts with, gives the fine branch alone; so does `gates=""`, which computes no
    coarse branch. A gradient flows through both branches and the gate, none through the choice.

    Where the tile does not divide the canvas, the last tiles of a dimension are smaller: they count among the n like
    the others, and their means are over the tokens they have. Text beside the video is kept whole, by all queries and
    for all keys, on top of k; it has no part in the coarse branch, neither as queries nor as keys.

    Deviations from the published code: k is at least 1 and at most n, as there, but a product that is whole up to
    rounding is not rounded up; any tile; text as told. The log-sum-exp is that of the fine branch.

    Formula:
        S = q_c k_c^T * scale, with the means q_c, k_c over the tokens of each tile
        O_f = attention over the ceil(density * n) tiles with the highest S;  O_c = softmax(S) v_c
        O = G * O_c + O_f

    When:
        Take it for a Wan model that you train with it (recipe vsa_gate), or that came with its gates. Without gates
        it is a top-k over tiles, to be measured against block_topk and svg.

    Args:
        density: share of the tiles that is kept, in (0, 1]: 1 - sparsity of the published code.
        tile: (frames, height, width) of a tile in tokens, each at least 1; larger than the canvas means the canvas.
        gates: trained gates: a folder, a Hub id or a GateSet; "" for none. They belong to one transformer: of a
            pipeline with two experts (Wan 2.2) each is patched by itself.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Zhang et al. 2025, VSA: Faster Video Diffusion with Trainable Sparse Attention (arXiv 2505.13389)"
    needs = frozenset({"bidirectional", "video grid"})
    knob = Knob("density", 1 / 256, 1.0, log=True)

    density: float = 0.125
    tile: Sizes = (4, 4, 4)
    gates: Gates = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_share("density", self.density))
        object.__setattr__(self, "tile", check_sizes("tile", self.tile))
        object.__setattr__(self, "gates", checked_gates(self.gates, "vsa"))
        # Without gates there is nothing to read, and no model needs to hand it over.
        object.__setattr__(self, "reads", frozenset({"hidden"} if self.gates else ()))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """Both branches; see Method.attention."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        tiles = video_tiles(ctx.layout, self.tile, q.device)
        queries, keys = tiles.means(q), tiles.means(k)
        pattern = self._pattern(queries, keys, tiles, ctx)
        if not self.gates:
            return run(q, k, v, pattern)
        gate = self._gate(v, ctx)
        if isinstance(gate, Decline):
            return gate
        out, lse = run(q, k, v, pattern)
        coarse = _coarse(queries, keys, tiles.means(v), ctx.softmax_scale).to(out.dtype)
        stop = tiles.start + tiles.tokens
        added = gate[:, :, tiles.start : stop] * coarse.index_select(2, tiles.tile_of)
        # Text has its own keys exactly and needs none of it.
        text = tiles.start, out.shape[2] - stop
        return out + (nn.functional.pad(added, (0, 0, *text)) if any(text) else added), lse

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The fine branch; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: vsa chooses by content, got None")
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        tiles = video_tiles(ctx.layout, self.tile, q.device)
        return self._pattern(tiles.means(q), tiles.means(k), tiles, ctx)

    def why_not(self, ctx: Context) -> str | None:
        """Also where not all tokens are queries; see Method.why_not."""
        return super().why_not(ctx) or ("vsa needs all tokens as queries" if ctx.layout.query_start else None)

    @classmethod
    def make_gates(cls, model: Fingerprint, settings: Mapping[str, Any]) -> Sequence[nn.Module]:
        """A linear layer of zeros for each layer, as wide as its heads together; see Method.make_gates."""
        unknown_settings("vsa", settings, ())
        width = model.heads * model.head_dim
        return [_zero_linear(width) for _ in range(model.layers)]

    def check_model(self, model: Any) -> None:
        """Whether the gates are the model's, and those of one transformer; see Method.check_model."""
        if not self.gates:
            return
        find_gates(self.gates, "vsa").check(model)
        experts = len(find_family(model)[2])
        if experts > 1:
            raise ValueError(f"`model` must be the one transformer that the gates were trained for, got {experts}")

    def _gate(self, v: Tensor, ctx: Context) -> Tensor | Decline:
        """What the coarse branch is multiplied by, [batch, heads, tokens, value dim]."""
        if ctx.inputs is None or ctx.inputs.hidden is None:
            raise ValueError("`ctx.inputs` must hold the hidden states, got none")
        hidden = ctx.inputs.hidden
        gate: Any = gate_of(self.gates, "vsa", ctx.layer, hidden, hidden.dtype)
        width = ctx.num_heads * v.shape[3]
        if (gate.out_features, gate.in_features) != (width, hidden.shape[2]):
            return Decline(
                f"the gates of vsa are for {gate.in_features} hidden states and {gate.out_features} values of all "
                f"heads together, the call has {hidden.shape[2]} and {width}"
            )
        weights: Tensor = gate(hidden.to(gate.weight.dtype)).to(v.dtype)
        return weights.unflatten(2, (ctx.num_heads, -1)).transpose(1, 2)

    def count(self, tiles: int) -> int:
        """Tiles that a tile reads, of so many."""
        return max(1, min(tiles, math.ceil(self.density * tiles - 1e-9)))

    def _pattern(self, queries: Tensor, keys: Tensor, tiles: VideoTiles, ctx: Context) -> BlockPattern:
        """The pattern of the best tiles, from the means of queries and keys."""
        queries = queries.detach().unflatten(1, (keys.shape[1], -1))
        keys, most = keys.detach()[:, :, None].mT, self.count(tiles.tiles)

        def choose(first: int, last: int) -> Tensor:
            scores = (queries[:, :, :, first:last] @ keys).flatten(1, 2) * ctx.softmax_scale
            best = rank_descending(scores)[..., :most]
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)

        return tile_pattern(tiles, choose, queries.shape[0], ctx.num_heads)

    def least_density(self, ctx: Context) -> float:
        """With the smallest tiles, and all text; see Method.least_density."""
        layout = ctx.layout
        if self.why_not(ctx) is not None or layout.video_part is None:
            return 0.0
        tokens, video = layout.kv_len, layout.video_part[1].length
        counts = video_tiles(layout, self.tile).counts
        kept = sum(counts[len(counts) - self.count(len(counts)) :])
        return (tokens**2 - video**2 + video * kept) / tokens**2

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Shares of the tiles, without gates; see Method.candidates."""
        return [{"density": share} for share in (1 / 16, 1 / 8, 1 / 4)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Tiles of a block, and tiles that straddle blocks."""
        return [{"density": 0.3, "tile": (2, 2, 4)}, {"density": 0.15, "tile": (2, 3, 5)}, {"density": 0.4}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All tiles."""
        return {"density": 1.0}


def _zero_linear(width: int) -> nn.Linear:
    made = nn.Linear(width, width)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    return made


def _coarse(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention among the means of tiles, [batch, heads, tiles, value dim]."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) if group > 1 else x for x in (k, v))
    return nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
