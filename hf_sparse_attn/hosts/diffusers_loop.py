"""Which evaluation of how many a forward is, read off the denoising loop that runs: its variables, or its scheduler.

The loop is found on the stack of the calling thread, so that it is the one that runs: that of the patched pipeline, of
one that shares its transformer (`from_pipe`), or a loop of the user's own over a scheduler's timesteps. It is only
looked at. What it says of itself is exact whatever the values of time do: rise, repeat (second-order solvers), stand
still, be rounded, start in the middle (`strength`); and nothing is left over from a run that was aborted.
"""

from __future__ import annotations

import dis
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor

from hf_sparse_attn.hosts.loop_head import UNREAD, Cut, Head, Loop, loops_of

_PIPELINES = {
    "diffusers.pipelines.pipeline_utils": "DiffusionPipeline",
    "diffusers.modular_pipelines.modular_pipeline": "ModularPipeline",
}
_SCHEDULERS = {"diffusers.schedulers.scheduling_utils": "SchedulerMixin"}
# What a pipeline is called in its methods, and in the blocks of a modular one.
_OWNERS = ("self", "components")
# Names of variables that may hold a schedule: a loop over the samples of a batch is none over steps.
_SCHEDULE = re.compile("step|sigma|time")
# Functions that hand out the variables of their caller.
_SNAPSHOTS = {"locals", "vars", "dir", "eval", "exec"}


class Place(NamedTuple):
    """A step of a run: its number, from 0 on, of how many model evaluations; None for what is not known."""

    step: int | None
    num_steps: int | None


class Found(NamedTuple):
    """What the stack says.

    Args:
        place: of the denoising loop that runs, or None.
        pipeline: the innermost pipeline that runs, or None.
    """

    place: Place | None = None
    pipeline: Any = None


class _Code(NamedTuple):
    """A function: its code, its loops, and whether it may hold the one copy of its variables itself."""

    code: CodeType
    loops: tuple[Loop, ...]
    snapshot: bool


_READ: dict[int, _Code] = {}
_KEPT = 4096


def running() -> Found:
    """The denoising loop, and the innermost pipeline, that the calling thread is in."""
    pipeline = None
    pipelines, schedulers = _loaded(_PIPELINES), _loaded(_SCHEDULERS)
    if not schedulers:
        return Found()
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = _read(frame.f_code)
        loops = [loop for loop in code.loops if loop.begin <= frame.f_lasti < loop.end]
        if loops or any(name in frame.f_code.co_varnames for name in _OWNERS):
            library = _is_library(frame)
            # To look at the variables writes them to that copy, which is a user's own business.
            if code.snapshot and not library:
                frame = frame.f_back
                continue
            with _variables(frame, code.snapshot) as variables:
                owner = next((x for n in _OWNERS if isinstance(x := variables.get(n), pipelines)), None)
                pipeline = owner if pipeline is None else pipeline
                place = _place(reversed(loops), variables, owner, schedulers, library) if loops else None
            if place is not None:
                return Found(place, pipeline)
        frame = frame.f_back
    return Found(None, pipeline)


def by_scheduler(pipeline: Any) -> Place:
    """What the scheduler of a pipeline knows of the run, whose loop could not be read."""
    scheduler: Any = getattr(pipeline, "scheduler", None)
    # Set by `set_timesteps`; a scheduler that never ran has a schedule of its training's length.
    if not getattr(scheduler, "num_inference_steps", None):
        return Place(None, None)
    length, begin = len(scheduler.timesteps), getattr(scheduler, "begin_index", None) or 0
    if hasattr(scheduler, "step_index"):
        # None before the first step: a forward there, as after the last, may be none of the run, but fill a cache.
        step = scheduler.step_index
        known = step is not None and begin <= step < length
        return Place(step - begin if known else None, length - begin)
    # Set only while the pipeline itself runs; its own number counts the steps that are left after `strength`.
    if getattr(pipeline, "_current_timestep", None) is not None:
        return Place(None, getattr(pipeline, "_num_timesteps", None) or length)
    return Place(None, length)


def _loaded(classes: Mapping[str, str]) -> tuple[type, ...]:
    """Classes by module, where these are imported: what is not cannot be running."""
    return tuple(getattr(sys.modules[m], name) for m, name in classes.items() if hasattr(sys.modules.get(m), name))


