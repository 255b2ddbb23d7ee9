"""Train the byte-level Llama that the demo reads real documents with.

    hf-sparse-attn train byte_llama --output DIR

The model sees standard-library source with needles in it (shipped/corpus.py) and, early on, strings of random bytes
said over and over, in stages of growing length. It runs on a few processor cores in about an hour.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import OptimizerSettings, Run, Task
from hf_sparse_attn.recipes.shipped.byte_llama_init import CircuitConfig, set_circuit
from hf_sparse_attn.recipes.shipped.staged import StagedRecipe
from hf_sparse_attn.shipped.corpus import FIRST_BYTE, needle_document, next_byte_loss, score_needles
from hf_sparse_attn.training.text.data import document_weights

# Bytes of the shortest document: one that says a string over has room for two of the shortest, and a byte before them.
_SHORTEST_PERIOD = 16
_LEAST = 2 * _SHORTEST_PERIOD + 2


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama; the names are those of `transformers.LlamaConfig`.

    Args:
        hidden_size: width of a token.
        intermediate_size: width inside a feed-forward layer.
        num_hidden_layers: layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads; divides the query heads.
        head_dim: width of a head.
        max_position_embeddings: tokens that the config promises.
        rope_theta: base of the rotary positions.
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float


@dataclass(frozen=True)
class StageConfig:
    """One stretch of training.

    Args:
        steps: how many steps.
        tokens: bytes in each step's batch.
        lengths: bytes in each document, one of these drawn for each step; all divide `tokens`.
        bytes_per_needle: a document has room for one needle in so many bytes; it draws from half of them to all.
        copies: fraction of the documents that are random bytes said over and over instead of code.
    """

    steps: int
    tokens: int
    lengths: tuple[int, ...]
    bytes_per_needle: int
    copies: float

    def __post_init__(self) -> None:
        for name in ("steps", "tokens", "bytes_per_needle"):
            check_int(name, getattr(self, name), 1)
        if not self.lengths:
            raise ValueError("`lengths` must hold at least one, got none")
        if not 0 <= self.copies <= 1:
            raise ValueError(f"`copies` must be from 0 to 1, got {self.copies}")
        for length in self.lengths:
            if self.tokens % check_int("lengths", length, _LEAST):
                raise ValueError(f"`lengths` must divide `tokens`, which are {self.tokens}, got {length}")


@dataclass(frozen=True)
class LossConfig:
    """Weights of a byte's loss; code has 1.

    Args:
        answer: of the digits of an answer.
        other: of the rest of the needles' lines.
    """

    answer: float
    other: float


@dataclass(frozen=True, kw_only=True)
class ByteLlama(StagedRecipe):
    """The model, what it reads, and how long.

    Args:
        model: the shape.
        circuit: what the copying heads start from.
        optimizer: AdamW.
        schedule_steps: steps that the learning rate is laid out for; the stages may stop short of them, with the rate
            then still on its way down.
        loss: weights in the loss.
        stages: what is read, one after the other.
    """

    model: ModelConfig
    circuit: CircuitConfig
    optimizer: OptimizerSettings
    schedule_steps: int
    loss: LossConfig
    stages: tuple[StageConfig, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("schedule_steps", self.schedule_steps, 1)

    def task(self, run: Run) -> Task:
        return ByteLlamaTask(self, run)


def build_model(config: ByteLlama) -> LlamaForCausalLM:
    """Make the model with its starting weights.

    Args:
        config: the shape, the circuit to start from and the seed.

    Returns:
        The model, in float32.
    """
    shape = dataclasses.asdict(config.model)
    rope = {"rope_type": "default", "rope_theta": shape.pop("rope_theta")}
    torch.manual_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            attention_bias=True,
            tie_word_embeddings=False,
            rope_parameters=rope,
            bos_token_id=FIRST_BYTE,
            eos_token_id=None,
            pad_token_id=None,
            **shape,
        )
    )
    set_circuit(model, config.circuit, config.seed)
    return model


def _length(stage: StageConfig, rng: np.random.Generator) -> int:
    """Bytes of a step's documents; the first thing that its generator draws."""
    return int(rng.choice(stage.lengths))


