"""`hf-sparse-attn profile`: profiles a model from a folder, the Hub or this package, and writes the profile."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from hf_sparse_attn.api import check_device
from hf_sparse_attn.context import check_int
from hf_sparse_attn.presets import BUDGETS
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.candidates import TIGHT
from hf_sparse_attn.profiling.inputs import check_dtype, load, read_call
from hf_sparse_attn.profiling.run import at_budget, check_settings, profile
from hf_sparse_attn.profiling.view.report import render, summary
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.shipped.byte_llama import default_metric


def main(args: argparse.Namespace, width: int) -> str:
    """Profiles, saves, and returns what to print.

    Args:
        args: as the command line gives them.
        width: of the terminal.

    Raises:
        ValueError: an option that does not fit the model, or a file that is none of what it should be.
        OSError: a file or model that is not there.
    """
    # What can be refused is refused before a model is loaded, a folder that cannot be made as well.
    check_int("batches", args.batches, 1)
    check_int("seed", args.seed, 0)
    device = check_device(args.device)
    metric = args.metric or default_metric(args.model)
    steps = list(pairwise([0.0, *args.steps, 1.0])) if args.steps else None
    chosen: dict[str, Any] = {"per": args.per, "passes": args.passes, "steps": steps}
    chosen["max_plans_per_layer"] = args.max_plans_per_layer
    output = Path(args.output)
    budgets: dict[float, Path] = {args.budget: output}
    if args.qualities:
        given = [f"--{name}" for name in ("per", "passes", "state") if getattr(args, name) not in ("density", 1, None)]
        if given:
            raise ValueError(f"{' and '.join(given)} must be left out for `qualities`, which measures more than once")
        budgets = {budget: output / quality for quality, budget in BUDGETS.items()}
    check_settings(min(budgets), metric, **chosen)
    if args.query_blocks is not None:
        check_int("query_blocks", args.query_blocks, 1)
    check_dtype(args.dtype)
    call = None if args.call is None else read_call(args.call)
    candidates = None if args.candidates is None else _candidates(Path(args.candidates))
    make_folder(output)
    check_int("held_out", args.held_out, 0)
    model, batches, source = load(
        args.model,
        data=args.data,
        images=args.images,
        audio=args.audio,
        length=args.length,
        size=args.size,
        count=args.batches + args.held_out,
        part=args.part,
        call=call,
        dtype=args.dtype,
        device=device,
        seed=args.seed,
    )
    batches, held_out = _parted(batches, len(args.length or (0,)), args.held_out)
    measured: HeadProfile | None = None
    documents, texts = [], []
    for budget, output in budgets.items():
        if measured is None or (candidates is None and (budget <= TIGHT) != (measured.budget["density"] <= TIGHT)):
            found = measured = profile(
                model,
                batches,
                candidates,
                budget,
                metric,
                **chosen,
                same_in_group=args.same_in_group,
                query_blocks=args.query_blocks,
                state=args.state,
                seed=args.seed,
                source=source,
                held_out=held_out or None,
            )
        else:
            limit = {"max_plans_per_layer": args.max_plans_per_layer}
            found = at_budget(model, measured, batches, budget, held_out or None, **limit)
        # Figures of all candidates would be in all three.
        (replace(found, measurements=None) if args.qualities else found).save_pretrained(output)
        document = {**summary(found, worst=0), "output": str(output)}
        documents.append(document)
        use = f"saved in {output}: hf_sparse_attn.patch(model, {str(output)!r})"
        texts.append(f"{render(document, width)}\n\n{use}")
    if args.json:
        return json.dumps(documents if args.qualities else documents[0], indent=2)
    return "\n\n".join(texts)


def _parted(batches: list[Any], lengths: int, held_out: int) -> tuple[list[Any], list[Any]]:
    """Inputs to profile on, and the last of each length to evaluate on.

    Raises:
        ValueError: there are too few of them.
    """
    if not held_out:
        return batches, []
    size = len(batches) // lengths
    if size <= held_out:
        raise ValueError(f"`held-out` must leave an input to profile on, got {held_out} of {size}")
    first = [one for at, one in enumerate(batches) if at % size < size - held_out]
    return first, [one for at, one in enumerate(batches) if at % size >= size - held_out]


def _candidates(path: Path) -> list[Any]:
    from hf_sparse_attn.profiles.measurements import methods_of

    try:
        return list(methods_of(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise type(error)(f"`candidates` must be a file that can be read, got {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`candidates` must be a JSON list of methods with params, got {path}: {error}") from error
