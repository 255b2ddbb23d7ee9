"""Videos of a folder with their captions, and the frames of one as a tensor of a size that was asked for."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse_attn.extras import MissingExtra, needing
from hf_sparse_attn.training.text.source import shown_files

# Pillow reads moving pictures of these itself.
_PICTURES = (".gif", ".webp", ".apng")
_VIDEOS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", *_PICTURES)
_FRAMES = (".png", ".jpg", ".jpeg")
_CAPTIONS = ("text", "caption", "prompt")
_JSON, _JSONL = "captions.json", "metadata.jsonl"
# 29.97 frames a second are 30 to whoever asks for them.
_RATE_TOLERANCE = 0.01

# How much earlier the nearer of two frames must be, in frames asked for, so that rounding decides nothing.
_TIE = 1e-6

Frame = NDArray[np.uint8]
# Frames, each with its second in the video where the reader tells it, and the frames a second of the whole. Of a
# moving picture: frames with the seconds they are shown, and how many a second of the shortest there would be.
Decoded = tuple[Iterator[tuple[Frame, float | None]], float | None]


class ShortClipError(ValueError):
    """A video has fewer frames than are asked for."""


@dataclass(frozen=True)
class Clip:
    """A video.

    Args:
        name: path within the folder, with slashes.
        path: a file, or a folder of frames.
        caption: what it shows.
        fps: frames a second, where the captions' file says it; a video file tells it itself.
    """

    name: str
    path: Path
    caption: str
    fps: float | None = None

    def identity(self) -> list[Any]:
        """What tells one state of it from another: its files with sizes and times."""
        stats = [(p.name, p.stat()) for p in ([self.path] if self.path.is_file() else frame_files(self.path))]
        return [self.name, self.caption, self.fps, [[name, s.st_size, s.st_mtime_ns] for name, s in stats]]


def find_clips(folder: Path) -> list[Clip]:
    """The videos of a folder and of folders in it, sorted by name.

    A video is a file, or a folder of frames as .png or .jpg files in the order of their names, in which numbers are
    told by their value: frame2 stands before frame10. Hidden files are none. Its caption stands
    beside it in a .txt file of its name, or in captions.json (an object from names to captions) or metadata.jsonl
    (objects with `file_name` and `text`, `caption` or `prompt`, and `fps` if need be) of the outer folder.

    Raises:
        FileNotFoundError: no such folder, or none of that in it.
        ValueError: a video without a caption, or a file of captions that is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"`source` must be a folder of videos, got {folder}")
    files = list(shown_files(folder))
    frames = {p.parent for p in files if p.suffix.lower() in _FRAMES}
    if folder in frames:
        raise ValueError(f"`source` must hold every video in a folder of its own, got frames in {folder} itself")
    found = sorted([*(p for p in files if p.suffix.lower() in _VIDEOS), *frames])
    if not found:
        raise FileNotFoundError(
            f"`source` must hold video files ({', '.join(_VIDEOS)}) or folders of frames ({', '.join(_FRAMES)}), "
            f"got none in {folder}"
        )
    listed = _listed(folder)
    return [_clip(folder, path, listed) for path in found]


def frame_files(folder: Path) -> list[Path]:
    """The frames of a folder, in order."""
    found = [p for p in folder.iterdir() if p.suffix.lower() in _FRAMES and not p.name.startswith(".")]
    return sorted(found, key=lambda p: ([int(n) if n.isdecimal() else n for n in re.split(r"(\d+)", p.name)], p.name))


