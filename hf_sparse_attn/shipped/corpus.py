"""Real text to measure attention on: standard-library source with key-value needles hidden in it.

Everything here is bytes: one token is one byte, and byte 0, which no source file holds, opens every document. A
document reads like this, with lines of code in the places of the dots:

    ...
    # key qzv=4821
    ...
    # get qzv=4821

The last lines ask for every hidden key in turn. Their answers are part of the document, so one forward pass scores
all of them: a needle counts as answered when the model's first choice is right at each of its digits.
"""

from __future__ import annotations

import hashlib
import string
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

Split = Literal["train", "heldout"]

FIRST_BYTE = 0
KEY_LETTERS = 3
VALUE_DIGITS = 4

_STATEMENT = "# key {key}={value}\n"
_QUESTION = "# get {key}={value}\n"
_LINE_BYTES = len("# key ") + KEY_LETTERS + len("=") + VALUE_DIGITS + len("\n")
_VALUE_OFFSET = _LINE_BYTES - 1 - VALUE_DIGITS
_LEAST_CODE = 64

# Tables, test data and machine-made files say little about how code reads, so they stay out.
_SKIPPED_FOLDERS = frozenset({
    "__phello__", "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "idle_test", "lib-dynload",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "turtledemo",
})  # fmt: skip
_SKIPPED_PREFIXES = ("_sysconfigdata", "_sysconfig_vars", "config-")

# Large modules that exist from Python 3.10 to 3.14: held out whatever their hash says, so long documents exist.
_ALWAYS_HELD_OUT = frozenset({"_pydecimal", "argparse", "decimal", "typing"})
_HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Needle:
    """One hidden key and value.

    Args:
        key: the letters asked for.
        value: the digits to answer with.
        depth: where the statement stands in the part before the questions, from 0 (its start) to 1 (its end).
        stated_at: position of the first digit of the value where it is hidden.
        asked_at: position of the first digit of the value in the answer at the end.
    """

    key: str
    value: str
    depth: float
    stated_at: int
    asked_at: int

    @property
    def answer_positions(self) -> range:
        """Positions of the answer's bytes; the logits that choose them stand one position earlier."""
        return range(self.asked_at, self.asked_at + len(self.value))

    @property
    def statement_positions(self) -> range:
        """Positions of the same digits where they are hidden."""
        return range(self.stated_at, self.stated_at + len(self.value))


@dataclass(frozen=True)
class NeedleDocument:
    """Source code with needles in it and the questions at its end.

    Args:
        text: every byte of the document, the opening zero byte included.
        module: the standard-library module the code comes from.
        needles: in the order of their depth.
        questions_at: position where the questions start.
        code_spans: half-open ranges of positions that hold code, in order.
    """

    text: bytes
    module: str
    needles: tuple[Needle, ...]
    questions_at: int
    code_spans: tuple[tuple[int, int], ...]

    def __len__(self) -> int:
        return len(self.text)

    @property
    def token_ids(self) -> Tensor:
        """The document as int64 token ids, shape (1, length)."""
        return torch.from_numpy(np.frombuffer(self.text, dtype=np.uint8).astype(np.int64))[None]

    @property
    def questions(self) -> list[tuple[list[int], list[int]]]:
        """For each needle the positions whose logits choose its answer, and those of the same digits where hidden."""
        return [([p - 1 for p in n.answer_positions], list(n.statement_positions)) for n in self.needles]

    @property
    def code_mask(self) -> Tensor:
        """True at the positions that hold code, shape (length,)."""
        mask = torch.zeros(len(self.text), dtype=torch.bool)
        for start, stop in self.code_spans:
            mask[start:stop] = True
        return mask


