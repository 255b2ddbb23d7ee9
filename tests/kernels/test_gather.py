"""torch_gather against the float64 reference, forward and backward."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_sparse_attn.kernels import torch_gather
from hf_sparse_attn.kernels.torch_gather import TorchGather
from tests.support.backends import PROBLEMS, case, check
from tests.support.patterns import expected, random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, feature", PROBLEMS)
def test_forward(shape: str, feature: str, dtype: torch.dtype) -> None:
    pattern, (q, k, v) = case(shape, feature, dtype)
    out, lse = TorchGather.attention(q, k, v, pattern, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    check(q, k, v, pattern, out, lse)
    again = TorchGather.attention(q, k, v, pattern, 0.3)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


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


def test_one_thread_gives_the_same() -> None:
    pattern, (q, k, v) = case("odd", "all", torch.float32)
    many = TorchGather.attention(q, k, v, pattern, 0.3)[0]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(many, TorchGather.attention(q, k, v, pattern, 0.3)[0])
    finally:
        torch.set_num_threads(threads)


def test_empty_heads_and_empty_batch_rows() -> None:
    pattern = replace(random_pattern(64, 64, batch=2, heads=2), kv_range=torch.tensor([[0, 64], [9, 9]]).int())
    q, k, v = random_inputs(pattern, batch=2, heads=2, dim=16)
    out, lse = TorchGather.attention(q, k, v, pattern, 0.3)
    assert not out[1].any() and bool((lse[1] == -torch.inf).all())
    expected(q, k, v, pattern, 0.3).check(out, lse)
