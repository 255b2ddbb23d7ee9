"""Tiny random instances of the transformer classes of diffusers: sizes, weights and inputs."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_sparse_attn.coverage.rules_diffusers import CHANNELS, FRAMES, HEIGHT, INPUTS, SIZES, WIDE, Tiny
from hf_sparse_attn.coverage.table_diffusers import TABLE

_COMPILED = tuple((re.compile(pattern), value) for pattern, value in SIZES)


def tiny_sizes(kind: Any) -> dict[str, Any]:
    """The arguments of a class's constructor that make it small: those of the rules, then its own."""
    found: dict[str, Any] = {}
    for name in list(inspect.signature(kind.__init__).parameters)[1:]:
        value = next((v for pattern, v in _COMPILED if pattern.fullmatch(name)), None)
        if value is not None:
            found[name] = value
    found.update(TABLE.get(kind.__name__, Tiny()).sizes)
    known = inspect.signature(kind.__init__).parameters
    return {name: value for name, value in found.items() if value is not None and name in known}


class _Unset(TorchFunctionMode):
    """NaN in memory that is only allocated, so that weights which no initialisation sets are known as such."""

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        return out.fill_(torch.nan) if func is torch.empty and out.is_floating_point() else out


def tiny_model(kind: Any, sizes: Mapping[str, Any] | None = None) -> nn.Module:
    """A model of a class with random weights in float32, none of them all zero, in evaluation mode.

    Args:
        sizes: arguments of its constructor; None takes those of `tiny_sizes`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        with _Unset():
            model: nn.Module = kind(**(tiny_sizes(kind) if sizes is None else sizes)).eval()
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                # Gates that begin closed would let attention have no part in the output; some are only allocated.
                if not bool(parameter.any()) or not bool(parameter.isfinite().all()):
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def tiny_inputs(kind: Any) -> dict[str, Any]:
    """Keyword inputs of a forward: arguments without a default by their names, and those of the table."""
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=draw)

    parameters = inspect.signature(kind.forward).parameters
    own = TABLE.get(kind.__name__, Tiny()).inputs
    given: dict[str, Any] = {}
    for name in parameters:
        value = own[name] if name in own else _by_name(name, kind, parameters)
        if isinstance(value, tuple) and value and all(isinstance(n, int) for n in value):
            value = random(*value)
        elif callable(value):
            value = value(random)
        if value is not None:
            given[name] = copy.deepcopy(value)
    return given


def _by_name(name: str, kind: Any, parameters: Mapping[str, Any]) -> Any:
    """What an argument of this name is in most classes; None where the rules know none."""
    if name == "hidden_states":
        if "img_ids" in parameters or "img_shapes" in parameters:
            return (HEIGHT // 2 * (WIDE // 2), CHANNELS)
        return (CHANNELS, FRAMES, HEIGHT, WIDE) if "3D" in kind.__name__ else (CHANNELS, HEIGHT, WIDE)
    if name == "img_shapes":
        return [[(1, HEIGHT // 2, WIDE // 2)]]
    return INPUTS.get(name)
