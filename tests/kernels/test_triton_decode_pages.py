"""The decoding kernel for every key and for pages: interpreted against the reference, compiled for GPUs."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.decoding import Kept, whole_pattern
from tests.support.patterns import expected

pytest.importorskip("triton", reason="needs the package triton")
from hf_sparse_attn.kernels import triton_common as common
from hf_sparse_attn.kernels import triton_decode as kernel
from hf_sparse_attn.kernels.triton_decode_pages import attend_cache
from tests.support.triton_testing import TARGETS, compile_for, equal, gpu, no_gpu, poisoned

Outputs = tuple[Tensor, Tensor]
# Sizes, and what is kept: page size with the number of lists, or nothing for every key.
CASES: dict[str, dict[str, Any]] = {
    "every_key": {},
    "every_key_padded": {"first": (0, 41)},
    "every_key_of_four_queries": {"queries": 4, "first": (3, 60)},
    "one_key": {"keys": 1},
    "pages_of_16": {"page": 16, "lists": 1},
    "pages_of_16_for_heads_of_keys": {"page": 16, "lists": 2, "first": (0, 41)},
    "pages_of_48_for_every_head": {"page": 48, "lists": 6},
    "single_slots": {"page": 1, "lists": 2},
    "bfloat16": {"page": 16, "lists": 2, "dtype": torch.bfloat16},
    "odd_dims": {"page": 16, "lists": 1, "dim": 40, "value_dim": 24},
    "none_kept": {"page": 16, "lists": 1, "none": True},
}


def make(
    queries: int = 1, keys: int = 150, dim: int = 32, value_dim: int = 32, page: int = 0, lists: int = 1,
    first: tuple[int, ...] | None = None, dtype: torch.dtype = torch.float32, none: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Kept | None, Tensor | None]:  # fmt: skip
    draw = torch.Generator().manual_seed(3)
    q = torch.randn(2, 6, queries, dim, generator=draw).to(dtype)
    k, v = (torch.randn(2, 2, keys, d, generator=draw).to(dtype) for d in (dim, value_dim))
    kept = None
    if page:
        total = -(-keys // page)
        pages = torch.stack([torch.randperm(total, generator=draw) for _ in range(2 * lists)])
        pages = pages[:, : max(2, total * 2 // 3)].view(2, lists, -1).to(torch.int32)
        pages[:, :, 1::3] = -1
        kept = Kept(torch.full_like(pages, -1) if none else pages, page)
    return q, k, v, kept, None if first is None else torch.tensor(first)


def wanted(q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, first: Tensor | None) -> Any:
    if kept is None:
        pattern = whole_pattern(q.shape[2], k.shape[2], first, q.device)
    else:
        pattern = kept.pattern(k.shape[2], q.shape[1], first)
    return expected(q, k, v, pattern, 0.3)


def unread(k: Tensor, kept: Kept | None, first: Tensor | None) -> Tensor:
    if kept is None:
        pattern = whole_pattern(1, k.shape[2], first, k.device)
    else:
        pattern = kept.pattern(k.shape[2], 6, first)
    heads = pattern.to_dense().any(2).expand(2, 6, -1).unflatten(1, (2, 3))
    return ~heads.any(2)[..., None]


def _run_in_worker(payload: bytes) -> bytes:
    q, k, v, kept, first, softcap, cut = pickle.loads(payload)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if cut:
            chosen = kernel._launch
            patch.setattr(kernel, "_launch", lambda *a: (chosen(*a)[0]._replace(keys=cut[0]), 1))
            patch.setattr(kernel, "choose_splits", lambda *_: cut[1])
        return pickle.dumps(kernel.TritonDecode.decode(q, k, v, kept, 0.3, softcap, first))


@pytest.fixture(scope="module")
def interpreted(interpreter: ProcessPoolExecutor) -> Callable[..., Outputs]:
    """TritonDecode.decode, interpreted; `cut` sets keys at a time and the number of splits."""

    def decode(
        q: Tensor, k: Tensor, v: Tensor, kept: Kept | None, first: Tensor | None, softcap: float = 0.0,
        cut: tuple[int, int] | None = None,
    ) -> Outputs:  # fmt: skip
        payload = pickle.dumps((q, k, v, kept, first, softcap, cut))
        return pickle.loads(interpreter.submit(_run_in_worker, payload).result())  # type: ignore[no-any-return]

    return decode


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, interpreted: Callable[..., Outputs]) -> None:
    given = make(**CASES[name])
    want = wanted(*given)
    for cut in (None, (16, 3)):
        found = interpreted(*given, cut=cut)
        want.check(*found)
        assert found[0].transpose(1, 2).is_contiguous()


def test_a_soft_cap(interpreted: Callable[..., Outputs]) -> None:
    q, k, v, kept, first = make(page=16, lists=2)
    out, _ = interpreted(q * 4, k, v, kept, first, 2.0)
    logits = (q * 4).double() @ k.double().repeat_interleave(3, 1).mT * 0.3
    assert kept is not None
    bent = (2.0 * torch.tanh(logits / 2.0)).masked_fill(~kept.pattern(150, 6).to_dense(), -torch.inf)
    want = bent.softmax(-1) @ v.double().repeat_interleave(3, 1)
    assert float((out - want).abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["every_key_padded", "pages_of_16_for_heads_of_keys"])
def test_what_is_not_read_may_be_anything(name: str, interpreted: Callable[..., Outputs]) -> None:
    q, k, v, kept, first = make(**CASES[name])
    nobody = unread(k, kept, first)
    assert nobody.any()
    dirty = (x.masked_fill(nobody, torch.nan) for x in (k, v))
    assert equal(interpreted(q, k, v, kept, first), interpreted(q, *dirty, kept, first))


_FORMS = [(dtype, page) for dtype in ("bf16", "fp16", "fp32") for page in (16, 0)]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(
    "dtype, page", [pytest.param(*form, marks=[pytest.mark.slow] * (form != _FORMS[0])) for form in _FORMS]
)
def test_compiles_for_gpus(target: str, dtype: str, page: int) -> None:
    launch = kernel.choose_launch(4, 128, 128, 4 if dtype == "fp32" else 2, TARGETS[target][1], int(page > 0))
    constants = {
        "q_dim": 1, "k_dim": 1, "v_dim": 1, "DIM": 128, "DIM_PAD": 128, "VALUE_DIM": 128, "VALUE_PAD": 128,
        "PAGE": page, "PACK": 4, "M": launch.lanes, "N": launch.keys, "CAUSAL": not page, "HAS_FIRST": True,
        "HAS_CAP": False, "SPLIT": True, "UPCAST": False,
    }  # fmt: skip
    types = {
        **dict.fromkeys(("q", "k", "v"), f"*{dtype}"), **dict.fromkeys(("out", "lse"), "*fp32"), "pages": "*i32",
        "first": "*i64", "factor": "fp32", "cap": "fp32",
    }  # fmt: skip
    compile_for(attend_cache, target, types, constants, launch.warps, launch.stages)


def test_another_length_compiles_no_other_kernel() -> None:
    assert {"kv_len", "page_count", "lists", "splits", "strips", "q_len"} <= set(common.LENGTHS)


@gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("name", CASES)
def test_compiled_matches_reference(name: str, dtype: torch.dtype) -> None:
    q, k, v, kept, first = make(**{**CASES[name], "keys": 5000, "dtype": dtype})
    there = None if kept is None else Kept(kept.pages.cuda(), kept.size)
    begin = None if first is None else first.cuda()
    found = kernel.TritonDecode.decode(q.cuda(), k.cuda(), v.cuda(), there, 0.3, 0.0, begin)
    wanted(q, k, v, kept, first).check(*found)
