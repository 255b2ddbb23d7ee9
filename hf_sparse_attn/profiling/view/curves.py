"""Pictures of a head profile that are no maps of all heads: what a budget buys, and the attention of some heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.profiles.head_profile import PUBLISHED, HeadProfile
from hf_sparse_attn.profiles.measurements import HeadMap, Measurements, weights_of
from hf_sparse_attn.profiling.head_maps import extent
from hf_sparse_attn.profiling.view.plots import Picture, finish, method_styles, new_figure
from hf_sparse_attn.profiling.view.report import number, short_labels, total_damage, words

_MOST_MAPS = 12
_KEPT = "#E4572E"
# How many times the smallest value the largest is where an axis is logarithmic.
WIDE = 7.0, 20.0
MARKS = "osD^vPX<>"


@dataclass(frozen=True)
class Budgets:
    """What a budget buys: (density or time, total damage) of choices.

    Args:
        mix: the best choice at each budget, where it has any damage.
        singles: (method, ...) of each candidate for all heads.
        chosen: of the profile, or None where it is not of this scale.
        by_density: whether the first is a density, not a time.
        whole: whether no choice without damage, such as dense, was left out of `mix`.
    """

    mix: list[tuple[float, float]]
    singles: list[tuple[str, float, float]]
    chosen: tuple[float, float] | None
    by_density: bool
    whole: bool

    @property
    def points(self) -> list[tuple[float, float]]:
        """All but the profile's own."""
        return [*self.mix, *((x, y) for _, x, y in self.singles)]

    @property
    def cost_words(self) -> str:
        """What the first of a point is."""
        return "density (kept share of the visible pairs)" if self.by_density else "time (share of dense)"


def budgets(profile: HeadProfile) -> Budgets | None:
    """What a budget buys; None where nothing was tried."""
    singles = list(_singles(profile))
    mix = [p for p in profile.pareto if p[1] > 0 and p[0] > 0]
    if not mix and not singles:
        return None
    by_density = "time" not in profile.budget
    damage, density = total_damage(profile), profile.density
    shown = by_density and damage is not None and damage > 0 and np.isfinite(density)
    chosen = (density, damage) if shown and damage is not None else None
    return Budgets(mix, singles, chosen, by_density, len(mix) == len(profile.pareto))


def pareto_picture(profile: HeadProfile) -> Picture | None:
    """Total damage against the budget; None where nothing was tried."""
    found = budgets(profile)
    if found is None:
        return None
    figure = new_figure(7.4, 5.2)
    ax = figure.subplots()
    styles = single_styles(profile)
    for name in dict.fromkeys(name for name, _, _ in found.singles):
        own = sorted((x, y) for n, x, y in found.singles if n == name)
        style: dict[str, Any] = {"color": styles[name][0], "marker": styles[name][1], "label": f"{name}, all heads"}
        ax.plot(*zip(*own, strict=True), linewidth=0.9, markersize=5, zorder=2, **style)
    if found.mix:
        style = {"color": "#22262B", "marker": "o", "label": "best mix of methods"}
        ax.plot(*zip(*found.mix, strict=True), linewidth=2, markersize=3.5, zorder=3, **style)
    for kind, value in profile.budget.items():
        ax.axvline(value, color="#6B7280", linewidth=1, linestyle="--", label=f"budget: {kind} {value:g}", zorder=1)
    if found.chosen is not None:
        style = {"color": _KEPT, "marker": "*", "markeredgecolor": "white", "label": "this profile"}
        ax.plot(*found.chosen, markersize=17, linestyle="none", zorder=4, **style)
    _scale(ax, "x", [x for x, _ in found.points], WIDE[0])
    _scale(ax, "y", [y for _, y in found.points], WIDE[1])
    ax.set_xlabel(found.cost_words, fontsize=9)
    ax.set_ylabel(f"total damage ({words(profile.metric)}, all heads)", fontsize=9)
    title = "What a budget buys"
    if found.chosen is not None:
        title += f": this profile has damage {number(found.chosen[1])} at density {number(found.chosen[0])}"
    ax.set_title(title, fontsize=11, loc="left", pad=8)
    ax.grid(True, color="#E5E7EB", linewidth=0.7)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=8)
    for edge in ("top", "right"):
        ax.spines[edge].set_visible(False)
    columns = 3 if max(map(len, styles), default=0) < 22 else 2
    figure.legend(loc="outside lower center", ncols=columns, fontsize=8, frameon=False)
    return finish(figure, "pareto")


def _scale(ax: Any, axis: str, values: list[float], wide: float) -> None:
    """A logarithmic axis, with plain numbers, where the largest value is `wide` times the smallest."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if max(values) <= wide * min(values):
        return
    getattr(ax, f"set_{axis}scale")("log")
    along = getattr(ax, f"{axis}axis")
    along.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if max(values) < 1e3 * min(values) else (1.0,)))
    along.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    along.set_minor_formatter(NullFormatter())


def attention_picture(profile: HeadProfile) -> Picture | None:
    """Attention of some heads with what the chosen method keeps over it; None where none was measured."""
    found = profile.measurements
    if found is None or not found.maps:
        return None
    shown = shown_maps(profile, found)
    columns = min(4, len(shown))
    rows = -(-len(shown) // columns)
    figure = new_figure(2.75 * columns + 0.3, 3.05 * rows + 0.5)
    axes = figure.subplots(rows, columns, squeeze=False)
    labels = short_labels(profile.methods)
    for at, ax in enumerate(axes.flat):
        if at >= len(shown):
            ax.set_visible(False)
            continue
        seen = shown[at]
        plan = plan_of(profile, found, seen)
        index = int(profile.plans[plan].choice[seen.layer, seen.head])
        kept = kept_of(profile, found, seen)
        _draw(ax, seen, found.cases[seen.case].tokens, kept)
        lines = [f"layer {seen.layer}, head {seen.head}", _cut(labels[index], 42), _said(profile, plan, seen)]
        if len(profile.plans) > 1:
            a, b = profile.plans[plan].steps
            lines[0] += f", steps {a:g} to {b:g}"
        ax.set_title("\n".join(lines), fontsize=8, loc="left", linespacing=1.25)
        ax.set_xlabel("key" if at + columns >= len(shown) else "", fontsize=8)
        ax.set_ylabel("query" if at % columns == 0 else "", fontsize=8)
    return finish(figure, "attention")


def _draw(ax: Any, seen: HeadMap, tokens: int, kept: Any) -> None:
    from matplotlib.colors import ListedColormap, LogNorm

    place = extent(tokens, len(seen.attention))
    weights = np.clip(np.nan_to_num(seen.attention), 1e-6, 1)
    ax.imshow(weights, cmap="Greys", norm=LogNorm(1e-4, 1), extent=place, interpolation="nearest")
    if kept is not None:
        over = np.ma.masked_where(~kept, np.ones(kept.shape))
        ax.imshow(over, cmap=ListedColormap([_KEPT]), alpha=0.36, extent=place, interpolation="nearest")
    ax.set_xlim(0, tokens)
    ax.set_ylim(tokens, 0)
    ax.set_xticks([0, tokens // 2, tokens])
    ax.set_yticks([0, tokens // 2, tokens])
    ax.tick_params(labelsize=7, length=2)
    for spine in ax.spines.values():
        spine.set_color("#9AA0A6")
        spine.set_linewidth(0.6)


def shown_maps(profile: HeadProfile, found: Measurements, most: int = _MOST_MAPS) -> list[HeadMap]:
    """At most so many maps: of each method in turn, the heads with the largest damage first."""
    damage = profile.figures.get("damage", profile.figures["density"])
    by_method: dict[int, list[HeadMap]] = {}
    for seen in found.maps:
        plan = plan_of(profile, found, seen)
        by_method.setdefault(int(profile.plans[plan].choice[seen.layer, seen.head]), []).append(seen)
    queues = []
    for index in sorted(by_method):

        def place(seen: HeadMap) -> tuple[float, int, int, int]:
            value = float(np.nan_to_num(damage[plan_of(profile, found, seen), seen.layer, seen.head]))
            return -value, seen.case, seen.layer, seen.head

        queues.append(sorted(by_method[index], key=place))
    # Dense heads, where everything is kept, last.
    queues.sort(key=lambda queue: queue[0] in by_method.get(0, []))
    turns = max(map(len, queues))
    picked = [queue[turn] for turn in range(turns) for queue in queues if turn < len(queue)][:most]
    return sorted(picked, key=lambda seen: (seen.layer, seen.head, seen.case))


def plan_of(profile: HeadProfile, found: Measurements, seen: HeadMap) -> int:
    """The plan at the middle of the steps that were measured."""
    middle = sum(found.cases[seen.case].steps) / 2
    return next((i for i, p in enumerate(profile.plans) if middle < p.steps[1]), len(profile.plans) - 1)


def kept_of(profile: HeadProfile, found: Measurements, seen: HeadMap) -> NDArray[np.bool_] | None:
    """What the head's method keeps, [cells, cells]; None where that was not measured."""
    method = profile.methods[profile.plans[plan_of(profile, found, seen)].choice[seen.layer, seen.head]]
    return seen.kept[found.candidates.index(method)] if method in found.candidates else None


