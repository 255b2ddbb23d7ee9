"""What a finished profile does to the whole model, on inputs it was not made from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles.card import card
from hf_sparse_attn.profiles.file import FILE
from hf_sparse_attn.profiles.head_profile import EVALUATION
from hf_sparse_attn.profiling.view.report import render, summary
from hf_sparse_attn.registry import make_method
from tests.support.tiny_encoders import ENCODERS, inputs
from tests.support.tiny_families import MODELS, output
from tests.support.tiny_lm import FAMILIES, tokens

WINDOW = make_method("sliding_window", {"window": 1 / 8, "sink": 2, "block_size": 16})


def _profile(model: Any, batches: list[Any], held_out: list[Any], **options: Any) -> hsa.HeadProfile:
    return hsa.profile(model, batches, [WINDOW], 0.6, progress=False, maps=0, held_out=held_out, **options)


@pytest.fixture(scope="module")
def evaluated() -> hsa.HeadProfile:
    """A profile of a tiny Llama, made at 64 tokens."""
    held_out = [tokens(1, 64, seed=3), tokens(1, 200, seed=4), tokens(1, 200, seed=5)]
    return _profile(FAMILIES["llama"](), [tokens(1, 64)], held_out)


def test_a_language_model_has_its_loss_at_every_length(evaluated: hsa.HeadProfile) -> None:
    model, rows = FAMILIES["llama"](), evaluated.evaluation
    assert [(row["figure"], row["tokens"], row["inputs"]) for row in rows] == [("loss", 64, 1), ("loss", 200, 2)]
    ids = tokens(1, 64, seed=3)
    with torch.no_grad():
        dense = float(model(ids, labels=ids).loss)
        with hsa.patch(model, evaluated, min_tokens=0) as patch:
            sparse = float(model(ids, labels=ids).loss)
    assert rows[0]["dense"] == pytest.approx(dense) and rows[0]["sparse"] == pytest.approx(sparse)
    assert rows[0]["difference"] == pytest.approx(sparse - dense) and sparse != dense
    assert rows[0]["density"] == pytest.approx(patch.report().density)


CASES: dict[str, tuple[Any, Any, int]] = {
    "an encoder": (ENCODERS["bert"], inputs("bert"), 111),
    "images": (ENCODERS["vit"], inputs("vit"), 67),
    "a transformer of videos": (lambda: MODELS["wan"]()[0], MODELS["wan"]()[1], 0),
}


@pytest.mark.parametrize("case", CASES)
def test_other_models_have_the_error_of_their_output(case: str) -> None:
    make, given, length = CASES[case]
    model = make()
    found = hsa.profile(model, [given], [WINDOW], 0.6, progress=False, maps=0, held_out=[given])
    (row,) = found.evaluation
    with torch.no_grad():
        dense = output(model, given)
        with hsa.patch(model, found, min_tokens=0):
            sparse = output(model, given)
    assert row["figure"] == "output error" and row["dense"] == 0 and length in (0, row["tokens"])
    error = float((sparse.double() - dense.double()).norm() / dense.double().norm())
    assert row["sparse"] == row["difference"] == pytest.approx(error, rel=1e-4) and error > 0


def test_a_callable_returns_the_loss(caplog: pytest.LogCaptureFixture) -> None:
    model, ids = FAMILIES["llama"](), tokens(1, 200)
    found = _profile(model, [ids[:, :64]], [lambda model: model(ids, labels=ids).loss])
    # That the length is another than the profile's is what was asked for.
    assert "runs at" not in caplog.text
    with torch.no_grad():
        assert found.evaluation[0]["dense"] == pytest.approx(float(model(ids, labels=ids).loss))


NOTHING: dict[str, tuple[list[Any], str]] = {
    "no inputs": ([], "`held_out` must hold at least one batch"),
    "no result": ([lambda model: None], "`held_out` must lead to a loss or an output"),
}


@pytest.mark.parametrize(("given", "said"), NOTHING.values(), ids=NOTHING)
def test_what_cannot_be_evaluated_is_told(given: list[Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        _profile(FAMILIES["llama"](), [tokens(1, 64)], given)


def test_it_is_saved_and_shown(evaluated: hsa.HeadProfile, tmp_path: Path) -> None:
    evaluated.save_pretrained(tmp_path)
    again = hsa.HeadProfile.from_pretrained(tmp_path)
    for row, saved in zip(evaluated.evaluation, again.evaluation, strict=True):
        assert list(saved) == list(EVALUATION) and saved["figure"] == row["figure"]
        assert [saved[name] for name in EVALUATION[1:]] == pytest.approx([row[n] for n in EVALUATION[1:]], rel=1e-4)
    shown = card(evaluated)
    assert "Quality on inputs it was not made from" in shown and "| 200 | 2 | loss |" in shown
    document = summary(evaluated)
    assert document["evaluation"][1]["tokens"] == 200 and "Whole model" in render(document)


def test_a_file_without_it_is_as_before(evaluated: hsa.HeadProfile, tmp_path: Path) -> None:
    evaluated.save_pretrained(tmp_path)
    value = json.loads((tmp_path / FILE).read_text())
    del value["evaluation"]
    (tmp_path / FILE).write_text(json.dumps(value))
    assert hsa.HeadProfile.from_pretrained(tmp_path).evaluation == ()


WRONG: dict[str, Any] = {
    "no rows": 3,
    "a field too few": [{"figure": "loss"}],
    "no figure": [dict.fromkeys(EVALUATION, 1.0) | {"tokens": 1, "inputs": 1, "density": 0.5, "figure": ""}],
    "no length": [dict.fromkeys(EVALUATION, 1.0) | {"tokens": 0, "inputs": 1, "density": 0.5, "figure": "loss"}],
    "a density": [dict.fromkeys(EVALUATION, 1.0) | {"tokens": 1, "inputs": 1, "density": 2.0, "figure": "loss"}],
    "a word": [dict.fromkeys(EVALUATION, "x") | {"tokens": 1, "inputs": 1, "density": 0.5, "figure": "loss"}],
}


@pytest.mark.parametrize("case", WRONG)
def test_what_a_stranger_wrote_is_refused(case: str, evaluated: hsa.HeadProfile, tmp_path: Path) -> None:
    evaluated.save_pretrained(tmp_path)
    value = json.loads((tmp_path / FILE).read_text()) | {"evaluation": WRONG[case]}
    (tmp_path / FILE).write_text(json.dumps(value))
    with pytest.raises(ValueError, match="`evaluation"):
        hsa.HeadProfile.from_pretrained(tmp_path)


def test_a_run_at_another_length_is_told(evaluated: hsa.HeadProfile, caplog: pytest.LogCaptureFixture) -> None:
    model = FAMILIES["llama"]()
    with caplog.at_level(logging.WARNING), hsa.patch(model, evaluated, min_tokens=0) as patch, torch.no_grad():
        model(tokens(1, 80))
        assert not list(patch.report().notes)
        model(tokens(1, 200))
        model(tokens(1, 200))
        model(tokens(1, 400))
    first, second = patch.report().notes
    assert first.startswith("the profile was measured at 64 tokens and runs at 200, where it was found to do: loss ")
    assert second == "the profile was measured at 64 tokens and runs at 400, of which it has no figures"
    assert caplog.text.count("runs at 200") == 1
