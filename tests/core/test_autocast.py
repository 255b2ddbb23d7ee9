"""Under autocast attention computes in autocast's dtype, whatever q, k and v come in, and estimates stay exact."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Method
from tests.support import tiny_diffusers, tiny_wan
from tests.support.tiny_hunyuan import Recorder
from tests.support.tiny_lm import FAMILIES, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

LOW = (torch.bfloat16, torch.float16)
BACKENDS = ("auto", "torch_reference", "torch_gather", "cpp_block_sparse")
WINDOW: dict[str, Any] = {"window": 24, "sink": 3, "block_size": 16}


def mixed(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys as rotation leaves them under autocast, values as their projection does."""
    draw = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 77, 20, generator=draw) for heads in (4, 2, 2))
    return q, k, v.to(dtype)


@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_two_dtypes(backend: str, dtype: torch.dtype) -> None:
    method = hsa.get_method("sliding_window")(**WINDOW)
    q, k, v = mixed(dtype)
    same = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    try:
        expected = hsa.attention(*same, method, backend=backend)
    except hsa.BackendUnavailable as reason:
        pytest.skip(str(reason))
    wanted = torch.autograd.grad(expected.float().sum(), same)
    given = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.autocast("cpu", dtype=dtype):
        out = hsa.attention(*given, method, backend=backend)
    assert out.dtype == dtype and torch.equal(out, expected)
    found = torch.autograd.grad(out.float().sum(), given)
    for mine, other, x in zip(found, wanted, given, strict=True):
        assert mine.dtype == x.dtype and torch.equal(mine, other.to(x.dtype))


def test_without_autocast_two_dtypes_are_refused() -> None:
    q, k, v = mixed(torch.bfloat16)
    with pytest.raises(ValueError, match=r"`v` must be torch\.float32 on cpu like `q`, got torch\.bfloat16"):
        hsa.attention(q, k, v, "sliding_window")
    pattern = hsa.get_method("sliding_window")(**WINDOW).pattern(None, None, Context.for_tensors(q, k))
    from hf_sparse_attn.dispatch import run_pattern

    with pytest.raises(ValueError, match=r"`k` and `v` must be torch\.float32 like `q`, got .* and torch\.bf"):
        run_pattern(q, k, v, pattern, 1.0)


def test_float64_is_left_alone() -> None:
    q, k, v = (x.double() for x in mixed(torch.float64))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = hsa.attention(q, k, v, "sliding_window")
    assert out.dtype == torch.float64


@pytest.mark.parametrize("host", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", LOW, ids=["bfloat16", "float16"])
def test_a_language_model(host: str, dtype: torch.dtype) -> None:
    """Its queries and keys are float32 here, its values are not."""
    model, ids = FAMILIES["llama"](host), tokens(2, 90)
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        dense = model(input_ids=ids).logits
        with hsa.patch(model, "sliding_window", min_tokens=0, window=90, sink=0, block_size=16) as patch:
            full = model(input_ids=ids).logits
        assert all(r.sparse_calls == 1 for r in patch.report().layers)
        with hsa.patch(model, "sliding_window", min_tokens=0, **WINDOW):
            sparse = model(input_ids=ids).logits
        assert torch.equal(model(input_ids=ids).logits, dense)
    scale = float(dense.abs().max())
    assert full.dtype == dense.dtype and float((full - dense).abs().max()) <= 16 * torch.finfo(dtype).eps * scale
    assert sparse.isfinite().all() and float((sparse - dense).abs().max()) > 1e-3 * scale


def test_a_language_model_learns() -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 90)
    grads = []
    for on in (True, False):
        model.zero_grad()
        with hsa.patch(model, "sliding_window", min_tokens=0, **WINDOW), torch.autocast("cpu", enabled=on):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert float(torch.nn.functional.cosine_similarity(*grads, dim=0)) > 0.999
    assert not torch.equal(*grads)


