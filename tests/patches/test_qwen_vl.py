"""Family qwen_vl: text attention sparse, vision tower exact in fewer calls, everything as it was after removal."""

from __future__ import annotations

import copy
import inspect
import logging
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache, StaticCache

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern
from hf_sparse_attn.family import find_family
from hf_sparse_attn.hosts import vision_segments
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.patching import active_patch
from hf_sparse_attn.registry import FAMILIES
from hf_sparse_attn.selection import pattern_from_rule
from hf_sparse_attn.session import DenseFallback
from tests.support.patched import (
    WINDOWED,
    assert_same_state,
    eight_roundings,
    register_masked,
    sparse_share,
    state_of,
)
from tests.support.tiny_qwen import KINDS, left_padded, prompt, tiny_qwen

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE = dict(min_tokens=0)
# An image, and a video of 8 frames (two are one step of the grid) with an odd number of rows and columns.
MIXED = [9, (3, 5), 4, (4, 3, 5), 11]


def text_methods() -> list[str]:
    found = [n for n in hsa.list_methods() if hsa.get_method(n).needs <= {"causal"} and n != "dense"]
    return [n for n in found if not hsa.get_method(n).reads]


def logits(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs).logits


def generate(model, inputs, **kwargs):
    return model.generate(**inputs, max_new_tokens=5, do_sample=False, **kwargs)


def as_dtype(inputs, dtype):
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


@lru_cache
def tolerance(kind: str, dtype: torch.dtype = torch.float32) -> float:
    inputs = prompt(kind, MIXED)
    return eight_roundings(lambda d: logits(tiny_qwen(kind).to(d), as_dtype(inputs, d)), dtype)


def text_rows(patch):
    return [r for r in patch.report().layers if not r.name.startswith("visual")]


