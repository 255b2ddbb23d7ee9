"""Compiled FlexAttention against the reference on the CPU, and everything it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from hf_sparse_attn.kernels import flex_attention as flex
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import expected, random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("one_thread")

FlexAttention = flex.FlexAttention


def tiny(dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.zeros(3, 1, 2, 40, dim, dtype=dtype)
    return q, k, v


@pytest.fixture
def compiler() -> None:
    reason = FlexAttention.why_not(None, *tiny(), False)
    if reason is not None:
        pytest.skip(reason)


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def check(pattern: BlockPattern, **inputs: Any) -> None:
    # Orders give dense copies: dense inputs without an order share their graph.
    q, k, v = (x.contiguous() for x in random_inputs(pattern, **inputs))
    assert FlexAttention.why_not(pattern, q, k, v, False) is None
    out, lse = FlexAttention.attention(q, k, v, pattern, 0.3)
    expected(q, k, v, pattern, 0.3).check(out, lse)


@pytest.mark.usefixtures("compiler")
def test_patterns_of_one_shape_share_a_graph() -> None:
    inputs: dict[str, Any] = {"heads": 4, "kv_heads": 2, "dim": 32}
    check(random_pattern(111, 130, aligned=True), **inputs)
    before = graphs()
    for other in (
        {"seed": 1},
        {"tiles": 0},
        {"tiles": 9},
        {"empty_rows": (0, 3)},
        {"keep": 0.0},
        {"keep": 1.0},
        {"q_order": (1, 1), "kv_order": (1, 1)},
        {"q_order": (1, 4), "kv_order": (1, 1)},
    ):
        check(random_pattern(111, 130, aligned=True, **other), **inputs)
    assert graphs() == before


@pytest.mark.usefixtures("compiler")
def test_never_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past Dynamo's limit FlexAttention would quietly compute the dense mask: it must raise instead."""
    check(random_pattern(111, 130, aligned=True), heads=4, kv_heads=2, dim=32)
    monkeypatch.setattr(flex, "_MAX_GRAPHS", 1)
    with pytest.raises(Exception, match=r"recompile_limit|fullgraph"):
        check(random_pattern(77, 77, aligned=True), heads=4, kv_heads=2, dim=32)


@pytest.mark.slow
@pytest.mark.usefixtures("compiler")
def test_batch_heads_and_value_dim_in_bfloat16() -> None:
    pattern = random_pattern(63, 70, aligned=True, batch=2, heads=4, block_q=16, q_order=(2, 4), kv_order=(2, 1))
    check(pattern, batch=2, heads=4, kv_heads=2, dim=40, value_dim=24, dtype=torch.bfloat16)


@pytest.mark.usefixtures("compiler")
def test_output_alone_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pattern = random_pattern(111, 130, aligned=True, seed=2)
    q, k, v = (x.contiguous() for x in random_inputs(pattern, heads=4, kv_heads=2, dim=32))
    both = FlexAttention.attention(q, k, v, pattern, 0.3)
    monkeypatch.setattr(flex, "_lse_of_blocks", None)
    assert torch.equal(FlexAttention.attention_output(q, k, v, pattern, 0.3), both[0])


@pytest.mark.usefixtures("compiler")
def test_inputs_that_could_need_a_gradient_run_where_none_is_recorded() -> None:
    pattern = random_pattern(111, 130, aligned=True)
    q, k, v = (x.contiguous().requires_grad_() for x in random_inputs(pattern, heads=4, kv_heads=2, dim=32))
    with torch.no_grad():
        out, lse = FlexAttention.attention(q, k, v, pattern, 0.3)
        expected(q, k, v, pattern, 0.3).check(out, lse)


