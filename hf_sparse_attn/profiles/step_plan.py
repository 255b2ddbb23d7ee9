"""StepPlan: which of a profile's methods every head runs in a range of denoising steps."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# What a file may hold.
MOST_METHODS = 1024
MOST_PLANS = 1024


@dataclass(frozen=True, eq=False)
class StepPlan:
    """The choice for a range of denoising steps.

    Args:
        steps: (start, end) as shares of the schedule in [0, 1], the end not included; (0, 1) for language.
        choice: int16 [layers, heads], index into the methods of the profile.
    """

    steps: tuple[float, float]
    choice: NDArray[np.int16]
