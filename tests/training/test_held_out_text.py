"""Figures on held-out text: those of all logits at once, from the logits of a few positions at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.shipped.corpus import next_byte_loss, score_needles
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.text.data import TextSample, TextSettings, open_text
from hf_sparse_attn.training.text.held_out import HeldOutScores, held_out_figures, held_out_settings, open_held_out
from hf_sparse_attn.training.text.model import load_language_model
from tests.support.tiny_lm import FAMILIES, VOCAB, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
NEEDLES = TextSettings(source="needles", length=701, needles=9)
WINDOW = {"window": 64, "sink": 4, "block_size": 16, "min_tokens": 0}


@pytest.fixture(scope="module")
def shipped():
    return load_language_model("byte_llama", torch.float32)[0]


@pytest.mark.parametrize("chunk", [None, 100, 1], ids=["whole", "chunks", "one_by_one"])
def test_documents_with_needles_as_from_all_logits(shipped, tmp_path: Path, chunk: int | None) -> None:
    data = open_text(held_out_settings(NEEDLES, None), None, seed=1000, cache=tmp_path)
    losses, counts, right = [], [], []
    # With a window, so that some needles are answered and some are not.
    with hsa.patch(shipped, "sliding_window", **{**WINDOW, "window": 256}), torch.no_grad():
        found = held_out_figures(CausalParts(shipped), data, 2, CPU, chunk)
        for document in map(data.document, range(2)):
            logits = shipped(document.token_ids, use_cache=False).logits
            counts.append(int(document.code_mask.sum()))
            losses.append(next_byte_loss(logits, document) * counts[-1])
            right += score_needles(logits, document)
    assert 0 < sum(right) < len(right) == 18
    assert found.keys() == {"loss", "needles"}
    assert found["needles"] == sum(right) / 18
    # Sums of float32 losses in another order.
    assert found["loss"] == pytest.approx(sum(losses) / sum(counts), rel=1e-5)


def test_plain_text_as_from_all_logits(shipped, tmp_path: Path) -> None:
    settings = held_out_settings(TextSettings(source="standard_library", length=300), None)
    data = open_held_out(settings, settings, 2, None, seed=0, cache=tmp_path)
    assert settings.split == "heldout" and data.scored(1)[1] == []
    ids = torch.stack([data[0].ids, data[1].ids])
    with torch.no_grad():
        logits = shipped(ids, use_cache=False).logits[:, :-1]
    want = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert held_out_figures(CausalParts(shipped), data, 2, CPU) == {"loss": pytest.approx(float(want), rel=1e-5)}


def test_no_more_logits_at_once_than_a_chunk_has(shipped, tmp_path: Path) -> None:
    data = open_text(NEEDLES, None, seed=1, cache=tmp_path)
    seen: list[int] = []
    handle = shipped.lm_head.register_forward_hook(lambda module, args, out: seen.append(out.shape[1]))
    held_out_figures(CausalParts(shipped), data, 1, CPU, 20)
    handle.remove()
    document = data.document(0)
    # Those of the code, which is all that counts in the loss, and of the 36 digits of answers.
    assert max(seen) == 20 and sum(seen) == int(document.code_mask.sum()) + 36


def test_an_answer_is_right_when_all_its_tokens_come_first() -> None:
    model, ids = FAMILIES["llama"](), tokens(1, 40)
    parts = CausalParts(model)
    with torch.no_grad():
        hidden = parts.hidden(ids)
        told = parts.logits(hidden)[0].argmax(-1)
    # Three places tell the token after them, and one tells another.
    ids[0, [11, 12, 21]] = told[[10, 11, 20]]
    ids[0, 31] = (told[30] + 1) % VOCAB
    weights = torch.rand(1, 40)
    scores = HeldOutScores(parts, 3)
    with torch.no_grad():
        scores.add(TextSample(ids, weights), hidden, [[10, 11], [20, 30], [20]])
        scores.add(TextSample(ids, weights), hidden, [])
    assert scores.answered == [True, False, True]
    assert scores.figures()["needles"] == pytest.approx(2 / 3)
    with torch.no_grad():
        losses = torch.nn.functional.cross_entropy(parts.logits(hidden)[0, :-1], ids[0, 1:], reduction="none")
    want = float((losses * weights[0, 1:]).sum() / weights[0, 1:].sum())
    assert scores.figures()["loss"] == pytest.approx(want, rel=1e-5)
    with pytest.raises(ValueError, match="`chunk` must be at least 1, got 0"):
        HeldOutScores(parts, 0).add(TextSample(ids, weights), hidden, [])


def test_text_of_ones_own_needs_held_out_text(tmp_path: Path) -> None:
    own = replace(NEEDLES, source="/somewhere")
    with pytest.raises(ValueError, match="`held_out` must be given for text of one's own, got none for '/somewhere'"):
        held_out_settings(own, None)
    assert held_out_settings(own, NEEDLES) is NEEDLES
    assert held_out_settings(NEEDLES, None) == replace(NEEDLES, split="heldout")
    (tmp_path / "text.txt").write_text("seven x" * 30, encoding="utf-8")
    settings = TextSettings(source=str(tmp_path / "text.txt"), length=50)
    assert len(open_held_out(settings, NEEDLES, 4, None, seed=0, cache=tmp_path / "cache")) == 4
    with pytest.raises(ValueError, match="must be at most 4, the held-out samples of 50 tokens, got 5"):
        open_held_out(settings, NEEDLES, 5, None, seed=0, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"`held_out` must be other text than `data`, got .*text\.txt in both"):
        open_held_out(settings, settings, 1, None, seed=0, cache=tmp_path / "cache")
