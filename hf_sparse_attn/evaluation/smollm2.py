"""Evaluation on SmolLM2: loss, divergence from dense and needles in held-out texts."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.evaluation.compare import Subject, compare
from hf_sparse_attn.evaluation.result import Result, Row, difference
from hf_sparse_attn.pretrained import smollm2, texts
from hf_sparse_attn.profiling.inputs import DTYPES

NEEDLES = 8
# Tokens of a text and texts to score where nothing is said.
TOKENS, TEXTS = 2048, 4
# Positions of a text at which the divergence is measured: the logits of all would fill the memory.
_POSITIONS = 256


@dataclass(frozen=True)
class SmolLM2Row(Row):
    """See Row.

    Args:
        loss: of the next token of the text, in nats.
        kl: divergence of dense from sparse predictions, KL(dense || sparse), in nats.
        needles: share of needles answered.
    """

    loss: float
    kl: float
    needles: float

    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = (
        ("loss", lambda row: f"{row.loss:.3f}"),
        ("over dense", lambda row: difference(row, "loss")),
        ("KL to dense", lambda row: f"{row.kl:.4f}"),
        ("needles", lambda row: f"{row.needles:.2f}"),
        ("over dense", lambda row: difference(row, "needles", 2)),
    )
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = (
        ("loss", "next-token loss (nats)", False),
        ("kl", "KL to dense (nats)", False),
        ("needles", "needles answered", True),
        ("recall", "attention recall", True),
    )


class _Read(NamedTuple):
    loss: float
    answered: list[bool]
    log_p: Tensor


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores the methods on SmolLM2.

    Args:
        args: `tokens`, `inputs` and `profile` of the command, each None for the default; and `dtype`, of which
            "auto" is bfloat16.
        names, densities, profiled: as in `compare`.
        output: unused; this model has no picture of its own.

    Raises:
        ValueError: a text of `tokens` cannot be had.
        MissingExtra: the packages of the extra `real` are not installed.
    """
    tokens, count = args.tokens or TOKENS, args.inputs or TEXTS
    tokenizer = smollm2.load_tokenizer()
    # More texts than there are: the same with other needles.
    fitted, other, third = _documents(tokenizer, texts.CALIBRATION, 3, tokens)
    scored = _documents(tokenizer, texts.HELD_OUT, count, tokens)
    dtype: Any = torch.bfloat16 if args.dtype == "auto" else DTYPES[args.dtype]
    model = smollm2.load_model(dtype)

    def output_of(document: texts.NeedleDocument) -> _Read:
        logits = model(document.token_ids, use_cache=False).logits
        places = torch.linspace(0, document.questions_at - 1, _POSITIONS).long()
        return _Read(document.loss(logits), document.answered(logits), logits[0, places].float().log_softmax(-1))

    return compare(
        Subject(
            name="smollm2",
            setting=f"SmolLM2-135M in {str(dtype).removeprefix('torch.')}, {count} held-out texts of {tokens} tokens, "
            f"{NEEDLES} needles each",
            model=model,
            row=SmolLM2Row,
            calibration=[fitted.batch, other.batch],
            correction=third.batch,
            scored=scored,
            run=lambda batch: model(batch["input_ids"], use_cache=False, logits_to_keep=1),
            output=output_of,
            figures=_figures,
        ),
        names, densities, profiled, args.profile,
    )  # fmt: skip


def _documents(tokenizer: Any, source: Any, count: int, tokens: int) -> list[texts.NeedleDocument]:
    chosen = islice(cycle(source.values()), count)
    return [texts.needle_document(tokenizer, text, tokens, NEEDLES, seed) for seed, text in enumerate(chosen)]


def _figures(read: _Read, dense: _Read) -> dict[str, float]:
    kl = (dense.log_p.exp() * (dense.log_p - read.log_p)).sum(-1).double().mean()
    return {"loss": read.loss, "kl": float(kl), "needles": sum(read.answered) / len(read.answered)}
