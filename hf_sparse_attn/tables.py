"""Tables: in a terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

# Columns and rows.
Table = tuple[Sequence[str], Sequence[Sequence[str]]]


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; a `|` in a cell is escaped."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line(["---"] * len(columns)), *map(line, rows)])


# A cell of a column that is set to the right: a number, perhaps with a unit, or nothing to say.
_NUMBER = re.compile(r"-|[+-]?\d[\d./]*( ?(ms|s|x|%|GB|MB))?")


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None, width: int = 110) -> str:
    """A plain text table drawn by rich, without colours, for terminals, logs and README."""
    import io

    from rich import box
    from rich.console import Console
    from rich.table import Table

    rows = [tuple(row) for row in rows]
    drawn = Table(box=box.SIMPLE_HEAD)
    for i, name in enumerate(columns):
        numeric = i > 0 and all(_NUMBER.fullmatch(row[i]) for row in rows) and any(row[i] != "-" for row in rows)
        drawn.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*row)
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True, highlight=False, markup=False).print(drawn)
    lines = [line.rstrip() for line in buffer.getvalue().strip("\n").splitlines()]
    return "\n".join(lines if title is None else [title, *lines])
