"""Amounts as shares of the keys: the same pattern as the number they stand for at each length, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.method import Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.profiles.file import from_json, to_json
from hf_sparse_attn.profiles.head_profile import HeadProfile

# Shares, and how they are numbers at a length: of blocks for `local`.
CASES: dict[str, dict[str, Any]] = {
    "sliding_window": {"window": 0.2, "sink": 0.03, "block_size": 32},
    "vertical_slash": {"vertical": 0.15, "slash": 0.3, "block_size": 32},
    "flexprefill": {"gamma": 0.4, "min_budget": 0.1, "max_budget": 0.3, "block_size": 16},
    "strided": {"local": 0.1, "stride": 7, "block_size": 16},
}
LENGTHS = (333, 1000)


def _numbers(name: str, tokens: int) -> dict[str, Any]:
    total = -(-tokens // 16) if name == "strided" else tokens
    found = {"window", "sink", "vertical", "slash", "min_budget", "max_budget", "local"}
    return {k: round(v * total) if k in found else v for k, v in CASES[name].items()}


def _call(tokens: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor, Context]:
    layout = (TokenLayout.causal if causal else TokenLayout.bidirectional)(tokens)
    ctx = Context(layout, num_heads=4, num_kv_heads=2, head_dim=16)
    generator = torch.Generator().manual_seed(tokens)
    return torch.randn(1, 4, tokens, 16, generator=generator), torch.randn(1, 2, tokens, 16, generator=generator), ctx


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("tokens", LENGTHS)
@pytest.mark.parametrize("name", sorted(CASES))
def test_a_share_is_the_number_that_it_stands_for(name: str, tokens: int, causal: bool) -> None:
    kind = hsa.get_method(name)
    if not causal and "causal" in kind.needs:
        return
    q, k, ctx = _call(tokens, causal)
    share, number = kind(**CASES[name]), kind(**_numbers(name, tokens))
    assert torch.equal(share.pattern_for(q, k, ctx).to_dense(), number.pattern_for(q, k, ctx).to_dense())
    assert share.least_density(ctx) == number.least_density(ctx)


def test_one_method_is_another_pattern_at_another_length() -> None:
    method = hsa.get_method("sliding_window")(window=0.25, sink=0)
    densities = [method.pattern_for(*_call(n, True)).density("causal") for n in (256, 1024, 4096)]
    # 2 x - x ** 2, whatever the length.
    assert densities == pytest.approx([0.4375] * 3, abs=2e-3)


def test_a_chunk_has_a_share_of_the_keys_that_it_sees() -> None:
    method = hsa.get_method("sliding_window")(window=0.1, sink=2, block_size=16)
    q, k, ctx = _call(400, True)
    chunk = replace(ctx, layout=ctx.layout.continued(300))
    found = method.pattern_for(q[:, :, 300:], k, chunk)
    assert isinstance(found, BlockPattern) and found.to_dense()[0, 0].sum(-1).tolist() == [42] * 100


@pytest.mark.parametrize(
    ("name", "params", "error", "message"),
    [
        ("sliding_window", {"window": 1.0}, ValueError, r"`window` must be an int, or as a float a share in \(0, 1\)"),
        ("sliding_window", {"window": 0.0}, ValueError, "`window` .* got 0.0"),
        ("sliding_window", {"sink": -0.5}, ValueError, "`sink` .* got -0.5"),
        ("sliding_window", {"window": "1/8"}, TypeError, r"a share in \(0, 1\), got '1/8' of type str"),
        ("sliding_window", {"window": True}, TypeError, "a share .* got True of type bool"),
        ("vertical_slash", {"vertical": 2.5}, TypeError, "`vertical` must be an int, got 2.5"),
        ("vertical_slash", {"slash": float("nan")}, ValueError, "`slash` .* got nan"),
        ("flexprefill", {"min_budget": 0.2, "max_budget": 0.1}, ValueError, "`max_budget` must be at least 0.2"),
        ("flexprefill", {"min_budget": 64, "max_budget": 32}, ValueError, "`max_budget` must be at least 64"),
        ("strided", {"local": 1.5}, TypeError, "`local` must be an int, got 1.5"),
    ],
)
def test_what_is_no_share_is_refused(name: str, params: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        hsa.get_method(name)(**params)


def test_a_share_is_never_equal_to_a_number() -> None:
    # Patterns are kept by their methods: 1 token and all of them must not be one key.
    made = [hsa.get_method("sliding_window")(window=window) for window in (1, 0.999, 0.5)]
    assert len(set(made)) == 3


def test_the_knob_turns_shares_too() -> None:
    shares = hsa.get_method("vertical_slash")(vertical=0.01, slash=0.06)
    assert shares.turned(600) == hsa.get_method("vertical_slash")(vertical=100, slash=600)
    mixed: Method = hsa.get_method("vertical_slash")(vertical=40, slash=0.06)
    assert mixed.turned(600) == hsa.get_method("vertical_slash")(vertical=40, slash=600)


def test_a_profile_keeps_shares() -> None:
    import numpy as np

    from hf_sparse_attn.profiles.step_plan import StepPlan
    from hf_sparse_attn.sharing.fingerprint import Fingerprint

    model = Fingerprint("M", "llama", 1, 2, 1, 8, "", "")
    methods = (hsa.get_method("dense")(), hsa.get_method("vertical_slash")(vertical=0.1, slash=0.05))
    plan = StepPlan((0.0, 1.0), np.array([[0, 1]], np.int16))
    figures = {"density": np.ones((1, 1, 2), np.float32)}
    profile = HeadProfile(model, methods, (plan,), figures, "output_error", {}, {})
    assert from_json(HeadProfile, to_json(profile)).methods == methods
