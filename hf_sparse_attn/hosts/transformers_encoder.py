"""Attention of transformers encoders: which modules are bidirectional self-attention, and what their tokens are."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedConfig

from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.hosts.transformers_hook import code_names, is_text_attention
from hf_sparse_attn.patching import Patch

# Arguments by which a forward takes the tokens that are keys, where these are not the queries'.
_OTHERS = frozenset(
    {"key_value_states", "encoder_hidden_states", "cross_attention_states", "context", "context_hidden_states"}
)
_CROSS = re.compile(r"cross|encoder_attn|enc_?dec_?att", re.IGNORECASE)
_BIAS = re.compile(r"position_bias|rel(ative)?_pos.*|relative_(key|bias|attention).*|distance_embedding")
# Single tokens that stand before the patches of an image, by the names of their parameters.
_BEFORE = frozenset({"cls_token", "class_embedding", "class_token", "distillation_token", "register_tokens"})
_CHANNELS = 2


@dataclass(eq=False)
class Hints:
    """What is known of the calls of a stack of attention layers besides their arguments; hooks keep it up to date.

    Args:
        before: tokens before the patches of an image.
        grid: (batch, frames, height, width) of the patches of the current forward, or None.
    """

    before: int = 0
    grid: tuple[int, ...] | None = None

    def layout(self, batch: int, tokens: int) -> TokenLayout:
        """The tokens of a row: a video where they are as many as its patches and what stands before, else text."""
        if self.grid is not None and self.grid[0] == batch:
            frames, height, width = self.grid[1:]
            if frames * height * width + self.before == tokens:
                return TokenLayout.video(frames, height, width, text_before=self.before)
        return TokenLayout.bidirectional(tokens)


@dataclass(eq=False)
class Source:
    """Whether the keys of a module's current call are of another sequence than its queries."""

    other: bool = False


def is_encoder_attention(module: nn.Module, name: str = "") -> bool:
    """Whether a module is self-attention, through the attention interface, of tokens that may see both ways.

    Args:
        module: any module.
        name: where it stands in the model; attention to another sequence is told by it where its class does both.
    """
    if not isinstance(getattr(module, "config", None), PreTrainedConfig):
        return False
    if "ALL_ATTENTION_FUNCTIONS" not in code_names(type(module)):
        return False
    if getattr(module, "is_causal", False) is not False or getattr(module, "is_cross_attention", False):
        return False
    # BERT's attention stands one level deeper than the name that tells.
    above, _, own = name.rpartition(".")
    if any(_CROSS.search(part) for part in (own, above.rpartition(".")[2])) or "Cross" in type(module).__name__:
        return False
    takes = _parameters(type(module))
    # Towers that are told where their segments end see only within these, which no layout here says.
    return bool(takes) and takes[0].startswith("hidden_state") and "cu_seqlens" not in takes


def is_any_attention(module: nn.Module, name: str) -> bool:
    """Whether a module is self-attention through the attention interface, of either kind: causal or both ways."""
    return is_text_attention(module) or is_encoder_attention(module, name)


def other_tokens(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments by which a module's forward can be given the keys of another sequence."""
    return tuple(name for name in _parameters(type(module)) if name in _OTHERS)


def has_bias(module: nn.Module) -> bool:
    """Whether a module's forward adds a position bias to the logits of its attention."""
    kind = type(module)
    return any(_BIAS.fullmatch(name) for name in (*code_names(kind, "co_varnames"), *code_names(kind)))


def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a class's forward, self left out."""
    return _read_parameters(kind)  # type: ignore[arg-type]  # mypy takes the classes of modules for unhashable


@lru_cache(maxsize=512)
def _read_parameters(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(inspect.unwrap(kind.forward)).parameters)[1:]


def watch_source(patch: Patch, module: nn.Module) -> Source:
    """What tells where the keys of a module's calls come from; a hook of the patch keeps it."""
    source, names = Source(), _parameters(type(module))
    others = other_tokens(module)

    def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        source.other = any(given.get(name) is not None for name in others)

    patch.hook(module, "register_forward_pre_hook", look, with_kwargs=True)
    return source


def patch_embedding(owner: nn.Module) -> nn.Module | None:
    """The convolution that cuts a model's images into patches, in raster order; None where that is not certain."""
    found = [
        (name.split(".")[:-1], module)
        for name, module in owner.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Conv3d))
        and module.kernel_size == module.stride
        and math.prod(module.stride) > 1
    ]
    if len(found) != 1:
        return None
    parts, convolution = found[0]
    above = [owner.get_submodule(".".join(parts[:end])) for end in range(len(parts), -1, -1)]
    # A model that hides patches at random may shuffle the others.
    if any(hasattr(module, "random_masking") for module in above):
        return None
    return convolution if {"flatten", "transpose"} <= set(code_names(type(above[0]))) else None


def image_model(owner: Any, models: Iterable[Any]) -> Any:
    """The innermost of some models that cuts images into patches for the attention in `owner`, or None."""
    # One configuration is one tower: in models of images and text the text has its own.
    above = [m for m in models if m.config is owner.config and any(part is owner for part in m.modules())]
    return next((m for m in (owner, *reversed(above)) if patch_embedding(m) is not None), None)


def watch_grid(patch: Patch, owner: nn.Module) -> Hints:
    """What tells the layout of the images of a model that cuts them itself; a hook of the patch keeps it.

    Raises:
        ValueError: the model has no patch_embedding().
    """
    convolution = patch_embedding(owner)
    if convolution is None:
        raise ValueError(f"`owner` must cut images into patches, got {type(owner).__name__}")
    before = [p for name, p in owner.named_parameters() if name.rpartition(".")[2] in _BEFORE]
    hints = Hints(sum(1 if p.ndim == 1 else p.shape[-2] for p in before))

    def look(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        batch, sizes = output.shape[0], tuple(output.shape[_CHANNELS:])
        hints.grid = (batch, *(1,) * (3 - len(sizes)), *sizes)

    patch.hook(convolution, "register_forward_hook", look)
    return hints


def reads_causally(owner: nn.Module) -> bool:
    """Whether a model makes a causal mask for attention that itself is not: CLIP's text, for one."""
    return "create_causal_mask" in code_names(type(owner))
