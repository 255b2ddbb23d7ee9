"""DuoAttention: heads that retrieve keep everything, the others the first tokens and the last ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.decoding_method import PromptOption
from hf_sparse_attn.method import Decline
from hf_sparse_attn.pages import sink_and_recent
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import METHODS, make_method
from hf_sparse_attn.selection import check_amount


@METHODS.register("duo")
@dataclass(frozen=True, kw_only=True)
class Duo(PromptOption):
    """Some heads of keys are read whole where text is generated, of the others the first tokens and the last ones.

    Which heads retrieve is trained, a number for each (recipe duo_gate), or published for a model;
    `profiles.published.duo_attention_heads` reads the published files. All heads of queries of a head of keys go with
    it. The others keep what `streaming` keeps: `recent` tokens before the query's own. Several queries in one call are
    a prompt, which those heads read as `sliding_window` does. Prompts of a patched model are attended to exactly,
    unless `prompts` says otherwise.

    Deviations: the cache keeps everything, so that memory is not saved; a chunk of a prompt keeps what the prompt as
    a whole would, where the published code lets a chunk see itself whole.

    Formula:
        retrieval heads: keep all j
        others, decoding at position i: keep j with j < sink or j >= i - recent
        others, prompts: keep j <= i with j < sink or i - j < recent

    When:
        Take it for a model whose retrieval heads are known: nothing is chosen, and nothing that is needed is lost.
        Leave it where they are not known: quest needs no training.

    Args:
        retrieval: for each layer the heads of keys that retrieve, by number; None: the method declines.
        sink: first tokens that the other heads keep, at least 0; or, as a float in (0, 1), a share of the tokens.
        recent: tokens that they keep before the query's own, at least 1, or a share of the tokens.
        prompts: whether prompts are read by the same rule.

    Raises:
        ValueError, TypeError: a parameter out of its range or of the wrong type.
    """

    paper = "Xiao et al. 2024, DuoAttention (arXiv 2410.10819)"

    retrieval: Sequence[Sequence[int]] | None = None
    sink: int | float = 64
    recent: int | float = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_amount("sink", self.sink, 0)
        check_amount("recent", self.recent, 1)
        if self.retrieval is not None:
            object.__setattr__(self, "retrieval", _heads(self.retrieval))

    def check_model(self, model: Any) -> None:
        """Raises where nobody said which heads retrieve; see Method.check_model."""
        if self.retrieval is None:
            raise ValueError(f"`retrieval` must be the heads of keys that retrieve, layer by layer: {_WHERE}")

    def why_not(self, ctx: Context) -> str | None:
        """Whether the heads of the layer are known; see Method.why_not."""
        return super().why_not(ctx) or self._why_not(ctx.layer, ctx.num_kv_heads)

    @torch.no_grad()
    def decode(self, step: Step) -> Kept | Decline | None:
        """All tokens, or the first and the last ones; see Method.decode."""
        kv_heads = step.k.shape[1]
        reason = self._why_not(step.layer, kv_heads)
        if reason is not None:
            return Decline(reason)
        whole = self._whole(step.layer)
        found = sink_and_recent(step, self.sink, self.recent, besides=1)
        if found is None or not whole or len(whole) == kv_heads:
            return found if not whole else None
        device = found.pages.device
        pages = torch.full((len(found.pages), kv_heads, step.length), -1, dtype=torch.int32, device=device)
        pages[:, :, : found.pages.shape[2]] = found.pages
        pages[:, list(whole)] = torch.arange(step.length, dtype=torch.int32, device=device)
        return Kept(pages)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """A step, or a window and everything; see Method.pattern."""
        if q is None or k is None or ctx.layout.q_len == 1:
            return super().pattern(q, k, ctx)
        reason = self.why_not(ctx)
        if reason is not None:
            return Decline(reason)
        params = {"window": self.recent, "sink": self.sink, "block_size": 64}
        window = make_method("sliding_window", params).static_pattern(ctx, q.device)
        assert isinstance(window, BlockPattern)
        whole = BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, True, 64, q.device)
        group = ctx.num_heads // ctx.num_kv_heads
        order = [int(head // group in self._whole(ctx.layer)) for head in range(ctx.num_heads)]
        return BlockPattern.stack_heads([window, whole], order) if any(order) else window

    def _whole(self, layer: int) -> Sequence[int]:
        assert self.retrieval is not None
        return self.retrieval[layer]

    def _why_not(self, layer: int, kv_heads: int) -> str | None:
        if self.retrieval is None:
            return f"duo must be told which heads retrieve: {_WHERE}"
        if layer >= len(self.retrieval):
            return f"duo knows the heads of {len(self.retrieval)} layers, the call is of layer {layer}"
        beyond = [head for head in self.retrieval[layer] if head >= kv_heads]
        return (
            f"duo keeps head of keys {beyond[0]} of layer {layer} whole, the call has {kv_heads}" if beyond else None
        )

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """Heads of one layer, none of which retrieves."""
        return [{"retrieval": ((),), "sink": 4, "recent": 60}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """More recent tokens than there are."""
        return {"retrieval": ((),), "sink": 0, "recent": 1 << 20}


_WHERE = "train them by the recipe duo_gate, or read published ones by duo_attention_heads()"


def _heads(layers: object) -> tuple[tuple[int, ...], ...]:
    """Heads of every layer as they are kept: ascending, each once."""
    if not isinstance(layers, Sequence) or not all(isinstance(heads, Sequence) for heads in layers):
        raise TypeError(f"`retrieval` must be a list of heads for each layer, got {layers!r}")
    return tuple(tuple(sorted({check_int("retrieval", head, 0) for head in heads})) for heads in layers)
