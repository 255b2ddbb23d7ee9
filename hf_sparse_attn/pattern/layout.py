"""Parts of a pattern that know nothing of patterns: offsets of rows, tables of tiles, how much is held at a time."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# Entries expanded to single keys at a time by the counting functions: bounds their memory.
CHUNK = 1 << 22
# Scores held at a time while blocks are ranked: bounds memory at long context.
_SCORES_AT_A_TIME = 1 << 24


def row_offsets(counts: Tensor) -> Tensor:
    """Row offsets of CSR from the number of entries per row; every head starts where the one before it ended."""
    ends = counts.to(torch.int64).flatten().cumsum(0).view_as(counts)
    return torch.cat([ends[..., :1] - counts[..., :1], ends], dim=-1)


def entry_rows(indptr: Tensor, entries: int | None = None) -> Tensor:
    """For each CSR entry the flat index of its row over [batch, heads, rows], int64 [entries]."""
    counts = indptr.diff(dim=-1).flatten()
    return torch.repeat_interleave(torch.arange(counts.numel(), device=indptr.device), counts, output_size=entries)


def distinct_tiles(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Equal tiles stored once, after the all-true one, which is always there.

    Args:
        tiles: bool [n, block_q, block_k].

    Returns:
        the table bool [distinct, block_q, block_k], and for each of `tiles` its place in it, int64 [n].
    """
    full = tiles.new_ones(1, *tiles.shape[1:])
    table, place = torch.cat([full, tiles]).flatten(1).unique(dim=0, return_inverse=True)
    # unique() sorts: the all-true tile comes last, and must become tile 0.
    return table.flip(0).unflatten(1, tuple(tiles.shape[1:])), (len(table) - 1 - place)[1:]


def causal_tiles(distance: Tensor, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Tile ids and tiles of blocks under a causal mask.

    Args:
        distance: int [blocks], position of the row's first query minus that of the block's first key; every
            block must hold at least one key that is not after the row's last query.
        block_q, block_k: sizes of a tile.

    Returns:
        tile ids int32 [blocks] (0 where the block lies wholly before the row) and tiles bool [n, block_q, block_k].
    """
    tiles = _causal_tile_table(block_q, block_k, distance.device)
    # Query a sees key b iff b <= a + distance: whole from distance = block_k - 1 on.
    ids = torch.where(distance >= block_k - 1, 0, distance + block_q)
    used = torch.zeros(len(tiles), dtype=torch.bool, device=ids.device)
    used[0] = True
    used[ids] = True
    return (used.cumsum(0) - 1).to(torch.int32)[ids], tiles[used]


@lru_cache(maxsize=16)
def _causal_tile_table(block_q: int, block_k: int, device: torch.device) -> Tensor:
    """Tile i > 0 is the one at distance i - block_q; tile 0 is all true."""
    distance = torch.arange(1 - block_q, block_k - 1, device=device)
    a = torch.arange(block_q, device=device)[:, None]
    b = torch.arange(block_k, device=device)[None, :]
    partial = b <= a + distance[:, None, None]
    return torch.cat([torch.ones(1, block_q, block_k, dtype=torch.bool, device=device), partial])


def at_a_time(numbers: int) -> int:
    """How many maps of `numbers` scores are held at a time, at least 1."""
    return max(1, _SCORES_AT_A_TIME // max(1, numbers))
