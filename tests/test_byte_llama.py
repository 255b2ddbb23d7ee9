"""The shipped model and the recipe that made it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.corpus import needle_document, next_byte_loss, score_needles
from hf_sparse_attn.demo import load_model
from hf_sparse_attn.observe import capture
from hf_sparse_attn.recipes import byte_llama

YAML = Path(__file__).parents[1] / "recipes" / "byte_llama.yaml"


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
    built = byte_llama.build_model(byte_llama.load_config(YAML))
    want = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    assert {name: tuple(value.shape) for name, value in built.state_dict().items()} == want


def test_offset_heads_look_back_from_the_start() -> None:
    built = byte_llama.build_model(byte_llama.load_config(YAML)).eval()
    document = needle_document(600, needles=4, seed=0)
    q, k, _, ctx = capture(built, document.token_ids).calls[0]
    for head in range(5):
        weights = (q[0, head, 300] @ k[0, head // 2, :301].T * ctx.softmax_scale).softmax(-1)
        assert int(weights.argmax()) == 300 - (head + 1)


def test_training_goes_on_where_it_was_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(byte_llama, "_report", lambda *given: None)
    threads = torch.get_num_threads()
    config = byte_llama.load_config(YAML)
    stage = replace(config.stages[0], tokens=512, lengths=(256,))
    long, short = (
        replace(config, stages=(replace(stage, steps=n),), run=replace(config.run, threads=1)) for n in (4, 2)
    )
    try:
        whole = byte_llama.train(long, tmp_path / "whole")
        byte_llama.train(short, tmp_path / "parts")
        resumed = byte_llama.train(long, tmp_path / "parts", resume=True)
    finally:
        torch.set_num_threads(threads)
    for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    assert load_model(tmp_path / "parts").num_parameters() == whole.num_parameters()


@pytest.mark.parametrize(
    "old, new, error, message",
    [
        ("seed: 0", "seeds: 0", ValueError, "seeds"),
        ("seed: 0", "seed: zero", TypeError, "seed"),
        ("  hidden_size: 144\n", "", ValueError, "hidden_size"),
    ],
    ids=["unknown", "type", "missing"],
)
def test_a_bad_recipe_is_refused(tmp_path: Path, old: str, new: str, error: type[Exception], message: str) -> None:
    text = YAML.read_text()
    assert old in text
    (tmp_path / "bad.yaml").write_text(text.replace(old, new))
    with pytest.raises(error, match=message):
        byte_llama.load_config(tmp_path / "bad.yaml")
