"""The suite of layers: one attention layer of a tiny model, and the model around it, patched against unpatched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from hf_sparse_attn.api import patch
from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.bench.patterns import scaled, video_grid
from hf_sparse_attn.cost.timing import FEWEST_ROUNDS, clock, failure, summary
from hf_sparse_attn.extras import need
from hf_sparse_attn.method import Method
from hf_sparse_attn.registry import METHODS

_LONG = 8192
UNPATCHED = "unpatched"
# What the dispatcher may cost where it chooses, in units of dense attention.
AUTO_LIMIT = 1.02


class Built(NamedTuple):
    """A tiny model: the module, one forward of it, its tokens, and its last self-attention layer."""

    module: nn.Module
    forward: Callable[[], Any]
    tokens: int
    attention: nn.Module


def layers(options: Options) -> list[dict[str, Any]]:
    """One attention layer with its projections in a tiny random model, unpatched against every method.

    Methods are as sparse as `options.min_tokens` allows, their parameters that count tokens scaled to the length. With
    "auto" the dispatcher chooses, and every method has its defaults.

    What counts is `ratio`, the median over the rounds of patched over unpatched seconds in the same round; `within`
    says whether it is at most 1.02, `forward_ratio` is that of the whole model. The method "dense" among them shows
    what the patch itself costs.
    """
    points = [(tokens, name) for tokens in options.tokens for name in _MODELS]
    return [record for point in tqdm(points, "layers", disable=None) for record in _point(options, *point)]


class _Contestant:
    """One method on one model: its patch is on only while it runs."""

    def __init__(self, built: Built, method: Method | None, options: Options) -> None:
        self.built, self.method, self.options = built, method, options
        # Seconds of the attention layer and of the whole forward; the first run does not count.
        self.runs: list[tuple[float, float]] = []
        self.ratios: list[tuple[float, float]] = []
        self.report: Any = None

    def run(self) -> tuple[float, float]:
        """Runs the model once; seconds of its attention layer, and all."""
        if self.method is None:
            return self._forward()
        with patch(self.built.module, self.method, min_tokens=self.options.min_tokens) as made:
            seconds = self._forward()
            self.report = made.report()
        return seconds

    def _forward(self) -> tuple[float, float]:
        now = clock(self.options.where)
        with _stopwatch(self.built.attention, now) as seconds:
            begin = now()
            self.built.forward()
            self.runs.append((sum(seconds), now() - begin))
        return self.runs[-1]

    def record(self) -> dict[str, Any]:
        """What a record has beside the point."""
        first, *seconds = (attention for attention, _ in self.runs)
        found = {"reason": None, "seconds": seconds, **summary(seconds), "warmup_seconds": first}
        if self.method is None:
            return found
        ratios, whole = (sorted(part) for part in zip(*self.ratios, strict=True))
        layers = self.report.layers
        gains = [layer.predicted_gain for layer in layers if layer.predicted_gain is not None]
        return {
            **found,
            "density": self.report.density,
            "params": self.report.params,
            "sparse_calls": sum(layer.sparse_calls for layer in layers),
            "dense_calls": sum(layer.dense_calls for layer in layers),
            "predicted_gain": sum(gains) / len(gains) if gains else None,
            "backends": sorted({b for layer in layers for b in layer.backends}),
            "dense_because": sorted({r for layer in layers for r in layer.reasons}),
            "ratio": median(ratios),
            "ratios": ratios,
            "forward_ratio": median(whole),
            "speedup": 1 / median(ratios),
            "within": median(ratios) <= AUTO_LIMIT,
            "sparse_last": any(layer.sparse_calls for layer in layers),
        }


def _point(options: Options, tokens: int, model: str) -> Iterator[dict[str, Any]]:
    """The records of one model and length: each method's run stands between two of the unpatched layer."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Of short inputs the last of two layers is timed: in the first one a patched model makes its mask, which an
        # unpatched one makes before. Of long ones that is nothing.
        built = _MODELS[model](options, tokens, 2 if tokens < _LONG // 2 else 1)
    point = {"model": model, "tokens": tokens, "heads": options.heads, "dim": options.dims[0]}
    point["dtype"] = options.dtypes[0]
    if isinstance(built, str):
        yield {**point, "contestant": UNPATCHED, "reason": built}
        return
    point["tokens"] = built.tokens
    reasons: dict[str, str] = {}
    contestants = {UNPATCHED: _Contestant(built, None, options)}
    for name, cls in METHODS.items():
        try:
            method = cls() if options.min_tokens == "auto" else scaled(cls, built.tokens)
            with patch(built.module, method):
                contestants[name] = _Contestant(built, method, options)
        except (TypeError, ValueError) as error:
            reasons[name] = str(error)
    for name, contestant in list(contestants.items()):
        try:
            contestant.run()
        # A method that breaks must not take the others' numbers with it.
        except Exception as error:
            reasons[name] = failure(error)
            del contestants[name]
    unpatched = contestants[UNPATCHED]
    begin = time.perf_counter()
    for done in range(options.repeats):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        before = unpatched.run()
        for contestant in contestants.values():
            if contestant is not unpatched:
                own, after = contestant.run(), unpatched.run()
                # The mean of the runs before and after takes out a drift of the machine's speed.
                contestant.ratios.append((2 * own[0] / (before[0] + after[0]), 2 * own[1] / (before[1] + after[1])))
                before = after
    for name, contestant in contestants.items():
        yield {**point, "contestant": name, **contestant.record()}
    for name, reason in reasons.items():
        yield {**point, "contestant": name, "reason": reason}


@contextmanager
def _stopwatch(layer: nn.Module, now: Callable[[], float]) -> Iterator[list[float]]:
    """Seconds of every call of a module while it is open, what its own hooks do included."""
    seconds: list[float] = []
    begun: list[float] = []
    handles = [
        layer.register_forward_pre_hook(lambda *_: begun.append(now()), prepend=True),
        layer.register_forward_hook(lambda *_: seconds.append(now() - begun.pop())),
    ]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


def _llama(options: Options, tokens: int, num_layers: int) -> Built | str:
    from transformers import LlamaConfig, LlamaModel

    width = options.heads * options.dims[0]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=num_layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.heads,
        head_dim=options.dims[0],
        max_position_embeddings=tokens,
    )
    module: Any = LlamaModel(config).eval().to(options.where, options.dtype)
    ids = torch.randint(3, 256, (1, tokens), device=options.where)
    return Built(module, lambda: module(input_ids=ids, use_cache=False), tokens, module.layers[-1].self_attn)


