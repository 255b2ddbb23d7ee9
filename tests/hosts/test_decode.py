"""Text that patched models generate: exact or sparse decoding gives what its definition says, whatever the call."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor
from transformers import masking_utils as mu

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context
from hf_sparse_attn.decoding import Kept, Step
from hf_sparse_attn.family import tiny_text
from hf_sparse_attn.hosts import transformers_decode
from hf_sparse_attn.hosts.transformers_decode import Few, read_few
from hf_sparse_attn.hosts.transformers_mask import MaskSpec, ReadyMask
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import FAMILIES
from tests.support.decoding import Forgetful, Pages

# Of a model whose prompts are read whole: what is left out is left out in decoding.
SPARSE: dict[str, Any] = {"min_tokens": 0}
NEW = 7


@lru_cache
def tiny(kind: str) -> Any:
    classes: dict[str, tuple[Any, dict[str, Any]]] = {
        "llama": (T.LlamaForCausalLM, {}),
        "all heads": (T.LlamaForCausalLM, {"num_key_value_heads": 4}),
        "window": (T.MistralForCausalLM, {"sliding_window": 40}),
        "gemma2": (T.Gemma2ForCausalLM, {"sliding_window": 40, "head_dim": 16}),
        "sinks": (T.GptOssForCausalLM, {"sliding_window": 40, "head_dim": 16, "num_local_experts": 4}),
    }
    made, sizes = classes[kind]
    model, _ = tiny_text(made, **{"num_key_value_heads": 2, "max_position_embeddings": 4096, **sizes})
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = None
    return model


def tokens(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 128, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def exact_from_the_first_key_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny texts are too short for it to pay; where heads are not grouped nothing is changed."""
    monkeypatch.setattr(transformers_decode, "pays_exact", lambda q, kv_heads, keys: q.shape[1] != kv_heads)


def generate(model: Any, ids: Tensor, **more: Any) -> tuple[Tensor, Tensor]:
    given = {"do_sample": False, "max_new_tokens": NEW, "return_dict_in_generate": True, "output_logits": True, **more}
    out = model.generate(ids, **given)
    return out.sequences, torch.stack(out.logits, 1)


def by_hand(model: Any, ids: Tensor, cache: Any = None, steps: int = NEW, **more: Any) -> tuple[Tensor, Tensor]:
    """The loop that generate() runs, greedy."""
    cache, found, mask = T.DynamicCache(config=model.config) if cache is None else cache, [], torch.ones_like(ids)
    fed = ids
    for _ in range(steps):
        with torch.no_grad():
            logits = model(fed, past_key_values=cache, attention_mask=mask, **more).logits[:, -1]
        found.append(logits)
        fed = logits.argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, fed], 1), torch.cat([mask, torch.ones_like(fed)], 1)
    return ids, torch.stack(found, 1)


@dataclass(frozen=True, kw_only=True)
class ByRows(Method):
    """All tokens at once: a prompt whole, and every token after it as a step of a decoding method."""

    prompt: int
    inner: Pages
    needs = frozenset({"causal"})

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        found = self.inner.pattern(q, k, ctx)
        assert isinstance(found, BlockPattern)
        keep = found.to_dense()
        whole = BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, True).to_dense()
        return BlockPattern.from_block_map(
            torch.cat([whole[:, :, : self.prompt].expand(*keep.shape[:2], -1, -1), keep[:, :, self.prompt :]], 2),
            1, 1, ctx.layout.q_len, ctx.layout.kv_len,
        )  # fmt: skip


def without_a_cache(model: Any, ids: Tensor, inner: Pages, steps: int = NEW) -> tuple[Tensor, Tensor]:
    found, prompt = [], ids.shape[1]
    with hsa.patch(model, ByRows(prompt=prompt, inner=inner), min_tokens=0, strict=True):
        for _ in range(steps):
            with torch.no_grad():
                logits = model(ids, use_cache=False).logits[:, -1]
            found.append(logits)
            ids = torch.cat([ids, logits.argmax(-1, keepdim=True)], 1)
    return ids, torch.stack(found, 1)


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor], within: float = 2e-6) -> None:
    assert torch.equal(one[0], other[0])
    torch.testing.assert_close(one[1], other[1], rtol=0, atol=within)


