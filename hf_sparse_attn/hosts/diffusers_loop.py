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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any, NamedTuple

from torch import Tensor

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
# What stands between the head of a loop and its first statement: how the next item gets its names.
_UNPACKING = {"UNPACK_SEQUENCE", "CACHE", "EXTENDED_ARG", "SWAP", "NOP"}
# What ends the statement before a loop.
_STATEMENT = ("STORE_", "DELETE_", "POP_", "JUMP", "RETURN", "RAISE", "RERAISE", "RESUME", "SETUP_", "BEFORE_", "END_")


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


class _Head(NamedTuple):
    """What a `for` loop goes over.

    Args:
        variables, attributes: the names that its expression reads.
        cut: (start, stop) of the one slice in it, each a number, None or the name of a variable; None where there is
            no such slice.
    """

    variables: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    cut: tuple[int | str | None, int | str | None] | None = None


class _Loop(NamedTuple):
    """A `for` loop of a function: where its body is in the bytecode, the names that it sets, and what it goes over."""

    begin: int
    end: int
    names: tuple[str, ...]
    head: _Head


class _Code(NamedTuple):
    """A function: its code, its loops, and whether it may hold the one copy of its variables itself."""

    code: CodeType
    loops: tuple[_Loop, ...]
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
        loops = [loop for loop in _read(frame.f_code).loops if loop.begin <= frame.f_lasti < loop.end]
        own = any(name in frame.f_code.co_varnames for name in _OWNERS)
        # To look at the variables writes them to that copy, which is a user's own business.
        if (loops or own) and (_is_library(frame) or not _may_hold(frame.f_code)):
            with _variables(frame) as variables:
                owner = next(
                    (variables[n] for n in ("self", "components") if isinstance(variables.get(n), pipelines)), None
                )
                pipeline = owner if pipeline is None else pipeline
                place = _place(reversed(loops), variables, owner, schedulers, _is_library(frame)) if loops else None
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
def _variables(frame: FrameType) -> Iterator[Mapping[str, Any]]:
    """The variables of a running function by name, which are not kept alive for longer than it keeps them itself."""
    found = frame.f_locals
    try:
        yield found
    finally:
        # Before Python 3.13 a function keeps the copy that was made of its variables until it ends.
        if type(found) is dict and frame.f_code.co_flags & inspect.CO_OPTIMIZED and not _may_hold(frame.f_code):
            found.clear()


def _may_hold(code: CodeType) -> bool:
    """Whether a function may itself hold the one copy of its variables that Python before 3.13 makes."""
    return _read(code).snapshot


def _read(code: CodeType) -> _Code:
    """What is to know of a function, read once; by identity, for to hash its code is to go through all of it."""
    known = _READ.get(id(code))
    if known is None or known.code is not code:
        if len(_READ) >= _KEPT:
            _READ.clear()
        steps = list(dis.get_instructions(code))
        # An attribute of that name is something else.
        snapshot = any(s.argval in _SNAPSHOTS and s.opname in ("LOAD_GLOBAL", "LOAD_NAME") for s in steps)
        known = _READ[id(code)] = _Code(code, tuple(_loops(steps)), snapshot)
    return known


def _loops(steps: Sequence[dis.Instruction]) -> Iterator[_Loop]:
    """The `for` loops of a function, outer ones first."""
    for number, step in enumerate(steps):
        if step.opname != "FOR_ITER":
            continue
        names: list[str] = []
        for after in steps[number + 1 :]:
            if after.opname.startswith("STORE_") and isinstance(after.argval, (str, tuple)):
                given = (after.argval,) if isinstance(after.argval, str) else after.argval
                names += given[:1] if "LOAD" in after.opname else given
            if not after.opname.startswith("STORE_") and after.opname not in _UNPACKING:
                break
        yield _Loop(step.offset, step.argval, tuple(names), _head(steps[:number]))


