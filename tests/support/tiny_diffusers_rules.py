"""How the transformer classes of diffusers are made small: sizes and inputs by the names of their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Text has TEXT tokens of WIDTH numbers, a head 24: it splits over two, three and four rotary axes.
HEADS, HEAD_DIM, TEXT, WIDTH, POOLED, CHANNELS = 2, 24, 9, 16, 8, 4
FRAMES, HEIGHT, WIDE = 3, 10, 14


@dataclass(frozen=True)
class Tiny:
    """What a class needs besides the rules.

    Args:
        sizes: arguments of its constructor; None leaves a default alone.
        inputs: arguments of its forward. A tuple of whole numbers is the shape of a random tensor for one sample, a
            function draws by itself, anything else is given as it is; None leaves the argument out.
        dense: pattern of the names of layers that stay dense: few tokens, or a mask of their own.
        grid: (frames, height, width) in tokens, or None where the order is not known.
        before, after: text tokens of a sequence.
        axes: dimensions of `hidden_states` that are frames, height and width; one dimension where tokens come ready
            made.
        patch: latents of a token in each direction.
    """

    sizes: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, Any] = field(default_factory=dict)
    dense: str = "nothing"
    grid: tuple[int, int, int] | None = None
    before: int = 0
    after: int = 0
    axes: tuple[int, ...] = (2, 3, 4)
    patch: tuple[int, int, int] = (1, 2, 2)


# The first rule whose name matches a parameter of a constructor decides.
SIZES: tuple[tuple[str, Any], ...] = (
    (r"num_(layers|visual_blocks|hidden_layers)|n_layers|.*depth|num_mmdit_layers|mmdit_layers", 2),
    (
        r"num_(single_layers|refiner_layers|single_dit_layers|text_blocks|.*text_layers|.*text_blocks)|n_refiner_layers",
        1,
    ),
    (r"(.*_)?(num_)?(key_value_|kv_)?(attention_)?heads|n_(kv_)?heads|nheads|(.*_)?num_(key_value|kv)_.*heads", HEADS),
    (r"attention_head_dim|head_dim", HEAD_DIM),
    (
        r"hidden_size|dim|model_dim|embed_dim|dit_dim|inner_dim|(caption_projection|cross_attention)_dim",
        HEADS * HEAD_DIM,
    ),
    (r"(in|out|latent)_channels|(in|out)_visual_dim|io_channels|latent_dim", CHANNELS),
    (
        r"text_(embed_|in_|hidden_)?dim|in_text_dim|joint_attention_dim|cap_feat_dim|caption_channels|text_emb_dim",
        WIDTH,
    ),
    (
        r"dit_text_dim|llm_features_dim|context_in_dim|text_encoder_dim|.*cond_dim|cond_token_dim|encoder_hidden_size",
        WIDTH,
    ),
    (r"pooled_projection_dim|in_text_dim2", POOLED),
    (r"(moe_)?(ffn?_|intermediate_|mlp_)(dim|size|hidden_size|inner_dim)|ffn_hidden_size|ff_inner_dim", 40),
    (r"time_(embed_|proj_|step_)?dim|timestep_.*(dim|channels)|time_embed_hidden_dim|condition_dim|adaln_.*dim", 16),
    (r"axes_dims?(_rope)?|rope_axes_dim|axes_dim_rope|rope_dim(_list)?", (8, 8, 8)),
    (r"rope_max_seq_len", 64),
    (r"multiple_of", 8),
    (r"rope_scaling", {"short_factor": [1.0] * (HEAD_DIM // 2), "long_factor": [1.0] * (HEAD_DIM // 2)}),
)


def image_ids(height: int = HEIGHT // 2, width: int = WIDE // 2, axes: int = 3) -> Tensor:
    """(0, row, column) of every token of an image, [height * width, axes], with zeros after them."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).float()
    return torch.nn.functional.pad(ids, (0, axes - 3))


def rotary(tokens: int, dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of `tokens` positions, [tokens, dim] each."""
    angles = torch.outer(torch.arange(tokens).float(), 0.5 ** torch.arange(dim))
    return angles.cos(), angles.sin()


def axial_rotary() -> tuple[Any, Any]:
    """Cosines and sines of each axis of a video, and the positions of its tokens on each, [1, tokens]."""
    sizes = (FRAMES, HEIGHT // 2, WIDE // 2)
    grid = torch.meshgrid(*(torch.arange(n) for n in sizes), indexing="ij")
    tables = tuple(tuple(t.repeat(1, 2) for t in rotary(n, 4)) for n in sizes)
    return tables, tuple(axis.reshape(1, -1) for axis in grid)


def position_ids() -> Tensor:
    """(0, row, column) of text, then of an image, [tokens, 3]."""
    return torch.cat([torch.zeros(TEXT, 3), image_ids()])


INPUTS: dict[str, Any] = {
    "timestep": torch.tensor([500.0]),
    "encoder_hidden_states": (TEXT, WIDTH),
    "pooled_projections": (POOLED,),
    "img_ids": image_ids(),
    "txt_ids": torch.zeros(TEXT, 3),
    "encoder_attention_mask": torch.ones(1, TEXT),
    "encoder_hidden_states_mask": torch.ones(1, TEXT).long(),
    "txt_seq_lens": [TEXT],
    "num_frames": FRAMES,
    "height": HEIGHT // 2,
    "width": WIDE // 2,
    "original_size": torch.tensor([[HEIGHT, WIDE]]),
    "target_size": torch.tensor([[HEIGHT, WIDE]]),
    "crop_coords": torch.tensor([[0, 0]]),
}
