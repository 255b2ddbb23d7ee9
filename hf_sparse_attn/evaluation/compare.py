"""Methods at equal density on one model, input by input against dense: what evaluations share."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch

from hf_sparse_attn.api import patch
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.outputs import captured
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import PROFILED, Result, Row
from hf_sparse_attn.evaluation.run import (
    Contestant,
    Measure,
    Trial,
    common_figures,
    dense_figures,
    dense_of,
    fitted,
    measured_density,
    profiles_within,
    saved,
    settled,
)
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.shipped.byte_llama import default_metric

# Attention calls, spread over the model, that densities are fitted on and fidelity is measured on.
_CALLS = 12


@dataclass(frozen=True)
class Subject:
    """A model with its inputs and figures.

    Args:
        name: of the model.
        setting: what is run, in words, or what says it of the attention calls that were seen.
        model: what is patched and profiled.
        row: makes a row of the figures by name, and of the fields of Row.
        calibration: batches to fit and profile with, of other inputs than those that are scored.
        correction: another one, by which densities are corrected.
        scored: inputs, of any kind.
        run: runs the model on a batch, with nothing that it does not need.
        output: what the model gives for an input.
        figures: how good an output is, by name, given what is kept of the dense output of the same input.
        one_sided: figures that say by themselves how far sparse is from dense, and of which dense has none to compare.
        kept: what is kept of a dense output.
    """

    name: str
    setting: str | Callable[[Sequence[Call]], str]
    model: Any
    row: Callable[..., Row]
    calibration: Sequence[Any]
    correction: Any
    scored: Sequence[Any]
    run: Callable[[Any], object]
    output: Callable[[Any], Any]
    figures: Callable[[Any, Any], dict[str, float]]
    one_sided: Collection[str] = ()
    kept: Callable[[Any], Any] = lambda out: out


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
    known = None if profile is None else saved(profile, model)
    calls = captured(model, lambda: subject.run(subject.calibration[0]), _CALLS)
    held_out = Reference(captured(model, lambda: subject.run(subject.correction), _CALLS))
    dense, whole = [], []
    for one in subject.scored:
        out = subject.output(one)
        dense.append(subject.kept(out))
        whole.append(subject.figures(out, dense[-1]))

    def measure(method: Method) -> float:
        with patch(model, method, min_tokens=0) as applied:
            subject.run(subject.correction)
        return measured_density(applied)

    def run(method: Method) -> Trial:
        with patch(model, method, min_tokens=0) as applied:
            found = [subject.figures(subject.output(one), out) for one, out in zip(subject.scored, dense, strict=True)]
        paired = {}
        for name in whole[0]:
            before = None if name in subject.one_sided else [one[name] for one in whole]
            paired[name] = Paired.of([one[name] for one in found], before)
        return Trial(measured_density(applied), {**_means(found), "paired": paired})

    rows = [subject.row(**dense_figures(), **_means(whole))]
    contestants = fitted(names, densities, calls, measure, skipped, subject.name)
    own: Iterable[Contestant] = ()
    if known is not None:
        own = [known]
    elif profiled:
        own = _mixes(subject, densities, skipped, measure)
    for contestant in chain(contestants, own):
        rows.append(subject.row(**common_figures(*settled(contestant, run), held_out)))
    setting = subject.setting if isinstance(subject.setting, str) else subject.setting(calls)
    return Result(subject.name, setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def _mixes(
    subject: Subject, densities: Sequence[float], skipped: dict[str, str], measure: Measure
) -> Iterable[Contestant]:
    """What the profiler chooses; a model of several parts has no profile as a whole, which is said."""
    try:
        Fingerprint.of(subject.model)
    except ValueError as error:
        skipped[PROFILED] = str(error)
        return ()
    metric = default_metric(subject.name)
    return profiles_within(subject.model, subject.calibration, metric, densities, skipped, measure)


def _means(found: Sequence[dict[str, float]]) -> dict[str, Any]:
    return {name: fmean(one[name] for one in found) for name in found[0]}
