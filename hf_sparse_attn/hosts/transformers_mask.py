"""What a mask of transformers says, carried to the attention layers as a light object instead of a tensor."""

from __future__ import annotations

import dis
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from hf_sparse_attn.at_work import Forward
from hf_sparse_attn.hosts.padding import key_padding
from hf_sparse_attn.method import Decline
from hf_sparse_attn.span import Span


@dataclass(frozen=True)
class MaskRule:
    """What a mask function of transformers keeps: the intersection of these, and besides it what `more` keeps.

    Args:
        causal: keys up to the query.
        window: keys fewer than this many places before the query (in bidirectional masks after it too), or None.
        chunk: keys of the query's own chunk of this many, or None.
        packed: int [batch, tokens], keys with the query's own number, or None.
        blocks: int [batch, tokens], keys with the query's own number, tokens of a negative one none; or None.
        unknown: what stands in the function that is none of these, or None.
        more: rules whose keys are kept too.
    """

    causal: bool = False
    window: int | None = None
    chunk: int | None = None
    packed: Tensor | None = None
    blocks: Tensor | None = None
    unknown: str | None = None
    more: tuple[MaskRule, ...] = ()

    def also(self, other: MaskRule) -> MaskRule:
        """The intersection of both."""
        packed, unknown = self.packed, self.unknown or other.unknown
        if other.packed is not None:
            packed = other.packed
            if self.packed is not None and self.packed is not other.packed:
                unknown = "two packings"
        if self.blocks is not None and other.blocks is not None:
            unknown = unknown or "two kinds of blocks"
        if self.more and other.more:
            unknown = unknown or "two unions"
        windows = [w for w in (self.window, other.window) if w is not None]
        chunks = [c for c in (self.chunk, other.chunk) if c is not None]
        # What is kept besides is cut by the other rule as well: (a or b) and c is (a and c) or (b and c).
        more = [rule.also(replace(other, more=())) for rule in self.more]
        more += [rule.also(replace(self, more=())) for rule in other.more]
        return MaskRule(
            self.causal or other.causal,
            min(windows, default=None),
            min(chunks, default=None),
            packed,
            self.blocks if self.blocks is not None else other.blocks,
            unknown,
            tuple(more),
        )

    @property
    def everything(self) -> bool:
        """Whether nothing is hidden."""
        hiding = (self.window, self.chunk, self.packed, self.blocks, self.unknown)
        return not self.causal and all(one is None for one in hiding)

    def settled(self, first: int) -> MaskRule | str:
        """The same rule without `more`, where that adds nothing or everything; else why it cannot be told.

        Args:
            first: place of the first query.
        """
        rule = replace(self, more=())
        for more in self.more:
            if rule.everything or more.everything:
                return MaskRule()
            # All of the past is in the rule, unless a window or chunk hides some; whether one does is seen later.
            if self.causal and more.causal and self.packed is None:
                continue
            if not self.causal or more.unknown or more.blocks is None:
                return f"mask of an unknown kind ({more.unknown or 'a union'})"
            if _sees_ahead(more.blocks, 0 if self.packed is not None else first):
                return "tokens of an image or prefix that see ahead"
        return rule


def _sees_ahead(blocks: Tensor, first: int) -> bool:
    """Whether a block holds two tokens from place `first` on, so that the one sees the other ahead of it."""
    numbers = blocks[:, first:].sort(1).values
    return bool(((numbers[:, 1:] == numbers[:, :-1]) & (numbers[:, 1:] >= 0)).any())


