"""Which models of the transformers installed here can be patched: decoders and encoders by task.

The decision is the families' own, asked of an instance without memory for its weights.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch

from hf_sparse_attn.coverage.listing import Coverage, Progress, Way, quiet, short
from hf_sparse_attn.family import ask_families

TASKS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "image-text": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image classification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "video classification": "MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING_NAMES",
    "image-text similarity": "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "text to text": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
# What reads text from left to right.
_DECODERS = frozenset({"causal LM", "image-text"})
# What stands for None where a class cannot be built without, by the number of layers.
UNSET: dict[str, Callable[[int], Any]] = {
    "attn_layer_indices": lambda layers: [layers - 1],
    "deepstack_layer_map": lambda layers: [],
    "default_language": lambda layers: "en_XX",
    "head_dim": lambda layers: 16,
    "indexer_budget": lambda layers: 8,
    "indexer_compress_ratio": lambda layers: 4,
    "indexer_head_dim": lambda layers: 256,
    "indexer_kv_heads": lambda layers: 1,
    "indexer_n_heads": lambda layers: 4,
    "layer_types": lambda layers: ["full_attention"] * layers,
    "mlp_layer_types": lambda layers: ["dense"] * layers,
    "moe_intermediate_size": lambda layers: 32,
    "n_routed_experts": lambda layers: 4,
    "n_shared_experts": lambda layers: 1,
    "num_experts": lambda layers: 4,
    "num_experts_per_tok": lambda layers: 2,
    "num_key_value_heads": lambda layers: 2,
    "sliding_window": lambda layers: 512,
    "spatial_target_layers": lambda layers: [],
    "top_k_experts": lambda layers: 2,
    "vocabulary_map": lambda layers: {"<image>": 100},
}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
Configs = Callable[[Any, bool], Iterable[Any]]


def transformers_classes(
    names: Iterable[str] | None = None, progress: Progress | None = None, configs: Configs | None = None
) -> list[Coverage]:
    """The classes that transformers lists for the tasks of TASKS, by name.

    Args:
        names: of the classes; None means all.
        progress: wraps the pairs of class name and task, such as tqdm does.
        configs: of a class, and whether it is to read from left to right: configurations to ask before its own.

    Raises:
        ValueError: a name that transformers does not list.
    """
    listed = transformers_tasks()
    chosen = list(listed) if names is None else list(names)
    unknown = sorted(set(chosen) - set(listed))
    if unknown:
        raise ValueError(f"`names` must be classes that transformers lists, got {', '.join(unknown)}")
    pairs: Iterable[tuple[str, str]] = [(name, listed[name]) for name in chosen]
    wrapped = pairs if progress is None else progress(pairs)
    with quiet("transformers"):
        found = [_of(name, task, configs) for name, task in wrapped]
    return sorted(found, key=lambda c: c.name)


def transformers_tasks() -> dict[str, str]:
    """Class name -> what transformers lists it for: keys of TASKS joined by a comma."""
    auto: Any = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, str] = {}
    for task, mapping in TASKS.items():
        for names in getattr(auto, mapping, {}).values():
            for name in (names,) if isinstance(names, str) else names:
                known = found.setdefault(name, task)
                found[name] = known if task in known.split(", ") else f"{known}, {task}"
    return dict(sorted(found.items()))


def reads_onward(task: str) -> bool:
    """Whether a class of these tasks reads text from left to right."""
    return not _DECODERS.isdisjoint(task.split(", "))


def own_fields(kind: Any, decoder: bool) -> dict[str, Any]:
    """The fields of a class's own configuration; BERT and its like read both ways unless told to be decoders."""
    fields: dict[str, Any] = kind.config_class().to_dict()
    return {**fields, "is_decoder": True} if decoder and "is_decoder" in fields else fields


