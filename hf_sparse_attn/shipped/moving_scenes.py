"""Scenes whose motion is known: one sprite crosses a still, textured background.

What moves, and how, is given by a class (shape, colour, direction). Frames are RGB in [0, 1]; the sprite moves `SPEED`
pixels from one frame to the next and never leaves the picture. In long clips it may turn back every so many frames.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SHAPES = ("disc", "square", "cross")
COLOURS = {
    "red": (0.95, 0.1, 0.1),
    "green": (0.1, 0.95, 0.1),
    "blue": (0.1, 0.15, 0.95),
    "yellow": (0.95, 0.9, 0.1),
}
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
SPEED = 1.5
# Half of the widest sprite, in pixels.
REACH = 3.5

# The background: side in pixels of a cell of its grain, and clouds per side of the frame.
_CELL = 2
_COARSE = 4


@dataclass(frozen=True)
class SceneClass:
    """What a scene shows.

    Args:
        shape: one of `SHAPES`.
        colour: one of `COLOURS`.
        direction: one of `DIRECTIONS`, where the sprite moves to.

    Raises:
        ValueError: a word is not one of those.
    """

    shape: str
    colour: str
    direction: str

    def __post_init__(self) -> None:
        for name, known in (("shape", SHAPES), ("colour", tuple(COLOURS)), ("direction", DIRECTIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}` must be one of {known}, got {getattr(self, name)!r}")

    @property
    def velocity(self) -> tuple[float, float]:
        """Pixels per frame, down and to the right."""
        angle = DIRECTIONS.index(self.direction) * math.pi / 4
        return SPEED * math.sin(angle), SPEED * math.cos(angle)


def scene_classes() -> list[SceneClass]:
    """All classes, the direction changing fastest."""
    return [SceneClass(*words) for words in product(SHAPES, COLOURS, DIRECTIONS)]


def draw_classes(count: int, seed: int) -> list[SceneClass]:
    """Draw classes in which the words of each kind come up about equally often.

    Args:
        count: how many.
        seed: the same seed gives the same classes.

    Returns:
        The classes.
    """
    rng = np.random.default_rng((seed, 1))
    words = [_dealt(known, count, rng) for known in (SHAPES, tuple(COLOURS), DIRECTIONS)]
    return [SceneClass(*three) for three in zip(*words, strict=True)]


def _dealt(known: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    rounds = [rng.permutation(len(known)) for _ in range(-(-count // len(known)))]
    return [known[int(index)] for index in np.concatenate(rounds or [np.zeros(0, int)])[:count]]


def travelled(frames: int, turn: int | None = None) -> NDArray[np.int64]:
    """How far along its way the sprite is in each frame, in steps of `SPEED` pixels.

    Args:
        frames: frames of the clip.
        turn: frames after which the sprite goes back the way it came, again and again, so that clips of any length fit
            into the picture; None lets it go on.

    Returns:
        int64 [frames], from 0.

    Raises:
        ValueError: `turn` is less than 2.
    """
    steps = np.arange(frames)
    if turn is None:
        return steps
    if turn < 2:
        raise ValueError(f"`turn` must be at least 2 frames, or none, got {turn}")
    return np.abs((steps + turn - 1) % (2 * (turn - 1)) - (turn - 1))


def least_size(frames: int, turn: int | None = None) -> int:
    """Pixels that a side of the frame must have for the sprite to stay in the picture over so many frames."""
    return math.ceil(2 * REACH + SPEED * (frames - 1 if turn is None else min(frames, turn) - 1))


def moving_clips(
    classes: Sequence[SceneClass], frames: int, height: int, width: int, seed: int, turn: int | None = None
) -> Tensor:
    """Draw one clip of each class, with a background and a starting place of its own.

    Args:
        classes: what the clips show.
        frames: frames per clip.
        height: pixels.
        width: pixels.
        seed: the same seed gives the same clips.
        turn: frames after which the sprite turns back; see `travelled`.

    Returns:
        float32 [classes, frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: `frames` is less than 1, or the sprite would leave the picture before the last one.
    """
    if frames < 1:
        raise ValueError(f"`frames` must be at least 1, got {frames}")
    for name, size in (("height", height), ("width", width)):
        least = least_size(frames, turn)
        if size < least:
            raise ValueError(f"`{name}` must be at least {least} pixels for {frames} frames, got {size}")
    rng = np.random.default_rng((seed, 0))
    clips = np.empty((len(classes), frames, 3, height, width), dtype=np.float32)
    for clip, scene in zip(clips, classes, strict=True):
        path = travelled(frames, turn)
        ways = [_way(speed, path, size, rng) for speed, size in zip(scene.velocity, (height, width), strict=True)]
        cover = sprite_cover(scene.shape, ways[0], ways[1], height, width)[:, None]
        colour = np.array(COLOURS[scene.colour], dtype=np.float32)[:, None, None]
        clip[:] = (1 - cover) * _background(height, width, rng) + cover * colour
    return torch.from_numpy(clips)


def _way(speed: float, path: NDArray[np.int64], size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centre of the sprite along one axis in every frame; pixel i reaches from i - 0.5 to i + 0.5."""
    run = speed * int(path.max())
    room = size - 2 * REACH - abs(run)
    start = REACH + max(0.0, -run) + room * rng.random() - 0.5
    return (start + speed * path).astype(np.float32)


def sprite_cover(
    shape: str, down: NDArray[np.float32], right: NDArray[np.float32], height: int, width: int
) -> NDArray[np.float32]:
    """Share of each pixel that the sprite covers.

    Args:
        shape: one of `SHAPES`.
        down: the centre's row in each frame, in pixels.
        right: its column.
        height: pixels.
        width: pixels.

    Returns:
        [frames, height, width].
    """
    y = np.abs(np.arange(height, dtype=np.float32) - down[:, None])[:, :, None]
    x = np.abs(np.arange(width, dtype=np.float32) - right[:, None])[:, None, :]
    if shape == "disc":
        outside = np.hypot(y, x) - 3.5
    elif shape == "square":
        outside = np.maximum(y, x) - 3.0
    else:
        outside = np.minimum(np.maximum(y - 1.25, x - 3.5), np.maximum(y - 3.5, x - 1.25))
    return np.clip(0.5 - outside, 0.0, 1.0).astype(np.float32)


def _background(height: int, width: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """Grey clouds with a little tint, and a grain of cells that nothing but the same place in other frames tells."""
    coarse = rng.uniform(0.15, 0.65, (1, _COARSE, _COARSE)) + rng.normal(0, 0.03, (3, _COARSE, _COARSE))
    clouds = torch.nn.functional.interpolate(
        torch.from_numpy(coarse)[None], (height, width), mode="bilinear", align_corners=True
    )[0].numpy()
    cells = rng.normal(0, 0.08, (-(-height // _CELL), -(-width // _CELL)))
    grain = cells.repeat(_CELL, 0).repeat(_CELL, 1)[:height, :width]
    return np.clip(clouds + grain, 0.0, 1.0).astype(np.float32)
