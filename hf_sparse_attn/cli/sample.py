"""`hf-sparse-attn sample`: a clip made with sparse attention, alone or beside the dense one of the same seed."""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.api import check_device, patch
from hf_sparse_attn.context import check_int
from hf_sparse_attn.cost.timing import synchronize, threads
from hf_sparse_attn.evaluation.equal_density import fit_density
from hf_sparse_attn.evaluation.fidelity import psnr, ssim
from hf_sparse_attn.evaluation.film import Panel, check_film, default_ending, write_film
from hf_sparse_attn.evaluation.run import base_method
from hf_sparse_attn.evaluation.video import CALIBRATION_SEED, captured
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.profiles.head_profile import find_profile
from hf_sparse_attn.profiling.inputs import check_dtype, is_pipeline, load, read_call
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.registry import METHODS, make_method
from hf_sparse_attn.report import Report
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.shipped import SHIPPED, moving
from hf_sparse_attn.shipped.moving_scenes import COLOURS, DIRECTIONS, SHAPES, SceneClass, draw_classes
from hf_sparse_attn.tables import table

log = logging.getLogger(__name__)

_SHIPPED = "moving_wan"
_STEPS = 8
# What a method of a shipped model is turned to where nothing is said.
_DENSITY = 0.25
# Arguments of a pipeline's call that the command sets.
_OWN = {"prompt", "generator", "output_type"}
# A density further off than this share of the one asked for is told.
_NEAR = 0.1
# Clips of each kind that are timed, in turns; of a pipeline, which takes minutes for one, a single one.
_ROUNDS = 2


class Subject(NamedTuple):
    """What is sampled.

    Args:
        model: to patch.
        run: makes the clip, [frames, 3, height, width] in [0, 1]; takes the number of steps, None for what is usual.
        shows: what it should show, in words.
        calls: gives attention calls by which a method is fitted to a density, where that is quick.
        is_right: whether a clip shows what it should, where that can be told.
    """

    model: Any
    run: Callable[[int | None], Tensor]
    shows: str
    calls: Callable[[], list[Call]] | None = None
    is_right: Callable[[Tensor], bool] | None = None


@dataclass(frozen=True)
class Row:
    """What was made, and what it took.

    Args:
        attention: in words.
        density: kept share of the visible pairs of query and key.
        seconds: of each clip that was timed: of processor time, or of the clock where the model is on a GPU.
        ratio: median of them over that of dense attention; None where there is none beside it.
        psnr, ssim: against the dense clip; likewise.
        right: whether it shows what it should; None where that cannot be told.
    """

    attention: str
    density: float
    seconds: list[float]
    ratio: float | None = None
    psnr: float | None = None
    ssim: float | None = None
    right: bool | None = None


def main(args: argparse.Namespace, width: int) -> str:
    """Samples, writes the film, and returns what to print.

    Args:
        args: as the command line gives them.
        width: columns of the table.

    Raises:
        ValueError, TypeError: an option that does not fit the model or another option.
        OSError: a model, profile or folder that is not there.
        MissingExtra: a package that is needed is not installed.
    """
    # What can be refused is refused before a model is loaded.
    device, settings = check_device(args.device), _settings(args)
    for name, least in (("steps", 1), ("seed", 0), ("frames_per_second", 1)):
        if getattr(args, name) is not None:
            check_int(name, getattr(args, name), least)
    check_dtype(args.dtype)
    file = Path(args.output or f"{Path(args.model).name}_{Path(args.method or 'sparse').name}{default_ending()}")
    check_film(file)
    with threads(args.threads):
        subject = _moving(args, device) if args.model == _SHIPPED else _pipeline(args, device)
        put = _patch_maker(args, settings, subject)
        rows, clips, report = _sampled(subject, put, args.compare, device, args.model == _SHIPPED)
    words = [[row.attention.partition("(")[0], *_words(row)] for row in rows]
    words[0][0] += f": {subject.shows}, seed {args.seed}"
    write_film([Panel(lines, clip) for lines, clip in zip(words, clips, strict=True)], file, args.frames_per_second)
    if args.json:
        document = {"output": str(file), "shows": subject.shows, "seed": args.seed, "notes": list(report.notes)}
        return json.dumps({**document, "rows": [asdict(row) for row in rows]}, indent=2)
    return "\n".join([_table(rows, width), *(f"note: {note}" for note in report.notes), f"wrote {file}"])


