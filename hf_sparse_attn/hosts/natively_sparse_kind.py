"""What one kind of models that select their own keys has to say of itself, so that the hook can run it."""

from __future__ import annotations

import inspect
import types
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn import recomputation
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE
from hf_sparse_attn.hosts.transformers_hook import LayerState, state_here
from hf_sparse_attn.overlay import own_value
from hf_sparse_attn.patching import Patch

# Decoders that choose their own keys: they cut the mask up inside the model, and no other choice can be made there.
_SPARSE_BY_THEMSELVES = frozenset(
    {
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "doge",
        "dots3_note",
        "glm5_next",
        "glm_moe_dsa",
        "hy_v4",
        "minimax_m3_vl",
        "mistral_large4",
        "qwen4_exp",
    }
)


def is_sparse_by_itself(config: Any) -> bool:
    """Whether the decoder that a config is of chooses its own keys, in whatever way."""
    # A model of images and text has its decoder under a name of its own.
    return str(getattr(config, "model_type", "")).removesuffix("_text") in _SPARSE_BY_THEMSELVES


class Attended(NamedTuple):
    """What attention over a selection gave.

    Args:
        out: [batch, q_len, heads, value dim], contiguous.
        listed: pairs of query and key that were read, those that the mask hides left out; over batch and heads.
        visible: all pairs that the mask shows; over batch and heads.
        backend: what ran.
    """

    out: Tensor
    listed: int | Tensor
    visible: int
    backend: str


class OwnCall(NamedTuple):
    """What the model's own attention function is given."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    kwargs: dict[str, Any]


class Kind(ABC):
    """One kind of models that select their own keys; a subclass in a file of its own, one instance in KINDS.

    The hook stands under the name that the configs of a patched model point at, so that layers hand their selection
    over, as an argument (`indices`) or by what a seam kept of it. Masks reach the layer as SelectingMask objects where
    transformers makes them, and as tensors where the user gave them.

    All the functions are asked for attention modules of text (transformers_hook.is_text_attention) alone. A seam is a
    method of an instance that `install` replaces through `replace_method`; the replacement runs where the layer is
    awake (`awake`), and elsewhere calls what it stands for.
    """

    name: ClassVar[str] = ""
    # Values of config.model_type, "_text" left out.
    models: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """Why the layers of a model cannot be reached, or None; looks at its modules, changes nothing.

        Args:
            owner: the innermost transformers model that holds the layers.
            modules: its attention modules.
        """

    def own_sparsity(self, module: Any) -> str | None:
        """Why a layer has no selection (a sliding window, dense by design), in words; None where it selects keys."""
        return None

    @abstractmethod
    def install(self, patch: Patch, module: Any) -> None:
        """Replaces the seams of one layer that selects keys."""

    @abstractmethod
    def attend(self, state: SelectingLayer, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """Attention over the selection of one call, or why the call must run as transformers runs it.

        Args:
            state, module: the layer.
            q, k, v, mask, kwargs: what the model hands to an attention function.
        """

    def narrow(self, module: Any, call: OwnCall) -> Tensor | None:
        """Output [batch, q_len, heads, value dim] of a layer without a selection, without a mask of all pairs.

        None where it runs as transformers runs it, which is what a kind need not care for.
        """
        return None

    @abstractmethod
    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """What transformers' own function is given for a call; the selection is in its mask.

        Args:
            module: the layer.
            call: what the model handed over, its mask a tensor of the model's own implementation, or None.
            active: whether the seams were in force, so that the arguments are theirs.
        """


@dataclass(frozen=True)
class SelectingLayer(LayerState):
    """What a layer that selects its keys needs to run by its lists.

    Args:
        kind: of the model.
        own_sparsity: why it has no selection; see Kind.
    """

    kind: Kind | None = None
    own_sparsity: str | None = None


def layer_of(module: nn.Module) -> SelectingLayer | None:
    """The state of a layer, asleep or not."""
    state = module.__dict__.get(STATE_ATTRIBUTE)
    return state if isinstance(state, SelectingLayer) else None


def awake(module: nn.Module) -> bool:
    """Whether a layer that runs now runs by its lists; else it runs as without the patch.

    Graphs and transforms of torch.func see the model as it is: nothing here can be traced.
    """
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    state = state_here(layer_of(module), module, None)
    return state is not None and not state.session.paused and not recomputation.is_of_before(state.session)


def why_other(module: Any, method: str, *wanted: str) -> str | None:
    """Why a method of a module is not the one that is known here, or None.

    Args:
        module: the module.
        method: name of the method.
        wanted: names of its parameters besides self, in order.
    """
    found = own_value(module, method)
    where = f"{type(module).__name__}.{method}"
    if not callable(found):
        return f"{where} is missing"
    got = [p for p in inspect.signature(found).parameters if p != "self"]
    if got != list(wanted):
        return f"{where} takes ({', '.join(got)}) where ({', '.join(wanted)}) is known"
    return None


def replace_method(patch: Patch, owner: Any, method: str, call: Callable[..., Any], awake: Callable[[], bool]) -> None:
    """Lets a method of an instance be another one while its layer is awake, until the patch is removed.

    Args:
        patch: undoes it.
        owner: the instance.
        method: name of the method.
        call: takes the instance first, then what the method takes.
        awake: whether the layer is.
    """
    before = getattr(owner, method)

    def chosen(self: Any, *args: Any, **kwargs: Any) -> Any:
        return call(self, *args, **kwargs) if awake() else before(*args, **kwargs)

    patch.set_attribute(owner, method, types.MethodType(chosen, owner))
