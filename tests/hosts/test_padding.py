"""Padded tokens cut away: which masks say no more than that, and what is left of a batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hf_sparse_attn import TokenLayout
from hf_sparse_attn.hosts.padding import Trim, key_padding, trim
from hf_sparse_attn.method import Decline

N = 13
VALID = torch.arange(N) < torch.tensor([[9], [13]])


@pytest.mark.parametrize(
    "mask",
    [
        VALID[:, None, None],
        VALID[:, None, None].expand(2, 4, 1, N).contiguous(),
        torch.where(VALID, 0.0, -torch.inf)[:, None, None],
        torch.where(VALID, 0.0, -10000.0).half()[:, None, None],
        torch.where(VALID, 0.0, torch.finfo(torch.bfloat16).min).bfloat16()[:, None, None],
        VALID[:, None, None].expand(2, 4, N, N),
        VALID[:, None, None].expand(2, 1, N, N).contiguous(),
        torch.where(VALID, 0.0, -torch.inf)[:, None, None].expand(2, 1, N, N).contiguous(),
    ],
    ids=["bool", "repeated over heads", "-inf", "-10000", "least", "expanded", "each query", "each query, -inf"],
)
def test_masks_that_only_hide_keys(mask: torch.Tensor) -> None:
    found = key_padding(mask, 2, N)
    assert found is not None and torch.equal(found, VALID)


def test_one_row_for_the_batch() -> None:
    assert torch.equal(key_padding(VALID[:1, None, None], 3, N), VALID[:1].expand(3, N))
    assert torch.equal(key_padding(VALID[:1], 1, N), VALID[:1])


@pytest.mark.parametrize(
    "mask",
    [
        torch.ones(1, 1, N, N, dtype=torch.bool).tril(),
        torch.ones(1, 1, N, N).tril().log(),
        torch.ones(2, N, dtype=torch.bool),
        torch.ones(1, 1, 1, N + 1, dtype=torch.bool),
        torch.ones(3, 1, 1, N, dtype=torch.bool),
        torch.stack([VALID, ~VALID], 1)[:, :, None],
        torch.where(VALID, 0.5, -torch.inf)[:, None, None],
        torch.where(VALID, 0, -10000)[:, None, None],
    ],
    ids=[
        "by query",
        "by query, -inf",
        "two rows of 2-D",
        "other length",
        "other batch",
        "by head",
        "bias",
        "integers",
    ],
)
def test_masks_that_say_more_are_left_alone(mask: torch.Tensor) -> None:
    assert key_padding(mask, 2, N) is None


LAYOUTS = {
    "after": (TokenLayout.video(1, 2, 3, text_after=7), [range(9), range(13), range(9), range(7)]),
    "before": (TokenLayout.video(1, 2, 3, text_before=7), [(*range(4), *range(7, 13)), range(13), range(2, 13)]),
    "at the start": (TokenLayout.video(1, 2, 3, text_before=7), [range(5, 13), range(6, 13), range(5, 13)]),
    "no grid": (TokenLayout.bidirectional(13), [(0, 2, 4, 9), range(13), (12,), ()]),
    "whole": (TokenLayout.video(1, 2, 3, text_after=7), [range(13), range(13)]),
}


@pytest.mark.parametrize("case", LAYOUTS)
def test_what_is_left_of_each_row(case: str) -> None:
    """Dense attention of what is left is that of the mask; what a mask hides is not read at all."""
    layout, kept = LAYOUTS[case]
    valid = torch.zeros(len(kept), N, dtype=torch.bool)
    for row, tokens in enumerate(kept):
        valid[row, list(tokens)] = True
    found = trim(valid, layout)
    assert isinstance(found, Trim)
    rows = sorted(r for span in found.spans for r in span.rows)
    assert rows == [r for r, tokens in enumerate(kept) if tokens]
    for span in found.spans:
        assert span.layout is not None and span.q == span.k
        assert {span.q[1] - span.q[0], span.layout.kv_len} == {len(kept[r]) for r in span.rows}
        assert [p for p in span.layout.parts if p.kind == "video"] == [p for p in layout.parts if p.kind == "video"]
    straight = all(b - a == 1 for tokens in kept for a, b in pairwise(tokens))
    assert (found.order is None) is straight
    q, k, v = torch.randn(3, len(kept), 2, N, 8, dtype=torch.float64)
    mask = (valid[:, None, :, None] & valid[:, None, None, :]).expand(-1, 2, -1, -1)
    want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    want = want.masked_fill(~valid[:, None, :, None], 0.0)
    poison = [t.masked_fill(~valid[:, None, :, None], torch.nan) for t in (q, k, v)]
    got = found.back(found.dense(*map(found.front, poison), F.scaled_dot_product_attention))
    assert (got - want).abs().max() <= 8 * torch.finfo(torch.float64).eps * want.abs().max()


def test_rows_of_equal_length_are_one_span() -> None:
    layout = TokenLayout.video(1, 2, 3, text_after=7)
    valid = torch.arange(N) < torch.tensor([9, 13, 9, 9])[:, None]
    found = trim(valid, layout)
    assert isinstance(found, Trim)
    assert sorted((span.rows, span.q) for span in found.spans) == [((0, 2, 3), (0, 9)), ((1,), (0, 13))]


def test_a_hidden_part_of_the_video_is_declined() -> None:
    found = trim(torch.arange(N)[None] < 4, TokenLayout.video(1, 2, 3, text_after=7))
    assert isinstance(found, Decline) and "hides a part of the video" in found.reason
