"""What the recipes for gates of language models share: the model, held-out text, and figures on it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.corpus import NeedleDocument, needle_document, score_needles
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.train_text import SPLIT_SOURCES, NeedleData, TextData, TextSettings, open_text

# Bytes of a statement before its value.
_STATEMENT = len("# key abc=")


def check_held_out(data: TextSettings, held_out: TextSettings | None) -> None:
    """Raises where text to evaluate on is missing.

    Raises:
        ValueError: `held_out` is None for text that does not come with the package.
    """
    if held_out is None and data.source not in SPLIT_SOURCES:
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


class PasskeyData(NeedleData):
    """Documents with needles, their answers marked; for a model with a tokenizer, in its tokens.

    With a tokenizer a document is made about so many times longer in bytes as a token has, and the start of its tokens
    is dropped: the questions stand at the end. Needles whose statement is dropped are not asked for.

    Args:
        settings: of the documents; `length` counts tokens.
        tokenizer: a fast one, or None for a model that reads bytes.
        seed: of the documents.

    Raises:
        ValueError: documents are shorter than `length`, or the tokenizer tells no places.
    """

    def __init__(self, settings: TextSettings, tokenizer: Any, seed: int) -> None:
        if tokenizer is not None and not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"the tokenizer must be a fast one, which tells places, got {type(tokenizer).__name__}")
        super().__init__(settings, seed)
        self.tokenizer = tokenizer
        self._bytes = settings.length
        # Grows until a document is long enough, which refuses what cannot be made, too.
        while tokenizer is not None and len(self._encoded(0)[0]) < settings.length:
            self._bytes = self._bytes * 3 // 2
        self.asked(0)

    def document(self, index: int) -> NeedleDocument:
        """The document that a sample is made of, in bytes."""
        drawn = int(np.random.default_rng((self.seed, self._check(index))).integers(2**62))
        chosen: Any = self.settings
        return needle_document(self._bytes, chosen.needles, drawn, chosen.split)

    def asked(self, index: int) -> tuple[Tensor, Tensor]:
        """Token ids, and the positions whose logits choose the tokens of answers, int64 and bool [length]."""
        document = self.document(index)
        if self.tokenizer is None:
            ids, places = document.token_ids[0], [(i, i + 1) for i in range(len(document))]
        else:
            numbers, places = self._encoded(index)
            ids = torch.tensor(numbers[-self.settings.length :])
            places = places[-self.settings.length :]
        marked = torch.zeros(len(ids), dtype=torch.bool)
        begins = places[0][0]
        for needle in document.needles:
            first, last = needle.asked_at, needle.asked_at + len(needle.value)
            if needle.stated_at - _STATEMENT >= begins:
                own = [i for i, (start, end) in enumerate(places) if start < last and end > first]
                marked[[i - 1 for i in own if i]] = True
        return ids, marked

    def _encoded(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a document, and where they stand in its bytes: source with needles is ASCII, or nearly so."""
        text = self.document(index).text[1:].decode("latin-1")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], [(a + 1, b + 1) for a, b in found["offset_mapping"]]


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
    total, count = 0.0, 0.0
    answers: list[bool] = []
    for index in indices:
        in_tokens = isinstance(data, PasskeyData) and data.tokenizer is not None
        if isinstance(data, PasskeyData):
            row, asked = data.asked(index)
            weights = (~asked).float().roll(1)
        else:
            row, weights = data[index]
        ids = row[None].to(device)
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
        if isinstance(data, PasskeyData) and in_tokens:
            # An answer counts digit by digit here: where one ends depends on the tokenizer.
            right = logits[0, :-1].argmax(-1).cpu() == row[1:]
            answers += right[asked[:-1]].tolist()
        elif isinstance(data, NeedleData):
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
