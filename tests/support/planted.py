"""Real tiny models whose heads attend as they are told: queries and keys are planted under the rotary embedding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

DIM, BLOCK = 64, 16


class Planted(nn.Module):
    """In place of a projection: gives the same queries or keys whatever comes in."""

    def __init__(self, planted: Tensor) -> None:
        super().__init__()
        self.register_buffer("planted", planted.transpose(0, 1).flatten(1)[None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.planted.expand(x.shape[0], -1, -1)


def codes(index: Tensor) -> Tensor:
    """A random unit vector for every number, [tokens, DIM]."""
    table = torch.randn(int(index.max()) + 1, DIM, generator=torch.Generator().manual_seed(7))
    return nn.functional.normalize(table, dim=1)[index]


def local(n: int) -> tuple[Tensor, Tensor]:
    """Weight falls off with distance: next to nothing beyond 48 tokens, a good part beyond 16."""
    angle = torch.arange(n)[:, None] * (torch.arange(DIM // 2) * 2 * torch.pi / 4096)
    wave = torch.cat([angle.cos(), angle.sin()], 1)
    return 12 * 2 / DIM * wave, wave


def sink(n: int) -> tuple[Tensor, Tensor]:
    """All weight on the first four tokens."""
    return _constant(n, (torch.arange(n) < 4).float())


def strided(n: int) -> tuple[Tensor, Tensor]:
    """All weight on every fifth block."""
    return _constant(n, (torch.arange(n) // BLOCK % 5 == 0).float())


def uniform(n: int) -> tuple[Tensor, Tensor]:
    """Equal weight on everything."""
    return _constant(n, torch.zeros(n))


def retrieval(n: int) -> tuple[Tensor, Tensor]:
    """Every block of queries looks at one block before it, drawn at random."""
    block = torch.arange(n) // BLOCK
    made = torch.Generator().manual_seed(3)
    target = torch.tensor([int(torch.randint(0, max(1, b), (), generator=made)) for b in range(int(block.max()) + 1)])
    return 40 * codes(target[block]), codes(block)


def spatial(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """All weight on the query's own frame."""
    frame = torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2])
    return 40 * codes(frame), codes(frame)


def temporal(grid: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """All weight on the query's own place, in all frames."""
    place = torch.arange(grid[1] * grid[2]).repeat(grid[0])
    return 40 * codes(place), codes(place)


def _constant(n: int, weight: Tensor) -> tuple[Tensor, Tensor]:
    one = torch.zeros(n, DIM)
    one[:, 0] = 30
    return one, torch.nn.functional.pad(weight[:, None], (0, DIM - 1))


def llama(layers: Sequence[Sequence[Callable[[int], tuple[Tensor, Tensor]]]], n: int) -> Any:
    """A Llama for texts of `n` tokens whose heads attend as planted, two to a key/value head.

    The heads of a group share their keys: each reads a half of the dimensions of its own.
    """
    import transformers

    heads = len(layers[0])
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=12 * heads, intermediate_size=48, num_hidden_layers=len(layers),
        num_attention_heads=heads, num_key_value_heads=heads // 2, head_dim=2 * DIM, max_position_embeddings=2048,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = transformers.LlamaForCausalLM(config).eval()
    cos, sin = model.model.rotary_emb(torch.zeros(1), torch.arange(n)[None])

    def unrotated(x: Tensor) -> Tensor:
        a, b = x.chunk(2, dim=-1)
        return x * cos[0] - torch.cat([-b, a], -1) * sin[0]

    for layer, kinds in zip(model.model.layers, layers, strict=True):
        planted = [kind(n) for kind in kinds]
        empty = torch.zeros(n, DIM)
        # sqrt(2 * DIM) undoes the factor on the logits.
        q = [torch.cat([p[0], empty] if h % 2 == 0 else [empty, p[0]], 1) for h, p in enumerate(planted)]
        k = [torch.cat([planted[h][1], planted[h + 1][1]], 1) for h in range(0, heads, 2)]
        layer.self_attn.q_proj = Planted(torch.stack([unrotated(x * (2 * DIM) ** 0.5) for x in q]))
        layer.self_attn.k_proj = Planted(torch.stack([unrotated(x) for x in k]))
    return model


def wan(layers: Sequence[Sequence[tuple[Tensor, Tensor]]], grid: tuple[int, int, int]) -> tuple[Any, dict[str, Any]]:
    """A Wan transformer for videos of `grid` tokens whose heads attend as planted, and inputs for it."""
    from tests.support.tiny_wan import inputs, transformer

    model = transformer(num_attention_heads=len(layers[0]), attention_head_dim=DIM, num_layers=len(layers))
    given = inputs(latents=(grid[0], 2 * grid[1], 2 * grid[2]))
    cos, sin = model.rope(given["hidden_states"])
    c, s = cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]

    def unrotated(x: Tensor) -> Tensor:
        a, b = x[:, 0::2], x[:, 1::2]
        return torch.stack([a * c + b * s, b * c - a * s], -1).flatten(1)

    for block, planted in zip(model.blocks, layers, strict=True):
        block.attn1.norm_q = block.attn1.norm_k = nn.Identity()
        block.attn1.to_q = Planted(torch.stack([unrotated(q * DIM**0.5) for q, _ in planted]))
        block.attn1.to_k = Planted(torch.stack([unrotated(k) for _, k in planted]))
    return model, given
