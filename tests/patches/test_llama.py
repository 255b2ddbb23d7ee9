"""Family llama: a patched decoder computes what it should, and is as it was once the patch is off."""

from __future__ import annotations

import copy
from functools import lru_cache
from itertools import permutations

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE
from hf_sparse_attn.method import Method
from hf_sparse_attn.patching import PATCH_ATTRIBUTE, active_patch
from tests.support.patched import (
    WINDOWED,
    assert_same_state,
    eight_roundings,
    register_masked,
    sparse_share,
    state_of,
)
from tests.support.patterns import Largest
from tests.support.tiny_lm import EAGER_ONLY, FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = dict(min_tokens=0)
CASES = [
    pytest.param(name, implementation, id=f"{name}-{implementation}")
    for name in FAMILIES
    for implementation in ("eager", "sdpa")
    if not (implementation == "sdpa" and name in EAGER_ONLY)
]


def text_methods() -> list[str]:
    found = [n for n in hsa.list_methods() if hsa.get_method(n).needs <= {"causal"} and n != "dense"]
    # Methods with trained gates have them for one model alone.
    return [n for n in found if not hsa.get_method(n).reads]


def examples() -> list[object]:
    return [
        pytest.param(name, params, id=f"{name}-{i}")
        for name in text_methods()
        for i, params in enumerate(hsa.get_method(name).examples())
    ]


def full_budgets() -> list[object]:
    budgets = [(n, hsa.get_method(n).full_budget()) for n in text_methods()]
    return [pytest.param(n, b, id=n) for n, b in budgets if b is not None]


@lru_cache
def tolerance(family: str = "llama") -> float:
    return eight_roundings(lambda dtype: logits(FAMILIES[family]("eager").to(dtype), tokens(2, 111)))


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def generate(model, ids, mask, **kwargs):
    return model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, **kwargs)


# ------------------------------------------------------------------ dense is untouched


@pytest.mark.parametrize("family, implementation", CASES)
def test_dense_patch_changes_no_bit(family, implementation):
    model = FAMILIES[family](implementation)
    ids, mask, _ = padded([23, 37], "left")

    def outputs():
        return [
            logits(model, tokens(2, 37)),
            logits(model, ids, attention_mask=mask, position_ids=positions(mask)),
            logits(model, ids.flip(1), attention_mask=mask.flip(1)),
            generate(model, ids, mask),
            generate(model, ids, mask, cache_implementation="static"),
        ]

    before = outputs()
    # strict: soft caps, sinks and windows are no fallback when dense is what was asked for.
    with hsa.patch(model, "dense", strict=True) as patch:
        within = outputs()
    for a, b in zip(before, within, strict=True):
        assert torch.equal(a, b)
    assert len(patch.report().layers) == 2
    assert all(set(r.reasons) == {"method dense"} for r in patch.report().layers)


@pytest.mark.parametrize("family, implementation", CASES)
def test_dense_fallback_of_a_sparse_method_changes_no_bit(family, implementation):
    model = FAMILIES[family](implementation)
    ids, mask, _ = padded([23, 37], "left")
    before = [logits(model, ids, attention_mask=mask), generate(model, ids, mask, cache_implementation="static")]
    with hsa.patch(model, "sliding_window") as patch:
        within = [logits(model, ids, attention_mask=mask), generate(model, ids, mask, cache_implementation="static")]
    assert all(torch.equal(a, b) for a, b in zip(before, within, strict=True))
    assert sparse_share(patch.report().layers) == 0


# ------------------------------------------------------------------ removal


@pytest.mark.parametrize("family, implementation", CASES)
def test_remove_restores_everything(family, implementation):
    model = FAMILIES[family](implementation)
    ids = tokens(1, 37)
    out, before = logits(model, ids), state_of(model)
    patch = hsa.patch(model, **WINDOWED)
    logits(model, ids)
    patch.remove()
    patch.remove()
    assert_same_state(before, state_of(model))
    assert torch.equal(out, logits(model, ids))
    with pytest.raises(RuntimeError, match="on purpose"), hsa.patch(model, **WINDOWED):
        logits(model, ids)
        raise RuntimeError("on purpose")
    hsa.patch(model, **WINDOWED)
    hsa.unpatch(model)
    assert_same_state(before, state_of(model))
    assert torch.equal(out, logits(model, ids))


def test_absent_implementation_becomes_absent_again():
    model = FAMILIES["llama"]("sdpa")
    model.config.__dict__["_attn_implementation_internal"] = None
    with hsa.patch(model, "dense"):
        logits(model, tokens(1, 20))
    assert model.config.__dict__["_attn_implementation_internal"] is None


ORDERS = [o for o in permutations(["+a", "+b", "-a", "-b"]) if all(o.index("+" + m) < o.index("-" + m) for m in "ab")]


