"""Some rows of a pattern, its heads one by one, and its keys in coarse cells: all against the token mask."""

from __future__ import annotations

import pytest
import torch

from hf_sparse_attn import BlockPattern
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.pattern.rows import head_densities, kept_cells
from tests.support.patterns import FEATURES, random_pattern

ROWS = {"first": [0], "tail": [3], "gaps": [0, 2], "gap_and_tail": [1, 3], "all": [0, 1, 2, 3]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize("feature", FEATURES)
def test_rows_keep_what_they_kept(feature: str, rows: list[int]) -> None:
    pattern = random_pattern(111, 130, batch=2, heads=2, seed=5, **FEATURES[feature])
    wanted = torch.tensor(rows)
    cut, tokens = pattern.query_rows(wanted).validate(), pattern.row_tokens(wanted)
    index = tokens.expand(2, 2, -1)[..., None].expand(-1, -1, -1, 130)
    assert cut.q_len == tokens.shape[2] == sum(min(32, 111 - 32 * r) for r in rows)
    assert torch.equal(cut.to_dense().expand(2, 2, -1, -1), pattern.to_dense().gather(2, index))


def test_rows_of_a_causal_pattern_run_as_in_the_whole() -> None:
    q, k, v = torch.randn(1, 4, 111, 16), torch.randn(1, 2, 130, 16), torch.randn(1, 2, 130, 16)
    pattern = BlockPattern.dense(111, 130, causal=True, block=32)
    rows = torch.tensor([1, 3])
    tokens = pattern.row_tokens(rows)[0, 0]
    out, lse, _ = run_pattern(q, k, v, pattern, 0.25, "torch_reference")
    part, part_lse, _ = run_pattern(q[:, :, tokens], k, v, pattern.query_rows(rows), 0.25, "torch_reference")
    torch.testing.assert_close(part, out[:, :, tokens])
    torch.testing.assert_close(part_lse, lse[:, :, tokens])


@pytest.mark.parametrize("rows", [[], [2, 1], [1, 1], [-1], [4]], ids=str)
def test_rows_must_ascend_within_the_pattern(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="`rows` must be ascending, from 0 to 3"):
        random_pattern(111, 130).query_rows(torch.tensor(rows, dtype=torch.int64))


def test_rows_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match="`rows` must be an int64 tensor"):
        random_pattern(111, 130).row_tokens([0])  # type: ignore[arg-type]


@pytest.mark.parametrize("count", ["full", "causal"])
@pytest.mark.parametrize("feature", FEATURES)
def test_density_of_each_head(feature: str, count: str) -> None:
    pattern = random_pattern(111, 130, batch=2, heads=3, seed=6, **FEATURES[feature])
    mask = pattern.to_dense()
    total = 111 * 130 if count == "full" else sum(range(20, 131))
    want = mask.sum((2, 3)).double() / total
    torch.testing.assert_close(head_densities(pattern, count).expand_as(want), want)  # type: ignore[arg-type]


def test_density_of_one_head_for_all() -> None:
    pattern = BlockPattern.dense(100, 100, causal=True, block=32)
    assert head_densities(pattern, "causal").tolist() == [[1.0]]


@pytest.mark.parametrize("feature", [f for f in FEATURES if f not in ("kv_range", "all")])
def test_cells_cover_what_is_kept(feature: str) -> None:
    pattern = random_pattern(111, 130, heads=2, seed=7, **FEATURES[feature])
    for head in range(2):
        mask = pattern.to_dense()[0, min(head, pattern.to_dense().shape[1] - 1)]
        want = torch.nn.functional.pad(mask, (0, 7 * 19 - 130, 0, 7 * 16 - 111))
        want = want.unflatten(0, (7, 16)).unflatten(2, (7, 19)).any(3).any(1)
        found = kept_cells(pattern, head, 7)
        assert bool((found | ~want).all())
        if pattern.q_order is None:
            # A row of 32 queries is two cells, whose keys are not told apart.
            pairs = torch.nn.functional.pad(want, (0, 0, 0, 1)).unflatten(0, (4, 2)).any(1)
            assert torch.equal(torch.nn.functional.pad(found, (0, 0, 0, 1)).unflatten(0, (4, 2)).any(1), pairs)
