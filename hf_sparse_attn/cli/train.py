"""`hf-sparse-attn train`: runs a recipe, and shows what it changed."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from hf_sparse_attn.documents import catalog
from hf_sparse_attn.recipe import read_recipe
from hf_sparse_attn.tables import table

log = logging.getLogger(__name__)


def main(args: argparse.Namespace, width: int) -> int:
    """Runs what the command line asks for and prints figures.

    Args:
        args: `recipe`, `settings`, `output`, `resume` and `json`.
        width: columns of the tables.

    Returns:
        exit status: 0, or 128 and the number of the signal that stopped the training.

    Raises:
        ValueError, TypeError, OSError: a recipe, data or folder that cannot work.
    """
    if args.recipe is None:
        print(_listing(args.json, width))
        return 0
    if args.output is None:
        raise ValueError("--output DIR must say where log, checkpoints and the result go")
    recipe = read_recipe(args.recipe, args.settings)
    from hf_sparse_attn.training.loop import Interrupted, train

    folder = Path(args.output)
    try:
        figures = train(recipe, folder, resume=args.resume, progress=not args.json)
    except Interrupted as stopped:
        log.warning("%s", stopped)
        return 128 + stopped.signal
    # Only the first process of several has figures.
    if figures:
        document = {"recipe": recipe.name, "output": str(folder), "result": str(folder / "result"), **figures}
        print(json.dumps(document, indent=2) if args.json else render(document, width))
    return 0


def render(document: dict[str, Any], width: int = 100) -> str:
    """Figures as a table and a line."""
    before, after = document["before"], document["after"]
    rows = [
        [name, _shown(before.get(name)), _shown(after.get(name)), _change(before.get(name), after.get(name))]
        for name in dict.fromkeys((*before, *after))
    ]
    took = (
        f"{document['steps']} steps in {document['seconds']:.0f} s ({document['step_seconds']:.3g} s each), "
        f"loss {document['loss']:.4g}, peak memory {document['peak_memory'] / 2**30:.2f} GiB, "
        f"{document['processes']} {'process' if document['processes'] == 1 else 'processes'}"
    )
    shown = (
        table(("held out", "before", "after", "change"), rows, document["recipe"], width=width) + "\n" if rows else ""
    )
    return f"{shown}{took}\nwrote {document['result']}"


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _change(before: float | None, after: float | None) -> str:
    return "-" if before is None or after is None else f"{after - before:+.3g}"


def _listing(as_json: bool, width: int) -> str:
    """The recipes that come with the package, and what each is for."""
    if as_json:
        return json.dumps(catalog.recipes(), indent=2)
    shown = table(*catalog.recipes_table(), width=width)
    return f"{shown}\nhf-sparse-attn train RECIPE [key=value ...] --output DIR"
