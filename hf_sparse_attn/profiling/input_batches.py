"""Batches of texts, images and speech for a model, or for a part of it; see profiling/inputs.py."""

from __future__ import annotations

import inspect
import os
import wave
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.extras import needing
from hf_sparse_attn.family import find_family
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.profiling.measure import Batch
from hf_sparse_attn.sharing.fingerprint import parts_of
from hf_sparse_attn.sharing.hub import reading

# Tokens of a text where nothing is said, as far as the model has positions for them.
LENGTH = 4096
# Tokens to which texts are cut at most where they are too few for more.
_SHORTEST = 64
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
# Bytes of a sample in a WAV file -> how it is stored, what zero is, and the largest.
_SAMPLES = {1: (torch.uint8, 128, 128.0), 2: (torch.int16, 0, 32768.0), 4: (torch.int32, 0, 2147483648.0)}

Source = str | os.PathLike[str]
# A file, a folder of files, or what stands in them.
Given = Source | Sequence[Any]
# What a model's inputs are made with, by its name.
Find = Callable[[str], Any]
# By their modules: transformers 5.17 hides its image processors under the short name where torchvision is missing.
_READERS = {
    "tokenizer": ("tokenization_auto", "AutoTokenizer"),
    "image processor": ("image_processing_auto", "AutoImageProcessor"),
    "feature extractor": ("feature_extraction_auto", "AutoFeatureExtractor"),
}


class Loaded(NamedTuple):
    """A model with what it is run on.

    Args:
        model: a transformers model or a part of one, a diffusers pipeline, or a shipped model.
        batches: as `profile` takes them.
        source: what they are, in words.
    """

    model: Any
    batches: list[Batch]
    source: str


class Wanted(NamedTuple):
    """What was asked for, options by name."""

    model: str
    options: Mapping[str, Any]
    number: int
    seed: int
    shorter: bool = False

    def refuse(self, *names: str) -> None:
        """Options that would be ignored."""
        wrong = [f"--{name}" for name in names if name in self.options]
        if wrong:
            raise ValueError(f"{' and '.join(wrong)} must be left out for {self.model}")

    def refuse_all_but(self, *names: str) -> None:
        """The same of all others."""
        self.refuse(*(name for name in self.options if name not in names))

    def one_of(self, *names: str) -> tuple[str, Any]:
        """The first option that was given, with its name; the last one as None where none was."""
        return next(((name, self.options[name]) for name in names if name in self.options), (names[-1], None))


def with_batches(given: Wanted, whole: Any, find: Find) -> Loaded:
    """A model of transformers, or the part that is wanted, with its batches."""
    part = whole if "part" not in given.options else find_part(whole, given.options["part"])
    # A decoder needs what its encoder says: the whole is run, and the part alone is looked at.
    alone = part is whole or not _needs_encoder(part)
    reads = part if alone else whole
    batches, source = _batches(given, reads, find)
    if not alone:
        batches = [_run_within(whole, batch) for batch in batches]
    return Loaded(part, batches, source)


def find_part(model: Any, name: str) -> Any:
    """A part of a model that can be profiled by itself.

    Args:
        model: a model of transformers.
        name: where it stands, "model.encoder", or the end of that.

    Raises:
        ValueError: there is none, or more than one.
    """
    known = _known_parts(model)
    found = [part for place, part in known.items() if place == name or place.endswith(f".{name}")]
    if len(found) != 1:
        names = ", ".join(known) or "none: the model is one"
        raise ValueError(f"`part` must be one of {names}; got {name!r}{nearest(name, known)}")
    return found[0]


def _known_parts(model: Any) -> dict[str, Any]:
    return dict(parts_of(model, find_family(model)[2]))


def _needs_encoder(part: nn.Module) -> bool:
    return "encoder_hidden_states" in _takes(part) and getattr(
        getattr(part, "config", None), "is_encoder_decoder", False
    )


def _takes(model: nn.Module) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


