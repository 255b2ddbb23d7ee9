"""Tally: running sums of the figures over calls and batches, and their file, from which a killed run goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hf_sparse_attn.context import Context
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.measurements import Case, Measurements, methods_of, read_arrays
from hf_sparse_attn.sharing.files import replace_file

FORMAT = "hf_sparse_attn.profile_state"
VERSION = 1
Steps = tuple[float, float]


@dataclass
class Sums:
    """Sums of one case: by figure [layers, heads, candidates], and how many calls each is of [layers, candidates]."""

    calls: int = 0
    tokens: int = 0
    sums: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    counts: dict[str, NDArray[np.float64]] = field(default_factory=dict)


class Tally:
    """Sums of figures, by case.

    Args:
        candidates: the candidates, dense first.
        steps: ranges of denoising steps.
    """

    def __init__(self, candidates: Sequence[Method], steps: Sequence[Steps]) -> None:
        self.candidates = tuple(candidates)
        self.steps = tuple(steps)
        self.batches = 0
        self.layers: list[str] = []
        self.heads = self.kv_heads = 0
        # By (length class, number of the step range).
        self.cases: dict[tuple[int, int], Sums] = {}
        self.declined: dict[str, str] = {}

    def case_of(self, ctx: Context) -> Sums | None:
        """The sums a call belongs to, or None where its step is in no range.

        Raises:
            ValueError: layers with different numbers of heads.
        """
        share = (ctx.step + 0.5) / ctx.num_steps
        number = next((i for i, (a, b) in enumerate(self.steps) if a <= share < b or share >= b == 1), None)
        if number is None:
            return None
        if not self.layers:
            self.layers = [""] * ctx.num_layers
            self.heads, self.kv_heads = ctx.num_heads, ctx.num_kv_heads
        own, first = (ctx.num_layers, ctx.num_heads), (len(self.layers), self.heads)
        if own != first:
            raise ValueError(
                f"`model` must have equally many heads in all layers to be profiled: (layers, heads) "
                f"{first} first, then {own}"
            )
        # The fewest where layers differ: heads that share keys in one layer then do so in all.
        self.kv_heads = min(self.kv_heads, ctx.num_kv_heads)
        sums = self.cases.setdefault((length_class(ctx.layout.kv_len), number), Sums())
        sums.calls += 1
        sums.tokens += ctx.layout.kv_len
        return sums

    def add(self, sums: Sums, layer: int, candidate: int, figures: Mapping[str, Tensor]) -> None:
        """Adds the figures [heads] of one candidate in one call."""
        shape = (len(self.layers), self.heads, len(self.candidates))
        for name, values in figures.items():
            if name not in sums.sums:
                sums.sums[name], sums.counts[name] = np.zeros(shape), np.zeros((shape[0], shape[2]))
            sums.sums[name][layer, :, candidate] += values.numpy()
            sums.counts[name][layer, candidate] += 1

    def means(self, maps: Sequence[Any] = ()) -> Measurements:
        """The means over all calls."""
        keys = sorted(self.cases)
        names = sorted({name for key in keys for name in self.cases[key].sums})
        blank = np.full((len(self.layers), self.heads, len(self.candidates)), np.nan)

        def mean(key: tuple[int, int], name: str) -> NDArray[np.float64]:
            found = self.cases[key]
            if name not in found.sums:
                return blank
            with np.errstate(invalid="ignore"):
                return found.sums[name] / found.counts[name][:, None]

        return Measurements(
            candidates=self.candidates,
            layers=tuple(self.layers),
            heads=self.heads,
            kv_heads=self.kv_heads,
            cases=tuple(Case(round(self.cases[k].tokens / self.cases[k].calls), self.steps[k[1]]) for k in keys),
            figures={name: np.stack([mean(key, name) for key in keys]).astype(np.float32) for name in names},
            declined=dict(self.declined),
            maps=maps,
        )

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Writes all sums, so that a reader sees either the file before or this one.

        Args:
            path: where to.
            about: what the sums are of; `load` refuses a file of anything else.
        """
        from safetensors.numpy import save_file

        tensors, cases = {}, []
        for i, (key, found) in enumerate(sorted(self.cases.items())):
            cases.append({"key": list(key), "calls": found.calls, "tokens": found.tokens})
            for name in found.sums:
                tensors[f"{i}.sums.{name}"] = found.sums[name]
                tensors[f"{i}.counts.{name}"] = found.counts[name]
        header = {
            "format": FORMAT,
            "version": VERSION,
            "about": dict(about),
            "candidates": [{"method": c.name, "params": c.params()} for c in self.candidates],
            "steps": [list(s) for s in self.steps],
            "batches": self.batches,
            "layers": self.layers,
            "heads": [self.heads, self.kv_heads],
            "cases": cases,
            "declined": self.declined,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"hf_sparse_attn": json.dumps(header)}
        replace_file(path, lambda file: save_file(tensors, file, metadata=metadata))

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any], candidates: Sequence[Method] | None) -> Tally:
        """Reads what `save` wrote.

        Args:
            path: the file.
            about: what the sums must be of.
            candidates: the candidates they must be of; None means those of the file.

        Raises:
            ValueError: not such a file, or of another model, other settings or other candidates, which are named.
        """
        header, tensors = read_arrays(path, "state", "an unfinished profile", (FORMAT, VERSION))
        for name, value in json.loads(json.dumps(dict(about))).items():
            if header["about"].get(name) != value:
                raise ValueError(
                    f"`state` must be of the same {name}: {value} here, {header['about'].get(name)} in {path}; "
                    "give another file to begin anew"
                )
        kept = methods_of(header["candidates"])
        if candidates is not None and tuple(candidates) != kept:
            raise ValueError(f"`state` must be of the same candidates, got {path} with {', '.join(map(str, kept))}")
        made = cls(kept, [(a, b) for a, b in header["steps"]])
        made.batches, made.layers, made.declined = header["batches"], header["layers"], header["declined"]
        made.heads, made.kv_heads = header["heads"]
        for i, case in enumerate(header["cases"]):
            made.cases[case["key"][0], case["key"][1]] = Sums(
                case["calls"],
                case["tokens"],
                {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"{i}.sums.")},
                {n.split(".", 2)[2]: t for n, t in tensors.items() if n.startswith(f"{i}.counts.")},
            )
        return made


def length_class(tokens: int) -> int:
    """Lengths within a factor of the square root of 2 of a power of two are one class: its exponent."""
    return round(math.log2(max(1, tokens)))


def longest_of_class(tokens: int) -> int:
    """The longest length of the class of a length."""
    return int(2 ** (length_class(tokens) + 0.5))
