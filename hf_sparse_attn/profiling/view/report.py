"""What a head profile says: tables for the terminal, plain values for programs, and words and numbers for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.tables import table

_WORST = ("damage", "output_error_p95", "output_error")


def summary(profile: HeadProfile, worst: int = 10) -> dict[str, Any]:
    """A profile in plain values, ready for JSON; None where a figure is not known.

    Args:
        profile: the profile.
        worst: heads listed, those with the largest damage (where that is unknown: output error) first.

    Raises:
        ValueError: `worst` is negative.
    """
    if worst < 0:
        raise ValueError(f"`worst` must be 0 or more, got {worst}")
    choice = np.stack([p.choice for p in profile.plans])
    names = [short_labels(profile.methods), profile.labels()]
    methods = [
        {
            "method": profile.methods[i].name,
            "short": names[0][i],
            "label": names[1][i],
            "heads": int((choice == i).sum()),
            "heads_by_steps": [int((c == i).sum()) for c in choice],
            "figures": {n: _mean(v[choice == i]) for n, v in profile.figures.items()},
        }
        for i in range(len(profile.methods))
        if (choice == i).any()
    ]
    layers = []
    for layer in range(profile.model.layers):
        used, many = np.unique(choice[:, layer], return_counts=True)
        by_heads = sorted(zip(many.tolist(), used.tolist(), strict=True), key=lambda pair: (-pair[0], pair[1]))
        layers.append(
            {
                "layer": layer,
                "density": _known(profile.layer_density(layer)),
                "damage": _mean(profile.figures["damage"][:, layer]) if "damage" in profile.figures else None,
                "methods": {names[0][i]: n for n, i in by_heads},
            }
        )
    return {
        "model": vars(profile.model),
        "metric": profile.metric,
        "budget": dict(profile.budget),
        "density": _known(profile.density),
        "damage": total_damage(profile),
        "steps": [list(p.steps) for p in profile.plans],
        "heads": int(choice.size),
        "same_in_group": profile.same_in_group,
        "methods": methods,
        "layers": layers,
        "worst": _worst(profile, worst),
        "pareto": [list(point) for point in profile.pareto],
        "calibration": dict(profile.calibration),
        "versions": dict(profile.versions),
        "evaluation": [dict(row) for row in profile.evaluation],
        "measured": profile.measurements is not None,
    }


def render(document: dict[str, Any], width: int = 110) -> str:
    """The summary as tables for a terminal."""
    model, steps = document["model"], document["steps"]
    many = len(steps) > 1
    size = f"{model['layers']} layers x {model['heads']} heads" + (f", {len(steps)} step ranges" if many else "")
    budget = ", ".join(f"{name} {value:g}" for name, value in document["budget"].items()) or "none"
    lines = [
        f"Head profile of {model['model_class']} ({model['family']}): {size}",
        f"budget: {budget}; achieved density: {number(document['density'])}; "
        f"total damage by {document['metric']}: {number(document['damage'])}",
    ]
    ranges = [f"heads, steps {a:g} to {b:g}" for a, b in steps] if many else ["heads"]
    figures = [n for n in ("density", "recall", "output_error", "damage") if n in _figure_names(document)]
    rows = [
        [m["label"], *map(str, m["heads_by_steps"]), *(number(m["figures"].get(n)) for n in figures)]
        for m in document["methods"]
    ]
    parts = ["\n".join(lines), table(["method", *ranges, *map(words, figures)], rows, "Methods", width)]
    parts.append(table(*layer_table(document), "Layers", width))
    if document["evaluation"]:
        parts.append(table(*evaluation_table(document), "Whole model, on inputs it was not made from", width))
    if document["worst"]:
        parts.append(table(*worst_table(document), f"Worst heads of {document['heads']}", width))
    return "\n\n".join(parts)


def layer_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The layers as columns and rows of text."""
    rows = []
    for entry in document["layers"]:
        used = ", ".join(f"{n} {name}" for name, n in entry["methods"].items())
        rows.append([str(entry["layer"]), number(entry["density"]), number(entry["damage"]), used])
    return ["layer", "density", "damage", "heads by method"], rows


