"""Adapt a language model to a longer context with sparse attention, by LoRA and stretched positions (LongLoRA)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.context import TokenLayout, check_int
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.file import FILE as PROFILE_FILE
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiling.candidates import default_candidates
from hf_sparse_attn.profiling.run import profile
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.settings import plain
from hf_sparse_attn.shipped.byte_llama import default_metric
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.rope_scaling import RopeSettings, scale_rope
from hf_sparse_attn.training.sparse import make_patch
from hf_sparse_attn.training.text.data import NeedleData, TextData, TextSample, TextSettings, open_text, sample_order
from hf_sparse_attn.training.text.held_out import held_out_figures, held_out_settings, open_held_out
from hf_sparse_attn.training.text.model import load_language_model

_NEEDLE_METRIC = default_metric("byte_llama")

# What `sparse.method` is called where the method is a profile that is found first.
_PROFILE = "profile"
# What a profile was found for, beside it.
_ASKED = "asked.json"

How = Literal["sparse", "dense"]


@dataclass(frozen=True, kw_only=True)
class CandidateSettings:
    """A method that heads may get, with its parameters."""

    method: str
    params: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ProfileSettings:
    """How a method is found for every head, before the first step; see hsa.profile.

    Damage is the error of a layer's output, and of documents with needles also what is lost of the attention to the
    answers.

    Args:
        candidates: to choose from, besides dense attention; none takes those that suit the length. Methods without a
            backward pass are left out of these.
        budget: share of the dense cost.
        samples: of the training text that it is measured on.
    """

    candidates: tuple[CandidateSettings, ...] = ()
    budget: float = 0.25
    samples: int = 1

    def __post_init__(self) -> None:
        check_int("samples", self.samples, 1)
        if not 0 < self.budget <= 1:
            raise ValueError(f"`budget` must be more than 0 and at most 1, got {self.budget}")

    def methods(self, length: int) -> list[Method]:
        """The candidates for texts of so many tokens."""
        if self.candidates:
            return [make_method(entry.method, entry.params) for entry in self.candidates]
        return [m for m in default_candidates(TokenLayout.causal(length)) if m.trainable]


@dataclass(frozen=True, kw_only=True)
class LlamaLongContext(AdapterRecipe):
    """A pretrained decoder is fine-tuned on texts longer than those it was trained on.

    It follows LongLoRA (Chen et al. 2023, arXiv 2309.12307): positions are stretched, a LoRA adapter on the attention
    projections is trained together with norms and embeddings in full, and attention is sparse while training, whatever
    it is afterwards. Deviation: any method with a backward pass takes the place of the paper's shifted groups.

    Args:
        data: text to train on; its `length` is the new context.
        profile: how a method is found for every head; `sparse.method` is then "profile".
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
    profile: ProfileSettings | None = None
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
        named = self.sparse is not None and self.sparse.method == _PROFILE
        if named != (self.profile is not None):
            raise ValueError(f"`profile` and `sparse.method: {_PROFILE}` must be given together, got one of them")
        held_out_settings(self.data, self.held_out)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of held-out samples."""
        return self.evaluation_lengths or (self.data.length,)

    def open_held_out(self, tokenizer: Any, cache: Path, run: Run | None = None) -> dict[int, TextData]:
        """Text to evaluate on, by the tokens of a sample; see open_text."""
        settings, samples = held_out_settings(self.data, self.held_out), self.evaluation_samples
        given: dict[str, Any] = {"seed": self.held_out_seed, "cache": cache, "run": run}
        return {
            n: open_held_out(replace(settings, length=n), self.data, samples, tokenizer, **given) for n in self.lengths
        }

    def task(self, run: Run) -> LongContextTask:
        return LongContextTask(self, run)


class LongContextTask(AdapterTask):
    """See LlamaLongContext."""

    def __init__(self, recipe: LlamaLongContext, run: Run) -> None:
        model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype)
        undo_rope = scale_rope(model, recipe.rope) if recipe.rope is not None else None
        _check_lengths(recipe, model)
        cache = run.output / "cache"
        self.data = open_text(recipe.data, tokenizer, seed=recipe.seed, cache=cache, run=run)
        self.held_out = recipe.open_held_out(tokenizer, cache, run)
        model.to(run.device)
        parts = CausalParts(model)
        sparse = recipe.sparse
        if sparse is not None and recipe.profile is not None:
            with run.main_first():
                sparse = replace(sparse, method=str(profile_folder(recipe, model, self.data, run)))
        if sparse is not None and recipe.train_with == "dense":
            # What is put on for evaluations alone must be refused before the first step as well.
            make_patch(model, sparse).remove()
        used = sparse if recipe.train_with == "sparse" else None
        trained_with = replace(recipe, evaluate_with=(recipe.train_with,), sparse=used, profile=None)
        rope = None if recipe.rope is None else {k: v for k, v in plain(recipe.rope).items() if v is not None}
        super().__init__(trained_with, run, model, base_model=recipe.model, rope=rope)
        self.recipe: LlamaLongContext = recipe
        self.sparse = sparse
        self.parts = parts
        self._undo_rope = undo_rope

    def batch(self, step: int, samples: Sequence[int]) -> TextSample:
        ids, weights = self.data.draw(self.numbers(step, samples))
        return TextSample(ids.to(self.run.device), weights.to(self.run.device))

    def weight(self, batch: TextSample) -> float:
        # Nothing predicts the first token.
        return float(batch.weights[:, 1:].sum())

    def loss(self, batch: TextSample) -> Tensor:
        return self.parts.loss(*batch, self.parts.hidden(batch.ids), self.recipe.loss_positions)

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out text, named what_how_length.

        `loss`: in nats per token; in documents with needles of their code alone. `needles`: share of the needles whose
        whole answer comes first. `density`: kept share of the visible pairs.
        """
        figures: dict[str, float] = {}
        for how in self.recipe.evaluate_with:
            with self.attention(how):
                figures |= figures_of(self.recipe, how, self.parts, self.held_out, self.run.device)
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
        return {"sparse": self.sparse if self.recipe.evaluate_with[0] == "sparse" else None}

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
        elif how == "sparse" and self.sparse is not None:
            self.patch = make_patch(self.model, self.sparse)


