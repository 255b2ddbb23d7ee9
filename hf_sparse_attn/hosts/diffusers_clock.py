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

from hf_sparse_attn.hosts.diffusers_loop import Place, by_scheduler, running

NO_SCHEDULE = (
    "number of steps unknown (patch the pipeline, call the transformer in a loop over the timesteps of "
    "its scheduler, or inside cache_context(name, step_index=..., num_inference_steps=...))"
)

GUESSED = (
    "steps are a guess, counted by changes of the time that the transformer is given: neither a denoising loop over a "
    "scheduler's timesteps nor cache_context(name, step_index=..., num_inference_steps=...) tells of them"
)


@dataclass(frozen=True)
class Generation:
    """How far a run of denoising steps is, where its loop does not say it.

    Args:
        branch, announced: guidance branch, and step and number of steps, as given to `cache_context`.
        time, count: last time, and how often it went on.
        way: -1 where time falls in this run, 1 where it rises, 0 before that is known.
    """

    branch: str | None = None
    announced: tuple[int | None, int | None] = (None, None)
    time: float | None = None
    count: int = 0
    way: int = 0


@dataclass(frozen=True)
class Moment:
    """The step of a forward.

    Args:
        step: number of the model evaluation in its run, from 0 on.
        num_steps: evaluations of the run; None where nobody knows it.
        guessed: whether the step was counted by the values of time, for want of anything better.
    """

    step: int
    num_steps: int | None
    guessed: bool = False


# Of each clock, in this thread or task. Weak, for a thread may outlive many patches.
_GENERATIONS: ContextVar[WeakKeyDictionary[Clock, Generation] | None] = ContextVar(
    "hf_sparse_attn_generations", default=None
)


class Clock:
    """Step of a call, by the first of these that tells it: `cache_context`, the denoising loop that runs, its
    scheduler (diffusers_loop.py), and at last the values of time.

    The transformers of a pipeline (two experts) share one clock, from which each thread that runs them reads its own
    time.
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

    def moment(self, time: Any, patched: Any) -> Moment:
        """The step of a forward.

        Args:
            time: as the transformer is given it; one value, or one for each row, frame or token.
            patched: the pipeline that was patched, or None.
        """
        now, found = self.generation, running()
        place, announced = found.place, Place(*now.announced)
        if announced.step is not None:
            num_steps = announced.num_steps or (place or by_scheduler(found.pipeline or patched)).num_steps
            return _moment(announced.step, num_steps)
        stale = False
        if place is None:
            place = by_scheduler(found.pipeline or patched)
            # Of a pipeline that does not run it may be left over from a run that was aborted.
            stale = found.pipeline is None and place.step is not None
        if place.step is not None:
            # What was counted belongs to a run that is over.
            self._note(time=None, count=0, way=0)
            return _moment(place.step, place.num_steps, guessed=stale)
        return _moment(self._count(time), place.num_steps, guessed=True)

    def _count(self, time: Any) -> int:
        """Counts changes of time; an equal one is the second guidance pass, one in the other direction a new run."""
        now = self.generation
        if time is None:
            return now.count
        # Times of the frames of one sample may stand still one by one: their mean goes on as long as any does.
        value = float(time.double().mean()) if isinstance(time, Tensor) else float(time)
        way = 0 if now.time is None else (value > now.time) - (value < now.time)
        if now.time is None or way:
            goes_on = now.time is not None and now.way in (0, way)
            self._note(time=value, count=now.count + 1 if goes_on else 0, way=way if goes_on else now.way)
        return self.generation.count

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


def _moment(step: int, num_steps: int | None, guessed: bool = False) -> Moment:
    return Moment(step if num_steps is None else max(0, min(step, num_steps - 1)), num_steps, guessed)