def _run_within(whole: Any, batch: Mapping[str, Any]) -> Callable[[Any], Any]:
    def run(part: Any) -> Any:
        device = next(whole.parameters()).device
        out = whole(**{name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items()})
        return out if getattr(out, "loss", None) is None else out.loss

    return run


def _batches(given: Wanted, model: Any, find: Find) -> tuple[list[Any], str]:
    """Batches of what a model reads, by its main input, and what they are."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main == "pixel_values":
        given.refuse("texts", "data", "audio", "length")
        return _image_batches(given, model, find("image processor")), "images"
    if main in ("input_features", "input_values"):
        given.refuse("texts", "data", "images", "length", "size")
        return _speech_batches(given, model, find("feature extractor")), "speech"
    if "images" in given.options and "part" not in given.options:
        towers = [name for name, part in _known_parts(model).items() if part.main_input_name == "pixel_values"]
        if towers:
            raise ValueError(f"`part` must say what of {given.model} reads images: {' or '.join(towers)}")
    given.refuse("images", "audio", "size")
    argument, texts = given.one_of("texts", "data")
    said = "standard library" if texts is None else Path(texts).name if _is_source(texts) else "texts"
    return _text_batches(given, model, find("tokenizer"), argument, texts), said


def _is_source(given: Any) -> bool:
    return isinstance(given, (str, os.PathLike))


def found_by(where: str, file: str | None) -> Find:
    """What comes with a model in a folder or repository; `file` is its GGUF file."""

    def find(what: str) -> Any:
        module, name = _READERS[what]
        kind: Any = getattr(import_module(f"transformers.models.auto.{module}"), name)
        try:
            return kind.from_pretrained(where, **({} if file is None else {"gguf_file": file}))
        # The libraries have errors of many kinds for what they cannot read.
        except Exception as error:
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"`model` must come with the files of its {what}, got {where}: {said}") from error

    return find


# ---------------------------------------------------------------------- texts


def _text_batches(given: Wanted, model: Any, tokenizer: Any, argument: str, texts: Given | None) -> list[Any]:
    lengths = given.options.get("length")
    table = _positions(model)
    text = _joined(argument, texts)
    if lengths is None:
        longest = min(LENGTH, _longest(model, tokenizer, table))
        if given.shorter:
            held = len(tokenizer(text[: 16 * longest * given.number], verbose=False).input_ids)
            longest = min(longest, max(_SHORTEST, held // given.number))
        lengths = (longest,)
    for length in lengths:
        if check_int("length", length, 16) > (table or length):
            raise ValueError(f"`length` must be at most {table}, the positions of {given.model}, got {length}")
    takes = _takes(model)
    made = []
    for ids in _token_ids(tokenizer, text, lengths, given.number, argument):
        _check_known(ids, model, tokenizer, given.model)
        batch = {"input_ids": ids}
        # A model that fills in what is masked has no loss on a whole text.
        if "labels" in takes and model.can_generate():
            batch["labels"] = ids
        if "decoder_input_ids" in takes:
            batch["decoder_input_ids"] = _decoder_start(model, ids)
        made.append(batch)
    return made


def read_text(argument: str, source: Source) -> str:
    """The text of a file in UTF-8, or of all files of a folder in the order of their names.

    Args:
        argument: that names it, for errors.
        source: the file or folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8, holds no text, or is a folder without files.
    """
    path = Path(source)
    try:
        files = sorted(p for p in path.iterdir() if p.is_file()) if argument != "data" and path.is_dir() else [path]
        text = "\n".join(file.read_text(encoding="utf-8") for file in files)
    except OSError as error:
        raise type(error)(f"`{argument}` must be a file that can be read, got {source}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`{argument}` must be a text in UTF-8, got {source}: {error}") from error
    if not files:
        raise ValueError(f"`{argument}` must be a file or a folder that holds some, got {source}")
    if not text.strip():
        raise ValueError(f"`{argument}` must hold text, got none in {source}")
    return text


def _joined(argument: str, texts: Given | None) -> str:
    """All that there is to read, in one."""
    if texts is None:
        from hf_sparse_attn.shipped.corpus import standard_library_text

        return "\n".join(part.decode("utf-8", "replace") for _, part in standard_library_text("train")[:200])
    if isinstance(texts, (str, os.PathLike)):
        return read_text(argument, texts)
    return "\n".join(texts)


def _token_ids(tokenizer: Any, text: str, lengths: Sequence[int], count: int, argument: str) -> list[Tensor]:
    """Runs of tokens from the start of a text, each of its own, `count` of each length; [1, length] each."""
    wanted = sum(lengths) * count
    # Far more characters than that make no difference and take long to tokenise.
    ids = tokenizer(text[: 16 * wanted], return_tensors="pt", verbose=False).input_ids
    if ids.shape[1] < wanted:
        raise ValueError(
            f"`{argument}` must hold at least {wanted} tokens for {count} texts of each length, got {ids.shape[1]}"
        )
    sizes = [length for length in lengths for _ in range(count)]
    return list(ids[:, :wanted].split(sizes, dim=1))


def _check_known(ids: Tensor, model: Any, tokenizer: Any, name: str) -> None:
    """A folder without a vocabulary gets a tokenizer that knows no word, or one of another model."""
    entries = model.get_input_embeddings().num_embeddings
    unknown = 0.0 if tokenizer.unk_token_id is None else float((ids == tokenizer.unk_token_id).float().mean())
    if unknown > 0.5 or int(ids.max()) >= entries:
        said = f"{unknown:.0%} of the text is unknown to it" if unknown > 0.5 else f"it has token {int(ids.max())}"
        raise ValueError(f"`model` must come with the tokenizer of its {entries} tokens, got {name}: {said}")


def _decoder_start(model: Any, ids: Tensor) -> Tensor:
    """What a decoder reads to write a text: its start, then all but the last token."""
    config = model.config.get_text_config(decoder=True)
    known = (getattr(config, key, None) for key in ("decoder_start_token_id", "bos_token_id"))
    # A small model may have kept the tokens of a large one in its config.
    start = next((n for n in known if isinstance(n, int) and n < config.vocab_size), 0)
    return torch.cat([torch.full_like(ids[:, :1], start), ids[:, :-1]], 1)


def _positions(model: Any) -> int | None:
    """How many positions a model has learned; None where it computes them."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and "relative" not in name:
            # RoBERTa counts from behind the padding token; BART has a fixed number of entries before the first.
            before = getattr(module, "offset", None) or (0 if module.padding_idx is None else module.padding_idx + 1)
            return module.num_embeddings - int(before)
    return None