@pytest.mark.parametrize("order", ORDERS, ids=" ".join)
def test_shared_config(order):
    models = {"a": FAMILIES["llama"]("sdpa")}
    models["b"] = type(models["a"])(models["a"].config).eval()
    assert models["a"].config is models["b"].config
    ids, before = tokens(2, 37), dict(models["a"].config.__dict__)
    dense = {n: logits(m, ids) for n, m in models.items()}
    patches = {}
    for step in order:
        sign, name = step
        if sign == "+":
            patches[name] = hsa.patch(models[name], **WINDOWED)
        else:
            patches.pop(name).remove()
        for n, m in models.items():
            assert torch.equal(logits(m, ids), dense[n]) == (n not in patches)
    assert before == models["a"].config.__dict__


def test_copy_of_a_patched_model_is_dense_and_saving_leaves_no_name(tmp_path):
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 37)
    dense = logits(model, ids)
    with hsa.patch(model, **WINDOWED):
        sparse = logits(model, ids)
        assert torch.equal(logits(copy.deepcopy(model), ids), dense)
        model.save_pretrained(tmp_path)
        fresh = type(model)(copy.deepcopy(model.config)).eval()
        fresh.load_state_dict(model.state_dict())
    assert "hsa" not in (tmp_path / "config.json").read_text()
    assert not torch.equal(sparse, dense)
    assert torch.equal(logits(type(model).from_pretrained(tmp_path), ids), dense)
    # A model built from a copy of a patched config has no patch: it runs what the config named before.
    assert torch.equal(logits(fresh, ids), dense)


# ------------------------------------------------------------------ sparse is what the pattern says

# The method whose pattern is the mask of "test_masked".
MASKED: list[Method] = []


def masked(module, query, key, attention_mask):
    return MASKED[0].pattern_for(query, key, hsa.Context.for_tensors(query, key)).to_dense() & attention_mask


register_masked("test_masked", masked)


@pytest.mark.parametrize("name, params", examples())
def test_sparse_equals_masked_with_gradients(name, params):
    cls = hsa.get_method(name)
    if cls.attention is not Method.attention or not cls.reads_prompts:
        pytest.skip("has a branch beside its pattern, or reads prompts whole")
    ids = tokens(2, 111)
    model, other = FAMILIES["llama"]("sdpa"), FAMILIES["llama"]("test_masked")
    MASKED[:] = [cls(**params)]
    want = other(input_ids=ids, labels=ids)
    with hsa.patch(model, name, strict=True, **SPARSE, **params) as patch:
        got = model(input_ids=ids, labels=ids)
        if cls.trainable:
            got.loss.backward()
    assert sparse_share(patch.report().layers) == 1
    assert (got.logits - want.logits).abs().max() <= tolerance()
    if cls.trainable:
        want.loss.backward()
        # Some gradients are 0 up to rounding (queries that see one key): the scale is that of all of them.
        scale = max(float(p.grad.abs().max()) for p in other.parameters())
        for (key, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
            assert (a.grad - b.grad).abs().max() <= tolerance() * scale, key


@pytest.mark.parametrize("name, budget", full_budgets())
@pytest.mark.parametrize("family", [n for n in FAMILIES if n != "gemma2"])
def test_full_budget_equals_dense(family, name, budget):
    # A window longer than the text; gemma3 brings a factor on the logits that is not dim ** -0.5.
    model = FAMILIES[family](**({"sliding_window": 512} if family in ("mistral", "gemma3", "gpt_oss") else {}))
    ids, mask, _ = padded([40, 111, 77], "left")
    dense = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    with hsa.patch(model, name, **SPARSE, **budget) as patch:
        sparse = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
    assert sparse_share(patch.report().layers) > 0
    valid = mask.bool()
    assert (dense - sparse)[valid].abs().max() <= tolerance(family)


@pytest.mark.parametrize("name, budget", full_budgets())
def test_full_budget_generates_the_same(name, budget):
    model = FAMILIES["llama"]("sdpa")
    ids, mask, _ = padded([23, 37], "left")
    ways = [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"prefill_chunk_size": 20}]
    single = ids[1:], mask[1:]
    with torch.no_grad():
        dense = [generate(model, ids, mask, **w) for w in ways]
        dense.append(generate(model, *single, prompt_lookup_num_tokens=3))
        dense.append(generate(model, *single, assistant_model=model))
        with hsa.patch(model, name, **SPARSE, **budget) as patch:
            sparse = [generate(model, ids, mask, **w) for w in ways]
            sparse.append(generate(model, *single, prompt_lookup_num_tokens=3))
            sparse.append(generate(model, *single, assistant_model=model))
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))
    assert 0 < sparse_share(patch.report().layers) < 1


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", text_methods())
def test_padded_batch_equals_single_runs(name, side):
    model = FAMILIES["llama"]("sdpa")
    ids, mask, singles = padded([61, 111, 40, 61], side)
    with hsa.patch(model, name, strict=True, **SPARSE, **hsa.get_method(name).examples()[0]) as patch:
        batch = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        assert sparse_share(patch.report().layers) == 1
        for row, single in enumerate(singles):
            alone = logits(model, single)[0]
            assert (batch[row][mask[row].bool()] - alone).abs().max() <= tolerance()
        noisy = torch.where(mask.bool(), ids, tokens(4, 111, seed=9))
        again = logits(model, noisy, attention_mask=mask, position_ids=positions(mask))
    assert torch.equal(batch[mask.bool()], again[mask.bool()])


