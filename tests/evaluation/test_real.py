"""The command that compares methods at equal density, on real weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.pretrained import dinov2, images

SMALL = ["--methods", "block_topk", "--densities", "0.25", "--threads", "1", "--json"]


def rows(capsys: Any, *options: str) -> list[dict[str, Any]]:
    assert main(["eval", *options, *SMALL]) == 0
    (result,) = json.loads(capsys.readouterr().out)
    assert result["rows"][0]["name"] == "dense" and result["subject"] in options
    return result["rows"]


@pytest.mark.real
@pytest.mark.slow
def test_dinov2(capsys: Any, tmp_path: Path) -> None:
    options = ["--size", "224", "--inputs", "2", "--no-profile", "--output", str(tmp_path)]
    dense, sparse = rows(capsys, "--model", "dinov2", *options)
    assert dense["state_error"] == dense["saliency"] == 0
    assert 0.02 < sparse["state_error"] < 0.8 and 0 < sparse["saliency"] < 0.2
    assert sparse["density"] == pytest.approx(0.25, rel=0.15)
    assert len(sparse["paired"]["state_error"]["differences"]) == 2
    assert "state error" in (tmp_path / "eval.md").read_text()
    assert (tmp_path / "eval_dinov2.png").stat().st_size > 10_000


@pytest.mark.real
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_smollm2(capsys: Any) -> None:
    dense, sparse, mix = rows(capsys, "smollm2", "--tokens", "512", "--inputs", "1")
    assert 2 < dense["loss"] < 3.5 and dense["kl"] == 0 and dense["needles"] > 0.5
    assert sparse["loss"] > dense["loss"] and 0.05 < sparse["kl"] and sparse["needles"] <= dense["needles"]
    assert mix["name"] == "per-head profile" and mix["kl"] < sparse["kl"]


@pytest.mark.real
@pytest.mark.slow
def test_whisper(capsys: Any) -> None:
    dense, sparse = rows(capsys, "whisper", "--inputs", "2", "--no-profile")
    assert dense["state_error"] == 0 and dense["word_error"] < 0.1
    assert 0.05 < sparse["state_error"] < 0.4 and sparse["word_error"] < 0.3


@pytest.mark.real
@pytest.mark.slow
def test_a_profile_in_place_of_a_mix(capsys: Any, tmp_path: Path) -> None:
    batch = {"pixel_values": dinov2.pixels(images.images(1, names=images.CALIBRATION)[0], 224)}
    quarter = hsa.get_method("block_topk")(density=0.25, block_size=16)
    found = hsa.profile(dinov2.load_model(), [batch], [quarter], 0.6, progress=False)
    found.save_pretrained(tmp_path)
    *_, own = rows(capsys, "dinov2", "--size", "224", "--inputs", "1", "--profile", str(tmp_path))
    assert own["name"] == f"profile {tmp_path}" and own["wanted"] is None and 0 < own["state_error"] < 0.8


@pytest.mark.parametrize(
    "options, said",
    [
        (["smollm2", "--size", "224"], "--size must be left out for smollm2, which has inputs of its own"),
        (["dinov2", "--tokens", "640"], "--tokens must be left out for dinov2, which has inputs of its own"),
        (["whisper", "--audio", "a.wav", "--part", "x"], "--audio and --part must be left out for whisper"),
        (["dinov2", "--dtype", "bfloat16"], "--dtype must be left out for dinov2"),
        (["whisper", "--seed", "3"], "--seed must be left out for whisper"),
        (["language", "--inputs", "3"], "--inputs must be left out for language"),
        (["dinov2", "--inputs", "0"], "`inputs` must be at least 1, got 0"),
    ],
)
def test_options_that_would_be_ignored(options: list[str], said: str, capsys: Any) -> None:
    assert main(["eval", *options, *SMALL]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.parametrize(
    "options, said",
    [
        (["dinov2", "--size", "100"], "`side` must be a multiple of 14, got 100"),
        (["smollm2", "--tokens", "60"], "`tokens` must be from "),
        (["dinov2", "--size", "224", "--profile", "nowhere"], "`profile` must be the folder or Hub id"),
    ],
)
def test_sizes_that_cannot_be(options: list[str], said: str, capsys: Any) -> None:
    assert main(["eval", *options, *SMALL]) == 2
    assert said in capsys.readouterr().err
