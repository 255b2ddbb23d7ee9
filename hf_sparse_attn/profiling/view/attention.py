"""Attention of single heads on the page: a picture for each, with the values of its squares."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import HeadMap, Measurements
from hf_sparse_attn.profiling.view.curves import kept_of, plan_of, shown_maps
from hf_sparse_attn.profiling.view.grids import Links, cell_id, named
from hf_sparse_attn.profiling.view.report import number, short_labels, words
from hf_sparse_attn.tables import escape

_MOST = 32
_KEPT = (228, 87, 46)
# A byte for each square: the highest bit says whether it is kept, the others the weight, 1e-4 to 1 by its logarithm.
_LEVELS = 127
CAPTION = (
    "Queries go down, keys to the right. Grey: dense attention (the darker the more, on a dark page the lighter; on a "
    "logarithmic scale). Red: what the head's method keeps; for methods that look at the input, on the input that was "
    "measured."
)
_FIGURES = ("density", "recall", "output_error", "damage")


@dataclass(frozen=True)
class Heads:
    """The heads that the page shows.

    Args:
        html: their figures.
        links: the figure of each head.
    """

    html: str
    links: Links


def heads(profile: HeadProfile, drawn: int) -> Heads | None:
    """The attention of some heads; None where none was measured.

    Args:
        profile: the profile.
        drawn: plans whose heads have a map that can be led back to.
    """
    found = profile.measurements
    if found is None or not found.maps:
        return None
    maps = shown_maps(profile, found, _MOST)
    links: dict[tuple[int, int, int], str] = {}
    made = []
    for at, seen in enumerate(maps):
        plan = plan_of(profile, found, seen)
        links.setdefault((plan, seen.layer, seen.head), f"attention-{at}")
        back = cell_id(plan, seen.layer, seen.head) if plan < drawn else None
        made.append(_figure(profile, found, seen, plan, f"attention-{at}", back))
    return Heads(f'<div class="heads">{"".join(made)}</div>', links)


def values_of(attention: NDArray[np.float32], kept: NDArray[np.bool_] | None) -> NDArray[np.uint8]:
    """The squares as bytes, as the page's script reads them."""
    weights = np.clip(np.nan_to_num(attention), 1e-4, 1)
    levels = np.rint(_LEVELS * (1 + np.log10(weights) / 4)).astype(np.uint8)
    return levels if kept is None else levels + 128 * kept.astype(np.uint8)


def _figure(profile: HeadProfile, found: Measurements, seen: HeadMap, plan: int, name: str, back: str | None) -> str:
    index = int(profile.plans[plan].choice[seen.layer, seen.head])
    where = f"layer {seen.layer}, head {seen.head}"
    steps = profile.plans[plan].steps
    where += f", steps {steps[0]:g} to {steps[1]:g}" if len(profile.plans) > 1 else ""
    labels = short_labels(profile.methods)
    label = named(profile, labels)[index]
    figures = [(n, float(profile.figures[n][plan, seen.layer, seen.head])) for n in _FIGURES if n in profile.figures]
    said = ", ".join(f"{words(n)} {number(value)}" for n, value in figures if not np.isnan(value))
    tokens = found.cases[seen.case].tokens
    place = where if back is None else f'<a href="#{back}">{where}</a>'
    picture = _image(seen, kept_of(profile, found, seen), tokens, f"Attention of {where}; kept: {labels[index]}")
    return (
        f'<figure id="{name}">{picture}'
        f'<div class="axis" aria-hidden="true"><span>0</span><span>{tokens // 2}</span><span>{tokens}</span></div>'
        f'<figcaption>{place}{label}<span class="said">{said}</span></figcaption></figure>'
    )


def _image(seen: HeadMap, kept: NDArray[np.bool_] | None, tokens: int, said: str) -> str:
    size = -(-tokens // len(seen.attention))
    # Squares of a length that they do not divide may lie beyond it.
    side = -(-tokens // size)
    values = values_of(seen.attention[:side, :side], None if kept is None else kept[:side, :side])
    grey = np.repeat((255 - 2 * (values & _LEVELS))[..., None], 3, -1).astype(np.float64)
    over = grey + 0.45 * (np.array(_KEPT) - grey)
    pixels = np.where((values > _LEVELS)[..., None], over, grey).astype(np.uint8)
    return (
        f'<img class="pixels" alt="{escape(said)}" width="{side}" height="{side}" data-side="{side}" '
        f'data-size="{size}" data-tokens="{tokens}" data-values="{_text(values.tobytes())}" '
        f'src="data:image/png;base64,{_text(_png(pixels))}">'
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    from matplotlib.image import imsave

    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    return buffer.getvalue()


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()
