"""Family encoder: transformers models whose attention sees both ways, and encoder-decoders, on the interface."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from hf_sparse_attn.family import pretrained_models, tiny_text
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES


@FAMILIES.register("encoder")
class Encoder:
    """BERT, ModernBERT, ViT, DINOv2, SigLIP, CLIP, Wav2Vec2, and in encoder-decoders both sides (BART, Whisper).

    Every self-attention of such a model is patched, and each call is taken for what it is: a bidirectional mask (or
    none where the module says that it sees both ways) is a bidirectional layout, a causal one (decoders, the text of
    CLIP) a causal layout. Cross-attention is never touched. Padding on either side is cut away as for decoders; a
    window of the model's own (ModernBERT) stays its own. Bias that comes with the call, as an argument or as a mask
    tensor, is no pattern: such calls stay dense and say so, and models of nothing else are declined.

    Where one convolution cuts images or video into patches, its output is the grid: the tokens are then a video with
    the class and register tokens as text before it. Everything else is text.

    A decoder alone, and the decoder of a model of images and text, is of the family llama; its vision tower can be
    patched by itself.
    """

    # What another family knows goes before.
    generic: ClassVar[bool] = True
    provides: ClassVar[frozenset[str]] = frozenset({"bidirectional", "causal", "video grid"})
    models: ClassVar[str] = (
        "transformers encoders and encoder-decoders on the attention interface (BERT, ModernBERT, ViT, CLIP, Whisper, "
        "BART, ...)"
    )

    @staticmethod
    def targets(model: Any) -> list[nn.Module] | Decline:
        """The innermost transformers models that own self-attention, and those that cut their images into patches."""
        inner = pretrained_models(model)
        if not inner:
            return Decline("not a transformers model")
        from hf_sparse_attn.hosts.transformers_encoder import has_bias, image_model, is_any_attention
        from hf_sparse_attn.hosts.transformers_hook import is_text_attention
        from hf_sparse_attn.hosts.transformers_install import attention_modules

        found = [entry for part in inner for entry in attention_modules(part, is_any_attention)]
        both_sides = any(getattr(m.config, "is_encoder_decoder", False) for m in inner)
        if not both_sides and any(is_text_attention(module) for _, module, _ in found):
            return Decline("its decoder is for the family llama; give an encoder within it by itself")
        owners = list(dict.fromkeys(owner for _, _, owner in found))
        if not owners:
            return Decline("no bidirectional self-attention that goes through the attention interface of transformers")
        if all(has_bias(module) for _, module, _ in found):
            return Decline("attention adds a position bias to its logits, which no method here can")
        for owner in owners:
            if not type(owner)._can_set_attn_implementation():
                return Decline(f"{type(owner).__name__} does not let its attention implementation be set")
        towers = [image_model(owner, inner) for owner in owners]
        return list(dict.fromkeys(m for m in (*owners, *towers) if m is not None))

    @staticmethod
    def provided(modules: list[nn.Module]) -> frozenset[str]:
        """The layouts that calls of these models have."""
        from hf_sparse_attn.hosts.transformers_encoder import patch_embedding, reads_causally
        from hf_sparse_attn.hosts.transformers_hook import is_text_attention

        found = set()
        for owner in modules:
            causal = reads_causally(owner)
            found |= {"causal" if causal or is_text_attention(m) else "bidirectional" for m in _own(owner)}
            if patch_embedding(owner) is not None:
                found.add("video grid")
        return frozenset(found)

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family."""
        from hf_sparse_attn.hosts.transformers_encoder import (
            image_model,
            is_any_attention,
            other_tokens,
            patch_embedding,
            watch_grid,
            watch_source,
        )
        from hf_sparse_attn.hosts.transformers_install import install_text

        models: list[Any] = patch.modules
        hints: dict[Any, Any] = {}
        for model in models:
            if patch_embedding(model) is not None:
                hints[model] = watch_grid(patch, model)

        def known(module: nn.Module, owner: Any) -> dict[str, Any]:
            more: dict[str, Any] = {"hints": hints.get(image_model(owner, models))}
            if other_tokens(module):
                more["source"] = watch_source(patch, module)
            return more

        many = len([model for model in models if _own(model)]) > 1
        install_text(patch, [(f"{type(m).__name__}." if many else "", m) for m in models], is_any_attention, known)

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A two-layer BERT and 111 tokens."""
        from transformers import BertModel

        return tiny_text(BertModel, max_position_embeddings=256)


def _own(model: nn.Module) -> list[nn.Module]:
    """The attention modules of which a model is the innermost that holds them."""
    from hf_sparse_attn.hosts.transformers_encoder import is_any_attention
    from hf_sparse_attn.hosts.transformers_install import attention_modules

    return [module for _, module, owner in attention_modules(model, is_any_attention) if owner is model]
