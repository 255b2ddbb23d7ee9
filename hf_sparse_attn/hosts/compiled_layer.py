"""A patched attention layer as one operator that torch.compile keeps whole and does not look into.

A compiled graph holds no Python state, so that what a layer decides (the pattern, dense or sparse, what is counted)
must happen when the graph runs. Which layer runs is told by a tensor: a number would compile every layer anew.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from hf_sparse_attn.autocast import cast_inputs
from hf_sparse_attn.session import SESSIONS
from hf_sparse_attn.transforms import are_transformed, step


class Layer(Protocol):
    """What runs when the operator does."""

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, extra: Mapping[str, Tensor], lengths: list[int],
        options: list[float], reason: str, again: bool,
    ) -> Tensor:  # fmt: skip
        """Attention of one call, eagerly.

        Args:
            q: [batch, heads, q_len, dim].
            k, v: [batch, kv_heads, kv_len, dim].
            extra: other tensors of the call by name.
            lengths, options: whole numbers and fractions, as given to `attend`.
            reason: why the call must run dense, or "".
            again: this is the run for a backward; it must not be counted.

        Returns:
            output [batch, q_len, heads, value dim].
        """


class Model(Protocol):
    """What runs when a compiled model begins a forward."""

    def begin(self, given: list[Tensor], sizes: list[int]) -> int:
        """Notes what the forward's layers share, eagerly, and gives it a number."""


_KNOWN: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def enrol(one: Layer | Model) -> Tensor:
    """Makes a layer or model known as long as it lives; the tensor is what `attend` and `begin` take."""
    number = next(_NUMBERS)
    _KNOWN[number] = one
    return ticket(number)


def ticket(number: int) -> Tensor:
    """A number that a graph takes for data: another value is no reason to compile anew."""
    return torch.tensor(number, device="cpu")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def note(session: int, layer: str, reason: str) -> None:
    """Counts a dense call that is part of the graph that is being traced; once, for a graph counts nothing."""
    found = SESSIONS.get(session)
    if found is not None:
        record = found.records[layer]
        record.count(record.dense_reasons, f"{reason} (counted once per compiled graph)")


def begin(model: Tensor, given: list[Tensor], sizes: list[int]) -> Tensor:
    """The beginning of a forward in the graph that is being traced; the ticket is for its layers' `attend`."""
    made: Tensor = _begin(model, given, sizes)
    return made


@torch.library.custom_op("hf_sparse_attn::begin", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _begin(model: Tensor, given: list[Tensor], sizes: list[int]) -> Tensor:
    return ticket(_find(model).begin(given, sizes))


@_begin.register_fake
def _(model: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(model)


def attend(
    layer: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: Mapping[str, Tensor | None], lengths: list[int],
    options: list[float], reason: str = "",
) -> Tensor:  # fmt: skip
    """The operator in the graph that is being traced; see Layer.run. A None in `extra` is left out."""
    q, k, v = cast_inputs(q, k, v)
    given = {name: x for name, x in extra.items() if x is not None}
    if are_transformed(q, k, v, *given.values()):
        return step(partial(_plain, _find(layer), tuple(given), lengths, options, reason), q, k, v, *given.values())[0]
    # For an empty list of numbers torch wants an empty list of gradients back, for any other None.
    lengths = lengths or [0]
    found: Tensor = _layer(layer, q, k, v, list(given.values()), ",".join(given), lengths, options, reason)
    return found


def _plain(
    layer: Layer, names: tuple[str, ...], lengths: list[int], options: list[float], reason: str, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """The layer inside of a transform; a run with gradients is a backward's."""
    q, k, v, *extra = tensors
    given, again = dict(zip(names, extra, strict=True)), torch.is_grad_enabled()
    return (layer.run(q, k, v, given, lengths, options, reason, again=again),)


def _find(number: Tensor) -> Any:
    found = _KNOWN.get(int(number))
    if found is None:
        raise RuntimeError("the patch of this compiled model was removed: compile the model again")
    return found


@torch.library.custom_op("hf_sparse_attn::layer", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _layer(
    layer: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor], names: str, lengths: list[int],
    options: list[float], reason: str,
) -> Tensor:  # fmt: skip
    given = dict(zip(names.split(","), extra, strict=False))
    out = _find(layer).run(q, k, v, given, lengths, options, reason, again=False)
    # The fake kernel says that it is contiguous, and an operator must not hand out what it was given.
    return out.contiguous()


@_layer.register_fake
def _(layer: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])


@torch.library.custom_op("hf_sparse_attn::layer_backward", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _layer_backward(
    grad: Tensor, layer: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor], names: str,
    lengths: list[int], options: list[float], reason: str,
) -> list[Tensor]:  # fmt: skip
    """Runs the layer again with a gradient: a graph can keep tensors between the passes, and nothing else."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in (q, k, v, *extra)]
    wanted = [x for x in inputs if x.requires_grad]
    with _autograd():
        given = dict(zip(names.split(","), inputs[3:], strict=False))
        q, k, v = inputs[:3]
        out = _find(layer).run(q, k, v, given, lengths, options, reason, again=True)
        found = torch.autograd.grad(out, wanted, grad, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.contiguous() for x, g in zip(wanted, found, strict=True)]


@contextmanager
def _autograd() -> Iterator[None]:
    """Records gradients although an operator runs, inside which torch skips the recording."""
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        exclude = exclude.remove(getattr(torch._C.DispatchKey, key))
    include = torch._C._dispatch_tls_local_include_set()
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield


@_layer_backward.register_fake
def _(grad: Tensor, layer: Tensor, q: Tensor, k: Tensor, v: Tensor, extra: list[Tensor], *_: Any) -> list[Tensor]:
    return [x.new_empty(x.shape) for x in (q, k, v, *extra) if x.is_floating_point()]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    layer, q, k, v, extra, *rest = inputs
    ctx.save_for_backward(layer, q, k, v, *extra)
    ctx.rest = rest


def _grads(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    layer, q, k, v, *extra = ctx.saved_tensors
    found = iter(_layer_backward(grad, layer, q, k, v, extra, *ctx.rest))
    grads = [next(found) if x.is_floating_point() else None for x in (q, k, v, *extra)]
    return (None, *grads[:3], grads[3:], None, None, None, None)


_layer.register_autograd(_grads, setup_context=_save)
