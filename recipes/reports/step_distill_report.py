"""Compare students of a few steps with their teacher on the small Wan, by clips whose motion can be checked.

    hf-sparse-attn train moving_wan_distill --output RUNS/student
    python -m hf_sparse_attn.recipes.reports.step_distill_report --runs RUNS --output .github/train

Samples the same scenes from the same noise with the teacher, with the untrained model as the student samples, and with
the students, and writes a table (step_distill.md, .json) and a contact sheet (step_distill.png).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.reports.page import cells, grid, log_of, machine_line, recipe_of, strip, write
from hf_sparse_attn.recipes.step_distill import StepDistill
from hf_sparse_attn.recipes.step_distill_task import SceneMaker
from hf_sparse_attn.shipped.moving_scenes import draw_classes
from hf_sparse_attn.training.sparse import make_patch

_NAME = "step_distill"
_SHOWN = 6
_COLUMNS = (
    ("motion right", "right", ".2f"),
    ("motion error (px)", "motion_error", ".2f"),
    ("sprite kept", "seen", ".2f"),
    ("flicker", "flicker", ".4f"),
    ("detail", "detail", ".4f"),
    ("model calls", "calls", ".0f"),
    ("processor s / clip", "seconds", ".2f"),
)
_LEARNT = (*_COLUMNS[:4], ("teacher error", "teacher_error", ".3f"))


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True, help="folder with finished trainings, a folder each")
    parser.add_argument("--output", type=Path, required=True, help="folder for table and contact sheet")
    parser.add_argument("--clips", type=int, default=24, help="clips that are sampled and checked")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    runs = sorted(folder for folder in options.runs.iterdir() if (folder / "figures.json").is_file())
    if not runs:
        raise ValueError(f"`runs` must hold a finished training, got none in {options.runs}")
    found = measure(runs, options.clips)
    sampled = found.pop("sampled")
    write(options.output, _NAME, page(found), found, lambda file: contact_sheet(found, sampled, file))


def measure(runs: Sequence[Path], clips: int) -> dict[str, Any]:
    """Samples clips with every model.

    Args:
        runs: outputs of trainings, with the same scenes.
        clips: how many.

    Returns:
        "machine"; "clips", their number; "rows", the figures by the model's name; "sampled", the clips likewise,
        [clips, frames, 3, height, width]; "settings", "training" and "evaluations" of every run.
    """
    first = recipe_of(StepDistill, runs[0])
    if first.scenes is None:
        raise ValueError(f"`runs` must be of scenes, got prompts in {runs[0]}")
    scenes = dataclasses.replace(first.scenes, clips=clips)
    material = SceneMaker(Run(runs[0], torch.device("cpu")), scenes, first.model, first.torch_dtype)
    found: dict[str, Any] = {"machine": machine() | {"threads": "1"}, "clips": clips}
    found |= {part: {} for part in ("rows", "sampled", "settings", "training", "evaluations")}

    def add(name: str, recipe: StepDistill | None) -> None:
        shift = 1.0 if recipe is None else recipe.student.shift or material.shift
        made, figures = material.made(None if recipe is None else recipe.student, shift)
        # What neighbouring pixels differ by: a student that lost the grain of the background shows it here.
        figures["detail"] = float(made.diff(dim=-1).abs().mean())
        found["rows"][name], found["sampled"][name] = figures, made

    add(f"teacher, {scenes.sampling_steps} steps, guidance {scenes.guidance:g}", None)
    steps = f"{first.student.steps} steps, no guidance"
    add(f"teacher, {steps}", first)
    if first.sparse is not None:
        with make_patch(material.model, first.sparse):
            add(f"teacher made sparse, {steps}", first)
    for folder in runs:
        recipe = recipe_of(StepDistill, folder)
        name = f"{folder.name}, {steps}"
        with hsa.load_bundle(material.model, folder / "result"):
            add(name, recipe)
        for part, file in (("settings", "settings.json"), ("training", "figures.json")):
            found[part][name] = json.loads((folder / file).read_text(encoding="utf-8"))
        found["evaluations"][name] = [entry for entry in log_of(folder) if "evaluation" in entry]
    return found


def page(found: dict[str, Any]) -> list[str]:
    """The sections of the page, from what `measure` gives."""
    first = next(iter(found["settings"].values()))
    scenes, sparse = first["scenes"], first["sparse"]
    said = "dense" if sparse is None else f"{sparse['method']} {sparse['params']}"
    trained, learnt, commands = [], [], []
    for name, settings in found["settings"].items():
        training, student, short = found["training"][name], settings["student"], name.partition(",")[0]
        trained.append(
            {
                "student": short,
                "steps": str(settings["steps"]),
                "of these imitating": str(student["imitate"]),
                "samples": str(settings["batch"]),
                "rate": f"{settings['optimizer']['learning_rate']:g}",
                "rate of fake score": f"{settings['fake']['learning_rate']:g}",
                "teacher error before": f"{training['before']['teacher_error']:.3f}",
                "after": f"{training['after']['teacher_error']:.3f}",
                "processor s / step": f"{training['step_cpu_seconds']:.1f}",
                "peak MiB": f"{training['peak_memory'] / 2**20:.0f}",
            }
        )
        learnt += [
            {"student": short, "step": str(entry["step"]), **cells(entry["evaluation"], _LEARNT)}
            for entry in found["evaluations"][name]
        ]
        imitate = f" student.imitate={student['imitate']}" if student["imitate"] else ""
        train = f"hf-sparse-attn train moving_wan_distill{imitate} evaluate_every=40"
        commands.append(f"`{train} --output RUNS/{short}`")
    return [
        "# The small Wan in a few steps without guidance",
        machine_line(found["machine"]),
        f"Recipe `moving_wan_distill` (sparsity-aware step distillation, BLADE) on `moving_wan`: {said} in all layers "
        f"and steps, {found['clips']} clips of {scenes['frames']} frames of {scenes['height']} x {scenes['width']}, "
        "the same scenes and noise in all rows. The teacher is the shipped model, dense. No clip is drawn in "
        "training, only the words that ask for one. A clip that loses its sprite counts as half the picture off; "
        "`detail` is the mean difference of neighbouring pixels.",
        grid([{"model": name, **cells(row, _COLUMNS)} for name, row in found["rows"].items()], 160),
        "Training. `teacher error` is the squared distance of the student's velocity from the teacher's with "
        "guidance, along the student's own way:",
        grid(trained, 160),
        f"On {scenes['clips']} clips, while they learnt:",
        grid(learnt, 160),
        "The machine was shared with other work, which lengthens the processor time of all rows alike.",
        f"Commands: {', '.join(commands)}; then `python -m hf_sparse_attn.recipes.reports.{_NAME}_report --runs RUNS "
        "--output .github/train`.",
    ]


def contact_sheet(found: dict[str, Any], sampled: dict[str, Tensor], file: Path) -> None:
    """Draws frames of the first two clips: what each model makes of the same words and noise.

    Args:
        found: as `measure` gives it.
        sampled: the clips by the model's name.
        file: PNG to write.
    """
    seed = next(iter(found["settings"].values()))["scenes"]["seed"]
    rows: list[tuple[str, str, Tensor]] = []
    for place, scene in enumerate(draw_classes(found["clips"], seed)[:2]):
        clips = {name: made[place : place + 1] for name, made in sampled.items()}
        rows += strip(f"a {scene.colour} {scene.shape}, {scene.direction}", clips, _SHOWN)
    draw_clips(rows, file, height=0.95 * len(rows) + 0.5, fontsize=8)


if __name__ == "__main__":
    main()
