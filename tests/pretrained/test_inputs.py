"""Texts, photographs and speech that real weights are fed with."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from hf_sparse_attn.pretrained import images, smollm2, speech, texts


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **_: Any) -> Any:
        return type("Encoded", (), {"input_ids": [ord(letter) for letter in text]})

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


class Pairs(Letters):
    """A tokenizer of pairs of letters: a number is cut in two ways, by where it stands."""

    def __call__(self, text: str, **_: Any) -> Any:
        pairs = [text[i : i + 2] for i in range(0, len(text), 2)]
        return type("Encoded", (), {"input_ids": [ord(p[0]) * 256 + ord(p[-1]) for p in pairs]})

    def decode(self, ids: list[int]) -> str:
        return "".join(chr(i // 256) + chr(i % 256) for i in ids)


def test_no_paragraph_is_both_fitted_and_scored_on() -> None:
    fitted, scored = (
        {part.strip() for text in split.values() for part in text.split("\n\n") if len(part) > 200}
        for split in (texts.CALIBRATION, texts.HELD_OUT)
    )
    assert len(fitted) > 300 and len(scored) > 300 and not fitted & scored
    assert not set(speech.sentences) & set(speech.calibration_sentences)
    assert not set(images.CALIBRATION) & set(images.HELD_OUT)


@pytest.mark.parametrize("tokens, needles", [(1500, 1), (2001, 8), (2111, 12)])
def test_a_document_states_each_number_once_and_asks_for_it_at_its_end(tokens: int, needles: int) -> None:
    document = texts.needle_document(Letters(), texts.HELD_OUT["smtplib"], tokens, needles, seed=3)
    ids = document.token_ids[0].tolist()
    text = Letters().decode(ids)
    assert document.token_ids.shape == (1, tokens) and len(document.questions) == needles
    assert text[document.questions_at :].startswith("\n\nList of the secret numbers:\n")
    for asked, stated in document.questions:
        number = "".join(text[i] for i in stated)
        assert number.isdigit() and len(number) == 4 and "".join(text[i + 1] for i in asked) == number
        city = text[: stated[0]].split()[-2]
        assert city in texts.CITIES and text[: asked[0] + 1].endswith(f"The secret number of {city} is ")
        assert stated[-1] < document.questions_at < asked[0] and text.count(number) == 2
    # By depth, in equal parts.
    depths = [stated[0] for _, stated in document.questions]
    assert depths == sorted(depths) and depths[-1] < document.questions_at
    assert document.batch["input_ids"] is document.token_ids and document.batch["needles"] is document.questions


def test_figures_of_a_document() -> None:
    document = texts.needle_document(Letters(), texts.HELD_OUT["smtplib"], 1200, 4)
    ids = document.token_ids[0]
    sure = torch.nn.functional.one_hot(ids.roll(-1), 300)[None].float() * 50
    assert document.answered(sure) == [True] * 4 and document.loss(sure) == pytest.approx(0, abs=1e-6)
    asked, _ = document.questions[2]
    wrong = sure.clone()
    wrong[0, asked[1]] = wrong[0, asked[1]].roll(1)
    assert document.answered(wrong) == [True, True, False, True] and document.loss(wrong) == document.loss(sure)
    assert document.loss(torch.zeros_like(sure)) == pytest.approx(torch.tensor(300.0).log().item())


@pytest.mark.parametrize(
    "tokenizer, tokens, needles, said",
    [
        (Letters(), 1000, 0, "`needles` must be from 1 to 12, got 0"),
        (Letters(), 300, 8, "`tokens` must be from "),
        (Letters(), 10**6, 8, "for this text, got 1000000"),
        (Pairs(), 1000, 8, "`tokenizer` must make the same tokens of a number in every place"),
    ],
)
def test_documents_that_cannot_be(tokenizer: Any, tokens: int, needles: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        texts.needle_document(tokenizer, texts.HELD_OUT["smtplib"], tokens, needles)


@pytest.mark.parametrize(
    "said, understood, error",
    [
        ("One, two; three.", "one two three", 0),
        ("one two three four", "one too three", 0.5),
        ("one two", "one one two two", 1),
        ("a b c d", "", 1),
    ],
)
def test_word_error(said: str, understood: str, error: float) -> None:
    assert speech.word_error(said, understood) == error


def test_nothing_said_has_no_word_error() -> None:
    with pytest.raises(ValueError, match=r"`said` must hold at least one word, got '\.\.\.'"):
        speech.word_error("...", "word")


@pytest.mark.real
def test_texts_are_long_enough() -> None:
    tokenizer = smollm2.load_tokenizer()
    lengths = {name: len(tokenizer(text, verbose=False).input_ids) for name, text in texts.HELD_OUT.items()}
    assert len(lengths) >= 8 and min(lengths.values()) >= 4600, lengths
    document = texts.needle_document(tokenizer, texts.HELD_OUT["debugger assignment"], 4096)
    assert document.token_ids.shape == (1, 4096) and all(len(asked) == 4 for asked, _ in document.questions)


@pytest.mark.real
def test_photographs() -> None:
    found = images.images(10, seed=1)
    again = images.images(10, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))
    for image in found:
        assert image.dtype == np.uint8 and image.shape[0] == image.shape[1] >= 200 and image.shape[2] == 3
        assert image.std() > 5
    # No photograph comes again before each was taken.
    assert len({image.mean().round(4) for image in found[: len(images.HELD_OUT)]}) == len(images.HELD_OUT)
    assert not np.array_equal(found[0], images.images(1, seed=1, names=images.CALIBRATION)[0])
    with pytest.raises(ValueError, match="`count` and `names` must be at least one, got 0 of 8 photographs"):
        images.images(0)


@pytest.mark.real
def test_speech() -> None:
    wave = speech.speak(speech.sentences[0])
    assert wave.dtype == np.float32 and wave.ndim == 1 and 4 < len(wave) / speech.RATE < 8
    assert 0.1 < np.abs(wave).max() <= 1
    # Whatever was said in between.
    speech.speak(speech.sentences[1])
    assert np.array_equal(wave, speech.speak(speech.sentences[0]))
    # The voice is below 8 kHz, and nothing of it was folded down.
    power = np.abs(np.fft.rfft(wave)) ** 2
    assert power[: len(power) // 2].sum() > 0.8 * power.sum()
    for nothing in ("", "   "):
        with pytest.raises(ValueError, match="`text` must be something that can be said"):
            speech.speak(nothing)
