"""What the evaluations on real weights share: methods at equal density on one model, input by input against dense."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from hf_sparse_attn.api import patch
from hf_sparse_attn.evaluation.any_model import as_it_is, load_profile
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.outputs import captured
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import Result, Row
from hf_sparse_attn.evaluation.run import (
    Contestant,
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
from hf_sparse_attn.shipped.byte_llama import default_metric

# Attention calls, spread over the model, that densities are fitted on and fidelity is measured on.
_CALLS = 8


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
def compare(
    subject: Subject, names: Sequence[str], densities: Sequence[float], profiled: bool, profile: str | None = None
) -> Result:
    """Scores the methods on a model.

    Args:
        subject: the model.
        names: methods, all with a knob.
        densities: kept shares of the visible pairs.
        profiled: also score the mix that the profiler chooses at each density.
        profile: folder or Hub id of a head profile to score in its place.

    Raises:
        ValueError: `profile` is none, or one of another model.
    """
    begin = time.perf_counter()
    model, skipped = subject.model, dict[str, str]()
    known = None if profile is None else load_profile(profile)
    if known is not None:
        known.check(model)
    calls = captured(model, lambda: subject.run(subject.calibration[0]), _CALLS)
    held_out = Reference(captured(model, lambda: subject.run(subject.correction), _CALLS))
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
    own: Iterable[Contestant] = ()
    if known is not None:
        own = [as_it_is(str(profile), known)]
    elif profiled:
        metric = default_metric(subject.name)
        own = profiles_within(model, subject.calibration, metric, densities, skipped, measure)
    for contestant in chain(contestants, own):
        rows.append(subject.row(**common_figures(*settled(contestant, run), held_out)))
    return Result(subject.name, subject.setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def _means(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: fmean(one[name] for one in found) for name in found[0]}
