"""MiniMax M3: an indexer chooses blocks of keys, one list for each head of keys and values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from hf_sparse_attn.hosts.natively_sparse_kind import Attended, Kind, OwnCall, awake, replace_method, why_other
from hf_sparse_attn.hosts.natively_sparse_mask import visible_of
from hf_sparse_attn.hosts.natively_sparse_pools import strips
from hf_sparse_attn.listed_attention import Visible, listed_attention
from hf_sparse_attn.patching import Patch

# Listed keys, over batch and heads of keys, whose slots are written out at a time.
_SLOTS = 1 << 22


class MSA(Kind):
    """MiniMax M3: layers of the type `minimax_m3_sparse`.

    Seam: `indexer.forward`, which selects in strips of queries. The lists come to the attention function as
    `block_indices`. Blocks begin at slot 0 of the cache, queries count from their first token: a batch padded on
    the left, or whose positions are the user's own, would be read at the wrong blocks, and runs the model's own way.
    """

    name: ClassVar[str] = "MSA"
    models: ClassVar[frozenset[str]] = frozenset({"minimax_m3_vl"})

    def why_not(self, owner: Any, modules: Sequence[Any]) -> str | None:
        """See Kind."""
        for module in modules:
            where = f"layer {module.layer_idx} ({type(module).__name__})"
            if not hasattr(module, "indexer"):
                return f"{where} has no `indexer`"
            if module.indexer is None:
                continue
            takes = ("hidden_states", "position_embeddings", "past_key_values", "position_ids")
            why = why_other(module.indexer, "forward", *takes) or why_other(
                module.indexer, "build_block_mask",
                "block_indices", "attention_mask", "key_length", "dtype", "device", "position_ids",
            )  # fmt: skip
            if why is not None:
                return f"{where}: {why}"
        if all(module.indexer is None for module in modules):
            return "no layer of it selects keys, by `layer_types` of its config"
        return None

    def own_sparsity(self, module: Any) -> str | None:
        """See Kind."""
        return "layer reads all keys by design" if module.indexer is None else None

    def install(self, patch: Patch, module: Any) -> None:
        """See Kind."""
        replace_method(patch, module.indexer, "forward", _select, partial(awake, module))

    def attend(self, state: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any,
               kwargs: Mapping[str, Any]) -> Attended | str:  # fmt: skip
        """See Kind."""
        blocks, visible = kwargs.get("block_indices"), visible_of(mask)
        if blocks is None:
            return "the layer hands no selection over"
        if visible is None:
            return "mask that weighs keys" if mask is not None else "no mask"
        why = _why_shifted(visible, kwargs.get("position_ids"), q.shape[0], q.shape[2])
        if why is not None:
            return why
        heads, queries = q.shape[1], q.shape[2]
        groups = math.lcm(blocks.shape[1], k.shape[1])
        if heads % groups:
            return f"{blocks.shape[1]} lists for {k.shape[1]} heads of keys"
        # One for each, as the model is trained; else heads that share a list share keys, and the other way round.
        blocks = blocks.repeat_interleave(groups // blocks.shape[1], 1)
        k, v = (x.repeat_interleave(groups // k.shape[1], 1) if groups > k.shape[1] else x for x in (k, v))
        size = module.indexer.block_size
        rows = max(1, _SLOTS // (q.shape[0] * groups * blocks.shape[3] * size))
        outs, listed = [], 0
        for start in range(0, queries, rows):
            own = slice(start, min(start + rows, queries))
            lists = _slots(blocks[:, :, own], size, visible, own, k.shape[2])
            listed += int((lists >= 0).sum()) * (heads // groups)
            outs.append(listed_attention(q[:, :, own], k, v, lists, kwargs["scaling"])[0])
        out = outs[0] if len(outs) == 1 else torch.cat(outs, 2)
        pairs = visible.pairs(q.shape[0], queries, k.shape[2]) * heads
        return Attended(out.transpose(1, 2).contiguous(), listed, pairs, "blocks by list")

    def own(self, module: Any, call: OwnCall, active: bool) -> OwnCall:
        """See Kind."""
        blocks = call.kwargs.get("block_indices")
        if blocks is None:
            return call
        q, keys = call.q, call.k.shape[2]
        positions = _positions(call.kwargs.get("position_ids"), q.shape[0], q.shape[2], keys, q.device)
        mask = module.indexer.build_block_mask(blocks, call.mask, keys, q.dtype, q.device, positions)
        return call._replace(mask=mask)


def _positions(given: Tensor | None, batch: int, queries: int, keys: int, device: torch.device) -> Tensor:
    """Positions of the queries [batch, q_len], as the model's attention has them."""
    if given is None:
        given = torch.arange(keys - queries, keys, device=device)
    return (given if given.ndim > 1 else given[None]).expand(batch, -1)


