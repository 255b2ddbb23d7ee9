"""Compare radial attention with LoRA and dense attention with LoRA on the small Wan at two and four times its length.

    for x in 2 4; do
      hf-sparse-attn train moving_wan_long extend=$x --output RUNS/${x}x-radial
      hf-sparse-attn train moving_wan_long extend=$x sparse=null --output RUNS/${x}x-dense
    done
    python -m hf_sparse_attn.recipes.reports.wan_long_video_report --runs RUNS --output .github/train

Evaluates the four models before and after their training, measures the time and memory of a step of each in a process
of its own, and writes a table (wan_long_video.md, .json) and a contact sheet (wan_long_video.png). The evaluation of a
model is kept beside its training and not computed again; a model whose training has not ended has no figures.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.evaluation.fidelity import psnr
from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.reports.page import (
    cached,
    cells,
    cost_of_a_step,
    grid,
    machine_line,
    recipe_of,
    strip,
    write,
)
from hf_sparse_attn.recipes.wan_long_video import WanLongVideo
from hf_sparse_attn.shipped.moving_scenes import draw_classes, moving_clips
from hf_sparse_attn.training.lora.settings import ADAPTER
from hf_sparse_attn.training.video.scenes import motion_figures

_NAME = "wan_long_video"
_SHOWN = 8
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
    parser.add_argument("--clips", type=int, nargs=2, default=(4, 2), help="clips sampled at twice and four times")
    parser.add_argument("--held-out", type=int, default=8, help="samples of the flow loss")
    options = parser.parse_args(arguments)
    counts = zip((2, 4), options.clips, strict=True)
    lengths = [_length(options.runs, times, clips, options.held_out) for times, clips in counts]
    sampled = [length.pop("sampled") for length in lengths]
    found = {"machine": machine() | {"threads": "1"}, "lengths": lengths}
    write(options.output, _NAME, page(found), found, lambda file: contact_sheet(lengths, sampled, file))


def evaluated(folder: Path, when: str, clips: int, held_out: int) -> tuple[dict[str, Any], Tensor]:
    """Figures and clips of a model; they are computed once and kept in the folder.

    Args:
        folder: output of the training.
        when: "before" or "after" it.
        clips: that are sampled.
        held_out: samples of the loss.
    """
    recipe: Any = recipe_of(WanLongVideo, folder)
    file = folder / "evaluation" / f"{when}.safetensors"
    if not file.is_file():
        torch.set_num_threads(1)
        asked = replace(recipe, held_out=held_out, scenes=replace(recipe.scenes, clips=clips))
        with closing(asked.task(Run(folder, torch.device("cpu")))) as task, torch.no_grad():
            if when == "after":
                put_weights(task.trained(), load_file(folder / "result" / "adapter_model.safetensors"))
            made = {"flow_loss": torch.tensor(task.held_out_loss(), dtype=torch.float64)}
            if task.patch is not None:
                made["density"] = torch.tensor(task.patch.report().density, dtype=torch.float64)
            material: Any = task.material
            drawn = torch.cat([material.clip(place) for place in range(clips)])
        file.parent.mkdir(exist_ok=True)
        save_file({**made, "clips": (drawn * 255).round().byte()}, file)
    kept = load_file(file)
    sampled = kept.pop("clips").float() / 255
    figures = {name: value.item() for name, value in kept.items()}
    return figures | motion_figures(sampled, draw_classes(clips, recipe.scenes.seed), recipe.scenes), sampled


def put_weights(trained: dict[str, torch.nn.Parameter], saved: dict[str, Tensor]) -> None:
    """Puts the weights of a saved adapter into one that is on its model.

    Raises:
        ValueError: they are not of the same adapter.
    """
    named = {name.removeprefix("base_model.model."): value for name, value in saved.items()}
    wanted = {name.replace(f".{ADAPTER}.", "."): parameter for name, parameter in trained.items()}
    if set(named) != set(wanted):
        raise ValueError(f"`saved` must have the weights {sorted(wanted)[:2]}, ..., got {sorted(named)[:2]}, ...")
    for name, parameter in wanted.items():
        parameter.data.copy_(named[name])


def _length(runs: Path, times: int, clips: int, held_out: int) -> dict[str, Any]:
    """Figures, settings and sampled clips of one length."""
    found: dict[str, Any] = {"times": times, "clips": clips, "rows": {}, "steps": {}, "sampled": {}}
    for kind in ("dense", "radial"):
        folder = runs / f"{times}x-{kind}"
        found[kind] = json.loads((folder / "settings.json").read_text())
        for when, name in (("before", f"{kind}, not adapted"), ("after", f"{kind} + LoRA")):
            if when == "before" or (folder / "result").is_dir():
                found["rows"][name], found["sampled"][name] = evaluated(folder, when, clips, held_out)
        cost = cached(folder / "evaluation" / "step.json", partial(cost_of_a_step, WanLongVideo, folder, 3, threads=1))
        found["steps"][kind] = {
            "density": found["rows"][f"{kind}, not adapted"].get("density", 1.0),
            "processor_seconds": cost["cpu_seconds"],
            "peak_memory": cost["peak"],
        }
    target = found["sampled"].get("dense + LoRA")
    for name, row in found["rows"].items():
        row["psnr"] = None if target is None or name == "dense + LoRA" else psnr(found["sampled"][name], target)
    return found


def page(found: dict[str, Any]) -> list[str]:
    """The sections of the page."""
    quality, cost = [], []
    for length in found["lengths"]:
        scenes = length["radial"]["scenes"]
        frames = length["times"] * scenes["frames"]
        size = {"length": f"{length['times']}x, {frames} frames"}
        quality += [{**size, "model": name, **cells(length["rows"].get(name, {}), _COLUMNS)} for name in _NAMES]
        for kind in ("radial", "dense"):
            step = length["steps"][kind]
            cost.append(
                {
                    **size,
                    "model": f"{kind} + LoRA",
                    "tokens": str(frames * scenes["height"] * scenes["width"] // 4),
                    "density": f"{step['density']:.3f}",
                    "processor s / step": f"{step['processor_seconds']:.2f}",
                    "peak MiB": f"{step['peak_memory'] / 2**20:.0f}",
                }
            )
    first = found["lengths"][0]["radial"]
    steps = ", ".join(f"{f['radial']['steps']} at {f['times']}x ({f['clips']} clips)" for f in found["lengths"])
    return [
        "# The small Wan at two and four times its length",
        machine_line(found["machine"]),
        f"`moving_wan` was trained at 12 frames of 24 x 24. Recipe `moving_wan_long`: {first['sparse']['method']} "
        f"{first['sparse']['params']} in all layers and steps, LoRA of rank {first['lora']['rank']} on queries, keys, "
        f"values and outputs of self-attention; optimizer steps: {steps}; one sample each. Dense and radial have the "
        "same steps, samples, noise and first weights. Clips are sampled with the attention that was trained, in "
        f"{first['scenes']['sampling_steps']} steps, with guidance {first['scenes']['guidance']:g}; the same "
        "seeds in all rows of a length. A clip that loses its sprite counts as 12 pixels off.",
        grid(quality, 140),
        "A training step, each in a process of its own:",
        grid(cost, 110),
        "The machine was shared with other work, which lengthens the processor time of all rows alike.",
        "Commands: `hf-sparse-attn train moving_wan_long extend=2 steps=60 scenes.clips=0 held_out=1` and `extend=4 "
        "steps=60 optimizer.warmup_steps=3 scenes.clips=0 held_out=1`, each also with `sparse=null`, then `python -m "
        f"hf_sparse_attn.recipes.reports.{_NAME}_report --runs RUNS --output .github/train`.",
    ]


def contact_sheet(lengths: Sequence[dict[str, Any]], sampled: Sequence[dict[str, Tensor]], file: Path) -> None:
    """Draws frames of one clip of each length: a true one, and what each model makes of the same words and noise.

    Args:
        lengths: as `_length` gives them.
        sampled: for each the clips by the model's name.
        file: PNG to write.
    """
    rows: list[tuple[str, str, Tensor]] = []
    for found, clips in zip(lengths, sampled, strict=True):
        size = found["radial"]["scenes"]
        frames = found["times"] * size["frames"]
        scene = draw_classes(found["clips"], size["seed"])[0]
        true = moving_clips([scene], frames, size["height"], size["width"], size["seed"], size["turn"])
        made = {name: clips[name][:1] for name in _NAMES if name in clips}
        title = f"{frames} frames: a {scene.colour} {scene.shape}, first {scene.direction}"
        rows += strip(title, {"a true clip": true, **made}, _SHOWN)
    draw_clips(rows, file, height=0.86 * len(rows) + 0.6, fontsize=9)


if __name__ == "__main__":
    main()
