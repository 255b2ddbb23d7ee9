"""What a call of a patched pipeline tells: which of its networks are not those that were patched."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any
from weakref import WeakSet, ref

from torch import nn

from hf_sparse_attn.hosts.diffusers_model import networks, outermost_models, pipeline_of
from hf_sparse_attn.patching import Patch, active_patch

_WATCHED = "_hf_sparse_attn_watched"


def watch(patch: Patch) -> None:
    """Has every call of the pipeline that was patched look at its networks, until the patch is removed.

    A network that is dense though another one is sparse is counted once for each call of the pipeline, under its own
    name; with strict=True the call raises. Does nothing for a bare transformer.
    """
    pipeline = pipeline_of(patch)
    kind: Any = type(pipeline)
    if not any("__call__" in vars(base) for base in kind.__mro__):
        return
    # One whose transformer was dropped while patched is watched for nobody any more.
    kind = getattr(kind, _WATCHED, kind)
    pipeline.__class__ = _watched_class(kind, _look(patch, pipeline))
    # Weak, for a transformer that is kept alone must not keep its pipeline alive.
    held = ref(pipeline)

    def restore() -> None:
        if (now := held()) is not None:
            now.__class__ = kind

    patch.on_remove(restore)


def _look(patch: Patch, pipeline: Any) -> Callable[[Any], None]:
    """What looks at a pipeline's networks; holds nothing of them or of the patch."""
    session, own, patched = patch.session, ref(pipeline), WeakSet(patch.modules)
    left_out = WeakSet(part for part in networks(pipeline).values() if not _holds(part, patched))

    def look(pipeline: Any) -> None:
        # A copy is another pipeline.
        if own() is not pipeline or session.paused or session.method.name == "dense":
            return
        for name, part in networks(pipeline).items():
            if _holds(part, patched) or any(active_patch(model) is not None for model in outermost_models([part])):
                continue
            what = "cannot be patched" if part in left_out else "was replaced after the patch"
            reason = f"{name} ({type(part).__name__}) {what} and runs dense"
            session.notes.add(reason)
            session.give_up(session.record(name, 0), reason)

    return look


def _holds(part: nn.Module, patched: WeakSet[nn.Module]) -> bool:
    return any(module in patched for module in part.modules())


def _watched_class(kind: Any, look: Callable[[Any], None]) -> Any:
    """A subclass of a pipeline's class that looks at the pipeline before every call."""
    original = kind.__call__

    @functools.wraps(original)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        look(self)
        return original(self, *args, **kwargs)

    def reduce(self: Any, protocol: Any) -> Any:
        # A copy, or what is loaded again, is of the class that it had.
        _, _, *state = super(watched, self).__reduce_ex__(protocol)
        return object.__new__, (kind,), *state

    body = {"__call__": call, "__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__}
    watched: Any = type(kind.__name__, (kind,), {**body, "__qualname__": kind.__qualname__, _WATCHED: kind})
    return watched
