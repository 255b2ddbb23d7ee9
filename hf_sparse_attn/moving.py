"""Moving scenes to measure video attention on: one sprite crosses a still, textured background.

What moves, and how, is given by a class (shape, colour, direction), so a sampled clip can be checked: `check_motion`
follows the sprite from frame to frame and compares its way with the one asked for. Frames are RGB in [0, 1]; the
sprite moves `SPEED` pixels from one frame to the next and never leaves the picture.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MODEL = Path(__file__).parent / "assets" / "moving_wan"

SHAPES = ("disc", "square", "cross")
COLOURS = {
    "red": (0.95, 0.1, 0.1),
    "green": (0.1, 0.95, 0.1),
    "blue": (0.1, 0.15, 0.95),
    "yellow": (0.95, 0.9, 0.1),
}
DIRECTIONS = ("right", "down-right", "down", "down-left", "left", "up-left", "up", "up-right")
SPEED = 1.5
REACH = 3.5
# One conditioning token for the shape, one for the colour, one for the direction.
TEXT_TOKENS = 3
TEXT_DIM = 16

_WORDS = (*SHAPES, *COLOURS, *DIRECTIONS)
_CELL = 2
_COARSE = 4
# A pixel counts as sprite from this share of the sprite's colour on; the background's own tint stays well below.
_SEEN = 0.4
# Grey level and contrast that the model sees as 0 and 1.
_MIDDLE = 0.4
_SPREAD = 0.25
_SHIFT = 3.0
_RIGHT_ERROR = 0.75
_RIGHT_AREA = (0.5, 1.7)


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


def condition(classes: Sequence[SceneClass | None]) -> Tensor:
    """Conditioning tokens for `encoder_hidden_states`: a unit vector per word, nothing learned.

    Args:
        classes: the classes; None stands for no condition, which is all zeros.

    Returns:
        float32 [classes, TEXT_TOKENS, TEXT_DIM].
    """
    tokens = torch.zeros(len(classes), TEXT_TOKENS, TEXT_DIM)
    for row, scene in enumerate(classes):
        if scene is not None:
            for place, word in enumerate((scene.shape, scene.colour, scene.direction)):
                tokens[row, place, _WORDS.index(word)] = 1.0
    return tokens


def moving_clips(classes: Sequence[SceneClass], frames: int, height: int, width: int, seed: int) -> Tensor:
    """Draw one clip of each class, with a background and a starting place of its own.

    Args:
        classes: what the clips show.
        frames: frames per clip.
        height: pixels.
        width: pixels.
        seed: the same seed gives the same clips.

    Returns:
        float32 [classes, frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: the sprite would leave the picture before the last frame.
    """
    rng = np.random.default_rng((seed, 0))
    clips = np.empty((len(classes), frames, 3, height, width), dtype=np.float32)
    for clip, scene in zip(clips, classes, strict=True):
        ways = [
            _way(speed, frames, size, name, rng)
            for speed, size, name in zip(scene.velocity, (height, width), ("height", "width"), strict=True)
        ]
        cover = _cover(scene.shape, ways[0], ways[1], height, width)[:, None]
        colour = np.array(COLOURS[scene.colour], dtype=np.float32)[:, None, None]
        clip[:] = (1 - cover) * _background(height, width, rng) + cover * colour
    return torch.from_numpy(clips)


def _way(speed: float, frames: int, size: int, name: str, rng: np.random.Generator) -> NDArray[np.float32]:
    """Centre of the sprite along one axis in every frame."""
    run = speed * (frames - 1)
    room = size - 2 * REACH - abs(run)
    if room < 0:
        least = math.ceil(2 * REACH + SPEED * (frames - 1))
        raise ValueError(f"`{name}` must be at least {least} pixels for {frames} frames, got {size}")
    start = REACH + max(0.0, -run) + room * rng.random() - 0.5
    return (start + speed * np.arange(frames)).astype(np.float32)


def _cover(
    shape: str, down: NDArray[np.float32], right: NDArray[np.float32], height: int, width: int
) -> NDArray[np.float32]:
    """Share of each pixel that the sprite covers, [frames, height, width]."""
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


def to_model(clips: Tensor) -> Tensor:
    """Frames in [0, 1], [batch, frames, 3, height, width], as the model has them: [batch, 3, frames, height, width]."""
    return (clips.transpose(1, 2) - _MIDDLE) / _SPREAD


def from_model(latents: Tensor) -> Tensor:
    """What `to_model` made back to frames, cut to [0, 1]."""
    return (latents.transpose(1, 2) * _SPREAD + _MIDDLE).clamp(0.0, 1.0)


@dataclass(frozen=True)
class MotionCheck:
    """What a clip shows, against its class.

    Args:
        error: root mean square distance in pixels from the sprite's centre to the way asked for, which may start
            anywhere; infinite where a frame shows no sprite.
        velocity: pixels per frame, down and to the right, of the straight line that fits best.
        colour: the colour most seen.
        shape: the shape that fits best.
        area: smallest and largest share of the sprite's area seen in any frame.
        flicker: mean absolute change of the background from frame to frame, on the scale of [0, 1].
        right: colour and area are right in every frame and the error is below three quarters of a pixel.
    """

    error: float
    velocity: tuple[float, float]
    colour: str
    shape: str
    area: tuple[float, float]
    flicker: float
    right: bool


def check_motion(clip: Tensor, scene: SceneClass) -> MotionCheck:
    """Follow the sprite through a clip and compare its way, colour and size with the class.

    The sprite is found by colour: each pixel counts for the nearest of `COLOURS` by the part of it that is not grey.
    Directions next to each other lie several pixels apart over a clip of 12 frames, so that frames in a wrong order or
    a wrong direction are far above the error allowed.

    Args:
        clip: frames in [0, 1], [frames, 3, height, width], at least two.
        scene: what it should show.

    Returns:
        What it shows.

    Raises:
        ValueError: `clip` has another shape.
    """
    if clip.ndim != 4 or clip.shape[1] != 3 or len(clip) < 2:
        raise ValueError(f"`clip` must be [frames, 3, height, width] of at least 2 frames, got {tuple(clip.shape)}")
    pixels = clip.detach().float().cpu().numpy()
    seen = _seen(pixels)
    colour = list(COLOURS)[int(seen.sum((1, 2, 3)).argmax())]
    shares = seen[list(COLOURS).index(scene.colour)]
    mass = shares.sum((1, 2))
    least = 1e-6
    y = (shares.sum(2) * np.arange(shares.shape[1])).sum(1) / np.maximum(mass, least)
    x = (shares.sum(1) * np.arange(shares.shape[2])).sum(1) / np.maximum(mass, least)
    time = np.arange(len(clip)) - (len(clip) - 1) / 2
    fits = [_cover(shape, y, x, *shares.shape[1:]) for shape in SHAPES]
    shape = SHAPES[int(np.argmin([np.square(shares - fit).sum() for fit in fits]))]
    wanted = fits[SHAPES.index(scene.shape)]
    area = mass / np.where(wanted > _SEEN, wanted, 0).sum((1, 2)).clip(least)
    lines = [way - speed * time for way, speed in zip((y, x), scene.velocity, strict=True)]
    error = math.sqrt(sum(float(line.var()) for line in lines)) if mass.min() > least else math.inf
    bounds = float(area.min()), float(area.max())
    return MotionCheck(
        error=error,
        velocity=(float(y @ time / (time @ time)), float(x @ time / (time @ time))),
        colour=colour,
        shape=shape,
        area=bounds,
        flicker=_flicker(pixels, y, x),
        right=colour == scene.colour
        and error < _RIGHT_ERROR
        and _RIGHT_AREA[0] <= bounds[0]
        and bounds[1] <= _RIGHT_AREA[1],
    )


def _seen(pixels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Share of each pixel that shows each of `COLOURS`, [colours, frames, height, width]."""
    sprites = np.array(list(COLOURS.values()), dtype=np.float32)
    sprites -= sprites.mean(1, keepdims=True)
    length = np.sqrt(np.square(sprites).sum(1))
    along = np.einsum("fchw,nc->nfhw", pixels - pixels.mean(1, keepdims=True), sprites / length[:, None])
    nearest = along == along.max(0)
    shares = np.clip(along / length[:, None, None, None], 0, 1)
    return np.where(nearest & (shares > _SEEN), shares, 0).astype(np.float32)


def _flicker(pixels: NDArray[np.float32], y: NDArray[np.float32], x: NDArray[np.float32]) -> float:
    rows, columns = (np.arange(size, dtype=np.float32) for size in pixels.shape[2:])
    away = np.maximum(np.abs(rows - y[:, None])[:, :, None], np.abs(columns - x[:, None])[:, None, :]) > REACH + 1
    still = away[1:] & away[:-1]
    change = np.abs(np.diff(pixels, axis=0)).mean(1)
    return float(change[still].mean()) if still.any() else 0.0


def load_moving_wan(path: Path = MODEL) -> Any:
    """Load the shipped video model, a `diffusers.WanTransformer3DModel` in float32.

    Args:
        path: folder with the model.

    Returns:
        The model, in evaluation mode.

    Raises:
        FileNotFoundError: the folder holds no model.
        ImportError: diffusers is not installed.
    """
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"the shipped model must be at {path}")
    from diffusers import WanTransformer3DModel

    model: Any = WanTransformer3DModel.from_pretrained(
        path, torch_dtype=torch.float32, local_files_only=True, low_cpu_mem_usage=False
    )
    return model.eval()


