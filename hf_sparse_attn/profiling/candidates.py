"""What a profile chooses from where nothing is said: what each method would have tried, as far as it can differ."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.decision import FULL
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.rows import head_densities, kept_cells
from hf_sparse_attn.pattern.video_tiles import tile_for as tile_for
from hf_sparse_attn.registry import METHODS

# Density up to which a budget is tight: in blocks of 16 rather than of 32 a choice for SmolLM2 at 2,048 tokens does a
# tenth less damage at 1/8, and a twentieth less at 1/4, where its kernel takes half as long again.
TIGHT = 0.15
_OWN = f"{__name__.split('.')[0]}."
# Tokens up to which methods that choose by content are tried on noise: beyond, no rounding makes two of them one.
_TRIED = 4096
# Cells along each side of the map by which patterns are told apart, besides their densities.
_CELLS = 64


def default_candidates(
    layout: TokenLayout, tokens: int = 0, family: Callable[[object], dict[str, Any]] = lambda _: {},
    budget: float = 1.0,
) -> list[Method]:  # fmt: skip
    """Methods and parameters to measure on a layout: `Method.candidates` of all that apply, static ones first.

    Left out are those that keep everything there, and those that keep what another one keeps.

    Args:
        layout: the tokens of a call.
        tokens: length of the longest call that is known; fewer than the layout has means those of the layout.
        family: parameters by which a family's default of a method, given its name, differs from the method's.
        budget: density that is to be spent; a tight one is spent in finer blocks.
    """
    n = max(tokens, layout.kv_len)
    if n > layout.kv_len and all(part.kind == "text" for part in layout.parts):
        layout = TokenLayout.causal(n) if layout.is_causal else TokenLayout.bidirectional(n)
    ctx = Context(layout, num_heads=2, num_kv_heads=2, head_dim=32)
    found = [m for name, kind in sorted(METHODS.items()) for m in _of_method(name, kind, ctx, n, family, budget)]
    # Of two that are alike the cheaper one to choose by is kept, and the package's own, which others have as well.
    ordered = sorted(found, key=lambda method: (not method.static, not type(method).__module__.startswith(_OWN)))
    kept: dict[Hashable, Method] = {}
    for method in ordered:
        told = _told_apart(method, ctx)
        if told is not None:
            kept.setdefault(told, method)
    return list(kept.values())


def _of_method(
    name: str,
    kind: type[Method],
    ctx: Context,
    tokens: int,
    family: Callable[[object], dict[str, Any]],
    budget: float,
) -> Iterator[Method]:
    """What a method would have tried, where it applies."""
    known = {field.name for field in fields(kind)}
    common = {"block_size": block_for(tokens, budget)} if "block_size" in known else {}
    for own in kind.candidates(ctx.layout, tokens):
        method = kind(**{**family(name), **common, **own})
        if method.why_not(ctx) is not None:
            return
        yield method


def _told_apart(method: Method, ctx: Context) -> Hashable | None:
    """What is the same of two methods only if they keep the same on these tokens; None where all is kept, or nothing.

    Methods that choose by content are tried on noise of two kinds, of flat and of sharp attention.
    """
    layout = ctx.layout
    if method.static:
        pattern = method.static_pattern(ctx, torch.device("cpu"))
    elif layout.kv_len > _TRIED:
        return method if method.least_density(ctx) < FULL else None
    else:
        pattern = method.pattern_for(*_noise(ctx), ctx)
    if isinstance(pattern, Decline):
        return None
    density = head_densities(pattern, layout.density_count)
    if float(density.min()) >= FULL:
        return None
    cells = [kept_cells(pattern, head, _CELLS).numpy().tobytes() for head in range(ctx.num_heads)]
    return tuple(density.expand(-1, ctx.num_heads).flatten().tolist()), *cells


def _noise(ctx: Context) -> tuple[Tensor, Tensor]:
    """q and k [1, heads, tokens, dim], the logits of each head ten times as large as those of the one before."""
    draw = torch.Generator().manual_seed(0)
    shape = (1, ctx.num_heads, ctx.layout.kv_len, ctx.head_dim)
    q, k = torch.randn(shape, generator=draw), torch.randn(shape, generator=draw)
    return q[:, :, ctx.layout.query_start :] * 10.0 ** torch.arange(ctx.num_heads)[:, None, None], k


def block_for(tokens: int, budget: float = 1.0) -> int:
    """Tokens in a block: 16 for a few hundred tokens, 128 from 16384 on; half as many for a tight budget."""
    size = 16
    while size < 128 and size * 128 <= tokens:
        size *= 2
    return max(16, size // 2) if budget <= TIGHT else size
