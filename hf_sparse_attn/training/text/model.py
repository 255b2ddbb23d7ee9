"""Language models by name: the one that comes with the package, a folder or a Hub id."""

from __future__ import annotations

from typing import Any

import torch

from hf_sparse_attn.sharing.hub import loading

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

    Raises:
        ValueError, OSError: `source` is no model that can be loaded.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if source == "byte_llama":
        from hf_sparse_attn.shipped.byte_llama import MODEL

        source = str(MODEL)
    with loading(source, besides=("byte_llama",)):
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype).eval()
        reads_bytes = model.config.get_text_config().vocab_size == BYTES
        tokenizer = None if reads_bytes else AutoTokenizer.from_pretrained(source)
    return model.to(device), tokenizer
