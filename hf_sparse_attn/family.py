"""What a model family is: how its attention is reached, and what the tokens of a call are."""

from __future__ import annotations

import sys
from collections.abc import Collection
from threading import Lock
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from hf_sparse_attn import recomputation
from hf_sparse_attn.method import NEEDS, READS, Decline, Method, MethodDoesNotApply
from hf_sparse_attn.patching import Patch, active_patch
from hf_sparse_attn.session import Session

# Two threads that patch one model at a time: the second is told so.
_INSTALLING = Lock()


class Family(Protocol):
    """One file in patches/, one class, registered by name. All its functions are static.

    `provides` names the layouts it can describe (keys of method.NEEDS); `models` says in words what it covers;
    `presets`, where it brings some, are what `quality=` of patch() chooses from before the table (presets.py). One
    with `generic = True` takes what no other family knows. One whose models differ in their layouts has
    `provided(modules)`, which says it of these modules; `provides` is then all that any of them has. One that hands
    over what a layer had besides q, k and v has `reads`, the fields of context.LayerInputs that its hooks fill in
    where the session's method reads them. One whose models run in no denoising steps has `has_steps = False`. One
    whose models take methods of one kind alone has `requires`, keys of NEEDS that a method must need.
    """

    provides: ClassVar[frozenset[str]]
    models: ClassVar[str]

    @staticmethod
    def targets(model: object) -> list[nn.Module] | Decline:
        """The modules to patch in a model or pipeline, or why it is none of this family."""

    @staticmethod
    def install(patch: Patch) -> None:
        """Installs the hooks on `patch.modules`, every one undone through `patch`, with a record for every layer."""

    @staticmethod
    def tiny() -> tuple[Any, dict[str, Any]]:
        """A tiny randomly initialised real model of the family and keyword inputs for its forward."""


Found = tuple[str, type[Family], list[nn.Module]]


def find_family(model: object) -> Found:
    """Name and class of the family of a model, and the modules to patch.

    Raises:
        TypeError: no family knows it; the message gives each family's reason.
    """
    found, reasons = ask_families(model)
    if found is None:
        said = "; ".join(f"{name}: {why}" for name, why in reasons.items())
        raise TypeError(f"`model` must be a model or pipeline of a known family, got {type(model).__name__} ({said})")
    return found


def ask_families(model: object) -> tuple[Found | None, dict[str, str]]:
    """What `find_family` gives, or None, and why each family that was asked does not know the model."""
    from hf_sparse_attn.registry import FAMILIES

    reasons: dict[str, str] = {}
    for name, family in sorted(FAMILIES.items(), key=lambda item: getattr(item[1], "generic", False)):
        found = family.targets(model)
        if not isinstance(found, Decline):
            return (name, family, found), reasons
        reasons[name] = found.reason
    return None, {**reasons, **FAMILIES.missing}


def install(model: object, found: tuple[str, type[Family], list[nn.Module]], session: Session) -> Patch:
    """Installs a family's hooks for a session; nothing is left in the model where that fails.

    Args:
        model: a model or pipeline.
        found: what `find_family` said of it.
        session: what its layers ask.

    Raises:
        ValueError: the model is patched already, or has no self-attention layers.
        MethodDoesNotApply: the family takes other methods alone.
    """
    name, family, modules = found
    check_requires(found, session.method, model)
    with _INSTALLING:
        for module in modules:
            already = active_patch(module)
            if already is not None:
                raise ValueError(f"`model` must not be patched already, got one with {already!r}: unpatch() it first")
        patch = Patch(name, session, modules, model)
    patch.has_steps = getattr(family, "has_steps", True)
    patch.generates_text = generates_text(family, modules)
    try:
        family.install(patch)
        recomputation.watch(patch)
        session.begun = True
        if not session.records:
            raise ValueError(f"`model` must have self-attention layers to patch, found none in {type(model).__name__}")
    except BaseException:
        patch.remove()
        raise
    return patch


def provided(family: type[Family], modules: list[nn.Module]) -> frozenset[str]:
    """The layouts that a family can describe for the modules it patches."""
    own = getattr(family, "provided", None)
    found: frozenset[str] = family.provides if own is None else own(modules)
    return found


def generates_text(family: type[Family], modules: list[nn.Module]) -> bool:
    """Whether the modules that a family patches may generate text token by token."""
    return not getattr(family, "has_steps", True) and "causal" in provided(family, modules)


def why_no_decoder(found: Found) -> str | None:
    """Why what concerns the way in which text is generated must be left out for a model, or None."""
    if generates_text(*found[1:]):
        return None
    return "selects keys by itself" if getattr(found[1], "requires", ()) else "generates no text token by token"


def check_requires(found: Found, method: Method, model: object) -> None:
    """Raises where the models of a family take other methods alone.

    Raises:
        MethodDoesNotApply: names the methods that it takes.
    """
    requires: frozenset[str] = getattr(found[1], "requires", frozenset())
    if not requires <= method.needs:
        from hf_sparse_attn.registry import METHODS

        known = ", ".join(repr(name) for name, kind in METHODS.items() if requires <= kind.needs)
        raise MethodDoesNotApply(
            f"`method` must be {known} for {type(model).__name__}, {NEEDS[min(requires)]}; got {method.name!r}"
        )


def check_reads(found: tuple[str, type[Family], list[nn.Module]], reads: frozenset[str], who: str) -> None:
    """Raises where a family does not hand over what is read of a layer besides q, k and v.

    Args:
        found: what `find_family` said of the model.
        reads: fields of LayerInputs.
        who: what reads them, in words.

    Raises:
        MethodDoesNotApply: names what is missing.
    """
    unread = [READS[name] for name in sorted(reads - getattr(found[1], "reads", frozenset()))]
    if unread:
        raise MethodDoesNotApply(
            f"{who} reads the {' and '.join(unread)} of a layer, which family {found[0]} does not hand over"
        )


def pretrained_models(model: object) -> list[Any]:
    """The transformers models in a module or a pipeline of transformers, outermost first."""
    # Where it was never imported there can be no such model, and asking must not cost the import.
    if "transformers.modeling_utils" not in sys.modules:
        return []
    from transformers import PreTrainedModel

    pipelines = sys.modules.get("transformers.pipelines.base")
    if pipelines is not None and isinstance(model, pipelines.Pipeline):
        model = model.model
    return [m for m in model.modules() if isinstance(m, PreTrainedModel)] if isinstance(model, nn.Module) else []


def has_class(module: object, names: Collection[str]) -> bool:
    """Whether a module's class, or one it derives from, has one of these names."""
    return any(cls.__name__ in names for cls in type(module).__mro__)


def tiny_text(kind: Any, **sizes: int) -> tuple[Any, dict[str, Any]]:
    """A two-layer model of a class of transformers, seeded, and 111 tokens for it.

    Args:
        kind: the class.
        sizes: of its configuration, besides the common ones.
    """
    common = {"vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(kind.config_class(**common, num_attention_heads=4, **sizes))
        return model.eval(), {"input_ids": torch.randint(3, 128, (2, 111))}
