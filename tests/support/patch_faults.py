"""Ways in which a patch, or the trial of one, could go wrong, and what the trial of a class must say then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.session import Session
from tests.coverage import trial
from tests.coverage.trial import Trial

Patch = pytest.MonkeyPatch


def _outputs(patch: Patch, change: Callable[[Any, str], Any]) -> None:
    """Every output of the trial is changed, by its state."""
    output = Trial.output
    patch.setattr(Trial, "output", lambda self, model, state: change(output(self, model, state), state))


def wrong(patch: Patch) -> None:
    sparse = Session.sparse

    def off(self: Session, *args: Any, **kwargs: Any) -> Any:
        done = sparse(self, *args, **kwargs)
        return None if done is None else (done[0] * 1.001, done[1])

    patch.setattr(Session, "sparse", off)


def dense(patch: Patch) -> None:
    def never(self: Session, record: Any, *args: Any, **kwargs: Any) -> None:
        record.dense_reasons["because"] += 1

    patch.setattr(Session, "sparse", never)


def half(patch: Patch) -> None:
    sparse = Session.sparse

    def first(self: Session, record: Any, *args: Any, **kwargs: Any) -> Any:
        if record.index:
            record.dense_reasons["because"] += 1
            return None
        return sparse(self, record, *args, **kwargs)

    patch.setattr(Session, "sparse", first)


def idle(patch: Patch) -> None:
    known = trial.all_sparse
    patch.setattr(trial, "all_sparse", lambda layers, d: known([*layers, LayerRecord("other", 9).report(None)], d))


def left(patch: Patch) -> None:
    """The output changes with every forward after the first patch was removed."""
    seen: set[str] = set()

    def changed(out: Any, state: str) -> Any:
        seen.add(state)
        return out + 1.0 if state == "unpatched" and "sparse" in seen else out

    _outputs(patch, changed)


def restless(patch: Patch) -> None:
    _outputs(patch, lambda out, state: out + torch.rand(out.shape))


def bits(patch: Patch) -> None:
    _outputs(patch, lambda out, state: out + (1e-4 if state == "dense" else 0.0))


def infinite(patch: Patch) -> None:
    _outputs(patch, lambda out, state: out / 0)


def nothing(patch: Patch) -> None:
    """A short window that is none."""
    patch.setattr(trial, "LITTLE", trial.EVERYTHING["sliding_window"])


def crash(patch: Patch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no\n  such kernel")

    patch.setattr(Session, "sparse", refuse)


def empty(patch: Patch) -> None:
    patch.setattr(trial, "tensors_of", lambda out: iter(()))
    patch.setattr(trial, "main_tensor", lambda out: [])


# Those of every library.
FAULTS: dict[Callable[[Patch], None], str] = {
    wrong: "sliding_window of every key: its output is off by",
    dense: "no call ran sparse: because",
    left: "after the patch was removed its output differs",
    restless: "its output differs from run to run",
    bits: "patched with method dense its output differs",
    nothing: "attention has no part in its output",
    infinite: "its output is not finite",
    crash: "fails, sparse: RuntimeError: no such kernel",
    empty: "its output holds no tensor",
}
