"""The density of a profile in use: sparse runs of the whole model, and a choice that keeps to its budget in these."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hf_sparse_attn.api import patch
from hf_sparse_attn.family import find_family
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.budget import BudgetError
from hf_sparse_attn.profiling.evaluate import same_draws
from hf_sparse_attn.profiling.measure import Batch, run_batch
from hf_sparse_attn.profiling.observe import evaluating

# Choices that are tried, and how far from its budget, as a share of it, a density may be.
_TRIES = 3
_CLOSE = 0.005


def density_in_use(model: Any, profile: HeadProfile, batches: Sequence[Batch]) -> float:
    """Share of the visible pairs of tokens that a model keeps when it runs by a profile, mean over batches.

    Args:
        model: as for `profile`; not patched, and left as it was.
        profile: of the model; its heads are sparse at any length.
        batches: as for `profile`.
    """
    found = []
    with evaluating(find_family(model)[2]), torch.no_grad():
        for batch in batches:
            with same_draws(batch), patch(model, profile, min_tokens=0) as applied:
                run_batch(model, batch)
            report = applied.report()
            found.append(report.density if report.prefill_density is None else report.prefill_density)
    return float(np.mean(found))


def keep_in_use(
    model: Any, made: HeadProfile, batches: Sequence[Batch], choose_again: Callable[[float], HeadProfile]
) -> HeadProfile:
    """A choice that keeps to its budget in sparse runs of the model, with their density in its figures.

    The figures of a choice are of a dense model. In a sparse one layers read what sparse layers before them wrote, and
    methods that go by content keep some percent more of it; the choice is then made anew within a smaller budget.

    Args:
        model, batches: what was measured.
        made: the choice by the figures, with a budget of density.
        choose_again: budget -> the choice within it.
    """
    budget = aimed = made.budget["density"]
    for number in range(_TRIES):
        if _is_static(made):
            break
        foreseen, found = made.density, density_in_use(model, made, batches)
        # A choice that leaves part of the budget unspent has no use for more of it.
        is_close = abs(found / budget - 1) <= _CLOSE or (found < budget and foreseen < (1 - _CLOSE) * aimed)
        if is_close or number == _TRIES - 1:
            return _with_density(made, found)
        aimed = min(1.0, budget * foreseen / found)
        try:
            made = replace(choose_again(aimed), budget=made.budget)
        except BudgetError:
            return _with_density(made, found)
    return made


def _is_static(profile: HeadProfile) -> bool:
    """Whether all that is kept is known before the model runs."""
    return all(profile.methods[i].static for plan in profile.plans for i in np.unique(plan.choice))


def _with_density(profile: HeadProfile, found: float) -> HeadProfile:
    """The profile with the densities of heads that go by content scaled, so that the mean of all is `found`."""
    moving = np.array([not method.static for method in profile.methods])
    goes = np.stack([moving[plan.choice] for plan in profile.plans])
    density = profile.figures["density"]

    def with_moving(values: NDArray[np.float32]) -> HeadProfile:
        return replace(profile, figures={**profile.figures, "density": np.where(goes, values, density)})

    fixed = with_moving(np.zeros_like(density)).density
    scale = (found - fixed) / max(profile.density - fixed, 1e-9)
    return with_moving((density * max(scale, 0.0)).clip(max=1.0))
