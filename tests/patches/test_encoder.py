"""Family encoder: patched encoders compute what they should, cross-attention is left alone, removal leaves nothing."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from transformers.modeling_utils import AttentionInterface

import hf_sparse_attn as hsa
from hf_sparse_attn import native
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.family import find_family
from hf_sparse_attn.hosts.transformers_encoder import Hints, patch_embedding, watch_grid
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.registry import FAMILIES, METHODS
from tests.support.patched import assert_same_state, register_masked, state_of
from tests.support.tiny_encoders import CLIP, ENCODERS, GRID, LENGTH, SPECIAL, TEXT, WINDOW, inputs, output
from tests.support.tiny_lm import mask_spec, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

WINDOWED: dict[str, Any] = dict(method="sliding_window", window=9, sink=2, block_size=16, min_tokens=0)
WHOLE: dict[str, Any] = dict(method="sliding_window", window=1 << 20, sink=0, block_size=16, min_tokens=0)


@torch.no_grad()
def run(model: nn.Module, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return output(model, given)


def reasons(patch: hsa.Patch) -> list[dict[str, int]]:
    return [layer.reasons for layer in patch.report().layers]


@lru_cache
def tolerance(family: str) -> float:
    """Eight times the error that float32 makes in the dense model's output, against float64."""
    low, high = (ENCODERS[family]("eager").to(dtype) for dtype in (torch.float32, torch.float64))
    given = inputs(family)
    double = {k: v.double() if v.is_floating_point() else v for k, v in given.items()}
    return 8 * float((run(low, given) - run(high, double)).abs().max())


# ------------------------------------------------------------------ dense is untouched, sparse is not


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ENCODERS)
def test_dense_changes_no_bit_and_removal_restores_everything(family: str, implementation: str) -> None:
    model, given = ENCODERS[family](implementation), inputs(family)
    before, state = run(model, given), state_of(model)
    with hsa.patch(model, "dense", strict=True) as patch:
        assert patch.family == "encoder"
        assert torch.equal(run(model, given), before)
    assert all(set(r) == {"method dense"} for r in reasons(patch))
    patch = hsa.patch(model, **WINDOWED)
    assert not torch.equal(run(model, given), before)
    hsa.unpatch(model)
    assert_same_state(state, state_of(model))
    assert torch.equal(run(model, given), before)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_self_attention_is_sparse_and_a_whole_window_is_dense(family: str) -> None:
    model, given = ENCODERS[family](), inputs(family)
    dense = run(model, given)
    with hsa.patch(model, strict=True, **WHOLE) as patch:
        assert (run(model, given) - dense).abs().max() <= tolerance(family)
    own = [{}, {f"layer's own sliding window of {WINDOW + 1}": 1}] if family == "modernbert" else None
    count = 4 if family in ("clip", "siglip", "whisper", "bart") else 2
    assert reasons(patch) == (own or [{}] * count)
    assert [r.sparse_calls for r in patch.report().layers] == [1 - len(r) for r in reasons(patch)]


# ------------------------------------------------------------------ sparse is what the pattern says


# The method whose pattern is the mask of "test_masked_encoder", and the family that it runs in.
MASKED: dict[str, Any] = {}


def mask_of(module, query, key, attention_mask):
    if MASKED["family"] == "vit":
        layout = TokenLayout.video(1, *GRID, text_before=1)
    elif getattr(module, "is_causal", False):
        layout = TokenLayout.causal(key.shape[2])
    else:
        layout = TokenLayout.bidirectional(key.shape[2])
    if "encoder_attn" in module.test_name:
        return attention_mask
    heads = dict(num_heads=query.shape[1], num_kv_heads=key.shape[1], head_dim=query.shape[3])
    found = MASKED["method"].pattern_for(query, key, hsa.Context(layout, scale=module.test_scale, **heads))
    if isinstance(found, Decline):
        return attention_mask
    return found.to_dense() if attention_mask is None else found.to_dense() & attention_mask


register_masked("test_masked_encoder", mask_of)

HAS = {
    "bert": {"bidirectional"},
    "vit": {"bidirectional", "video grid"},
    "whisper": {"bidirectional", "causal"},
}
ONE_LAYER = {"whisper": dict(encoder_layers=1, decoder_layers=1)}
EXAMPLES = [
    pytest.param(family, name, params, id=f"{family}-{name}-{i}")
    for family, has in HAS.items()
    for name in hsa.list_methods()
    if name != "dense" and hsa.get_method(name).needs <= has and not hsa.get_method(name).reads
    if hsa.get_method(name).reads_prompts
    for i, params in enumerate(hsa.get_method(name).examples())
]


