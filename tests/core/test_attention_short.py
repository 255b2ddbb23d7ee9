"""`hsa.attention` with the short ways to say what the tokens are: `is_causal=` and `grid=`."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Segment, TokenLayout
from tests.support import tiny_lm

GRID = (3, 4, 5)


def qkv(n: int = 60, heads: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, heads, n, 16)
    return q, k[:, :2], v[:, :2]


def in_full(layout: TokenLayout) -> Context:
    return Context(layout, num_heads=4, num_kv_heads=2, head_dim=16)


VIDEO = Segment("video", 60, GRID)


@pytest.mark.parametrize(
    ("method", "short", "layout"),
    [
        ("sliding_window", {}, TokenLayout.causal(60)),
        ("sliding_window", {"is_causal": True}, TokenLayout.causal(60)),
        ("sliding_window", {"is_causal": False}, TokenLayout.bidirectional(60)),
        ("radial", {"grid": GRID}, TokenLayout.video(*GRID)),
        ("svg", {"grid": list(GRID), "is_causal": False}, TokenLayout.video(*GRID)),
        ("sliding_window", {"grid": GRID, "is_causal": True}, TokenLayout.segments([VIDEO], causal=True)),
    ],
    ids=str,
)
def test_the_short_way_is_the_context(method: str, short: dict[str, Any], layout: TokenLayout) -> None:
    made = hsa.get_method(method)(**hsa.get_method(method).examples()[0])
    q, k, v = qkv()
    out, lse = hsa.attention(q, k, v, made, return_lse=True, **short)
    want = hsa.attention(q, k, v, made, in_full(layout), return_lse=True)
    assert torch.equal(out, want[0]) and torch.equal(lse, want[1])


def test_causal_and_not_are_those_of_torch() -> None:
    q, k, v = qkv(111)
    for causal in (True, False):
        want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(hsa.attention(q, k, v, "dense", is_causal=causal), want)
    # The last queries of a text that began in a cache.
    torch.testing.assert_close(hsa.attention(q[:, :, 90:], k, v, "dense", is_causal=False), want[:, :, 90:])


BOTH = "`is_causal` and `grid` must be left out beside a `ctx`, which says it"


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("dense", {"ctx": in_full(TokenLayout.causal(60)), "is_causal": True, "grid": GRID}, BOTH),
        ("dense", {"ctx": in_full(TokenLayout.causal(60)), "is_causal": False}, "`is_causal` must be left out beside"),
        (BlockPattern.dense(60, 60, True), {"is_causal": True}, "`is_causal` must be left out beside a pattern"),
        ("dense", {"grid": (3, 4)}, "`grid` must be (frames, height, width), got (3, 4)"),
        ("dense", {"grid": 60}, "`grid` must be (frames, height, width), got 60"),
        ("dense", {"grid": (3, 4, 0)}, "`grid[2]` must be at least 1, got 0"),
        ("dense", {"grid": (3, 4, 6)}, "got (3, 4, 6) = 72 for 60 queries and 60 keys; with text beside the video"),
        ("dense", {"is_causal": 1}, "`is_causal` must be a bool, got 1 of type int"),
        ("radial", {"is_causal": False}, "radial needs exactly one video segment"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_refused(method: Any, given: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        hsa.attention(*qkv(), method, **given)


def test_parameters_of_a_method_given_by_name() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, 100, 16)
    made = hsa.get_method("sliding_window")(window=20, sink=2, block_size=16)
    got = hsa.attention(q, k, v, "sliding_window", window=20, sink=2, block_size=16)
    assert torch.equal(got, hsa.attention(q, k, v, made))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`dense_layers` must be a number of layers or a list"):
        hsa.patch(tiny_lm.FAMILIES["llama"](), "sliding_window", dense_layers=0.5)
    with pytest.raises(TypeError, match="got windoww"):
        hsa.attention(q, k, v, "sliding_window", windoww=20)
    with pytest.raises(TypeError, match="`params` must be empty"):
        hsa.attention(q, k, v, hsa.BlockPattern.dense(100, 100, causal=True, block=16), window=20)
