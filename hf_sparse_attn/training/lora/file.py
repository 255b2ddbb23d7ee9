"""The files of an adapter: written as peft and diffusers read them, and read again onto a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_sparse_attn.sharing.files import replace_file, write_text
from hf_sparse_attn.sharing.strict_json import read_object, shortened
from hf_sparse_attn.training.lora.settings import ADAPTER, LoraSettings

if TYPE_CHECKING:
    from hf_sparse_attn.training.lora.adapter import Adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
# How peft names what it wraps, and diffusers the part of a pipeline.
_PEFT_PREFIX, _DIFFUSERS_PREFIX = "base_model.model.", "transformer."
# Where diffusers looks for rank, alpha and the rest.
_METADATA = "lora_adapter_metadata"
_LARGEST_CONFIG = 4 << 20
# What adapter_config.json may say besides: it changes nothing of what the adapter computes.
_INDIFFERENT = frozenset(
    {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "task_type"}
)
_SETTINGS = frozenset({"r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save"})


def save(adapter: Adapter, folder: Path, base_model: str = "") -> None:
    """See Adapter.save."""
    from safetensors.torch import save_file

    config = _config(adapter, base_model)
    state = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in _tensors(adapter).items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    files = {WEIGHTS: ({_PEFT_PREFIX + name: value for name, value in state.items()}, {"format": "pt"})}
    if any(cls.__module__.startswith("diffusers.") for cls in type(adapter.model).__mro__):
        inside = {_DIFFUSERS_PREFIX + key: value for key, value in config.items()}
        metadata = {"format": "pt", _METADATA: json.dumps(inside, indent=2, sort_keys=True)}
        files[DIFFUSERS_WEIGHTS] = ({_DIFFUSERS_PREFIX + name: value for name, value in state.items()}, metadata)
    folder.mkdir(parents=True, exist_ok=True)
    # What an earlier adapter left here would pass for this one's.
    for name in (CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS):
        (folder / name).unlink(missing_ok=True)
    for name, (tensors, metadata) in files.items():
        replace_file(folder / name, lambda path, t=tensors, m=metadata: save_file(t, path, metadata=m))  # type: ignore[misc]
    write_text(folder / CONFIG, text)


def read_settings(file: Path) -> LoraSettings:
    """The settings in an `adapter_config.json`.

    Raises:
        FileNotFoundError, ValueError: there is none, or it is not that of a LoRA adapter.
    """
    found = _read_json(file)
    targets, trained = found.get("target_modules"), found.get("modules_to_save") or []
    lists = ([targets] if isinstance(targets, str) else targets), trained
    if found.get("peft_type") != "LORA" or not all(
        isinstance(names, list) and all(isinstance(name, str) and name for name in names) for names in lists
    ):
        raise ValueError(f"`{file}` must hold a LoRA adapter with the names of its modules, got {shortened(found)}")
    values = {"rank": found.get("r"), "alpha": found.get("lora_alpha"), "dropout": found.get("lora_dropout", 0.0)}
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError(f"`{file}` must hold a number as {name}, got {shortened(value)}")
    try:
        return LoraSettings(targets=tuple(lists[0]), trained=tuple(trained), **values)  # type: ignore[arg-type]
    except (ValueError, TypeError) as error:
        raise ValueError(f"`{file}` must hold valid settings: {error}") from error


def _tensors(adapter: Adapter) -> dict[str, Tensor]:
    """The adapter's own tensors by the names that files have, in which that of the adapter is left out."""
    found = {}
    for name, layer in adapter.layers():
        for part in ("lora_A", "lora_B"):
            found[f"{name}.{part}.weight"] = getattr(layer, part)[ADAPTER].weight
    for name, wrapper in adapter.wrappers():
        for key, value in wrapper.modules_to_save[ADAPTER].state_dict(keep_vars=True).items():
            found[f"{name}.{key}"] = value
    return found


def _config(adapter: Adapter, base_model: str) -> dict[str, Any]:
    """What adapter_config.json holds; sets, which have no order, as sorted lists."""
    found = adapter.config.to_dict()
    found["base_model_name_or_path"] = base_model or None
    found["inference_mode"] = True
    # What peft has is one of names, see Adapter._install.
    found["target_modules"] = adapter.settings.pattern or found["target_modules"]
    kind = type(adapter.model)
    found["auto_mapping"] = {"base_model_class": kind.__name__, "parent_library": kind.__module__}
    made = {key: sorted(value) if isinstance(value, set) else value for key, value in found.items()}
    return dict(json.loads(json.dumps(made)))


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"`{file.parent}` must hold {file.name}, which is missing")
    if file.stat().st_size > _LARGEST_CONFIG:
        raise ValueError(f"`{file}` must have at most {_LARGEST_CONFIG} bytes, got {file.stat().st_size}")
    try:
        return read_object(file.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`{file}` must hold valid JSON: {error}") from error


def read_weights(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise FileNotFoundError(f"`{file.parent}` must hold {file.name}, which is missing")
    try:
        found = load_file(file)
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"`{file}` must hold the weights of an adapter, got a damaged file: {error}") from error
    return {name.removeprefix(_PEFT_PREFIX): value for name, value in found.items()}


def check_rank(settings: LoraSettings, state: dict[str, Tensor], file: Path) -> None:
    """Raises where matrices have another rank than the settings: before memory is taken for what a stranger asks."""
    for name, value in state.items():
        if name.endswith(".lora_A.weight") and len(value) != settings.rank:
            raise ValueError(
                f"`{file}` must hold {name} as {value.dtype} {[settings.rank, *value.shape[1:]]}, "
                f"got {value.dtype} {list(value.shape)}"
            )


def check_plain(adapter: Adapter, file: Path) -> None:
    """Raises where a file asks peft for more than LoraSettings have."""
    given, own = _read_json(file), _config(adapter, "")
    for key in sorted(given.keys() - _INDIFFERENT - _SETTINGS):
        # What this release of peft does not have may be there as long as it is off.
        if given[key] != own[key] if key in own else given[key]:
            raise ValueError(f"`{file}` must hold a plain LoRA adapter, got {key}: {shortened(given[key])}")


def fill(adapter: Adapter, state: dict[str, Tensor], file: Path) -> None:
    """Copies weights into an adapter, once all of them are known to fit."""
    own = _tensors(adapter)
    for name in sorted(own.keys() ^ state.keys()):
        where = "besides" if name in state else "missing"
        raise ValueError(f"`{file}` must hold the weights of an adapter on this model, got {name} {where}")
    for name, tensor in own.items():
        value = state[name]
        if value.shape != tensor.shape or value.is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"`{file}` must hold {name} as {tensor.dtype} {list(tensor.shape)}, "
                f"got {value.dtype} {list(value.shape)}"
            )
        if not torch.isfinite(value).all():
            raise ValueError(f"`{file}` must hold finite weights, got others in {name}")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(state[name])
