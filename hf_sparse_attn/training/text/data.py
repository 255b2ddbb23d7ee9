"""Text to train on: packed samples of exactly so many tokens, from any text, tokenised once and read from the disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.sharing.files import move, new_folder
from hf_sparse_attn.shipped.corpus import FIRST_BYTE, NeedleDocument, needle_document
from hf_sparse_attn.training.text.source import NEEDLES, Piece, Texts, identity, open_texts

_LOG = logging.getLogger(__name__)
_VERSION = 1
_TOKENS, _META = "tokens.bin", "meta.json"
# Documents with needles are made as they are asked for, so there are as many as numbers to draw them by.
_NEEDLE_DOCUMENTS = 2**31
# Texts go to the tokenizer in batches of about so many characters.
_BATCH_CHARACTERS = 1 << 20
# A folder that nothing has written to for so long was left by a process that was killed.
_ABANDONED_SECONDS = 3600.0


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """Where text comes from, and how long its samples are.

    Args:
        source: "needles" (standard-library source with needles hidden in it, corpus.py), "standard_library" (the same
            source as it is), a local .txt, .jsonl or .parquet file or a folder of them, a folder saved by `datasets`,
            or the id of a data set on the Hub.
        length: tokens of a sample.
        split: "train" or "heldout" for the standard library; a split of the data set; for a folder of files "train",
            or the name of a folder in it.
        name: configuration of a data set on the Hub.
        column: that holds the text; a .txt file has none, it is one document.
        revision: of a data set on the Hub. Without one, what was tokenised first stays in the cache.
        tokens: at most so many are taken, from the start; None takes all. A data set on the Hub is then read only as
            far as it is needed.
        needles: hidden in a document, for "needles" alone; as are the next two.
        answer_weight: of the loss at the digits of an answer; code has 1.
        other_weight: of the loss at the rest of the lines that state needles and ask for them.
    """

    source: str
    length: int
    split: str = "train"
    name: str | None = None
    column: str = "text"
    revision: str | None = None
    tokens: int | None = None
    needles: int = 8
    answer_weight: float = 5.0
    other_weight: float = 0.1

    def __post_init__(self) -> None:
        check_int("length", self.length, 2)
        check_int("needles", self.needles, 1)
        if self.tokens is not None and check_int("tokens", self.tokens, 1) < self.length:
            raise ValueError(f"`tokens` must be at least `length` = {self.length}, got {self.tokens}")
        for name in ("source", "split", "column"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must not be empty")
        for name in ("answer_weight", "other_weight"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"`{name}` must be 0 or more, got {getattr(self, name)}")


class TextSample(NamedTuple):
    """Tokens, int64, and what the loss at each of them weighs, float32; both [length], or [batch, length]."""

    ids: Tensor
    weights: Tensor


class TextData:
    """Samples by their index; `open_text` makes it.

    Args:
        length: tokens of a sample.
        seed: of the order in which `draw` takes the samples.
    """

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, index: int) -> TextSample:
        raise NotImplementedError

    def scored(self, index: int) -> tuple[TextSample, list[list[int]]]:
        """A sample as evaluations weigh it, and for each answer in it the positions whose logits choose its tokens."""
        return self[index], []

    def draw(self, numbers: Sequence[int]) -> TextSample:
        """Some samples of the shuffled endless run over all of them, stacked.

        Args:
            numbers: of the samples, counted from 0 over the whole training.
        """
        made = [self[sample_order(self.seed, len(self), number)] for number in numbers]
        return TextSample(torch.stack([s.ids for s in made]), torch.stack([s.weights for s in made]))

    def _check(self, index: int) -> int:
        # IndexError is what ends a loop over a sequence.
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}")
        return index


class NeedleData(TextData):
    """Documents with needles, drawn by (seed, index); nothing is kept."""

    def __init__(self, settings: TextSettings, seed: int) -> None:
        super().__init__(settings.length, seed)
        self.settings = settings

    def __len__(self) -> int:
        return _NEEDLE_DOCUMENTS

    def document(self, index: int) -> NeedleDocument:
        """The document that a sample is made of."""
        drawn = int(np.random.default_rng((self.seed, self._check(index))).integers(2**62))
        chosen: Any = self.settings
        return needle_document(self.length, chosen.needles, drawn, chosen.split)

    def __getitem__(self, index: int) -> TextSample:
        document = self.document(index)
        weights = document_weights(document, self.settings.answer_weight, self.settings.other_weight)
        return TextSample(document.token_ids[0], torch.from_numpy(weights))

    def scored(self, index: int) -> tuple[TextSample, list[list[int]]]:
        document = self.document(index)
        sample = TextSample(document.token_ids[0], document.code_mask.float())
        return sample, [asked for asked, _ in document.questions]


class PackedData(TextData):
    """Runs of `length` tokens, one after another, of a file of tokens that stays on the disk."""

    def __init__(self, tokens: NDArray[Any], length: int, seed: int) -> None:
        super().__init__(length, seed)
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens) // self.length

    def __getitem__(self, index: int) -> TextSample:
        start = self._check(index) * self.length
        part = np.asarray(self.tokens[start : start + self.length], dtype=np.int64)
        return TextSample(torch.from_numpy(part), torch.ones(self.length))


def open_text(settings: TextSettings, tokenizer: Any, *, seed: int, cache: Path, run: Run | None = None) -> TextData:
    """Opens text as samples; text that has not been tokenised before is tokenised now, with a progress bar.

    Documents stand one after another, each closed by the tokenizer's end-of-sequence token if it has one, and are cut
    into samples of exactly `length` tokens; what is left at the end is dropped. The tokens are a file in `cache`, from
    which samples of any length are read; the file is there in full or not at all.

    Args:
        settings: where from, and how long.
        tokenizer: of transformers, or None for a model that reads bytes: one byte is one token, and byte 0 opens every
            document.
        seed: of the order of the samples, and of the documents with needles.
        cache: folder for tokens, made if missing.
        run: where the training runs; the first process tokenises and the others wait.

    Raises:
        ValueError: `source` is nothing that can be read, has no text in that column, or is too short for one sample.
        FileNotFoundError: it is not there.
        MissingExtra: a package that reading it needs is not installed.
    """
    if settings.source == NEEDLES:
        if tokenizer is not None:
            raise ValueError(
                f"`source` must be other than {NEEDLES!r}, whose documents are bytes, for a model with a tokenizer; "
                f"got {type(tokenizer).__name__}"
            )
        data = NeedleData(settings, seed)
        # Refuses a split that is none, and a length that has no room for the needles.
        data.document(0)
        return data
    where = settings, tokenizer, Path(cache)
    if run is None:
        tokens = _prepared(*where, progress=True)
    else:
        with run.main_first():
            tokens = _prepared(*where, progress=run.progress and run.is_main)
    if len(tokens) < settings.length:
        raise ValueError(
            f"`source` must hold at least `length` = {settings.length} tokens, got {len(tokens)} "
            f"in {settings.source!r}"
        )
    return PackedData(tokens, settings.length, seed)


def document_weights(document: NeedleDocument, answer: float, other: float) -> NDArray[np.float32]:
    """What the loss at each byte weighs, [length]: 1 in code, `answer` in the answers, `other` in the rest."""
    weights = np.where(document.code_mask.numpy(), np.float32(1.0), np.float32(other))
    for needle in document.needles:
        weights[needle.asked_at : needle.asked_at + len(needle.value)] = answer
    return weights


def _prepared(settings: TextSettings, tokenizer: Any, cache: Path, progress: bool) -> NDArray[Any]:
    """All tokens of a source, mapped from the disk; made if they are not there."""
    asked = {name: getattr(settings, name) for name in ("source", "split", "name", "column", "revision", "tokens")}
    key = {"version": _VERSION, **asked, "files": identity(settings), "tokenizer": tokenizer_identity(tokenizer)}
    name = "text-" + hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:20]
    cache.mkdir(parents=True, exist_ok=True)
    folder = cache / name
    if folder.exists():
        found = _read(folder)
        if found is not None:
            return found
        _LOG.warning("%s is damaged and is made again", folder)
        shutil.rmtree(folder)
    for left in cache.glob(f".{name}-*"):
        # Another training may put it in its place at this very moment.
        with suppress(FileNotFoundError):
            if time.time() - max(p.stat().st_mtime for p in (left, *left.iterdir())) > _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)
    made = new_folder(cache, f".{name}-")
    try:
        _write(made, settings, tokenizer, progress)
        try:
            move(made, folder)
        except OSError:
            # Another training has put the same tokens there in the meantime.
            if not folder.exists():
                raise
    finally:
        shutil.rmtree(made, ignore_errors=True)
    found = _read(folder)
    if found is None:
        raise OSError(f"`cache` must keep what is written to it, got damaged files in {folder}")
    return found


def _read(folder: Path) -> NDArray[Any] | None:
    try:
        meta = json.loads((folder / _META).read_text(encoding="utf-8"))
        dtype, count = np.dtype(meta["dtype"]), int(meta["tokens"])
        if (folder / _TOKENS).stat().st_size != count * dtype.itemsize:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # An empty file cannot be mapped.
    return np.memmap(folder / _TOKENS, dtype, "r", shape=(count,)) if count else np.empty(0, dtype)


def _write(folder: Path, settings: TextSettings, tokenizer: Any, progress: bool) -> None:
    from tqdm import tqdm

    texts = open_texts(settings)
    dtype = np.dtype(np.uint16 if tokenizer is None or len(tokenizer) <= 2**16 else np.uint32)
    most = settings.tokens
    count = 0
    bar = tqdm(
        total=texts.total,
        desc=f"tokenise {Path(settings.source).name}",
        unit=texts.unit,
        unit_scale=True,
        disable=None if progress else True,
    )
    with open(folder / _TOKENS, "wb") as file, bar:
        for batch in _batches(texts):
            ids = _encode(batch, tokenizer, dtype)
            if most is not None:
                ids = ids[: most - count]
            ids.tofile(file)
            count += len(ids)
            bar.update(sum(piece.advance for piece in batch))
            if count == most:
                break
        file.flush()
        os.fsync(file.fileno())
    meta = {"version": _VERSION, "source": settings.source, "dtype": dtype.name, "tokens": count}
    (folder / _META).write_text(json.dumps(meta), encoding="utf-8")


def _batches(texts: Texts) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in texts.pieces:
        batch.append(piece)
        size += len(piece.text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _encode(batch: list[Piece], tokenizer: Any, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The tokens of some pieces, one after another."""
    parts: list[NDArray[Any]] = []
    if tokenizer is None:
        for piece in batch:
            if piece.begins:
                parts.append(np.array([FIRST_BYTE], dtype))
            parts.append(np.frombuffer(piece.text.encode("utf-8", "replace"), np.uint8).astype(dtype))
        return np.concatenate(parts)
    # `verbose` is about texts longer than the model allows, which are cut later.
    rows = tokenizer([p.text for p in batch], add_special_tokens=False, return_attention_mask=False, verbose=False)
    for piece, row in zip(batch, rows["input_ids"], strict=True):
        parts.append(np.asarray(row, dtype))
        if piece.ends and tokenizer.eos_token_id is not None:
            parts.append(np.array([tokenizer.eos_token_id], dtype))
    return np.concatenate(parts)


