"""The documents must be exactly what they claim, or every figure drawn from them is wrong."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.shipped.corpus import (
    FIRST_BYTE,
    NeedleDocument,
    needle_document,
    next_byte_loss,
    score_needles,
    standard_library_text,
)


def _logits_of(text: bytes) -> Tensor:
    """Logits that choose every next byte of the text with confidence."""
    following = torch.tensor([*text[1:], 0])
    return torch.nn.functional.one_hot(following, 256).float() * 20.0


@pytest.mark.parametrize("length", [305, 512, 1023, 2048, 4097, 32771])
def test_documents_have_the_exact_length(length: int) -> None:
    document = needle_document(length, seed=3)
    assert len(document) == len(document.text) == length
    assert document.token_ids.shape == (1, length)
    assert document.text[0] == FIRST_BYTE
    assert FIRST_BYTE not in document.text[1:]


def test_the_seed_decides_the_document() -> None:
    assert needle_document(1024, seed=5) == needle_document(1024, seed=5)
    assert needle_document(1024, seed=5).text != needle_document(1024, seed=6).text


@pytest.mark.parametrize(("length", "needles"), [(512, 4), (700, 8), (2048, 24), (2048, 1)])
def test_needles_stand_where_the_document_says(length: int, needles: int) -> None:
    document = needle_document(length, needles, seed=1)
    assert len({needle.key for needle in document.needles}) == needles
    for needle in document.needles:
        line = f"{needle.key}={needle.value}\n".encode()
        for opening, at in ((b"\n# key ", needle.stated_at), (b"\n# get ", needle.asked_at)):
            start = at - len(needle.key) - 1
            assert document.text[start : start + len(line)] == line
            before = document.text[start - len(opening) : start]
            assert before == opening or start == len(opening)
        assert needle.stated_at < document.questions_at < needle.asked_at
        assert 0.0 <= needle.depth <= 1.0
        assert document.text.count(f"# key {needle.key}=".encode()) == 1
    assert list(document.needles) == sorted(document.needles, key=lambda needle: needle.depth)


def test_the_code_is_what_is_left_without_the_needles() -> None:
    document = needle_document(2048, seed=2)
    code = b"".join(document.text[start:stop] for start, stop in document.code_spans)
    assert len(code) == 2048 - 1 - 2 * 8 * len("# key abc=0000\n")
    assert code[:-1] in dict(standard_library_text("heldout"))[document.module]
    assert int(document.code_mask.sum()) == len(code)


def test_needles_reach_every_depth() -> None:
    depths = [needle.depth for seed in range(20) for needle in needle_document(2048, seed=seed).needles]
    assert min(depths) < 0.1
    assert max(depths) > 0.9


def test_the_splits_share_nothing_and_hold_long_modules() -> None:
    train, heldout = dict(standard_library_text("train")), dict(standard_library_text("heldout"))
    assert not train.keys() & heldout.keys()
    assert {"argparse", "typing", "_pydecimal"} <= heldout.keys()
    assert max(map(len, heldout.values())) >= 32 * 1024
    assert sum(map(len, heldout.values())) < 0.3 * sum(map(len, train.values()))


def test_right_logits_answer_every_needle_and_cost_nothing() -> None:
    document = needle_document(1024, seed=4)
    logits = _logits_of(document.text)
    assert score_needles(logits, document) == (True,) * 8
    assert score_needles(logits[None], document) == (True,) * 8
    assert next_byte_loss(logits, document) < 1e-4
    assert next_byte_loss(torch.zeros(1024, 256), document) == pytest.approx(math.log(256), abs=1e-5)


@pytest.mark.parametrize("digit", range(4))
def test_one_wrong_digit_loses_its_needle_alone(digit: int) -> None:
    document = needle_document(1024, seed=4)
    text = bytearray(document.text)
    at = document.needles[2].answer_positions[digit]
    text[at] = ord("0") + (text[at] - ord("0") + 1) % 10
    assert score_needles(_logits_of(bytes(text)), document) == tuple(index != 2 for index in range(8))


def test_the_loss_leaves_needles_and_questions_out() -> None:
    document = needle_document(1024, seed=4)
    logits = _logits_of(document.text)
    aside = ~document.code_mask
    logits[:-1][aside[1:]] = 0.0
    assert next_byte_loss(logits, document) < 1e-4


def _other_shape(document: NeedleDocument) -> Tensor:
    return torch.zeros(2, len(document), 256)


def test_errors_name_argument_rule_and_value() -> None:
    with pytest.raises(ValueError, match=r"`length` must be at least \d+ for 8 needles, got 200"):
        needle_document(200)
    with pytest.raises(ValueError, match=r"`length` must be at most \d+ for 8 needles in the heldout modules, got"):
        needle_document(10**8)
    with pytest.raises(ValueError, match=r"`needles` must be from 1 to \d+, got 0"):
        needle_document(512, needles=0)
    with pytest.raises(ValueError, match=r"`split` must be \"train\" or \"heldout\", got 'test'"):
        standard_library_text("test")  # type: ignore[arg-type]
    document = needle_document(512)
    with pytest.raises(ValueError, match=r"`logits` must have shape \(512, vocabulary\)"):
        score_needles(_other_shape(document), document)


def test_documents_cannot_be_altered() -> None:
    document = needle_document(512)
    with pytest.raises(dataclasses.FrozenInstanceError):
        document.text = b""  # type: ignore[misc]
