"""What a profile chooses from where nothing is said."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Method
from hf_sparse_attn.methods.sliding_window import SlidingWindow
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.video_tiles import tile_for
from hf_sparse_attn.profiling.candidates import block_for, default_candidates
from hf_sparse_attn.registry import METHODS

TEXT = {"block_topk", "sliding_window", "strided", "xattention"}
LAYOUTS: dict[str, tuple[TokenLayout, set[str]]] = {
    "a text": (TokenLayout.causal(640), TEXT | {"vertical_slash", "flexprefill"}),
    "a short text": (TokenLayout.causal(111), TEXT | {"vertical_slash", "flexprefill"}),
    "an encoder": (TokenLayout.bidirectional(900), TEXT),
    "an image": (TokenLayout.video(1, 28, 28, text_before=1), TEXT | {"sliding_tile", "vsa"}),
    "a few frames": (TokenLayout.video(2, 8, 8), TEXT | {"sliding_tile", "vsa", "svg", "radial"}),
    "a video": (TokenLayout.video(5, 8, 9, text_after=7), TEXT | {"sliding_tile", "vsa", "svg", "radial"}),
}


def _pattern(method: Method, layout: TokenLayout) -> BlockPattern:
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 2, layout.kv_len, 32, generator=draw) for _ in range(2))
    found = method.pattern_for(q, k, Context(layout, num_heads=2, num_kv_heads=2, head_dim=32))
    assert isinstance(found, BlockPattern)
    return found


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_methods_that_apply_and_can_differ(name: str) -> None:
    layout, names = LAYOUTS[name]
    # Methods that other tests registered are candidates, too.
    found = [m for m in default_candidates(layout) if type(m).__module__.startswith("hf_sparse_attn.")]
    assert {method.name for method in found} == names
    assert len(set(found)) == len(found) <= 30
    patterns = [_pattern(method, layout) for method in found]
    kept = [pattern.to_dense().numpy().tobytes() for pattern in patterns]
    # What is chosen by a share of flat attention may be all of it on this noise.
    full = [m.name for m, p in zip(found, patterns, strict=True) if p.density(layout.density_count) == 1]
    assert set(full) <= {"flexprefill", "xattention"}
    told = [one for one, m in zip(kept, found, strict=True) if m.name not in ("flexprefill", "xattention")]
    assert len(set(told)) == len(told)


def test_they_are_for_the_longest_text_that_is_known() -> None:
    assert default_candidates(TokenLayout.causal(64), 1024) == default_candidates(TokenLayout.causal(1024))


@pytest.mark.parametrize("layout", [TokenLayout.causal, TokenLayout.bidirectional], ids=["causal", "both ways"])
def test_they_keep_their_density_at_other_lengths(layout: Any) -> None:
    for method in default_candidates(layout(1024)):
        # Of flat attention those that hold a share of it keep most, and diagonals lie apart, a block each.
        if method.name in ("flexprefill", "xattention", "vertical_slash"):
            continue
        here, there = (_pattern(method, layout(n)).density(layout(n).density_count) for n in (1024, 4096))
        # Blocks and the least that a method keeps weigh less where there are more tokens.
        assert 0.6 < there / here < 1.25 or (here < 0.2 and there < here)


def test_a_tile_is_no_larger_than_the_canvas() -> None:
    assert tile_for(TokenLayout.video(1, 56, 56)) == (1, 8, 8)
    assert tile_for(TokenLayout.video(2, 3, 60)) == (2, 2, 8)
    assert tile_for(TokenLayout.video(21, 30, 52)) == (4, 5, 8)


@pytest.fixture
def own() -> Iterator[type[Method]]:
    """A method of somebody's own that says what to try, registered while the test runs."""

    @hsa.register_method("own_rule")
    @dataclass(frozen=True, kw_only=True)
    class Own(Method):
        needs = frozenset({"causal"})
        block_size: int = 128
        every: int = 2

        def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern:
            size, n = self.block_size, ctx.layout.kv_len
            block = torch.arange(-(-n // size))
            keep = (block[:, None] - block) % self.every == 0
            return BlockPattern.from_block_map(keep[None, None], size, size, n, n, causal=True)

        @classmethod
        def candidates(cls, layout: TokenLayout, tokens: int) -> Sequence[Mapping[str, Any]]:
            return [{"every": 2}, {"every": 3}, {"every": 1}, {"every": 1000}, {"every": 2000}]

    yield Own
    METHODS._entries.pop("own_rule")


def test_of_two_that_are_alike_the_own_one_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Again(SlidingWindow):
        name = "a_window"

    monkeypatch.setitem(METHODS._entries, "a_window", Again)
    names = {method.name for method in default_candidates(TokenLayout.causal(640))}
    assert "sliding_window" in names and "a_window" not in names


def test_a_new_method_is_among_them(own: Any) -> None:
    found = [m for m in default_candidates(TokenLayout.causal(1024)) if m.name == "own_rule"]
    # All is kept by every block, and of two that keep the diagonal one is left.
    assert found == [own(every=n, block_size=16) for n in (2, 3, 1000)]
    assert not [m for m in default_candidates(TokenLayout.bidirectional(1024)) if m.name == "own_rule"]


def test_a_tight_budget_is_spent_in_finer_blocks() -> None:
    layout = TokenLayout.causal(1024)
    sizes = [{m.block_size for m in default_candidates(layout, 2048, budget=budget)} for budget in (0.125, 0.25)]
    assert sizes == [{16}, {32}]
    assert [block_for(n, 0.1) for n in (100, 2048, 16384, 131072)] == [16, 16, 64, 64]
