"""Padded tokens cut away: which masks say no more than that, and what is left of a batch."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from hf_sparse_attn import TokenLayout
from hf_sparse_attn.hosts import padding
from hf_sparse_attn.hosts.padding import Trim, key_padding, trim
from hf_sparse_attn.method import Decline

N = 13
VALID = torch.arange(N) < torch.tensor([[9], [13]])


# What the padding itself sees is of no account, as long as it is nothing that the others do not see.
PAIRS = VALID[:, None, :, None] & VALID[:, None, None]
FIRST = PAIRS | (torch.arange(N) == 0)


def additive(kept: torch.Tensor, hidden: float = -torch.inf, shift: float = 0.0) -> torch.Tensor:
    return torch.where(kept, shift, hidden)


MASKS = {
    "bool": VALID[:, None, None],
    "whole numbers": VALID[:, None, None].long(),
    "bytes": PAIRS.to(torch.uint8),
    "two dimensions": VALID,
    "repeated over heads": VALID[:, None, None].expand(2, 4, 1, N).contiguous(),
    "-inf": additive(VALID)[:, None, None],
    "-10000": additive(VALID, -10000.0).half()[:, None, None],
    "least": additive(VALID, torch.finfo(torch.bfloat16).min).bfloat16()[:, None, None],
    "a constant besides": additive(VALID, -10000.0, 1.5)[:, None, None],
    "expanded": VALID[:, None, None].expand(2, 4, N, N),
    "each query": VALID[:, None, None].expand(2, 1, N, N).contiguous(),
    "each query, -inf": additive(VALID)[:, None, None].expand(2, 1, N, N).contiguous(),
    "valid x valid": PAIRS,
    "valid x valid of heads": PAIRS.repeat(1, 4, 1, 1),
    "valid x valid, -inf": additive(PAIRS),
    "valid x valid, -10000": additive(PAIRS, -10000.0),
    "valid x valid, least": additive(PAIRS, torch.finfo(torch.float16).min).half(),
    "padding sees the first": FIRST,
    "padding sees the first, -inf": additive(FIRST),
    "a constant of each query": additive(PAIRS) + torch.arange(N)[:, None],
}


@pytest.mark.parametrize("pieces", [1 << 24, 3 * N], ids=["in one", "in pieces"])
@pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))
def test_masks_that_only_hide_keys(mask: torch.Tensor, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_PIECE", pieces)
    found = key_padding(mask, 2, N)
    assert isinstance(found, torch.Tensor) and torch.equal(found, VALID)


@pytest.mark.parametrize("sizes", [(2, N), (2, 1, 1, N), (2, 1, N, N), (2, 4, N, N), (1, 1, N, N), (N, N), (1, N, N)])
@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        (True, torch.bool),
        (1, torch.int64),
        (1, torch.int32),
        (1.0, torch.float32),
        (0.0, torch.float32),
        (1.0, torch.bfloat16),
        (-7.5, torch.float16),
        (-10000.0, torch.float32),
    ],
)
def test_one_value_hides_nothing(sizes: tuple[int, ...], value: float, dtype: torch.dtype) -> None:
    """An additive one adds the same to all logits, which softmax does not see."""
    found = key_padding(torch.full(sizes, value, dtype=dtype), 2, N)
    assert isinstance(found, torch.Tensor) and found.shape == (2, N) and bool(found.all())


GROUPS = {
    "padding sees itself": torch.tensor([[0] * 9 + [9] * 4, [0] * 13]),
    "two sequences": torch.tensor([[0] * 5 + [5] * 8]).expand(2, -1),
    "turn by turn, and padding": torch.tensor([[0, 1, -1] * 4 + [0], [0, 1] * 6 + [-1]]),
}


@pytest.mark.parametrize("pieces", [1 << 24, 3 * N], ids=["in one", "in pieces"])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("case", GROUPS)
def test_tokens_in_groups(case: str, heads: int, pieces: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each group is a sequence by itself; what nobody sees may see anything of one group."""
    monkeypatch.setattr(padding, "_PIECE", pieces)
    groups = GROUPS[case]
    mask = (groups[:, None, :, None] == groups[:, None, None]) & (groups >= 0)[:, None, None]
    mask = mask.repeat(1, heads, 1, 1)
    for given in (mask, additive(mask)):
        found = key_padding(given, 2, N)
        assert isinstance(found, torch.Tensor) and torch.equal(found, groups)
    for layout in (TokenLayout.bidirectional(N), TokenLayout.video(1, 2, 2, text_after=9)):
        cut = trim(groups, layout)
        if layout.video_part is not None and case == "turn by turn, and padding":
            assert isinstance(cut, Decline) and "hides a part of the video" in cut.reason
            continue
        assert isinstance(cut, Trim)
        q, k, v = torch.randn(3, 2, 3, N, 8, dtype=torch.float64)
        want = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        want = want.masked_fill((groups < 0)[:, None, :, None], 0.0)
        got = cut.back(cut.dense(*map(cut.front, (q, k, v)), F.scaled_dot_product_attention))
        assert (got - want).abs().max() <= 8 * torch.finfo(torch.float64).eps * want.abs().max()
        assert all(span.layout is not None and span.layout.kv_len == span.q[1] - span.q[0] for span in cut.spans)


