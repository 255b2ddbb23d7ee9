"""The fastest launches measured on this machine, on disk, for kernels that can be cut in several ways.

Knows no kernel: a launch is a few named whole numbers. Written by explicit tuning alone, never by a user's call.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_sparse_attn.sharing.files import write_text

log = logging.getLogger(__name__)

_FORMAT = 1
# Contents by path, read once in a process whatever other processes write: another launch adds in another order, and
# equal calls must give equal outputs.
_READ: dict[Path, dict[str, Any]] = {}


def path() -> Path:
    """Where the launches are kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_sparse_attn" / "tuning.json"


def lookup(device: str, software: str, kernel: str, shape: str) -> dict[str, int] | None:
    """The best launch known, or None.

    Args:
        device: name of the device.
        software: versions that decide how fast a launch is.
        kernel: name of the kernel.
        shape: name of a class of shapes that share a launch.
    """
    found = _load().get(f"{device}, {software}", {}).get(kernel, {}).get(shape)
    return None if found is None else dict(found["launch"])


def store(device: str, software: str, kernel: str, shape: str, launch: Mapping[str, int], milliseconds: float) -> None:
    """Keeps a launch as the best one, in place of another; the file is replaced as a whole, or left as it was.

    Args:
        device, software, kernel, shape: as in `lookup`.
        launch: what the kernel's file makes a launch of.
        milliseconds: what it took.

    Raises:
        ValueError: a launch that is not made of whole numbers from 1 on, or a time that is not positive.
    """
    entry = {"launch": dict(launch), "milliseconds": milliseconds}
    if not _is_entry(entry):
        raise ValueError(f"`launch` must hold whole numbers from 1 on and a positive time, got {entry}")
    # Read again: another process may have written since.
    _READ.pop(path(), None)
    known = _load()
    known.setdefault(f"{device}, {software}", {}).setdefault(kernel, {})[shape] = entry
    path().parent.mkdir(parents=True, exist_ok=True)
    write_text(path(), json.dumps({"format": _FORMAT, "launches": known}, indent=1, sort_keys=True))
    _READ.pop(path(), None)


def _load() -> dict[str, Any]:
    """Launches by device and versions, kernel, shape; none where the file is not there or broken."""
    file = path()
    if file not in _READ:
        _READ.setdefault(file, _parse(file) if file.is_file() else {})
    return _READ[file]


def _parse(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        log.warning("%s cannot be read and is ignored: %s", file, error)
        return {}
    if not isinstance(found, dict) or found.get("format") != _FORMAT or not isinstance(found.get("launches"), dict):
        log.warning("%s is not of format %d and is ignored", file, _FORMAT)
        return {}
    launches: dict[str, Any] = found["launches"]
    try:
        known = all(_is_entry(e) for kernels in launches.values() for k in kernels.values() for e in k.values())
    except AttributeError:
        # Something else than an object on one of the levels.
        known = False
    if not known:
        log.warning("%s holds something that is no launch and is ignored", file)
    return launches if known else {}


def _is_entry(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"launch", "milliseconds"}:
        return False
    launch, time = entry["launch"], entry["milliseconds"]
    whole = isinstance(launch, dict) and all(
        isinstance(k, str) and isinstance(n, int) and not isinstance(n, bool) and n >= 1 for k, n in launch.items()
    )
    return whole and isinstance(time, (int, float)) and not isinstance(time, bool) and time > 0