@lru_cache(maxsize=1)
def _templates() -> dict[object, str]:
    """Code of the closures that transformers builds its masks from. A closure's code is the same object every time."""
    nothing: Any = None
    made: dict[str, Callable[..., Any]] = {
        "and": masking_utils.and_masks(masking_utils.causal_mask_function),
        "or": masking_utils.or_masks(masking_utils.causal_mask_function),
        "blocks": masking_utils.blockwise_overlay(nothing),
        "window on both sides": masking_utils.sliding_window_bidirectional_overlay(1),
        "window": masking_utils.sliding_window_overlay(1),
        "chunk": masking_utils.chunked_overlay(1, nothing),
        "packed": masking_utils.packed_sequence_mask_function(nothing),
    }
    # Absent from 5.17, which does not renumber the positions of packed sequences.
    remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
    if remap is not None:
        made["remap"] = remap(masking_utils.causal_mask_function, nothing)
    return {function.__code__: kind for kind, function in made.items()}


def read_rule(function: Any) -> MaskRule:
    """What a mask function keeps, read from its structure; anything not recognised is said in `unknown`."""
    if function is masking_utils.causal_mask_function:
        return MaskRule(causal=True)
    if function is masking_utils.bidirectional_mask_function:
        return MaskRule()
    code = getattr(function, "__code__", None)
    kind = _templates().get(code)
    if kind is None or code is None:
        if code is not None and _is_true(function):
            return MaskRule()
        return MaskRule(unknown=getattr(function, "__qualname__", type(function).__name__))
    cells = dict(zip(code.co_freevars, (c.cell_contents for c in function.__closure__ or ()), strict=True))
    if kind == "and":
        rule = MaskRule()
        for part in cells["mask_functions"]:
            rule = rule.also(read_rule(part))
        return rule
    if kind == "or":
        first, *others = (read_rule(part) for part in cells["mask_functions"])
        return replace(first, more=(*first.more, *(r for o in others for r in (replace(o, more=()), *o.more))))
    if kind == "blocks":
        return MaskRule(blocks=cells["block_sequence_ids"])
    if kind == "window":
        return MaskRule(window=cells["sliding_window"])
    if kind == "window on both sides":
        # Its distance counts, the other's does not.
        return MaskRule(window=cells["sliding_window"] + 1)
    if kind == "chunk":
        return MaskRule(chunk=cells["chunk_size"])
    if kind == "packed":
        return MaskRule(packed=cells["packed_sequence_mask"])
    # Positions inside one packed sequence rise by one, so that renumbering changes no distance and no order there.
    return read_rule(cells["mask_function"])


def _is_true(function: Any) -> bool:
    """Whether a function is `lambda *args: <True>`, by which a decoder is made to see both ways."""
    code = function.__code__
    if code.co_argcount or code.co_kwonlyargcount or code.co_freevars or len(code.co_varnames) != 1:
        return False
    if any(step.argval == code.co_varnames[0] for step in dis.get_instructions(code)):
        return False
    return bool(function())


@dataclass(frozen=True)
class Plan:
    """How a call can run sparse.

    Args:
        kv_end: keys that exist; a static cache holds more places.
        spans: the sequences of the batch.
        packed: whether a row holds more than one sequence.
        reason: why the call must be dense, or None.
        own: the reason is the model's own sparsity, which is no fallback.
        causal: whether a token sees only itself and what came before.
        limited: whether a token of a longer text would see no more than a window or chunk of it.
    """

    kv_end: int = 0
    spans: tuple[Span, ...] = ()
    packed: bool = False
    reason: str | None = None
    own: bool = False
    causal: bool = True
    limited: bool = False

    @property
    def reach(self) -> int:
        """Tokens of the longest sequence."""
        return max((s.k[1] - s.k[0] for s in self.spans), default=0)


