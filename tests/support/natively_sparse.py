"""What is compared of models that select their own keys, with the patch and without."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.patching import Patch

CLOSE = {"rtol": 1e-4, "atol": 1e-4}
# Ways to generate.
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
}


def run(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits
    return logits


def generated_alike(model: Any, inputs: dict[str, Tensor], way: str) -> Patch:
    """Has a model generate without the patch and with it, and returns the patch once both gave the same."""
    options = {
        "max_new_tokens": 5, "do_sample": False, "output_scores": True, "return_dict_in_generate": True, **WAYS[way],
    }  # fmt: skip
    wanted = model.generate(**inputs, **options)
    with hsa.patch(model, "native") as patch:
        got = model.generate(**inputs, **options)
    assert torch.equal(got.sequences, wanted.sequences)
    for mine, theirs in zip(got.scores, wanted.scores, strict=True):
        torch.testing.assert_close(mine, theirs, **CLOSE)
    return patch


def gradients(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every parameter that has one, of some loss over what is no padding."""
    model.zero_grad()
    out = model(**inputs).logits
    weight = torch.linspace(-1, 1, out.numel()).view_as(out)
    # Rows of padding are nothing to learn from.
    (out * weight * inputs["attention_mask"][..., None].to(out.dtype)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
