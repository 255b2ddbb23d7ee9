"""Colours of the page, light and dark, as a style sheet: of methods and of the levels of a figure.

A page that allows no style but its own sheet has no colours in its tags; cells name a class.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.view.plots import method_styles, rgb, to_hex

LEVELS = 16
# From little to much, on a light page and on a dark one.
_RAMPS = {
    "density": (
        ("#FFFFE0", "#A9DDB7", "#41B0C3", "#1F6FB0", "#0A2A66"),
        ("#1C2A38", "#1F4E79", "#2484A8", "#5CC4B4", "#E3F7C4"),
    ),
    "damage": (
        ("#FFFBE6", "#FEDF90", "#FB9A36", "#D2560F", "#7A2A06"),
        ("#2C231B", "#643512", "#A95413", "#EE9A3C", "#FFEBB0"),
    ),
}
_DARK_DENSE = "#39424D"
# Of these two one can always be read: the contrast of the better is at least 4.58.
_INKS = "#000000", "#FFFFFF"


def level_class(figure: str, share: float) -> str:
    """The class of a cell.

    Args:
        figure: "density" or "damage".
        share: of the scale, from 0 to 1; beyond it the last level.
    """
    return f"{figure}{min(LEVELS - 1, max(0, int(share * LEVELS)))}"


def style_sheet(methods: Sequence[Method], series: Sequence[str]) -> str:
    """Rules for the classes method0, method1, ...; density0, ...; damage0, ...; series0, ...

    Args:
        methods: of the profile.
        series: colours of the methods in the plot.
    """
    light = [colour for colour, _ in method_styles(methods)]
    dark = [_DARK_DENSE if m.name == "dense" else _raised(c) for m, c in zip(methods, light, strict=True)]
    rules: tuple[list[str], list[str]] = ([], [])
    for mode, found in enumerate((light, dark)):
        rules[mode].extend(_filled(f"method{i}", c) for i, c in enumerate(found))
        for figure, ramps in _RAMPS.items():
            rules[mode].extend(_filled(f"{figure}{i}", c) for i, c in enumerate(_levels(ramps[mode])))
        own = series if mode == 0 else map(_raised, series)
        rules[mode].extend(f".series{i} {{ color: {c}; }}" for i, c in enumerate(own))
    newline = "\n"
    return f"{newline.join(rules[0])}\n@media (prefers-color-scheme: dark) {{\n{newline.join(rules[1])}\n}}\n"


def contrast(one: str, other: str) -> float:
    """Contrast of two colours, from 1 to 21, as the W3C's guidelines for accessible pages count it."""
    low, high = sorted(_luminance(rgb(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def _filled(name: str, colour: str) -> str:
    ink = max(_INKS, key=lambda ink: contrast(ink, colour))
    return f".{name} {{ background: {colour}; color: {ink}; }}"


def _levels(anchors: Sequence[str]) -> Iterator[str]:
    steps = list(pairwise(map(rgb, anchors)))
    for level in range(LEVELS):
        at = level / (LEVELS - 1) * len(steps)
        low, high = steps[min(int(at), len(steps) - 1)]
        share = at - min(int(at), len(steps) - 1)
        yield to_hex(low + (high - low) * share)


def _raised(colour: str) -> str:
    """A colour for a dark page: dark ones are made lighter."""
    found = rgb(colour)
    return to_hex(found + (1 - found) * (0.25 if _luminance(found) < 0.25 else 0.0))


def _luminance(colour: NDArray[np.float64]) -> float:
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    return float(linear @ (0.2126, 0.7152, 0.0722))
