"""Real texts that come with every Python, and numbers hidden in them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CITIES = ("Paris", "London", "Madrid", "Oslo", "Cairo", "Lima", "Tokyo", "Delhi", "Rome", "Vienna", "Prague", "Dublin")
_HIDDEN = "\n\nThe secret number of {city} is {number}.\n\n"
_ASKED, _QUESTION, _ANSWER = "\n\nList of the secret numbers:", "\nThe secret number of {city} is", " {number}."

# Pages of the language reference, of which none repeats a part of another one here, and modules.
_CALIBRATION_PAGES = (("compound",), ("formatstrings",), ("typesseq", "typesmapping"))
_CALIBRATION_MODULES = ("tarfile", "subprocess", "ipaddress", "optparse", "doctest")
_HELD_OUT_PAGES = (("specialnames",), ("types",), ("string-methods",), ("debugger", "assignment"))
_HELD_OUT_MODULES = ("typing", "smtplib", "argparse", "configparser", "mailbox", "statistics")


def _source(module: str) -> str:
    # Found, not imported: some of them do things when they are.
    spec = find_spec(module)
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        raise FileNotFoundError(f"the standard library must come with its .py sources, found none of {module}")
    return Path(spec.origin).read_text(encoding="utf-8")


def _texts(pages: Sequence[Sequence[str]], modules: Sequence[str]) -> dict[str, str]:
    from pydoc_data.topics import topics

    found = {}
    # In turns, so that the first few are of both kinds.
    for names, module in zip_longest(pages, modules):
        if names is not None:
            found[" ".join(names)] = "\n\n".join(topics[name] for name in names)
        found[module] = _source(module)
    return found


# Names and texts to choose and fit methods on, and those to score them on; no text is in both.
CALIBRATION: Mapping[str, str] = _texts(_CALIBRATION_PAGES, _CALIBRATION_MODULES)
HELD_OUT: Mapping[str, str] = _texts(_HELD_OUT_PAGES, _HELD_OUT_MODULES)


@dataclass(frozen=True)
class NeedleDocument:
    """A text with numbers hidden in it, which are asked for at its end.

    Args:
        token_ids: [1, tokens].
        questions: for each needle, by depth, the positions whose logits choose its digits, and those of the same
            digits where they are hidden.
        questions_at: position where the questions start.
    """

    token_ids: Tensor
    questions: tuple[tuple[list[int], list[int]], ...]
    questions_at: int

    @property
    def batch(self) -> dict[str, Any]:
        """As `hsa.profile` takes it."""
        return {"input_ids": self.token_ids, "needles": self.questions}

    def loss(self, logits: Tensor) -> float:
        """Mean cross-entropy of the next token before the questions, in nats.

        Args:
            logits: [1, tokens, vocabulary].
        """
        end = self.questions_at
        return float(torch.nn.functional.cross_entropy(logits[0, : end - 1].float(), self.token_ids[0, 1:end]))

    def answered(self, logits: Tensor) -> list[bool]:
        """For each needle, by depth, whether the likeliest token is right at each of its digits.

        Args:
            logits: [1, tokens, vocabulary].
        """
        ids = self.token_ids[0]
        return [bool((logits[0, asked].argmax(-1) == ids[stated]).all()) for asked, stated in self.questions]


def needle_document(tokenizer: Any, text: str, tokens: int, needles: int = 8, seed: int = 0) -> NeedleDocument:
    """Hides numbers at equal distances in the start of a text and asks for them, in another order, at its end.

    Args:
        tokenizer: whose tokens of digits hold nothing but digits, as that of SmolLM2.
        text: long enough for `tokens`.
        tokens: exact length of the document.
        needles: how many numbers, at most 12.
        seed: the same seed gives the same document.

    Raises:
        ValueError: `needles` is out of range, or `tokens` too short for them or longer than the text; or the tokens of
            digits are others where they are hidden than where they are asked for.
    """
    if not 1 <= needles <= len(CITIES):
        raise ValueError(f"`needles` must be from 1 to {len(CITIES)}, got {needles}")
    rng = random.Random(seed)
    hidden = [{"city": city, "number": rng.randrange(1000, 10000)} for city in rng.sample(CITIES, needles)]

    def encode(part: str) -> list[int]:
        return tokenizer(part, add_special_tokens=False, verbose=False).input_ids

    def digits(ids: Sequence[int]) -> list[int]:
        return [i for i, token in enumerate(ids) if tokenizer.decode([token]).strip().isdigit()]

    statements = [encode(_HIDDEN.format(**one)) for one in hidden]
    tail = encode(_ASKED)
    answers: dict[int, list[int]] = {}
    for i in rng.sample(range(needles), needles):
        tail += encode(_QUESTION.format(**hidden[i]))
        answer = encode(_ANSWER.format(**hidden[i]))
        answers[i] = [len(tail) + place for place in digits(answer)]
        tail += answer
    room = tokens - len(tail) - sum(map(len, statements))
    body = encode(text)
    if not needles <= room <= len(body):
        least, most = (tokens - room + size for size in (needles, len(body)))
        raise ValueError(f"`tokens` must be from {least} to {most} for this text, got {tokens}")
    ids: list[int] = []
    stated: list[list[int]] = []
    last = 0
    for i, statement in enumerate(statements):
        cut = int(room * (i + 0.5) / needles)
        ids += body[last:cut]
        stated.append([len(ids) + place for place in digits(statement)])
        ids += statement
        last = cut
    ids += body[last:room]
    at = len(ids)
    ids += tail
    questions = tuple(([at + place - 1 for place in answers[i]], stated[i]) for i in range(needles))
    if not all(a and [ids[p + 1] for p in a] == [ids[p] for p in s] for a, s in questions):
        raise ValueError("`tokenizer` must make the same tokens of a number in every place, got others")
    return NeedleDocument(torch.tensor([ids]), questions, at)
