"""Patch.paused(): the model of before, to the bit, without taking the patch off."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.api import patch
from hf_sparse_attn.family import Family
from hf_sparse_attn.registry import FAMILIES
from tests.support.tiny_lm import padded
from tests.support.tiny_qwen import prompt, tiny_qwen

pytestmark = pytest.mark.usefixtures("one_thread")

Play = Callable[[], Tensor]


def of_family(name: str) -> tuple[Any, Play]:
    if name in ("wan", "hunyuan_video", "diffusers"):
        pytest.importorskip("diffusers")
    kind: type[Family] = FAMILIES.get(name)
    model, given = kind.tiny()

    def play() -> Tensor:
        with torch.no_grad():
            out = model(**given)
        return out.logits if hasattr(out, "logits") else out[0]

    return model, play


def qwen(kind: str) -> tuple[Any, Play]:
    model = tiny_qwen(kind)
    given = prompt(kind, [9, (2, 4, 6), 30, (3, 5), 20])

    def play() -> Tensor:
        with torch.no_grad():
            return model(**given).logits

    return model, play


def hunyuan(kind: str) -> tuple[Any, Play]:
    pytest.importorskip("diffusers")
    from tests.support import tiny_hunyuan

    model, given = tiny_hunyuan.transformer(kind), tiny_hunyuan.inputs(kind)

    def play() -> Tensor:
        with torch.no_grad():
            return model(**given, return_dict=False)[0]

    return model, play


def left_padding() -> tuple[Any, Play]:
    model, _ = FAMILIES.get("llama").tiny()
    ids, mask, _ = padded([70, 111], "left")

    def play() -> Tensor:
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask).logits

    return model, play


MADE: dict[str, Callable[[], tuple[Any, Play]]] = {
    **{name: (lambda name=name: of_family(name)) for name in FAMILIES.names()},
    **{kind: (lambda kind=kind: qwen(kind)) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")},
    **{f"hunyuan {kind}": (lambda kind=kind: hunyuan(kind)) for kind in ("t2v", "1.5", "framepack")},
    "left_padding": left_padding,
}


@pytest.mark.parametrize("name", MADE)
def test_a_pause_is_the_unpatched_model_to_the_bit(name: str) -> None:
    model, play = MADE[name]()
    before = play()
    method = {"method": "block_topk", "density": 0.2, "block_size": 16}
    with patch(model, **({"method": "native"} if name == "natively_sparse" else method), min_tokens=0) as applied:
        sparse = play()
        counted = applied.report().to_dict()
        with applied.paused():
            paused = play()
        assert applied.report().to_dict() == counted
        again = play()
    assert torch.equal(paused, before)
    assert not torch.equal(sparse, before)
    assert torch.equal(again, sparse)


def test_a_pause_ends_with_an_exception_and_may_stand_in_another() -> None:
    model, play = of_family("llama")
    before = play()
    applied = hsa.patch(model, "block_topk", density=0.2, block_size=16, min_tokens=0)
    sparse = play()
    with applied.paused():
        with pytest.raises(RuntimeError, match="stop"), applied.paused():
            raise RuntimeError("stop")
        assert torch.equal(play(), before)
    assert torch.equal(play(), sparse)
    with applied.paused():
        applied.remove()
        assert torch.equal(play(), before)
    assert torch.equal(play(), before)


def test_a_pause_of_method_dense_counts_nothing() -> None:
    model, play = of_family("llama")
    with hsa.patch(model, "dense") as applied:
        with applied.paused():
            play()
        assert sum(layer.dense_calls for layer in applied.report().layers) == 0
        play()
        assert sum(layer.dense_calls for layer in applied.report().layers) == 2


def test_what_is_measured_in_a_pause_is_dense_under_strict_too() -> None:
    model, given = FAMILIES.get("llama").tiny()
    with hsa.patch(model, "block_topk", strict=True, min_tokens=0) as applied, applied.paused():
        model(**given, output_attentions=True)


def test_a_watcher_sees_every_sparse_sequence_with_its_output() -> None:
    model, _ = FAMILIES.get("llama").tiny()
    ids, mask, _ = padded([70, 111], "left")
    seen: list[tuple[Any, ...]] = []
    with hsa.patch(model, "block_topk", density=0.2, block_size=16, min_tokens=0) as applied:
        applied.session.watcher = lambda *given: seen.append(given)
        model(input_ids=ids, attention_mask=mask)
        with applied.paused():
            model(input_ids=ids, attention_mask=mask)
    assert sorted((ctx.layer, q.shape[2]) for q, _, _, ctx, _ in seen) == [(0, 70), (0, 111), (1, 70), (1, 111)]
    for q, k, v, ctx, out in seen:
        assert out.requires_grad
        assert torch.equal(out, hsa.attention(q, k, v, applied.method, ctx))
