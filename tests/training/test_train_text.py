"""Samples must be exactly the text that went in, however it is stored, and a kill must leave nothing half written."""

from __future__ import annotations

import json
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.recipe import Run, read_recipe
from hf_sparse_attn.shipped.corpus import needle_document, standard_library_text
from hf_sparse_attn.training.text import data as train_text
from hf_sparse_attn.training.text import source as train_text_source
from hf_sparse_attn.training.text.data import TextData, TextSettings, document_weights, open_text, sample_order
from tests.support.processes import exit_code

DOCUMENTS = [f"Chapter {i}.\n" + f"the fox number {i * 37} jumps over {i} dogs.\r\n" * (3 + i % 5) for i in range(23)]
LENGTH = 63
GOLDEN_ORDER = [935, 822, 996, 968, 741, 810]
GOLDEN_LARGE = [487818350, 1756914639, 2033362831]


def _tokenizer(eos: str | None = "</s>", seed_text: str = "the quick brown fox jumps over dogs") -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([seed_text] * 4, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token=eos)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return _tokenizer()


def _txt(folder: Path) -> Path:
    for i, text in enumerate(DOCUMENTS):
        place = folder / f"{i // 10}"
        place.mkdir(exist_ok=True, parents=True)
        (place / f"{i:02}.txt").write_bytes(text.encode())
    (folder / "notes.md").write_text("not text to train on")
    return folder


def _jsonl(folder: Path) -> Path:
    rows = [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)]
    rows.insert(3, {"id": 99, "text": None})
    (folder / "all.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    return folder / "all.jsonl"


def _parquet(folder: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"id": range(23), "text": DOCUMENTS}), folder / "a.parquet")
    return folder / "a.parquet"


def _mixed(folder: Path) -> Path:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in DOCUMENTS[:9]))
    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS[9:]}), folder / "b.parquet")
    return folder


def _split_folder(folder: Path) -> Path:
    _txt(folder / "train")
    (folder / "test").mkdir()
    (folder / "test" / "a.txt").write_text("a test")
    return folder


def _saved(folder: Path) -> Path:
    datasets.Dataset.from_dict({"text": DOCUMENTS}).save_to_disk(folder / "saved")
    return folder / "saved"


def _saved_splits(folder: Path) -> Path:
    made = datasets.Dataset.from_dict({"text": DOCUMENTS})
    datasets.DatasetDict({"train": made, "test": made.select([0])}).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = (_txt, _jsonl, _parquet, _mixed, _split_folder, _saved, _saved_splits)


