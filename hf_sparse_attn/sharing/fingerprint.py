"""Fingerprint: what of a model must be the same for a profile of its heads to mean anything."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.family import find_family

LARGEST = 4096
_LONGEST = 200
# Of a parameter, at least: a head that was edited or pruned is another model's.
_WEIGHTS = 64
# Fields of a config that define attention. Not dtype, paths, versions, dropout or the implementation of attention.
_ROPE = re.compile(r".*(rope|rotary|theta|axes_dim|pos_embed).*")
_ATTENTION = re.compile(
    r"model_type|hidden_size|inner_dim|n_embd|.*head_dim|n_head|n_layer|num_.*(heads|layers|blocks)|layer_types"
    r"|(use_)?sliding_window|max_window_layers|attention_(bias|window|chunk_size|multiplier)|.*softcapping"
    r"|query_pre_attn_scalar|use_bidirectional_attention|(use_)?qk_norm|.*patch_size.*|vace_layers"
)


@dataclass(frozen=True)
class Fingerprint:
    """What a profile remembers of its model.

    Args:
        model_class: class of the transformer that holds the attention, so that heads on top, PEFT or a pipeline
            around it change nothing.
        family: name of its family.
        layers: number of self-attention layers, as layers are counted in a Context.
        heads, kv_heads: query heads, and key/value heads, of a layer.
        head_dim: size of a query vector.
        rope: hash of how positions are rotated, or "" where the config does not say.
        config_hash: hash of the other fields of the config that define attention.

    Raises:
        ValueError, TypeError: a number that is not from 1 to 4096, heads that are no multiple of kv_heads, or a name
            that is not a short text.
    """

    model_class: str
    family: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: str
    config_hash: str

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kv_heads", "head_dim"):
            if check_int(name, getattr(self, name), 1) > LARGEST:
                raise ValueError(f"`{name}` must be at most {LARGEST}, got {getattr(self, name)}")
        if self.heads % self.kv_heads:
            raise ValueError(f"`kv_heads` must divide `heads` = {self.heads}, got {self.kv_heads}")
        for name in ("model_class", "family", "rope", "config_hash"):
            value = getattr(self, name)
            if not isinstance(value, str):
                raise TypeError(f"`{name}` must be a str, got {value!r} of type {type(value).__name__}")
            if len(value) > _LONGEST or not value.isprintable():
                raise ValueError(f"`{name}` must be at most {_LONGEST} printable characters, got {value[:40]!r}")

    @classmethod
    def of(cls, model: Any) -> Fingerprint:
        """The fingerprint of a model of transformers or diffusers, or of a pipeline; patched or not.

        Raises:
            TypeError: a model of no known family.
            ValueError: its parts differ in number or size of heads, so that no one profile can describe them.
        """
        family, _, modules = find_family(model)
        layers = _count_layers(model)
        of_part = {
            part: cls(type(part).__name__, family, layers, *_sizes(part, config), *_hashes(config))
            for part, config in _parts(modules)
        }
        found = set(of_part.values())
        if len(found) != 1:
            first, *others = sorted(found, key=str)
            raise ValueError(
                f"`model` must have attention of one kind, got {len(found)} in {type(model).__name__}"
                + "".join(f" ({'; '.join(first.difference(other))})" for other in others)
                + _give(model, of_part)
            )
        return found.pop()

    def check(self, model: Any, whose: str) -> None:
        """Raises where a model is another one than `whose`, "the gates were trained for".

        Raises:
            ValueError: names every field that differs, with both values.
            TypeError: a model of no known family.
        """
        different = self.difference(Fingerprint.of(model))
        if different:
            raise ValueError(f"`model` must be the one that {whose}; {'; '.join(different)}")

    def difference(self, other: Fingerprint) -> list[str]:
        """The fields that differ, each with both values: "heads: 32 here, 28 in the model"."""
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self)]
        return [
            f"{name}: {mine if mine != '' else 'none'} here, {their if their != '' else 'none'} in the model"
            for name, mine, their in pairs
            if mine != their
        ]


def weights_hash(model: Any) -> str:
    """Short hash of a model's classes, and of some weights of every parameter, spread over it."""
    digest = hashlib.sha256()
    for module in find_family(model)[2]:
        digest.update(type(module).__name__.encode())
        for name, weight in module.named_parameters():
            flat = weight.detach().flatten()
            some = flat[:: max(1, len(flat) // _WEIGHTS)].float().cpu()
            digest.update(f"{name} {list(weight.shape)} {some.tolist()}".encode())
    return digest.hexdigest()[:16]


def _count_layers(model: Any) -> int:
    """Layers as the hooks of the family number them; a patch that does nothing finds out where none is."""
    from hf_sparse_attn.patching import Patch, active_patch
    from hf_sparse_attn.policy import Policy
    from hf_sparse_attn.registry import METHODS
    from hf_sparse_attn.session import Session

    name, family, modules = find_family(model)
    active = next((p for module in modules if (p := active_patch(module)) is not None), None)
    if active is not None:
        records = active.session.records
    else:
        with Patch(name, Session(METHODS.get("dense")(), Policy(), "auto", False), modules, model) as trial:
            family.install(trial)
            records = trial.session.records
    return max((r.index for r in records.values() if not r.exact), default=-1) + 1


def _parts(modules: list[nn.Module]) -> list[tuple[nn.Module, dict[str, Any]]]:
    """The modules that hold self-attention, each with its config by name."""
    parts = []
    for module in modules:
        config: Any = getattr(module, "config", None)
        if hasattr(config, "to_dict"):
            if _attention_of(module) is None:
                continue
            config = config.to_dict()
        parts.append((module, dict(config) if isinstance(config, Mapping) else {}))
    return parts


def parts_of(model: Any, parts: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Those parts of a model that have a fingerprint by themselves, by where they stand in it ("model.encoder").

    Args:
        model: a model, or a pipeline of transformers.
        parts: modules within it.
    """
    root = model if isinstance(model, nn.Module) else getattr(model, "model", None)
    names = {id(m): name for name, m in root.named_modules()} if isinstance(root, nn.Module) else {}
    found = {}
    for part in parts:
        if names.get(id(part)):
            with suppress(TypeError, ValueError):
                Fingerprint.of(part)
                found[names[id(part)]] = part
    return found


def _give(model: Any, parts: Iterable[nn.Module]) -> str:
    """Names the parts of a model that can be given in its place."""
    root = "model" if isinstance(model, nn.Module) else "pipeline.model"
    names = [f"{root}.{name}" for name in parts_of(model, parts)]
    return f": give {' or '.join(names)}" if names else ""


def _sizes(module: nn.Module, config: dict[str, Any]) -> tuple[int, int, int]:
    """Query heads, key/value heads and the size of a head: by the config, else by the first attention module."""
    attention: Any = next((m for m in module.modules() if hasattr(m, "heads") or hasattr(m, "head_dim")), None)
    own = _attention_of(module)

    def number(*names: str, default: Any = None) -> int:
        values = [value for name in names if isinstance(value := config.get(name), int) and value > 0]
        return int(values[0] if values else default)

    def of_module(*names: str) -> int:
        values = (getattr(own, name, None) for name in names)
        return next((value for value in values if isinstance(value, int) and value > 0), 0)

    heads = number("num_attention_heads", "n_head", "num_heads", default=getattr(attention, "heads", 0))
    # The fields of a config by their own names; others that mean the same (BART, DistilBERT) are not among them.
    known = heads > 0
    heads = heads or of_module("num_heads", "n_heads", "num_attention_heads") or _rows(own, "q_proj")
    kv_heads = number(
        "num_key_value_heads", "num_kv_heads", "num_key_value_attention_heads",
        default=heads if known else of_module("num_key_value_heads", "num_kv_heads") or _rows(own, "k_proj") or heads,
    )  # fmt: skip
    width = number("hidden_size", "n_embd", default=getattr(attention, "inner_dim", heads))
    if not known:
        width = heads * of_module("head_dim", "attention_head_size") or getattr(own.config, "hidden_size", width)
    dim = number("head_dim", "attention_head_dim", default=getattr(attention, "head_dim", width // max(1, heads)))
    return heads, kv_heads, dim


def _rows(attention: Any, name: str) -> int:
    """Heads that a projection of an attention module makes, 0 where that is not known."""
    width, dim = getattr(getattr(attention, name, None), "out_features", 0), getattr(attention, "head_dim", None)
    return width // dim if isinstance(dim, int) and dim > 0 else 0


def _attention_of(module: nn.Module) -> Any:
    """The first attention module of which a model of transformers is the innermost that holds it, or None."""
    if not hasattr(getattr(module, "config", None), "to_dict"):
        return None
    from hf_sparse_attn.hosts.transformers_encoder import is_any_attention
    from hf_sparse_attn.hosts.transformers_install import attention_modules

    return next((m for _, m, owner in attention_modules(module, is_any_attention) if owner is module), None)


def _hashes(config: dict[str, Any]) -> tuple[str, str]:
    """Hash of the fields on rotation, and of the others that define attention."""
    public = {name: value for name, value in config.items() if not name.startswith("_")}
    rope = {name: value for name, value in public.items() if _ROPE.fullmatch(name)}
    rest = {name: value for name, value in public.items() if name not in rope and _ATTENTION.fullmatch(name)}
    return _hash(rope), _hash(rest)


def _hash(values: dict[str, Any]) -> str:
    plain = _plain(values)
    if not plain:
        return ""
    text = json.dumps(plain, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """Without what says nothing: later versions of a library add fields that are None or False."""
    if isinstance(value, Mapping):
        made = {str(k): _plain(v) for k, v in value.items()}
        return {k: v for k, v in made.items() if v is not None and v is not False and v != {}}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value
