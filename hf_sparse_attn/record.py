"""LayerRecord: what one patched attention layer did, and what is known of its calls before they are looked at."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hf_sparse_attn.cost.judge import PAUSED, Loss, Prediction, describe
from hf_sparse_attn.report import LayerReport

# Threads that run one model count in one record, and what they add must not get lost between reading and writing.
_COUNTING = threading.Lock()
# Shapes of calls that are kept in mind.
KEPT_SHAPES = 256


class Done(NamedTuple):
    """What one sequence gave: output, log-sum-exp, density and predicted gain."""

    out: Tensor
    lse: Tensor
    density: float | Tensor
    gain: float


@dataclass
class LayerRecord:
    """What one attention layer did so far."""

    name: str
    index: int
    sparse_calls: int = 0
    dense_reasons: Counter[str] = field(default_factory=Counter)
    # Reasons for which some heads of a sparse call were dense.
    partly_dense: Counter[str] = field(default_factory=Counter)
    backends: Counter[str] = field(default_factory=Counter)
    # A 0-d tensor on a GPU, for which no call waits.
    density_sum: float | Tensor = 0.0
    gain_sum: float = 0.0
    # Calls that are dense by prediction: number and sums of what was predicted, by kind and origin of the table.
    losses: dict[tuple[str, str], tuple[int, Prediction]] = field(default_factory=dict)
    # Shapes at which every call is dense, and why: where the host knows nothing else, that is all there is to decide.
    always_dense: dict[Any, tuple[str | Loss, str]] = field(default_factory=dict)
    # Shapes at which the method is not asked in the next calls, and in how many.
    paused: dict[Any, int] = field(default_factory=dict)
    # Sparse calls that are still to be measured, and what was measured: seconds sparse and dense.
    to_measure: int = 0
    measured: list[tuple[float, float]] = field(default_factory=list)
    # Of a run that is timed: it is sparse whatever is predicted, and teaches nothing.
    on_trial: bool = False
    # A layer whose pattern is the model's own, so that it has nothing to leave out; listed last in reports.
    exact: bool = False
    exact_calls: int = 0
    segments: int = 0

    @staticmethod
    def count(counter: Counter[str], name: str, times: int = 1) -> None:
        """Counts in one of the counters of a record."""
        with _COUNTING:
            counter[name] += times

    def count_exact(self, segments: int, runs: int, backend: str) -> None:
        """Counts one call whose `segments` of tokens, which never saw one another, ran in `runs` of `backend`."""
        with _COUNTING:
            self.exact_calls += 1
            self.segments += segments
            self.backends[backend] += runs

    def count_sparse(self, done: Sequence[Done]) -> None:
        """Counts one sparse call; its density and predicted gain are the means over its sequences."""
        density, gain = (sum(values) / len(done) for values in zip(*((d.density, d.gain) for d in done), strict=True))
        with _COUNTING:
            self.sparse_calls += 1
            self.density_sum = self.density_sum + density
            self.gain_sum += gain

    def dense_at_once(self, shape: Any, steady: bool = False) -> bool:
        """Whether a call of this shape is known to be dense; it is then counted. Pauses are not for `steady` calls."""
        known = self.always_dense.get(shape)
        if known is None:
            left = 0 if steady else self.paused.get(shape, 0)
            if not left:
                return False
            self.paused[shape] = left - 1
            known = PAUSED, ""
        self.count_dense(*known)
        return True

    def count_dense(self, reason: str | Loss, origin: str = "") -> None:
        """Counts one dense call; those by prediction are counted together, whatever their numbers."""
        if isinstance(reason, str):
            self.count(self.dense_reasons, reason)
            return
        key = reason.kind, origin
        with _COUNTING:
            n, sums = self.losses.get(key, (0, Prediction(0.0, 0.0, 0.0)))
            self.losses[key] = n + 1, Prediction(*(a + b for a, b in zip(sums, reason.prediction, strict=True)))

    def report(self, requested: float | None) -> LayerReport:
        """The record as it stands."""
        reasons = dict(self.dense_reasons)
        for (kind, origin), (n, sums) in self.losses.items():
            reasons[describe(kind, Prediction(*(x / n for x in sums)), origin)] = n
        sparse, dense = (sum(times) for times in zip(*self.measured, strict=True)) if self.measured else (0.0, 0.0)
        calls = self.sparse_calls
        return LayerReport(
            layer=self.index,
            name=self.name,
            sparse_calls=calls,
            dense_calls=sum(reasons.values()),
            backends=dict(self.backends),
            requested_density=requested,
            density=float(self.density_sum) / calls if calls else None,
            predicted_gain=self.gain_sum / calls if calls else None,
            measured_gain=dense / sparse if self.measured else None,
            reasons=reasons,
            exact_calls=self.exact_calls,
            segments=self.segments,
            partly_dense=dict(self.partly_dense),
        )
