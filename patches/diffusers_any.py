"""Any transformer of diffusers: self-attention that goes through the dispatcher or through PyTorch's function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_attn.hosts import diffusers_install
from hf_sparse_attn.hosts.diffusers_model import (
    DiffusersFamily,
    Place,
    Tokens,
    names_of,
    networks,
    outermost_models,
    self_attentions,
    transformers_of_diffusers,
)
from hf_sparse_attn.method import NEEDS, Decline, MethodDoesNotApply
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES

Inputs = Mapping[str, Any]
_UNKNOWN = Tokens(None)


def _patched(sizes: Iterable[int], patches: Iterable[int]) -> tuple[int, int, int]:
    """Grid of (frames, height, width) in tokens."""
    frames, height, width = (size // patch for size, patch in zip(sizes, patches, strict=True))
    return frames, height, width


def _video(config: Any, inputs: Inputs) -> Tokens:
    """Latents [batch, channels, frames, height, width] in patches, text in cross-attention."""
    return Tokens(_patched(inputs["hidden_states"].shape[2:], config.patch_size))


def _ltx(config: Any, inputs: Inputs) -> Tokens:
    """Tokens come ready made, their grid beside them; anything put after them belongs to no grid."""
    frames, height, width = (inputs.get(name) or 0 for name in ("num_frames", "height", "width"))
    known = inputs["hidden_states"].shape[1] == frames * height * width
    return Tokens((frames, height, width)) if known else _UNKNOWN


def _kandinsky5(config: Any, inputs: Inputs) -> Tokens:
    """Latents [batch, frames, height, width, channels]; its own sparse attention orders the tokens differently."""
    if inputs.get("sparse_params") is not None:
        return _UNKNOWN
    return Tokens(_patched(inputs["hidden_states"].shape[1:4], config.patch_size))


def _cogvideox(config: Any, inputs: Inputs) -> Tokens:
    """Text first; latents [batch, frames, channels, height, width]."""
    frames, _, height, width = inputs["hidden_states"].shape[1:]
    patches = (config.patch_size_t or 1, config.patch_size, config.patch_size)
    return Tokens(_patched((frames, height, width), patches), inputs["encoder_hidden_states"].shape[1])


def _video_then_text(config: Any, inputs: Inputs) -> Tokens:
    """Mochi: the video, then the valid text of the row."""
    sizes = inputs["hidden_states"].shape[2:]
    return Tokens(_patched(sizes, (1, config.patch_size, config.patch_size)), after=None)


def _image_then_text(config: Any, inputs: Inputs) -> Tokens:
    """SD3: the image in patches, then text; blocks with a second attention run it on the image alone."""
    if inputs["hidden_states"].ndim != 4:
        # A ControlNet may be given what the transformer has embedded.
        return _UNKNOWN
    height, width = inputs["hidden_states"].shape[2:]
    return Tokens((1, height // config.patch_size, width // config.patch_size), after=None)


def _hunyuan_image(config: Any, inputs: Inputs) -> Tokens:
    """Latents in patches, then text."""
    sizes, patches = inputs["hidden_states"].shape[2:], config.patch_size
    return Tokens(
        _patched((1,) * (3 - len(sizes)) + tuple(sizes), (1,) * (3 - len(patches)) + tuple(patches)), after=None
    )


def _qwen_image(config: Any, inputs: Inputs) -> Tokens:
    """Text first, then the image; with reference images behind it there is more than one grid."""
    shapes = inputs.get("img_shapes") or []
    rows = [row if isinstance(row, list) else [row] for row in shapes]
    if not rows or any(len(row) != 1 or tuple(row[0]) != tuple(rows[0][0]) for row in rows):
        return _UNKNOWN
    frames, height, width = rows[0][0]
    return Tokens((frames, height, width), before=None)


def _flux(config: Any, inputs: Inputs) -> Tokens:
    """Text first, then the image, whose ids are (0, row, column) in raster order; reference images have other ids."""
    ids, text = inputs.get("img_ids"), inputs["encoder_hidden_states"].shape[1]
    # A graph of the whole model cannot look at values.
    if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.shape[1] != 3 or torch.compiler.is_compiling():
        return _UNKNOWN
    height, width = (int(size) + 1 for size in ids[-1, 1:].tolist())
    if height * width != len(ids):
        return _UNKNOWN
    rows, columns = (torch.arange(size, device=ids.device, dtype=ids.dtype) for size in (height, width))
    whole = torch.cartesian_prod(rows[:1], rows, columns)
    return Tokens((1, height, width), before=text) if torch.equal(ids, whole) else _UNKNOWN


# What the model classes whose order of tokens is known say about it. All others: tokens of any order.
TOKENS: dict[str, Callable[[Any, Inputs], Tokens]] = {
    "AllegroTransformer3DModel": _video_then_text,
    "ChromaTransformer2DModel": _flux,
    "ChronoEditTransformer3DModel": _video,
    "CogVideoXTransformer3DModel": _cogvideox,
    "CosmosTransformer3DModel": _video,
    "FluxTransformer2DModel": _flux,
    "HunyuanImageTransformer2DModel": _hunyuan_image,
    "Kandinsky5Transformer3DModel": _kandinsky5,
    "LTXVideoTransformer3DModel": _ltx,
    "LTX2VideoTransformer3DModel": _ltx,
    "MochiTransformer3DModel": _video_then_text,
    "QwenImageTransformer2DModel": _qwen_image,
    "SD3Transformer2DModel": _image_then_text,
    "SkyReelsV2Transformer3DModel": _video,
    "WanAnimateTransformer3DModel": _video,
}

# The same of what takes part besides.
_OTHERS: dict[str, Callable[[Any, Inputs], Tokens]] = {
    "FluxControlNetModel": _flux,
    "QwenImageControlNetModel": _qwen_image,
    "SD3ControlNetModel": _image_then_text,
}

# Attention that is none of one sequence among itself, though it is reached.
_REFUSED = {
    "AnyFlowFARTransformer3DModel": "chunks of the video see only earlier ones",
    "Cosmos3OmniTransformer": "two parts of a sequence attend in two ways, one of them causal",
    "Kandinsky6SRTransformer3DModel": "attention is sparse by itself",
    "MiniMaxMusic3RVQDepthDecoder": "attention is causal",
    "NucleusMoEImageTransformer2DModel": "the image attends to text that does not attend to it",
    "OmniGenTransformer2DModel": "text attends causally, the image to everything",
    "PRXTransformer2DModel": "the image attends to text that does not attend to it",
    "PriorTransformer": "attention is causal",
    "QwenImage21Transformer2DModel": "text attends causally, an image to everything before it",
    "RFD4ProteinaTransformer": "every pair of tokens has a bias",
    "WanAnimate2Transformer3DModel": "each frame sees the reference of the same frame alone",
}


@FAMILIES.register("diffusers")
class Diffusers(DiffusersFamily):
    """Any other transformer of diffusers, bare, wrapped or in a pipeline; see family.Family.

    Self-attention is found by its processor. One that goes through the dispatcher is given a backend; one that calls
    scaled_dot_product_attention by itself (CogVideoX, Mochi, SD3, ...) is answered within its processor, which ends a
    graph of torch.compile. Cross-attention is never touched. What reaches neither (linear attention) is declined.

    Where the order of the tokens is known (TOKENS) they are a video or an image of one frame, with text before or
    after it; else they are bidirectional tokens without a grid, and methods that need one are refused. Steps are
    learnt as for Wan.
    """

    generic: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset({"bidirectional", "video grid"})
    models: ClassVar[str] = (
        "diffusers: any other transformer (LTX, CogVideoX, Mochi, Cosmos, Kandinsky, Flux, Qwen-Image, ...)"
    )

    @staticmethod
    def targets(model: object) -> list[nn.Module] | Decline:
        """The transformers in a module or pipeline, if all have self-attention that can be reached."""
        found = transformers_of_diffusers(model)
        if isinstance(found, Decline):
            return found
        for transformer in found:
            reason = why_not(transformer)
            if reason is not None:
                return Decline(reason)
        # What takes part besides is patched where it can be; what cannot is told by diffusers_pipeline.watch.
        others = [] if isinstance(model, nn.Module) else outermost_models(networks(model).values())
        return list(dict.fromkeys([*found, *(other for other in others if why_not(other) is None)]))

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family and diffusers_install.install.

        Raises:
            MethodDoesNotApply: the method needs a grid and the order of the model's tokens is not known.
        """
        main = transformers_of_diffusers(patch.model)
        for transformer in [] if isinstance(main, Decline) else main:
            if "video grid" in patch.method.needs and _tokens_of(transformer) is None:
                raise MethodDoesNotApply(
                    f"`method` {patch.method.name!r} needs {NEEDS['video grid']}; "
                    f"the order of tokens in {type(transformer).__name__} is not known"
                )
        diffusers_install.install(patch, Diffusers)

    @staticmethod
    def places(transformer: Any) -> Iterable[Place]:
        """See DiffusersFamily."""
        reached = [(path, module, way) for path, module, way in self_attentions(transformer) if way is not None]
        for index, (path, module, way) in enumerate(reached):
            yield Place(path, index, module, way)

    @staticmethod
    def tokens(transformer: Any, inputs: Inputs) -> Tokens:
        """See DiffusersFamily."""
        known = _tokens_of(transformer)
        return _UNKNOWN if known is None else known(transformer.config, inputs)

    @staticmethod
    def text_keys(inputs: Inputs) -> int:
        """See DiffusersFamily."""
        text, own = inputs.get("encoder_hidden_states"), inputs.get("hidden_states")
        return text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 and text is not own else 0

    @staticmethod
    def blocks(transformer: nn.Module) -> Iterable[str]:
        """See DiffusersFamily: not every model hands its layers a rotary tensor."""
        return dict.fromkeys(_block_of(path) for path, _, _ in self_attentions(transformer))

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """An LTX transformer of two layers, two heads of 12, and 5 x 7 x 13 tokens."""
        from diffusers import LTXVideoTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "num_layers": 2}
            model: Any = LTXVideoTransformer3DModel(
                **sizes, attention_head_dim=12, cross_attention_dim=24, caption_channels=16
            )
            inputs = {
                "hidden_states": torch.randn(1, 455, 4),
                "timestep": torch.tensor([500.0]),
                "encoder_hidden_states": torch.randn(1, 12, 16),
                "encoder_attention_mask": torch.ones(1, 12),
                "num_frames": 5,
                "height": 7,
                "width": 13,
            }
        return model.eval(), inputs


def _tokens_of(transformer: object) -> Callable[[Any, Inputs], Tokens] | None:
    name = type(transformer).__name__
    known = TOKENS.get(name) or _OTHERS.get(name)
    # A graph cannot ask what a class is made from.
    if known is None and not torch.compiler.is_compiling():
        known = next((TOKENS[base] for base in names_of(transformer) if base in TOKENS), None)
    return known


def why_not(transformer: nn.Module) -> str | None:
    """Why a transformer cannot be patched, or None."""
    kind = type(transformer).__name__
    refused = next((name for name in names_of(transformer) if name in _REFUSED), None)
    if refused is not None:
        return f"{kind}: {_REFUSED[refused]}"
    found = self_attentions(transformer)
    if not found:
        return f"{kind} has no self-attention with a processor"
    lost = sorted({type(module.processor).__name__ for _, module, way in found if way is None})
    if len(lost) == len({type(module.processor).__name__ for _, module, _ in found}):
        return f"{kind} computes attention by itself, without the dispatcher or PyTorch's function: {', '.join(lost)}"
    return None


def _block_of(path: str) -> str:
    """The part of an attention's path that names its block, the first member of a list; itself where there is none."""
    parts = path.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1])
