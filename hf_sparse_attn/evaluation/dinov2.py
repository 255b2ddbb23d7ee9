"""Evaluation on DINOv2: how far the last hidden state, and the saliency made of it, are from dense on photographs."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from torch import Tensor

from hf_sparse_attn.evaluation.compare import Subject, compare
from hf_sparse_attn.evaluation.outputs import relative_error
from hf_sparse_attn.evaluation.result import Result, Row, difference
from hf_sparse_attn.pretrained import dinov2
from hf_sparse_attn.pretrained.images import CALIBRATION, images

# Side of a photograph in pixels, and photographs to score, where nothing is said: 3,137 tokens.
SIZE, PHOTOGRAPHS = 784, 4


@dataclass(frozen=True)
class DINOv2Row(Row):
    """See Row.

    Args:
        state_error: relative error of the last hidden state.
        saliency: mean absolute difference of the saliency, which is in [0, 1].
    """

    state_error: float
    saliency: float

    columns: ClassVar[Sequence[tuple[str, Callable[[Any], str]]]] = (
        ("state error", lambda row: difference(row, "state_error", 3)),
        ("saliency off by", lambda row: difference(row, "saliency", 3)),
    )
    plots: ClassVar[Sequence[tuple[str, str, bool]]] = (
        ("state_error", "relative error of the last hidden state", False),
        ("saliency", "mean difference of saliency", False),
        ("recall", "attention recall", True),
        ("output_error", "relative output error", False),
    )


class _Looked(NamedTuple):
    hidden: Tensor
    saliency: Tensor


def evaluate(
    args: argparse.Namespace, names: Sequence[str], densities: Sequence[float], profiled: bool, output: Path | None
) -> Result:
    """Scores the methods on DINOv2-small in float32.

    Args:
        args: `size`, `inputs` and `profile` of the command, each None for the default.
        names, densities, profiled: as in `compare`.
        output: unused; this model has no picture of its own.

    Raises:
        ValueError: `size` is no multiple of a patch.
        MissingExtra: the packages of the extra `real` are not installed.
    """
    size, count = args.size or SIZE, args.inputs or PHOTOGRAPHS
    first, second, third = ({"pixel_values": dinov2.pixels(image, size)} for image in images(3, names=CALIBRATION))
    model, decoder = dinov2.load_model(), dinov2.load_decoder()

    def output_of(pixels: Tensor) -> _Looked:
        hidden = model(pixel_values=pixels).last_hidden_state
        return _Looked(hidden, decoder(hidden))

    def figures(looked: _Looked, dense: _Looked) -> dict[str, float]:
        off = float((looked.saliency - dense.saliency).abs().mean())
        return {"state_error": relative_error(looked.hidden, dense.hidden), "saliency": off}

    tokens = 1 + (size // dinov2.PATCH) ** 2
    return compare(
        Subject(
            name="dinov2",
            setting=f"DINOv2-small, {count} held-out photographs of {size} pixels ({tokens} tokens)",
            model=model,
            row=DINOv2Row,
            calibration=[first, second],
            correction=third,
            scored=[dinov2.pixels(image, size) for image in images(count)],
            run=lambda batch: model(**batch),
            output=output_of,
            figures=figures,
        ),
        names, densities, profiled, args.profile,
    )  # fmt: skip
