"""The coverage of all libraries in one list, with progress on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Literal, TypeVar

from tqdm import tqdm

from hf_sparse_attn.coverage.listing import Coverage, diffusers_classes

log = logging.getLogger(__name__)

T = TypeVar("T")
Library = Literal["transformers", "diffusers", "all"]


def coverage_of(library: Library = "all", verify: bool = False) -> list[Coverage]:
    """The classes of one library or of all that are installed.

    Args:
        library: "transformers", "diffusers" or "all".
        verify: also run tiny instances.

    Raises:
        ValueError: an unknown library, or one that was asked for by name and is not installed.
    """
    if library not in ("transformers", "diffusers", "all"):
        raise ValueError(f"`library` must be transformers, diffusers or all, got {library!r}")
    found: list[Coverage] = []
    if library != "diffusers":
        from hf_sparse_attn.coverage.of_transformers import transformers_classes

        found += transformers_classes(verify, progress=partial(_progress, "transformers"))
    if library != "transformers":
        if find_spec("diffusers") is not None:
            found += diffusers_classes(verify, progress=partial(_progress, "diffusers"))
        elif library == "diffusers":
            raise ValueError("`library` must be installed, got 'diffusers'")
        else:
            log.warning("diffusers is not installed: its classes are not listed")
    return found


def versions(found: Sequence[Coverage]) -> dict[str, str]:
    """Package -> version of torch and the libraries in a list."""
    return {name: str(import_module(name).__version__) for name in ("torch", *sorted({c.library for c in found}))}


def _progress(library: str, classes: Iterable[T]) -> Iterable[T]:
    """A bar on a terminal, nothing elsewhere."""
    return tqdm(list(classes), desc=library, unit="class", file=sys.stderr, disable=None)
