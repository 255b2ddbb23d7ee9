"""A low-rank adapter on a model, in place: the model keeps its class, and everything can be taken off again."""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.patching import changed, restoring
from hf_sparse_attn.sharing.strict_json import shortened
from hf_sparse_attn.training.lora import file
from hf_sparse_attn.training.lora.pattern import NamePattern
from hf_sparse_attn.training.lora.reach import FirstCall, check_called, keep_unfused
from hf_sparse_attn.training.lora.settings import ADAPTER, LoraSettings


def add_lora(model: nn.Module, settings: LoraSettings, seed: int = 0) -> Adapter:
    """Adds a low-rank adapter to a model, in place and reversibly.

    peft does the work, as `model.add_adapter` of transformers and diffusers has it done; so both know of the adapter.
    At first the adapter adds exactly 0. Its weights are float32, also on a model of lower precision; modules that are
    trained in full are copied to float32, and what they return has the dtype it had before. All weights of the model
    itself are frozen. A language model's head that is tied to a trained embedding keeps the model's own weight.
    Projections that have it cannot be fused meanwhile, for fused ones would leave it out. A module that the model does
    not call in its first forward is told in the log.

    Args:
        model: of transformers or diffusers, patched or not.
        settings: rank, the modules, and what is trained besides. An end of a name in `targets` starts at a dot; one in
            `trained` anywhere, as peft has it: "norm" also names `input_layernorm`.
        seed: of the added matrices, which depend on it and on the modules' names alone.

    Returns:
        the Adapter.

    Raises:
        ValueError: a name that no module has, a module that cannot get an adapter or whose weights are offloaded,
            projections that are fused, or a model that has an adapter. The model is then as it was.
        TypeError: `model` is no module, or `settings` no LoraSettings.
        MissingExtra: peft is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"`model` must be a torch module, got a {type(model).__name__}: name one of its parts")
    if not isinstance(settings, LoraSettings):
        raise TypeError(f"`settings` must be LoraSettings, got {settings!r}")
    check_int("seed", seed, 0)
    if importlib.util.find_spec("peft") is None:
        from hf_sparse_attn.extras import MissingExtra

        raise MissingExtra("a LoRA adapter", "peft")
    _check_free(model)
    targets, trained = find_targets(model, settings), find_trained(model, settings)
    _check_apart(targets, trained)
    for argument, names in (("targets", targets), ("trained", trained)):
        _check_in_memory(model, argument, names)
        check_called(model, argument, names)
    adapter = Adapter(model, settings)
    try:
        adapter._install(seed)
    except BaseException:
        adapter.remove()
        raise
    return adapter


def load_lora(model: nn.Module, folder: Path) -> Adapter:
    """Puts the adapter of a folder on a model, with its weights trainable.

    Raises:
        FileNotFoundError, ValueError: a file is missing or damaged, holds another kind of adapter, or one for another
            model. The model is then as it was.
        MissingExtra: peft is not installed.
    """
    config, weights = folder / file.CONFIG, folder / file.WEIGHTS
    settings = file.read_settings(config)
    state = file.read_weights(weights)
    file.check_rank(settings, state, weights)
    adapter = add_lora(model, settings)
    try:
        file.check_plain(adapter, config)
        file.fill(adapter, state, weights)
    except BaseException:
        adapter.remove()
        raise
    return adapter


class Adapter(AbstractContextManager["Adapter"]):
    """A low-rank adapter on a model, made by `add_lora`; `remove()` or the end of `with` takes it off."""

    def __init__(self, model: nn.Module, settings: LoraSettings) -> None:
        self.model = model
        self.settings = settings
        self.config: Any = None
        self._modules = [(module, dict(module._modules)) for module in model.modules()]
        self._required = [(p, p.requires_grad) for p in model.parameters()]
        self._attributes = [restoring(model, name) for name in _HOST_ATTRIBUTES]
        self._replaced: list[tuple[nn.Module, str, Any, Any]] = []
        self._first_call = FirstCall()
        self._removed = False

    def _install(self, seed: int) -> None:
        from peft import LoraConfig, inject_adapter_in_model

        settings, given = self.settings, self.settings.targets
        names: Any = sorted(given)
        if settings.pattern is not None:
            # peft would match a stranger's expression with `re`: it gets one of the names that were found.
            names = "|".join(map(re.escape, find_targets(self.model, settings)))
        alpha = settings.rank if settings.alpha is None else settings.alpha
        self.config = LoraConfig(
            r=settings.rank,
            lora_alpha=int(alpha) if alpha == int(alpha) else alpha,  # type: ignore[arg-type]
            lora_dropout=settings.dropout,
            target_modules=names,
            modules_to_save=list(settings.trained) or None,
        )
        try:
            # What is drawn here is drawn anew below, and must not move the generator of whoever calls.
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                # It warns of tied embeddings; see add_lora.
                warnings.simplefilter("ignore")
                inject_adapter_in_model(self.config, self.model, adapter_name=ADAPTER)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(
                f"`targets` must be modules that can get an adapter, got {list(given)}: {error}"
            ) from error
        finally:
            self._replaced = [
                (module, name, child, module._modules[name])
                for module, before in self._modules
                for name, child in before.items()
                if module._modules.get(name) is not child
            ]
        if hasattr(type(self.model), "_hf_peft_config_loaded"):
            # What add_adapter of transformers and diffusers sets.
            self.model.__dict__["_hf_peft_config_loaded"] = True
        known = {id(module) for module, _ in self._modules}
        for _, part in self.layers() + self.wrappers():
            base = part.get_base_layer() if hasattr(part, "get_base_layer") else part.original_module
            for module in part.modules():
                # peft leaves what it adds in training mode, with its dropout, whatever mode the model is in.
                if id(module) not in known:
                    module.training = base.training
        generator = torch.Generator().manual_seed(seed)
        for name, layer in sorted(self.layers()):
            _initialise(name, layer, generator)
        for name, wrapper in self.wrappers():
            _raise_precision(name, wrapper)
        parts = self.layers() + self.wrappers()
        self._attributes += keep_unfused(parts, self.model)
        self._first_call = FirstCall(self.model, parts)

    def layers(self) -> list[tuple[str, Any]]:
        """peft's layers with the added matrices, by the names of the modules in their place."""
        from peft.tuners.lora import LoraLayer

        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, LoraLayer)]

    def wrappers(self) -> list[tuple[str, Any]]:
        """peft's wrappers of modules that are trained in full, likewise."""
        from peft.utils import ModulesToSaveWrapper

        return [(name, m) for name, m in self.model.named_modules() if isinstance(m, ModulesToSaveWrapper)]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by their names in the model."""
        self._check_there()
        own = [part[ADAPTER] for _, layer in self.layers() for part in (layer.lora_A, layer.lora_B)]
        own += [wrapper.modules_to_save[ADAPTER] for _, wrapper in self.wrappers()]
        wanted = {id(p) for module in own for p in module.parameters()}
        return {name: p for name, p in self.model.named_parameters() if id(p) in wanted}

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within it the model computes exactly what it did before `add_lora`, bit for bit."""
        self._check_there()
        # Not peft's own enable_adapters: that changes requires_grad, and with it what a graph made before is.
        with changed((part for _, part in self.layers() + self.wrappers()), "_disable_adapters", True):
            yield

    def save(self, folder: str | os.PathLike[str], base_model: str = "") -> None:
        """Writes the adapter into a folder.

        `adapter_config.json` and `adapter_model.safetensors` are read by `PeftModel.from_pretrained` and by
        `load_adapter` of a transformers model (which in 5.17 leaves out what is trained in full). For a model of
        diffusers there is `pytorch_lora_weights.safetensors` besides, with rank and alpha, for `load_lora_weights` of
        its pipeline. Where modules are trained in full they are in it too: `load_lora_weights`, which takes low-rank
        matrices alone, then refuses the file, and `load_lora_adapter(folder, prefix="transformer",
        weight_name="pytorch_lora_weights.safetensors")` of the model reads it.

        Args:
            folder: where; it is made if need be, and an earlier adapter in it replaced.
            base_model: name or folder of the model, noted for whoever loads the adapter.
        """
        self._check_there()
        file.save(self, Path(folder), base_model)

    def remove(self) -> None:
        """Takes the adapter off; the model is then as it was before. A second call does nothing.

        Raises:
            ValueError: another adapter was put on the model since, its modules were replaced, or it was merged into
                the model's weights.
        """
        if self._removed:
            return
        self.check_removable()
        self._removed = True
        self._first_call.stop()
        for module, name, before, _ in self._replaced:
            module._modules[name] = before
        for parameter, required in self._required:
            parameter.requires_grad_(required)
        for restore in self._attributes:
            restore()

    def check_removable(self) -> None:
        """Raises what `remove` would."""
        if self._removed:
            return
        others = set(self.model.__dict__.get("peft_config", {})) - {ADAPTER}
        if others:
            raise ValueError(f"`model` must have no other adapter to remove this one, got {', '.join(sorted(others))}")
        changed = [name for module, name, _, new in self._replaced if module._modules.get(name) is not new]
        if changed:
            raise ValueError(f"`model` must have the adapter's modules to remove it, {changed[0]} was replaced")
        merged = [name for name, layer in self.layers() if layer.merged]
        if merged:
            raise ValueError(
                f"`model` must have its own weights to remove the adapter, it is merged into {merged[0]}: unmerge it "
                "first (unfuse_lora() of the model)"
            )

    def _check_there(self) -> None:
        if self._removed:
            raise ValueError("the adapter must be on its model, it was removed")

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        state = "removed" if self._removed else f"{len(self.layers())} modules"
        return f"Adapter(rank {self.settings.rank} on {type(self.model).__name__}, {state})"


