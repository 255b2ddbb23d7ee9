"""Frames of clips on one picture, for the pages of the recipes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from hf_sparse_attn.extras import needing
from hf_sparse_attn.shipped.moving import frames_to_image


def draw_clips(rows: Sequence[tuple[str, str, Tensor]], file: Path, height: float, fontsize: float) -> None:
    """Draws a contact sheet: a row of frames for each clip.

    Args:
        rows: title above the row or "", name beside it, and the clip [1, frames, 3, height, width] in [0, 1].
        file: PNG to write.
        height: of the sheet, in inches.
        fontsize: of the names, in points.
    """
    with needing("a sheet of frames"):
        from matplotlib.figure import Figure
        from PIL import Image

    figure = Figure(figsize=(8.2, height), layout="constrained")
    for ax, (title, name, clips) in zip(figure.subplots(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        ax.imshow(frames_to_image(clips, scale=4), interpolation="nearest")
        ax.set_xticks([])
        ax.set_yticks([])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(name.replace(", ", ",\n"), rotation=0, ha="right", va="center", fontsize=fontsize)
        if title:
            ax.set_title(title, fontsize=9, loc="left")
    figure.savefig(file, dpi=88)
    # A palette is a third of the size.
    with Image.open(file) as picture:
        small = picture.convert("RGB").quantize(255)
    small.save(file, optimize=True)
