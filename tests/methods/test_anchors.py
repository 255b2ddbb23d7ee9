"""Which layers choose for others: the published choice, the best one by trying all, and roles by number."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch

from hf_sparse_attn.anchors import check_anchors, choose_anchors, full_layers, head_similarity, of_depth
from tests.support.golden import golden

GOLDEN = golden("decoding")
SIMILARITY, IMPORTANCE = (torch.from_numpy(GOLDEN[f"anchors.{name}"]) for name in ("similarity", "importance"))


@pytest.mark.parametrize("count", [3, 4])
def test_anchors_are_the_published_ones(count: int) -> None:
    found = choose_anchors(SIMILARITY, IMPORTANCE, count)
    assert list(found.layers) == GOLDEN[f"anchors.pivots{count}"].tolist()
    if count == 4:
        assert np.array_equal(found.head_map, GOLDEN["anchors.head_map4"])


@pytest.mark.parametrize("count", [1, 2, 5, 10])
def test_no_other_anchors_gain_more(count: int) -> None:
    value = GOLDEN["anchors.layer_similarity"]

    def gain(layers: tuple[int, ...]) -> float:
        return sum(value[max(a for a in layers if a <= j), j] for j in range(10))

    best = max(gain((0, *others)) for others in combinations(range(1, 10), count - 1))
    assert gain(choose_anchors(SIMILARITY, IMPORTANCE, count).layers) == pytest.approx(best, abs=1e-5)


def test_similarity_is_what_a_head_still_sees() -> None:
    anchor = torch.tensor([[[0.5, 0.3, 0.1, 0.1]], [[0.1, 0.1, 0.3, 0.5]]])
    layer = torch.tensor([[[0.4, 0.1, 0.4, 0.1], [0.5, 0.3, 0.1, 0.1]], [[0.1, 0.1, 0.3, 0.5], [0.1, 0.2, 0.3, 0.4]]])
    found = head_similarity(anchor, layer, topk=2)
    torch.testing.assert_close(found, torch.tensor([[0.5 / 0.8], [1.0]]))
    own = torch.full((2, 2), 0.2)
    torch.testing.assert_close(head_similarity(anchor, layer, 2, own), torch.tensor([[0.7 / 1.0], [1.0]]))
    assert bool((head_similarity(layer, layer, 2).diagonal() == 1).all())


@pytest.mark.parametrize(
    ("name", "given"),
    [("freq4", {"frequency": 4}), ("freq2", {"frequency": 2}), ("freq3_off1", {"frequency": 3, "offset": 1}),
     ("hy_v4", {"frequency": 4}), ("freq4", {"pattern": "FFSSSFSSSFSSS"})],
)  # fmt: skip
def test_layers_that_choose_are_those_of_the_configurations(name: str, given: dict) -> None:
    assert np.array_equal(full_layers(13, **given), GOLDEN[f"roles.{name}"])


def test_anchors_stand_at_the_same_shares_of_other_depths() -> None:
    assert of_depth(None, (2, 8, 18), 32, 32) == (2, 8, 18)
    assert of_depth(None, (2, 8, 18), 32, 64) == [4, 16, 36]
    assert of_depth((3,), (2, 8, 18), 32, 64) == (3,)
    assert of_depth(None, (2, 8, 18), 32, 1) == [0]
    assert check_anchors([4, 2, 4]) == (2, 4)


def test_what_cannot_be_is_named() -> None:
    for count in (0, 11):
        with pytest.raises(ValueError, match="`count` must be"):
            choose_anchors(SIMILARITY, IMPORTANCE, count)
    with pytest.raises(ValueError, match=r"`similarity` must be \[10, 10"):
        choose_anchors(SIMILARITY[:3], IMPORTANCE, 2)
    with pytest.raises(ValueError, match="`pattern` must be 3 letters F and S, got 'FX'"):
        full_layers(3, pattern="FX")
    with pytest.raises(ValueError, match="`pattern` must begin with F"):
        full_layers(2, pattern="SF")
    with pytest.raises(ValueError, match="`offset` must be at least 1, got 0"):
        full_layers(4, 2, 0)
