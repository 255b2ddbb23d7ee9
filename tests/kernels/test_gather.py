"""torch_gather against the float64 reference, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_sparse_attn import BlockPattern
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.kernels import torch_gather
from hf_sparse_attn.kernels.torch_gather import TorchGather
from tests.support.backends import SHAPES, case, check
from tests.support.patterns import FEATURES, Largest, expected, random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(shape: str, feature: str, dtype: torch.dtype) -> None:
    pattern, (q, k, v) = case(shape, feature, dtype)
    out, lse = TorchGather.attention(q, k, v, pattern, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    check(q, k, v, pattern, out, lse)
    again = TorchGather.attention(q, k, v, pattern, 0.3)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.parametrize("feature", FEATURES)
def test_one_pattern_for_all_heads(feature: str) -> None:
    pattern, (q, k, v) = case("batch", feature, torch.float32, per_head=False)
    expected(q, k, v, pattern, 0.3).check(*TorchGather.attention(q, k, v, pattern, 0.3))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("shape", ["odd", "wide_value"])
def test_gradcheck(shape: str, feature: str) -> None:
    pattern, tensors = case(shape, feature, torch.float64)
    small = [x[..., :5].clone().requires_grad_() for x in tensors]
    some = (pattern.to_dense().any(-1)).expand(small[0].shape[:3])

    def run(q, k, v):
        out, lse = TorchGather.attention(q, k, v, pattern, 0.3)
        return out, lse.masked_fill(~some, 0.0)

    assert torch.autograd.gradcheck(run, small, fast_mode=True)
    # The fused backward runs where the log-sum-exp is not used.
    assert torch.autograd.gradcheck(lambda *x: run(*x)[0], small, fast_mode=True)


@pytest.mark.parametrize("feature", ["all", "columns", "tiles"])
def test_the_path_of_other_devices(feature: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The operators used where PyTorch's fused CPU attention is absent, forward and backward."""
    pattern, (q, k, v) = case("odd", feature, torch.float32)
    want = expected(q, k, v, pattern, 0.3)
    tensors = [x.clone().requires_grad_() for x in (q, k, v)]
    weight = torch.randn(want.out.shape)

    def gradients():
        out, lse = TorchGather.attention(*tensors, pattern, 0.3)
        want.check(out.detach(), lse.detach())
        return torch.autograd.grad((out * weight).sum(), tensors)

    fused = gradients()
    monkeypatch.setattr(torch_gather, "_has_fused", lambda device: False)
    for a, b in zip(fused, gradients(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("with_order", [False, True], ids=["in_order", "reordered"])
def test_keys_outside_the_valid_range_change_no_bit(with_order: bool) -> None:
    pattern = random_pattern(111, 130, kv_range=[(17, 99)], kv_order=(1, 1) if with_order else None, seed=8)
    q, k, v = random_inputs(pattern, heads=2, dim=32)
    clean = TorchGather.attention(q, k, v, pattern, 0.3)
    for x in (k, v):
        x[:, :, :17], x[:, :, 99:] = torch.nan, torch.inf
    dirty = TorchGather.attention(q, k, v, pattern, 0.3)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_one_thread_gives_the_same() -> None:
    pattern, (q, k, v) = case("odd", "all", torch.float32)
    many = TorchGather.attention(q, k, v, pattern, 0.3)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(many, TorchGather.attention(q, k, v, pattern, 0.3)[0])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_no_tensor_grows_with_the_square_of_the_length(causal: bool) -> None:
    peaks = []
    for n in (1024, 4096):
        blocks = n // 64
        keep = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool)
        keep.diagonal(0, 2, 3).fill_(True)
        keep[..., 0] = True
        pattern = BlockPattern.from_block_map(keep, 64, 64, n, n, causal)
        q, k, v = (x.requires_grad_() for x in random_inputs(pattern, heads=2, dim=16))
        with Largest() as seen:
            run_pattern(q, k, v, pattern, 0.3, "torch_gather")[0].sum().backward()
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]


def test_empty_heads_and_empty_batch_rows() -> None:
    pattern = replace(random_pattern(64, 64, batch=2, heads=2), kv_range=torch.tensor([[0, 64], [9, 9]]).int())
    q, k, v = random_inputs(pattern, batch=2, heads=2, dim=16)
    out, lse = TorchGather.attention(q, k, v, pattern, 0.3)
    assert not out[1].any() and bool((lse[1] == -torch.inf).all())
    expected(q, k, v, pattern, 0.3).check(out, lse)
