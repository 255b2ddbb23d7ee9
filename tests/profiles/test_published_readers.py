"""What the published loaders of others accept, ours accept, and with the same result."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.published import (
    GATES,
    SIZES,
    from_duo_attention,
    from_minference,
    from_sliding_tile,
    read_published,
)

GET = hsa.get_method
VERTICAL, REST = GET("vertical_slash")(vertical=30, slash=800), GET("vertical_slash")(vertical=1000, slash=6096)


@lru_cache
def model(layers: int = 2, heads: int = 8, kv_heads: int = 4) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads)
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(hidden_size=32, intermediate_size=8, vocab_size=16, **sizes))


def duo(folder: Path, text: str | bytes) -> Path:
    (folder / GATES).write_bytes(text if isinstance(text, bytes) else text.encode())
    (folder / SIZES).write_text(json.dumps({"sink_size": 128, "recent_size": 256, "deploy_sink_size": None}))
    return folder


def dense(profile: HeadProfile) -> list[list[int]]:
    return [[int(profile.methods[i].name == "dense") for i in row] for row in profile.plans[0].choice]


# The first numbers of a published file.
PUBLISHED = (
    "0.859375\t0.65234375\t1.0\t0.33984375\n"
    "-2.229213714599609375e-05\t-2.241134643554687500e-04\t-1.325607299804687500e-04\t1.0\n"
)


def test_gates_outside_their_range_are_clipped(tmp_path: Path) -> None:
    """A head just below 0 is as one at 0, not before it: of equal ones the first streams."""
    found = read_published(duo(tmp_path, PUBLISHED), model())
    assert dense(found) == [[1, 1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 0, 1, 1]]
    assert dense(from_duo_attention(tmp_path, model(), sparsity=0.1)) == [[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]
    assert dense(from_duo_attention(tmp_path, model(), threshold=0.0)) == [[1] * 8] * 2
    above = duo(tmp_path, "1.5\tinf\t0.2\t-inf\n0\t0\t0\t1\n")
    assert dense(from_duo_attention(above, model(), threshold=1.0)) == [[1, 1, 1, 1, 0, 0, 0, 0], [0] * 6 + [1, 1]]


@pytest.mark.parametrize(
    "text",
    [
        PUBLISHED.replace("\n", "\r\n").encode(),
        "# layers x heads\n" + PUBLISHED.replace("\n", "  # of one layer\n\n"),
        PUBLISHED.rstrip("\n"),
        PUBLISHED.replace("\t", " "),
        PUBLISHED.replace("\t", " \t "),
    ],
    ids=["crlf", "comments", "no last newline", "blanks", "tabs and blanks"],
)
def test_gates_written_in_other_ways(text: Any, tmp_path: Path) -> None:
    expected = dense(from_duo_attention(duo(tmp_path, PUBLISHED), model()))
    assert dense(from_duo_attention(duo(tmp_path, text), model())) == expected


@pytest.mark.parametrize("text", ["", "# nothing\n", "0.1\t\t0.2\t0.3\n" * 2, "1\t0\t0\t1\n1\t0\t0\n"], ids=str)
def test_files_that_are_no_table_of_gates_are_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`path` must (have 2 rows of 4|hold numbers)"):
        from_duo_attention(duo(tmp_path, text), model())


def test_one_layer_and_one_key_value_head(tmp_path: Path) -> None:
    assert dense(from_duo_attention(duo(tmp_path, "0.2\t-1\n"), model(1, 4, 2))) == [[1, 1, 0, 0]]
    assert dense(from_duo_attention(duo(tmp_path, "0.2\n0.9\n"), model(2, 4, 1))) == [[0] * 4, [1] * 4]


@pytest.mark.parametrize("kv_heads", [4, 8])
def test_a_share_is_a_quantile_as_in_the_code_of_duo_attention(kv_heads: int, tmp_path: Path) -> None:
    gates = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 2 * kv_heads)).reshape(2, -1)
    folder = duo(tmp_path, "\n".join("\t".join(map(repr, row.tolist())) for row in gates))
    for share in (0.01, 0.05, 0.1, 0.25, 0.3, 1 / 3, 0.5, 0.6, 0.7, 0.75, 0.9, 0.99):
        expected = (gates >= np.quantile(gates, share)).astype(int)
        found = from_duo_attention(folder, model(2, 8, kv_heads), sparsity=share)
        assert dense(found) == np.repeat(expected, 8 // kv_heads, 1).tolist(), share
    assert dense(from_duo_attention(folder, model(2, 8, kv_heads), sparsity=1)) == [[0] * 8] * 2


def minference(folder: Path, value: Any) -> Path:
    (folder / "best_pattern.json").write_text(value if isinstance(value, str) else json.dumps(value))
    return folder / "best_pattern.json"


def chosen(profile: HeadProfile) -> list[list[Any]]:
    return [[profile.methods[i] for i in row] for row in profile.plans[0].choice]


def test_scores_of_any_unit_and_numbers_of_heads_in_any_writing(tmp_path: Path) -> None:
    layer = (
        '{"00": ["vertical_and_slash", 30, 800, 6617078], " 1": ["vertical_and_slash", 30, 800, NaN],'
        ' "2": ["vertical_and_slash", 30, 800, null], "3": ["vertical_and_slash", 30, 800],'
        ' "4": ["block_sparse", 8, 1, 0.5], "4": ["vertical_and_slash", 30, 800, 0.5]}'
    )
    found = from_minference(minference(tmp_path, f"[{layer}, {{}}]"), model())
    assert chosen(found) == [[VERTICAL] * 5 + [REST] * 3, [REST] * 8]


def test_a_partial_file_is_read_when_asked(tmp_path: Path) -> None:
    """As the file published for Qwen3-0.6B, of 3 layers and 28 heads for a model of 28 layers and 16 heads."""
    own = {str(h): ["vertical_and_slash", 30, 800, 0.9] for h in range(14)}
    short, long = minference(tmp_path, [own]), [own, own, own]
    with pytest.raises(ValueError, match=r"list over 2 layers, got a list of 1 .*`partial=True`"):
        from_minference(short, model())
    assert chosen(from_minference(short, model(), partial=True)) == [[VERTICAL] * 8, [REST] * 8]
    assert chosen(read_published(minference(tmp_path, long), model(), partial=True)) == [[VERTICAL] * 8] * 2
    with pytest.raises(ValueError, match=r"heads from 0 to 7, got '8' .*`partial=True`"):
        from_minference(minference(tmp_path, [own, own]), model())


@pytest.mark.parametrize(
    "value, message",
    [
        (
            [{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 0.0]}, {}],
            "share of the att.*flexprefill",
        ),
        ([{"x": ["vertical_and_slash", 30, 800, 1]}, {}], "layer 0 must have numbers of heads, got 'x'"),
        ([{"1.0": ["vertical_and_slash", 30, 800, 1]}, {}], "numbers of heads, got '1.0'"),
        ([{"1": ["vertical_and_slash", 30.5, 800, 1]}, {}], "layer 0 head 1 must be .*`vertical` must be an int"),
        ([{"1": [["stream_llm", 100, 800, 1], ["block_sparse", 8, 1, 2]]}, {}], r"\[kind, vertical, slash, score\]"),
        ([["vertical_and_slash"], {}], "layer 0 must be an object of heads"),
    ],
)
@pytest.mark.parametrize("partial", [False, True])
def test_what_no_reader_takes_is_refused_with_its_reason(
    value: Any, message: str, partial: bool, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        from_minference(minference(tmp_path, value), model(), partial=partial)


def test_windows_whose_numbers_have_zeros_before_them(tmp_path: Path) -> None:
    windows = {f"{t:02d}_{layer:02d}_{h:02d}": [3, 3, 3] for t in range(2) for layer in range(2) for h in range(8)}
    path = tmp_path / "mask_strategy.json"
    path.write_text(json.dumps(windows))
    found = from_sliding_tile(path, model())
    assert [p.steps for p in found.plans] == [(0.0, 1.0)]
    assert [m.name for m in found.methods] == ["dense", "sliding_tile"]
