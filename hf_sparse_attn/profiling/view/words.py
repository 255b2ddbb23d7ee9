"""Words and numbers that tables, plots and pages of profiles share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import label_of


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
    return float(sums @ step_weights(profile))


def step_weights(profile: HeadProfile) -> Any:
    """What the step ranges weigh in a sum over all of them: their shares of the schedule, with mean 1."""
    return np.array([b - a for a, b in (p.steps for p in profile.plans)]) * len(profile.plans)


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
