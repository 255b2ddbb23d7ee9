"""What methods share: pooling, top-k with stable ties, patterns from token rules, merging by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from hf_sparse_attn.context import Context, TokenLayout, check_int
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.layout import at_a_time, causal_tiles, distinct_tiles

# Weights of the last queries held at a time, over heads: bounds memory at long context.
_WEIGHTS_AT_A_TIME = 1 << 25
# Bytes of a boolean block map that is no matter: its strips are put together.
_MAP_AT_ONCE = 1 << 20


def check_block_size(size: object, name: str = "block_size") -> int:
    """Returns a block size that all backends take: a power of two from 16 to 256."""
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"`{name}` must be an int, got {size!r} of type {type(size).__name__}")
    if not 16 <= size <= 256 or size & (size - 1):
        raise ValueError(f"`{name}` must be a power of two from 16 to 256, got {size}")
    return size


def check_share(name: str, value: object) -> float:
    """Returns a share in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be a number, got {value!r} of type {type(value).__name__}")
    if not 0 < value <= 1:
        raise ValueError(f"`{name}` must be more than 0 and at most 1, got {value}")
    return float(value)


def check_amount(name: str, value: object, minimum: int) -> int | float:
    """Returns a number of tokens or blocks of at least `minimum`, or a share of those of a call in (0, 1), a float.

    A share of 1 is refused: as a parameter it would be equal to one token.
    """
    rule = "an int, or as a float a share in (0, 1)"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"`{name}` must be {rule}, got {value!r} of type {type(value).__name__}")
    if isinstance(value, int):
        return check_int(name, value, minimum)
    if value > 1:
        raise TypeError(f"`{name}` must be an int, got {value} of type float, which is a share in (0, 1) alone")
    if not 0 < value < 1:
        raise ValueError(f"`{name}` must be {rule}, got {value}")
    return value


def amount_of(value: int | float, total: int) -> int:
    """The number that a parameter of `check_amount` stands for where a call has `total`; a share is at least one."""
    return max(1, round(value * total)) if isinstance(value, float) else value


def pool_blocks(x: Tensor, size: int) -> Tensor:
    """Mean of each block of `size` tokens in float32; a short last block is the mean of what it has.

    Args:
        x: [batch, heads, tokens, dim].
        size: tokens in a block.

    Returns:
        [batch, heads, blocks, dim] in float32.
    """
    whole = x.shape[2] // size * size
    pooled = x[:, :, :whole].unflatten(2, (-1, size)).mean(3, dtype=torch.float32)
    if whole < x.shape[2]:
        pooled = torch.cat([pooled, x[:, :, whole:].mean(2, keepdim=True, dtype=torch.float32)], dim=2)
    return pooled


def rank_descending(scores: Tensor) -> Tensor:
    """Indices along the last dimension from the highest score to the lowest, ties by lower index."""
    return torch.sort(scores, dim=-1, descending=True, stable=True).indices


def best_ascending(scores: Tensor, count: int) -> Tensor:
    """The first `count` of `rank_descending`, in ascending order: int64 [..., count]."""
    if scores.device.type != "cpu":
        return rank_descending(scores)[..., :count].sort(-1).values
    if not count:
        return torch.empty(*scores.shape[:-1], 0, dtype=torch.int64)
    # Without sorting all, where a look at the numbers need not wait for a device.
    values, best = scores.topk(count, sorted=False)
    least = values.amin(-1, keepdim=True)
    # No other one is as high as the lowest of the best: there is no choice among them.
    if int((scores >= least).sum()) == best.numel():
        return best.sort(-1).values
    if bool(least.isnan().any()):
        return rank_descending(scores)[..., :count].sort(-1).values
    above, level = scores > least, scores == least
    kept = above | (level & (level.cumsum(-1) <= count - above.sum(-1, keepdim=True)))
    return kept.nonzero()[:, -1].view(*scores.shape[:-1], count)