def figures_of(
    recipe: LlamaLongContext, how: How, parts: CausalParts, held_out: dict[int, TextData], device: torch.device
) -> dict[str, float]:
    """Figures on held-out text, named what_how_length; see LongContextTask.evaluate."""
    samples, chunk = recipe.evaluation_samples, recipe.loss_positions
    found = {n: held_out_figures(parts, data, samples, device, chunk) for n, data in held_out.items()}
    return {f"{name}_{how}_{n}": value for n, figures in found.items() for name, value in figures.items()}


def profile_folder(recipe: LlamaLongContext, model: Any, data: TextData, run: Run) -> Path:
    """The folder with a profile of the model as it is now; one of the same settings that is there stays.

    Args:
        recipe: the settings, with `profile`.
        model: on the device of the run, not patched.
        data: text to measure on.
        run: where it runs; the profile goes into the folder "profile" of its output.

    Raises:
        ValueError: the recipe has no profile, or a candidate no backward pass.
    """
    if (settings := recipe.profile) is None:
        raise ValueError("`profile` must be given, got none")
    folder = run.output / "profile"
    names = ("model", "dtype", "rope", "data", "seed", "profile")
    asked = json.dumps({name: plain(getattr(recipe, name)) for name in names}, sort_keys=True)
    if (folder / PROFILE_FILE).is_file() and (folder / _ASKED).is_file():
        if (folder / _ASKED).read_text(encoding="utf-8") == asked:
            HeadProfile.from_pretrained(folder).check(model)
            return folder
        (folder / PROFILE_FILE).unlink()
    methods = settings.methods(data.length)
    for method in methods:
        if not method.trainable:
            raise ValueError(f"`profile.candidates` must have a backward pass, got {method.name!r}, which has none")
    batches: list[dict[str, Any]] = []
    for number in range(settings.samples):
        index = sample_order(data.seed, len(data), number)
        batches.append({"input_ids": data[index].ids[None].to(run.device)})
        if isinstance(data, NeedleData):
            batches[-1]["needles"] = data.document(index).questions
    metric = _NEEDLE_METRIC if isinstance(data, NeedleData) else "layer_error"
    found = profile(model, batches, methods, settings.budget, metric, progress=run.progress, source="training text")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _ASKED).write_text(asked, encoding="utf-8")
    # The file that tells that there is one comes last.
    found.save_pretrained(folder)
    return folder


def _check_lengths(recipe: LlamaLongContext, model: Any) -> None:
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    for name, lengths in (("data.length", (recipe.data.length,)), ("evaluation_lengths", recipe.lengths)):
        if most is not None and max(lengths) > most:
            raise ValueError(
                f"`{name}` must be at most {most}, the positions of {recipe.model} as `rope` stretches them, "
                f"got {max(lengths)}"
            )


RECIPE = LlamaLongContext
