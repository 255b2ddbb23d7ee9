"""Language models for recipe distill_sparse: next-token distributions that are matched, and needles."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_sparse_attn.chunked_loss import CausalParts, chunked_cross_entropy, in_chunks
from hf_sparse_attn.corpus import score_needles
from hf_sparse_attn.language_model import load_language_model
from hf_sparse_attn.matching import AttentionMatch, divergence, layer_figures
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_text import (
    SPLIT_SOURCES,
    NeedleData,
    TextData,
    TextSample,
    TextSettings,
    open_text,
    sample_order,
)

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.distill_sparse import DistillSparse, Mode


class LanguageStudent:
    """A causal language model and text; see distill_sparse.Student."""

    def __init__(self, recipe: DistillSparse, settings: TextSettings, run: Run) -> None:
        self.recipe, self.device = recipe, run.device
        loaded = load_language_model(recipe.model, recipe.torch_dtype, run.device)
        self.model: nn.Module = loaded[0]
        tokenizer = loaded[1]

        def opened(settings: TextSettings) -> TextData:
            return open_text(settings, tokenizer, seed=recipe.seed, cache=run.output / "cache", run=run)

        self.data = opened(settings)
        # The last samples of text that has no held-out part are not trained on.
        self.kept = 0
        if recipe.held_out is None and settings.source not in SPLIT_SOURCES:
            self.held_out, self.kept = self.data, recipe.evaluation_samples
        else:
            self.held_out = opened(recipe.held_out or replace(settings, split="heldout"))
        if len(self.held_out) < recipe.evaluation_samples + (self.kept > 0):
            raise ValueError(
                f"`evaluation_samples` must be less than the {len(self.held_out)} samples of the text, "
                f"got {recipe.evaluation_samples}"
            )
        self.parts = CausalParts(self.model)

    def attach(self, patch: Patch) -> None:
        """Any patch will do."""

    def bundle_parts(self) -> dict[str, str]:
        return {}

    def batch(self, numbers: Sequence[int]) -> TextSample:
        size = len(self.data) - self.kept
        made = [self.data[sample_order(self.recipe.seed, size, number)] for number in numbers]
        return self._stacked(made)

    def _stacked(self, made: Sequence[TextSample]) -> TextSample:
        ids, weights = (torch.stack(parts).to(self.device) for parts in zip(*made, strict=True))
        return TextSample(ids, weights)

    def weights(self, batch: TextSample) -> Tensor:
        # The first token of a sample is predicted by nothing.
        return batch.weights[:, 1:].sum(1)

    def forward(self, batch: TextSample) -> Tensor:
        return self.parts.hidden(batch.ids)

    def output_loss(self, batch: TextSample, mine: Tensor, taught: Tensor, teacher: Mode) -> Tensor:
        logits = self.parts.logits

        def part(mine: Tensor, taught: Tensor, weights: Tensor) -> Tensor:
            with teacher():
                told = logits(taught[None])[0]
            return (weights * divergence(logits(mine[None])[0], told, self.recipe.temperature)).sum()

        given = (x.flatten(0, 1) for x in (mine[:, :-1], taught[:, :-1], batch.weights[:, 1:]))
        return in_chunks(part, self.parts.positions, *given)

    def evaluate(self, teacher: Mode, dense: Mode, match: AttentionMatch) -> dict[str, float]:
        """Means over held-out samples.

        `loss`: of the sparse student; `loss_dense` of the teacher, `loss_run_dense` of the student run dense. `kl`:
        divergence of the student from the teacher. `attention_error`: root of the relative squared error, by layer and
        mean. With needles the share of answers that are right, likewise.
        """
        sums: dict[str, float] = defaultdict(float)
        errors: list[tuple[int, Tensor]] = []
        first = len(self.data) - self.kept if self.kept else 0
        for number in range(self.recipe.evaluation_samples):
            index = first + number
            batch = self._stacked([self.held_out[index]])
            with teacher():
                taught = self.forward(batch)
                sums["loss_dense"] += self._loss(batch, taught)
                self._needles(sums, "needles_dense", index, taught)
            with match.collecting() as found:
                mine = self.forward(batch)
            errors += found
            sums["loss"] += self._loss(batch, mine)
            sums["kl"] += float(self.output_loss(batch, mine, taught, teacher))
            self._needles(sums, "needles", index, mine)
            with dense():
                sums["loss_run_dense"] += self._loss(batch, self.forward(batch))
            sums["weights"] += float(self.weights(batch).sum())
        samples, weights = self.recipe.evaluation_samples, sums.pop("weights")
        shares = {name: total / (samples if name.startswith("needles") else weights) for name, total in sums.items()}
        return {**dict(sorted(shares.items())), **layer_figures(errors)}

    def _loss(self, batch: TextSample, hidden: Tensor) -> float:
        given = hidden[:, :-1], batch.ids[:, 1:], batch.weights[:, 1:]
        return float(chunked_cross_entropy(*given, self.parts.logits, self.parts.positions))

    def _needles(self, sums: dict[str, float], name: str, index: int, hidden: Tensor) -> None:
        if isinstance(self.held_out, NeedleData):
            answered = score_needles(self.parts.logits(hidden), self.held_out.document(index))
            sums[name] += sum(answered) / len(answered)
