"""`hf-sparse-attn methods`: the list of methods, or all there is to know of one."""

from __future__ import annotations

import argparse
import json

from hf_sparse_attn.documents import catalog, method_page, method_text
from hf_sparse_attn.tables import markdown, table


def main(args: argparse.Namespace, width: int, terminal: int) -> str:
    """What to print.

    Args:
        args: `name` (None for the list), `markdown` and `json`.
        width: columns of the tables.
        terminal: columns of the terminal.

    Raises:
        ValueError: no method has that name.
    """
    if args.name is not None:
        if args.markdown and not args.json:
            return method_page.page(args.name, method_text.evaluation()).rstrip("\n")
        found = method_text.record(args.name, terminal)
        return json.dumps(found, indent=2, default=str) if args.json else method_text.render(found, terminal)
    columns, presets = catalog.presets_table()
    if args.json:
        document = {
            "methods": catalog.methods(),
            "families": catalog.families(),
            "backends": catalog.backends(),
            "presets": [dict(zip(columns, row, strict=True)) for row in presets],
        }
        return json.dumps(document, indent=2, default=str)
    if args.markdown:
        parts = catalog.tables().items()
        return "\n\n".join(f"<!-- generated: {name} -->\n{markdown(*t)}\n<!-- end -->" for name, t in parts)
    # What a method keeps takes a sentence, too wide for a terminal: it is in --markdown and --json.
    heads, rows = catalog.methods_table(third_party=True)
    methods = table([*heads[:1], *heads[2:]], [[*row[:1], *row[2:]] for row in rows], width=width)
    return f"{methods}\n\n{table(columns, presets, title='Presets (quality=)', width=width)}"
