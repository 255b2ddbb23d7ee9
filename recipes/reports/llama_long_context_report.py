"""Page, JSON and picture of two runs of llama_long_context, one trained with sparse attention and one with dense.

    hf-sparse-attn train llama_long_context --output SPARSE
    hf-sparse-attn train llama_long_context train_with=dense --output DENSE
    python -m hf_sparse_attn.recipes.llama_long_context_report --sparse SPARSE --dense DENSE --output FOLDER

What the runs did not measure is measured here: the model without stretched positions, and the processor time and
memory of a step, each in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run, SparseSettings
from hf_sparse_attn.recipes.llama_long_context import How, LlamaLongContext, figures_of, profile_folder
from hf_sparse_attn.settings import build_config
from hf_sparse_attn.tables import table
from hf_sparse_attn.training.bundle.bundle import load_bundle
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.loop import peak_memory
from hf_sparse_attn.training.sparse import make_patch
from hf_sparse_attn.training.text.data import open_text
from hf_sparse_attn.training.text.model import load_language_model

_NAME = "llama_long_context"
_HOW: tuple[How, How] = ("sparse", "dense")
# Steps whose time is measured, after one that is not; a dense one is long.
_TIMED = 1
_COLOURS = {"sparse": "#0072B2", "dense": "#E69F00"}


def settings_of(folder: Path) -> LlamaLongContext:
    """The recipe that a run was made with."""
    values = json.loads((folder / "settings.json").read_text())
    values.pop("recipe", None)
    return build_config(LlamaLongContext, values, _NAME)


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


def cost_of_a_step(recipe: LlamaLongContext, folder: Path) -> dict[str, float]:
    """Processor seconds of a step, and the most memory the process held, in bytes; call it in a fresh process.

    Args:
        recipe: of the run.
        folder: for its profile.
    """
    run = Run(folder, torch.device("cpu"), progress=False)
    task = recipe.task(run)
    optimizer = task.optimizers()[0]
    task.module.train()
    before = peak_memory(run.device)
    seconds = []
    for step in range(_TIMED + 1):
        begun = time.process_time()
        batch = task.batch(step, range(task.samples(step)))
        torch.autograd.backward(task.loss(batch) / task.weight(batch))
        nn.utils.clip_grad_norm_(list(task.trained().values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - begun)
    peak = peak_memory(run.device)
    task.close()
    return {"cpu_seconds": statistics.median(seconds[1:]), "peak": float(peak), "before": float(before)}


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
    recipes = {"sparse": settings_of(sparse), "dense": settings_of(dense)}
    folders = {"sparse": sparse, "dense": dense}
    own = recipes["sparse"]
    if own.sparse is None or replace(own, train_with="dense") != replace(
        recipes["dense"], sparse=own.sparse, profile=own.profile
    ):
        raise ValueError("`--sparse` and `--dense` must be runs that differ in `train_with` alone, got others")
    runs: dict[str, Any] = {}
    for how, folder in folders.items():
        lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        figures = json.loads((folder / "figures.json").read_text())
        runs[how] = {**figures, "losses": [line["loss"] for line in lines if "loss" in line]}
        runs[how]["cost"] = _cached(folder / "cost.json", lambda f=folder: _in_a_process(f))
    used = own.sparse if own.profile is None else replace(own.sparse, method=str(sparse / "profile"))
    if recipes["dense"] != replace(own, train_with="dense"):
        again = _cached(dense / "reread.json", lambda: reread(recipes["dense"], dense, used))
        runs["dense"].update(before=runs["sparse"]["before"], after=runs["dense"]["after"] | again)
    fresh: dict[str, float] = {}
    if fresh_seed is not None:
        for how in _HOW:
            longest = (max(own.lengths),)
            other = replace(recipes[how], held_out_seed=fresh_seed, evaluation_lengths=longest)
            file = folders[how] / f"fresh-{fresh_seed}.json"
            fresh |= _cached(file, lambda o=other, h=how: reread(o, folders[h], used, (h,)))
    bare = _cached(sparse / "unstretched.json", lambda: unstretched(own, sparse / "unstretched"))
    commands = [f"hf-sparse-attn train {_NAME} --output SPARSE"]
    commands.append(f"hf-sparse-attn train {_NAME} train_with=dense --output DENSE")
    commands.append(f"python -m hf_sparse_attn.recipes.{_NAME}_report --sparse SPARSE --dense DENSE --output FOLDER")
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


def _in_a_process(folder: Path) -> dict[str, float]:
    # The profile is there already: finding it is no part of a step.
    call = [sys.executable, "-m", f"hf_sparse_attn.recipes.{_NAME}_report", "--measure", str(folder)]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _cached(file: Path, make: Any) -> dict[str, float]:
    if not file.is_file():
        file.write_text(json.dumps(make()))
    found: dict[str, float] = json.loads(file.read_text())
    return found


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


def page(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    settings, runs = found["settings"], found["runs"]
    lengths = settings["evaluation_lengths"] or [settings["data"]["length"]]
    columns = ["model", "read with"]
    for length in lengths:
        columns += [f"loss at {length}", f"needles at {length}"]
    lines = []
    for name, how, figures in rows_of(found):
        cells = [name, how]
        for length in lengths:
            cells += [f"{figures[f'loss_{how}_{length}']:.4f}", f"{figures[f'needles_{how}_{length}']:.3f}"]
        lines.append(tuple(cells))
    costs = []
    for how in _HOW:
        run, cost = runs[how], runs[how]["cost"]
        memory = f"{cost['peak'] / 2**20:.0f}", f"{(cost['peak'] - cost['before']) / 2**20:.0f}"
        costs.append((how, str(run["steps"]), f"{run['step_seconds']:.1f}", f"{cost['cpu_seconds']:.1f}", *memory))
    titles = (
        "trained with",
        "steps",
        "s per step (wall)",
        "s per step (processor)",
        "peak MiB",
        "of it for steps MiB",
    )
    data, held = settings["data"], settings["held_out"]
    budget = (
        f"; its profile at most {settings['profile']['budget']} at {data['length']}" if settings["profile"] else ""
    )
    count = settings["evaluation_samples"]
    said = ", ".join(f"{name} {value}" for name, value in found["machine"].items())
    return "\n".join(
        [
            "# llama_long_context: sparse against dense fine-tuning",
            "",
            said,
            "",
            *(f"    {command}" for command in found["commands"]),
            "",
            f"{settings['model']} with RoPE {settings['rope']}, fine-tuned on {runs['sparse']['steps']} documents of "
            f"{data['length']} tokens with {data['needles']} needles each, LoRA of rank {settings['lora']['rank']} on "
            f"{', '.join(settings['lora']['targets'])} and {', '.join(settings['lora']['trained'])} in full. Sparse "
            f"attention keeps {runs['sparse']['after']['density']:.3f} of the visible pairs, over the lengths below"
            f"{budget}.",
            "",
            f"Held out: {count} documents of each length with {held['needles']} needles each, drawn from seed "
            f"{settings['held_out_seed']}. Loss: nats per byte of code. Needles: share whose digits all come first.",
            "",
            "```",
            table(tuple(columns), lines, "", width=130),
            "```",
            "",
            *comparison(found, lengths),
            *other_documents(found, max(lengths)),
            "",
            "```",
            table(titles, costs, "", width=130),
            "```",
            "",
            "Wall time is the median of the run, on a machine that other work was using too; processor time is "
            "that of one step in a process of its own, as is the peak of its resident memory, and what of it "
            "came on top of the model and its libraries once steps began.",
            "",
        ]
    )


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
    parser.add_argument("--sparse", type=Path, help="folder of the run trained with sparse attention")
    parser.add_argument("--dense", type=Path, help="folder of the run trained with dense attention")
    parser.add_argument("--output", type=Path, help="folder for the page, the JSON and the picture")
    parser.add_argument("--measure", type=Path, help="print what a step of this run costs, and no more")
    parser.add_argument("--fresh-seed", type=int, help="read as many other held-out documents, drawn from this seed")
    options = parser.parse_args(arguments)
    if options.measure is not None:
        sys.stdout.write(json.dumps(cost_of_a_step(settings_of(options.measure), options.measure)) + "\n")
        return
    if None in (options.sparse, options.dense, options.output):
        parser.error("--sparse, --dense and --output must be given")
    found = collect(options.sparse, options.dense, options.fresh_seed)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / f"{_NAME}.json").write_text(json.dumps(found, indent=1) + "\n")
    (options.output / f"{_NAME}.md").write_text(page(found))
    draw(found, options.output / f"{_NAME}.png")


if __name__ == "__main__":
    main()
