"""Presets: parameters of a method for a family in one word, each with where its values come from.

Those of this package are the rows of assets/presets.json. Amounts in them are shares of the tokens, so that a word
means the same at any length. A row whose quality was measured on a real model has the figures, and by them
`best_preset` chooses a method where none is named. Where a method's authors ran a family with other parameters than
the method's defaults, those are the defaults of the family: the rows of assets/family_defaults.json.

There is no preset for sliding_window on a video: its neighbours are those of a raster line, and nobody has published
one.
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
# The share of the pairs of tokens that a word stands for, where it is not the method's authors who said otherwise.
BUDGETS = {"high": 1 / 2, "balanced": 1 / 4, "fast": 1 / 8}
_ASSETS = Path(__file__).parent / "assets"
# What a model of transformers reads, by the name of its main input; other models make videos.
_KINDS = {"input_ids": "text", "pixel_values": "image", "input_features": "speech", "input_values": "speech"}
# Figures of which more is better.
_RISING = frozenset({"psnr", "ssim"})


@dataclass(frozen=True)
class Measured:
    """What a preset did to a real model.

    Args:
        model: its name.
        family: it is of.
        kind: what it reads or makes: "text", "image", "speech" or "video".
        figure: "loss" (nats a token), "output error" (relative error of the last hidden state), "ssim" (to the dense
            clip of the same seed).
        tokens: length of an input.
        inputs: how many.
        density: share of the pairs that was kept, in all calls.
        dense, sparse: the figure with dense attention, and with the preset.
        difference: between them, mean over inputs.
    """

    model: str
    family: str
    kind: str
    figure: str
    tokens: int
    inputs: int
    density: float
    dense: float
    sparse: float
    difference: float

    @property
    def damage(self) -> float:
        """By how much the figure is worse than dense."""
        return -self.difference if self.figure in _RISING else self.difference

    def __str__(self) -> str:
        # An error is one against dense attention.
        dense = f", dense {self.dense:.4g} ({self.difference:+.2g})" if self.dense else ""
        return (
            f"{self.figure} {self.sparse:.4g}{dense}, on {self.model} "
            f"({self.inputs} inputs of {self.tokens:,} tokens, density {self.density:.2g})"
        )


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
        measured: its quality on real models; empty where nobody measured it.
    """

    method: str
    quality: str
    source: str
    params: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: int | None = None
    dense_steps: float | None = None
    size: str = "all"
    modules: int | None = None
    measured: tuple[Measured, ...] = ()

    def __post_init__(self) -> None:
        check_quality(self.quality)
        rows = [Measured(**row) if isinstance(row, Mapping) else row for row in self.measured]
        object.__setattr__(self, "measured", tuple(rows))

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


def check_quality(quality: object) -> None:
    """Raises where `quality` is none of the words.

    Raises:
        ValueError: lists them, and names the nearest.
    """
    if quality not in QUALITIES:
        raise ValueError(
            f"`quality` must be one of {', '.join(QUALITIES)}; got {quality!r}{nearest(quality, QUALITIES)}"
        )


def kind_of(modules: Sequence[nn.Module]) -> str:
    """What the patched modules read or make: "text", "image", "speech" or "video".

    A model of text and something else counts as the other.
    """
    found = [_KINDS.get(str(getattr(module, "main_input_name", "")), "video") for module in modules]
    return next((kind for kind in found if kind != "text"), "text")


def best_preset(
    name: str, family: type[Family], modules: Sequence[nn.Module], quality: str, usable: Callable[[str], bool]
) -> tuple[Preset, Measured | None]:
    """The preset of a family that did the least damage where it was measured, and that figure.

    What was measured on a model of the family counts first, then what was on one of its kind (`kind_of`), by the
    method; where nothing was, the family's first preset is taken, without a figure.

    Args:
        name, family, modules: as `find_family` gives them.
        quality: one of QUALITIES.
        usable: whether a method can be used with the modules, given its name.

    Raises:
        ValueError: unknown quality, or the family has no preset that can be used.
    """
    check_quality(quality)
    own: dict[str, Preset] = {}
    for preset in presets_of(name, family):
        if preset.quality == quality and preset.fits(modules) and usable(preset.method):
            own.setdefault(preset.method, preset)
    if not own:
        raise ValueError(f"`method` must be given for a {name} model: its family has no preset {quality!r} to choose")
    kind = kind_of(modules)
    known = [
        (row, p.method)
        for p in (*own.values(), *(p for presets in _table().values() for p in presets))
        for row in p.measured
        if row.kind == kind and p.quality == quality and p.method in own
    ]
    figures = [found for found in known if found[0].family == name] or known
    if not figures:
        return next(iter(own.values())), None
    row, method = min(figures, key=lambda found: found[0].damage)
    return own[method], row


def find_preset(name: str, family: type[Family], modules: Sequence[nn.Module], method: str, quality: str) -> Preset:
    """The preset of a family for a method; the first that fits the modules.

    Raises:
        ValueError: unknown quality, or the family has none for the method.
    """
    check_quality(quality)
    known = presets_of(name, family)
    for preset in known:
        if (preset.method, preset.quality) == (method, quality) and preset.fits(modules):
            return preset
    methods = ", ".join(sorted({p.method for p in known})) or "none"
    raise ValueError(
        f"`quality` {quality!r} must be known for method {method!r} in family {name}, which has presets for: "
        f"{methods}. Give the method's parameters instead"
    )