def _longest(model: Any, tokenizer: Any, table: int | None) -> int:
    """Tokens of the longest text that a model and its tokenizer were made for."""
    config = model.config.get_text_config()
    known = [table, tokenizer.model_max_length, getattr(config, "max_position_embeddings", None)]
    return min((n for n in known if isinstance(n, int) and n > 0), default=LENGTH)


# ---------------------------------------------------------------------- images and speech


def _files(given: Wanted, argument: str, endings: frozenset[str], what: str) -> list[Any]:
    """The files that were given, in the order of their names; or what was given in their place."""
    source = given.options.get(argument)
    if source is None:
        raise ValueError(f"`{argument}` must be given for {given.model}: {what}, or a folder of them")
    if not isinstance(source, (str, os.PathLike)):
        return list(source)
    path = Path(source)
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    found = [file for file in files if file.suffix.lower() in endings and file.is_file()]
    if not found:
        raise (ValueError if path.exists() else FileNotFoundError)(
            f"`{argument}` must be {what}, or a folder of them, got {source}"
        )
    return list(found)


def _image_batches(given: Wanted, model: Any, processor: Any) -> list[Any]:
    frames = int(getattr(model.config, "num_frames", 0) or 0)
    pictures = _pictures(_files(given, "images", _PICTURES, "pictures"), given.number * max(1, frames), frames > 0)
    if len(pictures) < max(1, frames):
        raise ValueError(f"`images` must hold at least {frames} frames for a clip, got {len(pictures)}")
    # Short of pictures the batches are fewer.
    shown = [pictures[i : i + frames] for i in range(0, len(pictures) - frames + 1, frames)] if frames else pictures
    size, more = given.options.get("size"), {}
    options: dict[str, Any] = {"return_tensors": "pt"}
    if size is not None:
        check_int("size", size, 16)
        square = {"height": size, "width": size}
        shortest = "shortest_edge" in (getattr(processor, "size", None) or {})
        options |= {"size": {"shortest_edge": size} if shortest else square, "crop_size": square}
        if "interpolate_pos_encoding" in _takes(model):
            more = {"interpolate_pos_encoding": True}
    return [{"pixel_values": processor(one, **options).pixel_values, **more} for one in shown[: given.number]]


