"""Tiny HunyuanVideo transformers and pipelines with random weights, built in memory (no hub)."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hf_sparse_attn.method import Method

KINDS = ("t2v", "token_replace", "framepack", "1.5")
TEXT = 16


def transformer(kind: str = "t2v", seed: int = 0, **sizes: Any) -> Any:
    """Two layers (one of each kind where there are two), two heads of 12, patches of 1 x 2 x 2 (1.5: 1)."""
    import diffusers

    defaults: dict[str, Any] = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 1,
        "num_refiner_layers": 1,
        "mlp_ratio": 2.0,
        "text_embed_dim": TEXT,
        "rope_axes_dim": (4, 4, 4),
    }
    name = "HunyuanVideoTransformer3DModel"
    if kind == "1.5":
        name = "HunyuanVideo15Transformer3DModel"
        defaults.update(num_layers=2, text_embed_2_dim=6, image_embed_dim=10)
    else:
        defaults.update(num_single_layers=1, pooled_projection_dim=8)
    if kind == "token_replace":
        defaults.update(image_condition_type="token_replace", guidance_embeds=False)
    if kind == "framepack":
        name = "HunyuanVideoFramepackTransformer3DModel"
        defaults.update(has_image_proj=True, image_proj_dim=10, has_clean_x_embedder=True)
    torch.manual_seed(seed)
    return getattr(diffusers, name)(**{**defaults, **sizes}).eval()


def inputs(
    kind: str = "t2v",
    lengths: tuple[int, ...] = (7,),
    grid: tuple[int, int, int] = (3, 7, 9),
    slots: int = 12,
    seed: int = 1,
    time: float = 500,
) -> dict[str, Any]:
    """Keyword inputs of a forward.

    Args:
        kind: as in `transformer`.
        lengths: valid text tokens of each row of the batch.
        grid: frames, height and width in tokens.
        slots: text tokens with padding.
        seed, time: of the random draws, of the step.
    """
    draw, batch = torch.Generator().manual_seed(seed), len(lengths)

    def random(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=draw)

    size = 1 if kind == "1.5" else 2
    frames, height, width = grid[0], grid[1] * size, grid[2] * size
    valid = torch.tensor(lengths)
    given: dict[str, Any] = {
        "hidden_states": random(4, frames, height, width),
        "timestep": torch.full((batch,), float(time)),
        "encoder_hidden_states": random(slots, TEXT),
        "encoder_attention_mask": (torch.arange(slots) < valid[:, None]).long(),
    }
    if kind == "1.5":
        given["encoder_hidden_states_2"] = random(5, 6)
        # Glyphs: one fewer for each text token more, so that rows differ in both.
        given["encoder_attention_mask_2"] = (torch.arange(5) < (4 - valid % 3)[:, None]).long()
        given["image_embeds"] = torch.zeros(batch, 3, 10)
        return given
    given["pooled_projections"] = random(8)
    if kind != "token_replace":
        given["guidance"] = torch.full((batch,), 6000.0)
    if kind == "framepack":
        given["image_embeds"] = random(2, 10)
        given["indices_latents"] = torch.arange(20, 20 + frames)
        for name, count in (("latents_clean", 2), ("latents_history_2x", 3), ("latents_history_4x", 9)):
            given[name] = random(4, count, height, width)
            given[f"indices_{name}"] = torch.arange(count)
    return given


def history(grid: tuple[int, int, int]) -> int:
    """Tokens of FramePack's history in `inputs`: 2 frames as they are, 3 at half and 9 at a quarter of the size."""
    _, height, width = grid
    return 2 * height * width + 2 * -(-height // 2) * -(-width // 2) + 3 * -(-height // 4) * -(-width // 4)


def tokens_of(kind: str, length: int, grid: tuple[int, int, int]) -> tuple[int, int]:
    """(text_before, text_after) of a row whose text has `length` valid tokens."""
    if kind == "framepack":
        return history(grid), 2 + length
    return 0, length + (4 - length % 3 if kind == "1.5" else 0)


def pipeline(kind: str = "t2v") -> Any:
    """A pipeline that runs from embeddings, its text encoders having no part in what is tested."""
    import diffusers

    torch.manual_seed(0)
    if kind == "1.5":
        vae = diffusers.AutoencoderKLHunyuanVideo15(
            latent_channels=4,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            spatial_compression_ratio=4,
            temporal_compression_ratio=2,
            downsample_match_channel=False,
            upsample_match_channel=False,
        )
        names = ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
        pipe = diffusers.HunyuanVideo15Pipeline(
            **dict.fromkeys(names),
            vae=vae.eval(),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=transformer("1.5", in_channels=9),
            guider=diffusers.ClassifierFreeGuidance(guidance_scale=4.0),
        )
        pipe.vision_num_semantic_tokens, pipe.vision_states_dim = 3, 10
        pipe.set_progress_bar_config(disable=True)
        return pipe
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )
    parts: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    parts.update(vae=vae.eval(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0))
    name = "HunyuanVideoPipeline"
    if kind == "framepack":
        name = "HunyuanVideoFramepackPipeline"
        parts.update(image_encoder=None, feature_extractor=None)
    if kind == "token_replace":
        name = "HunyuanVideoImageToVideoPipeline"
        parts.update(image_processor=None)
    pipe = getattr(diffusers, name)(transformer=transformer(kind), **parts)
    if kind == "framepack":
        pipe.encode_image = lambda image, device: torch.linspace(-1, 1, 20).view(1, 2, 10)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: Any, steps: int = 2, guidance: float = 3.0, length: int = 5, output: str = "latent") -> Tensor:
    """Latents of a clip of 3 x 2 x 3 tokens (1.5: 5 x 4 x 6), with two guidance branches."""
    kind = type(pipe).__name__
    draw = torch.Generator().manual_seed(4)

    def text(slots: int, size: int = TEXT) -> Tensor:
        return torch.randn(1, slots, size, generator=draw)

    call: dict[str, Any] = {
        "num_inference_steps": steps,
        "num_frames": 9,
        "height": 32,
        "width": 48,
        "output_type": output,
        "generator": torch.Generator().manual_seed(0),
    }
    for name, count in (("", length), ("negative_", 3)):
        call[f"{name}prompt_embeds"] = text(11)
        mask = (torch.arange(11) < count).long()[None]
        if kind == "HunyuanVideo15Pipeline":
            call[f"{name}prompt_embeds_mask"] = mask
            call[f"{name}prompt_embeds_2"] = text(5, 6)
            call[f"{name}prompt_embeds_mask_2"] = torch.tensor([[1, 1, 0, 0, 0]])
        else:
            call[f"{name}prompt_attention_mask"] = mask
            call[f"{name}pooled_prompt_embeds"] = torch.randn(1, 8, generator=draw)
    if kind == "HunyuanVideo15Pipeline":
        call.update(height=16, width=24)
    else:
        call.update(true_cfg_scale=guidance)
    if kind in ("HunyuanVideoFramepackPipeline", "HunyuanVideoImageToVideoPipeline"):
        call["image"] = torch.rand(1, 3, 32, 48, generator=draw)
    if kind == "HunyuanVideoFramepackPipeline":
        # Two sections of two frames.
        call.update(latent_window_size=2, num_frames=10)
    return pipe(**call).frames