def _why_shifted(visible: Visible, positions: Tensor | None, batch: int, queries: int) -> str | None:
    """Why the positions of queries do not tell which blocks of keys they may see, or None."""
    if visible.mask is not None:
        return "mask that is not the plain causal one"
    first, padding = visible.first, visible.padding
    if padding is not None and not bool(padding[:, 0].all()):
        return "left padding, at which the model's own blocks and positions part"
    if positions is None:
        return None
    slots = torch.arange(first, first + queries, device=positions.device)
    same = positions.expand(batch, -1) == slots
    if padding is not None:
        # What stands for padding is read by nobody.
        same = same | ~padding[:, first : first + queries]
    return None if bool(same.all()) else "positions that are not those of the keys"


def _slots(blocks: Tensor, size: int, visible: Visible, rows: slice, keys: int) -> Tensor:
    """Slots of the keys in blocks [batch, groups, rows, n], int32 [batch, groups, rows, n * size]; -1 where unseen."""
    inner = torch.arange(size, dtype=torch.int32, device=blocks.device)
    slots = (blocks.int()[..., None] * size + inner).flatten(3)
    query = torch.arange(visible.first + rows.start, visible.first + rows.stop, device=blocks.device)
    seen = (slots >= 0) & (slots <= query[:, None]) & (slots < keys)
    if visible.padding is not None:
        padding = visible.padding
        row = torch.arange(padding.shape[0], device=blocks.device)[:, None, None, None]
        seen &= padding[row, slots.clamp(0, padding.shape[1] - 1)]
    return slots.where(seen, -1)


@torch.no_grad()
def _select(indexer: Any, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], past_key_values: Any,
            position_ids: Tensor) -> Tensor:  # fmt: skip
    """In place of an indexer's forward."""
    batch, queries, _ = hidden_states.shape
    q = indexer.q_norm(indexer.q_proj(hidden_states).view(batch, queries, -1, indexer.head_dim)).transpose(1, 2)
    k = indexer.k_norm(indexer.k_proj(hidden_states).view(batch, queries, 1, indexer.head_dim)).transpose(1, 2)
    cos, sin = (x[..., : indexer.head_dim] for x in position_embeddings)
    # The model's own function, which a kernel of the Hub may stand for.
    rotate = inspect.unwrap(type(indexer).forward).__globals__["apply_rotary_pos_emb"]
    q, k = rotate(q, k, cos, sin)
    if past_key_values is not None:
        k = past_key_values.layers[indexer.layer_idx].update_index(k)
    return top_blocks(q, k, position_ids, indexer.block_size, indexer.topk_blocks, indexer.local_blocks)


def top_blocks(q: Tensor, k: Tensor, positions: Tensor, size: int, topk: int, local: int) -> Tensor:
    """The blocks of keys with the highest products `q k`, for each query and index head.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, 1, kv_len, dim].
        positions: int [batch or 1, q_len]: a query sees the keys up to this slot.
        size: keys of a block.
        topk: blocks of a list.
        local: blocks up to the query's own that are chosen first.

    Returns:
        int64 [batch, heads, q_len, min(topk, blocks)]; -1, at the end, where there is no further block.
    """
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    blocks = -(-keys // size)
    topk = min(topk, blocks)
    out = torch.empty(batch, heads, queries, topk, dtype=torch.int64, device=q.device)
    flat = k.float().transpose(2, 3)
    place, back = torch.arange(keys, device=q.device), torch.arange(local, device=q.device)
    for rows, last in strips((positions + 1).clamp(max=keys), 4 * batch * heads * keys):
        # Whole blocks, as far as a query of the strip sees.
        end = min(blocks, max(1, -(-last // size)))
        width = min(keys, end * size)
        scores = q[:, :, rows].float() @ flat[..., :width]
        own = positions[:, None, rows, None]
        scores = scores.masked_fill_(place[:width] > own, -torch.inf)
        scores = torch.nn.functional.pad(scores, (0, end * size - width), value=-torch.inf)
        # The choice among equal scores depends on how many there are.
        best = scores.new_full((*scores.shape[:3], blocks), -torch.inf)
        best[..., :end] = scores.unflatten(-1, (end, size)).amax(-1)
        if local > 0:
            near = (own // size - back).clamp(min=0).expand(batch, heads, -1, -1)
            best.scatter_(-1, near, torch.inf)
        top, chosen = best.topk(topk)
        out[:, :, rows] = chosen.where(top > -torch.inf, -1)
    return out
