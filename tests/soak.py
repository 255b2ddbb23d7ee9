"""Many calls of four models from many threads, while patches come and go: `python -m tests.soak`.

Every output must be the right one of a way of attention that the model had while the call ran, as one thread found it
out before: to the bit.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

import hf_sparse_attn as hsa
from tests.support.served import DENSE, MODELS, SETTINGS, Served, quick_turns

# Of the calls of a thread, those before which it puts a patch on or takes it off, and those in a pause.
_CHANGES, _PAUSES = 0.15, 0.05
_PARTS = 4


@dataclass
class _Model:
    """One model, and the ways of attention that it had, with the time from which and until which."""

    served: Served
    lock: Any = field(default_factory=threading.Lock)
    patch: hsa.Patch | None = None
    ways: list[list[Any]] = field(default_factory=lambda: [[DENSE, 0.0, None]])

    def change(self, setting: str) -> None:
        """Takes the patch off, or puts one on where there is none."""
        with self.lock:
            way = setting if self.patch is None else DENSE
            self.ways.append([way, time.perf_counter(), None])
            if self.patch is None:
                self.patch = self.served.patch(setting)
            else:
                self.patch.remove()
                self.patch = None
            self.ways[-2][2] = time.perf_counter()

    def between(self, begin: float, end: float) -> set[str]:
        """The ways it had at some time between two."""
        return {way for way, start, stop in list(self.ways) if start <= end and (stop is None or stop >= begin)}


@dataclass
class Soak:
    """What came of it.

    Args:
        calls: how many were made.
        wrong: outputs that are none of the right ones, and what they were.
        errors: what was raised.
        ways: how many calls ran in which way.
        changes: how often a patch was put on or taken off.
        grown: objects of the package and tensors of which more are left after each part, by type: how many since the
            first.
        megabytes: resident memory after each part.
        seconds: how long it took.
    """

    calls: int = 0
    wrong: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    ways: Counter[str] = field(default_factory=Counter)
    changes: int = 0
    grown: dict[str, int] = field(default_factory=dict)
    megabytes: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def right(self) -> bool:
        """Whether nothing was wrong."""
        return not (self.wrong or self.errors or self.grown)


def soak(calls: int = 2000, threads: int = 8, seed: int = 0) -> Soak:
    """Runs it in parts, of which no kind of object may leave more each time."""
    result, models = Soak(), [_Model(make().learn()) for make in MODELS.values()]
    begin = time.perf_counter()
    counts = []
    with quick_turns():
        for part in range(_PARTS):
            _part(result, models, calls // _PARTS, threads, seed + part)
            for model in models:
                if model.patch is not None:
                    model.change(DENSE)
            counts.append(_objects())
            result.megabytes.append(_resident())
    steps = [after - before for before, after in pairwise(counts)]
    result.grown = {name: counts[-1][name] - counts[0][name] for name in steps[0] if all(name in one for one in steps)}
    result.seconds = time.perf_counter() - begin
    for model in models:
        for i in range(len(model.served.calls)):
            if model.served.found(i, model.served.run(i)) != [DENSE]:
                result.wrong.append(f"{type(model.served.model).__name__} is not as it was")
    return result


def _part(result: Soak, models: list[_Model], calls: int, threads: int, seed: int) -> None:
    left, lock, gate = iter(range(calls)), threading.Lock(), threading.Barrier(threads)

    def work(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        gate.wait()
        while True:
            with lock:
                if next(left, None) is None:
                    return
            model = draw.choice(models)
            try:
                if draw.random() < _CHANGES:
                    model.change(draw.choice(list(SETTINGS)))
                    with lock:
                        result.changes += 1
                _call(result, lock, model, draw)
            except Exception as error:
                with lock:
                    result.errors.append(f"{type(model.served.model).__name__}: {type(error).__name__}: {error}")

    pool = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
    for one in pool:
        one.start()
    for one in pool:
        one.join()


def _call(result: Soak, lock: Any, model: _Model, draw: random.Random) -> None:
    served, patch = model.served, model.patch
    number, paused = draw.randrange(len(served.calls)), patch is not None and draw.random() < _PAUSES
    begin = time.perf_counter()
    if paused and patch is not None:
        with patch.paused():
            output = served.run(number)
    else:
        output = served.run(number)
    allowed = model.between(begin, time.perf_counter())
    # Another patch may have come since.
    allowed = allowed | {DENSE} if paused else allowed
    found = set(served.found(number, output)) & allowed
    with lock:
        result.calls += 1
        result.ways.update(found)
        if not found:
            was = ", ".join(served.found(number, output)) or "nothing known"
            result.wrong.append(f"{type(served.model).__name__}, call {number}: {was}, not {sorted(allowed)}")


def _objects() -> Counter[str]:
    gc.collect()
    names = (f"{type(one).__module__}.{type(one).__qualname__}" for one in gc.get_objects())
    return Counter(name for name in names if name.startswith(("hf_sparse_attn", "torch.Tensor")))


def _resident() -> float:
    text = Path("/proc/self/status")
    if not text.is_file():
        return 0.0
    line = next(line for line in text.read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    torch.set_num_threads(1)
    found = soak(given.calls, given.threads, given.seed)
    print(
        f"{found.calls} calls, {given.threads} threads, {found.seconds:.0f} s, patches put on or off: {found.changes}"
    )
    print(f"ran as {dict(found.ways)}")
    print(f"{len(found.wrong)} wrong, {len(found.errors)} errors {(found.wrong + found.errors)[:5]}")
    memory = ", ".join(f"{one:.0f}" for one in found.megabytes)
    print(f"objects grown: {found.grown or 'none'}; resident memory after each of {_PARTS} parts: {memory} MB")
    return 0 if found.right else 1


if __name__ == "__main__":
    sys.exit(main())