def _said(profile: HeadProfile, plan: int, seen: HeadMap) -> str:
    names = {"density": "density", "recall": "recall", "output_error": "error"}
    values = {n: profile.figures[n][plan, seen.layer, seen.head] for n in names if n in profile.figures}
    return ", ".join(f"{names[n]} {v:.2f}" if v >= 0.005 or v == 0 else f"{names[n]} {v:.0e}"
                     for n, v in values.items() if not np.isnan(v))  # fmt: skip


def _singles(profile: HeadProfile) -> Iterator[tuple[str, float, float]]:
    """(method, mean density or time, total damage) of each candidate for all heads; without dense.

    Damages of lengths are averaged, and those of step ranges weighed by their share, as on the Pareto front.
    """
    found = profile.measurements
    if found is None or profile.metric == PUBLISHED or not weights_of(profile.metric).keys() <= found.figures.keys():
        return
    steps = sorted({case.steps for case in found.cases})
    weights = np.zeros(len(found.cases))
    for a, b in steps:
        own = [i for i, case in enumerate(found.cases) if case.steps == (a, b)]
        weights[own] = (b - a) / len(own)
    weights /= weights.sum()
    damage = found.damage(profile.metric)
    cost = found.figures["seconds" if "time" in profile.budget else "density"].astype(np.float64)
    dense = np.broadcast_to(cost[..., :1], cost.shape)
    cost = np.where(np.isfinite(damage), cost, dense) / (np.nanmean(dense) if "time" in profile.budget else 1)
    damage = np.where(np.isfinite(damage), damage, 0)
    for i, candidate in enumerate(found.candidates):
        x = float(weights @ np.nanmean(cost[..., i], (1, 2)))
        y = float(weights @ damage[..., i].sum((1, 2))) * len(steps)
        if i and y > 0 and x > 0:
            yield candidate.name, x, y


def single_styles(profile: HeadProfile) -> dict[str, tuple[str, str]]:
    """(colour, one of MARKS) by name of method: the colours of the maps, where the profile uses the method."""
    if profile.measurements is None:
        return {}
    names = dict.fromkeys([m.name for m in profile.methods] + [m.name for m in profile.measurements.candidates])
    first = [next(m for m in (*profile.methods, *profile.measurements.candidates) if m.name == n) for n in names]
    colours = method_styles(first)
    return {m.name: (colours[i][0], MARKS[i % len(MARKS)]) for i, m in enumerate(first)}


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."
