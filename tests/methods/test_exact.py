"""Method exact: nothing is left out, and who runs a call is whoever is predicted to be faster."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import hf_sparse_attn as hsa
from hf_sparse_attn.cost import table as cost

OWN = "exact: the model's own attention is predicted faster"


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 64}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(3, 64, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


@pytest.fixture
def predicted(monkeypatch: pytest.MonkeyPatch):
    """Sets what a call is predicted to take on a kernel, in units of what the model's own attention takes."""

    def choose(ratio: float) -> None:
        monkeypatch.setattr(cost.Table, "sparse_seconds", lambda self, name, work, shape, new: ratio * 1e-3)
        monkeypatch.setattr(cost.Table, "dense_seconds", lambda self, shape: 1e-3)
        monkeypatch.setattr("hf_sparse_attn.policy.fewest_keys", lambda ctx, device: 0)

    return choose


def layers(patch: hsa.Patch) -> list[tuple[int, dict[str, int]]]:
    return [(layer.sparse_calls, layer.reasons) for layer in patch.report().layers]


@pytest.mark.parametrize("tokens", [16, 63, 300])
def test_a_kernel_that_wins_gives_the_same_up_to_rounding(llama: LlamaForCausalLM, tokens: int) -> None:
    given = ids(2, tokens)
    with torch.no_grad():
        wanted = llama(given).logits
        with hsa.patch(llama, "exact", min_tokens=0, strict=True) as patch:
            found = llama(given).logits
            assert layers(patch) == [(1, {})] * 2
            assert patch.report().density == 1.0 and not patch.notes
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)


def test_rows_with_padding_and_chunks_are_exact(llama: LlamaForCausalLM) -> None:
    given, mask = ids(2, 90), torch.ones(2, 90, dtype=torch.long)
    mask[1, :33] = 0
    with torch.no_grad(), hsa.patch(llama, "exact", min_tokens=0, strict=True) as patch:
        found = llama(given, attention_mask=mask).logits
        first = llama(given[:1, :50], use_cache=True)
        chunked = llama(given[:1, 50:], past_key_values=first.past_key_values).logits
        assert all(calls == 3 for calls, _ in layers(patch))
    with torch.no_grad():
        wanted = llama(given, attention_mask=mask).logits
    torch.testing.assert_close(found[mask == 1], wanted[mask == 1], rtol=0, atol=1e-4)
    torch.testing.assert_close(chunked, wanted[:1, 50:], rtol=0, atol=1e-4)


def test_where_the_own_attention_wins_no_bit_changes_and_nothing_is_given_up(llama, predicted) -> None:
    predicted(1.3)
    given = ids(1, 200)
    with torch.no_grad():
        wanted = llama(given).logits
        with hsa.patch(llama, "exact", strict=True) as patch:
            assert torch.equal(llama(given).logits, wanted)
            assert layers(patch) == [(0, {OWN: 1})] * 2
            # Whoever asks for all keys need not be told that all are kept.
            assert not patch.notes


def test_what_is_predicted_decides(llama, predicted) -> None:
    predicted(0.5)
    with torch.no_grad(), hsa.patch(llama, "exact") as patch:
        llama(ids(1, 200))
        assert layers(patch) == [(1, {})] * 2
        assert [layer.predicted_gain for layer in patch.report().layers] == [2.0, 2.0]


def test_a_pattern_that_is_found_slower_is_left_to_the_model(llama, predicted, monkeypatch) -> None:
    """At best it would have paid; the backend that runs is slower."""
    predicted(0.5)
    from hf_sparse_attn.cost.judge import Call, Prediction

    monkeypatch.setattr(Call, "found", lambda self, pattern, q, k, v: Prediction(2e-3, 1e-3, 1.0))
    with torch.no_grad(), hsa.patch(llama, "exact", strict=True) as patch:
        llama(ids(1, 200))
        assert layers(patch) == [(0, {OWN: 1})] * 2 and not patch.notes


def test_gradients_are_the_models_own_up_to_rounding(llama: LlamaForCausalLM) -> None:
    found = []
    for patched in (False, True):
        llama.zero_grad()
        if patched:
            with hsa.patch(llama, "exact", min_tokens=0):
                llama(ids(1, 70)).logits.square().mean().backward()
        else:
            llama(ids(1, 70)).logits.square().mean().backward()
        found.append(llama.model.layers[0].self_attn.k_proj.weight.grad.clone())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)


def test_what_no_kernel_can_run_is_the_models_own(llama: LlamaForCausalLM) -> None:
    """A mask of the user's own, under strict=True: every other method raises."""
    mask = torch.zeros(1, 1, 40, 40).masked_fill(torch.rand(40, 40) < 0.3, -math.inf)
    mask.diagonal(dim1=2, dim2=3).zero_()
    with torch.no_grad(), hsa.patch(llama, "exact", strict=True, min_tokens=0) as patch:
        found = llama(ids(1, 40), attention_mask=mask).logits
        assert all(calls == 0 and reasons for calls, reasons in layers(patch))
    with torch.no_grad():
        assert torch.equal(found, llama(ids(1, 40), attention_mask=mask).logits)
    with torch.no_grad(), hsa.patch(llama, "strided", strict=True, min_tokens=0), pytest.raises(hsa.DenseFallback):
        llama(ids(1, 40), attention_mask=mask)


def test_encoders_and_calls_without_a_model(llama: LlamaForCausalLM) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(**sizes)).eval()
    with torch.no_grad():
        wanted = bert(ids(1, 100))[0]
        with hsa.patch(bert, "exact", min_tokens=0) as patch:
            torch.testing.assert_close(bert(ids(1, 100))[0], wanted, rtol=0, atol=1e-5)
            assert patch.report().density == 1.0
    q, k, v = (torch.randn(1, heads, 77, 16) for heads in (4, 2, 2))
    for causal in (True, False):
        found = hsa.attention(q, k, v, "exact", is_causal=causal)
        wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


def test_a_profile_does_not_try_it(llama: LlamaForCausalLM) -> None:
    layout = hsa.TokenLayout.causal(512)
    assert list(hsa.get_method("exact").candidates(layout, 512)) == []
