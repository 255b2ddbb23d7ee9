"""Family llama: what is read from a mask, and every reason for which a layer stays dense or a model is refused."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from transformers import masking_utils as mu

import hf_sparse_attn as hsa
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE
from hf_sparse_attn.hosts.transformers_hook import attend_sparse
from hf_sparse_attn.hosts.transformers_mask import packed_spans
from hf_sparse_attn.hosts.transformers_rules import with_cu_seq_lens
from hf_sparse_attn.method import Decline
from hf_sparse_attn.registry import FAMILIES as REGISTERED
from hf_sparse_attn.span import Span
from tests.support.tiny_lm import FAMILIES, WINDOW, mask_spec, padded, positions, tiny_vl, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

SPARSE: dict[str, Any] = dict(method="sliding_window", window=1 << 20, block_size=32, min_tokens=0)


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def reasons(patch) -> list[dict[str, int]]:
    return [layer.reasons for layer in patch.report().layers]


# ------------------------------------------------------------------ reading masks


def packing(*lengths: int) -> Any:
    place = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = mu.find_packed_sequence_indices(place)
    join = getattr(mu, "packed_sequence_compatibility_function", None)
    if join is not None:
        return join(mu.causal_mask_function, place, numbers)
    return mu.and_masks(mu.causal_mask_function, mu.packed_sequence_mask_function(numbers))


def rows(*texts: str) -> torch.Tensor:
    return torch.tensor([[c == "x" for c in text] for text in texts])


def blocks(text: str, batch: int = 2) -> torch.Tensor:
    """Numbers of image blocks of a row, "." for text."""
    return torch.tensor([[-1 if c == "." else int(c) for c in text]] * batch)


def union(more: Any) -> Any:
    return mu.or_masks(mu.causal_mask_function, more)


def odd(batch, head, q, k):
    return (q - k) % 2 == 0


STATIC = dict(q=4, kv=10, q_offset=torch.tensor(3))
# Every one is turned back into a token mask and compared with what transformers makes of the same arguments.
PLANS = {
    "whole": mask_spec(),
    "chunk": mask_spec(q=5, kv=20, q_offset=15),
    "static cache": mask_spec(**STATIC),
    "offset keys": mask_spec(q=6, kv=10, q_offset=10, kv_offset=6),
    "left": mask_spec(q=6, kv=6, padding=rows("xxxxxx", "..xxxx")),
    "right": mask_spec(q=6, kv=6, padding=rows("xxx...", "xxxxxx")),
    "both": mask_spec(q=6, kv=6, padding=rows(".xxx..", "xxxxxx", ".xxx.."), batch=3),
    "empty row": mask_spec(q=6, kv=6, padding=rows("......", "xxxxxx")),
    "left, chunk": mask_spec(q=3, kv=6, q_offset=3, padding=rows("xxxxxx", "....xx")),
    "left, static": mask_spec(**STATIC, padding=rows("xxxxxxx", "..xxxxx")),
    "right, chunk": mask_spec(q=3, kv=6, q_offset=3, padding=rows("xxxx..", "xxxxxx")),
    "packed": mask_spec(packing(3, 7, 10), batch=1),
    "wide window": mask_spec(mu.sliding_window_causal_mask_function(20)),
    "wide chunks": mask_spec(mu.chunked_causal_mask_function(20, torch.zeros(2, dtype=torch.long))),
    "bidirectional": mask_spec(mu.bidirectional_mask_function),
    "bidirectional, padded": mask_spec(mu.bidirectional_mask_function, q=6, kv=6, padding=rows("xxx...", "..xxxx")),
    "bidirectional, wide window": mask_spec(mu.sliding_window_bidirectional_mask_function(19)),
    "made bidirectional": mask_spec(mu.or_masks(mu.causal_mask_function, lambda *args: torch.tensor(True))),
    "no image": mask_spec(union(mu.blockwise_overlay(blocks("....................")))),
    "images of one token": mask_spec(union(mu.blockwise_overlay(blocks("..0..1..............")))),
    "image in the past": mask_spec(union(mu.blockwise_overlay(blocks("..0000..............", 1))), 5, 20, 15, batch=1),
    "no image, wide window": mask_spec(
        mu.and_masks(union(mu.blockwise_overlay(blocks("." * 20))), mu.sliding_window_overlay(20))
    ),
    "window or past": mask_spec(
        mu.or_masks(mu.sliding_window_causal_mask_function(20), mu.and_masks(mu.causal_mask_function, odd))
    ),
    "window over packed": mask_spec(mu.and_masks(packing(3, 7, 10), mu.sliding_window_overlay(10)), batch=1),
}


@pytest.mark.parametrize("case", list(PLANS))
def test_plan_is_the_mask_of_transformers(case):
    mask = PLANS[case]
    plan, want = mask.plan, mask.dense("sdpa", torch.device("cpu"))
    assert plan.reason is None
    got, valid = torch.zeros_like(want), torch.zeros_like(want[..., :1])
    for span in plan.spans:
        n, m = span.q[1] - span.q[0], span.k[1] - span.k[0]
        layout = TokenLayout.causal(m).continued(m - n)
        causal = hsa.BlockPattern.dense(layout.q_len, layout.kv_len, plan.causal, block=4).to_dense()[0, 0]
        for row in span.rows:
            got[row, 0, slice(*span.q), slice(*span.k)] = causal
            valid[row, 0, slice(*span.q)] = True
    # Padding queries are left out of the spans; what transformers lets them read is of no account.
    assert torch.equal(got, want & valid)
    padding = mask.wanted["attention_mask"]
    if padding is not None:
        first = plan.kv_end - mask.shape[2]
        assert torch.equal(valid[:, 0, :, 0], padding[:, first : plan.kv_end])
    else:
        assert valid.all()


NO_PLANS = {
    "holes": (mask_spec(q=6, kv=6, padding=rows("xx.xxx", "xxxxxx")), "padding between", False),
    "nothing valid": (mask_spec(q=2, kv=2, padding=rows("..", "..")), "no valid token", False),
    "bidirectional, cached": (
        mask_spec(mu.bidirectional_mask_function, q=5),
        "bidirectional mask of 5 queries",
        False,
    ),
    "bidirectional window": (
        mask_spec(mu.sliding_window_bidirectional_mask_function(18)),
        "own sliding window of 19",
        True,
    ),
    "image": (mask_spec(union(mu.blockwise_overlay(blocks("..00................")))), "see ahead", False),
    "image, packed": (
        mask_spec(mu.or_masks(packing(3, 17), mu.blockwise_overlay(blocks("..00................", 1))), batch=1),
        "see ahead",
        False,
    ),
    "image and more": (
        mask_spec(union(mu.and_masks(mu.blockwise_overlay(blocks("." * 20)), odd))),
        "unknown kind (odd)",
        False,
    ),
    "two block maps": (
        mask_spec(union(mu.and_masks(*[mu.blockwise_overlay(blocks("." * 20))] * 2))),
        "unknown kind (two kinds of blocks)",
        False,
    ),
    "two unions": (mask_spec(mu.and_masks(union(odd), union(odd))), "unknown kind", False),
    "window or image": (
        mask_spec(mu.or_masks(mu.sliding_window_causal_mask_function(19), mu.blockwise_overlay(blocks("." * 20)))),
        "own sliding window of 19",
        True,
    ),
    "not made bidirectional": (
        mask_spec(mu.or_masks(mu.causal_mask_function, lambda *args: args[2] >= 0)),
        "unknown kind",
        False,
    ),
    "unknown": (mask_spec(mu.and_masks(mu.causal_mask_function, odd)), "unknown kind (odd)", False),
    "union": (mask_spec(mu.or_masks(mu.causal_mask_function, odd)), "unknown kind", False),
    "window": (mask_spec(mu.sliding_window_causal_mask_function(19)), "own sliding window of 19", True),
    "chunks": (mask_spec(mu.chunked_causal_mask_function(19, torch.zeros(2))), "own chunks of 19", True),
    "packed, padded": (mask_spec(packing(3, 17), padding=rows("x" * 20)), "packed sequences with", False),
    "packed, cached": (mask_spec(packing(3, 7), q=10, kv=20, q_offset=10), "packed sequences with", False),
    "two packings": (mask_spec(mu.and_masks(packing(3, 17), packing(4, 16)), batch=1), "two packings", False),
    "keys missing": (mask_spec(q=6, kv=10, q_offset=9), "do not fit", False),
}


@pytest.mark.parametrize("case", list(NO_PLANS))
def test_no_plan_and_why(case):
    mask, reason, own = NO_PLANS[case]
    plan = mask.plan
    assert reason in plan.reason
    assert plan.own == own


def test_cu_seq_lens_beside_the_mask():
    q, plan = torch.zeros(1, 2, 20, 8), mask_spec(batch=1).plan
    edges = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
    assert with_cu_seq_lens(plan, "sdpa", q, {}) is plan
    assert "3 sequences" in with_cu_seq_lens(plan, "sdpa", q, {"cu_seq_lens_k": edges}).reason
    both = {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}
    assert with_cu_seq_lens(plan, "flash_attention_2", q, both).spans == (
        Span((0,), (0, 7), (0, 7)),
        Span((0,), (7, 20), (7, 20)),
    )
    cached = {"cu_seq_lens_q": edges - 1, "cu_seq_lens_k": edges}
    assert "cached keys" in with_cu_seq_lens(plan, "flash_attention_2", q, cached).reason


def test_packed_rows_alike_are_one_span():
    assert packed_spans(torch.tensor([[0, 0, 1], [5, 5, 6], [1, 1, 1]])) == (
        Span((0, 1), (0, 2), (0, 2)),
        Span((0, 1), (2, 3), (2, 3)),
        Span((2,), (0, 3), (0, 3)),
    )


def test_mask_counter_of_a_static_cache_is_read_when_the_mask_is_made():
    counter = torch.tensor(3)
    mask = mask_spec(q=4, kv=10, q_offset=counter)
    counter.add_(4)
    assert mask.plan.kv_end == 7


def test_indexing_a_mask_gives_the_tensor():
    mask = mask_spec()
    assert torch.equal(mask[:, 0], mask.dense("sdpa", torch.device("cpu"))[:, 0])
    assert mask.contiguous() is mask.to("cpu") is mask
    tensor, zeros = mask.dense("sdpa", torch.device("cpu")), torch.zeros(2, 1, 20, 20)
    assert mask.dtype == torch.bool and torch.equal(~mask, ~tensor)
    assert torch.equal(zeros + mask, zeros + tensor) and torch.equal(mask + zeros, zeros + tensor)


# ------------------------------------------------------------------ guards


def test_strict_failure_leaves_the_model_usable():
    model, ids, hole = FAMILIES["llama"](), tokens(1, 37), torch.ones(1, 37)
    hole[0, 5] = 0
    with hsa.patch(model, strict=True, **SPARSE) as patch:
        want = logits(model, ids)
        with pytest.raises(hsa.DenseFallback, match=r"layers\.0\.self_attn: padding between valid tokens"):
            logits(model, ids, attention_mask=hole)
        assert torch.equal(logits(model, ids), want)
    assert patch.report().layers[0].reasons == {}


@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt_oss"])
def test_own_window_is_kept_and_is_no_fallback(family):
    model, ids = FAMILIES[family](), tokens(1, 37)
    dense = logits(model, ids)
    with hsa.patch(model, strict=True, **SPARSE) as patch:
        assert torch.allclose(logits(model, ids), dense, atol=1e-4)
    windows = [{f"layer's own sliding window of {WINDOW}": 1}]
    assert reasons(patch) == (windows * 2 if family == "mistral" else [*windows, {}])
    with hsa.patch(model, strict=True, **SPARSE) as patch:
        logits(model, tokens(1, WINDOW))
    assert reasons(patch) == [{}, {}]


@pytest.mark.parametrize("family, feature", [("gpt_oss", "sinks"), ("gemma2", "soft cap")])
def test_sinks_and_soft_caps_are_exact_with_gradients(family, feature):
    model, ids = FAMILIES[family]("eager", sliding_window=256), tokens(2, 37)
    if feature == "soft cap":
        # Small enough to bend the logits of a tiny random model.
        for layer in model.model.layers:
            layer.self_attn.attn_logit_softcapping = 0.05
    found = []
    for sparse in (False, True):
        model.zero_grad()
        if sparse:
            hsa.patch(model, strict=True, **SPARSE)
        out = model(input_ids=ids, labels=ids)
        out.loss.backward()
        grads = [p.grad.clone() for n, p in model.named_parameters() if "self_attn" in n]
        found.append([out.logits.detach(), *grads])
    assert model.config._attn_implementation == "hsa:patched+eager"
    for dense, sparse in zip(*found, strict=True):
        assert (dense - sparse).abs().max() <= 1e-4 * dense.abs().max()


def test_user_mask_is_used_as_given():
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 37)
    mask = torch.ones(1, 1, 37, 37, dtype=torch.bool).tril() & (torch.rand(37, 37) > 0.3) | torch.eye(37).bool()
    dense = logits(model, ids, attention_mask=mask)
    with hsa.patch(model, **SPARSE) as patch:
        assert torch.equal(logits(model, ids, attention_mask=mask), dense)
    assert reasons(patch) == [{"mask given as a Tensor: mask that differs from query to query": 1}] * 2


def test_dropout_and_attention_weights_stay_dense():
    model, ids = FAMILIES["llama"]("eager", attention_dropout=0.1), tokens(1, 37)
    with hsa.patch(model, **SPARSE) as patch:
        out = model(input_ids=ids, output_attentions=True)
        model.train()(input_ids=ids)
    assert [a.shape for a in out.attentions] == [(1, 4, 37, 37)] * 2
    assert reasons(patch) == [{"output_attentions=True": 1, "dropout of 0.1 on the attention weights": 1}] * 2


GUARDS = {
    "no mask": (None, {}, "no mask was described"),
    "tensor": (torch.ones(2, 1, 20, 20), {}, "mask given as a Tensor"),
    "other sizes": (mask_spec(q=20, kv=21, q_offset=1), {}, "mask for [2, 1, 20, 21]"),
    "other batch": (mask_spec(batch=3), {}, "mask for [3, 1, 20, 20]"),
    "not causal": (mask_spec(), {"is_causal": False}, "is_causal=False"),
    "bias": (mask_spec(), {"position_bias": torch.zeros(1)}, "position bias"),
    "paged": (mask_spec(), {"cache": object()}, "paged cache"),
    "scaling": (mask_spec(), {"scaling": torch.ones(1)}, "scaling given as a Tensor"),
    "packing": (mask_spec(), {"cu_seq_lens_k": torch.tensor([0, 9, 20])}, "cu_seq_lens_k"),
}


@pytest.mark.parametrize("case", list(GUARDS))
def test_guards(case):
    mask, kwargs, reason = GUARDS[case]
    model = FAMILIES["llama"]()
    with hsa.patch(model, **SPARSE):
        module = model.model.layers[0].self_attn
        state = module.__dict__[STATE_ATTRIBUTE]
        q, k = torch.randn(2, 4, 20, 8), torch.randn(2, 2, 20, 8)
        assert attend_sparse(state, module, q, k, k, mask, kwargs) is None
        assert any(reason in r for r in state.record.dense_reasons)
        # The window is told by the layer alone: the mask says nothing of it.
        assert attend_sparse(state, module, q, k, k, mask_spec(), {"sliding_window": 19}) is None
        assert attend_sparse(state, module, q, k[:, :, :19], k[:, :, :19], mask_spec(), {}) is None
        assert {"layer's own sliding window of 19", "20 queries for 19 keys"} <= set(state.record.dense_reasons)
        assert attend_sparse(state, module, q, k, k, mask_spec(), {"sliding_window": 20}) is not None
        with pytest.raises(ValueError, match="context parallelism"):
            attend_sparse(state, module, q, k, k, None, {"is_causal": True})


def test_flash_function_sees_its_own_name():
    from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask
    from transformers.modeling_utils import AttentionInterface

    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, attention_mask))
        return query.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_flash", flash)
    AttentionMaskInterface.register("test_flash", flash_attention_mask)
    model, (ids, mask, _) = FAMILIES["llama"](), padded([20, 37], "left")
    model.config._attn_implementation_internal = "test_flash"
    with hsa.patch(model, "dense"):
        assert model.config._attn_implementation == "hsa:patched+test_flash"
        logits(model, ids, attention_mask=mask)
    assert [name for name, _ in seen] == ["test_flash"] * 2
    assert all(torch.equal(given, mask.bool()) for _, given in seen)


def test_pipeline_is_patched_through_its_model():
    import transformers

    model = FAMILIES["llama"]()
    pipeline = transformers.Pipeline.__new__(transformers.TextGenerationPipeline)
    pipeline.model = model
    assert REGISTERED.get("llama").targets(pipeline) == [model.model]


def refused() -> dict[str, tuple[Any, str]]:
    import transformers as T

    small = dict(hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=20)
    t5 = dict(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=20, decoder_start_token_id=0)
    bart = dict(d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2)
    sparse = FAMILIES["llama"]()
    sparse.model.config.model_type = "deepseek_v32"
    return {
        "linear": (nn.Linear(2, 2), "not a transformers model"),
        "text": ("llama", "not a transformers model"),
        "falcon": (T.FalconForCausalLM(T.FalconConfig(**small)), "attention interface"),
        "bert": (T.BertModel(T.BertConfig(**small, intermediate_size=16)), "no causal self-attention"),
        "t5": (T.T5ForConditionalGeneration(T.T5Config(**t5)), "encoder-decoder"),
        "bart": (T.BartModel(T.BartConfig(**bart, vocab_size=20, max_position_embeddings=32)), "encoder-decoder"),
        "sparse": (sparse, "sparse by itself"),
    }


@pytest.mark.parametrize("case", ["linear", "text", "falcon", "bert", "t5", "bart", "sparse"])
def test_other_models_are_refused(case):
    model, reason = refused()[case]
    answer = REGISTERED.get("llama").targets(model)
    assert isinstance(answer, Decline)
    assert reason in answer.reason


def test_class_that_cannot_switch_is_refused(monkeypatch):
    model = FAMILIES["llama"]()
    monkeypatch.setattr(type(model.model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(TypeError, match="LlamaModel does not let"):
        hsa.patch(model, "dense")


def test_switching_while_patched_is_left_and_said(caplog):
    model = FAMILIES["llama"]("sdpa")
    patch = hsa.patch(model, **SPARSE)
    model.set_attn_implementation("eager")
    with caplog.at_level(logging.WARNING):
        patch.remove()
    assert model.config._attn_implementation == "eager"
    assert "set to 'eager'" in caplog.text


# ------------------------------------------------------------------ images and text


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_decoder_of_a_model_of_images_alone(implementation):
    """Patched by itself it is a decoder like others; the vision tower is untouched."""
    model, inputs = tiny_vl(implementation)
    decoder = model.model.language_model

    def outputs():
        with torch.no_grad():
            return model(**inputs).logits, model.generate(**inputs, max_new_tokens=3, do_sample=False)

    before = outputs()
    with hsa.patch(decoder, "dense") as patch:
        assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))
        assert model.config.vision_config._attn_implementation == implementation
        assert model.config.text_config._attn_implementation.startswith("hsa:")
    with hsa.patch(decoder, **SPARSE) as patch:
        assert torch.allclose(before[0], outputs()[0], atol=1e-4)
    assert [r.name for r in patch.report().layers] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert all(r.sparse_calls == 2 for r in patch.report().layers)
    assert all(torch.equal(a, b) for a, b in zip(before, outputs(), strict=True))


def test_positions_helper_numbers_valid_tokens():
    _, mask, _ = padded([2, 4], "left")
    assert positions(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]