def tokenizer_identity(tokenizer: Any) -> str:
    """A hash of everything that decides what tokens a text becomes."""
    if tokenizer is None:
        return "bytes"
    fast = getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(fast.to_str()) if fast is not None else {"vocabulary": tokenizer.get_vocab()}
    # What the last call asked for, and no part of the tokenizer itself.
    said = {name: value for name, value in said.items() if name not in ("truncation", "padding")}
    text = json.dumps([type(tokenizer).__name__, tokenizer.eos_token_id, said], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


# A Feistel network over fewer numbers than 2^8 would know too few permutations.
_LEAST_HALF_BITS = 4
_ROUNDS = 6
_WORD = 2**64 - 1


def sample_order(seed: int, size: int, number: int) -> int:
    """The index of a sample in a shuffled endless run over all of them.

    Every epoch is a permutation of its own, computed and not stored: a Feistel network (Luby and Rackoff 1988) over
    the next power of 4, walked along its cycles until it is back among the indices (Black and Rogaway 2002).

    Args:
        seed: of the permutations.
        size: how many samples there are.
        number: of the sample, from 0 over the whole training.

    Returns:
        An index from 0 to `size` - 1; the same on every machine.

    Raises:
        ValueError, TypeError: a negative number, or no samples.
    """
    check_int("seed", seed, 0)
    epoch, index = divmod(check_int("number", number, 0), check_int("size", size, 1))
    if size == 1:
        return 0
    half = max(_LEAST_HALF_BITS, ((size - 1).bit_length() + 1) // 2)
    keys, mask = _round_keys(seed, epoch), (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right ^ key) & mask)
        index = left << half | right
        if index < size:
            return index


@lru_cache(maxsize=64)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    drawn = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
    return tuple(int.from_bytes(drawn[8 * i : 8 * i + 8], "little") for i in range(_ROUNDS))


def _mixed(value: int) -> int:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _WORD
    return value ^ (value >> 31)
