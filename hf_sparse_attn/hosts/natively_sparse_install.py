"""Putting the hook into models that select their own keys: of which kind they are, and the seams of their layers."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

from torch import nn

from hf_sparse_attn.hosts import PATCHED_PREFIX, SELECTING
from hf_sparse_attn.hosts.natively_sparse_csa import CSA
from hf_sparse_attn.hosts.natively_sparse_dsa import DSA
from hf_sparse_attn.hosts.natively_sparse_hook import register
from hf_sparse_attn.hosts.natively_sparse_kind import Kind, SelectingLayer
from hf_sparse_attn.hosts.natively_sparse_kpool import KPool
from hf_sparse_attn.hosts.natively_sparse_msa import MSA
from hf_sparse_attn.hosts.natively_sparse_qsa import QSA
from hf_sparse_attn.hosts.transformers_forward import STATE_ATTRIBUTE, bind
from hf_sparse_attn.hosts.transformers_install import (
    attention_modules,
    dense_name,
    refuse_pages,
    switch,
    watch_changes,
)
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.record import LayerRecord

# One for each way in which models select keys.
KINDS: tuple[Kind, ...] = (DSA(), MSA(), CSA(), KPool(), QSA())


def kind_of(owner: Any) -> Kind | None:
    """The kind of a transformers model, by what its config says it is, or None."""
    name = str(getattr(owner.config, "model_type", "")).removesuffix("_text")
    return next((kind for kind in KINDS if name in kind.models), None)


def why_not(owner: Any) -> str | None:
    """Why the layers of a model of some kind cannot be reached, or None."""
    kind = kind_of(owner)
    assert kind is not None
    return kind.why_not(owner, _own_modules(owner))


def install_selecting(patch: Patch, owners: Iterable[tuple[str, Any]]) -> None:
    """Gives every attention module its state and its seams, and lets the configs point at the hook.

    Args:
        patch: undoes it.
        owners: (prefix of its layers' names in the report, transformers model that owns attention).
    """
    bound = bind(patch, patch.modules)
    watched: list[tuple[Any, dict[str, tuple[Any, LayerRecord]]]] = []
    kinds: dict[int, tuple[Any, Kind]] = {}
    for prefix, owner in owners:
        kind = kind_of(owner)
        assert kind is not None
        places: dict[str, tuple[Any, LayerRecord]] = {}
        found = [(name, module) for name, module, holder in attention_modules(owner) if holder is owner]
        for name, module in found:
            for config in (owner.config, module.config):
                kinds.setdefault(id(config), (config, kind))
            record = patch.session.record(f"{prefix}{name}", module.layer_idx)
            why = kind.own_sparsity(module)
            state = SelectingLayer(
                record, patch.session, len(found), dense_name(module), bound=bound, kind=kind, own_sparsity=why
            )
            bound.states[module] = state
            patch.set_attribute(module, STATE_ATTRIBUTE, state)
            if why is None:
                kind.install(patch, module)
            places[name] = module, record
        watched.append((owner, places))
    # The configs last: only they let calls come here.
    bound.configs.update(kinds)
    for config, kind in kinds.values():
        switch(patch, config, partial(_known, kind), f"{PATCHED_PREFIX}{SELECTING}")
    for owner, places in watched:
        patch.hook(owner, "register_forward_pre_hook", watch_changes(patch.session, owner, places))
    refuse_pages(patch)


def _known(kind: Kind, name: str, original: str) -> None:
    register(name, original, kind)


def _own_modules(owner: Any) -> list[nn.Module]:
    return [module for _, module, holder in attention_modules(owner) if holder is owner]