@torch.no_grad()
def sample(
    model: Any,
    classes: Sequence[SceneClass],
    frames: int = 12,
    height: int = 24,
    width: int = 24,
    steps: int = 16,
    seed: int = 0,
    guidance: float = 1.0,
    callback: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Sample a clip of each class by Euler steps along the learned flow.

    Every call of the model stands in its `cache_context` with the step and the number of steps, so a patched model
    knows both; with guidance a step is two calls, "cond" and "uncond". Clip i starts from the noise of seed + i,
    whatever the batch.

    Args:
        model: a `WanTransformer3DModel` with the conditioning of `condition`, patched or not.
        classes: what to show, one clip each.
        frames: frames per clip.
        height: pixels, even.
        width: pixels, even.
        steps: Euler steps.
        seed: of the first clip's noise.
        guidance: classifier-free guidance; 1 is none, which halves the work.
        callback: called after every step with its number and the frames so far, as they are returned.

    Returns:
        float32 [classes, frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: `classes` is empty, or `steps` is not positive.
    """
    if not classes or steps < 1:
        raise ValueError(f"`classes` must not be empty and `steps` at least 1, got {len(classes)} and {steps}")
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=_SHIFT)
    scheduler.set_timesteps(steps)
    weight = next(model.parameters())
    noise = [torch.randn(3, frames, height, width, generator=torch.Generator().manual_seed(seed + i)) for i in range(len(classes))]
    latents = torch.stack(noise).to(weight.device)
    branches = {"cond": condition(classes)}
    if guidance != 1.0:
        branches["uncond"] = condition([None] * len(classes))
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.cache_context).parameters.values())
    for index, time in enumerate(scheduler.timesteps):
        # Older versions of diffusers take the name alone; patched, they take the rest as well.
        told = {"step_index": index, "num_inference_steps": steps} if takes_more else {}
        velocity = {}
        for name, text in branches.items():
            with model.cache_context(name, **told):
                velocity[name] = model(
                    latents.to(weight.dtype),
                    time.to(weight.device).expand(len(classes)),
                    text.to(weight),
                    return_dict=False,
                )[0].float()
        flow = velocity["cond"]
        if guidance != 1.0:
            flow = velocity["uncond"] + guidance * (flow - velocity["uncond"])
        latents = scheduler.step(flow, time, latents, return_dict=False)[0]
        if callback is not None:
            callback(index, from_model(latents))
    return from_model(latents).cpu()


def frames_to_image(clips: Tensor, scale: int = 3) -> Any:
    """Contact sheet: a row for each clip, its frames from left to right.

    Args:
        clips: [batch, frames, 3, height, width] in [0, 1].
        scale: pixels on the sheet for each pixel of a frame.

    Returns:
        A `PIL.Image.Image`.
    """
    from PIL import Image

    padded = torch.nn.functional.pad(clips.detach().float().cpu(), (0, 1, 0, 1), value=1.0)
    batch, frames, _, height, width = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(batch * height, frames * width, 3)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