@pytest.mark.parametrize("name", text_methods())
def test_packed_equals_single_runs(name):
    model = FAMILIES["llama"]("sdpa")
    singles = [tokens(1, n, seed=n) for n in (33, 61, 17)]
    ids, place = torch.cat(singles, 1), torch.cat([torch.arange(s.shape[1]) for s in singles])[None]
    edges = torch.tensor([0, 33, 94, 111], dtype=torch.int32)
    flash = dict(cu_seq_lens_q=edges, cu_seq_lens_k=edges, max_length_q=61, max_length_k=61)
    with hsa.patch(model, name, strict=True, **SPARSE, **hsa.get_method(name).examples()[0]) as patch:
        packed = logits(model, ids, position_ids=place, use_cache=False)
        assert torch.equal(packed, logits(model, ids, position_ids=place, use_cache=False, **flash))
        alone = torch.cat([logits(model, s) for s in singles], 1)
    assert sparse_share(patch.report().layers) == 1
    assert (packed - alone).abs().max() <= tolerance()


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_chunks_and_decoding_equal_one_shot(cache):
    from transformers import DynamicCache, StaticCache

    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 111)
    kept = StaticCache(config=model.config, max_cache_len=140) if cache == "static" else DynamicCache()
    # Decoding is sparse too here, so that the queries of every chunk are those of the whole.
    with hsa.patch(model, **WINDOWED) as patch:
        policy = patch.session.policy
        object.__setattr__(policy, "min_queries", 1)
        whole = logits(model, ids)
        parts = [logits(model, part, past_key_values=kept) for part in ids.split([50, 40, 20, 1], 1)]
    assert sparse_share(patch.report().layers) == 1
    assert (torch.cat(parts, 1) - whole).abs().max() <= tolerance()


def test_decoding_is_dense_by_default():
    model = FAMILIES["llama"]("sdpa")
    with hsa.patch(model, **WINDOWED) as patch:
        generate(model, tokens(1, 37), torch.ones(1, 37))
    for layer in patch.report().layers:
        assert layer.sparse_calls == 1
        assert layer.reasons == {"decoding: fewer than 16 queries": 4}


# ------------------------------------------------------------------ training and memory


def test_gradient_checkpointing_gives_the_same_gradients():
    model, ids = FAMILIES["llama"]("sdpa").train(), tokens(2, 63)
    grads = []
    with hsa.patch(model, **WINDOWED):
        for checkpoint in (False, True):
            if checkpoint:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("first", ["patch", "lora"])
def test_lora_trains_only_its_weights(first):
    peft = pytest.importorskip("peft")
    base, ids = FAMILIES["llama"]("sdpa"), tokens(2, 63)
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
    patch = hsa.patch(base, **WINDOWED) if first == "patch" else None
    model = peft.get_peft_model(base, config)
    patch = patch or hsa.patch(model, **WINDOWED)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    assert sparse_share(patch.report().layers) == 1
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed == {k for k in before if "lora_" in k}
    assert active_patch(base.model) is patch
    hsa.unpatch(model)
    assert not any(PATCH_ATTRIBUTE in m.__dict__ or STATE_ATTRIBUTE in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("side", [None, "left", "right"], ids=["whole", "left", "right"])
def test_memory_grows_with_the_length_not_its_square(side):
    model, sizes = FAMILIES["llama"]("sdpa"), []
    for n in (1024, 2048):
        ids, mask, _ = padded([n, n - 99], side) if side else (tokens(2, n), torch.ones(2, n), None)
        with hsa.patch(model, **WINDOWED) as patch, Largest() as largest:
            logits(model, ids, attention_mask=mask)
        assert sparse_share(patch.report().layers) == 1
        sizes.append(largest.bytes)
    assert sizes[1] < 3 * sizes[0]
    # The largest is the logits over the vocabulary, not anything the patch makes.
    assert sizes[1] <= 2 * 2048 * 97 * 4