def _is_library(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith("diffusers.")


@contextmanager
def _variables(frame: FrameType, snapshot: bool) -> Iterator[Mapping[str, Any]]:
    """The variables of a running function by name, which are not kept alive for longer than it keeps them itself.

    Args:
        frame: of the function.
        snapshot: whether it may hold the copy of its variables itself, which is then left as it is.
    """
    found = frame.f_locals
    try:
        yield found
    finally:
        # Before Python 3.13 a function keeps the copy that was made of its variables until it ends.
        if type(found) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED and not snapshot:
            found.clear()


def _read(code: CodeType) -> _Code:
    """What is to know of a function, read once; by identity, for to hash its code is to go through all of it."""
    known = _READ.get(id(code))
    if known is None or known.code is not code:
        if len(_READ) >= _KEPT:
            _READ.clear()
        steps = list(dis.get_instructions(code))
        # An attribute of that name is something else.
        snapshot = any(s.argval in _SNAPSHOTS and s.opname in ("LOAD_GLOBAL", "LOAD_NAME") for s in steps)
        known = _READ[id(code)] = _Code(code, tuple(loops_of(steps)), snapshot)
    return known


def _place(
    loops: Iterable[Loop], variables: Mapping[str, Any], owner: Any, schedulers: tuple[type, ...], library: bool
) -> Place | None:
    """Where the innermost loop over a schedule is.

    Args:
        loops: that run, inner ones first.
        variables: of the function.
        owner: the pipeline that it is a method of, or None.
        schedulers: the base class.
        library: whether the function is one of diffusers. Others may loop over anything: there a loop counts that goes
            over the timesteps of a scheduler.
    """
    for loop in loops:
        known = list(_schedules(variables, owner, schedulers, loop.head.variables))
        items = [variables[name] for name in loop.names if name in variables]
        count = variables.get(loop.names[0]) if loop.names else None
        number = count if type(count) is int else None
        # What the loop says it goes over comes first, and last what may be made of its item (`t.expand(batch)`).
        ranked = sorted(known, key=lambda one: one.rank(loop.head))
        if loop.head.cuts and not library:
            # What others would say of it is of the whole.
            ranked = [one for one in ranked if one.read_by(loop.head)] or ranked
        for item in items:
            if type(item) is int and len(items) > 1:
                continue
            for schedule in ranked:
                if schedule.of_scheduler or library or owner is not None:
                    place = _at(item, number, schedule, loop.head, variables, library)
                    if place is not None:
                        return place
    return None


class _Schedule(NamedTuple):
    """What may be looped over.

    Args:
        value: a tensor [steps, ...] or a sequence.
        name: of the variable that it is; None for one that an object has as `timesteps`.
        of_scheduler: whether it is (a part of) a scheduler's timesteps.
    """

    value: Any
    name: str | None
    of_scheduler: bool

    def rank(self, head: Head) -> int:
        """Its place among those that a loop may go over, by what its expression reads."""
        if self.read_by(head):
            return 0
        if self.name is None:
            return 2
        return 1 if _length(self.value) > 1 else 3

    def read_by(self, head: Head) -> bool:
        """Whether the expression of a loop reads it."""
        return "timesteps" in head.attributes if self.name is None else self.name in head.variables


def _at(
    item: Any, number: int | None, schedule: _Schedule, head: Head, variables: Mapping[str, Any], library: bool
) -> Place | None:
    """Where a loop is, if it goes over a schedule.

    Args:
        item, number: the loop's item, and its own count, or None.
        head: what the loop goes over.
        variables, library: see _place.
    """
    place, length = _index(item, schedule.value, number), _length(schedule.value)
    if place is None:
        return None
    own = schedule.name or "timesteps"
    cuts = [cut for cut in head.cuts if cut.name in (own, "", None)] if schedule.read_by(head) else []
    parts = [part for cut in cuts if (part := _part(cut, length, variables)) is not None]
    # They are gone over side by side, and the shortest ends it.
    for part in parts:
        if place in part and (number is None or part.index(place) == number):
            return Place(part.index(place), min(map(len, parts)))
    # Where a part begins, the loop's own count tells; nothing tells where it ends.
    dark = len(parts) < len(cuts) and (number is None or any(cut.stop is UNREAD for cut in cuts))
    if not library and (dark or any(cut.step is not None for cut in cuts)):
        return None
    # An enumeration that starts before or after the schedule goes over a part of it.
    start = 0 if number is None or number > place else place - number
    return Place(place - start, length - start)


def _part(cut: Cut, length: int, variables: Mapping[str, Any]) -> range | None:
    """The places of a schedule that a loop goes over, or None where that cannot be read."""
    bounds = [variables.get(b, UNREAD) if isinstance(b, str) else b for b in cut[1:]]
    if any(b is not None and type(b) is not int for b in bounds) or bounds[2] == 0:
        return None
    return range(length)[slice(*bounds)]


def _schedules(
    variables: Mapping[str, Any], owner: Any, schedulers: tuple[type, ...], read: frozenset[str]
) -> Iterator[_Schedule]:
    """What may be looped over; what is nearest first.

    Args:
        variables, owner, schedulers: see _place.
        read: variables that the loop reads; they may have any name where they hold timesteps of a scheduler.
    """
    held = [value for value in variables.values() if isinstance(value, schedulers)]
    own = getattr(owner, "scheduler", None)
    # A pipeline that a script holds brings its scheduler along.
    pipelines = _loaded(_PIPELINES)
    others = [getattr(value, "scheduler", None) for value in variables.values() if isinstance(value, pipelines)]
    times = [s.timesteps for s in (own, *held, *others) if isinstance(s, schedulers) and hasattr(s, "timesteps")]
    memory = {place for t in times if (place := _memory(t)) is not None}
    named = [(name, value) for name, value in variables.items() if _SCHEDULE.search(name)]
    for other in sorted(read - {name for name, _ in named}):
        value = variables.get(other)
        if isinstance(value, (Tensor, list, tuple)) and _is_of(value, memory):
            yield _Schedule(value, other, True)
    for name, value in (*named, (None, getattr(variables.get("block_state"), "timesteps", None))):
        if isinstance(value, (Tensor, list, tuple)) and _length(value) > 0 and not _repeats(value):
            yield _Schedule(value, name, _is_of(value, memory))
    for value in times:
        yield _Schedule(value, None, True)


def _is_of(value: Tensor | list[Any] | tuple[Any, ...], memory: set[int]) -> bool:
    """Whether a tensor, or every tensor of a list, lies in the timesteps of a scheduler."""
    if isinstance(value, Tensor):
        return value.ndim > 0 and len(value) > 0 and _memory(value) in memory
    return len(value) > 0 and all(_memory(one) in memory for one in value)


def _repeats(value: Any) -> bool:
    """Whether it is one number at many places, as a time for each sample of a batch."""
    return isinstance(value, Tensor) and len(value) > 1 and value.stride(0) == 0


def _length(value: Any) -> int:
    return (value.shape[0] if value.ndim else 0) if isinstance(value, Tensor) else len(value)


def _memory(value: Any) -> int | None:
    """Where the numbers of a tensor lie; a part of it lies there, too."""
    if type(value) is not Tensor or value.device.type == "meta":
        return None
    return value.untyped_storage().data_ptr() or None


def _index(item: Any, schedule: Any, number: int | None) -> int | None:
    """The place of a loop's item in what it may loop over, or None where it is none of its items.

    Args:
        item: of a loop over a tensor a view of it, which tells equal ones apart and waits for no device.
        schedule: a tensor [steps, ...], or a sequence.
        number: of the item by the loop's own count, or None.
    """
    if isinstance(schedule, Tensor):
        if not isinstance(item, Tensor) or item.shape != schedule.shape[1:]:
            return None
        if _memory(item) is not None and _memory(item) == _memory(schedule) and item.dtype == schedule.dtype:
            behind = int(item.storage_offset()) - int(schedule.storage_offset())
            place, rest = divmod(behind, schedule.stride(0) or 1)
            return place if rest == 0 and 0 <= place < len(schedule) else None
        return number if _equals(item, schedule, number) else None
    same = [place for place, one in enumerate(schedule) if one is item]
    if len(same) == 1:
        return same[0]
    return number if _equals(item, schedule, number) else None


def _equals(item: Any, schedule: Any, number: int | None) -> bool:
    """Whether the item of that number has the value of `item`."""
    if number is None or not 0 <= number < len(schedule):
        return False
    one = schedule[number]
    if isinstance(item, Tensor) != isinstance(one, Tensor):
        return False
    if isinstance(item, Tensor):
        return item.dtype == one.dtype and item.device == one.device and bool((item == one).all())
    return type(item) is type(one) and isinstance(item, (int, float)) and item == one
