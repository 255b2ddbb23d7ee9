"""DeepSeek sparse attention (DSA): the tokens that an indexer finds for each query, and attention over them."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from hf_sparse_attn.autocast import cast_inputs, made_on_cpu, no_autocast
from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.dispatch import check_tensors
from hf_sparse_attn.listed_attention import Visible, listed_attention
from hf_sparse_attn.method import Run
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.selection import best_ascending

# Query heads with the same keys from which on they run as rows of one list, several times as fast as one by one. Of
# fewer the pattern stays one of tokens.
_TOGETHER = 3
# Numbers of all index heads that are held at a time, about what stays in a cache.
_PRODUCTS = 1 << 21
# A pattern of single keys has no blocks, but a size of them.
_NO_BLOCK = 16


def dsa_attention(
    q: Tensor, k: Tensor, v: Tensor, q_index: Tensor, k_index: Tensor, weights: Tensor, top_k: int = 2048,
    scale: float | None = None, indices: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """DeepSeek sparse attention (DSA) as a function to train with (DeepSeek-AI 2025, DeepSeek-V3.2).

    Every query reads the `top_k` tokens up to itself with the highest index scores, the same for all heads; see
    `dsa_select_tokens`. Differentiable in q, k and v; the indexer gets no gradient, for it is trained by a loss of its
    own on its scores.

    Args:
        q: [batch, heads, tokens, dim]; fewer queries than keys are the last ones.
        k: [batch, kv_heads, keys, dim]; kv_heads divides heads.
        v: [batch, kv_heads, keys, value dim].
        q_index: queries of the indexer, [batch, index heads, tokens, index dim], after positions.
        k_index: its keys, which its heads share, [batch, keys, index dim], after positions.
        weights: of its heads for each query, [batch, index heads, tokens]; any sign.
        top_k: tokens that a query reads, at least 1.
        scale: factor on the logits of the attention; None means dim ** -0.5.
        indices: int [batch, tokens, n], the tokens where they are known, none twice; negative ones and those after
            the query are none. None means those of `dsa_select_tokens`; the indexer's tensors are then not read.

    Returns:
        [batch, heads, tokens, value dim] in the dtype of `q`, 0 for a query without any key.

    Raises:
        ValueError, TypeError: shapes, types or sizes that do not fit.
    """
    q, k, v = cast_inputs(q, k, v)
    check_tensors(q, k, v)
    with no_autocast(q.device), made_on_cpu():
        ctx = replace(Context.for_tensors(q, k), scale=scale)
        if indices is None:
            for name, given in (("q_index", q_index), ("k_index", k_index), ("weights", weights)):
                if not isinstance(given, Tensor):
                    raise TypeError(f"`{name}` must be a tensor where `indices` is None, got {type(given).__name__}")
            if k_index.shape[:2] != (k.shape[0], k.shape[2]) or q_index.shape[2] != q.shape[2]:
                raise ValueError(
                    f"`q_index` and `k_index` must be of {q.shape[2]} queries and [{k.shape[0]}, {k.shape[2]}, dim] "
                    f"keys, got {list(q_index.shape)} and {list(k_index.shape)}"
                )
            indices = dsa_select_tokens(q_index, k_index, weights, top_k)
        if indices.ndim != 3 or indices.shape[:2] != (q.shape[0], q.shape[2]) or indices.is_floating_point():
            raise ValueError(
                f"`indices` must be integers [batch, tokens, n] [{q.shape[0]}, {q.shape[2]}, n], got {indices.dtype} "
                f"{list(indices.shape)}"
            )
        lists = Visible(first=ctx.layout.query_start).of(indices)
        return listed_attention(q, k, v, lists[:, None], ctx.softmax_scale)[0]


@torch.no_grad()
def dsa_select_tokens(q_index: Tensor, k_index: Tensor, weights: Tensor, top_k: int = 2048) -> Tensor:
    """The indexer of DSA: the tokens up to each query with the highest scores, the same for all heads of attention.

    `I(t, s) = sum over heads of w_h(t) * relu(q_h(t) . k(s) / sqrt(index dim))` in float32, a strip of queries at a
    time. Ties go to the earlier token.

    Args:
        q_index: [batch, index heads, tokens, index dim]; fewer queries than keys are the last ones.
        k_index: [batch, keys, index dim].
        weights: [batch, index heads, tokens].
        top_k: tokens of a list, at least 1.

    Returns:
        int64 [batch, tokens, min(top_k, keys)], ascending, -1 at the end where a query sees fewer.

    Raises:
        ValueError, TypeError: shapes or sizes that do not fit.
    """
    check_int("top_k", top_k, 1)
    if q_index.ndim != 4 or k_index.ndim != 3 or weights.shape != q_index.shape[:3]:
        raise ValueError(
            "`q_index`, `k_index` and `weights` must be [batch, heads, tokens, dim], [batch, keys, dim] and [batch, "
            f"heads, tokens], got {list(q_index.shape)}, {list(k_index.shape)} and {list(weights.shape)}"
        )
    (batch, heads, queries, dim), keys = q_index.shape, k_index.shape[1]
    if k_index.shape != (batch, keys, dim) or not queries <= keys:
        raise ValueError(
            f"`k_index` must be [{batch}, at least {queries} keys, {dim}] like `q_index`, got {list(k_index.shape)}"
        )
    with no_autocast(q_index.device), made_on_cpu():
        work = torch.promote_types(q_index.dtype, torch.float32)
        key, start = k_index.to(work).mT, keys - queries
        # Heads of a query beside one another, so that their weights are one more product.
        query = q_index.transpose(1, 2).to(work) * dim**-0.5
        each = weights.to(work).transpose(1, 2)[:, :, None]
        found = torch.full((batch, queries, min(top_k, keys)), -1, device=q_index.device)
        token = torch.arange(start, keys, device=q_index.device)[:, None]
        step = max(1, min(at_a_time(batch * heads * keys), _PRODUCTS // (batch * heads * keys)))
        for first in range(0, queries, step):
            last = min(first + step, queries)
            rows, end = slice(first, last), start + last
            products = (query[:, rows].flatten(1, 2) @ key[..., :end]).relu_()
            scores = (each[:, rows] @ products.unflatten(1, (-1, heads)))[:, :, 0]
            scores.masked_fill_(torch.arange(end, device=scores.device) > token[rows], -torch.inf)
            best = best_ascending(scores, min(top_k, end))
            # A query that sees fewer has keys after itself in their place, which are the last of its list.
            found[:, rows, : best.shape[2]] = best.masked_fill_(best > token[rows], -1)
        return found


def tokens_pattern(indices: Tensor, keys: int, each: int = 1) -> BlockPattern:
    """The pattern of queries that read the single keys of their lists, as far as they see them; one for all heads.

    Args:
        indices: int [batch, queries, n]; negative ones and keys after the query are none.
        keys: how many there are; the last query is at the last of them.
        each: queries with the same list, one after another.
    """
    queries = indices.shape[1]
    token = torch.arange(keys - queries, keys, device=indices.device)[:, None]
    seen = (indices >= 0) & (indices <= token)
    none = torch.zeros(0, dtype=torch.int32, device=indices.device)
    counts = seen.sum(-1)[:, None]
    return BlockPattern.from_rows(
        torch.zeros_like(counts), none, each, _NO_BLOCK, queries * each, keys, column_counts=counts,
        columns=indices[seen],
    )  # fmt: skip


def attend(q: Tensor, k: Tensor, v: Tensor, indices: Tensor, run: Run) -> tuple[Tensor, Tensor]:
    """Attention of every query over the keys of its list: output and log-sum-exp.

    Args:
        q, k, v: [batch, heads, tokens, dim], keys and values [batch, kv_heads, keys, dim].
        indices: as of `tokens_pattern`.
        run: runs a pattern.
    """
    groups, keys = k.shape[1], k.shape[2]
    each = q.shape[1] // groups
    if each < _TOGETHER:
        return run(q, k, v, tokens_pattern(indices, keys))
    # The heads of a group become queries beside one another, which read their list in one row.
    together = q.unflatten(1, (groups, each)).transpose(2, 3).flatten(2, 3)
    out, lse = run(together, k, v, tokens_pattern(indices, keys, each))
    out, lse = (x.unflatten(2, (-1, each)).transpose(2, 3).flatten(1, 2) for x in (out, lse))
    return out, lse
