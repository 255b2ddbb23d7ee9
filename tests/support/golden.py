"""Golden values: what the published implementations select and give; see tests/golden."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FOLDER = Path(__file__).parents[1] / "golden"


def golden(name: str) -> dict[str, NDArray[Any]]:
    """The arrays of one method by key."""
    return dict(np.load(FOLDER / f"{name}.npz"))
