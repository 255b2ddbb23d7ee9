"""Sparse attention for pretrained Hugging Face models: one line on, one line off."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_sparse_attn import native
from hf_sparse_attn.lazy import lazy_names
from hf_sparse_attn.version import __version__ as __version__

# In a clone without symbolic links kernels/, patches/ and recipes/ stand beside the package, not in it.
if not (Path(__file__).parent / "kernels").is_dir() and (Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from hf_sparse_attn.api import attention, patch, unpatch
    from hf_sparse_attn.backend import BackendUnavailable
    from hf_sparse_attn.context import Context, Segment, TokenLayout
    from hf_sparse_attn.hosts.preallocated import PreallocatedCache
    from hf_sparse_attn.method import Decline, Method, MethodDoesNotApply
    from hf_sparse_attn.patching import Patch
    from hf_sparse_attn.pattern.block_pattern import BlockPattern
    from hf_sparse_attn.profiles.head_profile import HeadProfile
    from hf_sparse_attn.profiling.run import profile
    from hf_sparse_attn.report import Report
    from hf_sparse_attn.session import DenseFallback
    from hf_sparse_attn.sharing.gates import GateSet
    from hf_sparse_attn.trained.dsa import dsa_attention
    from hf_sparse_attn.trained.moba import moba_attention
    from hf_sparse_attn.trained.nsa import nsa_attention
    from hf_sparse_attn.training.bundle.bundle import LoadedBundle, load_bundle, push_bundle, save_bundle

_WHERE = {
    "attention": "hf_sparse_attn.api",
    "patch": "hf_sparse_attn.api",
    "unpatch": "hf_sparse_attn.api",
    "LoadedBundle": "hf_sparse_attn.training.bundle.bundle",
    "load_bundle": "hf_sparse_attn.training.bundle.bundle",
    "push_bundle": "hf_sparse_attn.training.bundle.bundle",
    "save_bundle": "hf_sparse_attn.training.bundle.bundle",
    "Context": "hf_sparse_attn.context",
    "Segment": "hf_sparse_attn.context",
    "TokenLayout": "hf_sparse_attn.context",
    "BackendUnavailable": "hf_sparse_attn.backend",
    "GateSet": "hf_sparse_attn.sharing.gates",
    "dsa_attention": "hf_sparse_attn.trained.dsa",
    "moba_attention": "hf_sparse_attn.trained.moba",
    "nsa_attention": "hf_sparse_attn.trained.nsa",
    "HeadProfile": "hf_sparse_attn.profiles.head_profile",
    "Decline": "hf_sparse_attn.method",
    "Method": "hf_sparse_attn.method",
    "MethodDoesNotApply": "hf_sparse_attn.method",
    "DenseFallback": "hf_sparse_attn.session",
    "Patch": "hf_sparse_attn.patching",
    "BlockPattern": "hf_sparse_attn.pattern.block_pattern",
    "PreallocatedCache": "hf_sparse_attn.hosts.preallocated",
    "profile": "hf_sparse_attn.profiling.run",
    "Report": "hf_sparse_attn.report",
}

__all__ = [
    "BackendUnavailable",
    "BlockPattern",
    "Context",
    "Decline",
    "DenseFallback",
    "GateSet",
    "HeadProfile",
    "LoadedBundle",
    "Method",
    "MethodDoesNotApply",
    "Patch",
    "PreallocatedCache",
    "Report",
    "Segment",
    "TokenLayout",
    "attention",
    "dsa_attention",
    "get_method",
    "list_methods",
    "load_bundle",
    "moba_attention",
    "nsa_attention",
    "patch",
    "profile",
    "push_bundle",
    "register_method",
    "save_bundle",
    "unpatch",
]


__getattr__, _lazy_dir = lazy_names(__name__, _WHERE)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def list_methods() -> list[str]:
    """Names of all sparse attention methods."""
    from hf_sparse_attn.registry import METHODS

    return METHODS.names()


def get_method(name: str) -> type[Method]:
    """The class of a method; call it with parameters.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    from hf_sparse_attn.registry import METHODS

    return METHODS.get(name)


def register_method(name: str) -> Callable[[type[Method]], type[Method]]:
    """Class decorator that adds a method of your own under `name`.

    Raises:
        ValueError: the name is taken.
        TypeError: the class is not a Method.
    """
    from hf_sparse_attn.registry import METHODS

    METHODS.discover()
    register = METHODS.register(name)

    def add(method: type[Method]) -> type[Method]:
        register(method)
        native.register(name)
        return method

    return add


# Every method stands under "hsa:<name>" as soon as transformers is imported, now or later.
native.install()