def _sampled(
    subject: Subject, put: Callable[[], Patch], compare: bool, device: torch.device, quick: bool
) -> tuple[list[Row], list[Tensor], Report]:
    """The clips, dense first where it is wanted, what was measured of each, and the report of the patch.

    Args:
        subject: what is sampled.
        put: patches it.
        compare: whether the dense clip is made too.
        device: of the model.
        quick: whether each is run before it is timed, and then more than once.
    """
    kinds = ["dense", "sparse"] if compare else ["sparse"]
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    clips: dict[str, Tensor] = {}
    report: Report | None = None
    for turn in range(_ROUNDS + 1 if quick else 1):
        for kind in kinds:
            with nullcontext() if kind == "dense" else put() as applied:
                begin = _now(device)
                clips[kind] = subject.run(1 if quick and not turn else None)
                if turn or not quick:
                    seconds[kind].append(_now(device) - begin)
                if applied is not None:
                    report = applied.report()
    assert report is not None
    medians = {kind: statistics.median(taken) for kind, taken in seconds.items()}
    rows = []
    for kind, clip in clips.items():
        right = None if subject.is_right is None else subject.is_right(clip)
        if kind == "dense":
            rows.append(Row("dense", 1.0, seconds[kind], right=right))
            continue
        row = Row(_label(report), report.density, seconds[kind], right=right)
        if compare:
            other, ratio = clips["dense"], medians["sparse"] / medians["dense"]
            row = replace(row, ratio=ratio, psnr=psnr(clip, other), ssim=ssim(clip, other))
        rows.append(row)
    return rows, list(clips.values()), report


def _now(device: torch.device) -> float:
    """Seconds of this process, which other programs do not take part in; on a GPU those of the clock."""
    if device.type == "cpu":
        return time.process_time()
    synchronize(device)
    return time.perf_counter()


def _label(report: Report) -> str:
    params = ", ".join(f"{name}={value}" for name, value in report.params.items() if value not in (None, ""))
    return f"{report.method}({params})" if len(params) < 200 else report.method


def _words(row: Row) -> list[str]:
    """What stands above a clip besides its name."""
    if row.ratio is None or row.psnr is None:
        return ["" if row.attention == "dense" else f"density {row.density:.2f}"]
    near = "the same" if row.psnr >= 100 else f"PSNR {row.psnr:.1f} dB"
    return [f"density {row.density:.2f}, {near}, time {row.ratio:.2f} of dense"]


def _table(rows: Sequence[Row], width: int) -> str:
    told = {None: "-", True: "yes", False: "no"}
    cells = [
        (
            row.attention,
            f"{row.density:.3f}",
            "-" if row.psnr is None else f"{row.psnr:.2f}",
            "-" if row.ssim is None else f"{row.ssim:.4f}",
            "-" if row.ratio is None else f"{row.ratio:.2f}",
            f"{min(row.seconds):.2f}-{max(row.seconds):.2f} s",
            told[row.right],
        )
        for row in rows
    ]
    columns = ("attention", "density", "PSNR (dB)", "SSIM", "time ratio", "a clip", "motion right")
    # Nothing is said of what was not measured.
    told_of = [i for i in range(len(columns)) if any(line[i] != "-" for line in cells)]
    return table([columns[i] for i in told_of], [[line[i] for i in told_of] for line in cells], width=width)


# ---------------------------------------------------------------------- the method


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """The parameters that --set gives.

    Raises:
        ValueError, TypeError: options that do not go together, or a parameter that the method has not.
    """
    found: dict[str, Any] = {}
    for text in args.set or ():
        name, is_set, value = text.partition("=")
        if not is_set or not name.isidentifier():
            raise ValueError(f"`set` must be PARAMETER=VALUE, such as block_size=64, got {text!r}")
        try:
            read = json.loads(value)
        except json.JSONDecodeError:
            read = value
        found[name] = tuple(read) if isinstance(read, list) else read
    apart = [name for name in ("density", "set") if getattr(args, name)]
    if apart and args.method is None:
        raise ValueError(f"`method` must be given with --{apart[0]}")
    if args.density is not None:
        check_share("density", args.density)
        if args.quality is not None:
            raise ValueError("`density` must be left out beside --quality, which sets it")
    if args.method is not None and find_profile(args.method) is None:
        make_method(args.method, found)
    elif apart:
        raise ValueError(f"--{apart[0]} must be left out for a profile, which holds all parameters")
    return found


