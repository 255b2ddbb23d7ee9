"""What a patch tells besides figures: notes, in the log and under the report's table."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn import native
from tests.support import tiny_lm, tiny_wan


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


WINDOW: dict[str, Any] = dict(method="sliding_window", window=24, sink=3, block_size=32, min_tokens=0)


def kept(n: int, start: int = 0) -> int:
    """Pairs that the window keeps for the queries from `start` to `n`, by counting."""
    return sum(min(i + 1, 24) + max(0, min(3, i - 23)) for i in range(start, n))


def seen(n: int, start: int = 0) -> int:
    return sum(range(start + 1, n + 1))


def test_density_counts_work_and_not_calls(llama: Any) -> None:
    with hsa.patch(llama, **WINDOW, dense_layers=1) as patch:
        for length in (200, 64):
            llama(tiny_lm.tokens(3, length))
        report = patch.report()
        want = (seen(200) + seen(64) + kept(200) + kept(64)) / (2 * (seen(200) + seen(64)))
        assert report.density == report.prefill_density == pytest.approx(want)
        assert report.decode_density is None and "decoding" not in str(report)
        assert report.layers[1].density == pytest.approx((kept(200) + kept(64)) / (seen(200) + seen(64)))
        assert report.layers[0].density is None
        # Twelve sequences of four query heads in each layer.
        assert report.layers[1].prefill.visible == 12 * (seen(200) + seen(64))


@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_is_told_apart_and_weighs_little(llama: Any, cache: str | None) -> None:
    with hsa.patch(llama, **WINDOW) as patch:
        llama.generate(tiny_lm.tokens(1, 150), max_new_tokens=9, do_sample=False, cache_implementation=cache)
        report = patch.report()
    assert report.decode_density == 1.0
    assert report.prefill_density == pytest.approx(kept(150) / seen(150))
    decoded = seen(158, 150)
    assert report.density == pytest.approx((kept(150) + decoded) / (seen(150) + decoded))
    assert "(prefill 0.327" in str(report) and "decoding 1.000)" in str(report)
    assert report.to_dict()["decode_density"] == 1.0


def test_sequences_of_a_padded_batch_count_by_their_own_work(llama: Any) -> None:
    ids, mask, _ = tiny_lm.padded([200, 90, 10], "left")
    with hsa.patch(llama, **WINDOW) as patch:
        llama(ids, attention_mask=mask)
        report = patch.report()
    # The third is too short to be sparse.
    want = (kept(200) + kept(90)) / (seen(200) + seen(90))
    assert report.prefill_density == pytest.approx(want) and report.decode_density == 1.0
    assert report.density == pytest.approx((kept(200) + kept(90) + seen(10)) / (seen(200) + seen(90) + seen(10)))


def test_layers_with_a_window_of_their_own_count_what_they_see() -> None:
    model = tiny_lm.FAMILIES["gemma3"]()
    with hsa.patch(model, **WINDOW) as patch:
        model(tiny_lm.tokens(1, 100))
        own, full = patch.report().layers
    assert own.prefill.computed == own.prefill.visible == 4 * sum(min(i + 1, tiny_lm.WINDOW) for i in range(100))
    assert full.prefill.visible == 4 * seen(100) and full.prefill.computed == pytest.approx(4 * kept(100))


def test_dense_calls_of_a_video_count_their_pairs() -> None:
    model, inputs = tiny_wan.transformer(), tiny_wan.inputs()
    with hsa.patch(model, "block_topk", block_size=16, topk=2, min_tokens=0, dense_layers=1) as patch:
        model(**inputs)
        layers = patch.report().layers
    assert layers[0].prefill.computed == layers[0].prefill.visible == layers[1].prefill.visible > 0
    assert layers[1].prefill.computed < layers[1].prefill.visible


def test_the_gain_of_the_whole_model_is_measured_where_asked(llama: Any) -> None:
    ids, ran = tiny_lm.tokens(1, 80), []

    def run() -> None:
        ran.append(len(ran))
        llama(ids)

    with hsa.patch(llama, **WINDOW) as patch:
        assert patch.report().model_gain is None
        gain = patch.measure_model(run, rounds=2)
        assert len(ran) == 6 and gain > 0
        report = patch.report()
        # The dense runs are not counted.
        assert report.model_gain == gain and report.layers[0].sparse_calls == 3 and not report.layers[0].dense_calls
        assert f", whole model {gain:.2f}x" in str(report) and report.to_dict()["model_gain"] == gain
        with pytest.raises(ValueError, match="`rounds` must be at least 1, got 0"):
            patch.measure_model(run, rounds=0)
    with pytest.raises(ValueError, match="while the patch is on"):
        patch.measure_model(run)


@pytest.mark.parametrize(
    ("options", "notes"),
    [
        ({"dense_layers": 1}, ()),
        ({"dense_layers": [1]}, ()),
        ({"dense_layers": []}, ()),
        ({"dense_layers": 2}, ("nothing can be sparse: dense_layers=2 keeps all 2 layers dense",)),
        ({"dense_layers": 99}, ("nothing can be sparse: dense_layers=99 keeps all 2 layers dense",)),
        ({"dense_layers": [1, 0]}, ("nothing can be sparse: dense_layers=[1, 0] keeps all 2 layers dense",)),
        ({"min_tokens": 2048}, ()),
        (
            {"min_tokens": 2049},
            ("nothing can be sparse: min_tokens=2049 is more than the 2048 tokens that the model takes",),
        ),
    ],
    ids=str,
)
def test_settings_after_which_nothing_is_sparse_are_told(
    llama: Any, options: dict[str, Any], notes: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    with hsa.patch(llama, **{**WINDOW, **options}) as patch:
        assert patch.notes == notes and tuple(r.getMessage() for r in caplog.records) == notes
        assert all(f"note: {text}" in str(patch.report()) for text in notes)


@pytest.mark.parametrize("layers", [[2], [0, 7], (99,)], ids=str)
def test_layers_that_the_model_has_not_are_refused(llama: Any, layers: Any) -> None:
    with pytest.raises(ValueError, match=r"`dense_layers` must be layers from 0 to 1 of the model, got \["):
        hsa.patch(llama, **WINDOW, dense_layers=layers)
    # The model is as it was.
    hsa.patch(llama, **WINDOW).remove()


def test_layers_are_those_of_the_whole_model_also_where_some_have_no_attention() -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes: dict[str, Any] = dict(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8,
    )  # fmt: skip
    kinds = ["linear_attention", "full_attention", "full_attention", "linear_attention"]
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, layer_types=kinds)).eval()
    with hsa.patch(model, **WINDOW, dense_layers=[0, 1, 3]) as patch:
        assert patch.notes == (
            "dense_layers=[0, 1, 3] has no effect on [0, 3]: no sparse attention would run there",
        )  # fmt: skip
    with hsa.patch(model, **WINDOW, dense_layers=[1, 2]) as patch:
        assert patch.notes == ("nothing can be sparse: dense_layers=[1, 2] keeps all 2 layers dense",)
    with pytest.raises(ValueError, match="from 0 to 3 of the model"):
        hsa.patch(model, **WINDOW, dense_layers=[4])


def test_steps_of_a_model_without_steps_have_no_effect_which_is_told(llama: Any) -> None:
    with hsa.patch(llama, **WINDOW, dense_steps=(0.2, 0.0)) as patch:
        llama(tiny_lm.tokens(1, 60))
        report = patch.report()
    said = "`dense_steps` must be left out for a model without denoising steps, got (0.2, 0.0)"
    assert report.notes == (f"{said}: it has no effect",)
    assert report.layers[0].sparse_calls == 1 and not report.layers[0].reasons
    with pytest.raises(ValueError, match="`dense_steps` must be left out"):
        hsa.patch(llama, **WINDOW, dense_steps=0.2, strict=True)
    with hsa.patch(llama, **WINDOW, dense_steps=0, strict=True) as patch:
        assert not patch.notes


@pytest.mark.parametrize(("share", "told"), [(0.5, False), (1.0, True), ((0.6, 0.4), True), ((0.6, 0.3), False)])
def test_steps_that_are_all_dense_are_told(share: Any, told: bool) -> None:
    with hsa.patch(tiny_wan.transformer(), "sliding_window", dense_steps=share, window=24, min_tokens=0) as patch:
        assert bool(patch.notes) == told
    if told:
        assert patch.notes == (f"nothing can be sparse: dense_steps={share} keeps every step dense",)


def test_presets_of_every_family_are_told_nothing_of(llama: Any) -> None:
    for model, method in ((llama, "vertical_slash"), (tiny_wan.transformer(num_layers=4), "radial")):
        for quality in ("high", "balanced", "fast"):
            with hsa.patch(model, method, quality=quality) as patch:
                assert patch.notes == ()


KEEPS = "keeps all keys of a call of 300 tokens: nothing is saved there"


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("sliding_window", {"min_tokens": 0}),
        ("sliding_window", {"window": 800, "sink": 100, "min_tokens": 0}),
        ("vertical_slash", {"min_tokens": 0}),
        ("block_topk", {"block_size": 64, "topk": 50, "min_tokens": 0}),
        ("block_topk", {"block_size": 16, "topk": 99, "min_tokens": 0}),
        ("sliding_window", {"backend": "cpp_block_sparse"}),
    ],
    ids=str,
)
def test_a_method_that_keeps_everything_is_told_once(
    llama: Any, method: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture, monkeypatch: Any
) -> None:
    # Short calls are predicted too.
    monkeypatch.setattr("hf_sparse_attn.policy.fewest_keys", lambda *_: 0)
    with hsa.patch(llama, method, **options) as patch:
        for length in (300, 300, 310):
            llama(tiny_lm.tokens(1, length))
        assert len(patch.notes) == 1 and patch.notes[0].startswith(f"{method}(") and patch.notes[0].endswith(KEEPS)
        assert patch.report().notes == patch.notes and len(caplog.records) == 1


def test_one_that_leaves_something_out_is_not(llama: Any) -> None:
    with hsa.patch(llama, **WINDOW) as patch:
        llama(tiny_lm.tokens(1, 300))
        llama.generate(tiny_lm.tokens(1, 40), max_new_tokens=3)
        assert patch.report().notes == ()
    with hsa.patch(llama, "dense") as patch:
        llama(tiny_lm.tokens(1, 300))
        assert patch.report().notes == ()


def test_the_report_finds_out_what_a_gpu_was_not_waited_for(llama: Any) -> None:
    with hsa.patch(llama, **WINDOW) as patch:
        llama(tiny_lm.tokens(1, 300))
        for record in patch.session.records.values():
            record.kept = [float(record.sparse[0]), 0.0]
        (note,) = patch.report().notes
        assert note.endswith("keeps all keys of some calls: nothing is saved there")


def test_layers_of_a_native_model_tell_it_once(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    monkeypatch.setattr("hf_sparse_attn.policy.fewest_keys", lambda *_: 0)
    model = tiny_lm.FAMILIES["llama"]("hsa:sliding_window")
    model(tiny_lm.tokens(1, 300))
    (note,) = native.report(model).notes
    assert note.endswith(KEEPS) and caplog.messages == [note]
