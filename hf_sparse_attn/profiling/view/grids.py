"""Maps of all layers and heads as tables of HTML: each cell holds its value, and says the whole of it when asked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.view.colours import LEVELS, level_class
from hf_sparse_attn.profiling.view.plots import method_styles, scale_of, short
from hf_sparse_attn.profiling.view.report import number, short_labels, words
from hf_sparse_attn.tables import Markup, escape

# Past so many heads, numbers in cells are for readers and titles alone.
_MOST_NUMBERS = 16
# (plan, layer, head): the id of the figure that shows its attention.
Links = Mapping[tuple[int, int, int], str]


def cell_id(plan: int, layer: int, head: int) -> str:
    """The id of a head's cell in the map of methods."""
    return f"head-{plan}-{layer}-{head}"


def method_grid(profile: HeadProfile, plan: int, links: Links) -> str:
    """The method of every head at the steps of a plan, and below it the methods by their letters."""
    styles, labels = method_styles(profile.methods), short_labels(profile.methods)
    choice = profile.plans[plan].choice

    def cell(layer: int, head: int) -> str:
        index = int(choice[layer, head])
        figures = ", ".join(f"{words(n)} {number(float(v[plan, layer, head]))}" for n, v in profile.figures.items())
        said = f"layer {layer}, head {head}: {labels[index]}; {figures}"
        link = links.get((plan, layer, head))
        own = f' id="{cell_id(plan, layer, head)}"'
        return _cell(f"method{index}", styles[index][1], said, own, link)

    used, many = np.unique(choice, return_counts=True)
    said = list(labels)
    for i, n in zip(used, many, strict=True):
        said[i] = f"{labels[i]} ({n})"
    shown = named(profile, said)
    key = "".join(f"<li>{shown[i]}</li>" for i in used)
    caption = "One cell per head; in brackets, the number of heads. Equal hues are one method at several parameters."
    caption += " Underlined heads lead to their attention." if links else ""
    below = f'<ul class="key">{key}</ul>'
    return _figure(
        f"methods-{plan}", "Method of each head", choice.shape, cell, f"letters {_tiny(choice.shape)}", below, caption
    )


def figure_grid(profile: HeadProfile, figure: str, plan: int) -> str:
    """A figure of every head at the steps of a plan, with the means of layers."""
    values = profile.figures[figure][plan].astype(np.float64)
    top, cut = scale_of(profile, figure)

    def cell(layer: int, head: int) -> str:
        value = float(values[layer, head])
        said = f"layer {layer}, head {head}: {words(figure)} {number(value)}"
        if np.isnan(value):
            return _cell("unknown", "?", f"layer {layer}, head {head}: not known")
        share = value**0.5 if figure == "density" else value / top
        return _cell(level_class(figure, share), short(value), said)

    def mean(layer: int) -> str:
        known = values[layer][~np.isnan(values[layer])]
        return short(float(known.mean())) if known.size else "-"

    ramp = "".join(f'<i class="{figure}{level}"></i>' for level in range(LEVELS))
    scale = f'<p class="ramp">0 <span class="bar">{ramp}</span> {short(top)}{" and more" if cut else ""}</p>'
    caption = {
        "density": "Share of the visible pairs of tokens that the head computes (the colours by its square root)",
        "damage": f"What the choice costs by {words(profile.metric)}: 0 is as good as dense",
    }[figure]
    caption += "; in the last column, the mean of the layer."
    caption += " Cells with a question mark are not known." if np.isnan(values).any() else ""
    kind = _tiny(values.shape)
    title = f"{words(figure).capitalize()} of each head"
    return _figure(f"{figure}-{plan}", title, values.shape, cell, kind, scale, caption, mean)


def named(profile: HeadProfile, labels: Sequence[str]) -> list[Markup]:
    """The methods in words, each with its colour and letter.

    Args:
        profile: the profile.
        labels: a text for each of its methods.
    """
    letters = [letter for _, letter in method_styles(profile.methods)]
    return [
        Markup(
            f'<span class="named"><span class="chip method{i}" aria-hidden="true">{letter}</span>'
            f"<span>{escape(label)}</span></span>"
        )
        for i, (letter, label) in enumerate(zip(letters, labels, strict=True))
    ]


def _tiny(shape: tuple[int, ...]) -> str:
    return "tiny" if shape[1] > _MOST_NUMBERS else ""


def _figure(
    name: str,
    title: str,
    shape: tuple[int, ...],
    cell: Callable[[int, int], str],
    kind: str,
    below: str,
    caption: str,
    mean: Callable[[int], str] | None = None,
) -> str:
    """A table of all layers and heads with its title above, and its key and caption below."""
    layers, heads = shape
    last = "" if mean is None else '<th scope="col" class="mean">mean</th>'
    top = "".join(f'<th scope="col">{head}</th>' for head in range(heads))
    rows = []
    for layer in range(layers):
        cells = "".join(cell(layer, head) for head in range(heads))
        ending = "" if mean is None else f'<td class="mean">{mean(layer)}</td>'
        rows.append(f'<tr><th scope="row">{layer}</th>{cells}{ending}</tr>')
    head = f"<thead><tr><td></td>{top}{last}</tr></thead>"
    table = f'<table class="map {kind}" aria-labelledby="{name}">{head}<tbody>{"".join(rows)}</tbody></table>'
    return (
        f'<figure><p class="title" id="{name}">{escape(title)}</p><div class="scroll">{table}</div>{below}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _cell(kind: str, text: str, said: str, more: str = "", link: str | None = None) -> str:
    said = escape(said)
    if link is None:
        return f'<td class="{kind}"{more} title="{said}">{text}</td>'
    return f'<td class="{kind}"{more}><a href="#{link}" title="{said}">{text}</a></td>'
