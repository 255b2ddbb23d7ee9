"""Tiny Wan transformers and pipelines with random weights, built in memory (no hub), and what tests ask of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Method

TABLES = ("_backends", "_constraints", "_supported_arg_names")


def transformer(seed: int = 0, cls: str = "WanTransformer3DModel", **sizes: Any) -> Any:
    """Two layers, two heads of 12 (the rotary table wants a multiple of 6), text of 32; `sizes` override."""
    import diffusers

    defaults = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "num_layers": 2,
        "ffn_dim": 40,
        "text_dim": 32,
        "rope_max_seq_len": 64,
    }
    torch.manual_seed(seed)
    return getattr(diffusers, cls)(**{**defaults, **sizes}).eval()


def inputs(batch: int = 1, latents: tuple[int, int, int] = (5, 14, 26), seed: int = 1, time: float = 500) -> dict:
    """Keyword inputs of a forward; latents of (frames, height, width), patches of 1 x 2 x 2."""
    made = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 16, *latents, generator=made),
        "timestep": torch.full((batch,), float(time)),
        "encoder_hidden_states": torch.randn(batch, 9, 32, generator=made),
    }


def pipeline(kind: str = "t2v") -> Any:
    """A pipeline that runs.

    Args:
        kind: "t2v" (2.1), "experts" (2.2, two transformers), "low_only" (2.2 with the second alone), "ti2v" (timesteps
            per token), "i2v" (2.2, image to video, two transformers), "i2v_clip" (2.1, image to video, with embeddings
            of the image), "ti2v_image" (timesteps per token, image to video), "v2v".
    """
    import diffusers

    torch.manual_seed(0)
    parts: dict[str, Any] = {
        # Prompts come as embeddings: the text encoder has no part in what is tested.
        "tokenizer": None,
        "text_encoder": None,
        "vae": diffusers.AutoencoderKLWan(
            base_dim=3, z_dim=16, dim_mult=[1] * 4, num_res_blocks=1, temperal_downsample=[False, True, True]
        ).eval(),
        "scheduler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        "transformer": None if kind == "low_only" else transformer(0, in_channels=36 if kind == "i2v" else 16),
    }
    if kind == "i2v_clip":
        parts["transformer"] = transformer(0, in_channels=36, image_dim=8, added_kv_proj_dim=24)
        parts |= _clip()
    if kind in ("experts", "i2v", "low_only"):
        parts["transformer_2"] = transformer(1, in_channels=36 if kind == "i2v" else 16)
        # Above 1: even the first step belongs to the low-noise expert.
        parts["boundary_ratio"] = 1.1 if kind == "low_only" else 0.7
    if kind.startswith("ti2v"):
        parts["expand_timesteps"] = True
    names = dict.fromkeys(("i2v", "i2v_clip", "ti2v_image"), "WanImageToVideoPipeline")
    pipe = getattr(diffusers, {**names, "v2v": "WanVideoToVideoPipeline"}.get(kind, "WanPipeline"))(**parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _clip() -> dict[str, Any]:
    """An image encoder of width 8, and what prepares an image for it; that of transformers needs torchvision."""
    from transformers import BatchFeature, CLIPVisionConfig, CLIPVisionModel

    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(2)
    encoder = CLIPVisionModel(CLIPVisionConfig(hidden_size=8, intermediate_size=16, **sizes)).eval()

    def process(images: Any, return_tensors: str) -> Any:
        if not isinstance(images, torch.Tensor):
            images = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None] / 255
        return BatchFeature({"pixel_values": F.interpolate(images.float(), (16, 16), mode="area")})

    return {"image_encoder": encoder, "image_processor": process}


def generate(pipe: Any, steps: int = 2, guidance: float = 5.0) -> torch.Tensor:
    """Latents of a clip of 3 x 2 x 3 tokens."""
    call: dict[str, Any] = {"num_frames": 9, "num_inference_steps": steps}
    kind = type(pipe).__name__
    if kind == "WanImageToVideoPipeline":
        call["image"] = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(3))
    if kind == "WanVideoToVideoPipeline":
        from PIL import Image

        call = {"num_inference_steps": steps, "strength": 0.5}
        call["video"] = [Image.new("RGB", (48, 32), (20 * i, 90, 200 - 20 * i)) for i in range(9)]
    made = torch.Generator().manual_seed(4)
    return pipe(
        prompt_embeds=torch.randn(1, 9, 32, generator=made),
        negative_prompt_embeds=torch.randn(1, 9, 32, generator=made),
        guidance_scale=guidance,
        height=32,
        width=48,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **call,
    ).frames


@dataclass(frozen=True, kw_only=True)
class Spy(Method):
    """Keeps everything and notes what it is told."""

    seen: list[hsa.Context] = field(default_factory=list, compare=False)

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        assert (q.shape[1], q.shape[3]) == (ctx.num_heads, ctx.head_dim)
        self.seen.append(ctx)
        return hsa.BlockPattern.dense(q.shape[2], k.shape[2], causal=False, block=64)


def spy(model: Any, **options: Any) -> tuple[hsa.Patch, list[hsa.Context]]:
    method = Spy()
    return hsa.patch(model, method, backend="torch_reference", min_tokens=0, **options), method.seen


def run(model: Any, grad: bool = False, **given: Any) -> torch.Tensor:
    with torch.set_grad_enabled(grad):
        return model(**given, return_dict=False)[0]


def window_mask(n: int, window: int = 60, sink: int = 5) -> torch.Tensor:
    i, j = torch.arange(n)[:, None], torch.arange(n)
    return ((i - j).abs() < window) | (j < sink)


@contextmanager
def replaced_attention(mask: torch.Tensor | None, dtype: torch.dtype) -> Iterator[None]:
    """Self-attention of every unpatched Wan model through SDPA with a token mask, in `dtype`."""
    from diffusers.models.transformers import transformer_wan as file

    original = file.dispatch_attention_fn

    def masked(query: Any, key: Any, value: Any, **rest: Any) -> torch.Tensor:
        if query.shape[1] != key.shape[1]:
            return original(query, key, value, **rest)
        q, k, v = (t.transpose(1, 2).to(dtype) for t in (query, key, value))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).to(query.dtype)

    file.dispatch_attention_fn = masked
    try:
        yield
    finally:
        file.dispatch_attention_fn = original


def assert_close(got: torch.Tensor, model: Any, given: dict[str, Any], mask: torch.Tensor | None) -> None:
    """`got` is at most 4 roundings from attention in float64; a rounding is what SDPA in float32 is off."""
    with replaced_attention(mask, torch.float64):
        exact = run(model, **given)
    with replaced_attention(mask, torch.float32):
        rounding = (run(model, **given) - exact).abs().max()
    assert (got - exact).abs().max() <= 4 * rounding + 4 * torch.finfo(torch.float32).eps * exact.abs().max()


def state(model: Any) -> dict[str, Any]:
    """Everything a patch may touch: attributes, hooks, processors, weights, and the tables of diffusers."""
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as tables

    parts = [m for n in ("transformer", "transformer_2") if (m := getattr(model, n, None)) is not None] or [model]
    found: dict[str, Any] = {name: copy.copy(getattr(tables, name)) for name in TABLES}
    for number, part in enumerate(parts):
        for name, module in part.named_modules():
            own = {k: dict(v) if isinstance(v, dict) else v for k, v in module.__dict__.items()}
            found[f"{number}.{name}"] = {k: v for k, v in own.items() if k not in ("_parameters", "_buffers")}
            if "processor" in own:
                found[f"{number}.{name}.processor"] = dict(getattr(module.processor, "__dict__", {}))
        found[f"{number} weights"] = {k: v.clone() for k, v in part.state_dict().items()}
    return found


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert before.keys() == after.keys()
    for name, value in before.items():
        if name.endswith("weights"):
            assert value.keys() == after[name].keys()
            assert all(torch.equal(v, after[name][k]) for k, v in value.items())
        else:
            assert value == after[name], name
