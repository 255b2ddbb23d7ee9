"""A trial of a model class that can be patched: a tiny random instance, run patched and unpatched."""

from __future__ import annotations

import copy
import inspect
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.coverage.listing import Coverage, quiet, short
from hf_sparse_attn.coverage.of_diffusers import diffusers_classes, diffusers_kinds
from hf_sparse_attn.coverage.of_transformers import reads_onward, transformers_classes
from hf_sparse_attn.family import find_family
from tests.support import tiny_diffusers, tiny_transformers

OPTIONS: dict[str, Any] = {"backend": "torch_gather", "min_tokens": 0}
# Every key by two methods: one that reads queries and keys, and one that does not.
EVERYTHING: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 1 << 20, "sink": 0, "block_size": 16},
    "block_topk": {"topk": 1 << 20, "block_size": 16},
}
LITTLE: dict[str, Any] = {"window": 3, "sink": 1, "block_size": 16}
# What a changed rounding of every weight does to the output bounds what another order of additions may do, which
# happens in attention alone but several times there.
ROUNDINGS = 8.0
# Share of the largest output; more would hide what a wrong pattern does.
MOST_ROUNDING = 0.01
# Weights of the largest instance that is still called tiny.
MOST_WEIGHTS = 40_000_000


class Failed(Exception):
    """Why a class that can be patched could not be verified."""


class Unfit(Failed):
    """An instance that does not run by itself: another one may."""


