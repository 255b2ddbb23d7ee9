"""The second way to reach attention: PyTorch's own function, within the processors of a patch and nowhere else."""

from __future__ import annotations

import functools
from abc import ABCMeta
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# One call of scaled_dot_product_attention: the function that does it, its arguments as given.
Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_SCOPED = "_hf_sparse_attn_scoped"
_DONE = "_hf_sparse_attn_done"
# PyTorch's function, whatever stands under its name.
SDPA: Callable[..., Tensor] = torch._C._nn.scaled_dot_product_attention
# Where torch has the function that its context parallelism puts there.
_RING = "torch.distributed.tensor."


class _Intercept(TorchFunctionMode):
    """Hands every call of scaled_dot_product_attention to `answer`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is SDPA:
            return self.answer(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def watched_by() -> str | None:
    """What is at work that must see every call of scaled_dot_product_attention, in words, or None.

    Either a mode (perturbed attention guidance is one) or a function put in the place of PyTorch's own. The modes of
    torch itself say on which device tensors are made, or trace; they do not change what attention is.
    """
    for mode in torch.overrides._get_current_function_mode_stack():
        kind = type(mode)
        if kind is not _Intercept and kind.__module__.partition(".")[0] != "torch":
            return f"{kind.__name__} at work, a mode that sees every call of a function of torch"
    now = F.scaled_dot_product_attention
    if now is SDPA:
        return None
    name = getattr(now, "__qualname__", type(now).__qualname__)
    return f"{name} of {getattr(now, '__module__', None)} in the place of scaled_dot_product_attention"


def is_context_parallel() -> bool:
    """Whether torch's context parallelism is at work: each rank then holds a share of the tokens."""
    own = getattr(F.scaled_dot_product_attention, "__globals__", {}).get("__name__", "")
    return str(own).startswith(_RING)


class _Alike(ABCMeta):
    """A class that is found where its base is looked up, as the hooks of diffusers look up processors."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or other is cls.__base__

    def __hash__(cls) -> int:
        return hash(cls.__base__)


def scoped_class(kind: type[Any], answer_for: Callable[[Any], Answer | None]) -> type[Any]:
    """A subclass of a processor's class whose calls of scaled_dot_product_attention are answered.

    Giving an object this class is undone by giving it its own class again: nothing of it is copied or replaced.

    Args:
        kind: the class of the processor.
        answer_for: the answer for an attention module while its processor runs, or None to leave it alone.
    """
    original = kind.__call__

    @functools.wraps(original)
    def call(self: Any, attn: Any, *args: Any, **kwargs: Any) -> Any:
        answer = answer_for(attn)
        if answer is None:
            return original(self, attn, *args, **kwargs)
        with _Intercept(answer):
            return original(self, attn, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # A copy is of the class that can be found by its name, and knows nothing of `answer_for`.
        plain: Any = object.__new__(kind)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce_ex__(protocol)

    # Graphs of torch.compile end here: a mode that is entered inside of one would not be seen.
    body: dict[str, Any] = {"__call__": torch.compiler.disable(call), "__module__": kind.__module__, _SCOPED: True}
    body["__reduce_ex__"] = reduce
    return _Alike(kind.__name__, (kind,), body)


def unscope(processor: Any, scoped: type[Any]) -> None:
    """Gives an object that has a class made by `scoped_class` its own again, below others whose turn has not come."""
    setattr(scoped, _DONE, True)
    kind = type(processor)
    while kind.__dict__.get(_DONE, False):
        kind = kind.__bases__[0]
    processor.__class__ = kind


def is_scoped(processor: object) -> bool:
    """Whether a processor has a class made by `scoped_class`."""
    return getattr(type(processor), _SCOPED, False) is True
