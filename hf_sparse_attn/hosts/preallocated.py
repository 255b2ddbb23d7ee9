"""PreallocatedCache: a cache of transformers with room for the tokens to come, which are written where they stay."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.transforms import are_transformed

# What `patch(cache=...)` takes besides None.
PREALLOCATED = "preallocated"
# Fewest tokens that room is made for, where nobody says how many come.
_FEWEST = 64
_NAMES = ("keys", "values")


@dataclass
class _Room:
    """A tensor [..., capacity, dim] and the view of its first tokens that the layer has handed over last."""

    buffer: Tensor
    view: Tensor
    written: int

    def append(self, new: Tensor, length: int) -> Tensor:
        """The view of so many tokens and `new` ones, which are written behind them."""
        end = length + new.shape[-2]
        # What was never written is in no view, so that no graph can need it as it was. After a crop one may: then the
        # write is known to autograd, whose backward raises rather than go on with other numbers.
        target = self.buffer if length < self.written else self.buffer.data
        target.narrow(-2, length, new.shape[-2]).copy_(new)
        self.written = max(self.written, end)
        self.view = self.buffer.narrow(-2, 0, end)
        return self.view


class PreallocatedLayer(DynamicLayer):
    """A layer of a cache whose keys and values are views of the filled part of larger tensors, and are appended there.

    Where gradients are wanted, or what comes does not go with what is kept (another dtype, device or batch), it is
    concatenated as DynamicLayer does.

    Args:
        max_tokens: room that is made at once; more make it grow. None means twice of what there is, each time.
    """

    # Of the class, for a layer becomes one by its class alone.
    max_tokens: int | None = None
    _rooms: dict[str, _Room] | None = None

    def __init__(self, max_tokens: int | None = None) -> None:
        super().__init__()
        if max_tokens is not None:
            self.max_tokens = check_int("max_tokens", max_tokens, 1)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends keys and values [batch, kv_heads, new, dim]; returns all, [batch, kv_heads, length, dim]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        if not self._fits(key_states, value_states, length):
            found: tuple[Tensor, Tensor] = super().update(key_states, value_states, *args, **kwargs)
            self._let_go()
            return found
        self.keys = all_keys = self._room("keys", key_states, length).append(key_states, length)
        self.values = all_values = self._room("values", value_states, length).append(value_states, length)
        return all_keys, all_values

    def _fits(self, keys: Tensor, values: Tensor, length: int) -> bool:
        """Whether new keys and values can be written behind those that are kept."""
        if length == 0 and self.max_tokens is None:
            # A prompt is kept as it is: many calls end with it.
            return False
        if torch.compiler.is_compiling() or are_transformed(keys, values) or keys.shape[:-1] != values.shape[:-1]:
            return False
        pairs: list[tuple[Any, Tensor]] = [(self.keys, keys), (self.values, values)]
        if torch.is_grad_enabled() and any(tensor.requires_grad for pair in pairs for tensor in pair):
            return False
        return all(type(new) is Tensor and (length == 0 or _alike(held, new)) for held, new in pairs)

    def _room(self, name: str, new: Tensor, length: int) -> _Room:
        """Where the next keys or values are written: with what is kept of them at its start."""
        rooms = self._rooms = {} if self._rooms is None else self._rooms
        held, room, end = getattr(self, name), rooms.get(name), length + new.shape[-2]
        # What was made in inference mode cannot be written outside.
        if room is None or room.view is not held or room.buffer.shape[-2] < end or _is_sealed(room.buffer):
            wanted = self.max_tokens or 0
            capacity = wanted if end <= wanted else max(2 * end, _FEWEST)
            buffer = new.new_empty(*new.shape[:-2], capacity, new.shape[-1])
            room = rooms[name] = _Room(buffer, buffer.narrow(-2, 0, length), length)
            if length:
                room.view.copy_(held)
        return room

    def _let_go(self) -> None:
        """Frees what is no longer the layer's keys and values."""
        rooms = self._rooms or {}
        if any(room.view is not getattr(self, name) for name, room in rooms.items()):
            self._rooms = None

    def reset(self) -> None:
        """See DynamicLayer."""
        super().reset()
        self._rooms = None

    def crop(self, tokens_to_remove: int) -> None:
        """See DynamicLayer; what comes next is written over what is cut off, unless gradients may need it."""
        before = [getattr(self, name) for name in _NAMES]
        super().crop(tokens_to_remove)
        rooms = {} if torch.is_grad_enabled() else (self._rooms or {})
        for name, was in zip(_NAMES, before, strict=True):
            if name in rooms and rooms[name].view is was:
                rooms[name].view = getattr(self, name)
        self._let_go()

    def reorder_cache(self, beam_idx: Any) -> None:
        """See DynamicLayer; in one copy."""
        rooms = self._rooms or {}
        if any(name not in rooms or rooms[name].view is not getattr(self, name) for name in _NAMES):
            super().reorder_cache(beam_idx)
            return
        for name, room in rooms.items():
            rows = beam_idx.to(room.buffer.device)
            buffer = room.buffer.new_empty(len(rows), *room.buffer.shape[1:])
            length = room.view.shape[-2]
            rooms[name] = _Room(buffer, buffer.narrow(-2, 0, length), length)
            torch.index_select(room.view, 0, rows, out=rooms[name].view)
            setattr(self, name, rooms[name].view)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """See DynamicLayer."""
        super().batch_repeat_interleave(repeats)
        self._let_go()

    def batch_select_indices(self, indices: Tensor) -> None:
        """See DynamicLayer."""
        super().batch_select_indices(indices)
        self._let_go()

    def offload(self) -> None:
        """See CacheLayerMixin; the room goes, too."""
        super().offload()
        self._let_go()

    def prefetch(self) -> None:
        """See CacheLayerMixin."""
        super().prefetch()
        self._let_go()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file is made of: tensors of its own, without the room behind them."""
        rooms = self._rooms or {}
        return {**self.__dict__, **{name: room.view.clone() for name, room in rooms.items()}, "_rooms": None}


def _alike(held: Tensor, new: Tensor) -> bool:
    """Whether tokens of one tensor can stand behind those of another without a change of either."""
    sizes = held.shape[:-2] == new.shape[:-2] and held.shape[-1] == new.shape[-1]
    return sizes and held.dtype == new.dtype and held.device == new.device


def _is_sealed(tensor: Tensor) -> bool:
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


class PreallocatedCache(DynamicCache):
    """A DynamicCache to which tokens are appended in place, where DynamicCache copies all keys and values each time.

    It is given as `past_key_values` to a model or to `generate`, and equals DynamicCache to the bit. Keys and values
    are views: what a crop cuts off is overwritten by what comes next. Layers with a window, with states of linear
    attention or with keys of an indexer are those of transformers. Under autograd tokens are concatenated.

    Args:
        config: of the model, from which the kinds of layers are known; None means that all are plain.
        max_tokens: tokens of a row that room is made for at once; it grows if more come. None means that the room
            doubles each time that it is full.
        offloading, offload_only_non_sliding: see DynamicCache.

    Raises:
        TypeError, ValueError: `config` is no configuration, or `max_tokens` no number from 1 on.
    """

    def __init__(
        self, config: Any = None, *, max_tokens: int | None = None, offloading: bool = False,
        offload_only_non_sliding: bool = False,
    ) -> None:  # fmt: skip
        if config is not None and not hasattr(config, "get_text_config"):
            raise TypeError(f"`config` must be a configuration of transformers or None, got {config!r:.100}")
        if max_tokens is not None:
            check_int("max_tokens", max_tokens, 1)
        super().__init__(config=config, offloading=offloading, offload_only_non_sliding=offload_only_non_sliding)
        preallocate(self, max_tokens)


def preallocate(cache: DynamicCache, max_tokens: int | None = None) -> None:
    """Has the plain layers of a cache append in place from now on, those that it has and those that it will have."""
    plain: list[Any] = [layer for layer in cache.layers if type(layer) is DynamicLayer]
    for layer in plain:
        layer.__class__ = PreallocatedLayer
        layer.max_tokens = max_tokens
    if cache.layer_class_to_replicate is DynamicLayer:
        make: Any = partial(PreallocatedLayer, max_tokens)
        cache.layer_class_to_replicate = make


def check_cache(cache: object, why_not: str | None, model: object) -> None:
    """Refuses a `cache` of `patch` that is none, or a model that has no use for one.

    Args:
        cache: what was given.
        why_not: what the model is or does that has no use for one, or None.
        model: that is patched.

    Raises:
        ValueError: names the argument.
    """
    if cache is not None and cache != PREALLOCATED:
        raise ValueError(f"`cache` must be {PREALLOCATED!r} or None, got {cache!r:.100}")
    if cache is not None and why_not is not None:
        raise ValueError(f"`cache` must be left out for {type(model).__name__}, which {why_not}, got {cache!r}")


def preallocate_caches(patch: Patch) -> None:
    """Has the caches preallocated that the patched model is given, until the patch is removed; they stay so."""

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        # Without `kwargs` where another thread just takes the hook off.
        if kwargs is None or torch.compiler.is_compiling() or patch.session.paused:
            return
        for given in (kwargs.get("past_key_values"), *args):
            if isinstance(given, Cache):
                # Of an encoder-decoder, what its decoder reads of itself; the other is filled once.
                own = getattr(given, "self_attention_cache", given)
                if isinstance(own, DynamicCache):
                    preallocate(own)

    for module in patch.modules:
        patch.hook(module, "register_forward_pre_hook", before, with_kwargs=True)
