"""Models whose layers share one module, and those whose modules have no number that counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AlbertConfig, AlbertForMaskedLM, AlbertModel

import hf_sparse_attn as hsa
from tests.support import tiny_transformers

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, embedding_size=32, intermediate_size=96, num_attention_heads=4
)
TOPK: dict[str, Any] = {"method": "block_topk", "density": 0.25, "block_size": 16, "min_tokens": 0}
IDS = torch.randint(3, 128, (2, 111), generator=torch.Generator().manual_seed(0))


def albert(kind: Any = AlbertModel, **sizes: int) -> Any:
    torch.manual_seed(0)
    return kind(AlbertConfig(**SIZES, **{"num_hidden_layers": 12, **sizes})).eval()


def run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS)[0]


@pytest.mark.parametrize("kind", [AlbertModel, AlbertForMaskedLM])
@pytest.mark.parametrize(
    ("dense", "kept"), [(1, {0}), (5, {0, 1, 2, 3, 4}), ([3, 11], {3, 11}), (None, set()), (12, set(range(12)))],
    ids=str,
)  # fmt: skip
def test_a_layer_is_a_run_of_the_shared_module(kind: Any, dense: Any, kept: set[int]) -> None:
    model = albert(kind)
    own = run(model)
    with hsa.patch(model, **TOPK, dense_layers=dense) as patch:
        got = run(model)
        assert torch.equal(run(model), got)
    layers = patch.report().layers
    assert [r.layer for r in layers] == list(range(12)) and len({r.name for r in layers}) == 12
    assert {r.layer for r in layers if r.reasons} == kept
    assert all((r.sparse_calls, r.dense_calls) == ((0, 2) if r.layer in kept else (2, 0)) for r in layers)
    assert torch.equal(got, own) == (len(kept) == 12) and torch.equal(run(model), own)


@pytest.mark.parametrize(
    ("sizes", "order"),
    [({"num_hidden_groups": 3}, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),
     ({"num_hidden_layers": 4, "inner_group_num": 2}, [0, 1] * 4),
     ({"num_hidden_layers": 7, "num_hidden_groups": 2, "inner_group_num": 2}, [0, 1] * 4 + [2, 3] * 3)],
    ids=["groups", "inner", "both"],
)  # fmt: skip
def test_the_runs_are_those_of_the_model(sizes: dict[str, int], order: list[int]) -> None:
    model = albert(**sizes)
    ran: list[int] = []
    names = [n for n, m in model.named_modules() if type(m).__name__ == "AlbertAttention"]
    for place, name in enumerate(names):
        model.get_submodule(name).register_forward_hook(lambda *_, place=place: ran.append(place))
    with hsa.patch(model, **TOPK, dense_layers=[1, 6]) as patch:
        run(model)
    assert ran == order
    layers = patch.report().layers
    assert [names.index(r.name.partition(" ")[0]) for r in layers] == order
    assert [r.layer for r in layers if r.reasons] == [1, 6]


def test_a_method_is_told_which_layer_of_how_many() -> None:
    model, seen = albert(), []
    with hsa.patch(model, **TOPK) as patch:
        patch.session.watcher = lambda q, k, v, ctx, out: seen.append((ctx.layer, ctx.num_layers))
        run(model)
    assert seen == [(layer, 12) for layer in range(12)]


@pytest.mark.slow
def test_a_compiled_graph_counts_its_runs() -> None:
    model = albert()
    with hsa.patch(model, **TOPK, dense_layers=2) as patch:
        want = run(model)
        model.compile(backend="eager", fullgraph=True)
        got = run(model)
    assert torch.allclose(got, want, atol=1e-5)
    assert [r.sparse_calls for r in patch.report().layers] == [0, 0] + [2] * 10


def test_modules_that_all_say_minus_one_are_numbered_in_order() -> None:
    """The attention of Zamba2 is told its layer in each call."""
    from transformers import Zamba2Config, Zamba2Model

    fields = next(tiny_transformers.tiny_configs(Zamba2Model, layers=(6,))).to_diff_dict()
    kept = {name: value for name, value in fields.items() if name not in ("hybrid_layer_ids", "layer_types")}
    config = Zamba2Config(**{**kept, "layers_block_type": ["mamba", "hybrid"] * 3})
    model = tiny_transformers.tiny_model(Zamba2Model, config)
    with hsa.patch(model, "sliding_window", window=8, sink=2, block_size=16, min_tokens=0, dense_layers=1) as patch:
        with torch.no_grad():
            model(**tiny_transformers.tiny_inputs(config))
    layers = patch.report().layers
    assert [(r.layer, r.sparse_calls) for r in layers] == [(0, 0), (1, 1), (2, 1)]