def _head(before: Sequence[dis.Instruction]) -> _Head:
    """What a loop goes over.

    Args:
        before: the instructions in front of it; its expression are the last ones, back to the end of a statement.
    """
    variables: set[str] = set()
    attributes: set[str] = set()
    cuts: list[tuple[int | str | None, int | str | None] | None] = []
    for number in range(len(before) - 1, -1, -1):
        step = before[number]
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME", "LOAD_GLOBAL")):
            variables.update([step.argval] if isinstance(step.argval, str) else step.argval)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            attributes.add(step.argval)
        elif step.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            cuts.append(_cut(before[max(0, number - 2) : number]) if step.arg in (None, 0, 2) else None)
        elif step.opname == "LOAD_CONST" and isinstance(step.argval, slice):
            cuts.append((step.argval.start, step.argval.stop) if step.argval.step is None else None)
        elif step.opname.startswith(_STATEMENT):
            # Python 3.13 may store the last value of a statement and load the first one of the next at once.
            variables.update([step.argval[1]] if step.opname == "STORE_FAST_LOAD_FAST" else [])
            break
    return _Head(frozenset(variables), frozenset(attributes), cuts[0] if len(cuts) == 1 else None)


def _cut(bounds: Sequence[dis.Instruction]) -> tuple[int | str | None, int | str | None] | None:
    """Start and stop of a slice, or None where these are more than a number or a variable each."""
    if len(bounds) < 2 or any(b.opname not in ("LOAD_CONST", "LOAD_FAST", "LOAD_DEREF") for b in bounds):
        return None
    start, stop = (bound.argval for bound in bounds)
    return start, stop


def _place(
    loops: Iterable[_Loop], variables: Mapping[str, Any], owner: Any, schedulers: tuple[type, ...], library: bool
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
    known = list(_schedules(variables, owner, schedulers))
    for loop in loops:
        items = [variables[name] for name in loop.names if name in variables]
        number = next((n for n in items if type(n) is int), None)
        # What the loop says it goes over comes first, and last what may be made of its item (`t.expand(batch)`).
        ranked = sorted(known, key=lambda one: one.rank(loop.head))
        for item in items:
            if type(item) is int and len(items) > 1:
                continue
            for schedule in ranked:
                if schedule.of_scheduler or library or owner is not None:
                    place = _at(item, number, schedule, loop.head, variables)
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

    def rank(self, head: _Head) -> int:
        """Its place among those that a loop may go over, by what its expression reads."""
        if self.read_by(head):
            return 0
        if self.name is None:
            return 2
        return 1 if _length(self.value) > 1 else 3

    def read_by(self, head: _Head) -> bool:
        """Whether the expression of a loop reads it."""
        return "timesteps" in head.attributes if self.name is None else self.name in head.variables


def _at(item: Any, number: int | None, schedule: _Schedule, head: _Head, variables: Mapping[str, Any]) -> Place | None:
    """Where a loop is, if it goes over a schedule.

    Args:
        item, number: the loop's item, and its own count, or None.
        head: what the loop goes over.
        variables: of the function.
    """
    place, length = _index(item, schedule.value, number), _length(schedule.value)
    if place is None:
        return None
    bounds = [variables.get(b) if isinstance(b, str) else b for b in head.cut or ()]
    if bounds and schedule.read_by(head) and all(b is None or type(b) is int for b in bounds):
        part = range(length)[slice(*bounds)]
        if place in part and (number is None or part.index(place) == number):
            return Place(part.index(place), len(part))
    # An enumeration that starts before or after the schedule goes over a part of it.
    start = 0 if number is None or number > place else place - number
    return Place(place - start, length - start)


def _schedules(variables: Mapping[str, Any], owner: Any, schedulers: tuple[type, ...]) -> Iterator[_Schedule]:
    """What may be looped over; what is nearest first."""
    held = [value for value in variables.values() if isinstance(value, schedulers)]
    own = getattr(owner, "scheduler", None)
    # A pipeline that a script holds brings its scheduler along.
    pipelines = _loaded(_PIPELINES)
    others = [getattr(value, "scheduler", None) for value in variables.values() if isinstance(value, pipelines)]
    times = [s.timesteps for s in (own, *held, *others) if isinstance(s, schedulers) and hasattr(s, "timesteps")]
    memory = {_memory(t) for t in times} - {None}
    named = [(name, value) for name, value in variables.items() if _SCHEDULE.search(name)]
    for name, value in (*named, (None, getattr(variables.get("block_state"), "timesteps", None))):
        if isinstance(value, (Tensor, list, tuple)) and _length(value) > 0 and not _repeats(value):
            yield _Schedule(value, name, _memory(value) in memory)
    for value in times:
        yield _Schedule(value, None, True)


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
    if number is not None:
        return number if _equals(item, schedule, number) else None
    same = [place for place, one in enumerate(schedule) if one is item]
    return same[0] if len(same) == 1 else None


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
