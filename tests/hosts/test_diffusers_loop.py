"""The denoising loop is read off the stack by what its head goes over, whatever its body makes of the time."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_sparse_attn.hosts.diffusers_loop import Place, by_scheduler, running
from hf_sparse_attn.hosts.loop_head import Cut, Head, head_of

diffusers = pytest.importorskip("diffusers")

Loop = Callable[[Any, list[Any]], None]


def look(seen: list[Any]) -> None:
    seen.append(running().place)


class Pipe(diffusers.DiffusionPipeline):
    """Loops over the schedule of its scheduler as pipelines do."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(scheduler=scheduler)

    def bar(self, steps: Any) -> Iterator[Any]:
        yield from steps

    def overwritten(self, seen: list[Any]) -> None:
        for t in self.bar(self.scheduler.timesteps):
            timesteps = t[None].expand(2)
            look(seen)
            del timesteps

    def overwritten_by_one(self, seen: list[Any]) -> None:
        for t in self.scheduler.timesteps:
            timesteps = t[None]
            look(seen)
            del timesteps

    def captured(self, seen: list[Any]) -> None:
        timesteps = self.scheduler.timesteps
        for i, t in enumerate(timesteps):
            timestep = t.expand(1)
            _ = [i < len(timesteps) for _ in range(2)]
            look(seen)
            del timestep

    def all_but_the_last(self, seen: list[Any]) -> None:
        for _i, _t in enumerate(self.bar(self.scheduler.timesteps[:-1])):
            look(seen)

    def from_a_variable(self, seen: list[Any]) -> None:
        timesteps, start = self.scheduler.timesteps, 1
        for _t in timesteps[start:]:
            look(seen)

    def numbers(self, seen: list[Any]) -> None:
        sigmas = [1.0, 0.5, 0.25, 0.0]
        for _i, _sigma in enumerate(sigmas[:-1]):
            look(seen)

    def of_a_part(self, seen: list[Any]) -> None:
        timesteps = self.scheduler.timesteps[-1:]
        for _t in timesteps:
            look(seen)

    def samples(self, seen: list[Any]) -> None:
        for _i, _t in enumerate(self.scheduler.timesteps):
            for _prompt in ["a", "b"]:
                look(seen)


def places(count: int) -> list[Place]:
    return [Place(i, count) for i in range(count)]


@pytest.fixture
def pipe() -> Pipe:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(4)
    return Pipe(scheduler)


@pytest.mark.parametrize(
    "name, count",
    {
        "overwritten": 4,
        "overwritten_by_one": 4,
        "captured": 4,
        "all_but_the_last": 3,
        "from_a_variable": 3,
        "numbers": 3,
        "of_a_part": 1,
    }.items(),
)
def test_a_loop_goes_over_what_its_head_says(pipe: Pipe, name: str, count: int) -> None:
    seen: list[Any] = []
    getattr(pipe, name)(seen)
    assert seen == places(count)


def test_a_loop_inside_of_a_step_is_not_one_over_steps(pipe: Pipe) -> None:
    seen: list[Any] = []
    pipe.samples(seen)
    assert seen == [place for place in places(4) for _ in range(2)]


def test_a_loop_of_the_users_own_goes_over_a_part(pipe: Pipe) -> None:
    seen: list[Any] = []
    timesteps = pipe.scheduler.timesteps
    for _t in timesteps[1:-1]:
        look(seen)
    assert seen == places(2)


def parts(scheduler: Any, seen: list[Any]) -> None:
    part = scheduler.timesteps[2:]
    for _t in part:
        look(seen)


def listed(scheduler: Any, seen: list[Any]) -> None:
    part = [t for t in scheduler.timesteps if t < scheduler.timesteps[1]]
    for _t in part:
        look(seen)


def thinned_out(scheduler: Any, seen: list[Any]) -> None:
    for _i, _t in enumerate(scheduler.timesteps[::2]):
        look(seen)


def backward(scheduler: Any, seen: list[Any]) -> None:
    levels = list(scheduler.timesteps)
    for _t in reversed(levels):
        look(seen)


def backward_with_a_count(scheduler: Any, seen: list[Any]) -> None:
    levels = list(scheduler.timesteps)
    for _i, _t in enumerate(levels[::-1]):
        look(seen)


