"""Compare radial attention with LoRA and dense attention with LoRA on the small Wan at two and four times its length.

    for x in 2 4; do
      hf-sparse-attn train moving_wan_long extend=$x --output RUNS/${x}x-radial
      hf-sparse-attn train moving_wan_long extend=$x sparse=null --output RUNS/${x}x-dense
    done
    python -m hf_sparse_attn.recipes.wan_long_video_report --runs RUNS --output .github/train

Reads what the four trainings wrote, measures the time and memory of a step of each in a process of its own, and writes
a table (wan_long_video.md, .json) and a contact sheet (wan_long_video.png).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hf_sparse_attn.evaluate_plot import machine
from hf_sparse_attn.fidelity import psnr
from hf_sparse_attn.moving import draw_classes, frames_to_image, moving_clips
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipe_config import build_config
from hf_sparse_attn.recipes.wan_long_video import WanLongVideo
from hf_sparse_attn.report import table
from hf_sparse_attn.training import peak_memory

_SHOWN = 8
_TIMED = 3
_NAMES = ("dense, not adapted", "radial, not adapted", "radial + LoRA", "dense + LoRA")
_COLUMNS = (
    ("flow loss", "flow_loss", ".4f"),
    ("motion right", "right", ".2f"),
    ("motion error (px)", "motion_error", ".2f"),
    ("sprite kept", "seen", ".2f"),
    ("flicker", "flicker", ".4f"),
    ("PSNR to dense + LoRA (dB)", "psnr", ".1f"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description="Compare sparse and dense adaptation of the small Wan.")
    parser.add_argument("--runs", type=Path, required=True, help="folder with the outputs 2x-radial, 2x-dense, 4x-...")
    parser.add_argument("--output", type=Path, required=True, help="folder for table and contact sheet")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    lengths = [_length(options.runs, times) for times in (2, 4)]
    write(lengths, options.output)


def _length(runs: Path, times: int) -> dict[str, Any]:
    """Figures, clips and settings of one length."""
    found: dict[str, Any] = {"times": times, "rows": {}, "steps": {}, "clips": {}}
    for kind in ("dense", "radial"):
        folder = runs / f"{times}x-{kind}"
        figures = json.loads((folder / "figures.json").read_text())
        settings = json.loads((folder / "settings.json").read_text())
        for when, step, name in (
            ("before", 0, f"{kind}, not adapted"),
            ("after", figures["steps"], f"{kind} + LoRA"),
        ):
            found["rows"][name] = figures[when]
            found["clips"][name] = load_file(folder / f"clips-{step:05}.safetensors")["clips"].float() / 255
        seconds, memory = _apart(settings)
        found["steps"][kind] = {
            "density": figures["after"].get("density", 1.0),
            "processor_seconds": seconds,
            "peak_memory": memory,
            "wall_seconds": figures["step_seconds"],
        }
        found[kind] = settings
    for name, row in found["rows"].items():
        row["psnr"] = None if name == "dense + LoRA" else psnr(found["clips"][name], found["clips"]["dense + LoRA"])
    return found


def _apart(settings: dict[str, Any]) -> tuple[float, int]:
    """`step_cost` in a process of its own, whose memory nothing else has used."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        cost: tuple[float, int] = pool.apply(step_cost, (settings,))
    return cost


def step_cost(settings: dict[str, Any]) -> tuple[float, int]:
    """Time and memory of training steps.

    Args:
        settings: of the recipe, as a training keeps them in settings.json.

    Returns:
        processor seconds of a step (median after one to warm up), and the most memory the process had, in bytes.
    """
    torch.set_num_threads(1)
    recipe = recipe_of(settings)
    with tempfile.TemporaryDirectory() as folder:
        task = recipe.task(Run(Path(folder), torch.device("cpu")))
    spent = []
    with closing(task):
        optimizer = task.optimizers()[0]
        task.model.train()
        for step in range(_TIMED + 1):
            begin = time.process_time()
            optimizer.zero_grad()
            torch.autograd.backward(task.loss(task.batch(step, range(recipe.batch))))
            optimizer.step()
            spent.append(time.process_time() - begin)
    return statistics.median(spent[1:]), peak_memory(torch.device("cpu"))


def recipe_of(settings: dict[str, Any]) -> WanLongVideo:
    """The recipe of a settings.json."""
    values = {name: value for name, value in settings.items() if name != "recipe"}
    return build_config(WanLongVideo, values, "wan_long_video")


