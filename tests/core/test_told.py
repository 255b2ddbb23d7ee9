"""What a patch tells besides figures: notes, in the log and under the report's table."""

from __future__ import annotations

import logging
from typing import Any

import pytest

import hf_sparse_attn as hsa
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
