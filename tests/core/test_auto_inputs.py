"""patch(profile="auto") where something is amiss: a cache that cannot be used, inputs that do not do."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles import known
from tests.support.tiny_lm import FAMILIES, tokens

WINDOW = hsa.get_method("block_topk")(block_size=32, density=0.25)
TEXTS = [tokens(1, 300, seed=seed) for seed in range(2)]


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(known, "SHIPPED", tmp_path / "shipped")


def test_a_profile_that_cannot_be_kept_is_used_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file" / "home"))
    with hsa.patch(FAMILIES["llama"](), profile="auto", texts=TEXTS) as patch:
        assert patch.choice.method.budget == {"density": 0.25}
        assert "is not kept, so that the next patch() makes it anew: `directory` must be a folder" in patch.notes[0]
        assert patch.notes[1] == str(patch.choice) and "made here just now" in patch.notes[1]


def test_a_profile_of_offloaded_weights_is_used_and_not_kept() -> None:
    cpu_offload = pytest.importorskip("accelerate").cpu_offload
    model = cpu_offload(FAMILIES["llama"](), "cpu")
    with hsa.patch(model, profile="auto", texts=TEXTS[:1]) as patch:
        assert "is not kept, so that the next patch() makes it anew: " in patch.notes[0]


def test_an_empty_word_is_no_quality() -> None:
    with pytest.raises(ValueError, match="`quality` must be one of high, balanced, fast; got ''"):
        hsa.patch(FAMILIES["llama"](), quality="")


def test_a_cache_that_may_not_be_looked_into_is_skipped_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    is_dir = Path.is_dir

    def denied(path: Path) -> bool:
        if path.parent.name == "profiles":
            raise PermissionError(13, "Permission denied")
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", denied)
    with hsa.patch(FAMILIES["llama"]()) as patch:
        assert "cannot be read and is skipped: [Errno 13] Permission denied" in patch.notes[0]
        assert patch.choice.method == patch.method.name


def test_two_texts_in_one_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`texts\[1\]` must be the ids of one text, got shape \[2, 40\]"):
        hsa.patch(FAMILIES["llama"](), profile="auto", texts=[tokens(1, 40), tokens(2, 40)])


def test_texts_too_short_for_the_quality_are_told_by_it() -> None:
    with pytest.raises(ValueError, match=r"`quality` must be one that the inputs are long enough for, got .fast"):
        hsa.patch(FAMILIES["llama"](), profile="auto", quality="fast", texts=[tokens(1, 40)])


def test_a_pipeline_of_transformers_takes_texts_by_its_own_tokenizer() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, pipeline

    made = Tokenizer(models.WordLevel({"[UNK]": 0, **{c: ord(c) - 90 for c in "abcdefg"}}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="[UNK]")
    pipe = pipeline("text-generation", model=FAMILIES["llama"](), tokenizer=tokenizer)
    with hsa.patch(pipe, profile="auto", texts=[" ".join("abcdefg"[i * i % 7] for i in range(300))]) as patch:
        assert patch.choice.method.calibration["tokens"] == [300]


def test_a_budget_that_no_choice_meets_at_all_lengths_is_called_as_it_was_given() -> None:
    batches = [{"input_ids": tokens(1, length)} for length in (64, 128)]
    with pytest.raises(ValueError, match=r"`budget` must be at least .*, got 0\.3 for lengths whose least is .*, "):
        hsa.profile(FAMILIES["llama"](), batches, [WINDOW], 0.3, progress=False)