def vision_rows(patch):
    return [r for r in patch.report().layers if r.name.startswith("visual")]


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Runs another method and notes the layouts and patterns."""

    inner: Method
    layouts: list = field(default_factory=list, compare=False)
    patterns: list = field(default_factory=list, compare=False)

    def attention(self, q, k, v, ctx, run):
        found = self.inner.pattern_for(q, k, ctx)
        if isinstance(found, Decline):
            return found
        self.layouts.append(ctx.layout)
        self.patterns.append(found)
        return run(q, k, v, found)


@dataclass(frozen=True, kw_only=True)
class Everything(Method):
    """Keeps all."""

    def pattern(self, q, k, ctx):
        return BlockPattern.dense(ctx.layout.q_len, ctx.layout.kv_len, ctx.layout.is_causal)


@dataclass(frozen=True, kw_only=True)
class OwnFrame(Method):
    """Each token sees text and its own frame: a method that lives from the coordinates of a causal video."""

    needs = frozenset({"causal", "video grid"})

    def pattern(self, q, k, ctx):
        layout, size = ctx.layout, 16
        where = layout.coordinates()
        frame = torch.where(where[:, 0] < 0, -1, where[:, 0] * 1000 + where[:, 1])
        row, col = torch.ones(-(-layout.q_len // size), -(-layout.kv_len // size)).tril().nonzero().unbind(1)
        pad = F.pad(frame, (0, 2 * size), value=-2)

        def rule(query, key):
            return (key <= query) & ((pad[key] == -1) | (pad[query] == -1) | (pad[key] == pad[query]))

        alike = torch.stack([row, col], 1)
        return pattern_from_rule(row, col * size, alike, rule, size, size, layout)


# Patterns that are the masks of "test_masked_vl", in the order of the calls.
MASKED: list[BlockPattern] = []
register_masked("test_masked_vl", lambda module, query, key, mask: MASKED.pop(0).to_dense() & mask)


# ------------------------------------------------------------------ dense is untouched, removal is exact


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
def test_dense_patch_changes_no_bit(kind, implementation):
    model = tiny_qwen(kind, implementation)
    one, batch = prompt(kind, MIXED), left_padded([prompt(kind, p) for p in (MIXED, [5, (2, 3)], [70])])

    def outputs():
        return [logits(model, one), logits(model, batch), generate(model, one), generate(model, batch)]

    before, state = outputs(), state_of(model)
    with hsa.patch(model, "dense", strict=True) as patch:
        within = outputs()
        assert model.config.vision_config._attn_implementation == implementation
    assert all(torch.equal(a, b) for a, b in zip(before, within, strict=True))
    assert [r.name for r in patch.report().layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(set(r.reasons) == {"method dense"} for r in patch.report().layers)
    assert_same_state(state, state_of(model))
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_line_on_one_line_off(kind):
    model, inputs = tiny_qwen(kind), prompt(kind, MIXED)
    before = [logits(model, inputs), generate(model, inputs), generate(model, inputs, num_beams=2)]
    state = state_of(model)
    patch = hsa.patch(model, **WINDOWED)
    assert patch.family == "qwen_vl"
    sparse = [logits(model, inputs), generate(model, inputs), generate(model, inputs, num_beams=2)]
    patch.remove()
    patch.remove()
    assert not torch.equal(before[0], sparse[0])
    assert_same_state(state, state_of(model))
    with pytest.raises(RuntimeError, match="on purpose"), hsa.patch(model, **WINDOWED):
        logits(model, inputs)
        raise RuntimeError("on purpose")
    patch = hsa.patch(model, **WINDOWED)
    with pytest.raises(Exception, match=r"features|match|shape|bounds"):
        logits(model, {**inputs, "pixel_values": inputs["pixel_values"][:-4]})
    hsa.unpatch(model)
    assert_same_state(state, state_of(model))
    after = [logits(model, inputs), generate(model, inputs), generate(model, inputs, num_beams=2)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_full_budget_generates_the_same(kind):
    model = tiny_qwen(kind)
    one, batch = prompt(kind, MIXED), left_padded([prompt(kind, p) for p in (MIXED, [40, (2, 3)])])
    ways = [(one, {}), (batch, {}), (one, {"num_beams": 3}), (one, {"cache_implementation": "static"})]
    dense = [generate(model, i, **w) for i, w in ways]
    with hsa.patch(model, **{**WINDOWED, "window": 4096}) as patch:
        assert torch.allclose(logits(model, one), logits(model, one), atol=tolerance(kind))
        sparse = [generate(model, i, **w) for i, w in ways]
    assert all(torch.equal(a, b) for a, b in zip(dense, sparse, strict=True))
    assert 0 < sparse_share(text_rows(patch)) < 1
    assert {"decoding: fewer than 16 queries"} == set(text_rows(patch)[0].reasons)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_one_family_takes_a_model(kind):
    model = tiny_qwen(kind)
    for given in (model, model.model):
        takers = [n for n, f in FAMILIES.items() if not isinstance(f.targets(given), Decline)]
        assert takers == ["qwen_vl"]
        assert find_family(given)[2] == [model.model, model.model.language_model]
    assert find_family(model.model.language_model)[0] == "llama"
    with pytest.raises(TypeError, match=r"llama: no causal self-attention.*qwen_vl: .* holds no Qwen2VLModel"):
        find_family(model.model.visual)


def test_inner_model_and_decoder_alone():
    model, inputs = tiny_qwen("qwen3_vl"), prompt("qwen3_vl", MIXED)
    with hsa.patch(model, **WINDOWED) as patch:
        whole = logits(model, inputs)
    with hsa.patch(model.model, **WINDOWED) as inner:
        assert torch.equal(logits(model, inputs), whole)
        assert active_patch(model.model) is inner
        for given in (model, model.model.language_model):
            with pytest.raises(ValueError, match="must not be patched already"):
                hsa.patch(given, "dense")
    assert inner.report().to_dict() == patch.report().to_dict()
    with hsa.patch(model.model.language_model, **WINDOWED) as decoder:
        assert decoder.family == "llama"
        assert (logits(model, inputs) - whole).abs().max() <= tolerance("qwen3_vl")
        with pytest.raises(ValueError, match="must not be patched already"):
            hsa.patch(model, "dense")
    assert sparse_share(text_rows(decoder)) == 1 and not vision_rows(decoder)


def test_methods_that_look_ahead_are_refused():
    model = tiny_qwen("qwen2_vl")
    state = state_of(model)
    with pytest.raises(hsa.MethodDoesNotApply, match="'radial' needs a bidirectional layout"):
        hsa.patch(model, "radial")
    assert_same_state(state, state_of(model))


# ------------------------------------------------------------------ sparse is what the pattern says


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "name",
    [n for n in text_methods() if hsa.get_method(n).attention is Method.attention and hsa.get_method(n).reads_prompts],
)
def test_sparse_equals_masked(name, dtype):
    """Some examples of a method keep nearly all of so short a prompt, but not all of them."""
    methods = [hsa.get_method(name)(**params) for params in hsa.get_method(name).examples()]
    watches = [check_masked("qwen2_5_vl", method, MIXED, dtype) for method in methods]
    dense = all(pattern.density("causal") == 1 for watch in watches for pattern in watch.patterns)
    assert dense == hsa.get_method(name).keeps_all


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_masked(kind, dtype):
    check_masked(kind, hsa.get_method("block_topk")(block_size=16, topk=3), MIXED, dtype)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_method_with_a_grid_equals_masked(kind):
    watch = check_masked(kind, OwnFrame(), [9, (4, 3, 5), 31], torch.float32)
    dense = watch.patterns[0].to_dense()[0, 0]
    # The second frame sees the text before it and itself, and nothing of the first.
    assert dense[10 + 17].nonzero()[:, 0].tolist() == [*range(10), *range(25, 28)]


def check_masked(kind, method, pieces, dtype) -> Watch:
    inputs = as_dtype(prompt(kind, pieces), dtype)
    watch, other = Watch(inner=method), tiny_qwen(kind).to(dtype)
    model = tiny_qwen(kind).to(dtype)
    with hsa.patch(model, watch, strict=True, **SPARSE) as patch:
        got = logits(model, inputs)
    assert sparse_share(text_rows(patch)) == 1
    other.set_attn_implementation({"text_config": "test_masked_vl"})
    MASKED[:] = watch.patterns
    want = logits(other, inputs)
    assert not MASKED
    assert (got - want).abs().max() <= tolerance(kind, dtype)
    return watch


@pytest.mark.parametrize("name", text_methods())
def test_padded_batch_equals_single_runs(name):
    kind = "qwen2_5_vl"
    model = tiny_qwen(kind)
    rows = [prompt(kind, p, i) for i, p in enumerate([MIXED, [3, (2, 3), (2, 2, 2), 5], [45], [60, (1, 3), 7], MIXED])]
    batch = left_padded(rows)
    with hsa.patch(model, name, strict=True, **SPARSE, **hsa.get_method(name).examples()[0]) as patch:
        together = logits(model, batch)
        for row, single in enumerate(rows):
            alone = logits(model, single)[0]
            assert (together[row, -len(alone) :] - alone).abs().max() <= tolerance(kind)
    assert sparse_share(text_rows(patch)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_batch_equals_loop(kind):
    model = tiny_qwen(kind)
    rows = [prompt(kind, p, i) for i, p in enumerate([[30, (2, 2, 3)], [2, (3, 2, 2), 7], [20, (1, 7), 9]])]
    with hsa.patch(model, **WINDOWED):
        together = logits(model, left_padded(rows))
        for row, single in enumerate(rows):
            alone = logits(model, single)[0]
            assert (together[row, -len(alone) :] - alone).abs().max() <= tolerance(kind)


@pytest.mark.parametrize("checkpoint", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind, checkpoint):
    """Those of the pattern as a mask, through text and vision; checkpointing changes nothing."""
    inputs, grads = prompt(kind, MIXED), []
    watch = Watch(inner=hsa.get_method("sliding_window")(window=24, sink=3, block_size=32))
    model, other = tiny_qwen(kind).train(), tiny_qwen(kind).train()
    if checkpoint:
        model.gradient_checkpointing_enable()
    with hsa.patch(model, watch, **SPARSE):
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    other.set_attn_implementation({"text_config": "test_masked_vl"})
    MASKED[:] = watch.patterns
    other(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    for m in (model, other):
        grads.append({n: p.grad for n, p in m.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and any("visual" in n for n in grads[0])
    scale = max(float(g.abs().max()) for g in grads[1].values())
    assert all((g - grads[1][n]).abs().max() <= tolerance(kind) * scale for n, g in grads[0].items())


# ------------------------------------------------------------------ what the methods are told


def watched(model, **kwargs):
    watch = Watch(inner=Everything())
    return watch, hsa.patch(model, watch, **SPARSE, **kwargs)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_reach_every_layer_and_follow_the_cache(kind):
    model = tiny_qwen(kind)
    watch, patch = watched(model)
    first, second = prompt(kind, [19, (3, 5), 2]), prompt(kind, [3, (2, 3, 3), 5], seed=1)
    object.__setattr__(patch.session.policy, "min_queries", 1)
    with torch.no_grad(), patch:
        cache = model(**first, use_cache=True).past_key_values
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        turn = {k: v for k, v in second.items() if k != "attention_mask"}
        copied = copy.deepcopy(cache)
        model(**turn, past_key_values=cache)
        cache.crop(-turn["input_ids"].shape[1])
        model(**turn, past_key_values=cache)
        # A copy of the cache from before, gone on with by text alone.
        model(input_ids=torch.full((1, 20), 8), past_key_values=copied)
    n, m = first["input_ids"].shape[1], second["input_ids"].shape[1]
    assert [(x.query_start, x.kv_len) for x in watch.layouts[::2]] == [(0, n), (n, n + 1)] + [
        (n + 1, n + 1 + m)
    ] * 2 + [(n + 1, n + 21)]
    assert watch.layouts[::2] == watch.layouts[1::2]
    assert watch.layouts[4] == watch.layouts[6]
    videos = [p for p in watch.layouts[4].parts if p.grid is not None]
    assert {p.clip for p in videos} == {0, 1} and videos[0].grid == (1, 3, 5)
    assert [p.frame for p in videos[1:]] == ([0, 1] if kind.startswith("qwen3") else [0])
    where = watch.layouts[4].coordinates()
    ids = torch.cat([first["mm_token_type_ids"][0], torch.zeros(1), second["mm_token_type_ids"][0]])
    assert torch.equal(where[:, 0] >= 0, ids > 0)
    assert [p.kind for p in watch.layouts[8].parts] == ["text", "video", "text"]


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generate_tells_the_layout_once_for_every_row(cache):
    kind = "qwen3_vl"
    model, rows = tiny_qwen(kind), [prompt(kind, p) for p in (MIXED, [5, (2, 3), 25], MIXED)]
    watch, patch = watched(model)
    with patch:
        generate(model, left_padded(rows), num_beams=2, cache_implementation=cache if cache == "static" else None)
        generate(model, left_padded(rows), num_return_sequences=2, num_beams=2)
    # Two layers, two sequences that differ in places, twice; decoding is dense.
    assert len(watch.layouts) == 8
    sizes = {layout.kv_len for layout in watch.layouts}
    assert sizes == {rows[0]["input_ids"].shape[1], rows[1]["input_ids"].shape[1]}
    grids = {x.kv_len: [p.grid for p in x.parts if p.grid] for x in watch.layouts}
    assert sorted(grids.values()) == [[(1, 2, 3)], [(1, 3, 5)] * 5]


def test_static_cache_with_room_is_followed():
    model, inputs = tiny_qwen("qwen2_vl"), prompt("qwen2_vl", MIXED)
    cache = StaticCache(config=model.config, max_cache_len=200)
    watch, patch = watched(model)
    with torch.no_grad(), patch:
        model(**inputs, past_key_values=cache)
        model(input_ids=torch.full((1, 20), 5), past_key_values=cache)
    assert [p.grid for p in watch.layouts[-1].parts] == [None, (1, 3, 5), None, (4, 3, 5), None]
    assert watch.layouts[-1].q_len == 20


UNKNOWN = "vision tokens unknown: "


def test_what_cannot_be_known_is_said_to_methods_that_need_it():
    kind = "qwen2_vl"
    model, inputs = tiny_qwen(kind), prompt(kind, [9, (4, 3, 5), 31])
    n = inputs["input_ids"].shape[1]
    text = {"input_ids": torch.full((1, 20), 5)}
    embeds = {"inputs_embeds": model.get_input_embeddings()(torch.full((1, 50), 5)).detach()}
    with torch.no_grad():
        filled = model(**inputs, use_cache=True).past_key_values
    with torch.no_grad(), hsa.patch(model, OwnFrame(), **SPARSE) as patch:
        reasons = lambda: text_rows(patch)[0].reasons  # noqa: E731
        logits(model, inputs)
        assert text_rows(patch)[0].sparse_calls == 1 and not reasons()
        logits(model, embeds)
        logits(model, {**embeds, "mm_token_type_ids": torch.zeros(1, 60, dtype=torch.int)})
        model(**text, past_key_values=copy.deepcopy(filled))
        cache = model(**inputs, use_cache=True).past_key_values
        model(**text, past_key_values=copy.deepcopy(cache))
        short = copy.deepcopy(cache)
        short.crop(20 - n)
        model(**text, past_key_values=short)
        longer = copy.deepcopy(cache)
        longer._hsa_tokens = longer._hsa_tokens.cropped(8)
        model(**text, past_key_values=longer)
        wide = copy.deepcopy(cache)
        wide.batch_repeat_interleave(2)
        model(input_ids=torch.full((2, 20), 5), past_key_values=wide)
        # The unknown stays unknown.
        model(**text, past_key_values=longer)
        # Two clips, or none, are no single grid.
        logits(model, prompt(kind, MIXED))
        logits(model, prompt(kind, [40]))
    assert text_rows(patch)[0].sparse_calls == 3
    single = "needs exactly one video segment with its (frames, height, width), got causal"
    assert reasons() == {
        f"{UNKNOWN}inputs_embeds without mm_token_type_ids of their own": 2,
        f"{UNKNOWN}cache filled without the patch": 1,
        f"{UNKNOWN}cache cropped inside an image or video": 1,
        f"{UNKNOWN}cache filled further without the patch": 2,
        f"{UNKNOWN}cache of 1 rows for 2": 1,
        f" {single} 10 text + 1x3x5 + 6 text + 4x3x5 + 12 text": 1,
        f" {single} 40 text": 1,
    }
    assert n == 9 + 62 + 31
    with torch.no_grad(), hsa.patch(model, OwnFrame(), strict=True, **SPARSE):
        with pytest.raises(DenseFallback, match="inputs_embeds without mm_token_type_ids"):
            logits(model, embeds)
        with pytest.raises(DenseFallback, match=r"needs exactly one video segment.*got causal 10 text"):
            logits(model, prompt(kind, MIXED))
    # A method that reads no grid runs all the same.
    with torch.no_grad(), hsa.patch(model, strict=True, **WINDOWED) as patch:
        logits(model, embeds)
        model(**text, past_key_values=filled)
    assert sparse_share(text_rows(patch)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_features_encoded_ahead_and_prefill_in_chunks(kind):
    """generate() of newer versions encodes before it prefills, and may then cut the prompt anywhere."""
    model, inputs = tiny_qwen(kind), prompt(kind, MIXED)
    if "mm_encoder_outputs" not in inspect.signature(model.model.forward).parameters:
        pytest.skip("this version of transformers encodes in the forward")
    dense = generate(model, inputs, prefill_chunk_size=30)
    given = {k: v for k, v in inputs.items() if not k.startswith("pixel")}
    names = {"image": ("pixel_values", "image_grid_thw"), "video": ("pixel_values_videos", "video_grid_thw")}

    def encode():
        with torch.no_grad():
            return {n: getattr(model.model, f"get_{n}_features")(*(inputs[x] for x in names[n])) for n in names}

    unknown = encode()
    watch, patch = watched(model)
    with patch:
        logits(model, inputs)
        logits(model, given, mm_encoder_outputs=encode())
        logits(model, given, mm_encoder_outputs=unknown)
        chunked = generate(model, inputs, prefill_chunk_size=30)
    assert torch.equal(chunked, dense)
    assert watch.layouts[2] == watch.layouts[0] and len(watch.layouts[0].parts) > 3
    assert all([p.kind for p in x.parts] == ["text"] for x in watch.layouts[4:])
    reason = "features without their grids"
    with hsa.patch(model, OwnFrame(), strict=True, **SPARSE), pytest.raises(DenseFallback, match=reason):
        logits(model, given, mm_encoder_outputs=unknown)


def test_calls_the_model_refuses_are_refused_by_the_model():
    model = tiny_qwen("qwen2_vl")
    errors = []
    for patched in (False, True):
        patch = hsa.patch(model, **WINDOWED) if patched else None
        with pytest.raises(Exception) as caught:
            model.model()
        errors.append(str(caught.value))
        if patch is not None:
            patch.remove()
    assert errors[0] == errors[1]


def test_embeddings_with_token_types_are_known():
    kind = "qwen2_vl"
    model, inputs = tiny_qwen(kind), prompt(kind, [9, (4, 3, 5), 31])
    watch, patch = watched(model)
    embeds = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with patch:
        logits(model, {"inputs_embeds": embeds, **{k: inputs[k] for k in ("mm_token_type_ids", "video_grid_thw")}})
        logits(model, inputs)
    assert watch.layouts[0] == watch.layouts[2] and watch.layouts[0].video_part is not None


def test_two_models_do_not_mix():
    """One runs inside the other's forward, and both share their configs."""
    kind = "qwen3_vl"
    a, prompts = tiny_qwen(kind), [prompt(kind, MIXED), prompt(kind, [25, (2, 2, 2), 3])]
    b = type(a)(a.config).eval()
    with hsa.patch(a, **WINDOWED), hsa.patch(b, **WINDOWED):
        want = logits(a, prompts[0]), logits(b, prompts[1])
    (watch_a, patch_a), (watch_b, patch_b) = watched(a), watched(b)
    inner = []
    handle = a.model.language_model.layers[0].register_forward_hook(lambda *_: inner.append(logits(b, prompts[1])))
    with patch_a, patch_b:
        logits(a, prompts[0])
    handle.remove()
    assert len(watch_a.layouts) == len(watch_b.layouts) == 2
    assert len({str(x) for x in watch_a.layouts}) == len({str(x) for x in watch_b.layouts}) == 1
    assert watch_a.layouts[0].kv_len == want[0].shape[1] and watch_b.layouts[0].kv_len == want[1].shape[1]
    assert a.config.text_config._attn_implementation == "sdpa"


