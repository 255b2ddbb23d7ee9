"""What the evaluations on real weights share: methods at equal density on one model, input by input against dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from hf_sparse_attn.api import patch
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import Result, Row
from hf_sparse_attn.evaluation.run import (
    Trial,
    common_figures,
    dense_figures,
    dense_of,
    fitted,
    measured_density,
    profiles_within,
    settled,
)
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.observe import Call, observing
from hf_sparse_attn.shipped.byte_llama import default_metric

# Layers whose attention calls densities are fitted on and fidelity is measured on, spread over the model.
_LAYERS = 8


@dataclass(frozen=True)
class Subject:
    """A model with its inputs and figures.

    Args:
        name: of the model.
        setting: what is run, in words.
        model: what is patched and profiled.
        row: its fields besides those of Row are the names of the figures.
        calibration: batches to fit and profile with, of other inputs than those that are scored.
        correction: another one, by which densities are corrected.
        scored: inputs, of any kind.
        run: runs the model on a batch, with nothing that it does not need.
        output: what the model gives for an input.
        figures: how good an output is, by name, given the dense output of the same input.
    """

    name: str
    setting: str
    model: Any
    row: type[Row]
    calibration: Sequence[Any]
    correction: Any
    scored: Sequence[Any]
    run: Callable[[Any], object]
    output: Callable[[Any], Any]
    figures: Callable[[Any, Any], dict[str, float]]


@torch.no_grad()
def compare(subject: Subject, names: Sequence[str], densities: Sequence[float], profiled: bool) -> Result:
    """Scores the methods on a model.

    Args:
        subject: the model.
        names: methods, all with a knob.
        densities: kept shares of the visible pairs.
        profiled: also score the mix that the profiler chooses at each density.
    """
    begin = time.perf_counter()
    model, skipped = subject.model, dict[str, str]()
    calls = _captured(subject, subject.calibration[0])
    held_out = Reference(_captured(subject, subject.correction))
    dense = list(map(subject.output, subject.scored))
    whole = [subject.figures(out, out) for out in dense]

    def measure(method: Method) -> float:
        with patch(model, method, min_tokens=0) as applied:
            subject.run(subject.correction)
        return measured_density(applied)

    def run(method: Method) -> Trial:
        with patch(model, method, min_tokens=0) as applied:
            found = [subject.figures(subject.output(one), out) for one, out in zip(subject.scored, dense, strict=True)]
        paired = {name: Paired.of([one[name] for one in found], [one[name] for one in whole]) for name in whole[0]}
        return Trial(measured_density(applied), {**_means(found), "paired": paired})

    rows = [subject.row(**dense_figures(), **_means(whole))]
    contestants = fitted(names, densities, calls, measure, skipped, subject.name)
    metric = default_metric(subject.name)
    mixes = profiles_within(model, subject.calibration, metric, densities, skipped, measure) if profiled else ()
    for contestant in chain(contestants, mixes):
        rows.append(subject.row(**common_figures(*settled(contestant, run), held_out)))
    return Result(subject.name, subject.setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def relative_error(found: torch.Tensor, dense: torch.Tensor) -> float:
    """Norm of the difference over the norm of the dense tensor."""
    return float((found.double() - dense.double()).norm() / dense.double().norm())


def _means(found: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: fmean(one[name] for one in found) for name in found[0]}


def _captured(subject: Subject, batch: Any) -> list[Call]:
    """The attention calls of some layers in a dense run."""
    calls: list[Call] = []
    with observing(subject.model, lambda seen: calls.append(Call(seen.q, seen.k, seen.v, seen.ctx))):
        subject.run(batch)
    return calls[:: max(1, len(calls) // _LAYERS)]