def _wan(options: Options, tokens: int, num_layers: int) -> Built | str:
    if find_spec("diffusers") is None:
        return need("diffusers")
    from diffusers import WanTransformer3DModel

    frames, height, width = video_grid(tokens)
    module: Any = WanTransformer3DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.dims[0],
        num_layers=num_layers,
        ffn_dim=2 * options.heads * options.dims[0],
        text_dim=32,
        rope_max_seq_len=max(64, frames),
    )
    module = module.eval().to(options.where)
    # As from_pretrained(torch_dtype=...) does: the model keeps some of its modules in float32.
    exact = set(module._keep_in_fp32_modules or ())
    for name, weight in module.named_parameters():
        if not exact & set(name.split(".")):
            weight.data = weight.data.to(options.dtype)
    # Patches of 1 x 2 x 2: the latents are twice as high and wide as the grid of tokens.
    inputs = {
        "hidden_states": torch.randn(1, 16, frames, 2 * height, 2 * width).to(options.where, options.dtype),
        "timestep": torch.tensor([500], device=options.where),
        "encoder_hidden_states": torch.randn(1, 16, 32).to(options.where, options.dtype),
    }
    return Built(module, lambda: module(**inputs), frames * height * width, module.blocks[-1].attn1)


_MODELS: dict[str, Callable[[Options, int, int], Built | str]] = {"llama prefill": _llama, "wan step": _wan}