def test_copy_of_a_patched_model_is_dense():
    kind = "qwen2_5_vl"
    model, inputs = tiny_qwen(kind), prompt(kind, MIXED)
    dense = logits(model, inputs)
    with hsa.patch(model, **WINDOWED) as patch:
        sparse = logits(model, inputs)
        copied = copy.deepcopy(model)
        assert torch.equal(logits(copied, inputs), dense)
        # An image and a video, in the model alone.
        assert [r.exact_calls for r in vision_rows(patch)] == [2, 2]
        assert torch.equal(logits(model, inputs), sparse) and not torch.equal(sparse, dense)
    assert torch.equal(logits(copied, inputs), dense) and torch.equal(logits(model, inputs), dense)


# ------------------------------------------------------------------ the vision tower


def tower(model, grid, seed=0):
    pixels = torch.randn(int(grid.prod(1).sum()), 96, generator=torch.Generator().manual_seed(seed))
    return model.model.visual(pixels.to(model.dtype), grid_thw=grid)


GRIDS = {
    "one_image": [[1, 6, 10]],
    "video": [[4, 6, 10]],
    "odd": [[3, 14, 26], [1, 2, 2], [1, 2, 2], [2, 14, 26]],
    "several": [[1, 10, 6], [1, 6, 10], [1, 4, 4], [5, 4, 4]],
}


