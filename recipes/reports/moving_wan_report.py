"""Measure the small Wan transformer: how often sampled motion is right, and where each head looks.

    python -m hf_sparse_attn.recipes.moving_wan_report --output report.md

The figures on the model card come from here.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.shipped.moving import MODEL, check_motion, draw_classes, frames_to_image, load_moving_wan, sample

_LOG = logging.getLogger(__name__)
_FRAMES, _SIDE = 12, 24
_ROWS = 64


@dataclass(frozen=True)
class HeadFigures:
    """Where one head's attention goes, averaged over queries, steps and clips.

    Args:
        layer: layer of the head.
        head: its index.
        frame: share of its mass in the query's own frame.
        place: share within one token of the query's own place, over all frames.
        near: share within two frames and two tokens.
        most: share of the keys that holds nine tenths of the mass.
    """

    layer: int
    head: int
    frame: float
    place: float
    near: float
    most: float

    @property
    def kind(self) -> str:
        """One word for the head: temporal, spatial or local where half its mass is there, else spread or global."""
        if self.place >= 0.5:
            return "temporal"
        if self.frame >= 0.5:
            return "spatial"
        if self.near >= 0.5:
            return "local"
        return "global" if self.most >= 0.5 else "spread"


@dataclass(frozen=True, kw_only=True)
class _Watch(Method):
    """Sums up the shares of every call for some queries and declines, so that the model runs dense."""

    sums: dict[tuple[int, int], list[Tensor]] = field(hash=False, compare=False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Any) -> Decline:
        grid = ctx.layout.coordinates()[:, 1:]
        rows = torch.linspace(0, q.shape[2] - 1, _ROWS).long()
        weights = (q[0, :, rows].float() @ k[0].float().mT * ctx.softmax_scale).softmax(-1)
        away = (grid[rows, None] - grid[None]).abs()
        side = away[..., 1:].amax(-1)
        kept = torch.stack([away[..., 0] == 0, side <= 1, (away[..., 0] <= 2) & (side <= 2)]).to(weights.dtype)
        shares = torch.einsum("hqk,nqk->hn", weights, kept) / _ROWS
        largest = weights.sort(-1, descending=True).values.cumsum(-1)
        most = ((largest < 0.9).sum(-1) + 1).float().mean(-1, keepdim=True) / weights.shape[-1]
        for head, figures in enumerate(torch.cat([shares, most], dim=-1)):
            self.sums.setdefault((ctx.layer, head), []).append(figures)
        return Decline("only watched")


def head_table(model: Any, clips: int, first_seed: int, steps: int) -> list[HeadFigures]:
    """Watch every head while clips are sampled densely without guidance.

    Args:
        model: the model.
        clips: how many.
        first_seed: seed of the first; the others follow.
        steps: Euler steps of each.

    Returns:
        A row for each head, layer by layer.
    """
    watch = _Watch(sums={})
    with patch(model, watch, min_tokens=0):
        for row, scene in enumerate(draw_classes(clips, first_seed)):
            sample(model, [scene], _FRAMES, _SIDE, _SIDE, steps, first_seed + row)
    means = {place: torch.stack(seen).mean(0).tolist() for place, seen in sorted(watch.sums.items())}
    return [HeadFigures(layer, head, *figures) for (layer, head), figures in means.items()]


@dataclass(frozen=True)
class MotionFigures:
    """What sampled clips of some settings show: shares of the clips, medians over them, and seconds per clip."""

    right: float
    colour: float
    shape: float
    error: float
    flicker: float
    seconds: float


def motion_table(model: Any, clips: int, first_seed: int, steps: int, guidance: float) -> tuple[MotionFigures, Tensor]:
    """Sample clips of evenly drawn classes, one by one, and check them.

    Args:
        model: the model.
        clips: how many.
        first_seed: seed of the first; the others follow.
        steps: Euler steps of each.
        guidance: classifier-free guidance.

    Returns:
        The figures, and the clips, [clips, frames, 3, height, width].
    """
    scenes = draw_classes(clips, first_seed)
    began = time.process_time()
    drawn = torch.cat(
        [
            sample(model, [scene], _FRAMES, _SIDE, _SIDE, steps, first_seed + row, guidance)
            for row, scene in enumerate(scenes)
        ]
    )
    seconds = (time.process_time() - began) / clips
    checks = [check_motion(clip, scene) for clip, scene in zip(drawn, scenes, strict=True)]
    figures = MotionFigures(
        right=statistics.mean(check.right for check in checks),
        colour=statistics.mean(check.colour == scene.colour for check, scene in zip(checks, scenes, strict=True)),
        shape=statistics.mean(check.shape == scene.shape for check, scene in zip(checks, scenes, strict=True)),
        error=statistics.median(check.error for check in checks),
        flicker=statistics.median(check.flicker for check in checks),
        seconds=seconds,
    )
    return figures, drawn


def report(model: Any, clips: int, first_seed: int, settings: Sequence[tuple[int, float]], sheet: Path) -> str:
    """Both tables in Markdown, and a contact sheet of the last settings' first clips.

    Args:
        model: the model.
        clips: clips for each of the settings.
        first_seed: seed of the first.
        settings: pairs of Euler steps and guidance.
        sheet: file for the contact sheet.

    Returns:
        The text.
    """
    lines = [
        "| steps | guidance | motion right | colour | shape | error, pixels | flicker | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for steps, guidance in settings:
        found, drawn = motion_table(model, clips, first_seed, steps, guidance)
        frames_to_image(drawn[:8]).save(sheet)
        lines.append(
            f"| {steps} | {guidance:g} | {found.right:.2f} | {found.colour:.2f} | {found.shape:.2f} "
            f"| {found.error:.2f} | {found.flicker:.3f} | {found.seconds:.1f} |"
        )
        _LOG.info(lines[-1])
    lines += [
        "",
        "| layer | head | kind | own frame | own place | near | keys for 0.9 |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {h.layer} | {h.head} | {h.kind} | {h.frame:.2f} | {h.place:.2f} | {h.near:.2f} | {h.most:.2f} |"
        for h in head_table(model, 2, first_seed, steps=8)
    ]
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and measure."""
    parser = argparse.ArgumentParser(description="Measure the small Wan transformer.")
    parser.add_argument("--model", type=Path, default=MODEL, help="folder with the model")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file; a contact sheet stands beside it")
    parser.add_argument("--clips", type=int, default=32, help="clips for each of the settings")
    parser.add_argument("--seed", type=int, default=1000, help="seed of the first clip")
    parser.add_argument(
        "--settings", nargs="+", default=["8:3", "16:1", "16:3"], help="Euler steps:guidance, one or more of them"
    )
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    pairs = [(int(steps), float(guidance)) for steps, guidance in (pair.split(":") for pair in options.settings)]
    sheet = options.output.with_suffix(".png")
    text = report(load_moving_wan(options.model), options.clips, options.seed, pairs, sheet)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
