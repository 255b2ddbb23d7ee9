"""What the pipeline classes of diffusers need to be built small and run, besides rules by name."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.support.tiny_diffusers_rules import POOLED, TEXT, WIDTH

# Pixels and frames of what is made, and its number of steps.
HEIGHT, WIDE, FRAMES, STEPS = 64, 96, 9, 4

# Channels of latents.
LATENTS = 4
# Leaves an argument out.
OMIT: Any = object()


@dataclass(frozen=True)
class Pipe:
    """What a class needs besides the rules.

    Args:
        parts: components by name, or functions that make them.
        sizes: arguments of the constructors of components, by name.
        call: arguments of its call, or functions that make them. A tuple of whole numbers is the shape of a random
            tensor.
        prepare: is handed the pipeline once it is built, and may replace what encodes prompts and images.
        stepless: whether it steps without a scheduler, with one forward for each step.
        aside: whether a forward of these keyword arguments is none of the denoising, as one that fills a cache.
    """

    parts: Mapping[str, Any] = field(default_factory=dict)
    sizes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    call: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[Any], None] = lambda pipe: None
    stepless: bool = False
    aside: Callable[[Mapping[str, Any]], bool] = lambda given: False


def image(width: int = WIDE, height: int = HEIGHT, shade: int = 90) -> Any:
    return Image.new("RGB", (width, height), (shade, 90, 200 - shade))


def video(width: int = WIDE, height: int = HEIGHT, frames: int = FRAMES) -> list[Any]:
    return [image(width, height, 20 * i) for i in range(frames)]


def text(*shape: int) -> Tensor:
    """Random numbers that stand for an encoded prompt of one sample."""
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(2))


class Harmless:
    """A safety checker that finds nothing."""

    def to(self, *_: object) -> Harmless:
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _levels(count: int) -> dict[str, Any]:
    """Sizes of an AutoencoderKL that halves height and width one time fewer than it has levels."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * count,
        "up_block_types": ("UpDecoderBlock2D",) * count,
        "block_out_channels": (4,) * count,
    }