# The towers of the mixture and of Qwen3 are one; rounding does not know how images are cut.
TOWERS = [
    *product(KINDS[:3], GRIDS, [torch.float32], ["runs", "by_length"]),
    *product(KINDS, ["odd"], [torch.bfloat16], ["runs"]),
]


@pytest.mark.parametrize("kind, name, dtype, order", TOWERS)
def test_vision_tower_in_fewer_calls_is_exact(kind, name, dtype, order, monkeypatch):
    """With gradients; within the rounding of the dtype, measured against float64 (here it is equal to the bit)."""
    if order == "by_length":
        monkeypatch.setattr(vision_segments, "_pays_to_order", lambda cut, device: True)
    model, grid = tiny_qwen(kind).to(dtype), torch.tensor(GRIDS[name])
    high = tower(tiny_qwen(kind).double(), grid).pooler_output.detach()
    results, calls = [], []
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **kw: calls.append(1) or sdpa(*a, **kw))
    for patched in (False, True):
        patch = hsa.patch(model, **WINDOWED) if patched else None
        model.zero_grad()
        calls.clear()
        out = tower(model, grid).pooler_output
        out.float().square().mean().backward()
        out = out.detach()
        results.append((out, model.model.visual.blocks[0].attn.qkv.weight.grad.clone(), len(calls)))
    assert patch is not None
    patch.remove()
    (loop, loop_grad, loop_calls), (grouped, grad, grouped_calls) = results
    limit = 3 * float((loop.double() - high).abs().max())
    assert limit > 0 and (grouped - loop).abs().max() <= limit
    assert (grad - loop_grad).abs().max() <= limit * max(float(loop_grad.abs().max()), 1)
    rows = vision_rows(patch)
    assert [r.name for r in rows] == ["visual.blocks.0.attn", "visual.blocks.1.attn"]
    assert [(r.exact_calls, r.sparse_calls, r.dense_calls) for r in rows] == [(1, 0, 0)] * 2
    assert sum(r.segments for r in rows) == loop_calls and sum(r.backends["sdpa"] for r in rows) == grouped_calls
    assert grouped_calls < loop_calls or (name == "one_image" and kind != "qwen2_5_vl")
    if name == "video" and kind != "qwen2_5_vl":
        assert grouped_calls == 2 and loop_calls == 8


