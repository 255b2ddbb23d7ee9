"""`hf-sparse-attn coverage`: the model classes installed here, and which can be patched."""

from __future__ import annotations

import argparse
import json

from hf_sparse_attn.coverage import page as coverage_page
from hf_sparse_attn.coverage.listing import coverage_summary, coverage_table
from hf_sparse_attn.coverage.run import coverage_of, versions
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.tables import table


def main(args: argparse.Namespace, width: int) -> tuple[str, list[str]]:
    """What to print, and what was written.

    Args:
        args: `library`, `markdown`, `output` and `json`.
        width: columns of the table.

    Raises:
        OSError: a folder that cannot be made.
    """
    if args.output is not None:
        # A folder that cannot be made must not cost the list.
        make_folder(args.output)
    found = coverage_of(args.library)
    used = versions(found)
    document = coverage_page.document(found, used)
    written = [] if args.output is None else [f"wrote {path}" for path in coverage_page.write(document, args.output)]
    if args.json:
        return json.dumps(document, indent=2, default=str), written
    if args.markdown:
        return coverage_page.page(document).rstrip("\n"), written
    said = f"With {', '.join(f'{name} {version}' for name, version in used.items())}."
    return "\n".join([table(*coverage_table(found), width=width), "", *coverage_summary(found), said]), written