_MEAN = {"latents_mean": [0.0] * LATENTS, "latents_std": [1.0] * LATENTS}
VAES: dict[str, dict[str, Any]] = {
    "AutoencoderKL": {
        **_levels(4),
        "latent_channels": LATENTS,
        "norm_num_groups": 1,
        "shift_factor": 0.1,
    },
    "AutoencoderKLWan": {
        "base_dim": 3,
        "z_dim": LATENTS,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        **_MEAN,
        "temperal_downsample": [False, True, True],
    },
    "AutoencoderKLQwenImage": {
        "base_dim": 3,
        "z_dim": LATENTS,
        "dim_mult": [1, 1, 1, 1],
        "num_res_blocks": 1,
        **_MEAN,
        "temperal_downsample": [False, True, True],
    },
    "AutoencoderKLCogVideoX": {
        "latent_channels": LATENTS,
        "block_out_channels": (8,) * 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4,
        "up_block_types": ("CogVideoXUpBlock3D",) * 4,
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLAllegro": {
        "latent_channels": LATENTS,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": LATENTS,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4,
        "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
        "block_out_channels": (8, 8, 8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": LATENTS,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": LATENTS,
        "block_out_channels": (32, 32, 32),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "sample_size": 32,
        "scaling_factor": 1.0,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": LATENTS,
        "block_out_channels": (8, 8, 8),
        "layers_per_block": 1,
        "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 2,
        "downsample_match_channel": False,
        "upsample_match_channel": False,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": LATENTS,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 4,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5,
        "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
        "patch_size": 1,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": LATENTS,
        "block_out_channels": [8, 8, 8, 8],
        "layers_per_block": 1,
        "norm_num_groups": 2,
    },
    "AutoencoderKLMochi": {
        "latent_channels": LATENTS,
        **{k: tuple(v) for k, v in _MEAN.items()},
        "encoder_block_out_channels": (32, 32, 32, 32),
        "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
    },
    "AutoencoderKLFlux2": {
        "block_out_channels": (4, 4, 4, 4),
        "latent_channels": LATENTS,
        "norm_num_groups": 1,
        "layers_per_block": 1,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": LATENTS,
        "encoder_block_out_channels": (8, 8, 8, 8),
        "decode_block_out_channels": (8, 8, 8, 8),
        "num_layers": 1,
        "latents_mean": None,
        "latents_std": None,
        "attention_resolutions": (8,),
        "resolution": 64,
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": 4,
        "downsampling_ratios": [2, 2],
        "channel_multiples": [1, 1],
        "decoder_channels": 4,
        "decoder_input_channels": LATENTS,
        "audio_channels": 2,
        "sampling_rate": 64,
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": LATENTS,
        "block_out_channels": (8,) * 4,
        "decoder_block_out_channels": (8,) * 3,
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 4,
        "patch_size": 1,
        "spatial_compression_ratio": 8,
        "temporal_compression_ratio": 8,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 4,
        "ch_mult": (1,),
        "num_res_blocks": 1,
        "latent_channels": 2,
        "mel_bins": 8,
    },
    "LTX2TextConnectors": {
        "caption_channels": WIDTH,
        "text_proj_in_factor": 1,
        "video_connector_num_attention_heads": 2,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1,
        "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 2,
        "audio_connector_attention_head_dim": 8,
        "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "rope_type": "split",
    },
    "AutoencoderSAME": {
        "patch_size": 4,
        "encoder_channels": 8,
        "encoder_c_mults": (2,),
        "encoder_strides": (2,),
        "encoder_transformer_depths": (1,),
        "latent_dim": LATENTS,
        "dim_heads": 8,
        "sampling_rate": 64,
    },
    "StableAudio3DurationEmbedder": {"output_dim": WIDTH, "fourier_dim": 8},
    "StableAudioProjectionModel": {
        "text_encoder_dim": WIDTH,
        "conditioning_dim": WIDTH,
        "min_value": 0,
        "max_value": 10,
    },
    "LongCatAudioDiTVae": {
        "channels": 8,
        "c_mults": [1, 1],
        "strides": [2, 2],
        "latent_dim": LATENTS,
        "encoder_latent_dim": 2 * LATENTS,
        "downsampling_ratio": 4,
        "sample_rate": 64,
    },
    "AceStepConditionEncoder": {
        "hidden_size": 48,
        "intermediate_size": 40,
        "text_hidden_dim": WIDTH,
        "timbre_hidden_dim": LATENTS,
        "num_lyric_encoder_hidden_layers": 1,
        "num_timbre_encoder_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 24,
        "sliding_window": 8,
    },
    "VQModel": {
        "block_out_channels": (4,),
        "norm_num_groups": 1,
        "latent_channels": LATENTS,
        "num_vq_embeddings": 16,
        "vq_embed_dim": LATENTS,
    },
}

# Those that take latents in packs of two by two.
_PACKED = {"in_channels": 4 * LATENTS, "out_channels": OMIT}
TRANSFORMERS: dict[str, dict[str, Any]] = {
    "FluxTransformer2DModel": _PACKED,
    "ChromaTransformer2DModel": _PACKED,
    "BriaTransformer2DModel": _PACKED,
    "LongCatImageTransformer2DModel": _PACKED,
    "QwenImageTransformer2DModel": {"in_channels": 4 * LATENTS, "out_channels": LATENTS},
    "Flux2Transformer2DModel": _PACKED,
    "OvisImageTransformer2DModel": {"in_channels": 4 * LATENTS, "out_channels": 4 * LATENTS},
    "HiDreamImageTransformer2DModel": {"max_resolution": (16, 16)},
    "MotifVideoTransformer3DModel": {"in_channels": 2 * LATENTS + 1, "out_channels": LATENTS},
    "LatteTransformer3DModel": {"video_length": 3},
}

# By patterns of names of pipelines: what is published with them, where their annotation does not say it.
SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "AllegroPipeline": ("EulerAncestralDiscreteScheduler", {}),
    "CogVideoXFunControlPipeline": ("CogVideoXDDIMScheduler", {}),
    "DiTPipeline|LattePipeline": ("DDIMScheduler", {}),
    "PixArtSigma.*": ("DPMSolverMultistepScheduler", {}),
    "WanPipeline|Wan(Image|Video|VACE|Animate|Modular|22).*|LucyEdit.*|ChronoEdit.*": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0},
    ),
    "SkyReelsV2.*": (
        "UniPCMultistepScheduler",
        {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 8.0},
    ),
    "HeliosPyramidDistilled.*": ("HeliosDMDScheduler", {}),
    "HeliosPipeline|HeliosModular.*": ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]}),
    "VQDiffusionPipeline": ("VQDiffusionScheduler", {"num_vec_classes": 17}),
}


_ONES = torch.ones(1, TEXT).long()


class Processor:
    """A processor of text and images that is only asked for its parts."""

    image_processor = None


class Typed:
    """A text encoder that is only asked for its type of numbers."""

    dtype = torch.float32


# Prompts of two encoders, whose second has five tokens of six numbers.
_SECOND = {
    "prompt_embeds_2": (1, 5, 6),
    "negative_prompt_embeds_2": (1, 5, 6),
    "prompt_embeds_mask_2": torch.ones(1, 5).long(),
    "negative_prompt_embeds_mask_2": torch.ones(1, 5).long(),
}
_BOOL = {"prompt_attention_mask": _ONES.bool(), "negative_prompt_attention_mask": _ONES.bool()}
_LIST = {"prompt_embeds": lambda: [text(TEXT, WIDTH)[0]], "negative_prompt_embeds": lambda: [text(TEXT, WIDTH)[0]]}