@dataclass(frozen=True)
class Trial:
    """An instance that is tried, and what must hold of it.

    Args:
        make: builds it, the same each time.
        forward: gives the tensors of an output that count, of a model.
        asked: names of the inputs, for what is said of a forward that fails.
        seconds: that one forward may take.
        methods: of EVERYTHING that are tried.
        check: raises where the layers of a patch that keeps every key did not run as they must.
        eager: builds it with the model's own attention: PyTorch's may lack what it is asked for, like a soft cap.
        most_rounding: share of the largest output that rounding may move; None where any may.
    """

    make: Callable[[], nn.Module]
    forward: Callable[[nn.Module], list[Tensor]]
    asked: str
    seconds: float
    methods: tuple[str, ...]
    check: Callable[[Any], None]
    eager: Callable[[], nn.Module] | None = None
    most_rounding: float | None = None

    def run(self) -> None:
        """Runs it.

        For models that select their own keys see `keep_selection`. Of others method "dense" is the unpatched output to
        the bit. With every key kept, the methods give that output, or the eager one, up to rounding. A short window
        does not. Without the patch the output is the first, to the bit.

        Raises:
            Failed: with what was not as it must be.
        """
        model = self.make()
        begin = time.perf_counter()
        try:
            own = self.output(model, "unpatched")
        except Failed as error:
            raise Unfit(str(error)) from error
        if time.perf_counter() - begin > self.seconds:
            raise Failed(f"one forward takes more than {self.seconds:g} s")
        if not bool(own.isfinite().all()):
            raise Failed("its output is not finite with random weights")
        if not torch.equal(self.output(model, "unpatched"), own):
            raise Failed("its output differs from run to run")
        allowed = ROUNDINGS * self.rounding(own)
        if self.most_rounding is not None and allowed > self.most_rounding * float(own.abs().max()):
            raise Failed(f"rounding alone moves its output by {allowed:.2g}, too much to tell")
        if getattr(find_family(model)[1], "requires", None):
            self.keep_selection(model, own, allowed)
            return
        with patch(model, "dense", min_tokens=0):
            if not torch.equal(self.output(model, "dense"), own):
                raise Failed("patched with method dense its output differs")
        for method in self.methods:
            self.keep_everything(model, method, own, allowed)
        with patch(model, "sliding_window", **OPTIONS, **LITTLE):
            if float((self.output(model, "sparse") - own).abs().max()) <= allowed:
                raise Failed("attention has no part in its output that a short window would change")
        if not torch.equal(self.output(model, "unpatched"), own):
            raise Failed("after the patch was removed its output differs")

    def keep_selection(self, model: nn.Module, own: Tensor, allowed: float) -> None:
        """Of a model that selects its own keys: method "native" gives its output, and a pause gives it to the bit."""
        with patch(model, "native") as patched:
            selected = self.output(model, "sparse")
            if not any(layer.sparse_calls for layer in patched.report().layers):
                raise Failed("no call ran sparse")
            with patched.paused():
                if not torch.equal(self.output(model, "paused"), own):
                    raise Failed("in a pause its output differs")
        off = float((selected - own).abs().max())
        if not off <= allowed and self.eager is not None:
            off = min(off, float((selected - self.output(self.eager(), "eager")).abs().max()))
        if not off <= allowed:
            raise Failed(f"with its own selection its output is off by {off:.2g}, rounding allows {allowed:.2g}")
        if not torch.equal(self.output(model, "unpatched"), own):
            raise Failed("after the patch was removed its output differs")

    def keep_everything(self, model: nn.Module, method: str, own: Tensor, allowed: float) -> None:
        """A method with every key kept: all layers ran as they must, and the output is that of dense."""
        with patch(model, method, **OPTIONS, **EVERYTHING[method]) as patched:
            everything = self.output(model, "sparse")
            layers = patched.report().layers
        if not any(layer.sparse_calls for layer in layers):
            reasons = dict.fromkeys(reason for layer in layers for reason in layer.reasons)
            raise Failed(f"no call ran sparse: {'; '.join(reasons) or 'no patched layer was called'}")
        self.check(layers)
        off = float((everything - own).abs().max())
        if not off <= allowed and self.eager is not None:
            off = min(off, float((everything - self.output(self.eager(), "eager")).abs().max()))
        if not off <= allowed:
            raise Failed(f"{method} of every key: its output is off by {off:.2g}, rounding allows {allowed:.2g}")

    def output(self, model: nn.Module, state: str) -> Tensor:
        """The output in one tensor."""
        try:
            with torch.no_grad():
                tensors = self.forward(model)
        except Exception as error:
            raise Failed(f"a forward of {self.asked} fails, {state}: {short(error)}") from error
        if not tensors:
            raise Failed("its output holds no tensor")
        return torch.cat([t.flatten() for t in tensors])

    def rounding(self, own: Tensor) -> float:
        """How far the output moves where every weight moves by its last digit."""
        model = self.make()
        draw = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.is_floating_point():
                    signs = torch.randint(2, parameter.shape, generator=draw) * 2 - 1
                    parameter.mul_(1 + signs * torch.finfo(parameter.dtype).eps)
        moved = float((self.output(model, "unpatched") - own).abs().max())
        return max(moved, torch.finfo(own.dtype).eps * float(own.abs().max()))


def try_diffusers(kind: Any, seconds: float = 5.0) -> None:
    """Tries a transformer class of diffusers; every patched layer must run sparse but those of few tokens or with a
    mask of their own.

    Raises:
        Failed: with what was not as it must be.
    """
    with quiet("diffusers"), torch.random.fork_rng(devices=[]):
        try:
            tiny_diffusers.tiny_model(kind)
            inputs = tiny_diffusers.tiny_inputs(kind)
        except Exception as error:
            raise Failed(f"no tiny instance is known: {short(error)}") from error
        if "return_dict" in inspect.signature(kind.forward).parameters:
            inputs["return_dict"] = False
        dense = tiny_diffusers.TABLE.get(kind.__name__, tiny_diffusers.Tiny()).dense
        Trial(
            make=lambda: tiny_diffusers.tiny_model(kind),
            forward=lambda model: [t for t in tensors_of(model(**inputs)) if t.is_floating_point()],
            asked="it",
            seconds=seconds,
            methods=tuple(EVERYTHING),
            check=lambda layers: all_sparse(layers, dense),
            most_rounding=MOST_ROUNDING,
        ).run()


