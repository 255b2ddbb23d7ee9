"""The shipped language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.profiles.measurements import DEFAULT_METRIC
from hf_sparse_attn.shipped import SHIPPED

MODEL = Path(__file__).parents[1] / "assets" / "byte_llama"


def settings(length: int) -> list[tuple[str, dict[str, Any]]]:
    """Methods and parameters for a document of `length` tokens, the tighter budget of each method last."""
    return [
        ("sliding_window", {"window": length // 4, "sink": 16, "block_size": 64}),
        ("sliding_window", {"window": length // 16, "sink": 16, "block_size": 64}),
        ("vertical_slash", {"vertical": length // 16, "slash": 3 * length // 64, "block_size": 64}),
        ("vertical_slash", {"vertical": length // 32, "slash": length // 32, "block_size": 64}),
        ("block_topk", {"density": 0.25, "block_size": 64}),
        ("block_topk", {"density": 0.125, "block_size": 64}),
    ]


def load_model(path: Path = MODEL) -> Any:
    """The shipped byte-level Llama, in evaluation mode.

    Raises:
        FileNotFoundError: the weights are not where they should be.
    """
    from transformers import AutoModelForCausalLM

    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(f"the shipped model must be at {path}, got no model.safetensors there")
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


# What a lost needle weighs beside the squared error of a layer, which hardly sees it: a question is a few rows of
# thousands. Of 0.02, 0.1 and 0.5 the one that answered the most needles at the least loss.
NEEDLE_WEIGHT = 0.02


def default_metric(model: str) -> str:
    """What damage is where nothing is said; needles are known of the shipped language model alone."""
    return f"{DEFAULT_METRIC} + {NEEDLE_WEIGHT} * retrieval_score" if model == SHIPPED[0] else DEFAULT_METRIC
