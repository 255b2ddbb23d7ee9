"""A trial of every transformer class of diffusers that can be patched: a tiny instance, run patched and unpatched."""

from __future__ import annotations

import inspect
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.coverage.rules_diffusers import Tiny
from hf_sparse_attn.coverage.table_diffusers import TABLE
from hf_sparse_attn.coverage.tiny_diffusers import tiny_inputs, tiny_model

_OPTIONS: dict[str, Any] = {"backend": "torch_gather", "min_tokens": 0}
# Every key by two methods: one that reads queries and keys, and one that does not.
_EVERYTHING: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 1 << 20, "sink": 0, "block_size": 16},
    "block_topk": {"topk": 1 << 20, "block_size": 16},
}
_LITTLE: dict[str, Any] = {"window": 3, "sink": 1, "block_size": 16}
# As in coverage_transformers: attention adds in another order, several times.
_ROUNDINGS = 8.0
# Share of the largest output; more would hide what a wrong pattern does.
_MOST_ROUNDING = 0.01


class Failed(Exception):
    """Why a class that can be patched could not be verified."""


def verify(kind: Any, seconds: float = 5.0) -> None:
    """Runs a tiny random instance of a class, unpatched and patched.

    Method "dense" is the unpatched output to the bit. With every key kept, a sliding window and the top blocks are
    that output up to rounding, and every patched layer ran sparse but those of few tokens or with a mask of their own.
    A short window is not that output. Without the patch the output is the first, to the bit.

    Args:
        kind: a transformer class of diffusers.
        seconds: that one forward may take.

    Raises:
        Failed: with what was not as it must be.
    """
    with _quiet(), torch.random.fork_rng(devices=[]):
        _verify(kind, seconds)


def _verify(kind: Any, seconds: float) -> None:
    try:
        model, inputs = tiny_model(kind), tiny_inputs(kind)
    except Exception as error:
        raise Failed(f"no tiny instance is known: {_short(error)}") from error
    begin = time.perf_counter()
    own = _run(model, inputs, "unpatched")
    if time.perf_counter() - begin > seconds:
        raise Failed(f"one forward takes more than {seconds:g} s")
    if not bool(own.isfinite().all()):
        raise Failed("its output is not finite with random weights")
    if not torch.equal(_run(model, inputs, "unpatched"), own):
        raise Failed("its output differs from run to run")
    allowed = _ROUNDINGS * _rounding(kind, inputs, own)
    if allowed > _MOST_ROUNDING * float(own.abs().max()):
        raise Failed(f"rounding alone moves its output by {allowed:.2g}, too much to tell")
    with patch(model, "dense", min_tokens=0):
        if not torch.equal(_run(model, inputs, "dense"), own):
            raise Failed("patched with method dense its output differs")
    for method, params in _EVERYTHING.items():
        with patch(model, method, **_OPTIONS, **params) as patched:
            everything = _run(model, inputs, "sparse")
            _all_sparse(patched.report().layers, TABLE.get(kind.__name__, Tiny()).dense)
        off = float((everything - own).abs().max())
        if not off <= allowed:
            raise Failed(f"{method} of every key: its output is off by {off:.2g}, rounding allows {allowed:.2g}")
    with patch(model, "sliding_window", **_OPTIONS, **_LITTLE):
        if float((_run(model, inputs, "sparse") - own).abs().max()) <= allowed:
            raise Failed("attention has no part in its output that a short window would change")
    if not torch.equal(_run(model, inputs, "unpatched"), own):
        raise Failed("after the patch was removed its output differs")


def _all_sparse(layers: Any, dense: str) -> None:
    """Raises where a layer was dense that is not expected to be, or none was sparse."""
    reasons = {reason: layer.name for layer in layers for reason in layer.reasons}
    if not any(layer.sparse_calls for layer in layers):
        raise Failed(f"no call ran sparse: {'; '.join(reasons) or 'no patched layer was called'}")
    odd = [f"{reason} ({name})" for reason, name in reasons.items() if not re.fullmatch(dense, name)]
    if odd:
        raise Failed(f"not all layers ran sparse: {'; '.join(odd)}")
    idle = [layer.name for layer in layers if not layer.sparse_calls and not layer.dense_calls]
    if idle:
        raise Failed(f"layers that were not called: {', '.join(idle)}")


def _run(model: nn.Module, inputs: dict[str, Any], state: str) -> Tensor:
    """All tensors of the output in one."""
    given = dict(inputs)
    if "return_dict" in inspect.signature(type(model).forward).parameters:
        given["return_dict"] = False
    try:
        with torch.no_grad():
            out: Any = model(**given)
    except Exception as error:
        raise Failed(f"a forward fails, {state}: {_short(error)}") from error
    found = [t.flatten() for t in _tensors(out) if t.is_floating_point()]
    if not found:
        raise Failed("its output holds no tensor")
    return torch.cat(found)


def _tensors(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for part in out:
            yield from _tensors(part)


def _rounding(kind: Any, inputs: dict[str, Any], own: Tensor) -> float:
    """How far the output moves where every weight moves by its last digit."""
    model = tiny_model(kind)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(2, parameter.shape, generator=draw) * 2 - 1
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
    moved = float((_run(model, inputs, "unpatched") - own).abs().max())
    return max(moved, torch.finfo(own.dtype).eps * float(own.abs().max()))


def _short(error: object) -> str:
    """Kind and first words of an error, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:117] + '...' if len(said) > 120 else said}"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of diffusers about sizes that nobody would choose."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
