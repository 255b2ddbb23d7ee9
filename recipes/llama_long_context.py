"""Recipe llama_long_context: a language model learns a longer context with sparse attention and a LoRA adapter."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.adapter_task import AdapterRecipe, AdapterTask, make_patch
from hf_sparse_attn.chunked_loss import CausalParts, chunked_cross_entropy
from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipe_config import plain
from hf_sparse_attn.rope_scaling import RopeSettings, scale_rope
from hf_sparse_attn.train_text import NeedleData, TextData, TextSample, TextSettings, open_text

# Sources that come apart into text to train on and text to evaluate on.
_SHIPPED = frozenset({"needles", "standard_library"})
_BYTES = 256

How = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class LlamaLongContext(AdapterRecipe):
    """A pretrained decoder is fine-tuned on texts longer than those it was trained on.

    It follows LongLoRA (Chen et al. 2023, arXiv 2309.12307): positions are stretched, a LoRA adapter on the attention
    projections is trained together with norms and embeddings in full, and attention is sparse while training, whatever
    it is afterwards. Deviation: any method with a backward pass takes the place of the paper's shifted groups.

    Args:
        data: text to train on; its `length` is the new context.
        rope: how positions are stretched; None leaves them.
        train_with: attention while training: that of `sparse`, or the model's own.
        evaluate_with: attention that held-out text is read with, each in turn; the first is what the bundle puts on
            the model.
        held_out: text to evaluate on; None takes the held-out part of a source that comes with the package.
        held_out_seed: of held-out documents with needles.
        evaluation_samples: held-out samples of each length.
        evaluation_lengths: tokens of a held-out sample, each in turn; none takes that of `data`.
        loss_positions: positions whose logits are in memory at once; None takes as many as have 2**26 numbers.
    """

    data: TextSettings
    rope: RopeSettings | None = None
    train_with: How = "sparse"
    evaluate_with: tuple[How, ...] = ("sparse", "dense")
    held_out: TextSettings | None = None
    held_out_seed: int = 1000
    evaluation_samples: int = 8
    evaluation_lengths: tuple[int, ...] = ()
    loss_positions: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("held_out_seed", self.held_out_seed, 0)
        check_int("evaluation_samples", self.evaluation_samples, 1)
        for length in self.evaluation_lengths:
            check_int("evaluation_lengths", length, 2)
        if self.loss_positions is not None:
            check_int("loss_positions", self.loss_positions, 1)
        if self.lora is None:
            raise ValueError("`lora` must be given, got none")
        if not self.evaluate_with:
            raise ValueError("`evaluate_with` must be sparse, dense or both, got none")
        if self.sparse is None and "sparse" in (self.train_with, *self.evaluate_with):
            raise ValueError("`sparse` must be given to train or evaluate with sparse attention, got none")
        if self.held_out is None and self.data.source not in _SHIPPED:
            raise ValueError(f"`held_out` must be given for text of one's own, got none for {self.data.source!r}")

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of held-out samples."""
        return self.evaluation_lengths or (self.data.length,)

    def task(self, run: Run) -> LongContextTask:
        return LongContextTask(self, run)


