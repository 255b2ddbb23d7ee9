"""What belongs to one call is its own: in threads, tasks, nested calls and replicas."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa
from tests.support import tiny_encoders
from tests.support.served import DENSE, MODELS, SETTINGS, Served, learnt, quick_turns
from tests.support.tiny_lm import FAMILIES as TEXT
from tests.support.tiny_lm import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

pytest.importorskip("diffusers")


@pytest.fixture(scope="module", params=MODELS)
def served(request: Any) -> Served:
    return learnt(request.param)


def test_threads_with_shapes_of_their_own(served: Served) -> None:
    jobs = [0, 1, 2] * 8
    with served.patch("top"), ThreadPoolExecutor(4) as pool, quick_turns():
        found = list(pool.map(served.run, jobs))
    assert [served.found(call, out) for call, out in zip(jobs, found, strict=True)] == [["top"]] * len(jobs)


def test_a_call_inside_of_a_call(served: Served) -> None:
    """Of another shape: what the outer one goes on with is its own."""
    found: list[Tensor] = []

    def inside(*_: Any) -> None:
        if not found:
            found.append(torch.empty(0))
            found[0] = served.run(1)

    with served.patch("top"):
        handle = served.layer.register_forward_pre_hook(inside)
        outer = served.run(0)
        handle.remove()
    assert served.found(1, found[0]) == ["top"] and served.found(0, outer) == ["top"]


def test_tasks_pause_for_themselves(served: Served) -> None:
    async def serve(patch: hsa.Patch, paused: bool) -> list[str]:
        if not paused:
            await asyncio.sleep(0)
            return served.found(0, served.run(0))
        with patch.paused():
            await asyncio.sleep(0)
            found = served.found(0, served.run(0))
            await asyncio.sleep(0)
            assert served.found(1, served.run(1)) == [DENSE]
            # Into a thread the pause goes along.
            assert served.found(1, await asyncio.to_thread(served.run, 1)) == [DENSE]
        return found

    async def both() -> list[list[str]]:
        with served.patch("window") as patch:
            return await asyncio.gather(*(serve(patch, paused) for paused in (True, False, True, False)))

    assert asyncio.run(both()) == [[DENSE], ["window"], [DENSE], ["window"]]


def copies(model: nn.Module, number: int) -> list[Any]:
    """Replicas as nn.DataParallel makes them, but all on the CPU, with the parameters themselves."""
    made: list[Any] = [[] for _ in range(number)]
    modules = list(model.modules())
    index = {module: i for i, module in enumerate(modules)}
    for module in modules:
        for replica in made:
            replica.append(module._replicate_for_data_parallel())
    for i, module in enumerate(modules):
        for replica in made:
            for name, child in module._modules.items():
                replica[i]._modules[name] = None if child is None else replica[index[child]]
            replica[i]._parameters, replica[i]._buffers = dict(module._parameters), dict(module._buffers)
    return [replica[0] for replica in made]


def test_replicas_run_as_the_model(served: Served) -> None:
    with served.patch("top") as patch:
        replicas = copies(served.model, 3)

        @torch.no_grad()
        def run(call: int) -> Tensor:
            return served.first(replicas[call](**served.calls[call]))

        with ThreadPoolExecutor(3) as pool, quick_turns():
            found = list(pool.map(run, range(3)))
        assert [served.found(i, out) for i, out in enumerate(found)] == [["top"]] * 3
        assert sum(layer.sparse_calls for layer in patch.report().layers) >= 6


# ---------------------------------------------------------------------- encoders


def test_grids_of_one_size_are_not_mixed_up() -> None:
    """Images of as many patches, high and wide, in two threads: the grid says which tokens are neighbours."""
    model = MODELS["vit"]()
    opened = model.calls[0]["pixel_values"], model.calls[1]["pixel_values"]
    calls = [{"pixel_values": image, "interpolate_pos_encoding": True} for image in opened]
    with hsa.patch(model.model, "radial", block_size=16, min_tokens=0, strict=True), torch.no_grad():
        want = [model.first(model.model(**call)) for call in calls]

        def run(i: int) -> bool:
            with torch.no_grad():
                return torch.equal(model.first(model.model(**calls[i])), want[i])

        with ThreadPoolExecutor(4) as pool, quick_turns():
            assert all(pool.map(run, [0, 1] * 20))


def test_embeddings_have_no_grid_of_a_call_before() -> None:
    """The grid of a forward ends with it: tokens that come without an image are no video."""
    model = MODELS["vit"]().model
    seen: list[Any] = []
    with hsa.patch(model, "block_topk", density=0.5, block_size=16, min_tokens=0) as patch:
        patch.session.watcher = lambda q, k, v, ctx, out: seen.append(ctx.layout.video_part)
        with torch.no_grad():
            image = torch.randn(1, 3, 64, 64)
            model(pixel_values=image)
            hidden = model.embeddings(image)
            handle = model.embeddings.register_forward_hook(lambda *_: hidden)
            model(pixel_values=torch.randn(1, 3, 64, 64))
            handle.remove()
    assert seen[0] is not None and len(seen) >= 4


@dataclass(frozen=True, kw_only=True)
class ByHidden(hsa.Method):
    """Keeps the half of the key blocks that the layer's hidden states name."""

    name = "by_hidden"
    reads = frozenset({"hidden"})

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        hidden, n = ctx.inputs.hidden[0], ctx.layout.kv_len
        blocks = torch.stack([part.sum() for part in hidden.split(16)])
        keep = (blocks >= blocks.median()) | torch.eye(len(blocks), dtype=torch.bool)
        return hsa.BlockPattern.from_block_map(keep[None, None], 16, 16, n, n, causal=True)