def _copy_document(length: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Random printable bytes with a period drawn anew; only the repetitions, which can be known, count in the loss."""
    period = int(rng.integers(_SHORTEST_PERIOD, length // 2))
    alphabet = rng.integers(32, 127, size=int(rng.integers(8, 95)))
    once = rng.choice(alphabet, size=period)
    body = np.resize(once, length - 1).astype(np.uint8)
    weights = np.zeros(length, dtype=np.float32)
    weights[1 + period + 8 :] = 1.0
    return bytes([FIRST_BYTE]) + body.tobytes(), weights


def training_batch(config: ByteLlama, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step, which depends on the seed and the step alone.

    Args:
        config: the stages, the loss weights and the seed.
        step: counted from 0 over all the stages.

    Returns:
        Token ids and loss weights, both of shape (batch, length).
    """
    stage: StageConfig = config.stage_at(step)
    rng = np.random.default_rng((config.seed, step))
    length = _length(stage, rng)
    most = max(1, length // stage.bytes_per_needle)
    ids, weights = [], []
    for _ in range(stage.tokens // length):
        if rng.random() < stage.copies:
            text, row_weights = _copy_document(length, rng)
        else:
            needles = int(rng.integers((most + 1) // 2, most + 1))
            document = needle_document(length, needles, int(rng.integers(2**62)), split="train")
            text = document.text
            row_weights = document_weights(document, config.loss.answer, config.loss.other)
        ids.append(np.frombuffer(text, dtype=np.uint8))
        weights.append(row_weights)
    return torch.from_numpy(np.stack(ids).astype(np.int64)), torch.from_numpy(np.stack(weights))


class ByteLlamaTask(Task):
    """All weights of the model, from the start."""

    def __init__(self, recipe: ByteLlama, run: Run) -> None:
        self.recipe, self.run = recipe, run
        model: Any = build_model(recipe)
        self.model = self.module = model.to(run.device)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.recipe.optimizer.make(list(self.module.parameters()))]

    def rate(self, step: int) -> float:
        return self.recipe.optimizer.factor(step, self.recipe.schedule_steps)

    def gradient_clip(self) -> float | None:
        return self.recipe.optimizer.gradient_clip

    def samples(self, step: int) -> int:
        stage = self.recipe.stage_at(step)
        return stage.tokens // _length(stage, np.random.default_rng((self.recipe.seed, step)))

    def batch(self, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        # The documents of a step come from one generator: all are drawn, and these taken.
        ids, weights = training_batch(self.recipe, step)
        return ids[list(samples)].to(self.run.device), weights[list(samples)].to(self.run.device)

    def weight(self, batch: tuple[Tensor, Tensor]) -> float:
        return float(batch[1][:, 1:].sum())

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        ids, weights = batch
        logits = self.model(input_ids=ids, use_cache=False).logits
        guesses, truth = logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
        losses = torch.nn.functional.cross_entropy(guesses, truth, reduction="none")
        return (losses * weights[:, 1:].flatten()).sum()

    def evaluate(self) -> dict[str, float]:
        """Fraction of needles answered in held-out documents, and mean next-byte loss on their code, in nats."""
        found: dict[str, float] = {}
        for length, documents in ((512, 8), (2048, 4)):
            answered, losses = list[bool](), list[float]()
            for seed in range(documents):
                document = needle_document(length, 8, seed, split="heldout")
                logits = self.model(input_ids=document.token_ids.to(self.run.device), use_cache=False).logits
                answered.extend(score_needles(logits, document))
                losses.append(next_byte_loss(logits, document))
            found[f"needles at {length}"] = sum(answered) / len(answered)
            found[f"loss at {length}"] = sum(losses) / len(losses)
        return found

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        self.model.save_pretrained(folder)


RECIPE = ByteLlama
