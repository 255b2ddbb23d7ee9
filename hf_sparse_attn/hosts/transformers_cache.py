"""What decoding remembers of the caches of transformers, and how it hears of what becomes of them.

The memory of one layer of a cache goes with that layer object. What the layer itself does (beams, crops, a reset) is
told by a class of its own kind that it has while it is remembered; a change that nobody tells is seen by the keys, and
what was remembered of them is then forgotten.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any
from weakref import WeakKeyDictionary, WeakSet, ref

import torch
from torch import Tensor, nn
from transformers import Cache

from hf_sparse_attn.decoding import Memory
from hf_sparse_attn.hosts.transformers_forward import forwards_here, values_here
from hf_sparse_attn.patching import Patch

# What a layer of a cache does besides taking in new tokens.
_EVENTS = ("reorder_cache", "batch_repeat_interleave", "batch_select_indices", "crop", "reset")
_TELLS = "_hf_sparse_attn_tells"
# Slots that are looked at to see whether keys are still the same: so many all over the cache, and so many of the last.
_PROBED = 16
_NUMBERS = itertools.count()
# By layer of a cache: what each patch remembers of it, by the number of its Caches.
_TRACKS: WeakKeyDictionary[Any, dict[int, Track]] = WeakKeyDictionary()


class Track:
    """What one patch remembers of a layer of a cache, and what the layer was like when it was last seen."""

    def __init__(self) -> None:
        # By layer of the model: some models have layers that read the keys of another one.
        self.memories: dict[int, Memory] = {}
        self.length = self.batch = 0
        # The keys, where the layer keeps what it hands over; else some of their slots, and the keys there.
        self._keys: ref[Tensor] | None = None
        self._version = 0
        self._probe: tuple[Tensor, Tensor] | None = None

    def check(self, layer: Any) -> None:
        """Forgets what is remembered where the layer holds other keys than it has handed over last."""
        if self._keys is not None:
            keys = layer.keys
            if keys is not self._keys() or _version(keys) != self._version:
                self.forget()

    def forget(self) -> None:
        """Forgets all; what comes next is taken in from the start."""
        self.memories.clear()
        self.length, self._keys, self._probe = 0, None, None

    def see(self, layer: Any, k: Tensor, end: int, new: int) -> None:
        """Takes note of what the layer hands over.

        Args:
            layer: of the cache.
            k: [batch, kv_heads, slots, dim], the keys.
            end, new: slots that are filled, and how many of them are new.
        """
        before = end - new
        if self._keys is None and self.memories and not self._is_same(k, before):
            self.memories.clear()
        if before < self.length:
            for memory in self.memories.values():
                memory.crop(before)
        self.length, self.batch = end, k.shape[0]
        if layer.keys is k:
            self._keys, self._version, self._probe = ref(k), _version(k), None
        else:
            spread = torch.linspace(0, max(0, end - _PROBED), _PROBED).long()
            slots = torch.cat([spread, torch.arange(max(0, end - _PROBED), end)]).to(k.device)
            self._keys, self._probe = None, (slots, k.index_select(2, slots))

    def _is_same(self, k: Tensor, before: int) -> bool:
        """Whether the first so many keys are those that were seen last, as far as a look at some tells."""
        if self._probe is None:
            return False
        slots, held = self._probe
        old = slots < before
        if k.shape[:2] != held.shape[:2] or k.device != held.device:
            return False
        return torch.equal(k.index_select(2, slots[old]), held[:, :, old])

    def follow(self, layer: Any, event: str, given: Any) -> None:
        """Does what the layer has done, with what it was given."""
        if event == "reset":
            self.forget()
            return
        if event != "crop":
            rows = torch.arange(self.batch, device=given.device if isinstance(given, Tensor) else None)
            rows = rows.repeat_interleave(given) if event == "batch_repeat_interleave" else rows[given]
            self.batch = len(rows)
            if self._probe is not None:
                self._probe = self._probe[0], self._probe[1].index_select(0, rows.to(self._probe[1].device))
            for memory in self.memories.values():
                memory.select(rows)
        # A crop is seen by the length that comes next.
        if self._keys is not None:
            self._keys, self._version = ref(layer.keys), _version(layer.keys)


def _version(keys: Tensor) -> int:
    return 0 if keys.is_inference() else keys._version


class Caches:
    """The memories of one patch, for each layer of each cache that its model was given."""

    def __init__(self) -> None:
        self._number = next(_NUMBERS)
        self._layers: WeakSet[Any] = WeakSet()
        # Caches that are known to be of the model.
        self._fitting: WeakSet[Cache] = WeakSet()
        self._closed = False

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any = None) -> None:
        """Runs before a model: finds its cache; without `kwargs` where another thread just takes the hook off."""
        if self._closed or kwargs is None or torch.compiler.is_compiling() or not forwards_here():
            return
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, Cache):
            cache = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
        # Of an encoder-decoder, what its decoder reads of itself.
        cache = getattr(cache, "self_attention_cache", cache)
        layers = getattr(cache, "layers", None)
        if layers is None:
            return
        if cache not in self._fitting:
            _check_number(module, layers)
            self._fitting.add(cache)
        values_here()[self] = layers
        for layer in layers:
            track = self._track(layer)
            if track is not None:
                track.check(layer)

    def note(self, index: int, k: Tensor, end: int, new: int) -> None:
        """Takes note of a call of a layer of the model, a step or a prompt.

        Args:
            index: of the layer.
            k, end, new: see Track.see.
        """
        layer = self._layer(index, k)
        if layer is None:
            return
        track = self._track(layer)
        if track is None:
            if not _listen(layer):
                return
            track = _TRACKS.setdefault(layer, {})[self._number] = Track()
            self._layers.add(layer)
        track.see(layer, k, end, new)
        values_here()[self, index] = track

    def memory(self, index: int) -> Memory:
        """The memory of a layer of the model in the call that was noted last; of nobody where no cache is known."""
        track = values_here().get((self, index))
        return Memory() if track is None else track.memories.setdefault(index, Memory())

    def close(self) -> None:
        """Forgets all, and gives the layers back what they were."""
        self._closed = True
        for layer in list(self._layers):
            tracks = _TRACKS.get(layer, {})
            tracks.pop(self._number, None)
            if not tracks and type(layer).__dict__.get(_TELLS, False):
                _set_class(layer, type(layer).__bases__[0])
        self._layers.clear()

    def _layer(self, index: int, k: Tensor) -> Any:
        """The layer of the cache that a layer of the model reads, by its number or by the keys; or None."""
        layers = values_here().get(self, ())
        if index < len(layers) and isinstance(getattr(layers[index], "keys", None), Tensor):
            return layers[index]
        return next((layer for layer in layers if getattr(layer, "keys", None) is k), None)

    def _track(self, layer: Any) -> Track | None:
        tracks = _TRACKS.get(layer)
        return None if tracks is None else tracks.get(self._number)


def _check_number(model: Any, layers: list[Any]) -> None:
    """Refuses a filled cache of another number of layers, which transformers takes, and fills up.

    Raises:
        ValueError: it is of another model.
    """
    config = model.config.get_text_config(decoder=True)
    wanted = getattr(config, "num_hidden_layers", None)
    # Layers that share their keys, and those that guess ahead, may be in a cache or not.
    odd = any(getattr(config, name, 0) for name in ("num_kv_shared_layers", "num_nextn_predict_layers"))
    filled = any(isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel() for layer in layers)
    if filled and wanted is not None and not odd and not config.is_encoder_decoder and len(layers) != wanted:
        raise ValueError(
            f"`past_key_values` must be a cache of this model, which has {wanted} layers, got one of {len(layers)}"
        )


def watch_caches(patch: Patch, owners: list[nn.Module]) -> Caches:
    """Has the caches that models are given known to the patch until it is removed."""
    caches = Caches()
    patch.on_remove(caches.close)
    for owner in owners:
        patch.hook(owner, "register_forward_pre_hook", caches.before, with_kwargs=True)
    return caches


def _listen(layer: Any) -> bool:
    """Has a layer tell what it does; whether it can."""
    kind = type(layer)
    if not kind.__dict__.get(_TELLS, False):
        try:
            _set_class(layer, _telling(kind))
        except TypeError:
            # Its class has slots, or cannot be derived from.
            return False
    return True


@lru_cache(maxsize=64)
def _telling(kind: Any) -> Any:
    """A subclass of a class of layers that tells what its layers do, and whose copies and pickles are of the class."""

    def reduce(self: Any, protocol: Any) -> Any:
        plain = object.__new__(kind)
        plain.__dict__.update(self.__dict__)
        return plain.__reduce_ex__(protocol)

    body: dict[str, Any] = {name: _told(getattr(kind, name), name) for name in _EVENTS if hasattr(kind, name)}
    # Without a type of its own: a subclass that has one takes the place of its base in transformers' table.
    # Pickles hold an object's class against that of what it is made of.
    body["__class__"] = property(lambda self: kind)
    body |= {"__reduce_ex__": reduce, "__module__": kind.__module__, "__doc__": kind.__doc__, "_layer_type": None}
    made = type(kind)(kind.__name__, (kind,), {**body, "__qualname__": kind.__qualname__, _TELLS: True})
    made._layer_type = getattr(kind, "_layer_type", None)
    return made


def _set_class(layer: Any, kind: type[Any]) -> None:
    object.__dict__["__class__"].__set__(layer, kind)


def _told(own: Callable[..., Any], event: str) -> Callable[..., Any]:
    @wraps(own)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        tracks = list(_TRACKS.get(self, {}).values())
        for track in tracks:
            track.check(self)
        done = own(self, *args, **kwargs)
        for track in tracks:
            track.follow(self, event, next(iter((*args, *kwargs.values())), None))
        return done

    return call
