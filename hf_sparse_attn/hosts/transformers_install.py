"""Putting the hook into transformers models: which modules are text attention, their state, the switch of configs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from hf_sparse_attn.decision import as_before
from hf_sparse_attn.family import pretrained_models
from hf_sparse_attn.hosts import NATIVE_PREFIX, PATCHED_PREFIX
from hf_sparse_attn.hosts.transformers_cache import watch_caches
from hf_sparse_attn.hosts.transformers_compile import CompiledLayer
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE, bind
from hf_sparse_attn.hosts.transformers_hook import (
    RUNS,
    LayerState,
    default_dense,
    dense_function,
    is_text_attention,
    register,
)
from hf_sparse_attn.hosts.transformers_inputs import watch_layer
from hf_sparse_attn.hosts.transformers_switch import is_switched, mend_copy, original, switch_off, switch_on
from hf_sparse_attn.patching import Patch, submodule_at
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.session import Session

# Method of a model of transformers that every continuous batching begins with.
_PAGED = "init_continuous_batching"


Wanted = Callable[[nn.Module, str], bool]


def _is_text(module: nn.Module, name: str) -> bool:
    return is_text_attention(module)


def attention_modules(model: nn.Module, wanted: Wanted = _is_text) -> list[tuple[str, Any, Any]]:
    """(name, attention module, innermost transformers model that holds it) in the order of the model.

    Args:
        model: any module.
        wanted: which modules, by themselves and their name; causal text attention if not given.
    """
    owners: dict[str, PreTrainedModel] = {}
    found = []
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            owners[name] = module
        elif wanted(module, name):
            above = [name[:i] for i in range(len(name)) if i == 0 or name[i] == "."]
            owner = next((owners[n] for n in reversed(above) if n in owners), None)
            if owner is not None:
                found.append((name, module, owner))
    return found


def install_text(
    patch: Patch,
    owners: Iterable[tuple[str, Any]],
    wanted: Wanted = _is_text,
    known: Callable[[Any, Any], dict[str, Any]] = lambda module, owner: {},
) -> None:
    """Gives every attention module its state and lets the configs point at the hook.

    Args:
        patch: undoes it.
        owners: (prefix of its layers' names in the report, transformers model that owns attention).
        wanted: which modules; see attention_modules.
        known: what else the state of an attention module with its owner holds; see LayerState.
    """
    configs: dict[int, Any] = {}
    bound = bind(patch, patch.modules)
    caches = None if patch.session.decoder.method is None else watch_caches(patch, patch.modules)
    watched: list[tuple[Any, dict[str, tuple[Any, LayerRecord]]]] = []
    for prefix, owner in owners:
        places: dict[str, tuple[Any, LayerRecord]] = {}
        found = [(name, module) for name, module, holder in attention_modules(owner, wanted) if holder is owner]
        # Layers of encoders have no number of their own.
        own = [getattr(module, "layer_idx", None) for _, module in found]
        numbers = [place if index is None or index < 0 else index for place, index in enumerate(own)]
        runs = _shared(owner.config, len(found)) or [[number] for number in numbers]
        if any(len(indices) > 1 for indices in runs):
            patch.hook(owner, "register_forward_pre_hook", _count_runs, with_kwargs=True)
        for (name, module), indices in zip(found, runs, strict=True):
            for config in (owner.config, module.config):
                configs.setdefault(id(config), config)
            extra = known(module, owner)
            if patch.session.reads:
                extra["watch"] = watch_layer(patch, module, name)
            dense = dense_name(module)
            states = []
            for index in indices:
                own_name = f"{prefix}{name}" if len(indices) == 1 else f"{prefix}{name} (layer {index})"
                record = patch.session.record(own_name, index)
                state = LayerState(
                    record, patch.session, max(map(max, runs)) + 1, dense, bound=bound, caches=caches, **extra
                )
                compiled = CompiledLayer(state, module, dense_function(dense, module))
                states.append(replace(state, compiled=compiled))
            bound.states[module] = state = replace(states[0], later=tuple(states[1:]))
            patch.set_attribute(module, STATE_ATTRIBUTE, state)
            places[name] = module, state.record
        watched.append((owner, places))
    # The configs last: only they let calls come here.
    bound.configs.update(configs)
    for config in configs.values():
        switch(patch, config)
    for owner, places in watched:
        patch.hook(owner, "register_forward_pre_hook", watch_changes(patch.session, owner, places))
    refuse_pages(patch)


def refuse_pages(patch: Patch) -> None:
    """Has continuous batching refused until a patch is removed."""
    for model in pretrained_models(patch.model):
        if hasattr(model, _PAGED):
            patch.set_attribute(model, _PAGED, _refuse_pages)


def _shared(config: Any, modules: int) -> list[list[int]]:
    """Which layers each attention module is, where layers share modules (ALBERT); else none."""
    groups, inner = getattr(config, "num_hidden_groups", 0), getattr(config, "inner_group_num", 1)
    if not groups or modules != groups * inner:
        return []
    layers: list[list[int]] = [[] for _ in range(modules)]
    for layer in range(config.num_hidden_layers):
        # As the model has it, rounding included.
        group = int(layer / (config.num_hidden_layers / groups))
        for place in range(inner):
            layers[group * inner + place].append(layer * inner + place)
    return layers


def _count_runs(module: nn.Module, args: Any, kwargs: Any = None) -> tuple[Any, dict[str, Any]] | None:
    """Before a forward: hands down what its shared layers count their runs in; see LayerWatch.before for `kwargs`."""
    return None if kwargs is None else (args, {**kwargs, RUNS: {}})


def _refuse_pages(*_: Any, **__: Any) -> Any:
    """Stands in for what every way to continuous batching begins with."""
    raise RuntimeError(
        "a patched model must not run continuous batching (generate_batch): it keeps keys in pages, which sparse "
        "attention does not read. unpatch() the model first, or use generate()"
    )


def watch_changes(
    session: Session, owner: nn.Module, places: dict[str, tuple[nn.Module, LayerRecord]]
) -> Callable[..., None]:
    """A pre-hook of a patched model that tells which of its attention modules no longer come to the hook.

    Args:
        session: of the patch.
        owner: the model.
        places: attention modules and their records, by where they stand in it.
    """
    own, names = weakref.ref(owner), list(places)
    known = [(weakref.ref(module), record) for module, record in places.values()]

    def look(now: nn.Module, args: Any) -> None:
        # A copy is another model, and what a graph calls was looked up while tracing.
        if now is not own() or torch.compiler.is_compiling() or as_before(session).reason is not None:
            return
        # Another thread puts the patch on or takes it off.
        if session.ended or not session.begun:
            return
        for i, (held, record) in enumerate(known):
            module: Any = held()
            found = submodule_at(now, names[i])
            if found is not module:
                # What wraps a layer, as checkpointing and compilation do, moves it.
                name = next((name for name, m in now.named_modules() if m is module), None)
                if name is None:
                    session.give_up(record, f"attention module {'replaced' if found else 'removed'} after the patch")
                    continue
                names[i] = name
            if not is_switched(module.config):
                now_set = module.config._attn_implementation
                session.give_up(record, f"attn_implementation set to {now_set!r} after the patch")

    return look


def dense_name(module: Any) -> str:
    """The implementation a module runs where nothing is made sparse."""
    own = original(module.config)
    # A native name is sparse itself: dense then means what the model would have run without it.
    return default_dense(module) if own.startswith(NATIVE_PREFIX) else own


def _known(name: str, own: str) -> None:
    register(name, own, lambda module: module.__dict__.get(STATE_ATTRIBUTE))


def switch(
    patch: Patch, config: Any, known: Callable[[str, str], object] = _known, prefix: str = PATCHED_PREFIX
) -> None:
    """Lets a config point at the hook until the patch is removed; see switch_on for `known` and `prefix`."""
    switch_on(config, known, prefix)
    patch.on_remove(switch_off, config)
    patch.on_copy(partial(mend_copy, config))
