"""Family llama: every transformers decoder whose attention goes through the attention interface."""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass
from threading import Lock
from typing import Any, ClassVar

from torch import nn

from hf_sparse_attn.method import Decline
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.registry import FAMILIES

log = logging.getLogger(__name__)

# Decoders that choose their own keys: they cut the mask up inside the model, and have nothing left to make sparse.
_SPARSE_BY_THEMSELVES = frozenset(
    {
        "axk2",
        "deepseek_v32",
        "deepseek_v4",
        "doge",
        "dots3_note",
        "glm5_next",
        "glm_moe_dsa",
        "hy_v4",
        "minimax_m3_vl",
        "mistral_large4",
        "qwen4_exp",
    }
)
_FIELD = "_attn_implementation_internal"
_ABSENT: Any = object()


@FAMILIES.register("llama")
class Llama:
    """Llama, Mistral, Qwen, Gemma, Phi, gpt_oss and their like; in a model of images and text, its text decoder."""

    provides: ClassVar[frozenset[str]] = frozenset({"causal"})
    models: ClassVar[str] = "transformers decoders on the attention interface (Llama, Mistral, Qwen2/3, Gemma2/3, ...)"

    @staticmethod
    def targets(model: Any) -> list[nn.Module] | Decline:
        """The decoders inside a model: the innermost transformers models that own text attention."""
        # Where this was never imported there can be no such model, and asking must not cost the import.
        if "transformers.modeling_utils" not in sys.modules:
            return Decline("not a transformers model")
        from transformers import PreTrainedModel

        pipelines = sys.modules.get("transformers.pipelines.base")
        if pipelines is not None and isinstance(model, pipelines.Pipeline):
            model = model.model
        inner = [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []
        if not inner:
            return Decline("not a transformers model")
        owners = list(dict.fromkeys(owner for _, _, owner in _attention_modules(model)))
        if not owners:
            return Decline("no causal self-attention that goes through the attention interface of transformers")
        for owner in owners:
            config: Any = owner.config
            if config.model_type in _SPARSE_BY_THEMSELVES:
                return Decline(f"attention of {config.model_type} is sparse by itself")
            if getattr(config, "is_encoder_decoder", False):
                return Decline("encoder-decoder models are not covered")
            if not type(owner)._can_set_attn_implementation():
                return Decline(f"{type(owner).__name__} does not let its attention implementation be set")
        return owners

    @staticmethod
    def install(patch: Patch) -> None:
        """Gives every attention module its state and lets the configs point at the hook."""
        from hf_sparse_attn.transformers_hook import (
            NATIVE_PREFIX,
            STATE_ATTRIBUTE,
            LayerState,
            default_dense,
        )

        found = []
        for owner in patch.modules:
            prefix = f"{type(owner).__name__}." if len(patch.modules) > 1 else ""
            found += [(f"{prefix}{name}", m, o) for name, m, o in _attention_modules(owner) if o is owner]
        num_layers = max((m.layer_idx for _, m, _ in found), default=0) + 1
        configs: dict[int, Any] = {}
        for name, module, owner in found:
            for config in (owner.config, module.config):
                configs.setdefault(id(config), config)
            original = _original(module.config)
            # A native name is sparse itself: dense then means what the model would have run without it.
            dense = default_dense(module) if original.startswith(NATIVE_PREFIX) else original
            state = LayerState(patch.session.record(name, module.layer_idx), patch.session, num_layers, dense)
            patch.set_attribute(module, STATE_ATTRIBUTE, state)
        for config in configs.values():
            _switch_on(config)
            patch.on_remove(_switch_off, config)

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A two-layer Llama with grouped heads and 111 tokens."""
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config)
            return model.eval(), {"input_ids": torch.randint(3, 128, (2, 111))}


def _attention_modules(model: nn.Module) -> list[tuple[str, Any, Any]]:
    """(name, attention module, innermost transformers model that holds it) in the order of the model."""
    from transformers import PreTrainedModel

    from hf_sparse_attn.transformers_hook import is_text_attention

    owners: dict[str, PreTrainedModel] = {}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        elif is_text_attention(module):
            above = [name[:i] for i in range(len(name)) if i == 0 or name[i] == "."]
            owner = next((owners[n] for n in reversed(above) if n in owners), None)
            if owner is not None:
                found.append((name, module, owner))
    return found


@dataclass
class _Switch:
    """A config that points at the hook, how many patches want that, and what it held before."""

    config: weakref.ref[Any]
    patches: int
    before: Any


_SWITCHES: dict[int, _Switch] = {}
_LOCK = Lock()


def _original(config: Any) -> str:
    """The implementation a config names, also when it points at the hook already."""
    from hf_sparse_attn.transformers_hook import PATCHED_PREFIX

    return str(config._attn_implementation or "eager").removeprefix(PATCHED_PREFIX)


def _switch_on(config: Any) -> None:
    from hf_sparse_attn.transformers_hook import PATCHED_PREFIX, STATE_ATTRIBUTE, register

    with _LOCK:
        known = _SWITCHES.get(id(config))
        if known is not None:
            known.patches += 1
            return
        key, original = id(config), _original(config)
        name = f"{PATCHED_PREFIX}{original}"
        register(name, original, lambda module: module.__dict__.get(STATE_ATTRIBUTE))
        gone = weakref.ref(config, lambda _: _SWITCHES.pop(key, None))
        _SWITCHES[key] = _Switch(gone, 1, config.__dict__.get(_FIELD, _ABSENT))
        config.__dict__[_FIELD] = name


def _switch_off(config: Any) -> None:
    from hf_sparse_attn.transformers_hook import PATCHED_PREFIX

    with _LOCK:
        known = _SWITCHES[id(config)]
        known.patches -= 1
        if known.patches:
            return
        del _SWITCHES[id(config)]
        now = str(config.__dict__.get(_FIELD))
        if not now.startswith(PATCHED_PREFIX):
            log.warning("attn_implementation was set to %r while the model was patched; it is left so", now)
        elif known.before is _ABSENT:
            config.__dict__.pop(_FIELD, None)
        else:
            config.__dict__[_FIELD] = known.before
