"""Train the gates of video sparse attention on a Wan model, and a LoRA besides where one is asked for.

    hf-sparse-attn train vsa_gate model=FOLDER_OR_ID videos.source=FOLDER --output DIR

VSA (Zhang et al. 2025, arXiv 2505.13389) adds to the sparse attention of chosen tiles a pooled branch, which a linear
gate of the hidden states weighs. The gates start at zero, so that training starts from plain top-k attention, and the
base model stays frozen: trained are the gates by themselves, or together with an adapter that lets queries, keys,
values and outputs follow (`lora`). The loss is that of flow matching, with sparse attention in force; the sparsity
rises in steps. The paper trains all weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run, SparseSettings
from hf_sparse_attn.recipes.wan_long_video import WanLongVideo
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.gates import GateSet
from hf_sparse_attn.training.sparse import make_patch
from hf_sparse_attn.training.video.material import Material
from hf_sparse_attn.training.video.task import VideoTask

METHOD = "vsa"


@dataclass(frozen=True, kw_only=True)
class SparsitySchedule:
    """How the sparsity, 1 - density, rises to that of the settings: by `rate` every `interval` steps, from 0 on.

    Args:
        rate: what is added at a time; must divide the sparsity that is wanted at the end.
        interval: steps from one rise to the next.
    """

    rate: float = 0.03
    interval: int = 50

    def __post_init__(self) -> None:
        check_int("interval", self.interval, 1)
        if not 0 < self.rate < 1:
            raise ValueError(f"`rate` must be more than 0 and less than 1, got {self.rate}")

    def rises(self, target: float) -> int:
        """How often the sparsity rises until it is `target`.

        Raises:
            ValueError: `rate` does not divide it.
        """
        # A quotient that is whole up to rounding is whole.
        whole = round(target / self.rate)
        if abs(whole * self.rate - target) > 1e-6:
            raise ValueError(f"`rate` must divide the sparsity that is wanted, {target:.4g}, got {self.rate}")
        return whole

    def sparsity(self, step: int, target: float) -> float:
        """At a step, counted from 0."""
        rises = self.rises(target)
        done = step // self.interval
        return target if done >= rises else done * self.rate


@dataclass(frozen=True, kw_only=True)
class VsaGate(WanLongVideo):
    """Gates of VSA for a Wan model, and with `lora` an adapter besides; see WanLongVideo for the rest.

    `sparse` must be of the method vsa, without `gates`; its density is the one that training ends with.

    Args:
        schedule: how the sparsity rises; None starts with the final one.
    """

    needs_lora: ClassVar[bool] = False

    schedule: SparsitySchedule | None = field(default_factory=SparsitySchedule)

    def __post_init__(self) -> None:
        super().__post_init__()
        sparse = self.sparse
        if sparse is None or sparse.method != METHOD:
            raise ValueError(f"`sparse.method` must be {METHOD!r}, got {None if sparse is None else sparse.method!r}")
        gates = sparse.params.get("gates")
        # The task puts the set here that it trains.
        if gates and not isinstance(gates, GateSet):
            raise ValueError(f"`sparse.params` must be without `gates`, which are trained, got {gates!r}")
        if isinstance(sparse.min_tokens, str):
            raise ValueError(
                f"`sparse.min_tokens` must be a number, for a call that is left dense trains no gate; "
                f"got {sparse.min_tokens!r}"
            )
        if self.schedule is not None:
            self.schedule.rises(1 - self.density)

    @property
    def density(self) -> float:
        """The one that training ends with."""
        found: Any = make_method(METHOD, {} if self.sparse is None else self.sparse.params)
        return float(found.density)

    def density_at(self, step: int) -> float:
        """Of a step, counted from 0."""
        return self.density if self.schedule is None else 1 - self.schedule.sparsity(step, 1 - self.density)

    def task(self, run: Run) -> VsaGateTask:
        return VsaGateTask(self, run, self._material(run))


class VsaGateTask(VideoTask):
    """The gates in training; see VideoTask.

    Args:
        recipe: the settings.
        run: where it runs.
        material: model and samples.
    """

    recipe: VsaGate

    def __init__(self, recipe: VsaGate, run: Run, material: Material) -> None:
        self.gates = GateSet(METHOD, material.model, seed=recipe.seed).to(run.device)
        super().__init__(replace(recipe, sparse=_with(recipe.sparse, gates=self.gates)), run, material)
        self.recipe = recipe
        self.module = nn.ModuleDict({"model": self.model, "gates": self.gates})
        self._density = recipe.density

    def begin_step(self, step: int) -> None:
        self._attend(self.recipe.density_at(step), self.gates)

    def evaluate(self) -> dict[str, float]:
        """As VideoTask.evaluate, at the density that training ends with; `flow_loss_no_gates` is the loss with the
        same tiles and no pooled branch.
        """
        self._attend(self.recipe.density, "", anew=True)
        plain = self.held_out_loss()
        self._attend(self.recipe.density, self.gates, anew=True)
        return {**super().evaluate(), "flow_loss_no_gates": plain}

    def bundle_parts(self) -> dict[str, Any]:
        return {**super().bundle_parts(), "gates": self.gates}

    def close(self) -> None:
        if self.patch is not None:
            self.patch.remove()
        super().close()

    def _attend(self, density: float, gates: GateSet | str, anew: bool = False) -> None:
        """Puts sparse attention of another density on the model."""
        if self.patch is not None and (anew or density != self._density):
            self.patch.remove()
            self.patch = make_patch(self.model, _with(self.recipe.sparse, density=density, gates=gates))
            self._density = density


def _with(sparse: SparseSettings | None, **params: Any) -> SparseSettings:
    if sparse is None:
        raise ValueError("`sparse` must say how attention is sparse, got none")
    return replace(sparse, params={**sparse.params, **params})


RECIPE = VsaGate
