"""Gradient checkpointing across the ends of a patch and of its pauses: gradients are right, or backward says why."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import hf_sparse_attn as hsa
from tests.support.tiny_families import MODELS, WINDOW, output

pytestmark = pytest.mark.usefixtures("one_thread")

KINDS = ("llama", "encoder", "vit", "qwen_vl", "wan", "hunyuan_video", "function")
REMOVED = r"was removed: call backward\(\) before remove\(\)"
PAUSED = r"must both be within patch.paused\(\)"


def built(kind: str, reentrant: bool = False) -> tuple[Any, dict[str, Any]]:
    model, given = MODELS[kind]()
    model.train()
    # Recomputation draws the same numbers, but a test of gradients needs none.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    if hasattr(model, "enable_gradient_checkpointing"):
        again = (lambda f, *args: checkpoint(f, *args, use_reentrant=reentrant)) if reentrant else None
        model.enable_gradient_checkpointing(again)
    else:
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        # Its inputs must require gradients.
        for name in given.keys() & {"hidden_states", "pixel_values"}:
            given[name] = given[name].requires_grad_()
        if kind in ("llama", "encoder", "qwen_vl"):
            model.enable_input_require_grads()
    return model, given


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return found


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("reentrant", [False, True], ids=["", "reentrant"])
@pytest.mark.parametrize("kind", KINDS[:-1])
def test_backward_after_removal_says_so(kind: str, reentrant: bool) -> None:
    model, given = built(kind, reentrant)
    with hsa.patch(model, **WINDOW):
        output(model, given).square().mean().backward()
        right = gradients(model)
        loss = output(model, given).square().mean()
    with pytest.raises(RuntimeError, match=REMOVED):
        loss.backward()
    gradients(model)
    with hsa.patch(model, **WINDOW):
        output(model, given).square().mean().backward()
    assert same(gradients(model), right)
    # Without checkpointing nothing runs again.
    model.gradient_checkpointing_disable() if kind in KINDS[:4] else model.disable_gradient_checkpointing()
    with hsa.patch(model, **WINDOW):
        loss = output(model, given).square().mean()
    loss.backward()
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(gradients(model), right, strict=True))


def test_a_layer_of_which_nothing_says_the_forward_is_refused() -> None:
    """The reentrant form hands detached tensors to the blocks, and these take no table of rotations."""
    model, given = built("function", reentrant=True)
    with hsa.patch(model, **WINDOW), pytest.raises(RuntimeError, match="use_reentrant=False"):
        output(model, given).square().mean().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_between_forward_and_backward(kind: str) -> None:
    model, given = built(kind)
    output(model, given).square().mean().backward()
    right = gradients(model)
    loss = output(model, given).square().mean()
    with hsa.patch(model, **WINDOW):
        loss.backward()
    assert same(gradients(model), right)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pause_between_forward_and_backward_says_so(kind: str) -> None:
    model, given = built(kind)
    output(model, given).square().mean().backward()
    right = gradients(model)
    with hsa.patch(model, **WINDOW) as patch:
        loss = output(model, given).square().mean()
        with patch.paused(), pytest.raises(RuntimeError, match=PAUSED):
            loss.backward()
        with patch.paused():
            loss = output(model, given).square().mean()
        with pytest.raises(RuntimeError, match=PAUSED):
            loss.backward()
        gradients(model)
        with patch.paused():
            loss = output(model, given).square().mean()
            loss.backward()
        assert same(gradients(model), right)


def test_a_checkpoint_of_ones_own_and_a_forward_that_fails() -> None:
    model, given = MODELS["llama"]()
    ids = given["input_ids"]
    with hsa.patch(model, **WINDOW):
        with pytest.raises(IndexError):
            model(input_ids=ids + 10_000)
        embedded = model.model.embed_tokens(ids)
        again = checkpoint(lambda x: model.model(inputs_embeds=x)[0], embedded, use_reentrant=False)
        once = model(input_ids=ids).logits
    once.sum().backward()
    with pytest.raises(RuntimeError, match=REMOVED):
        again.sum().backward()
