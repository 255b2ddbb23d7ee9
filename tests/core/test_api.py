"""The functional form, the registries and the policy: what they refuse, and with which words."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, replace

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Method, Segment, TokenLayout
from hf_sparse_attn.backend import auto_order, choose_backend
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS, Registry
from hf_sparse_attn.selection import merge_by_lse
from hf_sparse_attn.session import Session
from tests.support.patterns import random_inputs, random_pattern

CPU = torch.device("cpu")


def qkv(n: int = 64, heads: int = 4, kv_heads: int = 2, dim: int = 16):
    return random_inputs(BlockPattern.dense(n, n, True), heads=heads, kv_heads=kv_heads, dim=dim)


def test_a_bare_call_is_causal_text() -> None:
    q, k, v = qkv()
    out = hsa.attention(q, k, v, "dense")
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, want)


def test_scale_comes_from_the_argument_then_the_context() -> None:
    q, k, v = qkv()
    ctx = Context(TokenLayout.causal(64), num_heads=4, num_kv_heads=2, head_dim=16, scale=0.5)
    half = hsa.attention(q, k, v, "dense", ctx)
    assert torch.equal(half, hsa.attention(q, k, v, "dense", scale=0.5))
    assert not torch.equal(half, hsa.attention(q, k, v, "dense", ctx, scale=0.25))


def test_a_ready_pattern_with_log_sum_exp() -> None:
    q, k, v = qkv(130)
    pattern = random_pattern(130, 130, columns=5)
    out, lse = hsa.attention(q, k, v, pattern, return_lse=True)
    want = hsa.attention(q, k, v, pattern, backend="torch_reference", return_lse=True)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])


def test_merging_two_halves_is_the_whole() -> None:
    q, k, v = qkv(96)
    mask = torch.rand(1, 1, 96, 96) < 0.5
    mask[:, :, 7] = False
    first, second = mask & (torch.arange(96) < 40), mask & (torch.arange(96) >= 40)
    halves = [
        hsa.attention(q, k, v, BlockPattern.from_token_mask(m, 16, 16), return_lse=True) for m in (first, second)
    ]
    out, lse = merge_by_lse(*halves)
    want = hsa.attention(q, k, v, BlockPattern.from_token_mask(mask, 16, 16), return_lse=True)
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want[1])
    assert not out[:, :, 7].any() and bool((lse[:, :, 7] == -torch.inf).all())


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"q": torch.zeros(1, 4, 64)}, ValueError, r"`q` must be \[batch, heads, tokens, dim\], got shape"),
        ({"q": [1]}, TypeError, "`q` must be a tensor"),
        ({"k": torch.zeros(1, 2, 64, 16).long()}, TypeError, "`k` must be floating point"),
        ({"v": torch.zeros(1, 2, 64, 16).half()}, ValueError, "`v` must be torch.float32 on cpu like `q`"),
        ({"v": torch.zeros(1, 2, 63, 16)}, ValueError, "`v` must be"),
        ({"k": torch.zeros(1, 2, 64, 8)}, ValueError, "`k` must have the batch and dim"),
        ({"k": torch.zeros(1, 3, 64, 16), "v": torch.zeros(1, 3, 64, 16)}, ValueError, "heads that divides 4, got 3"),
        ({"method": "nothing"}, ValueError, "`method` must be one of block_topk, dense, .*; got 'nothing'"),
        ({"method": 7}, TypeError, "`method` must be a name or a Method, got 7"),
        ({"method": "radial"}, hsa.MethodDoesNotApply, "radial needs a bidirectional layout"),
        ({"backend": "cuda"}, ValueError, "`backend` must be one of .*torch_gather.*; got 'cuda'"),
        ({"ctx": Context(TokenLayout.causal(63))}, ValueError, "`ctx` must describe 64 queries and 64 keys, got 63"),
        (
            {"method": random_pattern(64, 65)},
            ValueError,
            "`pattern` must be for 64 queries and 64 keys, got 64 and 65",
        ),
        ({"method": random_pattern(64, 64, heads=3)}, ValueError, "`pattern` must have heads 1 or 4, got 3"),
        ({"softcap": -1.0}, ValueError, "`softcap` must be 0 or more, got -1.0"),
        ({"sinks": torch.zeros(3)}, ValueError, r"`sinks` must be one logit per query head \[4\], got shape \[3\]"),
        ({"k": torch.zeros(1, 2, 60, 16), "v": torch.zeros(1, 2, 60, 16)}, ValueError, "at least as many tokens"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_calls_are_named(change: dict, error: type[Exception], message: str) -> None:
    q, k, v = qkv()
    with pytest.raises(error, match=message):
        hsa.attention(**{"q": q, "k": k, "v": v, "method": "dense", **change})


@pytest.mark.parametrize("backend", ["torch_reference", "torch_gather"])
def test_softcap_and_sinks(backend: str) -> None:
    q, k, v = (x.double() for x in qkv())
    sinks = torch.linspace(-1, 2, q.shape[1], dtype=torch.float64)
    pattern = random_pattern(q.shape[2], k.shape[2], heads=q.shape[1], columns=5)
    out, lse = hsa.attention(q, k, v, pattern, backend=backend, softcap=0.7, sinks=sinks, return_lse=True)
    group = q.shape[1] // k.shape[1]
    logits = 0.7 * torch.tanh(q @ k.repeat_interleave(group, 1).mT * q.shape[3] ** -0.5 / 0.7)
    logits = logits.masked_fill(~pattern.to_dense(), -torch.inf)
    logits = torch.cat([logits, sinks.view(1, -1, 1, 1).expand(*logits.shape[:3], 1)], -1)
    assert torch.allclose(lse, logits.logsumexp(-1), atol=1e-12)
    assert torch.allclose(out, logits.softmax(-1)[..., :-1] @ v.repeat_interleave(group, 1), atol=1e-12)


def test_softcap_gradients() -> None:
    pattern = random_pattern(20, 33, block_q=16, block_k=16, heads=2, columns=5)
    tensors = [
        torch.randn(1, h, n, 5, dtype=torch.float64, requires_grad=True) for h, n in ((2, 20), (1, 33), (1, 33))
    ]

    def both(q, k, v):
        return hsa.attention(q, k, v, pattern, backend="torch_gather", softcap=0.7, return_lse=True)

    assert torch.autograd.gradcheck(
        lambda *x: both(*x)[0].square() + both(*x)[1][..., None].nan_to_num(0, 0, 0), tensors
    )


def test_softcap_of_the_context_is_used() -> None:
    q, k, v = qkv()
    ctx = replace(hsa.Context.for_tensors(q, k), softcap=0.1)
    capped = hsa.attention(q, k, v, "dense", softcap=0.1)
    assert torch.equal(hsa.attention(q, k, v, "dense", ctx), capped)
    assert not torch.equal(hsa.attention(q, k, v, "dense", ctx, softcap=0.0), capped)


def test_an_explicit_backend_never_falls_back() -> None:
    q, k, v = qkv()
    with pytest.raises(hsa.BackendUnavailable, match="`backend` 'triton_block_sparse' cannot run this call: "):
        hsa.attention(q, k, v, "dense", backend="triton_block_sparse")


def test_auto_names_every_reason_when_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in auto_order("cpu"):
        monkeypatch.setattr(BACKENDS.get(name), "why_not", staticmethod(lambda *a: "switched off"))
    names = ("cpp_decode", "torch_folded", "cpp_block_sparse", "torch_gather")
    both = "no backend can run this call: " + "; ".join(f"{name}: switched off" for name in names)
    with pytest.raises(hsa.BackendUnavailable, match=both):
        choose_backend("auto", None, *qkv(), needs_grad=False)


@pytest.mark.parametrize(
    "build, error, message",
    [
        (lambda: TokenLayout.causal(0), ValueError, "`n` must be at least 1, got 0"),
        (lambda: TokenLayout.causal(3.5), TypeError, "`n` must be an int, got 3.5"),
        (lambda: TokenLayout.video(3, 0, 4), ValueError, "`height` must be at least 1"),
        (lambda: TokenLayout.video(3, 4, 4, text_after=-1), ValueError, "`text_after` must be at least 0"),
        (lambda: TokenLayout.segments([], causal=True), TypeError, "non-empty sequence of Segment"),
        (lambda: TokenLayout.causal(5).continued(6), ValueError, "`query_start` must be at most the number of keys 5"),
        (lambda: Segment("audio", 4), ValueError, "`kind` must be 'text' or 'video'"),
        (lambda: Segment("video", 5, (1, 2, 2)), ValueError, r"frames \* height \* width = 4, got 5"),
        (lambda: Segment("video", 4), ValueError, "`grid` of a video segment"),
        (lambda: Segment("text", 4, (1, 2, 2)), ValueError, "`grid` must be None for a text segment"),
        (lambda: Context("causal"), TypeError, "`layout` must be a TokenLayout, got str"),
        (lambda: Context(TokenLayout.causal(4), num_kv_heads=3), ValueError, "`num_kv_heads` must divide"),
        (lambda: Policy(dense_layers=-1), ValueError, "`dense_layers` must be a number"),
        (lambda: Policy(dense_layers="first"), ValueError, "`dense_layers` must be a number"),
        (lambda: Policy(dense_steps=1.5), ValueError, "`dense_steps` must be shares between 0 and 1"),
        (lambda: Policy(dense_steps=(0.1, 0.2, 0.3)), ValueError, r"one share or \(start, end\)"),
        (lambda: Policy(min_tokens="few"), ValueError, "`min_tokens` must be 'auto' or a number"),
    ],
)
def test_bad_descriptions_are_named(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_video_layouts_with_text() -> None:
    layout = TokenLayout.video(2, 3, 4, text_before=5, text_after=6)
    assert (layout.kv_len, layout.q_len, layout.is_causal) == (35, 35, False)
    assert layout.video_part is not None and layout.video_part[0] == 5
    assert str(layout) == "bidirectional 5 text + 2x3x4 + 6 text"
    two = TokenLayout.segments([Segment("video", 4, (1, 2, 2))] * 2, causal=False)
    assert two.video_part is None


@pytest.mark.parametrize(
    "steps, share, dense",
    [
        (4, (0.1, 0.1), {0, 3}),
        (50, 0.24, set(range(12))),
        (10, (0.3, 0.0), {0, 1, 2}),
        (1, 0.01, {0}),
        (5, None, set()),
    ],
)
def test_dense_steps_are_shares_of_any_schedule(steps: int, share, dense: set[int]) -> None:
    policy = Policy(dense_steps=share, min_tokens=0)
    contexts = [Context(TokenLayout.causal(64), step=s, num_steps=steps) for s in range(steps)]
    assert {c.step for c in contexts if policy.why_dense(c, CPU)} == dense


@pytest.mark.parametrize("layers, dense", [(2, {0, 1}), ([3, 0], {0, 3}), (None, set()), (0, set())])
def test_dense_layers(layers, dense: set[int]) -> None:
    policy = Policy(dense_layers=layers, min_tokens=0)
    contexts = [Context(TokenLayout.causal(64), layer=i, num_layers=4) for i in range(4)]
    assert {c.layer for c in contexts if policy.why_dense(c, CPU) == "dense_layers"} == dense


def test_auto_keeps_short_calls_dense_and_decoding_always_is() -> None:
    auto, forced = Policy(), Policy(min_tokens=0)
    short = Context(TokenLayout.causal(64))
    assert "fewer than" in str(auto.why_dense(short, CPU)) and forced.why_dense(short, CPU) is None
    assert auto.why_dense(Context(TokenLayout.causal(9000)), CPU) is None
    decode = Context(TokenLayout.causal(9000).continued(8999))
    assert "decoding" in str(forced.why_dense(decode, CPU))


def test_registries_are_found_by_discovery() -> None:
    assert {"dense", "sliding_window", "vertical_slash", "radial", "block_topk"} <= set(METHODS.names())
    assert {"llama", "wan"} <= set(FAMILIES.names())
    assert {"torch_reference", "torch_gather", "flex_attention"} <= set(BACKENDS.names())


def test_registering() -> None:
    with pytest.raises(ValueError, match="lower-case letters"):
        hsa.register_method("My Method")
    with pytest.raises(TypeError, match="must be a subclass"):
        hsa.register_method("mine")(int)
    with pytest.raises(ValueError, match=r"must be free, got 'dense', taken by hf_sparse_attn.methods.dense.Dense"):

        @hsa.register_method("dense")
        @dataclass(frozen=True, kw_only=True)
        class Mine(Method):
            pass

    fresh: Registry[type] = Registry("thing", "hf_sparse_attn.methods", lambda name, entry: None)
    first = fresh.register("a")(type("A", (), {}))
    assert fresh.register("a")(type("A", (), {})) is not first


def test_a_broken_file_is_not_taken_for_a_missing_package(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "things_under_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "fine.py").write_text("")
    (package / "lacking.py").write_text("import a_package_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry: Registry[type] = Registry("thing", "things_under_test", lambda name, entry: None)
    assert registry.names() == [] and registry.missing == {"lacking": "needs the package a_package_nobody_has"}
    (package / "broken.py").write_text("from hf_sparse_attn.method import NoSuchName")
    broken: Registry[type] = Registry("thing", "things_under_test", lambda name, entry: None)
    with pytest.raises(ImportError, match="NoSuchName"):
        broken.names()


def test_a_patched_model_is_not_pickled() -> None:
    session = Session(hsa.get_method("dense")(), Policy(), "auto", strict=False)
    made = Patch("none", session, [torch.nn.Linear(1, 1)], torch.nn.Linear(1, 1))
    with pytest.raises(TypeError, match="unpatch"):
        pickle.dumps(made)


@pytest.mark.parametrize(
    "what", [torch.nn.Linear(2, 2), object(), None, "llama"], ids=["module", "object", "none", "str"]
)
def test_what_no_family_knows_is_refused_with_every_reason(what: object) -> None:
    with pytest.raises(
        TypeError, match=r"`model` must be a model or pipeline of a known family, got .*llama: .*wan: "
    ):
        hsa.patch(what, "sliding_window")


def test_unknown_parameters_list_the_known_ones() -> None:
    model, _ = FAMILIES.get("llama").tiny()
    before = dict(model.__dict__)
    with pytest.raises(TypeError, match="takes the parameters window, sink, block_size; got windows"):
        hsa.patch(model, "sliding_window", windows=3)
    with pytest.raises(TypeError, match="`params` must be empty"):
        hsa.patch(model, hsa.get_method("dense")(), window=3)
    with pytest.raises(hsa.MethodDoesNotApply, match=r"`method` 'radial' needs a bidirectional layout .*family llama"):
        hsa.patch(model, "radial")
    with pytest.raises(ValueError, match="must be patched, got a LlamaForCausalLM without a patch"):
        hsa.unpatch(model)
    assert model.__dict__ == before


def test_a_report_names_layers_that_share_an_index() -> None:
    session = Session(hsa.get_method("dense")(), Policy(), "auto", strict=False)
    made = Patch("wan", session, [torch.nn.Linear(1, 1)], torch.nn.Linear(1, 1))
    session.record("transformer.blocks.0.attn1", 0)
    assert "transformer" not in str(made.report())
    session.record("transformer_2.blocks.0.attn1", 0).dense_reasons["method dense"] += 3
    text = str(made.report())
    assert (
        "transformer.blocks.0.attn1" in text and "transformer_2.blocks.0.attn1" in text and "3x method dense" in text
    )
    assert made.report().density == 1.0 and made.report().to_dict()["layers"][1]["dense_calls"] == 3
