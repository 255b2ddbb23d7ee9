"""Latents to train on: samples in safetensors shards, with an index that says what is in which."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_sparse_attn.context import check_int
from hf_sparse_attn.sharing.files import replace_file, write_text

FORMAT, VERSION = "hf_sparse_attn.latents", 1
INDEX = "index.json"
_SHARD = "latents-{:05}.safetensors"
_LATENTS = "latents"
_SHARD_BYTES = 256 << 20
# Handles of shards that a LatentData keeps open.
_OPEN = 32
_TEMPORARY = (".latents-", f".{INDEX}")
# A temporary file that nothing has written to for so long was left by a process that was killed.
_ABANDONED_SECONDS = 3600.0


class LatentSample(NamedTuple):
    """A video as the transformer sees it.

    Args:
        latents: [channels, frames, height, width], in latent units and normalised as for the transformer.
        conditions: tensors by name, without a batch axis: prompt_embeds, prompt_attention_mask, image_embeds, ...
    """

    latents: Tensor
    conditions: dict[str, Tensor]


class LatentData:
    """Samples of a folder of latents, read from the disk as they are asked for; shapes may differ.

    Args:
        folder: with index.json and its shards, as a LatentWriter leaves it.

    Raises:
        FileNotFoundError: the folder, its index or a shard is not there.
        ValueError: the index is none, was not finished, or says what the shards do not hold.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        if not (self.folder / INDEX).is_file():
            raise FileNotFoundError(f"`folder` must hold {INDEX} and shards of latents, got {self.folder}")
        index = read_index(self.folder)
        if not index["complete"]:
            raise ValueError(
                f"`folder` must hold latents that were written to the end, got {len(index['samples'])} samples of a "
                f"run that stopped in {self.folder}; the same run goes on from there"
            )
        self.samples: list[dict[str, Any]] = index["samples"]
        if not self.samples:
            raise ValueError(f"`folder` must hold at least one sample, got none in {self.folder}")
        self._shard = lru_cache(_OPEN)(self._open)
        self._check()

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> LatentSample:
        # IndexError is what ends a loop over a sequence.
        if not 0 <= index < len(self):
            raise IndexError(f"`index` must be from 0 to {len(self) - 1}, got {index}")
        sample = self.samples[index]
        shard = self._shard(sample["shard"])
        read = {name: shard.get_tensor(_key(index, name)) for name in (_LATENTS, *sample["conditions"])}
        return LatentSample(read.pop(_LATENTS), read)

    def name(self, index: int) -> str:
        """What the sample was made from, such as the name of a video; "" where nothing was said."""
        return str(self.samples[index]["name"])

    def _open(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / name
        if not path.is_file():
            raise FileNotFoundError(f"`folder` must hold every shard that {INDEX} names, got none at {path}")
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise ValueError(f"`folder` must hold whole shards, got {path}: {error}") from error

    def _check(self) -> None:
        """Headers alone are read."""
        for index, sample in enumerate(self.samples):
            shard = self._shard(sample["shard"])
            held = set(shard.keys())
            for name, shape in ((_LATENTS, sample[_LATENTS]), *sample["conditions"].items()):
                key = _key(index, name)
                found = shard.get_slice(key).get_shape() if key in held else None
                if found != shape:
                    raise ValueError(
                        f"`folder` must hold what {INDEX} says, `{name}` of {shape} for sample {index}, "
                        f"got {found} in {self.folder / sample['shard']}"
                    )


class LatentWriter:
    """Writes samples one by one; every shard is on the disk in full before the index names it.

    A process that is killed loses the samples of its last shard at most: a writer of the same folder and key goes on
    behind those that are kept. Close it when all samples are there; until then `LatentData` refuses the folder.

    Args:
        folder: made if missing.
        key: what the samples depend on, plain values.
        shard_bytes: about how large a shard is; one that has as much is written.

    Raises:
        ValueError: the folder holds latents of another key, or something else under the name of the index.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        key: Mapping[str, Any] | None = None,
        shard_bytes: int = _SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self._shard_bytes = check_int("shard_bytes", shard_bytes, 1)
        # As JSON gives it back: tuples are lists there.
        plain = json.loads(json.dumps(key or {}))
        self._waiting: dict[str, Tensor] = {}
        self._entries: list[dict[str, Any]] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        for left in self.folder.glob(".*"):
            if time.time() - left.stat().st_mtime > _ABANDONED_SECONDS and left.name.startswith(_TEMPORARY):
                left.unlink(missing_ok=True)
        if (self.folder / INDEX).is_file():
            self._index = read_index(self.folder)
            if self._index["key"] != plain:
                raise ValueError(
                    f"`folder` must be empty or hold latents of the same key, got others in {self.folder}"
                )
        else:
            self._index = {"format": FORMAT, "version": VERSION, "complete": False, "key": plain, "samples": []}
            self._write_index()

    def __len__(self) -> int:
        return len(self._index["samples"]) + len(self._entries)

    @property
    def complete(self) -> bool:
        """Whether the writer was closed, now or by an earlier run: nothing can be added then."""
        return bool(self._index["complete"])

    @property
    def names(self) -> list[str]:
        """Names of the samples that are there."""
        return [str(entry["name"]) for entry in (*self._index["samples"], *self._entries)]

    def add(self, sample: LatentSample, name: str = "") -> None:
        """Adds a sample.

        Args:
            sample: what to write; tensors of any device.
            name: what it was made from.

        Raises:
            ValueError: the latents are not of four axes, or hold what is no number.
        """
        if self.complete:
            raise ValueError(f"`folder` must hold latents that were not finished, got {self.folder}")
        if sample.latents.ndim != 4 or not sample.latents.numel():
            shape = list(sample.latents.shape)
            raise ValueError(f"`latents` must be [channels, frames, height, width], got {shape} for {name!r}")
        tensors = {_LATENTS: sample.latents, **sample.conditions}
        if len(tensors) != len(sample.conditions) + 1:
            raise ValueError(f"`conditions` must not be called {_LATENTS!r}, got {list(sample.conditions)}")
        for key, tensor in tensors.items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise ValueError(
                    f"`{key}` must be finite, got infinite or undefined values for {name!r}; a VAE or text encoder in "
                    "float16 may overflow"
                )
        number = len(self)
        self._waiting.update({_key(number, key): _own(tensor) for key, tensor in tensors.items()})
        shapes = {key: list(tensor.shape) for key, tensor in tensors.items()}
        latents = shapes.pop(_LATENTS)
        self._entries.append({"name": name, "shard": "", _LATENTS: latents, "conditions": shapes})
        if sum(t.numel() * t.element_size() for t in self._waiting.values()) >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Writes the samples that wait for their shard to be full."""
        from safetensors.torch import save_file

        if not self._entries:
            return
        used = {entry["shard"] for entry in self._index["samples"]}
        shard = _SHARD.format(len(used))
        # The shard counts once the index names it: what an earlier run left under that name is replaced.
        replace_file(self.folder / shard, lambda path: save_file(self._waiting, path))
        self._index["samples"] += [{**entry, "shard": shard} for entry in self._entries]
        self._waiting, self._entries = {}, []
        self._write_index()

    def close(self) -> None:
        """Writes what waits, and marks the folder as finished.

        Raises:
            ValueError: there is no sample.
        """
        self.flush()
        if not self._index["samples"]:
            raise ValueError(f"`samples` must be at least one, got none for {self.folder}")
        self._index["complete"] = True
        self._write_index()

    def _write_index(self) -> None:
        write_text(self.folder / INDEX, json.dumps(self._index))


def read_index(folder: Path) -> dict[str, Any]:
    """The index of a folder of latents, checked but for what its shards hold.

    Raises:
        ValueError: it is no index, or of a later version.
    """
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise KeyError("format")
        version = index["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"`folder` must hold an {INDEX} of latents, got {path}: {error!r}") from error
    if version != VERSION:
        raise ValueError(f"`version` of {path} must be {VERSION}, got {version!r}")
    try:
        whole = isinstance(index["complete"], bool) and isinstance(index["key"], dict)
        good = whole and all(_is_entry(entry) for entry in index["samples"])
    except (KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"`folder` must hold an {INDEX} with shard, name and shapes of every sample, got {path}")
    return dict(index)


def _is_entry(entry: dict[str, Any]) -> bool:
    shapes = [entry[_LATENTS], *entry["conditions"].values()]
    sizes = all(isinstance(s, list) and all(type(n) is int and n >= 0 for n in s) for s in shapes)
    shard = entry["shard"]
    # A name with a path in it, or with a drive or a stream as Windows writes them, would be read from somewhere else.
    plain = isinstance(shard, str) and re.fullmatch(r"[^/\\:]+\.safetensors", shard) is not None
    return sizes and plain and isinstance(entry["name"], str) and len(entry[_LATENTS]) == 4


def _key(number: int, name: str) -> str:
    return f"{number}.{name}"


def _own(tensor: Tensor) -> Tensor:
    """On the CPU, in memory of its own: safetensors takes no views, and the caller may change what it gave."""
    return tensor.detach().to("cpu", copy=True).contiguous()