def _layers(pipe: Any) -> None:
    pipe.text_encoder, pipe.check_inputs = Typed(), lambda *_, **__: None
    pipe.get_prompt_embeds = lambda *_, **__: (text(TEXT, WIDTH), [text(TEXT, WIDTH)] * 3, torch.ones(1, TEXT))


def _guided(pipe: Any) -> None:
    pipe.transformer.register_to_config(guidance_embeds=False)


_SAFE: dict[str, Any] = {"safety_checker": Harmless}
_ONE_MORE = {"transformer": {"in_channels": LATENTS + 1, "out_channels": LATENTS}}


def _unchecked(pipe: Any) -> None:
    pipe.check_inputs = lambda *_, **__: None


def _encoded(*given: Any) -> Callable[[Any], None]:
    """Gives what an encoder of prompts is replaced by."""

    def prepare(pipe: Any) -> None:
        pipe.encode_prompt = lambda *_, **__: given

    return prepare


def _ideogram(pipe: Any) -> None:
    tokens = TEXT + HEIGHT // 16 * (WIDE // 16)
    where = torch.arange(tokens)[None]
    indicator = torch.tensor([3] * TEXT + [2] * (tokens - TEXT))[None]
    pipe.encode_prompt = lambda **_: (
        text(tokens, WIDTH), where[..., None].expand(1, tokens, 3), torch.zeros_like(where), indicator,
    )  # fmt: skip


_FIBO = {"prompt": "a cat", "negative_prompt": "a dog"}
_KANDINSKY = {
    "prompt_embeds_qwen": (1, TEXT, WIDTH),
    "prompt_embeds_clip": (1, POOLED),
    "prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
    "negative_prompt_embeds_qwen": (1, TEXT, WIDTH),
    "negative_prompt_embeds_clip": (1, POOLED),
    "negative_prompt_cu_seqlens": torch.tensor([0, TEXT], dtype=torch.int32),
}
_HUNYUAN_DIT = {
    "prompt_embeds_2": (1, 5, WIDTH),
    "negative_prompt_embeds_2": (1, 5, WIDTH),
    "prompt_attention_mask_2": torch.ones(1, 5).long(),
    "negative_prompt_attention_mask_2": torch.ones(1, 5).long(),
    "use_resolution_binning": False,
}
_NINE = {"transformer": {"in_channels": 2 * LATENTS + 1, "out_channels": LATENTS}}
_TWICE = {"transformer": {"in_channels": 2 * LATENTS, "out_channels": LATENTS}}
_CONTROL = {"transformer": {"in_channels": 8 * LATENTS, "out_channels": 4 * LATENTS}}
_LTX2 = {"spatio_temporal_guidance_blocks": [1], "num_frames": FRAMES}

_DEEP = {"vae": {"dim_mult": [1] * 6, "temperal_downsample": [False, True, True, False, False], "base_dim": 3}}
_CLOZE: dict[str, Any] = {
    "task_prompt": "a task",
    "content_prompt": "a cat",
    "image": lambda: [[image(), image()], [image(), None]],
    "prompt_embeds": OMIT,
    "pooled_prompt_embeds": OMIT,
}


def _cloze(pipe: Any) -> None:
    for one in (pipe.generation_pipe, pipe.upsampling_pipe):
        one.set_progress_bar_config(disable=True)
        one.encode_prompt = lambda *_, **__: (text(TEXT, WIDTH), text(POOLED), torch.zeros(TEXT, 3))


def _uncoded(pipe: Any) -> None:
    """Spares encoding and decoding, where an image is made a million pixels whatever size is asked for."""
    _unchecked(pipe)
    pipe.text_encoder = Typed()

    def encode(pixels: Tensor, *_: Any, **__: Any) -> Any:
        rows, columns = pixels.shape[-2] // 32, pixels.shape[-1] // 32
        latents = torch.zeros(len(pixels), LATENTS, 1, rows, columns)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda *_: latents, mode=lambda: latents))

    pipe.vae.encode = encode
    pipe.vae.decode = lambda latents, **_: (torch.zeros(len(latents), 3, 1, 8, 8),)


def _learned() -> Any:
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
        LearnedClassifierFreeSamplingEmbeddings,
    )

    return LearnedClassifierFreeSamplingEmbeddings(learnable=False)


def _upsampler() -> Any:
    from diffusers.pipelines.ltx2.latent_upsampler import LTX2LatentUpsamplerModel

    return LTX2LatentUpsamplerModel(
        in_channels=LATENTS, mid_channels=32, num_blocks_per_stage=1, spatial_upsample=False, temporal_upsample=True
    ).eval()


