"""Tiny random instances of any transformers class: its configuration with every size cut down, weights and inputs."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.coverage.of_transformers import ROPE, UNSET, own_fields

VOCAB, TOKENS, WIDTH, HEADS, HEAD_DIM = 128, 40, 64, 4, 16
# Ids of special tokens lie from here on, those of texts below.
_SPECIAL = 100

_LAYERS = re.compile(
    r"(?!.*(shared|nextn|mtp|dense))((num|n|encoder|decoder)(_hidden)?_layers?|num_.*_layers|depths?|.*_(num_layers|depth)"
    r"|layers)"
)
# The first rule whose name matches a field decides; None keeps the value. A number goes down to the limit, never up.
_RULES: tuple[tuple[str, int | None], ...] = (
    (r"attention_hidden_size|mamba_d_ssm", 2 * WIDTH),
    (r"qk_head_dim", 2 * HEAD_DIM),
    (r"attention_head_dim", 2 * WIDTH // HEADS),
    (r"(.*_)?(n_groups?|ngroups)|num_expert_groups?|topk_groups?", 1),
    (r"base_channels", 32),
    (r"num_embeddings|.*hash_byte_group_vocab", VOCAB),
    (r".*(vocab_size|vocabulary_size|num_embeddings_vocab)(_per_layer_input)?", VOCAB),
    (r"mtp_.*|num_nextn_predict_layers|num_mtp_layers|num_kv_shared_layers", 0),
    (r"num_(key_value|kv|query)_(heads|groups)|.*_kv_heads|multi_query_group_num|.*num_key_value_heads", 2),
    (r"mamba_(n|num)_heads|mamba_.*n_heads", 4),
    (r"mamba_(d_)?head(_dim)?|mamba_head_dim|mamba_headdim", 32),
    (r"linear_num_(key|value)_heads", 4),
    (r"(num|n)(_.*)?_heads?|.*attention_heads|.*_num_heads", HEADS),
    (r"(.*_)?(head_dim|head_size|d_kv|kv_channels|headdim|rotary_dim|head_dims)|qk_(nope|rope)_.*", HEAD_DIM),
    (r"(q|kv|o|index)_lora_rank|.*lora_rank|.*_lora_dim", 32),
    (r".*(per_tok(en)?|top_?k|topk_group|moe_top_k)(_experts)?|moe_k|top_k_experts", 2),
    (r"(n|num)_shared_experts|.*num_shared_experts", 1),
    (r"first_k_dense_replace|moe_layer_start_index|num_dense_layers", 1),
    (r".*(num|n)_.*experts|num_experts|.*_num_experts|.*expert_num", 4),
    (r".*(intermediate|ffn|inner|mlp)_(size|dim|hidden_size)(_mlp)?|d_ff|.*ffn_dim|ffn_hidden_size|n_inner", 96),
    (r"hidden_size_per_layer_input", 16),
    (r".*hidden_size|.*hidden_dim|d_model|n_embd|dim|.*embed_dim|embedding_(dim|size)|word_embed_proj_dim", WIDTH),
    (r".*(projection|proj|output|input|out|model)_dim|lru_width|.*_emb_dim|.*cross_attention_dim", WIDTH),
    (r"(mamba_)?(d_state|ssm_state_size|state_size)|.*_d_state", 16),
    (r"(max|n)_(position_embeddings|positions|target_positions|source_positions|ctx)|seq_length|max_seq_len", 512),
)
_COMPILED = tuple((re.compile(pattern), limit) for pattern, limit in _RULES)


def tiny_configs(kind: Any, layers: tuple[int, ...] = (2, 8), decoder: bool = True) -> Iterator[Any]:
    """Configurations of a class from its defaults with the sizes cut down, sub-configurations included.

    Those that the class itself refuses are left out. More layers are for models of which only some layers have
    attention; unset fields are filled in for classes that cannot be built from their own defaults.

    Args:
        kind: a transformers model class.
        layers: of every part, in this order.
        decoder: ask a class that can read both ways or from left to right for the latter.

    Raises:
        Exception: whatever the last one was refused with, where all are.
    """
    whole = own_fields(kind, decoder)
    refused: Exception | None = None
    tried: list[dict[str, Any]] = []
    made = 0
    for count in layers:
        for filled in (False, True):
            sizes = _shrunk(whole, count, filled)
            if sizes in tried:
                continue
            tried.append(copy.deepcopy(sizes))
            try:
                config = kind.config_class.from_dict(sizes)
            except Exception as error:
                refused = refused or error
                continue
            made += 1
            yield config
    if not made and refused is not None:
        raise refused


def _shrunk(given: Mapping[str, Any], layers: int, filled: bool) -> dict[str, Any]:
    """Fields with smaller values; what lists one entry per layer is cut to the layers left, every kind among them."""
    counts = {v for name, v in given.items() if _LAYERS.fullmatch(name) and isinstance(v, int) and v > layers}
    special: Iterator[int] = iter(range(_SPECIAL, VOCAB))
    found: dict[str, Any] = {}
    for name, value in given.items():
        if name in ("out_features", "out_indices", "stage_names"):
            # They name layers that are cut away; a class works them out anew.
            continue
        if name == "per_layer_config" and isinstance(value, Mapping) and value:
            found[name] = {layers - 1: _shrunk(next(iter(value.values())), layers, False)}
        elif isinstance(value, Mapping):
            own = name.endswith("config") or "model_type" in value
            found[name] = _shrunk(value, layers, filled) if own else copy.deepcopy(dict(value))
            if filled and name == "attn_config":
                found[name].setdefault("rope_theta", 10000.0)
        elif isinstance(value, list) and re.fullmatch(r"vision_feature_layers?", name):
            found[name] = [min(v, layers - 1) for v in value]
        elif isinstance(value, list) and len(value) in counts:
            found[name] = _some(value, layers)
        elif value is None and filled and name in UNSET:
            found[name] = UNSET[name](layers)
        elif isinstance(value, bool) or not isinstance(value, int):
            found[name] = value
        elif re.fullmatch(r".*token_(id|index)|.*_token_id_.*", name):
            found[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, next(special, VOCAB - 1))
        elif _LAYERS.fullmatch(name) and value > layers:
            found[name] = layers
        else:
            found[name] = _limited(name, value)
    if "kv_lora_rank" in given:
        # Latent attention has as many keys as queries; where a head has a rotated part and another, both are in it.
        found["num_key_value_heads"] = found.get("num_attention_heads", HEADS)
        if (given.get("head_dim") or 0) > (given.get("qk_rope_head_dim") or 0) > 0:
            found["head_dim"] = 2 * HEAD_DIM
    if found.get("hybrid_layer_ids"):
        found["hybrid_layer_ids"] = [layers - 1]
    if filled and set(found.get("layer_types") or ()) == {"linear_attention"}:
        # A hybrid whose defaults forget the attention.
        found["layer_types"][-1] = "full_attention"
    if "index_block_size" in found and set(found.get("layer_types") or ()) == {"full_attention"}:
        # MiniMax M3, whose defaults forget the layers that select blocks.
        found["layer_types"][-1] = "minimax_m3_sparse"
        found["index_block_size"] = 8
    if "index_kpool" in found:
        # Pools are read whole.
        found["index_kpool"], found["index_topk"] = 4, 8
    if isinstance(found.get("mamba_d_head"), int) and isinstance(found.get("mamba_n_heads"), int):
        inner = found.get("mamba_d_ssm") or found["mamba_expand"] * found["hidden_size"]
        found["mamba_n_heads"] = inner // found["mamba_d_head"]
    if "use_cache" in found:
        found["use_cache"] = False
    if isinstance(found.get("eos_token_id"), list):
        found["eos_token_id"] = 2
    if "initializer_range" in found:
        # Large enough that attention is far from uniform.
        found["initializer_range"] = 0.2
    _fit_rope(found, filled)
    found.pop("transformers_version", None)
    return found


def _limited(name: str, value: int) -> int:
    for pattern, limit in _COMPILED:
        if pattern.fullmatch(name):
            return value if limit is None else min(value, limit)
    return value


def _some(value: list[Any], layers: int) -> list[Any]:
    """`layers` of the entries in their order, the last of every kind among them as far as they fit."""
    kinds = list(dict.fromkeys(map(str, value)))
    wanted = (kinds * layers)[:layers] if len(kinds) > 1 else [str(value[0])] * layers
    by_name = {str(v): v for v in value}
    return [by_name[name] for name in wanted]


def _fit_rope(found: dict[str, Any], filled: bool) -> None:
    """Sections of rotary positions add up to half of the rotated part of a head."""
    kinds = [kind for kind in dict.fromkeys(found.get("layer_types") or ()) if "attention" in kind]
    rope = found.get("rope_parameters")
    if not rope and filled and kinds and "rope_parameters" in found:
        found["rope_parameters"] = {kind: dict(ROPE) for kind in kinds}
    if not rope or not isinstance(rope, dict):
        return
    share = rope.get("partial_rotary_factor", found.get("partial_rotary_factor")) or 1.0
    dim = found.get("head_dim") or found.get("hidden_size", WIDTH) // (found.get("num_attention_heads") or HEADS)
    half = int(dim * share) // 2
    given = rope.get("mrope_section")
    if given or (filled and "rope_type" in rope):
        # Height, width and time; a class that knows no sections reads none.
        count = len(given) if given else 3
        rope["mrope_section"] = [half - half // count * (count - 1)] + [half // count] * (count - 1)


def tiny_model(kind: Any, config: Any) -> Any:
    """A model with random weights in float32, none of them all zero, in evaluation mode.

    Args:
        kind: a transformers model class.
        config: its configuration.
    """
    for part in _configs(config):
        # The grouped matrix product of mixture models wants sizes that a tiny one has not.
        part._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = kind(config).eval()
        draw = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.parameters():
                # Gates that begin closed would let attention have no part in the output.
                if parameter.is_floating_point() and not bool(parameter.any()):
                    parameter.copy_(torch.randn(parameter.shape, generator=draw) * 0.1)
    return model


def _configs(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None and hasattr(part, "to_dict"):
            yield from _configs(part)


def tiny_inputs(config: Any) -> dict[str, Tensor]:
    """One text of random tokens, none of them special; one row per codebook for decoders of sound."""
    rows = config.num_codebooks if str(config.model_type).startswith("musicgen") else 1
    ids = torch.randint(3, _SPECIAL, (rows, TOKENS), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids}


def encoder_inputs(kind: Any, config: Any) -> Iterator[dict[str, Tensor]]:
    """What a model that reads both ways may want, least first: its main input alone, then all that it takes.

    Args:
        kind: a transformers model class.
        config: its configuration; images, clips and sounds are of the size that it names.
    """
    takes = inspect.signature(kind.forward).parameters
    main = str(kind.main_input_name)
    ids = tiny_inputs(config)["input_ids"]
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: ids,
        "pixel_values": lambda: _pixels(config),
        "pixel_values_videos": lambda: _pixels(config, frames=8),
        "input_values": lambda: _noise(1, 16000) if not _of(config, "num_mel_bins") else _sound(config).mT,
        "input_features": lambda: _sound(config),
        "attention_mask": lambda: torch.ones_like(ids),
    }
    second = {"decoder_input_ids": ids.flip(1)} if "decoder_input_ids" in takes else {}
    yield {main: makers.get(main, lambda: ids)(), **second}
    if main == "input_features":
        yield {main: _sound(config).mT, **second}
    if main == "pixel_values":
        yield {main: _pixels(config, frames=int(_of(config, "num_frames") or 8)), **second}
    both = [name for name in ("input_ids", "pixel_values", "attention_mask") if name in takes]
    yield {**{name: makers[name]() for name in both}, **second}


def _of(config: Any, name: str) -> Any:
    """A field of a configuration or of the first of its parts that has it."""
    return next((getattr(c, name) for c in _configs(config) if getattr(c, name, None) is not None), None)


def _noise(*sizes: int) -> Tensor:
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0))


def _pixels(config: Any, frames: int = 0) -> Tensor:
    size = _of(config, "image_size") or _of(config, "crop_size") or 224
    height, width = (size, size) if isinstance(size, int) else tuple(size)[:2]
    channels = _of(config, "num_channels") or _of(config, "in_channels") or 3
    return _noise(1, *((frames,) if frames else ()), channels, height, width)


def _sound(config: Any) -> Tensor:
    """A spectrogram [1, bands, steps] as long as the configuration allows."""
    bands = _of(config, "num_mel_bins") or _of(config, "input_feat_per_channel") or _of(config, "input_dim") or 80
    steps = 2 * (_of(config, "max_source_positions") or 100)
    return _noise(1, bands, _of(config, "max_length") or min(steps, 1024))
