"""Tiny models of transformers that select their own keys, one of every class, with weights that make it matter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

# Fewer index heads leave many scores at exactly 0, and which of them are taken depends on the number of keys.
_INDEX = {"index_n_heads": 16, "index_head_dim": 16, "index_topk": 12}
_COMMON = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "moe_intermediate_size": 32,
    "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "q_lora_rank": 24, "kv_lora_rank": 20, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10,
    "max_position_embeddings": 32768, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None, **_INDEX,
}  # fmt: skip


def _text(name: str, **sizes: Any) -> nn.Module:
    kind: Any = getattr(transformers, f"{name}ForCausalLM")
    model: nn.Module = kind(kind.config_class(**{**_COMMON, **sizes}))
    return model


def _deepseek_v32(**sizes: Any) -> nn.Module:
    return _text("DeepseekV32", **{"num_hidden_layers": 3, "n_group": 2, "topk_group": 1, **sizes})


def _glm_moe_dsa(**sizes: Any) -> nn.Module:
    roles = {"num_hidden_layers": 5, "index_topk_freq": 2, "index_skip_topk_offset": 1}
    return _text("GlmMoeDsa", **{**roles, **sizes})


def _hy_v4(**sizes: Any) -> nn.Module:
    return _text("HYV4", **{"num_hidden_layers": 4, **sizes})


def _axk2(**sizes: Any) -> nn.Module:
    return _text("AXK2", **{"num_hidden_layers": 3, "gated_norm_rank": 4, **sizes})


def _dots3_note(**sizes: Any) -> nn.Module:
    # Layers 0 and 1 select keys, 2 to 4 see a window, 5 selects again.
    sliding = {
        "sliding_window": 9, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 20,
        "swa_qk_nope_head_dim": 12, "swa_qk_rope_head_dim": 8, "swa_v_head_dim": 10, "swa_q_lora_rank": 24,
        "swa_kv_lora_rank": 20,
    }  # fmt: skip
    return _text("Dots3Note", **{"num_hidden_layers": 6, **sliding, **sizes})


def _mistral_large4(**sizes: Any) -> nn.Module:
    # Layer 2 takes over the selection of layer 1, layer 3 the keys of layer 1 as well.
    text = {
        **{k: v for k, v in _COMMON.items() if k != "q_lora_rank"}, "num_hidden_layers": 5,
        "indexer_types": ["full", "full", "shared", "shared", "full"], "no_rope_layers": [1, 1, 1, 1, 0],
        "kv_source_layers": [0, 1, 2, 1, 4], **sizes,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    config = transformers.MistralLarge4Config(text_config=text, vision_config=vision, image_token_index=3)
    return transformers.MistralLarge4ForConditionalGeneration(config)


_MODELS: dict[str, Callable[..., nn.Module]] = {
    "deepseek_v32": _deepseek_v32,
    "glm_moe_dsa": _glm_moe_dsa,
    "hy_v4": _hy_v4,
    "mistral_large4": _mistral_large4,
    "axk2": _axk2,
    "dots3_note": _dots3_note,
}
# Those that the transformers installed here has.
NAMES = [name for name in _MODELS if hasattr(transformers.models, name)]


def build(name: str, implementation: str = "eager", seed: int = 0, **sizes: Any) -> Any:
    """A tiny model, seeded.

    Args:
        name: one of NAMES.
        implementation: of its attention.
        seed: of its weights.
        sizes: of its configuration, besides the common ones.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = _MODELS[name](**sizes)
        _stir(model)
    model.set_attn_implementation(implementation)
    return model.eval()


def _stir(model: nn.Module) -> None:
    """Weights with which attention is far from uniform, and biases, sinks and scales that are no identity."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim > 1:
                p.normal_(0, (1.0 if "embed" in name else 1.3) * p.shape[-1] ** -0.5 if "embed" not in name else 1.0)
            elif name.endswith("sinks"):
                p.normal_()
            else:
                p.add_(torch.randn_like(p) * 0.2)


def ids(tokens: int, batch: int = 1, seed: int = 0) -> Tensor:
    """Token ids [batch, tokens], none of them special."""
    return torch.randint(4, 96, (batch, tokens), generator=torch.Generator().manual_seed(seed))
