"""Which model classes of the libraries installed here can be patched and how, and why others cannot."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

Way = Literal["dispatcher", "function", "both", "interface"]
Status = Literal["verified", "patched", "declined", "not built"]
Progress = Callable[[Iterable[Any]], Iterable[Any]]


@dataclass(frozen=True)
class Coverage:
    """What is known of one model class.

    Args:
        name: of the class.
        file: the module that defines it.
        family: the family that takes it; None where none does, or where that cannot be asked.
        way: how its self-attention is reached, "both" where its layers differ; None where it cannot be.
        reason: why it cannot be patched, or None.
        built: whether an instance was asked (without memory for its weights).
        verified: whether a small instance was run, patched, as it must.
        library: that has it.
        task: what the library lists it for.
        note: why one that can be patched was not verified, or None.
    """

    name: str
    file: str
    family: str | None
    way: Way | None
    reason: str | None
    built: bool
    verified: bool
    library: str = "diffusers"
    task: str = "transformer"
    note: str | None = None

    @property
    def status(self) -> Status:
        """In one word; "patched" is one that can be patched and was not verified."""
        if self.verified:
            return "verified"
        if self.reason is None:
            return "patched"
        return "declined" if self.built else "not built"


STATUSES: dict[Status, str] = {
    "verified": "verified",
    "patched": "can be patched, not verified",
    "declined": "declined",
    "not built": "could not be built",
}


def coverage_table(found: Sequence[Coverage]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Columns and rows of a list of classes, one row each."""
    columns = ("class", "listed for", "status", "family", "attention by", "why not")
    rows: list[tuple[str, ...]] = [
        (c.name, c.task, c.status, c.family or "-", c.way or "-", c.reason or c.note or "-")
        for c in sorted(found, key=lambda c: (c.library, c.name))
    ]
    return columns, rows


def coverage_counts(found: Sequence[Coverage]) -> dict[str, dict[str, int]]:
    """Library and task, "transformers causal LM" -> classes by status; one with two tasks is in both."""
    counts: dict[str, dict[str, int]] = {}
    for c in found:
        for task in c.task.split(", "):
            row = counts.setdefault(f"{c.library} {task}", {"classes": 0, **dict.fromkeys(STATUSES, 0)})
            row["classes"] += 1
            row[c.status] += 1
    return dict(sorted(counts.items()))


def coverage_summary(found: Sequence[Coverage]) -> list[str]:
    """The counts in words, a line for each library and task."""
    return [
        f"{name}: {row['classes']} classes: " + ", ".join(f"{row[s]} {words}" for s, words in STATUSES.items())
        for name, row in coverage_counts(found).items()
    ]


def short(error: object) -> str:
    """Kind and first words of an error, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:117] + '...' if len(said) > 120 else said}"


@contextmanager
def quiet(library: str) -> Iterator[None]:
    """Without the warnings of a library about sizes that nobody would choose."""
    logging = importlib.import_module(f"{library}.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
