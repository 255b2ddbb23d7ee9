"""BlockPattern: the one value that passes from a method to a kernel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.pattern import check, ops, stack
from hf_sparse_attn.pattern import rows as rows_of
from hf_sparse_attn.pattern.cache import derived
from hf_sparse_attn.pattern.layout import causal_tiles, distinct_tiles, row_offsets

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """Which keys every block of queries reads: key blocks in rows (CSR), partial tiles, single columns, orders.

    Rows are blocks of `block_q` consecutive queries. A key block is `block_k` consecutive keys from any start: it
    need not be aligned. Keys at or beyond `kv_len` and queries at or beyond `q_len` (short tail blocks) do not exist.
    No key may stand twice in one row. With an order, "query i" and "key j" below mean places i and j of the order.

    Args:
        block_q: queries in a row, at least 1.
        block_k: keys in a block, at least 1.
        q_len: number of queries.
        kv_len: number of keys.
        indptr: int64 [batch or 1, heads or 1, rows + 1]; the blocks of row r are `starts[indptr[r]:indptr[r + 1]]`.
            Offsets are absolute over the whole of `starts`; heads are query heads.
        starts: int32 [blocks], the first key of each block.
        tile_ids: int32 [blocks], which tile limits the block; 0 means that the whole block is kept.
        tiles: bool [n_tiles, block_q, block_k]; tile 0 is all true.
        column_indptr: int64 [batch or 1, heads or 1, rows + 1], like `indptr` for `columns`, or None.
        columns: int32 [n], single keys read by all queries of the row, or None.
        q_order: int64 [batch or 1, heads or 1, q_len], token at each place, or None.
        kv_order: int64 [batch or 1, heads or 1, kv_len], token at each place, or None.
        kv_range: int32 [batch, 2], valid keys [start, end) as tokens (before the order), or None.
    """

    block_q: int
    block_k: int
    q_len: int
    kv_len: int
    indptr: Tensor
    starts: Tensor
    tile_ids: Tensor
    tiles: Tensor
    column_indptr: Tensor | None = None
    columns: Tensor | None = None
    q_order: Tensor | None = None
    kv_order: Tensor | None = None
    kv_range: Tensor | None = None
    # What was made of this pattern and is needed again, by name; see pattern/cache.py.
    derived: dict[Hashable, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    # ------------------------------------------------------------------ construction

    @classmethod
    def from_rows(
        cls,
        counts: Tensor,
        starts: Tensor,
        block_q: int,
        block_k: int,
        q_len: int,
        kv_len: int,
        tile_ids: Tensor | None = None,
        tiles: Tensor | None = None,
        column_counts: Tensor | None = None,
        columns: Tensor | None = None,
    ) -> BlockPattern:
        """Builds a pattern from the number of blocks in each row.

        Args:
            counts: int [batch or 1, heads or 1, rows].
            starts: int [sum of counts], first keys, row after row.
            block_q, block_k, q_len, kv_len: as in the class.
            tile_ids, tiles: as in the class; None means whole blocks.
            column_counts: int [batch or 1, heads or 1, rows] and
            columns: int [sum of column_counts], or None both.

        Raises:
            ValueError: a size is not positive or `counts` has the wrong number of rows.
        """
        for name, size in (("block_q", block_q), ("block_k", block_k), ("q_len", q_len), ("kv_len", kv_len)):
            check_int(name, size, 1)
        rows = -(-q_len // block_q)
        if counts.ndim != 3 or counts.shape[2] != rows:
            raise ValueError(f"`counts` must be [batch, heads, {rows}], got {list(counts.shape)}")
        if tiles is None:
            tiles = torch.ones(1, block_q, block_k, dtype=torch.bool, device=starts.device)
        if tile_ids is None:
            tile_ids = torch.zeros_like(starts, dtype=torch.int32)
        return cls(
            block_q, block_k, q_len, kv_len,
            row_offsets(counts), starts.to(torch.int32), tile_ids.to(torch.int32), tiles,
            None if column_counts is None else row_offsets(column_counts),
            None if columns is None else columns.to(torch.int32),
        )  # fmt: skip

    @classmethod
    def from_block_map(
        cls, keep: Tensor, block_q: int, block_k: int, q_len: int, kv_len: int, causal: bool = False
    ) -> BlockPattern:
        """Builds a pattern of aligned blocks from a boolean map.

        Args:
            keep: bool [batch or 1, heads or 1, query blocks, key blocks].
            block_q, block_k, q_len, kv_len: as in the class.
            causal: drops keys after the query; the last query is at the last key.

        Raises:
            TypeError: `keep` is not boolean.
            ValueError: `keep` has the wrong shape, or `causal` with more queries than keys.
        """
        for name, size in (("block_q", block_q), ("block_k", block_k), ("q_len", q_len), ("kv_len", kv_len)):
            check_int(name, size, 1)
        if keep.dtype != torch.bool:
            raise TypeError(f"`keep` must be boolean, got {keep.dtype}")
        want = (-(-q_len // block_q), -(-kv_len // block_k))
        if keep.ndim != 4 or tuple(keep.shape[2:]) != want:
            raise ValueError(f"`keep` must be [batch, heads, {want[0]}, {want[1]}], got {list(keep.shape)}")
        if causal and q_len > kv_len:
            raise ValueError(f"`q_len` must be at most `kv_len` = {kv_len} when causal, got {q_len}")
        if causal:
            last_query = kv_len - q_len + (torch.arange(want[0], device=keep.device) + 1) * block_q - 1
            first_key = torch.arange(want[1], device=keep.device) * block_k
            keep = keep & (first_key <= last_query.clamp(max=kv_len - 1)[:, None])
        row, key_block = keep.nonzero()[:, 2:].unbind(1)
        starts = key_block * block_k
        tile_ids, tiles = None, None
        if causal:
            tile_ids, tiles = causal_tiles(kv_len - q_len + row * block_q - starts, block_q, block_k)
        return cls.from_rows(keep.sum(-1), starts, block_q, block_k, q_len, kv_len, tile_ids, tiles)

    @classmethod
    def from_token_mask(cls, mask: Tensor, block_q: int, block_k: int) -> BlockPattern:
        """Builds the pattern of an exact token mask, equal tiles stored once. O(q_len x kv_len): for small sizes.

        Args:
            mask: bool [batch or 1, heads or 1, q_len, kv_len].
            block_q, block_k: as in the class.
        """
        q_len, kv_len = mask.shape[2:]
        rows, cols = -(-q_len // block_q), -(-kv_len // block_k)
        # Tokens that do not exist count as kept, so that the full tail blocks need no tile.
        padded = torch.ones(*mask.shape[:2], rows * block_q, cols * block_k, dtype=torch.bool, device=mask.device)
        padded[..., :q_len, :kv_len] = mask
        blocks = padded.unflatten(2, (rows, block_q)).unflatten(4, (cols, block_k)).transpose(3, 4)
        real = torch.zeros_like(padded)
        real[..., :q_len, :kv_len] = mask
        keep = real.unflatten(2, (rows, block_q)).unflatten(4, (cols, block_k)).any(-1).any(3)
        tiles, tile_ids = distinct_tiles(blocks[keep])
        starts = keep.nonzero()[:, 3] * block_k
        return cls.from_rows(keep.sum(-1), starts, block_q, block_k, q_len, kv_len, tile_ids, tiles)

    @classmethod
    def dense(
        cls, q_len: int, kv_len: int, causal: bool, block: int = 128, device: torch.device | str = "cpu"
    ) -> BlockPattern:
        """All keys (causal: all up to the query), in blocks of `block` x `block`; one head stands for all."""
        rows, cols = -(-q_len // block), -(-kv_len // block)
        keep = torch.ones(1, 1, rows, cols, dtype=torch.bool, device=device)
        return cls.from_block_map(keep, block, block, q_len, kv_len, causal)

    @classmethod
    def stack_heads(cls, patterns: Sequence[BlockPattern], order: Sequence[int] | None = None) -> BlockPattern:
        """One pattern whose heads are those of all `patterns`, in order; blocks are cut to a common size.

        Args:
            patterns: of equal lengths and valid ranges.
            order: for each head of the result its number among the heads of all `patterns`; None means all in turn.

        Raises:
            ValueError: no pattern, patterns of different lengths, batch sizes or valid ranges, or no such head.
        """
        return stack.stack_heads(patterns, order)

    # ------------------------------------------------------------------ sizes

    @property
    def batch(self) -> int:
        """Leading batch size; 1 stands for any batch."""
        return self.indptr.shape[0]

    @property
    def heads(self) -> int:
        """Leading head size; 1 stands for any number of query heads."""
        return self.indptr.shape[1]

    @property
    def rows(self) -> int:
        """Number of query blocks."""
        return self.indptr.shape[2] - 1

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.starts.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.numel() * t.element_size() for t in self._tensors().values())

    def row_counts(self) -> Tensor:
        """Number of key blocks of each row, int64 [batch, heads, rows]."""
        return self.indptr.diff(dim=-1)

    def __repr__(self) -> str:
        extra = "".join(
            f", {n}" for n in ("columns", "q_order", "kv_order", "kv_range") if getattr(self, n) is not None
        )
        return (
            f"BlockPattern({self.q_len} x {self.kv_len}, blocks {self.block_q} x {self.block_k}, batch {self.batch}, "
            f"heads {self.heads}, {self.starts.numel()} blocks, {len(self.tiles)} tiles{extra})"
        )

    # ------------------------------------------------------------------ views and checks (bodies in ops.py)

    def density(self, count: Literal["full", "causal"] = "full") -> float:
        """Kept pairs of tokens over all pairs, mean over batch and heads.

        Args:
            count: "full" divides by q_len * kv_len; "causal" by the pairs of a causal mask (last query at last key).
        """
        # Read once: static patterns live on in a cache and are asked at every call.
        found: float | Tensor = self.density_later(count)
        if isinstance(found, Tensor):
            found = self.derived["density", count] = float(found)
        return found

    def density_later(self, count: Literal["full", "causal"] = "full") -> float | Tensor:
        """`density` without waiting for a GPU: a 0-d tensor there until it was read, a number elsewhere."""

        def count_pairs() -> float | Tensor:
            found = ops.density(self, count)
            return found if isinstance(found, Tensor) and found.device.type != "cpu" else float(found)

        return derived(self, ("density", count), count_pairs)

    def to_dense(self) -> Tensor:
        """Token mask, bool [batch, heads, q_len, kv_len], in token order. O(q_len x kv_len): small sizes and tests."""
        return ops.to_dense(self)

    def block_map(self) -> Tensor:
        """Bool [batch, heads, query blocks, key blocks]: whether any key of the aligned block is kept by any query."""
        return ops.block_map(self)

    def to_flex(self) -> BlockMask:
        """The pattern as a FlexAttention BlockMask (queries and keys must be put in order before).

        Raises:
            ValueError: key blocks that are not aligned, or columns.
        """
        return ops.to_flex(self)

    def reblock(self, block_q: int, block_k: int) -> BlockPattern:
        """The same keys in smaller blocks; `block_q` and `block_k` must divide the present ones."""
        return ops.reblock(self, block_q, block_k)

    def query_rows(self, rows: Tensor) -> BlockPattern:
        """The pattern of some rows alone, for the queries `q[tokens]` with `tokens = row_tokens(rows)`, in that order.

        Args:
            rows: int64 [n], blocks of queries, ascending.

        Raises:
            TypeError, ValueError: `rows` is not such a tensor.
        """
        return rows_of.query_rows(self, rows)

    def last_queries(self, count: int) -> BlockPattern:
        """The pattern of the last queries alone; blocks of queries get smaller where they do not begin with one.

        Raises:
            TypeError, ValueError: `count` is not from 1 to all queries, or the queries are in an order of their own.
        """
        return rows_of.last_queries(self, count)

    def row_tokens(self, rows: Tensor) -> Tensor:
        """The queries of some rows as tokens, int64 [batch or 1, heads or 1, queries]; see `query_rows`."""
        return rows_of.row_tokens(self, rows)

    def validate(self) -> BlockPattern:
        """Checks every rule of the class and returns the pattern.

        Raises:
            TypeError: a tensor of the wrong dtype.
            ValueError: names the field, the rule and the value that breaks it.
        """
        check.validate(self)
        return self

    def with_kv_range(self, kv_range: Tensor | None) -> BlockPattern:
        """The same pattern with only keys in [start, end) of each batch row valid; int [batch, 2]."""
        return replace(self, kv_range=None if kv_range is None else kv_range.to(self.device, torch.int32))

    def to(self, device: torch.device | str) -> BlockPattern:
        """The pattern on another device; itself where it is there already."""
        if self.device == torch.device(device):
            return self
        moved: dict[str, Any] = {name: t.to(device) for name, t in self._tensors().items()}
        return replace(self, **moved)

    def _tensors(self) -> dict[str, Tensor]:
        names = (
            "indptr",
            "starts",
            "tile_ids",
            "tiles",
            "column_indptr",
            "columns",
            "q_order",
            "kv_order",
            "kv_range",
        )
        return {n: t for n in names if (t := getattr(self, n)) is not None}
