"""Find the key/value heads that retrieve, by one trained number each (DuoAttention); the others get a window."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.published import from_duo_attention
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.shipped.corpus import NeedleDocument, needle_document
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.text.data import NeedleData, TextSample, TextSettings
from hf_sparse_attn.training.text.held_out import held_out_figures, held_out_settings
from hf_sparse_attn.training.text.model import load_language_model

# Bytes of a statement before its value.
_STATEMENT = len("# key abc=")
# Folder in the result with the files as DuoAttention publishes them.
PUBLISHED = "duo_attention"


@dataclass(frozen=True, kw_only=True)
class DuoGate(AdapterRecipe):
    """The gates of DuoAttention (Xiao et al. 2024, arXiv 2410.10819) for a pretrained decoder, which stays as it is.

    Every key/value head gets a number a, 1 at first and kept in [0, 1], and gives a * full attention + (1 - a) *
    attention to the first and the most recent tokens. On documents that state keys and ask for them at their end, the
    loss is the mean squared difference of the last hidden states from the model's own, over the positions that choose
    the answers and the width, plus `weight` times the sum of the gates. Heads whose gate stays large retrieve.

    The result holds the gates as DuoAttention publishes them, and a HeadProfile with the smallest `sparsity` of the
    gates on the window. Deviations: the rate falls along the schedule asked for, not over the last fifth alone; all
    documents have one length.

    Args:
        data: documents with needles: its `source` must be "needles".
        sink: first tokens that every head reads.
        recent: most recent tokens that every head reads.
        block_size: tokens in a block of the window's pattern.
        weight: of the sum of the gates in the loss.
        sparsity: share of the heads that the profile puts on the window.
        held_out_seed: of held-out documents.
        evaluation_samples: held-out documents.
    """

    data: TextSettings
    sink: int = 64
    recent: int = 256
    block_size: int = 64
    weight: float = 0.05
    sparsity: float = 0.5
    held_out_seed: int = 1000
    evaluation_samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("held_out_seed", self.held_out_seed, 0)
        check_int("evaluation_samples", self.evaluation_samples, 1)
        check_share("sparsity", self.sparsity)
        if not 0 <= self.weight < float("inf"):
            raise ValueError(f"`weight` must be 0 or more, got {self.weight}")
        for name in ("lora", "sparse"):
            if getattr(self, name) is not None:
                raise ValueError(f"`{name}` must be left out: the model itself is not trained")
        if self.data.source != "needles":
            raise ValueError(f"`data.source` must be 'needles', got {self.data.source!r}")
        self.window()

    def window(self) -> Method:
        """What a head reads whose gate is 0."""
        params = {"sink": self.sink, "window": self.recent, "block_size": self.block_size}
        return make_method("sliding_window", params)

    def task(self, run: Run) -> DuoGateTask:
        return DuoGateTask(self, run)


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

    def scored(self, index: int) -> tuple[TextSample, list[list[int]]]:
        if self.tokenizer is None:
            return super().scored(index)
        # An answer counts token by token here: where one ends depends on the tokenizer.
        ids, asked = self.asked(index)
        return TextSample(ids, (~asked).float().roll(1)), asked.nonzero().tolist()

    def _encoded(self, index: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Tokens of a document, and where they stand in its bytes: source with needles is ASCII, or nearly so."""
        text = self.document(index).text[1:].decode("latin-1")
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return found["input_ids"], [(a + 1, b + 1) for a, b in found["offset_mapping"]]


class DuoBatch(NamedTuple):
    """Token ids and the positions that choose the answers, both [batch, tokens]."""

    ids: Tensor
    asked: Tensor


