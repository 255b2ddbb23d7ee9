"""The second way to reach attention: PyTorch's own function, within the processors of a patch and nowhere else."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# One call of scaled_dot_product_attention: the function that does it, its arguments as given.
Answer = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
_SCOPED = "_hf_sparse_attn_scoped"


class _Intercept(TorchFunctionMode):
    """Hands every call of scaled_dot_product_attention to `answer`."""

    def __init__(self, answer: Answer) -> None:
        super().__init__()
        self.answer = answer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return self.answer(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


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
        plain = kind.__new__(kind)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce_ex__(protocol)

    # Graphs of torch.compile end here: a mode that is entered inside of one would not be seen.
    body: dict[str, Any] = {"__call__": torch.compiler.disable(call), "__module__": kind.__module__, _SCOPED: True}
    body["__reduce_ex__"] = reduce
    return type(kind.__name__, (kind,), body)


def is_scoped(processor: object) -> bool:
    """Whether a processor has a class made by `scoped_class`."""
    return getattr(type(processor), _SCOPED, False) is True