class MaskSpec:
    """Stands for a mask between the model and its attention layers, which it reaches untouched.

    It is O(batch x tokens); the tensor that the original implementation wants is made when a layer stays dense, once
    per forward. transformers takes it for a finished 4-D mask.
    """

    ndim = 4

    def __init__(self, original: str, wanted: dict[str, Any]) -> None:
        offset = wanted.get("q_offset", 0)
        # A static cache hands out its own counter, which the first layer moves on before its attention runs.
        self.wanted = {**wanted, "q_offset": offset.clone() if isinstance(offset, Tensor) else offset}
        self.original = original
        self.device = torch.device(wanted.get("device", "cpu"))
        self.shape = (wanted["batch_size"], 1, wanted["q_length"], wanted["kv_length"])
        # The forward that it was made in, where that is known: by it a layer that runs again finds its state.
        self.forward: Forward | None = None
        self._dense: dict[tuple[str, torch.device], Any] = {}

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Gives a function of torch the tensor: a layer that was put in since the patch comes to no hook."""
        args, kwargs = tree_map_only(cls, cls._tensor, (args, kwargs or {}))
        return func(*args, **kwargs)

    @cached_property
    def kv_end(self) -> int:
        """Keys up to the last query's; all places of a static cache whose counter would have to be waited for."""
        offset = self.wanted["q_offset"]
        if isinstance(offset, Tensor) and offset.device.type != "cpu":
            return int(self.shape[3])
        return min(self.shape[3], int(offset) + self.shape[2] - int(self.wanted.get("kv_offset", 0)))

    def contiguous(self) -> MaskSpec:
        """Itself; generate() asks for it."""
        return self

    def to(self, *_: Any, **__: Any) -> MaskSpec:
        """Itself; accelerate asks for it. `dense` puts the tensor where it is needed."""
        return self

    def __getitem__(self, index: Any) -> Any:
        # A model that cuts pieces out of its mask gets them from the tensor; its layers are then dense.
        return self._tensor()[index]

    def __add__(self, other: Any) -> Any:
        # Likewise one that adds its mask to something.
        return self._tensor() + other

    __radd__ = __add__

    def __invert__(self) -> Any:
        return ~self._tensor()

    @property
    def dtype(self) -> Any:
        """That of the tensor it stands for, which a model may ask before it changes it."""
        return self._tensor().dtype

    def _tensor(self) -> Any:
        make = ALL_MASK_ATTENTION_FUNCTIONS[self.original]
        return make(**{**self.wanted, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})

    def dense(self, name: str, device: torch.device) -> Any:
        """What the mask function of the implementation `name` returns, on `device`."""
        key = (name, device)
        if key not in self._dense:
            make = ALL_MASK_ATTENTION_FUNCTIONS.get(name)
            mask = None if make is None else make(**self.wanted)
            self._dense[key] = mask.to(device) if isinstance(mask, Tensor) else mask
        return self._dense[key]

    @cached_property
    def plan(self) -> Plan:
        """The sequences of the batch, or why they cannot be told; worked out once."""
        batch, _, q_len, kv_len = self.shape
        kv_offset, q_offset = int(self.wanted.get("kv_offset", 0)), int(self.wanted["q_offset"])
        rule = read_rule(self.wanted.get("mask_function", masking_utils.causal_mask_function)).settled(q_offset)
        if isinstance(rule, str):
            return Plan(reason=rule)
        if rule.unknown:
            return Plan(reason=f"mask of an unknown kind ({rule.unknown})")
        if not rule.causal and (q_len != kv_len or q_offset or kv_offset):
            return Plan(reason=f"bidirectional mask of {q_len} queries for {kv_len} keys")
        end = q_offset + q_len
        kv_end = end - kv_offset
        if not q_len <= kv_end <= kv_len:
            return Plan(reason=f"queries up to {end} do not fit keys {kv_offset} to {kv_offset + kv_len}")
        padding = self.wanted.get("attention_mask")
        if rule.packed is not None:
            if padding is not None or not q_len == kv_end == kv_len == rule.packed.shape[1]:
                return Plan(reason="packed sequences with padding or a cache")
            plan = Plan(kv_end, packed_spans(rule.packed), packed=True)
        elif padding is not None:
            plan = _padded_plan(padding[:, kv_offset : kv_offset + kv_end], q_len, kv_end)
        else:
            plan = Plan(kv_end, whole(batch, q_len, kv_end))
        limited = rule.window is not None or rule.chunk is not None or kv_offset != 0
        plan = replace(plan, causal=rule.causal, limited=limited)
        if plan.reason is not None:
            return plan
        if rule.window is not None and plan.reach > rule.window:
            return replace(plan, reason=f"layer's own sliding window of {rule.window}", own=True)
        if rule.chunk is not None and end > rule.chunk:
            return replace(plan, reason=f"layer's own chunks of {rule.chunk}", own=True)
        return plan


