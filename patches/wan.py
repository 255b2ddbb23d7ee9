"""Wan: self-attention of the video transformers, reached through the attention dispatcher of diffusers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.hosts import diffusers_install
from hf_sparse_attn.hosts.diffusers_model import DiffusersFamily, Place, Tokens, find_transformers
from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES

_CLASSES = {
    "diffusers.models.transformers.transformer_wan": "WanTransformer3DModel",
    "diffusers.models.transformers.transformer_wan_vace": "WanVACETransformer3DModel",
}


@FAMILIES.register("wan")
class Wan(DiffusersFamily):
    """Wan transformers of diffusers, bare, wrapped (PEFT, torch.compile) or in a pipeline; see family.Family.

    Only self-attention (`attn1`) is touched. The tokens are one video of frames x height x width patches.

    Step of a call: `step_index` and `num_inference_steps` where they are given to `cache_context` (the patched one
    takes both with any version of diffusers); else read off the denoising loop that runs, the pipeline's or one of the
    user's own over a scheduler's timesteps (hosts/diffusers_loop.py); else changes of the time are counted, an equal
    one being the second guidance pass and one in the other direction a new video, which the report tells where
    anything depends on it. Steps are model evaluations: a second-order solver has two for most of its steps,
    `strength` leaves the first ones out. Both experts count as one run. Where nobody knows how long a run is, with
    `dense_steps` every call is dense for that reason.
    """

    provides: ClassVar[frozenset[str]] = frozenset({"bidirectional", "video grid"})
    reads: ClassVar[frozenset[str]] = frozenset({"hidden"})
    models: ClassVar[str] = "diffusers: Wan 2.1, Wan 2.2 (two experts), TI2V-5B, VACE; text, image and video to video"

    @staticmethod
    def targets(model: object) -> list[nn.Module] | Decline:
        """The Wan transformers in a module or pipeline; imports nothing: what was never imported cannot be given."""
        return find_transformers(model, _CLASSES)

    @staticmethod
    def install(patch: Patch) -> None:
        """See family.Family and diffusers_install.install."""
        diffusers_install.install(patch, Wan)

    @staticmethod
    def places(transformer: Any) -> Iterable[Place]:
        """See DiffusersFamily."""
        for index, block in enumerate(transformer.blocks):
            yield Place(f"blocks.{index}.attn1", index, block.attn1)
        # A control block of VACE belongs to the layer that its output is added to.
        control = zip(
            getattr(transformer, "vace_blocks", ()), getattr(transformer.config, "vace_layers", ()), strict=True
        )
        for number, (block, index) in enumerate(control):
            yield Place(f"vace_blocks.{number}.attn1", index, block.attn1)

    @staticmethod
    def tokens(transformer: Any, inputs: Mapping[str, Any]) -> Tokens:
        """See DiffusersFamily."""
        sizes = zip(inputs["hidden_states"].shape[2:], transformer.config.patch_size, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        return Tokens((frames, height, width))

    @staticmethod
    def layer_inputs(inputs: Mapping[str, Any]) -> LayerInputs | None:
        """See DiffusersFamily."""
        # The block has normalised them: attention makes q, k and v of them as they are.
        return LayerInputs(hidden=inputs.get("hidden_states"))

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """Two layers, two heads of 12, and latents of 5 x 7 x 13 tokens."""
        from diffusers import WanTransformer3DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            sizes = {
                "num_attention_heads": 2,
                "attention_head_dim": 12,
                "num_layers": 2,
                "ffn_dim": 48,
                "text_dim": 32,
            }
            model: Any = WanTransformer3DModel(**sizes, rope_max_seq_len=32)
            inputs = {
                "hidden_states": torch.randn(1, 16, 5, 14, 26),
                "timestep": torch.tensor([500]),
                "encoder_hidden_states": torch.randn(1, 12, 32),
            }
        return model.eval(), inputs