def _patch_maker(args: argparse.Namespace, settings: dict[str, Any], subject: Subject) -> Callable[[], Patch]:
    """What puts the method on the model."""
    name = args.method
    if name is None:
        return lambda: patch(subject.model, quality=args.quality)
    # A clip of a named method should show that method, also where it does not pay.
    own: dict[str, Any] = {"min_tokens": 0}
    if find_profile(name) is None and args.quality is None and _is_turned(args, settings, subject):
        turned = _turned(name, settings, args.density, subject)
        return lambda: patch(subject.model, turned, **own)
    return lambda: patch(subject.model, name, quality=args.quality, **own, **settings)


def _is_turned(args: argparse.Namespace, settings: dict[str, Any], subject: Subject) -> bool:
    """Whether the method is turned to a density: where one is given, and of a shipped model where nothing is."""
    cls = METHODS.get(args.method)
    if args.density is not None and cls.knob is None:
        raise ValueError(f"`density` must be left out for {args.method}, which has no parameter that sets it")
    return args.density is not None or (subject.calls is not None and not settings and cls.knob is not None)


def _turned(name: str, settings: dict[str, Any], density: float | None, subject: Subject) -> Method:
    """A method at a density, its other parameters as given, or else as suit the input."""
    if subject.calls is None:
        knob = METHODS.get(name).knob
        if knob is None or knob.name != "density":
            set_by = knob.name if knob else "none"
            raise ValueError(f"`density` of {name} must be set by its parameter, --set {set_by}=..., for a pipeline")
        return make_method(name, {**settings, "density": density})
    calls = subject.calls()
    base = base_method(name, calls[0].ctx.layout)
    wanted = density or _DENSITY
    found = fit_density(replace(base, **settings), wanted, calls)
    if abs(found.density - wanted) > _NEAR * wanted:
        log.warning("%s comes no nearer to a density of %g than %.3f on so short a clip", name, wanted, found.density)
    return found.method


# ---------------------------------------------------------------------- the models


def _moving(args: argparse.Namespace, device: torch.device) -> Subject:
    """The shipped model of moving scenes."""
    given = [f"--{name}" for name in ("call", "dtype") if getattr(args, name) not in (None, "auto")]
    if given:
        raise ValueError(f"{' and '.join(given)} must be left out for {_SHIPPED}")
    scene = draw_classes(1, args.seed)[0] if args.prompt is None else _scene(args.prompt)
    model = moving.load_moving_wan().to(device)

    def run(steps: int | None) -> Tensor:
        return moving.sample(model, [scene], steps=steps or args.steps or _STEPS, seed=args.seed)[0]

    def calls() -> list[Call]:
        return captured(model, draw_classes(1, CALIBRATION_SEED), CALIBRATION_SEED)

    shows = f"{scene.colour} {scene.shape} going {scene.direction}"
    return Subject(model, run, shows, calls, lambda clip: moving.check_motion(clip, scene).right)


def _scene(prompt: str) -> SceneClass:
    """The scene that three words name, in any order."""
    words = prompt.replace(",", " ").lower().split()
    found = []
    for known in (SHAPES, tuple(COLOURS), DIRECTIONS):
        named = [word for word in words if word in known]
        if len(named) != 1:
            raise ValueError(f"`prompt` must name one of {', '.join(known)} for {_SHIPPED}, got {prompt!r}")
        found += named
    return SceneClass(*found)


def _pipeline(args: argparse.Namespace, device: torch.device) -> Subject:
    """A pipeline of diffusers that makes videos, or images."""
    if args.model in SHIPPED or not is_pipeline(args.model):
        raise ValueError(f"`model` must make videos or images, got {args.model}")
    if args.prompt is None:
        raise ValueError(f"`prompt` must say what a pipeline is to show, got none for {args.model}")
    call = {} if args.call is None else read_call(args.call)
    own = sorted(call.keys() & _OWN)
    if own:
        raise ValueError(f"`call` must leave out what the command sets itself, got {', '.join(own)}")
    call |= {} if args.steps is None else {"num_inference_steps": args.steps}
    call["output_type"] = "np"
    loaded = load(args.model, prompts=[args.prompt], count=1, call=call, dtype=args.dtype, device=device)

    given: Any = loaded.batches[0]

    def run(steps: int | None) -> Tensor:
        batch = {**given, "generator": torch.Generator().manual_seed(args.seed)}
        made = loaded.model(**batch)
        frames = made.frames if hasattr(made, "frames") else made.images
        clip = torch.as_tensor(frames[0])
        return (clip if clip.ndim == 4 else clip[None]).movedim(-1, 1).float()

    return Subject(loaded.model, run, args.prompt)
