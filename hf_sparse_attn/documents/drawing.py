"""What a method keeps, drawn: an SVG that is the same on every machine."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern

_HEADS, _GROUPS, _DIM = 4, 2, 16
# Tokens along the side of a cell: all pairs of a cell are one spot of the picture.
_CELL = 8
# Two of the heads, each of its own key/value head.
_DRAWN = (0, 3)
_SHADES = ("#dbe7f3", "#9fc2e3", "#5b97cc", "#1f5f9e")
_SIDE = 288


def layout_of(method: Method) -> TokenLayout:
    """The small layout that a method is drawn on: text, or a video for a method that needs one."""
    if "video grid" in method.needs:
        return TokenLayout.video(6, 8, 8)
    return TokenLayout.bidirectional(384) if "bidirectional" in method.needs else TokenLayout.causal(384)


def draw(method: Method) -> str:
    """What two heads keep on made-up queries and keys, as the text of an SVG.

    Raises:
        ValueError: the method declines the layout.
    """
    layout = layout_of(method)
    pattern = pattern_of(method, layout)
    if isinstance(pattern, Decline):
        raise ValueError(f"`method` must apply to {layout}, got {method!r}: {pattern.reason}")
    return _picture(drawn_heads(pattern, layout), f"{method.name} on {layout}")


def pattern_of(method: Method, layout: TokenLayout) -> BlockPattern | Decline:
    """What a method keeps of made-up queries and keys."""
    q, k = made_up(layout)
    ctx = Context(layout, num_heads=_HEADS, num_kv_heads=_GROUPS, head_dim=_DIM)
    if method.reads:
        ctx = replace(ctx, inputs=LayerInputs(q.transpose(1, 2).flatten(2), q, k))
    return method.pattern_for(q, k, ctx)


def drawn_heads(pattern: BlockPattern, layout: TokenLayout) -> list[tuple[str, Tensor, Tensor]]:
    """The heads that are drawn, one where all are alike: name, and the kept and the visible pairs [tokens, tokens]."""
    kept = pattern.to_dense()[0].double()
    seen = torch.ones_like(kept[0])
    seen = seen.tril() if layout.is_causal else seen
    heads = _DRAWN if len(kept) > 1 else _DRAWN[:1]
    return [(f"head {head}", kept[head], seen) for head in heads]


@lru_cache
def made_up(layout: TokenLayout, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Queries [1, 4, tokens, 16] and keys [1, 2, tokens, 16] of heads that look around themselves and at landmarks.

    Drawn with Python's own generator, which is the same everywhere.
    """
    draws = random.Random(seed)
    places = layout.coordinates().tolist()
    landmarks = set(draws.sample(range(layout.kv_len), 6))
    # The first key/value head looks near in the order of the tokens; the second at one place of every frame, in text
    # at tokens of the same kind.
    near = [_waves(n / layout.kv_len, (1, 4, 12)) for n in range(layout.kv_len)]
    alike = [_waves(y / 8, (1, 2)) + _waves(x / 8, (1,)) if y >= 0 else _waves(n / 48, (1, 2, 3))
             for n, (_, _, y, x) in enumerate(places)]  # fmt: skip
    keys, queries = [], []
    for group, features in enumerate((near, alike)):
        keys.append([[3 * f for f in v] + [4.0 * (n in landmarks)] + _noise(draws, 9) for n, v in enumerate(features)])
        for _ in range(_HEADS // _GROUPS):
            loud = 1.0 + group
            queries.append([[3 * f for f in v] + [loud] + _noise(draws, 9) for v in features])
    return torch.tensor([queries]), torch.tensor([keys])


def _waves(place: float, turns: tuple[int, ...]) -> list[float]:
    return [wave(2 * math.pi * n * place) for n in turns for wave in (math.cos, math.sin)]


def _noise(draws: random.Random, n: int) -> list[float]:
    return [draws.gauss(0, 0.7) for _ in range(n)]


def _picture(heads: list[tuple[str, Tensor, Tensor]], title: str) -> str:
    width, height = 16 + len(heads) * (_SIDE + 16), _SIDE + 48
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{title}</title>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
    ]
    for number, (name, kept, seen) in enumerate(heads):
        left, density = 16 + number * (_SIDE + 16), float(kept.sum() / seen.sum())
        parts += [
            f'<text x="{left}" y="22">{name}: {density:.2f} of the pairs</text>',
            f'<g transform="translate({left} 32) scale({_SIDE * _CELL / len(kept):g})" shape-rendering="crispEdges">',
            *_spots(kept, seen),
            "</g>",
            f'<rect x="{left}" y="32" width="{_SIDE}" height="{_SIDE}" fill="none" stroke="#888"/>',
        ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _spots(kept: Tensor, seen: Tensor) -> list[str]:
    """A path for each shade: runs of equal spots, darker where more of the pairs are kept."""
    share = _sums(kept) / _sums(seen).clamp(min=1)
    shades = (share * len(_SHADES)).ceil().long()
    paths = []
    for number, colour in enumerate(_SHADES, 1):
        runs = [
            f"M{start} {y}h{n}v1h-{n}z" for y, row in enumerate(shades.tolist()) for start, n in _runs(row, number)
        ]
        paths += [f'<path fill="{colour}" d="{"".join(runs)}"/>'] if runs else []
    return paths


def _sums(mask: Tensor) -> Tensor:
    """Sums over the cells of a [tokens, tokens] mask."""
    return mask.unflatten(0, (-1, _CELL)).unflatten(2, (-1, _CELL)).sum((1, 3))


def _runs(row: list[int], value: int) -> list[tuple[int, int]]:
    """(start, length) of the runs of a value."""
    found, start = [], None
    for n, here in enumerate([*row, None]):
        if here == value and start is None:
            start = n
        elif here != value and start is not None:
            found.append((start, n - start))
            start = None
    return found