def test_report_counts_exact_calls_by_themselves():
    model, inputs = tiny_qwen("qwen2_5_vl"), prompt("qwen2_5_vl", MIXED)
    with hsa.patch(model, **WINDOWED) as patch:
        logits(model, inputs)
    report = patch.report()
    density = sum(r.density for r in text_rows(patch)) / 2
    assert report.density == pytest.approx(density) and density < 1
    assert [r.name for r in report.layers][:2] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert "2 (30 segments)" in str(report) and "exact" in str(report)
    assert report.to_dict()["layers"][2]["exact_calls"] == 2
    with hsa.patch(model, "dense") as patch:
        logits(model, inputs)
    assert "exact" not in str(patch.report())


def test_tower_on_another_implementation_is_left(caplog):
    model, inputs = tiny_qwen("qwen2_vl", "eager"), prompt("qwen2_vl", MIXED)
    with caplog.at_level(logging.INFO, "hf_sparse_attn"), hsa.patch(model, **WINDOWED) as patch:
        logits(model, inputs)
        assert model.config.vision_config._attn_implementation == "eager"
    assert "vision tower left as it is: its attention is eager" in caplog.text
    assert not vision_rows(patch) and sparse_share(text_rows(patch)) == 1


def test_tower_of_a_native_model_is_grouped_too():
    model, inputs = tiny_qwen("qwen2_vl", "hsa:sliding_window"), prompt("qwen2_vl", MIXED)
    usual = logits(tiny_qwen("qwen2_vl"), inputs)
    with hsa.patch(model, **{**WINDOWED, "window": 4096}) as patch:
        assert (logits(model, inputs) - usual).abs().max() <= tolerance("qwen2_vl")
    assert [r.exact_calls for r in vision_rows(patch)] == [2, 2]