def standard_library_text(split: Split) -> list[tuple[str, bytes]]:
    """Read the source of the running interpreter's standard library.

    Args:
        split: "train", or "heldout" for about a tenth of the modules, chosen by a hash of their names together with
            a few large ones, so that the choice is the same on every machine.

    Returns:
        Module names with their bytes, sorted by name.

    Raises:
        ValueError: `split` is neither of the two.
        FileNotFoundError: this interpreter ships its standard library without sources.
    """
    _check_split(split)
    return [(name, text) for name, text in _all_modules() if _is_held_out(name) == (split == "heldout")]


def needle_document(length: int, needles: int = 8, seed: int = 0, split: Split = "heldout") -> NeedleDocument:
    """Hide needles in a stretch of standard-library code and ask for them at its end.

    The statements stand at line starts, one in each of `needles` equal parts of the code; the questions come in
    another random order.

    Args:
        length: exact number of bytes, which are the tokens.
        needles: how many keys to hide.
        seed: the same seed gives the same document.
        split: which modules the code may come from.

    Returns:
        The document.

    Raises:
        ValueError: `split` is unknown, there is not at least one needle, or `length` is too short for the needles
            or longer than the longest module allows.
        FileNotFoundError: this interpreter ships its standard library without sources.
    """
    _check_split(split)
    most = (26**KEY_LETTERS) // 2
    if not 1 <= needles <= most:
        raise ValueError(f"`needles` must be from 1 to {most}, got {needles}")
    overhead = 1 + 2 * needles * _LINE_BYTES
    if length < overhead + _LEAST_CODE:
        raise ValueError(f"`length` must be at least {overhead + _LEAST_CODE} for {needles} needles, got {length}")
    modules = _modules_of(split)
    longest = max(len(text) for _, text in modules)
    code_bytes = length - overhead
    if code_bytes > longest:
        raise ValueError(
            f"`length` must be at most {longest + overhead} for {needles} needles in the {split} modules, got {length}"
        )
    rng = np.random.default_rng(seed)
    module, code = _stretch_of_code(modules, code_bytes, rng)
    return _hide(module, code, _draw_pairs(needles, rng), rng)


def score_needles(logits: Tensor, document: NeedleDocument) -> tuple[bool, ...]:
    """Tell for each needle whether the model's first choice is right at every digit of its answer.

    Args:
        logits: what the model gave for `document.token_ids`, shape (length, vocabulary) or (1, length, vocabulary).
        document: the document.

    Returns:
        One truth value per needle, in the order of `document.needles`.

    Raises:
        ValueError: the shape of `logits` does not fit the document.
    """
    scores = _rows(logits, document)
    asked = torch.tensor([list(needle.answer_positions) for needle in document.needles], device=scores.device)
    truth = document.token_ids[0].to(scores.device)[asked]
    right = (scores[asked - 1].argmax(dim=-1) == truth).all(dim=-1)
    return tuple(bool(answered) for answered in right.tolist())


def next_byte_loss(logits: Tensor, document: NeedleDocument) -> float:
    """Mean next-byte cross-entropy in nats over the code, leaving needles and questions out.

    Args:
        logits: what the model gave for `document.token_ids`, shape (length, vocabulary) or (1, length, vocabulary).
        document: the document.

    Returns:
        The mean over the code's bytes.

    Raises:
        ValueError: the shape of `logits` does not fit the document.
    """
    scores = _rows(logits, document)
    wanted = document.code_mask.nonzero()[:, 0].to(scores.device)
    truth = document.token_ids[0].to(scores.device)[wanted]
    return float(torch.nn.functional.cross_entropy(scores[wanted - 1].float(), truth))


def _rows(logits: Tensor, document: NeedleDocument) -> Tensor:
    rows = logits[0] if logits.ndim == 3 and logits.shape[0] == 1 else logits
    if rows.ndim != 2 or rows.shape[0] != len(document) or rows.shape[1] < 256:
        raise ValueError(
            f"`logits` must have shape ({len(document)}, vocabulary) or (1, {len(document)}, vocabulary) with a "
            f"vocabulary of at least 256, got {tuple(logits.shape)}"
        )
    return rows


