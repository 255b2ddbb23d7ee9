"""The coverage of all libraries in one list, with progress on stderr."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from tqdm import tqdm

from hf_sparse_attn.coverage.listing import Coverage, Progress
from hf_sparse_attn.coverage.of_diffusers import diffusers_classes
from hf_sparse_attn.coverage.of_transformers import transformers_classes
from hf_sparse_attn.extras import need

log = logging.getLogger(__name__)

Library = Literal["transformers", "diffusers", "all"]
LISTS: dict[str, Callable[..., list[Coverage]]] = {
    "transformers": transformers_classes,
    "diffusers": diffusers_classes,
}


def coverage_of(library: Library = "all") -> list[Coverage]:
    """The classes of one library or of all that are installed, with progress on stderr.

    Raises:
        ValueError: an unknown library, or one that was asked for by name and is not installed.
    """
    if library not in (*LISTS, "all"):
        raise ValueError(f"`library` must be transformers, diffusers or all, got {library!r}")
    found: list[Coverage] = []
    for name in LISTS if library == "all" else (library,):
        if find_spec(name) is not None:
            found += LISTS[name](progress=progress(name))
        elif library == name:
            raise ValueError(f"`library` must be installed, got {name!r}: the list of its classes {need(name)}")
        else:
            log.warning("%s is not installed: the list of its classes %s", name, need(name))
    return found


def progress(library: str) -> Progress:
    """A bar on a terminal, nothing elsewhere."""
    return lambda classes: tqdm(list(classes), desc=library, unit="class", file=sys.stderr, disable=None)


def versions(found: Sequence[Coverage]) -> dict[str, str]:
    """Package -> version of torch and the libraries in a list."""
    names = ("torch", *sorted({c.library for c in found}))
    return {name: str(import_module(name).__version__) for name in names}
