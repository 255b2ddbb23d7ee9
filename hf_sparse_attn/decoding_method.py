"""DecodingMethod: base of the methods that choose keys for one query at a time, where text is generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.decoding import Kept, Memory, Step
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.selection import check_share


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

    def least_density(self, ctx: Context) -> float:
        """0: what a step keeps is rounded to pages and tokens; see Method.least_density."""
        return 0.0

    def dense_here(self, ctx: Context) -> str | None:
        """A prompt; see Method.dense_here."""
        return f"{self.name} reads prompts whole"

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """Every query as a step of its own: slow, and what `decode` is held against; see Method.pattern."""
        if q is None or k is None:
            raise TypeError(f"`q` and `k` must be tensors: {self.name} chooses by content, got None")
        layout, memory = ctx.layout, Memory()
        batch, heads = q.shape[:2]

        def kept(i: int, memory: Memory) -> Kept | Decline | None:
            end = layout.query_start + i + 1
            return self.decode(Step(
                q[:, :, i : i + 1], k[:, :, :end], k[:, :, :end], None, ctx.layer, ctx.num_layers, ctx.softmax_scale,
                memory, softcap=ctx.softcap,
            ))  # fmt: skip

        # Fewer keys are never chosen from where more of them are all kept.
        last = kept(layout.q_len - 1, Memory())
        if last is None:
            return BlockPattern.dense(layout.q_len, layout.kv_len, True, device=q.device)
        rows: list[Tensor] = []
        for i in range(layout.q_len):
            found = kept(i, memory)
            if isinstance(found, Decline):
                return found
            rows.append(_slots(found, layout.query_start + i + 1, q.device).expand(batch, -1, -1))
        most = max(row.shape[2] for row in rows)
        lists = q.new_full((batch, max(row.shape[1] for row in rows), layout.q_len, most), -1, dtype=torch.int32)
        for i, row in enumerate(rows):
            lists[:, :, i, : row.shape[2]] = row
        lists = lists.repeat_interleave(heads // lists.shape[1], 1)
        valid = lists >= 0
        counts = valid.sum(3)
        return BlockPattern.from_rows(
            torch.zeros_like(counts), lists.flatten()[:0], 1, 1, layout.q_len, layout.kv_len,
            column_counts=counts, columns=lists[valid],
        )  # fmt: skip


def _slots(found: Kept | None, end: int, device: torch.device) -> Tensor:
    """The slots below `end` that each list keeps, -1 for none: int32 [batch or 1, lists, count]."""
    if found is None:
        return torch.arange(end, dtype=torch.int32, device=device)[None, None]
    if found.size == 1:
        return found.pages
    pages = found.pages[..., None]
    slots = pages * found.size + torch.arange(found.size, dtype=torch.int32, device=device)
    return slots.masked_fill((pages < 0) | (slots >= end), -1).flatten(2)


@dataclass(frozen=True, kw_only=True)
class PromptOption(DecodingMethod):
    """A method that reads prompts by a rule of its own, too, if it is asked to.

    Args:
        prompts: whether it does where a model is patched.
    """

    prompts: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.prompts, bool):
            raise TypeError(f"`prompts` must be a bool, got {self.prompts!r} of type {type(self.prompts).__name__}")
        # What other methods say of their class is a matter of the parameter here.
        object.__setattr__(self, "reads_prompts", self.prompts)

    def dense_here(self, ctx: Context) -> str | None:
        """A prompt, unless they are read, too; see Method.dense_here."""
        return None if self.prompts else super().dense_here(ctx)


@dataclass(frozen=True, kw_only=True)
class Budgeted(DecodingMethod):
    """A method that keeps so many of the tokens of a cache, in layers after the first ones.

    A subclass says which `share` of the tokens it keeps if it is not told.

    Args:
        density: share of the tokens that is kept, in (0, 1]; or
        budget: tokens that are kept; one of the two.
        min_budget: fewest tokens that are kept by `density`.
        skip_layers: first layers that keep everything.
    """

    default_density: ClassVar[float] = 0.125

    density: float | None = None
    budget: int | None = None
    min_budget: int = 0
    skip_layers: int = 2

    def __post_init__(self) -> None:
        if self.density is not None and self.budget is not None:
            raise ValueError(f"`budget` must be None when `density` is given, got {self.budget} and {self.density}")
        if self.budget is not None:
            check_int("budget", self.budget, 1)
        else:
            density = self.default_density if self.density is None else self.density
            object.__setattr__(self, "density", check_share("density", density))
        check_int("min_budget", self.min_budget, 0)
        check_int("skip_layers", self.skip_layers, 0)

    def tokens(self, length: int) -> int:
        """How many of `length` tokens are kept, at most; no fewer than `length` means all."""
        if self.budget is not None:
            return self.budget
        assert self.density is not None
        return max(self.min_budget, int(self.density * length))

    def skips(self, step: Step) -> bool:
        """Whether the layer keeps everything. A call that belongs to no model, of a single layer, never does."""
        return step.layer < self.skip_layers and step.num_layers > 1

    @classmethod
    def examples(cls) -> list[dict[str, Any]]:
        """A number of tokens, of a few hundred."""
        return [{"budget": 64}]

    @classmethod
    def full_budget(cls) -> dict[str, Any]:
        """All tokens."""
        return {"density": 1.0}
