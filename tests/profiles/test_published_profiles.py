"""Profiles that others published: what is read, and what is refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.methods.dense import Dense
from hf_sparse_attn.profiles import published
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support.tiny_lm import FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

GET = hsa.get_method


@lru_cache
def model() -> Any:
    return FAMILIES["llama"]("sdpa")


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sliding tile attention, or what stands for its parameters where it is not there."""

    @dataclass(frozen=True, kw_only=True)
    class SlidingTile(Dense):
        window: tuple = (3, 3, 3)
        tile: tuple = (6, 8, 8)

    if "sliding_tile" not in METHODS:
        SlidingTile.name = "sliding_tile"
        monkeypatch.setitem(METHODS._entries, "sliding_tile", SlidingTile)


def written(folder: Path, value: Any, name: str = "profile.json") -> Path:
    (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder / name


def chosen(profile: HeadProfile, plan: int = 0) -> list[list[Any]]:
    return [[profile.methods[i] for i in row] for row in profile.plans[plan].choice]


MINFERENCE = [
    {
        "0": ["vertical_and_slash", 100, 800, 0.97],
        "1": ["stream_llm", 100, 800, 12345.0],
        "3": ["block_sparse", 8, 1, 0],
    },
    {str(h): ["vertical_and_slash", 30, 500, 1.0] for h in range(4)},
]


def test_minference(tmp_path: Path) -> None:
    found = published.from_minference(written(tmp_path, MINFERENCE), model())
    first, second = chosen(found)
    assert first == [
        GET("vertical_slash")(vertical=100, slash=800),
        GET("sliding_window")(sink=100, window=800),
        GET("vertical_slash")(vertical=1000, slash=6096),
        GET("block_topk")(block_size=64, topk=100),
    ]
    assert second == [GET("vertical_slash")(vertical=30, slash=500)] * 4
    assert found.model == Fingerprint.of(model()) and found.metric == "published" and not found.budget
    assert np.isnan(found.figures["density"]).all()
    late = published.from_minference(tmp_path / "profile.json", model(), starting_layer=1)
    assert [m.name for m in chosen(late)[0]] == ["dense"] * 4 and chosen(late)[1] == second
    assert late.layer_density(0) == 1


def test_what_is_read_runs_and_is_kept(tmp_path: Path) -> None:
    found = published.read_published(written(tmp_path, MINFERENCE), model())
    found.save_pretrained(tmp_path / "saved")
    ids = tokens(1, 111)
    outputs = []
    for method in (found, tmp_path / "saved"):
        with torch.no_grad(), hsa.patch(model(), method, min_tokens=0) as patch:
            outputs.append(model()(input_ids=ids).logits)
            assert all(r.sparse_calls == 1 for r in patch.report().layers)
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "value, message",
    [
        (MINFERENCE[:1], "list over 2 layers, got a list of 1"),
        ([[], []], r"layer 0 must be an object of heads, got \[\]"),
        ([{"4": MINFERENCE[1]["0"]}, {}], "heads from 0 to 3, got '4'"),
        ([{"-1": MINFERENCE[1]["0"]}, {}], "heads from 0 to 3, got '-1'"),
        ([{"0": ["magic", 1, 2, 3]}, {}], "layer 0 head 0 must be of vertical_and_slash.*got 'magic'"),
        ([{}, {"2": ["vertical_and_slash", 1]}], r"layer 1 head 2 must be \[kind, vertical, slash, score\]"),
        ([{"0": ["vertical_and_slash", -1, 2, 3]}, {}], "`vertical` must be at least 0, got -1"),
        ([{"0": ["vertical_and_slash", 1, "2", 3]}, {}], "`slash` must be an int"),
        ([{"0": [["a"], 1, 2, 3]}, {}], "must be of vertical_and_slash"),
        ([{"0": 3}, {}], "layer 0 head 0 must be"),
    ],
)
def test_minference_refuses(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        published.from_minference(written(tmp_path, value), model())


def duo(folder: Path, gates: Any = ((0.9, 0.1), (0.5, 0.5)), sizes: Any = None) -> Path:
    text = gates if isinstance(gates, str) else "\n".join("\t".join(f"{g:.18e}" for g in row) for row in gates)
    written(folder, text, published.GATES)
    written(folder, {"sink_size": 4, "recent_size": 32} if sizes is None else sizes, published.SIZES)
    return folder


@pytest.mark.parametrize(
    "options, dense",
    [
        ({}, [[1, 1, 0, 0], [0, 0, 1, 1]]),
        ({"sparsity": 0.25}, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ({"sparsity": 1.0}, [[0] * 4] * 2),
        ({"threshold": 0.5}, [[1, 1, 0, 0], [1, 1, 1, 1]]),
        ({"threshold": 0.95}, [[0] * 4] * 2),
    ],
    ids=["half", "quarter", "all", "threshold", "high"],
)
def test_duo_attention(options: dict, dense: list, tmp_path: Path) -> None:
    for path in (duo(tmp_path), tmp_path / published.GATES):
        found = published.read_published(path, model(), **options)
        assert [[int(m.name == "dense") for m in row] for row in chosen(found)] == dense
        assert GET("sliding_window")(sink=4, window=32) in found.methods
        decoding = GET("duo")(**published.duo_attention_heads(path, model(), **options))
        heads = [[int(head // 2 in whole) for head in range(4)] for whole in decoding.retrieval]
        assert (heads, decoding.sink, decoding.recent) == (dense, 4, 32)


@pytest.mark.parametrize(
    "given, options, message",
    [
        (dict(gates=((0.1, 0.2),)), {}, r"2 rows of 2 key/value heads, got 1 rows of \[2\]"),
        (dict(gates=((0.1,) * 4,) * 2), {}, r"got 2 rows of \[4\]"),
        (dict(gates="1 a\n0 0"), {}, "must hold numbers"),
        (dict(gates="1 nan\n0 0"), {}, "gates from 0 to 1"),
        (dict(sizes=[]), {}, "`sink_size` and `recent_size`"),
        (dict(sizes={"sink_size": 1}), {}, "`sink_size` and `recent_size`"),
        (dict(sizes={"sink_size": -1, "recent_size": 5}), {}, "`sink` must be at least 0"),
        ({}, dict(threshold=0.5, sparsity=0.5), "`threshold` must be None when `sparsity` is given"),
        ({}, dict(sparsity=1.5), "`sparsity` must be more than 0 and at most 1"),
    ],
)
def test_duo_attention_refuses(given: dict, options: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        published.from_duo_attention(duo(tmp_path, **given), model(), **options)


def search(steps: int = 4, layers: int = 2, heads: int = 4) -> dict[str, list[int]]:
    """The first step full, then one window, then another for the last head of all."""
    windows = {}
    for t in range(steps):
        for layer in range(layers):
            for head in range(heads):
                last = t == steps - 1 and layer == layers - 1 and head == heads - 1
                windows[f"{t}_{layer}_{head}"] = [3, 6, 10] if t == 0 else [1, 5, 7] if last else [3, 3, 3]
    return windows


@pytest.mark.usefixtures("tiles")
def test_sliding_tile(tmp_path: Path) -> None:
    path = written(tmp_path, search())
    found = published.read_published(path, model(), tile=(2, 4, 4), full=(3, 6, 10))
    assert [p.steps for p in found.plans] == [(0.0, 0.25), (0.25, 0.75), (0.75, 1.0)]
    assert not found.plans[0].choice.any()
    windows = [[m.params()["window"] for m in row] for row in chosen(found, 2)]
    assert windows[1] == [(3, 3, 3)] * 3 + [(1, 5, 7)]
    assert found.methods[1].params()["tile"] == (2, 4, 4)
    assert found.calibration["steps"] == 4
    assert found.figures["density"][0].tolist() == [[1.0] * 4] * 2
    assert len(published.from_sliding_tile(path, model()).methods) == 4
    found.save_pretrained(tmp_path / "saved")
    assert HeadProfile.from_pretrained(tmp_path / "saved").methods == found.methods


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize(
    "change, message",
    [
        ({"0_0_0": None}, "got 31 for 4 steps"),
        ({"9_0_0": [3, 3, 3]}, "got 33 for 10 steps"),
        ({"0_0_0": None, "0_7_0": [3, 3, 3]}, "a window for step 0 layer 0 head 0, got none"),
        ({"00_0_0": [3, 3, 3]}, "got 33 for 4 steps"),
        ({"0_0_0": [3, 3]}, r"step 0 layer 0 head 0 must be three numbers of tiles, got \[3, 3\]"),
        ({"0_0_0": [3, -3, 3]}, "three numbers of tiles"),
        ({"0_0_0": [3, 10**9, 3]}, "three numbers of tiles"),
        ({"0_0_0": "3,3,3"}, "three numbers of tiles"),
        ({"a": 1}, "must be an object of 'step_layer_head'"),
    ],
)
def test_sliding_tile_refuses(change: dict, message: str, tmp_path: Path) -> None:
    value = {k: v for k, v in {**search(), **change}.items() if v is not None}
    with pytest.raises(ValueError, match=message):
        published.from_sliding_tile(written(tmp_path, value), model())


@pytest.mark.parametrize(
    "text", ["{}", "3", "{", "[" * 100_000, '{"a": 1}'], ids=["empty", "3", "cut", "deep", "other"]
)
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`path` must be"):
        published.read_published(written(tmp_path, text), model())


def test_files_that_are_not_there_or_too_large(tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(FileNotFoundError, match="`path` must be a file that is there"):
        published.read_published(tmp_path / "nothing", model())
    with pytest.raises(FileNotFoundError, match=published.GATES):
        published.read_published(tmp_path, model())
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="must be a text file"):
        published.read_published(tmp_path / "bytes", model())
    monkeypatch.setattr(published, "_LARGEST_FILE", 3)
    with pytest.raises(ValueError, match="at most 3 bytes"):
        published.read_published(written(tmp_path, MINFERENCE), model())
