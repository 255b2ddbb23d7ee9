"""Train the byte-level Llama that the demo reads real documents with.

    python -m hf_sparse_attn.recipes.byte_llama --config recipes/byte_llama.yaml --output DIR

The model sees standard-library source with needles in it (`hf_sparse_attn.corpus`) and, early on, strings of random
bytes said over and over, in stages of growing length. It runs on a few processor cores in about an hour, saves as it
goes, and goes on from its last checkpoint with --resume.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import math
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_attn.corpus import FIRST_BYTE, NeedleDocument, needle_document, next_byte_loss, score_needles
from hf_sparse_attn.recipe_config import read_config
from hf_sparse_attn.recipes.byte_llama_init import CircuitConfig, set_circuit

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama; the names are those of `transformers.LlamaConfig`."""

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
        for length in self.lengths:
            if self.tokens % length:
                raise ValueError(f"`lengths` must divide `tokens`, which are {self.tokens}, got {length}")


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with a linear warm-up and a cosine down to `final_fraction` of the peak at step `schedule_steps`.

    The stages may stop short of `schedule_steps`: the rate is then still on its way down at the end.
    """

    learning_rate: float
    warmup_steps: int
    schedule_steps: int
    final_fraction: float
    weight_decay: float
    beta1: float
    beta2: float
    gradient_clip: float


@dataclass(frozen=True)
class LossConfig:
    """Weights of a byte's loss: 1 for code, `answer` for answers, `other` for the rest of the needles' lines."""

    answer: float
    other: float


@dataclass(frozen=True)
class RunConfig:
    """How the run goes about its work, which does not change what it computes."""

    threads: int
    evaluate_every: int
    save_every_seconds: float


@dataclass(frozen=True)
class TrainConfig:
    """Everything the weights depend on, and how to run it."""

    seed: int
    model: ModelConfig
    circuit: CircuitConfig
    optimizer: OptimizerConfig
    loss: LossConfig
    stages: tuple[StageConfig, ...]
    run: RunConfig

    @property
    def total_steps(self) -> int:
        """Steps of all the stages together."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> StageConfig:
        """The stage that the step counted from 0 belongs to."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise ValueError(f"`step` must be less than {self.total_steps}, got {step + self.total_steps}")


def load_config(path: Path) -> TrainConfig:
    """Read a training configuration.

    Args:
        path: a YAML file with exactly the keys of `TrainConfig`.

    Returns:
        The configuration.

    Raises:
        ValueError: a key is missing or unknown.
        TypeError: a value has the wrong type.
    """
    return read_config(TrainConfig, path)


def build_model(config: TrainConfig) -> LlamaForCausalLM:
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


def _copy_document(length: int, rng: np.random.Generator) -> tuple[bytes, np.ndarray]:
    """Random printable bytes with a period drawn anew; only the repetitions, which can be known, count in the loss."""
    period = int(rng.integers(16, length // 2))
    alphabet = rng.integers(32, 127, size=int(rng.integers(8, 95)))
    once = rng.choice(alphabet, size=period)
    body = np.resize(once, length - 1).astype(np.uint8)
    weights = np.zeros(length, dtype=np.float32)
    weights[1 + period + 8 :] = 1.0
    return bytes([FIRST_BYTE]) + body.tobytes(), weights


def _document_weights(document: NeedleDocument, loss: LossConfig) -> np.ndarray:
    weights = np.full(len(document), loss.other, dtype=np.float32)
    for start, stop in document.code_spans:
        weights[start:stop] = 1.0
    for needle in document.needles:
        weights[needle.asked_at : needle.asked_at + len(needle.value)] = loss.answer
    return weights


def training_batch(config: TrainConfig, step: int) -> tuple[Tensor, Tensor]:
    """Draw the batch of one step, which depends on the seed and the step alone.

    Args:
        config: the stages, the loss weights and the seed.
        step: counted from 0 over all the stages.

    Returns:
        Token ids and loss weights, both of shape (batch, length).
    """
    stage = config.stage_at(step)
    rng = np.random.default_rng((config.seed, step))
    length = int(rng.choice(stage.lengths))
    most = max(1, length // stage.bytes_per_needle)
    ids, weights = [], []
    for _ in range(stage.tokens // length):
        if rng.random() < stage.copies:
            text, row_weights = _copy_document(length, rng)
        else:
            needles = int(rng.integers((most + 1) // 2, most + 1))
            document = needle_document(length, needles, int(rng.integers(2**62)), split="train")
            text, row_weights = document.text, _document_weights(document, config.loss)
        ids.append(np.frombuffer(text, dtype=np.uint8))
        weights.append(row_weights)
    return torch.from_numpy(np.stack(ids).astype(np.int64)), torch.from_numpy(np.stack(weights))


def _learning_rate(config: TrainConfig, step: int) -> float:
    optimizer = config.optimizer
    if step < optimizer.warmup_steps:
        return optimizer.learning_rate * (step + 1) / optimizer.warmup_steps
    done = min(1.0, (step - optimizer.warmup_steps) / max(1, optimizer.schedule_steps - optimizer.warmup_steps))
    cosine = 0.5 * (1.0 + math.cos(math.pi * done))
    return optimizer.learning_rate * (optimizer.final_fraction + (1.0 - optimizer.final_fraction) * cosine)


def _make_optimizer(model: LlamaForCausalLM, config: OptimizerConfig) -> torch.optim.AdamW:
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim == 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim != 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, length: int, seeds: Iterable[int], needles: int = 8) -> tuple[float, float]:
    """Measure held-out documents.

    Args:
        model: the model.
        length: bytes in each document.
        seeds: one document for each.
        needles: needles in each.

    Returns:
        Fraction of needles answered and mean next-byte loss on the code, in nats.
    """
    answered: list[bool] = []
    losses: list[float] = []
    for seed in seeds:
        document = needle_document(length, needles, seed, split="heldout")
        logits = model(input_ids=document.token_ids, use_cache=False).logits
        answered.extend(score_needles(logits, document))
        losses.append(next_byte_loss(logits, document))
    return sum(answered) / len(answered), sum(losses) / len(losses)


def _save(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, step: int, seconds: float, output: Path) -> None:
    """Replace the files one by one by finished ones, so that an interruption leaves none half written."""
    with tempfile.TemporaryDirectory(dir=output) as scratch:
        model.save_pretrained(scratch)
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "seconds": seconds}
        torch.save(state, Path(scratch) / "checkpoint.pt")
        for path in Path(scratch).iterdir():
            os.replace(path, output / path.name)


def train(config: TrainConfig, output_dir: Path, resume: bool = False) -> LlamaForCausalLM:
    """Train the model and keep it, with a checkpoint to go on from, in a folder.

    Args:
        config: what to train and how.
        output_dir: folder for the weights, made if missing.
        resume: go on from the checkpoint in the folder where there is one.

    Returns:
        The trained model.
    """
    output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(config.run.threads)
    model = build_model(config)
    optimizer = _make_optimizer(model, config.optimizer)
    first, before = 0, 0.0
    checkpoint = output_dir / "checkpoint.pt"
    if resume and checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, before = state["step"], state["seconds"]
    _LOG.info("%d parameters, %d steps from %d", model.num_parameters(), config.total_steps, first)
    began = saved = time.monotonic()
    recent: list[Tensor] = []
    for step in range(first, config.total_steps):
        if step % config.run.evaluate_every == 0:
            _report(model, config, step, recent, before + time.monotonic() - began)
            recent = []
        recent.append(_train_step(model, optimizer, config, step))
        if time.monotonic() - saved > config.run.save_every_seconds:
            _save(model, optimizer, step + 1, before + time.monotonic() - began, output_dir)
            saved = time.monotonic()
    _report(model, config, config.total_steps, recent, before + time.monotonic() - began)
    _save(model, optimizer, config.total_steps, before + time.monotonic() - began, output_dir)
    return model


def _report(model: LlamaForCausalLM, config: TrainConfig, step: int, losses: list[Tensor], seconds: float) -> None:
    mean = float(torch.stack(losses).mean()) if losses else math.nan
    short, long = evaluate(model, 512, range(8)), evaluate(model, 2048, range(4))
    _LOG.info(
        "step %d/%d, %.0f s: training loss %.3f; held-out needles and loss at 512: %.2f, %.3f; at 2048: %.2f, %.3f",
        *(step, config.total_steps, seconds, mean, *short, *long),
    )


def _train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, config: TrainConfig, step: int) -> Tensor:
    for group in optimizer.param_groups:
        group["lr"] = _learning_rate(config, step)
    ids, weights = training_batch(config, step)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=ids, use_cache=False).logits
    guesses, truth = logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten()
    losses = torch.nn.functional.cross_entropy(guesses, truth, reduction="none")
    wanted = weights[:, 1:].flatten()
    loss = (losses * wanted).sum() / wanted.sum()
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    torch.nn.utils.clip_grad_norm_(model.parameters(), config.optimizer.gradient_clip)
    optimizer.step()
    return loss.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(description="Train the byte-level Llama of the demo.")
    parser.add_argument("--config", type=Path, required=True, help="YAML file with every setting")
    parser.add_argument("--output", type=Path, required=True, help="folder for the weights and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in the output folder")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    train(load_config(options.config), options.output, resume=options.resume)


if __name__ == "__main__":
    main()
