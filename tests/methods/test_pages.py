"""What is remembered of the pages of a cache: bounds that hold, rows that grow and are never made anew."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.decoding import Memory, Step
from hf_sparse_attn.pages import PageBounds, PageMeans, PageRows, PageSpreads, bound_weights, grouped, remembered

KINDS = [PageBounds, PageMeans, PageSpreads]


def keys(length: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, 2, length, 16, generator=torch.Generator().manual_seed(0)).to(dtype)


def made(kind: type[PageRows], k: Tensor, first: Tensor | None = None, size: int = 16) -> PageRows:
    rows = kind(size)
    rows.update(k, first)
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [False, True])
def test_no_key_of_a_page_has_a_product_above_its_bound(dtype: torch.dtype, padded: bool) -> None:
    k, first = keys(301, dtype=dtype), torch.tensor([0, 37]) if padded else None
    q = torch.randn(2, 4, 1, 16, dtype=torch.float64)
    step = Step(q.to(dtype), k, k, first, 0, 1, 1.0)
    weights = bound_weights(grouped(step, "head"))
    # Exact: in float64 both are sums of the same products, or of larger ones.
    bounds = remembered(step, PageBounds, 16).rows.double()
    bound = (weights.double().flatten(2, 3) @ bounds.mT).repeat_interleave(16, 3)[..., :301]
    product = grouped(step, "head").double().flatten(2, 3) @ k.double().mT
    real = torch.arange(301) >= (torch.zeros(2, 1) if first is None else first[:, None])
    assert bool((bound - product + 1e-12 >= 0)[real[:, None, None].expand_as(bound)].all())
    # And it is near: some key of every page has that number in some channel.
    assert torch.equal(bounds[0, 0, 0, :16], k[0, 0, :16].amax(0).double())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [None, [0, 37], [16, 300]], ids=str)
def test_rows_that_grew_are_those_of_all_keys_at_once(kind: type[PageRows], first: list[int] | None) -> None:
    starts = None if first is None else torch.tensor(first)
    k, rows = keys(330), kind(16)
    for length in (1, 15, 16, 17, 40, 41, 42, 48, 200, 201, 330):
        rows.update(k[:, :, :length], starts)
        assert torch.equal(rows.rows, made(kind, k[:, :, :length], starts).rows)
    for length in (329, 320, 319, 33, 0):
        rows.crop(length)
        # Other tokens come after what is left.
        k = torch.cat([k[:, :, :length], keys(400)[:, :, length:].flip(2)], 2)
        rows.update(k[:, :, : length + 3], starts)
        assert torch.equal(rows.rows, made(kind, k[:, :, : length + 3], starts).rows)
        rows.update(k, starts)
    # Beams that change places have no other length and no other number.
    for order in ([1, 0], [1, 1, 0]):
        rows.select(torch.tensor(order))
        k, starts = k[order], None if starts is None else starts[order]
        rows.update(k, starts)
        assert torch.equal(rows.rows, made(kind, k, starts).rows)


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_of_padding_alone_and_what_stands_in_it_count_for_nothing(kind: type[PageRows]) -> None:
    k, first = keys(100), torch.tensor([40, 0])
    other = k.clone()
    other[0, :, :40] = torch.inf
    rows = made(kind, other, first).rows
    assert torch.equal(rows, made(kind, k, first).rows)
    assert bool((rows[0, :, :2] == 0).all()) and bool(rows.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_makes_no_room_and_reads_its_own_page_alone(kind: type[PageRows]) -> None:
    k, rows = keys(2000), kind(16)
    rooms = set()
    for length in range(1000, 1500):
        rows.update(k[:, :, :length], None)
        rooms.add(rows._rows.data_ptr())
        # Keys before the page are not read again.
        k[:, :, : length // 16 * 16] = torch.nan
    assert len(rooms) <= 2 and bool(rows.rows.isfinite().all())


@pytest.mark.parametrize("kind", KINDS)
def test_keys_of_other_sizes_or_padding_are_read_anew(kind: type[PageRows]) -> None:
    rows = made(kind, keys(100))
    for k, first in ((keys(120, batch=3), None), (keys(130), torch.tensor([3, 0])), (keys(140), torch.tensor([3, 5]))):
        rows.update(k, first)
        assert torch.equal(rows.rows, made(kind, k, first).rows)


def test_what_is_remembered_goes_with_the_memory() -> None:
    memory, k = Memory(), keys(100)
    step = Step(k[:, :, -1:], k, k, None, 0, 1, 1.0, memory)
    rows = remembered(step, PageBounds, 16)
    assert remembered(step, PageBounds, 16) is rows
    assert remembered(step, PageBounds, 8) is not rows and remembered(step, PageMeans, 16) is not rows
    memory.crop(50)
    assert rows.length == 48
    memory.clear()
    assert remembered(step, PageBounds, 16) is not rows
