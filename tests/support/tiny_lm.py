"""Tiny random language models, one of each kind of attention that transformers decoders have, and their inputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

VOCAB = 97
WINDOW = 16

_SIZES: dict[str, Any] = dict(
    vocab_size=VOCAB,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=2048,
    # Large enough that attention is far from uniform: with the usual 0.02 every mask would give nearly the same.
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_MIXED = ["sliding_attention", "full_attention"]


def _build(config: str, model: str, **extra: Any) -> Callable[..., Any]:
    def build(implementation: str | None = None, **changes: Any) -> Any:
        import transformers

        sizes = {**_SIZES, **extra, **changes}
        made = getattr(transformers, config)(**sizes)
        made._attn_implementation = implementation
        # The grouped matrix product of mixture models takes no float64, in which tolerances are derived.
        made._experts_implementation = "eager"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            built = getattr(transformers, model)(made).eval()
            for name, weight in built.named_parameters():
                if name.endswith("sinks"):
                    torch.nn.init.normal_(weight, std=2.0)
        # Random models end texts at random places; generation is compared over all the tokens asked for.
        built.generation_config.eos_token_id = None
        return built

    return build


_YARN_OFF = dict(rope_parameters={"rope_type": "default", "rope_theta": 10000.0})

# name -> builder(implementation=None, **config changes) of a causal language model. Gemma's factor on the logits is
# not head_dim ** -0.5 here, so that a factor that got lost shows.
FAMILIES: dict[str, Callable[..., Any]] = {
    "llama": _build("LlamaConfig", "LlamaForCausalLM"),
    "mistral": _build("MistralConfig", "MistralForCausalLM", sliding_window=WINDOW),
    "qwen2": _build("Qwen2Config", "Qwen2ForCausalLM"),
    "qwen3": _build("Qwen3Config", "Qwen3ForCausalLM"),
    "gemma2": _build(
        "Gemma2Config", "Gemma2ForCausalLM", sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=24
    ),
    "gemma3": _build(
        "Gemma3TextConfig", "Gemma3ForCausalLM", sliding_window=WINDOW, layer_types=_MIXED, query_pre_attn_scalar=24
    ),
    "gpt_oss": _build(
        "GptOssConfig",
        "GptOssForCausalLM",
        sliding_window=WINDOW,
        layer_types=_MIXED,
        num_local_experts=2,
        num_experts_per_tok=1,
        **_YARN_OFF,
    ),
    "phi3": _build("Phi3Config", "Phi3ForCausalLM"),
}
# Their classes refuse "sdpa": it has neither a soft cap nor sinks.
EAGER_ONLY = frozenset({"gemma2", "gpt_oss"})


def tokens(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    """Random token ids, none of them special."""
    return torch.randint(3, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(lengths: list[int], side: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A batch of mixed lengths padded on one side: ids, mask, and the single texts [1, length]."""
    singles = [tokens(1, n, seed + i) for i, n in enumerate(lengths)]
    ids = torch.zeros(len(lengths), max(lengths), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, single in enumerate(singles):
        n = single.shape[1]
        place = slice(max(lengths) - n, None) if side == "left" else slice(0, n)
        ids[row, place], mask[row, place] = single[0], 1
    return ids, mask, singles


def positions(mask: torch.Tensor) -> torch.Tensor:
    """Position ids that number the valid tokens of every row from 0."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def tiny_vl(implementation: str) -> tuple[Any, dict[str, Any]]:
    """A Qwen2.5-VL of two layers each, and a text with a video of 2 x 8 x 12 patches in it."""
    import transformers as T

    sizes = dict(hidden_size=32, intermediate_size=48)
    text = dict(vocab_size=97, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, **sizes)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = dict(depth=2, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=32)
    config = T.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope},
        vision_config={**vision, **sizes, "window_size": 16, "fullatt_block_indexes": [1]},
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    config._attn_implementation = implementation
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = T.Qwen2_5_VLForConditionalGeneration(config).eval()
    video = torch.full((1, 2 * 8 * 12 // 4), 91)
    ids = torch.cat([tokens(1, 9) % 90, torch.tensor([[92]]), video, torch.tensor([[93]]), tokens(1, 11) % 90], 1)
    return model, dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == 91).int() * 2,
        pixel_values_videos=torch.randn(2 * 8 * 12, 96, generator=torch.Generator().manual_seed(0)),
        video_grid_thw=torch.tensor([[2, 8, 12]]),
    )


def mask_spec(function: Any = None, q: int = 20, kv: int = 20, q_offset: int = 0, kv_offset: int = 0,
              padding: torch.Tensor | None = None, batch: int = 2) -> Any:  # fmt: skip
    """What transformers asks a mask for, causal where no `function` is given."""
    from transformers import masking_utils

    from hf_sparse_attn.hosts.transformers_mask import MaskSpec

    function = masking_utils.causal_mask_function if function is None else function
    return MaskSpec(
        "sdpa",
        dict(
            batch_size=batch, q_length=q, kv_length=kv, q_offset=q_offset, kv_offset=kv_offset, mask_function=function,
            attention_mask=padding, device="cpu", dtype=torch.float32, allow_is_causal_skip=False,
        ),
    )  # fmt: skip
