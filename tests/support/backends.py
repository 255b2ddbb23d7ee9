"""Problems for backends: shapes that are no multiple of a block, every feature of a pattern, and what is right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import FEATURES, expected, random_inputs, random_pattern

SHAPES = {
    "one_token": {"q_len": 1, "kv_len": 1, "heads": 1, "kv_heads": 1, "dim": 16},
    # Few tokens, for what is interpreted.
    "few": {"q_len": 37, "kv_len": 55, "heads": 2, "kv_heads": 1, "dim": 24},
    "odd": {"q_len": 63, "kv_len": 111, "heads": 4, "kv_heads": 2, "dim": 40},
    "batch": {"q_len": 70, "kv_len": 70, "heads": 2, "kv_heads": 1, "dim": 24, "batch": 2},
    "wide_value": {"q_len": 65, "kv_len": 64, "heads": 2, "kv_heads": 2, "dim": 16, "value_dim": 40},
    "narrow_value": {"q_len": 64, "kv_len": 100, "heads": 4, "kv_heads": 1, "dim": 48, "value_dim": 8},
}

# A shape with every feature, and every shape with all of them at once.
PROBLEMS = [("odd", name) for name in FEATURES] + [(name, "all") for name in SHAPES if name != "odd"]


def case(
    shape: str, feature: str, dtype: torch.dtype, per_head: bool = True
) -> tuple[BlockPattern, tuple[Tensor, Tensor, Tensor]]:
    """A pattern and q, k, v for it.

    Args:
        shape: of SHAPES.
        feature: of patterns.FEATURES.
        dtype: of the tensors.
        per_head: whether every head of every row has lists of its own, or all share one.
    """
    sizes: dict[str, Any] = dict(SHAPES[shape])
    q_len, kv_len, batch = sizes.pop("q_len"), sizes.pop("kv_len"), sizes.get("batch", 1)
    lead = {"batch": batch, "heads": sizes["heads"]} if per_head else {}
    if not per_head and FEATURES[feature].get("kv_range"):
        lead = {"batch": batch}
    empty = tuple(r for r in FEATURES[feature].get("empty_rows", ()) if r < -(-q_len // 32))
    pattern = random_pattern(q_len, kv_len, **{**FEATURES[feature], **lead, "empty_rows": empty, "seed": 7})
    return pattern, random_inputs(pattern, dtype=dtype, **{**sizes, "batch": batch})


def check(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, out: Tensor, lse: Tensor) -> None:
    """Against the reference; the log-sum-exp may be as far off as that of PyTorch's own dense operator.

    In half precision that operator takes a faster, coarser exponential than the float32 reference behind `expected`.
    """
    want = expected(q, k, v, pattern, 0.3)
    x, y = torch.randn(2, 1, 1, 64, q.shape[3]).to(q.dtype)
    dense = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(x, y, y, scale=0.3)[1]
    exact = (x.double() @ y.double().mT * 0.3).logsumexp(-1)
    error = float((dense - exact).abs().max())
    want._replace(lse_tolerance=max(want.lse_tolerance, 3 * error)).check(out, lse)
