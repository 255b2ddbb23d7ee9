"""Tiny instances of the transformer classes of diffusers, with inputs and with what is known of their tokens."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.coverage import tiny_diffusers as coverage_diffusers_tiny

# One class of each way to attention.
TWO = ("LTXVideoTransformer3DModel", "CogVideoXTransformer3DModel")
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_layers": 2}


@dataclass(frozen=True)
class Tiny:
    """How a class is built and run.

    Args:
        sizes: its configuration; None means that of the package's own trial.
        inputs: draws its keyword inputs; None means those of the package's own trial.
        grid: (frames, height, width) in tokens, or None where the order is not known.
        before, after: text tokens of a sequence.
        axes: dimensions of `hidden_states` that are frames, height and width; one dimension where tokens come ready
            made.
        patch: latents of a token in each direction.
        latents: name of the input that holds the latents.
    """

    sizes: dict[str, Any] | None
    inputs: Callable[[Callable[..., Tensor]], dict[str, Any]] | None
    grid: tuple[int, int, int] | None = None
    before: int = 0
    after: int = 0
    axes: tuple[int, ...] = (2, 3, 4)
    patch: tuple[int, int, int] = (1, 2, 2)
    latents: str = "hidden_states"


def image_ids(height: int, width: int) -> Tensor:
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()


def _time(value: float = 500.0) -> Tensor:
    return torch.tensor([value])


def _wan(random: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": random(16, 3, 10, 14),
        "timestep": _time(),
        "encoder_hidden_states": random(9, 16),
    }


def _flux(random: Callable[..., Tensor]) -> dict[str, Any]:
    return {
        "hidden_states": random(63, 4),
        "timestep": _time(0.5),
        "encoder_hidden_states": random(6, 16),
        "pooled_projections": random(8),
        "img_ids": image_ids(7, 9),
        "txt_ids": torch.zeros(6, 3),
    }


def _without(inputs: Callable[..., dict[str, Any]], *names: str) -> Callable[..., dict[str, Any]]:
    return lambda random: {k: v for k, v in inputs(random).items() if k not in names}


_WAN = {**HEADS, "attention_head_dim": 12, "ffn_dim": 40, "text_dim": 16, "rope_max_seq_len": 32}
_FLUX = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 12,
    "num_attention_heads": 2,
    "joint_attention_dim": 16,
    "axes_dims_rope": (4, 4, 4),
}

CLASSES: dict[str, Tiny] = {
    "LTXVideoTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 16,
        },
        lambda random: {
            "hidden_states": random(105, 4),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "encoder_attention_mask": torch.ones(1, 9),
            "num_frames": 3,
            "height": 5,
            "width": 7,
        },
        grid=(3, 5, 7),
        axes=(1,),
    ),
    "LTX2VideoTransformer3DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "cross_attention_dim": 24,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 6,
            "audio_cross_attention_dim": 12,
            "caption_channels": 16,
        },
        lambda random: {
            "hidden_states": random(105, 4),
            "audio_hidden_states": random(20, 4),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "audio_encoder_hidden_states": random(9, 16),
            "encoder_attention_mask": torch.ones(1, 9),
            "audio_encoder_attention_mask": torch.ones(1, 9),
            "num_frames": 3,
            "height": 5,
            "width": 7,
            "fps": 25.0,
            "audio_num_frames": 20,
        },
        grid=(3, 5, 7),
        axes=(1,),
    ),
    "SkyReelsV2Transformer3DModel": Tiny(_WAN, _wan, grid=(3, 5, 7)),
    "ChronoEditTransformer3DModel": Tiny(_WAN, _wan, grid=(3, 5, 7)),
    "CosmosTransformer3DModel": Tiny(
        {
            **HEADS,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_embed_dim": 16,
            "adaln_lora_dim": 4,
            "max_size": (4, 32, 32),
            "extra_pos_embed_type": None,
            "concat_padding_mask": False,
        },
        lambda random: {
            "hidden_states": random(4, 3, 10, 14),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "attention_mask": torch.ones(1, 9).bool(),
            "fps": 30,
        },
        grid=(3, 5, 7),
    ),
    "Kandinsky5Transformer3DModel": Tiny(
        {
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "time_dim": 16,
            "model_dim": 24,
            "ff_dim": 40,
            "num_text_blocks": 1,
            "num_visual_blocks": 2,
            "axes_dims": (4, 4, 4),
        },
        lambda random: {
            "hidden_states": random(3, 10, 14, 4),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "pooled_projections": random(8),
            "visual_rope_pos": (torch.arange(3), torch.arange(5), torch.arange(7)),
            "text_rope_pos": torch.arange(9),
        },
        grid=(3, 5, 7),
        axes=(1, 2, 3),
    ),
    "CogVideoXTransformer3DModel": Tiny(
        {
            **HEADS,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "sample_width": 14,
            "sample_height": 10,
            "sample_frames": 9,
            "max_text_seq_length": 9,
        },
        lambda random: {
            "hidden_states": random(3, 4, 10, 14),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
        },
        grid=(3, 5, 7),
        before=9,
        axes=(1, 3, 4),
    ),
    "MochiTransformer3DModel": Tiny(
        {
            **HEADS,
            "attention_head_dim": 12,
            "pooled_projection_dim": 8,
            "in_channels": 4,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "max_sequence_length": 9,
        },
        lambda random: {
            "hidden_states": random(4, 3, 10, 14),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "encoder_attention_mask": torch.arange(9)[None] < 6,
        },
        grid=(3, 5, 7),
        after=6,
    ),
    "AllegroTransformer3DModel": Tiny(
        {
            **HEADS,
            "attention_head_dim": 24,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 48,
            "sample_width": 14,
            "sample_height": 10,
            "sample_frames": 3,
            "caption_channels": 16,
        },
        lambda random: {
            "hidden_states": random(4, 3, 10, 14),
            "timestep": _time(),
            "encoder_hidden_states": random(1, 9, 16)[0],
            "encoder_attention_mask": torch.ones(1, 9),
            "attention_mask": torch.ones(1, 3, 10, 14),
            "image_rotary_emb": _allegro_rotary(),
        },
        grid=(3, 5, 7),
    ),
    "FluxTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 8}, _flux, grid=(1, 7, 9), before=6, axes=(1,)
    ),
    "ChromaTransformer2DModel": Tiny(
        {
            **_FLUX,
            "approximator_num_channels": 8,
            "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        _without(_flux, "pooled_projections"),
        grid=(1, 7, 9),
        before=6,
        axes=(1,),
    ),
    "QwenImageTransformer2DModel": Tiny(
        {k: v for k, v in {**_FLUX, "out_channels": 1}.items() if k != "num_single_layers"},
        lambda random: {
            "hidden_states": random(63, 4),
            "timestep": _time(0.5),
            "encoder_hidden_states": random(9, 16),
            "encoder_hidden_states_mask": torch.ones(1, 9).long(),
            "img_shapes": [[(1, 7, 9)]],
        },
        grid=(1, 7, 9),
        before=9,
        axes=(1,),
    ),
    "HunyuanImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (6, 6),
        },
        lambda random: {
            "hidden_states": random(4, 7, 9),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "encoder_attention_mask": (torch.arange(9)[None] < 6).long(),
        },
        grid=(1, 7, 9),
        after=6,
        axes=(2, 3),
        patch=(1, 1, 1),
    ),
    "SD3Transformer2DModel": Tiny(
        {
            **HEADS,
            "sample_size": 18,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "joint_attention_dim": 16,
            "caption_projection_dim": 24,
            "pooled_projection_dim": 8,
            "pos_embed_max_size": 16,
        },
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "pooled_projections": random(8),
        },
        grid=(1, 7, 9),
        after=9,
        axes=(2, 3),
    ),
    "AuraFlowTransformer2DModel": Tiny(
        {
            "sample_size": 18,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 12,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 24,
            "pos_embed_max_size": 256,
        },
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(0.5),
            "encoder_hidden_states": random(9, 16),
        },
    ),
    "PixArtTransformer2DModel": Tiny(
        {**HEADS, "attention_head_dim": 12, "cross_attention_dim": 24, "sample_size": 16, "caption_channels": 16},
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        },
    ),
    "DiTTransformer2DModel": Tiny(
        {**HEADS, "attention_head_dim": 12, "sample_size": 16, "num_embeds_ada_norm": 1000},
        lambda random: {"hidden_states": random(4, 16, 16), "timestep": _time(), "class_labels": torch.tensor([3])},
    ),
    "OvisImageTransformer2DModel": Tiny(_FLUX, _without(_flux, "pooled_projections")),
    "LongCatImageTransformer2DModel": Tiny(
        {**_FLUX, "pooled_projection_dim": 16}, _without(_flux, "pooled_projections")
    ),
    "BriaTransformer2DModel": Tiny({**_FLUX, "axes_dims_rope": [4, 4, 4]}, _flux),
    "MotifVideoTransformer3DModel": Tiny(
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_single_layers": 1,
            "text_embed_dim": 16,
            "rope_axes_dim": (4, 4, 4),
        },
        lambda random: {
            "hidden_states": random(4, 3, 10, 14),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
        },
    ),
    "CogView4Transformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 16,
            "sample_size": 16,
            "rope_axes_dim": (8, 8),
        },
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "original_size": torch.tensor([[14, 18]]),
            "target_size": torch.tensor([[14, 18]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
    ),
    "CogView3PlusTransformer2DModel": Tiny(
        {
            **HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "text_embed_dim": 16,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "pos_embed_max_size": 16,
            "sample_size": 16,
        },
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
            "original_size": torch.tensor([[14, 18]]),
            "target_size": torch.tensor([[14, 18]]),
            "crop_coords": torch.tensor([[0, 0]]),
        },
    ),
    "Lumina2Transformer2DModel": Tiny(
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 8,
            "axes_dim_rope": (4, 4, 4),
            "axes_lens": (300, 32, 32),
            "cap_feat_dim": 16,
        },
        lambda random: {
            "hidden_states": random(4, 14, 18),
            "timestep": _time(0.5),
            "encoder_hidden_states": random(9, 16),
            "encoder_attention_mask": torch.ones(1, 9).bool(),
        },
    ),
    "ZImageTransformer2DModel": Tiny(
        {
            "in_channels": 4,
            "dim": 24,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 16,
            "axes_dims": [4, 4, 4],
            "axes_lens": [256, 32, 32],
        },
        lambda random: {"x": [random(4, 1, 14, 18)[0]], "t": _time(0.5), "cap_feats": [random(9, 16)[0]]},
    ),
    "StableAudioDiTModel": Tiny(
        {
            **HEADS,
            "sample_size": 64,
            "in_channels": 4,
            "out_channels": 4,
            "attention_head_dim": 12,
            "num_key_value_attention_heads": 1,
            "cross_attention_dim": 12,
            "time_proj_dim": 8,
            "global_states_input_dim": 8,
            "cross_attention_input_dim": 16,
        },
        lambda random: {
            "hidden_states": random(4, 63),
            "timestep": _time(0.5),
            "encoder_hidden_states": random(9, 16),
            "global_hidden_states": random(1, 8),
            "rotary_embedding": (torch.randn(64, 6).cos(), torch.randn(64, 6).sin()),
        },
    ),
    "WanAnimateTransformer3DModel": Tiny(None, None, grid=(4, 5, 7)),
    "LatteTransformer3DModel": Tiny(
        {
            **HEADS,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "cross_attention_dim": 24,
            "sample_size": 16,
            "patch_size": 2,
            "attention_bias": True,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "caption_channels": 16,
            "video_length": 3,
        },
        lambda random: {
            "hidden_states": random(4, 3, 16, 16),
            "timestep": _time(),
            "encoder_hidden_states": random(9, 16),
        },
    ),
}  # fmt: skip


def _allegro_rotary() -> tuple[Any, Any]:
    frames, height, width = torch.meshgrid(*(torch.arange(n) for n in (3, 5, 7)), indexing="ij")
    tables = [torch.outer(torch.arange(n).float(), torch.rand(4)).repeat(1, 2) for n in (3, 5, 7)]
    freqs = tuple((t.cos(), t.sin()) for t in tables)
    grid = tuple(axis.reshape(1, -1) for axis in (frames, height, width))
    return freqs, grid


def build(name: str) -> tuple[Any, dict[str, Any]]:
    """A model of a class and its inputs; skips where this version of diffusers has no such class."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    model: Any = coverage_diffusers_tiny.tiny_model(kind, CLASSES[name].sizes)
    return model, inputs(name)


