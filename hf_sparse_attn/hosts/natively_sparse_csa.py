"""DeepSeek-V4: a window of keys, and entries for what came before it, all of them or those an indexer chooses."""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hf_sparse_attn.hosts.natively_sparse_compress import compress
from hf_sparse_attn.hosts.natively_sparse_kind import Attended, Kind, OwnCall, awake, why_other
from hf_sparse_attn.hosts.natively_sparse_mask import SelectingMask
from hf_sparse_attn.hosts.natively_sparse_pools import top_pools
from hf_sparse_attn.hosts.transformers_mask import MaskRule, read_rule
from hf_sparse_attn.listed_attention import listed_attention
from hf_sparse_attn.patching import Patch

# Listed keys, over the batch, that are written out at a time.
_SLOTS = 1 << 22
_TAKES = ("hidden_states", "q_residual", "position_ids", "past_key_values", "layer_idx")


@dataclass(frozen=True)
class Entries:
    """Which entries each query reads, in the place of the bias that a compressor makes of it.

    Args:
        closed: int [batch, q_len], a query may read the first so many entries.
        chosen: int32 [batch, q_len, n], those that an indexer chose among them, -1 for none; None where all are read.
        many: entries that there are.
    """

    closed: Tensor
    chosen: Tensor | None
    many: int

    def lists(self, rows: slice) -> Tensor:
        """Entries that queries read, int [batch, rows, n], -1 for none."""
        if self.chosen is not None:
            return self.chosen[:, rows]
        place = torch.arange(self.many, device=self.closed.device)
        return place.where(place < self.closed[:, rows, None], -1)

    def to(self, dtype: torch.dtype) -> Tensor:
        """What joins a mask that was given as a tensor, [batch, 1, q_len, many]."""
        if self.chosen is None:
            keep = torch.arange(self.many, device=self.closed.device) < self.closed[..., None]
        else:
            keep = torch.zeros(*self.chosen.shape[:2], self.many + 1, dtype=torch.bool, device=self.chosen.device)
            keep = keep.scatter_(2, self.chosen.long().where(self.chosen >= 0, self.many), True)[..., :-1]
        keep = keep[:, None]
        # A cast of 0 and -inf to bool would show what is hidden, and hide the rest.
        return (
            keep
            if dtype == torch.bool
            else torch.zeros(keep.shape, dtype=dtype, device=keep.device).masked_fill(~keep, -torch.inf)
        )


class _Kept(threading.local):
    """What the compressor that ran last in this thread gave for the attention that follows it in its layer."""

    owner: Any = None
    bias: Any = None

    def take(self, compressor: Any) -> Any:
        """What that compressor gave, which is then forgotten."""
        found = self.bias if self.owner is compressor else None
        self.owner = self.bias = None
        return found


_KEPT = _Kept()


