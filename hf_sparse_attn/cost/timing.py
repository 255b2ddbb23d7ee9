"""Timing: one call, and several contestants in turns."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tqdm import tqdm

log = logging.getLogger(__name__)

# A point that is slow stops after this many rounds once its time is up.
FEWEST_ROUNDS = 2


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, the work it left on the device included, and what it returned."""
    synchronize(device)
    begin = time.perf_counter()
    made = call()
    synchronize(device)
    return time.perf_counter() - begin, made


def clock(device: torch.device) -> Callable[[], float]:
    """The clock for comparing calls that a busy machine may interrupt: on one CPU thread it is that thread's own."""
    if device.type == "cpu" and torch.get_num_threads() == 1:
        return time.thread_time

    def now() -> float:
        synchronize(device)
        return time.perf_counter()

    return now


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Within it, torch runs with that many CPU threads, afterwards with those of before; None changes nothing.

    Raises:
        ValueError: fewer than one.
    """
    before = torch.get_num_threads()
    if count is not None:
        if count < 1:
            raise ValueError(f"`threads` must be at least 1, got {count}")
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def peak_bytes(calls: Iterable[Callable[[], Any]], device: torch.device) -> list[int]:
    """Most bytes that were allocated at one time during each call, on top of what was before."""
    if device.type == "cuda":
        return [_peak_on_gpu(call, device) for call in calls]
    # The CPU's allocator has no counters, but its profiler sees every allocation, also those inside of operators.
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as seen:
        for call in calls:
            with record_function("measured call"):
                call()
    recorded: Any = seen.profiler
    events = sorted(recorded.kineto_results.events(), key=lambda e: e.start_ns())
    peaks: list[int] = []
    now = 0
    for event in events:
        if event.name() == "measured call":
            peaks, now = [*peaks, 0], 0
        elif event.name() == "[memory]" and peaks:
            now += event.nbytes()
            peaks[-1] = max(peaks[-1], now)
    return peaks


def _peak_on_gpu(call: Callable[[], Any], device: torch.device) -> int:
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def in_turns(
    contestants: dict[Any, Callable[[], Any]], where: torch.device, repeats: int, seconds: float, title: str
) -> tuple[dict[Any, dict[str, Any]], dict[Any, str]]:
    """Times all contestants round by round, so that what else the machine does meets them alike.

    Args:
        contestants: calls by name.
        where: the device.
        repeats: rounds over the contestants.
        seconds: time after which there is no further round once there were two.
        title: of the bar.

    Returns:
        by contestant: `warmup_seconds` (the first call, compiling and planning included), `seconds` (one per round),
        `bytes` (the most that a second call allocates: what is kept for a pattern is there by then), `rounds`,
        `median`, `min`, `max`; and the reasons of those that failed.
    """
    times: dict[Any, dict[str, Any]] = {}
    failed: dict[Any, str] = {}
    with tqdm(total=len(contestants) * (1 + repeats), desc=title, leave=False, disable=None) as bar:
        for name, call in contestants.items():
            try:
                times[name] = {"warmup_seconds": timed(call, where)[0], "seconds": []}
            # A contestant that breaks must not take the others' numbers with it; it is listed with its error.
            except Exception as error:
                log.debug("%s failed", name, exc_info=True)
                failed[name] = failure(error)
            bar.update()
        peaks = peak_bytes((contestants[name] for name in times), where)
        for found, peak in zip(times.values(), peaks, strict=True):
            found["bytes"] = peak
        begin = time.perf_counter()
        for done in range(repeats):
            if done >= FEWEST_ROUNDS and time.perf_counter() - begin > seconds:
                break
            for name in times:
                times[name]["seconds"].append(timed(contestants[name], where)[0])
                bar.update()
    return {name: {**found, **summary(found["seconds"])} for name, found in times.items()}, failed


def compare(
    first: Callable[[], object], second: Callable[[], object], device: torch.device, rounds: int = 3
) -> tuple[float, float]:
    """Median seconds of two calls, run in turns after one of each to warm up, without gradients."""
    seconds: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for done in range(rounds + 1):
            for call, spent in zip((first, second), seconds, strict=True):
                took = timed(call, device)[0]
                if done:
                    spent.append(took)
    return statistics.median(seconds[0]), statistics.median(seconds[1])


def failure(error: Exception) -> str:
    """One line about what a contestant raised."""
    return f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Number of rounds, median and spread."""
    return {
        "rounds": len(seconds),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }
