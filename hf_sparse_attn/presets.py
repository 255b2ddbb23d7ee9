"""Presets: parameters of a method for a family in one word, each with where its values come from.

Those of this package are the rows of assets/presets.json. Where a method's authors ran a family with other parameters
than the method's defaults, those are the defaults of the family: the rows of assets/family_defaults.json.

There is no preset for sliding_window on a video: a frame has thousands of tokens and how many depends on the size of
the video, so that no number of tokens means the same twice, and nobody has published one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from hf_sparse_attn.nearest import nearest

if TYPE_CHECKING:
    from hf_sparse_attn.family import Family

T = TypeVar("T")

QUALITIES = ("high", "balanced", "fast")
_ASSETS = Path(__file__).parent / "assets"


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
    return _by_family("presets", Preset)


@dataclass(frozen=True)
class FamilyDefault:
    """Parameters of a method that a family has in place of the method's own defaults; fields as of Preset."""

    method: str
    source: str
    params: Mapping[str, Any]
    size: str = "all"
    modules: int | None = None


@cache
def family_defaults() -> dict[str, list[FamilyDefault]]:
    """By family; of several for one method the first counts that fits."""
    return _by_family("family_defaults", FamilyDefault)


def default_params(family: str, modules: Sequence[nn.Module], method: object) -> dict[str, Any]:
    """Parameters by which a family's default of a method differs from the method's own.

    Args:
        family: its name.
        modules: to patch.
        method: name of the method; anything else has none.
    """
    for row in family_defaults().get(family, ()):
        if row.method == method and row.modules in (None, len(modules)):
            return dict(row.params)
    return {}


def _by_family(table: str, kind: Callable[..., T]) -> dict[str, list[T]]:
    found: dict[str, list[T]] = {}
    for row in json.loads((_ASSETS / f"{table}.json").read_text(encoding="utf-8")):
        for name in row.pop("families"):
            found.setdefault(name, []).append(kind(**row))
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
