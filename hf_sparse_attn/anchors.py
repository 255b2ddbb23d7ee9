"""Layers that choose for the layers after them: which they are, and which of their heads stands for which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int


class Anchors(NamedTuple):
    """Layers that choose, and for every layer and head the head of the last such layer whose choice it reads.

    Args:
        layers: ascending.
        head_map: for every layer the head of the anchor for each head.
    """

    layers: tuple[int, ...]
    head_map: tuple[tuple[int, ...], ...]


def check_anchors(layers: object) -> tuple[int, ...] | None:
    """Returns layers in ascending order, each once, or None where none are given."""
    if layers is None:
        return None
    if not isinstance(layers, Sequence) or isinstance(layers, str) or not layers:
        raise TypeError(f"`anchors` must be a list of layers or None, got {layers!r}")
    return tuple(sorted({check_int("anchors", layer, 0) for layer in layers}))


def of_depth(layers: Sequence[int] | None, published: Sequence[int], depth: int, num_layers: int) -> Sequence[int]:
    """The layers that are given, or else those published for a model, at the same shares of a model's layers.

    Args:
        layers: given, or None.
        published: for a model of `depth` layers.
        depth: its number of layers.
        num_layers: layers of the model at hand.
    """
    if layers is not None or num_layers == depth:
        return published if layers is None else layers
    return sorted({min(round(layer * num_layers / depth), num_layers - 1) for layer in published})


def full_layers(num_layers: int, frequency: int = 1, offset: int = 2, pattern: str | None = None) -> tuple[bool, ...]:
    """Which layers choose by themselves; the others read what the last of these chose.

    As configurations of transformers say it: `index_topk_freq`, `index_skip_topk_offset`, `index_topk_pattern`.

    Args:
        num_layers: of the model.
        frequency: every so many layers one chooses, at least 1.
        offset: layer i chooses where max(i - offset + 1, 0) is a multiple of `frequency`.
        pattern: one letter for each layer in place of both, F for one that chooses and S for one that shares.

    Raises:
        ValueError: a pattern of other letters or another length, or one whose first layer has nothing to share.
    """
    check_int("frequency", frequency, 1)
    if pattern is None:
        found = tuple(max(i - offset + 1, 0) % frequency == 0 for i in range(num_layers))
    elif len(pattern) != num_layers or set(pattern) - {"F", "S"}:
        raise ValueError(f"`pattern` must be {num_layers} letters F and S, got {pattern!r}")
    else:
        found = tuple(letter == "F" for letter in pattern)
    if num_layers and not found[0]:
        given = (
            f"`pattern` must begin with F, got {pattern!r}"
            if pattern
            else f"`offset` must be at least 1, got {offset}"
        )
        raise ValueError(f"{given}: no layer comes before the first one")
    return found


def head_similarity(anchor: Tensor, layer: Tensor, topk: int = 64, own: Tensor | None = None) -> Tensor:
    """How much of what a layer's heads look at they would still see with the choice of an anchor's heads.

    The weight that a head puts on the best keys of a head of the anchor, over that on its own best keys; of the
    queries the one for which it is least.

    Args:
        anchor, layer: weights of the same queries on the same keys, [queries, heads, keys] each; in Kascade those of
            the keys before a tile of queries, summed over it.
        topk: best keys that a head chooses.
        own: weights that are kept whatever is chosen, as of the tile itself, [queries, heads] of `layer`; None: none.

    Returns:
        [heads of layer, heads of anchor].
    """
    count = min(topk, anchor.shape[2])
    chosen = torch.zeros_like(anchor).scatter_(2, anchor.topk(count, 2).indices, 1.0)
    seen, best = layer @ chosen.mT, layer.topk(count, 2).values.sum(2, keepdim=True)
    if own is not None:
        seen, best = seen + own[..., None], best + own[..., None]
    return (seen / best.clamp(min=1e-30)).amin(0)


def choose_anchors(similarity: Tensor, importance: Tensor, count: int) -> Anchors:
    """The layers that stand for the others best, the first layer among them, and whom their heads stand for (Kascade).

    Layer j gains importance_j * mean over its heads of the best similarity to a head of the anchor before it; the sum
    of what all layers gain is the largest that any `count` anchors have.

    Args:
        similarity: [layers, layers, heads, heads]: by anchor, layer, head of the layer and head of the anchor, as
            `head_similarity` gives it, mean over prompts; only anchors that come no later than the layer are read.
        importance: [layers], in Kascade 1 - cosine of what a layer's attention gets and gives, with the residual.
        count: of anchors, at least 1.

    Raises:
        ValueError: shapes that do not fit, or more anchors than layers.
    """
    layers = len(importance)
    if similarity.ndim != 4 or similarity.shape[:2] != (layers, layers):
        raise ValueError(f"`similarity` must be [{layers}, {layers}, heads, heads], got {list(similarity.shape)}")
    if check_int("count", count, 1) > layers:
        raise ValueError(f"`count` must be at most the {layers} layers, got {count}")
    value = (similarity.double().amax(3).mean(2) * importance.double()).tolist()

    def gain(anchor: int, end: int) -> float:
        return sum(value[anchor][anchor:end])

    # best[i]: most that layers from i on gain with i an anchor and so many in all, and the anchors.
    best: dict[int, tuple[float, tuple[int, ...]]] = {i: (gain(i, layers), (i,)) for i in range(layers)}
    for more in range(1, count):
        best = {
            i: max(((gain(i, j) + best[j][0], (i, *best[j][1])) for j in range(i + 1, layers - more + 1)), key=_first)
            for i in range(layers - more)
        }
    chosen = best[0][1]
    head_map = []
    for layer in range(layers):
        anchor = max(one for one in chosen if one <= layer)
        head_map.append(tuple(similarity[anchor, layer].argmax(1).tolist()))
    return Anchors(chosen, tuple(head_map))


def _first(pair: tuple[float, tuple[int, ...]]) -> float:
    return pair[0]
