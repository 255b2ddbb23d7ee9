"""What a sparse student learns from its dense self: the outputs of the model, and those of every attention call."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import Context
from hf_sparse_attn.dispatch import dense_attention
from hf_sparse_attn.patching import Patch, changed
from hf_sparse_attn.profiling.observe import evaluating


@contextmanager
def teaching(model: nn.Module, patch: Patch | None, adapter: Any = None) -> Iterator[None]:
    """Within it a model computes what it did before its patch and its adapter, bit for bit, without gradients.

    Args:
        model: in any mode; within, it is in evaluation mode.
        patch: sparse attention on it, or None.
        adapter: a lora.Adapter on it, or None.
    """
    paused = nullcontext() if patch is None else patch.paused()
    disabled = nullcontext() if adapter is None else adapter.disabled()
    with evaluating([model]), paused, disabled, torch.no_grad():
        yield


class AttentionMatch:
    """How far sparse attention is from dense attention on the same q, k and v, layer by layer and with a gradient.

    The error of a sample in a layer is the sum of the squared differences of the outputs over the sum of the squares
    of the dense one. The dense output is what is taught: it has no gradient, but is computed anew in every forward of
    what q, k and v are then. No forward of a teacher is needed.

    Works with gradient checkpointing of the form that is not reentrant.

    Args:
        patch: sparse attention on the model.
        trains: whether gradients are taken of the errors; a recomputation for the backward pass must then do what the
            forward did.
    """

    def __init__(self, patch: Patch, trains: bool) -> None:
        self.trains = trains
        self._found: list[tuple[int, Tensor]] | None = None
        patch.session.watcher = self

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, ctx: Context, out: Tensor) -> None:
        """See session.Watcher."""
        if not (self.trains if torch.is_grad_enabled() else self._found is not None):
            return
        error = output_error(out, q, k, v, ctx)
        if self._found is not None:
            self._found.append((ctx.layer, error))

    @contextmanager
    def collecting(self) -> Iterator[list[tuple[int, Tensor]]]:
        """Within it the errors of all calls are gathered: layer and [batch], in the order they ran.

        With a gradient only where it was said that it trains.
        """
        found: list[tuple[int, Tensor]] = []
        with changed([self], "_found", found):
            yield found


class LayerOutputs:
    """What the attention modules of a patched model return, gathered while it runs dense and while it runs sparse.

    Works with gradient checkpointing of the form that is not reentrant.

    Args:
        patch: sparse attention on the model; its removal ends this, too.
        wanted: whether anything is gathered at all.
    """

    def __init__(self, patch: Patch, wanted: bool = True) -> None:
        self._found: dict[str, list[Tensor]] | None = None
        if not wanted:
            return
        names = [name for name, record in patch.session.records.items() if not record.exact]
        for name, module in zip(names, _modules(patch, names), strict=True):
            patch.hook(module, "register_forward_hook", partial(self._keep, name))

    def _keep(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if self._found is not None:
            self._found.setdefault(name, []).append(output if isinstance(output, Tensor) else output[0])

    @contextmanager
    def collecting(self) -> Iterator[dict[str, list[Tensor]]]:
        """Within it outputs are gathered: [batch, tokens, width] by the layer's name, one for each of its calls."""
        found: dict[str, list[Tensor]] = {}
        with changed([self], "_found", found):
            yield found


def _modules(patch: Patch, names: Sequence[str]) -> list[nn.Module]:
    """The attention modules of some layers, by their names in the report."""
    known = {name: m for owner in patch.modules for name, m in owner.named_modules()}
    # A part of a pipeline, or of a model with several decoders, has its name before that of the layer.
    found = [known.get(name, known.get(name.partition(".")[2])) for name in names]
    missing = [name for name, module in zip(names, found, strict=True) if module is None]
    if missing:
        raise ValueError(f"`match.layers` must have modules of the layers' names, there is none for {missing[0]}")
    return [module for module in found if module is not None]


def layers_error(mine: dict[str, list[Tensor]], taught: dict[str, list[Tensor]]) -> Tensor:
    """Squared error of what attention modules return over the squares of what was taught, mean over them, [batch].

    Args:
        mine, taught: what LayerOutputs gathered in a forward of the student and of the teacher; no gradient goes to
            the latter.
    """
    errors = []
    for name, outputs in taught.items():
        for out, told in zip(mine[name], outputs, strict=True):
            errors.append(_relative(out, told.detach().to(torch.promote_types(told.dtype, torch.float32))))
    return torch.stack([error.to(errors[0].device) for error in errors]).mean(0)


def output_error(out: Tensor, q: Tensor, k: Tensor, v: Tensor, ctx: Context) -> Tensor:
    """Squared error of an attention output over the squares of the dense one, [batch], in float32 or more.

    Args:
        out: [batch, heads, q_len, value dim].
        q, k, v: [batch, heads or kv_heads, tokens, dim] of the call; no gradient goes to the dense output.
        ctx: where the call is.
    """
    with torch.no_grad():
        dense = dense_attention(q, k, v, ctx)[0].to(torch.promote_types(out.dtype, torch.float32))
    return _relative(out, dense)


def _relative(out: Tensor, told: Tensor) -> Tensor:
    """Squared error of [batch, ...] over the squares of what was told, [batch]."""
    size = told.square().flatten(1).sum(1).clamp(min=torch.finfo(told.dtype).tiny)
    return (out.to(told.dtype) - told).square().flatten(1).sum(1) / size


def mean_error(found: Sequence[tuple[int, Tensor]], batch: int) -> Tensor:
    """Mean over the layers of the errors of each sample, [batch].

    Args:
        found: what AttentionMatch gathered in one forward.
        batch: samples of that forward.

    Raises:
        ValueError: no call was sparse, or the calls were cut to parts of the batch.
    """
    if not found:
        raise ValueError(
            "attention matching must have a layer that runs sparse, all are dense here: set `sparse.min_tokens` to 0 "
            "to take short calls too"
        )
    if any(error.shape != (batch,) for _, error in found):
        raise ValueError(f"attention matching must have {batch} samples without padding in every call")
    return torch.stack([error.to(found[0][1].device) for _, error in found]).mean(0)


def layer_figures(found: Sequence[tuple[int, Tensor]]) -> dict[str, float]:
    """`attention_error` and `attention_error_layer_<n>`: roots of mean errors, over the layers and of each.

    Args:
        found: what AttentionMatch gathered in some forwards.
    """
    layers: dict[int, list[float]] = {}
    for layer, error in found:
        layers.setdefault(layer, []).extend(error.tolist())
    roots = {layer: math.sqrt(sum(e) / len(e)) for layer, e in sorted(layers.items())}
    if not roots:
        return {}
    mean = sum(roots.values()) / len(roots)
    return {"attention_error": mean, **{f"attention_error_layer_{layer}": root for layer, root in roots.items()}}


def divergence(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of next-token distributions, from the teacher's, [...], in float32 or more.

    Times the square of the temperature, so that gradients keep their size (Hinton et al. 2015, arXiv 1503.02531).

    Args:
        student, teacher: logits [..., vocabulary].
        temperature: that both are divided by.
    """
    dtype = torch.promote_types(student.dtype, torch.float32)
    told = torch.log_softmax(teacher.to(dtype) / temperature, -1)
    said = torch.log_softmax(student.to(dtype) / temperature, -1)
    return temperature**2 * (told.exp() * (told - said)).sum(-1)
