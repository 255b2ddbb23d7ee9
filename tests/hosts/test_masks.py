"""Masks as the models of diffusers make them, and as models of transformers are given them: sparse where exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.registry import FAMILIES
from tests.support import tiny_diffusers as tiny
from tests.support.tiny_diffusers_rules import TEXT

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

# Hides nothing, so that what differs from the unpatched model is the mask.
WHOLE: dict[str, Any] = {"window": 1 << 20, "sink": 0, "block_size": 16, "min_tokens": 0}
TOKENS = TEXT + tiny.HEIGHT // 2 * (tiny.WIDE // 2)
PADDED = torch.arange(TEXT)[None] < 5
ALL = torch.ones(1, TEXT, dtype=torch.bool)
BIAS = "the call has a float mask that is a bias on its logits"

BY_QUERY = "the call has a mask that differs from query to query"


def with_image(text: Tensor) -> Tensor:
    """Valid tokens [batch, text and image] from those of the text before it."""
    return torch.cat([text, text.new_ones(1, TOKENS - TEXT)], 1)


def pairs(text: Tensor) -> Tensor:
    """Which tokens see one another, [batch, 1, tokens, tokens]."""
    valid = with_image(text)
    return valid[:, None, :, None] & valid[:, None, None]


def joint(mask: Tensor) -> dict[str, Any]:
    return {"joint_attention_kwargs": {"attention_mask": mask}}


# Model class, its inputs, and the reason for which the call is dense or None.
MASKS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "chroma, one constant": ("Chroma", {"attention_mask": with_image(ALL).float()}, None),
    "chroma, zeros": ("Chroma", {"attention_mask": with_image(ALL).float() * 0}, None),
    "chroma, valid x valid": ("Chroma", {"attention_mask": with_image(PADDED)}, None),
    "chroma, added ones": ("Chroma", {"attention_mask": with_image(PADDED).float()}, BIAS),
    "cogview4, whole": ("CogView4", {"attention_mask": ALL.long()}, None),
    "cogview4, added ones": ("CogView4", {"attention_mask": PADDED.long()}, BIAS),
    "glm image, whole": ("GlmImage", {"attention_mask": ALL.float()}, None),
    "glm image, added ones": ("GlmImage", {"attention_mask": PADDED.float()}, BIAS),
    "qwen image": ("QwenImage", {"encoder_hidden_states_mask": PADDED.long()}, None),
    "flux, -inf": ("Flux", joint(torch.where(pairs(PADDED), 0.0, -torch.inf)), None),
    "flux, ones": ("Flux", joint(torch.ones(1, 1, TOKENS, TOKENS)), None),
    "flux, bias": ("Flux", joint(torch.linspace(0, 1, TOKENS).expand(1, 1, TOKENS, TOKENS)), BIAS),
    "fibo": ("BriaFibo", joint(with_image(PADDED)[:, None, None]), None),
    "fibo, -10000": ("BriaFibo", joint(torch.where(pairs(PADDED), 0.0, -10000.0)), None),
    "ideogram, padding by itself": ("Ideogram4", {"segment_ids": torch.where(with_image(PADDED), 1, -1)}, None),
    "flux, bool": ("Flux", joint(pairs(PADDED)), None),
    "flux, by query": ("Flux", joint(torch.ones(1, 1, TOKENS, TOKENS).bool().tril(40)), BY_QUERY),
}  # fmt: skip


def run(model: Any, given: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(**given, return_dict=False)[0]
    return out


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_of_a_diffusers_model(case: str) -> None:
    name, more, reason = MASKS[case]
    model, given = tiny.build(f"{name}Transformer2DModel")
    given.update(more)
    own = run(model, given)
    with hsa.patch(model, "sliding_window", **WHOLE) as patch:
        got = run(model, given)
    for layer in patch.report().layers:
        # The padding that sees itself is too short to be sparse.
        short = {"decoding: fewer than 16 queries": 1} if "by itself" in case else {}
        assert layer.reasons == (short if reason is None else {reason: 1})
        assert layer.sparse_calls == (reason is None)
    assert own.isfinite().all() and (got - own).abs().max() <= (1e-5 if reason is None else 0.0)
    if reason is not None:
        with (
            hsa.patch(model, "sliding_window", strict=True, **WHOLE),
            pytest.raises(RuntimeError, match=reason),
        ):
            run(model, given)


def test_what_a_mask_hides_has_no_part_in_a_sparse_call() -> None:
    """Hidden text may be anything, the image sees none of it."""
    model, given = tiny.build("ChromaTransformer2DModel")
    given["attention_mask"] = with_image(PADDED)
    with hsa.patch(model, "sliding_window", **{**WHOLE, "window": 3}, strict=True):
        before = run(model, given)
        given["encoder_hidden_states"] = given["encoder_hidden_states"].masked_fill(~PADDED[..., None], 7.0)
        assert torch.equal(run(model, given), before)


def test_chroma_in_its_own_pipeline() -> None:
    """Its mask is one constant where no text is padded; each of guidance's two calls has its own."""
    model = tiny.build("ChromaTransformer2DModel")[0]
    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=1, norm_num_groups=1, shift_factor=0.1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    none = {"text_encoder": None, "tokenizer": None}
    pipe = diffusers.ChromaPipeline(scheduler=scheduler, vae=vae.eval(), transformer=model, **none)
    pipe.set_progress_bar_config(disable=True)
    call: dict[str, Any] = {"num_inference_steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    for prefix, mask in (("", ALL), ("negative_", PADDED)):
        call[f"{prefix}prompt_embeds"] = torch.randn(1, TEXT, 16)
        call[f"{prefix}prompt_attention_mask"] = mask.float()
    with hsa.patch(pipe, "sliding_window", **{**WHOLE, "window": 3}) as patch:
        pipe(**call)
    assert all((r.sparse_calls, r.reasons) == (2, {BIAS: 2}) for r in patch.report().layers)


# ---------------------------------------------------------------------- transformers

N = 111
VALID = torch.arange(N) >= torch.tensor([[0], [9]])
PAIRS = VALID[:, None, :, None] & VALID[:, None, None]
TRIL = torch.ones(N, N, dtype=torch.bool).tril()
READY = "mask given as a Tensor: "
ADDED = f"{READY}float mask that is a bias on its logits"
GROUPS = f"{READY}mask of separate sequences"


def added(kept: Tensor, hidden: float = -torch.inf) -> Tensor:
    return torch.where(kept, 0.0, hidden)


# Implementation, mask, and the reason for which the call is dense or None; by family.
GIVEN: dict[str, tuple[str, str, Tensor, str | None]] = {
    "causal": ("llama", "sdpa", TRIL[None, None], None),
    "causal and padding": ("llama", "sdpa", TRIL & VALID[:, None, None], None),
    "causal and padded pairs": ("llama", "sdpa", TRIL & PAIRS, None),
    "causal, least": ("llama", "sdpa", added(TRIL & PAIRS, torch.finfo(torch.float32).min), None),
    "causal, padded at the end": ("llama", "sdpa", TRIL & VALID.flip(1)[:, None, None], None),
    "causal in eager attention": ("llama", "eager", added(TRIL & VALID[:, None, None], -10000.0), None),
    "eager attention adds a bool": ("llama", "eager", TRIL[None, None], ADDED),
    "both ways in a decoder": ("llama", "sdpa", PAIRS, f"{READY}mask that is not causal"),
    "padding": ("encoder", "sdpa", VALID[:, None, None], None),
    "padding of each query": ("encoder", "sdpa", VALID[:, None, None].expand(2, 1, N, N), None),
    "valid x valid": ("encoder", "sdpa", PAIRS, None),
    "valid x valid, least": ("encoder", "sdpa", added(PAIRS, torch.finfo(torch.float32).min), None),
    "ones": ("encoder", "sdpa", torch.ones(2, 1, 1, N), None),
    "ones of each query": ("encoder", "eager", torch.ones(2, 1, N, N, dtype=torch.bool), None),
    "a bias": ("encoder", "sdpa", VALID[:, None, None].float(), ADDED),
    "by query": ("encoder", "sdpa", TRIL[None, None], f"{READY}mask that differs from query to query"),
    "apart": ("encoder", "sdpa", PAIRS | ~VALID[:, None, :, None] & ~VALID[:, None, None], GROUPS),
}  # fmt: skip


@pytest.mark.parametrize("case", GIVEN)
def test_a_mask_that_is_given_ready_made(case: str) -> None:
    family, implementation, mask, reason = GIVEN[case]
    model, given = FAMILIES.get(family).tiny()
    model.set_attn_implementation(implementation)

    def states() -> Tensor:
        with torch.no_grad():
            found: Tensor = model.base_model(input_ids=given["input_ids"], attention_mask=mask).last_hidden_state
        return found

    own = states()
    with hsa.patch(model, "sliding_window", **WHOLE) as patch:
        got = states()
    assert [r.reasons for r in patch.report().layers] == [{} if reason is None else {reason: 1}] * 2
    read = VALID.flip(1) if "at the end" in case else VALID
    assert (got - own)[read].abs().max() <= (1e-5 if reason is None else 0.0)


def test_a_mask_that_is_changed_is_read_again() -> None:
    model, given = FAMILIES.get("encoder").tiny()
    mask = torch.ones(2, 1, 1, N)
    call: Callable[[], Any] = lambda: model(input_ids=given["input_ids"], attention_mask=mask)  # noqa: E731
    with torch.no_grad(), hsa.patch(model, "sliding_window", **WHOLE) as patch:
        call()
        mask[..., 3] = 2.0
        call()
    assert [(r.sparse_calls, r.dense_calls) for r in patch.report().layers] == [(1, 1)] * 2