def read_clip(clip: Clip, frames: int, height: int, width: int, fps: float | None) -> Tensor:
    """The first frames of a video, scaled to cover the size and cut to it around the centre.

    Args:
        clip: the video.
        frames, height, width: of the result.
        fps: frames a second to take, each the nearest in time where the video tells times; None takes every frame. In
            a moving picture (.gif) each frame has a duration of its own, and the one that is shown is taken.

    Returns:
        [3, frames, height, width], float32 from -1 to 1.

    Raises:
        ShortClipError: it has too few frames.
        ValueError: it cannot be read, or has fewer frames a second than are asked for, or nothing says how many.
        MissingExtra: nothing that reads it is installed.
    """
    decoded, rate = _decode(clip)
    least = frames
    taken: Iterator[Frame] = (frame for frame, _ in decoded)
    if fps is not None:
        if rate is None or not rate > 0:
            raise ValueError(f"`fps` must be none where nothing says the rate of a video, got {fps:g} for {clip.name}")
        if fps > rate * (1 + _RATE_TOLERANCE):
            raise ValueError(f"`fps` must be at most the {rate:g} of the video, got {fps:g} for {clip.name}")
        fps = min(fps, rate)
        least = math.floor((frames - 1) * rate / fps + 0.5) + 1
        shown = clip.fps is None and clip.path.suffix.lower() in _PICTURES
        taken = (_shown if shown else _at_rate)(decoded, fps, rate)
    kept: list[Tensor] = []
    with _readable(clip.path):
        for frame in taken:
            kept.append(_fitted(torch.from_numpy(np.array(frame)), height, width))
            if len(kept) == frames:
                return torch.stack(kept, 1)
    raise ShortClipError(
        f"`frames` must be at most what every video has, got {frames}, for which {clip.name} must have "
        f"{least} frames and has fewer; `skip_short` leaves such videos out"
    )


def _at_rate(decoded: Iterator[tuple[Frame, float | None]], fps: float, rate: float) -> Iterator[Frame]:
    """For each moment of a constant rate the nearest frame, of two as near the later one."""
    number, start, before, place_before = 0, 0.0, None, 0.0
    for index, (frame, told) in enumerate(decoded):
        time = index / rate if told is None else told
        start = time if before is None else start
        place = (time - start) * fps
        while before is not None and number < (place_before + place) / 2 - _TIE:
            yield before
            number += 1
        before, place_before = frame, place
    # The last one is shown for as long as one is on average.
    while before is not None and number < place_before + fps / rate / 2 - _TIE:
        yield before
        number += 1


def _shown(decoded: Iterator[tuple[Frame, float | None]], fps: float, rate: float) -> Iterator[Frame]:
    """For each moment of a constant rate the frame that is shown then; of frames shown equally long, the nearest."""
    number, end = 0, 0.0
    for frame, seconds in decoded:
        end += (seconds or 0.0) * fps
        while number < end - fps / rate / 2 - _TIE:
            yield frame
            number += 1


