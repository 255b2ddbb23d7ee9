"""DecodingMethod: base of the methods that choose keys for one query at a time, where text is generated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern


@dataclass(frozen=True, kw_only=True)
class DecodingMethod(Method):
    """A method that reads a cache sparsely where text is generated. Prompts are attended to exactly.

    A subclass defines `decode` (Method). What it keeps from step to step is in `step.memory`, what one layer tells the
    next in `step.layers`.
    """

    needs = frozenset({"causal"})
    trainable = False
    decodes = True
    reads_prompts = False

    def dense_here(self, ctx: Context) -> str | None:
        """A prompt; see Method.dense_here."""
        return f"{self.name} reads prompts whole"

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Every query as a step of its own, without a cache: slow, and what `decode` is held against."""
        if q is None or k is None:
            raise TypeError(f"`q` and `k` must be tensors: {self.name} chooses by content, got None")
        layout, batch, heads = ctx.layout, q.shape[0], q.shape[1]
        rows: list[list[Tensor]] = []
        for i in range(q.shape[2]):
            end = layout.query_start + i + 1
            step = Step(
                q[:, :, i : i + 1], k[:, :, :end], k[:, :, :end], None, ctx.layer, ctx.num_layers, ctx.softmax_scale,
                softcap=ctx.softcap,
            )  # fmt: skip
            found = self.decode(step)
            if isinstance(found, Decline):
                return found
            rows.append(self._slots(found, batch, heads, end, q.device))
        lists = [row[j] for j in range(batch * heads) for row in rows]
        counts = torch.tensor([len(one) for one in lists], device=q.device).view(batch, heads, q.shape[2])
        none = torch.zeros(0, dtype=torch.int32, device=q.device)
        return BlockPattern.from_rows(
            torch.zeros_like(counts), none, 1, 1, layout.q_len, layout.kv_len,
            column_counts=counts, columns=torch.cat(lists),
        )  # fmt: skip

    @staticmethod
    def _slots(found: Kept | None, batch: int, heads: int, end: int, device: torch.device) -> list[Tensor]:
        """The slots below `end` that each head of each row keeps, in order."""
        if found is None:
            return [torch.arange(end, device=device)] * (batch * heads)
        slots = found.pages[..., None] * found.size + torch.arange(found.size, device=device)
        slots = slots.where(found.pages[..., None] >= 0, end).flatten(2)
        slots = slots.repeat_interleave(heads // found.pages.shape[1], 1).expand(batch, -1, -1).flatten(0, 1)
        return [one[one < end].sort().values for one in slots]
