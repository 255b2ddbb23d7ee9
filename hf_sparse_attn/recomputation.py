"""Gradient checkpointing: what runs again in backward must meet the patch as it was, or backward says so."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_sparse_attn.patching import Patch
from hf_sparse_attn.session import Session

_CHECKPOINT = inspect.unwrap(checkpoint).__code__


@dataclass
class _Forward:
    """A forward with gradients: whether some of its attention runs again in backward, and what it runs inside of."""

    again: bool
    outer: _Forward | None


_RUNNING: ContextVar[_Forward | None] = ContextVar("hf_sparse_attn_forward", default=None)


def note(session: Session) -> None:
    """Notes that attention of a patched layer runs: part of the forward that runs in this thread."""
    running = _RUNNING.get()
    if running is not None and not running.again and _is_checkpointed():
        running.again = session.checkpointed = True


def is_quiet() -> bool:
    """Whether no forward with gradients and no backward runs in this thread, so that nothing can run again."""
    return _RUNNING.get() is None and torch._C._current_graph_task_id() == -1


def is_of_before(session: Session) -> bool:
    """Whether backward runs attention again of a forward before the patch: none since is known."""
    return not session.checkpointed and in_backward()


def is_of_unknown(session: Session) -> bool:
    """Whether backward runs attention again where forwards under the patch were checkpointed."""
    return session.checkpointed and in_backward()


def in_backward() -> bool:
    """Whether backward runs in this thread, and no forward within it."""
    return _RUNNING.get() is None and torch._C._current_graph_task_id() != -1


def watch(patch: Patch) -> None:
    """Looks at the forwards of what is patched, until the patch is removed."""
    session = patch.session

    def enter(module: nn.Module, args: Any) -> None:
        session.check_program()
        if not torch.compiler.is_compiling() and torch.is_grad_enabled():
            _RUNNING.set(_Forward(False, _RUNNING.get()))

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running = None if torch.compiler.is_compiling() else _RUNNING.get()
        # Where gradients were switched off within the forward, an outer one must not be left for it.
        if running is None or not torch.is_grad_enabled():
            return
        _RUNNING.set(running.outer)
        if running.again:
            check = _check(patch, session.paused)
            for node in {t.grad_fn for t in _tensors(output) if t.grad_fn is not None}:
                node.register_prehook(check)

    for module in patch.modules:
        patch.hook(module, "register_forward_pre_hook", enter)
        patch.hook(module, "register_forward_hook", leave, always_call=True)


def _check(patch: Patch, paused: bool) -> Any:
    """Raises, where backward begins, if what it runs again would be other attention than in the forward."""

    def check(_: Any) -> None:
        if patch.removed:
            raise RuntimeError(
                "gradient checkpointing runs layers again in backward, but the patch of their forward was removed: "
                "call backward() before remove() or the end of `with hsa.patch(...)`"
            )
        if paused != (patch.session.paused):
            raise RuntimeError(
                "gradient checkpointing runs layers again in backward: forward and backward must both be within "
                "patch.paused(), or both outside of it"
            )

    return check


def _is_checkpointed() -> bool:
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code is _CHECKPOINT:
            return True
    return False


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _tensors(value)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
