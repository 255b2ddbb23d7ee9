"""LayerRecord: what one patched attention layer did, and what is known of its calls before they are looked at."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from hf_sparse_attn.cost.judge import Prediction, describe
from hf_sparse_attn.decision import Decision
from hf_sparse_attn.report import Decoding, LayerReport, Pairs

# Threads that run one model count in one record, and what they add must not get lost between reading and writing.
_COUNTING = threading.Lock()


class Work(NamedTuple):
    """What there is to compute in a call.

    Args:
        pairs: visible pairs of query and key, over batch rows and query heads.
        decoding: whether there are too few queries for sparse attention, as where text is generated.
    """

    pairs: int = 0
    decoding: bool = False

    @classmethod
    def of(cls, q: Tensor, keys: int, causal: bool, min_queries: int, window: int | None = None) -> Work:
        """The work of queries `q` [batch, heads, q_len, dim] that are the last of so many keys.

        Args:
            q, keys: the call.
            causal: whether a query sees only the keys up to its own.
            min_queries: fewer are decoding.
            window: keys that a causal query sees at most.
        """
        queries = q.shape[2]
        pairs = queries * keys
        if causal:
            pairs = _seen(keys, window) - _seen(keys - queries, window)
        return cls(q.shape[0] * q.shape[1] * pairs, queries < min_queries)


def _seen(tokens: int, window: int | None) -> int:
    """Pairs of the first so many tokens with what each of them sees."""
    tokens = max(0, tokens)
    near = tokens if window is None else min(tokens, window)
    return near * (near + 1) // 2 + (tokens - near) * near


class Done(NamedTuple):
    """What one sequence gave: output, log-sum-exp, density and predicted gain; and what there was to compute.

    Sequences of which that is not told weigh alike.
    """

    out: Tensor
    lse: Tensor
    density: float | Tensor
    gain: float
    work: Work = Work(1)


@dataclass
class Decoded:
    """Sums over the decoding calls of one kind: pairs that were visible, and those that were kept of them."""

    calls: int = 0
    visible: int = 0
    kept: float | Tensor = 0.0
    pages: int = 0
    gain_sum: float = 0.0
    backends: Counter[str] = field(default_factory=Counter)

    def report(self) -> Decoding:
        """The sums as they stand; waits for a GPU."""
        density = float(self.kept) / self.visible if self.visible else 1.0
        gain = self.gain_sum / self.calls if self.gain_sum else None
        return Decoding(self.calls, density, self.pages, gain, dict(self.backends), self.visible)


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
    # Pairs of queries and keys, of prefill and of decoding: all visible ones, those of sparse calls, and those which
    # were kept of them: a 0-d tensor on a GPU, for which no call waits.
    visible: list[int] = field(default_factory=lambda: [0, 0])
    sparse: list[int] = field(default_factory=lambda: [0, 0])
    kept: list[float | Tensor] = field(default_factory=lambda: [0.0, 0.0])
    gain_sum: float = 0.0
    # Calls that are dense by prediction: number and sums of what was predicted, by kind and origin of the table.
    losses: dict[tuple[str, str], tuple[int, Prediction]] = field(default_factory=dict)
    # What was decided for all calls of a shape; see decision.by_shape.
    by_shape: dict[Any, Decision] = field(default_factory=dict)
    # Sparse calls that are still to be measured, and what was measured: seconds sparse and dense.
    to_measure: int = 0
    measured: list[tuple[float, float]] = field(default_factory=list)
    # Of a run that is timed: it is sparse whatever is predicted.
    on_trial: bool = False
    # A layer whose pattern is the model's own, so that it has nothing to leave out; listed last in reports.
    exact: bool = False
    exact_calls: int = 0
    segments: int = 0
    # Steps of generated text by what chose the keys, apart from the calls above.
    decoded: dict[str, Decoded] = field(default_factory=dict)

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
        """Counts one sparse call; its predicted gain is the mean over its sequences."""
        gain = sum(d.gain for d in done) / len(done)
        with _COUNTING:
            self.sparse_calls += 1
            self.gain_sum += gain
            for _, _, density, _, (pairs, decoding) in done:
                self.visible[decoding] += pairs
                self.sparse[decoding] += pairs
                self.kept[decoding] = self.kept[decoding] + density * pairs

    def count_decode(
        self, kind: str, work: Work, kept: float | Tensor, backend: str, pages: int = 0, gain: float = 0.0
    ) -> None:
        """Counts one decoding call that was run here: it is neither sparse nor dense, and is reported by itself.

        Args:
            kind: name of the method that chose the keys; "exact" where all are read.
            work: what there was to compute.
            kept: share of the visible pairs that was computed; a 0-d tensor on a GPU, which is not waited for.
            backend: what ran.
            pages: pages of the cache that were read, over batch rows and lists; 0 where it is not read by pages.
            gain: predicted seconds of all keys on the same path over those of the call; 0 where nobody predicts.
        """
        with _COUNTING:
            found = self.decoded.setdefault(kind, Decoded())
            found.calls += 1
            found.visible += work.pairs
            found.kept = found.kept + kept * work.pairs
            found.pages += pages
            found.gain_sum += gain
            found.backends[backend] += 1

    def count_dense(self, decision: Decision, work: Work | None = None) -> None:
        """Counts one dense call, whose work is None where it is unknown.

        Those by prediction are counted together, whatever their numbers.
        """
        reason = decision.reason
        if work is not None:
            with _COUNTING:
                self.visible[work.decoding] += work.pairs
        if isinstance(reason, str):
            self.count(self.dense_reasons, reason)
        elif reason is not None:
            key = reason.kind, decision.origin
            with _COUNTING:
                n, sums = self.losses.get(key, (0, Prediction(0.0, 0.0, 0.0)))
                added = (a + b for a, b in zip(sums, reason.prediction, strict=True))
                self.losses[key] = n + 1, Prediction(*added)

    def report(self, requested: float | None) -> LayerReport:
        """The record as it stands."""
        reasons = dict(self.dense_reasons)
        for (kind, origin), (n, sums) in self.losses.copy().items():
            reasons[describe(kind, Prediction(*(x / n for x in sums)), origin)] = n
        sparse, dense = (sum(times) for times in zip(*self.measured, strict=True)) if self.measured else (0.0, 0.0)
        calls = self.sparse_calls
        kept = [float(pairs) for pairs in self.kept]
        computed = [k + visible - sparse for k, visible, sparse in zip(kept, self.visible, self.sparse, strict=True)]
        decoded = {kind: (found.visible, found.report()) for kind, found in self.decoded.copy().items()}
        computed[1] += sum(visible * found.density for visible, found in decoded.values())
        return LayerReport(
            layer=self.index,
            name=self.name,
            sparse_calls=calls,
            dense_calls=sum(reasons.values()),
            backends=dict(self.backends),
            requested_density=requested,
            density=sum(kept) / sum(self.sparse) if any(self.sparse) else None,
            predicted_gain=self.gain_sum / calls if calls and self.gain_sum else None,
            measured_gain=dense / sparse if self.measured else None,
            reasons=reasons,
            exact_calls=self.exact_calls,
            segments=self.segments,
            partly_dense=dict(self.partly_dense),
            prefill=Pairs(computed[0], self.visible[0]),
            decode=Pairs(computed[1], self.visible[1] + sum(visible for visible, _ in decoded.values())),
            decoding={kind: found for kind, (_, found) in decoded.items()},
        )