def kinds(patch: hsa.Patch) -> list[dict[str, int]]:
    return [calls(layer) for layer in patch.report().layers]


def calls(layer: Any) -> dict[str, int]:
    return {kind: found.calls for kind, found in layer.decoding.items()}


# ------------------------------------------------------------------ exact


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("kind", ["llama", "window", "gemma2", "sinks"])
def test_exact_decoding_is_dense_decoding_up_to_rounding(kind: str, cache: str | None) -> None:
    model, ids = tiny(kind), tokens(2, 37)
    want = generate(model, ids, cache_implementation=cache)
    with hsa.patch(model, "sliding_window") as patch:
        got = generate(model, ids, cache_implementation=cache)
    assert_same(got, want)
    assert not torch.equal(got[1], want[1])
    assert kinds(patch) == [{"exact": NEW - 1}] * 2


def test_a_model_of_whole_heads_is_left_to_the_bit() -> None:
    model, ids = tiny("all heads"), tokens(2, 37)
    want = generate(model, ids)
    with hsa.patch(model, "sliding_window") as patch:
        assert all(map(torch.equal, generate(model, ids), want))
    assert [layer.reasons["decoding: fewer than 16 queries"] for layer in patch.report().layers] == [NEW - 1] * 2


@pytest.mark.parametrize("given", [{"method": "dense"}, {"method": "sliding_window", "decode": "dense"}])
def test_dense_changes_no_bit(given: dict[str, Any]) -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    want = generate(model, ids)
    with hsa.patch(model, **given) as patch:
        assert all(map(torch.equal, generate(model, ids), want))
    assert patch.report().decode == "dense"


@pytest.mark.parametrize("padding", [[0, 9], [3, 0], [5, 11]])
def test_padding_before_the_text_is_no_part_of_it(padding: list[int]) -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    mask = (torch.arange(37) >= torch.tensor(padding)[:, None]).long()
    want = generate(model, ids, attention_mask=mask)
    with hsa.patch(model, "sliding_window") as patch:
        assert_same(generate(model, ids, attention_mask=mask), want)
    assert kinds(patch) == [{"exact": NEW - 1}] * 2


def test_a_mask_that_is_given_ready_made_is_read() -> None:
    model, ids, cache = tiny("llama"), tokens(2, 37), T.DynamicCache()
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        seen = (torch.arange(33) <= 30 + torch.arange(3)[:, None]) & (torch.arange(33) >= 2)
        given = {"attention_mask": seen[None, None].expand(2, -1, -1, -1), "past_key_values": cache}
        want = model(ids[:, 30:33], **given).logits
        cache.crop(-3)
        with hsa.patch(model, "sliding_window") as patch:
            got = model(ids[:, 30:33], **given).logits
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)
    assert kinds(patch) == [{"exact": 1}] * 2


ODD: dict[str, tuple[str, dict[str, Any]]] = {
    "holes": ("padding between valid tokens", {"attention_mask": (torch.arange(31) != 7).expand(2, -1)}),
    "after": ("no valid token", {"attention_mask": (torch.arange(31) < 30).expand(2, -1)}),
    "none": ("padding among the queries", {"attention_mask": torch.ones(2, 31) * torch.tensor([[1], [0]])}),
    "weights": ("output_attentions=True", {"output_attentions": True}),
}


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("decode", ["exact", Pages()], ids=["exact", "sparse"])
def test_what_is_no_plain_step_is_the_models_own_to_the_bit(case: str, decode: Any) -> None:
    model, ids, cache = tiny("llama"), tokens(2, 31), T.DynamicCache()
    reason, given = ODD[case]
    model.set_attn_implementation("eager" if case == "weights" else "sdpa")
    try:
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
            want = model(ids[:, 30:], past_key_values=cache, **given).logits
            cache.crop(-1)
            with hsa.patch(model, "sliding_window", decode=decode, min_tokens=0) as patch:
                got = model(ids[:, 30:], past_key_values=cache, **given).logits
    finally:
        model.set_attn_implementation("sdpa")
    assert torch.equal(got, want)
    assert all(sum(n for said, n in r.reasons.items() if reason in said) == 1 for r in patch.report().layers)


