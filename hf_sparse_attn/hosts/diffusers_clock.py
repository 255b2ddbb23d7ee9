"""Which denoising step a forward of a diffusers transformer belongs to, and which guidance branch."""

from __future__ import annotations

import inspect
import types
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

NO_SCHEDULE = (
    "dense_steps: number of steps unknown (patch the pipeline, or call the transformer inside "
    "cache_context(name, step_index=..., num_inference_steps=...))"
)


@dataclass(frozen=True)
class Generation:
    """How far a run of denoising steps is.

    Args:
        branch, announced: guidance branch, and step and number of steps, as given to `cache_context`.
        time, count: last timestep, and how often it fell.
    """

    branch: str | None = None
    announced: tuple[int | None, int | None] = (None, None)
    time: float | None = None
    count: int = 0


# Of each clock, in this thread or task. Weak, for a thread may outlive many patches.
_GENERATIONS: ContextVar[WeakKeyDictionary[Clock, Generation] | None] = ContextVar(
    "hf_sparse_attn_generations", default=None
)


class Clock:
    """Step of a call: announced through `cache_context`, else falls of the timestep are counted.

    An equal timestep is the second guidance pass, a rise a new video. The transformers of a pipeline (two experts)
    share one clock; each thread that runs them reads its own time from it.
    """

    @property
    def generation(self) -> Generation:
        """The one that runs in this thread."""
        known = _GENERATIONS.get()
        return Generation() if known is None else known.get(self, Generation())

    def _note(self, **changes: Any) -> None:
        # A copy, for a context that was copied (a task, a thread) shares the dictionary.
        known = WeakKeyDictionary(_GENERATIONS.get() or {})
        known[self] = replace(self.generation, **changes)
        _GENERATIONS.set(known)

    def step(self, timestep: Any) -> int:
        """The step of a forward at `timestep`; one per token (0 on a given frame) counts by its largest."""
        now = self.generation
        if now.announced[0] is not None:
            return now.announced[0]
        if timestep is None:
            return 0
        time, count = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep), now.count
        if now.time is not None and time != now.time:
            count = count + 1 if time < now.time else 0
        self._note(time=time, count=count)
        return count

    def context_of(self, transformer: nn.Module) -> Any | None:
        """`transformer.cache_context` that also tells the clock, bound, so that a deep copy has its own.

        None where the transformer has no such method. It takes `step_index` and `num_inference_steps` with any
        version of diffusers.
        """
        clock, own = self, getattr(type(transformer), "cache_context", None)
        if own is None:
            return None
        before = transformer.__dict__.get("cache_context")
        # Older versions take the name alone.
        takes_more = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(before or own).parameters.values())

        @contextmanager
        def cache_context(self: nn.Module, name: str, **told: Any) -> Iterator[None]:
            passed = told if takes_more else {}
            outer = clock.generation
            # The guiders of diffusers call the branches pred_cond and pred_uncond.
            announced = told.get("step_index"), told.get("num_inference_steps")
            clock._note(branch=name.removeprefix("pred_"), announced=announced)
            try:
                with own(self, name, **passed) if before is None else before(name, **passed):
                    yield
            finally:
                clock._note(branch=outer.branch, announced=outer.announced)

        return types.MethodType(cache_context, transformer)


def run_length(pipeline: Any) -> int | None:
    """Steps of a pipeline's current run, or None where nobody knows."""
    # Set only while the pipeline itself runs; its own number counts the steps that are left after `strength`.
    if getattr(pipeline, "_current_timestep", None) is not None:
        return getattr(pipeline, "_num_timesteps", None)
    scheduler: Any = getattr(pipeline, "scheduler", None)
    return len(scheduler.timesteps) if getattr(scheduler, "num_inference_steps", None) else None
