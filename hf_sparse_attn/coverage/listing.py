"""Which model classes of the libraries installed here can be patched and how, and why others cannot: diffusers."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import CodeType
from typing import Any, Literal

import torch
from torch import nn

from hf_sparse_attn.family import find_family
from hf_sparse_attn.hosts.diffusers_model import self_attentions, way_of

Way = Literal["dispatcher", "function", "both", "interface"]
Status = Literal["verified", "patched", "declined", "not built"]
Progress = Callable[[Iterable[Any]], Iterable[Any]]

_LAYERS = ("num_layers", "num_single_layers", "num_refiner_layers", "depth", "n_layers", "num_visual_blocks")


@dataclass(frozen=True)
class Coverage:
    """What is known of one model class.

    Args:
        name: of the class.
        file: the module that defines it.
        family: the family that takes it; None where none does, or where that cannot be asked.
        way: how its self-attention is reached, "both" where its layers differ; None where it cannot be.
        reason: why it cannot be patched, or None.
        built: whether an instance was asked (without memory for its weights); else the code of the class was read.
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
        return "declined" if self.built or self.library == "diffusers" else "not built"


def diffusers_classes(
    verify: bool = False, names: Iterable[str] | None = None, progress: Progress | None = None
) -> list[Coverage]:
    """All transformer classes of the diffusers installed here, by name.

    With `verify`, every class that can be patched is built tiny with random weights and run, see coverage_diffusers.

    Args:
        verify: also run tiny instances.
        names: of the classes; None means all.
        progress: wraps the classes, such as tqdm does.

    Raises:
        ImportError: diffusers is not installed.
        ValueError: a name that diffusers does not have.
    """
    kinds = {kind.__name__: kind for kind in _classes()}
    chosen = sorted(kinds) if names is None else sorted(names)
    unknown = sorted(set(chosen) - set(kinds))
    if unknown:
        raise ValueError(f"`names` must be transformer classes of diffusers, got {', '.join(unknown)}")
    wanted = [kinds[name] for name in chosen]
    return [_of(kind, verify) for kind in (wanted if progress is None else progress(wanted))]


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


def _classes() -> Iterator[type[Any]]:
    folder = importlib.import_module("diffusers.models.transformers")
    base: Any = importlib.import_module("diffusers.models.modeling_utils").ModelMixin
    for file in pkgutil.iter_modules(folder.__path__):
        try:
            module = importlib.import_module(f"{folder.__name__}.{file.name}")
        except ImportError:
            # A file that needs a package of its own defines classes that nobody here can have.
            continue
        for kind in vars(module).values():
            if isinstance(kind, type) and issubclass(kind, base) and kind.__module__ == module.__name__:
                yield kind


def _of(kind: type[Any], verify: bool) -> Coverage:
    name, file = kind.__name__, kind.__module__
    model = _without_memory(kind)
    if model is None:
        ways = {way for processor in _processors(kind) if (way := way_of(processor)) is not None}
        reason = None if ways else f"{name} names no processor that reaches the dispatcher or PyTorch's function"
        note = None if reason else "no instance of it could be built without arguments"
        return Coverage(name, file, None, _one(ways), reason, False, False, note=note)
    try:
        family = find_family(model)[0]
    except TypeError as error:
        return Coverage(name, file, None, None, _own_reason(name, str(error)), True, False)
    ways = {found.way for found in self_attentions(model) if found.way is not None}
    note = _trial(kind) if verify else None
    return Coverage(name, file, family, _one(ways), None, True, verify and note is None, note=note)


def _trial(kind: type[Any]) -> str | None:
    """Why a class could not be verified, or None where it was."""
    from hf_sparse_attn.coverage.of_diffusers import Failed, verify

    try:
        verify(kind)
    except Failed as error:
        return str(error)
    return None


def _one(ways: set[Any]) -> Way | None:
    return "both" if len(ways) > 1 else next(iter(ways), None)


def _own_reason(name: str, text: str) -> str:
    """The part of find_family's message that is about the class; the other families only say that it is not theirs."""
    parts = text.partition("(")[2].rstrip(")").split("; ")
    own = [part.partition(": ")[2] for part in parts if part.startswith("diffusers: ")]
    return own[0] if own else f"{name}: {text}"


def _without_memory(kind: type[Any]) -> nn.Module | None:
    """An instance without memory for weights, tiny or of the class's own sizes; None where it has none."""
    from hf_sparse_attn.coverage.tiny_diffusers import tiny_sizes

    few = {name: 1 for name in _LAYERS if name in inspect.signature(kind.__init__).parameters}
    for sizes in (tiny_sizes(kind), few, {}):
        try:
            with torch.device("meta"):
                model: nn.Module = kind(**sizes)
            return model
        except Exception:
            # Whatever a class raises without its sizes: there is no instance to ask.
            continue
    return None


def _processors(kind: type[Any]) -> list[Any]:
    """Stand-ins of the processor classes that the code of a class names, directly or through its parts."""
    seen: set[type[Any]] = set()
    waiting = [kind]
    while waiting:
        current = waiting.pop()
        if current in seen:
            continue
        seen.add(current)
        for member in vars(current).values():
            if isinstance(member, type) and member.__module__.startswith("diffusers.models"):
                waiting.append(member)
            function: Any = inspect.unwrap(member) if callable(member) else None
            code = getattr(function, "__code__", None)
            for name in _names(code) if code is not None else ():
                found = function.__globals__.get(name)
                if isinstance(found, type) and found.__module__.startswith("diffusers.models"):
                    waiting.append(found)
    return [object.__new__(k) for k in sorted(seen, key=lambda k: k.__name__) if _is_processor(k)]


def _is_processor(kind: type[Any]) -> bool:
    return "Processor" in kind.__name__ and not issubclass(kind, nn.Module)


def _names(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
