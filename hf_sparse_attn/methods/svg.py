"""Sparse VideoGen: every head of a video model looks along frames or along time; which of the two, each call tells."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, Segment, TokenLayout, check_int
from hf_sparse_attn.method import Decline, Knob, Method, Run
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import check_block_size, check_share, pattern_from_rule, text_blocks, text_tokens

Kind = Literal["auto", "spatial", "temporal"]

# Frames to either side in the masks by which heads are told apart: with the sink (Wan) and without (Hunyuan).
_PROFILE_FRAMES = {True: 2.0, False: 1.5}


@METHODS.register("svg")
@dataclass(frozen=True, kw_only=True)
class Svg(Method):
    """Spatial heads keep a band along frames, temporal heads one along time; each call tells which a head is.

    Both keep the same band, |i - j| <= w over places of the video, and drop the rest: a spatial head's places are the
    tokens frame by frame, a temporal head's are patch by patch, all frames of a patch together. w is N (1 - sqrt(1 -
    s)) rounded up to whole blocks, for N tokens of which c are text and s = density - 2c / N, so that the band alone
    is about `density` of all pairs ("sparsity" in the published code). The sink is kept besides by all queries: the
    first T places, T being the tokens of a frame. For a temporal head that is not the first frame but all frames of
    the first T / F patches: so in the published code, for choosing and for running, and kept. Text is kept whole.

    The choice, per call, batch row and head: the output of `num_samples` rows of queries, drawn once with a fixed seed
    over the whole video, is computed densely and under a mask of each kind (blocks less than 2 frames apart, 1.5
    without sink, and the sink), and the kind with the smaller mean squared error is taken, spatial where they are
    equal. No more than these rows of scores are ever made. `pattern` without `v` compares the rows of attention
    weights themselves: the error for values that are independent of one another.

    Deviations from the published code: the rows come from the whole video (there, unseeded and with repeats, from the
    first 10000 tokens, three frames of 720p); the masks of the choice are never wider than the band that is run, nor
    empty (there frames of less than half a block leave none); text on either side, or none; without sink the width
    is also rounded up and inclusive (there down and exclusive); at least one block; `density=1` keeps everything.

    Formula:
        keep(i, j): |p(i) - p(j)| <= w, or p(j) < T; p = place frame by frame (spatial) or patch by patch (temporal)
        w = N * (1 - sqrt(1 - s)) rounded up to blocks, s = density - 2 * c / N
        kind = the one with the smaller squared error of the output on num_samples rows

    When:
        Take it for a video model as it is, without training or profile: no head is forced into the wrong kind.
        Leave it where choosing must cost nothing (radial, sliding_tile), or after a profile has told the kinds.

    Args:
        density: share of all pairs in the band and the text, in (0, 1], before rounding and without the sink.
        kind: "auto" (told at every call), "spatial" or "temporal", for all heads; or a tuple with one for each head.
        num_samples: rows of queries by which a head's kind is told, at least 1.
        sink: True or False: whether the first places are kept by all queries (Wan) or not (HunyuanVideo).
        block_size: tokens in a block, a power of two from 16 to 256.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Xi et al. 2025, Sparse VideoGen (ICML 2025, arXiv 2502.01776)"
    needs = frozenset({"bidirectional", "video grid"})
    knob = Knob("density", 1 / 256, 1.0, log=True)

    density: float = 0.25
    kind: Kind | tuple[Kind, ...] = "auto"
    num_samples: int = 64
    sink: bool = True
    block_size: int = 128

    def __post_init__(self) -> None:
        object.__setattr__(self, "density", check_share("density", self.density))
        if isinstance(self.kind, list):
            object.__setattr__(self, "kind", tuple(self.kind))
        known = ("auto", "spatial", "temporal")
        if not self.kind or any(kind not in known for kind in self._kinds):
            raise ValueError(f"`kind` must be one of {', '.join(known)}, or one of them per head; got {self.kind!r}")
        check_int("num_samples", self.num_samples, 1)
        if not isinstance(self.sink, bool):
            raise TypeError(f"`sink` must be a bool, got {self.sink!r} of type {type(self.sink).__name__}")
        check_block_size(self.block_size)
        # Heads of a kind that is given need no look at a call: such a pattern is built once.
        object.__setattr__(self, "static", "auto" not in self._kinds)

    @property
    def _kinds(self) -> tuple[Kind, ...]:
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> tuple[Tensor, Tensor] | Decline:
        """Tells the heads apart by their outputs and runs the one pattern; see Method.attention."""
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        found = self.static_pattern(ctx, q.device) if self.static else self.pattern(q, k, ctx, v)
        return found if isinstance(found, Decline) else run(q, k, v, found)

    def pattern(
        self, q: Tensor | None, k: Tensor | None, ctx: Context, v: Tensor | None = None
    ) -> BlockPattern | Decline:
        """One band for all heads, and for each head the order of its tokens; see Method.pattern.

        Args:
            q, k, ctx: as in Method.pattern.
            v: [batch, kv_heads, kv_len, value dim], or None; see the class.

        Raises:
            TypeError: no `q` or `k` though a head is to be told by them.
            ValueError: `kind` is for another number of heads.
        """
        if not self.static and (q is None or k is None):
            raise TypeError(f"`q` and `k` must be tensors: svg chooses by content with kind={self.kind!r}, got None")
        layout = ctx.layout
        if layout.video_part is None:
            return Decline("svg needs exactly one video segment")
        if layout.query_start:
            return Decline("svg needs all tokens as queries")
        if isinstance(self.kind, tuple) and len(self.kind) != ctx.num_heads:
            raise ValueError(f"`kind` must be one for each of the {ctx.num_heads} heads, got {len(self.kind)}")
        if q is None or k is None or self.static:
            band = self._band(layout)
            if set(self._kinds) == {"spatial"}:
                return band
            order = _orders(layout)[[int(kind == "temporal") for kind in self._kinds]][None]
            return replace(band, q_order=order, kv_order=order)
        # The band and the two orders are built once per layout; what is left to a call is to give heads their order.
        one = replace(self, kind="temporal").static_pattern(ctx, q.device)
        if isinstance(one, Decline) or one.kv_order is None:
            raise RuntimeError(f"`kind` 'temporal' must have an order of tokens for {layout}, got {one}")
        temporal = self.choose(q, k, v, ctx)[..., None]
        order = torch.where(temporal, one.kv_order, torch.arange(layout.kv_len, device=q.device))
        return replace(one, q_order=order, kv_order=order)

    def choose(self, q: Tensor, k: Tensor, v: Tensor | None, ctx: Context) -> Tensor:
        """Which heads are temporal, bool [batch, heads].

        Args:
            q: [batch, heads, tokens, dim].
            k: [batch, kv_heads, tokens, dim].
            v: [batch, kv_heads, tokens, value dim], or None to compare the attention weights.
            ctx: where the call is; its layout has one video.
        """
        start, video = _video(ctx.layout)
        rows = _sample(video.length, self.num_samples, q.device)
        masks = self.profile_masks(ctx.layout, rows)
        error = row_errors(q, k, v, rows + start, masks, ctx.softmax_scale, ctx.softcap)
        temporal = error[1] < error[0]
        for head, kind in enumerate(self._kinds if isinstance(self.kind, tuple) else ()):
            if kind != "auto":
                temporal[:, head] = kind == "temporal"
        return temporal

    def profile_masks(self, layout: TokenLayout, rows: Tensor) -> Tensor:
        """The masks by which heads are told apart, bool [2, rows, keys]: spatial and temporal.

        Args:
            layout: the tokens.
            rows: int64 [rows], tokens of the video as queries, counted from its first.
        """
        start, video = _video(layout)
        size, frames, per_frame = self.block_size, *_frames(video)
        token = torch.arange(video.length, device=rows.device)
        place = torch.stack([token, token % per_frame * frames + token // per_frame])
        blocks = int(_PROFILE_FRAMES[self.sink] * per_frame) // size
        blocks = max(1, min(blocks, self._reach(layout) // size))
        block = place // size
        kept = (block[:, rows, None] - block[:, None]).abs() < blocks
        if self.sink:
            kept |= (place < per_frame)[:, None]
        return torch.nn.functional.pad(kept, (start, layout.kv_len - start - video.length), value=True)

    def _reach(self, layout: TokenLayout) -> int:
        """Half width of the band, in tokens: whole blocks, at least one."""
        tokens, video = layout.kv_len, _video(layout)[1].length
        if self.density == 1:
            return -(-video // self.block_size) * self.block_size
        share = max(0.0, self.density - 2 * (tokens - video) / tokens)
        width = tokens * (1 - math.sqrt(1 - share)) / self.block_size
        # A width of whole blocks stays what it is, whatever the last bit of the root.
        return max(1, math.ceil(width - 1e-9)) * self.block_size

    def _band(self, layout: TokenLayout) -> BlockPattern:
        """Band, sink and text over places; text stands where it is in either order."""
        size, tokens, reach = self.block_size, layout.kv_len, self._reach(layout)
        start, video = _video(layout)
        sink = start + _frames(video)[1] if self.sink else start
        first = torch.arange(-(-tokens // size)) * size
        last = (first + size - 1).clamp(max=tokens - 1)
        text, (text_row, text_col) = text_tokens(layout), text_blocks(layout, size, size)
        near = (first <= last[:, None] + reach) & (last >= first[:, None] - reach)
        row, col = (near | (first < sink) | text_row[:, None] | text_col).nonzero().unbind(1)
        distance = first[row] - first[col]
        # Blocks that lie wholly in the band have one tile, those beyond its far side another.
        distance = distance.masked_fill(distance.abs() + size - 1 <= reach, 0).clamp(-reach - size, reach + size)
        edges = text.diff(prepend=text[:1]).nonzero()[:, 0]
        alike = [distance, (sink - first[col]).clamp(0, size)]
        alike += [(edge - place).clamp(0, size) for edge in edges for place in (first[row], first[col])]

        def rule(query: Tensor, key: Tensor) -> Tensor:
            kept = ((query - key).abs() <= reach) | (key < sink)
            return kept | text[query.clamp(max=tokens - 1)] | text[key.clamp(max=tokens - 1)]

        return pattern_from_rule(row, first[col], torch.stack(alike, 1), rule, size, size, layout)

    def least_density(self, ctx: Context) -> float:
        """What is kept, exactly: it is the same for both kinds; see Method.least_density."""
        layout = ctx.layout
        if layout.video_part is None or layout.query_start:
            return 0.0
        tokens, (_, video) = layout.kv_len, _video(layout)
        n, reach = video.length, min(self._reach(layout), video.length - 1)
        kept = n * (2 * reach + 1) - reach * (reach + 1)
        if self.sink:
            # Queries farther than the band from a key of the sink: after it, and before it.
            key = torch.arange(_frames(video)[1])
            kept += int((n - 1 - key - reach).clamp(min=0).sum() + (key - reach).clamp(min=0).sum())
        return (tokens**2 - n**2 + kept) / tokens**2

    def choosing_pairs(self, ctx: Context) -> float:
        """Those of the sampled queries, and their outputs under either mask; see Method.choosing_pairs."""
        return 2.0 * self.num_samples * ctx.layout.kv_len

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Both kinds of head; one frame has no two kinds; see Method.candidates."""
        part = layout.video_part
        if part is None or part[1].grid is None or part[1].grid[0] < 2:
            return []
        kinds: tuple[Kind, ...] = ("spatial", "temporal")
        return [{"kind": kind, "density": share} for kind in kinds for share in (1 / 32, 1 / 8, 1 / 4)]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Told online, with and without sink, and both kinds given."""
        return [
            {"density": 0.3, "block_size": 16, "num_samples": 32},
            {"density": 0.2, "block_size": 32, "sink": False, "num_samples": 7},
            {"density": 0.15, "block_size": 16, "kind": "spatial", "sink": False},
            {"density": 0.4, "block_size": 64, "kind": "temporal"},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """A band as wide as the video."""
        return {"density": 1.0, "block_size": 32}


def row_errors(
    q: Tensor, k: Tensor, v: Tensor | None, rows: Tensor, masks: Tensor, scale: float, softcap: float = 0.0
) -> Tensor:
    """Mean squared error of sampled rows of the output under each mask, in float32; a few heads at a time.

    Args:
        q: [batch, heads, tokens, dim].
        k: [batch, kv_heads, tokens, dim].
        v: [batch, kv_heads, tokens, value dim], or None for the rows of attention weights in place of the output.
        rows: int64 [rows], the queries.
        masks: bool [masks, rows, tokens], each with a key in every row.
        scale: factor on the logits.
        softcap: as in Context.

    Returns:
        float32 [masks, batch, heads].
    """
    kv_heads, group = k.shape[1], q.shape[1] // k.shape[1]
    # Query heads that share keys stand beside their rows: [batch, kv_heads, heads of a group, rows, dim].
    sampled = q[:, :, rows].float().unflatten(1, (kv_heads, group)) * scale
    step = at_a_time(group * masks[0].numel())
    error = q.new_empty(len(masks), q.shape[0], kv_heads, group, dtype=torch.float32)
    dropped = ~masks
    for item in range(q.shape[0]):
        for first in range(0, kv_heads, step):
            own = slice(first, first + step)
            scores = (sampled[item, own].flatten(1, 2) @ k[item, own].float().mT).unflatten(1, (group, -1))
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            values = None if v is None else v[item, own, None].float()

            def output(scores: Tensor, values: Tensor | None = values) -> Tensor:
                weights = scores.softmax(-1)
                return weights if values is None else weights @ values

            dense = output(scores)
            for i, mask in enumerate(dropped):
                near = output(scores.masked_fill(mask, -torch.inf))
                error[i, item, own] = (near - dense).square().mean((2, 3))
    return error.flatten(2)


def _video(layout: TokenLayout) -> tuple[int, Segment]:
    """First token and segment of the video of a layout that has one."""
    if layout.video_part is None:
        raise ValueError(f"`layout` must have exactly one video segment, got {layout}")
    return layout.video_part


def _frames(video: Segment) -> tuple[int, int]:
    """Frames, and tokens in a frame."""
    if video.grid is None:
        raise ValueError(f"`grid` of a video segment must be (frames, height, width), got {video}")
    return video.grid[0], video.length // video.grid[0]


def _orders(layout: TokenLayout) -> Tensor:
    """The token at each place, int64 [2, tokens]: frame by frame, and patch by patch."""
    start, video = _video(layout)
    order = torch.arange(layout.kv_len).repeat(2, 1)
    stop = start + video.length
    order[1, start:stop] = order[0, start:stop].view(_frames(video)).T.flatten()
    return order


@lru_cache(maxsize=16)
def _sample(tokens: int, count: int, device: torch.device) -> Tensor:
    """`count` of `tokens` rows without repeats, ascending; the same at every call."""
    drawn = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:count]
    return drawn.sort().values.to(device)
