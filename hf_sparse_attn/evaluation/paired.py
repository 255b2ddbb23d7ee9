"""Paired statistics: how a figure of sparse runs differs from that of dense runs on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# As many signs as a cell of a table shows one by one.
_SHOWN_SIGNS = 12


@dataclass(frozen=True)
class Paired:
    """The differences of a figure, input by input: sparse less dense.

    Args:
        differences: of every input, in the order of the inputs.
        mean: of the differences.
        deviation: their standard deviation, of a sample (n - 1); None for a single input.
        error: standard error of the mean; None for a single input.
        signs: one of every input: "+" where sparse has more of the figure than dense, "-" less, "=" as much.
    """

    differences: tuple[float, ...]
    mean: float
    deviation: float | None
    error: float | None
    signs: str

    @classmethod
    def of(cls, sparse: Sequence[float], dense: Sequence[float] | None = None) -> Paired:
        """The statistics of figures of the same inputs.

        Args:
            sparse: the figure of every input.
            dense: the same of dense runs; None for a figure that says by itself how far sparse is from dense.

        Raises:
            ValueError: no input, or not as many of one as of the other.
        """
        dense = [0.0] * len(sparse) if dense is None else dense
        if not sparse or len(sparse) != len(dense):
            raise ValueError(f"`dense` must hold a figure for each of {len(sparse)} inputs, got {len(dense)}")
        found = tuple(float(a) - float(b) for a, b in zip(sparse, dense, strict=True))
        n, mean = len(found), math.fsum(found) / len(found)
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in found) / (n - 1)) if n > 1 else None
        signs = "".join("+" if x > 0 else "-" if x < 0 else "=" for x in found)
        return cls(found, mean, deviation, None if deviation is None else deviation / math.sqrt(n), signs)

    @property
    def agreed(self) -> bool:
        """Whether the difference has the same sign on every input."""
        return len(set(self.signs)) == 1

    def shown(self, digits: int = 4) -> str:
        """Mean, standard error and signs for a cell of a table: "+0.0110 ±0.0040 +++-"."""
        signs = self.signs
        if len(signs) > _SHOWN_SIGNS:
            signs = " ".join(f"{signs.count(sign)}{sign}" for sign in "+-=" if sign in signs)
        return f"{self.mean:+.{digits}f}{self.spread(digits)} {signs}"

    def spread(self, digits: int = 4) -> str:
        """The standard error behind a figure, " ±0.0040"; nothing for a single input."""
        return "" if self.error is None else f" ±{self.error:.{digits}f}"
