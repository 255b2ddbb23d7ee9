"""What settings do to a model: refused where it cannot have them, told where nothing comes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hf_sparse_attn.family import pretrained_models
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.policy import Policy


def check_effect(patch: Patch) -> None:
    """Looks at the policy of a new patch with what is known of its model; notes what its user would not expect.

    Raises:
        ValueError: layers that the model does not have; or, where the patch is strict, steps that it does not have.
    """
    policy = patch.session.policy
    steps = _check_steps(patch, policy)
    layers = _check_layers(patch, policy)
    longest = _longest(patch.model)
    lengths = None
    if policy.min_tokens != "auto" and longest is not None and int(policy.min_tokens) > longest:
        lengths = f"min_tokens={policy.min_tokens} is more than the {longest} tokens that the model takes"
    for why in (layers, steps, lengths):
        if why is not None:
            patch.note(f"nothing can be sparse: {why}")


def _check_steps(patch: Patch, policy: Policy) -> str | None:
    """Why no denoising step can be sparse; takes shares of steps away where the model has no steps."""
    start, end = policy.shares
    if not start and not end:
        return None
    if patch.has_steps:
        return f"dense_steps={policy.dense_steps} keeps every step dense" if start + end >= 1 else None
    said = f"`dense_steps` must be left out for a model without denoising steps, got {policy.dense_steps}"
    if patch.session.strict:
        raise ValueError(said)
    patch.note(f"{said}: it has no effect")
    patch.session.policy = replace(policy, dense_steps=None)
    return None


def _check_layers(patch: Patch, policy: Policy) -> str | None:
    """Why no layer can be sparse."""
    own = {record.index for record in patch.session.records.values() if not record.exact}
    if policy.dense_layers is None or not own:
        return None
    config: Any = _config(patch.model)
    number = max(max(own) + 1, getattr(config, "num_hidden_layers", None) or 0)
    if len(own) == 1:
        # One module may be all the layers of its model.
        own = set(range(number))
    dense = policy.dense_layers
    if isinstance(dense, tuple):
        beyond = [index for index in dense if index >= number]
        if beyond:
            raise ValueError(f"`dense_layers` must be layers from 0 to {number - 1} of the model, got {beyond}")
        useless = sorted(set(dense) - own)
        if useless:
            patch.note(f"dense_layers={list(dense)} has no effect on {useless}: no sparse attention would run there")
    all_dense = own <= set(dense) if isinstance(dense, tuple) else dense > max(own)
    shown = list(dense) if isinstance(dense, tuple) else dense
    return f"dense_layers={shown} keeps all {len(own)} layers dense" if all_dense else None


def _config(model: Any) -> Any:
    """Config of the text model in a model of transformers, or None."""
    found = pretrained_models(model)
    return found[0].config.get_text_config() if found else None


def _longest(model: Any) -> int | None:
    """Tokens that a model of transformers takes at most, where its config says so."""
    longest = getattr(_config(model), "max_position_embeddings", None)
    return longest if isinstance(longest, int) and longest > 0 else None
