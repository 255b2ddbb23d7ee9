"""How the models of diffusers are made, what a family says of them, and the attention dispatcher."""

from __future__ import annotations

import inspect
import logging
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn

from hf_sparse_attn.context import LayerInputs, Segment, TokenLayout
from hf_sparse_attn.hosts.padding import key_padding
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.session import Session

log = logging.getLogger(__name__)

_MODELS = "diffusers.models.transformers."
_NETWORKS = (_MODELS, "diffusers.models.controlnets.")
# Parts of a path that say a module is no self-attention over the main tokens.
_ASIDE = re.compile(
    r"attn2|(.*_)?cross_att.*|.*_to_.*_attn|(audio|text|txt|context|face|perceiver)_?.*|.*_text_.*|.*refiner.*|image_cond"
)

# Networks of a pipeline that denoise.
PIPELINE_PARTS = ("transformer", "transformer_2", "unconditional_transformer")
# Attributes of a patched module: its number as a tensor, which is how a compiled graph knows it, and its name.
NUMBER = "_hsa_number"
NAME = "_hsa_name"
# How a processor reaches attention: the dispatcher with a backend of its own, or PyTorch's function.
Way: TypeAlias = Literal["dispatcher", "function"]
# What the dispatcher keeps for a backend: its function, its checks, the arguments it is given.
DISPATCH_TABLES = ("_backends", "_constraints", "_supported_arg_names")


@dataclass(frozen=True)
class Tokens:
    """What the tokens of self-attention are in one forward; their number is known when a layer runs.

    Args:
        grid: (frames, height, width) in tokens, an image being one frame; None where the order is not known.
        before, after: text or condition tokens before and after the video; None for one of them means as many as the
            sequence holds besides.
    """

    grid: tuple[int, int, int] | None
    before: int | None = 0
    after: int | None = 0

    def layout(self, length: int) -> TokenLayout | None:
        """The layout of a sequence of `length` tokens, or None where it does not fit the grid."""
        if self.grid is None:
            return TokenLayout.bidirectional(length)
        video = Segment("video", self.grid[0] * self.grid[1] * self.grid[2], self.grid)
        rest = length - video.length - (self.before or 0) - (self.after or 0)
        before = rest if self.before is None else self.before
        after = rest if self.after is None else self.after
        if before + video.length + after != length or rest < 0:
            return None
        return TokenLayout.video(*self.grid, text_before=before, text_after=after)

    def sizes(self) -> list[int]:
        """As whole numbers, -1 for what is not known; see `of_sizes`."""
        return [-1 if n is None else n for n in (*(self.grid or (-1, -1, -1)), self.before, self.after)]

    @classmethod
    def of_sizes(cls, sizes: list[int]) -> Tokens:
        """The inverse of `sizes`."""
        frames, height, width, *rest = sizes
        before, after = (None if n < 0 else n for n in rest)
        return cls(None if frames < 0 else (frames, height, width), before, after)

    def __str__(self) -> str:
        return str(TokenLayout.video(*self.grid, self.before or 0, self.after or 0)) if self.grid else "of any order"


@dataclass(frozen=True)
class Place:
    """A self-attention module: its path in the transformer, the index of its layer, the module, and how it asks."""

    path: str
    index: int
    attention: Any
    way: Way = "dispatcher"


@dataclass(frozen=True)
class Layer:
    """One patched attention: path, record, index of how many layers, the backend it had, and how it asks."""

    path: str
    record: LayerRecord
    index: int
    num_layers: int
    backend: Any
    way: Way


@dataclass(frozen=True)
class Call:
    """What all layers of one forward share; `num_steps` is None where nobody knows it."""

    tokens: Tokens
    step: int
    num_steps: int | None
    branch: str | None
    # By mask, as most models give one to all layers: to look at its values is to wait for the device.
    trims: Any = field(compare=False)


