"""Adapt a Qwen-VL model to questions about longer videos with sparse attention, by LoRA."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.qwen_vl_long_video_data import NO_LABEL, SECONDS, QuestionData, QuestionSettings, Sample
from hf_sparse_attn.sharing.hub import loading
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.text.data import sample_order

_KINDS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")


@dataclass(frozen=True, kw_only=True)
class QwenVLLongVideo(AdapterRecipe):
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL model learns to answer questions about videos of more frames than before.

    A LoRA adapter on the text decoder's projections is trained on the loss of the answers alone, with sparse attention
    in the decoder, which knows the frames, rows and columns of the video's tokens. The vision tower stays as it is.

    Args:
        data: questions about videos; its `frames` are what the model is to learn to take.
        held_out: questions to evaluate on; None takes the last ones of `data`, which are then not trained on.
        evaluation_samples: how many.
    """

    data: QuestionSettings
    held_out: QuestionSettings | None = None
    evaluation_samples: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("evaluation_samples", self.evaluation_samples, 1)
        if self.lora is None:
            raise ValueError("`lora` must be given, got none")

    def task(self, run: Run) -> QwenVLTask:
        return QwenVLTask(self, run)


class QwenVLTask(AdapterTask):
    """See QwenVLLongVideo.

    Args:
        recipe: the settings.
        run: where it runs.
        processor: in place of the model's own, for samples that are not prepared.
    """

    recipe: QwenVLLongVideo

    def __init__(self, recipe: QwenVLLongVideo, run: Run, processor: Any = None) -> None:
        from transformers import AutoConfig, AutoModelForImageTextToText

        # Data and kind of model first: loading takes longest.
        with loading(recipe.model):
            config = AutoConfig.from_pretrained(recipe.model)
        if config.model_type not in _KINDS:
            raise ValueError(f"`model` must be of the kinds {', '.join(_KINDS)}, got {config.model_type}")
        self.data = QuestionData(recipe.data, recipe.model, config, processor)
        self.kept = recipe.evaluation_samples if recipe.held_out is None else 0
        self.held_out = (
            self.data
            if recipe.held_out is None
            else QuestionData(recipe.held_out, recipe.model, config, processor or self.data.processor)
        )
        if len(self.held_out) < recipe.evaluation_samples + (self.kept > 0):
            raise ValueError(
                f"`evaluation_samples` must be less than the {len(self.held_out)} questions, "
                f"got {recipe.evaluation_samples}"
            )
        with loading(recipe.model):
            model = AutoModelForImageTextToText.from_pretrained(recipe.model, dtype=recipe.torch_dtype)
        super().__init__(recipe, run, model.eval().to(run.device), base_model=recipe.model)

    def batch(self, step: int, samples: Sequence[int]) -> list[Sample]:
        size = len(self.data) - self.kept
        return [
            self._placed(self.data[sample_order(self.recipe.seed, size, number)])
            for number in self.numbers(step, samples)
        ]

    def _placed(self, sample: Sample) -> Sample:
        return {name: value.to(self.run.device) for name, value in sample.items()}

    def weight(self, batch: list[Sample]) -> float:
        return float(sum(int((sample["labels"][1:] != NO_LABEL).sum()) for sample in batch))

    def loss(self, batch: list[Sample]) -> Tensor:
        # One after another: videos differ in length, and padding them would be lost work.
        return torch.stack([self._answer_loss(sample)[0] for sample in batch]).sum()

    def _answer_loss(self, sample: Sample) -> tuple[Tensor, Tensor]:
        """Loss of the answer's tokens, a sum, and which of them the model would choose, bool [answer]."""
        places = (sample["labels"][1:] != NO_LABEL).nonzero()[:, 0]
        given = {name: value[None] for name, value in sample.items() if name in ("input_ids", "mm_token_type_ids")}
        if SECONDS in sample:
            given[SECONDS] = sample[SECONDS]
        model: Any = self.model
        logits = (
            model(
                **given,
                attention_mask=torch.ones_like(given["input_ids"]),
                pixel_values_videos=sample["pixel_values_videos"].to(model.dtype),
                video_grid_thw=sample["video_grid_thw"],
                use_cache=False,
                logits_to_keep=places,
            )
            .logits[0]
            .float()
        )
        truth = sample["labels"][places + 1]
        return nn.functional.cross_entropy(logits, truth, reduction="sum"), logits.argmax(-1) == truth

    def evaluate(self) -> dict[str, float]:
        """On held-out questions, with the decoder sparse, and dense (`_dense`).

        `loss`: per token of the answers. `accuracy`: share of their tokens that are the model's first choice, given
        the ones before. `exact`: share of answers in which all are.
        """
        found: dict[str, float] = {}
        first = len(self.data) - self.kept if self.kept else 0
        samples = [self._placed(self.held_out[first + n]) for n in range(self.recipe.evaluation_samples)]
        tokens = self.weight(samples)
        for ending in ("", "_dense") if self.patch is not None else ("",):
            sums: dict[str, float] = defaultdict(float)
            with self.patch.paused() if self.patch is not None and ending else nullcontext():
                for sample in samples:
                    loss, right = self._answer_loss(sample)
                    sums["loss"] += float(loss) / tokens
                    sums["accuracy"] += float(right.sum()) / tokens
                    sums["exact"] += float(right.all()) / len(samples)
            found.update({f"{name}{ending}": value for name, value in sums.items()})
        return found


RECIPE = QwenVLLongVideo
