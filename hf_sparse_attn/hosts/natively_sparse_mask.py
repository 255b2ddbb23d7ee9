"""Masks of models that select their own keys: described to their layers, and made only where nothing less will do."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from hf_sparse_attn.hosts.transformers_mask import MaskSpec
from hf_sparse_attn.listed_attention import Visible

# An additive mask of this or less leaves a key no weight.
_HIDDEN = -9000.0


class SelectingMask(MaskSpec):
    """Stands for a mask between a model that selects its keys and its layers; see MaskSpec.

    Such models cut the rows out of it for their indexer, which gets this object itself.
    """

    def __getitem__(self, index: Any) -> Any:
        parts = index if isinstance(index, tuple) else (index,)
        every = slice(None)
        if len(parts) > 1 and isinstance(parts[1], int) and parts[1] == 0:
            if all(isinstance(part, slice) and part == every for part in (parts[0], *parts[2:])):
                return self
        return super().__getitem__(index)

    def __and__(self, other: Any) -> Any:
        # A model joins what its indexer gave it: an object that a seam put there speaks for the mask as well.
        if not isinstance(other, Tensor):
            return other
        mask = self.dense(self.original, other.device)
        if other.is_floating_point():
            # As transformers 5.17 has it.
            return mask + other
        return mask & other if mask.dtype == torch.bool else mask.masked_fill(~other, torch.finfo(mask.dtype).min)

    def is_floating_point(self) -> bool:
        """Whether it weighs keys; see dtype."""
        return False

    @property
    def dtype(self) -> Any:
        """That of the mask which it stands for, without making it."""
        return torch.bool

    @cached_property
    def visible(self) -> Visible:
        """Which keys the mask shows; made as a tensor only where it is not the plain causal one."""
        causal = masking_utils.causal_mask_function
        if self.wanted.get("mask_function", causal) is causal:
            return self.up_to_own
        mask = shown(self._tensor())
        assert mask is not None
        return Visible(mask=mask)

    @cached_property
    def up_to_own(self) -> Visible:
        """The keys up to each query's own that are no padding, whatever else the mask hides."""
        wanted = self.wanted
        before, keys = int(wanted.get("kv_offset", 0)), self.shape[3]
        padding = masking_utils.prepare_padding_mask(wanted.get("attention_mask"), keys, before)
        if padding is not None:
            padding = padding[:, before : before + keys].to(self.device, torch.bool)
            padding = None if bool(padding.all()) else padding
        return Visible(int(wanted["q_offset"]) - before, padding)


def shown(mask: Tensor) -> Tensor | None:
    """Which keys a mask [batch, 1, q_len, kv_len] shows, bool [batch, q_len, kv_len]; None where it weighs keys."""
    if mask.ndim != 4 or mask.shape[1] != 1:
        return None
    mask = mask[:, 0]
    if not mask.is_floating_point():
        return mask.bool()
    if not bool(((mask == 0) | (mask <= _HIDDEN)).all()):
        return None
    return mask == 0


def visible_of(mask: Any) -> Visible | None:
    """Which keys a mask shows, given as an object or as a tensor; None where it does more than that."""
    if isinstance(mask, SelectingMask):
        return mask.visible
    if isinstance(mask, Tensor):
        found = shown(mask if mask.ndim == 4 else mask[:, None])
        return None if found is None else Visible(mask=found)
    return None
