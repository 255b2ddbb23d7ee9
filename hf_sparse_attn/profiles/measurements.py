"""Measurements: what the profiler found out about every head and every candidate; kept in one safetensors file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.method import Method
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.registry import make_method

FORMAT = "hf_sparse_attn.measurements"
VERSION = 1
METRICS = ("output_error", "layer_error", "recall", "influence", "retrieval_score", "video_mse")
# Of those that every input allows the one by which choices lose least on real models: SmolLM2-135M at density 1/4 of
# 2,048 tokens lost 0.013 nats by it, 0.068 by "influence" and 0.21 by "output_error".
DEFAULT_METRIC = "layer_error"


@dataclass(frozen=True)
class Case:
    """One condition under which heads were measured.

    Args:
        tokens: length of the sequence, in tokens.
        steps: (start, end) of the range of denoising steps, as shares of the schedule in [0, 1]; (0, 1) for language.
    """

    tokens: int
    steps: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class HeadMap:
    """The attention of one head, pooled for a picture.

    Args:
        case, layer, head: where it was seen.
        attention: float [cells, cells], dense attention summed over keys and averaged over queries of a cell.
        kept: bool [candidates, cells, cells], whether a candidate reads any key of the cell.
    """

    case: int
    layer: int
    head: int
    attention: NDArray[np.float32]
    kept: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Measurements:
    """Figures of every head under every candidate.

    Args:
        candidates: methods with their parameters; the first is `dense`.
        layers: names of the layers, by index.
        heads, kv_heads: query heads, and key/value heads, of each layer.
        cases: conditions that were measured.
        figures: float32 arrays [cases, layers, heads, candidates] by name. Always there: "density" (kept share of the
            visible pairs), "seconds" (predicted by the cost model, for this head alone), "recall" (share of the dense
            attention mass on kept keys, mean over rows), "output_error" (relative error of a row of the head's output,
            median over rows), "output_error_p95" (95 % over rows), "layer_error" (squared error of the head's output
            as a share of the squared output of all heads of the layer); others of METRICS where they were asked for.
            NaN where a candidate declined.
        declined: reasons by label of a candidate.
        maps: pooled attention of some heads.
    """

    candidates: tuple[Method, ...]
    layers: tuple[str, ...]
    heads: int
    kv_heads: int
    cases: tuple[Case, ...]
    figures: Mapping[str, NDArray[np.float32]]
    declined: Mapping[str, str] = field(default_factory=dict)
    maps: Sequence[HeadMap] = ()

    def __post_init__(self) -> None:
        shape = (len(self.cases), len(self.layers), self.heads, len(self.candidates))
        if not self.candidates or self.candidates[0].name != "dense":
            raise ValueError(f"`candidates` must begin with dense, got {[c.name for c in self.candidates]}")
        for name in ("density", "seconds", "recall", "output_error", "output_error_p95"):
            if name not in self.figures:
                raise ValueError(f"`figures` must hold {name!r}, got {sorted(self.figures)}")
        for name, values in self.figures.items():
            if values.shape != shape:
                raise ValueError(f"`figures[{name!r}]` must be {list(shape)}, got {list(values.shape)}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The candidates in words, as `label_of`."""
        return tuple(map(label_of, self.candidates))

    def damage(self, metric: str) -> NDArray[np.float64]:
        """What a candidate costs in quality, [cases, layers, heads, candidates]: 0 for dense, larger is worse.

        "recall" and "retrieval_score" count what is lost of 1; the others are errors. Infinite where a candidate
        declined.

        Args:
            metric: one of METRICS, or a sum of them as `weights_of` reads it.

        Raises:
            ValueError: unknown metric, or one that was not measured.
        """
        total = np.zeros((len(self.cases), len(self.layers), self.heads, len(self.candidates)))
        for name, weight in weights_of(metric).items():
            if name not in self.figures:
                known = ", ".join(m for m in METRICS if m in self.figures)
                raise ValueError(f"`metric` must have been measured ({known}), got {name!r}")
            values = self.figures[name].astype(np.float64)
            if name in ("recall", "retrieval_score"):
                values = 1 - values
            total += weight * np.where(np.isnan(values), np.inf, np.maximum(values, 0))
        return total

    def save(self, path: Path | str) -> None:
        """Writes one safetensors file."""
        from safetensors.numpy import save_file

        tensors = {f"figures.{name}": np.ascontiguousarray(v, np.float32) for name, v in self.figures.items()}
        for i, found in enumerate(self.maps):
            tensors[f"maps.{i}.attention"] = np.ascontiguousarray(found.attention, np.float32)
            tensors[f"maps.{i}.kept"] = np.ascontiguousarray(found.kept, np.bool_)
        header = {
            "format": FORMAT,
            "version": VERSION,
            "candidates": [{"method": c.name, "params": c.params()} for c in self.candidates],
            "layers": list(self.layers),
            "heads": self.heads,
            "kv_heads": self.kv_heads,
            "cases": [{"tokens": c.tokens, "steps": list(c.steps)} for c in self.cases],
            "declined": dict(self.declined),
            "maps": [[m.case, m.layer, m.head] for m in self.maps],
        }
        save_file(tensors, path, metadata={"hf_sparse_attn": json.dumps(header)})

    @classmethod
    def load(cls, path: Path | str) -> Measurements:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: no such file.
            ValueError: not such a file, or of another version.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"`path` must be a file of measurements, got {path}")
        header, tensors = read_arrays(path, "path", "measurements", (FORMAT, VERSION))
        try:
            return cls(
                candidates=methods_of(header["candidates"]),
                layers=tuple(header["layers"]),
                heads=header["heads"],
                kv_heads=header["kv_heads"],
                cases=tuple(Case(c["tokens"], (c["steps"][0], c["steps"][1])) for c in header["cases"]),
                figures={n.removeprefix("figures."): t for n, t in tensors.items() if n.startswith("figures.")},
                declined=header["declined"],
                maps=[
                    HeadMap(case, layer, head, tensors[f"maps.{i}.attention"], tensors[f"maps.{i}.kept"])
                    for i, (case, layer, head) in enumerate(header["maps"])
                ],
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ValueError(f"`path` must be a whole file of measurements, got {path}: {error!r}") from error


def weights_of(metric: str) -> dict[str, float]:
    """The metrics in a sum and their weights: "layer_error + 0.1 * retrieval_score" is {"layer_error": 1.0, ...}.

    Args:
        metric: one of METRICS, or a sum of them, each by itself or behind a number and `*`.

    Raises:
        TypeError: not a string.
        ValueError: a name that is no metric or stands twice, or a weight that is not more than 0.
    """
    if not isinstance(metric, str):
        raise TypeError(f"`metric` must be a string, got {metric!r} of type {type(metric).__name__}")
    found: dict[str, float] = {}
    for term in metric.split("+"):
        number, star, name = (part.strip() for part in term.rpartition("*"))
        try:
            weight = float(number) if star else 1.0
        except ValueError:
            weight = math.nan
        if name not in METRICS or name in found or (number and not star):
            said = f"`metric` must be one of {', '.join(METRICS)}, or a sum of them with weights; got {metric!r}"
            raise ValueError(said + ("" if name in METRICS else nearest(name, METRICS)))
        if not 0 < weight < math.inf:
            raise ValueError(f"`metric` must have weights of more than 0, got {number!r} in {metric!r}")
        found[name] = weight
    return found


def label_of(method: Method) -> str:
    """A method in words: its name and the parameters that are set, "sliding_window(window=256, sink=16)"."""
    params = ", ".join(f"{name}={value}" for name, value in method.params().items() if value is not None)
    return f"{method.name}({params})" if params else method.name


def methods_of(entries: Sequence[Mapping[str, Any]]) -> tuple[Method, ...]:
    """Methods from JSON: [{"method": name, "params": {...}}, ...]."""
    # JSON knows lists alone, and parameters are hashable.
    params = [{n: tuple(v) if isinstance(v, list) else v for n, v in e.get("params", {}).items()} for e in entries]
    return tuple(make_method(entry["method"], own) for entry, own in zip(entries, params, strict=True))


def read_arrays(
    path: Path | str, argument: str, what: str, kind: tuple[str, int]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    """Header and arrays of a safetensors file of this package.

    Args:
        path: the file.
        argument, what: name of the argument that gave it and what it must be of, for errors.
        kind: format and version that the header must have.

    Raises:
        ValueError: not such a file, or of another version.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            header: dict[str, Any] = json.loads((file.metadata() or {}).get("hf_sparse_attn", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"`{argument}` must be a file of {what}, got {path}: {error}") from error
    if (header.get("format"), header.get("version")) != kind:
        found = f"{header.get('format')} version {header.get('version')}"
        raise ValueError(f"`{argument}` must be {kind[0]} version {kind[1]}, got {found} in {path}")
    return header, arrays