def _pictures(files: Sequence[Any], most: int, every: bool) -> list[Any]:
    """The first pictures in files, all frames of an animation with `every`, else its first."""
    with needing("a picture"):
        from PIL import Image, ImageSequence

    found: list[Any] = []
    for file in files:
        if not isinstance(file, Path):
            found.append(file)
            continue
        with reading(f"`images` must be pictures, got {file}"):
            with Image.open(file) as opened:
                for frame in ImageSequence.Iterator(opened):
                    found.append(frame.convert("RGB"))
                    if not every or len(found) >= most:
                        break
        if all(low == high for low, high in found[-1].getextrema()):
            raise ValueError(f"`images` must show something, got one colour all over in {file}")
        if len(found) >= most:
            break
    return found[:most]


def _speech_batches(given: Wanted, model: Any, extractor: Any) -> list[Any]:
    rate = int(extractor.sampling_rate)
    made = []
    for recording in _files(given, "audio", frozenset({".wav"}), "WAV files")[: given.number]:
        sound = read_wave(recording, rate) if isinstance(recording, Path) else torch.as_tensor(recording)
        if sound.min() == sound.max():
            raise ValueError(f"`audio` must hold sound, got silence in {recording}")
        features = extractor(sound.numpy(), sampling_rate=rate, return_tensors="pt")
        batch = {name: features[name] for name in (model.main_input_name,)}
        if "decoder_input_ids" in _takes(model):
            batch["decoder_input_ids"] = _decoder_start(model, torch.zeros(1, 1, dtype=torch.int64))
        made.append(batch)
    return made


def read_wave(file: Path, rate: int) -> Tensor:
    """The sound of a WAV file, channels averaged.

    Args:
        file: with whole numbers of 8, 16 or 32 bits.
        rate: samples in a second that are wanted; others are interpolated.

    Returns:
        float32 [samples] in [-1, 1].

    Raises:
        ValueError: no such file.
    """
    try:
        with wave.open(str(file), "rb") as opened:
            width, channels, own = opened.getsampwidth(), opened.getnchannels(), opened.getframerate()
            content = bytearray(opened.readframes(opened.getnframes()))
    except (wave.Error, EOFError, OSError) as error:
        raise ValueError(f"`audio` must be WAV files, got {file}: {str(error) or 'it ends too soon'}") from error
    # A file that was cut off may end within a sample.
    del content[len(content) // (width * channels) * (width * channels) :]
    if width not in _SAMPLES or not content:
        raise ValueError(f"`audio` must hold samples of 8, 16 or 32 bits, got {len(content)} bytes in {file}")
    kind, zero, largest = _SAMPLES[width]
    sound = (torch.frombuffer(content, dtype=kind).float() - zero) / largest
    sound = sound.unflatten(0, (-1, channels)).mean(1)
    if own == rate:
        return sound
    size = max(1, round(len(sound) * rate / own))
    return nn.functional.interpolate(sound[None, None], size, mode="linear", align_corners=False)[0, 0]
