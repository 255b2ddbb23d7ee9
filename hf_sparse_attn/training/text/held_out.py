"""Text that a recipe evaluates on: the check of its settings, opening it, and figures on it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.text.data import TextData, TextSample, TextSettings, open_text
from hf_sparse_attn.training.text.source import shared_text

# Sources that come apart into text to train on and text to evaluate on.
SPLIT_SOURCES = frozenset({"needles", "standard_library"})


def held_out_settings(data: TextSettings, held_out: TextSettings | None) -> TextSettings:
    """The settings of text to evaluate on: those given, or the held-out part of a source that comes with the package.

    Args:
        data: of the text that is trained on.
        held_out: as the recipe has it.

    Raises:
        ValueError: `held_out` is None for text that does not come with the package.
    """
    if held_out is None and data.source not in SPLIT_SOURCES:
        raise ValueError(f"`held_out` must be given for text of one's own, got none for {data.source!r}")
    return held_out or replace(data, split="heldout")


def open_held_out(
    settings: TextSettings,
    trained: TextSettings,
    samples: int,
    tokenizer: Any,
    *,
    seed: int,
    cache: Path,
    run: Run | None = None,
) -> TextData:
    """Opens text to evaluate on, of which there must be so many samples.

    Args:
        settings, tokenizer, seed, cache, run: as `open_text` takes them.
        trained: of the text that is trained on.
        samples: as `evaluation_samples` of a recipe.

    Raises:
        ValueError: there are fewer, or some of it is trained on; or as `open_text`.
    """
    shared = shared_text(trained, settings)
    if shared is not None:
        raise ValueError(f"`held_out` must be other text than `data`, got {shared} in both")
    found = open_text(settings, tokenizer, seed=seed, cache=cache, run=run)
    if len(found) < samples:
        raise ValueError(
            f"`evaluation_samples` must be at most {len(found)}, the held-out samples of {settings.length} tokens, "
            f"got {samples}"
        )
    return found


class HeldOutScores:
    """Loss and answers over samples; no more logits are in memory than those of a chunk of positions.

    Args:
        parts: the model, patched or not.
        chunk: positions whose logits are in memory at once; None takes as many as have 2**26 numbers.
    """

    def __init__(self, parts: CausalParts, chunk: int | None = None) -> None:
        self.parts, self.chunk = parts, parts.positions if chunk is None else chunk
        self.loss = self.weight = 0.0
        self.answered: list[bool] = []

    def add(self, batch: TextSample, hidden: Tensor, answers: list[list[int]]) -> None:
        """Counts a sample.

        Args:
            batch: the sample, [1, length].
            hidden: what the model makes of it, [1, length, width].
            answers: for each answer the positions that choose its tokens; all must be right.
        """
        self.loss += float(self.parts.loss(batch.ids, batch.weights, hidden, self.chunk))
        # Nothing predicts the first token.
        self.weight += float(batch.weights[:, 1:].sum())
        if answers:
            places = torch.tensor([place for answer in answers for place in answer], device=hidden.device)
            told = [self.parts.logits(hidden[:, part])[0].argmax(-1) for part in places.split(self.chunk)]
            right = torch.cat(told) == batch.ids[0, places + 1]
            self.answered += [bool(part.all()) for part in right.cpu().split([len(answer) for answer in answers])]

    def figures(self) -> dict[str, float]:
        """`loss` in nats per token and, where samples have answers, `needles`, the share of them that is right."""
        needles = {"needles": sum(self.answered) / len(self.answered)} if self.answered else {}
        return {"loss": self.loss / self.weight} | needles


@torch.no_grad()
def held_out_figures(
    parts: CausalParts, data: TextData, samples: int, device: torch.device, chunk: int | None = None
) -> dict[str, float]:
    """Figures over the first samples; see HeldOutScores. The loss of documents with needles is that of their code.

    Args:
        parts: the model, patched or not.
        data: held-out text.
        samples: how many are read.
        device: of the model.
        chunk: as HeldOutScores takes it.
    """
    scores = HeldOutScores(parts, chunk)
    for index in range(samples):
        sample, answers = data.scored(index)
        batch = TextSample(sample.ids[None].to(device), sample.weights[None].to(device))
        scores.add(batch, parts.hidden(batch.ids), answers)
    return scores.figures()
