"""GateSet: small trained modules, one for each layer of a model, that a method asks; files that can be shared."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.sharing.files import replace_file, write_text
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.hub import local_folder, told
from hf_sparse_attn.sharing.strict_json import as_dict, as_text, check_keys, read_document, shortened
from hf_sparse_attn.version import __version__

FORMAT = "hf_sparse_attn.gates"
VERSION = 1
SETTINGS_FILE, WEIGHTS_FILE = "gates.json", "gates.safetensors"
_KEYS = ("format", "version", "kind", "model", "settings", "versions")
_LARGEST_FILE = 1 << 20


class GateSet(nn.Module):
    """The trained gates of one method for one model: a module for each layer, built by the method's `make_gates`.

    Two sets are equal only if they are the same object, so that a method that holds one can be compared and hashed
    while it is trained.

    Args:
        kind: name of the method.
        model: the model, or its fingerprint.
        settings: what `make_gates` of the method takes: numbers, texts, or lists of them, by name.
        seed: of the starting weights.

    Raises:
        ValueError: an unknown method or one without gates, or settings that are none of its.
        TypeError: a model of no known family.
    """

    def __init__(self, kind: str, model: Any, settings: Mapping[str, Any] | None = None, seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.model = model if isinstance(model, Fingerprint) else Fingerprint.of(model)
        self.settings = {name: _checked(name, value) for name, value in (settings or {}).items()}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = METHODS.get(kind).make_gates(self.model, self.settings)
        self.layers = nn.ModuleList(made)
        if len(self.layers) != self.model.layers:
            raise ValueError(f"`make_gates` of {kind!r} must give {self.model.layers} gates, got {len(self.layers)}")
        # Copies of single gates on other devices or in other types; not part of the state.
        self.__dict__["_placed"] = {}

    def __repr__(self) -> str:
        weights = sum(p.numel() for p in self.parameters())
        return f"GateSet({self.kind!r}, {self.model.model_class}, {len(self.layers)} layers, {weights} weights)"

    def check(self, model: Any) -> None:
        """Raises where the gates are for another model.

        Raises:
            ValueError: names every field that differs, with both values.
            TypeError: a model of no known family.
        """
        self.model.check(model, "the gates were trained for")

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `gates.safetensors` and `gates.json`; each file is replaced as a whole or not at all.

        Args:
            folder: made if it is not there.

        Raises:
            ValueError: a weight is not finite.
            OSError: it cannot be written.
        """
        from safetensors.torch import save_file

        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        weights = {name: t.detach().cpu().contiguous() for name, t in self.layers.state_dict().items()}
        for name, weight in weights.items():
            if not bool(weight.isfinite().all()):
                raise ValueError(f"gates must have finite weights to be saved, got others in {name}")
        versions = {"hf_sparse_attn": __version__, "torch": torch.__version__}
        value = {
            "format": FORMAT, "version": VERSION, "kind": self.kind, "model": asdict(self.model),
            "settings": self.settings, "versions": versions,
        }  # fmt: skip
        # Weights that belong to other settings would fit in shape, perhaps: each file knows the other.
        mark = {"format": FORMAT, "settings": _digest(value)}
        replace_file(path / WEIGHTS_FILE, lambda file: save_file(weights, file, mark))
        write_text(path / SETTINGS_FILE, json.dumps(value, indent=1) + "\n")

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> GateSet:
        """Reads what `save` wrote, onto the CPU. Nothing in the files is run or used as a path.

        Args:
            source: a folder, or the id of a repository on the Hub ("name/repository") with the files in it or in its
                folder `gates`.

        Raises:
            FileNotFoundError: a folder without gates.
            ValueError: files that are no whole, valid gates; or `source` is neither a folder nor a Hub id.
            OSError: the Hub cannot be reached, or has no such repository.
        """
        folder = _folder(source)
        try:
            return _read(cls, folder)
        except (ValueError, TypeError) as error:
            raise ValueError(f"`source` must hold valid gates, got {folder}: {error}") from error

    def of_layer(self, layer: int, device: torch.device, dtype: torch.dtype) -> nn.Module:
        """A copy of a layer's gate on a device in a type, made once; it does not follow later training."""
        key = layer, device, dtype
        placed: dict[Any, nn.Module] = self.__dict__["_placed"]
        if key not in placed:
            placed[key] = copy.deepcopy(self.layers[layer]).to(device, dtype).requires_grad_(False).eval()
        return placed[key]

    def __deepcopy__(self, memo: dict[int, Any]) -> GateSet:
        made = type(self).__new__(type(self))
        memo[id(self)] = made
        made.__dict__.update({k: copy.deepcopy(v, memo) for k, v in self.__dict__.items() if k != "_placed"})
        made.__dict__["_placed"] = {}
        return made


