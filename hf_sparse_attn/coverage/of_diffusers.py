"""Which transformer classes of the diffusers installed here can be patched and how, and why others cannot."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from hf_sparse_attn.coverage.listing import Coverage, Progress, Way, short
from hf_sparse_attn.extras import needing
from hf_sparse_attn.family import ask_families
from hf_sparse_attn.hosts.diffusers_model import self_attentions

_LAYERS = ("num_layers", "num_single_layers", "num_refiner_layers", "depth", "n_layers", "num_visual_blocks")
# What classes cannot be built without where their own default is None, least first.
_ROPE = {"short_factor": [1.0] * 48, "long_factor": [1.0] * 48}
_SIZES = {"in_channels": 32, "out_channels": 32, "patch_size": 2, "num_kv_heads": 1, "caption_channels": 32}
_UNSET: tuple[Mapping[str, Any], ...] = (
    {},
    {"in_channels": 32},
    {**_SIZES, "rope_scaling": _ROPE},
    {**_SIZES, "caption_channels": (32, 32), "llama_layers": (0,)},
)
Sizes = Callable[[type[Any]], Mapping[str, Any]]


def diffusers_classes(
    names: Iterable[str] | None = None, progress: Progress | None = None, sizes: Sizes | None = None
) -> list[Coverage]:
    """All transformer classes of the diffusers installed here, by name.

    Args:
        names: of the classes; None means all.
        progress: wraps the classes, such as tqdm does.
        sizes: of a class: arguments of its constructor to try before its own.

    Raises:
        MissingExtra: diffusers is not installed.
        ValueError: a name that diffusers does not have.
    """
    kinds = diffusers_kinds()
    chosen = sorted(kinds) if names is None else sorted(names)
    unknown = sorted(set(chosen) - set(kinds))
    if unknown:
        raise ValueError(f"`names` must be transformer classes of diffusers, got {', '.join(unknown)}")
    wanted = [kinds[name] for name in chosen]
    return [_of(kind, sizes) for kind in (wanted if progress is None else progress(wanted))]


def diffusers_kinds() -> dict[str, type[Any]]:
    """The transformer classes by name."""
    return {kind.__name__: kind for kind in _classes()}


def _classes() -> Iterator[type[Any]]:
    with needing("the list of diffusers' classes"):
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


def _of(kind: type[Any], sizes: Sizes | None) -> Coverage:
    name, file = kind.__name__, kind.__module__
    model = _without_memory(kind, sizes)
    if isinstance(model, Exception):
        return Coverage(name, file, None, None, f"could not be built: {short(model)}", False, False)
    found, reasons = ask_families(model)
    if found is None:
        return Coverage(name, file, None, None, reasons["diffusers"], True, False)
    ways = {way for _, _, way in self_attentions(model) if way is not None}
    reached: Way | None = "both" if len(ways) > 1 else next(iter(ways), None)
    return Coverage(name, file, found[0], reached, None, True, False)


def _without_memory(kind: type[Any], sizes: Sizes | None) -> nn.Module | Exception:
    """An instance without memory for weights, of few layers or of the class's own sizes; or why there is none."""
    parameters = inspect.signature(kind.__init__).parameters
    few = {name: 1 for name in _LAYERS if name in parameters}
    none = {name for name, parameter in parameters.items() if parameter.default is None}
    tried = [{**own, **{n: v for n, v in unset.items() if n in none}} for own in (few, {}) for unset in _UNSET]
    for arguments in tried if sizes is None else [sizes(kind), *tried]:
        try:
            with torch.device("meta"):
                model: nn.Module = kind(**arguments)
            return model
        except Exception as error:
            refused = error
    return refused
