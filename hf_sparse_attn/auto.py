"""What `patch` runs where no method is named: a profile that is known or made of the model, or the best preset."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.family import Found, find_family, pretrained_models, provided
from hf_sparse_attn.presets import BUDGETS, best_preset, check_quality
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.known import Known, keep_known, look_up
from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.registry import METHODS, make_method

# Fewer tokens are not attended to sparsely, and tell nothing of it.
_FEWEST = 16


@dataclass(frozen=True)
class Choice:
    """What was chosen for a model, and what is known of it.

    Args:
        method: name of the method, whose preset for the quality is in force, or the profile.
        quality: the word that was asked for.
        why: in one line: what it is, and its quality as far as that was measured.
        skipped: files that could not be used or written, and why.
    """

    method: str | HeadProfile
    quality: str
    why: str
    skipped: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.why


def choose(model: Any, quality: str) -> Choice:
    """The profile that is known of a model, else the preset that did the least damage where it was measured.

    Args:
        model: a model or pipeline.
        quality: one of presets.QUALITIES.

    Raises:
        TypeError: a model of no known family.
        ValueError: unknown quality, or a family without presets.
    """
    check_quality(quality)
    found = find_family(model)
    known = look_up(model, quality)
    if known.profile is not None:
        return _of_profile(known.profile, quality, known)
    preset, figure = best_preset(*found, quality, lambda method: _usable(method, found))
    method = label_of(make_method(preset.method, dict(preset.params)))
    said = f"quality {quality!r}: {method}; "
    if figure is None:
        said += "its quality was not measured on a model of this kind"
    else:
        said += str(figure) + ("" if figure.family == found[0] else f"; not measured on models of family {found[0]}")
    return Choice(preset.method, quality, said, known.skipped)


def profiled(
    model: Any, quality: str, texts: Any = None, images: Any = None, batches: Any = None, tokenizer: Any = None
) -> Choice:
    """The profile of a model at a quality out of the cache, or made on the inputs given and put there.

    Args:
        model: a model or pipeline, not patched.
        quality: one of presets.QUALITIES.
        texts, images, batches, tokenizer: as in `patch()`.

    Raises:
        TypeError, ValueError, OSError: as `profile`, or inputs that are none.
        ValueError: the inputs are too short for the quality.
    """
    check_quality(quality)
    find_family(model)
    known = look_up(model, quality, shipped=False)
    if known.profile is None:
        # By its public name: what measures stands above this room.
        import hf_sparse_attn

        if batches is None:
            model, tokenizer = _within(model, images is not None, tokenizer)
        made = _batches(model, texts, images, batches, tokenizer)
        try:
            profile = hf_sparse_attn.profile(model, made, budget=BUDGETS[quality], source="inputs given to patch()")
        except ValueError as error:
            # Of a budget that cannot be met, which nobody gave here by that name.
            if getattr(error, "least", None) is None:
                raise
            raise ValueError(
                f"`quality` must be one that the inputs are long enough for, got {quality!r}, which keeps "
                f"{BUDGETS[quality]:g} of the pairs of tokens: {error}"
            ) from error
        known = Known(profile, "made here just now", (*known.skipped, *_kept(profile, model, quality)))
    assert known.profile is not None
    return _of_profile(known.profile, quality, known)


def _kept(profile: HeadProfile, model: Any, quality: str) -> tuple[str, ...]:
    """Puts a profile into the cache; where that cannot be done, says so: the profile took long and serves for now."""
    try:
        keep_known(profile, model, quality)
    # A folder that cannot be written, or weights that are not here to be looked at (offloaded ones).
    except Exception as error:
        return (f"the profile is not kept, so that the next patch() makes it anew: {str(error)[:300]}",)
    return ()


def _within(model: Any, is_image: bool, tokenizer: Any) -> tuple[Any, Any]:
    """The model in a pipeline of transformers, and the tokenizer or image processor there, for inputs of a model."""
    if isinstance(model, nn.Module) or not pretrained_models(model):
        return model, tokenizer
    own = getattr(model, "image_processor" if is_image else "tokenizer", None)
    return model.model, own if tokenizer is None else tokenizer


def _of_profile(profile: HeadProfile, quality: str, known: Known) -> Choice:
    said = f"quality {quality!r}: the head profile {known.where}, density {profile.density:.2g}; "
    figures = [
        f"{row['figure']} {row['sparse']:.4g}, dense {row['dense']:.4g} ({row['difference']:+.2g}), "
        f"{row['inputs']} inputs of {row['tokens']:,} tokens"
        for row in profile.evaluation
    ]
    said += "; ".join(figures) or "its quality on other inputs was not measured"
    return Choice(profile, quality, said, known.skipped)


def _usable(method: str, found: Found) -> bool:
    """Whether a method is installed and applies to all that the modules of a family are."""
    if method not in METHODS:
        return False
    kind = METHODS.get(method)
    if not getattr(found[1], "requires", frozenset()) <= kind.needs:
        return False
    return kind.needs <= provided(*found[1:]) and kind.reads <= getattr(found[1], "reads", frozenset())


def _batches(model: Any, texts: Any, images: Any, batches: Any, tokenizer: Any) -> Any:
    """What a profile is made on, as `profile` takes it."""
    given = {name: v for name, v in (("texts", texts), ("images", images), ("batches", batches)) if v is not None}
    if len(given) != 1:
        said = " and ".join(f"`{name}`" for name in given) or "none"
        raise TypeError(f'`profile="auto"` must come with one of `texts`, `images` and `batches`, got {said}')
    if batches is not None:
        return batches
    ((name, values),) = given.items()
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise TypeError(f"`{name}` must be a list, got {values!r:.100} of type {type(values).__name__}")
    rows = list(values)
    if not rows:
        raise ValueError(f"`{name}` must hold at least one, got none")
    if name == "images":
        return [_image(i, row, tokenizer) for i, row in enumerate(rows)]
    if not isinstance(model, nn.Module):
        return [{"prompt": row} for row in rows]
    if any(isinstance(row, str) for row in rows) and tokenizer is None:
        tokenizer = _tokenizer_of(model)
    return [_tokens(i, row, tokenizer) for i, row in enumerate(rows)]


def _tokens(index: int, text: Any, tokenizer: Any) -> dict[str, Tensor]:
    """The ids of one text, [1, tokens]."""
    ids = tokenizer(text).input_ids if isinstance(text, str) else text
    try:
        ids = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"`texts[{index}]` must be a text or token ids, got {text!r:.100}: {error}") from None
    if ids.numel() != ids.shape[-1:].numel():
        raise ValueError(f"`texts[{index}]` must be the ids of one text, got shape {list(ids.shape)}")
    ids = ids.reshape(1, -1)
    if ids.is_floating_point() or ids.shape[1] < _FEWEST:
        raise ValueError(f"`texts[{index}]` must be at least {_FEWEST} token ids, got {ids.shape[1]} of {ids.dtype}")
    return {"input_ids": ids}


def _image(index: int, image: Any, processor: Any) -> dict[str, Tensor]:
    """The pixels of one image, [1, channels, height, width]."""
    if isinstance(image, Tensor) and image.ndim in (3, 4):
        return {"pixel_values": image if image.ndim == 4 else image[None]}
    if processor is None:
        raise TypeError(
            f"`images[{index}]` must be pixel values [channels, height, width], or come with the model's image "
            f"processor as `tokenizer`, got {type(image).__name__}"
        )
    return {"pixel_values": processor(images=image, return_tensors="pt")["pixel_values"]}


def _tokenizer_of(model: Any) -> Any:
    """The tokenizer beside a model, as far as it is on this machine."""
    from transformers import AutoTokenizer

    name = getattr(model, "name_or_path", "") or ""
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=True)
    # The libraries have errors of many kinds for files that are not there.
    except Exception as error:
        raise ValueError(
            f"`texts` must be token ids, or come with `tokenizer`, for the model's own is not on this machine "
            f"(looked for at {name!r})"
        ) from error