def covering(scores: Tensor, share: float, forced: Tensor, visible: Tensor) -> Tensor:
    """The fewest elements of each row that hold a share of its sum: forced ones first, then from the highest on.

    Args:
        scores: float32 [..., n], at least 0, and 0 where not visible.
        share: in (0, 1]; all that is visible is kept at 1.
        forced, visible: bool, broadcastable to `scores`; forced ones must be visible.

    Returns:
        bool like `scores`.
    """
    if share == 1:
        return visible.expand_as(scores)
    order = rank_descending(scores.masked_fill(forced, torch.inf).masked_fill(~visible, -torch.inf))
    total = scores.gather(-1, order).cumsum(-1)
    # An element is needed while those before it hold less than the share.
    before = torch.nn.functional.pad(total[..., :-1], (1, 0))
    needed = before < share * scores.sum(-1, keepdim=True)
    return (torch.zeros_like(needed).scatter_(-1, order, needed) & visible) | forced


def top_blocks(
    score: Callable[[int, int], Tensor],
    counts: Tensor,
    shape: tuple[int, int, int, int],
) -> Tensor:
    """The best key blocks of each query block, a strip of rows at a time.

    Args:
        score: (first row, last row) -> float32 [batch, heads, rows, key blocks]; +inf forces, -inf forbids.
        counts: int64 [rows], blocks to keep in each row; must not exceed the number not forbidden.
        shape: (batch, heads, rows, key blocks).

    Returns:
        int64 [batch, heads, sum of counts]: kept key blocks, ascending within each row, row after row.
    """
    batch, heads, rows, cols = shape
    most = int(counts.max())
    step = at_a_time(batch * heads * cols)
    strips = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        best = rank_descending(score(first, last))[..., :most]
        unused = torch.arange(most, device=counts.device) >= counts[first:last, None]
        # Unused places sort to the end of the row and are cut off there.
        best = best.masked_fill(unused, cols).sort(-1).values
        strips.append(best[:, :, ~unused])
    return torch.cat(strips, dim=-1)


