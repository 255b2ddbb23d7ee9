"""Compare radial attention with LoRA and dense attention with LoRA on the small Wan at two and four times its length.

    for x in 2 4; do
      hf-sparse-attn train moving_wan_long extend=$x --output RUNS/${x}x-radial
      hf-sparse-attn train moving_wan_long extend=$x sparse=null --output RUNS/${x}x-dense
    done
    python -m hf_sparse_attn.recipes.wan_long_video_report --runs RUNS --output .github/train

Evaluates the four models before and after their training, measures the time and memory of a step of each in a process
of its own, and writes a table (wan_long_video.md, .json) and a contact sheet (wan_long_video.png). Every piece of the
evaluation is kept beside its training as soon as it is there, and not computed again; a model whose training has not
ended has no figures.
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
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.evaluation.fidelity import psnr
from hf_sparse_attn.evaluation.plot import machine
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.wan_long_video import WanLongVideo
from hf_sparse_attn.settings import build_config
from hf_sparse_attn.shipped.moving import draw_classes, moving_clips
from hf_sparse_attn.tables import table
from hf_sparse_attn.training.loop import peak_memory
from hf_sparse_attn.training.lora.adapter import ADAPTER
from hf_sparse_attn.training.video.scenes import SceneSettings, motion_figures

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
    parser.add_argument("--clips", type=int, nargs=2, default=(4, 2), help="clips sampled at twice and four times")
    parser.add_argument("--held-out", type=int, default=8, help="samples of the flow loss")
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    counts = zip((2, 4), options.clips, strict=True)
    lengths = [_length(options.runs, times, clips, options.held_out) for times, clips in counts]
    write(lengths, options.output)


def piece(folder: Path, when: str, place: int | None, clips: int, held_out: int) -> Path:
    """Computes a piece of the evaluation of a training, unless it is there.

    Args:
        folder: output of the training.
        when: "before" or "after" it.
        place: of the clip to sample; None for the loss.
        clips: that are sampled in all.
        held_out: samples of the loss.

    Returns:
        the file that holds it.
    """
    file = folder / "evaluation" / (f"{when}-loss.json" if place is None else f"{when}-{place}.safetensors")
    if file.is_file():
        return file
    file.parent.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    settings = json.loads((folder / "settings.json").read_text())
    settings["held_out"], settings["scenes"]["clips"] = held_out, clips
    task = recipe_of(settings).task(Run(folder, torch.device("cpu")))
    with closing(task), torch.no_grad():
        if when == "after":
            put_weights(task.trained(), load_file(folder / "result" / "adapter_model.safetensors"))
        if place is None:
            found = {"flow_loss": task.held_out_loss()}
            if task.patch is not None:
                found["density"] = task.patch.report().density
            file.write_text(json.dumps(found))
        else:
            material: Any = task.material
            clip = (material.clip(place) * 255).round().byte()
            save_file({"clip": clip.contiguous()}, file)
    return file


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


def _evaluated(folder: Path, when: str, clips: int, held_out: int) -> tuple[dict[str, Any], Tensor]:
    """Figures and clips of a model before or after its training."""
    figures = json.loads(piece(folder, when, None, clips, held_out).read_text())
    files = [piece(folder, when, place, clips, held_out) for place in range(clips)]
    sampled = torch.cat([load_file(file)["clip"] for file in files]).float() / 255
    scenes = build_config(SceneSettings, json.loads((folder / "settings.json").read_text())["scenes"], "scenes")
    return figures | motion_figures(sampled, draw_classes(clips, scenes.seed), scenes), sampled


def _length(runs: Path, times: int, clips: int, held_out: int) -> dict[str, Any]:
    """Figures, clips and settings of one length."""
    found: dict[str, Any] = {"times": times, "rows": {}, "steps": {}, "clips": {}}
    for kind in ("dense", "radial"):
        folder = runs / f"{times}x-{kind}"
        settings = json.loads((folder / "settings.json").read_text())
        for when, name in (("before", f"{kind}, not adapted"), ("after", f"{kind} + LoRA")):
            if when == "after" and not (folder / "result").is_dir():
                continue
            found["rows"][name], found["clips"][name] = _evaluated(folder, when, clips, held_out)
        seconds, memory = _cost(folder, settings)
        found["steps"][kind] = {
            "density": found["rows"][f"{kind}, not adapted"].get("density", 1.0),
            "processor_seconds": seconds,
            "peak_memory": memory,
        }
        found[kind] = settings
    target = found["clips"].get("dense + LoRA")
    for name, row in found["rows"].items():
        row["psnr"] = None if target is None or name == "dense + LoRA" else psnr(found["clips"][name], target)
    return found


def _cost(folder: Path, settings: dict[str, Any]) -> tuple[float, int]:
    """`step_cost` in a process of its own, whose memory nothing else has used; kept as the pieces are."""
    file = folder / "evaluation" / "cost.json"
    if not file.is_file():
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            file.write_text(json.dumps(pool.apply(step_cost, (settings,))))
    seconds, memory = json.loads(file.read_text())
    return seconds, memory


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
            row = found["rows"].get(name, {})
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
        f"{first['scenes']['sampling_steps']} steps, with guidance {first['scenes']['guidance']:g}; the same "
        "seeds in all rows of a length. A clip that loses its sprite counts as 12 pixels off.",
        "```\n" + table(["length", "model", *(name for name, _, _ in _COLUMNS)], quality, width=140) + "\n```",
        "A training step, each in a process of its own:",
        "```\n"
        + table(["length", "model", "tokens", "density", "processor s / step", "peak MiB"], cost, width=110)
        + "\n```",
        "The machine was shared with other work, which lengthens the processor time of all rows alike.",
        "Commands: `hf-sparse-attn train moving_wan_long extend=2 steps=60 scenes.clips=0 held_out=1` and `extend=4 "
        "steps=60 optimizer.warmup_steps=3 scenes.clips=0 held_out=1`, each also with `sparse=null`, then `python -m "
        "hf_sparse_attn.recipes.wan_long_video_report --runs RUNS --output .github/train`.",
    ]
    (output / "wan_long_video.md").write_text("\n\n".join(text) + "\n", encoding="utf-8")
    kept = [{name: value for name, value in found.items() if name != "clips"} for found in lengths]
    document = {"machine": where, "lengths": kept}
    (output / "wan_long_video.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    contact_sheet(lengths, output / "wan_long_video.png")


def _clips(found: dict[str, Any]) -> int:
    return len(found["clips"][_NAMES[0]])


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def contact_sheet(lengths: Sequence[dict[str, Any]], file: Path, place: int = 0) -> None:
    """Draws frames of one clip of each length: a true one, and what each model makes of the same words and noise.

    Args:
        lengths: as `_length` gives them.
        file: PNG to write.
        place: of the clip among those that were sampled.
    """
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
        made = [name for name in _NAMES if name in found["clips"]]
        rows += [("", name, found["clips"][name][place : place + 1, shown]) for name in made]
    draw_clips(rows, file, height=0.86 * len(rows) + 0.6, fontsize=9)


if __name__ == "__main__":
    main()
