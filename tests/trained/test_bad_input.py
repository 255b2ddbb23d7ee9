"""What the functions to train with say of arguments that are no tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa

Q, KV, GATE = torch.randn(1, 2, 9, 8), torch.randn(1, 1, 9, 8), torch.ones(1, 2, 9)
BLOCKS = torch.zeros(1, 2, 9, 1, dtype=torch.int64)
nsa: Any = hsa.nsa_attention
moba: Any = hsa.moba_attention
dsa: Any = hsa.dsa_attention


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: nsa(Q, KV, KV, 0.5, GATE), TypeError, r"`g_cmp` must be a tensor .* or None, got float"),
        (lambda: nsa(Q, KV, KV, None, GATE, 1), TypeError, r"`g_swa` must be a tensor .* or None, got int"),
        (
            lambda: nsa(Q, KV, KV, None, GATE, block_indices=BLOCKS),
            ValueError,
            r"\[batch, kv_heads, tokens, n\] \[1, 1, 9, n\], got torch.int64 \[1, 2, 9, 1\]",
        ),
        (lambda: moba(Q, KV, KV, cu_seqlens=[0, 9]), TypeError, r"`cu_seqlens` must be a tensor .*, got list"),
        (lambda: dsa(Q, KV, KV, None, None, None), TypeError, r"`q_index` must be a tensor where `indices` is None"),
    ],
)
def test_what_is_no_tensor_is_named(call: Callable[[], object], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