def masked(family: str, method: Method) -> nn.Module:
    """One layer (two would let rounding choose other keys in the second), every module with its name."""
    MASKED.update(method=method, family=family)
    model = ENCODERS[family]("test_masked_encoder", **ONE_LAYER.get(family, dict(num_hidden_layers=1)))
    for name, module in model.named_modules():
        module.test_name, module.test_scale = name, getattr(module, "scaling", None)
        if family == "whisper":
            # It scales its queries before the call.
            module.test_scale = 1.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family, name, params", EXAMPLES)
def test_sparse_equals_masked(family: str, name: str, params: dict[str, Any], dtype: torch.dtype) -> None:
    cls = hsa.get_method(name)
    if cls.attention is not Method.attention:
        pytest.skip("has a branch beside its pattern")
    exact, other = masked(family, cls(**params)), masked(family, cls(**params)).to(dtype)
    model = ENCODERS[family](None, **ONE_LAYER.get(family, dict(num_hidden_layers=1))).to(dtype)
    given = inputs(family)
    low = {k: v.to(dtype) if v.is_floating_point() else v for k, v in given.items()}
    want = run(other, low).float()
    # The error of the reference of low precision, where its pattern is that of the exact one; else that of its type.
    error = (want - run(exact, given)).abs().max() if dtype != torch.float32 and cls.static else 0
    with hsa.patch(model, name, min_tokens=0, **params) as patch:
        got = run(model, low).float()
    allowed = max(tolerance(family), 4 * torch.finfo(dtype).eps * float(want.abs().max()), 2 * float(error))
    assert (got - want).abs().max() <= allowed
    declined = [r for layer in reasons(patch) for r in layer]
    assert sum(r.sparse_calls for r in patch.report().layers) + len(declined) == len(patch.report().layers)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name",
    [n for n in hsa.list_methods() if hsa.get_method(n).needs <= {"bidirectional"} and not hsa.get_method(n).reads],
)
def test_padded_batch_equals_single_runs(name: str, side: str) -> None:
    model = ENCODERS["bert"]()
    ids, mask, singles = padded([61, 111, 40, 61], side)
    with hsa.patch(model, name, strict=True, min_tokens=0, **hsa.get_method(name).examples()[0]):
        given = dict(attention_mask=mask, position_ids=positions(mask))
        batch = run(model, dict(input_ids=ids, **given))
        for row, single in enumerate(singles):
            alone = run(model, dict(input_ids=single))[0]
            assert (batch[row][mask[row].bool()] - alone).abs().max() <= tolerance("bert")
        noisy = torch.where(mask.bool(), ids, tokens(4, 111, seed=9))
        again = run(model, dict(input_ids=noisy, **given))
    assert torch.equal(batch[mask.bool()], again[mask.bool()])


@pytest.mark.parametrize("family", [n for n in ENCODERS if n not in TEXT])
def test_batch_equals_loop(family: str) -> None:
    model, given = ENCODERS[family](), inputs(family, batch=3)
    with hsa.patch(model, strict=True, **WINDOWED):
        batch = run(model, given)
        rows = [run(model, {k: v[i : i + 1] for k, v in given.items()}) for i in range(3)]
    if family in ("clip", "siglip"):
        # Texts first, then images.
        rows = [torch.cat([r[:1] for r in rows]), torch.cat([r[1:] for r in rows])]
    assert (batch - torch.cat(rows)).abs().max() <= tolerance(family)


# ------------------------------------------------------------------ what the tokens are