def _fitted(frame: Tensor, height: int, width: int) -> Tensor:
    """A frame [height, width, 3] of bytes as [3, height, width] from -1 to 1, of another size."""
    found = frame.permute(2, 0, 1)[None].float() / 255.0
    scale = max(height / found.shape[2], width / found.shape[3])
    if scale != 1:
        size = [max(height, round(found.shape[2] * scale)), max(width, round(found.shape[3] * scale))]
        found = F.interpolate(found, size, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (found.shape[2] - height) // 2, (found.shape[3] - width) // 2
    return 2.0 * found[0, :, top : top + height, left : left + width] - 1.0


def _clip(folder: Path, path: Path, listed: dict[str, tuple[str, float | None]]) -> Clip:
    name = path.relative_to(folder).as_posix()
    stem = name if path.is_dir() else name.removesuffix(path.suffix)
    caption, fps = listed.get(name) or listed.get(stem) or (None, None)
    beside = path.parent / f"{path.name if path.is_dir() else path.stem}.txt"
    if caption is None and beside.is_file():
        caption = _text(beside).strip()
    if caption is None:
        raise ValueError(
            f"`source` must hold a caption of every video, in {beside.name} beside it, {_JSON} or {_JSONL}; "
            f"got none for {name} in {folder}"
        )
    return Clip(name, path, caption, fps)


def _listed(folder: Path) -> dict[str, tuple[str, float | None]]:
    """Caption and rate by the name of a video, of the files that hold those of many."""
    found: dict[str, tuple[str, float | None]] = {}
    path = folder / _JSON
    if path.is_file():
        values = _json(_text(path))
        if not isinstance(values, dict) or not all(isinstance(v, str) for v in values.values()):
            raise ValueError(f"`{_JSON}` must hold an object from names to captions, got another in {folder}")
        found.update({name: (caption, None) for name, caption in values.items()})
    path = folder / _JSONL
    if path.is_file():
        for number, line in enumerate(_text(path).split("\n"), 1):
            if not line.strip():
                continue
            row = _json(line)
            row = row if isinstance(row, dict) else {}
            caption = next((row[key] for key in _CAPTIONS if isinstance(row.get(key), str)), None)
            fps = row.get("fps")
            if not isinstance(row.get("file_name"), str) or caption is None or not isinstance(fps, int | float | None):
                raise ValueError(
                    f"`{_JSONL}` must hold objects with file_name and one of {', '.join(_CAPTIONS)} as text, and fps "
                    f"as a number if at all; got another in line {number} in {folder}"
                )
            found[row["file_name"].rstrip("/")] = caption, fps
    return found


def _text(path: Path) -> str:
    try:
        # The mark that some editors put in front is no part of a caption.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"captions must be UTF-8, got {path}: {error}") from error


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _decode(clip: Clip) -> Decoded:
    """The frames of a video, one by one, and its rate."""
    path = clip.path
    if path.is_dir():
        return _frames_of(path), clip.fps
    with _readable(path):
        if path.suffix.lower() not in _PICTURES:
            frames, rate = _reader()(path)
            return frames, clip.fps or rate
        frames, rate = _moving_picture(path)
        return (frames, rate) if clip.fps is None else (((frame, None) for frame, _ in frames), clip.fps)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except MissingExtra:
        raise
    # Each reader has errors of its own.
    except Exception as error:
        raise ValueError(f"`source` must hold videos that can be read, got {path}: {error}") from error


def _frames_of(folder: Path) -> Iterator[tuple[Frame, None]]:
    image = _pillow()
    for path in frame_files(folder):
        with image.open(path) as opened:
            yield np.asarray(opened.convert("RGB")), None


def _moving_picture(path: Path) -> Decoded:
    image = _pillow()
    with image.open(path) as opened:
        shown = [_seconds(opened, number) for number in range(getattr(opened, "n_frames", 1))]

    def frames() -> Iterator[tuple[Frame, float]]:
        with image.open(path) as opened:
            for number, seconds in enumerate(shown):
                opened.seek(number)
                yield np.asarray(opened.convert("RGB")), seconds

    return frames(), 1.0 / min(filter(None, shown)) if any(shown) else None


def _seconds(opened: Any, number: int) -> float:
    """How long a frame of a moving picture is shown."""
    opened.seek(number)
    if opened.format == "WEBP":
        # It knows when the frame is decoded.
        opened.load()
    return float(opened.info.get("duration") or 0.0) / 1000.0


def _pillow() -> Any:
    with needing("reading frames"):
        from PIL import Image
    return Image


def _reader() -> Any:
    """The first reader of video files that is installed; av is the one that the extra brings."""
    for package, read in (("av", _by_av), ("imageio", _by_imageio), ("decord", _by_decord)):
        try:
            __import__(package)
        except ImportError:
            continue
        return read
    raise MissingExtra("reading video files", "av")


def _by_av(path: Path) -> Decoded:
    import av

    opened: Any = av.open(str(path))
    stream = opened.streams.video[0]

    def frames() -> Iterator[tuple[Frame, float | None]]:
        with opened:
            for frame in opened.decode(stream):
                # A phone that is held upright writes lying frames, and by how much they are to be turned.
                turns = round(getattr(frame, "rotation", 0) / 90)
                yield np.rot90(frame.to_ndarray(format="rgb24"), turns), frame.time

    return frames(), None if stream.average_rate is None else float(stream.average_rate)


def _by_imageio(path: Path) -> Decoded:
    import imageio.v2

    opened = imageio.v2.get_reader(str(path))

    def frames() -> Iterator[tuple[Frame, None]]:
        with opened:
            for frame in opened:
                yield frame, None

    return frames(), opened.get_meta_data().get("fps")


def _by_decord(path: Path) -> Decoded:
    import decord

    opened = decord.VideoReader(str(path))
    return ((opened[i].asnumpy(), None) for i in range(len(opened))), float(opened.get_avg_fps())
