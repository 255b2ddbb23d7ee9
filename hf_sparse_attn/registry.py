"""One Registry class and its three instances, each filled by importing the files of one folder."""

from __future__ import annotations

import importlib
import logging
import pkgutil
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from hf_sparse_attn.extras import EXTRAS, install
from hf_sparse_attn.method import Method
from hf_sparse_attn.nearest import nearest

if TYPE_CHECKING:
    from hf_sparse_attn.backend import Backend
    from hf_sparse_attn.family import Family

T = TypeVar("T")
log = logging.getLogger(__name__)


class Registry(Generic[T]):
    """Named entries of one kind, found by importing every file of a package folder the first time one is asked for.

    A file whose optional dependency is missing is left out and the reason kept in `missing`.

    Args:
        kind: what an entry is called in errors ("method").
        package: package whose files register the entries.
        check: raises TypeError for an entry of the wrong form.
        entry_point_group: group of installed entry points that are entries too, or None.
    """

    def __init__(
        self, kind: str, package: str, check: Callable[[str, object], None], entry_point_group: str | None = None
    ) -> None:
        self.kind = kind
        self.package = package
        self.missing: dict[str, str] = {}
        # Grows with every entry: what is remembered of the entries holds for one version.
        self.version = 0
        self._check = check
        self._group = entry_point_group
        self._entries: dict[str, T] = {}
        # Reentrant: a file may ask the registry while it is being imported, and gets what is there by then.
        self._lock = threading.RLock()
        self._begun = self._discovered = False

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that adds an entry under `name`.

        Raises:
            ValueError: the name is taken by another entry, or is not made of lower-case letters, digits and `_`.
            TypeError: the entry has the wrong form.
        """
        if not isinstance(name, str) or not name.isidentifier() or name != name.lower():
            raise ValueError(f"`name` of a {self.kind} must be lower-case letters, digits and '_', got {name!r}")

        def add(entry: T) -> T:
            self._check(name, entry)
            known = self._entries.get(name)
            # The same class defined again (a notebook cell run twice) replaces itself.
            if known is not None and _origin(known) != _origin(entry):
                raise ValueError(f"`name` of a {self.kind} must be free, got {name!r}, taken by {_origin(known)}")
            self._entries[name] = entry
            self.version += 1
            return entry

        return add

    def get(self, name: str, module: str | None = None) -> T:
        """The entry called `name`.

        Args:
            name: of the entry.
            module: that registers it, where that is known; it is named if it was not imported.

        Raises:
            ValueError: unknown name; the message lists the known ones and names the nearest, or tells what its file
                needs that is not installed.
        """
        self.discover()
        if name not in self._entries:
            lacking = self._lacking().get(name)
            if lacking is not None:
                raise ValueError(f"`{self.kind}` {name!r} {lacking}")
            said = f"`{self.kind}` must be one of {', '.join(self.names())}; got {name!r}"
            near = nearest(name, self.known())
            if self._group and (module or not near):
                near = f" ({to_import(module)})"
            raise ValueError(said + near)
        return self._entries[name]

    def names(self) -> list[str]:
        """All names, sorted."""
        self.discover()
        return sorted(self._entries)

    def known(self) -> list[str]:
        """All names, those in files whose package is missing here included, read from their text."""
        return sorted({*self.names(), *self._lacking()})

    def why_missing(self, file: str) -> str | None:
        """What the file of an entry needs that is not installed, and how to install it; None where it is there."""
        self.discover()
        reason = self.missing.get(file)
        package = "" if reason is None else reason.rpartition(" ")[2]
        return f"{reason} {install(package)}" if package in EXTRAS else reason

    def _lacking(self) -> dict[str, str | None]:
        """What the entries need that stand in files whose package is missing here."""
        self.discover()
        found: dict[str, str | None] = {}
        for file in self.missing:
            spec = find_spec(f"{self.package}.{file}")
            if spec is not None and spec.origin is not None:
                said = self.why_missing(file)
                text = Path(spec.origin).read_text(encoding="utf-8")
                found.update(dict.fromkeys(re.findall(r'^@\w+\.register\("(\w+)"\)', text, re.M), said))
        return found

    def items(self) -> Iterator[tuple[str, T]]:
        """(name, entry) pairs, sorted by name."""
        return iter([(name, self._entries[name]) for name in self.names()])

    def __contains__(self, name: object) -> bool:
        self.discover()
        return name in self._entries

    def discover(self) -> None:
        """Imports the folder's files and the entry points; once, and whoever comes meanwhile waits."""
        if self._discovered:
            return
        with self._lock:
            if self._begun:
                return
            self._begun = True
            try:
                self._import_all()
            finally:
                self._discovered = True

    def _import_all(self) -> None:
        folder = importlib.import_module(self.package)
        for file in pkgutil.iter_modules(folder.__path__):
            try:
                importlib.import_module(f"{self.package}.{file.name}")
            except ImportError as error:
                # Only an absent third-party package is a reason to go on without the file.
                if error.name is None or error.name.split(".")[0] == "hf_sparse_attn":
                    raise
                self.missing[file.name] = f"needs the package {error.name.split('.')[0]}"
                log.debug("%s %s is not available: %s", self.kind, file.name, error)
        for point in entry_points(group=self._group) if self._group else ():
            if point.name not in self._entries:
                self.register(point.name)(point.load())


