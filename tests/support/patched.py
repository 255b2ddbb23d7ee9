"""What a patch on a model of transformers may leave behind, how much of it ran, and what it must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from hf_sparse_attn.record import LayerRecord

WINDOWED: dict[str, Any] = dict(method="sliding_window", window=24, sink=3, block_size=32, min_tokens=0)

State = tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]


def state_of(model: Any) -> State:
    """Everything a patch could leave behind; models of images keep the last `rope_deltas` by themselves."""
    flat = {
        n: {k: (id(v), copy.copy(v)) for k, v in m.__dict__.items() if k not in ("config", "rope_deltas")}
        for n, m in model.named_modules()
    }
    configs = {n: copy.deepcopy(m.config.__dict__) for n, m in model.named_modules() if hasattr(m, "config")}
    return flat, configs, {k: v.clone() for k, v in model.state_dict().items()}


def assert_same_state(before: State, after: State) -> None:
    """Two states are of one model that nothing was done to."""
    assert before[0].keys() == after[0].keys()
    for name, values in before[0].items():
        assert {k: v[0] for k, v in values.items()} == {k: v[0] for k, v in after[0][name].items()}
        assert all(v[1] == after[0][name][k][1] for k, v in values.items() if "hooks" in k)
    assert {n: str(c) for n, c in before[1].items()} == {n: str(c) for n, c in after[1].items()}
    assert before[2].keys() == after[2].keys()
    assert all(torch.equal(v, after[2][k]) for k, v in before[2].items())


def sparse_share(layers: Iterable[LayerRecord]) -> float:
    """Share of the calls of these layers of a report that were sparse."""
    counted = [(r.sparse_calls, r.sparse_calls + r.dense_calls) for r in layers]
    return sum(n for n, _ in counted) / sum(n for _, n in counted)


def eight_roundings(output: Callable[[torch.dtype], Tensor], low: torch.dtype = torch.float32) -> float:
    """Eight times the error that a precision makes in the output of the dense model, against float64."""
    return 8 * float((output(low) - output(torch.float64)).abs().max())


def register_masked(name: str, mask: Callable[[Any, Tensor, Tensor, Tensor | None], Tensor | None]) -> None:
    """An implementation of the tests' own: SDPA under the mask of tokens given by (module, query, key, mask)."""

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        scaling: float | None = None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        chosen = mask(module, query, key, attention_mask)
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=chosen, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    whole = {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **given: sdpa_mask(**{**given, **whole}))