@dataclass(frozen=True, kw_only=True)
class Recorder(Method):
    """Runs another method and keeps what its patterns were, as token masks [rows, heads or 1, tokens, tokens]."""

    inner: Method
    masks: list[tuple[int, Tensor]] = field(default_factory=list, compare=False)

    def attention(self, q: Any, k: Any, v: Any, ctx: Any, run: Any) -> Any:
        seen: list[Tensor] = []

        def noted(q: Any, k: Any, v: Any, pattern: Any) -> Any:
            seen.append(pattern.to_dense().expand(q.shape[0], -1, -1, -1))
            return run(q, k, v, pattern)

        done = self.inner.attention(q, k, v, ctx, noted)
        self.masks.append((ctx.layer, functools.reduce(torch.logical_or, seen)))
        return done


def replay(model: Any, given: dict[str, Any], masks: list[tuple[int, Tensor]], dtype: torch.dtype) -> Tensor:
    """The unpatched model with recorded masks in SDPA in `dtype`: in each layer the first tokens of each row in turn.

    Args:
        model, given: the model and its inputs; rows of a batch have texts of different lengths, so that each was one
            call of the method, or all one length, so that all rows were one.
        masks: (layer, mask) as Recorder keeps them.
        dtype: of the attention.
    """
    from diffusers.models.transformers import transformer_hunyuan_video as first
    from diffusers.models.transformers import transformer_hunyuan_video15 as second

    original, layers = first.dispatch_attention_fn, iter(sorted({layer for layer, _ in masks}))

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **rest: Any) -> Tensor:
        layer, (q, k, v) = next(layers), (t.transpose(1, 2).to(dtype) for t in (query, key, value))
        batch, heads, tokens = q.shape[:3]
        own = torch.ones(1, dtype=torch.bool) if attn_mask is None else attn_mask
        both = own.expand(batch, heads, tokens, tokens).clone()
        row = 0
        for mask in (mask for at, mask in masks if at == layer):
            n = mask.shape[-1]
            both[row : row + len(mask), :, :n, :n] &= mask
            row += len(mask)
        assert row == batch
        return F.scaled_dot_product_attention(q, k, v, attn_mask=both).transpose(1, 2).to(query.dtype)

    first.dispatch_attention_fn = second.dispatch_attention_fn = attend
    try:
        with torch.no_grad():
            return model(**given, return_dict=False)[0]
    finally:
        first.dispatch_attention_fn = second.dispatch_attention_fn = original
