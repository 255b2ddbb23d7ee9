"""StreamingLLM where text is generated: the first tokens of a cache and the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import PromptOption
from hf_sparse_attn.method import Decline
from hf_sparse_attn.pages import sink_and_recent
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS, make_method
from hf_sparse_attn.selection import check_amount


@METHODS.register("streaming")
@dataclass(frozen=True, kw_only=True)
class Streaming(PromptOption):
    """Where text is generated, each query keeps the first tokens of the cache, the most recent ones and itself.

    As in the published code the query's own token comes on top: `recent` counts those before it. Several queries in
    one call are a prompt, where query i keeps key j <= i if i - j < recent or j < sink, as `sliding_window` does.
    Prompts of a patched model are attended to exactly, unless `prompts` says otherwise.

    Deviations: positions are not numbered anew, and the cache keeps everything: what is saved is reading.

    Formula:
        decoding at position i: keep j with j < sink or j >= i - recent
        prompts: keep j <= i with j < sink or i - j < recent

    When:
        Take it for endless text whose next word depends on what was said just now. Leave it where anything in
        between must be found again: quest finds it.

    Args:
        sink: first tokens that are kept, at least 0; or, as a float in (0, 1), a share of the tokens.
        recent: tokens kept before the query's own, at least 1, or a share of the tokens.
        prompts: whether prompts are read by the same rule.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Xiao et al. 2023, StreamingLLM (arXiv 2309.17453)"

    sink: int | float = 64
    recent: int | float = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("sink", self.sink, 0)
        check_amount("recent", self.recent, 1)

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | None:
        """The first and the last tokens; see Method.decode."""
        return sink_and_recent(step, self.sink, self.recent, besides=1)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """A step, or the window of a prompt; see Method.pattern."""
        if q is None or k is None or ctx.layout.q_len == 1:
            return super().pattern(q, k, ctx)
        window = make_method("sliding_window", {"window": self.recent, "sink": self.sink, "block_size": 64})
        return window.static_pattern(ctx, q.device)

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """A window that is no multiple of a block."""
        return [{"sink": 4, "recent": 60}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """More recent tokens than there are."""
        return {"sink": 0, "recent": 1 << 20}
