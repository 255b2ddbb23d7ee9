"""Tiny models to put adapters on, and everything of a model that must be as before when they are off again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.training.lora.adapter import Adapter
from hf_sparse_attn.training.lora.settings import LoraSettings
from tests.support import tiny_hunyuan, tiny_lm, tiny_qwen, tiny_wan

LM = ("q_proj", "k_proj", "v_proj", "o_proj")
VIDEO = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True)
class Case:
    """A model, its inputs, and an adapter with and without modules that are trained in full."""

    build: Callable[[], Any]
    inputs: Callable[[], dict[str, Any]]
    plain: LoraSettings
    full: LoraSettings

    def run(self, model: Any, **changes: Any) -> Tensor:
        """The model's output."""
        given = {**self.inputs(), **changes}
        return model(**given, return_dict=False)[0]


def _settings(targets: tuple[str, ...], trained: tuple[str, ...]) -> tuple[LoraSettings, LoraSettings]:
    return LoraSettings(targets=targets, rank=3, alpha=5.5), LoraSettings(targets=targets, rank=3, trained=trained)


CASES = {
    "llama": Case(
        lambda: tiny_lm.FAMILIES["llama"]("sdpa"),
        lambda: {"input_ids": tiny_lm.tokens(2, 111)},
        *_settings(LM, ("embed_tokens", "norm")),
    ),
    "qwen_vl": Case(
        lambda: tiny_qwen.tiny_qwen("qwen2_5_vl"),
        lambda: tiny_qwen.prompt("qwen2_5_vl", [9, (2, 4, 6), 11]),
        *_settings((r".*language_model.*\.(q_proj|v_proj)",), ("input_layernorm",)),
    ),
    "wan": Case(
        tiny_wan.transformer,
        lambda: tiny_wan.inputs(latents=(3, 6, 10)),
        *_settings(VIDEO, ("norm2", "proj_out")),
    ),
    "hunyuan": Case(
        tiny_hunyuan.transformer,
        lambda: tiny_hunyuan.inputs(grid=(3, 3, 5)),
        *_settings(VIDEO, ("attn.norm_q",)),
    ),
}


def shake(adapter: Adapter, size: float = 0.1, seed: int = 5) -> None:
    """Moves the weights of an adapter away from their start, where it adds 0."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in adapter.parameters().values():
            weight.add_(size * torch.randn(weight.shape, generator=draw).to(weight.dtype))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Every module with class and attributes (hooks included), every weight with its bits and whether it trains."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
        found[name] = module, type(module), {k: v for k, v in own.items() if k not in ("_parameters", "_buffers")}
    weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found["weights"] = {n: (p, p.requires_grad, p.detach().clone()) for n, p in weights.items()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Two snapshots are of one model in one state."""
    assert before.keys() == after.keys()
    old, new = before["weights"], after["weights"]
    assert old.keys() == new.keys()
    for name, (weight, required, bits) in old.items():
        assert new[name][0] is weight and new[name][1] == required and torch.equal(bits, new[name][2]), name
    for name in before.keys() - {"weights"}:
        assert before[name][0] is after[name][0] and before[name][1] is after[name][1], name
        assert before[name][2] == after[name][2], name