def test_a_compiled_language_model() -> None:
    found: list[set[torch.dtype]] = []

    def looked_at(graph: Any, inputs: Any) -> Any:
        for node in graph.graph.nodes:
            if "hf_sparse_attn.layer" in str(node.target):
                found.append({given.meta["example_value"].dtype for given in node.args[1:4]})
        return graph

    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 90)
    torch._dynamo.reset()
    with hsa.patch(model, "sliding_window", min_tokens=0, **WINDOW), torch.autocast("cpu", dtype=torch.bfloat16):
        eager = model(input_ids=ids, labels=ids)
        compiled = torch.compile(model, backend=looked_at)(input_ids=ids, labels=ids)
    # What the graph believes of the operator's output is the dtype of its queries.
    assert found == [{torch.bfloat16}] * 2
    scale = float(eager.logits.detach().abs().max())
    apart = float((compiled.logits - eager.logits).detach().abs().max())
    assert apart <= 16 * torch.finfo(torch.bfloat16).eps * scale
    compiled.loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["WanTransformer3DModel", "CosmosTransformer3DModel"])
def test_a_video_model(name: str) -> None:
    """Queries and keys of the second are float32, its values are not."""
    model, given = (
        (tiny_wan.transformer(), tiny_wan.inputs()) if name.startswith("Wan") else tiny_diffusers.build(name)
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        dense = model(**given, return_dict=False)[0]
        with hsa.patch(model, "sliding_window", min_tokens=0, strict=True, **WINDOW) as patch:
            sparse = model(**given, return_dict=False)[0]
        assert all(r.sparse_calls == 1 for r in patch.report().layers)
    assert sparse.isfinite().all() and sparse.dtype == dense.dtype and not torch.equal(sparse, dense)


@dataclass(frozen=True, kw_only=True)
class Asks(Method):
    """Notes whether autocast would change what is computed here."""

    seen: list[bool] = field(default_factory=list, compare=False)

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        self.seen.extend([torch.is_autocast_enabled("cpu"), q.dtype != torch.bfloat16])
        return hsa.BlockPattern.dense(q.shape[2], k.shape[2], causal=ctx.layout.is_causal, block=64)


def test_methods_and_observers_run_without_autocast() -> None:
    from hf_sparse_attn.profiling.observe import observing

    model, ids, asks, seen = FAMILIES["llama"]("sdpa"), tokens(2, 90), Asks(), []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with hsa.patch(model, asks, min_tokens=0):
            model(input_ids=ids)
        hsa.attention(*mixed(torch.bfloat16), asks)
        with observing(model, lambda one: seen.append(torch.is_autocast_enabled("cpu"))):
            model(input_ids=ids)
        assert torch.is_autocast_enabled("cpu")
    assert len(asks.seen) == 6 and not any(asks.seen)
    assert len(seen) == 2 and not any(seen)


def test_estimates_are_not_rounded() -> None:
    """The blocks are those that are chosen outside of autocast from the same numbers."""
    inner = hsa.get_method("block_topk")(density=0.2, block_size=16)
    q, k, v = (torch.randn(1, 2, 400, 16, generator=torch.Generator().manual_seed(n)) for n in range(3))
    low = [x.bfloat16() for x in (q, k, v)]
    masks = []
    for on in (False, True):
        recorder = Recorder(inner=inner)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            hsa.attention(*(low if not on else (q, k, v)), recorder)
        masks.append(recorder.masks[0][1])
    assert torch.equal(*masks)


def test_profiling_sees_what_attention_computes_with() -> None:
    from hf_sparse_attn.profiling.observe import observing

    model, ids, seen = FAMILIES["llama"]("sdpa"), tokens(1, 90), []
    with torch.autocast("cpu", dtype=torch.bfloat16), observing(model, lambda one: seen.append(one)):
        model(input_ids=ids)
    assert seen and {x.dtype for one in seen for x in (one.q, one.k, one.v)} == {torch.bfloat16}
