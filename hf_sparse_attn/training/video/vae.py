"""What differs between the VAEs of video pipelines: how latents are normalised, and what a prompt becomes."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.profiling.observe import evaluating

# Names of the text encoders of the pipelines.
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")
# Values of each weight that a fingerprint looks at.
_LOOKED_AT = 64


def _mean_and_std(vae: Any) -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(getattr(vae.config, name)).view(-1, 1, 1, 1) for name in ("latents_mean", "latents_std"))
    return mean, 1.0 / std


def _scaling_factor(vae: Any) -> tuple[Tensor, Tensor]:
    return torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), float(vae.config.scaling_factor))


@dataclass(frozen=True)
class _Rules:
    """Of one class of VAE.

    Args:
        normal: shift and factor, [channels or 1, 1, 1, 1]: latents for the transformer are (z - shift) * factor.
        prompt: names of what `encode_prompt` of its pipelines returns; None for what is not kept.
    """

    normal: Callable[[Any], tuple[Tensor, Tensor]]
    prompt: tuple[str | None, ...]


_HUNYUAN_15 = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
_RULES = {
    "AutoencoderKLWan": _Rules(_mean_and_std, ("prompt_embeds", None)),
    "AutoencoderKLHunyuanVideo": _Rules(
        _scaling_factor, ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    ),
    "AutoencoderKLHunyuanVideo15": _Rules(_scaling_factor, _HUNYUAN_15),
}


def check_vae(vae: Any) -> None:
    """Refuses a VAE that nothing here knows.

    Raises:
        TypeError: it is of another class.
    """
    if type(vae).__name__ not in _RULES:
        raise TypeError(f"`vae` must be {' or '.join(_RULES)}; got {type(vae).__name__}")


def normalised(vae: Any, z: Tensor) -> Tensor:
    """What the VAE gave, as the transformer takes it: float32, [..., channels, frames, height, width]."""
    shift, factor = (t.to(z.device) for t in _RULES[type(vae).__name__].normal(vae))
    return (z.float() - shift) * factor


def denormalised(vae: Any, latents: Tensor) -> Tensor:
    """What the VAE decodes, from latents of the transformer: the inverse of `normalised`."""
    shift, factor = (t.to(latents.device) for t in _RULES[type(vae).__name__].normal(vae))
    return latents.float() / factor + shift


def encode_video(vae: Any, video: Tensor) -> Tensor:
    """Latents of a video, normalised: the mode of the VAE's distribution, as the video-to-video pipelines take it.

    Args:
        vae: of a known class.
        video: [3, frames, height, width], from -1 to 1.

    Returns:
        [channels, latent frames, latent height, latent width], float32.
    """
    with torch.no_grad():
        z = vae.encode(video[None].to(vae.device, vae.dtype)).latent_dist.mode()
    return normalised(vae, z)[0]


def encode_first_frame(pipe: Any, video: Tensor, device: torch.device) -> dict[str, Tensor]:
    """What an image-to-video pipeline of Wan makes of the first frame of a video.

    Args:
        pipe: of class WanImageToVideoPipeline, or any that gives the first frame in place of its noise.
        video: [3, frames, height, width], from -1 to 1.
        device: where the image encoder is.

    Returns:
        `image_latents`, normalised: of the first frame alone, [channels, 1, latent height, latent width], where the
        pipeline gives it in place of noise; else of the first frame and grey ones after it, like the latents of the
        video. And `image_embeds` [tokens, width] where the transformer takes them.

    Raises:
        ValueError: the transformer takes embeddings of an image, and the pipeline cannot make them.
    """
    first = video[:, :1]
    clip = first if pipe.config.get("expand_timesteps") else torch.cat([first, torch.zeros_like(video[:, 1:])], dim=1)
    made = {"image_latents": encode_video(pipe.vae, clip)}
    if getattr(getattr(pipe, "transformer", None), "config", {}).get("image_dim") is not None:
        if getattr(pipe, "image_encoder", None) is None:
            raise ValueError("`pipe` must have an image encoder, which its transformer needs, got none")
        from PIL import Image

        pixels = ((first[:, 0].float() + 1) * 127.5).round().clamp(0, 255).byte()
        with torch.no_grad():
            made["image_embeds"] = pipe.encode_image(Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()), device)[0]
    return made


def encode_caption(pipe: Any, caption: str, device: torch.device, tokens: int | None = None) -> dict[str, Tensor]:
    """What a pipeline's text encoders make of a caption, by the names that the pipeline itself takes it under.

    Args:
        pipe: of a VAE of a known class.
        caption: may be empty, for training without a prompt.
        device: where the text encoders are.
        tokens: longest prompt; None takes what the pipeline takes when it generates.

    Returns:
        Tensors without a batch axis.

    Raises:
        ValueError: the pipeline has no text encoder, needs more than a text, or cannot have a longest prompt.
        MissingExtra: the pipeline needs ftfy, which is not installed.
    """
    accepted = inspect.signature(pipe.encode_prompt).parameters
    needed = [n for n, p in accepted.items() if p.default is p.empty and n not in ("prompt", "kwargs")]
    if needed:
        raise ValueError(
            f"`pipe` must encode a prompt from text alone, got {type(pipe).__name__}, which needs {', '.join(needed)}"
        )
    if getattr(pipe, "text_encoder", None) is None or getattr(pipe, "tokenizer", None) is None:
        raise ValueError(f"`pipe` must have a text encoder and a tokenizer, got a {type(pipe).__name__} without")
    if tokens is not None and "max_sequence_length" not in accepted:
        raise ValueError(
            f"`tokens` must be none for {type(pipe).__name__}, whose prompts have one length, got {tokens}"
        )
    longest = inspect.signature(type(pipe).__call__).parameters.get("max_sequence_length")
    if tokens is None and longest is not None and isinstance(longest.default, int):
        tokens = longest.default
    given = {"device": device, "do_classifier_free_guidance": False, "max_sequence_length": tokens}
    try:
        with torch.no_grad():
            made = pipe.encode_prompt(caption, **{k: v for k, v in given.items() if k in accepted and v is not None})
    except NameError as error:
        # Releases of diffusers without this check fail in the middle of their own code.
        if error.name != "ftfy":
            raise
        raise MissingExtra("encode_prompt of this pipeline", "ftfy") from error
    names = _RULES[type(pipe.vae).__name__].prompt
    if len(made) != len(names):
        raise ValueError(
            f"`pipe` must give {len(names)} values for a prompt, got {len(made)} from {type(pipe).__name__}"
        )
    return {name: value[0] for name, value in zip(names, made, strict=True) if name is not None}


def fingerprint(module: Any) -> str:
    """A hash of the class, config and some of the values of every weight of a model of diffusers or transformers."""
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    # Where it came from and who saved it change nothing.
    said = {k: v for k, v in config.items() if not k.startswith("_") and not k.endswith("version")}
    tiling = [getattr(module, name, None) for name in ("use_tiling", "use_framewise_encoding")]
    found = hashlib.sha256(json.dumps([type(module).__name__, said, tiling], sort_keys=True, default=str).encode())
    for name, weight in module.state_dict().items():
        found.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # Quantised weights are of classes of their own, and offloaded ones are not there.
        if type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and not weight.is_meta:
            values = weight.detach().flatten()
            found.update(values[:: max(1, len(values) // _LOOKED_AT)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:20]


def parts_of(pipe: Any, names: Sequence[str]) -> list[Any]:
    """The parts of a pipeline of these names that it has."""
    return [part for part in (getattr(pipe, name, None) for name in names) if part is not None]


@contextmanager
def placed(modules: list[Any], device: torch.device) -> Iterator[None]:
    """Models on a device, in eval mode; afterwards where and as they were. One that is offloaded stays where it is."""
    moved = [(m, m.device) for m in modules if not hasattr(m, "_hf_hook") and m.device != device]
    try:
        for module, _ in moved:
            module.to(device)
        with evaluating(modules):
            yield
    finally:
        for module, before in moved:
            module.to(before)
