"""The suite of decoding: seconds of one step of generated text, with a cache of so many tokens before it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hf_sparse_attn.api import patch
from hf_sparse_attn.bench.options import DTYPES, Options
from hf_sparse_attn.cost.timing import FEWEST_ROUNDS, clock, failure, summary
from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.registry import make_method

OWN = "transformers"
# The method whose pages are read where decoding is sparse.
_SPARSE = "quest"
# Steps of a round that are timed, after one that is not: a patch that was just put on looks at the whole cache once.
_STEPS = 4
# Tokens that a prompt is read in at a time.
_CHUNK = 2048
_PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def generation(options: Options) -> list[dict[str, Any]]:
    """Steps of a model by itself, by method "exact", and sparse, all after the same prompt and with the same tokens.

    What counts is `ratio`, the median over the rounds of the seconds of a step over those of the unpatched model in
    the same round. OpenVINO GenAI and llama.cpp take their turn where they are installed and `gguf` is given; they
    read the same prompt and go on with tokens of their own.
    """
    records = []
    for dtype in options.dtypes:
        label, model = _model(options, DTYPES[dtype])
        for tokens in tqdm(options.tokens, f"decoding in {dtype}", disable=None):
            point = {"model": label, "tokens": tokens, "dtype": dtype}
            records += [{**point, **record} for record in _point(options, model, dtype, tokens)]
    return records


@dataclass
class _Contestant:
    """One way of decoding: what is patched while it runs, and its own cache."""

    name: str
    model: Any
    put: Callable[[], AbstractContextManager[Any]]
    cache: Any
    rounds: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    report: Any = None

    def run(self, ids: Tensor, now: Callable[[], float]) -> None:
        """One round: a token that is not timed, and those that are; `ids` [1, 1 + _STEPS]."""
        with self.put() as made:
            taken = []
            for token in ids.split(1, 1):
                begin = now()
                self.model(token, past_key_values=self.cache, use_cache=True)
                taken.append(now() - begin)
            self.report = None if made is None else made.report()
        self.seconds += taken[1:]
        self.rounds.append(median(taken[1:]))

    def record(self, own: list[float]) -> dict[str, Any]:
        """What stands in the result, the first round left out; `own`: medians of the rounds of the unpatched model."""
        ratios = sorted(a / b for a, b in zip(self.rounds[1:], own[1:], strict=True))
        found = {
            "contestant": self.name, "reason": None, "seconds": self.seconds[_STEPS:],
            **summary(self.seconds[_STEPS:]), "ratio": median(ratios), "ratios": ratios,
        }  # fmt: skip
        if self.report is not None:
            layers = self.report.layers
            backends = {name for layer in layers for kind in layer.decoding.values() for name in kind.backends}
            because = {reason for layer in layers for reason in (*layer.reasons, *layer.partly_dense)}
            found |= {
                "density": self.report.decode_density, "backends": sorted(backends), "dense_because": sorted(because)
            }  # fmt: skip
        return found


def _point(options: Options, model: Any, dtype: str, tokens: int) -> Iterator[dict[str, Any]]:
    ids = torch.randint(
        3, model.config.get_text_config().vocab_size, (1, tokens + (options.repeats + 1) * (1 + _STEPS)),
        generator=torch.Generator().manual_seed(0),
    ).to(options.where)  # fmt: skip
    prompt, rounds = ids[:, :tokens], ids[:, tokens:].split(1 + _STEPS, 1)
    cache = _read(model, prompt)
    contestants = [
        _Contestant(name, model, put, deepcopy(cache)) for name, put in _ways(options, model, options.densities)
    ]
    del cache
    one_thread = options.where.type == "cpu" and torch.get_num_threads() == 1
    # Others have threads of their own: the whole process counts.
    now = time.process_time if one_thread else clock(options.where)
    failed: dict[str, str] = {}
    begin = time.perf_counter()
    for done, given in enumerate(rounds):
        if done > FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
            break
        for one in contestants:
            if one.name in failed:
                continue
            try:
                one.run(given, now)
            # A way that breaks must not take the others' numbers with it.
            except Exception as error:
                failed[one.name] = failure(error)
    own = contestants[0].rounds
    for one in contestants:
        if one.name in failed or OWN in failed:
            yield {"contestant": one.name, "reason": failed.get(one.name, failed.get(OWN))}
        else:
            yield one.record(own)
    for name, peer in _PEERS.items():
        yield {
            "contestant": name,
            **_peer(peer, options, prompt[0].tolist(), dtype, now, median(own) if own else None),
        }


def _ways(
    options: Options, model: Any, densities: tuple[float, ...]
) -> Iterator[tuple[str, Callable[[], AbstractContextManager[Any]]]]:
    """Names of the ways to decode, and what puts their patch on."""
    yield OWN, nullcontext
    yield "exact", partial(patch, model, "exact")
    yield "exact, preallocated", partial(patch, model, "exact", cache="preallocated")
    for density in densities:
        method = make_method(_SPARSE, {"density": density})
        yield (
            f"{_SPARSE} {density:g}, preallocated",
            partial(patch, model, "exact", decode=method, min_tokens=options.min_tokens, cache="preallocated"),
        )


def _read(model: Any, prompt: Tensor) -> Any:
    """The cache of a model that has read a prompt [1, tokens]."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with patch(model, "exact"):
        for part in prompt.split(_CHUNK, 1):
            model(part, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def _model(options: Options, dtype: torch.dtype) -> tuple[str, Any]:
    """Name and model: the one that is asked for, else SmolLM2 where its package is installed, else a tiny one."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if options.model is not None:
        found: Any = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype)
        return Path(options.model).name, found.eval().to(options.where)
    try:
        from hf_sparse_attn.pretrained import smollm2

        return "SmolLM2-135M", smollm2.load_model(dtype).to(options.where)
    except MissingExtra:
        config = LlamaConfig(
            vocab_size=256, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=2, max_position_embeddings=max(options.tokens) + 1024,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made: Any = LlamaForCausalLM(config)
        return "random Llama", made.eval().to(options.where, dtype)


# Of a GGUF file, the ids of a prompt, how many tokens to add, threads, dtype and clock: the time after each token.
Peer = Callable[[str, list[int], int, int, str, Callable[[], float]], list[float]]


def _peer(
    peer: tuple[str, Peer], options: Options, prompt: list[int], dtype: str, now: Callable[[], float],
    own: float | None,
) -> dict[str, Any]:  # fmt: skip
    module, run = peer
    if options.where.type != "cpu":
        return {"reason": "runs on the CPU alone here"}
    if find_spec(module) is None:
        return {"reason": f"{module} is not installed"}
    if options.gguf is None:
        return {"reason": "needs a GGUF file of the model: --gguf"}
    try:
        added = 2 + options.repeats * _STEPS
        marks = run(options.gguf, prompt, added, torch.get_num_threads(), dtype, now)
    except Exception as error:
        return {"reason": failure(error)}
    # The first one comes with the prompt, the second finds nothing in place.
    seconds = [after - before for before, after in pairwise(marks[1:])]
    ratio = None if own is None else median(seconds) / own
    return {"reason": None, "seconds": seconds, **summary(seconds), "ratio": ratio, "file": Path(options.gguf).name}


def _openvino(
    file: str, prompt: list[int], added: int, threads: int, dtype: str, now: Callable[[], float]
) -> list[float]:
    import openvino
    import openvino_genai as genai

    marks: list[float] = []

    def take(_: object) -> Any:
        marks.append(now())
        return genai.StreamingStatus.RUNNING

    class Streamer(genai.StreamerBase):
        def write(self, token: object) -> Any:
            return take(token)

        def end(self) -> None:
            """Nothing is held back."""

    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": _PRECISIONS[dtype], "NUM_STREAMS": 1}
    pipeline = genai.LLMPipeline(file, "CPU", **settings)
    wanted = genai.GenerationConfig()
    wanted.max_new_tokens, wanted.ignore_eos, wanted.do_sample = added, True, False
    ids = torch.tensor([prompt]).numpy()
    tokens = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(ids * 0 + 1))
    pipeline.generate(tokens, wanted, Streamer())
    return marks


def _llama_cpp(
    file: str, prompt: list[int], added: int, threads: int, dtype: str, now: Callable[[], float]
) -> list[float]:
    from llama_cpp import Llama

    # What is computed in is the file's.
    model = Llama(
        model_path=file, n_ctx=len(prompt) + added, n_threads=threads, n_threads_batch=threads, flash_attn=True,
        verbose=False,
    )  # fmt: skip
    model.eval(prompt)
    marks = [now()]
    for token in prompt[: added - 1]:
        model.eval([token])
        marks.append(now())
    return marks


# By name: the module that must be installed, and what runs it.
_PEERS: dict[str, tuple[str, Peer]] = {
    "OpenVINO GenAI": ("openvino_genai", _openvino), "llama.cpp": ("llama_cpp", _llama_cpp)
}  # fmt: skip
