"""The file of tuned launches: what is stored is found again, and a broken file is ignored and rebuilt."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from hf_sparse_attn.cost import tuning

KEY = ("a GPU", "torch 2, triton 3", "forward", "float16, dim 64")
LAUNCH = {"queries": 128, "keys": 64}


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    return tmp_path


def test_what_is_stored_is_found(home: Path) -> None:
    assert tuning.lookup(*KEY) is None
    tuning.store(*KEY, LAUNCH, 1.5)
    tuning.store(*KEY[:3], "float16, dim 128", {"queries": 64}, 2)
    assert tuning.path() == home / "hf_sparse_attn" / "tuning.json"
    assert tuning.lookup(*KEY) == LAUNCH and tuning.lookup(*KEY[:3], "float16, dim 128") == {"queries": 64}
    for place, other in enumerate(("another GPU", "torch 3", "backward", "float16, dim 96")):
        assert tuning.lookup(*KEY[:place], other, *KEY[place + 1 :]) is None
    tuning.store(*KEY, {"queries": 32}, 1.0)
    assert tuning.lookup(*KEY) == {"queries": 32}
    assert [p.name for p in tuning.path().parent.iterdir()] == ["tuning.json"]


def test_what_is_found_is_a_copy() -> None:
    tuning.store(*KEY, LAUNCH, 1.5)
    tuning.lookup(*KEY).clear()
    assert tuning.lookup(*KEY) == LAUNCH


def test_what_another_process_has_stored_is_found_and_kept() -> None:
    tuning.store(*KEY, LAUNCH, 1.5)
    known = json.loads(tuning.path().read_text())
    known["launches"]["b, c"] = {"forward": {"d": {"launch": {"keys": 16}, "milliseconds": 1}}}
    tuning.path().write_text(json.dumps(known))
    tuning.store(*KEY, {"queries": 16}, 1.5)
    assert tuning.lookup("b", "c", "forward", "d") == {"keys": 16} and tuning.lookup(*KEY) == {"queries": 16}


def file(entry: Any) -> str:
    return json.dumps({"format": 1, "launches": {"a GPU, torch 2, triton 3": {"forward": {KEY[3]: entry}}}})


BROKEN = {
    "empty": ("", "cannot be read"),
    "cut": (file({"launch": LAUNCH, "milliseconds": 1})[:-9], "cannot be read"),
    "a_list": ("[]", "not of format 1"),
    "of_another_format": (json.dumps({"format": 2, "launches": {}}), "not of format 1"),
    "no_launches": (json.dumps({"format": 1}), "not of format 1"),
    "a_number_for_a_device": (json.dumps({"format": 1, "launches": {"a": 3}}), "no launch"),
    "a_number_for_a_kernel": (json.dumps({"format": 1, "launches": {"a": {"forward": 3}}}), "no launch"),
    "a_text": (file({"launch": {"queries": "128"}, "milliseconds": 1}), "no launch"),
    "zero": (file({"launch": {"queries": 0}, "milliseconds": 1}), "no launch"),
    "true": (file({"launch": {"queries": True}, "milliseconds": 1}), "no launch"),
    "no_time": (file({"launch": LAUNCH}), "no launch"),
    "a_time_of_zero": (file({"launch": LAUNCH, "milliseconds": 0}), "no launch"),
}


@pytest.mark.parametrize(("text", "why"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_ignored_with_a_warning_and_rebuilt(
    text: str, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    tuning.path().parent.mkdir(parents=True)
    tuning.path().write_text(text)
    assert tuning.lookup(*KEY) is None and tuning.lookup(*KEY) is None
    assert why in caplog.text and caplog.text.count("WARNING") == 1
    tuning.store(*KEY, LAUNCH, 1.5)
    assert tuning.lookup(*KEY) == LAUNCH


@pytest.mark.parametrize(
    ("launch", "time"), [({"queries": 0}, 1.0), ({"queries": 1.5}, 1.0), (LAUNCH, 0.0)], ids=["zero", "part", "time"]
)
def test_refuses_what_it_would_not_read(launch: dict[str, Any], time: float) -> None:
    with pytest.raises(ValueError, match="`launch` must hold whole numbers"):
        tuning.store(*KEY, launch, time)
    assert not tuning.path().exists()


def test_a_failed_write_leaves_the_file_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store(*KEY, LAUNCH, 1.5)
    before = tuning.path().read_bytes()

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuning.store(*KEY, {"queries": 16}, 1.0)
    assert tuning.path().read_bytes() == before
    assert [p.name for p in tuning.path().parent.iterdir()] == ["tuning.json"]
