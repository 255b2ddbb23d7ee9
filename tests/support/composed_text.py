"""Tiny text models for tests of what else is done to a model: runs, full budgets, and that nothing is left behind."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

import hf_sparse_attn as hsa
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE
from hf_sparse_attn.patching import PATCH_ATTRIBUTE
from tests.support.patched import sparse_share
from tests.support.tiny_lm import FAMILIES, tokens
from tests.support.tiny_qwen import prompt, tiny_qwen

KINDS = ("llama", "qwen2_5_vl")
FULL = {"method": "sliding_window", "min_tokens": 0, **hsa.get_method("sliding_window").full_budget()}


def fresh(kind: str) -> Any:
    return FAMILIES["llama"]("sdpa") if kind == "llama" else tiny_qwen(kind)


def play(model: Any, kind: str) -> torch.Tensor:
    given = {"input_ids": tokens(2, 111)} if kind == "llama" else prompt(kind, [9, (2, 4, 6), 30])
    if model.dtype == torch.bfloat16:
        given = {k: v.bfloat16() if v.is_floating_point() else v for k, v in given.items()}
    with torch.no_grad():
        logits = model(**given).logits
    if kind != "llama":
        # What the model itself keeps of its last prompt.
        model.model.rope_deltas = None
    return logits


def attend(dtype: torch.dtype, module: Any, q: Any, k: Any, v: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
    k, v = (t.repeat_interleave(module.num_key_value_groups, 1).to(dtype) for t in (k, v))
    out = F.scaled_dot_product_attention(q.to(dtype), k, v, attn_mask=mask, scale=scaling)
    return out.transpose(1, 2).to(q.dtype).contiguous(), None


for precision in (torch.float64, torch.float32, torch.bfloat16):
    AttentionInterface.register(f"test_{precision}", functools.partial(attend, precision))
    AttentionMaskInterface.register(
        f"test_{precision}", lambda **kw: sdpa_mask(**{**kw, "allow_is_causal_skip": False})
    )


@contextmanager
def attention_in(model: Any, dtype: torch.dtype) -> Iterator[None]:
    """Text attention of an unpatched model in `dtype`."""
    attentions = [m for m in model.modules() if hasattr(m, "layer_idx") and hasattr(m, "num_key_value_groups")]
    with pytest.MonkeyPatch.context() as configs:
        for config in {id(m.config): m.config for m in attentions}.values():
            configs.setitem(config.__dict__, "_attn_implementation_internal", f"test_{dtype}")
        yield


def assert_full_budget(model: Any, kind: str) -> None:
    """At full budget the logits are those of dense attention; a rounding is what attention in the dtype is off."""
    with hsa.patch(model, **FULL) as patch:
        got = play(model, kind)
    assert sparse_share(patch.report().layers) == 1
    dtype = model.dtype
    with attention_in(model, torch.float64):
        exact = play(model, kind)
    with attention_in(model, dtype):
        rounding = (play(model, kind) - exact).abs().max()
    assert (got - exact).abs().max() <= 4 * rounding + 4 * torch.finfo(dtype).eps * exact.abs().max()


def assert_no_trace(model: Any) -> None:
    """Nothing of ours is left in a model whose modules were changed while it was patched."""
    for name, module in model.named_modules():
        assert not [k for k in module.__dict__ if k in (PATCH_ATTRIBUTE, STATE_ATTRIBUTE) or "hsa" in k], name
        held = [v for k, v in module.__dict__.items() if k.endswith("_hooks") and isinstance(v, dict)]
        hooks = [h for found in held for h in found.values()]
        assert not [h for h in hooks if "hf_sparse_attn" in str(getattr(h, "__module__", ""))], name
        config = getattr(module, "config", None)
        assert not str(getattr(config, "_attn_implementation", "")).startswith("hsa"), name
