"""Tables: in a terminal, as Markdown and as HTML."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape as escape_html

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


class Markup(str):
    """HTML that is written as it is; every other text is escaped first."""

    __slots__ = ()


def escape(text: str) -> Markup:
    """Text for HTML: no tags, and no characters that only control or turn the others; Markup is returned as it is."""
    if isinstance(text, Markup):
        return text
    return Markup(escape_html("".join(c if c.isprintable() else "\ufffd" for c in text)))


def html(
    columns: Sequence[str],
    rows: Iterable[Sequence[str]],
    numeric: Iterable[int] = (),
    kind: str = "",
    inline: bool = False,
) -> Markup:
    """An HTML table.

    Args:
        columns: headings; no head where all are empty.
        rows: cells, each a text, or Markup.
        numeric: columns that are set to the right; their cells are of class "n".
        kind: the table's class.
        inline: how cells are set stands in each of them, for a place with a style sheet of its own (a notebook).
    """
    right = set(numeric)

    def opened(tag: str, column: int) -> str:
        scope = ' scope="col"' if tag == "th" else ""
        if inline:
            side = "right" if column in right else "left"
            return f'<{tag}{scope} style="text-align: {side}">'
        kept = ' class="n"' if column in right else ""
        return f"<{tag}{scope}{kept}>"

    def line(tag: str, cells: Sequence[str]) -> str:
        return f"<tr>{''.join(f'{opened(tag, i)}{escape(c)}</{tag}>' for i, c in enumerate(cells))}</tr>"

    head = f"<thead>{line('th', columns)}</thead>" if any(columns) else ""
    body = "".join(line("td", row) for row in rows)
    opening = f'<table class="{kind}">' if kind else "<table>"
    return Markup(f"{opening}{head}<tbody>{body}</tbody></table>")
