"""Calls that are dense by their shape: seen at once from the second one on, and counted as the first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import hf_sparse_attn as hsa
from hf_sparse_attn.family import tiny_text
from hf_sparse_attn.hosts import transformers_hook as hook


class Asked(Exception):
    """The rules were asked one by one."""


class Mode(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@pytest.fixture
def patched(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Any, Any, dict[str, Any]]]:
    """A patched model that has met its inputs once, after which rules are not to be asked."""
    from transformers import LlamaForCausalLM

    def refuse(*_: Any, **__: Any) -> Any:
        raise Asked

    model, inputs = tiny_text(LlamaForCausalLM, num_key_value_heads=2)
    with torch.no_grad(), hsa.patch(model, "vertical_slash") as patch:
        model(**inputs)
        monkeypatch.setattr(hook, "decide", refuse)
        yield patch, model, inputs


def test_they_are_counted_as_the_first(patched: tuple[Any, Any, dict[str, Any]]) -> None:
    patch, model, inputs = patched
    first = patch.report().layers
    plain = model(**inputs).logits
    for before, after in zip(first, patch.report().layers, strict=True):
        assert {reason: 2 * calls for reason, calls in before.reasons.items()} == after.reasons != {}
        assert after.prefill.visible == 2 * before.prefill.visible > 0
    counted = patch.report().layers
    with patch.paused():
        model(**inputs)
    assert patch.report().layers == counted
    patch.remove()
    assert torch.equal(plain, model(**inputs).logits)


@pytest.mark.parametrize("what", ["mode", "autocast", "gradients", "other length"])
def test_whatever_else_is_at_work_is_looked_at(what: str, patched: tuple[Any, Any, dict[str, Any]]) -> None:
    _, model, inputs = patched
    around: Any = {
        "mode": Mode(),
        "autocast": torch.autocast("cpu", torch.bfloat16),
        "gradients": torch.enable_grad(),
        "other length": torch.no_grad(),
    }[what]
    if what == "other length":
        inputs = {name: x[:, :50] for name, x in inputs.items()}
    with around, pytest.raises(Asked):
        model(**inputs)
