"""Folders of tiny models of every kind with what reads for them, and files of texts, pictures and sound."""

from __future__ import annotations

import wave
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tests.support import tiny_lm
from tests.support.tiny_encoders import ENCODERS

WORDS = [f"w{i}" for i in range(90)]
TEXT = " ".join(WORDS * 30)


def _tokenizer(folder: Path, **options: Any) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"[UNK]": 0, **{word: i for i, word in enumerate(WORDS, 1)}}, "[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", **options).save_pretrained(folder)


def _image_processor(folder: Path, kind: str) -> None:
    import transformers

    sizes: dict[str, Any] = {
        "ViTImageProcessor": {"size": {"height": 24, "width": 44}},
        "CLIPImageProcessor": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        "BitImageProcessor": {"size": {"shortest_edge": 24}, "crop_size": {"height": 24, "width": 24}},
        "VideoMAEImageProcessor": {"size": {"shortest_edge": 28}, "crop_size": {"height": 20, "width": 28}},
    }
    getattr(transformers, kind)(**sizes[kind]).save_pretrained(folder)


def make_models(root: Path) -> Path:
    """Folders of tiny models of every kind, with what makes their inputs."""
    from transformers import Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

    for name in ("bert", "roberta", "distilbert", "bart", "vit", "dinov2", "videomae", "clip", "wav2vec2", "whisper"):
        changes = {"max_position_embeddings": 66} if name in ("bert", "roberta") else {}
        ENCODERS[name](**changes).save_pretrained(root / name)
    tiny_lm.FAMILIES["llama"]().save_pretrained(root / "llama")
    for name in ("bert", "roberta", "distilbert", "bart", "clip", "llama"):
        _tokenizer(root / name)
    ENCODERS["bert"]().save_pretrained(root / "wordless")
    for name, kind in (("vit", "ViT"), ("dinov2", "Bit"), ("videomae", "VideoMAE"), ("clip", "CLIP")):
        _image_processor(root / name, f"{kind}ImageProcessor")
    Wav2Vec2FeatureExtractor(feature_size=1).save_pretrained(root / "wav2vec2")
    WhisperFeatureExtractor(feature_size=8, chunk_length=1, n_fft=400, hop_length=131).save_pretrained(
        root / "whisper"
    )
    (root / "nothing").mkdir()
    return root


def make_files(root: Path) -> Path:
    """Texts, pictures and sounds, and such of each as say nothing."""
    for name in ("texts", "pictures", "clip", "sounds", "black", "silent"):
        (root / name).mkdir()
    (root / "text.txt").write_text(TEXT)
    (root / "short.txt").write_text("w1 w2 w3")
    (root / "texts" / "a.txt").write_text(TEXT)
    (root / "texts" / "b.txt").write_text(TEXT)
    draw = np.random.default_rng(0)
    pictures = [Image.fromarray(draw.integers(0, 255, (40, 50, 3), np.uint8)) for _ in range(12)]
    for i, picture in enumerate(pictures[:2]):
        picture.save(root / "pictures" / f"{i}.png")
    pictures[0].save(root / "clip" / "all.gif", save_all=True, append_images=pictures[1:])
    Image.new("RGB", (40, 50)).save(root / "black" / "0.png")
    for name, sound in (("sounds", draw.integers(-9000, 9000, 8000)), ("silent", np.zeros(8000))):
        for i in range(2):
            with wave.open(str(root / name / f"{i}.wav"), "wb") as out:
                out.setparams((1, 2, 8000, 0, "NONE", ""))
                out.writeframes(sound.astype("<i2").tobytes())
    return root