@pytest.mark.parametrize("family", SPECIAL)
def test_images_and_clips_are_known_by_their_grid(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    cls = METHODS.get("sliding_window")
    own = cls.pattern
    monkeypatch.setattr(cls, "pattern", lambda self, q, k, ctx: (seen.append(ctx.layout), own(self, q, k, ctx))[1])
    monkeypatch.setattr(cls, "static", False)
    model = ENCODERS[family]()
    with hsa.patch(model, strict=True, **WINDOWED):
        run(model, inputs(family))
    grid = {"vit": (1, *GRID), "deit": (1, *GRID), "videomae": CLIP}.get(family, (1, 7, 9))
    assert seen == [TokenLayout.video(*grid, text_before=SPECIAL[family])] * 2


def test_other_numbers_of_tokens_are_text() -> None:
    hints = Hints(before=1, last=(2, 1, 3, 5))
    assert hints.layout(2, 16) == TokenLayout.video(1, 3, 5, text_before=1)
    for batch, n in ((2, 15), (2, 17), (1, 16)):
        assert hints.layout(batch, n) == TokenLayout.bidirectional(n)
    assert Hints().layout(1, 5) == TokenLayout.bidirectional(5)


def test_grid_is_known_only_with_certainty() -> None:
    import transformers as T

    for family in ("vit", "clip", "videomae"):
        assert isinstance(patch_embedding(getattr(ENCODERS[family](), "vision_model", ENCODERS[family]())), nn.Module)
    # Hides and shuffles patches; no convolution; text.
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32)
    assert patch_embedding(T.ViTMAEModel(T.ViTMAEConfig(**sizes))) is None
    assert patch_embedding(ENCODERS["bert"]()) is None
    text = ENCODERS["bert"]()
    with hsa.patch(text, **WINDOWED) as patch, pytest.raises(ValueError, match="`owner` must cut images into patches"):
        watch_grid(patch, text)


def test_radial_runs_on_a_clip() -> None:
    model = ENCODERS["videomae"]()
    with hsa.patch(model, "radial", block_size=16, min_tokens=0, strict=True) as patch:
        run(model, inputs("videomae"))
    assert all(r.sparse_calls == 1 for r in patch.report().layers)


# ------------------------------------------------------------------ cross-attention


@torch.no_grad()
def test_cross_attention_is_untouched() -> None:
    """Also where it has as many keys as queries, so that no size tells it apart, and in a module that does both."""
    model, hidden, other = ENCODERS["bart"](), torch.randn(1, LENGTH, 32), torch.randn(1, LENGTH, 32)
    cross = [m for n, m in model.named_modules() if n.endswith("encoder_attn")]
    both = model.encoder.layers[0].self_attn
    modules = [*cross, both]
    dense = [m(hidden, key_value_states=other)[0] for m in modules]
    alone = both(hidden)[0]
    with hsa.patch(model, **WINDOWED) as patch:
        assert not any(STATE_ATTRIBUTE in m.__dict__ for m in cross)
        assert len(cross) == 2 and not any("encoder_attn" in name for name in patch.session.records)
        again = [m(hidden, key_value_states=other)[0] for m in modules]
        # The positional form says the same.
        again.append(both(hidden, other)[0])
        assert not any(r.sparse_calls or r.reasons for r in patch.report().layers)
        assert not torch.equal(both(hidden)[0], alone)
    assert all(torch.equal(a, b) for a, b in zip([*dense, dense[-1]], again, strict=True))


def test_generation_of_an_encoder_decoder_with_every_key_kept() -> None:
    import transformers as T

    config = ENCODERS["bart"]().config
    torch.manual_seed(0)
    model = T.BartForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    ids, mask, _ = padded([33, 61], "right")
    given = dict(attention_mask=mask, max_new_tokens=5, do_sample=False)
    dense = model.generate(ids, **given)
    with hsa.patch(model, **WHOLE) as patch:
        assert torch.equal(model.generate(ids, **given), dense)
    by_name = {r.name: r for r in patch.report().layers}
    assert by_name["BartEncoder.layers.0.self_attn"].sparse_calls == 1
    assert by_name["BartDecoder.layers.0.self_attn"].reasons == {"decoding: fewer than 16 queries": 5}


# ------------------------------------------------------------------ training and compiling


