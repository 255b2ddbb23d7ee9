"""The files of a bundle: `bundle.json` beside the adapter, the profile and the gates; written last and read first."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hf_sparse_attn.profiles.file import CARD as PROFILE_CARD
from hf_sparse_attn.profiles.file import FILE as PROFILE_FILE
from hf_sparse_attn.profiles.file import MEASUREMENTS, MODEL_KEYS
from hf_sparse_attn.recipe import SparseSettings
from hf_sparse_attn.settings import build_config, plain
from hf_sparse_attn.sharing.files import write_text
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.strict_json import as_dict, as_text, check_keys, decode, encode, read_document, shortened
from hf_sparse_attn.training.lora.file import CONFIG, DIFFUSERS_WEIGHTS, WEIGHTS

FORMAT = "hf_sparse_attn.bundle"
VERSION = 1
FILE, CARD = "bundle.json", "README.md"
PROFILE, GATES = "profile", "gates"
_LARGEST_FILE = 8 << 20
# No other files of a folder are in a bundle: no name in it can lead elsewhere, and nothing of one's own is uploaded.
NAMES = frozenset(
    [CONFIG, WEIGHTS, DIFFUSERS_WEIGHTS]
    + [f"{PROFILE}/{name}" for name in (PROFILE_FILE, MEASUREMENTS, PROFILE_CARD)]
    + [f"{GATES}/{name}" for name in ("gates.json", "gates.safetensors")]
)
# That of a method in a bundle's settings, where it is the profile in the bundle.
_OWN_PROFILE = "profile"


@dataclass(frozen=True)
class Bundle:
    """What a bundle's folder holds.

    Args:
        base_model: name or folder of the model that it is for.
        part: the transformer of a pipeline with several that it is for; "" where it has one.
        fingerprint: of the model as it was trained, with its positions scaled as `rope` says.
        sparse: settings of sparse attention; None where it has none.
        rope: how positions were scaled; None where they were not.
        figures: what was measured.
        recipe: the settings it was trained with.
        versions: of the libraries.
        files: the other files, each with its SHA-256.
    """

    base_model: str
    part: str
    fingerprint: Fingerprint
    sparse: SparseSettings | None
    rope: dict[str, Any] | None
    figures: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, str]

    @property
    def has_adapter(self) -> bool:
        """Whether it holds a LoRA adapter."""
        return CONFIG in self.files

    @property
    def has_profile(self) -> bool:
        """Whether its method is a HeadProfile in its folder."""
        return any(name.startswith(f"{PROFILE}/") for name in self.files)

    @property
    def has_gates(self) -> bool:
        """Whether its method asks gates in its folder."""
        return any(name.startswith(f"{GATES}/") for name in self.files)

    def settings_in(self, folder: Path) -> SparseSettings | None:
        """The settings with the profile and the gates of a folder in place."""
        found = self.sparse
        if found is not None and self.has_profile:
            found = replace(found, method=str(folder / PROFILE))
        if found is not None and self.has_gates:
            found = replace(found, params={**found.params, "gates": str(folder / GATES)})
        return found


_KEYS = ("format", "version", *Bundle.__dataclass_fields__)


def files_in(folder: Path) -> dict[str, str]:
    """The files of a bundle that lie in a folder, each with its SHA-256."""
    return {name: digest(folder / name) for name in sorted(NAMES) if (folder / name).is_file()}


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    made = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            made.update(block)
    return made.hexdigest()


def write(bundle: Bundle, folder: Path) -> None:
    """Writes `bundle.json`, without which a folder is no bundle."""
    write_text(folder / FILE, to_json(bundle))


def to_json(bundle: Bundle) -> str:
    """The text of `bundle.json`.

    Raises:
        TypeError: a value that JSON cannot hold.
    """
    sparse = None
    if bundle.sparse is not None:
        sparse = plain(bundle.sparse)
        sparse["params"] = {name: encode(name, value) for name, value in bundle.sparse.params.items()}
    value = {
        "format": FORMAT,
        "version": VERSION,
        **vars(bundle),
        "fingerprint": asdict(bundle.fingerprint),
        "sparse": sparse,
        "rope": None if bundle.rope is None else as_json("rope", bundle.rope),
        "figures": as_json("figures", bundle.figures),
        "recipe": as_json("recipe", bundle.recipe),
    }
    return json.dumps(value, indent=1, allow_nan=False) + "\n"


def as_json(name: str, value: Any) -> Any:
    """A value as JSON has it; a number that is not finite, which JSON lacks, becomes null.

    Raises:
        TypeError: something else than numbers, texts, paths, and lists and mappings of these.
    """
    if isinstance(value, Mapping):
        return {str(key): as_json(f"{name}.{key}", part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(name, part) for part in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"`{name}` must be numbers, texts, or lists or mappings of them, got {shortened(value)}")


def read(folder: Path) -> Bundle:
    """What `bundle.json` of a folder says.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is no valid one; the message names the part, the rule and the value.
    """
    file = folder / FILE
    if not file.is_file():
        raise FileNotFoundError(f"`source` must be a folder that holds {FILE}, got {folder}")
    size = file.stat().st_size
    if size > _LARGEST_FILE:
        raise ValueError(f"`source` must hold a bundle with at most {_LARGEST_FILE} bytes of settings, got {size}")
    try:
        return _from_json(file.read_bytes().decode("utf-8"))
    except (ValueError, TypeError) as error:
        raise ValueError(f"`source` must hold a valid bundle, got {file}: {error}") from error


def check_files(folder: Path, bundle: Bundle) -> None:
    """Raises where a file is missing, or not as it was saved.

    That for diffusers is left out: nothing here reads it, and it need not be downloaded.
    """
    for name, expected in bundle.files.items():
        if name == DIFFUSERS_WEIGHTS:
            continue
        if not (folder / name).is_file():
            raise FileNotFoundError(f"`source` must hold all files of its bundle, got {folder} without {name}")
        if digest(folder / name) != expected:
            raise ValueError(f"`source` must hold the files of its bundle as they were saved, got a changed {name}")


def _from_json(text: str) -> Bundle:
    value = read_document(text, "bundle", FORMAT, VERSION, _KEYS)
    check_keys("fingerprint", value["fingerprint"], MODEL_KEYS)
    made = Bundle(
        base_model=as_text("base_model", value["base_model"]),
        part=as_text("part", value["part"]),
        fingerprint=Fingerprint(**value["fingerprint"]),
        sparse=None if value["sparse"] is None else _settings(value["sparse"]),
        rope=None if value["rope"] is None else as_dict("rope", value["rope"]),
        figures=as_dict("figures", value["figures"]),
        recipe=as_dict("recipe", value["recipe"]),
        versions={
            as_text("versions", k): as_text("versions", v) for k, v in as_dict("versions", value["versions"]).items()
        },
        files=_files(value["files"]),
    )
    if made.has_profile != (made.sparse is not None and made.sparse.method == _OWN_PROFILE):
        raise ValueError("`sparse.method` must be 'profile' exactly where `files` has one")
    if not made.has_adapter and made.sparse is None:
        raise ValueError("`files` must have an adapter where `sparse` is null")
    return made


def _settings(value: Any) -> SparseSettings:
    made = build_config(SparseSettings, value, "sparse")
    if "gates" in made.params:
        raise ValueError("`sparse.params` must have no `gates`: a bundle has its own in its folder")
    if not re.fullmatch(r"[\w.-]{1,200}", made.method):
        raise ValueError(f"`sparse.method` must be the name of a method, got {shortened(made.method)}")
    return replace(made, params={k: decode(f"sparse.params.{k}", v) for k, v in made.params.items()})


def _files(value: Any) -> dict[str, str]:
    found = as_dict("files", value)
    for name, expected in found.items():
        if name not in NAMES or not isinstance(expected, str) or not re.fullmatch("[0-9a-f]{64}", expected):
            raise ValueError(
                f"`files` must be those of a bundle with their SHA-256, got {shortened({name: expected})}"
            )
    if (CONFIG in found) != (WEIGHTS in found):
        raise ValueError(f"`files` must have both of {CONFIG} and {WEIGHTS}, or none")
    return found
