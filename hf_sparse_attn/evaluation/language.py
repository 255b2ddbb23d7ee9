"""Evaluation on the shipped byte-level Llama: next-byte loss and needles of held-out documents."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import Result, Row, difference
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
from hf_sparse_attn.profiling.observe import Call, capture
from hf_sparse_attn.shipped.byte_llama import default_metric, load_model
from hf_sparse_attn.shipped.corpus import NeedleDocument, needle_document, next_byte_loss, score_needles

NEEDLES = 8
# Bytes of a document where nothing is said.
TOKENS = 4096
# Documents to fit densities on and to profile with, from other modules than those that are scored.
CALIBRATION_SEEDS = (0, 1)
# Of the document by which densities are corrected.
_CORRECTION_SEED = 2
METRIC = default_metric("byte_llama")
# Seeds of the documents that are scored begin here.
_FIRST_SEED = 1000


@dataclass(frozen=True)
class LanguageRow(Row):
    """See Row.

    Args:
        loss: next-byte loss on code, in nats.
        by_depth: share of needles answered at each depth, from the start of the document to its end.
    """

    loss: float
    by_depth: tuple[float, ...]

    @property
    def needles(self) -> float:
        """Share of needles answered."""
        return sum(self.by_depth) / len(self.by_depth)

    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = (
        ("loss", lambda row: f"{row.loss:.3f}"),
        ("over dense", lambda row: difference(row, "loss")),
        ("needles", lambda row: f"{row.needles:.2f}"),
        ("% by depth", lambda row: " ".join(f"{share:.0%}"[:-1] for share in row.by_depth)),
    )
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = (
        ("loss", "next-byte loss (nats)", False),
        ("needles", "needles answered", True),
        ("recall", "attention recall", True),
        ("output_error", "relative output error", False),
    )


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores the methods on the shipped language model.

    Args:
        args: `tokens`, `documents` and `device` of the command.
        names: methods, all with a knob.
        densities: kept shares of the visible pairs.
        profiled: also score the mix that the profiler chooses at each density.
        output: unused; this model has no picture of its own.
    """
    if args.documents < 1:
        raise ValueError(f"`documents` must be at least 1, got {args.documents}")
    tokens = args.tokens or TOKENS
    begin = time.perf_counter()
    model = load_model()
    calibration = [needle_document(tokens, NEEDLES, seed, "train") for seed in CALIBRATION_SEEDS]
    correction = needle_document(tokens, NEEDLES, _CORRECTION_SEED, "train")
    scored = [needle_document(tokens, NEEDLES, _FIRST_SEED + i) for i in range(args.documents)]
    calls = captured(model, calibration[0])
    held_out = Reference(captured(model, scored[0]))
    skipped: dict[str, str] = {}

    @torch.no_grad()
    def read(document: NeedleDocument) -> tuple[float, list[bool]]:
        """Loss, and whether the needles are answered by depth, whatever their order in the document's list."""
        logits = model(document.token_ids, use_cache=False).logits
        answers = zip(document.needles, score_needles(logits, document), strict=True)
        return next_byte_loss(logits, document), [ok for _, ok in sorted(answers, key=lambda item: item[0].depth)]

    def measure(method: Method) -> float:
        with patch(model, method, min_tokens=0) as applied, torch.no_grad():
            model(correction.token_ids, use_cache=False, logits_to_keep=1)
        return measured_density(applied)

    def figures(losses: Sequence[float], right: Sequence[Sequence[bool]]) -> dict[str, Any]:
        by_depth = tuple(sum(column) / len(column) for column in zip(*right, strict=True))
        return {"loss": sum(losses) / len(losses), "by_depth": by_depth}

    dense_losses, dense_right = zip(*map(read, scored), strict=True)
    rows: list[Row] = [LanguageRow(**figures(dense_losses, dense_right), **dense_figures())]

    def run(method: Method) -> Trial:
        with patch(model, method, min_tokens=0) as applied:
            losses, right = zip(*map(read, scored), strict=True)
        paired = {"loss": Paired.of(losses, dense_losses)}
        paired["needles"] = Paired.of(*([sum(r) / len(r) for r in found] for found in (right, dense_right)))
        return Trial(measured_density(applied), {**figures(losses, right), "paired": paired})

    found = fitted(names, densities, calls, measure, skipped, "language")
    own: Iterable[Contestant] = ()
    if args.profile is not None:
        own = [saved(args.profile, model)]
    elif profiled:
        own = profiles(model, calibration, densities, skipped, measure)
    for contestant in chain(found, own):
        rows.append(LanguageRow(**common_figures(*settled(contestant, run), held_out)))
    setting = (
        f"shipped byte-level Llama, {args.documents} held-out documents of {tokens} bytes, {NEEDLES} needles each"
    )
    return Result("language", setting, dense_of(model), rows, skipped, time.perf_counter() - begin)


def profiles(
    model: nn.Module, documents: Sequence[NeedleDocument], densities: Sequence[float], skipped: dict[str, str],
    measure: Measure,
) -> Iterator[Contestant]:  # fmt: skip
    """A mix for each density, all from one measurement on documents that are not scored; see profiles_within."""
    return profiles_within(model, list(map(profile_batch, documents)), METRIC, densities, skipped, measure)


def profile_batch(document: NeedleDocument) -> dict[str, Any]:
    """A document as the profiler wants it, with the positions that ask and those that know the answer."""
    return {"input_ids": document.token_ids, "needles": document.questions}


def captured(model: nn.Module, document: NeedleDocument) -> list[Call]:
    """The attention calls of a dense forward, layer by layer."""
    return list(capture(model, document.token_ids).values())
