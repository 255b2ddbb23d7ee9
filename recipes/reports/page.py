"""What the reports share: a page of sections with its JSON and picture, the runs that they read, what a step costs."""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hf_sparse_attn.recipe import Recipe, Run
from hf_sparse_attn.settings import build_config
from hf_sparse_attn.tables import markdown, table
from hf_sparse_attn.training.loop import peak_memory

_Recipe = TypeVar("_Recipe", bound=Recipe)
# Rows of a table: what stands under each heading.
Rows = Sequence[Mapping[str, str]]


def write(folder: Path, name: str, sections: Sequence[str], figures: Any, draw: Callable[[Path], object]) -> None:
    """Writes a page, its figures and its picture: `name`.md, .json and .png.

    Args:
        folder: made if missing.
        name: of the files.
        sections: paragraphs, tables and lists of commands, in Markdown.
        figures: plain values.
        draw: draws the picture into a file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    (folder / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(folder / f"{name}.png")


def machine_line(machine: Mapping[str, str]) -> str:
    """What the figures were measured with, in one line."""
    return ", ".join(f"{name} {value}" for name, value in machine.items())


def grid(rows: Rows, width: int) -> str:
    """Rows as a text table in a block of code."""
    return f"```\n{table(list(rows[0]), [list(row.values()) for row in rows], width=width)}\n```"


def pipes(rows: Rows) -> str:
    """Rows as a table of Markdown."""
    return markdown(list(rows[0]), [list(row.values()) for row in rows])


def cells(figures: Mapping[str, float | None], columns: Sequence[tuple[str, str, str]]) -> dict[str, str]:
    """Figures under their headings, by columns of heading, key and format; what is not there is a dash."""
    found = ((title, figures.get(key), form) for title, key, form in columns)
    return {title: "-" if value is None else format(value, form) for title, value, form in found}


def recipe_of(kind: type[_Recipe], run: Path) -> _Recipe:
    """The recipe of a kind that the run in a folder was made with."""
    values = json.loads((run / "settings.json").read_text(encoding="utf-8"))
    return build_config(kind, values, values.pop("recipe"))


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]


def cached(file: Path, make: Callable[[], Any]) -> Any:
    """What a JSON file holds; it is made where it is missing."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(make()), encoding="utf-8")
    return json.loads(file.read_text(encoding="utf-8"))


def cost_of_a_step(kind: type[Recipe], run: Path, steps: int, threads: int | None = None) -> dict[str, float]:
    """What training steps of a run's recipe cost, in a process of its own, whose memory nothing else has used.

    Args:
        kind: of recipe.
        run: folder of the run; a profile that is there is used again, for finding it is no part of a step.
        steps: how many are timed, after one to warm up.
        threads: of torch; None leaves its choice.

    Returns:
        `cpu_seconds`, the median; `peak`, the most memory that the process held, and `before`, what it held before
        steps began, in bytes.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_cost, (kind, run, steps, threads))


def _cost(kind: type[Recipe], run: Path, steps: int, threads: int | None) -> dict[str, float]:
    if threads is not None:
        torch.set_num_threads(threads)
    device = torch.device("cpu")
    with closing(recipe_of(kind, run).task(Run(run, device, progress=False))) as task:
        optimizer = task.optimizers()[0]
        task.module.train()
        before, seconds = peak_memory(device), []
        for step in range(steps + 1):
            begun = time.process_time()
            optimizer.zero_grad()
            batch = task.batch(step, range(task.samples(step)))
            torch.autograd.backward(task.loss(batch) / task.weight(batch))
            nn.utils.clip_grad_norm_(list(task.trained().values()), 1.0)
            optimizer.step()
            seconds.append(time.process_time() - begun)
    return {"cpu_seconds": statistics.median(seconds[1:]), "peak": peak_memory(device), "before": before}


def strip(title: str, clips: Mapping[str, Tensor], count: int) -> list[tuple[str, str, Tensor]]:
    """Rows of a contact sheet: some frames of clips that belong together.

    Args:
        title: above the first row; the numbers of the frames are added.
        clips: by name, [1, frames, 3, height, width].
        count: frames that are shown.
    """
    frames = next(iter(clips.values())).shape[1]
    shown = torch.linspace(0, frames - 1, count).round().long()
    title += "; frames " + ", ".join(str(int(n) + 1) for n in shown)
    return [("" if number else title, name, clip[:, shown]) for number, (name, clip) in enumerate(clips.items())]