Gates = str | GateSet


def checked_gates(gates: object, kind: str) -> Gates:
    """Returns the parameter `gates` of a method: a live set of its kind, or a folder or Hub id as text.

    Raises:
        TypeError: it is neither.
        ValueError: a set of another kind.
    """
    if isinstance(gates, GateSet):
        if gates.kind != kind:
            raise ValueError(f"`gates` must be of {kind}, got those of {gates.kind}")
        return gates
    path = os.fspath(gates) if isinstance(gates, (str, os.PathLike)) else None
    if not isinstance(path, str):
        kind = type(gates).__name__
        raise TypeError(f"`gates` must be a folder, a Hub id or a GateSet, got {gates!r} of type {kind}")
    return path


_LOCK = Lock()
# By resolved folder: when its files were last written, and what was read then.
_LOADED: dict[Path, tuple[tuple[int, ...], GateSet]] = {}
# Folders of repositories of the Hub that were asked for.
_DOWNLOADED: dict[str, Path] = {}


def find_gates(gates: Gates, kind: str) -> GateSet:
    """The gates of a method's parameter; what is in files is read once, and anew when they have changed.

    Raises:
        ValueError: there are none ("" was given), they are of another kind, or damaged.
        OSError: they are not there.
    """
    if isinstance(gates, GateSet):
        return gates
    if not gates:
        raise ValueError(f"`gates` must be a folder, a Hub id or a GateSet with gates trained for {kind}, got none")
    folder = _folder(gates)
    try:
        written = tuple((folder / name).stat().st_mtime_ns for name in (SETTINGS_FILE, WEIGHTS_FILE))
    except FileNotFoundError as error:
        missing = Path(error.filename).name
        raise FileNotFoundError(f"`gates` must be a folder that holds {missing}, got {folder}") from None
    with _LOCK:
        known = _LOADED.get(folder)
        if known is None or known[0] != written:
            known = _LOADED[folder] = written, GateSet.load(folder).requires_grad_(False).eval()
    if known[1].kind != kind:
        raise ValueError(f"`gates` must be of {kind}, got those of {known[1].kind} in {gates!r}")
    return known[1]


def gate_of(gates: Gates, kind: str, layer: int, like: Tensor, dtype: torch.dtype | None = None) -> nn.Module:
    """The gate of a layer, on the device of a tensor.

    Gates from files are copied there once. Those of a live set are used as they are, for a gradient flows into them.

    Args:
        gates: the parameter of the method.
        kind: name of the method.
        layer: index of the layer.
        like: a tensor of the call.
        dtype: of the copied weights; None means float32.

    Raises:
        ValueError, OSError: as `find_gates`; or a live set is on another device, or there are fewer layers.
    """
    found = find_gates(gates, kind)
    if layer >= len(found.layers):
        raise ValueError(f"`gates` must be of more than {layer} layers, got {found!r}")
    if not isinstance(gates, GateSet):
        return found.of_layer(layer, like.device, torch.float32 if dtype is None else dtype)
    gate = found.layers[layer]
    weight = next(gate.parameters(), None)
    if weight is not None and weight.device != like.device:
        raise ValueError(f"`gates` must be on the device of the model {like.device}, got {weight.device}")
    return gate


def _folder(source: str | os.PathLike[str]) -> Path:
    """Where the files of gates lie."""
    path = local_folder(source)
    if path is not None:
        if not (path / SETTINGS_FILE).is_file():
            raise FileNotFoundError(f"`source` must be a folder that holds {SETTINGS_FILE}, got {path}")
        return path.resolve()
    repo_id = os.fspath(source)
    if repo_id not in _DOWNLOADED:
        _DOWNLOADED[repo_id] = _download(repo_id)
    return _DOWNLOADED[repo_id]