def backward_before(scheduler: Any, seen: list[Any]) -> None:
    levels = list(scheduler.timesteps)[::-1]
    for _t in levels:
        look(seen)


def neighbours(scheduler: Any, seen: list[Any]) -> None:
    for _t, _next in zip(scheduler.timesteps[:-1], scheduler.timesteps[1:], strict=True):
        look(seen)


def neighbours_with_an_end(scheduler: Any, seen: list[Any]) -> None:
    for _t, _next in zip(scheduler.timesteps, scheduler.timesteps[1:].tolist() + [0.0] * 1, strict=True):
        look(seen)


def one_after_the_other(scheduler: Any, seen: list[Any]) -> None:
    for _t in itertools.chain(scheduler.timesteps[:2], scheduler.timesteps[2:]):
        look(seen)


def with_the_rest(scheduler: Any, seen: list[Any]) -> None:
    for _t, *_more in zip(scheduler.timesteps, "abcd", strict=True):
        look(seen)


@pytest.mark.parametrize(
    "loop, count",
    {
        parts: 2,
        listed: 2,
        thinned_out: 2,
        backward: 4,
        backward_with_a_count: 4,
        backward_before: 4,
        neighbours: 3,
        neighbours_with_an_end: 4,
        one_after_the_other: 4,
        with_the_rest: 4,
    }.items(),
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_parts_of_a_schedule_under_any_name_and_in_any_order(pipe: Pipe, loop: Any, count: int) -> None:
    seen: list[Any] = []
    loop(pipe.scheduler, seen)
    assert seen == places(count)


def test_a_part_that_cannot_be_read_is_none(pipe: Pipe) -> None:
    """What is not known is no step at all, rather than a wrong one."""
    seen: list[Any] = []
    timesteps, held = pipe.scheduler.timesteps, 1
    scheduler = pipe.scheduler
    for _t in timesteps[len(timesteps) - held - 1 :]:
        look(seen)
    for _t in itertools.islice(timesteps, 2):
        look(seen)
    for _i, _t in reversed(list(enumerate(timesteps))):
        look(seen)
    assert scheduler is not None and seen == [None] * 8


def test_a_scheduler_tells_no_step_before_its_first_one_and_after_its_last(pipe: Pipe) -> None:
    """A forward that fills a cache runs there, and is none of the run."""
    assert by_scheduler(pipe) == Place(None, 4)
    sample, told = torch.zeros(1, 1), []
    for t in pipe.scheduler.timesteps:
        pipe.scheduler.step(sample, t, sample)
        told.append(by_scheduler(pipe).step)
    assert told == [1, 2, 3, None]


@pytest.mark.parametrize(
    "code, head",
    [
        (
            [("STORE_FAST_LOAD_FAST", ("timesteps", "timesteps")), ("GET_ITER", None)],
            Head(frozenset({"timesteps"}), frozenset()),
        ),
        (
            [
                ("LOAD_FAST", "before"),
                ("STORE_FAST", "after"),
                ("LOAD_FAST_LOAD_FAST", ("self", "steps")),
                ("LOAD_ATTR", "timesteps"),
                ("LOAD_CONST", slice(None, -1)),
                ("BINARY_OP", None),
                ("GET_ITER", None),
            ],
            Head(frozenset({"self", "steps"}), frozenset({"timesteps"}), (Cut("timesteps", None, -1),)),
        ),
        (
            [
                ("LOAD_FAST_BORROW", "timesteps"),
                ("LOAD_FAST", "start"),
                ("LOAD_CONST", None),
                ("BINARY_SLICE", None),
                ("GET_ITER", None),
            ],
            Head(frozenset({"timesteps", "start"}), frozenset(), (Cut("timesteps", "start", None),)),
        ),
    ],
    ids=["one instruction for two", "a constant slice", "a slice of two"],
)
def test_heads_in_the_bytecode_of_newer_pythons(code: list[tuple[str, Any]], head: Head) -> None:
    steps: Any = [SimpleNamespace(opname=name, argval=value, arg=None, argrepr="") for name, value in code]
    assert head_of(steps) == head
