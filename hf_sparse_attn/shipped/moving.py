"""The shipped video model and what it is measured by: sampled clips of scenes whose motion can be checked.

`sample` draws clips of given classes (shipped/moving_scenes.py) with the model, sparse or not; `check_motion` follows
the sprite through a clip and compares its way with the one asked for.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse_attn.extras import needing
from hf_sparse_attn.shipped.moving_scenes import (
    COLOURS,
    DIRECTIONS,
    REACH,
    SHAPES,
    SPEED,
    SceneClass,
    sprite_cover,
    travelled,
)

MODEL = Path(__file__).parents[1] / "assets" / "moving_wan"
# One conditioning token for the shape, one for the colour, one for the direction.
TEXT_TOKENS = 3
TEXT_DIM = 16
# The three colours, then what `with_motion` adds.
CHANNELS_IN = 6
CHANNELS_OUT = 3

_WORDS = (*SHAPES, *COLOURS, *DIRECTIONS)
# A pixel counts as sprite from this share of the sprite's colour on; the background's own tint stays well below.
_SEEN = 0.4
# Pixels from the moving lines of the condition at which it has fallen to 1 / e.
_NEAR = 4.0
# Grey level and contrast that the model sees as 0 and 1.
_MIDDLE = 0.4
_SPREAD = 0.25
# How far the noise levels of the steps lean towards noise; that of training.
_SHIFT = 3.0
# A clip is right up to this share of the error that the neighbouring direction would give, and where every frame shows
# the sprite's area within these bounds.
_RIGHT_ERROR = 0.4
_RIGHT_AREA = (0.4, 2.0)


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


def to_model(clips: Tensor) -> Tensor:
    """Frames as the model has them.

    Args:
        clips: [batch, frames, 3, height, width] in [0, 1].

    Returns:
        [batch, 3, frames, height, width] about 0.
    """
    return (clips.transpose(1, 2) - _MIDDLE) / _SPREAD


def from_model(latents: Tensor) -> Tensor:
    """Frames in [0, 1] from what the model has, the way back of `to_model`.

    Args:
        latents: [batch, 3, frames, height, width].

    Returns:
        [batch, frames, 3, height, width], cut to [0, 1].
    """
    return (latents.transpose(1, 2) * _SPREAD + _MIDDLE).clamp(0.0, 1.0)


def with_motion(latents: Tensor, classes: Sequence[SceneClass | None], turn: int | None = None) -> Tensor:
    """Add the motion asked for to every pixel, in channels where image to video models have their condition.

    A channel of ones, then how near the pixel is to two lines, one along each axis, that move with the velocity of the
    class and cross in the middle of the picture half-way through the clip. They tell the way, not the place: the
    model decides how far from the lines the sprite is, and must decide the same in every frame. A
    conditioning token for the direction alone is not heeded after as short a training.

    Args:
        latents: [batch, 3, frames, height, width].
        classes: one for each row of the batch; None stands for no condition, zeros.
        turn: frames after which sprite and lines turn back; see `moving_scenes.travelled`. They cross the middle of
            the picture half-way between two turns.

    Returns:
        [batch, 6, frames, height, width], what the model takes as `hidden_states`.

    Raises:
        ValueError: there are not as many classes as rows.
    """
    if len(classes) != len(latents):
        raise ValueError(f"`classes` must be one for each of {len(latents)} clips, got {len(classes)}")
    told = latents.new_zeros(len(latents), CHANNELS_IN - CHANNELS_OUT, *latents.shape[2:])
    rows, columns = (torch.arange(n, device=latents.device) - (n - 1) / 2 for n in latents.shape[3:])
    path = torch.from_numpy(travelled(latents.shape[2], turn)).to(latents.device)
    time = path - int(path.max()) / 2
    for row, scene in zip(told, classes, strict=True):
        if scene is not None:
            down, right = scene.velocity
            row[0] = 1.0
            row[1] = _near(rows[None, :, None] - down * time[:, None, None])
            row[2] = _near(columns[None, None, :] - right * time[:, None, None])
    return torch.cat([latents, told], dim=1)


def _near(distance: Tensor) -> Tensor:
    return torch.exp(-((distance / _NEAR) ** 2))


@dataclass(frozen=True)
class MotionCheck:
    """What a clip shows, against its class.

    Args:
        error: root mean square distance in pixels from the sprite's centre to the way asked for, which may start
            anywhere; infinite where a frame shows no sprite.
        velocity: pixels per frame, down and to the right, of the straight line (there and back, if the sprite should
            turn) that fits best.
        colour: the colour most seen.
        shape: the shape that fits best.
        area: smallest and largest share of the sprite's area seen in any frame.
        flicker: mean absolute change of the background from frame to frame, on the scale of [0, 1].
        right: the colour is right, every frame shows from 0.4 to 2 of the sprite's area, and the error is below two
            fifths of what a sprite in a neighbouring direction would give (1.6 pixels over 12 frames).
    """

    error: float
    velocity: tuple[float, float]
    colour: str
    shape: str
    area: tuple[float, float]
    flicker: float
    right: bool


def check_motion(clip: Tensor, scene: SceneClass, turn: int | None = None) -> MotionCheck:
    """Follow the sprite through a clip and compare its way, colour and size with the class.

    The sprite is found by colour: each pixel counts for the nearest of `COLOURS` by the part of it that is not grey.
    Over 12 frames a neighbouring direction is some 4 pixels off.

    Args:
        clip: frames in [0, 1], [frames, 3, height, width], at least two.
        scene: what it should show.
        turn: frames after which the sprite should turn back; see `moving_scenes.travelled`.

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
    path = travelled(len(clip), turn)
    time = path - path.mean()
    fits = [sprite_cover(shape, y, x, *shares.shape[1:]) for shape in SHAPES]
    shape = SHAPES[int(np.argmin([np.square(shares - fit).sum() for fit in fits]))]
    wanted = fits[SHAPES.index(scene.shape)]
    area = mass / np.where(wanted > _SEEN, wanted, 0).sum((1, 2)).clip(least)
    lines = [way - speed * time for way, speed in zip((y, x), scene.velocity, strict=True)]
    error = math.sqrt(sum(float(line.var()) for line in lines)) if mass.min() > least else math.inf
    # Unit vectors an eighth of a turn apart differ by 2 sin(pi / 8).
    apart = 2 * math.sin(math.pi / 8) * SPEED * float(time.std())
    bounds = float(area.min()), float(area.max())
    return MotionCheck(
        error=error,
        velocity=(float(y @ time / (time @ time)), float(x @ time / (time @ time))),
        colour=colour,
        shape=shape,
        area=bounds,
        flicker=_flicker(pixels, y, x),
        right=colour == scene.colour
        and error < _RIGHT_ERROR * apart
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
        MissingExtra: diffusers is not installed.
    """
    if not (path / "config.json").is_file():
        raise FileNotFoundError(f"the shipped model must be at {path}, got no config.json there")
    with needing("the shipped video model"):
        from diffusers import WanTransformer3DModel
    from safetensors.torch import load_file

    # Not from_pretrained: it asks for accelerate to load a model that keeps some modules in float32.
    model: Any = WanTransformer3DModel.from_config(WanTransformer3DModel.load_config(path, local_files_only=True))
    model.load_state_dict(load_file(path / "diffusion_pytorch_model.safetensors"))
    return model.eval()


@torch.no_grad()
def sample(
    model: Any,
    classes: Sequence[SceneClass],
    frames: int = 12,
    height: int = 24,
    width: int = 24,
    steps: int = 8,
    seed: int = 0,
    guidance: float = 3.0,
    callback: Callable[[int, Tensor], None] | None = None,
    turn: int | None = None,
    shift: float = _SHIFT,
    even: bool = False,
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
        guidance: classifier-free guidance; 1 is none, which halves the work and gets the motion right less often.
        callback: called after every step with its number and the frames so far, as they are returned.
        turn: frames after which the sprite is to turn back; see `moving_scenes.travelled`.
        shift: how far the noise levels lean towards noise.
        even: whether the levels are evenly spaced before the shift, as for a model distilled to a few steps; else the
            last one is nearly 0, as diffusers has it.

    Returns:
        float32 [classes, frames, 3, height, width] in [0, 1].

    Raises:
        ValueError: `classes` is empty, or `steps` is not positive.
    """
    if not classes or steps < 1:
        raise ValueError(f"`classes` must not be empty and `steps` at least 1, got {len(classes)} and {steps}")
    with needing("sampling"):
        from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    if even:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    else:
        scheduler.set_timesteps(steps)
    weight = next(model.parameters())
    noises = (torch.Generator().manual_seed(seed + row) for row in range(len(classes)))
    shape = (3, frames, height, width)
    latents = torch.stack([torch.randn(shape, generator=noise) for noise in noises]).to(weight.device)
    branches: dict[str, Sequence[SceneClass | None]] = {"cond": classes}
    if guidance != 1.0:
        branches["uncond"] = [None] * len(classes)
    takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.cache_context).parameters.values())
    for index, time in enumerate(scheduler.timesteps):
        # Older versions of diffusers take the name alone; patched, they take the rest as well.
        told = {"step_index": index, "num_inference_steps": steps} if takes_more else {}
        velocity = {}
        for name, asked in branches.items():
            with model.cache_context(name, **told):
                velocity[name] = model(
                    with_motion(latents, asked, turn).to(weight.dtype),
                    time.to(weight.device).expand(len(classes)),
                    condition(asked).to(weight),
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
    with needing("a sheet of frames"):
        from PIL import Image

    padded = torch.nn.functional.pad(clips.detach().float().cpu(), (0, 1, 0, 1), value=1.0)
    batch, frames, _, height, width = padded.shape
    sheet = padded.permute(0, 3, 1, 4, 2).reshape(batch * height, frames * width, 3)
    image = Image.fromarray((sheet * 255).round().byte().numpy())
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