def test_weights_that_the_config_asks_for_come_from_the_model() -> None:
    model, ids, cache = tiny("llama"), tokens(1, 31), T.DynamicCache()
    model.set_attn_implementation("eager")
    model.config.output_attentions = True
    try:
        with torch.no_grad(), hsa.patch(model, Pages(), **SPARSE) as patch:
            model(ids[:, :30], past_key_values=cache)
            assert [w.shape[-1] for w in model(ids[:, 30:], past_key_values=cache).attentions] == [31, 31]
    finally:
        model.config.output_attentions = False
        model.set_attn_implementation("sdpa")
    assert kinds(patch) == [{}] * 2


def test_an_attention_function_that_was_replaced_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as functions

    own, called = functions["sdpa"], []

    def other(*args: Any, **kwargs: Any) -> Any:
        called.append(args[1].shape[2])
        return own(*args, **kwargs)

    monkeypatch.setitem(functions._local_mapping, "sdpa", other)
    model = tiny("llama")
    with hsa.patch(model, "sliding_window") as patch:
        generate(model, tokens(1, 37))
    assert called.count(1) == 2 * (NEW - 1) and kinds(patch) == [{}] * 2


def test_keys_that_no_mask_describes_are_left_to_the_model() -> None:
    """A growing cache that another model has filled in part: its second layer begins with the first step."""
    model, ids = tiny("llama"), tokens(1, 31)
    cache, found = T.DynamicCache(), []
    with torch.no_grad():
        model(ids[:, :30], past_key_values=cache)
        for patched in (False, True):
            given = T.DynamicCache()
            given.update(cache.layers[0].keys, cache.layers[0].values, 0)
            patch = hsa.patch(model, "sliding_window") if patched else None
            found.append(model(ids[:, 30:], past_key_values=given).logits)
    assert patch is not None
    assert kinds(patch) == [{"exact": 1}, {}]
    patch.remove()
    torch.testing.assert_close(*found, rtol=0, atol=2e-6)


def spec(**more: Any) -> MaskSpec:
    wanted = dict(batch_size=1, q_length=1, kv_length=20, q_offset=19, attention_mask=None, device="cpu")
    return MaskSpec("sdpa", {"mask_function": mu.causal_mask_function, "dtype": torch.float32, **wanted, **more})


def test_what_a_mask_says_of_few_queries() -> None:
    plain = read_few(spec())
    assert isinstance(plain, Few) and (plain.end, plain.starts, plain.limited) == (20, None, False)
    for limit in (mu.chunked_overlay(32, torch.zeros(1)), mu.sliding_window_overlay(32)):
        found = read_few(spec(mask_function=mu.and_masks(mu.causal_mask_function, limit)))
        assert isinstance(found, Few) and found.limited
    moved = read_few(spec(q_offset=29, kv_offset=10))
    assert isinstance(moved, Few) and moved.limited and moved.end == 20
    assert read_few(spec(mask_function=mu.bidirectional_mask_function)) != plain
    # What was given ready made may come again, and is another forward then.
    ready = ReadyMask((1, 1, 1, 20), spec().plan)
    one, other = read_few(ready), read_few(ready)
    assert isinstance(one, Few) and isinstance(other, Few) and one.rows is not other.rows


def test_gradients_are_those_of_the_model() -> None:
    model, ids = tiny("llama"), tokens(1, 31)
    grads = []
    for method in (None, Pages()):
        cache = T.DynamicCache()
        with torch.no_grad():
            model(ids[:, :30], past_key_values=cache)
        patch = None if method is None else hsa.patch(model, method, min_tokens=0)
        model.zero_grad()
        model(ids[:, 30:], past_key_values=cache).logits.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
        if patch is not None:
            said = [layer.reasons for layer in patch.report().layers]
            patch.remove()
    assert all(map(torch.equal, *grads))
    assert said == [{"decoding: gradients where text is generated": 1}] * 2


# ------------------------------------------------------------------ sparse


