"""Page, JSON and picture of two runs of llama_long_context, one trained with sparse attention and one with dense.

    hf-sparse-attn train llama_long_context --output SPARSE
    hf-sparse-attn train llama_long_context train_with=dense --output DENSE
    python -m hf_sparse_attn.recipes.reports.llama_long_context_report --sparse SPARSE --dense DENSE --output FOLDER

What the runs did not measure is measured here: the model without stretched positions, and the processor time and
memory of a step, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run, SparseSettings
from hf_sparse_attn.recipes.llama_long_context import How, LlamaLongContext, figures_of, profile_folder
from hf_sparse_attn.recipes.reports.page import cached, cost_of_a_step, grid, log_of, machine_line, recipe_of, write
from hf_sparse_attn.training.bundle.bundle import load_bundle
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.sparse import make_patch
from hf_sparse_attn.training.text.data import open_text
from hf_sparse_attn.training.text.model import load_language_model

_NAME = "llama_long_context"
_HOW: tuple[How, How] = ("sparse", "dense")
_COLOURS = {"sparse": "#0072B2", "dense": "#E69F00"}


def unstretched(recipe: LlamaLongContext, folder: Path) -> dict[str, float]:
    """Figures of the model with its positions as they were; its profile goes into the folder.

    Args:
        recipe: of one of the runs.
        folder: made if missing.
    """
    run = Run(folder, torch.device("cpu"))
    model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype)
    sparse = recipe.sparse
    if sparse is None:
        raise ValueError("`recipe` must have `sparse`, got none")
    if recipe.profile is not None:
        data = open_text(recipe.data, tokenizer, seed=recipe.seed, cache=folder / "cache", run=run)
        sparse = replace(sparse, method=str(profile_folder(recipe, model, data, run)))
    return _read(model, tokenizer, recipe, sparse, folder / "cache")


def _read(
    model: Any,
    tokenizer: Any,
    recipe: LlamaLongContext,
    sparse: SparseSettings,
    cache: Path,
    hows: Sequence[How] = _HOW,
) -> dict[str, float]:
    """Held-out figures of a model as it is, read with sparse attention or its own, or both."""
    held_out = recipe.open_held_out(tokenizer, cache)
    parts, figures = CausalParts(model), dict[str, float]()
    for how in hows:
        patch = make_patch(model, sparse) if how == "sparse" else None
        figures |= figures_of(recipe, how, parts, held_out, torch.device("cpu"))
        if patch is not None:
            patch.remove()
    return figures


def reread(
    recipe: LlamaLongContext, folder: Path, sparse: SparseSettings, hows: Sequence[How] = ("sparse",)
) -> dict[str, float]:
    """Figures of a finished run's model, read with sparse attention of choice, or its own.

    Args:
        recipe: of the run.
        folder: of the run.
        sparse: the attention, its method a profile's folder where it is a profile.
        hows: what it is read with.
    """
    model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype)
    with load_bundle(model, folder / "result", patch=False):
        return _read(model, tokenizer, recipe, sparse, folder / "cache", hows)


def collect(sparse: Path, dense: Path, fresh_seed: int | None = None) -> dict[str, Any]:
    """All figures of two runs.

    Args:
        sparse, dense: folders of the finished runs, which may differ in `train_with`, and in `sparse` and `profile`,
            of which dense training takes no notice: the dense one is read with the sparse attention of the other.
        fresh_seed: of more held-out documents, of the greatest length, that each run's model reads with the attention
            it was trained with; None reads none.

    Raises:
        ValueError: they differ in more.
    """
    recipes = {"sparse": recipe_of(LlamaLongContext, sparse), "dense": recipe_of(LlamaLongContext, dense)}
    folders = {"sparse": sparse, "dense": dense}
    own = recipes["sparse"]
    if own.sparse is None or replace(own, train_with="dense") != replace(
        recipes["dense"], sparse=own.sparse, profile=own.profile
    ):
        raise ValueError("`--sparse` and `--dense` must be runs that differ in `train_with` alone, got others")
    runs: dict[str, Any] = {}
    for how, folder in folders.items():
        figures = json.loads((folder / "figures.json").read_text())
        runs[how] = {**figures, "losses": [line["loss"] for line in log_of(folder) if "loss" in line]}
        # A dense step is long: one is enough.
        runs[how]["cost"] = cached(folder / "cost.json", partial(cost_of_a_step, LlamaLongContext, folder, 1))
    used = own.sparse if own.profile is None else replace(own.sparse, method=str(sparse / "profile"))
    if recipes["dense"] != replace(own, train_with="dense"):
        again = cached(dense / "reread.json", lambda: reread(recipes["dense"], dense, used))
        runs["dense"].update(before=runs["sparse"]["before"], after=runs["dense"]["after"] | again)
    fresh: dict[str, float] = {}
    if fresh_seed is not None:
        for how in _HOW:
            longest = (max(own.lengths),)
            other = replace(recipes[how], held_out_seed=fresh_seed, evaluation_lengths=longest)
            file = folders[how] / f"fresh-{fresh_seed}.json"
            fresh |= cached(file, partial(reread, other, folders[how], used, (how,)))
    bare = cached(sparse / "unstretched.json", lambda: unstretched(own, sparse / "unstretched"))
    commands = [f"hf-sparse-attn train {_NAME} --output SPARSE"]
    commands.append(f"hf-sparse-attn train {_NAME} train_with=dense --output DENSE")
    commands.append(
        f"python -m hf_sparse_attn.recipes.reports.{_NAME}_report --sparse SPARSE --dense DENSE --output FOLDER"
    )
    if fresh_seed is not None:
        commands[-1] += f" --fresh-seed {fresh_seed}"
    settings = json.loads((sparse / "settings.json").read_text())
    return {
        "machine": machine(),
        "commands": commands,
        "settings": settings,
        "unstretched": bare,
        "runs": runs,
        "fresh": {"seed": fresh_seed, **fresh},
    }


def rows_of(found: dict[str, Any]) -> list[tuple[str, str, dict[str, float]]]:
    """(what was done, attention it is read with, figures) for every row of the table."""
    runs = found["runs"]
    stages = [
        ("as it is", found["unstretched"]),
        ("positions stretched", runs["sparse"]["before"]),
        ("fine-tuned sparse", runs["sparse"]["after"]),
        ("fine-tuned dense", runs["dense"]["after"]),
    ]
    return [(name, how, figures) for name, figures in stages for how in _HOW]


def page(found: dict[str, Any]) -> list[str]:
    """The sections of the page."""
    settings, runs = found["settings"], found["runs"]
    data, held, lora = settings["data"], settings["held_out"], settings["lora"]
    lengths = settings["evaluation_lengths"] or [data["length"]]
    profile = settings["profile"]
    budget = f"; its profile at most {profile['budget']} at {data['length']}" if profile else ""
    rows = []
    for name, how, figures in rows_of(found):
        rows.append({"model": name, "read with": how})
        for length in lengths:
            rows[-1][f"loss at {length}"] = f"{figures[f'loss_{how}_{length}']:.4f}"
            rows[-1][f"needles at {length}"] = f"{figures[f'needles_{how}_{length}']:.3f}"
    costs = [
        {
            "trained with": how,
            "steps": str(run["steps"]),
            "s per step (wall)": f"{run['step_seconds']:.1f}",
            "s per step (processor)": f"{run['cost']['cpu_seconds']:.1f}",
            "peak MiB": f"{run['cost']['peak'] / 2**20:.0f}",
            "of it for steps MiB": f"{(run['cost']['peak'] - run['cost']['before']) / 2**20:.0f}",
        }
        for how, run in ((how, runs[how]) for how in _HOW)
    ]
    return [
        "# llama_long_context: sparse against dense fine-tuning",
        machine_line(found["machine"]),
        "\n".join(f"    {command}" for command in found["commands"]),
        f"{settings['model']} with RoPE {settings['rope']}, fine-tuned on {runs['sparse']['steps']} documents of "
        f"{data['length']} tokens with {data['needles']} needles each, LoRA of rank {lora['rank']} on "
        f"{', '.join(lora['targets'])} and {', '.join(lora['trained'])} in full. Sparse attention keeps "
        f"{runs['sparse']['after']['density']:.3f} of the visible pairs, over the lengths below{budget}.",
        f"Held out: {settings['evaluation_samples']} documents of each length with {held['needles']} needles each, "
        f"drawn from seed {settings['held_out_seed']}. Loss: nats per byte of code. Needles: share whose digits all "
        "come first.",
        grid(rows, 130),
        "\n".join([*comparison(found, lengths), *other_documents(found, max(lengths))]),
        grid(costs, 130),
        "Wall time is the median of the run, on a machine that other work was using too; processor time is that of "
        "one step in a process of its own, as is the peak of its resident memory, and what of it came on top of the "
        "model and its libraries once steps began.",
    ]


def comparison(found: dict[str, Any], lengths: Sequence[int]) -> list[str]:
    """Sentences that set the sparse fine-tuning against the dense one."""
    after = {how: found["runs"][how]["after"] for how in _HOW}
    lines = []
    for length in lengths:
        dense = after["dense"][f"loss_dense_{length}"]
        parts = [f"{100 * (after['sparse'][f'loss_{how}_{length}'] / dense - 1):+.2f} % read {how}" for how in _HOW]
        lines.append(
            f"Loss at {length} of the sparse fine-tuning against that of the dense one read dense: {', '.join(parts)}."
        )
    return lines


def other_documents(found: dict[str, Any], length: int) -> list[str]:
    """A sentence on the documents of the fresh seed; none where there is none."""
    fresh = found["fresh"]
    if fresh["seed"] is None:
        return []
    sparse, dense = (fresh[f"loss_{how}_{length}"] for how in _HOW)
    needles = [f"{fresh[f'needles_{how}_{length}']:.3f}" for how in _HOW]
    more = 100 * (sparse / dense - 1)
    return [
        f"As many other documents of {length}, of seed {fresh['seed']}, read once: loss {sparse:.4f} trained "
        f"and read sparse, {dense:.4f} trained and read dense ({more:+.2f} %); needles {' and '.join(needles)}."
    ]


def draw(found: dict[str, Any], file: Path) -> None:
    """Loss over the steps of both, and needles at the longest length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    for how in _HOW:
        losses = found["runs"][how]["losses"]
        left.plot(range(1, len(losses) + 1), losses, color=_COLOURS[how], marker="os"[how == "dense"], ms=3, label=how)
    left.set_xlabel("step")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("training loss (nats, weighted)")
    left.set_ylim(bottom=0)
    left.legend(title="trained with", frameon=False)
    settings = found["settings"]
    length = max(settings["evaluation_lengths"] or [settings["data"]["length"]])
    rows = rows_of(found)
    names = list(dict.fromkeys(name for name, _, _ in rows))
    for i, how in enumerate(_HOW):
        heights = [figures[f"needles_{how}_{length}"] for _, own, figures in rows if own == how]
        places = [n + (i - 0.5) * 0.38 for n in range(len(names))]
        bars = right.bar(places, heights, 0.36, color=_COLOURS[how], label=how)
        right.bar_label(bars, fmt="%.2f", fontsize=8)
    right.set_xticks(range(len(names)), [name.replace("ed ", "ed\n").replace("s s", "s\ns") for name in names])
    right.set_ylim(0, 1.12)
    right.set_ylabel(f"needles answered at {length}")
    right.legend(title="read with", frameon=False, loc="upper left", fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sparse", type=Path, required=True, help="folder of the run trained with sparse attention")
    parser.add_argument("--dense", type=Path, required=True, help="folder of the run trained with dense attention")
    parser.add_argument("--output", type=Path, required=True, help="folder for the page, the JSON and the picture")
    parser.add_argument("--fresh-seed", type=int, help="read as many other held-out documents, drawn from this seed")
    options = parser.parse_args(arguments)
    found = collect(options.sparse, options.dense, options.fresh_seed)
    write(options.output, _NAME, page(found), found, lambda file: draw(found, file))


if __name__ == "__main__":
    main()
