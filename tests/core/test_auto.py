"""patch() without a method: what it chooses, what it says of it, and that models run as they should."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import presets
from hf_sparse_attn.presets import BUDGETS, QUALITIES, Measured, Preset, best_preset, kind_of, presets_of
from hf_sparse_attn.profiles import known
from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_encoders, tiny_wan
from tests.support.tiny_families import MODELS, run
from tests.support.tiny_lm import FAMILIES as DECODERS

NOTHING = {"needs": frozenset(), "provides": frozenset({"causal", "bidirectional"})}


@pytest.fixture(autouse=True)
def nothing_shipped(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """The profiles that come with the package are of other models than these, and may be read a hundred times."""
    monkeypatch.setattr(known, "SHIPPED", tmp_path / "none")


@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_kind_of_model_is_patched_and_runs(name: str) -> None:
    model, inputs = MODELS[name]()
    before = run(model, inputs)
    with hsa.patch(model) as patch:
        assert torch.isfinite(run(model, inputs)).all()
    assert patch.choice.quality == "balanced" and patch.method.name == patch.choice.method
    assert patch.notes[0] == str(patch.choice) and "'balanced'" in patch.notes[0]
    # A figure, or that there is none.
    assert " inputs of " in patch.notes[0] or "not measured" in patch.notes[0]
    assert patch.notes[0] in str(patch.report())
    assert torch.equal(run(model, inputs), before)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("name", sorted(FAMILIES.names()))
def test_every_family_has_a_preset_to_choose_for_every_word(name: str, quality: str) -> None:
    model, _ = FAMILIES.get(name).tiny()
    with hsa.patch(model, quality=quality) as patch:
        assert patch.choice.quality == quality
        # The same as when it is named.
        chosen = patch.method, patch.session.policy
    with hsa.patch(model, patch.choice.method, quality=quality) as named:
        assert (named.method, named.session.policy) == chosen


def test_a_pipeline_is_patched() -> None:
    pipe = tiny_wan.pipeline()
    with hsa.patch(pipe) as patch:
        assert patch.family == "wan" and patch.choice is not None


def test_what_was_chosen_is_logged_and_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "hf_sparse_attn"), hsa.patch(DECODERS["llama"]()) as patch:
        said = [(r.levelname, r.message) for r in caplog.records if r.message == str(patch.choice)]
    assert said == [("INFO", str(patch.choice))]


def test_a_method_that_is_named_is_no_choice() -> None:
    with hsa.patch(DECODERS["llama"](), "sliding_window", quality="fast") as patch:
        assert patch.choice is None and not patch.notes


def test_short_inputs_stay_dense_to_the_bit() -> None:
    model, inputs = MODELS["llama"]()
    before = run(model, inputs)
    with hsa.patch(model) as patch:
        assert torch.equal(run(model, inputs), before)
        assert patch.report().density == 1


def test_layers_and_steps_that_are_given_go_before() -> None:
    with hsa.patch(tiny_wan.transformer(), dense_layers=0, dense_steps=0.5) as patch:
        assert (patch.session.policy.dense_layers, patch.session.policy.dense_steps) == (0, 0.5)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"quality": "best"}, ValueError, "`quality` must be one of high, balanced, fast; got 'best'"),
        ({"window": 64}, TypeError, "`method` must be given with parameters of it, got window alone"),
        ({"quality": "fast", "density": 0.5, "topk": 3}, TypeError, "got density, topk alone"),
        ({"texts": ["a"]}, TypeError, '`texts` must come with `profile="auto"`'),
        ({"method": "dense", "tokenizer": len}, TypeError, '`tokenizer` must come with `profile="auto"`'),
        ({"profile": "mine"}, ValueError, "`profile` must be \"auto\"; a profile is given as `method`, got 'mine'"),
        ({"method": "dense", "profile": "auto"}, TypeError, '`method` must be left out beside `profile="auto"`'),
        ({"profile": "auto", "window": 3}, TypeError, "`method` must be given with parameters of it"),
        ({"profile": "auto"}, TypeError, "must come with one of `texts`, `images` and `batches`, got none"),
        ({"profile": "auto", "texts": [], "batches": []}, TypeError, "got `texts` and `batches`"),
        ({"profile": "auto", "texts": []}, ValueError, "`texts` must hold at least one, got none"),
        ({"profile": "auto", "texts": "a text"}, TypeError, "`texts` must be a list, got 'a text' of type str"),
        ({"profile": "auto", "texts": [[1, 2, 3]]}, ValueError, r"`texts\[0\]` must be at least 16 token ids, got 3"),
        ({"profile": "auto", "texts": [{"not": "a text"}]}, TypeError, r"`texts\[0\]` must be a text or token ids"),
        ({"profile": "auto", "texts": ["a text"]}, ValueError, "or come with `tokenizer`, for the model's own is not"),
        ({"profile": "auto", "images": ["a.png"]}, TypeError, r"`images\[0\]` must be pixel values"),
    ],
    ids=str,
)
def test_what_is_refused_leaves_the_model_alone(given: dict[str, Any], error: Any, message: str) -> None:
    model = DECODERS["llama"]()
    with pytest.raises(error, match=message):
        hsa.patch(model, **given)
    hsa.patch(model, "dense").remove()


def test_a_model_of_no_family_is_refused_as_ever() -> None:
    with pytest.raises(TypeError, match="`model` must be a model or pipeline of a known family, got Linear"):
        hsa.patch(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "kind"), [("bert", "text"), ("vit", "image"), ("wav2vec2", "speech"), ("whisper", "speech")]
)
def test_the_kind_of_an_encoder_is_what_it_reads(name: str, kind: str) -> None:
    from hf_sparse_attn.family import find_family

    assert kind_of(find_family(tiny_encoders.ENCODERS[name]())[2]) == kind


def _measured(family: str, kind: str, damage: float, figure: str = "loss") -> Measured:
    return Measured("a model", family, kind, figure, 2048, 4, 0.25, 2.0, 2.0 + damage, damage)


def _ssim(sparse: float) -> Measured:
    return Measured("a model", "own", "video", "ssim", 2048, 4, 0.25, 1.0, sparse, sparse - 1)


def _preset(method: str, *rows: Measured, quality: str = "fast") -> Preset:
    return Preset(method, quality, "a test", measured=rows)


@pytest.mark.parametrize(
    ("rows", "method"),
    [
        # The least damage; of ssim more is better.
        ([_preset("a", _measured("own", "video", 0.2)), _preset("b", _measured("own", "video", 0.1))], "b"),
        ([_preset("a", _ssim(0.9)), _preset("b", _ssim(0.8))], "a"),
        # Another kind, another word and what cannot be used do not count.
        ([_preset("a", _measured("own", "text", 0.1)), _preset("b", _measured("own", "video", 0.2))], "b"),
        ([_preset("a", _ssim(0.9), quality="high"), _preset("b", _ssim(0.8))], "b"),
        ([_preset("unusable", _measured("own", "video", 0.1)), _preset("b")], "b"),
        # One's own family goes before another's.
        ([_preset("a", _measured("other", "video", 0.1)), _preset("b", _measured("own", "video", 0.2))], "b"),
        ([_preset("a"), _preset("b", _measured("other", "video", 0.2))], "b"),
        ([_preset("a"), _preset("b")], "a"),
    ],
)  # fmt: skip
def test_the_best_preset(rows: list[Preset], method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(presets, "_table", dict)
    family: Any = type("Own", (), {"presets": tuple(rows)})
    found, figure = best_preset("own", family, [torch.nn.Identity()], "fast", lambda name: name != "unusable")
    assert found.method == method and (figure is None) == (not found.measured)


def test_a_family_that_nobody_measured_takes_its_own_preset_of_what_is_best_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [_preset("a", _measured("other", "video", 0.3)), _preset("b", _measured("other", "video", 0.1))]
    monkeypatch.setattr(presets, "_table", lambda: {"other": rows})
    own = (_preset("a"), _preset("b"))
    family: Any = type("Own", (), {"presets": own})
    found, figure = best_preset("own", family, [torch.nn.Identity()], "fast", lambda _: True)
    assert found is own[1] and figure is rows[1].measured[0]


def test_a_family_without_presets_must_be_given_a_method() -> None:
    with pytest.raises(ValueError, match="`method` must be given for a own model: its family has no preset 'fast'"):
        best_preset("own", type("Own", (), {}), [torch.nn.Identity()], "fast", lambda _: True)  # type: ignore[arg-type]


def test_figures_of_presets_are_what_they_say() -> None:
    rows = [(p, row) for name, f in FAMILIES.items() for p in presets_of(name, f) for row in p.measured]
    assert {row.kind for _, row in rows} == {"text", "image", "speech", "video"}
    for preset, row in rows:
        assert row.difference == pytest.approx(row.sparse - row.dense, abs=2e-3)
        assert row.inputs >= 4 and row.damage > -0.01
        if row.kind != "video":
            # Of a video some steps are dense.
            assert BUDGETS[preset.quality] * 0.8 <= row.density <= BUDGETS[preset.quality] * 1.2, preset
