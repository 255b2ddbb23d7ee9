"""Rotary positions of a live transformers model stretched to a longer context, and put back."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import restoring
from hf_sparse_attn.settings import build_config

# Types of transformers whose base can be changed and which keep their meaning.
_BASED = ("default", "linear", "llama3")
# Layers that see no further than a window meet no longer distances in a longer text.
_WINDOWED = ("sliding_attention", "chunked_attention")


@dataclass(frozen=True, kw_only=True)
class RopeSettings:
    """How rotary positions (RoPE) are stretched.

    Args:
        type: "linear" divides all frequencies by the factor (position interpolation, Chen et al. 2023, arXiv
            2306.15595); "ntk" raises the base, so that the slowest frequency is divided by the factor and the fastest
            stays (the NTK-aware form described in Peng et al. 2023, section 3.1); "yarn" divides slow frequencies,
            keeps fast ones and makes attention sharper (Peng et al. 2023, YaRN, arXiv 2309.00071).
        factor: length aimed at over the length the model was trained to, 1 or more.
        original_length: tokens the model was trained to; None takes it from the model's config.
        beta_fast, beta_slow: "yarn" alone: frequencies that turn at least `beta_fast` times over the original length
            stay, those that turn less than `beta_slow` times are divided in full, those between in part.
        attention_factor: "yarn" alone: on cosine and sine, so that logits grow by its square; None is the paper's
            0.1 ln(factor) + 1.
    """

    type: Literal["linear", "ntk", "yarn"]
    factor: float
    original_length: int | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    attention_factor: float | None = None

    def __post_init__(self) -> None:
        if self.type not in ("linear", "ntk", "yarn"):
            raise ValueError(f"`type` must be linear, ntk or yarn, got {self.type!r}")
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"`factor` must be 1 or more, got {self.factor}")
        if self.original_length is not None:
            check_int("original_length", self.original_length, 1)
        for name, value in self.of_yarn().items():
            if self.type != "yarn":
                raise ValueError(f"`{name}` must be left out for type {self.type!r}, got {value}")
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be more than 0, got {value}")
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if fast < slow:
            raise ValueError(f"`beta_fast` must be at least `beta_slow` = {slow}, got {fast}")

    def of_yarn(self) -> dict[str, float]:
        """The settings that "yarn" alone has, where given."""
        values = {name: getattr(self, name) for name in ("beta_fast", "beta_slow", "attention_factor")}
        return {name: value for name, value in values.items() if value is not None}


def scale_rope(model: nn.Module, settings: RopeSettings | Mapping[str, Any]) -> Stretch:
    """Stretches the rotary positions of a model, in place and reversibly.

    The model is then what transformers builds from a config with the same rope parameters, and its config says so when
    saved; `max_position_embeddings` grows to the new length. A model that was stretched in the same way before is
    stretched further: factors multiply. Layers with a sliding window that have positions of their own keep them.

    Args:
        model: a transformers model, or a module that holds one.
        settings: RopeSettings, or a mapping with their names, {"type": "yarn", "factor": 4.0}.

    Returns:
        what undoes it when called, bit for bit; a second call does nothing. Several stretchings are undone last one
        first: `check()` raises what the call would.

    Raises:
        ValueError: settings that are none, a model without RoPE, or one whose RoPE is of a type that cannot be
            stretched so. The model is then as it was.
        TypeError: `model` is no module, or a setting has the wrong type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got a {type(model).__name__}")
    if not isinstance(settings, RopeSettings):
        settings = build_config(RopeSettings, dict(settings), "rope")
    rotary = rotary_modules(model)
    if not rotary:
        raise ValueError(
            f"`model` must have rotary positions (RoPE) in the manner of transformers, got a {type(model).__name__}"
        )
    configs = _configs(model, rotary)
    # All is worked out, and can be refused, before anything is changed.
    planned = [(config, _planned(config, settings)) for config in configs]
    changes = Stretch()
    try:
        for config, values in planned:
            for name, value in values.items():
                changes.set(config, name, value)
        for module in rotary:
            _rebuild(module, changes)
    except BaseException:
        changes()
        raise
    return changes


def rotary_modules(model: nn.Module) -> list[nn.Module]:
    """Modules that compute a transformers model's rotary positions of text from its config.

    In a model of images and text those of the vision tower are none of them.
    """
    text = _text_config(model)
    return [
        module
        for module in model.modules()
        if any(name.endswith("inv_freq") for name in module._buffers)
        # A model may give a module a copy of its config.
        and type(getattr(module, "config", None)) is type(text)
        and isinstance(getattr(module.config, "rope_parameters", None), dict)
    ]


