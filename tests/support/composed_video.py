"""Tiny video models for tests of what else is done to a model: runs, full budgets, and that nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import hf_sparse_attn as hsa
from tests.support import tiny_hunyuan, tiny_wan
from tests.support.tiny_wan import run

SPARSE = {"method": "sliding_window", "backend": "torch_reference", "min_tokens": 0, "strict": True, "block_size": 32}
WINDOW = {**SPARSE, "window": 60, "sink": 5}
FULL = {**SPARSE, **hsa.get_method("sliding_window").full_budget()}
KINDS = ("wan", "hunyuan_video")
# The time of the step that runs, which the caches of diffusers ask for.
NOW = [0.0]


def fresh(kind: str) -> Any:
    return tiny_wan.transformer() if kind == "wan" else tiny_hunyuan.transformer()


def inputs(kind: str, dtype: torch.dtype = torch.float32, time: float = 500) -> dict[str, Any]:
    given = tiny_wan.inputs(time=time) if kind == "wan" else tiny_hunyuan.inputs(time=time)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}


def play(model: Any, kind: str, times: tuple[float, ...] = (500,)) -> torch.Tensor:
    """Outputs of a run of steps, [steps, ...]."""
    if getattr(model, "is_cache_enabled", False):
        model._reset_stateful_cache()
    steps = []
    for time in times:
        NOW[0] = time
        with model.cache_context("cond"):
            steps.append(run(model, **inputs(kind, model.dtype if model.dtype.itemsize == 2 else torch.float32, time)))
    return torch.stack(steps)


@contextmanager
def attention_in(dtype: torch.dtype) -> Iterator[None]:
    """All attention of unpatched models in `dtype`."""
    from diffusers.models.transformers import transformer_hunyuan_video, transformer_wan

    def attend(query: Any, key: Any, value: Any, attn_mask: Any = None, **_: Any) -> Any:
        q, k, v = (t.transpose(1, 2).to(dtype) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).transpose(1, 2).to(query.dtype)

    with pytest.MonkeyPatch.context() as files:
        for file in (transformer_hunyuan_video, transformer_wan):
            files.setattr(file, "dispatch_attention_fn", attend)
        yield


def assert_full_budget(model: Any, get: Callable[[], torch.Tensor], dtype: torch.dtype = torch.float32) -> None:
    """At full budget `get` gives what dense attention gives; a rounding is what attention in `dtype` is off."""
    with hsa.patch(model, **FULL) as patch:
        got = get()
    assert all(r.sparse_calls > 0 for r in patch.report().layers)
    with attention_in(torch.float64):
        exact = get()
    with attention_in(dtype):
        rounding = (get() - exact).abs().max()
    assert (got - exact).abs().max() <= 4 * rounding + 4 * torch.finfo(dtype).eps * exact.abs().max()


def assert_no_trace(model: Any) -> None:
    """Nothing of ours is left in a model whose modules were changed while it was patched."""
    for name, module in model.named_modules():
        assert not [k for k in module.__dict__ if "hsa" in k or k == "cache_context"], name
        held = [v for k, v in module.__dict__.items() if k.endswith("_hooks") and isinstance(v, dict)]
        hooks = [h for found in held for h in found.values()]
        assert not [h for h in hooks if "hf_sparse_attn" in str(getattr(h, "__module__", ""))], name
        processor = getattr(module, "processor", None)
        assert not type(processor).__module__.startswith("hf_sparse_attn"), name
        assert "hf_sparse_attn" not in str(getattr(processor, "_attention_backend", "")), name
