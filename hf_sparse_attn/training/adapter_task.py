"""Recipes that adapt a pretrained model: a LoRA adapter on it, and sparse attention in force while it is trained."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import OptimizerSettings, Recipe, Run, SparseSettings, Task
from hf_sparse_attn.settings import plain
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.sparse import check_backward, make_patch

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class AdapterRecipe(Recipe):
    """A pretrained model, a LoRA adapter on it, and sparse attention in force while it is trained.

    Args:
        model: a folder, a Hub id, or a model that comes with the package.
        steps: optimizer steps.
        optimizer: of the adapter's weights.
        lora: the adapter; None for a recipe that trains something else of its own.
        sparse: sparse attention, as `hsa.patch` takes it; None trains with the model's own.
        batch: samples of a step, over all processes.
        gradient_checkpointing: keep no activations inside the blocks, and compute them again.
        dtype: what the base model is loaded in; the adapter is float32.
    """

    model: str
    steps: int
    optimizer: OptimizerSettings
    lora: LoraSettings | None = None
    sparse: SparseSettings | None = None
    batch: int = 1
    gradient_checkpointing: bool = False
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("steps", self.steps, 1)
        check_int("batch", self.batch, 1)
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"`optimizer.warmup_steps` must be at most `steps` = {self.steps}, got {self.optimizer.warmup_steps}"
            )

    @property
    def total_steps(self) -> int:
        return self.steps

    @property
    def torch_dtype(self) -> Any:
        """`dtype` as torch and from_pretrained take it; "auto" stays a word."""
        return self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)


class AdapterTask(Task):
    """What such recipes have in common; a recipe's own task defines `batch`, `weight`, `loss` and `evaluate`.

    Args:
        recipe: the settings.
        run: where it runs.
        model: on the device of the run.
        base_model: folder or Hub id that the model came from, for the bundle.
        rope: how its positions were scaled, for the bundle; None where they were not.

    Raises:
        ValueError: the method or the backend has no backward pass, does not fit the model, or a module to adapt is not
            there. The model is then as it was.
    """

    def __init__(
        self, recipe: AdapterRecipe, run: Run, model: nn.Module, *, base_model: str, rope: dict[str, Any] | None = None
    ) -> None:
        self.recipe, self.run, self.model, self.module = recipe, run, model, model
        self.base_model, self.rope = base_model, rope
        self.adapter: Any = None
        self.patch: Patch | None = None
        self._was_sparse = False
        self._undo = ExitStack()
        with ExitStack() as undo:
            if recipe.sparse is not None:
                check_backward(recipe.sparse, model)
            for parameter in model.parameters():
                undo.callback(parameter.requires_grad_, parameter.requires_grad)
            model.requires_grad_(False)
            if recipe.lora is not None:
                from hf_sparse_attn.training.lora.adapter import add_lora

                self.adapter = add_lora(model, recipe.lora, seed=recipe.seed)
                undo.callback(self.adapter.remove)
            if recipe.gradient_checkpointing:
                undo.callback(checkpoint_gradients(model))
            if recipe.sparse is not None:
                self.patch = make_patch(model, recipe.sparse)
                undo.callback(self.patch.remove)
            self._undo = undo.pop_all()

    def numbers(self, step: int, samples: Sequence[int]) -> list[int]:
        """Numbers of some samples of a step over the whole training."""
        return [step * self.recipe.batch + sample for sample in samples]

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.recipe.optimizer.make(list(self.trained().values()))]

    def rate(self, step: int) -> float:
        return self.recipe.optimizer.factor(step, self.recipe.steps)

    def gradient_clip(self) -> float | None:
        return self.recipe.optimizer.gradient_clip

    def samples(self, step: int) -> int:
        return self.recipe.batch

    def end_step(self, step: int) -> None:
        """Warns after the first step where sparse attention was asked for and none ran."""
        reason = self.all_dense() if step == 0 else None
        if reason is not None:
            _LOG.warning("`sparse` left every layer dense in the first step: %s", reason)

    def all_dense(self) -> str | None:
        """Why no layer has been sparse so far; None where one was, or none was to be."""
        layers = [] if self.patch is None else self.patch.report().layers
        if not layers or any(layer.sparse_calls for layer in layers):
            return None
        return "; ".join(sorted({reason for layer in layers for reason in layer.reasons})) or "no call"

    def check_sparse(self) -> None:
        """Raises where all has been dense so far, for recipes that would then train another model than is asked for.

        Looks until a layer was sparse, and no more after that.

        Raises:
            ValueError: no layer was sparse, although sparse attention is asked for.
        """
        reason = None if self._was_sparse else self.all_dense()
        if reason is not None:
            raise ValueError(f"`sparse` must make a layer sparse, all were dense: {reason}")
        self._was_sparse = True

    def bundle_parts(self) -> dict[str, Any]:
        """What else belongs into the bundle: `profile`, `gates`, or a `sparse` other than the one trained with."""
        return {}

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        from hf_sparse_attn.training.bundle.bundle import save_bundle

        given = {
            "model": self.model,
            "base_model": self.base_model,
            "adapter": self.adapter,
            "sparse": self.recipe.sparse,
            "rope": self.rope,
            "figures": figures,
            "recipe": {"recipe": self.recipe.name, **plain(self.recipe)},
        }
        save_bundle(folder, **{**given, **self.bundle_parts()})

    def close(self) -> None:
        self._undo.close()


def checkpoint_gradients(model: Any) -> Any:
    """Turns gradient checkpointing on; returns what turns it off again.

    Raises:
        ValueError: the model has none.
    """
    # transformers calls it activation checkpointing from 5.23 on. The form that is asked for needs no input with a
    # gradient: the base model is frozen.
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if hasattr(model, f"{name}_enable"):
            getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
            return getattr(model, f"{name}_disable")
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing()
        return model.disable_gradient_checkpointing
    raise ValueError(f"`gradient_checkpointing` must be false for {type(model).__name__}, which has none; got true")