def _of(name: str, task: str, configs: Configs | None) -> Coverage:
    import transformers

    try:
        kind: Any = getattr(transformers, name)
        file = str(kind.__module__)
    except Exception as error:
        return Coverage(name, "transformers", None, None, short(error), False, False, "transformers", task)
    family, reason, built = _decide(kind, reads_onward(task), configs)
    way: Way | None = None if family is None else "interface"
    return Coverage(name, file, family, way, reason, built, False, "transformers", task)


def _decide(kind: Any, decoder: bool, configs: Configs | None) -> tuple[str | None, str | None, bool]:
    """The family or the reason why none, and whether an instance was asked."""
    reason: str | None = None
    refused: Exception | None = None
    for config in _attempts(kind, decoder, configs):
        try:
            if isinstance(config, Exception):
                raise config
            with torch.device("meta"):
                model = kind(config)
        except Exception as error:
            refused = refused or error
            continue
        found, reasons = ask_families(model)
        if found is not None:
            return found[0], None, True
        # Where only some layers have attention, another instance may have one.
        reason = reason or _own_reason(reasons, decoder)
    return None, reason or f"could not be built: {short(refused)}", reason is not None


def _attempts(kind: Any, decoder: bool, configs: Configs | None) -> Iterator[Any]:
    """Configurations, or why there is none: those given, the class's own, and its own with what it lacks."""

    def own(kind: Any, decoder: bool) -> Iterator[Any]:
        yield kind.config_class.from_dict(own_fields(kind, decoder))

    def filled(kind: Any, decoder: bool) -> Iterator[Any]:
        yield kind.config_class.from_dict(_filled(own_fields(kind, decoder)))

    for source in (own, filled) if configs is None else (configs, own, filled):
        try:
            yield from source(kind, decoder)
        except Exception as error:
            yield error


def _filled(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields, those of its parts included, with values for what a class cannot be built without."""
    layers = given.get("num_hidden_layers") or 2
    found: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Mapping) and (name.endswith("config") or "model_type" in value):
            found[name] = _filled(value)
        else:
            found[name] = UNSET[name](layers) if value is None and name in UNSET else value
    if "attn_config" in found:
        found["attn_config"].setdefault("rope_theta", ROPE["rope_theta"])
    fill_rope(found)
    heads = found.get("num_attention_heads")
    if isinstance(heads, int) and isinstance(found.get("hidden_size"), int):
        # A whole number of dimensions each.
        found["num_attention_heads"] = math.gcd(heads, found["hidden_size"]) if "head_dim" not in found else heads
    found.pop("transformers_version", None)
    return found


def fill_rope(found: dict[str, Any]) -> None:
    """One attention layer at least, and rotary positions for every kind of them."""
    if set(found.get("layer_types") or ()) == {"linear_attention"}:
        # A hybrid whose defaults forget the attention.
        found["layer_types"][-1] = "full_attention"
    if "index_block_size" in found and set(found.get("layer_types") or ()) == {"full_attention"}:
        # MiniMax M3, whose defaults forget the layers that select blocks.
        found["layer_types"][-1] = "minimax_m3_sparse"
    kinds = [kind for kind in dict.fromkeys(found.get("layer_types") or ()) if "attention" in kind]
    rope = found.get("rope_parameters")
    if kinds and not rope and "rope_parameters" in found:
        found["rope_parameters"] = {kind: dict(ROPE) for kind in kinds}
    elif isinstance(rope, dict) and "rope_type" in rope and not rope.get("mrope_section"):
        # Height, width and time; a class that knows no sections reads none.
        half = int((found.get("head_dim") or 16) * rope.get("partial_rotary_factor", 1.0)) // 2
        rope["mrope_section"] = [half - 2 * (half // 3), half // 3, half // 3]


def _own_reason(reasons: Mapping[str, str], decoder: bool) -> str:
    """The reason of the family that the class is about; the others only say that it is not theirs."""
    own = reasons["llama" if decoder else "encoder"]
    return reasons["encoder"] if own.startswith("encoder-decoder") else own
