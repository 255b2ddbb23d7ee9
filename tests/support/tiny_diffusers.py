"""Tiny random instances of the transformer classes of diffusers, their inputs, and what their tokens are."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tests.support.tiny_diffusers_rules import (
    CHANNELS,
    FRAMES,
    HEIGHT,
    INPUTS,
    POOLED,
    SIZES,
    TEXT,
    WIDE,
    WIDTH,
    Tiny,
)
from tests.support.tiny_diffusers_table import TABLE

# One class of each way to attention.
TWO = ("LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel")
# Those that the tests of the family run: of known order, and some of no known one.
CLASSES = (
    *(name for name, tiny in TABLE.items() if tiny.grid is not None),
    "AuraFlowTransformer2DModel",
    "BriaTransformer2DModel",
    "CogView3PlusTransformer2DModel",
    "CogView4Transformer2DModel",
    "DiTTransformer2DModel",
    "LatteTransformer3DModel",
    "LongCatImageTransformer2DModel",
    "Lumina2Transformer2DModel",
    "MotifVideoTransformer3DModel",
    "OvisImageTransformer2DModel",
    "PixArtTransformer2DModel",
    "StableAudioDiTModel",
    "ZImageTransformer2DModel",
)

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


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of a class and its inputs; skips where this version of diffusers has no such class."""
    import diffusers

    kind = getattr(diffusers, name, None) or getattr(diffusers.models.transformers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    model: Any = tiny_model(kind)
    return model, tiny_inputs(kind)


def cell(name: str, given: dict[str, Any], place: tuple[int, int, int]) -> dict[str, Any]:
    """The same inputs with the latents of one cell of the grid changed."""
    tiny = TABLE[name]
    assert tiny.grid is not None
    changed = given["hidden_states"].clone()
    where: list[Any] = [slice(None)] * changed.ndim
    if len(tiny.axes) == 1:
        where[tiny.axes[0]] = (place[0] * tiny.grid[1] + place[1]) * tiny.grid[2] + place[2]
    else:
        for axis, at, size in list(zip(reversed(tiny.axes), reversed(place), reversed(tiny.patch), strict=False)):
            where[axis] = slice(at * size, (at + 1) * size)
    changed[tuple(where)] += 1.0
    return {**given, "hidden_states": changed}


def pipeline(kind: str) -> tuple[Any, Callable[[], Tensor]]:
    """A pipeline ("ltx", "cogvideox" or "flux") that runs from embeddings, and three steps of it to pixels."""
    import diffusers

    names = {"ltx": TWO[0], "cogvideox": TWO[1], "flux": "FluxTransformer2DModel"}
    model = build(names[kind])[0]
    torch.manual_seed(0)
    none = {"text_encoder": None, "tokenizer": None}
    draw = torch.Generator().manual_seed(4)
    call: dict[str, Any] = {"num_inference_steps": 3, "output_type": "pt"}
    for prefix in ("", "negative_"):
        call[f"{prefix}prompt_embeds"] = torch.randn(1, TEXT, WIDTH, generator=draw)
        if kind == "flux":
            call[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, POOLED, generator=draw)
        if kind == "ltx":
            call[f"{prefix}prompt_attention_mask"] = torch.ones(1, TEXT)
    pipe: Any
    if kind == "flux":
        vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1)
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        more = {"text_encoder_2": None, "tokenizer_2": None}
        pipe = diffusers.FluxPipeline(scheduler=scheduler, vae=vae.eval(), transformer=model, **none, **more)
        call.update(true_cfg_scale=2.0, height=14, width=18)
    elif kind == "ltx":
        vae = diffusers.AutoencoderKLLTXVideo(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            decoder_block_out_channels=(8,) * 4,
            layers_per_block=(1,) * 5,
            decoder_layers_per_block=(1,) * 5,
            spatio_temporal_scaling=(True, True, False, False),
            decoder_spatio_temporal_scaling=(True, True, False, False),
            patch_size=1,
        )
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        pipe = diffusers.LTXPipeline(scheduler=scheduler, vae=vae.eval(), transformer=model, **none)
        call.update(guidance_scale=3.0, height=32, width=32, num_frames=9)
    else:
        vae = diffusers.AutoencoderKLCogVideoX(
            latent_channels=4,
            block_out_channels=(8,) * 4,
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            layers_per_block=1,
            norm_num_groups=2,
        )
        pipe = diffusers.CogVideoXPipeline(
            scheduler=diffusers.CogVideoXDDIMScheduler(), vae=vae.eval(), transformer=model, **none
        )
        call.update(guidance_scale=3.0, height=80, width=112, num_frames=9)
    pipe.set_progress_bar_config(disable=True)
    return pipe, lambda: pipe(**call, generator=torch.Generator().manual_seed(0))[0]