def test_gradients_equal_those_under_the_mask_with_and_without_checkpointing() -> None:
    cls = hsa.get_method("sliding_window")
    params = dict(window=9, sink=2, block_size=16)
    changes = dict(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    other = masked("bert", cls(**params))
    model, given = ENCODERS["bert"](None, **changes).train(), inputs("bert")
    other(**given).last_hidden_state.square().sum().backward()
    scale = max(float(p.grad.abs().max()) for p in other.parameters() if p.grad is not None)
    found = []
    with hsa.patch(model, "sliding_window", min_tokens=0, strict=True, **params):
        for checkpoint in (False, True):
            if checkpoint:
                model.gradient_checkpointing_enable()
            model.zero_grad()
            model(**given).last_hidden_state.square().sum().backward()
            found.append([None if p.grad is None else p.grad.clone() for p in model.parameters()])
    for (name, p), one, two in zip(other.named_parameters(), *found, strict=True):
        if p.grad is not None:
            assert torch.equal(one, two), name
            assert (one - p.grad).abs().max() <= tolerance("bert") * scale, name


@torch.no_grad()
def test_compiled_bert_is_one_graph(fresh_compiler: None) -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    model, counter = ENCODERS["bert"](num_hidden_layers=1), CompileCounterWithBackend("aot_eager")
    with hsa.patch(model, strict=True, **WINDOWED) as patch:
        compiled = torch.compile(model, fullgraph=True, backend=counter)
        for lengths in ([61, 111, 40], [64, 90, 111]):
            ids, mask, _ = padded(lengths, "right")
            given = dict(input_ids=ids, attention_mask=mask)
            valid = mask.bool()
            want = run(model, given)[valid]
            torch.testing.assert_close(output(compiled, given)[valid], want, atol=2e-5, rtol=2e-5)
        assert counter.frame_count == 1
        assert [r.sparse_calls for r in patch.report().layers] == [4]


@torch.no_grad()
def test_compiled_image_model_knows_its_grid(fresh_compiler: None) -> None:
    model, given = ENCODERS["vit"](num_hidden_layers=1), inputs("vit")
    with hsa.patch(model, "radial", block_size=16, min_tokens=0, strict=True):
        want = run(model, given)
        got = output(torch.compile(model, fullgraph=True, backend="eager"), given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@torch.no_grad()
def test_compiled_calls_without_a_plan_are_dense(fresh_compiler: None) -> None:
    model, given = ENCODERS["modernbert"](), inputs("modernbert")
    with hsa.patch(model, **WINDOWED) as patch:
        want = run(model, given)
        got = output(torch.compile(model, fullgraph=True, backend="eager"), given)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)
    assert "layer's own mask (counted once per compiled graph)" in reasons(patch)[1]


# ------------------------------------------------------------------ guards


HOLE = torch.ones(2, 111)
HOLE[0, 5] = 0
STRICT = {
    "hole": (dict(attention_mask=HOLE), "padding between valid tokens"),
    "tensor": (
        dict(attention_mask=torch.ones(2, 1, 111, 111, dtype=torch.bool).tril()),
        "mask given as a Tensor: mask that differs from query to query",
    ),
}


@pytest.mark.parametrize("case", STRICT)
def test_strict_raises_where_sparse_is_given_up(case: str) -> None:
    more, reason = STRICT[case]
    model, given = ENCODERS["bert"](), {**inputs("bert"), **more}
    dense = run(model, given)
    with hsa.patch(model, **WINDOWED) as patch:
        assert torch.equal(run(model, given), dense)
    assert reasons(patch) == [{reason: 1}] * 2
    with hsa.patch(model, strict=True, **WINDOWED), pytest.raises(hsa.DenseFallback, match=reason):
        run(model, given)


def test_dropout_and_attention_weights_stay_dense() -> None:
    model, given = ENCODERS["bert"]("eager"), inputs("bert")
    with hsa.patch(model, **WINDOWED) as patch:
        out = model(**given, output_attentions=True)
        model.train()(**given)
    assert [a.shape for a in out.attentions] == [(2, 4, 111, 111)] * 2
    assert reasons(patch) == [{"output_attentions=True": 1, "dropout of 0.1 on the attention weights": 1}] * 2


def test_a_mask_against_the_module_is_dense() -> None:
    """What a call sees must be said alike by its mask and by what an implementation does without one."""
    from transformers import masking_utils as mu

    model = ENCODERS["bert"]()
    with hsa.patch(model, **WINDOWED) as patch:
        module = model.encoder.layer[0].attention.self
        q = torch.randn(2, 4, 20, 8)
        attend = AttentionInterface()[model.config._attn_implementation]
        both, past = mask_spec(mu.bidirectional_mask_function), mask_spec()
        for mask, causal in ((past, None), (both, True), (None, None), (both, None), (past, True)):
            attend(module, q, q, q, mask, **({} if causal is None else {"is_causal": causal}))
        attend(module, q, q.repeat_interleave(2, 2), q.repeat_interleave(2, 2), None)
    layer = patch.report().layers[0]
    assert layer.sparse_calls == 3
    assert layer.reasons == {
        "causal mask in a layer with is_causal=False": 1,
        "bidirectional mask in a causal layer": 1,
        "2 x 20 queries for 2 x 40 keys": 1,
    }


REFUSED = {
    "causal method": ("bert", "vertical_slash", hsa.MethodDoesNotApply, "needs a causal layout; BertModel"),
    "no grid": ("bert", "radial", hsa.MethodDoesNotApply, "needs exactly one video segment"),
    "images": ("vit", "vertical_slash", hsa.MethodDoesNotApply, "needs a causal layout; ViTModel"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_methods_for_other_layouts_are_refused(case: str) -> None:
    family, name, error, said = REFUSED[case]
    model = ENCODERS[family]()
    before = state_of(model)
    with pytest.raises(error, match=said):
        hsa.patch(model, name)
    assert_same_state(before, state_of(model))


@pytest.mark.parametrize("family", ["whisper", "clip"])
def test_a_causal_method_runs_where_a_model_is_causal(family: str) -> None:
    model, given = ENCODERS[family](), inputs(family)
    with hsa.patch(model, "vertical_slash", vertical=4, slash=6, block_size=16, min_tokens=0) as patch:
        run(model, given)
    for layer in patch.report().layers:
        causal = "Decoder" in layer.name or "Text" in layer.name
        assert layer.sparse_calls == causal
        assert causal or "vertical_slash needs a causal layout" in next(iter(layer.reasons))
    with hsa.patch(model, "vertical_slash", min_tokens=0, strict=True), pytest.raises(hsa.DenseFallback):
        run(model, given)


def models_refused() -> dict[str, tuple[Any, str]]:
    import transformers as T

    t5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    llama = FAMILIES.get("llama").tiny()[0]
    fnet = T.FNetConfig(vocab_size=20, hidden_size=16, num_hidden_layers=1, intermediate_size=16)
    bert = ENCODERS["bert"]()
    return {
        "linear": (nn.Linear(2, 2), "not a transformers model"),
        "llama": (llama, "family llama"),
        "t5": (T.T5Model(T.T5Config(**t5)), "position bias"),
        "fnet": (T.FNetModel(fnet), "no bidirectional self-attention"),
        "bert": (bert, "BertModel does not let"),
    }


@pytest.mark.parametrize("case", ["linear", "llama", "t5", "fnet", "bert"])
def test_other_models_are_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, said = models_refused()[case]
    if case == "bert":
        monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    answer = FAMILIES.get("encoder").targets(model)
    assert isinstance(answer, Decline) and said in answer.reason


def test_a_decoder_is_of_the_family_llama() -> None:
    import transformers as T

    config = ENCODERS["bert"]().config
    config.is_decoder = True
    assert find_family(T.BertLMHeadModel(config))[0] == "llama"


# ------------------------------------------------------------------ by name


@pytest.mark.parametrize("name", ["sliding_window", "vertical_slash"])
def test_short_texts_by_name_are_the_models_own_attention(name: str, caplog: pytest.LogCaptureFixture) -> None:
    model, given = ENCODERS["bert"](f"hsa:{name}"), inputs("bert")
    assert torch.equal(run(model, given), run(ENCODERS["bert"](), given))
    assert [r.layer for r in native.report(model).layers] == [0, 1]
    said = "needs causal attention: BertSelfAttention stays dense" in caplog.text
    assert said == (name == "vertical_slash")


@pytest.mark.parametrize("family", ["bert", "vit", "bart"])
def test_by_name_is_as_patched(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what a name cannot know: grids of images, and which of a class is self-attention where it does both."""
    from hf_sparse_attn import policy

    whole = policy.Policy
    monkeypatch.setattr(policy, "Policy", lambda **kwargs: whole(**{"min_tokens": 0, **kwargs}))
    window = METHODS.get("sliding_window")
    monkeypatch.setitem(METHODS._entries, "sliding_window", lambda **kw: window(window=9, sink=2, block_size=16))
    model, usual, given = ENCODERS[family]("hsa:sliding_window"), ENCODERS[family](), inputs(family)
    sparse = run(model, given)
    layers = native.report(model).layers
    assert [(r.layer, r.sparse_calls) for r in layers] == [(0, 1), (1, 1)]
    with hsa.patch(usual, window(window=9, sink=2, block_size=16), min_tokens=0):
        patched = run(usual, given)
    assert torch.equal(sparse, patched) == (family == "bert")