def write(lengths: Sequence[dict[str, Any]], output: Path) -> None:
    """Writes table and contact sheet.

    Args:
        lengths: as `_length` gives them.
        output: folder.
    """
    quality, cost = [], []
    for found in lengths:
        scenes = found["radial"]["scenes"]
        frames = found["times"] * scenes["frames"]
        size = f"{found['times']}x, {frames} frames"
        for name in _NAMES:
            row = found["rows"][name]
            quality.append([size, name, *(_shown(row.get(key), form) for _, key, form in _COLUMNS)])
        for kind in ("radial", "dense"):
            step = found["steps"][kind]
            tokens = frames * scenes["height"] * scenes["width"] // 4
            cost.append(
                [
                    size,
                    f"{kind} + LoRA",
                    str(tokens),
                    f"{step['density']:.3f}",
                    f"{step['processor_seconds']:.2f}",
                    f"{step['peak_memory'] / 2**20:.0f}",
                ]
            )
    where = machine() | {"threads": "1"}
    first = lengths[0]["radial"]
    said = ", ".join(f"{name} {value}" for name, value in where.items())
    steps = ", ".join(f"{f['radial']['steps']} at {f['times']}x ({_clips(f)} clips)" for f in lengths)
    sparse = first["sparse"]
    text = [
        "# The small Wan at two and four times its length",
        said,
        f"`moving_wan` was trained at 12 frames of 24 x 24. Recipe `moving_wan_long`: {sparse['method']} "
        f"{sparse['params']} in all layers and steps, LoRA of rank {first['lora']['rank']} on queries, keys, values "
        f"and outputs of self-attention; optimizer steps: {steps}; one sample each. Dense and radial have the same "
        "steps, samples, noise and first weights. Clips are sampled with the attention that was trained, in "
        f"{first['scenes']['sampling_steps']} steps, with guidance {first['scenes']['guidance']:g}; those of a line "
        "have the same seeds in all rows of a length. A clip that loses its sprite counts as 12 pixels off.",
        "```\n" + table(["length", "model", *(name for name, _, _ in _COLUMNS)], quality, width=140) + "\n```",
        "A training step, each in a process of its own:",
        "```\n"
        + table(["length", "model", "tokens", "density", "processor s / step", "peak MiB"], cost, width=110)
        + "\n```",
        "Command: `python -m hf_sparse_attn.recipes.wan_long_video_report --runs RUNS --output .github/train`, after "
        "the four trainings that it names.",
    ]
    (output / "wan_long_video.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    kept = [{name: value for name, value in found.items() if name != "clips"} for found in lengths]
    document = {"machine": where, "lengths": kept}
    (output / "wan_long_video.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    contact_sheet(lengths, output / "wan_long_video.png")


def _clips(found: dict[str, Any]) -> int:
    return len(found["clips"]["dense + LoRA"])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def contact_sheet(lengths: Sequence[dict[str, Any]], file: Path, place: int = 0) -> None:
    """Draws frames of one clip of each length: a true one, and what each model makes of the same words and noise.

    Args:
        lengths: as `_length` gives them.
        file: PNG to write.
        place: of the clip among those that were sampled.
    """
    from matplotlib.figure import Figure

    rows: list[tuple[str, str, Tensor]] = []
    for found in lengths:
        size = found["radial"]["scenes"]
        frames = found["times"] * size["frames"]
        scene = draw_classes(_clips(found), size["seed"])[place]
        true = moving_clips([scene], frames, size["height"], size["width"], size["seed"], size["turn"])
        shown = torch.linspace(0, frames - 1, _SHOWN).round().long()
        title = f"{frames} frames: a {scene.colour} {scene.shape}, first {scene.direction}; frames "
        title += ", ".join(str(int(n) + 1) for n in shown)
        rows.append((title, "a true clip", true[:, shown]))
        rows += [("", name, found["clips"][name][place : place + 1, shown]) for name in _NAMES]
    figure = Figure(figsize=(8.2, 0.86 * len(rows) + 0.6), layout="constrained")
    for ax, (title, name, clips) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        ax.imshow(frames_to_image(clips, scale=4))
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=9)
        if title:
            ax.set_title(title, fontsize=9, loc="left")
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
