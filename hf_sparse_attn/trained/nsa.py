"""Native sparse attention (NSA, Yuan et al. 2025): its three branches, and their sum to train with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.autocast import cast_inputs, made_on_cpu, no_autocast
from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.dispatch import check_tensors, run_pattern
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.selection import best_ascending
from hf_sparse_attn.selection_by_query import block_means, grouped_products, pattern_by_query

# Sizes of the blocks of the compressed branch: of queries, and of means.
_ROW, _MEANS = 64, 16
# Scores that are held at a time, about what stays in a cache.
_SCORES = 1 << 20
# Above every probability, in the order in which they are kept: the first block, the one before the own, the own.
_FIRST, _BEFORE, _OWN = 2.0, 3.0, 4.0


def nsa_attention(
    q: Tensor, k: Tensor, v: Tensor, g_cmp: Tensor | None, g_slc: Tensor, g_swa: Tensor | None = None,
    block_size: int = 64, block_count: int = 16, window_size: int = 512, scale: float | None = None,
    block_indices: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Native sparse attention (NSA) as a function to train with (Yuan et al. 2025, arXiv 2502.11089).

    `g_cmp * o_cmp + g_slc * o_slc + g_swa * o_swa`: attention over the means of blocks, over the selected blocks and
    over a window. Differentiable in q, k, v and the gates; the selection is a constant of the backward.

    Args:
        q: [batch, heads, tokens, dim]; fewer queries than keys are the last ones.
        k: [batch, kv_heads, tokens, dim]; kv_heads divides heads, and the heads of a group share their blocks.
        v: [batch, kv_heads, tokens, value dim].
        g_cmp: gate of the compressed branch, [batch, heads, tokens of q], mostly a sigmoid; None leaves it out.
        g_slc: gate of the selected branch, likewise.
        g_swa: gate of the window, likewise; None leaves it out.
        block_size: tokens in a block, at least 1.
        block_count: blocks that a query reads, at least 1.
        window_size: tokens of the window, the query itself among them; 0 leaves it out.
        scale: factor on the logits; None means dim ** -0.5.
        block_indices: int [batch, kv_heads, tokens of q, n], the selected blocks where they are known, -1 for none;
            None means those of `nsa_select_blocks`. The compressed branch is added all the same.
        backend: "auto", or a backend by name.

    Returns:
        [batch, heads, tokens, value dim] in the dtype of `q`.

    Raises:
        ValueError, TypeError: shapes, types or sizes that do not fit.
    """
    q, k, v = cast_inputs(q, k, v)
    ctx = _checked(q, k, v, scale)
    check_sizes(block_size, block_count, window_size)
    for name, gate in (("g_cmp", g_cmp), ("g_slc", g_slc), ("g_swa", g_swa)):
        if gate is not None and not isinstance(gate, Tensor):
            raise TypeError(f"`{name}` must be a tensor [batch, heads, tokens] or None, got {type(gate).__name__}")
        if gate is not None and gate.shape != q.shape[:3]:
            raise ValueError(f"`{name}` must be [batch, heads, tokens] {list(q.shape[:3])}, got {list(gate.shape)}")
    with no_autocast(q.device), made_on_cpu():
        factor = ctx.softmax_scale
        if block_indices is None:
            block_indices = select_blocks(q, k, block_size, block_count, factor)
        chosen = _checked_blocks(block_indices, q, k, block_size)
        selected = run_pattern(q, k, v, blocks_pattern(chosen, block_size, ctx.layout, q.shape[1]), factor, backend)[0]
        compressed = None if g_cmp is None else compressed_branch(q, k, v, block_size, factor, backend=backend)[0]
        window = None
        if g_swa is not None and window_size:
            window = run_pattern(q, k, v, window_pattern(window_size, ctx, q.device), factor, backend)[0]
        return weighed((g_cmp, g_slc, g_swa), (compressed, selected, window))


