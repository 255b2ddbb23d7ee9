"""Which models of the transformers installed here can be patched, decoders and encoders by task, and a trial.

The decision is the families' own, asked of an instance: a tiny one first, without memory for weights.
"""

from __future__ import annotations

import copy
import importlib
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.coverage.listing import Coverage
from hf_sparse_attn.coverage.tiny_transformers import encoder_inputs, tiny_configs, tiny_inputs, tiny_model
from hf_sparse_attn.family import find_family

TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "video classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "image-text similarity": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "text to text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
# What reads text from left to right.
_DECODERS = frozenset({"causal LM", "image-text"})
# Weights of the largest instance that is still called tiny.
_MOST_WEIGHTS = 40_000_000
_EVERYTHING: dict[str, Any] = {"window": 1 << 20, "sink": 0, "block_size": 16}
_LITTLE: dict[str, Any] = {"window": 3, "sink": 1, "block_size": 16}
# What a changed rounding of every weight does to the output bounds what another order of additions may do, which
# happens in attention alone but several times there.
_ROUNDINGS = 8.0

Progress = Callable[[Iterable[tuple[str, str]]], Iterable[tuple[str, str]]]


class _Failed(Exception):
    """Why a class that is patched could not be verified."""


class _Unfit(_Failed):
    """An instance that does not run by itself: another one may."""


def transformers_classes(
    verify: bool = False, names: Iterable[str] | None = None, seconds: float = 2.0, progress: Progress | None = None
) -> list[Coverage]:
    """The classes that transformers lists for the tasks of TASKS, by name.

    With `verify`, every class that can be patched is built tiny with random weights and read one text of 40 tokens
    (encoders of images and sound an image, clip or sound of their own size):
    method "dense" is the unpatched output to the bit; a sliding window longer than the text is that output, or that of
    the implementation "eager", up to rounding, a short one is not; at least one call ran sparse; without the patch the
    output is the first to the bit.

    Args:
        verify: also run tiny instances.
        names: of the classes; None means all.
        seconds: that one forward of a tiny instance may take.
        progress: wraps the pairs of class name and task, such as tqdm does.

    Raises:
        ValueError: a name that transformers does not list, or `seconds` that is not positive.
    """
    if not seconds > 0:
        raise ValueError(f"`seconds` must be positive, got {seconds}")
    listed = transformers_tasks()
    chosen = list(listed) if names is None else list(names)
    unknown = sorted(set(chosen) - set(listed))
    if unknown:
        raise ValueError(f"`names` must be classes that transformers lists, got {', '.join(unknown)}")
    pairs: Iterable[tuple[str, str]] = [(name, listed[name]) for name in chosen]
    wrapped = pairs if progress is None else progress(pairs)
    with _quiet():
        found = [_of(name, task, verify, seconds) for name, task in wrapped]
    return sorted(found, key=lambda c: c.name)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of transformers about sizes that nobody would choose."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)


def transformers_tasks() -> dict[str, str]:
    """Class name -> what transformers lists it for: keys of TASKS joined by a comma."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for task, mapping in TASKS.items():
        for names in getattr(auto, mapping, {}).values():
            for name in (names,) if isinstance(names, str) else names:
                known = found.setdefault(name, task)
                found[name] = known if task in known.split(", ") else f"{known}, {task}"
    return dict(sorted(found.items()))


def _of(name: str, task: str, verify: bool, seconds: float) -> Coverage:
    import transformers

    try:
        kind: Any = getattr(transformers, name)
        file = str(kind.__module__)
    except Exception as error:
        return Coverage(name, "transformers", None, None, _short(error), False, False, "transformers", task)
    decoder = not _DECODERS.isdisjoint(task.split(", "))
    family, reason, config = _decide(kind, decoder)
    built = config is not None
    if family is None:
        return Coverage(name, file, None, None, reason, built, False, "transformers", task)
    note = None
    if verify:
        try:
            _verify_first(kind, seconds, decoder)
        except Exception as error:
            note = str(error) if isinstance(error, _Failed) else _short(error)
    verified = verify and note is None
    return Coverage(name, file, family, "interface", None, True, verified, "transformers", task, note)


def _decide(kind: Any, decoder: bool) -> tuple[str | None, str | None, Any]:
    """The family or the reason why none, and the configuration of the instance that was asked, None without one."""
    reason: str | None = None
    refused: Exception | None = None
    asked: Any = None
    for config, error in _configs(kind, decoder):
        if config is None:
            refused = refused or error
            continue
        try:
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:
            refused = refused or error
            continue
        try:
            return find_family(model)[0], None, config
        except TypeError as error:
            # Where only some layers have attention, an instance of more layers may have one.
            reason, asked = reason or _own_reason(str(error), decoder), config
    if asked is not None:
        return None, reason, asked
    return None, f"could not be built: {_short(refused)}", None


def _configs(kind: Any, decoder: bool) -> Iterator[tuple[Any, Exception | None]]:
    """Tiny configurations, then the class's own."""
    try:
        for config in tiny_configs(kind, decoder=decoder):
            yield config, None
    except Exception as error:
        yield None, error
    try:
        yield kind.config_class(), None
    except Exception as error:
        yield None, error


