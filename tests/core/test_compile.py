"""Sparse attention under torch.compile: one graph, one more for other lengths, the same numbers and gradients."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_sparse_attn as hsa
from hf_sparse_attn import compiled
from hf_sparse_attn.kernels.torch_gather import TorchGather
from tests.support.patterns import random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def case(n: int, kv_len: int | None = None, seed: int = 0, **inputs):
    pattern = random_pattern(n, kv_len or n, heads=4, columns=5, q_order=(1, 1), kv_range=True, seed=seed)
    return pattern, random_inputs(pattern, heads=4, kv_heads=2, dim=32, seed=seed, **inputs)


def block(q, k, v, pattern):
    """Attention among what a compiler likes to fuse."""
    out, lse = hsa.attention(q * 1.5, k, v, pattern, return_lse=True)
    return out.sin(), lse.exp()


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_one_graph_and_one_more_for_all_other_lengths(backend: str) -> None:
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(block, fullgraph=True, backend=counter)
    for n in (300, 511, 640) if backend == "inductor" else (300, 511, 640, 1000, 77):
        pattern, tensors = case(n, seed=n)
        with torch.no_grad():
            for got, want in zip(run(*tensors, pattern), block(*tensors, pattern), strict=True):
                torch.testing.assert_close(got, want)
    assert counter.frame_count <= 2


@pytest.mark.parametrize(
    "backend, value_dim",
    [("aot_eager", 24), ("aot_eager", 40), pytest.param("inductor", 24, marks=pytest.mark.slow)],
)
def test_gradients_pass_through_the_graph(backend: str, value_dim: int) -> None:
    run = torch.compile(block, fullgraph=True, backend=backend)
    pattern, tensors = case(111, 130, value_dim=value_dim)
    tensors = [x.detach().requires_grad_() for x in tensors]
    weight = torch.randn(1, 4, 111, value_dim)
    grads = []
    for attend in (run, block):
        out, weights = attend(*tensors, pattern)
        grads.append(torch.autograd.grad((out * weight).sum() + weights.sum(), tensors))
    for got, want in zip(*grads, strict=True):
        assert want.abs().max() > 0
        # A compiler sums in another order, and what goes in and comes out is multiplied.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=5e-5)


def test_the_operators_keep_their_promises() -> None:
    pattern, tensors = case(40, 50)
    tensors = [x.detach().requires_grad_() for x in tensors]
    arguments = (*tensors, *compiled._spread(pattern), 0.3, 0.0, "torch_gather", True)
    torch.library.opcheck(compiled._operator, arguments)


def test_softcap_and_an_explicit_backend_reach_the_operator() -> None:
    pattern, tensors = case(40)

    def capped(q, k, v):
        return hsa.attention(q, k, v, pattern, backend="torch_reference", softcap=0.3)

    got = torch.compile(capped, fullgraph=True, backend="aot_eager")(*tensors)
    assert torch.equal(got, capped(*tensors))
    assert not torch.equal(got, hsa.attention(*tensors, pattern, backend="torch_reference"))


def test_a_backend_without_a_backward_says_so() -> None:
    pattern, (q, k, v) = case(40)
    run = torch.compile(lambda q: hsa.attention(q, k, v, pattern, backend="torch_reference"), backend="aot_eager")
    assert torch.equal(run(q), hsa.attention(q, k, v, pattern, backend="torch_reference"))
    with pytest.raises(hsa.BackendUnavailable, match="'torch_reference' cannot run this call: no backward under"):
        run(q.detach().requires_grad_())


def test_a_static_pattern_is_planned_once_and_not_kept_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    forward = TorchGather.forward
    monkeypatch.setattr(TorchGather, "forward", staticmethod(lambda *a: (seen.append(id(a[3])), forward(*a))[1]))

    def attend(q, k, v, p):
        return hsa.attention(q, k, v, p, backend="torch_gather")

    run = torch.compile(attend, fullgraph=True, backend="inductor")
    pattern, tensors = case(64)
    for _ in range(3):
        run(*tensors, pattern)
    assert len(seen) == 3 and len(set(seen)) == 1
    watched = weakref.ref(compiled._PATTERNS[pattern.indptr])
    torch._dynamo.reset()
    del pattern
    gc.collect()
    assert watched() is None