def nsa_compressed(
    q: Tensor, k: Tensor, v: Tensor, block_size: int = 64, scale: float | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """The compressed branch of nsa_attention: attention over the means of the blocks that ended up to each query.

    Args:
        q, k, v, block_size, scale, backend: as of nsa_attention.

    Returns:
        output [batch, heads, tokens, value dim], 0 where no block has ended yet, and log-sum-exp
        [batch, heads, tokens], there -inf. Both are differentiable.
    """
    q, k, v = cast_inputs(q, k, v)
    ctx = _checked(q, k, v, scale)
    check_sizes(block_size, 1, 0)
    with no_autocast(q.device), made_on_cpu():
        return compressed_branch(q, k, v, block_size, ctx.softmax_scale, backend=backend)


def nsa_select_blocks(
    q: Tensor, k: Tensor, block_size: int = 64, block_count: int = 16, scale: float | None = None
) -> Tensor:
    """The blocks that each query of nsa_attention reads in full.

    Args:
        q, k, block_size, block_count, scale: as of nsa_attention.

    Returns:
        int64 [batch, kv_heads, tokens of q, block_count], ascending, -1 at the end where there are fewer.
    """
    ctx = _checked(q, k, k, scale)
    check_sizes(block_size, block_count, 0)
    with no_autocast(q.device), made_on_cpu():
        found = select_blocks(q, k, block_size, block_count, ctx.softmax_scale)
        return nn.functional.pad(found, (0, block_count - found.shape[3]), value=-1)


def nsa_selected(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, block_size: int = 64, scale: float | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """The selected branch of nsa_attention: attention over the tokens up to each query in the blocks of its list.

    Args:
        q, k, v, block_indices, block_size, scale, backend: as of nsa_attention.

    Returns:
        [batch, heads, tokens, value dim], 0 for a query without any key.
    """
    q, k, v = cast_inputs(q, k, v)
    ctx = _checked(q, k, v, scale)
    check_sizes(block_size, 1, 0)
    with no_autocast(q.device), made_on_cpu():
        chosen = _checked_blocks(block_indices, q, k, block_size)
        pattern = blocks_pattern(chosen, block_size, ctx.layout, q.shape[1])
        return run_pattern(q, k, v, pattern, ctx.softmax_scale, backend)[0]


@torch.no_grad()
def select_blocks(q: Tensor, k: Tensor, size: int, count: int, scale: float, softcap: float = 0.0) -> Tensor:
    """See nsa_select_blocks; no longer than there are blocks.

    Args:
        q, k, size, count: as there.
        scale, softcap: of the logits, as in Context.
    """
    (batch, _, queries, _), groups, keys = q.shape, k.shape[1], k.shape[2]
    means, blocks = block_means(k, size), -(-keys // size)
    token = torch.arange(keys - queries, keys, device=q.device)[:, None]
    own, block = token // size, torch.arange(blocks, device=q.device)
    found = torch.full((batch, groups, queries, min(count, blocks)), -1, device=q.device)
    numbers = batch * q.shape[1] * blocks
    step = max(1, min(at_a_time(numbers), _SCORES // numbers))
    for first in range(0, queries, step):
        rows, last = slice(first, first + step), min(first + step, queries) - 1
        # Blocks up to the own of the last query.
        place = block[: (keys - queries + last) // size + 1]
        ended = place[: means.shape[2]]
        logits = grouped_products(q[:, :, rows], means[:, :, : len(ended)]) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        logits.masked_fill_((ended + 1) * size - 1 > token[rows], -torch.inf)
        # A query that no block has ended for has no weights, and needs none.
        weights = logits.softmax(-1).nan_to_num_(0.0).unflatten(1, (groups, -1)).mean(2)
        scores = nn.functional.pad(weights, (0, len(place) - len(ended)))
        for forced, score in ((0, _FIRST), (own[rows] - 1, _BEFORE), (own[rows], _OWN)):
            scores.masked_fill_(place == forced, score)
        best = best_ascending(scores.masked_fill_(place > own[rows], -torch.inf), min(count, len(place)))
        # Where there are fewer, blocks after the own stand in their place, which are the last of the list.
        found[:, :, rows, : best.shape[3]] = best.masked_fill_(best > own[rows], -1)
    return found


def blocks_pattern(chosen: Tensor, size: int, layout: TokenLayout, heads: int) -> BlockPattern:
    """The pattern of queries that read the blocks of their lists, up to themselves.

    Args:
        chosen: int64 [batch, kv_heads, queries, n], blocks in any order; negative ones are none.
        size: tokens in a block.
        layout: the tokens, causal.
        heads: query heads.
    """
    blocks = -(-layout.kv_len // size)

    def keep(first: int, last: int) -> Tensor:
        own = chosen[:, :, first:last]
        # What is none goes to a place that is cut off.
        found = own.new_zeros(*own.shape[:3], blocks + 1, dtype=torch.bool)
        return found.scatter_(-1, own.where(own >= 0, blocks), True)[..., :blocks]

    shape = (*chosen.shape[:3], blocks)
    return pattern_by_query(keep, shape, size, layout, heads // chosen.shape[1])


def compressed_branch(
    q: Tensor, k: Tensor, v: Tensor, size: int, scale: float, softcap: float = 0.0, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """See nsa_compressed."""
    keys, values = (block_means(x, size).to(x.dtype) for x in (k, v))
    if not keys.shape[2]:
        lse = torch.full(q.shape[:3], -torch.inf, device=q.device, dtype=torch.promote_types(q.dtype, torch.float32))
        return (q * 0.0).sum(-1, keepdim=True).expand(*q.shape[:3], v.shape[3]), lse
    pattern = _ended_blocks(q.shape[2], k.shape[2], size, keys.shape[2], q.device)
    return run_pattern(q, keys, values, pattern, scale, backend, softcap)[:2]


def _ended_blocks(queries: int, keys: int, size: int, ended: int, device: torch.device) -> BlockPattern:
    """Queries, the last of so many tokens, over the means of the blocks that ended with them or before."""
    rows, cols = -(-queries // _ROW), -(-ended // _MEANS)
    first = keys - queries + torch.arange(rows, device=device) * _ROW
    last = (first + _ROW - 1).clamp(max=keys - 1)
    start = torch.arange(cols, device=device) * _MEANS
    row, col = (start * size + size - 1 <= last[:, None]).nonzero(as_tuple=True)
    # Mean b of a block is there for query a iff (b + 1) * size <= ahead + a + 1.
    ahead = (first[row] - start[col] * size).clamp(max=_MEANS * size - 1)
    kinds, kind = ahead.unique(return_inverse=True)
    lane, mean = torch.arange(_ROW, device=device), torch.arange(_MEANS, device=device)
    tiles = (mean + 1) * size <= (kinds[:, None] + lane + 1)[:, :, None]
    tile_ids = torch.where(tiles.flatten(1).all(1), 0, torch.arange(1, len(kinds) + 1, device=device))[kind]
    counts = torch.bincount(row, minlength=rows)[None, None]
    table = torch.cat([tiles.new_ones(1, _ROW, _MEANS), tiles])
    return BlockPattern.from_rows(counts, start[col], _ROW, _MEANS, queries, ended, tile_ids, table)


def window_pattern(size: int, ctx: Context, device: torch.device) -> BlockPattern:
    """The last tokens of every query."""
    params: dict[str, Any] = {"window": size, "sink": 0, "block_size": 64}
    found = METHODS.get("sliding_window")(**params).static_pattern(ctx, device)
    assert isinstance(found, BlockPattern)
    return found


def weighed(gates: Sequence[Tensor | None], branches: Sequence[Tensor | None]) -> Tensor:
    """The sum of the branches times their gates; what has no gate or no branch is left out."""
    parts = [(g, o) for g, o in zip(gates, branches, strict=True) if g is not None and o is not None]
    wide = [g[..., None] * o for g, o in parts]
    return torch.stack(wide).sum(0).to(parts[0][1].dtype) if len(wide) > 1 else wide[0].to(parts[0][1].dtype)


def _checked(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Context:
    check_tensors(q, k, v)
    return replace(Context.for_tensors(q, k), scale=scale)


def _checked_blocks(chosen: Tensor, q: Tensor, k: Tensor, size: int) -> Tensor:
    """Lists of blocks as int64, after a look at their shape and range."""
    want, blocks = (q.shape[0], k.shape[1], q.shape[2]), -(-k.shape[2] // size)
    if chosen.ndim != 4 or chosen.shape[:3] != want or chosen.is_floating_point():
        raise ValueError(
            f"`block_indices` must be integers [batch, kv_heads, tokens, n] [{', '.join(map(str, want))}, n], "
            f"got {chosen.dtype} {list(chosen.shape)}"
        )
    if chosen.numel() and int(chosen.max()) >= blocks:
        raise ValueError(f"`block_indices` must be less than {blocks} blocks, got {int(chosen.max())}")
    return chosen.long()


def check_sizes(block_size: object, block_count: object, window_size: object) -> None:
    """Raises where a size is no int or too small, by its name."""
    check_int("block_size", block_size, 1)
    check_int("block_count", block_count, 1)
    check_int("window_size", window_size, 0)
