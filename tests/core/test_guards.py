"""Every guard of policy, methods, dispatch and registries fires where it should and nowhere beside it."""

from __future__ import annotations

import importlib
import pkgutil
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import backend, dispatch
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.registry import (
    BACKENDS,
    METHODS,
    Registry,
    _check_backend,
    _check_family,
    _check_method,
    make_method,
)
from tests.support.patterns import random_pattern

CPU = torch.device("cpu")
CAUSAL = hsa.TokenLayout.causal(64)
VIDEO = hsa.TokenLayout.video(2, 4, 8)


def context(layout: hsa.TokenLayout = CAUSAL, **where: Any) -> hsa.Context:
    return hsa.Context(layout, num_heads=2, num_kv_heads=1, head_dim=8, **where)


def tensors(**changes: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q of two heads, k and v of one; `q`, `k`, `v` give another shape."""
    shapes = {"q": (1, 2, 32, 8), "k": (1, 1, 32, 8), "v": (1, 1, 32, 8), **changes}
    q, k, v = (torch.zeros(shapes[name]) for name in "qkv")
    return q, k, v


# ---- policy


def why_dense(policy: Policy, layout: hsa.TokenLayout = CAUSAL, **where: Any) -> str | None:
    return policy.why_dense(context(layout, **where), CPU)


@pytest.mark.parametrize(
    ("layers", "dense"),
    [(None, []), (0, []), (2, [0, 1]), ([3, 1], [1, 3]), ((), [])],
    ids=["none", "0", "2", "list", "()"],
)
def test_dense_layers(layers: Any, dense: list[int]) -> None:
    policy = Policy(dense_layers=layers, min_tokens=0)
    assert [i for i in range(5) if why_dense(policy, layer=i, num_layers=5) == "dense_layers"] == dense


@pytest.mark.parametrize(
    ("share", "steps", "dense"),
    [
        (None, 4, []),
        (0.5, 4, [0, 1]),
        # Each share that is more than 0 keeps at least one step; 0.07 of 100 is 7, whatever floats say.
        (0.01, 4, [0]),
        (0.07, 100, [*range(7)]),
        ((0.25, 0.25), 4, [0, 3]),
        ((0, 0.5), 4, [2, 3]),
        (1, 2, [0, 1]),
    ],
    ids=str,
)
def test_dense_steps(share: Any, steps: int, dense: list[int]) -> None:
    policy = Policy(dense_steps=share, min_tokens=0)
    assert [i for i in range(steps) if why_dense(policy, step=i, num_steps=steps) == "dense_steps"] == dense


def test_few_queries_are_decoding() -> None:
    policy = Policy(min_tokens=0)
    layouts = {n: hsa.TokenLayout.causal(n) for n in (15, 16)}
    assert why_dense(policy, layouts[15]) == "decoding: fewer than 16 queries"
    assert why_dense(policy, layouts[16]) is None
    assert why_dense(replace(policy, min_queries=15), layouts[15]) is None


def test_few_keys_are_dense() -> None:
    assert why_dense(Policy(min_tokens=64)) is None
    assert why_dense(Policy(min_tokens=65)) == "fewer than 65 keys (min_tokens=65)"


def test_automatic_keys_are_those_of_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_sparse_attn.policy.fewest_keys", lambda ctx, device: 65)
    assert why_dense(Policy()) == "fewer than 65 keys (min_tokens=auto)"
    monkeypatch.setattr("hf_sparse_attn.policy.fewest_keys", lambda ctx, device: 64)
    assert why_dense(Policy()) is None


@pytest.mark.parametrize("layers", [-1, True, [0, -1], [False], 1.5, "first", [0, "1"]], ids=repr)
def test_dense_layers_that_are_none(layers: Any) -> None:
    with pytest.raises(ValueError, match="`dense_layers` must be a number of layers or a list of layer indices, got"):
        Policy(dense_layers=layers)


@pytest.mark.parametrize("steps", [-0.1, 1.1, True, (0.1, 2), "half", (0.5, "0.5")], ids=repr)
def test_dense_steps_that_are_none(steps: Any) -> None:
    with pytest.raises(ValueError, match="`dense_steps` must be shares between 0 and 1, got"):
        Policy(dense_steps=steps)


@pytest.mark.parametrize("steps", [(), (0.1,), (0.1, 0.1, 0.1)], ids=repr)
def test_dense_steps_are_one_share_or_two(steps: Any) -> None:
    with pytest.raises(ValueError, match=r"`dense_steps` must be one share or \(start, end\), got"):
        Policy(dense_steps=steps)


@pytest.mark.parametrize("tokens", [-1, True, 1.5, "few"], ids=repr)
def test_min_tokens_that_are_none(tokens: Any) -> None:
    with pytest.raises(ValueError, match="`min_tokens` must be 'auto' or a number of tokens, got"):
        Policy(min_tokens=tokens)


def test_limits_themselves_are_allowed() -> None:
    Policy(dense_layers=0, dense_steps=(0, 1), min_tokens=0)


# ---- methods


@dataclass(frozen=True, kw_only=True)
class Needy(Method):
    name = "needy"

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        return hsa.BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal)


def needing(**attributes: Any) -> Method:
    return type("Needing", (Needy,), attributes)()


@pytest.mark.parametrize(
    ("need", "layout", "fits"),
    [
        ("causal", CAUSAL, True),
        ("causal", VIDEO, False),
        ("bidirectional", VIDEO, True),
        ("bidirectional", CAUSAL, False),
        ("video grid", VIDEO, True),
        ("video grid", CAUSAL, False),
        ("video grid", hsa.TokenLayout.bidirectional(64), False),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_a_method_needs(need: str, layout: hsa.TokenLayout, fits: bool) -> None:
    method, (q, k, _) = needing(needs=frozenset({need})), tensors(q=(1, 2, 64, 8), k=(1, 1, 64, 8))
    found = method.pattern_for(q, k, context(layout))
    assert isinstance(found, hsa.BlockPattern) is fits
    if not fits:
        words = {"causal": "a causal layout", "bidirectional": "a bidirectional layout"}
        wanted = words.get(need, "exactly one video segment with its (frames, height, width)")
        assert found == Decline(f"needy needs {wanted}, got {layout}")


def test_what_a_method_reads() -> None:
    method, full = needing(reads=frozenset({"q", "hidden"})), torch.zeros(1)
    assert method.why_not(context()) == (
        "needy reads the hidden states and queries before positions, which the call has not"
    )
    some = context(inputs=LayerInputs(full, None, None))
    assert method.why_not(some) == "needy reads the queries before positions, which the call has not"
    assert method.why_not(context(inputs=LayerInputs(full, full, None))) is None


@pytest.mark.parametrize("name", METHODS.names())
def test_every_method_says_what_it_needs_of_a_layout(name: str) -> None:
    """By each of its needs alone: a layout that has it not is declined, with that need named."""
    method = METHODS.get(name)(**METHODS.get(name).examples()[0])
    without = {"causal": VIDEO, "bidirectional": CAUSAL, "video grid": hsa.TokenLayout.bidirectional(64)}
    # No layout has it: the model selects.
    without["own selection"] = CAUSAL
    for need in method.needs:
        assert f"{name} needs" in str(method.why_not(context(without[need])))


def test_parameters_of_a_ready_method_and_unknown_ones() -> None:
    ready = METHODS.get("sliding_window")()
    assert make_method(ready, {}) is ready
    assert make_method("sliding_window", {"window": 7}).params()["window"] == 7
    with pytest.raises(TypeError, match="`params` must be empty when `method` is a Method, got window"):
        make_method(ready, {"window": 7})
    with pytest.raises(TypeError, match="`method` must be a name or a Method, got 7 of type int"):
        make_method(7, {})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"method 'sliding_window' takes the parameters .*; got widow"):
        make_method("sliding_window", {"widow": 7})


# ---- dispatch


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": (2, 32, 8)}, ValueError, r"`q` must be \[batch, heads, tokens, dim\], got shape"),
        ({"v": (1, 1, 32, 8, 1)}, ValueError, r"`v` must be \[batch, heads, tokens, dim\], got shape"),
        ({"v": (1, 1, 31, 8)}, ValueError, r"`v` must be \[1, 1, 32\] in batch, heads, tokens like `k`, got"),
        ({"k": (2, 1, 32, 8), "v": (2, 1, 32, 8)}, ValueError, "`k` must have the batch and dim of `q`"),
        ({"k": (1, 1, 32, 7)}, ValueError, "`k` must have the batch and dim of `q`"),
        ({"q": (1, 3, 32, 8), "k": (1, 2, 32, 8), "v": (1, 2, 32, 8)}, ValueError, "heads that divides 3, got 2"),
        ({"k": (1, 0, 32, 8), "v": (1, 0, 32, 8)}, ValueError, "heads that divides 2, got 0"),
    ],
    ids=["axes of q", "axes of v", "tokens of v", "batch of k", "dim of k", "heads", "no heads"],
)
def test_tensors_that_do_not_fit(change: dict[str, Any], error: type[Exception], message: str) -> None:
    dispatch.check_tensors(*tensors())
    with pytest.raises(error, match=message):
        dispatch.check_tensors(*tensors(**change))


def test_tensors_of_other_kinds() -> None:
    q, k, v = tensors()
    with pytest.raises(TypeError, match=r"`k` must be a tensor \[batch, heads, tokens, dim\], got list"):
        dispatch.check_tensors(q, [1], v)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"`q` must be floating point, got torch.int64"):
        dispatch.check_tensors(q.long(), k.long(), v.long())
    with pytest.raises(ValueError, match=r"`v` must be torch.float32 on cpu like `q`, got torch.float16 on cpu"):
        dispatch.check_tensors(q, k, v.half())
    with pytest.raises(ValueError, match=r"`k` must be torch.float32 on cpu like `q`, got torch.float32 on meta"):
        dispatch.check_tensors(q, k.to("meta"), v)
    with pytest.raises(ValueError, match=r"`k` and `v` must be torch.float32 like `q`, got .*float32 and .*float16"):
        dispatch.run_pattern(q, k, v.half(), random_pattern(32, 32), 1.0)


@pytest.mark.parametrize(
    ("sizes", "lead", "message"),
    [
        ((31, 32), {}, "`pattern` must be for 32 queries and 32 keys, got 31 and 32"),
        ((32, 31), {}, "`pattern` must be for 32 queries and 32 keys, got 32 and 31"),
        ((32, 32), {"batch": 2}, "`pattern` must have batch 1 or 1, got 2"),
        ((32, 32), {"heads": 3}, "`pattern` must have heads 1 or 2, got 3"),
    ],
    ids=["queries", "keys", "batch", "heads"],
)
def test_patterns_that_do_not_fit(sizes: tuple[int, int], lead: dict[str, int], message: str) -> None:
    q, k, _ = tensors()
    for fitting in (random_pattern(32, 32), random_pattern(32, 32, heads=2)):
        dispatch.check_pattern(fitting, q, k)
    with pytest.raises(ValueError, match=message):
        dispatch.check_pattern(random_pattern(*sizes, **lead), q, k)


@pytest.fixture
def three(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Backends that answer what they are told: `late` ranks after `early`, `never` is for no device."""
    answers: dict[str, str | None] = {"early": None, "late": None, "never": None}

    def made(name: str, ranks: dict[str, int]) -> type:
        return type(name, (), {"auto_rank": ranks, "why_not": staticmethod(lambda *a: answers[name])})

    entries = {
        "late": made("late", {"cpu": 2}),
        "early": made("early", {"cpu": 1}),
        "never": made("never", {"cuda": 1}),
    }
    BACKENDS.discover()
    monkeypatch.setattr(BACKENDS, "_entries", entries)
    return answers


def test_the_lowest_rank_that_can_run_a_call_is_taken(three: dict[str, Any]) -> None:
    assert backend.auto_order("cpu") == ["early", "late"] and backend.auto_order("meta") == []

    def chosen(name: str = "auto") -> str:
        return backend.choose_backend(name, None, *tensors(), False)[0]

    assert chosen() == "early" and chosen("late") == "late" and chosen("never") == "never"
    three["early"] = "too early"
    assert chosen() == "late"
    with pytest.raises(hsa.BackendUnavailable, match="`backend` 'early' cannot run this call: too early"):
        chosen("early")
    three["late"] = "too late"
    with pytest.raises(hsa.BackendUnavailable, match="no backend can run this call: early: too early; late: too late"):
        chosen()
    with pytest.raises(ValueError, match="`backend` must be one of early, late, never; got 'none'"):
        chosen("none")


@pytest.mark.parametrize("which", range(3))
def test_a_gradient_is_wanted_of_any_of_the_three_where_gradients_are_recorded(
    which: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def choose(*given: Any) -> None:
        asked.append(given[5])
        raise InterruptedError

    monkeypatch.setattr(dispatch, "choose_backend", choose)
    given = list(tensors())
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded), pytest.raises(InterruptedError):
            dispatch.run_pattern(*given, random_pattern(32, 32), 1.0)
    given[which].requires_grad_()
    for recorded in (False, True):
        with torch.set_grad_enabled(recorded), pytest.raises(InterruptedError):
            dispatch.run_pattern(*given, random_pattern(32, 32), 1.0)
    assert asked == [False, False, False, True]


# ---- registries


def registry(check: Any = lambda name, entry: None) -> Registry[Any]:
    made: Registry[Any] = Registry("thing", "hf_sparse_attn.pattern", check)
    made._discovered = True
    return made


@pytest.mark.parametrize("name", ["Upper", "a-b", "", "1a", 7], ids=repr)
def test_names_that_are_none(name: Any) -> None:
    with pytest.raises(ValueError, match="`name` of a thing must be lower-case letters, digits and '_', got"):
        registry().register(name)


def test_a_name_is_taken_once_but_may_be_defined_again() -> None:
    things = registry()
    first = things.register("a_1")(type("First", (), {}))
    again = things.register("a_1")(type("First", (), {}))
    assert things.get("a_1") is again is not first
    with pytest.raises(ValueError, match=r"`name` of a thing must be free, got 'a_1', taken by .*First"):
        things.register("a_1")(type("Second", (), {}))
    with pytest.raises(ValueError, match="`thing` must be one of a_1; got 'b'"):
        things.get("b")
    assert "a_1" in things and "b" not in things and things.names() == ["a_1"]


@pytest.mark.parametrize(
    ("check", "entry", "message"),
    [
        (_check_method, int, "method 'x' must be a subclass of hf_sparse_attn.method.Method"),
        (_check_method, Needy(), "method 'x' must be a subclass"),
        (_check_backend, type("B", (), {"why_not": print}), r"backend 'x' must have a method attention\(\)"),
        (_check_backend, type("B", (), {"attention": print}), r"backend 'x' must have a method why_not\(\)"),
        (
            _check_family,
            type("F", (), {"targets": print, "tiny": print}),
            r"family 'x' must have a method install\(\)",
        ),
        (
            _check_family,
            type("F", (), {"install": print, "tiny": print}),
            r"family 'x' must have a method targets\(\)",
        ),
        (
            _check_family,
            type("F", (), {"targets": print, "install": print}),
            r"family 'x' must have a method tiny\(\)",
        ),
    ],
)
def test_entries_of_the_wrong_form(check: Any, entry: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        registry(check).register("x")(entry)


@pytest.mark.parametrize(
    ("missing", "left_out"),
    [("absent_package", True), ("absent_package.part", True), ("hf_sparse_attn.gone", False), (None, False)],
    ids=str,
)
def test_only_an_absent_package_of_others_leaves_a_file_out(
    missing: str | None, left_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of ours that is broken is an error, not a missing entry."""
    package = ModuleType("things")
    package.__path__ = []  # type: ignore[attr-defined]

    def import_module(name: str) -> ModuleType:
        if name == "things":
            return package
        raise ImportError("gone", name=missing)

    monkeypatch.setattr(pkgutil, "iter_modules", lambda path: [type("File", (), {"name": "one"})])
    monkeypatch.setattr(importlib, "import_module", import_module)
    things: Registry[Any] = Registry("thing", "things", lambda name, entry: None)
    if not left_out:
        with pytest.raises(ImportError, match="gone"):
            things.discover()
        return
    assert things.names() == [] and things.missing == {"one": "needs the package absent_package"}


def test_a_backend_without_ranks_is_taken_by_name_only() -> None:
    entry = type("B", (), {"attention": print, "why_not": print})
    _check_backend("x", entry)
    assert entry.auto_rank == {} and entry.name == "x"
