"""torch.func over sparse attention: first derivatives and vmap give what loops over plain calls give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap

import hf_sparse_attn as hsa
from hf_sparse_attn.cost import table as cost
from tests.support.tiny_families import MODELS, VIDEO, WINDOW

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("cpp_block_sparse", "torch_gather", "torch_reference")
METHODS: dict[str, Any] = {
    "static": hsa.get_method("sliding_window")(window=9, sink=2, block_size=16),
    "by content": hsa.get_method("block_topk")(density=0.4, block_size=16),
    "with a branch": hsa.get_method("vsa")(density=0.4, tile=(1, 2, 2)),
}
CONTEXT = hsa.Context(hsa.TokenLayout.video(7, 3, 3), num_heads=4, num_kv_heads=2, head_dim=8)
Tensors = tuple[Tensor, ...]


def inputs(samples: int = 3) -> Tensors:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(samples, 2, heads, 63, 8, generator=draw) for heads in (4, 2, 2))


def functional(method: str, backend: str) -> Callable[..., Any]:
    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        ctx = CONTEXT if method == "with a branch" else None
        return hsa.attention(q, k, v, METHODS[method], ctx, backend=backend)

    return run


def by_autograd(loss: Callable[..., Tensor], tensors: Tensors) -> Tensors:
    given = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(loss(*given), given)


def close(got: Tensors, want: Tensors) -> bool:
    return all(torch.allclose(a, b, atol=1e-5, rtol=1e-4) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS)
def test_the_functional_form(method: str, backend: str) -> None:
    run, given = functional(method, backend), inputs()
    one = tuple(x[0] for x in given)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return run(q, k, v).square().sum()

    assert close(grad(loss, argnums=(0, 1, 2))(*one), by_autograd(loss, one))
    out, back = vjp(run, *one)
    assert torch.equal(out, run(*one)) and close(back(2 * out), by_autograd(loss, one))
    looped = torch.stack([run(*sample) for sample in zip(*given, strict=True)])
    assert torch.equal(vmap(run)(*given), looped)
    # Over another dim, with keys that all share, one transform within another, and plain gradients of it.
    moved = vmap(run, in_dims=(1, None, None), out_dims=1)(given[0].transpose(0, 1), given[1][0], given[2][0])
    assert torch.equal(moved[:, 0], run(*one))
    each = [
        torch.stack(parts) for parts in zip(*(by_autograd(loss, s) for s in zip(*given, strict=True)), strict=True)
    ]
    assert close(vmap(grad(loss, argnums=(0, 1, 2)))(*given), tuple(each))
    assert close(grad(lambda *x: vmap(loss)(*x).sum(), argnums=(0, 1, 2))(*given), tuple(each))
    assert close(by_autograd(lambda *x: vmap(loss)(*x).sum(), given), tuple(each))


def test_log_sum_exp_sinks_and_ready_patterns() -> None:
    q, k, v = (x[0] for x in inputs())
    pattern = METHODS["static"].pattern(q, k, hsa.Context.for_tensors(q, k))
    sinks = torch.tensor([0.3, -1.0, 2.0, 0.0])

    def loss(q: Tensor, sinks: Tensor) -> Tensor:
        out, lse = hsa.attention(q, k, v, pattern, sinks=sinks, return_lse=True, scale=0.4, softcap=3.0)
        return out.square().sum() + lse.sin().sum()

    assert close(grad(loss, argnums=(0, 1))(q, sinks), by_autograd(loss, (q, sinks)))
    rows = jacrev(lambda sinks: hsa.attention(q, k, v, pattern, sinks=sinks)[0, :, :3, 0])(sinks)
    assert rows.shape == (4, 3, 4) and torch.count_nonzero(rows.diagonal(dim1=0, dim2=2)) == 12


def test_second_derivatives_are_refused() -> None:
    q, k, v = (x[0, :1, :, :20] for x in inputs())

    def loss(q: Tensor) -> Tensor:
        return hsa.attention(q, k, v, METHODS["static"]).square().sum()

    with pytest.raises(RuntimeError, match="cannot be differentiated twice"):
        grad(lambda q: grad(loss)(q).sum())(q)
    with pytest.raises(RuntimeError, match="no derivatives in forward mode"):
        hessian(loss)(q)
    with pytest.raises(RuntimeError, match="twice"):
        found = torch.autograd.grad(loss(x := q.clone().requires_grad_()), x, create_graph=True)[0]
        found.sum().backward()


def output(model: Any, given: dict[str, Any]) -> Callable[[dict[str, Tensor], Tensor], Tensor]:
    """The model as a function of its parameters and of its first input that has numbers in it."""
    name = next(n for n in ("hidden_states", "pixel_values", "inputs_embeds") if n in given)

    def run(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, parameters, kwargs={**given, name: x, "return_dict": False})[0]

    return run


def built(kind: str) -> tuple[Any, dict[str, Any], Tensor]:
    model, given = MODELS[kind]()
    if "input_ids" in given:
        embedded = model.get_input_embeddings()(given.pop("input_ids")).detach()
        given = {**given, "inputs_embeds": embedded}
    if kind == "llama":
        given["use_cache"] = False
    name = next(n for n in ("hidden_states", "pixel_values", "inputs_embeds") if n in given)
    return model, given, given[name]


@pytest.mark.parametrize("kind", ["llama", "llama padded", "encoder", "encoder padded", "vit", *VIDEO])
def test_a_patched_model(kind: str) -> None:
    kind, _, padded = kind.partition(" ")
    model, given, x = built(kind)
    if padded:
        given["attention_mask"] = torch.ones(x.shape[:2], dtype=torch.long)
        given["attention_mask"][0, :9] = 0
    run, parameters = output(model, given), {n: p.detach() for n, p in model.named_parameters()}

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return run(parameters, x).square().mean()

    dense = run(parameters, x)
    with hsa.patch(model, **WINDOW) as patch:
        sparse = run(parameters, x)
        assert not torch.allclose(sparse, dense, atol=1e-4)
        names = [n for n, p in model.named_parameters() if p.requires_grad]
        loss({}, x).backward()
        want = {n: p.grad for n, p in model.named_parameters() if n in names}
        before = sum(r.sparse_calls for r in patch.report().layers)
        got = grad(loss)(parameters, x)
        assert all(w is None or torch.allclose(got[n], w, atol=1e-6, rtol=1e-3) for n, w in want.items())
        assert sum(r.sparse_calls for r in patch.report().layers) == before * 3 // 2
        samples = torch.stack([x, 0.5 * x])
        mapped = vmap(run, in_dims=(None, 0))(parameters, samples)
        assert torch.allclose(mapped[0], sparse, atol=1e-5)
        assert torch.allclose(mapped[1], run(parameters, samples[1]), atol=1e-5)
        each = vmap(grad(loss), in_dims=(None, 0))(parameters, samples)
        assert all(torch.allclose(each[n][0], got[n], atol=1e-6, rtol=1e-3) for n in got)
        assert all(not r.reasons for r in patch.report().layers)


def test_a_mask_of_each_sample() -> None:
    model, given, x = built("llama")
    masks = torch.ones(2, *x.shape[:2], dtype=torch.long)
    masks[1, 0, :17] = 0

    def run(mask: Tensor) -> Tensor:
        return model(**{**given, "attention_mask": mask}).logits

    with hsa.patch(model, **WINDOW), torch.no_grad():
        want = torch.stack([run(mask) for mask in masks])
        got = vmap(run)(masks)
    assert torch.allclose((got - want) * masks[..., None], torch.zeros(()), atol=1e-5)


def test_a_model_with_a_native_name(monkeypatch: pytest.MonkeyPatch) -> None:
    model, given, x = built("llama")
    run, parameters = output(model, given), {n: p.detach() for n, p in model.named_parameters()}
    model.set_attn_implementation("hsa:vertical_slash")
    # Costs by which sparse attention pays, whatever this machine is.
    monkeypatch.setattr(cost.Table, "dense_seconds", lambda self, shape: 1.0)
    long = x[:1].repeat(1, 12, 1)
    out = run(parameters, long)
    assert any(r.sparse_calls for r in hsa.native.report(model).layers)

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return run(parameters, x).square().mean()

    loss({}, long).backward()
    got = grad(loss)(parameters, long)
    reached = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
    assert all(torch.allclose(got[n], want, atol=1e-6, rtol=1e-3) for n, want in reached)
    assert torch.allclose(vmap(run, in_dims=(None, 0))(parameters, long[None])[0], out, atol=1e-5)
