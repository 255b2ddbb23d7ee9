"""Tiny models of transformers that select blocks, pools or entries of keys, with weights that make it matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_COMMON = {
    "vocab_size": 96, "hidden_size": 48, "num_attention_heads": 4, "moe_intermediate_size": 24,
    "num_experts_per_tok": 2, "max_position_embeddings": 32768, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


def _minimax_m3_vl(**sizes: Any) -> nn.Module:
    # Layer 1 reads all keys.
    layers = ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"]
    common = {k: v for k, v in _COMMON.items() if k != "moe_intermediate_size"}
    text = {
        **common, "num_hidden_layers": 3, "layer_types": layers, "num_key_value_heads": 2, "head_dim": 16,
        "rotary_dim": 8, "index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 3,
        "intermediate_size": 24, "dense_intermediate_size": 48, "shared_intermediate_size": 24,
        "num_local_experts": 4, "rope_parameters": _ROPE, **sizes,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28,
    }  # fmt: skip
    config = transformers.MiniMaxM3VLConfig(
        text_config=text, vision_config=vision, image_token_index=94, video_token_index=95, projector_hidden_size=48
    )
    return transformers.MiniMaxM3SparseForConditionalGeneration(config)


def _deepseek_v4(**sizes: Any) -> nn.Module:
    layers = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    text = {
        **_COMMON, "num_hidden_layers": 3, "layer_types": layers, "mlp_layer_types": ["moe"] * 3, "head_dim": 16,
        "num_key_value_heads": 1, "q_lora_rank": 24, "n_routed_experts": 4, "n_shared_experts": 1,
        "compress_rates": {layers[1]: 4, layers[2]: 8}, "sliding_window": 7, "o_groups": 2, "o_lora_rank": 12,
        "index_n_heads": 16, "index_head_dim": 12, "index_topk": 3, "hc_mult": 2, **sizes,
    }  # fmt: skip
    return transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**text))


def _glm5_next(**sizes: Any) -> nn.Module:
    # The last layer takes over the selection of the one before it.
    text = {
        **_COMMON, "num_hidden_layers": 4, "intermediate_size": 48, "num_key_value_heads": 4, "n_routed_experts": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention", "full_attention"],
        "indexer_types": ["full", "full", "full", "shared"], "mlp_layer_types": ["dense"] * 4, "kv_lora_rank": 20,
        "q_lora_rank": 24, "v_head_dim": 10, "qk_nope_head_dim": 12, "index_n_heads": 16, "index_head_dim": 12,
        "index_kpool": 4, "index_topk": 12, "linear_head_dim": 12, "linear_num_heads": 4, "hc_mult": 2, **sizes,
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 48,
        "projection_intermediate_size": 16,
    }  # fmt: skip
    places = ("image", "video", "image_start", "image_end", "video_start", "video_end")
    tokens = {f"{name}_token_id": 95 - i for i, name in enumerate(places)}
    config = transformers.Glm5NextConfig(text_config=text, vision_config=vision, **tokens)
    return transformers.Glm5NextForConditionalGeneration(config)


def _qwen4_exp(**sizes: Any) -> nn.Module:
    text = {
        **_COMMON, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 4,
        "layer_types": ["full_attention", "linear_attention", "full_attention"],
        "shared_expert_intermediate_size": 24, "linear_key_head_dim": 12, "linear_value_head_dim": 12,
        "linear_num_key_heads": 2, "linear_num_value_heads": 4, "hc_count": 2, "hc_lowrank": 8,
        "indexer_n_heads": 16, "indexer_kv_heads": 1, "indexer_head_dim": 12, "indexer_budget": 12,
        "indexer_compress_ratio": 4, **sizes,
        "rope_parameters": {**_ROPE, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
    }  # fmt: skip
    return transformers.Qwen4ExpForCausalLM(transformers.Qwen4ExpTextConfig(**text))


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "minimax_m3_vl": _minimax_m3_vl,
    "deepseek_v4": _deepseek_v4,
    "glm5_next": _glm5_next,
    "qwen4_exp": _qwen4_exp,
}
# Those that the transformers installed here has.
NAMES = [name for name in _MODELS if hasattr(transformers.models, name)]


def build(name: str, implementation: str = "eager", **sizes: Any) -> Any:
    """A tiny model, seeded.

    Args:
        name: one of NAMES.
        implementation: of its attention.
        sizes: of the configuration of its text model, besides the common ones.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model: Any = _MODELS[name](**sizes)
        for key, p in model.named_parameters():
            if "A_log" in key or "dt_bias" in key or "hc" in key:
                continue
            if p.ndim > 1 and "position_bias" not in key and "_ape" not in key:
                p.normal_(0, 1.0 if "embed" in key else 1.2 * p.shape[-1] ** -0.5)
            else:
                p.add_(torch.randn_like(p) * (1.0 if key.endswith("sinks") else 0.2))
    model.set_attn_implementation(implementation)
    return model.eval()


def ids(tokens: int, batch: int = 1) -> Tensor:
    """Token ids [batch, tokens], none of them special."""
    return torch.randint(4, 88, (batch, tokens), generator=torch.Generator().manual_seed(0))


def text(model: Any) -> Any:
    """The decoder within a model."""
    return getattr(model.model, "language_model", model.model)


def selecting(model: Any) -> list[Any]:
    """The attention modules that the patch reaches."""
    found = (getattr(layer, "self_attn", None) for layer in text(model).layers)
    return [module for module in found if hasattr(module, "scaling")]