# What peft and the host libraries set on a model that has an adapter.
_HOST_ATTRIBUTES = ("peft_config", "_hf_peft_config_loaded", "active_adapter")


def find_targets(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Names of the modules that get an adapter.

    Raises:
        ValueError: a target that no module has; near names are listed.
    """
    given = settings.targets
    names = [name for name, _ in model.named_modules() if name]
    if settings.pattern is not None:
        try:
            pattern = NamePattern(settings.pattern)
        except ValueError as error:
            raise ValueError(
                f"`targets` must be a regular expression, got {shortened(settings.pattern)}: {error}"
            ) from error
        found = [name for name in names if pattern.matches(name)]
        if not found:
            raise ValueError(f"`targets` must match a module of {type(model).__name__}, got {shortened(given[0])}")
        return found
    ends = {name: {name[at:] for at in _starts(name)} for name in names}
    known = set().union(*ends.values())
    for target in given:
        if target not in known:
            _unknown("targets", target, model, [n for n, m in model.named_modules() if isinstance(m, nn.Linear)])
    wanted = set(given)
    return [name for name in names if not wanted.isdisjoint(ends[name])]


def find_trained(model: nn.Module, settings: LoraSettings) -> list[str]:
    """Names of the modules that are trained in full.

    Raises:
        ValueError: an end that no module with weights has, or one of a module inside another one.
    """
    weighted = [name for name, m in model.named_modules() if name and any(True for _ in m.parameters())]
    for end in dict.fromkeys(settings.trained):
        if not any(name.endswith(end) for name in weighted):
            _unknown("trained", end, model, weighted)
    ends = settings.trained
    found = [name for name, _ in model.named_modules() if name and ends and name.endswith(ends)]
    for name in found:
        if (inside := next((o for o in found if name.startswith(f"{o}.")), None)) is not None:
            raise ValueError(f"`trained` must name modules that are not inside one another, got {name} in {inside}")
    return found


def _check_apart(targets: list[str], trained: list[str]) -> None:
    for name in trained:
        inside = next((t for t in targets if t == name or t.startswith(f"{name}.") or name.startswith(f"{t}.")), None)
        if inside is not None:
            raise ValueError(f"`trained` must name other modules than `targets`, got {name} and {inside}")


def _check_in_memory(model: nn.Module, argument: str, names: list[str]) -> None:
    """Raises where weights are elsewhere, as those that accelerate offloads: an adapter would be put there, too."""
    for name in names:
        if any(p.is_meta for p in model.get_submodule(name).parameters()):
            raise ValueError(f"`{argument}` must be modules whose weights are in memory, got {name} on meta")


def _check_free(model: nn.Module) -> None:
    from peft.tuners.tuners_utils import BaseTunerLayer

    there = sorted(getattr(model, "peft_config", {}))
    if there or any(isinstance(m, BaseTunerLayer) for m in model.modules()):
        raise ValueError(
            f"`model` must have no adapter yet, got one with {', '.join(map(repr, there)) or 'layers of peft'}: "
            "merge or unload it first"
        )


def _starts(name: str) -> list[int]:
    """Where the ends of a name that targets may give begin: at the whole, and after each dot."""
    return [0, *(at + 1 for at, char in enumerate(name) if char == ".")]


def _unknown(argument: str, given: str, model: nn.Module, names: list[str]) -> None:
    """Raises with the ends of names that are nearest to the given one, or else all last parts."""
    parts = 1 + given.count(".")
    ends = sorted({".".join(name.split(".")[-parts:]) for name in names})
    near = difflib.get_close_matches(given, ends, n=6, cutoff=0.5) or ends[:12]
    raise ValueError(
        f"`{argument}` must be modules of {type(model).__name__} such as {', '.join(near) or 'none'}; "
        f"got {shortened(given)}"
    )


def _initialise(name: str, layer: Any, generator: torch.Generator) -> None:
    """A of a uniform distribution as in peft, B of 0; in float32, drawn on the CPU."""
    if ADAPTER not in layer.lora_A:
        raise ValueError(f"`targets` must be linear modules, got {name}, a {type(layer.get_base_layer()).__name__}")
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    first = torch.empty(a.shape, dtype=torch.float32)
    # That of nn.Linear, which peft takes: kaiming_uniform_ with a = sqrt(5).
    bound = first[0].numel() ** -0.5
    first.uniform_(-bound, bound, generator=generator)
    for parameter, value in ((a, first), (b, torch.zeros(b.shape))):
        parameter.data = value.to(parameter.device, torch.promote_types(parameter.dtype, torch.float32))


def _raise_precision(name: str, wrapper: Any) -> None:
    """Has a copied module trained in float32, and casts what goes in and out where the model has less."""
    copy, original = wrapper.modules_to_save[ADAPTER], wrapper.original_module
    dtypes = {p.dtype for p in original.parameters() if p.is_floating_point()}
    low = {dtype for dtype in dtypes if torch.finfo(dtype).bits < 32}
    if not low:
        return
    if len(dtypes) > 1:
        raise ValueError(f"`trained` must be modules of one dtype each, got {name} of {', '.join(map(str, dtypes))}")
    copy.to(torch.float32)
    dtype = low.pop()
    copy.register_forward_pre_hook(lambda _, args: tuple(_cast(a, dtype, torch.float32) for a in args))
    copy.register_forward_hook(lambda _, args, out: _cast(out, torch.float32, dtype))


def _cast(value: Any, before: torch.dtype, after: torch.dtype) -> Any:
    if isinstance(value, tuple):
        return tuple(_cast(v, before, after) for v in value)
    return value.to(after) if isinstance(value, Tensor) and value.dtype == before else value