@dataclass(frozen=True)
class Asked:
    """One call of attention, in [batch, heads, tokens, dim].

    Args:
        q, k, v: what attends to what.
        mask: as scaled_dot_product_attention takes it, or what else the family makes of it.
        scale: factor on the logits; None means dim ** -0.5.
        odd: features of the call, by name, that sparse attention does not have.
        dense: the model's own attention of q, k, v and a mask.
        inputs: what else the layer had, where the method reads it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    scale: float | None
    odd: tuple[str, ...]
    dense: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    inputs: LayerInputs | None = None


class DiffusersFamily(ABC):
    """The base of families whose models are transformers of diffusers. It is used as it is, without an instance: what
    belongs to a patch, a forward or a layer at work is none of its business.
    """

    @staticmethod
    @abstractmethod
    def places(transformer: Any) -> Iterable[Place]:
        """The self-attention modules of a transformer, in the order they run."""

    @staticmethod
    @abstractmethod
    def tokens(transformer: Any, inputs: Mapping[str, Any]) -> Tokens:
        """What the tokens of a forward are, from its arguments by name."""

    @staticmethod
    def layer_inputs(inputs: Mapping[str, Any]) -> LayerInputs | None:
        """What a method that reads more than q, k and v is handed, from the arguments of an attention by name."""
        return None

    @staticmethod
    def text_keys(inputs: Mapping[str, Any]) -> int:
        """How many keys are the text alone, by which cross-attention under another name is told; 0 for no such."""
        return 0

    @staticmethod
    def blocks(transformer: nn.Module) -> Iterable[str]:
        """Paths of the modules whose inputs say which forward backward runs again, besides the rotary tables."""
        return ()

    @staticmethod
    def valid(mask: Tensor, batch: int, tokens: int) -> Tensor | Decline:
        """Which tokens see one another, as padding.key_padding has it, or what the mask says besides."""
        return key_padding(mask, batch, tokens)

    @staticmethod
    def dense_mask(mask: Tensor | None, tokens: int) -> Tensor | None:
        """The mask that the model's own attention is given."""
        return mask

    @staticmethod
    def stand_in(processor: Any, backend: Any, session: Session) -> Any | None:
        """A processor that runs instead of `processor` and asks `backend` for attention; None where it can itself."""
        return None


def find_transformers(model: object, classes: Mapping[str, str]) -> list[nn.Module] | Decline:
    """The transformers of some classes in a module or pipeline; imports nothing: what is not loaded cannot be given.

    Args:
        model: a module, perhaps wrapped (PEFT, torch.compile), or a pipeline.
        classes: module file -> class name.
    """
    parts = transformer_parts(model)
    if isinstance(parts, Decline):
        return parts
    loaded = [(sys.modules[file], name) for file, name in classes.items() if file in sys.modules]
    kinds = tuple(getattr(file, name) for file, name in loaded if hasattr(file, name))
    found = dict.fromkeys(m for part in parts for m in part.modules() if isinstance(m, kinds))
    return list(found) or Decline(f"{type(model).__name__} holds no {' or '.join(classes.values())}")


def transformer_parts(model: object) -> list[nn.Module] | Decline:
    """The module itself, or the transformers of a pipeline."""
    kind = type(model).__name__
    if isinstance(model, nn.Module):
        return [model]
    if not any(hasattr(model, name) for name in PIPELINE_PARTS):
        return Decline(f"{kind} is neither a module nor a pipeline with a `transformer`")
    held = [getattr(model, name, None) for name in PIPELINE_PARTS]
    if all(part is None for part in held):
        return Decline(f"{kind} has no transformer: {', '.join(PIPELINE_PARTS)} are None or absent")
    return [part for part in held if isinstance(part, nn.Module)]


def networks(pipeline: object) -> dict[str, nn.Module]:
    """The networks of a pipeline by name: what denoises, and what else (a ControlNet) takes part."""
    return {
        name: part
        for name, part in vars(pipeline).items()
        if isinstance(part, nn.Module) and (name in PIPELINE_PARTS or outermost_models([part]))
    }