def test_switching_the_tower_while_patched_goes_back_to_the_loop(caplog):
    model, inputs = tiny_qwen("qwen2_5_vl"), prompt("qwen2_5_vl", MIXED)
    with hsa.patch(model, **{**WINDOWED, "window": 4096}) as patch:
        want = logits(model, inputs)
        model.set_attn_implementation({"vision_config": "eager"})
        assert (logits(model, inputs) - want).abs().max() <= tolerance("qwen2_5_vl")
    assert [r.exact_calls for r in vision_rows(patch)] == [2, 2]
    assert model.config.vision_config._attn_implementation == "eager" and "set to 'eager'" in caplog.text


def test_edges_that_do_not_fit_are_left_to_the_model():
    model = tiny_qwen("qwen2_vl")
    block = model.model.visual.blocks[0].attn
    x, turn = torch.randn(8, 32), (torch.ones(8, 8), torch.zeros(8, 8))
    with torch.no_grad():
        want = block(x, torch.tensor([0, 4, 8]), turn)
        with hsa.patch(model, **WINDOWED) as patch:
            # Positional, as others may call it.
            assert torch.equal(block(x, torch.tensor([0, 4, 8]), turn), want)
            with pytest.raises(RuntimeError, match="split"):
                block(x, torch.tensor([0, 4, 7]), position_embeddings=turn)
    assert vision_rows(patch)[0].exact_calls == 1


