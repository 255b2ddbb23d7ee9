"""Evaluation on the encoder of Whisper: how far its last hidden state is from dense, and what is understood."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hf_sparse_attn.evaluation.compare import Subject, compare
from hf_sparse_attn.evaluation.outputs import relative_error
from hf_sparse_attn.evaluation.result import Result, Row, difference
from hf_sparse_attn.pretrained import speech, whisper

# Sentences to score where nothing is said.
SENTENCES = 10


@dataclass(frozen=True)
class WhisperRow(Row):
    """See Row.

    Args:
        state_error: relative error of the encoder's last hidden state.
        word_error: words that are wrong, missing or too many, as a share of those said.
    """

    state_error: float
    word_error: float

    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = (
        ("state error", lambda row: difference(row, "state_error", 3)),
        ("word error", lambda row: f"{row.word_error:.3f}"),
        ("over dense", lambda row: difference(row, "word_error", 3)),
    )
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = (
        ("state_error", "relative error of the encoder", False),
        ("word_error", "word error", False),
        ("recall", "attention recall", True),
        ("output_error", "relative output error", False),
    )


class _Spoken(NamedTuple):
    sentence: str
    features: Tensor


class _Heard(NamedTuple):
    hidden: Tensor
    word_error: float


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores the methods on the encoder of Whisper tiny.en in float32, the decoder as it is.

    Args:
        args: `inputs` and `profile` of the command, each None for the default.
        names, densities, profiled: as in `compare`.
        output: unused; this model has no picture of its own.

    Raises:
        MissingExtra: the packages of the extra `real` are not installed.
    """
    count = args.inputs or SENTENCES
    model, tokenizer, extractor = whisper.load_model(), whisper.load_tokenizer(), whisper.load_extractor()
    encoder = model.model.encoder

    def spoken(sentence: str) -> _Spoken:
        wave = speech.speak(sentence)
        return _Spoken(sentence, extractor(wave, sampling_rate=speech.RATE, return_tensors="pt").input_features)

    def output_of(said: _Spoken) -> _Heard:
        hidden = encoder(said.features).last_hidden_state
        understood = whisper.transcribe(model, tokenizer, said.features)
        return _Heard(hidden, speech.word_error(said.sentence, understood))

    def figures(heard: _Heard, dense: _Heard) -> dict[str, float]:
        return {"state_error": relative_error(heard.hidden, dense.hidden), "word_error": heard.word_error}

    first, second, third, *_ = ({"input_features": spoken(one).features} for one in speech.calibration_sentences)
    return compare(
        Subject(
            name="whisper",
            setting=f"encoder of Whisper tiny.en, {count} sentences of synthesised speech (1500 tokens)",
            model=encoder,
            row=WhisperRow,
            calibration=[first, second],
            correction=third,
            scored=list(map(spoken, islice(cycle(speech.sentences), count))),
            run=lambda batch: encoder(**batch),
            output=output_of,
            figures=figures,
        ),
        names, densities, profiled, args.profile,
    )  # fmt: skip
