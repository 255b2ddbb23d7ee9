"""What a model is run on: any model by its name, with batches of texts, images, speech or prompts made for it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch

from hf_sparse_attn.context import check_int
from hf_sparse_attn.extras import needing
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.pretrained import NAMES
from hf_sparse_attn.profiling.input_batches import (
    LENGTH,
    Given,
    Loaded,
    Source,
    Wanted,
    found_by,
    read_text,
    with_batches,
)
from hf_sparse_attn.profiling.measure import Batch
from hf_sparse_attn.sharing.hub import loading, reading
from hf_sparse_attn.shipped import SHIPPED

DTYPES: dict[str, Any] = {
    "auto": "auto",
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Prompts for models that make videos or images.
PROMPTS = (
    "a dog runs along the beach, waves behind it",
    "a train crosses a bridge in the mountains, seen from above",
    "a chef cuts vegetables in a bright kitchen, close up",
    "rain falls on a busy street at night, neon lights in the puddles",
)
_GGUF = ".gguf"
# Height and width of images for DINOv2: 56 patches of 14 pixels.
_DINOV2_SIDE = 784
# Needles hidden in every document for the shipped language model.
_NEEDLES = 16


def load(
    model: str,
    *,
    texts: Given | None = None,
    images: Given | None = None,
    audio: Given | None = None,
    prompts: Given | None = None,
    data: Source | None = None,
    length: Sequence[int] | None = None,
    size: int | None = None,
    count: int = 4,
    part: str | None = None,
    call: Mapping[str, Any] | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    seed: int = 0,
    shorter: bool = False,
) -> Loaded:
    """Loads a model and makes batches of what it reads.

    Args:
        model: the folder of a model or pipeline, its id on the Hub, a GGUF file (on the Hub "name/repository/file"),
            or the name of a shipped model or of one of pretrained/.
        texts: for models of text: a file, a folder of files, or texts; None means Python's standard library.
        images: for models of images: files, a folder of them, or pictures as PIL has them.
        audio: for models of speech: WAV files, a folder of them, or waveforms at the rate that the model wants.
        prompts: for pipelines: a file with one on each line, or prompts; None means a few of this package.
        data: a file of texts or prompts, whichever the model reads.
        length: tokens of a text, one or several; None means 4096, or as many as the model has positions for.
        size: height and width that images are brought to, in pixels; None means what the model's processor does.
        count: texts of each length, images, recordings or prompts.
        part: attribute of the model that is wanted in its place, "model.encoder", or the end of its name.
        call: more arguments of a pipeline's call.
        dtype: of the weights, one of DTYPES.
        device: where the model goes.
        seed: of what is drawn.
        shorter: without a `length`, whether texts are cut shorter where those that were given are too few for it.

    Returns:
        the model in evaluation mode, `count` batches for each length, and what they are.

    Raises:
        ValueError: an option that does not fit the model, or inputs that it cannot read.
        OSError: a file or model that is not there.
        MissingExtra: a package that is needed is not installed.
    """
    check_int("count", count, 1)
    check_dtype(dtype)
    options = {
        "texts": texts, "images": images, "audio": audio, "prompts": prompts, "data": data, "length": length,
        "size": size, "part": part, "call": call, "dtype": None if dtype == "auto" else dtype,
    }  # fmt: skip
    given = Wanted(model, {name: value for name, value in options.items() if value is not None}, count, seed, shorter)
    if model in SHIPPED:
        return _shipped(given, torch.device(device))
    if model in NAMES:
        return _pretrained(given, torch.device(device))
    file = _gguf(model)
    if file is None and is_pipeline(model):
        given.refuse_all_but("prompts", "data", "call", "dtype")
        return _pipeline(given, torch.device(device))
    given.refuse("prompts", "call")
    whole = _transformers_model(model, file, DTYPES[dtype]).to(device).eval()
    return with_batches(given, whole, found_by(*(file or (model, None))))


def read_call(text: str) -> dict[str, Any]:
    """The arguments of a pipeline's call from a command line.

    Raises:
        ValueError: no JSON object.
    """
    try:
        call = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"`call` must be a JSON object, got {text}: {error}") from error
    if not isinstance(call, dict):
        raise ValueError(f"`call` must be a JSON object, got {text}")
    return call


def check_dtype(name: str) -> None:
    """Refuses a dtype that is none.

    Raises:
        ValueError: it is not one of DTYPES.
    """
    if name not in DTYPES:
        raise ValueError(f"`dtype` must be one of {', '.join(DTYPES)}, got {name!r}{nearest(name, DTYPES)}")


# ---------------------------------------------------------------------- shipped models


def _shipped(given: Wanted, device: torch.device) -> Loaded:
    if given.model == "byte_llama":
        from hf_sparse_attn.shipped.byte_llama import load_model

        given.refuse_all_but("length")
        # Documents first, for a length that they cannot have.
        documents = _documents(given.options.get("length", (LENGTH,)), given.number, given.seed)
        byte_llama: Any = load_model()
        return Loaded(byte_llama.to(device), documents, "standard library, needles")
    from hf_sparse_attn.shipped import moving
    from hf_sparse_attn.shipped.moving_scenes import draw_classes

    given.refuse_all_but()

    def run(scene: Any, number: int) -> Callable[[Any], Any]:
        return lambda model: moving.sample(model, [scene], seed=given.seed + number)

    scenes = draw_classes(given.number, given.seed)
    moving_wan = moving.load_moving_wan().to(device)
    return Loaded(moving_wan, [run(scene, i) for i, scene in enumerate(scenes)], "synthetic moving scenes")


def _documents(lengths: Sequence[int], count: int, seed: int) -> list[Batch]:
    """Documents of the shipped model's training with needles in them."""
    from hf_sparse_attn.shipped.corpus import needle_document

    made: list[Batch] = []
    for length in lengths:
        for i in range(count):
            document = needle_document(length, needles=_NEEDLES, seed=seed + i, split="train")
            ids = document.token_ids
            made.append({"input_ids": ids, "labels": ids, "needles": document.questions})
    return made


