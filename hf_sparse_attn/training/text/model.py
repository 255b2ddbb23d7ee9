"""Language models by name: the one that comes with the package, a folder or a Hub id."""

from __future__ import annotations

from typing import Any

import torch

# Tokens of a model that reads bytes, which needs no tokenizer.
BYTES = 256


def load_language_model(source: str, dtype: Any, device: torch.device | str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        source: "byte_llama", a folder or a Hub id.
        dtype: as `from_pretrained` takes it.
        device: where it is put.

    Returns:
        the model, and the tokenizer; None for a model that reads bytes, which has 256 tokens.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == "byte_llama":
        from hf_sparse_attn.shipped.byte_llama import MODEL

        source = str(MODEL)
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval().to(device)
    reads_bytes = model.config.get_text_config().vocab_size == BYTES
    return model, None if reads_bytes else AutoTokenizer.from_pretrained(source)
