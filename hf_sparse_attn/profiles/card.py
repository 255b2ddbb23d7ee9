"""The model card of a HeadProfile, made from nothing but the profile."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.sharing.card import front_matter, plain_value, section
from hf_sparse_attn.sharing.hub import is_hub_id

if TYPE_CHECKING:
    from hf_sparse_attn.profiles.head_profile import HeadProfile

_EVALUATION = ("tokens", "inputs", "figure", "density", "dense", "sparse", "difference")


def card(profile: HeadProfile, repo_id: str | None = None) -> str:
    """README.md of a profile: front matter, how to use it, what it chose and what was measured.

    Args:
        profile: the profile.
        repo_id: the repository that it goes to, for the example; None for a folder.
    """
    model = profile.model
    parts = [
        _front(profile),
        f"# Sparse attention head profile for {plain_value(model.model_class)}\n",
        f"Which sparse attention method each of {model.layers} layers x {model.heads} heads runs; mean density "
        f"{number(profile.density)} of the visible pairs of tokens.\n",
        "## Use\n",
        "```python\nimport hf_sparse_attn as hsa\n\n"
        f"with hsa.patch(model, {json.dumps(repo_id or 'this/folder')}) as p:\n    ...\n    print(p.report())\n```\n",
        "A model of another class or configuration is refused, and the difference named.\n",
        *section("Model", ("field", "value"), [(k, str(v)) for k, v in vars(model).items()]),
        *section("Methods", *method_table(profile)),
        *section("Quality on inputs it was not made from", *evaluation_table(profile)),
        *section("Calibration", ("", ""), _facts(profile)),
        *section("Other budgets", ("density", "damage"), [(number(a), number(b)) for a, b in profile.pareto]),
        *section("Versions", ("library", "version"), list(profile.versions.items())),
    ]
    return "\n".join(parts)


def _front(profile: HeadProfile) -> str:
    front: dict[str, Any] = {"library_name": "hf_sparse_attn", "tags": ["sparse-attention", "head-profile"]}
    base = profile.calibration.get("model")
    if is_hub_id(base):
        front["base_model"] = base
    return front_matter(front)


def method_table(profile: HeadProfile) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: each method in use, the share of the heads that run it, and the means of their figures."""
    choice = np.stack([p.choice for p in profile.plans])
    names = [name for name in profile.figures if name != "density"]
    rows = []
    for index, method in enumerate(profile.methods):
        chosen = choice == index
        if not chosen.any():
            continue
        figures = [profile.figures[name][chosen] for name in ("density", *names)]
        means = [number(float(np.nanmean(v))) if not np.isnan(v).all() else "-" for v in figures]
        rows.append((label_of(method), f"{100 * chosen.mean():.1f} %", *means))
    return ("method", "heads", "mean density", *names), rows


def evaluation_table(profile: HeadProfile) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows: what the profile does to the whole model; no rows where that was not measured."""
    rows = [
        tuple(number(row[name]) if isinstance(row[name], float) else str(row[name]) for name in _EVALUATION)
        for row in profile.evaluation
    ]
    return _EVALUATION, rows


def _facts(profile: HeadProfile) -> list[tuple[str, str]]:
    facts: dict[str, Any] = {"metric": profile.metric, **{f"budget: {k}": v for k, v in profile.budget.items()}}
    if len(profile.plans) > 1:
        facts["step ranges"] = ", ".join(f"{a:.3g} to {b:.3g}" for a, b in (p.steps for p in profile.plans))
    if profile.same_in_group:
        facts["key/value groups"] = "all query heads of a group read the union of their patterns"
    return [(k, str(v)) for k, v in {**facts, **profile.calibration}.items()]


def number(value: float) -> str:
    """A figure in text."""
    return "unknown" if np.isnan(value) else f"{value:.4g}"
