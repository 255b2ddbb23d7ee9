"""What an attention layer of transformers had before positions came into it, kept for methods that read it."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.hosts.transformers_hook import code_names
from hf_sparse_attn.method import MethodDoesNotApply
from hf_sparse_attn.patching import Patch


class LayerWatch:
    """Keeps what the parts of one attention module give while it runs, until the attention function asks for it.

    The part that is watched is looked up in every forward, for PEFT may put a wrapper in its place, before or after,
    and what counts is what the wrapper gives.

    Args:
        patch: takes the hooks off.
        parts: name of the part whose output is kept, by field of LayerInputs ("q", "k").
        hidden: whether to keep what the module itself reads, too.
    """

    def __init__(self, patch: Patch, parts: dict[str, str], hidden: bool) -> None:
        self.patch = patch
        self.parts = parts
        self.hidden = hidden
        self._kept: dict[str, Tensor] = {}
        self._watched: dict[str, tuple[nn.Module, Any]] = {}
        self._closed = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs before the module: a new call begins."""
        # A compiled graph is dense and hands nothing over; hooks in it would only break it.
        if self._closed or torch.compiler.is_compiling():
            return
        self._kept.clear()
        for field, name in self.parts.items():
            part, watched = getattr(module, name), self._watched.get(field)
            if watched is None or watched[0] is not part:
                if watched is not None:
                    watched[1].remove()
                kept = partial(self._keep, field)
                self._watched[field] = part, self.patch.hook(part, "register_forward_hook", kept)
        if self.hidden:
            self._kept["hidden"] = args[0] if args else kwargs["hidden_states"]

    def _keep(self, field: str, part: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not self._closed and not torch.compiler.is_compiling():
            self._kept[field] = output

    def release(self) -> dict[str, Tensor]:
        """What was kept of the call that is running, which is forgotten."""
        kept, self._kept = self._kept, {}
        return kept

    def inputs(self, kept: dict[str, Tensor], q: Tensor, k: Tensor) -> LayerInputs | str:
        """What was kept as it is handed over, or why it cannot be.

        Args:
            kept: what `release` gave.
            q: [batch, heads, q_len, dim] of the call.
            k: [batch, kv_heads, kv_len, dim] of the call; those before the last q_len keys come from a cache.
        """
        found: dict[str, Tensor] = {}
        for field, like in (("q", q), ("k", k)):
            if field not in self.parts:
                continue
            if field not in kept:
                return f"{self.parts[field]} did not run in this layer"
            one = _by_head(kept[field], like.shape[1], q.shape[2], like.shape[3])
            if one is None:
                gives = f"{self.parts[field]} gives {list(kept[field].shape)}"
                return f"{gives} where the layer has {list(like.shape)} for {q.shape[2]} queries"
            found[field] = one
        if self.hidden:
            hidden = kept.get("hidden")
            if hidden is None or hidden.ndim != 3 or hidden.shape[:2] != (q.shape[0], q.shape[2]):
                return "the layer's hidden states are not [batch, tokens, width]"
            found["hidden"] = hidden
        return LayerInputs(**found)

    def close(self) -> None:
        """Keeps nothing any more."""
        self._closed = True
        self._kept.clear()
        self._watched.clear()


def watch_layer(patch: Patch, module: nn.Module, name: str) -> LayerWatch:
    """Watches an attention module for what the patch's session reads; undone by the patch.

    Raises:
        MethodDoesNotApply: its queries or keys before positions cannot be told from outside.
    """
    reads = patch.session.reads
    parts = {}
    for field in sorted(reads & {"q", "k"}):
        part = _part(module, field)
        if part is None:
            raise MethodDoesNotApply(
                f"`method` {patch.method.name!r} reads queries and keys before positions: a layer must make them in "
                f"parts called {field}_norm or {field}_proj, which {name} ({type(module).__name__}) does not"
            )
        parts[field] = part
    watch = LayerWatch(patch, parts, "hidden" in reads)
    patch.on_remove(watch.close)
    patch.hook(module, "register_forward_pre_hook", watch.before, with_kwargs=True)
    return watch


def _part(module: nn.Module, field: str) -> str | None:
    """Name of the part that gives queries or keys last before positions are put in: the norm, else the projection."""
    # A norm after the rotation is none that counts here.
    names = code_names(type(module))
    rotated = next((i for i, n in enumerate(names) if "rot" in n and "apply" in n), len(names))
    for name in (f"{field}_norm", f"{field}_proj"):
        if name in names[:rotated] and isinstance(getattr(module, name, None), nn.Module):
            return name
    return None


def _by_head(x: Tensor, heads: int, tokens: int, dim: int) -> Tensor | None:
    """A projection or norm of [batch, tokens, heads * dim] or by head, as [batch, heads, tokens, dim]."""
    if x.ndim == 3 and x.shape[1:] == (tokens, heads * dim):
        return x.unflatten(2, (heads, dim)).transpose(1, 2)
    # With as many tokens as heads it cannot be told which is which.
    if x.ndim != 4 or heads == tokens:
        return None
    if x.shape[1:] == (tokens, heads, dim):
        return x.transpose(1, 2)
    return x if x.shape[1:] == (heads, tokens, dim) else None
