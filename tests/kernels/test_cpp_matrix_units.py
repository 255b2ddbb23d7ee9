"""cpp_block_sparse at head sizes that units for matrices of bfloat16 take, where the processor has them."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hf_sparse_attn import BlockPattern
from hf_sparse_attn.kernels import cpp_block_sparse_build as build
from hf_sparse_attn.kernels.cpp_block_sparse import CppBlockSparse
from hf_sparse_attn.kernels.torch_reference import TorchReference
from tests.support.backends import PROBLEMS, case, check
from tests.support.patterns import random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("poisoned_memory")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def compiled() -> None:
    """Skips where the kernel cannot be compiled."""
    reason = build.why_not(BF16)
    if reason is not None:
        pytest.skip(reason)


@pytest.mark.parametrize("dim, value_dim", [(32, 64), (64, 64), (128, 96)])
@pytest.mark.parametrize("blocks", [(7, 200), (32, 32), (63, 5), (200, 63)], ids=str)
def test_head_sizes(blocks: tuple[int, int], dim: int, value_dim: int) -> None:
    """Blocks from any key, tiles, single columns; rows of an odd number of vectors, and of several items."""
    pattern = random_pattern(333, 500, block_q=blocks[0], block_k=blocks[1], heads=4, columns=40, seed=3)
    q, k, v = random_inputs(pattern, heads=4, kv_heads=2, dim=dim, value_dim=value_dim, dtype=BF16)
    out, lse = CppBlockSparse.attention(q, k, v, pattern, 0.3)
    check(q, k, v, pattern, out, lse)
    again = CppBlockSparse.attention(q, k, v, pattern, 0.3)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("shape, feature", PROBLEMS)
def test_features(shape: str, feature: str) -> None:
    """Orders, valid ranges, empty rows: at a head size of 64 in place of the case's own."""
    pattern, (q, k, v) = case(shape, feature, BF16)
    made = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(*x.shape[:3], 64, generator=made).to(BF16) for x in (q, k, v))
    check(q, k, v, pattern, *CppBlockSparse.attention(q, k, v, pattern, 0.3))


@pytest.mark.parametrize("scale, softcap", [(0.0, 0.0), (-0.4, 0.0), (0.3, 2.0)])
def test_scales(scale: float, softcap: float) -> None:
    pattern = random_pattern(100, 130, columns=5)
    q, k, v = random_inputs(pattern, dim=64, dtype=BF16)
    want, want_lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, scale, softcap)
    out, lse = CppBlockSparse.attention(q, k, v, pattern, scale, softcap)
    torch.testing.assert_close(out.double(), want, atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(lse.double(), want_lse, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize("tokens", [1, 31, 1000])
def test_beside_pytorchs_operators(tokens: int) -> None:
    """Both may set the units up in the same thread, and neither is to find them as the other has left them."""
    pattern = BlockPattern.dense(tokens, tokens, causal=True, block=64)
    q, k, v = random_inputs(pattern, heads=2, dim=64, dtype=BF16)
    first = scaled_dot_product_attention(q, k, v, is_causal=True)
    out, _ = CppBlockSparse.attention(q, k, v, pattern, 0.125)
    assert torch.equal(first, scaled_dot_product_attention(q, k, v, is_causal=True))
    torch.testing.assert_close(out, first, atol=2e-2, rtol=2e-2)


def test_the_output_lies_in_memory_as_the_queries_do() -> None:
    pattern = BlockPattern.dense(100, 100, causal=True, block=64)
    q, k, v = (torch.randn(1, 100, 2, 64).transpose(1, 2) for _ in range(3))
    out, _ = CppBlockSparse.attention(q, k, v, pattern, 0.125)
    assert out.stride() == q.stride()