@dataclass(frozen=True)
class ReadyMask:
    """What a mask says that the model was given as a tensor: order and padding, and no more."""

    shape: tuple[int, int, int, int]
    plan: Plan


# What was read of masks that are tensors, and of which version: all layers of a forward are given the same one.
_READ = WeakTensorKeyDictionary()


def read_ready(mask: Tensor, shape: tuple[int, int, int, int], causal: bool) -> ReadyMask | str:
    """What a mask given as a tensor says, or what it is that no layer here can follow.

    Args:
        mask: [batch or 1, heads or 1, queries, keys].
        shape: (batch, 1, queries, keys) of the call.
        causal: whether the layer is.
    """
    key = 0 if mask.is_inference() else mask._version, shape, causal
    known, found = _READ.get(mask, (None, ""))
    if known != key:
        batch, _, queries, keys = shape
        valid = key_padding(mask, batch, keys, queries if causal else None)
        if isinstance(valid, Decline):
            found = valid.reason
        elif valid.dtype != torch.bool:
            found = "mask of separate sequences"
        else:
            found = ReadyMask(shape, replace(_padded_plan(valid, queries, keys), causal=causal))
        _READ[mask] = key, found
    return found


def whole(batch: int, q_len: int, kv_end: int) -> tuple[Span, ...]:
    """The rows of a batch in which every token is one of the sequence."""
    return (Span(tuple(range(batch)), (0, q_len), (0, kv_end)),)


def _group(places: list[tuple[int, tuple[int, int], tuple[int, int]]]) -> tuple[Span, ...]:
    """Spans from (row, queries, keys), rows at the same places in one."""
    rows: dict[tuple[tuple[int, int], tuple[int, int]], list[int]] = {}
    for row, q, k in places:
        rows.setdefault((q, k), []).append(row)
    return tuple(Span(tuple(r), q, k) for (q, k), r in rows.items())


def _padded_plan(valid: Tensor, q_len: int, kv_end: int) -> Plan:
    """Sequences of a batch padded on either side.

    Args:
        valid: bool [batch, up to kv_end keys]; keys beyond are padding.
        q_len, kv_end: the queries are the last `q_len` of `kv_end` keys.
    """
    if valid.shape[1] >= kv_end and bool(valid.all()):
        return Plan(kv_end, whole(valid.shape[0], q_len, kv_end))
    place = torch.arange(valid.shape[1], device=valid.device)
    first = torch.where(valid, place, valid.shape[1]).amin(1)
    last = torch.where(valid, place, -1).amax(1)
    places = []
    for row, (start, stop, count) in enumerate(torch.stack([first, last, valid.sum(1)], 1).tolist()):
        if count == 0:
            continue
        if stop - start + 1 != count:
            return Plan(reason="padding between valid tokens")
        before = kv_end - q_len
        q, k = (max(start - before, 0), stop + 1 - before), (start, stop + 1)
        if q[1] > q[0]:
            places.append((row, q, k))
    return Plan(kv_end, _group(places)) if places else Plan(reason="no valid token")


def packed_spans(numbers: Tensor) -> tuple[Span, ...]:
    """Spans of packed rows.

    Args:
        numbers: int [batch, tokens], the same for neighbours of one sequence.
    """
    edge = torch.ones_like(numbers[:, :1], dtype=torch.bool)
    changes = torch.cat([edge, numbers[:, 1:] != numbers[:, :-1]], 1).nonzero().tolist()
    places = []
    for (row, start), after in zip(changes, [*changes[1:], (-1, 0)], strict=True):
        stop = after[1] if after[0] == row else numbers.shape[1]
        places.append((row, (start, stop), (start, stop)))
    return _group(places)
