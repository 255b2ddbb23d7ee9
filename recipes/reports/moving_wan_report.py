"""Measure the small Wan transformer: how often sampled motion is right, and where each head looks.

    python -m hf_sparse_attn.recipes.reports.moving_wan_report --output report.md

The figures on the model card come from here.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.recipes.reports.page import pipes
from hf_sparse_attn.shipped.moving import MODEL, check_motion, frames_to_image, load_moving_wan, sample
from hf_sparse_attn.shipped.moving_scenes import draw_classes

_FRAMES, _SIDE = 12, 24
_ROWS = 64


def kind_of(frame: float, place: float, near: float, most: float) -> str:
    """One word for a head: temporal, spatial or local where half its attention is there, else spread or global.

    Args:
        frame: share of its attention in the query's own frame, averaged over queries, steps and clips as the others.
        place: share within one token of the query's own place, over all frames.
        near: share within two frames and two tokens.
        most: share of the keys that holds nine tenths of the attention.
    """
    for kind, share in (("temporal", place), ("spatial", frame), ("local", near), ("global", most)):
        if share >= 0.5:
            return kind
    return "spread"


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


def head_table(model: Any, clips: int, first_seed: int, steps: int) -> list[dict[str, str]]:
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
        for number, scene in enumerate(draw_classes(clips, first_seed)):
            sample(model, [scene], _FRAMES, _SIDE, _SIDE, steps, first_seed + number)
    rows = []
    for (layer, head), seen in sorted(watch.sums.items()):
        told = torch.stack(seen).mean(0).tolist()
        shares = zip(("own frame", "own place", "near", "keys for 0.9"), told, strict=True)
        row = {"layer": str(layer), "head": str(head), "kind": kind_of(*told)}
        rows.append(row | {title: f"{share:.2f}" for title, share in shares})
    return rows


def motion_table(
    model: Any, clips: int, first_seed: int, steps: int, guidance: float
) -> tuple[dict[str, str], Tensor]:
    """Sample clips of evenly drawn classes, one by one, and check them.

    Args:
        model: the model.
        clips: how many.
        first_seed: seed of the first; the others follow.
        steps: Euler steps of each.
        guidance: classifier-free guidance.

    Returns:
        The row of the table, shares of the clips, medians over them and seconds for each; and the clips,
        [clips, frames, 3, height, width].
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
    checks = [(check_motion(clip, scene), scene) for clip, scene in zip(drawn, scenes, strict=True)]
    row = {
        "steps": str(steps),
        "guidance": f"{guidance:g}",
        "motion right": f"{statistics.mean(check.right for check, _ in checks):.2f}",
        "colour": f"{statistics.mean(check.colour == scene.colour for check, scene in checks):.2f}",
        "shape": f"{statistics.mean(check.shape == scene.shape for check, scene in checks):.2f}",
        "error, pixels": f"{statistics.median(check.error for check, _ in checks):.2f}",
        "flicker": f"{statistics.median(check.flicker for check, _ in checks):.3f}",
        "seconds": f"{seconds:.1f}",
    }
    return row, drawn


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
    motion = []
    for steps, guidance in tqdm(settings, "settings", disable=None):
        row, drawn = motion_table(model, clips, first_seed, steps, guidance)
        frames_to_image(drawn[:8]).save(sheet)
        motion.append(row)
    return f"{pipes(motion)}\n\n{pipes(head_table(model, 2, first_seed, steps=8))}\n"


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
    pairs = [(int(steps), float(guidance)) for steps, guidance in (pair.split(":") for pair in options.settings)]
    sheet = options.output.with_suffix(".png")
    text = report(load_moving_wan(options.model), options.clips, options.seed, pairs, sheet)
    options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
