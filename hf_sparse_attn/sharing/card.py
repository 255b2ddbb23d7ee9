"""Cards of shared folders: front matter and tables."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from hf_sparse_attn.tables import markdown


def front_matter(values: dict[str, Any]) -> str:
    """YAML: every value is written as JSON, which YAML includes, so that no text can add a key."""
    lines = [f"{key}: {json.dumps(value)}" for key, value in values.items()]
    return "---\n" + "\n".join(lines) + "\n---\n"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return markdown(tuple(columns), [tuple(plain_value(cell) for cell in row) for row in rows]) + "\n"


def section(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The parts of a card with a table under a heading; none where there are no rows."""
    return [f"## {title}\n", markdown_table(columns, rows)] if rows else []


def plain_value(text: str) -> str:
    """A text that ends no cell, line or tag."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'")