def _download(repo_id: str) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import EntryNotFoundError

    with told(f"`source` must be gates on the Hub that can be reached, got {repo_id!r}"):
        try:
            beside = huggingface_hub.hf_hub_download(repo_id, SETTINGS_FILE)
            huggingface_hub.hf_hub_download(repo_id, WEIGHTS_FILE)
        except EntryNotFoundError:
            # A bundle keeps them in a folder.
            beside = huggingface_hub.hf_hub_download(repo_id, f"gates/{SETTINGS_FILE}")
            huggingface_hub.hf_hub_download(repo_id, f"gates/{WEIGHTS_FILE}")
    # Not resolved: the files of a repository are links to where they are stored one by one.
    return Path(beside).parent


def _read(cls: type[GateSet], folder: Path) -> GateSet:
    from safetensors import SafetensorError, safe_open

    value = _settings(folder / SETTINGS_FILE)
    model = Fingerprint(**value["model"])
    # Made without memory first: sizes in the file of a stranger are only believed when the weights have them.
    with torch.device("meta"):
        made = cls(value["kind"], model, value["settings"])
    wanted = made.layers.state_dict()
    file = folder / WEIGHTS_FILE
    if not file.is_file():
        raise ValueError(f"{WEIGHTS_FILE} is not there")
    try:
        with safe_open(file, "pt") as opened:
            mark = opened.metadata() or {}
            shapes = {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}
            _same_tensors(shapes, {name: tuple(t.shape) for name, t in wanted.items()})
            # Copied out of the file, which is mapped: who writes over it must not change gates that are in use.
            weights = {name: opened.get_tensor(name).clone() for name in shapes}
    except SafetensorError as error:
        raise ValueError(f"{WEIGHTS_FILE} must be a whole safetensors file: {error}") from None
    if mark.get("format") != FORMAT or mark.get("settings") != _digest(value):
        raise ValueError(f"{WEIGHTS_FILE} must be written together with {SETTINGS_FILE}, got one of other settings")
    for name, weight in weights.items():
        if not weight.is_floating_point() or not bool(weight.isfinite().all()):
            raise ValueError(f"weights must be finite numbers, got {weight.dtype} with others in {name}")
    made.layers.load_state_dict(weights, assign=True)
    return made


def _same_tensors(found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]) -> None:
    wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{WEIGHTS_FILE} must hold the weights that the settings tell of; {name} is "
            f"{list(found[name]) if name in found else 'missing'}, "
            f"not {list(wanted[name]) if name in wanted else 'wanted'} ({len(wrong)} such)"
        )


def _settings(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"{SETTINGS_FILE} must have at most {_LARGEST_FILE} bytes, got {size}")
    try:
        value = read_document(file.read_bytes().decode("utf-8"), SETTINGS_FILE, FORMAT, VERSION, _KEYS)
        check_keys("model", value["model"], tuple(Fingerprint.__dataclass_fields__))
        as_dict("settings", value["settings"])
        as_text("kind", value["kind"])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{SETTINGS_FILE} must be a JSON file of gates: {str(error)[:200]}") from None
    return value


def _checked(name: object, value: Any) -> Any:
    """A setting as JSON has it."""
    if not isinstance(name, str) or len(name) > 200:
        raise ValueError(f"`settings` must have short names, got {shortened(name)}")
    if isinstance(value, (list, tuple)) and len(value) <= 256:
        return [_checked(name, item) for item in value]
    plain = value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))
    if not plain:
        raise TypeError(f"`settings[{name!r}]` must be a number, a text or a list of them, got {shortened(value)}")
    return value


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def unknown_settings(kind: str, settings: Mapping[str, Any], known: Sequence[str]) -> None:
    """For `make_gates`: refuses settings that the method does not have.

    Raises:
        ValueError: names them and the known ones.
    """
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"gates of {kind} take the settings {', '.join(known)}; got {', '.join(unknown)}")