def test_generate_is_the_loop_by_hand_and_a_run_without_a_cache() -> None:
    model, ids, method = tiny("llama"), tokens(2, 37), Pages()
    with hsa.patch(model, method, **SPARSE) as patch:
        generated = generate(model, ids)
        looped = by_hand(model, ids)
    assert_same(generated, looped)
    assert_same(generated, without_a_cache(model, ids, Pages()))
    assert kinds(patch) == [{"pages": 2 * NEW - 2}] * 2
    want = generate(model, ids)
    assert (generated[1] - want[1]).abs().max() > 1e-4


def test_a_static_cache_gives_the_same() -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    with hsa.patch(model, Pages(), **SPARSE):
        want = generate(model, ids)
        assert_same(by_hand(model, ids, T.StaticCache(config=model.config, max_cache_len=50)), want)
        assert_same(generate(model, ids, cache_implementation="static"), want)


def test_rows_of_a_padded_batch_are_as_by_themselves() -> None:
    # Pages are counted from the first slot: by whole pages, padding leaves them as they are.
    model, ids = tiny("llama"), tokens(2, 40)
    mask = (torch.arange(40) >= torch.tensor([0, 12])[:, None]).long()
    with hsa.patch(model, Pages(), **SPARSE):
        found = generate(model, ids, attention_mask=mask)
        for row, start in enumerate((0, 12)):
            alone = generate(model, ids[row : row + 1, start:])
            assert_same((found[0][row : row + 1, start:], found[1][row : row + 1]), alone)


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "attention_mask": True},
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": True},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=["beams", "padded beams", "looked up", "assisted", "sampled"],
)
def test_ways_of_generating_give_the_same_with_a_memory(more: dict[str, Any]) -> None:
    one_row = not {"prompt_lookup_num_tokens", "assistant_model"}.isdisjoint(more)
    model, ids, found = tiny("llama"), tokens(1 if one_row else 2, 40), []
    if one_row:
        ids[:, 20:] = ids[:, :20]
    more = dict(more)
    if "attention_mask" in more:
        more["attention_mask"] = (torch.arange(40) >= torch.tensor([0, 11])[:, None]).long()
    if "assistant_model" in more:
        more["assistant_model"], _ = tiny_text(T.LlamaForCausalLM, num_key_value_heads=2)
        more["assistant_model"].generation_config.num_assistant_tokens = 5
    methods = Pages(), Forgetful()
    for method in methods:
        with hsa.patch(model, method, **SPARSE):
            torch.manual_seed(0)
            found.append(model.generate(ids, **{"do_sample": False, "max_new_tokens": 12, **more}))
    assert torch.equal(*found)
    seen = methods[0].seen
    assert seen["rebuilt"] == 2 and (seen["selects"] > 0) == ("num_beams" in more)
    # What is not accepted is taken back. (The first guess comes with the prompt, and is read whole as its part.)
    assert (seen["crops"] > 0) == one_row


def test_few_tokens_at_once_are_steps_one_by_one() -> None:
    model, ids, given = tiny("llama"), tokens(2, 60), []
    with hsa.patch(model, Pages(), **SPARSE), torch.no_grad():
        for sizes in ([40, *[1] * 20], [40, 15, 1, 4], [40, 2, 3, 15]):
            cache = T.DynamicCache()
            given.append(torch.cat([model(x, past_key_values=cache).logits for x in ids.split(sizes, 1)], 1))
    for other in given[1:]:
        torch.testing.assert_close(other, given[0], rtol=0, atol=2e-6)


def test_chunks_and_turns_are_one_prompt_and_steps_after_it() -> None:
    model, ids, given = tiny("llama"), tokens(2, 64), []
    with hsa.patch(model, Pages(), **SPARSE) as patch, torch.no_grad():
        for sizes in ([60, 1, 1, 1, 1], [20, 40, 1, 1, 1, 1]):
            cache = T.DynamicCache()
            given.append([model(x, past_key_values=cache).logits for x in ids.split(sizes, 1)][-4:])
    for one, other in zip(*given, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-6)
    assert kinds(patch) == [{"pages": 8}] * 2


