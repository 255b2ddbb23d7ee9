"""Tiny random encoders, one of each kind of bidirectional attention that transformers has, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.support.tiny_lm import tokens

VOCAB = 97
WINDOW = 8
# Patches of an image, height by width, and frames of a clip.
GRID, CLIP = (6, 11), (3, 5, 7)
LENGTH = 61

_SIZES: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    # Large enough that attention is far from uniform.
    initializer_range=0.2,
)
_TEXT: dict[str, Any] = dict(
    **_SIZES,
    vocab_size=VOCAB,
    max_position_embeddings=600,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    cls_token_id=1,
    sep_token_id=2,
)
_BOTH: dict[str, Any] = dict(
    vocab_size=VOCAB,
    d_model=32,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=4,
    decoder_attention_heads=4,
    encoder_ffn_dim=48,
    decoder_ffn_dim=48,
    init_std=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)


def _model(name: str, config: Any, implementation: str | None) -> Any:
    import transformers

    config._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).eval()


def _text(name: str, config: str, **extra: Any) -> Callable[..., Any]:
    def build(implementation: str | None = None, **changes: Any) -> Any:
        import transformers

        return _model(name, getattr(transformers, config)(**{**_TEXT, **extra, **changes}), implementation)

    return build


def _image(name: str, config: str, **extra: Any) -> Callable[..., Any]:
    def build(implementation: str | None = None, **changes: Any) -> Any:
        import transformers

        sizes = {**_SIZES, "image_size": (24, 44), "patch_size": 4, **extra, **changes}
        return _model(name, getattr(transformers, config)(**sizes), implementation)

    return build


def _clip(implementation: str | None = None, kind: str = "CLIP", **changes: Any) -> Any:
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        text_config={**_TEXT, "eos_token_id": 2, **changes},
        vision_config={**_SIZES, "image_size": 24, "patch_size": 4, **changes},
        projection_dim=16,
    )
    return _model(f"{kind}Model", config, implementation)


def _bart(implementation: str | None = None, **changes: Any) -> Any:
    import transformers

    config = transformers.BartConfig(**{**_BOTH, "max_position_embeddings": 300, **changes})
    return _model("BartModel", config, implementation)


def _whisper(implementation: str | None = None, **changes: Any) -> Any:
    import transformers

    sizes = dict(num_mel_bins=8, max_source_positions=LENGTH, max_target_positions=300)
    return _model("WhisperModel", transformers.WhisperConfig(**{**_BOTH, **sizes, **changes}), implementation)


def _wav(implementation: str | None = None, **changes: Any) -> Any:
    import transformers

    sizes = dict(conv_dim=(8, 8), conv_stride=(5, 2), conv_kernel=(10, 3), num_feat_extract_layers=2, vocab_size=VOCAB)
    positions = dict(num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2, layerdrop=0.0)
    config = transformers.Wav2Vec2Config(**{**_SIZES, **sizes, **positions, **changes})
    return _model("Wav2Vec2Model", config, implementation)


# name -> builder(implementation=None, **config changes).
ENCODERS: dict[str, Callable[..., Any]] = {
    "bert": _text("BertModel", "BertConfig"),
    "roberta": _text("RobertaModel", "RobertaConfig"),
    "xlm_roberta": _text("XLMRobertaForMaskedLM", "XLMRobertaConfig"),
    "distilbert": _text("DistilBertModel", "DistilBertConfig", dim=32, hidden_dim=48, n_layers=2, n_heads=4),
    # One layer of either kind.
    "modernbert": _text(
        "ModernBertModel",
        "ModernBertConfig",
        local_attention=2 * WINDOW,
        layer_types=["full_attention", "sliding_attention"],
    ),
    "vit": _image("ViTModel", "ViTConfig"),
    "dinov2": _image("Dinov2Model", "Dinov2Config", image_size=24),
    "registers": _image("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", image_size=24, num_register_tokens=3),
    "deit": _image("DeiTModel", "DeiTConfig"),
    "videomae": _image(
        "VideoMAEModel", "VideoMAEConfig", image_size=(20, 28), num_frames=6, tubelet_size=2, use_mean_pooling=False
    ),
    "clip": _clip,
    "siglip": lambda implementation=None, **changes: _clip(implementation, "Siglip", **changes),
    "wav2vec2": _wav,
    "whisper": _whisper,
    "bart": _bart,
}
# Families whose tokens are the text of `input_ids` and nothing else.
TEXT = ("bert", "roberta", "xlm_roberta", "distilbert", "modernbert")
# Class and register tokens before the patches.
SPECIAL = {"vit": 1, "dinov2": 1, "registers": 4, "deit": 2, "videomae": 0}


def inputs(family: str, batch: int = 2) -> dict[str, torch.Tensor]:
    """Keyword inputs of a forward."""
    draw = torch.Generator().manual_seed(0)
    if family in TEXT:
        return {"input_ids": tokens(batch, 111)}
    if family == "videomae":
        frames, height, width = CLIP
        return {"pixel_values": torch.randn(batch, 2 * frames, 3, 4 * height, 4 * width, generator=draw)}
    if family == "wav2vec2":
        return {"input_values": torch.randn(batch, 900, generator=draw)}
    if family == "whisper":
        features = torch.randn(batch, 8, 2 * LENGTH, generator=draw)
        return {"input_features": features, "decoder_input_ids": tokens(batch, LENGTH)}
    if family == "bart":
        return {"input_ids": tokens(batch, LENGTH), "decoder_input_ids": tokens(batch, LENGTH, seed=1)}
    if family in ("clip", "siglip"):
        pixels = torch.randn(batch, 3, 24, 24, generator=draw)
        ids = tokens(batch, 37)
        # The text of CLIP is read at its last token.
        ids[:, -1] = 2
        return {"input_ids": ids, "pixel_values": pixels}
    height, width = GRID if family in ("vit", "deit") else (7, 9)
    return {"pixel_values": torch.randn(batch, 3, 4 * height, 4 * width, generator=draw)}


def output(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model computes last of every token, or of the whole where there are two towers."""
    out = model(**given)
    if hasattr(out, "text_embeds"):
        return torch.cat([out.text_embeds, out.image_embeds])
    return out.logits if hasattr(out, "logits") else out.last_hidden_state
