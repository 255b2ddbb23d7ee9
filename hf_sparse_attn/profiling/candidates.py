"""What a profile chooses from where nothing is said: methods for a kind of layout, scaled to its length."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.method import Method
from hf_sparse_attn.registry import METHODS

# Names of methods with their parameters; all get the block size of the length besides.
Entries = list[tuple[str, dict[str, Any]]]


def default_candidates(
    layout: TokenLayout, tokens: int = 0, family: Callable[[object], dict[str, Any]] = lambda _: {}
) -> list[Method]:
    """Methods and parameters to measure on a layout; those that this installation does not have are left out.

    Args:
        layout: the tokens of a call.
        tokens: length to scale windows and budgets to; fewer than the layout has means those of the layout.
        family: parameters by which a family's default of a method, given its name, differs from the method's.
    """
    n = max(tokens, layout.kv_len)
    entries = _text(n) if layout.is_causal else _video(n, layout) if layout.video_part is not None else _full(n)
    made = []
    for name, own in entries:
        params = {**family(name), **own, "block_size": block_for(n)}
        # A method of another version may lack a parameter.
        if name in METHODS and set(params) <= {f.name for f in fields(METHODS.get(name))}:
            method = METHODS.get(name)(**params)
            if method not in made:
                made.append(method)
    return made


def block_for(tokens: int) -> int:
    """Tokens in a block: 16 for a few hundred tokens, 128 from 16384 on."""
    size = 16
    while size < 128 and size * 128 <= tokens:
        size *= 2
    return size


def _text(n: int) -> Entries:
    found = _windows(n, (64, 32, 16, 8, 4), sink=16)
    # Diagonals are rounded to blocks and so cost more than columns.
    for vertical, slash in ((16, 64), (8, 64), (32, 32), (16, 16), (8, 8)):
        found.append(("vertical_slash", {"vertical": max(30, n // vertical), "slash": max(50, n // slash)}))
    found += _densities(1 / 16, 1 / 8, 1 / 4)
    found.append(("strided", {"local": 4, "stride": 8, "sink": 1}))
    for held in (0.6, 0.9):
        found.append(("flexprefill", {"gamma": held, "min_budget": max(block_for(n), n // 32)}))
        found.append(("xattention", {"threshold": held, "stride": 8}))
    return found


def tile_for(layout: TokenLayout) -> tuple[int, int, int]:
    """A tile of about a sixth of the canvas along each side, at most the published (6, 8, 8)."""
    grid = layout.video_part[1].grid if layout.video_part is not None else None
    frames, height, width = (max(2, -(-size // 6)) for size in grid or (1, 1, 1))
    return min(6, frames), min(8, height), min(8, width)


def _video(n: int, layout: TokenLayout) -> Entries:
    shares = (1 / 32, 1 / 8, 1 / 4)
    found: Entries = [("radial", {})]
    found += [("svg", {"kind": kind, "density": share}) for kind in ("spatial", "temporal") for share in shares]
    found += [("sliding_tile", {"window": share, "tile": tile_for(layout)}) for share in shares]
    return found + _densities(1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2) + _windows(n, (32, 16), sink=0)


def _full(n: int) -> Entries:
    return _densities(1 / 16, 1 / 8, 1 / 4, 1 / 2) + _windows(n, (32, 16, 8, 4), sink=16)


def _windows(n: int, parts: tuple[int, ...], sink: int) -> Entries:
    return [("sliding_window", {"window": max(16, n // part), "sink": sink}) for part in parts]


def _densities(*shares: float) -> Entries:
    return [("block_topk", {"density": share}) for share in shares]