def _expected(tokenizer: Any) -> list[int]:
    found = []
    for text in DOCUMENTS:
        found += [*tokenizer(text, add_special_tokens=False)["input_ids"]]
        found += [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return found


def _open(source: Path | str, tokenizer: Any, cache: Path, **rest: Any) -> TextData:
    run = rest.pop("run", None)
    settings = TextSettings(source=str(source), **{"length": LENGTH, **rest})
    return open_text(settings, tokenizer, seed=5, cache=cache, run=run)


def _tokens(data: TextData) -> list[int]:
    return torch.cat([data[i].ids for i in range(len(data))]).tolist()


# ---------------------------------------------------------------------- what a sample is


@pytest.mark.parametrize("eos", ["</s>", None], ids=["eos", "no eos"])
@pytest.mark.parametrize("make", SOURCES, ids=lambda make: make.__name__.strip("_"))
def test_samples_are_the_documents_one_after_another(
    make: Callable[[Path], Path], eos: str | None, tmp_path: Path
) -> None:
    tokenizer = _tokenizer(eos)
    (tmp_path / "data").mkdir()
    data = _open(make(tmp_path / "data"), tokenizer, tmp_path / "cache")
    expected = _expected(tokenizer)
    assert len(data) == len(expected) // LENGTH > 20
    assert _tokens(data) == expected[: len(data) * LENGTH]
    sample = data[1]
    assert sample.ids.dtype == torch.int64 and sample.ids.shape == (LENGTH,)
    assert sample.weights.dtype == torch.float32 and sample.weights.tolist() == [1.0] * LENGTH
    with pytest.raises(IndexError, match=r"`index` must be from 0 to \d+, got \d+"):
        data[len(data)]
    with pytest.raises(IndexError, match="got -1"):
        data[-1]


def test_another_split_is_another_text(tmp_path: Path, tokenizer: Any) -> None:
    data = _open(_split_folder(tmp_path), tokenizer, tmp_path / "cache", split="test", length=4)
    ids = [*tokenizer("a test", add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    assert _tokens(data) == ids[: len(ids) // 4 * 4]


def test_bytes_where_there_is_no_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _txt(tmp_path / "data")
    data = _open(source, None, tmp_path / "cache", length=7)
    expected = b"".join(b"\0" + text.encode() for text in DOCUMENTS)
    assert bytes(_tokens(data)) == expected[: len(data) * 7]
    # Read in many pieces, and tokenised in many batches, it is the same.
    monkeypatch.setattr(train_text_source, "_PIECE_CHARACTERS", 20)
    monkeypatch.setattr(train_text, "_BATCH_CHARACTERS", 100)
    assert _tokens(_open(source, None, tmp_path / "other", length=7)) == _tokens(data)


def test_pieces_of_a_document_are_not_closed(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = _txt(tmp_path / "data")
    monkeypatch.setattr(train_text_source, "_PIECE_CHARACTERS", 60)
    data = _open(source, tokenizer, tmp_path / "cache")
    count = _tokens(data).count(tokenizer.eos_token_id)
    assert count == _expected(tokenizer)[: len(data) * LENGTH].count(tokenizer.eos_token_id)


def test_a_line_without_end_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_text_source, "_PIECE_CHARACTERS", 20)
    text = "".join(chr(97 + n % 26) for n in range(333)) + "\n\nend"
    (tmp_path / "a.txt").write_bytes(text.encode())
    pieces = list(train_text_source._read_txt(tmp_path / "a.txt", "text"))
    assert "".join(piece.text for piece in pieces) == text
    assert max(len(piece.text) for piece in pieces) <= 40 and sum(piece.advance for piece in pieces) == len(text)
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]


def test_hidden_files_and_byte_order_marks_are_no_text(tmp_path: Path) -> None:
    # Such files come with folders from macOS and from notebooks.
    folder = tmp_path / ".data" / "own"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    (folder / ".ipynb_checkpoints" / "a.txt").write_text("an old state")
    (folder / "._a.txt").write_bytes(bytes(range(256)))
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbfthe text")
    assert bytes(_tokens(_open(folder, None, tmp_path / "cache", length=9))) == b"\0the text"


def test_another_training_that_finishes_meanwhile_does_no_harm(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = _jsonl(tmp_path), tmp_path / "cache"
    _open(source, tokenizer, cache)
    (made,) = cache.iterdir()
    left = cache / f".{made.name}-gone"
    made.rename(left)
    kept = Path.iterdir

    def iterdir(self: Path) -> Any:
        if self == left:
            left.rename(made)
        return kept(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "iterdir", iterdir)
        data = _open(source, tokenizer, cache)
    assert _tokens(data) == _expected(tokenizer)[: len(data) * LENGTH]


def test_the_standard_library_is_read_by_its_split(tmp_path: Path) -> None:
    data = _open("standard_library", None, tmp_path, length=1000, split="heldout", tokens=5000)
    expected = b"".join(b"\0" + text for _, text in standard_library_text("heldout"))[:5000]
    assert len(data) == 5
    assert bytes(_tokens(data)) == expected


@pytest.mark.parametrize("tokens", [LENGTH, 200, 10**6])
def test_no_more_tokens_are_taken_than_asked_for(
    tokens: int, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Many batches: what the earlier ones gave counts.
    monkeypatch.setattr(train_text, "_BATCH_CHARACTERS", 100)
    data = _open(_jsonl(tmp_path), tokenizer, tmp_path / "cache", tokens=tokens)
    expected = _expected(tokenizer)[:tokens]
    assert len(data) == len(expected) // LENGTH
    assert _tokens(data) == expected[: len(data) * LENGTH]


class _Wide:
    """A tokenizer without a fast backend and with more tokens than 16 bits can tell apart."""

    eos_token_id = 69_999

    def __len__(self) -> int:
        return 70_000

    def get_vocab(self) -> dict[str, int]:
        return {"a": 0}

    def __call__(self, texts: list[str], **options: Any) -> dict[str, list[list[int]]]:
        assert options["add_special_tokens"] is False
        return {"input_ids": [[66_000 + ord(c) for c in text] for text in texts]}


def test_large_vocabularies_keep_their_tokens(tmp_path: Path) -> None:
    data = _open(_jsonl(tmp_path), _Wide(), tmp_path / "cache")
    expected = [i for text in DOCUMENTS for i in (*(66_000 + ord(c) for c in text), 69_999)]
    assert _tokens(data) == expected[: len(data) * LENGTH]


# ---------------------------------------------------------------------- needles


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_needle_samples_are_documents_of_the_corpus(split: str, tmp_path: Path) -> None:
    data = _open("needles", None, tmp_path, length=711, needles=5, split=split)
    assert isinstance(data, train_text.NeedleData)
    assert list(tmp_path.iterdir()) == []
    for index in (0, 3, len(data) - 1):
        document = data.document(index)
        drawn = int(np.random.default_rng((5, index)).integers(2**62))
        assert document == needle_document(711, 5, drawn, split)  # type: ignore[arg-type]
        ids, weights = data[index]
        assert bytes(ids.tolist()) == document.text
        assert weights.dtype == torch.float32
        in_code = document.code_mask
        answers = torch.zeros(711, dtype=torch.bool)
        for needle in document.needles:
            answers[list(needle.answer_positions)] = True
        assert weights[in_code].unique().tolist() == [1.0]
        assert weights[answers].unique().tolist() == [5.0]
        rest = weights[~in_code & ~answers]
        assert len(rest) > 50 and torch.equal(rest, torch.full_like(rest, 0.1))
    assert data.document(0) != data.document(1)


def test_needle_weights_are_settings_and_those_of_the_shipped_training(tmp_path: Path) -> None:
    data = _open("needles", None, tmp_path, length=512, answer_weight=2.0, other_weight=0.5)
    assert data[4].weights.unique().tolist() == [0.5, 1.0, 2.0]
    document = needle_document(600, 4, 9)
    wanted = np.full(600, 0.1, np.float32)
    for start, stop in document.code_spans:
        wanted[start:stop] = 1.0
    for needle in document.needles:
        wanted[needle.asked_at : needle.asked_at + 4] = 5.0
    loss = read_recipe("byte_llama").loss
    assert (loss.answer, loss.other) == (5.0, 0.1)
    assert np.array_equal(document_weights(document, 5.0, 0.1), wanted)


def test_draw_stacks_the_shuffled_samples(tmp_path: Path, tokenizer: Any) -> None:
    data = _open(_jsonl(tmp_path), tokenizer, tmp_path / "cache")
    numbers = [0, 7, len(data), 10**9]
    ids, weights = data.draw(numbers)
    assert ids.shape == weights.shape == (4, LENGTH)
    for row, number in zip(ids, numbers, strict=True):
        assert torch.equal(row, data[sample_order(5, len(data), number)].ids)


# ---------------------------------------------------------------------- order


@pytest.mark.parametrize("size", [1, 2, 3, 16, 63, 255, 256, 257, 1000, 4097])
def test_every_epoch_is_a_permutation_of_its_own(size: int) -> None:
    epochs = [tuple(sample_order(3, size, e * size + i) for i in range(size)) for e in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(size))
    if size > 10:
        assert len(set(epochs)) == 3
        assert epochs[0] != tuple(sample_order(4, size, i) for i in range(size))


def test_the_order_is_the_same_on_every_machine() -> None:
    assert [sample_order(7, 1000, i) for i in range(6)] == GOLDEN_ORDER
    assert [sample_order(0, 2**31, 10**12 + i) for i in range(3)] == GOLDEN_LARGE


@pytest.mark.parametrize("size", [5, 23, 300])
def test_the_order_looks_random(size: int) -> None:
    """Where two neighbours land, over many epochs: every index as often, and every distance as often."""
    rounds = 40 * size
    first = Counter(sample_order(1, size, e * size) for e in range(rounds))
    apart = Counter(
        (sample_order(1, size, e * size + 1) - sample_order(1, size, e * size)) % size for e in range(rounds)
    )
    assert set(apart) == set(range(1, size))
    for counts, classes in ((first, size), (apart, size - 1)):
        mean = rounds / classes
        chi = sum((counts[c] - mean) ** 2 / mean for c in (range(size) if classes == size else range(1, size)))
        # Chi-squared with classes - 1 degrees of freedom: five standard deviations above its mean.
        assert chi < classes - 1 + 5 * (2 * (classes - 1)) ** 0.5


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ((0, 0, 0), ValueError, "`size` must be at least 1, got 0"),
        ((0, 5, -1), ValueError, "`number` must be at least 0, got -1"),
        ((-1, 5, 0), ValueError, "`seed` must be at least 0, got -1"),
        ((0, 5, 1.5), TypeError, "`number` must be an int, got 1.5"),
    ],
)
def test_an_order_of_nothing_is_refused(given: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sample_order(*given)


# ---------------------------------------------------------------------- the cache


class _Counting:
    """Counts how often text goes through a tokenizer."""

    def __init__(self, tokenizer: Any, fail_at: int | None = None) -> None:
        self.tokenizer, self.calls, self.fail_at = tokenizer, 0, fail_at

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __len__(self) -> int:
        return len(self.tokenizer)

    def __call__(self, *given: Any, **options: Any) -> Any:
        self.calls += 1
        if self.calls == self.fail_at:
            raise RuntimeError("interrupted")
        return self.tokenizer(*given, **options)


def test_text_is_tokenised_once_for_all_lengths(tmp_path: Path, tokenizer: Any) -> None:
    source, counting = _jsonl(tmp_path), _Counting(tokenizer)
    first = _open(source, counting, tmp_path / "cache")
    assert isinstance(first, train_text.PackedData) and isinstance(first.tokens, np.memmap)
    assert counting.calls == 1
    assert _tokens(_open(source, counting, tmp_path / "cache", length=9))[:LENGTH] == first[0].ids.tolist()
    assert counting.calls == 1


def test_a_padding_call_changes_no_tokenizer(tmp_path: Path) -> None:
    source, own = _jsonl(tmp_path), _Counting(_tokenizer())
    own.tokenizer.pad_token = "</s>"
    _open(source, own, tmp_path / "cache")
    own.tokenizer(["a", "a b c"], padding=True, truncation=True, max_length=2)
    _open(source, own, tmp_path / "cache")
    assert own.calls == 1


@pytest.mark.parametrize("change", ["file", "tokenizer", "eos", "column", "tokens"])
def test_what_changes_is_tokenised_again(change: str, tmp_path: Path, tokenizer: Any) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps({"text": text, "other": text[::-1]}) for text in DOCUMENTS))
    _open(source, tokenizer, tmp_path / "cache")
    asked: dict[str, Any] = {}
    if change == "file":
        source.write_text(source.read_text().replace("fox", "cat"))
    elif change == "tokenizer":
        tokenizer = _tokenizer(seed_text="number number number")
    elif change == "eos":
        tokenizer = _tokenizer(eos="<s>")
    else:
        asked = {"column": "other"} if change == "column" else {"tokens": 500}
    counting = _Counting(tokenizer)
    _open(source, counting, tmp_path / "cache", **asked)
    assert counting.calls == 1


def test_the_first_process_goes_first(tmp_path: Path, tokenizer: Any) -> None:
    inside = []
    counting = _Counting(tokenizer)

    @contextmanager
    def main_first() -> Iterator[None]:
        inside.append(counting.calls)
        yield
        inside.append(counting.calls)

    run = Run(tmp_path, torch.device("cpu"), rank=1, world=2, progress=False, main_first=main_first)
    _open(_jsonl(tmp_path), counting, tmp_path / "cache", run=run)
    assert inside == [0, 1]


@pytest.mark.parametrize(("progress", "rank", "seen"), [(True, 0, True), (False, 0, False), (True, 1, False)])
def test_the_bar_is_shown_by_the_first_process(
    progress: bool, rank: int, seen: bool, tmp_path: Path, tokenizer: Any, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tqdm

    asked: list[Any] = []
    real = tqdm.tqdm
    monkeypatch.setattr(tqdm, "tqdm", lambda **given: (asked.append(given), real(**given))[1])
    run = Run(tmp_path, torch.device("cpu"), rank=rank, world=2, progress=progress)
    source = _jsonl(tmp_path)
    _open(source, tokenizer, tmp_path / "cache", run=run)
    # None leaves it to tqdm, which shows a bar on a terminal alone.
    assert asked[0]["disable"] is (None if seen else True)
    assert asked[0]["total"] == source.stat().st_size


def test_an_exception_in_the_middle_leaves_nothing(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_text, "_BATCH_CHARACTERS", 300)
    source = _jsonl(tmp_path)
    with pytest.raises(RuntimeError, match="interrupted"):
        _open(source, _Counting(tokenizer, fail_at=3), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert _tokens(_open(source, tokenizer, tmp_path / "cache"))[:100] == _expected(tokenizer)[:100]


def test_a_kill_in_the_middle_leaves_nothing_that_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, cache = _jsonl(tmp_path), tmp_path / "cache"

    def run() -> None:
        real, calls = train_text._encode, []

        def encode(*given: Any) -> Any:
            calls.append(0)
            return os._exit(9) if len(calls) == 3 else real(*given)

        train_text._BATCH_CHARACTERS, train_text._encode = 300, encode
        open_text(TextSettings(source=str(source), length=LENGTH), None, seed=5, cache=cache)

    assert exit_code(run) == 9
    (left,) = cache.iterdir()
    assert left.name.startswith(".")
    # Another process may still be writing to it, so it stays for a while.
    data = _open(source, None, cache)
    tokens = _tokens(data)
    assert left.exists() and bytes(tokens[:50]) == b"\0" + DOCUMENTS[0].encode()[:49]
    # A file that is mapped must not shrink.
    del data
    damaged = next(p for p in cache.iterdir() if p != left)
    (damaged / "tokens.bin").write_bytes(b"short")
    old = time.time() - 7200
    for path in (*left.iterdir(), left):
        os.utime(path, (old, old))
    again = _open(source, None, cache)
    assert not left.exists() and _tokens(again) == tokens


@pytest.mark.parametrize("damage", ["truncated", "no meta", "empty meta"])
def test_a_damaged_cache_is_made_again(damage: str, tmp_path: Path, tokenizer: Any) -> None:
    source = _jsonl(tmp_path)
    _open(source, tokenizer, tmp_path / "cache")
    (folder,) = (tmp_path / "cache").iterdir()
    if damage == "truncated":
        (folder / "tokens.bin").write_bytes((folder / "tokens.bin").read_bytes()[:-1])
    elif damage == "no meta":
        (folder / "meta.json").unlink()
    else:
        (folder / "meta.json").write_text("{}")
    data = _open(source, tokenizer, tmp_path / "cache")
    assert _tokens(data) == _expected(tokenizer)[: len(data) * LENGTH]


def test_two_trainings_may_make_the_same_cache(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, cache = _jsonl(tmp_path), tmp_path / "cache"
    real = train_text._write
    calls: list[int] = []

    def write(*given: Any) -> None:
        calls.append(0)
        real(*given)
        if len(calls) == 1:
            _open(source, tokenizer, cache)

    monkeypatch.setattr(train_text, "_write", write)
    data = _open(source, tokenizer, cache)
    assert len(calls) == 2 and len(list(cache.iterdir())) == 1
    assert _tokens(data) == _expected(tokenizer)[: len(data) * LENGTH]


# ---------------------------------------------------------------------- what is refused


def _refused(folder: Path) -> dict[str, tuple[dict[str, Any], type[Exception], str]]:
    jsonl, saved, splits = _jsonl(folder), _saved(folder), folder / "splits"
    datasets.DatasetDict({"train": datasets.Dataset.from_dict({"text": ["a"]})}).save_to_disk(splits)
    (folder / "empty").mkdir()
    for name, text in (("a.csv", "a,b"), ("list.jsonl", "[1]"), ("bad.jsonl", '{"text": "a"}\n{"te'), ("e.txt", "")):
        (folder / name).write_text(text)
    (folder / "number.jsonl").write_text('{"text": 5}')
    (folder / "bad.parquet").write_text("no parquet")
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"]}), folder / "other.parquet")
    there = "`source` must be a file or folder that is there"
    return {
        "too few tokens": ({"source": jsonl, "length": 10**6}, ValueError, r"at least `length` = 1000000 tokens, got"),
        "empty file": ({"source": folder / "e.txt"}, ValueError, r"`source` must hold at least .* tokens, got 0"),
        "missing file": ({"source": folder / "none.txt"}, FileNotFoundError, there),
        "missing folder": ({"source": f"{folder}/none/"}, FileNotFoundError, there),
        "relative": ({"source": "./none"}, FileNotFoundError, there),
        "no id": ({"source": "a b c"}, ValueError, "`source` must be 'needles', .* or a data set on the Hub"),
        "empty folder": ({"source": folder / "empty"}, FileNotFoundError, r"with .txt, .jsonl or .parquet files"),
        "other file": ({"source": folder / "a.csv"}, ValueError, r"must end with .txt, .jsonl or .parquet, got"),
        "column of jsonl": ({"source": jsonl, "column": "body"}, ValueError, "one of id, text; got 'body' for line 1"),
        "column of parquet": ({"source": folder / "other.parquet"}, ValueError, "one of content; got 'text'"),
        "column of saved": ({"source": saved, "column": "body"}, ValueError, "`column` must be one of text; got"),
        "no text": ({"source": folder / "number.jsonl"}, ValueError, "must hold text, got int in line 1"),
        "no object": ({"source": folder / "list.jsonl"}, ValueError, "a JSON object in each line, got line 1"),
        "broken line": ({"source": folder / "bad.jsonl"}, ValueError, "a JSON object in each line, got line 2"),
        "no parquet": ({"source": folder / "bad.parquet"}, ValueError, r"must hold Parquet in its .parquet files"),
        "split of a file": ({"source": jsonl, "split": "test"}, ValueError, "`split` must be 'train' for a file"),
        "split of a folder": ({"source": folder, "split": "test"}, ValueError, "or the name of a folder in"),
        "split of saved": ({"source": saved, "split": "test"}, ValueError, "`split` must be 'train' for"),
        "split of splits": ({"source": splits, "split": "test"}, ValueError, "`split` must be one of train; got"),
        "split of needles": ({"source": "needles", "split": "test", "length": 999}, ValueError, "`split` must be"),
        "short needles": ({"source": "needles"}, ValueError, r"`length` must be at least \d+ for 8 needles, got 63"),
        "hub": ({"source": "no/such"}, ValueError, r"a data set on the Hub with `name` None and `split` 'train'; got"),
        "length": ({"source": jsonl, "length": 1}, ValueError, "`length` must be at least 2, got 1"),
        "needles": ({"source": jsonl, "needles": 0}, ValueError, "`needles` must be at least 1, got 0"),
        "tokens": ({"source": jsonl, "tokens": 5}, ValueError, "`tokens` must be at least `length` = 63, got 5"),
        "no source": ({"source": ""}, ValueError, "`source` must not be empty"),
        "weight": ({"source": jsonl, "other_weight": -1.0}, ValueError, "`other_weight` must be 0 or more, got -1"),
    }


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return _refused(tmp_path_factory.mktemp("refused"))


CASES = (
    "too few tokens", "empty file", "missing file", "missing folder", "relative", "no id", "empty folder",
    "other file", "column of jsonl", "column of parquet", "column of saved", "no text", "no object", "broken line",
    "no parquet", "split of a file", "split of a folder", "split of saved", "split of splits", "split of needles",
    "short needles", "hub", "length", "needles", "tokens", "no source", "weight",
)  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_read_is_refused(
    case: str, refused: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "hub":

        def offline(*given: Any, **options: Any) -> None:
            raise ConnectionError("the Hub cannot be reached")

        monkeypatch.setattr(datasets, "load_dataset", offline)
    assert set(CASES) == set(refused)
    asked, error, message = refused[case]
    with pytest.raises(error, match=message):
        _open(cache=tmp_path / "cache", tokenizer=None, **asked)
    left = list((tmp_path / "cache").iterdir()) if (tmp_path / "cache").exists() else []
    assert case in ("too few tokens", "empty file") or left == []


def test_needles_are_bytes(tmp_path: Path, tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="whose documents are bytes, for a model with a tokenizer; got "):
        _open("needles", tokenizer, tmp_path, length=999)


@pytest.mark.parametrize(("make", "package"), [(_saved, "datasets"), (_parquet, "pyarrow")], ids=["saved", "parquet"])
def test_packages_that_are_missing_are_named(
    make: Callable[[Path], Path], package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make(tmp_path)
    for name in (package, f"{package}.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtra, match=rf"needs {package} \(pip install 'hf-sparse-attn\[train\]'\)"):
        _open(source, None, tmp_path / "cache")


# ---------------------------------------------------------------------- the Hub


@pytest.mark.parametrize("tokens", [None, 500], ids=["all", "some"])
def test_hub_data_is_asked_for_as_set_and_only_once(
    tokens: int | None, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def load_dataset(*given: Any, **options: Any) -> Any:
        asked.append((given, options))
        made = datasets.Dataset.from_dict({"body": DOCUMENTS, "id": list(range(23))})
        return made.to_iterable_dataset() if options["streaming"] else made

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for _ in range(2):
        data = _open(
            "some/books",
            tokenizer,
            tmp_path,
            name="en",
            split="validation",
            column="body",
            revision="r1",
            tokens=tokens,
        )
    options = {"split": "validation", "revision": "r1", "streaming": tokens is not None}
    assert asked == [(("some/books", "en"), options)]
    assert _tokens(data) == _expected(tokenizer)[:tokens][: len(data) * LENGTH]