def to_import(module: str | None = None) -> str:
    """How a method of one's own becomes known.

    Args:
        module: that registers it, where that is known.
    """
    name = "the module that registers it" if module is None else module
    return (
        f"a method of your own: import {name} first, on the command line by --import {module or 'MODULE'}, or install "
        "a package with an entry point for it"
    )


def _origin(entry: object) -> str:
    owner = entry if isinstance(entry, type) else type(entry)
    return f"{owner.__module__}.{owner.__qualname__}"


def _check_method(name: str, entry: object) -> None:
    if not (isinstance(entry, type) and issubclass(entry, Method)):
        raise TypeError(f"method {name!r} must be a subclass of hf_sparse_attn.method.Method, got {entry!r}")
    entry.name = name


def _check_backend(name: str, entry: object) -> None:
    for needed in ("why_not", "attention"):
        if not callable(getattr(entry, needed, None)):
            raise TypeError(f"backend {name!r} must have a method {needed}(), got {entry!r}")
    # One that says nothing is taken by name only.
    entry.auto_rank = getattr(entry, "auto_rank", {})  # type: ignore[attr-defined]
    entry.name = name  # type: ignore[attr-defined]


def _check_family(name: str, entry: object) -> None:
    for needed in ("targets", "install", "tiny"):
        if not callable(getattr(entry, needed, None)):
            raise TypeError(f"family {name!r} must have a method {needed}(), got {entry!r}")


METHODS: Registry[type[Method]] = Registry("method", "hf_sparse_attn.methods", _check_method, "hf_sparse_attn.methods")
FAMILIES: Registry[type[Family]] = Registry("family", "hf_sparse_attn.patches", _check_family)
BACKENDS: Registry[type[Backend]] = Registry("backend", "hf_sparse_attn.kernels", _check_backend)


def make_method(method: str | Method, params: dict[str, Any], besides: Sequence[str] = ()) -> Method:
    """A Method from its name and parameters, or the Method given.

    Args:
        method, params: the method.
        besides: what the caller takes by keyword besides, which an unknown parameter may have been meant for.

    Raises:
        TypeError: `method` is neither, or parameters come with a ready Method, or an unknown parameter.
        ValueError: unknown name; the message lists the known ones.
    """
    if isinstance(method, Method):
        if params:
            raise TypeError(f"`params` must be empty when `method` is a Method, got {', '.join(sorted(params))}")
        return method
    if not isinstance(method, str):
        raise TypeError(f"`method` must be a name or a Method, got {method!r} of type {type(method).__name__}")
    cls = METHODS.get(method)
    known = [f.name for f in fields(cls)]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise TypeError(
            f"method {method!r} takes the parameters {', '.join(known) or '(none)'}; got {', '.join(unknown)}"
            + nearest(unknown, [*known, *besides])
        )
    return cls(**params)
