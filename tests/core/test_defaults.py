"""Default dtype and default device of the process change nothing: not what is computed, not where."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.method import MethodDoesNotApply
from hf_sparse_attn.registry import METHODS
from tests.support.tiny_families import MODELS, WINDOW, output

pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("cpp_block_sparse", "torch_gather", "torch_reference")
LAYOUTS = (hsa.TokenLayout.causal(210), hsa.TokenLayout.video(5, 6, 7))


@contextmanager
def default(setting: Any) -> Iterator[None]:
    """A default dtype, or a default device; "meta" stands for any that is not the CPU."""
    before = torch.get_default_dtype()
    try:
        if isinstance(setting, torch.dtype):
            torch.set_default_dtype(setting)
            yield
        else:
            with torch.device(setting):
                yield
    finally:
        torch.set_default_dtype(before)


SETTINGS = [torch.float16, torch.bfloat16, torch.float64, "meta"]


def attended(name: str, backend: str) -> list[Tensor]:
    """Outputs and gradients of all examples of a method."""
    draw = torch.Generator("cpu").manual_seed(0)
    found = []
    for params in METHODS.get(name).examples()[:1]:
        method = METHODS.get(name)(**params)
        for layout, dtype in ((one, d) for one in LAYOUTS for d in (torch.float32, torch.bfloat16)):
            if method.reads:
                continue
            q, k, v = (
                torch.randn(1, heads, 210, 16, generator=draw, device="cpu", dtype=torch.float32).to(dtype)
                for heads in (4, 2, 2)
            )
            for x in (q, k, v):
                x.requires_grad_()
            ctx = hsa.Context(layout, num_heads=4, num_kv_heads=2, head_dim=16)
            try:
                out = hsa.attention(q, k, v, method, ctx, backend=backend)
            except (MethodDoesNotApply, hsa.BackendUnavailable):
                continue
            assert isinstance(out, Tensor)
            found.append(out.detach())
            found += torch.autograd.grad(out.float().square().sum(), (q, k, v))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", METHODS.names())
def test_the_functional_form(name: str, backend: str) -> None:
    want = attended(name, backend)
    for setting in SETTINGS:
        with default(setting):
            got = attended(name, backend)
        assert len(got) == len(want)
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True)), setting


@pytest.mark.parametrize("kind", ["llama", "encoder", "wan", "hunyuan_video", "function"])
def test_a_patched_model(kind: str) -> None:
    """A float32 model under other defaults; what models themselves make in a default dtype is left out."""
    model, given = MODELS[kind]()
    with hsa.patch(model, **WINDOW, backend="torch_gather"):
        want = output(model, given)
    for setting in (torch.float16, torch.float64):
        with default(setting), hsa.patch(model, **WINDOW, backend="torch_gather", strict=True) as patch:
            got = output(model, given)
        assert torch.equal(got, want) and got.dtype == want.dtype, setting
        assert all(r.sparse_calls == 1 for r in patch.report().layers)


@pytest.mark.parametrize("kind", ["vit", "encoder"])
def test_a_patched_model_on_another_device_than_the_default(kind: str) -> None:
    model, given = MODELS[kind]()
    with hsa.patch(model, **WINDOW):
        want = output(model, given)
    with torch.device("meta"), hsa.patch(model, **WINDOW, strict=True) as patch:
        got = output(model, given)
    assert torch.equal(got, want) and all(r.sparse_calls == 1 for r in patch.report().layers)
