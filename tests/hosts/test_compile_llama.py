"""Patched language models under torch.compile: whole graphs, few of them, numbers and counts as without."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import hf_sparse_attn as hsa
from tests.support.tiny_lm import FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread", "fresh_compiler")

WINDOW = dict(method="sliding_window", window=24, sink=3, block_size=16, min_tokens=0)
SLASH = dict(method="vertical_slash", vertical=12, slash=20, block_size=16, min_tokens=0)
PER_GRAPH = "(counted once per compiled graph)"
# Ways to sum that differ by a rounding or two, over two layers of float32.
CLOSE = dict(atol=2e-5, rtol=2e-5)


def build(family: str, **changes):
    model = FAMILIES[family](**changes)
    # The loop over experts that these models have by default is one that no compiler takes whole.
    model.config._experts_implementation = "batched_mm"
    return model


def counts(patch) -> list[tuple[int, dict[str, int]]]:
    return [(layer.sparse_calls, layer.reasons) for layer in patch.report().layers]


def full(ids: torch.Tensor) -> dict[str, torch.Tensor]:
    return dict(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", [WINDOW, SLASH], ids=lambda m: m["method"])
@torch.no_grad()
def test_whole_model_is_one_graph(method: dict, backend: str) -> None:
    model = FAMILIES["llama"]("sdpa")
    counter = CompileCounterWithBackend(backend)
    with hsa.patch(model, strict=True, **method) as patch:
        run = torch.compile(model, fullgraph=True, backend=counter)
        lengths = (111, 130, 200) if backend == "inductor" else (111, 130, 200, 63)
        for done, n in enumerate(lengths, 1):
            ids = tokens(2, n)
            got = run(**full(ids)).logits
            assert counts(patch) == [(done, {})] * 2
            torch.testing.assert_close(got, _eager(model, patch, ids), **CLOSE)
            _forget(patch, done)
        assert counter.frame_count <= 2


def _eager(model, patch, ids: torch.Tensor) -> torch.Tensor:
    return model(**full(ids)).logits


def _forget(patch, calls: int) -> None:
    """Takes the calls of the eager comparison out of the counts again."""
    for record in patch.session.records.values():
        record.sparse_calls = calls


@torch.no_grad()
def test_padding_is_read_when_the_graph_runs() -> None:
    model = FAMILIES["llama"]("sdpa")
    with hsa.patch(model, strict=True, **WINDOW):
        run = torch.compile(model, fullgraph=True, backend="aot_eager")
        for lengths in ([111, 37, 80], [64, 111, 90]):
            ids, mask, _ = padded(lengths, "left")
            given = dict(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
            valid = mask.bool()
            torch.testing.assert_close(run(**given).logits[valid], model(**given).logits[valid], **CLOSE)


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "gpt_oss"])
@torch.no_grad()
def test_soft_caps_sinks_and_own_windows(family: str) -> None:
    model, ids = build(family), tokens(2, 77)
    with hsa.patch(model, **WINDOW) as patch:
        want = model(**full(ids)).logits
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**full(ids)).logits
    torch.testing.assert_close(got, want, **CLOSE)
    own = {f"layer's own sliding window of {16}": 1, f"layer's own mask {PER_GRAPH}": 1}
    assert [reasons for _, reasons in counts(patch)] == ([own, {}] if family != "qwen3" else [{}, {}])
    assert [n for n, _ in counts(patch)] == ([0, 2] if family != "qwen3" else [2, 2])


@pytest.mark.parametrize(
    "family, backend",
    [
        pytest.param("llama", "inductor", marks=pytest.mark.slow),
        ("llama", "aot_eager"),
        ("gpt_oss", "aot_eager"),
    ],
)
def test_gradients(family: str, backend: str) -> None:
    model, ids = build(family), tokens(2, 77)
    found = []
    with hsa.patch(model, **SLASH) as patch:
        for run in (model, torch.compile(model, fullgraph=True, backend=backend)):
            model.zero_grad()
            loss = run(**full(ids), labels=ids).loss
            loss.backward()
            found.append({name: p.grad.clone() for name, p in model.named_parameters() if "self_attn" in name})
        # The second run of the backward is not counted.
        assert [n for n, _ in counts(patch)] == ([2, 2] if family == "llama" else [0, 2])
    for name, grad in found[0].items():
        assert grad.abs().max() > 0
        assert (found[1][name] - grad).abs().max() <= 1e-4 * grad.abs().max(), name


@torch.no_grad()
def test_layers_compiled_one_by_one_share_a_graph() -> None:
    model, ids = FAMILIES["llama"]("sdpa", num_hidden_layers=4), tokens(1, 90)
    counter = CompileCounterWithBackend("aot_eager")
    with hsa.patch(model, strict=True, **WINDOW) as patch:
        want = model(**full(ids)).logits
        for layer in model.model.layers:
            layer.compile(fullgraph=True, backend=counter)
        torch.testing.assert_close(model(**full(ids)).logits, want, **CLOSE)
        assert counts(patch) == [(2, {})] * 4
    assert counter.frame_count == 1


@torch.no_grad()
def test_static_cache_prefills_sparse_and_decodes_dense_in_the_graph() -> None:
    model = FAMILIES["llama"]("sdpa")
    ids = tokens(1, 60)
    with hsa.patch(model, **WINDOW) as patch:
        plan = dict(max_new_tokens=6, do_sample=False, cache_implementation="static")
        want = model.generate(ids, attention_mask=torch.ones_like(ids), disable_compile=True, **plan)
        before = counts(patch)
        from transformers import CompileConfig

        made = []

        def counter(graph, inputs, **_):
            made.append(graph)
            return graph

        model.generation_config.compile_config = CompileConfig(backend=counter, fullgraph=True)
        model.generation_config.compile_config._compile_all_devices = True
        got = model.generate(ids, attention_mask=torch.ones_like(ids), **plan)
        assert torch.equal(got, want)
        assert made
        assert before[0][0] == 1 and counts(patch)[0][0] == 2


@torch.no_grad()
def test_dense_steps_compile_too_and_a_removed_patch_is_gone_from_the_graph() -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 70)
    dense = model(**full(ids)).logits
    run = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(run(**full(ids)).logits, dense, **CLOSE)
    with hsa.patch(model, **WINDOW) as patch:
        sparse = model(**full(ids)).logits
        assert (sparse - dense).abs().max() > 1e-3
        torch.testing.assert_close(run(**full(ids)).logits, sparse, **CLOSE)
        assert counts(patch) == [(2, {})] * 2
    torch.testing.assert_close(run(**full(ids)).logits, dense, **CLOSE)
    with hsa.patch(model, "dense"):
        torch.testing.assert_close(run(**full(ids)).logits, dense, **CLOSE)
    assert counts(patch) == [(2, {})] * 2


@torch.no_grad()
def test_what_a_graph_cannot_tell_is_dense_and_counted_or_raises() -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 70)
    mask = torch.ones(1, 1, 70, 70, dtype=torch.bool).tril()
    mask[..., 5] = False
    mask[..., 5, 5] = True
    with hsa.patch(model, **WINDOW) as patch:
        want = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        run = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(run(input_ids=ids, attention_mask=mask, use_cache=False).logits, want, **CLOSE)
        seen = "mask given as a Tensor: mask that differs from query to query"
        assert counts(patch) == [(0, {seen: 1, f"mask given as a Tensor {PER_GRAPH}": 1})] * 2
        # Without a mask transformers cannot see in a graph that nothing is packed.
        run(input_ids=ids, use_cache=False)
        assert any("give an attention_mask of ones" in reason for reason in counts(patch)[0][1])
    torch._dynamo.reset()
    with hsa.patch(model, strict=True, **WINDOW):
        run = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(hsa.DenseFallback, match="mask given as a Tensor"):
            run(input_ids=ids, attention_mask=mask, use_cache=False)


def test_gradients_of_what_the_operator_runs_dense() -> None:
    """A graph cannot know that a text is too short, and the attention of gpt-oss reads its sinks from the module."""
    model, ids = build("gpt_oss", sliding_window=256), tokens(1, 40)
    found = []
    with hsa.patch(model, **{**WINDOW, "min_tokens": 1000}) as patch:
        for run in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            model.zero_grad()
            run(**full(ids), labels=ids).loss.backward()
            found.append([layer.self_attn.sinks.grad.clone() for layer in model.model.layers])
            assert all(isinstance(layer.self_attn.sinks, torch.nn.Parameter) for layer in model.model.layers)
    assert counts(patch)[1] == (0, {"fewer than 1000 keys (min_tokens=1000)": 2})
    for eager, compiled in zip(*found, strict=True):
        assert eager.abs().max() > 0
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-6)
