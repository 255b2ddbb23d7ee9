"""Language models for recipe distill_sparse: next-token distributions that are matched, and needles."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.patching import Patch
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.training.chunked_loss import CausalParts, in_chunks
from hf_sparse_attn.training.matching import AttentionMatch, divergence, layer_figures
from hf_sparse_attn.training.text.data import TextSample, TextSettings, open_text, sample_order
from hf_sparse_attn.training.text.held_out import SPLIT_SOURCES, HeldOutScores, held_out_settings, open_held_out
from hf_sparse_attn.training.text.model import load_language_model

if TYPE_CHECKING:
    from hf_sparse_attn.recipes.distill_sparse import DistillSparse, Mode


class LanguageStudent:
    """A causal language model and text; see distill_sparse.Student."""

    def __init__(self, recipe: DistillSparse, settings: TextSettings, run: Run) -> None:
        self.recipe, self.device = recipe, run.device
        loaded = load_language_model(recipe.model, recipe.torch_dtype, run.device)
        self.model: nn.Module = loaded[0]
        tokenizer = loaded[1]
        given: dict[str, Any] = {"seed": recipe.seed, "cache": run.output / "cache", "run": run}
        self.data, samples = open_text(settings, tokenizer, **given), recipe.evaluation_samples
        # The last samples of text that has no held-out part are not trained on.
        self.kept = samples if recipe.held_out is None and settings.source not in SPLIT_SOURCES else 0
        if not self.kept:
            kept = held_out_settings(settings, recipe.held_out)
            self.held_out = open_held_out(kept, settings, samples, tokenizer, **given)
        elif len(self.data) <= samples:
            raise ValueError(
                f"`evaluation_samples` must be less than the {len(self.data)} samples of the text, got {samples}"
            )
        else:
            self.held_out = self.data
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
        scores = {how: HeldOutScores(self.parts) for how in ("", "_dense", "_run_dense")}
        apart, errors = 0.0, list[tuple[int, Tensor]]()
        first = len(self.data) - self.kept if self.kept else 0
        for index in range(first, first + self.recipe.evaluation_samples):
            batch = self._stacked([self.held_out[index]])
            _, answers = self.held_out.scored(index)
            with teacher():
                taught = self.forward(batch)
                scores["_dense"].add(batch, taught, answers)
            with match.collecting() as found:
                mine = self.forward(batch)
            errors += found
            scores[""].add(batch, mine, answers)
            apart += float(self.output_loss(batch, mine, taught, teacher))
            with dense():
                scores["_run_dense"].add(batch, self.forward(batch), [])
        figures = {name + how: value for how, own in scores.items() for name, value in own.figures().items()}
        figures["kl"] = apart / scores[""].weight
        return {**dict(sorted(figures.items())), **layer_figures(errors)}
