"""Four tiny models as a server has them: several threads run them, and patches come and go meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import hf_sparse_attn as hsa

# Two ways to be sparse, besides the dense one.
SETTINGS: dict[str, dict[str, Any]] = {
    "window": {"method": "sliding_window", "window": 24, "sink": 3, "block_size": 16, "min_tokens": 0, "strict": True},
    "top": {"method": "block_topk", "density": 0.3, "block_size": 16, "min_tokens": 0, "strict": True},
}
DENSE = "dense"


@dataclass
class Served:
    """A model with calls of several shapes, and what each of them gives, dense and by each of the settings.

    Args:
        model: the model.
        layer: a part of it that runs in the middle of a forward.
        calls: arguments.
        first: the first tensor of what the model gives.
    """

    model: Any
    layer: nn.Module
    calls: list[dict[str, Any]]
    first: Callable[[Any], Tensor]
    right: dict[str, list[Tensor]] = field(default_factory=dict)

    @torch.no_grad()
    def run(self, call: int) -> Tensor:
        """One forward."""
        return self.first(self.model(**self.calls[call]))

    def patch(self, setting: str) -> hsa.Patch:
        """Puts a setting on."""
        return hsa.patch(self.model, **SETTINGS[setting])

    def learn(self) -> Served:
        """Finds out in one thread what is right."""
        self.right[DENSE] = [self.run(i) for i in range(len(self.calls))]
        for name in SETTINGS:
            with self.patch(name):
                self.right[name] = [self.run(i) for i in range(len(self.calls))]
        for a, b in ((DENSE, "window"), (DENSE, "top"), ("window", "top")):
            if any(torch.equal(x, y) for x, y in zip(self.right[a], self.right[b], strict=True)):
                raise RuntimeError(f"{type(self.model).__name__} gives the same {a} and {b}")
        return self

    def found(self, call: int, output: Tensor) -> list[str]:
        """The settings for which an output is the right one."""
        return [name for name, outputs in self.right.items() if torch.equal(output, outputs[call])]


def _llama() -> Served:
    from tests.support.tiny_lm import FAMILIES, padded, tokens

    model = FAMILIES["llama"]("sdpa")
    ids, mask, _ = padded([70, 111], "left")
    calls = [{"input_ids": tokens(1, 90)}, {"input_ids": tokens(2, 133, seed=1)}]
    calls.append({"input_ids": ids, "attention_mask": mask})
    return Served(model, model.model.layers[1], calls, lambda out: out.logits)


def _wan() -> Served:
    from tests.support import tiny_wan

    model = tiny_wan.transformer()
    sizes = ((5, 14, 26), (3, 6, 10), (3, 10, 6))
    calls = [{**tiny_wan.inputs(latents=size, seed=i), "return_dict": False} for i, size in enumerate(sizes)]
    return Served(model, model.blocks[1].attn1, calls, lambda out: out[0])


def _vit() -> Served:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2,
        image_size=64, patch_size=8, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = transformers.ViTModel(config, add_pooling_layer=False).eval()
        images = [
            torch.randn(batch, 3, height, width) for batch, height, width in ((1, 48, 88), (1, 88, 48), (2, 64, 72))
        ]
    calls = [{"pixel_values": one, "interpolate_pos_encoding": True} for one in images]
    layer = next(m for name, m in model.named_modules() if name.endswith("1.attention"))
    return Served(model, layer, calls, lambda out: out.last_hidden_state)


def _qwen_vl() -> Served:
    from tests.support.tiny_qwen import prompt, tiny_qwen

    model = tiny_qwen("qwen2_5_vl")
    pieces: list[list[Any]] = [[9, (2, 4, 6), 30, (3, 5), 20], [60, (4, 6), 40], [12, (3, 5, 4), 33]]
    calls = [prompt("qwen2_5_vl", one, seed=i) for i, one in enumerate(pieces)]
    return Served(model, model.model.language_model.layers[1], calls, lambda out: out.logits)


MODELS: dict[str, Callable[[], Served]] = {"llama": _llama, "wan": _wan, "vit": _vit, "qwen_vl": _qwen_vl}


class InTheMiddle:
    """A forward in a thread of its own that waits in the middle of the model until it is told to go on.

    Args:
        served: the model.
        call: which of its calls.
    """

    def __init__(self, served: Served, call: int = 0) -> None:
        self._there, self._go = threading.Event(), threading.Event()
        self._output: Tensor | Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(served, call))
        self._handle = served.layer.register_forward_pre_hook(self._wait)
        self._thread.start()
        if not self._there.wait(60):
            raise RuntimeError("the forward did not come to the middle")

    def _wait(self, *_: Any) -> None:
        if threading.current_thread() is self._thread:
            self._there.set()
            self._go.wait(60)

    def _run(self, served: Served, call: int) -> None:
        try:
            self._output = served.run(call)
        except Exception as error:
            self._output = error
        finally:
            self._there.set()

    def end(self) -> Tensor:
        """Lets it go on to its end; what it gave."""
        self._go.set()
        self._thread.join()
        self._handle.remove()
        if not isinstance(self._output, Tensor):
            raise self._output or RuntimeError("no output")
        return self._output


@contextmanager
def quick_turns() -> Any:
    """Within it threads take turns after a few operations."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def learnt(name: str) -> Served:
    """One of the models, and what is right of it, found out with one thread of torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    made = MODELS[name]().learn()
    torch.set_num_threads(before)
    return made
