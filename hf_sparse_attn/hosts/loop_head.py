"""What the `for` loops of a function go over, read off its bytecode: names, and the parts of what these hold."""

from __future__ import annotations

import dis
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

# What stands between the head of a loop and its first statement: how the next item gets its names.
_UNPACKING = {"UNPACK_SEQUENCE", "UNPACK_EX", "CACHE", "EXTENDED_ARG", "SWAP", "NOP"}
# What ends the statement before a loop.
_STATEMENT = ("STORE_", "DELETE_", "POP_", "JUMP", "RETURN", "RAISE", "RERAISE", "RESUME", "SETUP_", "BEFORE_", "END_")
# A bound of a slice that is neither a number nor a variable.
UNREAD: Any = object()


class Cut(NamedTuple):
    """A part of what a name holds: start, stop and step of a slice, each a number, None, a variable's name or UNREAD.

    Args:
        name: of a variable or an attribute.
    """

    name: str | None
    start: Any = None
    stop: Any = None
    step: Any = None


_UNKNOWN = Cut(None, UNREAD, UNREAD)


class Head(NamedTuple):
    """What a `for` loop goes over.

    Args:
        variables, attributes: the names that its expression reads.
        cuts: the parts that it goes over side by side, of names that are cut somewhere in it.
    """

    variables: frozenset[str] = frozenset()
    attributes: frozenset[str] = frozenset()
    cuts: tuple[Cut, ...] = ()


class Loop(NamedTuple):
    """A `for` loop of a function: where its body is in the bytecode, the names that it sets, and what it goes over."""

    begin: int
    end: int
    names: tuple[str, ...]
    head: Head


def loops_of(steps: Sequence[dis.Instruction]) -> Iterator[Loop]:
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
        yield Loop(step.offset, step.argval, tuple(names), head_of(steps[:number]))


def head_of(before: Sequence[dis.Instruction]) -> Head:
    """What a loop goes over.

    Args:
        before: the instructions in front of it; its expression are the last ones, back to the end of a statement.
    """
    read: list[tuple[str, Any]] = []
    for step in reversed(before):
        if step.opname.startswith(_STATEMENT):
            # Python 3.13 may store the last value of a statement and load the first one of the next at once.
            read += [("variable", step.argval[1])] if step.opname == "STORE_FAST_LOAD_FAST" else []
            break
        if step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME", "LOAD_GLOBAL")):
            names = [step.argval] if isinstance(step.argval, str) else step.argval
            read += [("variable", name) for name in reversed(names)]
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            read.append(("attribute", step.argval))
        elif step.opname in ("LOAD_CONST", "LOAD_SMALL_INT"):
            # Newer versions keep the slices of numbers ready.
            read.append(("slice" if isinstance(step.argval, slice) else "number", step.argval))
        elif step.opname in ("BUILD_SLICE", "BINARY_SLICE"):
            read.append(("cut", step.arg or 2))
        elif step.opname == "BINARY_OP" and step.argrepr.startswith("+"):
            read.append(("sum", None))
        else:
            read.append((step.opname, None))
    names = {kind: frozenset(n for k, n in read if k == kind) for kind in ("variable", "attribute")}
    return Head(names["variable"], names["attribute"], _cuts(read[::-1]))


def _cuts(read: Sequence[tuple[str, Any]]) -> tuple[Cut, ...]:
    """The parts that an expression goes over.

    Args:
        read: (what it is, its value) of its instructions.
    """
    cuts: list[Cut] = []
    bounds: set[int] = set()
    for at, (kind, value) in enumerate(read):
        if kind not in ("slice", "cut"):
            continue
        first = at - value if kind == "cut" else at
        given = [(k, v) for k, v in read[max(0, first) : at]]
        known = all(k in ("variable", "number") for k, _ in given) and first > 0
        if kind == "slice":
            own: list[Any] = [value.start, value.stop, value.step]
        elif known:
            own = [v for _, v in given]
        else:
            own = [UNREAD, None if read[at - 1] == ("number", None) else UNREAD]
        if known:
            bounds.update(range(first, at))
        name = read[first - 1][1] if known and read[first - 1][0] in ("variable", "attribute") else None
        cuts.append(Cut(name, *own))
    whole = [v for at, (k, v) in enumerate(read) if k in ("variable", "attribute") and at not in bounds]
    for name in {cut.name for cut in cuts if cut.name is not None}:
        if whole.count(name) > sum(cut.name == name for cut in cuts):
            # What is added to a part may be as long as the whole.
            cuts = [c for c in cuts if c.name != name or ("sum", None) not in read]
            cuts.insert(0, Cut(name))
    called = {v for k, v in read if k in ("variable", "attribute")}
    if "reversed" in called:
        cuts = [_UNKNOWN] if cuts else [Cut("", None, None, -1)]
    elif "islice" in called:
        cuts = [_UNKNOWN]
    elif "chain" in called or (("sum", None) in read and all(c[1:] != (None, None, None) for c in cuts)):
        # One after the other.
        cuts = []
    return tuple(cuts)