class LongContextTask(AdapterTask):
    """See LlamaLongContext."""

    def __init__(self, recipe: LlamaLongContext, run: Run) -> None:
        model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype)
        undo_rope = scale_rope(model, recipe.rope) if recipe.rope is not None else None
        _check_lengths(recipe, model)
        held_out = recipe.held_out or replace(recipe.data, split="heldout")
        cache = run.output / "cache"
        self.data = open_text(recipe.data, tokenizer, seed=recipe.seed, cache=cache, run=run)
        self.held_out = {
            length: open_text(
                replace(held_out, length=length), tokenizer, seed=recipe.held_out_seed, cache=cache, run=run
            )
            for length in recipe.lengths
        }
        for length, data in self.held_out.items():
            if len(data) < recipe.evaluation_samples:
                raise ValueError(
                    f"`evaluation_samples` must be at most {len(data)}, the held-out samples of {length} tokens, "
                    f"got {recipe.evaluation_samples}"
                )
        model.to(run.device)
        parts = CausalParts(model)
        if recipe.sparse is not None and recipe.train_with == "dense":
            # What is put on for evaluations alone must be refused before the first step as well.
            make_patch(model, recipe.sparse).remove()
        trained_with = recipe if recipe.train_with == "sparse" else replace(recipe, evaluate_with=("dense",), sparse=None)
        rope = None if recipe.rope is None else {k: v for k, v in plain(recipe.rope).items() if v is not None}
        super().__init__(trained_with, run, model, base_model=recipe.model, rope=rope)
        self.recipe: LlamaLongContext = recipe
        self.parts = parts
        self._undo_rope = undo_rope

    def batch(self, step: int, samples: Sequence[int]) -> TextSample:
        ids, weights = self.data.draw(self.numbers(step, samples))
        return TextSample(ids.to(self.run.device), weights.to(self.run.device))

    def weight(self, batch: TextSample) -> float:
        # Nothing predicts the first token.
        return float(batch.weights[:, 1:].sum())

    def loss(self, batch: TextSample) -> Tensor:
        return self._loss(self.parts.hidden(batch.ids), batch)

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out text, named what_how_length.

        `loss`: in nats per token; in documents with needles of their code alone. `needles`: share of the needles whose
        whole answer comes first. `density`: kept share of the visible pairs.
        """
        figures: dict[str, float] = {}
        for how in self.recipe.evaluate_with:
            with self.attention(how):
                for length, data in self.held_out.items():
                    found = self._figures(data)
                    figures.update({f"{name}_{how}_{length}": value for name, value in found.items()})
                if how == "sparse" and self.patch is not None:
                    figures["density"] = self.patch.report().density
        return figures

    @contextmanager
    def attention(self, how: How) -> Iterator[None]:
        """Within it the model has sparse attention, or its own, whatever it is trained with."""
        trained_with: How = "dense" if self.patch is None else "sparse"
        if how == trained_with:
            yield
            return
        self._switch(how)
        try:
            yield
        finally:
            self._switch(trained_with)

    def bundle_parts(self) -> dict[str, Any]:
        return {"sparse": self.recipe.sparse if self.recipe.evaluate_with[0] == "sparse" else None}

    def close(self) -> None:
        if self.patch is not None:
            self.patch.remove()
        super().close()
        if self._undo_rope is not None:
            self._undo_rope()

    def _switch(self, how: How) -> None:
        if how == "dense" and self.patch is not None:
            self.patch.remove()
            self.patch = None
        elif how == "sparse" and self.recipe.sparse is not None:
            self.patch = make_patch(self.model, self.recipe.sparse)

    def _loss(self, hidden: Tensor, batch: TextSample) -> Tensor:
        positions = self.recipe.loss_positions or self.parts.positions
        shifted = hidden[:, :-1], batch.ids[:, 1:], batch.weights[:, 1:]
        return chunked_cross_entropy(*shifted, self.parts.logits, positions)

    @torch.no_grad()
    def _figures(self, data: TextData) -> dict[str, float]:
        total, count, answers = 0.0, 0.0, []
        device = self.run.device
        for index in range(self.recipe.evaluation_samples):
            document = data.document(index) if isinstance(data, NeedleData) else None
            sample = data[index]
            ids = sample.ids[None].to(device)
            weights = sample.weights if document is None else document.code_mask.float()
            hidden = self.parts.hidden(ids)
            batch = TextSample(ids, weights[None].to(device))
            total += float(self._loss(hidden, batch))
            count += self.weight(batch)
            if document is not None:
                asked = torch.tensor([list(needle.answer_positions) for needle in document.needles], device=device)
                told = self.parts.logits(hidden[:, (asked - 1).flatten()])[0].argmax(-1).view(asked.shape)
                answers += (told == ids[0, asked]).all(-1).tolist()
        found = {"loss": total / count}
        if answers:
            found["needles"] = sum(answers) / len(answers)
        return found


def load_language_model(source: str, dtype: Any) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        source: "byte_llama", a folder or a Hub id.
        dtype: as `from_pretrained` takes it.

    Returns:
        the model, and the tokenizer; None for a model that reads bytes, which has 256 tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == "byte_llama":
        from hf_sparse_attn.demo import MODEL

        source = str(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
    reads_bytes = model.config.get_text_config().vocab_size == _BYTES
    return model, None if reads_bytes else AutoTokenizer.from_pretrained(source)


def _check_lengths(recipe: LlamaLongContext, model: Any) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, lengths in (("data.length", (recipe.data.length,)), ("evaluation_lengths", recipe.lengths)):
        if most is not None and max(lengths) > most:
            raise ValueError(
                f"`{name}` must be at most {most}, the positions of {recipe.model} as `rope` stretches them, "
                f"got {max(lengths)}"
            )


RECIPE = LlamaLongContext
