"""What a finished profile costs the whole model, on inputs it was not made from: dense beside sparse, by length."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.family import find_family
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.measure import Batch, inputs_of, ready
from hf_sparse_attn.profiling.observe import Seen, evaluating, observing
from hf_sparse_attn.profiling.tally import length_class

LOSS, OUTPUT_ERROR = "loss", "output error"


class _Run(NamedTuple):
    """A batch: its tokens, what was kept of the pairs, and the figure of the dense and of the sparse run."""

    tokens: int
    figure: str
    density: float
    dense: float
    sparse: float


def evaluate(model: Any, profile: HeadProfile, batches: Iterable[Batch]) -> tuple[dict[str, Any], ...]:
    """Runs a model dense and by its profile on inputs; the model is left as it was.

    The figure is the loss where the inputs have one: labels, the tokens that a causal language model reads, or a
    callable that returns it. Elsewhere it is the error of the first output, as a share of that of the dense run.

    Args:
        model: as for `profile`; not patched.
        profile: of the model; its heads are sparse at any length.
        batches: as for `profile`, of any lengths.

    Returns:
        a row for each length and figure, as `HeadProfile.evaluation` has them.

    Raises:
        ValueError: no batches, or one that leads to neither a loss nor an output.
    """
    # Without the lengths it was measured at: that it runs at others is what is asked for here.
    unmeasured = replace(profile, calibration={}, measurements=None)
    with evaluating(find_family(model)[2]), torch.no_grad():
        runs = [_run(model, unmeasured, batch) for batch in batches]
    if not runs:
        raise ValueError("`held_out` must hold at least one batch, got none")
    groups = sorted({(length_class(run.tokens), run.figure) for run in runs})
    return tuple(_row([run for run in runs if (length_class(run.tokens), run.figure) == group]) for group in groups)


def _row(runs: list[_Run]) -> dict[str, Any]:
    dense, sparse, density, tokens = (
        float(np.mean([getattr(run, name) for run in runs])) for name in ("dense", "sparse", "density", "tokens")
    )
    return {
        "figure": runs[0].figure, "tokens": round(tokens), "inputs": len(runs), "density": density,
        "dense": dense, "sparse": sparse, "difference": sparse - dense,
    }  # fmt: skip


def _run(model: Any, profile: HeadProfile, batch: Batch) -> _Run:
    lengths: list[int] = []

    def look(seen: Seen) -> None:
        lengths.append(seen.ctx.layout.kv_len)

    with same_draws(batch), observing(model, look):
        dense = _result(model, batch)
    with same_draws(batch), patch(model, profile, min_tokens=0) as applied:
        sparse = _result(model, batch)
    tokens, density = max(lengths, default=1), applied.report().density
    if dense.numel() == 1:
        return _Run(tokens, LOSS, density, float(dense), float(sparse))
    error = (sparse - dense).norm() / dense.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return _Run(tokens, OUTPUT_ERROR, density, 0.0, float(error))


def _result(model: Any, batch: Batch) -> Tensor:
    """The loss of a run, or its first output, in float64."""
    inputs = inputs_of(batch)[0]
    if callable(inputs):
        out = inputs(model)
    else:
        if _is_language_model(model) and "labels" not in inputs and "input_ids" in inputs:
            inputs["labels"] = inputs["input_ids"]
        out = model(**ready(model, inputs))
    first = getattr(out, "loss", None)
    if first is None and out is not None:
        first = out if isinstance(out, Tensor) else out[0]
    if isinstance(first, np.ndarray):
        first = torch.from_numpy(first)
    if not isinstance(first, Tensor):
        raise ValueError(f"`held_out` must lead to a loss or an output of tensors, got {type(first).__name__}")
    return first.double().cpu()


def _is_language_model(model: Any) -> bool:
    """Whether a model has a loss on the tokens that it reads."""
    if not isinstance(model, nn.Module) or not getattr(model, "can_generate", lambda: False)():
        return False
    config = getattr(model, "config", None)
    return "labels" in inspect.signature(model.forward).parameters and not getattr(config, "is_encoder_decoder", False)


@contextmanager
def same_draws(batch: Batch) -> Iterator[None]:
    """Within it random numbers are drawn that the next run draws again, those of a batch's generators included."""
    values = batch.values() if isinstance(batch, Mapping) else ()
    generators = [value for value in values if isinstance(value, torch.Generator)]
    states = [generator.get_state() for generator in generators]
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
