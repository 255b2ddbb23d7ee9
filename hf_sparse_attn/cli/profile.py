"""`hf-sparse-attn profile`: profiles a model from a folder, the Hub or this package, and writes the profile."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.api import check_device
from hf_sparse_attn.context import check_int
from hf_sparse_attn.extras import needing
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.profiling.run import check_settings, profile
from hf_sparse_attn.profiling.view.report import render, summary
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.sharing.hub import loading
from hf_sparse_attn.shipped import SHIPPED
from hf_sparse_attn.shipped.byte_llama import default_metric

_PROMPTS = (
    "a dog runs along the beach, waves behind it",
    "a train crosses a bridge in the mountains, seen from above",
    "a chef cuts vegetables in a bright kitchen, close up",
    "rain falls on a busy street at night, neon lights in the puddles",
)
# Needles hidden in every document for the shipped language model.
_NEEDLES = 16


def main(args: argparse.Namespace, width: int) -> str:
    """Profiles, saves, and returns what to print.

    Args:
        args: as the command line gives them.
        width: of the terminal.

    Raises:
        ValueError: an option that does not fit the model, or a file that is none of what it should be.
        OSError: a file or model that is not there.
    """
    # What can be refused is refused before a model is loaded, a folder that cannot be made as well.
    check_int("batches", args.batches, 1)
    check_int("seed", args.seed, 0)
    device = check_device(args.device)
    metric = args.metric or default_metric(args.model)
    steps = list(pairwise([0.0, *args.steps, 1.0])) if args.steps else None
    chosen: dict[str, Any] = {"per": args.per, "passes": args.passes, "steps": steps}
    chosen["max_plans_per_layer"] = args.max_plans_per_layer
    check_settings(args.budget, metric, **chosen)
    if args.query_blocks is not None:
        check_int("query_blocks", args.query_blocks, 1)
    _dtype(args.dtype)
    candidates = None if args.candidates is None else _candidates(Path(args.candidates))
    make_folder(args.output)
    model, batches, source = _load(args, device)
    found = profile(
        model,
        batches,
        candidates,
        args.budget,
        metric,
        **chosen,
        same_in_group=args.same_in_group,
        query_blocks=args.query_blocks,
        state=args.state,
        seed=args.seed,
        source=source,
    )
    found.save_pretrained(args.output)
    document = {**summary(found, worst=0), "output": str(args.output)}
    if args.json:
        return json.dumps(document, indent=2)
    use = f"saved in {args.output}: hf_sparse_attn.patch(model, {str(args.output)!r})"
    return f"{render(document, width)}\n\n{use}"


def _candidates(path: Path) -> list[Any]:
    from hf_sparse_attn.profiles.measurements import methods_of

    try:
        return list(methods_of(json.loads(path.read_text(encoding="utf-8"))))
    except OSError as error:
        raise type(error)(f"`candidates` must be a file that can be read, got {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"`candidates` must be a JSON list of methods with params, got {path}: {error}") from error


# ---------------------------------------------------------------------- models and what they read


def _load(args: argparse.Namespace, device: torch.device) -> tuple[Any, list[Any], str]:
    """Model, batches, and what the batches are in words."""
    lengths = args.length or (4096,)
    if args.model == "byte_llama":
        from hf_sparse_attn.shipped.byte_llama import load_model

        _refuse(args, "data", "call", "dtype")
        # Documents first, for a length that they cannot have.
        documents = _documents(lengths, args.batches, args.seed)
        shipped: Any = load_model()
        return shipped.to(device), documents, "standard library, needles"
    if args.model == "moving_wan":
        _refuse(args, "data", "length", "call", "dtype")
        return *_moving(args.batches, args.seed, device), "synthetic moving scenes"
    with loading(args.model, besides=SHIPPED):
        is_pipeline = _file_of(args.model, "model_index.json") is not None
        config = _file_of(args.model, "config.json")
        if config is None and not is_pipeline:
            raise ValueError("it holds neither config.json nor model_index.json")
        keys = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    if is_pipeline:
        _refuse(args, "length")
        return *_pipeline(args, device), "prompts"
    _refuse(args, "call")
    if "_class_name" in keys:
        raise ValueError(
            "`model` must be a whole pipeline, for a transformer alone does not tell what to run it on; "
            f"got {args.model}"
        )
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with loading(args.model, besides=SHIPPED):
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        model: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=_dtype(args.dtype))
    model = model.to(device).eval()
    said = "standard library" if args.data is None else Path(args.data).name
    return model, _texts(tokenizer, args.data, lengths, args.batches), said


def _refuse(args: argparse.Namespace, *names: str) -> None:
    """Options that would be ignored."""
    given = [f"--{name}" for name in names if getattr(args, name) not in (None, "auto")]
    if given:
        raise ValueError(f"{' and '.join(given)} must be left out for {args.model}")


def _dtype(name: str) -> Any:
    known = {"auto": "auto", "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ValueError(f"`dtype` must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}")
    return known[name]


def _file_of(model: str, name: str) -> Path | None:
    """A file of a model's folder or Hub repository, or None where it has none of that name."""
    if Path(model).is_dir():
        path = Path(model) / name
        return path if path.is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except RemoteEntryNotFoundError:
        return None
    except LocalEntryNotFoundError:
        # Without a network only what was loaded before is known.
        return None


