"""With the defaults, equal calls are equally sparse: whatever ran before, however long it took, in training or not."""

from __future__ import annotations

import itertools
import random
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.report import LayerReport

pytestmark = pytest.mark.usefixtures("one_thread")

diffusers = pytest.importorskip("diffusers")

# Latents of 720 and 320 tokens, the same turned, and two of the first.
SHAPES = ((1, 5, 24, 24), (1, 5, 16, 16), (1, 5, 12, 48), (2, 5, 24, 24))


def model() -> Any:
    sizes: dict[str, Any] = dict(num_attention_heads=4, attention_head_dim=64, ffn_dim=64, text_dim=32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.WanTransformer3DModel(num_layers=2, rope_max_seq_len=128, **sizes).eval()


def video(shape: tuple[int, ...]) -> Tensor:
    made = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape[0], 16, *shape[1:], generator=made)


@torch.no_grad()
def run(wan: Any, shape: tuple[int, ...]) -> bytes:
    text, step = torch.ones(shape[0], 8, 32), torch.full((shape[0],), 500)
    return bytes(wan(video(shape), step, text, return_dict=False)[0].numpy().tobytes())


def choices(layers: list[LayerReport]) -> list[tuple[bool, bool]]:
    return [(layer.sparse_calls > 0, layer.dense_calls > 0) for layer in layers]


@pytest.mark.parametrize("method", ["svg", "vsa", "xattention", "block_topk"])
def test_the_order_of_calls_and_the_clock_decide_nothing(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    wan, found = model(), {shape: set() for shape in SHAPES}
    for order in itertools.islice(itertools.permutations(SHAPES), 0, 24, 7):
        with hsa.patch(wan, method):
            for shape in (*order, *order):
                found[shape].add(run(wan, shape))
        # A machine that is now fast, now slow.
        draw = random.Random(len(order))
        for name in ("perf_counter", "thread_time", "process_time", "monotonic"):
            monkeypatch.setattr(time, name, draw.random)
    assert [len(outputs) for outputs in found.values()] == [1] * len(SHAPES)


@pytest.mark.parametrize("method", ["svg", "block_topk"])
def test_training_and_threads_decide_nothing(method: str) -> None:
    wan, seen = model(), []
    for how in ("eval", "train", "threads", "gradients"):
        wan.train(how == "train")
        torch.set_num_threads(2 if how == "threads" else 1)
        with hsa.patch(wan, method) as patch, torch.set_grad_enabled(how == "gradients"):
            wan(video(SHAPES[0]), torch.tensor([500]), torch.ones(1, 8, 32))
            seen.append(choices(patch.report().layers))
        torch.set_num_threads(1)
    assert seen == [seen[0]] * 4


def test_a_graph_decides_as_the_model_does() -> None:
    wan = model()
    with hsa.patch(wan, "svg") as patch:
        run(wan, SHAPES[0])
        eager = choices(patch.report().layers)
    torch._dynamo.reset()
    with hsa.patch(wan, "svg") as patch:
        wan.compile_repeated_blocks(backend="eager")
        run(wan, SHAPES[0])
        assert choices(patch.report().layers) == eager
    torch._dynamo.reset()
