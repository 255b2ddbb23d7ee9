"""One tiny model of every family, and of every way in which attention is reached, with inputs for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_diffusers, tiny_encoders, tiny_hunyuan

WINDOW: dict[str, Any] = dict(method="sliding_window", window=24, sink=3, block_size=16, min_tokens=0)


def _encoder(name: str) -> tuple[Any, dict[str, Any]]:
    return tiny_encoders.ENCODERS[name](), tiny_encoders.inputs(name)


def _hunyuan(kind: str) -> tuple[Any, dict[str, Any]]:
    return tiny_hunyuan.transformer(kind), tiny_hunyuan.inputs(kind, (7,))


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **{name: FAMILIES.get(name).tiny for name in ("llama", "encoder", "qwen_vl", "wan", "hunyuan_video")},
    "vit": lambda: _encoder("vit"),
    "bart": lambda: _encoder("bart"),
    "hunyuan_video_1.5": lambda: _hunyuan("1.5"),
    "dispatcher": lambda: tiny_diffusers.build(tiny_diffusers.TWO[0]),
    "function": lambda: tiny_diffusers.build(tiny_diffusers.TWO[1]),
}
VIDEO = ("wan", "hunyuan_video", "hunyuan_video_1.5", "dispatcher", "function")


def output(model: Any, given: dict[str, Any]) -> Tensor:
    """The first tensor that a forward gives."""
    found = model(**given, return_dict=False)[0]
    return found if isinstance(found, Tensor) else torch.stack(found)


def run(model: Any, given: dict[str, Any]) -> Tensor:
    """The same without gradients."""
    with torch.no_grad():
        return output(model, given)
