"""Family natively_sparse: decoders of transformers that were trained to select their own keys."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from hf_sparse_attn.family import pretrained_models, tiny_text
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.presets import QUALITIES, Preset
from hf_sparse_attn.registry import FAMILIES


@FAMILIES.register("natively_sparse")
class NativelySparse:
    """DeepSeek-V3.2, GLM-5, MiniMax M3 and their like, whose layers choose; of models of images, the decoder.

    They take the method `native` alone: what to read was trained into them, and another choice would lose it.
    """

    has_steps: ClassVar[bool] = False
    provides: ClassVar[frozenset[str]] = frozenset({"own selection"})
    requires: ClassVar[frozenset[str]] = frozenset({"own selection"})
    presets: ClassVar[tuple[Preset, ...]] = tuple(
        Preset("native", quality, "what the model was trained to read, at any quality") for quality in QUALITIES
    )
    models: ClassVar[str] = (
        "transformers decoders that select their own keys (DeepSeek-V3.2, GLM-5, HunYuan V4, Mistral Large 4, A.X K2, "
        "dots3.note, MiniMax M3, DeepSeek-V4, GLM 5.3, Qwen 4)"
    )

    @staticmethod
    def targets(model: Any) -> list[nn.Module] | Decline:
        """The decoders inside a model: the innermost transformers models whose text attention selects its keys."""
        inner = pretrained_models(model)
        if not inner:
            return Decline("not a transformers model")
        from hf_sparse_attn.hosts.natively_sparse_install import kind_of, why_not
        from hf_sparse_attn.hosts.transformers_install import attention_modules

        found = [owner for part in inner for _, _, owner in attention_modules(part)]
        owners = [owner for owner in dict.fromkeys(found) if kind_of(owner) is not None]
        if not owners:
            return Decline("no decoder that selects its own keys in a way that is known here")
        for owner in owners:
            why = why_not(owner)
            if why is not None:
                return Decline(f"the indexer of {type(owner).__name__} is not as it is known here: {why}")
        return owners

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family."""
        from hf_sparse_attn.hosts.natively_sparse_install import install_selecting

        if patch.session.backend != "auto":
            raise ValueError(
                f'`backend` must be "auto" for a model that selects its own keys, got {patch.session.backend!r}'
            )
        many = len(patch.modules) > 1
        install_selecting(patch, [(f"{type(owner).__name__}." if many else "", owner) for owner in patch.modules])

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A two-layer DeepSeek-V3.2 that reads 16 keys, and 111 tokens."""
        from transformers import DeepseekV32ForCausalLM

        return tiny_text(
            DeepseekV32ForCausalLM, num_key_value_heads=4, n_routed_experts=8, num_experts_per_tok=2, n_group=2,
            topk_group=1, moe_intermediate_size=32, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16,
            qk_rope_head_dim=8, v_head_dim=16, index_n_heads=16, index_head_dim=16, index_topk=16,
            max_position_embeddings=4096,
        )  # fmt: skip
