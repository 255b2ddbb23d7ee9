"""`python -m tests.coverage.verify --output .github`: tries every class that can be patched, and writes the list."""

from __future__ import annotations

import argparse
import json

from hf_sparse_attn.coverage.page import document, page, write
from hf_sparse_attn.coverage.run import LISTS, progress, versions
from tests.coverage.trial import listed, verified


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--library", choices=(*LISTS, "all"), default="all")
    parser.add_argument("--output", metavar="DIR", help="write coverage.json and coverage.md there")
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of the page")
    args = parser.parse_args()
    libraries = LISTS if args.library == "all" else (args.library,)
    found = [verified(c) for name in libraries for c in progress(f"{name}, tried")(listed(name))]
    whole = document(found, versions(found))
    print(json.dumps(whole, indent=2) if args.json else page(whole))
    for path in [] if args.output is None else write(whole, args.output):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
