"""Every model that patch() takes can be profiled, or the parts of it are named that can."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiling.observe import Seen, observing
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support import tiny_encoders, tiny_families, tiny_lm

WINDOW = make_method("sliding_window", {"window": 1 / 4, "sink": 1, "block_size": 16})


def _text(name: str) -> tuple[Any, dict[str, Any]]:
    return tiny_lm.FAMILIES[name](), {"input_ids": tiny_lm.tokens(1, 64)}


def _encoder(name: str) -> tuple[Any, dict[str, Any]]:
    return tiny_encoders.ENCODERS[name](), tiny_encoders.inputs(name)


def _both(name: str, config: str, **sizes: Any) -> tuple[Any, dict[str, Any]]:
    import transformers

    common: dict[str, Any] = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "eos_token_id": 2}
    for side in ("encoder", "decoder"):
        common |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 48}
    made = getattr(transformers, config)(**{**common, "decoder_start_token_id": 1, **sizes})
    return getattr(transformers, name)(made).eval(), tiny_encoders.inputs("bart")


MODELS: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {
    **tiny_families.MODELS,
    # All layers of the tiny Mistral have a window of their own, and stay as they are.
    **{name: lambda name=name: _text(name) for name in tiny_lm.FAMILIES if name != "mistral"},
    **{name: lambda name=name: _encoder(name) for name in tiny_encoders.ENCODERS},
    "marian": lambda: _both("MarianMTModel", "MarianConfig"),
    "mbart": lambda: _both("MBartForConditionalGeneration", "MBartConfig"),
    # Other heads and other layers on either side.
    "uneven": lambda: _both("BartForConditionalGeneration", "BartConfig", decoder_layers=3, decoder_attention_heads=2),
}


def _whole(model: Any, given: dict[str, Any]) -> Callable[[Any], Any]:
    return lambda part: model(**given)


def _seen(model: Any, batch: Any) -> set[tuple[int, ...]]:
    """Heads and sizes of the calls that are made: query heads, key/value heads, size of a head, layers."""
    found: set[tuple[int, ...]] = set()

    def look(shown: Seen) -> None:
        ctx = shown.ctx
        found.add((ctx.num_heads, ctx.num_kv_heads, ctx.head_dim, ctx.num_layers))

    with observing(model, look), torch.no_grad():
        batch(model) if callable(batch) else model(**batch)
    return found


@pytest.mark.parametrize("name", MODELS)
def test_it_or_the_parts_that_are_named_are_profiled(name: str) -> None:
    model, given = MODELS[name]()
    try:
        Fingerprint.of(model)
        places = [""]
    except ValueError as error:
        places = re.findall(r"model\.([\w.]+)", str(error).partition(": give ")[2])
        assert len(places) > 1, error
    for place in places:
        part, batch = (model, given) if not place else (model.get_submodule(place), _whole(model, given))
        found = hsa.profile(part, [batch], [WINDOW], 0.9, progress=False, maps=0)
        known = found.model
        assert _seen(part, batch) == {(known.heads, known.kv_heads, known.head_dim, known.layers)}
        with hsa.patch(part, found, min_tokens=0) as patch, torch.no_grad():
            model(**given)
        assert patch.report().density < 1