def row_blocks(layout: TokenLayout, size: int, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Key blocks in which the first and the last query of each row lie, both int64 [rows].

    They differ where a chunk of a prompt does not begin with a block.
    """
    first = layout.query_start + torch.arange(-(-layout.q_len // size), device=device) * size
    return first // size, (first + size - 1).clamp(max=layout.kv_len - 1) // size


def least_of_row_blocks(ctx: Context, size: int) -> float:
    """Share of the visible pairs of a whole causal prompt that the first block and each row's own block keep."""
    n = ctx.layout.kv_len
    if ctx.layout.query_start or not ctx.layout.is_causal:
        return 0.0
    blocks, rest = divmod(n, size)
    own = blocks * size * (size + 1) // 2 + rest * (rest + 1) // 2
    return (own + max(0, n - size) * size) / (n * (n + 1) / 2)


def gather_rows(
    keep: Callable[[int, int], Tensor], shape: tuple[int, int, int, int], weight: int = 1, strips: int = 1
) -> tuple[Tensor, Tensor]:
    """The kept key blocks of a boolean block map that is never there as a whole, a strip of rows at a time.

    Args:
        keep: (first row, last row) -> bool [batch, heads, rows, key blocks].
        shape: (batch, heads, rows, key blocks).
        weight: numbers that `keep` holds for each element of its result.
        strips: fewest strips; more than one where `keep` is cheaper for early rows.

    Returns:
        int64 [batch, heads, rows], kept blocks of each row, and int32 [their sum], the blocks, row after row.
    """
    batch, heads, rows, cols = shape
    step = min(-(-rows // strips), at_a_time(batch * heads * cols * weight))
    maps: Iterable[Tensor] = (keep(first, min(first + step, rows)) for first in range(0, rows, step))
    if batch * heads * rows * cols <= _MAP_AT_ONCE:
        maps = [torch.cat(list(maps), 2)]
    parts = []
    for kept in maps:
        block = torch.arange(cols, dtype=torch.int32, device=kept.device)
        parts.append((kept.sum(-1), block.expand_as(kept).masked_select(kept)))
    if len(parts) == 1:
        return parts[0]
    counts = torch.cat([count for count, _ in parts], 2)
    # A strip holds rows of all heads; the result goes head by head.
    begin = (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)
    blocks = torch.empty(int(counts.sum()), dtype=torch.int32, device=counts.device)
    for i, (count, found) in enumerate(parts):
        length = count.flatten()
        shift = begin[:, :, i * step : i * step + count.shape[2]].flatten() - (length.cumsum(0) - length)
        at = torch.arange(len(found), device=found.device)
        blocks[at + torch.repeat_interleave(shift, length, output_size=len(found))] = found
    return counts, blocks


def pattern_of_rows(counts: Tensor, blocks: Tensor, size: int, layout: TokenLayout) -> BlockPattern:
    """The pattern of aligned blocks of `size` x `size` found by `gather_rows`, cut at the diagonal where causal."""
    starts = blocks.long() * size
    tile_ids, tiles = None, None
    if layout.is_causal:
        row = torch.arange(counts.shape[2], device=counts.device).expand_as(counts).flatten()
        own = layout.query_start + torch.repeat_interleave(row, counts.flatten(), output_size=len(starts)) * size
        tile_ids, tiles = causal_tiles(own - starts, size, size)
    return BlockPattern.from_rows(counts, starts, size, size, layout.q_len, layout.kv_len, tile_ids, tiles)


def last_query_sums(
    q: Tensor, k: Tensor, last_queries: int, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries summed along columns and along diagonals, in float32.

    Args:
        q: [batch, heads, q_len, dim].
        k: [batch, kv_heads, kv_len, dim]; the last query is at the last key.
        last_queries: number of estimating queries; fewer where q is shorter.
        scale: factor on the logits.
        softcap: cap on the logits as in Context, 0 for none.

    Returns:
        score of each column and of each diagonal (0 is the main one), both [batch, heads, kv_len].
    """
    # What is ranked by these sums has no gradient.
    q, k = q.detach(), k.detach()
    n, last = k.shape[2], min(last_queries, q.shape[2])
    query = q[:, :, -last:].unflatten(1, (k.shape[1], -1))
    per_query = q.shape[0] * query.shape[2] * n
    heads = max(1, _WEIGHTS_AT_A_TIME // (per_query * last))
    # Where the queries of one key head are too many, too, they go in strips, which are added up.
    step = min(last, max(1, _WEIGHTS_AT_A_TIME // per_query))
    if heads >= k.shape[1] and step == last:
        return _strip_sums(query.float(), k.float(), scale, softcap)
    parts = []
    for i in range(0, k.shape[1], heads):
        sums = q.new_zeros(2, q.shape[0], min(heads, k.shape[1] - i) * query.shape[2], n, dtype=torch.float32)
        for j in range(0, last, step):
            end = min(j + step, last)
            seen = n - last + end
            strip = query[:, i : i + heads, :, j:end].float(), k[:, i : i + heads, :seen].float()
            for total, part in zip(sums, _strip_sums(*strip, scale, softcap), strict=True):
                total[..., :seen] += part
        parts.append(sums)
    vertical, slash = torch.cat(parts, 2)
    return vertical, slash


def _strip_sums(q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
    """As `last_query_sums`, for q [batch, kv_heads, group, last, dim]."""
    n, last = k.shape[2], q.shape[3]
    # A line of zeros goes before the first query: see below.
    logits = torch.einsum("bngqd,bnkd->bngqk", torch.nn.functional.pad(q * scale, (0, 0, 1, 0)), k).flatten(1, 2)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    later = torch.ones(last + 1, last, dtype=torch.bool, device=q.device).triu(0)
    logits[..., n - last :].masked_fill_(later, -torch.inf)
    weights = logits.softmax(-1)
    weights[:, :, 0] = 0
    # Query i of the strip has distance o in column n - last + i - o. Lines that are read one key longer than they are
    # put equal distances below each other, the far ones first; what a query lacks there is the end of the line
    # before, which it must not see and which is 0.
    batch, heads = weights.shape[:2]
    strides = (*weights.stride()[:2], n + 1, 1)
    slash = weights.as_strided((batch, heads, last, n), strides, weights.storage_offset() + n - last + 1).sum(2)
    return weights.sum(2), slash.flip(-1)


def text_tokens(layout: TokenLayout) -> Tensor:
    """Which keys are text beside a video, bool [keys]: these are always kept.

    All false without a video and for a causal layout: there the text is no condition but the sequence itself.
    """
    is_text = torch.zeros(layout.kv_len, dtype=torch.bool)
    if not layout.is_causal and any(p.kind == "video" for p in layout.parts):
        start = 0
        for part in layout.parts:
            is_text[start : start + part.length] = part.kind == "text"
            start += part.length
    return is_text


def text_blocks(layout: TokenLayout, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Query blocks and key blocks that hold a text token of a layout with video: these are always kept.

    Returns:
        bool [query blocks] and bool [key blocks]; all false for a layout without video.
    """
    is_text = text_tokens(layout)

    def any_in(tokens: Tensor, size: int) -> Tensor:
        pad = -len(tokens) % size
        return torch.nn.functional.pad(tokens, (0, pad)).unflatten(0, (-1, size)).any(1)

    return any_in(is_text[layout.query_start :], block_q), any_in(is_text, block_k)


def pattern_from_rule(
    row: Tensor,
    start: Tensor,
    alike: Tensor,
    rule: Callable[[Tensor, Tensor], Tensor],
    block_q: int,
    block_k: int,
    layout: TokenLayout,
) -> BlockPattern:
    """One-head pattern of a token-exact static rule.

    Args:
        row: int64 [blocks], rows in ascending order.
        start: int64 [blocks], first key of each block, ascending within a row.
        alike: int64 [blocks, n], what the tile depends on: blocks with equal numbers have equal tiles, so that the
            rule is evaluated once for each distinct one.
        rule: (query position [n, block_q, 1], key position [n, 1, block_k]) -> bool [n, block_q, block_k].
        block_q, block_k: sizes of a block.
        layout: the tokens.
    """
    kinds, kind = alike.unique(dim=0, return_inverse=True)
    # Any block of a kind will do as its example: the last one written wins, and all are equal.
    example = torch.zeros(len(kinds), dtype=torch.int64).scatter_(0, kind, torch.arange(len(row)))
    query = layout.query_start + row[example, None, None] * block_q + torch.arange(block_q)[:, None]
    key = start[example, None, None] + torch.arange(block_k)
    tiles, tile_of = distinct_tiles(rule(query, key))
    tile = tile_of[kind]
    some = tiles.flatten(1).any(1)[tile]
    rows = -(-layout.q_len // block_q)
    counts = torch.bincount(row[some], minlength=rows)[None, None]
    return BlockPattern.from_rows(
        counts, start[some], block_q, block_k, layout.q_len, layout.kv_len, tile[some], tiles
    )


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> tuple[Tensor, Tensor]:
    """Attention with one more logit per head, whose value is 0, from the attention without it (gpt-oss: `s_aux`).

    Args:
        out: [batch, heads, tokens, dim].
        lse: log-sum-exp [batch, heads, tokens].
        sinks: the logits [heads].
    """
    sink = sinks.to(lse.dtype).view(1, -1, 1)
    # The sink takes exp(sink) / (exp(lse) + exp(sink)) of the weight.
    kept = torch.sigmoid(lse - sink)
    return (out * kept[..., None]).to(out.dtype), torch.logaddexp(lse, sink.expand_as(lse))


def merge_by_lse(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint sets of keys from the attention over each.

    Args:
        first, second: (output [batch, heads, tokens, dim], log-sum-exp [batch, heads, tokens]).
    """
    lse = torch.logaddexp(first[1], second[1])
    # Where neither has a key both log-sum-exps are -inf: 0 in their place gives weights 0 and output 0.
    shift = lse.masked_fill(lse == -torch.inf, 0.0)
    a, b = ((x[1] - shift).exp()[..., None] for x in (first, second))
    out = first[0].to(a.dtype) * a + second[0].to(b.dtype) * b
    return out.to(first[0].dtype), lse
