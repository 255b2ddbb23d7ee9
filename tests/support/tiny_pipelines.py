"""Tiny random instances of the pipeline classes of diffusers that hold a transformer, and a call of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Collection, Mapping
from typing import Any, get_args

import diffusers
import torch
from PIL import Image

from hf_sparse_attn.coverage.of_diffusers import diffusers_kinds
from tests.support.tiny_diffusers import tiny_model, tiny_sizes
from tests.support.tiny_diffusers_rules import POOLED, TEXT, WIDTH
from tests.support.tiny_pipelines_table import (
    CONTROLNETS,
    FRAMES,
    HEIGHT,
    OMIT,
    PIPES,
    SCHEDULERS,
    STEPS,
    TRANSFORMERS,
    VAES,
    WIDE,
    Pipe,
    image,
    video,
)

# Parts that only turn a prompt or an image into what is given ready made.
_ABSENT = re.compile(
    r"(text_|image_|vision_language_)?(encoder|tokenizer|processor)(_\d)?|.*_(processor|encoder|tokenizer)|processor"
    r"|feature_extractor.*|safety_checker|tokenizer.*|text_encoder.*|pe|pe_tokenizer|siglip|image_encoder|.*upscaler|vocoder"
)


def pipeline_classes() -> dict[str, type[Any]]:
    """The pipeline classes of diffusers that have a transformer, by name."""
    found = {}
    for name in dir(diffusers):
        kind = getattr(diffusers, name, None)
        if isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline):
            if transformer_parts(kind):
                found[name] = kind
    return found


def transformer_parts(kind: type[Any]) -> dict[str, type[Any]]:
    """The transformer classes of a pipeline class by the names of its parts."""
    kinds = diffusers_kinds()
    return {name: one for name, said in annotations(kind).items() for one in classes_of(said) if one.__name__ in kinds}


def annotations(kind: type[Any]) -> dict[str, Any]:
    """What the parts of a pipeline class are annotated with."""
    if "__init__" not in vars(kind):
        return {}
    return {
        name: parameter.annotation
        for name, parameter in inspect.signature(kind.__init__, eval_str=True).parameters.items()
        if name != "self" and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }


def classes_of(annotation: Any) -> list[type[Any]]:
    """The classes that an annotation names."""
    if isinstance(annotation, type) and not get_args(annotation):
        return [annotation]
    return [kind for part in get_args(annotation) for kind in classes_of(part)]


def tiny_pipeline(name: str, scheduler: Any = None, **parts: Any) -> Any:
    """A pipeline with random weights in float32 and without text encoders.

    Args:
        name: of its class.
        scheduler: instead of its own.
        parts: components instead of those that would be made.
    """
    kind, own = getattr(diffusers, name), PIPES.get(name, Pipe())
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parameters = inspect.signature(kind.__init__).parameters
        for part, said in annotations(kind).items():
            if part in parts:
                made[part] = parts[part]
            elif part in own.parts:
                value = own.parts[part]
                made[part] = value() if callable(value) else value
            elif part == "scheduler":
                made[part] = scheduler_of(name, said) if scheduler is None else scheduler
            else:
                found = _part(part, said, parameters[part].default, own)
                if found is not OMIT:
                    made[part] = found
        pipe = kind(**made)
    own.prepare(pipe)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def scheduler_of(name: str, annotation: Any) -> Any:
    """A scheduler of the class that is published with a pipeline, or that it is annotated with."""
    for pattern, (kind, settings) in SCHEDULERS.items():
        if re.fullmatch(pattern, name):
            return getattr(diffusers, kind)(**settings)
    for kind in classes_of(annotation):
        if issubclass(kind, diffusers.SchedulerMixin) and kind is not diffusers.SchedulerMixin:
            return kind()
    return diffusers.FlowMatchEulerDiscreteScheduler()


def _part(part: str, said: Any, default: Any, own: Pipe) -> Any:
    """A component by its name and annotation; OMIT leaves it to its default."""
    kinds = classes_of(said)
    sizes = own.sizes.get(part, {})
    for kind in kinds:
        if kind.__name__ in diffusers_kinds():
            known = {**tiny_sizes(kind), **TRANSFORMERS.get(kind.__name__, {}), **sizes}
            return tiny_model(kind, {k: v for k, v in known.items() if v is not OMIT})
        if kind.__name__ in VAES:
            return kind(**{**VAES[kind.__name__], **sizes}).eval()
        if kind.__name__.endswith("ControlNetModel"):
            known = {**tiny_sizes(kind), **CONTROLNETS.get(kind.__name__, {}), **sizes}
            return tiny_model(kind, {k: v for k, v in known.items() if v is not OMIT})
    if part == "guider":
        return diffusers.ClassifierFreeGuidance(guidance_scale=4.0)
    if _ABSENT.fullmatch(part):
        return None
    if default is not inspect.Parameter.empty:
        return OMIT
    raise LookupError(f"no tiny {part} is known: {said}")


def tiny_call(pipe: Any, steps: int = STEPS, **more: Any) -> dict[str, Any]:
    """Keyword arguments of a call that needs no text encoder and decodes nothing.

    Args:
        pipe: of `tiny_pipeline`.
        steps: number of inference steps.
        more: other arguments; OMIT leaves one out.
    """
    name, call = type(pipe).__name__, inspect.signature(type(pipe).__call__).parameters
    own = PIPES.get(name, Pipe()).call
    given: dict[str, Any] = {}
    draw = torch.Generator().manual_seed(1)
    for key in call:
        given[key] = own[key] if key in own else _argument(key, call, draw)
    given = _made(given, draw)
    if "num_inference_steps" in call:
        given["num_inference_steps"] = steps
    given.update({key: value for key, value in more.items() if value is not OMIT})
    return {key: value for key, value in given.items() if more.get(key) is not OMIT or key not in more}


def _made(given: Mapping[str, Any], draw: torch.Generator) -> dict[str, Any]:
    """Arguments of a call, with functions called and shapes made tensors."""
    made = {}
    for key, value in given.items():
        one = value() if callable(value) else value
        if isinstance(one, tuple) and one and all(type(n) is int for n in one) and key not in _PLAIN:
            one = torch.randn(one, generator=draw)
        if one is not OMIT:
            made[key] = one
    return made


# Arguments whose tuples are no shapes.
_PLAIN = ("original_size", "target_size", "crops_coords_top_left", "sample_size")
_SIMPLE: Mapping[str, Any] = {
    "output_type": "latent",
    "height": HEIGHT,
    "width": WIDE,
    "num_frames": FRAMES,
    "max_sequence_length": TEXT,
}


def _argument(key: str, call: Collection[str], draw: torch.Generator) -> Any:
    """What an argument of this name is in most pipelines; OMIT where the rules know none."""
    bare = key.removeprefix("negative_")
    if bare == "prompt":
        # Some have a text of their own for where none is given.
        return None
    if key in _SIMPLE:
        return _SIMPLE[key]
    if key == "generator":
        return torch.Generator().manual_seed(0)
    if bare == "prompt_embeds":
        return torch.randn(1, TEXT, WIDTH, generator=draw)
    if bare == "pooled_prompt_embeds":
        return torch.randn(1, POOLED, generator=draw)
    if bare in ("prompt_attention_mask", "prompt_embeds_mask"):
        return torch.ones(1, TEXT).long()
    if key in ("image", "control_image"):
        return image()
    if key in ("mask_image", "control_mask"):
        return Image.new("L", (WIDE, HEIGHT), 255)
    if key == "video" and "image" not in call:
        return video()
    return OMIT


def modular_classes() -> dict[str, type[Any]]:
    """The modular pipelines of diffusers by name."""
    found = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    return {
        name: kind
        for name, kind in found.items()
        if isinstance(kind, type) and issubclass(kind, diffusers.ModularPipeline) and kind.default_blocks_name
    }


def modular_blocks(name: str) -> Any:
    """What denoises in a modular pipeline, between what encodes and what decodes."""
    blocks = getattr(diffusers.modular_pipelines, getattr(diffusers, name).default_blocks_name)()
    return blocks.sub_blocks["denoise"]


def tiny_modular(name: str) -> Any:
    """A modular pipeline of the blocks that denoise, with random weights in float32."""
    blocks, own = modular_blocks(name), PIPES.get(name, Pipe())
    pipe = getattr(diffusers, name)(blocks=blocks)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = {}
        for spec in blocks.expected_components:
            if spec.name in own.parts:
                value = own.parts[spec.name]
                made[spec.name] = value() if callable(value) else value
            elif spec.name == "scheduler":
                made[spec.name] = scheduler_of(name, spec.type_hint)
            elif spec.default_creation_method == "from_pretrained":
                made[spec.name] = _part(spec.name, spec.type_hint, inspect.Parameter.empty, own)
    pipe.update_components(**made)
    own.prepare(pipe)
    _silence(pipe.blocks)
    return pipe


def _silence(blocks: Any) -> None:
    """Without the bars that blocks draw by themselves."""
    if hasattr(blocks, "set_progress_bar_config"):
        blocks.set_progress_bar_config(disable=True)
    for block in (getattr(blocks, "sub_blocks", None) or {}).values():
        _silence(block)


def modular_call(pipe: Any, name: str, steps: int = STEPS) -> dict[str, Any]:
    """Keyword arguments of a call of `tiny_modular`."""
    wanted = [one.name for one in pipe.blocks.inputs if one.name]
    own, draw = PIPES.get(name, Pipe()).call, torch.Generator().manual_seed(1)
    given = {key: own[key] if key in own else _argument(key, wanted, draw) for key in dict.fromkeys((*wanted, *own))}
    return {**_made(given, draw), "num_inference_steps": steps}