def transformers_of_diffusers(model: object) -> list[nn.Module] | Decline:
    """The outermost transformer models of diffusers, of any class, in a module or pipeline."""
    parts = transformer_parts(model)
    if isinstance(parts, Decline):
        return parts
    found = outermost_models(parts, (_MODELS,))
    return found or Decline(f"{type(model).__name__} holds no transformer model of diffusers")


def outermost_models(parts: Iterable[nn.Module], files: tuple[str, ...] = _NETWORKS) -> list[nn.Module]:
    """The outermost models of some files of diffusers in some modules: transformers, and ControlNets if not asked."""
    found: dict[nn.Module, None] = {}
    inside: set[nn.Module] = set()
    for part in parts:
        for module in part.modules():
            bases = [base for base in type(module).__mro__ if base.__module__.startswith(files)]
            # Several ControlNets are run one by one.
            several = any("Multi" in base.__name__ and "ControlNet" in base.__name__ for base in bases)
            if module not in inside and not several and any("config_name" in dir(base) for base in bases):
                found[module] = None
                inside.update(module.modules())
    return list(found)


def names_of(module: object) -> list[str]:
    """Names of a module's class and of those it is made from: one that is sharded has a class of its own."""
    return [kind.__name__ for kind in type(module).__mro__]


def self_attentions(transformer: nn.Module) -> list[tuple[str, Any, Way | None]]:
    """The self-attention modules over the main tokens of any transformer, found by their processors and names.

    Each with its path before it, and behind it how its processor reaches attention. Left out: cross-attention, and
    what works on text, audio or conditions alone.
    """
    found = []
    for path, module in transformer.named_modules():
        processor = getattr(module, "processor", None)
        if processor is None or getattr(module, "is_cross_attention", False) is True:
            continue
        if not any(_ASIDE.fullmatch(part) for part in path.split(".")):
            found.append((path, module, way_of(processor)))
    return found


def way_of(processor: object) -> Way | None:
    """How a processor reaches attention: the dispatcher with a backend of its own, PyTorch's function, or neither."""
    if hasattr(processor, "_attention_backend"):
        return "dispatcher"
    kind: Any = type(processor)
    call = inspect.unwrap(kind.forward if isinstance(processor, nn.Module) else kind.__call__)
    names = getattr(getattr(call, "__code__", None), "co_names", ())
    # The dispatcher ends in PyTorch's function unless another backend was set for the whole process.
    known = "scaled_dot_product_attention" in names or "dispatch_attention_fn" in names
    return "function" if known else None


def pipeline_of(patch: Patch) -> Any:
    """The pipeline that was patched, which alone knows how many steps a run has; None for a bare transformer."""
    return None if isinstance(patch.model, nn.Module) else patch.model


def forward_parameters(kind: type[Any]) -> list[str]:
    """Names of the arguments of a class's forward."""
    return list(inspect.signature(kind.forward).parameters)[1:]


def rotary_table(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The first rotary table given to an attention layer."""
    named = [value for name, value in kwargs.items() if any(part in name for part in ("rotary", "rope", "freqs"))]
    for table in (*named, *(a for a in args if isinstance(a, (tuple, list)))):
        first = table[0] if isinstance(table, (tuple, list)) and table else table
        if isinstance(first, Tensor):
            return first
    return None


def dispatcher() -> tuple[Callable[..., Tensor], Any, Any]:
    """The dispatch function of diffusers, its backend tables and the type of a backend's name.

    Raises:
        RuntimeError: they are not where versions 0.36 to 0.42 have them.
    """
    import diffusers

    try:
        from diffusers.models import attention_dispatch as file

        tables = file._AttentionBackendRegistry
        if all(isinstance(getattr(tables, name), dict) for name in DISPATCH_TABLES):
            return file.dispatch_attention_fn, tables, file.AttentionBackendName
    except (ImportError, AttributeError) as error:
        log.debug("diffusers %s: %s", diffusers.__version__, error)
    raise RuntimeError(f"`diffusers` must have the attention dispatcher of 0.36 to 0.42, got {diffusers.__version__}")