def test_what_a_method_reads_is_of_the_same_call() -> None:
    """Hidden states are kept by forward: other threads' are of other tokens."""
    model = TEXT["llama"]("sdpa")
    ids = [tokens(1, n, seed=n) for n in (90, 90, 131)]
    with hsa.patch(model, ByHidden(), min_tokens=0, strict=True), torch.no_grad():
        want = [model(one).logits for one in ids]

        def run(i: int) -> bool:
            with torch.no_grad():
                return torch.equal(model(ids[i]).logits, want[i])

        with ThreadPoolExecutor(4) as pool, quick_turns():
            assert all(pool.map(run, [0, 1, 2] * 10))


@pytest.mark.parametrize("family", ["bart", "whisper"])
def test_encoder_decoders_in_threads(family: str) -> None:
    model = tiny_encoders.ENCODERS[family]("sdpa")
    calls = [tiny_encoders.inputs(family, batch) for batch in (1, 2)]
    with hsa.patch(model, "block_topk", density=0.4, block_size=16, min_tokens=0), torch.no_grad():
        want = [tiny_encoders.output(model, one) for one in calls]

        def run(i: int) -> bool:
            with torch.no_grad():
                return torch.equal(tiny_encoders.output(model, calls[i]), want[i])

        with ThreadPoolExecutor(4) as pool, quick_turns():
            assert all(pool.map(run, [0, 1] * 10))


# ---------------------------------------------------------------------- masks


def test_masks_made_ahead_outlive_the_patch() -> None:
    """generate() makes them before the forward that they are for."""
    from transformers.masking_utils import create_causal_mask

    model, ids = TEXT["llama"]("sdpa"), tokens(1, 90)
    with torch.no_grad():
        before = model(ids).logits
        with hsa.patch(model, **SETTINGS["window"]):
            embeds = model.get_input_embeddings()(ids)
            mask = create_causal_mask(model.config, embeds, torch.ones_like(ids), past_key_values=None)
        assert torch.equal(model(ids, attention_mask=mask).logits, before)
    del mask
    assert model.config._attn_implementation == "sdpa"


def test_no_mask_of_ours_reaches_a_function_that_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    own, given = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def look(module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        given.append(mask)
        return own(module, q, k, v, mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", look)
    served = MODELS["llama"]()
    stop = threading.Event()

    def switch() -> None:
        while not stop.is_set():
            hsa.patch(served.model, **{**SETTINGS["window"], "strict": False}).remove()

    thread = threading.Thread(target=switch)
    with quick_turns():
        thread.start()
        for i in range(60):
            served.run(i % 3)
        stop.set()
        thread.join()
    assert given and all(mask is None or type(mask) is Tensor for mask in given)


# ---------------------------------------------------------------------- first use

_FIRST = """
import threading, torch
torch.set_num_threads(1)
import hf_sparse_attn as hsa
from tests.support.served import MODELS, SETTINGS
from tests.support.tiny_lm import FAMILIES, tokens
models = [MODELS["{kind}"]() for _ in range(4)]
wrong, gate = [], threading.Barrier(4)
def serve(i):
    gate.wait()
    try:
        {how}
    except Exception as error:
        wrong.append(f"{{type(error).__name__}}: {{error}}")
threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert not wrong, wrong
"""
_HOWS = {
    "patch": 'models[i].patch("top"); models[i].run(0)',
    "native": 'models[0].model.set_attn_implementation("hsa:block_topk"); models[0].run(0)',
    "function": 'hsa.attention(*torch.randn(3, 1, 2, 300, 16), "block_topk")',
    "names": 'assert len(hsa.list_methods()) > 5 and hsa.get_method("radial")',
}


@pytest.mark.slow
@pytest.mark.parametrize("how", _HOWS)
def test_the_first_use_may_be_in_many_threads(how: str) -> None:
    code = _FIRST.format(kind="llama", how=_HOWS[how])
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
