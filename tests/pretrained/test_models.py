"""Real weights are those that they should be: what each model is known to do, and errors where a package is absent."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse_attn.extras import EXTRAS, MissingExtra
from hf_sparse_attn.pretrained import NAMES, dinov2, images, package_folder, smollm2, speech, texts, whisper
from tests.support.real_weights import PACKAGES, why_not

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Any]:
    return smollm2.load_model(), smollm2.load_tokenizer()


@pytest.mark.real
@torch.no_grad()
def test_smollm2_knows_the_capital_of_france(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    asked = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert tokenizer.decode(model(asked).logits[0, -1].argmax()) == " Paris"
    assert model.config.num_hidden_layers == 30 and next(model.parameters()).dtype == torch.float32
    assert smollm2.load_model(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.real
@torch.no_grad()
def test_smollm2_reads_and_answers(llama: tuple[Any, Any]) -> None:
    model, tokenizer = llama
    document = texts.needle_document(tokenizer, texts.HELD_OUT["types"], 640, needles=4)
    logits = model(document.token_ids).logits
    assert 2 < document.loss(logits) < 3.2
    assert sum(document.answered(logits)) >= 3


@pytest.mark.real
@torch.no_grad()
def test_dinov2_sees_an_image_and_its_mirror_alike() -> None:
    model = dinov2.load_model()
    found = []
    for image in images.images(3):
        for view in (image, image[:, ::-1]):
            found.append(model(pixel_values=dinov2.pixels(view, 224)).last_hidden_state[0, 0])
    cosine = torch.nn.functional.cosine_similarity(torch.stack(found)[:, None], torch.stack(found), dim=-1)
    same = torch.block_diag(*[torch.ones(2, 2)] * 3).bool()
    assert cosine[same].min() > 0.9 and cosine[~same].max() < 0.8


@pytest.mark.real
@torch.no_grad()
def test_saliency_is_of_the_thing_and_not_of_the_border() -> None:
    """The astronaut stands in the middle of her photograph."""
    image = images.images(1, names=("astronaut.png",))[0]
    hidden = dinov2.load_model()(pixel_values=dinov2.pixels(image, 224)).last_hidden_state
    found = dinov2.load_decoder()(hidden)
    assert found.shape == (1, 1, 128, 128) and 0 <= found.min() and found.max() <= 1
    assert found[..., 32:96, 32:96].mean() > found[..., :16].mean() + 0.2


@pytest.mark.parametrize(
    "shape, dtype, side, said",
    [
        ((20, 20), "uint8", 28, "`image` must be [height, width, 3] of uint8, got [20, 20] of uint8"),
        ((20, 20, 3), "float32", 28, "`image` must be [height, width, 3] of uint8, got [20, 20, 3] of float32"),
        ((20, 20, 3), "uint8", 30, "`side` must be a multiple of 14, got 30"),
        ((20, 20, 3), "uint8", 0, "`side` must be a multiple of 14, got 0"),
    ],
)
def test_images_that_are_none(shape: tuple[int, ...], dtype: str, side: int, said: str) -> None:
    import numpy as np

    with pytest.raises(ValueError, match=re.escape(said)):
        dinov2.pixels(np.zeros(shape, dtype), side)


def word_errors(count: int) -> list[float]:
    model, tokenizer, extractor = whisper.load_model(), whisper.load_tokenizer(), whisper.load_extractor()
    found = []
    for sentence in speech.sentences[:count]:
        wave = speech.speak(sentence)
        features = extractor(wave, sampling_rate=speech.RATE, return_tensors="pt").input_features
        found.append(speech.word_error(sentence, whisper.transcribe(model, tokenizer, features)))
    return found


@pytest.mark.real
def test_whisper_understands() -> None:
    assert max(word_errors(2)) < 0.1


@pytest.mark.real
@pytest.mark.slow
def test_whisper_understands_ten_sentences() -> None:
    found = word_errors(10)
    assert len(found) == 10 and sum(found) / 10 < 0.12 and max(found) < 0.4


@pytest.mark.real
def test_a_folder_that_was_not_finished_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tokenizer:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            raise OSError("disk full")

    class Model:
        @staticmethod
        def from_pretrained(*_: Any, **__: Any) -> Any:
            return torch.nn.Linear(1, 1)

    monkeypatch.setattr(smollm2, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM", Model)
    monkeypatch.setattr("transformers.AutoTokenizer", Tokenizer)
    with pytest.raises(OSError, match="disk full"):
        smollm2.model_folder()
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


@pytest.mark.parametrize("package", PACKAGES)
def test_an_absent_package_is_named_with_its_extra(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse_attn.pretrained.find_spec", lambda name: None)
    said = f"SmolLM2 needs {package} (pip install 'hf-sparse-attn[real]')"
    with pytest.raises(MissingExtra, match=re.escape(said)):
        package_folder("SmolLM2", package)
    assert why_not() == f"the test needs {PACKAGES[0]} (pip install 'hf-sparse-attn[real]')"


def test_loaders_say_what_is_absent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for room in (smollm2, dinov2, whisper, images):

        def absent(what: str, package: str) -> Path:
            raise MissingExtra(what, package)

        monkeypatch.setattr(room, "package_folder", absent)
    monkeypatch.setitem(__import__("sys").modules, "espeakng_loader", None)
    uses = [smollm2.load_model, smollm2.load_tokenizer, dinov2.load_model, dinov2.load_decoder, whisper.load_model,
            whisper.load_tokenizer, lambda: images.images(1), lambda: speech.speak("hello")]  # fmt: skip
    for use in uses:
        with pytest.raises(MissingExtra, match=r"needs .*hf-sparse-attn\[real\]"):
            use()


def test_packages_are_pinned_alike_in_the_extra_and_for_ci() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    (extra,) = re.findall(r"^real = \[(.*)\]", text, re.M)
    pinned = {name.split(";")[0] for name in re.findall(r'"([^"]*)"', extra)}
    lines = (ROOT / ".ci" / "real.txt").read_text().splitlines()
    assert pinned == {line.split(";")[0] for line in lines if line and not line.startswith("#")}
    assert all("==" in name for name in pinned)
    assert {name.split("==")[0] for name in pinned} >= {name for name, of in EXTRAS.items() if of == "real"}
    assert "real" not in re.findall(r"^all = .*", text, re.M)[0]
    assert NAMES == ("smollm2", "dinov2", "whisper")