def test_log_sum_exp_needs_few_logits_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row whose blocks fall into several chunks is merged right."""
    pattern = random_pattern(63, 130, aligned=True, block_q=16, block_k=16, keep=0.9)
    q, k, v = random_inputs(pattern, heads=2)
    monkeypatch.setattr(flex, "_LOGITS_AT_A_TIME", 3 * 16 * 16)
    want = expected(q, k, v, pattern, 0.3)
    lse = flex._lse_of_blocks(q, k, pattern, 0.3)
    some = want.lse > -torch.inf
    assert torch.equal(lse > -torch.inf, some)
    assert float((lse - want.lse)[some].abs().max()) <= want.lse_tolerance


# ---- what it refuses


@pytest.fixture
def no_cache() -> Iterator[None]:
    flex._why_no_compiler.cache_clear()
    yield
    flex._why_no_compiler.cache_clear()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        pytest.param({"aligned": False}, "key blocks that start at multiples of block_k = 32", id="unaligned"),
        pytest.param({"aligned": True, "keep": 0.3, "columns": 9}, "single columns", id="columns"),
        pytest.param({"aligned": True, "kv_range": [(0, 9)]}, "no `kv_range`", id="kv_range"),
        pytest.param({"aligned": True, "kv_order": (1, 2)}, "an order of the keys per query head", id="kv_order"),
    ],
)
def test_refuses_patterns(pattern: dict[str, Any], reason: str) -> None:
    q, k, v = tiny()
    assert reason in str(FlexAttention.why_not(random_pattern(40, 40, **pattern), q, k[:, :1], v[:, :1], False))


def test_refuses_a_gradient_on_the_cpu() -> None:
    assert "no backward on the CPU" in str(FlexAttention.why_not(None, *tiny(), True))


def test_refuses_float64() -> None:
    assert "got float64" in str(FlexAttention.why_not(None, *tiny(dtype=torch.float64), False))


def test_refuses_another_device() -> None:
    assert "the tensors are on meta" in str(FlexAttention.why_not(None, *(x.to("meta") for x in tiny()), False))


def test_refuses_where_compiling_is_off() -> None:
    with torch._dynamo.config.patch(disable=True):
        assert "torch.compile is switched off" in str(FlexAttention.why_not(None, *tiny(), False))


def test_refuses_a_cpu_without_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert "needs an x86 CPU with AVX2, this one offers DEFAULT" in str(FlexAttention.why_not(None, *tiny(), False))


@pytest.mark.usefixtures("no_cache")
def test_refuses_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def missing() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", missing)
    assert "needs a C++ compiler" in str(FlexAttention.why_not(None, *tiny(), False))


def test_refuses_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def why_not(pattern: BlockPattern | None, dim: int, grad: bool = False) -> str:
        x = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float16, shape=(1, 2, 40, dim))
        return str(FlexAttention.why_not(pattern, x, x, x, grad))  # type: ignore[arg-type]

    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda _: object())
    assert "a dim of at least 16 on a GPU, got 8" in why_not(None, 8)
    assert "`block_k` to be a power of two from 16 on, on a GPU, got 48" in why_not(
        random_pattern(40, 40, block_k=48, aligned=True), 64
    )
    assert "`block_q` to be a multiple of 128 for a gradient, got 32" in why_not(
        random_pattern(40, 40, aligned=True), 64, grad=True
    )
    monkeypatch.setattr(flex.importlib.util, "find_spec", lambda _: None)
    assert "needs the package triton" in why_not(None, 64)


# ---- on a GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")
@pytest.mark.parametrize("block", [32, 128])
def test_matches_reference_on_a_gpu(block: int) -> None:
    pattern = random_pattern(300, 500, aligned=True, block_q=block, block_k=block, q_order=(1, 1), kv_order=(1, 1))
    q, k, v = random_inputs(pattern, heads=4, kv_heads=2, dtype=torch.float16)
    there = [x.cuda() for x in (q, k, v)]
    assert FlexAttention.why_not(pattern.to("cuda"), *there, False) is None
    out, lse = FlexAttention.attention(*there, pattern.to("cuda"), 0.3)
    expected(q, k, v, pattern, 0.3).check(out, lse)
