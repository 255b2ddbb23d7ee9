"""Sparse attention for pretrained Hugging Face models: one line on, one line off."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_sparse_attn import native

__version__ = "0.1.0"

# In a clone without symbolic links kernels/, patches/ and recipes/ stand beside the package, not in it.
if not (Path(__file__).parent / "kernels").is_dir() and (Path(__file__).parents[1] / "kernels").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if TYPE_CHECKING:
    from hf_sparse_attn.api import attention, patch, unpatch
    from hf_sparse_attn.bundle import LoadedBundle, load_bundle, push_bundle, save_bundle
    from hf_sparse_attn.context import Context, Segment, TokenLayout
    from hf_sparse_attn.dispatch import BackendUnavailable
    from hf_sparse_attn.gates import GateSet
    from hf_sparse_attn.head_profile import HeadProfile
    from hf_sparse_attn.method import Decline, Method, MethodDoesNotApply
    from hf_sparse_attn.patching import DenseFallback, Patch
    from hf_sparse_attn.pattern import BlockPattern
    from hf_sparse_attn.profiling import profile
    from hf_sparse_attn.report import Report

_WHERE = {
    "attention": "api",
    "patch": "api",
    "unpatch": "api",
    "LoadedBundle": "bundle",
    "load_bundle": "bundle",
    "push_bundle": "bundle",
    "save_bundle": "bundle",
    "Context": "context",
    "Segment": "context",
    "TokenLayout": "context",
    "BackendUnavailable": "dispatch",
    "GateSet": "gates",
    "HeadProfile": "head_profile",
    "Decline": "method",
    "Method": "method",
    "MethodDoesNotApply": "method",
    "DenseFallback": "patching",
    "Patch": "patching",
    "BlockPattern": "pattern",
    # The file is called profiling, for an imported submodule would take the place of the function.
    "profile": "profiling",
    "Report": "report",
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
    "Report",
    "Segment",
    "TokenLayout",
    "attention",
    "get_method",
    "list_methods",
    "load_bundle",
    "patch",
    "profile",
    "push_bundle",
    "register_method",
    "save_bundle",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(import_module(f"hf_sparse_attn.{_WHERE[name]}"), name)
    raise AttributeError(f"module 'hf_sparse_attn' has no attribute {name!r}")


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
