"""How a profile is drawn: one picture, the styles of methods, and maps of all layers and heads."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.report import short_labels, words

# Okabe and Ito's colours, which the colour-blind tell apart; dense is grey.
_HUES = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#7F5539")
_DENSE = "#DADDE1"
_UNKNOWN = "#F7F7F7"
_INK = "#22262B"
_FAINT = "#6B7280"
_DPI = 140
# A cell needs this many inches to hold a letter, and a number.
_LETTER, _NUMBER = 0.17, 0.42


@dataclass(frozen=True)
class Picture:
    """One picture.

    Args:
        name: of its file, without suffix.
        png: the file.
    """

    name: str
    png: bytes


def method_styles(methods: Sequence[Method]) -> list[tuple[str, str]]:
    """(colour, letter) of each method: a hue per name, paler for further parameters; dense is a grey dot.

    Past 26 methods there is no letter.
    """
    names = list(dict.fromkeys(m.name for m in methods if m.name != "dense"))
    letters = iter(ascii_uppercase)
    seen: dict[str, int] = {}
    styles = []
    for method in methods:
        if method.name == "dense":
            styles.append((_DENSE, "·"))
            continue
        variants = sum(m.name == method.name for m in methods)
        nth = seen[method.name] = seen.get(method.name, -1) + 1
        share = 0.66 * nth / max(2, variants - 1)
        hue = rgb(_HUES[names.index(method.name) % len(_HUES)])
        styles.append((to_hex(hue + (1 - hue) * share), next(letters, "")))
    return styles


def new_figure(width: float, height: float) -> Any:
    """An empty figure of that many inches, which no other drawing of the process sees."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def finish(figure: Any, name: str) -> Picture:
    """The figure as a picture. Dollar signs are dollar signs: a name may hold any text."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=_DPI, format="png")
    return Picture(name, buffer.getvalue())


def method_map(profile: HeadProfile, choice: NDArray[np.int16], name: str, title: str) -> Picture:
    """The method of every head, [layers, heads]."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    styles, labels = method_styles(profile.methods), short_labels(profile.methods)
    used, many = np.unique(choice, return_counts=True)
    width, height, cell = _size(choice.shape)
    columns = max(1, min(len(used), int((width + 0.8) // (0.6 + 0.075 * max(len(labels[i]) + 6 for i in used)))))
    rows = -(-len(used) // columns)
    figure = new_figure(width + 0.9, height + 0.75 + 0.22 * rows)
    ax = figure.subplots()
    colours = ListedColormap([c for c, _ in styles])
    ax.imshow(choice, cmap=colours, vmin=-0.5, vmax=len(styles) - 0.5, interpolation="nearest", aspect="auto")
    _frame(ax, choice.shape, title)
    if cell >= _LETTER:
        for (layer, head), index in np.ndenumerate(choice):
            colour, letter = styles[index]
            _write(ax, head, layer, letter, colour, min(9.0, 42 * cell))
    order = sorted(range(len(used)), key=lambda i: int(used[i]))
    handles = [Patch(facecolor=styles[used[i]][0], edgecolor="#9AA0A6", linewidth=0.5) for i in order]
    said = [f"{styles[used[i]][1]}  {labels[used[i]]} ({many[i]})".strip() for i in order]
    figure.legend(
        handles, said, loc="outside lower center", ncols=columns, fontsize=8, frameon=False, handlelength=1.1,
        handleheight=1.1, columnspacing=1.4,
    )  # fmt: skip
    return finish(figure, name)


def figure_map(profile: HeadProfile, figure_name: str, plan: int, name: str, title: str) -> Picture:
    """A figure of every head in one of the plans."""
    import matplotlib
    from matplotlib.colors import Normalize, PowerNorm

    values = profile.figures[figure_name][plan].astype(np.float64)
    is_density = figure_name == "density"
    top, cut = scale_of(profile, figure_name)
    norm = PowerNorm(0.5, 0, 1) if is_density else Normalize(0, top)
    width, height, cell = _size(values.shape)
    figure = new_figure(width + 2.4, height + 0.75)
    ax, side = figure.subplots(1, 2, width_ratios=(width, 0.8), sharey=True)
    colours = matplotlib.colormaps["YlGnBu" if is_density else "YlOrBr"].with_extremes(bad=_UNKNOWN)
    image = ax.imshow(values, cmap=colours, norm=norm, interpolation="nearest", aspect="auto")
    _frame(ax, values.shape, title)
    if cell >= _NUMBER:
        for (layer, head), value in np.ndenumerate(values):
            text = "?" if np.isnan(value) else short(value)
            _write(ax, head, layer, text, to_hex(np.array(colours(norm(value))[:3])), 7.5)
    bar = figure.colorbar(image, ax=side, fraction=0.35, pad=0.1, extend="max" if cut else "neither")
    bar.ax.tick_params(labelsize=8, length=2)
    bar.outline.set_visible(False)
    bar.set_label("share of visible pairs kept" if is_density else f"damage ({words(profile.metric)})", fontsize=8)
    known = [float(np.nanmean(row)) if not np.isnan(row).all() else 0.0 for row in values]
    side.barh(range(len(known)), known, height=0.8, color="#9CB4CC" if is_density else "#D9B58A")
    side.set_title("mean", fontsize=8, color=_FAINT)
    side.tick_params(axis="y", which="both", length=0, labelleft=False)
    side.tick_params(axis="x", labelsize=7, length=2)
    side.locator_params(axis="x", nbins=2)
    side.set_xlim(0, max([*known, 1e-12]) * 1.08)
    for edge in ("top", "right", "left"):
        side.spines[edge].set_visible(False)
    return finish(figure, name)


def scale_of(profile: HeadProfile, figure: str) -> tuple[float, bool]:
    """Where the scale of a figure ends, one for all step ranges, and whether some heads are beyond it."""
    if figure == "density":
        return 1.0, False
    # A few heads far out must not make all others white.
    every = profile.figures[figure]
    most, usual = float(np.nanmax(every)), float(np.nanquantile(every, 0.99))
    top = (usual if most > 2 * usual > 0 else most) or 1.0
    return top, most > top


def _size(shape: tuple[int, ...]) -> tuple[float, float, float]:
    """(width, height) of a map of layers x heads in inches, and the smaller side of a cell."""
    layers, heads = shape
    width = min(max(0.27 * heads, min(0.75 * heads, 4.5)), 9.5)
    height = min(max(0.22 * layers, min(0.5 * layers, 3.0)), 9.0)
    return width, height, min(width / heads, height / layers)


def _frame(ax: Any, shape: tuple[int, ...], title: str) -> None:
    """Labels, whole numbers as ticks, thin lines between the cells."""
    layers, heads = shape
    width, height, cell = _size(shape)
    ax.set_title(title, fontsize=11, color=_INK, loc="left", pad=8)
    ax.set_xlabel("head", fontsize=9)
    ax.set_ylabel("layer", fontsize=9)
    ax.set_xticks(_ticks(heads, width / 0.28))
    ax.set_yticks(_ticks(layers, height / 0.2))
    ax.tick_params(labelsize=8, length=0)
    ax.tick_params(which="minor", length=0)
    if cell >= 0.06:
        ax.set_xticks(np.arange(heads + 1) - 0.5, minor=True)
        ax.set_yticks(np.arange(layers + 1) - 0.5, minor=True)
        ax.grid(which="minor", color="white", linewidth=min(1.2, 5 * cell))
    for spine in ax.spines.values():
        spine.set_visible(False)


def _ticks(count: int, room: float) -> NDArray[np.int64]:
    step = next(
        s for s in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, 4096) if count / s <= room
    )
    return np.arange(0, count, step)


def _write(ax: Any, x: int, y: int, text: str, behind: str, size: float) -> None:
    dark = float(rgb(behind) @ (0.299, 0.587, 0.114)) < 0.55
    drawn = ax.text(x, y, text, ha="center", va="center", fontsize=size, color="white" if dark else _INK)
    # A thousand letters that lie within the map need not be measured for the layout.
    drawn.set_in_layout(False)


def short(value: float) -> str:
    """A figure that fits into a cell."""
    return f"{value:.2f}" if value >= 0.1 else f"{value:.3f}" if value >= 0.001 or value == 0 else f"{value:.0e}"


def rgb(text: str) -> NDArray[np.float64]:
    """[red, green, blue] from 0 to 1 of "#RRGGBB"."""
    return np.array([int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)])


def to_hex(colour: NDArray[np.float64]) -> str:
    """ "#RRGGBB" of [red, green, blue] from 0 to 1."""
    return "#" + "".join(f"{round(255 * float(c)):02X}" for c in colour)
