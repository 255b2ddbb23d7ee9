"""BlockPattern: what it keeps, counts, turns into and refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_sparse_attn import BlockPattern
from hf_sparse_attn.pattern.layout import causal_tiles
from tests.support.patterns import FEATURES, random_pattern

SIZES = [(1, 1), (63, 63), (111, 130), (130, 111), (32, 64)]


def causal_mask(q_len: int, kv_len: int) -> torch.Tensor:
    return torch.arange(kv_len) <= torch.arange(kv_len - q_len, kv_len)[:, None]


@pytest.mark.parametrize("q_len, kv_len", SIZES)
def test_token_mask_survives_the_round_trip(q_len: int, kv_len: int) -> None:
    mask = torch.rand(2, 3, q_len, kv_len) < 0.3
    pattern = BlockPattern.from_token_mask(mask, 16, 32).validate()
    assert torch.equal(pattern.to_dense(), mask)
    assert pattern.density() == pytest.approx(float(mask.double().mean()))


def test_equal_tiles_are_stored_once() -> None:
    pattern = BlockPattern.from_token_mask(causal_mask(320, 320)[None, None], 32, 32)
    assert len(pattern.tiles) == 2


@pytest.mark.parametrize("q_len, kv_len", [(1, 1), (63, 63), (63, 111), (32, 96)])
def test_block_map_with_causal_edge(q_len: int, kv_len: int) -> None:
    keep = torch.rand(1, 2, -(-q_len // 16), -(-kv_len // 32)) < 0.7
    pattern = BlockPattern.from_block_map(keep, 16, 32, q_len, kv_len, causal=True).validate()
    wide = keep.repeat_interleave(16, 2).repeat_interleave(32, 3)[..., :q_len, :kv_len]
    want = wide & causal_mask(q_len, kv_len)
    assert torch.equal(pattern.to_dense(), want)
    seen = causal_mask(q_len, kv_len).sum() * 2
    assert pattern.density("causal") == pytest.approx(int(want.sum()) / int(seen))


@pytest.mark.parametrize("feature", FEATURES)
def test_views_agree_with_the_mask(feature: str) -> None:
    pattern = random_pattern(111, 130, batch=2, heads=2, seed=3, **FEATURES[feature])
    mask = pattern.to_dense()
    assert pattern.density() == pytest.approx(float(mask.double().mean()))
    # The map is over places, so that orders are undone before it is compared.
    placed = mask
    if pattern.q_order is not None:
        placed = placed.gather(2, pattern.q_order.expand(2, 2, -1)[..., None].expand_as(mask))
    if pattern.kv_order is not None:
        placed = placed.gather(3, pattern.kv_order.expand(2, 2, -1)[:, :, None].expand_as(mask))
    rows, cols = -(-111 // 32), -(-130 // 32)
    padded = torch.zeros(2, 2, rows * 32, cols * 32, dtype=torch.bool)
    padded[..., :111, :130] = placed
    want = padded.unflatten(2, (rows, 32)).unflatten(4, (cols, 32)).any(-1).any(3)
    assert torch.equal(pattern.block_map().expand_as(want), want)


@pytest.mark.parametrize("feature", FEATURES)
def test_reblock_keeps_the_same_keys(feature: str) -> None:
    pattern = random_pattern(111, 130, batch=2, heads=2, seed=4, **FEATURES[feature])
    assert torch.equal(pattern.reblock(16, 8).validate().to_dense(), pattern.to_dense())


def test_stack_heads_of_different_patterns() -> None:
    parts = [
        random_pattern(111, 130, heads=1, block_q=32, block_k=32, seed=1, columns=9),
        random_pattern(111, 130, heads=2, block_q=16, block_k=64, seed=2, kv_order=(1, 1)),
        random_pattern(111, 130, heads=1, block_q=64, block_k=16, seed=3, q_order=(1, 1), batch=2),
    ]
    stacked = BlockPattern.stack_heads(parts).validate()
    assert (stacked.heads, stacked.block_q, stacked.block_k) == (4, 16, 16)
    want = torch.cat([p.to_dense().expand(2, -1, -1, -1) for p in parts], dim=1)
    assert torch.equal(stacked.to_dense(), want)


def test_stack_heads_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="at least one"):
        BlockPattern.stack_heads([])
    with pytest.raises(ValueError, match="equal lengths"):
        BlockPattern.stack_heads([random_pattern(64, 64), random_pattern(64, 65)])
    with pytest.raises(ValueError, match="kv_range"):
        BlockPattern.stack_heads([random_pattern(64, 64), random_pattern(64, 64, kv_range=[(1, 5)])])
    with pytest.raises(ValueError, match="batch 1 or 3"):
        BlockPattern.stack_heads([random_pattern(64, 64, batch=2), random_pattern(64, 64, batch=3)])


@pytest.mark.parametrize("block_q, block_k", [(16, 16), (16, 64), (64, 16)])
def test_causal_tiles_at_every_distance(block_q: int, block_k: int) -> None:
    distance = torch.arange(1 - block_q, 3 * block_k)
    ids, tiles = causal_tiles(distance, block_q, block_k)
    a, b = torch.arange(block_q)[:, None], torch.arange(block_k)
    assert torch.equal(tiles[ids.long()], b <= a + distance[:, None, None])
    assert bool(tiles[0].all())


def test_memory_grows_with_blocks_not_with_their_square() -> None:
    small, large = (
        BlockPattern.from_rows(
            torch.full((1, 1, n), 4), (torch.arange(4 * n) % 4) * 128, 128, 128, n * 128, n * 128
        ).nbytes
        for n in (100, 1000)
    )
    assert large < 11 * small


GOOD = {"block_q": 16, "block_k": 16, "q_len": 40, "kv_len": 40}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"indptr": torch.zeros(1, 1, 4, dtype=torch.int32)}, "`indptr` must be torch.int64"),
        ({"indptr": torch.zeros(1, 1, 3, dtype=torch.int64)}, "`indptr` must be"),
        ({"indptr": torch.tensor([[[0, 2, 1, 3]]])}, "rise from 0 to 3"),
        ({"starts": torch.tensor([0, 0, 40], dtype=torch.int32)}, r"`starts` must lie in \[0, 40\)"),
        ({"starts": torch.tensor([0, 16, 24], dtype=torch.int32)}, "once a row"),
        ({"tile_ids": torch.tensor([0, 0, 1], dtype=torch.int32)}, "`tile_ids` must lie"),
        ({"tile_ids": torch.zeros(2, dtype=torch.int32)}, "as long as `starts`"),
        ({"tiles": torch.zeros(1, 16, 16, dtype=torch.bool)}, "tile 0 all true"),
        ({"tiles": torch.ones(1, 16, 8, dtype=torch.bool)}, "`tiles` must be"),
        ({"columns": torch.zeros(1, dtype=torch.int32)}, "both or neither"),
        ({"q_order": torch.zeros(1, 1, 40, dtype=torch.int64)}, "permutations of 40"),
        ({"kv_range": torch.tensor([[5, 41]], dtype=torch.int32)}, "0 <= start <= end <= 40"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_validate_names_what_is_wrong(change: dict, message: str) -> None:
    good = BlockPattern.from_rows(torch.tensor([[[1, 0, 2]]]), torch.tensor([0, 0, 16]), **GOOD).validate()
    with pytest.raises((ValueError, TypeError), match=message):
        replace(good, **change).validate()


def test_validate_sees_a_column_inside_a_block() -> None:
    pattern = BlockPattern.from_rows(
        torch.tensor([[[1, 0, 0]]]), torch.tensor([8]), **GOOD,
        column_counts=torch.tensor([[[1, 0, 0]]]), columns=torch.tensor([9]),
    )  # fmt: skip
    with pytest.raises(ValueError, match="got 9 twice in row 0"):
        pattern.validate()


def test_constructors_refuse_bad_input() -> None:
    with pytest.raises(TypeError, match="boolean"):
        BlockPattern.from_block_map(torch.ones(1, 1, 2, 2), 16, 16, 32, 32)
    with pytest.raises(ValueError, match=r"`keep` must be \[batch, heads, 3, 2\]"):
        BlockPattern.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), 16, 16, 33, 32)
    with pytest.raises(ValueError, match="`q_len` must be at most"):
        BlockPattern.from_block_map(torch.ones(1, 1, 2, 1, dtype=torch.bool), 16, 16, 32, 16, causal=True)
    with pytest.raises(ValueError, match="`block_q` must be at least 1"):
        BlockPattern.from_block_map(torch.ones(1, 1, 2, 2, dtype=torch.bool), 0, 16, 32, 32)
    with pytest.raises(ValueError, match="`counts` must be"):
        BlockPattern.from_rows(torch.tensor([[[1]]]), torch.tensor([0]), **GOOD)
    with pytest.raises(ValueError, match="`count` must be"):
        random_pattern(64, 64).density("half")  # type: ignore[arg-type]  # the error is the test
    with pytest.raises(ValueError, match="must divide"):
        random_pattern(64, 64).reblock(24, 16)


@pytest.mark.parametrize("feature", ["unaligned", "columns", "kv_range"])
def test_flex_refuses_what_it_cannot_hold(feature: str) -> None:
    with pytest.raises(ValueError, match=r"FlexAttention|cut the keys"):
        random_pattern(111, 130, seed=5, **{**FEATURES[feature], "aligned": feature != "unaligned"}).to_flex()


def test_to_flex_is_the_same_mask() -> None:
    pattern = random_pattern(128, 192, heads=2, aligned=True, seed=6)
    mask = pattern.to_flex()
    b, h = torch.zeros((), dtype=torch.int64), torch.arange(2)[:, None, None]
    q, kv = torch.arange(128)[:, None], torch.arange(192)
    blocks = mask.to_dense().repeat_interleave(32, 2).repeat_interleave(32, 3).bool()
    want = pattern.to_dense()[0]
    assert torch.equal(mask.mask_mod(b, h, q, kv), want)
    assert bool((blocks[0] | ~want).all())
