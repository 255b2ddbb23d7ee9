"""Tiny random Qwen-VL models of every kind, and prompts with images and videos in them, without a processor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
VOCAB, IMAGE, VIDEO, BEGIN, END = 97, 90, 91, 92, 93
# Patches of 4 x 4 pixels in 2 frames of 3 colours, 2 x 2 of which are one token.
PIXELS, MERGE = 3 * 2 * 4 * 4, 2

_CLASSES = {
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration"),
    "qwen2_5_vl": ("Qwen2_5_VLConfig", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3_vl": ("Qwen3VLConfig", "Qwen3VLForConditionalGeneration"),
    "qwen3_vl_moe": ("Qwen3VLMoeConfig", "Qwen3VLMoeForConditionalGeneration"),
}
# Windows of 2 x 2 tokens; only the last layer sees whole frames.
_VISION = {
    "qwen2_vl": {"embed_dim": 32, "hidden_size": 32, "mlp_ratio": 2},
    "qwen2_5_vl": {"window_size": 16, "fullatt_block_indexes": [1], "tokens_per_second": 3},
    "qwen3_vl": {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]},
}
_VISION["qwen3_vl_moe"] = _VISION["qwen3_vl"]


def tiny_qwen(kind: str, implementation: str | None = "sdpa", **text_changes: Any) -> Any:
    """A model of two text and two vision layers whose attention is far from uniform."""
    import transformers

    config_name, model_name = _CLASSES[kind]
    sizes: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, initializer_range=0.2)
    text: dict[str, Any] = dict(
        **sizes, vocab_size=VOCAB, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=4096, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    )  # fmt: skip
    if kind == "qwen3_vl_moe":
        text.update(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    vision: dict[str, Any] = dict(
        depth=2, num_heads=4, patch_size=4, spatial_merge_size=MERGE, temporal_patch_size=2, initializer_range=0.2
    )
    if kind != "qwen2_vl":
        vision.update(hidden_size=32, intermediate_size=48, out_hidden_size=32)
    config = getattr(transformers, config_name)(
        text_config={**text, **text_changes},
        vision_config={**vision, **_VISION[kind]},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=BEGIN,
        vision_end_token_id=END,
    )
    config._attn_implementation = implementation
    # The grouped matrix product of mixture models takes no float64, in which tolerances are derived.
    config._experts_implementation = config.text_config._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(config).eval()
    model.generation_config.eos_token_id = None
    return model


def prompt(kind: str, pieces: list[int | tuple[int, ...]], seed: int = 0) -> dict[str, Any]:
    """Inputs of one row.

    Args:
        kind: of the model; Qwen3 puts timestamps before every frame.
        pieces: in order, a number of text tokens, or an image (height, width) or video (frames, height, width) in
            tokens.
        seed: of texts and pixels.
    """
    draw = torch.Generator().manual_seed(seed)

    def text(n: int) -> list[int]:
        return torch.randint(3, IMAGE, (n,), generator=draw).tolist()

    ids: list[int] = []
    grids: dict[str, list[list[int]]] = {"image": [], "video": []}
    for piece in pieces:
        if isinstance(piece, int):
            ids += text(piece)
            continue
        name, token = ("image", IMAGE) if len(piece) == 2 else ("video", VIDEO)
        frames, height, width = (1, *piece) if len(piece) == 2 else piece
        grids[name].append([frames, height * MERGE, width * MERGE])
        if name == "video" and kind.startswith("qwen3"):
            for _ in range(frames):
                ids += [*text(2), BEGIN, *[token] * (height * width), END]
        else:
            ids += [BEGIN, *[token] * (frames * height * width), END]
    row = torch.tensor([ids])
    kinds = (row == IMAGE).int() + (row == VIDEO).int() * 2
    inputs: dict[str, Any] = dict(input_ids=row, attention_mask=torch.ones_like(row), mm_token_type_ids=kinds)
    for name, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        if grids[name]:
            grid = torch.tensor(grids[name])
            inputs[pixels] = torch.randn(int(grid.prod(1).sum()), PIXELS, generator=draw)
            inputs[f"{name}_grid_thw"] = grid
    return inputs


def left_padded(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """One batch of several prompts."""
    longest = max(row["input_ids"].shape[1] for row in rows)

    def pad(t: Tensor) -> Tensor:
        return torch.nn.functional.pad(t, (longest - t.shape[1], 0))

    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    batch: dict[str, Any] = {name: torch.cat([pad(row[name]) for row in rows]) for name in names}
    for name in ("pixel_values", "pixel_values_videos", "image_grid_thw", "video_grid_thw"):
        given = [row[name] for row in rows if name in row]
        if given:
            batch[name] = torch.cat(given)
    return batch
