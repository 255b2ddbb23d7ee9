"""Decoders in settings that change what a call is: read both ways by their config, served in pages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel, Qwen3Config, Qwen3Model

import hf_sparse_attn as hsa
from hf_sparse_attn import native
from tests.support.tiny_families import MODELS, WINDOW, run

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES: dict[str, Any] = dict(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2,
)  # fmt: skip
TWO_WAYS: dict[str, Any] = {"method": "block_topk", "density": 0.3, "block_size": 16, "min_tokens": 0, "strict": True}


def pair(kind: Any, config: Any, implementation: str = "sdpa") -> tuple[Any, Any]:
    """A causal model, and the same weights with is_causal=False in the config."""
    torch.manual_seed(0)
    causal = kind(config(**SIZES, attn_implementation=implementation)).eval()
    both = kind(config(**SIZES, attn_implementation=implementation, is_causal=False)).eval()
    both.load_state_dict(causal.state_dict())
    return causal, both


def hidden(model: Any, mask: Tensor | None, **given: Any) -> Tensor:
    ids = torch.randint(3, 128, (2, 111), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids, attention_mask=mask, **given)[0]
    return found if mask is None else found * mask[..., None]


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(("kind", "config"), [(LlamaModel, LlamaConfig), (Qwen3Model, Qwen3Config)])
def test_a_decoder_that_reads_both_ways_by_its_config(
    kind: Any, config: Any, implementation: str, padded: bool
) -> None:
    causal, both = pair(kind, config, implementation)
    mask = torch.ones(2, 111, dtype=torch.long) if padded else None
    if mask is not None:
        mask[0, :13] = 0
    dense = hidden(both, mask)
    assert torch.allclose(dense, hidden(causal, mask, is_causal=False), atol=1e-5)
    with hsa.patch(causal, **TWO_WAYS), hsa.patch(both, **TWO_WAYS) as patch:
        want, got = hidden(causal, mask, is_causal=False), hidden(both, mask)
        assert torch.equal(got, want) and not torch.allclose(got, dense, atol=1e-3)
        # A call may say otherwise.
        assert torch.equal(hidden(both, mask, is_causal=True), hidden(causal, mask, is_causal=True))
    assert all(r.sparse_calls == 2 for r in patch.report().layers)
    assert torch.equal(hidden(both, mask), dense)


def test_a_method_for_causal_text_says_that_the_call_is_not() -> None:
    _, both = pair(LlamaModel, LlamaConfig)
    dense = hidden(both, None)
    with hsa.patch(both, "vertical_slash", vertical=8, slash=16, block_size=16, min_tokens=0) as patch:
        assert torch.equal(hidden(both, None), dense)
    assert all("vertical_slash needs" in reason for r in patch.report().layers for reason in r.reasons)


def test_by_its_native_name() -> None:
    torch.manual_seed(0)
    model = LlamaModel(LlamaConfig(**SIZES, is_causal=False)).eval()
    ids = torch.randint(3, 128, (1, 2048))
    with torch.no_grad():
        dense = model(ids)[0]
        model.set_attn_implementation("hsa:block_topk")
        assert not torch.allclose(model(ids)[0], dense, atol=1e-4)
    assert [r.sparse_calls for r in native.report(model).layers] == [1, 1]


@pytest.mark.parametrize("call", ["generate_batch", "init_continuous_batching"])
def test_continuous_batching_is_refused_with_the_way_out(call: str) -> None:
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    with hsa.patch(model, **WINDOW):
        with pytest.raises(RuntimeError, match=r"continuous batching .* keeps keys in pages.*unpatch\(\) the model"):
            model.generate_batch([[3, 4, 5]]) if call == "generate_batch" else model.init_continuous_batching()
        assert "init_continuous_batching" not in copy.deepcopy(model).__dict__
    assert "init_continuous_batching" not in model.__dict__


def test_the_inner_model_is_read_both_ways_in_a_head_that_is_not() -> None:
    model, given = MODELS["llama"]()
    model.config.is_causal = False
    dense = run(model, given)
    with hsa.patch(model, **TWO_WAYS) as patch:
        assert not torch.equal(run(model, given), dense)
    assert all(r.sparse_calls == 1 for r in patch.report().layers)