class CSA(Kind):
    """DeepSeek-V4: windows alone, windows with all closed entries (HCA), windows with chosen entries (CSA).

    Seam: `compressor.forward`, which selects in strips of queries. The model adds what it returns to its mask only
    where that is a tensor; so it is kept until the attention function of the same layer asks for it. A window alone is
    read by lists as well: as transformers runs it, it costs all pairs.
    """

    name: ClassVar[str] = "CSA"
    models: ClassVar[frozenset[str]] = frozenset({"deepseek_v4"})

    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """See Kind."""
        for module in modules:
            where = f"layer {module.layer_idx} ({type(module).__name__})"
            if not hasattr(module, "compressor"):
                return f"{where} has no `compressor`"
            if module.compressor is None:
                continue
            why = why_other(module.compressor, "forward", *_TAKES)
            if why is None and hasattr(module.compressor, "indexer"):
                why = why_other(module.compressor.indexer, "forward", *_TAKES)
            if why is not None:
                return f"{where}: {why}"
        return None

    def install(self, patch: Patch, module: Any) -> None:
        """See Kind."""
        compressor = module.compressor
        if compressor is None:
            return
        before, runs = compressor.forward, partial(awake, module)

        def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = (partial(_select, self) if runs() else before)(*args, **kwargs)
            if not torch.compiler.is_compiling():
                _KEPT.owner, _KEPT.bias = self, found[1]
            return found

        patch.set_attribute(compressor, "forward", types.MethodType(forward, compressor))
        # What a forward left that an exception ended.
        patch.on_remove(_KEPT.take, None)

    def attend(self, state: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """See Kind."""
        if not isinstance(mask, SelectingMask):
            return "mask given as a tensor"
        window = Window.of(mask)
        if isinstance(window, str):
            return window
        entries = _KEPT.bias if module.compressor is not None else None
        if module.compressor is not None and (_KEPT.owner is not module.compressor or entries is None):
            return "the layer hands no selection over"
        _KEPT.take(module.compressor)
        batch, heads, queries = q.shape[:3]
        width = window.width + (entries.lists(slice(0, 1)).shape[2] if entries is not None else 0)
        rows = max(1, _SLOTS // (batch * width))
        outs, listed, visible = [], 0, 0
        for start in range(0, queries, rows):
            own = slice(start, min(start + rows, queries))
            lists = window.lists(batch, own, q.device)
            near = int((lists >= 0).sum())
            listed, visible = listed + near, visible + near
            if entries is not None:
                far = entries.lists(own)
                listed += int((far >= 0).sum())
                visible += int(entries.closed[:, own].clamp(max=entries.many).sum())
                lists = torch.cat([lists, far.int().add(window.keys).where(far >= 0, -1)], 2)
            outs.append(listed_attention(q[:, :, own], k, v, lists[:, None], kwargs["scaling"], kwargs["s_aux"])[0])
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        return Attended(
            out.transpose(1, 2).contiguous(), listed * heads, visible * heads, "window and entries by list"
        )

    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """See Kind."""
        bias = _KEPT.take(module.compressor) if module.compressor is not None else None
        mask, keys = call.mask, call.k.shape[2]
        if not isinstance(mask, Tensor) or mask.shape[3] == keys:
            return call
        if bias is None:
            # As the model has it: one query sees all entries that there are.
            return call._replace(mask=nn.functional.pad(mask, (0, keys - mask.shape[3]), value=0.0))
        return call._replace(mask=torch.cat([mask, bias.to(mask.dtype)], 3))


@dataclass(frozen=True)
class Window:
    """The keys near each query.

    Args:
        first: slot of the first query among the keys at hand.
        width: keys that a query sees, its own among them.
        keys: keys at hand.
        padding: bool [batch, keys], False where a key is padding; None where none is.
    """

    first: int
    width: int
    keys: int
    padding: Tensor | None

    @classmethod
    def of(cls, mask: SelectingMask) -> Window | str:
        """What a mask shows, or why it is no plain window."""
        wanted = mask.wanted
        before, keys, first = int(wanted.get("kv_offset", 0)), mask.shape[3], int(wanted["q_offset"])
        rule = read_rule(wanted.get("mask_function"))
        if rule.window is None or rule != MaskRule(causal=True, window=rule.window):
            return "mask that is not the plain window"
        padding = wanted.get("attention_mask")
        if padding is not None:
            padding = padding.to(mask.device, torch.bool)
            if not bool(padding[:, 0].all()):
                return "left padding, which the model's own entries hold as if it were text"
            padding = padding[:, before : before + keys]
            padding = nn.functional.pad(padding, (0, keys - padding.shape[1]))
            padding = None if bool(padding.all()) else padding
        return cls(first - before, min(rule.window, first - before + mask.shape[2]), keys, padding)

    def lists(self, batch: int, rows: slice, device: torch.device) -> Tensor:
        """Slots of the keys that queries see, int32 [batch, rows, width], -1 for none."""
        query = torch.arange(self.first + rows.start, self.first + rows.stop, dtype=torch.int32, device=device)
        slots = query[:, None] - torch.arange(self.width, dtype=torch.int32, device=device)
        slots = slots.where((slots >= 0) & (slots < self.keys), -1).expand(batch, -1, -1)
        if self.padding is None:
            return slots
        row = torch.arange(batch, device=device)[:, None, None]
        return slots.where(self.padding[row, slots.clamp(min=0)], -1)


def _select(
    compressor: Any, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, past_key_values: Any,
    layer_idx: int,
) -> tuple[Tensor, Entries]:  # fmt: skip
    """In place of a compressor's forward: all entries so far [batch, 1, entries, dim], and those each query reads."""
    cache = None if past_key_values is None else past_key_values.layers[layer_idx]
    entries = compress(compressor, "compressor", hidden_states, cache)
    closed = ((position_ids + 1) // compressor.compress_rate).expand(len(hidden_states), -1)
    chosen = None
    if hasattr(compressor, "indexer"):
        chosen = _choose(compressor.indexer, hidden_states, q_residual, position_ids, cache, closed)
    elif position_ids.shape[1] == 1:
        # As the model has it: one query reads all entries that there are, whatever its position.
        closed = torch.full_like(closed, entries.shape[1])
    return entries[:, None], Entries(closed, chosen, entries.shape[1])


@torch.no_grad()
def _choose(
    indexer: Any, hidden_states: Tensor, q_residual: Tensor, position_ids: Tensor, cache: Any, closed: Tensor
) -> Tensor:
    """The entries that an indexer chooses, int32 [batch, q_len, n]."""
    k = compress(indexer, "indexer", hidden_states, cache)
    cos, sin = indexer.rotary_emb(hidden_states, position_ids=position_ids, layer_type=indexer.rope_layer_type)
    q = indexer.q_b_proj(q_residual).view(*hidden_states.shape[:2], -1, indexer.head_dim).transpose(1, 2)
    q = inspect.unwrap(type(indexer).forward).__globals__["apply_rotary_pos_emb"](q, cos, sin).transpose(1, 2)
    scorer = indexer.scorer
    weights = scorer.weights_proj(hidden_states).float() * scorer.weights_scaling
    return top_pools(q.float() * scorer.softmax_scale, k, weights, closed, indexer.index_topk).int()
