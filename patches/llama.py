"""Family llama: every transformers decoder whose attention goes through the attention interface."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from torch import nn

from hf_sparse_attn.family import has_class, pretrained_models, tiny_text
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES

# Models of images and text whose decoder's tokens are more than text: the family that knows which takes them.
_OF_QWEN_VL = frozenset({"Qwen2VLModel", "Qwen2_5_VLModel", "Qwen3VLModel", "Qwen3VLMoeModel"})


@FAMILIES.register("llama")
class Llama:
    """Llama, Mistral, Qwen, Gemma, Phi, gpt_oss and their like; in a model of images and text, its text decoder."""

    has_steps: ClassVar[bool] = False
    provides: ClassVar[frozenset[str]] = frozenset({"causal"})
    reads: ClassVar[frozenset[str]] = frozenset({"hidden", "q", "k"})
    models: ClassVar[str] = "transformers decoders on the attention interface (Llama, Mistral, Qwen2/3, Gemma2/3, ...)"

    @staticmethod
    def targets(model: Any) -> list[nn.Module] | Decline:
        """The decoders inside a model: the innermost transformers models that own text attention."""
        inner = pretrained_models(model)
        if not inner:
            return Decline("not a transformers model")
        if any(has_class(m, _OF_QWEN_VL) for m in inner):
            return Decline("Qwen-VL models are of the family qwen_vl")
        if any(getattr(m.config, "is_encoder_decoder", False) for m in inner):
            return Decline("encoder-decoder models are of the family encoder")
        from hf_sparse_attn.hosts.natively_sparse_kind import is_sparse_by_itself
        from hf_sparse_attn.hosts.transformers_install import attention_modules

        found = [entry for part in inner for entry in attention_modules(part)]
        owners = list(dict.fromkeys(owner for _, _, owner in found))
        if not owners:
            return Decline("no causal self-attention that goes through the attention interface of transformers")
        for owner in owners:
            config: Any = owner.config
            if is_sparse_by_itself(config) or any(type(m).__name__.endswith("Indexer") for m in owner.modules()):
                return Decline(f"attention of {config.model_type} is sparse by itself")
            if not type(owner)._can_set_attn_implementation():
                return Decline(f"{type(owner).__name__} does not let its attention implementation be set")
        if all(_has_bias(module) for _, module, _ in found):
            return Decline("attention adds a position bias to its logits, which no method here can")
        return owners

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family."""
        from hf_sparse_attn.hosts.transformers_install import install_text

        many = len(patch.modules) > 1
        install_text(patch, [(f"{type(owner).__name__}." if many else "", owner) for owner in patch.modules])

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A two-layer Llama with grouped heads and 111 tokens."""
        from transformers import LlamaForCausalLM

        return tiny_text(LlamaForCausalLM, num_key_value_heads=2, max_position_embeddings=4096)


def _has_bias(module: nn.Module) -> bool:
    code = inspect.unwrap(type(module).forward).__code__
    return "position_bias" in code.co_varnames