def _own_reason(text: str, decoder: bool) -> str:
    """The part of find_family's message by the family it is about; the others only say that it is not theirs."""
    parts = text.partition("(")[2].removesuffix(")").split("; ")
    said = {name: reason for name, _, reason in (part.partition(": ") for part in parts)}
    own = said.get("llama" if decoder else "encoder", text)
    return said.get("encoder", text) if own.startswith("encoder-decoder") else own


def _short(error: object) -> str:
    """Kind and first words of an error, on one line."""
    said = " ".join(str(error).split())
    return f"{type(error).__name__}: {said[:117] + '...' if len(said) > 120 else said}"


def _verify_first(kind: Any, seconds: float, decoder: bool) -> None:
    """Verifies the first tiny instance that can be built and runs without a patch; raises where that fails."""
    unfit: Exception | None = None
    for config in tiny_configs(kind, decoder=decoder):
        try:
            with torch.device("meta"):
                model = kind(config)
            find_family(model)
        except Exception as error:
            unfit = unfit or _Failed(f"a tiny instance fails: {_short(error)}")
            continue
        weights = sum(p.numel() for p in model.parameters())
        if weights > _MOST_WEIGHTS:
            raise _Failed(f"the smallest instance known has {weights / 1e6:.0f} million weights")
        for inputs in [tiny_inputs(config)] if decoder else encoder_inputs(kind, config):
            try:
                _verify(kind, config, inputs, seconds)
                return
            except _Unfit as error:
                unfit = unfit or error
    raise unfit or _Failed("there is no tiny instance")


def _verify(kind: Any, config: Any, inputs: dict[str, Tensor], seconds: float) -> None:
    """Raises where a tiny instance does not do what `transformers_classes` says."""
    model = tiny_model(kind, config)
    begin = time.perf_counter()
    try:
        own = _run(model, inputs, "unpatched")
    except _Failed as error:
        raise _Unfit(str(error)) from error
    if time.perf_counter() - begin > seconds:
        raise _Failed(f"one forward takes more than {seconds:g} s")
    if not bool(own.isfinite().all()):
        raise _Failed("its output is not finite with random weights")
    if not torch.equal(_run(model, inputs, "unpatched"), own):
        raise _Failed("its output differs from run to run")
    allowed = _ROUNDINGS * _rounding(kind, config, inputs, own)
    with patch(model, "dense", min_tokens=0):
        if not torch.equal(_run(model, inputs, "dense"), own):
            raise _Failed("patched with method dense its output differs")
    options: dict[str, Any] = {"backend": "torch_gather", "min_tokens": 0}
    with patch(model, "sliding_window", **options, **_EVERYTHING) as patched:
        everything = _run(model, inputs, "sparse")
        layers = patched.report().layers
    if not any(layer.sparse_calls for layer in layers):
        reasons = dict.fromkeys(reason for layer in layers for reason in layer.reasons)
        raise _Failed(f"no call ran sparse: {'; '.join(reasons) or 'no patched layer was called'}")
    off = float((everything - own).abs().max())
    if not off <= allowed:
        off = min(off, float((everything - _eager(kind, config, inputs)).abs().max()))
    if not off <= allowed:
        raise _Failed(f"with every key kept its output is off by {off:.2g}, rounding allows {allowed:.2g}")
    with patch(model, "sliding_window", **options, **_LITTLE):
        if float((_run(model, inputs, "sparse") - own).abs().max()) <= allowed:
            raise _Failed("attention has no part in its output that a short window would change")
    if not torch.equal(_run(model, inputs, "unpatched"), own):
        raise _Failed("after the patch was removed its output differs")


def _run(model: nn.Module, inputs: dict[str, Tensor], state: str) -> Tensor:
    """The logits, or the first floating-point tensor of the output."""
    try:
        with torch.no_grad():
            out: Any = model(**inputs)
    except Exception as error:
        raise _Failed(f"a forward of {' and '.join(inputs)} alone fails, {state}: {_short(error)}") from error
    logits = getattr(out, "logits", None)
    # Similarities of one text and one image are 1 whatever is done to them.
    embeds = [getattr(out, name, None) for name in ("text_embeds", "image_embeds")]
    tensors = [*embeds, logits, *(out.values() if hasattr(out, "values") else out)]
    found = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    if not found:
        raise _Failed("its output holds no tensor")
    return found[0].clone()


def _eager(kind: Any, config: Any, inputs: dict[str, Tensor]) -> Tensor:
    """The output by the model's own code: another implementation may lack what it is asked for, like a soft cap."""
    model = tiny_model(kind, copy.deepcopy(config))
    model.set_attn_implementation("eager")
    return _run(model, inputs, "eager")


def _rounding(kind: Any, config: Any, inputs: dict[str, Tensor], own: Tensor) -> float:
    """How far the output moves where every weight moves by its last digit."""
    model = tiny_model(kind, config)
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                signs = torch.randint(2, parameter.shape, generator=draw) * 2 - 1
                parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
    moved = float((_run(model, inputs, "unpatched") - own).abs().max())
    return max(moved, torch.finfo(own.dtype).eps * float(own.abs().max()))
