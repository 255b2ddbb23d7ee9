"""Measurements: sums of metrics, damage, and the file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.evaluation.fidelity import dense_attention
from hf_sparse_attn.profiles.measurements import Case, HeadMap, Measurements, label_of, weights_of
from hf_sparse_attn.profiling.observe import Seen
from hf_sparse_attn.profiling.probe import Probe


def made(**changes: object) -> Measurements:
    shape = (1, 2, 3, 2)
    values = {
        name: np.full(shape, value, np.float32)
        for name, value in {
            "density": 0.5, "seconds": 1e-3, "recall": 0.75, "output_error": 0.125, "output_error_p95": 0.5,
            "layer_error": 0.25,
        }.items()
    }  # fmt: skip
    values["layer_error"][0, 1, 2, 1] = np.nan
    window = hsa.get_method("sliding_window")(window=40, sink=4, block_size=16)
    maps = [HeadMap(0, 1, 2, np.eye(4, dtype=np.float32), np.ones((2, 4, 4), bool))]
    fields = {
        "candidates": (hsa.get_method("dense")(), window), "layers": ("a", "b"), "heads": 3, "kv_heads": 1,
        "cases": (Case(111, (0.0, 0.5)),), "figures": values, "declined": {"radial": "no"}, "maps": maps,
    }  # fmt: skip
    return Measurements(**{**fields, **changes})  # type: ignore[arg-type]


def test_damage_is_the_weighted_sum_and_infinite_where_a_candidate_declined() -> None:
    damage = made().damage("layer_error + 0.5 * recall")
    assert damage[0, 0, 0, 0] == 0.25 + 0.5 * 0.25
    assert np.isinf(damage[0, 1, 2, 1]) and np.isfinite(damage).sum() == damage.size - 1
    assert (made().damage("output_error") == 0.125).all()


@pytest.mark.parametrize(
    "text, weights",
    [
        ("recall", {"recall": 1.0}),
        ("layer_error + 0.02 * retrieval_score", {"layer_error": 1.0, "retrieval_score": 0.02}),
        ("2*influence+1e-3*video_mse", {"influence": 2.0, "video_mse": 0.001}),
    ],
)
def test_sums_are_read(text: str, weights: dict[str, float]) -> None:
    assert weights_of(text) == weights


@pytest.mark.parametrize(
    "text", ["", "beauty", "recall +", "recall + recall", "2 recall", "x * recall", "0 * recall", "-1 * recall",
             "inf * recall", "nan * recall", "recall * 2"],
)  # fmt: skip
def test_what_is_no_sum_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`metric` must"):
        weights_of(text)


def test_metrics_must_be_strings_that_were_measured() -> None:
    with pytest.raises(TypeError, match=r"`metric` must be a string, got \['recall'\]"):
        weights_of(["recall"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`metric` must have been measured \(output_error.*got 'influence'"):
        made().damage("recall + influence")


@pytest.mark.parametrize("batch", [1, 2])
def test_layer_error_is_a_share_of_the_output_of_the_layer(batch: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, heads, 200, 16, generator=generator) for heads in (4, 2, 2))
    v[:, 0] *= 9
    ctx = Context(TokenLayout.causal(200), num_heads=4, num_kv_heads=2, head_dim=16)
    method = hsa.get_method("sliding_window")(window=24, sink=2, block_size=16)
    found = Probe(Seen("layer", q, k, v, ctx), None).measure(method)
    dense, sparse = dense_attention(q, k, v, ctx)[0], hsa.attention(q, k, v, method, ctx)
    want = (dense - sparse).square().sum((0, 2, 3)) / dense.square().sum()
    torch.testing.assert_close(found.figures["layer_error"].float(), want, rtol=1e-4, atol=0)
    # The heads of the larger values are nearly all of the layer.
    assert want[:2].min() > 10 * want[2:].max()


def test_a_file_gives_back_what_was_saved(tmp_path: Path) -> None:
    first = made()
    first.save(tmp_path / "m.safetensors")
    again = Measurements.load(tmp_path / "m.safetensors")
    assert again.labels == first.labels == ("dense", "sliding_window(window=40, sink=4, block_size=16)")
    assert (again.layers, again.cases, again.declined) == (first.layers, first.cases, first.declined)
    for name, values in first.figures.items():
        np.testing.assert_array_equal(again.figures[name], values)
    assert (again.maps[0].case, again.maps[0].layer, again.maps[0].head) == (0, 1, 2)
    np.testing.assert_array_equal(again.maps[0].kept, first.maps[0].kept)


def test_parameters_that_are_tuples_stay_so(tmp_path: Path) -> None:
    tiles = hsa.get_method("sliding_tile")(window=(3, 1, 3), tile=(2, 4, 4))
    made(candidates=(hsa.get_method("dense")(), tiles)).save(tmp_path / "m.safetensors")
    assert Measurements.load(tmp_path / "m.safetensors").candidates[1] == tiles
    assert label_of(tiles).startswith("sliding_tile(window=(3, 1, 3), tile=(2, 4, 4)")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="`path` must be a file of measurements"):
        Measurements.load(tmp_path / "none")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="`path` must be a file of measurements"):
        Measurements.load(tmp_path / "text")
    save_file({"x": np.zeros(3)}, tmp_path / "other")
    with pytest.raises(ValueError, match=r"must be hf_sparse_attn\.measurements version 1, got None version None"):
        Measurements.load(tmp_path / "other")
    made().save(tmp_path / "m")
    whole = (tmp_path / "m").read_bytes()
    (tmp_path / "short").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="`path` must be a file of measurements"):
        Measurements.load(tmp_path / "short")


def test_measurements_check_themselves() -> None:
    with pytest.raises(ValueError, match="`candidates` must begin with dense"):
        made(candidates=(hsa.get_method("sliding_window")(),))
    figures = dict(made().figures)
    with pytest.raises(ValueError, match="`figures` must hold 'recall'"):
        made(figures={name: value for name, value in figures.items() if name != "recall"})
    with pytest.raises(ValueError, match=r"`figures\['recall'\]` must be \[1, 2, 3, 2\], got \[3\]"):
        made(figures={**figures, "recall": np.zeros(3, np.float32)})
