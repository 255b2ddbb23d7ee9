"""PreallocatedCache: equal to DynamicCache to the bit whatever happens to it, and appended to where it stays."""

from __future__ import annotations

import copy
import io
import random

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import hf_sparse_attn as hsa
from hf_sparse_attn.hosts.preallocated import PreallocatedLayer

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip

EVENTS = ["crop", "reorder", "repeat", "select", "reset", "copy", "file", "offload"]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def ids(rows: int, tokens: int) -> torch.Tensor:
    return torch.randint(1, 64, (rows, tokens), generator=torch.Generator().manual_seed(tokens))


def step(seed: int, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """New keys and values, of widths of their own."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 2, tokens, 8, generator=g), torch.randn(rows, 2, tokens, 5, generator=g)


def equal(one: DynamicLayer, other: DynamicLayer) -> bool:
    if one.get_seq_length() != other.get_seq_length():
        return False
    if one.get_seq_length() == 0:
        return True
    return torch.equal(one.keys, other.keys) and torch.equal(one.values, other.values)


@pytest.mark.parametrize("max_tokens", [None, 1, 30, 500])
@pytest.mark.parametrize("seed", range(6))
def test_a_layer_equals_the_dynamic_one_after_any_events(seed: int, max_tokens: int | None) -> None:
    draw, plain, ours, rows = random.Random(seed), DynamicLayer(), PreallocatedLayer(max_tokens), 2
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for i in range(60):
        event = draw.choice(
            ["update"] * 8 + ["crop", "reorder", "repeat", "select", "reset", "copy", "file", "offload"]
        )
        length = plain.get_seq_length()
        if event == "update":
            new = step(i, rows, draw.choice([1, 1, 1, 3, 17]))
            (k, v), (own_k, own_v) = plain.update(*new), ours.update(*new)
            assert torch.equal(k, own_k) and torch.equal(v, own_v)
            assert own_k is ours.keys
            seen.append((own_k, own_k.clone()))
        elif event == "crop" and length > 2:
            seen.clear()
            cut = draw.randint(1, length - 1)
            plain.crop(-cut), ours.crop(-cut)
        elif event == "reorder":
            order = torch.tensor([draw.randrange(rows) for _ in range(rows)])
            plain.reorder_cache(order), ours.reorder_cache(order)
        elif event == "repeat" and rows < 5 and length:
            rows *= 2
            plain.batch_repeat_interleave(2), ours.batch_repeat_interleave(2)
        elif event == "select" and rows > 2 and length:
            rows -= 1
            kept = torch.arange(rows).flip(0)
            plain.batch_select_indices(kept), ours.batch_select_indices(kept)
        elif event == "reset" and draw.random() < 0.3:
            # Of older transformers a reset clears numbers and keeps the length.
            plain, rows = DynamicLayer(), 2
            ours.reset()
            ours = PreallocatedLayer(max_tokens) if ours.get_seq_length() else ours
        elif event == "copy":
            kept, ours = ours, draw.choice([copy.deepcopy, copy.copy])(ours)
            kept.update(*step(-i, rows, 2))
        elif event == "file":
            file = io.BytesIO()
            torch.save(ours, file)
            ours = torch.load(io.BytesIO(file.getvalue()), weights_only=False)
        elif event == "offload":
            ours.offload(), ours.prefetch()
        assert equal(plain, ours), f"{event} at {i}"
        # What was handed over stays as it was, until a crop gives it up.
        assert all(torch.equal(now, then) for now, then in seen)


def test_tokens_are_appended_in_place() -> None:
    layer = PreallocatedLayer(40)
    places = {layer.update(*step(i, 1, 1))[0].data_ptr() for i in range(40)}
    assert len(places) == 1
    with torch.no_grad():
        layer.crop(-3)
    assert layer.update(*step(0, 1, 1))[0].data_ptr() in places
    growing = PreallocatedLayer()
    assert len({growing.update(*step(i, 1, 1))[0].data_ptr() for i in range(500)}) <= 6


@pytest.mark.parametrize("how", ["greedy", "sampled", "beams", "beam samples", "assisted", "chunks", "prompt lookup"])
def test_generation_equals_that_with_a_dynamic_cache(model: LlamaForCausalLM, how: str) -> None:
    asked = {
        "greedy": {}, "sampled": {"do_sample": True, "num_return_sequences": 2}, "beams": {"num_beams": 3},
        "beam samples": {"do_sample": True, "num_beams": 3, "num_return_sequences": 2},
        "assisted": {"assistant_model": LlamaForCausalLM(model.config).eval()}, "chunks": {"prefill_chunk_size": 7},
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
    }[how]  # fmt: skip
    one_row = how in ("assisted", "prompt lookup")
    given = ids(1 if one_row else 2, 24)
    found = []
    for cache in (DynamicCache(), hsa.PreallocatedCache(), hsa.PreallocatedCache(model.config, max_tokens=30)):
        torch.manual_seed(1)
        out = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=30, past_key_values=cache, output_scores=True,
            return_dict_in_generate=True, **asked,
        )  # fmt: skip
        found.append((out.sequences, *out.scores))
        kinds = {type(layer) for layer in cache.layers}
        assert kinds == {DynamicLayer if type(cache) is DynamicCache else PreallocatedLayer}
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_under_autograd_tokens_are_concatenated(model: LlamaForCausalLM) -> None:
    gradients = []
    for cache in (DynamicCache(), hsa.PreallocatedCache(max_tokens=64)):
        first = model(ids(1, 9), past_key_values=cache).logits
        second = model(ids(1, 3), past_key_values=cache).logits
        (first.sum() + second.square().sum()).backward()
        gradients.append(model.model.layers[0].self_attn.k_proj.weight.grad.clone())
        model.zero_grad()
    assert torch.equal(*gradients)


def test_a_graph_is_not_given_other_keys_than_it_has_seen() -> None:
    layer, q = PreallocatedLayer(64), torch.ones(1, 2, 1, 8, requires_grad=True)
    keys, _ = layer.update(*step(0, 1, 5))
    score = (q @ keys.mT).sum()
    layer.update(*step(1, 1, 1))
    score.backward()
    torch.testing.assert_close(q.grad, step(0, 1, 5)[0].sum(2, keepdim=True))
    score = (q @ keys.mT).sum()
    layer.crop(-3)
    layer.update(*step(2, 1, 1))
    score.backward()
    # Without gradients nobody can know that a graph waits: it is told.
    score = (q @ layer.keys.mT).sum()
    with torch.no_grad():
        layer.update(*step(4, 1, 1))
        layer.crop(-2)
        layer.update(*step(3, 1, 1))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        score.backward()


def test_inference_mode_may_come_and_go() -> None:
    layer, plain = PreallocatedLayer(64), DynamicLayer()
    for i, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.enable_grad]):
        with mode():
            layer.update(*step(i, 1, 2)), plain.update(*step(i, 1, 2))
    assert equal(layer, plain)


def test_what_does_not_go_together_is_concatenated() -> None:
    layer, plain = PreallocatedLayer(64), DynamicLayer()
    for i, dtype in enumerate([torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]):
        k, v = (x.to(dtype) for x in step(i, 1, 2))
        assert layer.update(k, v)[0].dtype == plain.update(k, v)[0].dtype
    assert equal(layer, plain)
    with pytest.raises(RuntimeError, match="izes of tensors must match"):
        layer.update(*step(0, 3, 1))


def test_layers_with_a_window_are_left_as_they_are() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    assert {type(layer) for layer in hsa.PreallocatedCache(config).layers} == {DynamicSlidingWindowLayer}


def test_a_patch_preallocates_the_caches_that_it_sees(model: LlamaForCausalLM) -> None:
    given = {"attention_mask": torch.ones(2, 20, dtype=torch.long), "max_new_tokens": 8, "do_sample": False}
    wanted = model.generate(ids(2, 20), **given)
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with hsa.patch(model, "dense", cache="preallocated"):
            assert torch.equal(model.generate(ids(2, 20), past_key_values=cache, **given), wanted)
        assert {type(layer) for layer in cache.layers} == {PreallocatedLayer}
        # It goes on being valid without the patch.
        more = {**given, "attention_mask": torch.ones(2, 30, dtype=torch.long)}
        text = torch.cat([wanted, ids(2, 2)], 1)
        assert torch.equal(model.generate(text, past_key_values=cache, **more), model.generate(text, **more))
    after = DynamicCache()
    model.generate(ids(2, 20), past_key_values=after, **given)
    assert {type(layer) for layer in after.layers} == {DynamicLayer}


def test_of_an_encoder_decoder_what_grows_is_preallocated() -> None:
    sizes = {"d_model": 16, "vocab_size": 64, "encoder_layers": 1, "decoder_layers": 1, "forced_eos_token_id": None}
    model = BartForConditionalGeneration(BartConfig(**sizes, max_position_embeddings=32)).eval()
    asked = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True}
    wanted = model.generate(ids(1, 9), **asked)
    with hsa.patch(model, "dense", cache="preallocated"):
        found = model.generate(ids(1, 9), **asked)
    assert torch.equal(found.sequences, wanted.sequences)
    assert type(found.past_key_values.self_attention_cache.layers[0]) is PreallocatedLayer
    assert type(found.past_key_values.cross_attention_cache.layers[0]) is DynamicLayer


@pytest.mark.parametrize(
    ("made", "error", "said"),
    [
        (lambda: hsa.PreallocatedCache(max_tokens=0), ValueError, "`max_tokens` must be at least 1, got 0"),
        (lambda: hsa.PreallocatedCache(max_tokens=2.5), TypeError, "`max_tokens` must be an int, got 2.5"),
        (lambda: hsa.PreallocatedCache(4096), TypeError, "`config` must be a configuration of transformers or None"),
    ],
)
def test_bad_arguments_of_a_cache(made: object, error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        made()  # type: ignore[operator]


def test_bad_caches_of_a_patch(model: LlamaForCausalLM) -> None:
    for wrong in ("paged", 1, True, DynamicCache()):
        with pytest.raises(ValueError, match="`cache` must be 'preallocated' or None, got"):
            hsa.patch(model, "dense", cache=wrong)
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = BertModel(BertConfig(**sizes)).eval()
    with pytest.raises(ValueError, match="`cache` must be left out for BertModel, which generates no text"):
        hsa.patch(bert, "dense", cache="preallocated")
    for untouched in (model, bert):
        hsa.patch(untouched, "dense").remove()