def _check_split(split: str) -> None:
    if split not in ("train", "heldout"):
        raise ValueError(f'`split` must be "train" or "heldout", got {split!r}')


def _is_held_out(name: str) -> bool:
    if name in _ALWAYS_HELD_OUT:
        return True
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:8], "big") % _HELD_OUT_ONE_IN == 0


@lru_cache(maxsize=1)
def _all_modules() -> tuple[tuple[str, bytes], ...]:
    root = Path(sysconfig.get_path("stdlib"))
    found: dict[str, bytes] = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if _SKIPPED_FOLDERS.intersection(parts) or any(part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        text = path.read_bytes().replace(b"\r\n", b"\n")
        if text and FIRST_BYTE not in text:
            found[".".join(parts).removesuffix(".__init__")] = text
    if not found:
        raise FileNotFoundError(
            f"the standard library must come with its .py sources to make documents from, found none under {root}"
        )
    return tuple(sorted(found.items()))


@lru_cache(maxsize=2)
def _modules_of(split: Split) -> tuple[tuple[str, bytes], ...]:
    return tuple(standard_library_text(split))


def _stretch_of_code(modules: tuple[tuple[str, bytes], ...], size: int, rng: np.random.Generator) -> tuple[str, bytes]:
    """Take `size` bytes from a line start, every module weighted by the starts it offers."""
    starts = np.array([max(0, len(text) - size + 1) for _, text in modules], dtype=np.int64)
    ends = np.cumsum(starts)
    drawn = int(rng.integers(ends[-1]))
    index = int(np.searchsorted(ends, drawn, side="right"))
    name, text = modules[index]
    position = drawn - int(ends[index] - starts[index])
    start = text.rfind(b"\n", 0, position) + 1
    # The stretch may end inside a line; a newline in place of its last byte lets the questions start a line.
    return name, text[start : start + size - 1] + b"\n"


def _draw_pairs(count: int, rng: np.random.Generator) -> list[tuple[str, str]]:
    letters = string.ascii_lowercase
    pairs = []
    for number in rng.choice(len(letters) ** KEY_LETTERS, size=count, replace=False):
        digits = [(int(number) // len(letters) ** place) % len(letters) for place in range(KEY_LETTERS)]
        value = int(rng.integers(10**VALUE_DIGITS))
        pairs.append(("".join(letters[digit] for digit in digits), f"{value:0{VALUE_DIGITS}d}"))
    return pairs


def _hide(module: str, code: bytes, pairs: list[tuple[str, str]], rng: np.random.Generator) -> NeedleDocument:
    line_starts = np.array([0, *(place + 1 for place, byte in enumerate(code) if byte == 10)], dtype=np.int64)
    depths = (np.arange(len(pairs)) + rng.random(len(pairs))) / len(pairs)
    cuts = [int(line_starts[np.abs(line_starts - depth * len(code)).argmin()]) for depth in depths]
    text = bytearray([FIRST_BYTE])
    spans: list[tuple[int, int]] = []
    stated: list[int] = []
    for start, stop, pair in zip([0, *cuts], [*cuts, len(code)], [*pairs, None], strict=True):
        if stop > start:
            spans.append((len(text), len(text) + stop - start))
            text += code[start:stop]
        if pair is not None:
            stated.append(len(text) + _VALUE_OFFSET)
            text += _STATEMENT.format(key=pair[0], value=pair[1]).encode()
    questions_at = len(text)
    asked = [0] * len(pairs)
    for index in rng.permutation(len(pairs)):
        asked[index] = len(text) + _VALUE_OFFSET
        text += _QUESTION.format(key=pairs[index][0], value=pairs[index][1]).encode()
    needles = tuple(
        Needle(key, value, stated_at=at, asked_at=question, depth=at / questions_at)
        for (key, value), at, question in zip(pairs, stated, asked, strict=True)
    )
    return NeedleDocument(bytes(text), module, needles, questions_at, tuple(spans))