def test_caches_of_earlier_forwards_hold_nothing():
    """Layouts live in the call and its cache alone."""
    model, inputs = tiny_qwen("qwen2_vl"), prompt("qwen2_vl", MIXED)
    with hsa.patch(model, **WINDOWED), torch.no_grad():
        out = model(**inputs, use_cache=True, return_dict=False)
        cache = next(x for x in out if isinstance(x, DynamicCache))
        assert cache._hsa_tokens.length == inputs["input_ids"].shape[1]
        model(**inputs, use_cache=False)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["frames", "windows"])
def test_grouped_calls_are_exact_and_do_not_lose_on_a_gpu(name):
    from types import SimpleNamespace

    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    from hf_sparse_attn.record import LayerRecord

    lengths = [1196] * 16 if name == "frames" else [min(8, 74 - 8 * r) * min(8, 74 - 8 * c) for r in range(10) for c in range(10)]  # fmt: skip  # noqa: E501
    module = SimpleNamespace(num_key_value_groups=1, training=False, is_causal=False)
    q, k, v = (torch.randn(sum(lengths), 16, 80, device="cuda").bfloat16().transpose(0, 1)[None] for _ in range(3))

    def one(q, k, v):
        return sdpa_attention_forward(module, q, k, v, None, is_causal=False)

    def loop(q=q, k=k, v=v):
        return torch.cat([one(*x)[0] for x in zip(*(t.split(lengths, 2) for t in (q, k, v)), strict=True)], 1)

    segments = vision_segments.Segments(vision_segments.Cut(tuple(lengths)), LayerRecord("x", 0))
    ways = {"loop": loop, "grouped": lambda: segments.attend(one, "sdpa", q, k, v)}
    seconds: dict[str, list[float]] = {n: [] for n in ways}
    for _ in range(30):
        for n, way in ways.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            out = way()
            end.record()
            torch.cuda.synchronize()
            seconds[n].append(begin.elapsed_time(end))
    error = (loop() - loop(q.double(), k.double(), v.double())).abs().max()
    assert (out - loop()).abs().max() <= 3 * error
    median = {n: sorted(t[5:])[12] for n, t in seconds.items()}
    print(name, median)
    assert median["grouped"] <= 1.05 * median["loop"]
