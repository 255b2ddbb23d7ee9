"""Programs made of patched models (torch.export, torch.jit) are refused while they are made, or dense on purpose."""

from __future__ import annotations

import contextlib
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa
from tests.support.processes import run_code
from tests.support.tiny_families import MODELS, WINDOW, run

pytestmark = pytest.mark.usefixtures("one_thread")

REFUSED = r"must not be exported or traced: .* unpatch\(\) it first"
WAYS = ("export", "strict", "trace")
KINDS = tuple(kind for kind in MODELS if kind != "bart")


class Net(nn.Module):
    """A model whose inputs are its tensors in turn."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        super().__init__()
        self.model = model
        self.names = [name for name, value in given.items() if isinstance(value, Tensor)]
        self.rest = {name: value for name, value in given.items() if name not in self.names}

    def forward(self, *args: Tensor) -> Tensor:
        found = self.model(**dict(zip(self.names, args, strict=True)), **self.rest, return_dict=False)
        return found[0]


def program(way: str, model: nn.Module, given: dict[str, Any]) -> Any:
    net = Net(model, given).eval()
    args = tuple(given[name] for name in net.names)
    with torch.no_grad():
        if way == "trace":
            return torch.jit.trace(net, args, strict=False), args
        return torch.export.export(net, args, strict=way == "strict").module(), args


@pytest.mark.parametrize(
    ("kind", "way"), [*((kind, "export") for kind in KINDS), *product(("llama", "wan", "function"), WAYS[1:])]
)
def test_a_patched_model_is_refused(kind: str, way: str) -> None:
    model, given = MODELS[kind]()
    with hsa.patch(model, **WINDOW) as patch, pytest.raises(RuntimeError, match=REFUSED):
        program(way, model, given)
    assert all(r.sparse_calls == 0 for r in patch.report().layers)


@pytest.mark.parametrize(
    ("kind", "way"),
    [("llama", "trace"), ("vit", "strict"), ("wan", "strict"), ("function", "export")],
)
@pytest.mark.parametrize("reason", ["pause", "dense"])
def test_what_runs_as_before_is_a_program_that_knows_no_patch(kind: str, way: str, reason: str) -> None:
    model, given = MODELS[kind]()
    dense = run(model, given)
    method = WINDOW if reason == "pause" else {"method": "dense"}
    with hsa.patch(model, **method) as patch, patch.paused() if reason == "pause" else contextlib.nullcontext():
        made, args = program(way, model, given)
    assert "hf_sparse_attn" not in str(made.graph)
    assert torch.equal(made(*args), dense)


@pytest.mark.parametrize("way", WAYS)
def test_a_part_of_a_patched_model_is_refused(way: str) -> None:
    model, _ = MODELS["encoder"]()
    with hsa.patch(model, **WINDOW), pytest.raises(RuntimeError, match=REFUSED):
        program(way, model.encoder.layer[0].attention, {"hidden_states": torch.randn(1, 64, 64)})


@pytest.mark.parametrize("way", WAYS)
def test_a_model_with_a_native_name_is_refused_until_it_has_another(way: str) -> None:
    model, given = MODELS["llama"]()
    dense = run(model, given)
    model.set_attn_implementation("hsa:sliding_window")
    with pytest.raises(RuntimeError, match=REFUSED):
        program(way, model, given)
    model.set_attn_implementation("sdpa")
    made, args = program(way, model, given)
    assert torch.allclose(made(*args), dense, atol=1e-5)


class Attention(nn.Module):
    """The functional form, by a method or by its pattern."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = hsa.attention(q, k, v, self.method)
        assert isinstance(found, Tensor)
        return found


def test_the_functional_form_carries_its_pattern_and_is_not_traced(tmp_path: Any) -> None:
    given = tuple(torch.randn(1, heads, 63, 8) for heads in (4, 2, 2))
    method = hsa.get_method("sliding_window")(window=9, sink=2, block_size=16)
    ready = Attention(method.pattern(given[0], given[1], hsa.Context.for_tensors(given[0], given[1])))
    made = torch.export.export(ready, given)
    assert torch.equal(made.module()(*given), ready(*given))
    torch.export.save(made, tmp_path / "program.pt2")
    torch.save((given, ready(*given)), tmp_path / "given")
    done = run_code(
        "import torch, hf_sparse_attn.compiled\n"
        "given, want = torch.load('given')\n"
        "assert torch.equal(torch.export.load('program.pt2').module()(*given), want)\n",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    for strict in (False, True):
        with pytest.raises(RuntimeError, match="must be a ready BlockPattern in an exported program"):
            torch.export.export(Attention(method), given, strict=strict)
    with pytest.raises(RuntimeError, match=r"must not be traced by torch\.jit"):
        torch.jit.trace(ready, given)
