"""A training in stages, as those were that made the shipped models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_sparse_attn.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StagedRecipe(Recipe):
    """A recipe of stretches one after the other; see Recipe for the rest.

    Args:
        stages: each with its number of `steps`.
    """

    stages: tuple[Any, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.stages:
            raise ValueError("`stages` must hold at least one, got none")

    @property
    def total_steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> Any:
        """The stage that the step counted from 0 belongs to.

        Raises:
            ValueError: there are not so many steps.
        """
        left = step
        for stage in self.stages:
            if left < stage.steps:
                return stage
            left -= stage.steps
        raise ValueError(f"`step` must be less than {step - left}, got {step}")
