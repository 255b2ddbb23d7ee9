"""Moving pictures: each frame is shown for as long as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hf_sparse_attn.training.video.source import Clip, ShortClipError, read_clip

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(folder: Path, durations: Any, suffix: str = ".gif", **said: Any) -> Clip:
    """Frames of 0, 30, 60 ... with durations in milliseconds; None for a file that tells none."""
    count = 4 if durations is None else len(durations)
    images = [Image.fromarray(np.full((8, 8, 3), 30 * i, np.uint8)) for i in range(count)]
    path = folder / f"a{suffix}"
    given = {} if durations is None else {"duration": durations}
    given |= {"lossless": True} if suffix == ".webp" else {}
    kind = {".apng": "PNG", ".webp": "WEBP", ".gif": "GIF"}[suffix]
    images[0].save(path, kind, save_all=True, append_images=images[1:], **given)
    return Clip(path.name, path, "", **said)


def taken(clip: Clip, frames: int, fps: float | None) -> list[int]:
    found = read_clip(clip, frames, 8, 8, fps)
    return [round((float(x) + 1) * 127.5 / 30) for x in found[0, :, 0, 0]]


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".apng"])
def test_a_frame_is_taken_as_long_as_it_is_shown(suffix: str, tmp_path: Path) -> None:
    clip = picture(tmp_path, [100, 300, 100, 200], suffix)
    assert taken(clip, 7, 10.0) == [0, 1, 1, 1, 2, 3, 3]
    assert taken(clip, 4, 5.0) == [0, 1, 2, 3]
    assert taken(clip, 4, None) == [0, 1, 2, 3]
    with pytest.raises(ShortClipError):
        read_clip(clip, 8, 8, 8, 10.0)


@pytest.mark.parametrize(
    ("durations", "fps", "expected"),
    [
        ([500, 100, 100], 10.0, [0, 0, 0, 0, 0, 1, 2]),
        ([100, 100, 1000], 10.0, [0, 1, *[2] * 10]),
        ([30, 40, 30, 30, 40, 30], 10.0, [0, 3]),
        ([0, 200, 100], 10.0, [1, 1, 2]),
        ([50] * 6, 10.0, [0, 2, 4]),
        ([100] * 4, 4.0, [0, 3]),
    ],
    ids=["long first", "long last", "thirtieths", "none for the first", "equal", "equal, between two"],
)
def test_durations_of_other_kinds(durations: list[int], fps: float, expected: list[int], tmp_path: Path) -> None:
    assert taken(picture(tmp_path, durations), len(expected), fps) == expected
    with pytest.raises(ShortClipError):
        read_clip(picture(tmp_path, durations), len(expected) + 1, 8, 8, fps)


def test_equal_durations_are_a_constant_rate(tmp_path: Path) -> None:
    """As frames of a folder at that rate."""
    for number in range(12):
        Image.fromarray(np.full((8, 8, 3), 20 * number, np.uint8)).save(tmp_path / f"{number}.png")
    images = [Image.open(tmp_path / f"{n}.png") for n in range(12)]
    images[0].save(tmp_path / "b.gif", save_all=True, append_images=images[1:], duration=40)
    for fps in (25.0, 24.0, 16.0, 12.5, 10.0, 7.0):
        of_folder = read_clip(Clip("a", tmp_path, "", 25.0), 3, 8, 8, fps)
        of_picture = read_clip(Clip("b", tmp_path / "b.gif", ""), 3, 8, 8, fps)
        assert of_folder.equal(of_picture), fps


def test_rates_that_nothing_tells_or_that_captions_tell(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing says the rate of a video"):
        taken(picture(tmp_path, None), 2, 10.0)
    with pytest.raises(ValueError, match="`fps` must be at most the 10 of the video, got 16"):
        taken(picture(tmp_path, [300, 100, 200]), 2, 16.0)
    # Every frame counts alike where the captions give a rate.
    assert taken(picture(tmp_path, [300, 100, 200, 100], fps=8.0), 2, 4.0) == [0, 2]
