"""What `observing` shows is what a patched method is given."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.family import find_family, install
from hf_sparse_attn.method import Decline, Method, Run
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.profiling.observe import Seen, capture, observing
from hf_sparse_attn.session import Session
from tests.support.tiny_encoders import ENCODERS, SPECIAL, inputs
from tests.support.tiny_families import MODELS, output

CASES: dict[str, Any] = MODELS | {name: lambda name=name: (ENCODERS[name](), inputs(name)) for name in ENCODERS}


@dataclass(frozen=True, kw_only=True)
class _Asked(Method):
    """Keeps what it is given, and declines."""

    name = "asked"
    calls: list[tuple[Context, Tensor]] = field(default_factory=list, compare=False)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, run: Run) -> Decline:
        self.calls.append((ctx, q.clone()))
        return Decline("asked")


@dataclass(frozen=True, kw_only=True)
class _Dense(Method):
    """Leaves every call dense, as a profile does with layers that tolerate nothing."""

    name = "dense_by_choice"

    def dense_here(self, ctx: Context) -> str | None:
        return "dense by choice"


def _asked(model: Any, given: dict[str, Any]) -> list[tuple[Context, Tensor]]:
    """What a patched method is given, call by call."""
    asked = _Asked()
    with install(model, find_family(model), Session(asked, Policy(min_tokens=0), "auto", False)), torch.no_grad():
        output(model, given)
    return asked.calls


def _check_same(seen: list[Seen], asked: list[tuple[Context, Tensor]]) -> None:
    assert seen and len(seen) == len(asked)
    for shown, (ctx, q) in zip(seen, asked, strict=True):
        assert shown.ctx == ctx
        torch.testing.assert_close(shown.q, q, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CASES)
def test_calls_are_shown_as_a_method_gets_them(name: str) -> None:
    model, given = CASES[name]()
    seen: list[Seen] = []
    with observing(model, seen.append), torch.no_grad():
        output(model, given)
    _check_same(seen, _asked(model, given))


@pytest.mark.parametrize("name", ["dinov2", "llama", "wan"])
def test_calls_are_shown_backwards_as_a_method_gets_them(name: str) -> None:
    model, given = CASES[name]()
    seen: list[Seen] = []
    with observing(model, seen.append, gradients=True) as patch:
        torch.autograd.grad(output(model, given).float().sum(), patch.session.outputs)
    assert all(shown.grad is not None for shown in seen)
    _check_same(seen[::-1], _asked(model, given))


def test_layers_that_the_method_in_force_leaves_dense_are_shown() -> None:
    model, given = CASES["llama"]()
    seen: list[Seen] = []
    with observing(model, seen.append, _Dense()), torch.no_grad():
        output(model, given)
    assert [shown.ctx.layer for shown in seen] == [0, 1]


@pytest.mark.parametrize("name", SPECIAL)
def test_the_grid_of_an_image_is_captured(name: str) -> None:
    calls = capture(ENCODERS[name](), inputs(name))
    assert len(calls) == 2 and all(call.ctx.layout.video_part is not None for call in calls.values())