def inputs(name: str) -> dict[str, Any]:
    """The keyword inputs of a class."""
    import diffusers

    draw, own = torch.Generator().manual_seed(1), CLASSES[name].inputs
    if own is None:
        return coverage_diffusers_tiny.tiny_inputs(getattr(diffusers, name))
    given = own(lambda *shape: torch.randn(1, *shape, generator=draw))
    if "txt_seq_lens" in inspect.signature(getattr(diffusers, name).forward).parameters:
        given["txt_seq_lens"] = [given["encoder_hidden_states"].shape[1]]
    return given


def cell(name: str, given: dict[str, Any], place: tuple[int, int, int]) -> dict[str, Any]:
    """The same inputs with the latents of one cell of the grid changed."""
    tiny = CLASSES[name]
    assert tiny.grid is not None
    changed = given[tiny.latents].clone()
    where: list[Any] = [slice(None)] * changed.ndim
    if len(tiny.axes) == 1:
        where[tiny.axes[0]] = (place[0] * tiny.grid[1] + place[1]) * tiny.grid[2] + place[2]
    else:
        for axis, at, size in list(zip(reversed(tiny.axes), reversed(place), reversed(tiny.patch), strict=False)):
            where[axis] = slice(at * size, (at + 1) * size)
    changed[tuple(where)] += 1.0
    return {**given, tiny.latents: changed}


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
        call[f"{prefix}prompt_embeds"] = torch.randn(1, 6 if kind == "flux" else 9, 16, generator=draw)
        if kind == "flux":
            call[f"{prefix}pooled_prompt_embeds"] = torch.randn(1, 8, generator=draw)
        if kind == "ltx":
            call[f"{prefix}prompt_attention_mask"] = torch.ones(1, 9)
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
