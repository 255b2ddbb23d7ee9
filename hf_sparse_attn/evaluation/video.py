"""Evaluation on the shipped Wan of moving scenes: same-seed PSNR and SSIM, and whether the motion is right."""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from statistics import fmean as mean
from typing import Any, ClassVar

from torch import Tensor

from hf_sparse_attn.api import patch
from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.evaluation.fidelity import Reference, psnr, ssim
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import Result, Row, difference
from hf_sparse_attn.evaluation.run import (
    Contestant,
    Measure,
    Trial,
    common_figures,
    dense_figures,
    dense_of,
    fitted,
    measured_density,
    profiles_within,
    saved,
    settled,
)
from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.observe import Call, Seen, observing
from hf_sparse_attn.shipped.moving import check_motion, load_moving_wan, sample
from hf_sparse_attn.shipped.moving_scenes import SceneClass, draw_classes

log = logging.getLogger(__name__)

STEPS = 8
# Steps whose calls are looked at: early, where the clip takes shape, in the middle, and late.
_SEEN_STEPS = (1, 4, 7)
# Seeds of the noise: of the clips to fit and profile with, and of those that are scored.
CALIBRATION_SEED, _FIRST_SEED = 0, 1000
# Of the clip by which densities are corrected.
_CORRECTION_SEED = 500


@dataclass(frozen=True)
class VideoRow(Row):
    """See Row.

    Args:
        psnr: in dB against the dense clip of the same seed, mean over frames and clips.
        ssim: likewise.
        right: share of clips in which the sprite has its colour and goes the way it should.
    """

    psnr: float
    ssim: float
    right: float

    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = (
        ("PSNR (dB)", lambda row: f"{row.psnr:.2f}{row.paired['psnr'].spread(2)}" if row.paired else "same"),
        ("SSIM", lambda row: f"{row.ssim:.4f}"),
        ("over dense", lambda row: difference(row, "ssim")),
        ("motion right", lambda row: f"{row.right:.2f}"),
    )
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = (
        ("psnr", "PSNR against dense (dB)", True),
        ("ssim", "SSIM against dense", True),
        ("recall", "attention recall", True),
        ("output_error", "relative output error", False),
    )


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores the methods on the shipped video model.

    Args:
        args: `clips` of the command.
        names: methods, all with a knob.
        densities: kept shares of the pairs.
        profiled: also score the mix that the profiler chooses at each density.
        output: folder for the contact sheet; None for none.
    """
    if args.clips < 1:
        raise ValueError(f"`clips` must be at least 1, got {args.clips}")
    begin = time.perf_counter()
    model = load_moving_wan()
    scenes = draw_classes(args.clips, _FIRST_SEED)
    calls = captured(model, draw_classes(1, CALIBRATION_SEED), CALIBRATION_SEED)
    held_out = Reference(captured(model, scenes[:1], _FIRST_SEED))
    dense = sample(model, scenes, steps=STEPS, seed=_FIRST_SEED)
    was_right = rights(dense, scenes)
    rows: list[Row] = [VideoRow(psnr=100.0, ssim=1.0, right=mean(was_right), **dense_figures())]
    sheets = [("dense", 1.0, dense)]
    skipped: dict[str, str] = {}

    def measure(method: Method) -> float:
        with patch(model, method, min_tokens=0) as applied:
            sample(model, draw_classes(1, _CORRECTION_SEED), steps=STEPS, seed=_CORRECTION_SEED)
        return measured_density(applied)

    def run(method: Method) -> Trial:
        with patch(model, method, min_tokens=0) as applied:
            clips = sample(model, scenes, steps=STEPS, seed=_FIRST_SEED)
        taken[method] = clips
        near, alike = ([of(a, b) for a, b in zip(clips, dense, strict=True)] for of in (psnr, ssim))
        right = rights(clips, scenes)
        paired = {"psnr": Paired.of(near), "ssim": Paired.of(alike, [1.0] * len(alike))}
        paired["right"] = Paired.of(right, was_right)
        found = {"psnr": mean(near), "ssim": mean(alike), "right": mean(right), "paired": paired}
        return Trial(measured_density(applied), found)

    taken: dict[Method, Tensor] = {}
    found = fitted(names, densities, calls, measure, skipped, "video")
    own: Iterable[Contestant] = ()
    if args.profile is not None:
        own = [saved(args.profile, model)]
    elif profiled:
        own = profiles(model, densities, skipped, measure)
    for contestant in chain(found, own):
        contestant, trial = settled(contestant, run)
        rows.append(VideoRow(**common_figures(contestant, trial, held_out)))
        sheets.append((contestant.name, trial.density, taken[contestant.fit.method]))
        taken.clear()
    if output is not None:
        # One whose dense version is as it should be, where there is one.
        good = [check_motion(clip, scene).right for clip, scene in zip(dense, scenes, strict=True)]
        shown = good.index(True) if any(good) else 0
        drawn = [("", f"{name}\n{density:.3f}", clips[shown : shown + 1]) for name, density, clips in sheets]
        try:
            draw_clips(drawn, output / "eval_video_frames.png", height=0.95 * len(drawn) + 0.4, fontsize=9)
        except MissingExtra as missing:
            log.warning("%s", missing)
    size = "x".join(map(str, calls[0].ctx.layout.parts[0].grid or ()))
    setting = f"shipped Wan of moving scenes, {args.clips} clips of {size} tokens, {STEPS} steps, none of them dense"
    return Result("video", setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def profiles(
    model: Any, densities: Sequence[float], skipped: dict[str, str], measure: Measure
) -> Iterator[Contestant]:
    """A mix for each density, from clips that are not scored; see profiles_within."""

    def run(model: Any) -> None:
        sample(model, draw_classes(2, CALIBRATION_SEED), steps=STEPS, seed=CALIBRATION_SEED)

    return profiles_within(model, [run], "layer_error", densities, skipped, measure)


def captured(model: Any, scenes: Sequence[SceneClass], seed: int) -> list[Call]:
    """The attention calls of some steps of a dense run, with their steps in the context."""
    calls: list[Call] = []

    def look(seen: Seen) -> None:
        if seen.ctx.step in _SEEN_STEPS:
            calls.append(Call(seen.q, seen.k, seen.v, seen.ctx))

    with observing(model, look, steps=True):
        sample(model, scenes, steps=STEPS, seed=seed)
    return calls


def rights(clips: Tensor, scenes: Sequence[SceneClass]) -> list[float]:
    """1 for every clip whose motion is right, else 0."""
    return [float(check_motion(clip, scene).right) for clip, scene in zip(clips, scenes, strict=True)]
