"""What the recipes for gates of language models share: the model, held-out text, and figures on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_text import NeedleData, TextData, TextSettings, open_text

# Sources that come apart into text to train on and text to evaluate on.
_SHIPPED = frozenset({"needles", "standard_library"})
_BYTES = 256


def load_language_model(source: str, dtype: Any, device: torch.device) -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        source: "byte_llama", a folder or a Hub id.
        dtype: as `from_pretrained` takes it.
        device: where it is put.

    Returns:
        the model, and the tokenizer; None for a model that reads bytes, which has 256 tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == "byte_llama":
        from hf_sparse_attn.demo import MODEL

        source = str(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)
    reads_bytes = model.config.get_text_config().vocab_size == _BYTES
    return model, None if reads_bytes else AutoTokenizer.from_pretrained(source)


def check_held_out(data: TextSettings, held_out: TextSettings | None) -> None:
    """Raises where text to evaluate on is missing.

    Raises:
        ValueError: `held_out` is None for text that does not come with the package.
    """
    if held_out is None and data.source not in _SHIPPED:
        raise ValueError(f"`held_out` must be given for text of one's own, got none for {data.source!r}")


def open_both(
    data: TextSettings, held_out: TextSettings | None, samples: int, tokenizer: Any, seeds: tuple[int, int], run: Run
) -> tuple[TextData, TextData]:
    """Text to train on and text to evaluate on, of which there must be so many samples.

    Raises:
        ValueError: there are fewer.
    """
    cache: Path = run.output / "cache"
    kept = held_out or replace(data, split="heldout")
    found = open_text(data, tokenizer, seed=seeds[0], cache=cache, run=run)
    other = open_text(kept, tokenizer, seed=seeds[1], cache=cache, run=run)
    if len(other) < samples:
        raise ValueError(f"`evaluation_samples` must be at most {len(other)}, the held-out samples, got {samples}")
    return found, other


@torch.no_grad()
def text_figures(model: Any, data: TextData, indices: Iterable[int], device: torch.device) -> dict[str, float]:
    """Loss in nats per token and, in documents with needles, the share of them that is answered.

    In documents with needles the loss is that of their code alone.

    Args:
        model: a causal language model, patched or not.
        data: held-out text.
        indices: of the samples.
        device: of the model.
    """
    from hf_sparse_attn.corpus import score_needles

    total, count = 0.0, 0.0
    answers: list[bool] = []
    for index in indices:
        sample = data[index]
        ids = sample.ids[None].to(device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        weights = sample.weights
        if isinstance(data, NeedleData):
            document = data.document(index)
            weights = document.code_mask.float()
            answers += score_needles(logits, document)
        losses = torch.nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:], reduction="none")
        used = weights[1:].to(device)
        total += float((losses * used).sum())
        count += float(used.sum())
    found = {"loss": total / max(count, 1.0)}
    if answers:
        found["needles"] = sum(answers) / len(answers)
    return found
