"""The indexer of DeepSeek sparse attention, in strips of queries: what transformers selects, in linear memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.hosts.natively_sparse_mask import visible_of
from hf_sparse_attn.listed_attention import Visible

# Bytes of scores, of all index heads, that are held at a time.
_SCORES = 1 << 23


@dataclass(frozen=True)
class Indexer:
    """How the indexer of one model makes its queries and keys.

    Args:
        takes: parameters of its forward.
        rotation: name of the function that rotates, in the file of the model.
        last: whether the last channels are rotated, not the first.
        late: whether the weights of the heads are scaled, not the scores.
        wide: whether keys are normed in the dtype of the norm.
        hidden: whether queries are made of the hidden states, with a norm and a scaling by position of their own.
    """

    takes: tuple[str, ...] = (
        "hidden_states", "q_resid", "position_embeddings", "attention_mask", "position_ids", "past_key_values",
    )  # fmt: skip
    rotation: str = "apply_rotary_pos_emb_interleave"
    last: bool = False
    late: bool = False
    wide: bool = False
    hidden: bool = False

    def queries_and_keys(self, indexer: Any, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Index queries [batch, q_len, heads, dim] and keys [batch, q_len, dim] of the new tokens."""
        x, cos_sin = given["hidden_states"], given["position_embeddings"]
        resid = indexer.q_input_norm(x) if self.hidden else given["q_resid"]
        q = indexer.wq_b(resid).view(*x.shape[:2], indexer.n_heads, indexer.head_dim)
        k = indexer.wk(x)
        k = indexer.k_norm(k.to(indexer.k_norm.weight.dtype)).to(x.dtype) if self.wide else indexer.k_norm(k)
        k = k.unsqueeze(2)
        if self.hidden:
            q = indexer.softmax_scaling(q, given["position_ids"], head_dim_first=False)
        if getattr(indexer, "use_rope", True):
            q, k = self._rotated(indexer, q, k, *cos_sin)
        return q, k.squeeze(2)

    def _rotated(self, indexer: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        rope, plain = indexer.qk_rope_head_dim, indexer.head_dim - indexer.qk_rope_head_dim
        sizes = [plain, rope] if self.last else [rope, plain]
        parts = [list(x.split(sizes, -1)) for x in (q, k)]
        at = 1 if self.last else 0
        # The model's own function, which a kernel of the Hub may stand for.
        rotate = inspect.unwrap(type(indexer).forward).__globals__[self.rotation]
        parts[0][at], parts[1][at] = rotate(parts[0][at], parts[1][at], cos, sin, unsqueeze_dim=2)
        return torch.cat(parts[0], -1), torch.cat(parts[1], -1)


_HALF = "apply_rotary_pos_emb"
# By config.model_type, "_text" left out.
INDEXERS = {
    "deepseek_v32": Indexer(rotation=_HALF),
    "glm_moe_dsa": Indexer(),
    "hy_v4": Indexer(rotation=_HALF, last=True, late=True, wide=True),
    "mistral_large4": Indexer(
        ("hidden_states", "position_embeddings", "attention_mask", "position_ids", "past_key_values"), hidden=True
    ),
    "axk2": Indexer(rotation=_HALF),
    "dots3_note": Indexer(),
}


@torch.no_grad()
def select(how: Indexer, indexer: Any, *args: Any, **kwargs: Any) -> Tensor:
    """In place of an indexer's forward: int32 [batch, q_len, k], -1 in place of keys that the mask hides."""
    given = {**dict(zip(how.takes, args, strict=False)), **kwargs}
    q, k = how.queries_and_keys(indexer, given)
    cache = given.get("past_key_values")
    if cache is not None:
        k = cache.update_indexer(k, indexer.layer_idx)
    x, heads = given["hidden_states"], indexer.n_heads**-0.5
    weights = indexer.weights_proj(x.to(indexer.weights_proj.weight.dtype)).float() * heads
    scale = indexer.softmax_scale
    if how.late:
        weights, scale = weights * scale, None
    mask = given["attention_mask"]
    return top_keys(q, k, weights, scale, visible_of(mask), mask, min(indexer.index_topk, k.shape[1]))


def top_keys(
    q: Tensor, k: Tensor, weights: Tensor, scale: float | None, visible: Visible | None, bias: Tensor | None, topk: int
) -> Tensor:
    """The keys of the highest scores `sum over heads of weights * relu(scale * q k)`, for each query.

    A strip of queries is scored at a time, over the keys that it may see. The choice among equal scores is that of
    torch.topk over the whole row, for that is what it is made by.

    Args:
        q: [batch, q_len, heads, dim].
        k: [batch, kv_len, dim].
        weights: float32 [batch, q_len, heads].
        scale: factor on the products, or None.
        visible: which keys are seen; None where only `bias` says it.
        bias: [batch, q_len, kv_len], added to the scores where `visible` is None.
        topk: keys of a list, at most kv_len.

    Returns:
        int32 [batch, q_len, topk]; with `visible`, -1 in place of keys that are not seen.
    """
    batch, queries, heads, _ = q.shape
    keys = k.shape[1]
    out = torch.empty(batch, queries, topk, dtype=torch.int32, device=q.device)
    wide: Callable[[Tensor], Tensor] = Tensor.float
    flat = wide(k).transpose(1, 2)
    row = torch.full((), -torch.inf)
    start = 0
    while start < queries:
        end = keys if visible is None else visible.end(start + 1, keys)
        stop = min(queries, start + max(1, min(_ROWS, _SCORES // (4 * batch * heads * max(1, end)))))
        end = keys if visible is None else visible.end(stop, keys)
        rows = slice(start, stop)
        if visible is not None and end <= topk:
            # All that is seen fits into the list.
            seen = visible.rows(start, stop, topk, q.device)
            out[:, rows] = torch.arange(topk, dtype=torch.int32, device=q.device).where(seen, -1)
            start = stop
            continue
        products = wide(q[:, rows]).flatten(1, 2) @ flat[:, :, :end]
        if scale is not None:
            products.mul_(scale)
        products = products.relu_().view(batch, stop - start, heads, end)
        row = torch.full((batch, stop - start, keys), -torch.inf, device=q.device)
        scores = (weights[:, rows, None] @ products)[:, :, 0]
        if visible is not None:
            scores.masked_fill_(~visible.rows(start, stop, end, q.device), -torch.inf)
        elif bias is not None:
            scores += bias[:, rows]
        row[:, :, :end] = scores
        best, chosen = row.topk(topk, sorted=False)
        out[:, rows] = chosen if visible is None else chosen.where(best > -torch.inf, -1)
        start = stop
    return out


# Queries of a strip, however short their scores.
_ROWS = 64