# ---------------------------------------------------------------------- real weights that are installed


def _pretrained(given: Wanted, device: torch.device) -> Loaded:
    """A model of pretrained/, on its own inputs to choose by where none are given."""
    own: dict[str, Any] = {}
    if given.model == "smollm2":
        from hf_sparse_attn.pretrained import smollm2, texts

        given.refuse("prompts", "call")
        model = smollm2.load_model(DTYPES[given.options.get("dtype", "float32")])
        reader = smollm2.load_tokenizer()
        if not {"texts", "data"} & set(given.options):
            own = {"texts": list(texts.CALIBRATION.values())}
    elif given.model == "dinov2":
        from hf_sparse_attn.pretrained import dinov2, images

        given.refuse("prompts", "call", "dtype")
        model, reader = dinov2.load_model(), _Pixels()
        if "images" not in given.options:
            own = {"images": images.images(given.number, given.seed, images.CALIBRATION)}
    else:
        from hf_sparse_attn.pretrained import speech, whisper

        given.refuse("prompts", "call", "dtype")
        model, reader = whisper.load_model(), whisper.load_extractor()
        if "audio" not in given.options:
            own = {"audio": [speech.speak(said) for said in speech.calibration_sentences[: given.number]]}
    named = given._replace(options={**own, **given.options})
    return with_batches(named, model.to(device).eval(), lambda what: reader)


class _Pixels:
    """What makes the pixels of DINOv2, called as an image processor of transformers."""

    size: ClassVar[dict[str, int]] = {}

    def __call__(self, image: Any, size: Mapping[str, int] | None = None, **_: Any) -> Any:
        from hf_sparse_attn.pretrained import dinov2

        side = _DINOV2_SIDE if size is None else size["height"]
        return SimpleNamespace(pixel_values=dinov2.pixels(np.asarray(image), side))


# ---------------------------------------------------------------------- models of the libraries


def _gguf(model: str) -> tuple[str, str] | None:
    """Folder or repository, and name, of a GGUF file; None where the model is none."""
    if not model.endswith(_GGUF):
        return None
    path = Path(model)
    # A file on the Hub is named behind its repository.
    if path.is_file() or len(path.parts) != 3 or path.is_absolute():
        if not path.is_file():
            raise FileNotFoundError(f"`model` must be a GGUF file that is there, got {model}")
        return str(path.parent), path.name
    return "/".join(path.parts[:2]), path.parts[2]


def is_pipeline(model: str) -> bool:
    """Whether a folder or repository holds a pipeline, and not a model of transformers.

    Raises:
        ValueError, OSError: it holds neither, or nothing that can be run.
    """
    with loading(model, besides=SHIPPED):
        whole = _file_of(model, "model_index.json") is not None
        config = _file_of(model, "config.json")
        if config is None and not whole:
            unseen = "" if Path(model).is_dir() else ", as far as the Hub can be reached"
            raise ValueError(f"it holds neither config.json nor model_index.json{unseen}")
        keys = {} if config is None else json.loads(config.read_text(encoding="utf-8"))
    if not whole and "_class_name" in keys:
        raise ValueError(
            f"`model` must be a whole pipeline, for a transformer alone does not tell what to run it on; got {model}"
        )
    return whole


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


def _pipeline(given: Wanted, device: torch.device) -> Loaded:
    with needing("a pipeline"):
        from diffusers import DiffusionPipeline

    dtype = given.options.get("dtype")
    with loading(given.model, besides=SHIPPED):
        pipe: Any = DiffusionPipeline.from_pretrained(given.model, torch_dtype=DTYPES[dtype] if dtype else None)
    argument, source = given.one_of("prompts", "data")
    if source is None:
        lines: Sequence[str] = PROMPTS
    else:
        lines = read_text(argument, source).splitlines() if isinstance(source, (str, os.PathLike)) else source
    prompts = [line.strip() for line in lines if line.strip()][: given.number]
    if not prompts:
        raise ValueError(f"`{argument}` must hold one prompt per line, got none in {source}")

    def batch(number: int, prompt: str) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(given.seed + number)
        return {"prompt": prompt, "generator": generator, "output_type": "latent", **given.options.get("call", {})}

    return Loaded(pipe.to(device), [batch(i, prompt) for i, prompt in enumerate(prompts)], "prompts")


def _transformers_model(model: str, file: tuple[str, str] | None, dtype: Any) -> Any:
    import transformers
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

    if file is not None:
        with needing("a GGUF file"):
            import gguf  # noqa: F401  # transformers reads such files by it
        with reading(f"`model` must be a GGUF file that transformers can read, got {model}"):
            return AutoModelForCausalLM.from_pretrained(file[0], gguf_file=file[1], dtype=dtype)
    with loading(model, besides=SHIPPED):
        config: Any = AutoConfig.from_pretrained(model)
        # The class that the weights were saved of; a folder may not say.
        named = (getattr(transformers, name, None) for name in getattr(config, "architectures", None) or ())
        kind: Any = next((found for found in named if found is not None), None)
        if kind is None:
            kind = AutoModelForCausalLM if type(config) in AutoModelForCausalLM._model_mapping else AutoModel
        return kind.from_pretrained(model, dtype=dtype)


# ---------------------------------------------------------------------- batches by what a model reads
