"""Presets: parameters of a method for a family in one word, each with where its values come from.

Those of this package are the rows of assets/presets.json. There is none for sliding_window on a video: a frame has
thousands of tokens and how many depends on the size of the video, so that no number of tokens means the same twice,
and nobody has published one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_sparse_attn.nearest import nearest

if TYPE_CHECKING:
    from hf_sparse_attn.family import Family

QUALITIES = ("high", "balanced", "fast")
_TABLE = Path(__file__).parent / "assets" / "presets.json"


@dataclass(frozen=True)
class Preset:
    """What one word stands for.

    Args:
        method: name of the method.
        quality: one of QUALITIES; "balanced" is what the method's authors ran, where they ran the model.
        source: where the values come from.
        params: parameters of the method that differ from its defaults.
        dense_layers, dense_steps: as in `patch()`.
        size: which models of the family, in words.
        modules: number of patched modules that tells those models apart; None means any.
    """

    method: str
    quality: str
    source: str
    params: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: int | None = None
    dense_steps: float | None = None
    size: str = "all"
    modules: int | None = None

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise ValueError(_unknown(self.quality))

    def fits(self, modules: Sequence[nn.Module]) -> bool:
        """Whether the patched modules are of its size."""
        return self.modules is None or self.modules == len(modules)


def presets_of(name: str, family: type[Family]) -> tuple[Preset, ...]:
    """The presets of a family: those that it brings itself as `presets`, then those of the table."""
    return (*getattr(family, "presets", ()), *_table().get(name, ()))


@cache
def _table() -> dict[str, list[Preset]]:
    found: dict[str, list[Preset]] = {}
    for row in json.loads(_TABLE.read_text(encoding="utf-8")):
        for name in row.pop("families"):
            found.setdefault(name, []).append(Preset(**row))
    return found


def _unknown(quality: object) -> str:
    return f"`quality` must be one of {', '.join(QUALITIES)}; got {quality!r}{nearest(quality, QUALITIES)}"


def find_preset(name: str, family: type[Family], modules: Sequence[nn.Module], method: str, quality: str) -> Preset:
    """The preset of a family for a method; the first that fits the modules.

    Raises:
        ValueError: unknown quality, or the family has none for the method.
    """
    if quality not in QUALITIES:
        raise ValueError(_unknown(quality))
    known = presets_of(name, family)
    for preset in known:
        if (preset.method, preset.quality) == (method, quality) and preset.fits(modules):
            return preset
    methods = ", ".join(sorted({p.method for p in known})) or "none"
    raise ValueError(
        f"`quality` {quality!r} must be known for method {method!r} in family {name}, which has presets for: "
        f"{methods}. Give the method's parameters instead"
    )
