"""Profiles that are known of a model: in the cache, in the package, made by patch(model, profile="auto")."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles import known
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.known import find_known, folder_of, keep_known, look_up
from hf_sparse_attn.profiles.step_plan import StepPlan
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support import tiny_encoders, tiny_wan
from tests.support.tiny_lm import FAMILIES, tokens

np = pytest.importorskip("numpy")


@pytest.fixture(autouse=True)
def places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(known, "SHIPPED", tmp_path / "shipped")


def _profile(model: Any, window: int = 32) -> HeadProfile:
    own = Fingerprint.of(model)
    methods = (hsa.get_method("dense")(), hsa.get_method("sliding_window")(window=window, sink=2, block_size=16))
    shape = own.layers, own.heads
    figures = {"density": np.full((1, *shape), 0.2, np.float32)}
    plan = StepPlan((0.0, 1.0), np.ones(shape, np.int16))
    return HeadProfile(own, methods, (plan,), figures, "output_error", {"density": 0.25}, {})


def _ship(profile: HeadProfile, name: str, quality: str = "balanced") -> Path:
    folder: Path = known.SHIPPED / name / quality
    profile.save_pretrained(folder)
    return folder


def test_nothing_is_known_of_a_model_that_nobody_profiled() -> None:
    assert find_known(FAMILIES["llama"](), "balanced") is None


def test_a_shipped_profile_is_found_by_its_fingerprint_and_its_quality() -> None:
    model = FAMILIES["llama"]()
    _ship(_profile(FAMILIES["qwen3"]()), "another")
    _ship(_profile(model), "mine")
    found = look_up(model, "balanced")
    assert found.profile is not None and found.where == "that comes with the package for mine"
    assert find_known(model, "fast") is None
    with hsa.patch(model) as patch:
        assert isinstance(patch.choice.method, HeadProfile)
        assert patch.notes == (
            "quality 'balanced': the head profile that comes with the package for mine, density 0.2; "
            "its quality on other inputs was not measured",
        )
        model(tokens(1, 64))
    with hsa.patch(model, quality="fast") as patch:
        assert patch.choice.method == patch.method.name


def test_one_of_the_cache_goes_before_and_is_of_these_weights_alone() -> None:
    model = FAMILIES["llama"]()
    _ship(_profile(model, 48), "mine")
    keep_known(_profile(model, 24), model, "balanced")
    found = find_known(model, "balanced")
    assert found is not None and found.methods[1].params()["window"] == 24
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.model.norm.weight.mul_(1.001)
    other = find_known(tuned, "balanced")
    assert other is not None and other.methods[1].params()["window"] == 48
    edited = copy.deepcopy(model)
    with torch.no_grad():
        edited.model.layers[1].self_attn.q_proj.weight[-8:] = 0
    other = find_known(edited, "balanced")
    assert other is not None and other.methods[1].params()["window"] == 48


def test_figures_of_a_profile_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    row = {"figure": "loss", "tokens": 2048, "inputs": 8, "density": 0.25, "dense": 2.627, "sparse": 2.638}
    found = _profile(model)
    object.__setattr__(found, "evaluation", ({**row, "difference": 0.011},))
    monkeypatch.setattr("hf_sparse_attn.auto.look_up", lambda *_: known.Known(found, "made here", ()))
    with hsa.patch(model) as patch:
        assert "loss 2.638, dense 2.627 (+0.011), 8 inputs of 2,048 tokens" in patch.notes[0]


@pytest.mark.parametrize("broken", ["", "{", '{"format": "another"}', "null", None])
def test_a_broken_file_is_skipped_with_a_note(broken: str | None) -> None:
    model = FAMILIES["llama"]()
    _ship(_profile(model, 48), "mine")
    folder = keep_known(_profile(model, 24), model, "balanced")
    if broken is None:
        (folder / "head_profile.json").unlink()
    else:
        (folder / "head_profile.json").write_text(broken)
    with hsa.patch(model) as patch:
        assert patch.choice.method.methods[1].params()["window"] == 48
        assert f"the profile in {folder.parent.parent} cannot be read and is skipped" in patch.notes[0]
        assert patch.notes[1] == str(patch.choice)


def test_a_model_of_several_kinds_has_no_profile_and_is_patched() -> None:
    model = tiny_encoders.ENCODERS["clip"]()
    assert find_known(model, "balanced") is None or isinstance(find_known(model, "balanced"), HeadProfile)
    with hsa.patch(model) as patch:
        assert patch.choice.method == patch.method.name


def test_a_quality_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="`quality` must be one of high, balanced, fast; got 'good'"):
        find_known(FAMILIES["llama"](), "good")


def test_many_threads_that_keep_one_leave_a_whole_one() -> None:
    model = FAMILIES["llama"]()
    made = [_profile(model, 16 + i) for i in range(8)]
    threads = [threading.Thread(target=keep_known, args=(profile, model, "fast")) for profile in made]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert look_up(model, "fast").skipped == ()
    found = find_known(model, "fast")
    assert found is not None and 16 <= found.methods[1].params()["window"] < 24
    assert {path.name for path in folder_of(model, found.model, "fast").iterdir()} == {
        "README.md",
        "head_profile.json",
    }


# ---------------------------------------------------------------------- profile="auto"


def test_a_profile_is_made_once_and_read_from_then_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["llama"]()
    ids = [tokens(1, 200, seed=seed) for seed in range(2)]
    with hsa.patch(model, profile="auto", texts=ids, quality="high") as patch:
        made = patch.choice.method
        assert made.budget == {"density": 0.5} and "made here just now" in patch.notes[0]
    folder = folder_of(model, made.model, "high")
    assert json.loads((folder / "head_profile.json").read_text())["budget"] == {"density": 0.5}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("profiled again")

    monkeypatch.setattr(hsa, "profile", refuse)
    # With the inputs or without them, and where only the quality is given.
    for given in ({"profile": "auto", "texts": ids}, {"profile": "auto"}, {}):
        with hsa.patch(model, quality="high", **given) as patch:
            assert np.array_equal(patch.choice.method.plans[0].choice, made.plans[0].choice)
            assert "made here for these weights" in patch.notes[0]
    with pytest.raises(AssertionError, match="profiled again"):
        hsa.patch(model, profile="auto", texts=ids, quality="fast")
    hsa.patch(model, "dense").remove()


def test_what_comes_with_the_package_is_not_read_where_one_of_these_weights_is_asked_for() -> None:
    model = FAMILIES["llama"]()
    _ship(_profile(model), "mine")
    with pytest.raises(TypeError, match="must come with one of `texts`, `images` and `batches`"):
        hsa.patch(model, profile="auto")


def test_strings_are_read_by_a_tokenizer() -> None:
    model = FAMILIES["llama"]()

    def tokenizer(text: str) -> Any:
        return type("Encoded", (), {"input_ids": [3 + ord(letter) % 90 for letter in text]})

    with hsa.patch(model, profile="auto", texts=["a text that is long enough, " * 5], tokenizer=tokenizer) as patch:
        assert patch.choice.method.calibration["tokens"] == [140]


def test_images_and_batches() -> None:
    model, inputs = tiny_encoders.ENCODERS["vit"](), tiny_encoders.inputs("vit")
    pixels = inputs["pixel_values"]
    with hsa.patch(model, profile="auto", images=list(pixels), quality="high") as patch:
        assert patch.choice.method.calibration["batches"] == len(pixels)
    with hsa.patch(model, profile="auto", batches=[inputs]) as patch:
        assert patch.choice.method.budget == {"density": 0.25}


def test_a_pipeline_takes_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, seen = tiny_wan.pipeline(), []

    def profile(model: Any, batches: Any, **_: Any) -> HeadProfile:
        seen.extend(batches)
        return _profile(model)

    monkeypatch.setattr(hsa, "profile", profile)
    with hsa.patch(pipe, profile="auto", texts=["a dog", "a cat"]) as patch:
        assert patch.family == "wan" and patch.choice.method.methods == _profile(pipe).methods
    assert seen == [{"prompt": "a dog"}, {"prompt": "a cat"}]


def test_weights_that_are_not_here_are_no_obstacle() -> None:
    model = FAMILIES["llama"]()
    keep_known(_profile(model), model, "balanced")
    empty = copy.deepcopy(model).to("meta")
    found = look_up(empty, "balanced")
    assert found.profile is None and "is skipped" in found.skipped[0]


def test_a_profile_that_cannot_be_made_leaves_the_model_and_the_cache_alone(tmp_path: Path) -> None:
    model = FAMILIES["llama"]()
    with pytest.raises(IndexError):
        hsa.patch(model, profile="auto", texts=[[10**6] * 64])
    assert not (tmp_path / "home").exists()
    hsa.patch(model, "dense").remove()