@dataclass(frozen=True, kw_only=True)
class MixedHeads(Method):
    """Attention while the gates are trained: every head gives its share of full attention and of a window.

    Args:
        gates: [layers, key/value heads].
        window: the method of the window.
        switch: holds whether the gates are left out, which is the model itself.
    """

    name: ClassVar[str] = "duo_training"
    paper: ClassVar[str] = "Xiao et al. 2024, DuoAttention (arXiv 2410.10819)"

    gates: nn.Parameter = field(compare=False, repr=False)
    window: Method
    switch: list[bool] = field(default_factory=lambda: [False], compare=False)

    def params(self) -> dict[str, Any]:
        """The window's; the gates are no setting."""
        return self.window.params()

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Any) -> tuple[Tensor, Tensor] | Decline:
        """See Method.attention."""
        full, lse = dense_attention(q, k, v, ctx)
        if self.switch[0]:
            return full, lse
        found = self.window.pattern_for(q, k, ctx)
        if isinstance(found, Decline):
            return found
        near = run(q, k, v, found)[0]
        share = self.gates[ctx.layer].repeat_interleave(ctx.num_heads // ctx.num_kv_heads).view(1, -1, 1, 1)
        return (share * full + (1 - share) * near).to(q.dtype), lse


class DuoGateTask(AdapterTask):
    """See DuoGate."""

    def __init__(self, recipe: DuoGate, run: Run) -> None:
        model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype, run.device)
        self.parts = CausalParts(model)
        self.data = PasskeyData(recipe.data, tokenizer, recipe.seed)
        self.held_out = PasskeyData(held_out_settings(recipe.data, None), tokenizer, recipe.held_out_seed)
        sizes = Fingerprint.of(model)
        super().__init__(recipe, run, model, base_model=recipe.model)
        self.recipe: DuoGate = recipe
        self.gates = nn.Parameter(torch.ones(sizes.layers, sizes.kv_heads, device=run.device))
        self._mixed = MixedHeads(gates=self.gates, window=recipe.window())
        self.module: nn.Module = nn.ModuleDict({"gates": nn.ParameterList([self.gates]), "model": model})
        self._active = patch(model, self._mixed, min_tokens=0)
        self._undo.callback(self._take_off)

    def batch(self, step: int, samples: Sequence[int]) -> DuoBatch:
        return self._stacked(self.data, self.numbers(step, samples))

    def weight(self, batch: DuoBatch) -> float:
        return float(len(batch.ids))

    def loss(self, batch: DuoBatch) -> Tensor:
        return self._difference(batch) + self.recipe.weight * len(batch.ids) * self.gates.abs().sum()

    def end_step(self, step: int) -> None:
        with torch.no_grad():
            self.gates.clamp_(0, 1)

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out documents.

        `difference`: of the last hidden states, as in the loss; `gates`: mean of the gates; `loss_*`, `needles_*`: of
        the model as it is (dense) and with the profile (profile); `density`: kept share of the visible pairs then.
        """
        given = self.parts, self.held_out, self.recipe.evaluation_samples, self.run.device
        batches = [self._stacked(self.held_out, [index]) for index in range(self.recipe.evaluation_samples)]
        figures = {"difference": sum(float(self._difference(b).detach()) for b in batches) / len(batches)}
        figures["gates"] = float(self.gates.mean())
        profile = self.profile()
        with self._taken_off():
            figures |= {f"{name}_dense": value for name, value in held_out_figures(*given).items()}
            with patch(self.model, profile, min_tokens=0) as active:
                figures |= {f"{name}_profile": value for name, value in held_out_figures(*given).items()}
                figures["density"] = active.report().density
        return figures

    def profile(self) -> HeadProfile:
        """The gates as they are now, cut at the share of `sparsity`."""
        with TemporaryDirectory() as folder:
            self.publish(Path(folder))
            return from_duo_attention(folder, self.model, sparsity=self.recipe.sparsity)

    def publish(self, folder: Path) -> None:
        """Writes the gates as DuoAttention publishes them: full_attention_heads.tsv and config.json."""
        folder.mkdir(parents=True, exist_ok=True)
        values = self.gates.detach().cpu().double().numpy()
        np.savetxt(folder / "full_attention_heads.tsv", values, fmt="%.6f", delimiter="\t")
        sizes = {"sink_size": self.recipe.sink, "recent_size": self.recipe.recent}
        (folder / "config.json").write_text(json.dumps(sizes) + "\n", encoding="utf-8")

    def bundle_parts(self) -> dict[str, Any]:
        return {"profile": self.profile()}

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        # What is saved is read back from the model, which must be its own then.
        with self._taken_off():
            super().save(folder, figures)
        self.publish(folder / PUBLISHED)

    @contextmanager
    def _taken_off(self) -> Iterator[None]:
        self._take_off()
        try:
            yield
        finally:
            self._active = patch(self.model, self._mixed, min_tokens=0)

    def _take_off(self) -> None:
        self._active.remove()

    def _stacked(self, data: PasskeyData, numbers: Sequence[int]) -> DuoBatch:
        made = [data.asked(number) for number in numbers]
        ids, asked = (torch.stack(parts).to(self.run.device) for parts in zip(*made, strict=True))
        return DuoBatch(ids, asked)

    def _difference(self, batch: DuoBatch) -> Tensor:
        """Mean squared difference of the last hidden states where answers are chosen, summed over the batch."""
        self._mixed.switch[0] = True
        try:
            with torch.no_grad():
                own = self.parts.hidden(batch.ids)
        finally:
            self._mixed.switch[0] = False
        found = (self.parts.hidden(batch.ids).float() - own.float()).square().mean(-1)
        share = batch.asked / batch.asked.sum(-1, keepdim=True).clamp(min=1)
        return (found * share).sum()


RECIPE = DuoGate