def _resizing(pipe: Any) -> None:
    """The one function of torchvision, which is not installed, that the controlnet of Cosmos asks for."""
    functional = SimpleNamespace(resize=lambda mask, size, **_: torch.nn.functional.interpolate(mask, size))
    module = sys.modules[type(pipe.controlnet).__module__]
    module.transforms = SimpleNamespace(functional=functional, InterpolationMode=SimpleNamespace(NEAREST=0))


_CONNECTED = {
    f"{sign}connector_{name}": value
    for sign in ("", "negative_")
    for name, value in (
        ("prompt_embeds", (1, TEXT, WIDTH)),
        ("audio_prompt_embeds", (1, TEXT, WIDTH)),
        ("attention_mask", _ONES),
    )
}
_QWEN = {
    f"{sign}{name}": value
    for sign in ("", "negative_")
    for name, value in (
        ("qwen_prompt_embeds", (1, TEXT, WIDTH)),
        ("qwen_attention_mask", _ONES),
        ("t5_input_ids", torch.arange(TEXT)[None]),
        ("t5_attention_mask", _ONES),
    )
}
_KREA = {"transformer": {"in_channels": 4 * LATENTS}}
_KREA_CALL = {
    "prompt_embeds": (1, TEXT, 3, WIDTH),
    "negative_prompt_embeds": (1, TEXT, 3, WIDTH),
    "prompt_embeds_mask": _ONES.bool(),
    "negative_prompt_embeds_mask": _ONES.bool(),
}
_SIXTEEN = {"in_channels": 16, "out_channels": 16}
_HELIOS = {"num_latent_frames_per_chunk": 3, "history_sizes": lambda: [4, 2, 1], "width": 128}
_PICTURE = {"image_latents": (1, LATENTS, 1, HEIGHT // 8, WIDE // 8)}


def _conditioner() -> Any:
    from diffusers.models.condition_embedders.condition_embedder_anima import AnimaTextConditioner

    sizes = {"source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH, "target_vocab_size": 32}
    return AnimaTextConditioner(**sizes, num_layers=1, num_attention_heads=2, min_sequence_length=TEXT).eval()


def _music() -> Any:
    from diffusers.models.condition_embedders.condition_embedder_minimax_music3 import MiniMaxMusic3ConditionEncoder

    return MiniMaxMusic3ConditionEncoder(condition_hidden_dim=WIDTH, num_condition_layers=2, out_dim=WIDTH).eval()


def _audio_scheduler() -> Any:
    from diffusers import MiniMaxH3Scheduler

    return MiniMaxH3Scheduler()


PIPES: dict[str, Pipe] = {
    "Cosmos2_5_TransferPipeline": Pipe(
        _SAFE,
        {"transformer": {**_ONE_MORE["transformer"], "controlnet_block_every_n": 1}},
        {"controls": video, "num_frames_per_chunk": FRAMES},
        _resizing,
    ),
    "HunyuanImagePipeline": Pipe(
        call={
            "prompt_embeds_2": (1, 5, WIDTH),
            "negative_prompt_embeds_2": (1, 5, WIDTH),
            "prompt_embeds_mask_2": torch.ones(1, 5).long(),
            "negative_prompt_embeds_mask_2": torch.ones(1, 5).long(),
        }
    ),
    "HunyuanImageRefinerPipeline": Pipe(
        sizes={
            "transformer": {
                "in_channels": 4 * LATENTS,
                "out_channels": 2 * LATENTS,
                "patch_size": (1, 1, 1),
                "rope_axes_dim": (8, 8, 8),
            }
        }
    ),
    "Kandinsky5I2IPipeline": Pipe(
        sizes={"transformer": {"visual_cond": True}},
        call=_KANDINSKY,
        prepare=lambda pipe: setattr(pipe, "resolutions", [(WIDE, HEIGHT)]),
    ),
    "LattePipeline": Pipe(sizes={"transformer": {"out_channels": 2 * LATENTS}}, call={"video_length": 3}),
    "QwenImageEditPipeline": Pipe(sizes=_DEEP, prepare=_uncoded),
    "QwenImageEditPlusPipeline": Pipe(sizes=_DEEP, prepare=_uncoded),
    "QwenImageEditInpaintPipeline": Pipe(sizes=_DEEP, prepare=_uncoded),
    "QwenImageLayeredPipeline": Pipe(sizes=_DEEP, call={"prompt": "a cat", "output_type": "pt"}, prepare=_uncoded),
    "JoyImageEditPipeline": Pipe(sizes={"vae": {**_DEEP["vae"], "scale_factor_spatial": 32}}, prepare=_uncoded),
    "JoyImageEditPlusPipeline": Pipe(
        sizes={"vae": {**_DEEP["vae"], "scale_factor_spatial": 32}},
        call={"prompt": ["a cat"], "images": lambda: [[image()]], "width": 128},
        prepare=_uncoded,
    ),
    "VisualClozePipeline": Pipe(
        {"resolution": 64},
        {"transformer": {"in_channels": 288, "out_channels": 4 * LATENTS}},
        {
            **_CLOZE,
            "upsampling_strength": 0.5,
            "upsampling_height": HEIGHT,
            "upsampling_width": WIDE,
            "output_type": "pil",
        },
        _cloze,
    ),
    "VQDiffusionPipeline": Pipe(
        {"learned_classifier_free_sampling_embeddings": _learned},
        {
            "transformer": {
                "num_vector_embeds": 17,
                "sample_size": 4,
                "in_channels": OMIT,
                "out_channels": OMIT,
                "norm_type": "ada_norm",
                "num_embeds_ada_norm": 100,
            }
        },
        {"prompt": "a cat", "output_type": "pt"},
        lambda pipe: setattr(pipe, "_encode_prompt", lambda *_, **__: text(TEXT, WIDTH).expand(2, -1, -1)),
    ),
    "LTX2DFRTemporalRefinePipeline": Pipe(
        {"temporal_latent_upsampler": _upsampler},
        {"transformer": {"use_keyframes_abs_pos_embedding": True}},
        {
            "latents": (1, LATENTS, 2, HEIGHT // 8, WIDE // 8),
            "keyframes_latents": (1, LATENTS, 1, HEIGHT // 8, WIDE // 8),
            "keyframe_positions": [8],
            "audio_latents": (1, 2, 9, 2),
            "sigmas": [1.0, 0.9, 0.5],
        },
    ),
    "AceStepPipeline": Pipe(
        sizes={"transformer": {"encoder_hidden_size": 48}},
        call={"prompt": "a song", "lyrics": "la", "audio_duration": 2.0},
        prepare=_encoded(text(TEXT, WIDTH), _ONES, text(5, WIDTH), torch.ones(1, 5).long()),
    ),
    "FluxFillPipeline": Pipe(sizes={"transformer": {"in_channels": 288, "out_channels": 4 * LATENTS}}),
    "EasyAnimateControlPipeline": Pipe(
        sizes={"transformer": {"in_channels": 3 * LATENTS, "out_channels": LATENTS}},
        call={"control_video": (1, 3, FRAMES, HEIGHT, WIDE)},
        prepare=_encoded(text(TEXT, WIDTH), text(TEXT, WIDTH), _ONES, _ONES),
    ),
    "EasyAnimateInpaintPipeline": Pipe(
        sizes={
            "transformer": {
                "in_channels": 3 * LATENTS,
                "out_channels": LATENTS,
                "resize_inpaint_mask_directly": False,
            }
        },
        call={"video": (1, 3, FRAMES, HEIGHT, WIDE), "mask_video": torch.ones(1, 1, FRAMES, HEIGHT, WIDE)},
    ),
    "HiDreamImagePipeline": Pipe(
        call={
            "prompt_embeds_t5": (1, TEXT, WIDTH),
            "negative_prompt_embeds_t5": (1, TEXT, WIDTH),
            "prompt_embeds_llama3": (3, 1, TEXT, WIDTH),
            "negative_prompt_embeds_llama3": (3, 1, TEXT, WIDTH),
        },
        prepare=lambda pipe: setattr(pipe, "default_sample_size", 8),
    ),
    "HunyuanVideo15ImageToVideoPipeline": Pipe(
        sizes={"transformer": {"in_channels": 2 * LATENTS + 1, "out_channels": LATENTS, "target_size": 32}},
        call=_SECOND,
        prepare=lambda pipe: setattr(pipe, "encode_image", lambda **_: torch.zeros(1, 3, 10)),
    ),
    "HunyuanVideo15Pipeline": Pipe(sizes=_NINE, call={**_SECOND, "height": 32, "width": 48}),
    "Kandinsky5T2IPipeline": Pipe(
        call=_KANDINSKY, prepare=lambda pipe: setattr(pipe, "resolutions", [(WIDE, HEIGHT)])
    ),
    "StableAudio3InpaintPipeline": Pipe(
        sizes={"transformer": {"local_add_cond_dim": LATENTS + 1}},
        call={"audio": (1, 2, 128), "duration": 2.0, "mask_start_seconds": 0.5, "mask_end_seconds": 1.0},
    ),
    "StableAudioPipeline": Pipe(
        sizes={"transformer": {"global_states_input_dim": 2 * WIDTH}}, call={"audio_end_in_s": 0.5}
    ),
    "ZImageControlNetInpaintPipeline": Pipe(
        sizes={
            "controlnet": {
                "control_in_dim": 2 * LATENTS + 1,
                "add_control_noise_refiner": "control_noise_refiner",
            }
        },
        call=_LIST,
    ),
    "ZImageOmniPipeline": Pipe(
        call={
            "prompt_embeds": lambda: [[text(TEXT, WIDTH)[0]]],
            "negative_prompt_embeds": lambda: [[text(TEXT, WIDTH)[0]]],
            "image": OMIT,
        }
    ),
    "WanAnimatePipeline": Pipe(
        call={
            "pose_video": video,
            "face_video": video,
            "image_embeds": (1, 3, 12),
            "height": 32,
            "width": 48,
            "segment_frame_length": FRAMES,
        },
        prepare=_unchecked,
    ),
    "HeliosPipeline": Pipe(call={"num_latent_frames_per_chunk": 3, "history_sizes": lambda: [4, 2, 1]}),
    "HeliosPyramidPipeline": Pipe(
        call={
            "width": 128,
            "num_latent_frames_per_chunk": 3,
            "history_sizes": lambda: [4, 2, 1],
            "pyramid_num_inference_steps_list": [2, 3, 2],
        }
    ),
    "LTXI2VLongMultiPromptPipeline": Pipe(
        call={"prompt": "a cat", "temporal_tile_size": 8, "temporal_overlap": 2, "num_frames": 17},
        prepare=_encoded(text(TEXT, WIDTH), _ONES, text(TEXT, WIDTH), _ONES),
    ),
    "QwenImageControlNetInpaintPipeline": Pipe(sizes={"controlnet": {"extra_condition_channels": LATENTS}}),
    "StableDiffusion3ControlNetInpaintingPipeline": Pipe(sizes={"controlnet": {"extra_conditioning_channels": 1}}),
    "VisualClozeGenerationPipeline": Pipe(
        {"resolution": 64},
        {"transformer": {"in_channels": 288, "out_channels": 4 * LATENTS}},
        _CLOZE,
        _encoded(text(TEXT, WIDTH), text(POOLED), torch.zeros(TEXT, 3)),
    ),
    "SanaWMLTX2Refiner": Pipe(
        call={"sana_latent": (1, LATENTS, 5, 4, 6), "prompt": "a cat", "fps": 24.0, "block_size": 2},
        aside=lambda given: "capture" in given.get("kv_cache_mode", ""),
        prepare=lambda pipe: setattr(pipe, "_encode_prompt", lambda *_, **__: (text(TEXT, WIDTH), _ONES)),
    ),
    "LTX2DFRPipeline": Pipe(
        sizes={"transformer": {"use_keyframes_abs_pos_embedding": True}}, call={"sigmas": [1.0, 0.9, 0.5]}
    ),
    "LongCatAudioDiTPipeline": Pipe(
        call={"prompt": "a sound", "audio_duration_s": 2.0},
        prepare=_encoded(text(TEXT, WIDTH), torch.tensor([TEXT])),
    ),
    "LongCatImagePipeline": Pipe(
        sizes={"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16}},
        call={"enable_prompt_rewrite": False, "prompt": "a cat", "negative_prompt": "a dog"},
        prepare=_unchecked,
    ),
    "LongCatImageEditPipeline": Pipe(
        {"text_processor": Processor},
        sizes={"transformer": {"in_channels": 64}, "vae": {"latent_channels": 16, **_levels(6)}},
        call={"prompt": "a cat", "negative_prompt": "a dog"},
        prepare=_unchecked,
    ),
    "Ideogram4Pipeline": Pipe(
        sizes={"transformer": {"in_channels": 4 * LATENTS}, "unconditional_transformer": {"in_channels": 4 * LATENTS}},
        call={"prompt": "a cat", "guidance_schedule": None, "guidance_scale": 7.0},
        prepare=_ideogram,
    ),
    "FluxKontextPipeline": Pipe(call={"max_area": HEIGHT * WIDE, "_auto_resize": False}),
    "FluxKontextInpaintPipeline": Pipe(call={"max_area": HEIGHT * WIDE, "_auto_resize": False}),
    "StableAudio3AudioToAudioPipeline": Pipe(call={"audio": (1, 2, 128), "duration": 2.0}),
    "StableAudio3Pipeline": Pipe(call={"duration": 2.0}),
    "BriaFibo2Pipeline": Pipe(
        call={"image": OMIT, "prompt_embeds": (1, 2, TEXT, WIDTH), "negative_prompt_embeds": (1, 2, TEXT, WIDTH)}
    ),
    "BriaFiboPipeline": Pipe(call=_FIBO, prepare=_layers),
    "BriaFiboEditPipeline": Pipe(call=_FIBO, prepare=_layers),
    "ChromaInpaintPipeline": Pipe(call=_BOOL, prepare=_guided),
    "ChromaImg2ImgPipeline": Pipe(call=_BOOL),
    "ChromaPipeline": Pipe(call=_BOOL),
    "ChronoEditPipeline": Pipe(
        sizes={"transformer": {"in_channels": 3 * LATENTS, "out_channels": LATENTS, "image_dim": 12}},
        call={"image_embeds": (1, 3, 12)},
        prepare=_unchecked,
    ),
    "CogVideoXFunControlPipeline": Pipe(sizes=_TWICE, call={"control_video": video}),
    "CogVideoXImageToVideoPipeline": Pipe(sizes=_TWICE),
    "CogView4ControlPipeline": Pipe(sizes=_TWICE),
    "Cosmos2TextToImagePipeline": Pipe(_SAFE),
    "Cosmos2VideoToWorldPipeline": Pipe(_SAFE, _ONE_MORE),
    "Cosmos2_5_PredictBasePipeline": Pipe(_SAFE, _ONE_MORE, {"image": OMIT}),
    "CosmosTextToWorldPipeline": Pipe(_SAFE),
    "CosmosVideoToWorldPipeline": Pipe(_SAFE, _ONE_MORE),
    "DiTPipeline": Pipe(call={"class_labels": [3], "output_type": "np"}),
    "FluxControlPipeline": Pipe(sizes=_CONTROL),
    "FluxControlImg2ImgPipeline": Pipe(sizes=_CONTROL),
    "FluxControlInpaintPipeline": Pipe(sizes=_CONTROL),
    "GlmImagePipeline": Pipe(
        sizes={"vae": _MEAN},
        aside=lambda given: given["kv_caches"][0].mode == "write",
        call={"image": OMIT, "prior_token_ids": lambda: torch.arange(24)[None] % 32},
    ),
    "HunyuanDiTPipeline": Pipe(call=_HUNYUAN_DIT),
    "HunyuanDiTPAGPipeline": Pipe(call=_HUNYUAN_DIT),
    "HunyuanDiTControlNetPipeline": Pipe(call=_HUNYUAN_DIT),
    "HunyuanSkyreelsImageToVideoPipeline": Pipe(sizes=_TWICE),
    "HunyuanVideoFramepackPipeline": Pipe(
        call={"latent_window_size": 2, "num_frames": 10},
        prepare=lambda pipe: setattr(pipe, "encode_image", lambda image, device: text(2, 10)),
    ),
    "HunyuanVideoImageToVideoPipeline": Pipe(
        sizes={"transformer": {"image_condition_type": "token_replace", "guidance_embeds": False}}
    ),
    "Kandinsky5I2VPipeline": Pipe(call=_KANDINSKY),
    "Kandinsky5T2VPipeline": Pipe(call=_KANDINSKY),
    "Kandinsky6TI2VAPipeline": Pipe(call={"image": OMIT, "sample_audio": False}),
    "Krea2Pipeline": Pipe(sizes=_KREA, call=_KREA_CALL),
    "LTX2ConditionPipeline": Pipe(call=_LTX2),
    "LTX2HDRPipeline": Pipe(call=_LTX2),
    "LTX2ImageToVideoPipeline": Pipe(call=_LTX2),
    "LTX2InContextPipeline": Pipe(call=_LTX2),
    "LTX2Pipeline": Pipe(call=_LTX2),
    "LucyEditPipeline": Pipe(sizes=_TWICE),
    "PixArtAlphaPipeline": Pipe(call={"use_resolution_binning": False}),
    "PixArtSigmaPAGPipeline": Pipe(call={"use_resolution_binning": False}),
    "PixArtSigmaPipeline": Pipe(call={"use_resolution_binning": False}),
    "SkyReelsV2ImageToVideoPipeline": Pipe(
        sizes={"transformer": {"in_channels": 3 * LATENTS, "out_channels": LATENTS, "image_dim": 12}},
        call={"image_embeds": (1, 3, 12)},
        prepare=_unchecked,
    ),
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline": Pipe(call={"overlap_history": 5}),
    "StableDiffusion3InpaintPipeline": Pipe(
        sizes={"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}}
    ),
    "WanImageToVideoPipeline": Pipe(sizes={"transformer": {"in_channels": 3 * LATENTS, "out_channels": LATENTS}}),
    "WanVACEPipeline": Pipe(sizes={"transformer": {"vace_in_channels": 64 + 2 * LATENTS}}),
    "ZImageControlNetPipeline": Pipe(call=_LIST),
    "ZImageImg2ImgPipeline": Pipe(call=_LIST),
    "ZImageInpaintPipeline": Pipe(call=_LIST),
    "ZImagePipeline": Pipe(call=_LIST),
    "AnimaModularPipeline": Pipe({"text_conditioner": _conditioner}, call=_QWEN),
    "EchoModularPipeline": Pipe(
        sizes={"transformer": {"audio_in_channels": 128, "audio_out_channels": 128}},
        call={**_CONNECTED, "sigmas": lambda: [1.0, 0.8, 0.5, 0.0]},
        stepless=True,
    ),
    "Flux3DistilledModularPipeline": Pipe(sizes={"transformer": {"flow_map": True}}),
    "HeliosModularPipeline": Pipe(call={**_HELIOS, "sigmas": OMIT}),
    "HunyuanVideo15ModularPipeline": Pipe(
        sizes={"transformer": {"in_channels": 65, "out_channels": 32}}, call={**_SECOND, "height": 32, "width": 48}
    ),
    "MiniMaxMusic3ModularPipeline": Pipe({"condition_encoder": _music}, call={"frame_hiddens": (1, 30, 2 * WIDTH)}),
    "QwenImageLayeredModularPipeline": Pipe(call={"image_latents": (1, 1, LATENTS, HEIGHT // 8, WIDE // 8)}),
    "HeliosPyramidModularPipeline": Pipe(call={**_HELIOS, "pyramid_num_inference_steps_list": lambda: [2, 3, 2]}),
    "HeliosPyramidDistilledModularPipeline": Pipe(
        call={**_HELIOS, "pyramid_num_inference_steps_list": lambda: [2, 3, 2]}
    ),
    "Ideogram4ModularPipeline": Pipe(
        sizes={"transformer": {"in_channels": 4 * LATENTS}, "unconditional_transformer": {"in_channels": 4 * LATENTS}},
        call={
            "text_features": (1, TEXT, WIDTH),
            "text_lengths": torch.tensor([TEXT]),
            "guidance_schedule": lambda: [7.0] * STEPS,
        },
    ),
    "Krea2ModularPipeline": Pipe(sizes=_KREA, call=_KREA_CALL),
    "Krea2TurboModularPipeline": Pipe(sizes=_KREA, call=_KREA_CALL),
    "LTX2ModularPipeline": Pipe(call={**_CONNECTED, "batch_size": 1, "dtype": torch.float32}),
    "LTX25ModularPipeline": Pipe(call={**_CONNECTED, "batch_size": 1, "dtype": torch.float32}),
    "QwenImageEditModularPipeline": Pipe(call=_PICTURE),
    "QwenImageEditPlusModularPipeline": Pipe(
        call={"image_latents": lambda: [text(LATENTS, 1, HEIGHT // 8, WIDE // 8)]}
    ),
    "WanModularPipeline": Pipe(sizes={"transformer": _SIXTEEN}),
    "Wan22ModularPipeline": Pipe(sizes={"transformer": _SIXTEEN, "transformer_2": _SIXTEEN}),
    "Wan22VaceModularPipeline": Pipe(sizes={"transformer": _SIXTEEN, "transformer_2": _SIXTEEN}),
    "WanImage2VideoModularPipeline": Pipe(
        sizes={"transformer": {"in_channels": 36, "out_channels": 16, "image_dim": 12}},
        call={"image_condition_latents": (1, 20, 3, HEIGHT // 8, WIDE // 8), "image_embeds": (1, 3, 12)},
    ),
    "Wan22Image2VideoModularPipeline": Pipe(
        sizes={
            "transformer": {"in_channels": 36, "out_channels": 16},
            "transformer_2": {"in_channels": 36, "out_channels": 16},
        },
        call={"image_condition_latents": (1, 20, 3, HEIGHT // 8, WIDE // 8)},
    ),
    "MiniMaxH3ModularPipeline": Pipe(
        {"audio_scheduler": _audio_scheduler},
        {part: {"in_channels": 24, "audio_in_channels": 32} for part in ("transformer", "transformer_ref")},
        call={"text_token_tags": torch.ones(TEXT).long(), "prompt_embeds": (1, TEXT, WIDTH), "num_frames": 124},
    ),
    "ZImageModularPipeline": Pipe(call=_LIST),
}
CONTROLNETS: dict[str, dict[str, Any]] = {
    "FluxControlNetModel": {"in_channels": 4 * LATENTS},
    "QwenImageControlNetModel": {"in_channels": 4 * LATENTS},
    "CosmosControlNetModel": {
        "n_controlnet_blocks": 2,
        "in_channels": LATENTS + 2,
        "latent_channels": LATENTS + 2,
        "model_channels": 48,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "text_embed_dim": WIDTH,
        "adaln_lora_dim": 4,
        "max_size": (4, 32, 32),
        "img_context_dim_out": WIDTH,
        "crossattn_proj_in_channels": WIDTH,
        "encoder_hidden_states_channels": WIDTH,
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0],
        "control_refiner_layers_places": [0],
        "control_in_dim": LATENTS,
    },
    "HunyuanDiT2DControlNetModel": {
        "patch_size": 2,
        "in_channels": LATENTS,
        "cross_attention_dim": WIDTH,
        "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": POOLED,
        "text_len": TEXT,
        "text_len_t5": 5,
        "sample_size": 16,
        "transformer_num_layers": 2,
    },
}
