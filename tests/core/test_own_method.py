"""The method of the README as it stands there: whole, in chunks, with any cache, in a batch, and as a function."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_sparse_attn as hsa
from hf_sparse_attn.method import Decline
from hf_sparse_attn.registry import METHODS
from tests.support import tiny_lm
from tests.support.patterns import FEATURES, random_pattern

README = Path(__file__).parents[2] / "README.md"
NAME = "every_other_block"
PATCH: dict[str, Any] = {"method": NAME, "min_tokens": 0}


@pytest.fixture(scope="module", autouse=True)
def method() -> Iterator[type[hsa.Method]]:
    """The code of the README, run up to the class."""
    code = re.search(r"## Your own method.*?```python\n(.*?)\nq, k, v =", README.read_text(), re.S)
    assert code is not None
    exec(compile(code[1], "README.md", "exec"), {"__name__": "readme"})
    yield METHODS.get(NAME)
    METHODS._entries.pop(NAME)


def in_chunks(model: Any, ids: torch.Tensor, sizes: list[int], cache: Any) -> torch.Tensor:
    out, start = [], 0
    for size in sizes:
        part = ids[:, start : start + size]
        out.append(model(part, past_key_values=cache, use_cache=True).logits)
        start += size
    assert start == ids.shape[1]
    return torch.cat(out, 1)


@pytest.mark.parametrize("sizes", [[128, 128, 44], [100, 64, 136], [17, 283], [299 - 64, 65]], ids=str)
@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@torch.no_grad()
def test_chunks_are_the_whole(sizes: list[int], static: bool) -> None:
    model, ids = tiny_lm.FAMILIES["llama"](), tiny_lm.tokens(1, 300)
    cache = StaticCache(model.config, max_cache_len=320) if static else DynamicCache(config=model.config)
    with hsa.patch(model, **PATCH, strict=True) as patch:
        whole = model(ids).logits
        torch.testing.assert_close(in_chunks(model, ids, sizes, cache), whole)
        assert patch.report().layers[0].dense_calls == 0 and patch.report().density < 0.75
    assert not torch.allclose(whole, model(ids).logits)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"prefill_chunk_size": 77}], ids=str)
def test_it_generates_what_it_would_without_a_cache(options: dict[str, Any]) -> None:
    model, ids = tiny_lm.FAMILIES["llama"](), tiny_lm.tokens(1, 200)
    with hsa.patch(model, **PATCH, strict=True) as patch:
        patch.session.policy = type(patch.session.policy)(min_tokens=0, min_queries=1)
        want = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, **options), want)
        assert not any(layer.reasons for layer in patch.report().layers)


def test_a_padded_batch_with_a_cache_is_its_rows() -> None:
    model = tiny_lm.FAMILIES["llama"]()
    ids, mask, singles = tiny_lm.padded([200, 91], "left")
    with hsa.patch(model, **PATCH):
        both = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        for row, single in enumerate(singles):
            one = model.generate(single, max_new_tokens=4, do_sample=False)
            assert torch.equal(both[row, -4:], one[0, -4:])


@pytest.mark.parametrize("queries", [1, 37, 64, 200, 1000])
def test_the_function_takes_the_last_queries(queries: int) -> None:
    q, k, v = torch.randn(3, 1, 4, 1000, 32)
    want = hsa.attention(q, k, v, NAME)[:, :, -queries:]
    torch.testing.assert_close(hsa.attention(q[:, :, -queries:], k, v, NAME), want)


@pytest.mark.parametrize("feature", [name for name in FEATURES if "order" not in name and name != "all"])
@pytest.mark.parametrize("count", [1, 31, 32, 63, 111])
def test_the_last_queries_of_a_pattern(feature: str, count: int) -> None:
    pattern = random_pattern(111, 130, heads=2, seed=3, **FEATURES[feature])
    cut = pattern.last_queries(count).validate()
    assert torch.equal(cut.to_dense(), pattern.to_dense()[:, :, -count:])
    for wrong in (0, 112):
        with pytest.raises(ValueError, match="`count` must be at"):
            pattern.last_queries(wrong)


def test_an_order_of_all_tokens_is_declined_where_only_some_are_queries(method: Any, monkeypatch: Any) -> None:
    found = method().pattern(None, None, hsa.Context(hsa.TokenLayout.causal(128)))
    ordered = replace(found, q_order=torch.arange(128).flip(0)[None, None])
    monkeypatch.setattr(method, "pattern", lambda *_: ordered)
    layout = hsa.TokenLayout.causal(128).continued(100)
    answer = method().pattern_for(torch.zeros(1, 8, 28, 64), None, hsa.Context(layout))
    assert isinstance(answer, Decline) and "only the last 28 are queries" in answer.reason
