"""Attention of few queries to a cache, by every backend that needs no pattern for it, against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.backend import Decoder
from hf_sparse_attn.decoding import Kept
from hf_sparse_attn.dispatch import run_exact, run_kept, run_pattern
from hf_sparse_attn.kernels import cpp_block_sparse_build as build
from hf_sparse_attn.kernels import cpp_decode
from hf_sparse_attn.kernels.cpp_decode import CppDecode
from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from tests.support.backends import check
from tests.support.patterns import FEATURES, random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("poisoned_memory")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
NAMES = ["cpp_decode", "torch_folded"]
# Heads, heads of keys, keys, queries, dim, dim of values; groups of every width that is compiled, and beyond.
SIZES: dict[str, tuple[int, ...]] = {
    "one_key": (1, 1, 1, 1, 40, 40),
    "group_of_3": (9, 3, 777, 1, 64, 64),
    "group_of_4_in_pieces": (8, 2, 5000, 1, 128, 128),
    "group_of_7_odd_dims": (7, 1, 300, 1, 81, 33),
    "narrow_values": (4, 2, 200, 1, 192, 128),
    "no_group": (3, 3, 130, 1, 256, 256),
    "five_queries": (4, 2, 65, 5, 64, 64),
    "sixteen_queries": (12, 2, 100, 16, 32, 64),
    "as_many_queries_as_keys": (2, 1, 4, 4, 16, 16),
    "group_of_18": (18, 1, 90, 1, 64, 32),
}


def decoder(name: str, dtype: torch.dtype) -> type[Decoder]:
    found: Any = BACKENDS.get(name)
    x = torch.zeros(1, 1, 1, 16, dtype=dtype)
    if reason := found.why_not_decode(x, x, x, None):
        pytest.skip(reason)
    return found  # type: ignore[no-any-return]


def inputs(size: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> list[Tensor]:
    heads, kv_heads, kv_len, q_len, dim, value_dim = SIZES[size]
    draw = torch.Generator().manual_seed(5)
    shapes = ((heads, q_len, dim), (kv_heads, kv_len, dim), (kv_heads, kv_len, value_dim))
    return [torch.randn(batch, *shape, generator=draw).to(dtype) for shape in shapes]


def whole(q: Tensor, k: Tensor) -> BlockPattern:
    return BlockPattern.dense(q.shape[2], k.shape[2], causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_every_key(name: str, size: str, dtype: torch.dtype) -> None:
    q, k, v = inputs(size, dtype)
    out, lse = decoder(name, dtype).decode(q, k, v, None, 0.3, 0.0, None)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert out.transpose(1, 2).is_contiguous()
    check(q, k, v, whole(q, k), out, lse)


def pages_of(q: Tensor, k: Tensor, lists: int, size: int, share: float = 0.5) -> Kept:
    """Different pages for every list in an order of chance, the last page among some, holes between."""
    total = -(-k.shape[2] // size)
    draw = torch.Generator().manual_seed(lists)
    pages = torch.stack([torch.randperm(total, generator=draw) for _ in range(q.shape[0] * lists)])
    pages = pages[:, : max(2, int(total * share))].view(q.shape[0], lists, -1)
    pages[:, :, 1::3] = -1
    return Kept(pages.to(torch.int32), size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lists", ["all_heads", "heads_of_keys", "every_head"])
@pytest.mark.parametrize("page", [1, 16, 48])
@pytest.mark.parametrize("name", NAMES)
def test_pages(name: str, page: int, lists: str, dtype: torch.dtype) -> None:
    q, k, v = inputs("group_of_3", dtype)
    kept = pages_of(q, k, {"all_heads": 1, "heads_of_keys": 3, "every_head": 9}[lists], page)
    for first in (None, torch.tensor([0, 402])):
        found = decoder(name, dtype).decode(q, k, v, kept, 0.3, 0.0, first)
        check(q, k, v, kept.pattern(777, 9, first), *found)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_what_is_not_read_may_be_anything(name: str, dtype: torch.dtype) -> None:
    """Padding, the pages that are not listed, and what a buffer holds beyond its length."""
    q, k, v = inputs("group_of_3", dtype)
    kept, first = pages_of(q, k, 1, 16), torch.tensor([700, 130])
    clean = []
    for pages in (None, kept):
        found = decoder(name, dtype).decode(q, k, v, pages, 0.3, 0.0, first)
        clean.append(found)
        pattern = (
            kept.pattern(777, 9, first)
            if pages
            else whole(q, k).with_kv_range(torch.stack([first, torch.full((2,), 777)], 1))
        )
        nobody = ~pattern.to_dense().any(2).expand(2, 9, -1)[:, :1, :, None]
        buffers = [torch.full((2, 3, 900, 64), torch.nan, dtype=dtype) for _ in range(2)]
        for buffer, x in zip(buffers, (k, v), strict=True):
            buffer[:, :, :777] = x.masked_fill(nobody, torch.nan)
        views = [buffer[:, :, :777] for buffer in buffers]
        for a, b in zip(found, decoder(name, dtype).decode(q, *views, pages, 0.3, 0.0, first), strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(clean[0][0], clean[1][0])


@pytest.mark.parametrize("name", NAMES)
def test_rows_without_a_key(name: str) -> None:
    q, k, v = inputs("group_of_3")
    none = Kept(torch.full((2, 1, 4), -1, dtype=torch.int32), 16)
    for pages, first in ((none, None), (None, torch.tensor([777, 777]))):
        out, lse = decoder(name, q.dtype).decode(q, k, v, pages, 0.3, 0.0, first)
        assert not out.any() and bool((lse == -torch.inf).all())


@pytest.mark.parametrize("name", NAMES)
def test_a_soft_cap(name: str) -> None:
    q, k, v = (x * 2 for x in inputs("five_queries"))
    want, want_lse = TorchReference.attention(q.double(), k.double(), v.double(), whole(q, k), 0.3, 5.0)
    out, lse = decoder(name, q.dtype).decode(q, k, v, None, 0.3, 5.0, None)
    assert float((out - want).abs().max()) < 1e-5 and float((lse - want_lse).abs().max()) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_not_a_number_stays_one(name: str) -> None:
    q, k, v = inputs("group_of_3")
    q[1, 4, 0, 3] = torch.nan
    out, _ = decoder(name, q.dtype).decode(q, k, v, None, 0.3, 0.0, None)
    assert out[1, 4].isnan().all() and not out[0].isnan().any() and not out[1, 5].isnan().any()


@pytest.mark.parametrize("layout", ["tokens_first", "dims_apart", "expanded"])
def test_layouts_of_memory(layout: str) -> None:
    q, k, v = inputs("group_of_4_in_pieces")
    if layout == "tokens_first":
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    elif layout == "dims_apart":
        given = [x.mT.contiguous().mT for x in (q, k, v)]
    else:
        k, v = (x[:, :1].expand(-1, 2, -1, -1) for x in (k, v))
        given = [q, k, v]
    want = decoder("cpp_decode", q.dtype).decode(q, k.contiguous(), v.contiguous(), None, 0.3, 0.0, None)
    assert torch.equal(CppDecode.decode(*given, None, 0.3, 0.0, None)[0], want[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = inputs("group_of_4_in_pieces", dtype, batch=1)
    kept = pages_of(q, k, 2, 16)
    before = torch.get_num_threads()
    found: list[list[Tensor]] = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            given = [decoder("cpp_decode", dtype).decode(q, k, v, pages, 0.3, 0.0, None) for pages in (None, kept)]
            found.append([x for pair in given for x in pair])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lead", ["one_list", "every_head", "alike_in_a_group"])
@pytest.mark.parametrize("feature", FEATURES)
def test_patterns(feature: str, lead: str, dtype: torch.dtype) -> None:
    """Everything a pattern can say, in rows of three queries; heads of a group with equal lists are one."""
    decoder("cpp_decode", dtype)
    given = {**FEATURES[feature], "block_q": 3, "seed": 7}
    if lead == "every_head":
        given |= {"heads": 4}
    pattern = random_pattern(8, 211, **given)
    if lead == "alike_in_a_group":
        other = random_pattern(8, 211, **{**given, "seed": 8}).with_kv_range(pattern.kv_range)
        pattern = BlockPattern.stack_heads([pattern, other], [0, 0, 1, 1])
    q, k, v = random_inputs(pattern, heads=4, kv_heads=2, dim=40, dtype=dtype)
    found = CppDecode.attention(q, k, v, pattern, 0.3)
    check(q, k, v, pattern, *found)
    again = CppDecode.attention(q, k, v, pattern, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("change", ["gradient", "float64", "many_queries"])
def test_other_calls_go_through_a_pattern(change: str) -> None:
    q, k, v = inputs("group_of_3")
    if change == "gradient":
        q = q.requires_grad_()
    elif change == "float64":
        q, k, v = (x.double() for x in (q, k, v))
    else:
        q = q.expand(-1, -1, 30, -1)
    out, lse, name = run_exact(q, k, v, 0.3)
    assert name != "cpp_decode"
    check(q.detach(), k, v, whole(q, k), out.detach(), lse.detach())
    if change == "gradient":
        kept = pages_of(q, k, 3, 16)
        grad = torch.autograd.grad(run_kept(q, k, v, kept, 0.3)[0].sum(), q)[0]
        want = torch.autograd.grad(run_pattern(q, k, v, kept.pattern(777, 9), 0.3, "torch_reference")[0].sum(), q)[0]
        assert grad.any() and float((grad - want).abs().max()) < 1e-5


def test_a_backend_by_name_runs() -> None:
    q, k, v = inputs("group_of_3")
    for name in ("torch_folded", "torch_gather", "torch_reference"):
        assert run_exact(q, k, v, 0.3, backend=name)[2] == name
        assert run_kept(q, k, v, pages_of(q, k, 1, 16), 0.3, backend=name)[2] == name if name != "torch_folded" else 1
    with pytest.raises(ValueError, match="`backend` must be one of"):
        run_exact(q, k, v, 0.3, backend="cpp_dekode")


def test_lists_that_fit_no_heads_are_refused() -> None:
    q, k, v = inputs("group_of_3")
    for lists in ((2, 2, 5), (1, 3, 5)):
        with pytest.raises(ValueError, match=r"`pages` must be \[2, 1 or 3 or 9, count\], got"):
            run_kept(q, k, v, Kept(torch.zeros(lists, dtype=torch.int32), 16), 0.3)


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp_decode, "_libraries", {})
    monkeypatch.setattr(build, "compiler", lambda: None)
    build._library.cache_clear()


@pytest.mark.usefixtures("no_compiler")
@pytest.mark.parametrize(
    "call", [lambda q, k, v: run_exact(q, k, v, 0.3), lambda q, k, v: run_kept(q, k, v, pages_of(q, k, 1, 16), 0.3)]
)
def test_without_a_compiler_pytorch_runs(call: Callable[..., tuple[Tensor, Tensor, str]]) -> None:
    assert call(*inputs("group_of_3"))[2] == "torch_folded"
    build._library.cache_clear()


def test_attention_of_one_query_takes_it() -> None:
    q, k, v = inputs("group_of_3")
    decoder("cpp_decode", q.dtype)
    out, lse = hsa.attention(q, k, v, "dense", scale=0.3, return_lse=True)
    assert torch.equal(out, run_exact(q, k, v, 0.3, backend="cpp_decode")[0])
    check(q, k, v, whole(q, k), out, lse)