def test_many_groups_are_declined() -> None:
    found = trim(torch.arange(N)[None], TokenLayout.bidirectional(N))
    assert isinstance(found, Decline) and "13 separate sequences" in found.reason


def test_one_row_for_the_batch() -> None:
    for mask, batch in ((VALID[:1, None, None], 3), (VALID[:1], 1), (VALID[:1], 3), (PAIRS[:1], 3), (PAIRS[0, 0], 3)):
        found = key_padding(mask, batch, N)
        assert isinstance(found, torch.Tensor) and torch.equal(found, VALID[:1].expand(batch, N))


def test_a_row_of_the_batch_may_be_constant_or_hidden() -> None:
    mask = additive(torch.stack([PAIRS[0], torch.zeros_like(PAIRS[0]), torch.ones_like(PAIRS[0])]))
    found = key_padding(mask, 3, N)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, torch.stack([VALID[0], torch.zeros_like(VALID[0]), torch.ones_like(VALID[0])]))


APART = torch.block_diag(torch.ones(5, 5), torch.ones(8, 8)).bool()[None, None]
TWO = (torch.arange(N) == 4) & (torch.arange(N) >= 4)[:, None]
BY_QUERY, BIAS, OTHER = "differs from query to query", "a bias on its logits", "which is none of 2 rows of 13 tokens"
NEITHER = {
    "causal": (torch.ones(1, 1, N, N, dtype=torch.bool).tril(), BY_QUERY),
    "causal, -inf": (torch.ones(1, 1, N, N).tril().log(), BY_QUERY),
    "a token of two sequences": (
        torch.block_diag(torch.ones(5, 5), torch.ones(8, 8)).bool()[None, None] | TWO,
        BY_QUERY,
    ),
    "an image sees a text that does not see it": (VALID[:1, None, None] | ~VALID[:1, None, :, None], BY_QUERY),
    "by head": (torch.stack([VALID, ~VALID], 1)[:, :, None], BY_QUERY),
    "a query that others see sees nothing": (
        PAIRS.repeat(1, 2, 1, 1).index_fill(2, torch.tensor([3]), False),
        BY_QUERY,
    ),
    "other length": (torch.ones(1, 1, 1, N + 1, dtype=torch.bool), OTHER),
    "other batch": (torch.ones(3, 1, 1, N, dtype=torch.bool), OTHER),
    "rows of a cache": (torch.ones(2, 1, 5, N, dtype=torch.bool), OTHER),
    "bias": (torch.where(VALID, 0.5, -torch.inf)[:, None, None] + 0.1 * torch.arange(N), BIAS),
    "ones and zeros are added": (PAIRS.float(), BIAS),
    "ones and zeros of keys": (VALID[:, None, None].bfloat16(), BIAS),
    "little weight": (additive(VALID, -20.0)[:, None, None], BIAS),
    "nan": (torch.full((2, 1, N, N), torch.nan), BIAS),
    "inf": (additive(PAIRS, 0.0, torch.inf), BIAS),
    "learnt": (torch.zeros(2, 1, N, N, requires_grad=True), BIAS),
    "whole numbers": (torch.where(VALID, 0, -10000)[:, None, None], "none of zeros and ones"),
}


@pytest.mark.parametrize("case", NEITHER)
def test_masks_that_say_more_are_left_alone(case: str) -> None:
    mask, reason = NEITHER[case]
    found = key_padding(mask, 2, N)
    assert isinstance(found, Decline) and reason in found.reason


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
