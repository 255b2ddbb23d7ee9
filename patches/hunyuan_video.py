"""HunyuanVideo: joint attention of video and text, reached through the attention dispatcher of diffusers."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_attn.hosts import diffusers_install
from hf_sparse_attn.hosts.diffusers_model import DiffusersFamily, Place, Tokens, find_transformers
from hf_sparse_attn.hosts.padding import key_padding
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES
from hf_sparse_attn.session import Session

_FILES = "diffusers.models.transformers.transformer_"
_CLASSES = {
    f"{_FILES}hunyuan_video": "HunyuanVideoTransformer3DModel",
    f"{_FILES}hunyuan_video_framepack": "HunyuanVideoFramepackTransformer3DModel",
    f"{_FILES}hunyuan_video15": "HunyuanVideo15Transformer3DModel",
}
_SQUARE_MASK = "HunyuanVideo15AttnProcessor2_0"
# Strides (frames, height, width) of FramePack's embedding of its history, and whether it pads the end to a whole one.
_HISTORY = {
    "latents_clean": ((1, 2, 2), False),
    "latents_history_2x": ((2, 4, 4), True),
    "latents_history_4x": ((4, 8, 8), True),
}


@FAMILIES.register("hunyuan_video")
class HunyuanVideo(DiffusersFamily):
    """HunyuanVideo transformers of diffusers, bare, wrapped (PEFT, torch.compile) or in a pipeline; see family.Family.

    A sequence is the video in raster order and then its text (in 1.5: image, glyphs and text; in FramePack the frames
    of its history come before the video). Text and history are condition: every method keeps their rows and columns.

    Padded text is cut away instead of masked, in dense calls too: exact for all other tokens, and 1.5 makes no mask
    of tokens x tokens then. Each row of a batch is cut to its own length, so that cond and uncond in one batch give
    what two calls give. Only with the method "dense" nothing is cut: it gives the bits of the unpatched model.

    Steps and guidance branches are learnt as for Wan (patches/wan.py); FramePack counts its steps anew in every
    section.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"bidirectional", "video grid"})
    models: ClassVar[str] = "diffusers: HunyuanVideo (text, image to video), SkyReels V1, FramePack, HunyuanVideo 1.5"

    @staticmethod
    def targets(model: object) -> list[nn.Module] | Decline:
        """The HunyuanVideo transformers in a module or pipeline."""
        return find_transformers(model, _CLASSES)

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family and diffusers_install.install."""
        diffusers_install.install(patch, HunyuanVideo)

    @staticmethod
    def places(transformer: Any) -> Iterable[Place]:
        """See DiffusersFamily."""
        index = 0
        for name in ("transformer_blocks", "single_transformer_blocks"):
            for number, block in enumerate(getattr(transformer, name, ())):
                yield Place(f"{name}.{number}.attn", index, block.attn)
                index += 1

    @staticmethod
    def tokens(transformer: Any, inputs: Mapping[str, Any]) -> Tokens:
        """See DiffusersFamily."""
        config = transformer.config
        patch = (config.patch_size_t, config.patch_size, config.patch_size)
        history = 0
        for name, (stride, padded) in _HISTORY.items():
            given = inputs.get(name)
            if given is not None and inputs.get(f"indices_{name}") is not None:
                history += math.prod(_grid(given, stride, padded))
        return Tokens(_grid(inputs["hidden_states"], patch), before=history, after=None)

    @staticmethod
    def stand_in(processor: Any, backend: Any, session: Session) -> Any | None:
        """See DiffusersFamily."""
        if type(processor).__name__ != _SQUARE_MASK or session.method.name == "dense":
            return None
        return _no_square_mask()(processor, backend, session)

    @staticmethod
    def valid(mask: Tensor, batch: int, tokens: int) -> Tensor | Decline:
        """See DiffusersFamily; a mask [batch, text] is that of the text at the end."""
        return _of_text(mask, tokens) if mask.ndim == 2 else key_padding(mask, batch, tokens)

    @staticmethod
    def dense_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
        """See DiffusersFamily."""
        if mask is None or mask.ndim != 2:
            return mask
        keys = _of_text(mask, tokens)[:, None, None, :]
        return keys & keys.mT

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """One layer of each kind, two heads of 12, latents of 5 x 7 x 13 tokens, and text of 7 in 12 places."""
        from diffusers import HunyuanVideoTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes: dict[str, Any] = {
                "in_channels": 4,
                "out_channels": 4,
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 1,
                "num_single_layers": 1,
                "num_refiner_layers": 1,
                "text_embed_dim": 16,
                "pooled_projection_dim": 8,
                "rope_axes_dim": (4, 4, 4),
            }
            model: Any = HunyuanVideoTransformer3DModel(**sizes)
            inputs = {
                "hidden_states": torch.randn(1, 4, 5, 14, 26),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 12, 16),
                "encoder_attention_mask": torch.arange(12)[None] < 7,
                "pooled_projections": torch.randn(1, 8),
                "guidance": torch.tensor([6000.0]),
            }
        return model.eval(), inputs


def _of_text(mask: Tensor, tokens: int) -> Tensor:
    """Valid tokens, bool [batch, tokens], from those of the text at the end."""
    return nn.functional.pad(mask.bool(), (tokens - mask.shape[1], 0), value=True)


def _grid(latents: Tensor, stride: tuple[int, int, int], padded: bool = False) -> tuple[int, int, int]:
    """How many patches latents [..., frames, height, width] have in each direction."""
    frames, height, width = (
        -(-size // step) if padded else size // step for size, step in zip(latents.shape[-3:], stride, strict=True)
    )
    return frames, height, width


@lru_cache(maxsize=1)
def _no_square_mask() -> type[Any]:
    """The processor that stands in for the one of 1.5; made at first use, as it needs diffusers."""
    from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

    class NoSquareMask(HunyuanVideoAttnProcessor2_0):
        """Attention of 1.5 that hands on the mask of the text [batch, text] as it is.

        Its own processor makes a mask of tokens x tokens of it in every layer; all else is as in the first version,
        whose processor this is.
        """

        def __init__(self, original: Any, member: Any, session: Session) -> None:
            super().__init__()
            self.original, self.member, self.session = original, member, session
            self.__dict__.update(original.__dict__)
            self._attention_backend = member

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return copy.deepcopy(self.original, memo)

        def __call__(
            self,
            attn: Any,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor | None = None,
            attention_mask: Tensor | None = None,
            image_rotary_emb: Any = None,
        ) -> Any:
            given = hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb
            if self._attention_backend is self.member and self.session.paused:
                return self.original(attn, *given)
            if self._attention_backend is self.member:
                return super().__call__(attn, *given)
            # Another backend was set: it knows only masks as the original makes them.
            own = copy.copy(self.original)
            own._attention_backend, own._parallel_config = self._attention_backend, self._parallel_config
            return own(attn, *given)

    return NoSquareMask
