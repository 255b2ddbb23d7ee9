"""One patched transformer in several threads, in another one, and after exceptions: each forward has its own state."""

from __future__ import annotations

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa
from hf_sparse_attn.cost.judge import Loss, Prediction
from hf_sparse_attn.decision import Decision
from hf_sparse_attn.hosts import diffusers_state
from hf_sparse_attn.hosts.diffusers_model import self_attentions
from hf_sparse_attn.record import Done, LayerRecord
from tests.support import tiny_diffusers, tiny_hunyuan, tiny_wan
from tests.support.tiny_wan import Spy, run

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("diffusers")

THREADS = 4
WINDOW: dict[str, Any] = {"method": "sliding_window", "window": 40, "sink": 0, "block_size": 16, "min_tokens": 0}
RADIAL: dict[str, Any] = {"method": "radial", "block_size": 16, "min_tokens": 0}
TOP: dict[str, Any] = {"method": "block_topk", "density": 0.3, "block_size": 16, "min_tokens": 0}
Inputs = dict[str, Any]


@pytest.fixture(autouse=True)
def nobody_waits_for_its_turn() -> Iterator[None]:
    """Threads take turns after a few operations instead of a few layers."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    assert diffusers_state.innermost() is None


def wan() -> tuple[Any, list[Inputs]]:
    sizes = ((5, 14, 26), (3, 6, 10), (3, 10, 6), (5, 26, 14))
    return tiny_wan.transformer(), [tiny_wan.inputs(latents=size, seed=i) for i, size in enumerate(sizes)]


def hunyuan(kind: str) -> tuple[Any, list[Inputs]]:
    """Padded texts of different lengths, alone and in a batch."""
    rows: tuple[tuple[int, ...], ...] = ((7,), (3,), (12, 5), (5, 12))
    grids = ((3, 7, 9), (3, 9, 7), (3, 7, 9), (2, 7, 9))
    made = [tiny_hunyuan.inputs(kind, *one, seed=i) for i, one in enumerate(zip(rows, grids, strict=True))]
    return tiny_hunyuan.transformer(kind), made


def generic(name: str) -> tuple[Any, list[Inputs]]:
    """Other latents of the same grid, and of another one where that is easily said."""
    model, given = tiny_diffusers.build(name)
    made = [{**given, "hidden_states": given["hidden_states"] + i} for i in range(3)]
    if name == "CogVideoXTransformer3DModel":
        made.append({**given, "hidden_states": given["hidden_states"].mT.contiguous()})
    return model, made


MODELS: dict[str, Callable[[], tuple[Any, list[Inputs]]]] = {
    "wan": wan,
    "hunyuan": lambda: hunyuan("t2v"),
    "hunyuan 1.5": lambda: hunyuan("1.5"),
    "function": lambda: generic("CogVideoXTransformer3DModel"),
    "dispatcher": lambda: generic("LTXVideoTransformer3DModel"),
}


def counted(patch: hsa.Patch, times: int = 1) -> list[Counter[str]]:
    """Sparse calls, dense ones by reason, and runs of backends of each layer, so many times."""
    found = [{"sparse": r.sparse_calls, **r.reasons, **r.backends} for r in patch.report().layers]
    return [Counter({name: n * times for name, n in layer.items()}) for layer in found]


def in_threads(jobs: list[Callable[[], Any]]) -> list[Any]:
    """What jobs give that begin at one time."""
    gate = threading.Barrier(len(jobs))

    def play(job: Callable[[], Any]) -> Any:
        gate.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(play, jobs))


def steps(model: Any, calls: list[Inputs]) -> list[Tensor]:
    """Each call as a step of its own: the first dense, the branches alternating."""
    found = []
    for step, given in enumerate(calls):
        told = {"step_index": step, "num_inference_steps": len(calls)}
        with model.cache_context(("cond", "uncond")[step % 2], **told):
            found.append(run(model, **given))
    return found


@pytest.mark.parametrize("options", [WINDOW, RADIAL, TOP], ids=lambda o: o["method"])
@pytest.mark.parametrize("kind", MODELS)
def test_threads_give_what_one_gives(kind: str, options: dict[str, Any]) -> None:
    """To the bit, and all of it is counted."""
    model, calls = MODELS[kind]()
    with hsa.patch(model, dense_steps=0.2, **options) as patch:
        want = steps(model, calls)
        expected = counted(patch, THREADS)
    assert expected[0]["sparse"] and expected[0].total() > 2 * expected[0]["sparse"]
    with hsa.patch(model, dense_steps=0.2, **options) as patch:
        found = in_threads([lambda: steps(model, calls)] * THREADS)
        assert counted(patch) == expected
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, want, strict=True))


@dataclass(frozen=True, kw_only=True)
class SpyOfThreads(Spy):
    """Notes what it is told by thread."""

    told: dict[int, list[tuple[int, str | None]]] = field(default_factory=dict, compare=False)

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        if ctx.layer == 0:
            self.told.setdefault(threading.get_ident(), []).append((ctx.step, ctx.branch))
        return super().pattern(q, k, ctx)


@pytest.mark.parametrize("kind", ["wan", "function"])
def test_each_thread_counts_its_own_steps(kind: str) -> None:
    """A loop that tells nobody its steps: falls of its own timesteps count, and others' branches are others'."""
    model, calls = MODELS[kind]()
    spy = SpyOfThreads()

    def loop(branch: str | None) -> list[tuple[int, str | None]]:
        for time in (900.0, 900.0, 600.0, 300.0, 950.0):
            given = {**calls[0], "timestep": torch.tensor([time])}
            if branch is None:
                run(model, **given)
            else:
                with model.cache_context(branch):
                    run(model, **given)
        return spy.told[threading.get_ident()]

    branches = [None, "cond", "uncond", None]
    with hsa.patch(model, spy, backend="torch_reference", min_tokens=0):
        found = in_threads([lambda b=b: loop(b) for b in branches])
    assert found == [[(step, branch) for step in (0, 0, 1, 2, 0)] for branch in branches]


def loss_of(model: Any, given: Inputs) -> tuple[Tensor, Tensor]:
    """A loss, and the latents it is of."""
    leaf = given["hidden_states"].clone().requires_grad_()
    return model(**{**given, "hidden_states": leaf}, return_dict=False)[0].square().mean(), leaf


def gradients(model: Any, given: Inputs) -> Tensor:
    """By the latents: threads would add up those of the weights in one place."""
    loss, leaf = loss_of(model, given)
    return torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("kind", MODELS)
def test_backward_in_threads_runs_layers_again_as_they_were(kind: str) -> None:
    model, calls = MODELS[kind]()
    model.enable_gradient_checkpointing()
    model.train()
    with hsa.patch(model, strict=True, **RADIAL):
        want = [gradients(model, given) for given in calls]
        found = in_threads([lambda: [gradients(model, given) for given in calls]] * THREADS)
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, want, strict=True))


def test_backward_in_another_thread() -> None:
    """As on a GPU, where autograd has threads of its own: they know no forward, and the rotary tensor says which."""
    model, calls = wan()
    model.enable_gradient_checkpointing()
    model.train()
    with hsa.patch(model, strict=True, **RADIAL):
        want = [gradients(model, given) for given in calls[:2]]
        losses = [loss_of(model, given) for given in calls[:2]]
        found = in_threads([lambda p=p: torch.autograd.grad(*p)[0] for p in losses])
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))


def test_compiled_layers_in_threads() -> None:
    model, _ = wan()
    calls = [tiny_wan.inputs(seed=i) for i in range(3)]
    torch._dynamo.reset()
    with hsa.patch(model, dense_steps=0.2, **RADIAL) as patch:
        model.compile_repeated_blocks(backend="eager", fullgraph=True)
        want = steps(model, calls)
        expected = counted(patch, 1 + THREADS)
        with torch._dynamo.config.patch(error_on_recompile=True):
            found = in_threads([lambda: steps(model, calls)] * THREADS)
        assert counted(patch) == expected
    assert all(torch.equal(a, b) for got in found for a, b in zip(got, want, strict=True))
    torch._dynamo.reset()


@contextmanager
def raising(module: nn.Module, error: BaseException) -> Iterator[None]:
    """A module that raises before it runs."""

    def hook(*_: Any) -> None:
        raise error

    handle = module.register_forward_pre_hook(hook)
    try:
        with pytest.raises(type(error)):
            yield
    finally:
        handle.remove()


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt()], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("where", ["in a layer", "between layers"])
@pytest.mark.parametrize("kind", MODELS)
def test_an_exception_leaves_no_state(kind: str, where: str, error: BaseException) -> None:
    model, calls = MODELS[kind]()
    attention = self_attentions(model)[-1][1]
    projection = attention.to_out[0] if attention.to_out is not None else attention.to_q
    with hsa.patch(model, **WINDOW):
        want = run(model, **calls[1])
        with raising(projection if where == "in a layer" else attention, error):
            run(model, **calls[0])
        if isinstance(error, Exception):
            assert diffusers_state.innermost() is None
        # After an interrupt torch calls no hook; the next forward ends what it left.
        assert torch.equal(run(model, **calls[1]), want)
        assert diffusers_state.innermost() is None


def test_a_recomputation_that_stops_in_the_middle_leaves_nothing_to_the_next() -> None:
    """Backward asks for no more than it needs: it leaves a block, perhaps within its attention, by an exception."""
    model, calls = wan()
    model.enable_gradient_checkpointing()
    model.train()
    with hsa.patch(model, strict=True, **RADIAL):
        want = gradients(model, calls[1])
        losses = [loss_of(model, given) for given in calls[:2]]
        with raising(model.blocks[1].attn1.to_out[0], RuntimeError("stop")):
            torch.autograd.grad(*losses[0])
        assert torch.equal(torch.autograd.grad(*losses[1])[0], want)


@pytest.mark.parametrize("place", ["between layers", "in a layer"])
@pytest.mark.parametrize("inner", MODELS)
@pytest.mark.parametrize("outer", ["wan", "hunyuan", "function"])
def test_a_forward_inside_of_a_forward(outer: str, inner: str, place: str) -> None:
    model, calls = MODELS[outer]()
    other, others = MODELS[inner]()
    blocks = self_attentions(model)
    module = blocks[0][1].to_q if place == "in a layer" else blocks[-1][1]
    found: list[Tensor] = []
    with hsa.patch(model, strict=True, **RADIAL) as first, hsa.patch(other, strict=True, **TOP) as second:
        want, wanted = run(model, **calls[0]), run(other, **others[1])
        expected = counted(first, 2), counted(second, 2)
        handle = module.register_forward_pre_hook(lambda *_: found.append(run(other, **others[1])))
        assert torch.equal(run(model, **calls[0]), want)
        handle.remove()
        assert len(found) == 1 and torch.equal(found[0], wanted)
        assert (counted(first), counted(second)) == expected


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_experts_of_one_patch_inside_of_one_another(compiled: bool) -> None:
    """Two transformers of one pipeline share a patch, but no forward."""
    pipe = tiny_wan.pipeline("experts")
    one, two = tiny_wan.inputs(latents=(3, 6, 10)), tiny_wan.inputs(latents=(5, 4, 6))
    with hsa.patch(pipe, strict=True, **RADIAL):
        want, wanted = run(pipe.transformer, **one), run(pipe.transformer_2, **two)
        found: list[Tensor] = []

        @torch.compiler.disable
        def hook(*_: Any) -> None:
            found.append(run(pipe.transformer_2, **two))

        handle = pipe.transformer.blocks[1].register_forward_pre_hook(hook)
        if compiled:
            torch._dynamo.reset()
            pipe.transformer.compile_repeated_blocks(backend="eager")
        assert torch.equal(run(pipe.transformer, **one), want) and torch.equal(found[0], wanted)
        handle.remove()


def test_no_count_is_lost() -> None:
    record, times = LayerRecord("layer", 0), 5000

    def count() -> None:
        for _ in range(times):
            record.count_sparse([Done(torch.zeros(()), torch.zeros(()), density, 2.0) for density in (0.25, 0.75)])
            record.count_dense(Decision("short"))
            record.count_dense(Decision(Loss("predicted", Prediction(1.0, 2.0, 3.0))))
            record.count_exact(3, 1, "fused")

    in_threads([count] * THREADS)
    calls = times * THREADS
    found = record.report(None)
    assert (found.sparse_calls, found.density, found.predicted_gain) == (calls, 0.5, 2.0)
    assert (list(found.reasons.values()), found.exact_calls) == ([calls, calls], calls)
    assert found.backends == {"fused": calls}