def _text_config(model: nn.Module) -> Any:
    """The config of the outermost transformers model, or of its text decoder; None where there is none."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "get_text_config"):
            return config.get_text_config(decoder=True)
    return None


class Stretch:
    """Attributes and buffers that were set, and what they were; a call puts everything back."""

    def __init__(self) -> None:
        self._back = ExitStack()
        self._stretched: list[tuple[Any, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute."""
        if name == "rope_parameters":
            self._stretched.append((owner, value))
        self._back.callback(restoring(owner, name))
        setattr(owner, name, value)

    def set_buffer(self, module: nn.Module, name: str, value: Tensor) -> None:
        """Sets a buffer that is there."""
        before = module._buffers[name]
        assert before is not None
        self._back.callback(_put_back, module, name, before)
        module._buffers[name] = value.to(before.device, before.dtype)

    def check(self) -> None:
        """Raises what a call would.

        Raises:
            ValueError: the model was stretched again since, which must be undone first.
        """
        if any(owner.__dict__.get("rope_parameters") is not now for owner, now in self._stretched):
            raise ValueError("`rope_parameters` of the model were changed since: undo that first")

    def __call__(self) -> None:
        self.check()
        self._stretched.clear()
        self._back.close()


def _put_back(module: nn.Module, name: str, before: Tensor) -> None:
    current = module._buffers[name]
    # The model may have moved to another device in the meantime.
    module._buffers[name] = before if current is None else before.to(current.device)


def _configs(model: nn.Module, rotary: list[nn.Module]) -> list[Any]:
    """The configs that the modules read, and the model's own where that is another object."""
    found: list[Any] = [module.config for module in rotary]
    text = _text_config(model)
    if isinstance(getattr(text, "rope_parameters", None), dict):
        found.append(text)
    return list({id(config): config for config in found}.values())


def _planned(config: Any, settings: RopeSettings) -> dict[str, Any]:
    """The attributes of a config that are changed, with their new values."""
    before: dict[str, Any] = config.rope_parameters
    after = copy.deepcopy(before)
    layers = {name: value for name, value in after.items() if isinstance(value, dict)}
    if layers:
        wide = {name: value for name, value in layers.items() if name not in _WINDOWED}
        if not wide:
            raise ValueError(f"`model` must have layers without a window to stretch, got {', '.join(layers)}")
        lengths = [_stretch(value, config, settings) for value in wide.values()]
    else:
        lengths = [_stretch(after, config, settings)]
    longest = max(_length(config), *lengths)
    changed = {"rope_parameters": after, "max_position_embeddings": longest}
    if settings.type == "yarn" and hasattr(config, "original_max_position_embeddings"):
        # Where a config has this one, transformers puts it before the one in the parameters.
        stretched = after if not layers else wide.popitem()[1]
        changed["original_max_position_embeddings"] = int(stretched["original_max_position_embeddings"])
    return changed


def _length(config: Any) -> int:
    found = getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int):
        raise ValueError(f"`model` must have max_position_embeddings in its config, got {found!r}")
    return found


def _stretch(parameters: dict[str, Any], config: Any, settings: RopeSettings) -> int:
    """Changes rope parameters of transformers; returns the length they are then good for."""
    kind, factor = parameters.get("rope_type", "default"), float(settings.factor)
    length = settings.original_length or _length(config)
    if settings.type == "ntk":
        _check_kind(kind, _BASED, settings)
        # The slowest of dim / 2 frequencies is base ** -((dim - 2) / dim).
        dim = _rotary_dim(parameters, config)
        if dim <= 2:
            raise ValueError(f"`type` must be other than 'ntk' for one frequency, got {dim} rotary dimensions")
        parameters["rope_theta"] = parameters["rope_theta"] * factor ** (dim / (dim - 2))
        return math.ceil(length * factor)
    _check_kind(kind, ("default", settings.type), settings)
    stretched = float(parameters.get("factor") or 1.0) if kind == settings.type else 1.0
    parameters.update(rope_type=settings.type, factor=stretched * factor)
    if settings.type == "linear":
        return math.ceil(length * factor)
    known = parameters.get("original_max_position_embeddings") if kind == "yarn" else None
    original = settings.original_length or known or _length(config)
    parameters["original_max_position_embeddings"] = int(original)
    # One that was set for a smaller factor would not fit the new one.
    parameters.pop("attention_factor", None)
    parameters.update(settings.of_yarn())
    return math.ceil(original * stretched * factor)


def _check_kind(kind: str, known: tuple[str, ...], settings: RopeSettings) -> None:
    if kind not in known:
        other = "; type 'ntk' stretches it" if kind in _BASED else ""
        raise ValueError(
            f"`type` {settings.type!r} needs a model whose RoPE is of type {' or '.join(dict.fromkeys(known))}, "
            f"got {kind!r}{other}"
        )


def _rotary_dim(parameters: dict[str, Any], config: Any) -> int:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head_dim * parameters.get("partial_rotary_factor", 1.0))


def _rebuild(module: Any, changes: Stretch) -> None:
    """Has a rotary module hold what a new one of the same config does."""
    # The device of a new module is torch's default one, where models are often made without memory.
    with torch.device("cpu"):
        fresh = type(module)(config=module.config)
    for name, buffer in fresh._buffers.items():
        if name not in module._buffers:
            raise ValueError(f"`model` must have rotary modules as transformers makes them, got one without {name}")
        changes.set_buffer(module, name, buffer)
    skipped = {*nn.Module().__dict__, "config"}
    for name, value in fresh.__dict__.items():
        if name not in skipped:
            changes.set(module, name, value)