def test_short_prompts_are_read_whole() -> None:
    model, ids = tiny("llama"), tokens(2, 14)
    with hsa.patch(model, Pages(count=1), **SPARSE) as patch, torch.no_grad():
        got = model(ids).logits
    torch.testing.assert_close(got, model(ids).logits, rtol=0, atol=2e-6)
    assert kinds(patch) == [{"exact": 1}] * 2


def test_layers_hand_on_within_a_forward_and_no_further() -> None:
    model, method = tiny("llama"), Pages()
    with hsa.patch(model, method, **SPARSE), torch.no_grad():
        cache = T.DynamicCache()
        for x in tokens(1, 46).split([40, 1, 3, 2], 1):
            model(x, past_key_values=cache)
    assert method.told == [told for rows in (1, 3, 2) for layer in ((0, []), (1, [0])) for told in [layer] * rows]


def test_a_layer_of_the_models_own_window_is_never_sparse() -> None:
    model, ids, method = tiny("gemma2"), tokens(2, 60), Pages()
    with hsa.patch(model, method, **SPARSE) as patch:
        got = generate(model, ids)
    sliding, full = kinds(patch)
    assert sliding == {"exact": NEW - 1} and full == {"pages": NEW - 1}
    assert {layer for layer, _ in method.told} == {1}
    assert not torch.equal(got[1], generate(model, ids)[1])


def test_dense_layers_and_lengths_hold_where_text_is_generated() -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    with hsa.patch(model, Pages(), dense_layers=1, min_tokens=40) as patch:
        generate(model, ids)
    # Keys of the steps: 38 to 43.
    assert kinds(patch) == [{"exact": NEW - 1}, {"exact": 2, "pages": NEW - 3}]
    with hsa.patch(model, Pages()) as patch:
        generate(model, ids)
    assert kinds(patch) == [{"exact": NEW - 1}] * 2


def test_sparse_decoding_under_a_method_that_reads_prompts_or_changes_nothing() -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    with hsa.patch(model, Pages(), **SPARSE):
        want = generate(model, ids)
    with hsa.patch(model, "dense", decode=Pages(), **SPARSE) as patch:
        assert_same(generate(model, ids), want)
    assert kinds(patch) == [{"pages": NEW - 1}] * 2
    assert [layer.reasons for layer in patch.report().layers] == [{"method dense": 1}] * 2
    with hsa.patch(model, "sliding_window", window=9, sink=2, block_size=16, decode=Pages(), **SPARSE) as patch:
        generate(model, ids)
    assert [layer.sparse_calls for layer in patch.report().layers] == [1] * 2
    assert kinds(patch) == [{"pages": NEW - 1}] * 2


@pytest.mark.parametrize("strict", [False, True])
def test_a_method_that_declines_is_told(strict: bool) -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    with hsa.patch(model, Pages(declines="not today"), strict=strict, **SPARSE) as patch:
        if strict:
            with pytest.raises(hsa.DenseFallback, match="not today"):
                generate(model, ids)
            return
        got = generate(model, ids)
    assert_same(got, generate(model, ids))
    assert [layer.reasons["not today"] for layer in patch.report().layers] == [NEW - 1] * 2


def test_a_patch_that_goes_while_text_is_generated() -> None:
    model, ids = tiny("llama"), tokens(2, 40)
    cache = T.DynamicCache()
    patch = hsa.patch(model, Pages(), **SPARSE)
    first = by_hand(model, ids, cache, steps=4)[0]
    patch.remove()
    with torch.no_grad():
        got = model(first[:, -1:], past_key_values=cache).logits
        cache.crop(-1)
        assert torch.equal(model(first[:, -1:], past_key_values=cache).logits, got)
    assert "hsa" not in model.config._attn_implementation
    assert [type(layer) for layer in cache.layers] == [T.cache_utils.DynamicLayer] * 2


