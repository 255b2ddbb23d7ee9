"""What a patch tells besides figures: notes, in the log and under the report's table."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import hf_sparse_attn as hsa
from tests.support import tiny_lm


@pytest.fixture
def llama() -> Any:
    return tiny_lm.FAMILIES["llama"]()


def test_a_note_is_told_once_and_kept(llama: Any, caplog: pytest.LogCaptureFixture) -> None:
    with hsa.patch(llama, "sliding_window", window=24) as patch, caplog.at_level(logging.WARNING, "hf_sparse_attn"):
        for text in ("steps are guessed", "second", "steps are guessed"):
            patch.note(text)
        patch.session.notes.add("second")
        assert patch.notes == ("steps are guessed", "second")
        assert [r.getMessage() for r in caplog.records] == ["steps are guessed", "second"]
        report = patch.report()
        assert str(report).splitlines()[-2:] == ["note: steps are guessed", "note: second"]
        assert report.to_dict()["notes"] == ("steps are guessed", "second")
