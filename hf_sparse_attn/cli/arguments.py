"""What the commands have in common: how arguments are read, modules of the user's imported, errors and logs shown."""

from __future__ import annotations

import argparse
import codecs
import io
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import NoReturn, TypeVar

from hf_sparse_attn.nearest import nearest

T = TypeVar("T")
# What a terminal without Unicode gets for the lines of tables and the spots of pictures.
_PLAIN = str.maketrans("─━·░▒▓█", "--.:+*#")


class Parser(argparse.ArgumentParser):
    """Errors are raised: argparse itself would print the usage and leave the process."""

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: (.+?) \(choose from (.*)\)", message)
        known = [name.strip(" '") for name in choice[2].split(",")] if choice else []
        raise ValueError(message + (nearest(choice[1].strip("'"), known) if choice else ""))


def list_of(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    """Parses comma-separated values."""

    def parse(text: str) -> tuple[T, ...]:
        try:
            return tuple(kind(part.strip()) for part in text.split(","))
        except ValueError:
            name = getattr(kind, "__name__", "value")
            raise argparse.ArgumentTypeError(f"must be {name}s separated by commas, got {text!r}") from None

    return parse


@contextmanager
def importing(modules: Sequence[str]) -> Iterator[None]:
    """Within it modules are there that were asked for, also such as lie in the folder where the command was given."""
    before = list(sys.path)
    if modules:
        sys.path.insert(0, os.getcwd())
    try:
        for name in modules:
            try:
                import_module(name)
            # Whatever a file raises that is somebody's own.
            except Exception as error:
                raise ValueError(f"--import must name a module that can be imported, got {name!r}: {error}") from error
        yield
    finally:
        sys.path[:] = before


def message_of(error: Exception) -> str:
    """What an error says; of an optional package that is missing, which extra brings it."""
    from hf_sparse_attn.extras import MissingExtra, absent

    package = None if isinstance(error, MissingExtra) else absent(error)
    return str(error) if package is None else str(MissingExtra("the command", package))


@contextmanager
def logs_to_stderr(level: int) -> Iterator[None]:
    """Logs of this package on stderr while a command runs; a caller in the same process keeps its own setting."""
    logger = logging.getLogger("hf_sparse_attn")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@contextmanager
def plain_where_needed() -> Iterator[None]:
    """Within it what the encoding of stdout cannot hold is written in ASCII, that of tables and pictures by look."""

    def plain(error: UnicodeError) -> tuple[str, int]:
        if not isinstance(error, UnicodeEncodeError):
            raise error
        said = error.object[error.start : error.end].translate(_PLAIN)
        return said.encode("ascii", "replace").decode("ascii"), error.end

    codecs.register_error("hf_sparse_attn.plain", plain)
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.errors != "strict":
        yield
        return
    stream.reconfigure(errors="hf_sparse_attn.plain")
    try:
        yield
    finally:
        stream.reconfigure(errors="strict")
