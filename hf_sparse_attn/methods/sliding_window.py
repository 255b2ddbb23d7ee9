"""Sliding window with sinks (A-shape, StreamingLLM, Longformer's local part)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.method import Knob, Method
from hf_sparse_attn.pages import sink_and_recent
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import (
    amount_of,
    check_amount,
    check_block_size,
    pattern_from_rule,
    text_blocks,
    text_tokens,
)


@METHODS.register("sliding_window")
@dataclass(frozen=True, kw_only=True)
class SlidingWindow(Method):
    """Each query keeps the nearest tokens and the first ones; all else is dropped. Exact to the token.

    Causal: query i keeps key j <= i where i - j < window or j < sink. Bidirectional: |i - j| < window or j < sink, and
    text beside a video is kept whole, by all queries and for all keys.
    Deviation from the papers: positions are not re-assigned (StreamingLLM re-numbers the tokens of its cache).

    Formula:
        causal: keep j <= i with i - j < window or j < sink
        bidirectional: keep j with |i - j| < window or j < sink

    When:
        Take it for fluent text at the least cost, and as the method of the heads of a profile that look around
        themselves. Leave it where anything outside of the window must be found again: it is gone.

    Args:
        window: tokens kept up to and including the query itself (on both sides where bidirectional), at least 1; or,
            as a float in (0, 1), a share of the keys, which means the same at any length.
        sink: first tokens kept by every query, at least 0, or a share of the keys like `window`.
        block_size: tokens in a block of the pattern, a power of two from 16 to 256; does not change what is kept.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453); A-shape of Jiang et al. 2024, MInference (2407.02490)"
    static = True
    decodes = True
    knob = Knob("window", 1, 1 << 30, log=True, integer=True)

    window: int | float = 3968
    sink: int | float = 128
    block_size: int = 128

    def __post_init__(self) -> None:
        check_amount("window", self.window, 1)
        check_amount("sink", self.sink, 0)
        check_block_size(self.block_size)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern:
        """Sinks and band as aligned blocks with edge tiles; see Method.pattern."""
        layout, size = ctx.layout, self.block_size
        window, sink = (amount_of(n, layout.kv_len) for n in (self.window, self.sink))
        rows, cols = -(-layout.q_len // size), -(-layout.kv_len // size)
        first = layout.query_start + torch.arange(rows) * size
        last = (first + size - 1).clamp(max=layout.kv_len - 1)
        high = last if layout.is_causal else (last + window - 1).clamp(max=layout.kv_len - 1)
        low = (first - window + 1).clamp(min=0)
        block = torch.arange(cols)
        sinks = block * size < sink
        if layout.is_causal:
            sinks = sinks & (block * size <= last[:, None])
        band = (block >= low[:, None] // size) & (block <= high[:, None] // size)
        text, text_row, text_col = text_tokens(layout), *text_blocks(layout, size, size)
        if layout.is_causal:
            # Text around the images of a language model is what the window is for.
            text, text_row, text_col = (torch.zeros_like(t) for t in (text, text_row, text_col))
        row, col = (band | sinks | text_row[:, None] | text_col).nonzero().unbind(1)
        # A tile depends on how far the block lies from the row, up to beyond the window, on where the sinks end, and
        # on where text begins and ends in its rows and in its keys.
        far = window + 2 * size
        edges = text.diff(prepend=text[:1]).nonzero()[:, 0]
        alike = [(first[row] - col * size).clamp(-far, far), (sink - col * size).clamp(0, size)]
        alike += [(edge - start).clamp(0, size) for edge in edges for start in (first[row], col * size)]

        def rule(query: Tensor, key: Tensor) -> Tensor:
            near = query - key < window
            if not layout.is_causal:
                near = near & (key - query < window)
            kept = near | (key < sink)
            if layout.is_causal:
                return kept & (key <= query)
            last = layout.kv_len - 1
            return kept | text[query.clamp(max=last)] | text[key.clamp(max=last)]

        return pattern_from_rule(row, col * size, torch.stack(alike, 1), rule, size, size, layout)

    def decode(self, step: Step) -> Kept | None:
        """The last row of the causal pattern; see Method.decode."""
        return sink_and_recent(step, self.sink, self.window)

    def least_density(self, ctx: Context) -> float:
        """The window alone; see Method.least_density."""
        n = ctx.layout.kv_len
        window = min(amount_of(self.window, n), n)
        if ctx.layout.query_start:
            return 0.0
        # The first queries of a causal window have fewer keys; in one of both sides the last ones do, too.
        kept, missing = window * n, window * (window - 1) / 2
        if ctx.layout.is_causal:
            return (kept - missing) / (n * (n + 1) / 2)
        return (2 * (kept - missing) - n) / n**2

    @classmethod
    def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
        """Windows that are shares of the tokens, of 16 at least; see Method.candidates."""
        is_video = layout.video_part is not None
        parts = (128, 64, 32, 16, 8, 4) if layout.is_causal else (32, 16) if is_video else (32, 16, 8, 4)
        wide = [part for part in parts if tokens >= 16 * part] or parts[-1:]
        return [{"window": 1 / part, "sink": 0 if is_video else 16} for part in wide]

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Windows and sinks that are no multiple of the block."""
        return [
            {"window": 40, "sink": 4, "block_size": 32},
            {"window": 1, "sink": 0, "block_size": 16},
            {"window": 64, "sink": 33, "block_size": 64},
        ]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """A window longer than any test."""
        return {"window": 1 << 20, "sink": 0, "block_size": 32}
