"""The suites that run models: attention layers and whole tiny models, patched against unpatched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.bench.options import Options
from hf_sparse_attn.bench.patterns import scaled, video_grid
from hf_sparse_attn.cost.judge import LOSSES
from hf_sparse_attn.cost.timing import FEWEST_ROUNDS, clock, failure, in_turns, summary
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import METHODS

_LAYERS = 2
_LONG = 8192
UNPATCHED = "unpatched"
# What the dispatcher may cost where it chooses, in units of dense attention.
AUTO_LIMIT = 1.02
# Calls before those that count: by then a method that does not pay is left alone.
_LEARNING = 6


class Built(NamedTuple):
    """A tiny model: the module, one forward of it, its tokens, and its last self-attention layer."""

    module: nn.Module
    forward: Callable[[], Any]
    tokens: int
    attention: nn.Module


def model(options: Options) -> list[dict[str, Any]]:
    """A whole forward of tiny random models, unpatched against every method through `patch()` with its own policy.

    The method "dense" among them shows what the patch itself costs.
    """
    return [record for point, built in _points(options) for record in _model_point(options, point, built)]


def layers(options: Options) -> list[dict[str, Any]]:
    """One attention layer with its projections in a tiny model, unpatched against every method, forced to be sparse.

    Parameters that count tokens are scaled to the length.
    """
    return [
        record
        for point, built in _points(options)
        for record in _layer_point(options, point, built, scaled, {"min_tokens": 0})
    ]


def auto(options: Options) -> list[dict[str, Any]]:
    """One attention layer unpatched against every method with its defaults, where the dispatcher chooses.

    Above 8,192 tokens with half of the heads: the CPU takes long.

    What counts is `ratio`, the median over the rounds of patched over unpatched seconds in the same round, after
    some calls from which the dispatcher learns; `within` says whether it is at most 1.02.
    """
    return [
        record
        for point, built in _points(options)
        for record in _layer_point(options, point, built, lambda cls, tokens: cls(), {})
    ]


def _points(options: Options) -> Iterator[tuple[dict[str, Any], Built | str]]:
    """Every model and length: what its records share, and the model or why there is none."""
    for tokens in options.tokens:
        halved = options.suite == "auto" and tokens > _LONG
        own = replace(options, heads=max(1, options.heads // 2)) if halved else options
        # Of short inputs the last of two layers is timed: in the first one a patched model makes its mask, which an
        # unpatched one makes before. Of long ones that is nothing.
        num_layers = _LAYERS if options.suite == "model" or tokens < _LONG // 2 else 1
        for name, build in _MODELS.items():
            with torch.random.fork_rng():
                torch.manual_seed(0)
                built = build(own, tokens, num_layers)
            there = tokens if isinstance(built, str) else built.tokens
            point = {"model": name, "tokens": there, "heads": own.heads, "dim": options.dims[0]}
            yield {**point, "dtype": options.dtypes[0]}, built


def _model_point(options: Options, point: dict[str, Any], built: Built | str) -> Iterator[dict[str, Any]]:
    """The records of one model and length."""
    if isinstance(built, str):
        yield {**point, "contestant": UNPATCHED, "reason": built}
        return
    calls: dict[str, Callable[[], Any]] = {UNPATCHED: built.forward}
    reports: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, method in _methods(built, scaled, reasons):
        calls[name] = _patched(built.module, method, built.forward, name, reports)
    times, failed = in_turns(calls, options, f"{point['model']} {point['tokens']}")
    reasons.update(failed)
    for name in [*times, *reasons]:
        record = {**point, "contestant": name, **times.get(name, {}), "reason": reasons.get(name)}
        if name in times and UNPATCHED in times:
            record["speedup"] = times[UNPATCHED]["median"] / times[name]["median"]
        if name in times and name in reports:
            record.update(_told(reports[name]))
        yield record


def _methods(
    built: Built, make: Callable[[type[Method], int], Method], reasons: dict[str, str]
) -> Iterator[tuple[str, Method]]:
    """The methods that apply to a model; the reasons of the others are noted."""
    for name, cls in METHODS.items():
        try:
            method = make(cls, built.tokens)
            with patch(built.module, method):
                pass
        except (TypeError, ValueError) as error:
            reasons[name] = str(error)
            continue
        yield name, method


def _told(report: Any) -> dict[str, Any]:
    """What a report says, for a record."""
    layers = report.layers
    calls = [layer.predicted_gain for layer in layers if layer.predicted_gain is not None]
    return {
        "density": report.density,
        "params": report.params,
        "sparse_calls": sum(layer.sparse_calls for layer in layers),
        "dense_calls": sum(layer.dense_calls for layer in layers),
        "predicted_gain": sum(calls) / len(calls) if calls else None,
        "backends": sorted({b for layer in layers for b in layer.backends}),
        "dense_because": sorted({r for layer in layers for r in layer.reasons}),
    }


def _patched(
    module: nn.Module, method: Method, forward: Callable[[], Any], name: str, reports: dict[str, Any]
) -> Callable[[], Any]:
    def call() -> None:
        with patch(module, method) as made:
            forward()
            reports[name] = made.report()

    return call


@contextmanager
def _stopwatch(layer: nn.Module, device: torch.device) -> Iterator[list[float]]:
    """Seconds of every call of a module while it is open, what its own hooks do included."""
    seconds: list[float] = []
    begun: list[float] = []
    now = clock(device)

    def start(*_: Any) -> None:
        begun.append(now())

    def stop(*_: Any) -> None:
        seconds.append(now() - begun.pop())

    handles = [layer.register_forward_pre_hook(start, prepend=True), layer.register_forward_hook(stop)]
    try:
        yield seconds
    finally:
        for handle in handles:
            handle.remove()


class _Contestant:
    """One method on one model: its patch is on only while it runs, and keeps what it has learned."""

    def __init__(self, built: Built, method: Method | None, policy: dict[str, Any], device: torch.device) -> None:
        self.built, self.method, self.policy, self.device = built, method, policy, device
        self.seconds: list[float] = []
        self.first: list[float] = []
        self.before: Patch | None = None
        self.reports: list[Any] = []

    def run(self) -> float:
        """Seconds of the attention layer in one forward of the model."""
        if self.method is None:
            return self._forward()
        with patch(self.built.module, self.method, **self.policy) as made:
            if self.before is not None:
                known = self.before.session
                made.session.judge = known.judge
                for name, record in made.session.records.items():
                    record.by_shape = known.records[name].by_shape
            self.before = made
            seconds = self._forward()
            self.reports.append(made.report())
        return seconds

    def _forward(self) -> float:
        with _stopwatch(self.built.attention, self.device) as seconds:
            self.built.forward()
        return sum(seconds)


def _layer_point(
    options: Options,
    point: dict[str, Any],
    built: Built | str,
    make: Callable[[type[Method], int], Method],
    policy: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """The records of one layer and length: each method's run stands between two of the unpatched layer."""
    if isinstance(built, str):
        yield {**point, "contestant": UNPATCHED, "reason": built}
        return
    reasons: dict[str, str] = {}
    contestants = {UNPATCHED: _Contestant(built, None, {}, options.where)}
    for name, method in _methods(built, make, reasons):
        contestants[name] = _Contestant(built, method, policy, options.where)
    for name, contestant in list(contestants.items()):
        try:
            calls = LOSSES if built.tokens > _LONG else _LEARNING
            calls = 1 if policy or contestant.method is None else calls
            contestant.first = [contestant.run() for _ in range(calls)]
        # A method that breaks must not take the others' numbers with it.
        except Exception as error:
            reasons[name] = failure(error)
            del contestants[name]
    ratios: dict[str, list[float]] = {name: [] for name in contestants}
    begin = time.perf_counter()
    for done in range(options.repeats):
        if done >= FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        unpatched = contestants[UNPATCHED].seconds
        unpatched.append(contestants[UNPATCHED].run())
        for name, contestant in contestants.items():
            if name == UNPATCHED:
                continue
            contestant.seconds.append(contestant.run())
            unpatched.append(contestants[UNPATCHED].run())
            # The mean of the runs before and after takes out a drift of the machine's speed.
            ratios[name].append(contestant.seconds[-1] * 2 / (unpatched[-2] + unpatched[-1]))
    for name, contestant in contestants.items():
        if not contestant.seconds:
            continue
        record = {**point, "contestant": name, "reason": None, "seconds": contestant.seconds}
        record.update(summary(contestant.seconds), warmup_seconds=contestant.first[0])
        if name != UNPATCHED:
            ordered = sorted(ratios[name])
            record.update(_told(contestant.reports[-1]), ratio=median(ordered), ratios=ordered)
            record.update(speedup=1 / record["ratio"], within=record["ratio"] <= AUTO_LIMIT)
            record["learning"] = contestant.first
            record["sparse_last"] = any(layer.sparse_calls for layer in contestant.reports[-1].layers)
        yield record
    for name, reason in reasons.items():
        yield {**point, "contestant": name, "reason": reason}


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
        return "needs the package diffusers"
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


_MODELS: dict[str, Callable[[Options, int, int], Built | str]] = {
    "llama prefill": _llama,
    "wan step": _wan,
}
