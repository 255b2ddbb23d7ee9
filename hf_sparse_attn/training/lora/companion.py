"""A second low-rank adapter in the layers of a first one: two models to train, and one base model in memory."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import nn

from hf_sparse_attn.patching import changed
from hf_sparse_attn.training.lora.adapter import Adapter
from hf_sparse_attn.training.lora.settings import ADAPTER

COMPANION = "companion"


def add_companion(adapter: Adapter) -> Companion:
    """Adds a second adapter beside one that is on a model: of the same modules, rank and weights, in place.

    Unless something else is said the first one is in force, and it alone is saved.

    Args:
        adapter: the first one, see `lora.add_lora`. It must train no module in full.

    Raises:
        ValueError: it was removed, has a companion, or trains modules in full.
    """
    trained = adapter.settings.trained
    if trained:
        raise ValueError(f"`lora.trained` must be empty where there are two adapters, got {list(trained)}")
    # Raises where it was removed.
    adapter.parameters()
    if any(COMPANION in layer.lora_A for _, layer in adapter.layers()):
        raise ValueError("`adapter` must have no companion yet, got one that has")
    return Companion(adapter)


class Companion:
    """A second adapter in the layers of a first one, made by `add_companion`."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self._layers: list[Any] = [layer for _, layer in adapter.layers()]
        for layer in self._layers:
            for held in _held(layer):
                if ADAPTER in held:
                    held[COMPANION] = copy.deepcopy(held[ADAPTER])

    def parameters(self) -> dict[str, nn.Parameter]:
        """Its weights, by their names in the model."""
        wanted = {id(p) for layer in self._layers for part in _parts(layer) for p in part.parameters()}
        return {name: p for name, p in self.adapter.model.named_parameters() if id(p) in wanted}

    @property
    def in_force(self) -> bool:
        """Whether it is this adapter that the model computes with, and not the first one."""
        return any(layer._active_adapter == COMPANION for layer in self._layers)

    def active(self, wanted: bool = True) -> AbstractContextManager[None]:
        """Within it the model computes with this adapter in place of the first one; or with the first one again."""
        # Not peft's own set_adapter: that changes requires_grad.
        return changed(self._layers, "_active_adapter", COMPANION if wanted else ADAPTER)

    def bound(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """A call that computes with the adapter that is in force now, whenever it is made: for a recomputation."""
        wanted = self.in_force

        def made(*args: Any, **given: Any) -> Any:
            with self.active(wanted):
                return call(*args, **given)

        return made

    def remove(self) -> None:
        """Takes it out of the layers; the first adapter is then as it was. A second call does nothing."""
        for layer in self._layers:
            for held in _held(layer):
                if COMPANION in held:
                    del held[COMPANION]


def _held(layer: Any) -> list[Any]:
    """What a layer of peft keeps for each of its adapters, by their names."""
    return [getattr(layer, name) for name in (*layer.adapter_layer_names, *layer.other_param_names)]


def _parts(layer: Any) -> list[nn.Module]:
    return [held[COMPANION] for held in (layer.lora_A, layer.lora_B) if COMPANION in held]
