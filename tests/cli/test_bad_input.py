"""Models and inputs that are none: a line that names the argument, the rule and what was given, and status 2."""

from __future__ import annotations

import os
import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.profiling.input_batches import read_wave
from tests.support import tiny_lm
from tests.support.tiny_prompts import _tokenizer


def sound(path: Path, samples: list[int], channels: int = 1) -> None:
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, 16000, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))


def changed(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with models whole and broken, and with inputs that hold nothing."""
    from transformers import LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel, WhisperConfig, WhisperFeatureExtractor
    from transformers import WhisperForConditionalGeneration as Whisper

    root = tmp_path_factory.mktemp("bad")
    text = {"vocab_size": 600, "hidden_size": 32, "intermediate_size": 32}
    lm = LlamaForCausalLM(LlamaConfig(**text, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64))
    for name in ("lm", "no_tokenizer", "cut", "no_weights", "unknown", "zeros", "bad_tokenizer"):
        lm.save_pretrained(root / name)
        if name != "no_tokenizer":
            _tokenizer(64, "a cat", pad_token="<pad>", eos_token="</s>").save_pretrained(root / name)
    weights = root / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    (root / "zeros" / "model.safetensors").write_bytes(bytes(500))
    (root / "no_weights" / "model.safetensors").unlink()
    (root / "bad_tokenizer" / "tokenizer.json").write_text("{no")
    config = root / "unknown" / "config.json"
    config.write_text(changed(config.read_text(), '"model_type": "llama"', '"model_type": "lama"'))
    vit = ViTModel(ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    vit.save_pretrained(root / "no_processor")
    vit.save_pretrained(root / "vit")
    (root / "vit" / "preprocessor_config.json").write_text('{"image_processor_type": "ViTImageProcessor"}')
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 64}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "decoder_start_token_id": 1}
    Whisper(WhisperConfig(**sizes, **heads, **ids)).save_pretrained(root / "speech")
    WhisperFeatureExtractor().save_pretrained(root / "speech")
    (root / "folder").mkdir()
    (root / "empty.txt").write_text("")
    (root / "blank.txt").write_text(" \n\n")
    (root / "short.txt").write_text("Hello.")
    for name in ("a.png", "a.gguf", "a.wav"):
        (root / f"none_{name}").write_bytes(b"")
        (root / f"junk_{name}").write_bytes(b"RI" + bytes(range(200)))
    sound(root / "silent.wav", [0] * 16000)
    sound(root / "hum.wav", [500] * 16000)
    sound(root / "no_samples.wav", [])
    sound(root / "stereo.wav", [n % 700 for n in range(4000)], channels=2)
    (root / "cut.wav").write_bytes((root / "stereo.wav").read_bytes()[:20])
    (root / "half.wav").write_bytes((root / "stereo.wav").read_bytes()[:2001])
    return root


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


MODEL = "`model` must be the folder of a model, its id on the Hub, or one of byte_llama, moving_wan; got"
GGUF = "`model` must be a GGUF file that transformers can read, got"
SPEECH = "speech --part encoder --audio"

CASES = {
    "lm --data short.txt": "`data` must hold at least ",
    "lm --data empty.txt": "`data` must hold text, got none in empty.txt",
    "lm --data blank.txt": "`data` must hold text, got none in blank.txt",
    "lm --length 16 --batches 1": "`batches` must be longer: no method keeps less than all of 16 tokens, batch 0",
    "no_tokenizer": "`model` must come with the files of its tokenizer, got no_tokenizer: ",
    "bad_tokenizer": "`model` must come with the files of its tokenizer, got bad_tokenizer: ",
    "folder": f"{MODEL} 'folder': it holds neither config.json nor model_index.json",
    "a/b": f"{MODEL} 'a/b': it holds neither config.json nor model_index.json, as far as the Hub can be reached",
    "cut": f"{MODEL} 'cut': ",
    "zeros": f"{MODEL} 'zeros': ",
    "no_weights": f"{MODEL} 'no_weights': ",
    "unknown": f"{MODEL} 'unknown': The checkpoint you are trying to load has model type `lama`",
    "nope.gguf": "`model` must be a GGUF file that is there, got nope.gguf",
    "none_a.gguf": f"{GGUF} none_a.gguf: ",
    "junk_a.gguf": f"{GGUF} junk_a.gguf: ",
    "foo.gguf": f"{GGUF} foo.gguf: GGUF model with architecture foo is not supported yet.",
    "no_processor --images noise.png": "`model` must come with the files of its image processor, got no_processor: ",
    "vit --images black.png": "`images` must show something, got one colour all over in black.png",
    "vit --images red.png": "`images` must show something, got one colour all over in red.png",
    "vit --images none_a.png": "`images` must be pictures, got none_a.png: ",
    "vit --images junk_a.png": "`images` must be pictures, got junk_a.png: ",
    "vit --images cut.png": "`images` must be pictures, got cut.png: ",
    "vit --images folder": "`images` must be pictures, or a folder of them, got folder",
    f"{SPEECH} silent.wav": "`audio` must hold sound, got silence in silent.wav",
    f"{SPEECH} hum.wav": "`audio` must hold sound, got silence in hum.wav",
    f"{SPEECH} no_samples.wav": "`audio` must hold samples of 8, 16 or 32 bits, got 0 bytes in no_samples.wav",
    f"{SPEECH} none_a.wav": "`audio` must be WAV files, got none_a.wav: it ends too soon",
    f"{SPEECH} cut.wav": "`audio` must be WAV files, got cut.wav: it ends too soon",
    f"{SPEECH} junk_a.wav": "`audio` must be WAV files, got junk_a.wav: file does not start with RIFF id",
}


def pictures() -> None:
    """Made where Pillow is."""
    image = pytest.importorskip("PIL.Image")
    image.new("RGB", (64, 64)).save("black.png")
    image.new("RGB", (64, 64), (200, 30, 30)).save("red.png")
    image.frombytes("RGB", (64, 64), bytes(n * n % 251 for n in range(64 * 64 * 3))).save("noise.png")
    Path("cut.png").write_bytes(Path("noise.png").read_bytes()[:-500])


@pytest.mark.parametrize("line", CASES, ids=lambda line: line.replace(" ", "-"))
def test_one_clear_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    if ".png" in line and not Path(line.split()[-1]).exists():
        pictures()
    if ".gguf" in line and line != "nope.gguf":
        gguf = pytest.importorskip("gguf")
        if line == "foo.gguf":
            writer = gguf.GGUFWriter("foo.gguf", "foo")
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.close()
    assert main(["profile", *line.split(), "--output", "o"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"hf-sparse-attn: error: {CASES[line]}"), last


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("lm --texts short.txt", "`texts` must hold at least "),
        ("lm --texts empty.txt", "`texts` must hold text, got none in empty.txt"),
        ("no_tokenizer", "`model` must come with the files of its tokenizer, got no_tokenizer: "),
        ("folder", f"{MODEL} 'folder': it holds neither config.json nor model_index.json"),
        (SPEECH.replace("--audio", "--audio silent.wav"), "`audio` must hold sound, got silence in silent.wav"),
        ("vit --images black.png", "`images` must show something, got one colour all over in black.png"),
    ],
    ids=["short", "empty", "no-tokenizer", "folder", "silent", "black"],
)
def test_eval_says_the_same(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    if ".png" in line:
        pictures()
    assert main(["eval", *line.split()]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"hf-sparse-attn: error: {said}"), last


def test_sound_that_ends_within_a_sample() -> None:
    whole, half = (read_wave(Path(name), 16000) for name in ("stereo.wav", "half.wav"))
    assert len(half) == (2001 - 44) // 4 and torch.equal(half, whole[: len(half)])


def refused(model: Any, batch: dict[str, torch.Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        hsa.profile(model, [batch], progress=False, maps=0)


def test_a_profile_is_not_made_of_nothing() -> None:
    from transformers import ViTConfig, ViTModel

    text = tiny_lm.FAMILIES["llama"]()
    refused(text, {"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"`batches` must hold values, batch 0 has none")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    images = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=4)).eval()
    # Black, after each channel was scaled by its own mean and spread.
    black = torch.tensor([-2.1, -2.0, -1.8]).view(1, 3, 1, 1).expand(2, 3, 32, 32)
    refused(images, {"pixel_values": black}, r"`batches` must show something, 'pixel_values' of batch 0 is one value")
    some = black.clone()
    some[1, 2, 3, 4] = 0
    window = hsa.get_method("sliding_window")(window=8, sink=1, block_size=16)
    made = hsa.profile(images, [{"pixel_values": some}], [window], budget=1.0, progress=False, maps=0)
    assert made.model.heads == 2


def test_texts_shorter_than_a_block_are_told() -> None:
    model = tiny_lm.FAMILIES["llama"]()
    for name in ("sliding_window", "block_topk", "xattention", "vertical_slash", "strided", "flexprefill"):
        with hsa.patch(model, name, min_tokens=0) as applied, torch.no_grad():
            model(torch.arange(20)[None])
        assert any("keeps all keys of a call of 20 tokens" in note for note in applied.notes), name
    assert os.listdir("folder") == []