def all_sparse(layers: Any, dense: str) -> None:
    """Raises where a layer was dense that is not expected to be, or was not called."""
    reasons = {reason: layer.name for layer in layers for reason in layer.reasons}
    odd = [f"{reason} ({name})" for reason, name in reasons.items() if not re.fullmatch(dense, name)]
    if odd:
        raise Failed(f"not all layers ran sparse: {'; '.join(odd)}")
    idle = [layer.name for layer in layers if not layer.sparse_calls and not layer.dense_calls]
    if idle:
        raise Failed(f"layers that were not called: {', '.join(idle)}")


def tensors_of(out: Any) -> Iterator[Tensor]:
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (list, tuple)):
        for part in out:
            yield from tensors_of(part)


def try_transformers(kind: Any, decoder: bool, seconds: float = 2.0) -> None:
    """Tries the first tiny instance of a transformers class that can be built and runs without a patch.

    It reads one text of 40 tokens, or an image, clip or sound of its own size; at least one call must run sparse.

    Raises:
        Failed: with what was not as it must be.
    """
    unfit: Exception | None = None
    with quiet("transformers"):
        for config in tiny_transformers.tiny_configs(kind, decoder=decoder):
            try:
                with torch.device("meta"):
                    model = kind(config)
                find_family(model)
            except Exception as error:
                unfit = unfit or Failed(f"a tiny instance fails: {short(error)}")
                continue
            weights = sum(p.numel() for p in model.parameters())
            if weights > MOST_WEIGHTS:
                raise Failed(f"the smallest instance known has {weights / 1e6:.0f} million weights")
            inputs = tiny_transformers.tiny_inputs, tiny_transformers.encoder_inputs
            for given in [inputs[0](config)] if decoder else inputs[1](kind, config):
                try:
                    _one_of_transformers(kind, config, given, seconds).run()
                    return
                except Unfit as error:
                    unfit = unfit or error
    raise unfit or Failed("there is no tiny instance")


def _one_of_transformers(kind: Any, config: Any, inputs: Mapping[str, Tensor], seconds: float) -> Trial:
    def eager() -> nn.Module:
        model = tiny_transformers.tiny_model(kind, copy.deepcopy(config))
        model.set_attn_implementation("eager")
        return model

    return Trial(
        make=lambda: tiny_transformers.tiny_model(kind, config),
        forward=lambda model: main_tensor(model(**inputs)),
        asked=f"{' and '.join(inputs)} alone",
        seconds=seconds,
        methods=("sliding_window",),
        check=lambda layers: None,
        eager=eager,
    )


def main_tensor(out: Any) -> list[Tensor]:
    """The logits, or the first floating-point tensor of the output."""
    # Similarities of one text and one image are 1 whatever is done to them.
    embeds = [getattr(out, name, None) for name in ("text_embeds", "image_embeds")]
    tensors = [*embeds, getattr(out, "logits", None), *(out.values() if hasattr(out, "values") else out)]
    return [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()][:1]


def verified(found: Coverage, seconds: float | None = None) -> Coverage:
    """A class that can be patched, tried: verified, or with why not; any other as it is."""
    limit = {} if seconds is None else {"seconds": seconds}
    if found.reason is not None or not found.built:
        return found
    try:
        if found.library == "diffusers":
            try_diffusers(diffusers_kinds()[found.name], **limit)
        else:
            import transformers

            try_transformers(getattr(transformers, found.name), reads_onward(found.task), **limit)
    except Exception as error:
        return replace(found, note=str(error) if isinstance(error, Failed) else short(error))
    return replace(found, verified=True)


def listed(library: str, **options: Any) -> list[Coverage]:
    """The classes of a library, asked of the tiny instances that are tried."""
    if library == "diffusers":
        return diffusers_classes(sizes=tiny_diffusers.tiny_sizes, **options)
    return transformers_classes(
        configs=lambda kind, decoder: tiny_transformers.tiny_configs(kind, decoder=decoder), **options
    )
