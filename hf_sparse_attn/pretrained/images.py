"""Real photographs, out of the package scikit-image."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from hf_sparse_attn.extras import needing
from hf_sparse_attn.pretrained import package_folder

# Photographs to choose and fit methods on, and those to score them on, all in the public domain.
CALIBRATION = ("chelsea.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "brick.png", "gravel.png")
HELD_OUT = ("astronaut.png", "coffee.png", "retina.jpg", "camera.png", "coins.png", "grass.png", "cell.png",
            "clock_motion.png")  # fmt: skip
# The least that a square cut out has of the shorter side.
_LEAST = 0.7


def images(count: int, seed: int = 0, names: Sequence[str] = HELD_OUT) -> list[np.ndarray[Any, Any]]:
    """Squares cut out of photographs, as large as they are there, no photograph twice before each was taken once.

    Args:
        count: how many.
        seed: the same seed gives the same images.
        names: the photographs; those of CALIBRATION are not among those of HELD_OUT.

    Returns:
        each [side, side, 3] of uint8.

    Raises:
        ValueError: `count` is less than 1, or there is no photograph.
        MissingExtra: scikit-image or pillow is not installed.
    """
    if count < 1 or not names:
        raise ValueError(f"`count` and `names` must be at least one, got {count} of {len(names)} photographs")
    folder = package_folder("a photograph", "scikit-image") / "data"
    with needing("a photograph"):
        from PIL import Image
    rng = random.Random(seed)
    order: list[str] = []
    found: list[np.ndarray[Any, Any]] = []
    while len(found) < count:
        order = order or rng.sample(list(names), len(names))
        with Image.open(folder / order.pop()) as opened:
            image = np.asarray(opened.convert("RGB"))
        height, width = image.shape[:2]
        side = round(min(height, width) * rng.uniform(_LEAST, 1))
        top, left = rng.randint(0, height - side), rng.randint(0, width - side)
        found.append(image[top : top + side, left : left + side])
    return found