def test_an_encoder_decoder_generates_by_its_self_attention_alone() -> None:
    config = T.BartConfig(
        vocab_size=128, d_model=64, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = T.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids, found = tokens(2, 33), []
    methods = Pages(), Forgetful()
    for method in methods:
        with hsa.patch(model, method, **SPARSE) as patch:
            found.append(model.generate(ids, max_new_tokens=30, do_sample=False, num_beams=2))
    assert torch.equal(*found) and methods[0].seen["rebuilt"] == 2 and methods[0].seen["selects"]
    by_name = {layer.name: layer for layer in patch.report().layers}
    assert by_name["BartDecoder.layers.1.self_attn"].decoding["pages"].calls > 10


def test_by_a_native_name_text_is_generated_exactly() -> None:
    model, ids = tiny("llama"), tokens(2, 37)
    want = generate(model, ids)
    model.set_attn_implementation("hsa:sliding_window")
    try:
        assert_same(generate(model, ids), want)
        from hf_sparse_attn import native

        assert [calls(layer) for layer in native.report(model).layers] == [{"exact": NEW - 1}] * 2
    finally:
        model.set_attn_implementation("sdpa")


# ------------------------------------------------------------------ what is asked for


class Apart(Pages):
    """Keeps what a page says of `step` apart, to see what it is given."""

    def decode(self, step: Step) -> Kept | Decline | None:
        assert step.q.shape[2] == 1 and step.num_layers == 2 and step.length == step.v.shape[2]
        return super().decode(step)


WRONG: dict[str, tuple[Any, type[Exception], str]] = {
    "unknown": ("exakt", ValueError, r"`decode` must be one of exact, sparse, dense.*got 'exakt' \(nearest: exact\)"),
    "no decoder": ("radial", ValueError, r"`decode` must be a method that decodes .*got 'radial', which reads"),
    "a method that does not": (
        hsa.get_method("radial")(), ValueError, r"`decode` must be a method that decodes .*got Radial"
    ),
    "a number": (1, TypeError, "`decode` must be a name or a Method, got 1 of type int"),
    "a class": (Pages, TypeError, "`decode` must be a name or a Method, got <class"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_decode_is_refused_and_the_model_untouched(case: str) -> None:
    model = tiny("llama")
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    decode, error, said = WRONG[case]
    with pytest.raises(error, match=said):
        hsa.patch(model, "sliding_window", decode=decode)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()}.keys() == before.keys()
    assert all(module.__dict__.keys() == before[name].keys() for name, module in model.named_modules())
    assert model.config._attn_implementation == "sdpa"


OTHERS = {"bert": ("encoder", "generates no text"), "dsa": ("natively_sparse", "selects keys by itself")}


@pytest.mark.parametrize("kind", OTHERS)
def test_models_whose_decoding_is_none_or_their_own_take_no_decoder(kind: str) -> None:
    family, why = OTHERS[kind]
    model, inputs = FAMILIES.get(family).tiny()
    method = "native" if kind == "dsa" else "dense"
    with pytest.raises(ValueError, match=rf"`decode` must be left out for .* \(family {family}\), which {why}"):
        hsa.patch(model, method, decode="exact")
    with hsa.patch(model, method) as patch, torch.no_grad():
        model(**inputs)
    assert patch.report().decode == "" and "decode=" not in str(patch.report())


ASKED: dict[str, tuple[Any, Any, str]] = {
    "nothing": ("sliding_window", None, "exact"),
    "nothing of dense": ("dense", None, "dense"),
    "nothing of a decoder": (Pages(), None, "pages"),
    "exact of dense": ("dense", "exact", "exact"),
    "exact of a decoder": (Pages(), "exact", "exact"),
    "dense of a decoder": (Pages(), "dense", "dense"),
    "dense as a method": ("sliding_window", hsa.get_method("dense")(), "dense"),
    "sparse of a decoder": (Pages(), "sparse", "pages"),
}


@pytest.mark.parametrize("case", ASKED)
def test_what_decodes_is_what_was_asked_for(case: str) -> None:
    method, decode, said = ASKED[case]
    model = tiny("llama")
    with hsa.patch(model, method, decode=decode) as patch, torch.no_grad():
        assert "decode=" not in str(patch.report())
        model(tokens(1, 3))
        found = patch.report()
    assert found.decode.partition("(")[0] == said and found.to_dict()["decode"] == found.decode
    assert f"decode={said}" in str(found)
