"""The shipped model and the recipe that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiling.observe import capture
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.recipes.shipped import byte_llama
from hf_sparse_attn.shipped.byte_llama import load_model
from hf_sparse_attn.shipped.corpus import needle_document, next_byte_loss, score_needles
from hf_sparse_attn.training.loop import train

YAML = Path(__file__).parents[2] / "recipes" / "shipped" / "byte_llama.yaml"


@pytest.fixture(scope="module")
def model():
    return load_model()


def read(model, document):
    with torch.no_grad():
        return model(document.token_ids, use_cache=False).logits


def test_it_answers_densely_and_reads_code(model) -> None:
    documents = [needle_document(2048, needles=8, seed=seed) for seed in range(5)]
    answered = [sum(score_needles(read(model, d), d)) for d in documents]
    assert sum(answered) >= 0.9 * 40
    assert all(next_byte_loss(read(model, d), d) < 1.6 for d in documents)


def test_a_window_alone_cannot_answer(model) -> None:
    document = needle_document(2048, needles=8, seed=3)
    with hsa.patch(model, "sliding_window", window=128, sink=16, min_tokens=0):
        assert sum(score_needles(read(model, document), document)) <= 2
    assert sum(score_needles(read(model, document), document)) >= 7


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="the shipped model must be at"):
        load_model(tmp_path)


def test_the_recipe_builds_the_shipped_architecture(model) -> None:
    built = byte_llama.build_model(recipe())
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == want


def test_offset_heads_look_back_from_the_start() -> None:
    built = byte_llama.build_model(recipe()).eval()
    document = needle_document(600, needles=4, seed=0)
    q, k, _, ctx = capture(built, document.token_ids)[0]
    for head in range(5):
        weights = (q[0, head, 300] @ k[0, head // 2, :301].T * ctx.softmax_scale).softmax(-1)
        assert int(weights.argmax()) == 300 - (head + 1)


def recipe() -> byte_llama.ByteLlama:
    made = read_recipe("byte_llama")
    assert isinstance(made, byte_llama.ByteLlama)
    return made


def test_the_shipped_recipe_has_all_its_steps() -> None:
    assert recipe().total_steps == 2650
    with pytest.raises(ValueError, match="`step` must be less than 2650, got 2650"):
        recipe().stage_at(2650)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_llama.ByteLlamaTask, "evaluate", lambda self: {})
    stage = replace(recipe().stages[0], steps=4, tokens=512, lengths=(256,))
    config = replace(recipe(), stages=(stage,), threads=1, save_every=1)
    train(config, tmp_path / "whole", progress=False)

    def stopped(self: byte_llama.ByteLlamaTask, step: int) -> None:
        if step == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(byte_llama.ByteLlamaTask, "begin_step", stopped)
        train(config, tmp_path / "parts", progress=False)
    train(config, tmp_path / "parts", resume=True, progress=False)
    whole, parts = (load_model(tmp_path / name / "result").state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_a_batch_is_made_of_its_documents() -> None:
    task = byte_llama.ByteLlamaTask(recipe(), Run(Path("."), torch.device("cpu")))
    count = task.samples(300)
    whole, part = task.batch(300, range(count)), task.batch(300, [1, 3])
    assert len(whole[0]) == count and whole[0].numel() == 8192
    assert torch.equal(part[0], whole[0][[1, 3]]) and torch.equal(part[1], whole[1][[1, 3]])
    assert task.weight(part) == pytest.approx(float(part[1][:, 1:].sum()))


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ("seed: 0", "seeds: 0", ValueError, "seeds"),
        ("seed: 0", "seed: zero", TypeError, "seed"),
        ("  hidden_size: 144\n", "", ValueError, "hidden_size"),
        ("lengths: [256, 512]", "lengths: []", ValueError, "`lengths` must hold at least one"),
        ("lengths: [256, 512]", "lengths: [32]", ValueError, "`lengths` must be at least 34, got 32"),
        ("steps: 250", "steps: 0", ValueError, "`steps` must be at least 1, got 0"),
        ("copies: 0.2", "copies: 2", ValueError, "`copies` must be from 0 to 1, got 2"),
    ],
    ids=["unknown", "type", "missing", "lengths", "short", "steps", "copies"],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    text = YAML.read_text()
    assert old in text
    (tmp_path / "bad.yaml").write_text(text.replace(old, new))
    with pytest.raises(error, match=message):
        read_recipe(tmp_path / "bad.yaml")
