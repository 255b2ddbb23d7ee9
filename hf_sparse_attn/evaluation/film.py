"""Clips beside one another as a film, MP4 or GIF, with words above each."""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from hf_sparse_attn.extras import needing
from hf_sparse_attn.sharing.files import replace_file

ENDINGS = (".mp4", ".gif")
# Pixels: least width of a panel, between panels, and of a line of words.
_WIDTH, _GAP, _LINE = 384, 8, 22
# Nobody wants to find a short clip at its end: a file that does not go round by itself holds it so often.
_SECONDS = 4.0


class Panel(NamedTuple):
    """A clip and what is written above it.

    Args:
        lines: of words.
        clip: [frames, 3, height, width] in [0, 1].
    """

    lines: Sequence[str]
    clip: Tensor


def default_ending() -> str:
    """MP4 where PyAV is installed, else GIF."""
    return ENDINGS[0] if find_spec("av") is not None else ENDINGS[1]


def check_film(file: Path) -> None:
    """Refuses a file that cannot become a film, before anything is made for it.

    Raises:
        ValueError: its ending is none of ENDINGS.
        OSError: its folder is not there, or it is a folder itself.
        MissingExtra: a package that writes it is not installed.
    """
    if file.suffix.lower() not in ENDINGS:
        raise ValueError(f"`output` must end in {' or '.join(ENDINGS)}, got {file}")
    if file.is_dir():
        raise IsADirectoryError(f"`output` must be a file, got the folder {file}")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"`output` must be in a folder that is there, got {file}")
    with needing("a film"):
        import PIL  # noqa: F401

        if file.suffix.lower() == ".mp4":
            import av  # noqa: F401


def write_film(panels: Sequence[Panel], file: Path, fps: float) -> None:
    """Writes clips of one size beside one another, small ones enlarged without smoothing.

    Args:
        panels: at least one, all with as many frames.
        file: to write, .mp4 or .gif.
        fps: frames shown in a second.

    Raises:
        OSError: it cannot be written.
    """
    frames = [_frame(panels, number) for number in range(len(panels[0].clip))]
    if file.suffix.lower() == ".gif":
        first, *rest = [frame.quantize(255) for frame in frames]
        shown = {"save_all": True, "append_images": rest, "duration": round(1000 / fps), "loop": 0}
        replace_file(file, lambda path: first.save(path, format="GIF", **shown))
    else:
        times = max(1, round(_SECONDS * fps / len(frames)))
        replace_file(file, lambda path: _write_mp4(frames * times, path, fps))


def _frame(panels: Sequence[Panel], number: int) -> Any:
    """One picture: the panels at one time, with their words."""
    from PIL import Image, ImageDraw

    _, height, width = panels[0].clip.shape[1:]
    scale = max(1, math.ceil(_WIDTH / width))
    size, words = (width * scale, height * scale), 6 + _LINE * max(len(panel.lines) for panel in panels)
    # Video has pixels of colour half as many to a side.
    whole = [-(-n // 2) * 2 for n in (len(panels) * (size[0] + _GAP) - _GAP, words + size[1])]
    picture = Image.new("RGB", (whole[0], whole[1]), "white")
    draw = ImageDraw.Draw(picture)
    for place, panel in enumerate(panels):
        left = place * (size[0] + _GAP)
        for row, line in enumerate(panel.lines):
            draw.text((left + 4, 3 + row * _LINE), line, "black", font=_font(draw, line, size[0] - 8))
        pixels = (panel.clip[number].permute(1, 2, 0) * 255).round().clamp(0, 255).byte().cpu().numpy()
        picture.paste(Image.fromarray(pixels).resize(size, Image.Resampling.NEAREST), (left, words))
    return picture


def _font(draw: Any, line: str, width: int) -> Any:
    """The largest font in which a line fits; of a Pillow without FreeType the only one it has."""
    from PIL import ImageFont

    fonts = [ImageFont.load_default(size) for size in (18, 16, 14, 12, 10)]
    return next((font for font in fonts if draw.textlength(line, font=font) <= width), fonts[-1])


def _write_mp4(frames: Sequence[Any], path: Path, fps: float) -> None:
    from fractions import Fraction

    import av

    with av.open(str(path), "w", format="mp4") as container:
        # MPEG-4 is what every build of FFmpeg has.
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        stream: Any = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1000))
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "14"} if codec == "libx264" else {"qscale": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())