def _documents(lengths: Sequence[int], batches: int, seed: int) -> list[dict[str, Any]]:
    """Documents of the shipped model's training with needles in them."""
    from hf_sparse_attn.shipped.corpus import needle_document

    made = []
    for length in lengths:
        for i in range(batches):
            document = needle_document(length, needles=_NEEDLES, seed=seed + i, split="train")
            ids = document.token_ids
            made.append({"input_ids": ids, "labels": ids, "needles": document.questions})
    return made


def _read(data: str) -> str:
    try:
        return Path(data).read_text(encoding="utf-8")
    except OSError as error:
        raise type(error)(f"`data` must be a file that can be read, got {data}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"`data` must be a text in UTF-8, got {data}: {error}") from error


def _texts(tokenizer: Any, data: str | None, lengths: Sequence[int], batches: int) -> list[dict[str, Tensor]]:
    """Runs of tokens from the start of a text, each of its own."""
    if data is None:
        from hf_sparse_attn.shipped.corpus import standard_library_text

        text = "\n".join(part.decode("utf-8", "replace") for _, part in standard_library_text("train")[:200])
    else:
        text = _read(data)
    wanted = sum(lengths) * batches
    # Far more characters than that make no difference and take long to tokenise.
    ids = tokenizer(text[: 16 * wanted], return_tensors="pt").input_ids
    if ids.shape[1] < wanted:
        raise ValueError(
            f"`data` must hold at least {wanted} tokens for {batches} texts of each length, got {ids.shape[1]}"
        )
    made, start = [], 0
    for length in lengths:
        for _ in range(batches):
            part = ids[:, start : start + check_int("length", length, 16)]
            start += length
            made.append({"input_ids": part, "labels": part})
    return made


def _pipeline(args: argparse.Namespace, device: torch.device) -> tuple[Any, list[Any]]:
    with needing("a pipeline"):
        from diffusers import DiffusionPipeline

    dtype = _dtype(args.dtype)
    try:
        call = json.loads(args.call) if args.call else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"`call` must be a JSON object, got {args.call}: {error}") from error
    if not isinstance(call, dict):
        raise ValueError(f"`call` must be a JSON object, got {args.call}")
    with loading(args.model, besides=SHIPPED):
        pipe: Any = DiffusionPipeline.from_pretrained(args.model, torch_dtype=None if dtype == "auto" else dtype)
    pipe = pipe.to(device)
    lines = _PROMPTS if args.data is None else _read(args.data).splitlines()
    prompts = [line.strip() for line in lines if line.strip()][: args.batches]
    if not prompts:
        raise ValueError(f"`data` must hold one prompt per line, got none in {args.data}")

    def batch(number: int, prompt: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(args.seed + number)
        return {"prompt": prompt, "generator": generator, "output_type": "latent", **call}

    return pipe, [batch(i, prompt) for i, prompt in enumerate(prompts)]


def _moving(batches: int, seed: int, device: torch.device) -> tuple[Any, list[Any]]:
    """The shipped video model, and denoising runs over classes of scenes."""
    from hf_sparse_attn.shipped import moving
    from hf_sparse_attn.shipped.moving_scenes import draw_classes

    model = moving.load_moving_wan().to(device)
    classes = draw_classes(batches, seed)

    def run(scene: Any, number: int) -> Callable[[Any], Any]:
        return lambda model: moving.sample(model, [scene], seed=seed + number)

    return model, [run(scene, i) for i, scene in enumerate(classes)]
