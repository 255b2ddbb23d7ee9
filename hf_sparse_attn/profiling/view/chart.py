"""What a budget buys as a drawing of SVG: as wide as the page is, in the page's colours, each mark with its values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.curves import MARKS, WIDE, Budgets, budgets, single_styles
from hf_sparse_attn.profiling.view.report import number, words
from hf_sparse_attn.tables import escape, html

# Outlines around (0, 0) of the marks in MARKS, and the star of the profile.
_PLUS = "M-2-5h4v3h3v4h-3v3h-4v-3h-3v-4h3z"
_OUTLINES = {
    "o": "M-4.5 0a4.5 4.5 0 1 0 9 0a4.5 4.5 0 1 0-9 0z",
    "s": "M-4-4h8v8h-8z",
    "D": "M0-5.5l5.5 5.5l-5.5 5.5l-5.5-5.5z",
    "^": "M0-5l5.5 9h-11z",
    "v": "M0 5l5.5-9h-11z",
    "P": _PLUS,
    "X": "M-5-3l2-2l3 3l3-3l2 2l-3 3l3 3l-2 2l-3-3l-3 3l-2-2l3-3z",
    "<": "M-5 0l9-5.5v11z",
    ">": "M5 0l-9-5.5v11z",
    "*": "M0-10l2.4 6.8l7.1.1l-5.7 4.3l2.1 6.9l-5.9-4.1l-5.9 4.1l2.1-6.9l-5.7-4.3l7.1-.1z",
}


@dataclass(frozen=True)
class _Axis:
    """Values in percent of a length.

    Args:
        low, high: its ends.
        logarithmic: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    logarithmic: bool

    @classmethod
    def over(cls, values: Sequence[float], wide: float) -> _Axis:
        """One that is logarithmic where the largest value is `wide` times the smallest."""
        low, high = min(values), max(values)
        if high > wide * low:
            edge = (high / low) ** 0.05
            return cls(low / edge, high * edge, True)
        edge = 0.05 * (high - low) or 0.5 * high
        return cls(max(0.0, low - edge), high + edge, False)

    def at(self, value: float) -> float:
        """Where a value is, from 0 to 100."""
        if self.logarithmic:
            return 100 * math.log(value / self.low) / math.log(self.high / self.low)
        return 100 * (value - self.low) / (self.high - self.low)

    def ticks(self, most: int) -> list[float]:
        """Round values along it, not many more than `most`."""
        if not self.logarithmic:
            step = 10.0 ** math.floor(math.log10((self.high - self.low) / most))
            step *= next(f for f in (1, 2, 5, 10) if (self.high - self.low) / (f * step) <= most)
            first = math.ceil(self.low / step)
            return [i * step for i in range(first, int(self.high / step) + 1)]
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        for factors in ((1, 2, 5), (1, 3), (1,)):
            found = [f * 10.0**p for p in powers for f in factors if self.low <= f * 10.0**p <= self.high]
            if len(found) <= most:
                return found
        return found[:: -(-len(found) // most)]


def chart(profile: HeadProfile) -> str | None:
    """The drawing with its key, and its numbers as a table; None where no other budgets were tried."""
    found = budgets(profile)
    if found is None:
        return None
    styles = single_styles(profile)
    places = list(styles)
    limits = [value for kind, value in profile.budget.items() if (kind == "density") == found.by_density]
    every = [*found.points, *([found.chosen] if found.chosen else [])]
    x = _Axis.over([*(p[0] for p in every), *limits], WIDE[0])
    y = _Axis.over([p[1] for p in every], WIDE[1])
    cost = "density" if found.by_density else "time"
    drawn, key = [*_frame(x, y)], []

    def line(kind: str, points: Sequence[tuple[float, float]], mark: str, said: str) -> None:
        at = [(f"{x.at(a):.2f}%", f"{100 - y.at(b):.2f}%") for a, b in points]
        parts = [f'<line x1="{a}" y1="{b}" x2="{c}" y2="{d}"/>' for (a, b), (c, d) in pairwise(at)]
        for (a, b), values in zip(at, points, strict=True):
            value = f"{said}: {cost} {number(values[0])}, damage {number(values[1])}"
            parts.append(f'<use href="#mark-{mark}" x="{a}" y="{b}"><title>{escape(value)}</title></use>')
        drawn.append(f'<g class="series {kind}">{"".join(parts)}</g>')
        sign = f'<svg aria-hidden="true" class="{kind}"><use href="#mark-{mark}" x="11" y="7"/></svg>'
        key.append(f"<li>{sign}{escape(said)}</li>")

    for value in limits:
        at, said = f"{x.at(value):.2f}%", f"budget: {cost} {value:g}"
        drawn.append(f'<line class="limit" x1="{at}" x2="{at}" y1="0" y2="100%"><title>{said}</title></line>')
        sign = '<svg aria-hidden="true"><line class="limit" x1="0" x2="22" y1="7" y2="7"/></svg>'
        key.append(f"<li>{sign}{said}</li>")
    for name in dict.fromkeys(name for name, _, _ in found.singles):
        own = sorted((a, b) for n, a, b in found.singles if n == name)
        line(f"series{places.index(name)}", own, f"{MARKS.index(styles[name][1])}", f"{name}, all heads")
    if found.mix:
        line("mix", found.mix, "0", "best mix of methods")
    if found.chosen:
        line("own", [found.chosen], "own", "this profile")
    shapes = {**{str(i): _OUTLINES[m] for i, m in enumerate(MARKS)}, "own": _OUTLINES["*"]}
    marks = "".join(f'<path id="mark-{name}" d="{outline}"/>' for name, outline in shapes.items())
    label = f"Total damage against {cost}, drawn; the values are in the table below"
    return (
        f'<figure><p class="said">total damage ({escape(words(profile.metric))}, all heads)</p>'
        f'<div class="plot"><svg role="img" aria-label="{label}"><defs>{marks}</defs>{"".join(drawn)}'
        f'<text x="50%" y="100%" dy="38" text-anchor="middle">{found.cost_words}</text></svg></div>'
        f'<ul class="key">{"".join(key)}</ul>'
        f"<figcaption>{_caption(found)}</figcaption>"
        f"<details><summary>These values as a table</summary>"
        f'<div class="scroll">{_values(found, cost)}</div></details></figure>'
    )


def _frame(x: _Axis, y: _Axis) -> list[str]:
    parts = []
    for value in x.ticks(8):
        at = f"{x.at(value):.2f}%"
        parts.append(f'<line class="tick" x1="{at}" x2="{at}" y1="0" y2="100%"/>')
        parts.append(f'<text x="{at}" y="100%" dy="18" text-anchor="middle">{value:.4g}</text>')
    for value in y.ticks(8):
        at = f"{100 - y.at(value):.2f}%"
        parts.append(f'<line class="tick" x1="0" x2="100%" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="0" y="{at}" dx="-8" dy="4" text-anchor="end">{value:.4g}</text>')
    return parts


def _caption(found: Budgets) -> str:
    said = "Down and to the left is better. The line is the best choice of a method for every head at each budget."
    said += "" if found.whole else " Choices without damage, such as dense, are off the scale."
    if found.singles:
        said += " Marks joined by thin lines: one method for all heads; heads it declines are dense."
    return said


def _values(found: Budgets, cost: str) -> str:
    rows = [(f"{name}, all heads", number(a), number(b)) for name, a, b in found.singles]
    rows += [("best mix of methods", number(a), number(b)) for a, b in found.mix]
    rows += [("this profile", number(found.chosen[0]), number(found.chosen[1]))] if found.chosen else []
    return html(("choice", cost, "total damage"), rows, (1, 2), "sort")
