"""Heads that are built to be local, sink, strided, retrieval, spatial or temporal are found to be just that."""

from __future__ import annotations

import numpy as np
import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.run import from_measurements
from tests.support import planted
from tests.support.tiny_lm import tokens

pytestmark = pytest.mark.usefixtures("one_thread")

N, SIZE = 500, planted.BLOCK
GRID = (6, 8, 9)


def made(name: str, **params: object) -> Method:
    return hsa.get_method(name)(**params)


TEXT = {
    "local": made("sliding_window", window=48, sink=0, block_size=SIZE),
    "sink": made("sliding_window", window=16, sink=4, block_size=SIZE),
    "strided": made("strided", local=1, stride=5, head_step=0, block_size=SIZE),
    "retrieval": made("block_topk", topk=3, block_size=SIZE),
}
VIDEO = {
    "spatial": made("svg", density=0.35, kind="spatial", sink=False, block_size=SIZE),
    "temporal": made("svg", density=0.35, kind="temporal", sink=False, block_size=SIZE),
    "retrieval": made("block_topk", topk=3, block_size=SIZE),
}
TEXT_LAYERS = [
    ["local", "sink", "strided", "retrieval", "uniform", "local"],
    ["retrieval", "uniform", "local", "strided", "sink", "retrieval"],
]
VIDEO_LAYERS = [["spatial", "temporal", "retrieval", "uniform"], ["uniform", "temporal", "temporal", "spatial"]]


def tight_budget(found: hsa.HeadProfile, classes: dict[str, Method], layers: list[list[str]]) -> float:
    """What the planted classes cost, and a thousandth."""
    measured = found.measurements
    order = [*measured.candidates]
    cost = measured.figures["density"][0]
    each = [
        cost[i, h, order.index(classes[kind]) if kind in classes else 0]
        for i, layer in enumerate(layers)
        for h, kind in enumerate(layer)
    ]
    return float(np.mean(each)) + 1e-3


def assert_found(profile: hsa.HeadProfile, classes: dict[str, Method], layers: list[list[str]], metric: str) -> None:
    exact = from_measurements(profile.measurements, profile.model, tight_budget(profile, classes, layers), metric)
    chosen = [[exact.methods[i] for i in layer] for layer in exact.plans[0].choice]
    dense = made("dense")
    names = {method: kind for kind, method in classes.items()} | {dense: "uniform"}
    assert [[names[m] for m in layer] for layer in chosen] == layers


@pytest.fixture(scope="module")
def text_profile() -> hsa.HeadProfile:
    model = planted.llama([[getattr(planted, kind) for kind in layer] for layer in TEXT_LAYERS], N)
    batches = [tokens(1, N, seed) for seed in range(2)]
    return hsa.profile(model, batches, list(TEXT.values()), budget=0.6, metrics=("recall",), progress=False, maps=0)


@pytest.fixture(scope="module")
def video_profile() -> hsa.HeadProfile:
    n = GRID[0] * GRID[1] * GRID[2]
    kinds = {"spatial": planted.spatial(GRID), "temporal": planted.temporal(GRID)}
    kinds |= {"retrieval": planted.retrieval(n), "uniform": planted.uniform(n)}
    model, given = planted.wan([[kinds[kind] for kind in layer] for layer in VIDEO_LAYERS], GRID)
    return hsa.profile(
        model, [given], list(VIDEO.values()), budget=0.7, metrics=("recall", "video_mse"), progress=False, maps=0
    )


@pytest.mark.parametrize("metric", ["output_error", "recall"])
def test_planted_text_heads_are_found(text_profile: hsa.HeadProfile, metric: str) -> None:
    assert_found(text_profile, TEXT, TEXT_LAYERS, metric)


@pytest.mark.parametrize("metric", ["output_error", "recall", "video_mse"])
def test_planted_video_heads_are_found(video_profile: hsa.HeadProfile, metric: str) -> None:
    assert_found(video_profile, VIDEO, VIDEO_LAYERS, metric)


@pytest.mark.parametrize("kind", TEXT)
def test_the_planted_class_loses_next_to_nothing(text_profile: hsa.HeadProfile, kind: str) -> None:
    measured = text_profile.measurements
    at = [(i, h) for i, layer in enumerate(TEXT_LAYERS) for h, k in enumerate(layer) if k == kind]
    number = measured.candidates.index(TEXT[kind])
    for layer, head in at:
        recall = measured.figures["recall"][0, layer, head]
        assert recall[number] > 0.99 and recall[number] >= np.delete(recall, [0, number]).max()