def evaluation_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What the profile does to the whole model as columns and rows of text."""
    figures = ("density", "dense", "sparse", "difference")
    rows = [
        [str(row["tokens"]), str(row["inputs"]), row["figure"], *(number(row[name]) for name in figures)]
        for row in document["evaluation"]
    ]
    return ["tokens", "inputs", "figure", *figures], rows


def worst_table(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The worst heads as columns and rows of text."""
    known = _figure_names(document)
    figures = [n for n in ("density", "damage", "output_error", "output_error_p95", "recall") if n in known]
    many = len(document["steps"]) > 1
    columns = ["layer", "head", *(["steps"] if many else []), "method", *map(words, figures)]
    rows = [
        [
            str(head["layer"]),
            str(head["head"]),
            *([f"{head['steps'][0]:g} to {head['steps'][1]:g}"] if many else []),
            head["method"],
            *(number(head["figures"][n]) for n in figures),
        ]
        for head in document["worst"]
    ]
    return columns, rows


def _figure_names(document: dict[str, Any]) -> set[str]:
    return {name for m in document["methods"] for name in m["figures"]}


def _worst(profile: HeadProfile, many: int) -> list[dict[str, Any]]:
    by = next((n for n in _WORST if n in profile.figures and not np.isnan(profile.figures[n]).all()), None)
    if by is None:
        return []
    values = np.nan_to_num(profile.figures[by].astype(np.float64), nan=-math.inf)
    order = [np.unravel_index(i, values.shape) for i in np.argsort(-values, axis=None, kind="stable")[:many]]
    labels = short_labels(profile.methods)
    return [
        {
            "layer": int(layer),
            "head": int(head),
            "steps": list(profile.plans[plan].steps),
            "method": labels[profile.plans[plan].choice[layer, head]],
            "figures": {n: _known(float(v[plan, layer, head])) for n, v in profile.figures.items()},
        }
        for plan, layer, head in order
        if values[plan, layer, head] > -math.inf
    ]


def _mean(values: Any) -> float | None:
    return None if np.isnan(values).all() else float(np.nanmean(values.astype(np.float64)))


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def short_labels(methods: Sequence[Method]) -> list[str]:
    """The methods in few words: the name, and of the parameters those in which methods of this name differ."""
    made = []
    for method in methods:
        others = [m.params() for m in methods if m.name == method.name]
        own = method.params()
        differ = {n: v for n, v in own.items() if any(o.get(n) != v for o in others)}
        made.append(" ".join([method.name, *(f"{n}={_brief(v)}" for n, v in differ.items())]))
    # Methods of other packages may hide their parameters.
    return made if len(set(made)) == len(made) else [label_of(m) for m in methods]


def total_damage(profile: HeadProfile) -> float | None:
    """Damage of all heads together, step ranges weighed by their share of the schedule; None where it is unknown.

    A sum over the heads of all step ranges, as on the Pareto front.
    """
    if "damage" not in profile.figures or np.isnan(profile.figures["damage"]).all():
        return None
    sums = np.nansum(profile.figures["damage"].astype(np.float64), (1, 2))
    # Shares of the schedule, with mean 1.
    weights = np.array([b - a for a, b in (p.steps for p in profile.plans)]) * len(profile.plans)
    return float(sums @ weights)


def number(value: float | None) -> str:
    """A figure in text; "-" where it is not known."""
    if value is None or math.isnan(value):
        return "-"
    return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.2e}"


def words(name: str) -> str:
    """The name of a figure as a heading."""
    return {"output_error_p95": "output error, 95 %"}.get(name, name.replace("_", " "))


def _brief(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value).replace(" ", "")
    return text if len(text) <= 24 else f"{text[:21]}..."
