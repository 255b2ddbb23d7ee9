"""Presets: parameters of a method for a family in one word, each with where its values come from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from hf_sparse_attn.family import Family

QUALITIES = ("high", "balanced", "fast")


def _any_size(modules: Sequence[nn.Module]) -> bool:
    return True


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
        fits: whether the patched modules are of that size.
    """

    method: str
    quality: str
    source: str
    params: Mapping[str, Any] = field(default_factory=dict)
    dense_layers: int | None = None
    dense_steps: float | None = None
    size: str = "all"
    fits: Callable[[Sequence[nn.Module]], bool] = _any_size

    def __post_init__(self) -> None:
        if self.quality not in QUALITIES:
            raise ValueError(f"`quality` must be one of {', '.join(QUALITIES)}; got {self.quality!r}")


def find_preset(name: str, family: type[Family], modules: Sequence[nn.Module], method: str, quality: str) -> Preset:
    """The preset of a family for a method; the first that fits the modules.

    Raises:
        ValueError: unknown quality, or the family has none for the method.
    """
    if quality not in QUALITIES:
        raise ValueError(f"`quality` must be one of {', '.join(QUALITIES)}; got {quality!r}")
    known: Sequence[Preset] = getattr(family, "presets", ())
    for preset in known:
        if (preset.method, preset.quality) == (method, quality) and preset.fits(modules):
            return preset
    methods = ", ".join(sorted({p.method for p in known})) or "none"
    raise ValueError(
        f"`quality` {quality!r} must be known for method {method!r} in family {name}, which has presets for: "
        f"{methods}. Give the method's parameters instead"
    )


_SEARCH = "candidate of the head search of MInference (arXiv 2407.02490)"
_OURS = "ours, not measured on a trained model: "

# Causal text, whatever the model: the published values are the same for all sizes.
TEXT_PRESETS: tuple[Preset, ...] = (
    Preset("vertical_slash", "high", _OURS + "twice the verticals of balanced", {"vertical": 2000, "slash": 6096}),
    Preset(
        "vertical_slash", "balanced", "MInference 1.0, heads without a pattern of their own",
        {"vertical": 1000, "slash": 6096},
    ),
    Preset(
        "vertical_slash", "fast", "MInference, all heads of Llama 3.1 in its second configuration",
        {"vertical": 512, "slash": 2048},
    ),
    Preset("sliding_window", "high", _OURS + "twice the window of balanced", {"window": 8064, "sink": 128}),
    Preset("sliding_window", "balanced", "A-shape of MInference", {"window": 3968, "sink": 128}),
    Preset("sliding_window", "fast", _SEARCH, {"window": 800, "sink": 100}),
    Preset("block_topk", "high", _OURS + "twice the blocks of balanced", {"block_size": 64, "topk": 200}),
    Preset("block_topk", "balanced", "block-sparse heads of MInference", {"block_size": 64, "topk": 100}),
    Preset("block_topk", "fast", _OURS + "half the blocks of balanced", {"block_size": 64, "topk": 50}),
)  # fmt: skip
