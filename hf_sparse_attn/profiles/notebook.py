"""A HeadProfile in a notebook: a line on the whole, its quality and its methods, in the notebook's own colours."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hf_sparse_attn.profiles.card import evaluation_table, method_table, number
from hf_sparse_attn.tables import escape, html

if TYPE_CHECKING:
    from hf_sparse_attn.profiles.head_profile import HeadProfile


def render(profile: HeadProfile) -> str:
    """HTML without a script, a style sheet or an address."""
    model = profile.model
    columns, rows = method_table(profile)
    budget = ", ".join(f"{name} {value:g}" for name, value in profile.budget.items()) or "none"
    ranges = f", {len(profile.plans)} step ranges" if len(profile.plans) > 1 else ""
    title = f"Head profile of {model.model_class}: {model.layers} layers x {model.heads} heads{ranges}"
    said = f"density {number(profile.density)}, budget {budget}, damage by {profile.metric}"
    table = html(columns, rows, range(1, len(columns)), inline=True)
    names, figures = evaluation_table(profile)
    at = [i for i, name in enumerate(names) if name != "figure"]
    whole = f"<p>On inputs it was not made from:</p>{html(names, figures, at, inline=True)}" if figures else ""
    return f"<p><b>{escape(title)}</b><br>{escape(said)}</p>{whole}{table}"
