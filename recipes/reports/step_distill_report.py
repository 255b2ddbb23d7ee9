"""Compare students of a few steps with their teacher on the small Wan, by clips whose motion can be checked.

    hf-sparse-attn train moving_wan_distill --output RUNS/student
    python -m hf_sparse_attn.recipes.step_distill_report --runs RUNS --output .github/train

Samples the same scenes from the same noise with the teacher, with the untrained model as the student samples, and with
the students, and writes a table (step_distill.md, .json) and a contact sheet (step_distill.png).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.step_distill import SceneMaker, StepDistill
from hf_sparse_attn.settings import build_config
from hf_sparse_attn.shipped.moving import draw_classes
from hf_sparse_attn.tables import table
from hf_sparse_attn.training.sparse import make_patch

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
    parser = argparse.ArgumentParser(description="Compare students of a few steps with their teacher.")
    parser.add_argument("--runs", type=Path, required=True, help="folder with finished trainings, a folder each")
    parser.add_argument("--output", type=Path, required=True, help="folder for table and contact sheet")
    parser.add_argument("--clips", type=int, default=24, help="clips that are sampled and checked")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    runs = sorted(folder for folder in options.runs.iterdir() if (folder / "figures.json").is_file())
    if not runs:
        raise ValueError(f"`runs` must hold a finished training, got none in {options.runs}")
    write(measure(runs, options.clips), options.output)


def recipe_of(folder: Path) -> StepDistill:
    """The recipe of a training."""
    values = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    return build_config(StepDistill, {n: v for n, v in values.items() if n != "recipe"}, "step_distill")


def measure(runs: Sequence[Path], clips: int) -> dict[str, Any]:
    """Samples clips with every model.

    Args:
        runs: outputs of trainings, with the same scenes.
        clips: how many.

    Returns:
        "rows", the figures by the model's name; "clips" likewise, [clips, frames, 3, height, width]; "settings",
        "training" and "evaluations" of every run; "scenes".
    """
    first = recipe_of(runs[0])
    if first.scenes is None:
        raise ValueError(f"`runs` must be of scenes, got prompts in {runs[0]}")
    scenes = dataclasses.replace(first.scenes, clips=clips)
    material = SceneMaker(Run(runs[0], torch.device("cpu")), scenes, first.model, first.torch_dtype)
    found: dict[str, Any] = {"rows": {}, "clips": {}, "settings": {}, "training": {}, "evaluations": {}}
    found["scenes"] = scenes

    def add(name: str, recipe: StepDistill | None) -> None:
        shift = 1.0 if recipe is None else recipe.student.shift or material.shift
        made, figures = material.made(None if recipe is None else recipe.student, shift)
        # What neighbouring pixels differ by: a student that lost the grain of the background shows it here.
        figures["detail"] = float(made.diff(dim=-1).abs().mean())
        found["rows"][name], found["clips"][name] = figures, made

    add(f"teacher, {scenes.sampling_steps} steps, guidance {scenes.guidance:g}", None)
    steps = f"{first.student.steps} steps, no guidance"
    add(f"teacher, {steps}", first)
    if first.sparse is not None:
        with make_patch(material.model, first.sparse):
            add(f"teacher made sparse, {steps}", first)
    for folder in runs:
        recipe = recipe_of(folder)
        with ExitStack() as stack:
            stack.enter_context(hsa.load_bundle(material.model, folder / "result"))
            name = f"{folder.name}, {steps}"
            add(name, recipe)
        found["settings"][name] = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
        found["training"][name] = json.loads((folder / "figures.json").read_text(encoding="utf-8"))
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
        found["evaluations"][name] = [entry for entry in log if "evaluation" in entry]
    return found


def write(found: dict[str, Any], output: Path) -> None:
    """Writes table and contact sheet.

    Args:
        found: as `measure` gives it.
        output: folder.
    """
    scenes, where = found["scenes"], machine() | {"threads": "1"}
    rows = [[name, *(format(row[key], form) for _, key, form in _COLUMNS)] for name, row in found["rows"].items()]
    trained = []
    for name, settings in found["settings"].items():
        training, student = found["training"][name], settings["student"]
        trained.append(
            [
                name.partition(",")[0],
                str(settings["steps"]),
                str(student["imitate"]),
                str(settings["batch"]),
                f"{settings['optimizer']['learning_rate']:g}",
                f"{settings['fake']['learning_rate']:g}",
                f"{training['before']['teacher_error']:.3f}",
                f"{training['after']['teacher_error']:.3f}",
                f"{training['step_cpu_seconds']:.1f}",
                f"{training['peak_memory'] / 2**20:.0f}",
            ]
        )
    learnt = [
        [
            name.partition(",")[0],
            str(entry["step"]),
            *(format(entry["evaluation"][key], form) for _, key, form in _LEARNT),
        ]
        for name, entries in found["evaluations"].items()
        for entry in entries
    ]
    columns = ["student", "steps", "of these imitating", "samples", "rate", "rate of fake score"]
    columns += ["teacher error before", "after", "processor s / step", "peak MiB"]
    sparse = next(iter(found["settings"].values()))["sparse"]
    said = "dense" if sparse is None else f"{sparse['method']} {sparse['params']}"
    text = [
        "# The small Wan in a few steps without guidance",
        ", ".join(f"{name} {value}" for name, value in where.items()),
        f"Recipe `moving_wan_distill` (sparsity-aware step distillation, BLADE) on `moving_wan`: {said} in all layers "
        f"and steps, {scenes.clips} clips of {scenes.frames} frames of {scenes.height} x {scenes.width}, the same "
        "scenes and noise in all rows. The teacher is the shipped model, dense. No clip is drawn in training, only "
        "the words that ask for one. A clip that loses its sprite counts as half the picture off; `detail` is the "
        "mean difference of neighbouring pixels.",
        "```\n" + table(["model", *(name for name, _, _ in _COLUMNS)], rows, width=160) + "\n```",
        "Training. `teacher error` is the squared distance of the student's velocity from the teacher's with "
        "guidance, along the student's own way:",
        "```\n" + table(columns, trained, width=160) + "\n```",
        f"On {_clips(found)} clips, while they learnt:",
        "```\n" + table(["student", "step", *(name for name, _, _ in _LEARNT)], learnt, width=160) + "\n```",
        "The machine was shared with other work, which lengthens the processor time of all rows alike.",
        f"Commands: {', '.join(_command(*run) for run in found['settings'].items())}; then `python -m "
        "hf_sparse_attn.recipes.step_distill_report --runs RUNS --output .github/train`.",
    ]
    (output / "step_distill.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    document = {"machine": where, **{key: found[key] for key in ("rows", "settings", "training", "evaluations")}}
    (output / "step_distill.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    contact_sheet(found, output / "step_distill.png")


def _command(name: str, settings: dict[str, Any]) -> str:
    imitate = settings["student"]["imitate"]
    more = f" student.imitate={imitate}" if imitate else ""
    return f"`hf-sparse-attn train moving_wan_distill{more} evaluate_every=40 --output RUNS/{name.partition(',')[0]}`"


def _clips(found: dict[str, Any]) -> int:
    first = next(iter(found["settings"].values()))
    return int(first["scenes"]["clips"])


def contact_sheet(found: dict[str, Any], file: Path, places: Sequence[int] = (0, 1)) -> None:
    """Draws frames of some clips: what each model makes of the same words and noise.

    Args:
        found: as `measure` gives it.
        file: PNG to write.
        places: of the clips among those that were sampled.
    """
    scenes = found["scenes"]
    shown = torch.linspace(0, scenes.frames - 1, _SHOWN).round().long()
    rows: list[tuple[str, str, Tensor]] = []
    for place in [place for place in places if place < scenes.clips]:
        scene = draw_classes(scenes.clips, scenes.seed)[place]
        title = f"a {scene.colour} {scene.shape}, {scene.direction}; frames "
        title += ", ".join(str(int(n) + 1) for n in shown)
        for name, clips in found["clips"].items():
            rows.append((title, name, clips[place : place + 1, shown]))
            title = ""
    draw_clips(rows, file, height=0.95 * len(rows) + 0.5, fontsize=8)


if __name__ == "__main__":
    main()
