"""Profiles that others published, as a HeadProfile: files of MInference, DuoAttention and sliding tile attention."""

from __future__ import annotations

import json
import math
import os
import re
import warnings
from collections.abc import Sequence
from itertools import groupby, pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.head_profile import PUBLISHED, HeadProfile
from hf_sparse_attn.profiles.step_plan import MOST_PLANS, StepPlan
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.sharing.fingerprint import LARGEST, Fingerprint
from hf_sparse_attn.sharing.strict_json import finite, shortened

GATES, SIZES = "full_attention_heads.tsv", "config.json"
_LARGEST_FILE = 64 << 20
# What MInference runs where its file is silent, and the key blocks of its block-sparse pattern whatever it says.
_MINFERENCE_DEFAULT = ("vertical_and_slash", 1000, 6096)
_MINFERENCE_BLOCKS = 100
_PARTIAL = ": give `partial=True` to read it as MInference does"
_HEAD = re.compile(r"\s*[+-]?[0-9]{1,9}\s*")
_STA_KEY = re.compile(r"([0-9]{1,4})_([0-9]{1,4})_([0-9]{1,4})")


def read_published(path: str | os.PathLike[str], model: Any, **options: Any) -> HeadProfile:
    """Reads any of the files below, told apart by what they hold.

    Args:
        path: a JSON file of MInference or sliding tile attention, or a folder of DuoAttention.
        model: the model that the profile is for.
        **options: of the reader.

    Raises:
        FileNotFoundError: no such file.
        ValueError: none of these, or one for another number of layers or heads.
    """
    file = Path(path)
    if file.is_dir() or file.name == GATES:
        return from_duo_attention(path, model, **options)
    value = _read_json(file)
    if isinstance(value, list):
        return from_minference(path, model, **options)
    if isinstance(value, dict) and value and all(_STA_KEY.fullmatch(key) for key in value):
        return from_sliding_tile(path, model, **options)
    raise ValueError(
        f"`path` must be a profile of MInference, DuoAttention or sliding tile attention, got {file}: "
        f"{shortened(value)}"
    )


def from_minference(
    path: str | os.PathLike[str], model: Any, *, starting_layer: int = 0, partial: bool = False
) -> HeadProfile:
    """MInference's choice: a list over layers of {head: [kind, vertical, slash, score]}.

    "vertical_and_slash" is vertical_slash; "stream_llm" is sliding_window with as many sinks and as wide;
    "block_sparse" is block_topk with 100 blocks of 64 tokens, as its code runs it whatever the numbers; a head that
    is not named has 1000 verticals and 6096 slashes, as there. Scores are in units that differ from file to file and
    are left out. "flex_vertical_and_slash", which keeps a share of each head's attention, is refused: that is
    flexprefill's way, and no number of verticals and slashes.

    Args:
        path: the JSON file.
        model: the model that it is for.
        starting_layer: layers below it are dense.
        partial: read a file for fewer or more layers or heads, as MInference does: a layer that it lacks is one whose
            heads are not named, and what the model lacks is left out. Otherwise it passes for another model's.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or one for another number of layers or heads.
    """
    value, found = _read_json(Path(path)), Fingerprint.of(model)
    if not isinstance(value, list) or (len(value) != found.layers and not partial):
        what = f"a list of {len(value)}" if isinstance(value, list) else shortened(value)
        raise ValueError(f"`path` must be a list over {found.layers} layers, got {what} in {path}{_PARTIAL}")
    cells = []
    for layer in range(found.layers):
        named = _named_heads(layer, value[layer], path) if layer < len(value) else {}
        beyond = sorted(head for head in named if not 0 <= head < found.heads)
        if beyond and not partial:
            raise ValueError(
                f"layer {layer} must have heads from 0 to {found.heads - 1}, got '{beyond[0]}' in {path}{_PARTIAL}"
            )
        for head in range(found.heads):
            where = f"layer {layer} head {head}"
            entry = named.get(head, _MINFERENCE_DEFAULT)
            cells.append(None if layer < starting_layer else _minference(where, entry))
    return _profile(found, cells, [(0.0, 1.0)], {"source": "MInference", "file": Path(path).name})


def _named_heads(layer: int, heads: Any, path: str | os.PathLike[str]) -> dict[int, Any]:
    """The entries of a layer by the numbers of their heads; a number may have zeros or blanks before it."""
    if not isinstance(heads, dict):
        raise ValueError(f"layer {layer} must be an object of heads, got {shortened(heads)} in {path}")
    wrong = next((name for name in heads if not _HEAD.fullmatch(name)), None)
    if wrong is not None:
        raise ValueError(f"layer {layer} must have numbers of heads, got {shortened(wrong)} in {path}")
    return {int(name): entry for name, entry in heads.items()}


def _minference(where: str, entry: Any) -> Method:
    if not isinstance(entry, (list, tuple)) or len(entry) not in (3, 4):
        raise ValueError(f"{where} must be [kind, vertical, slash, score], got {shortened(entry)}")
    kind, first, second = entry[:3]
    if kind == "vertical_and_slash":
        return _made(where, "vertical_slash", vertical=first, slash=second)
    if kind == "stream_llm":
        return _made(where, "sliding_window", sink=first, window=second)
    if kind == "block_sparse":
        return _made(where, "block_topk", block_size=64, topk=_MINFERENCE_BLOCKS)
    hint = ", which keeps a share of the attention: take flexprefill" if kind == "flex_vertical_and_slash" else ""
    raise ValueError(f"{where} must be of vertical_and_slash, stream_llm or block_sparse, got {shortened(kind)}{hint}")


def from_duo_attention(
    path: str | os.PathLike[str], model: Any, *, threshold: float | None = None, sparsity: float | None = None
) -> HeadProfile:
    """DuoAttention's choice: a gate in [0, 1] for each layer and key/value head; those with a large one stay dense.

    All query heads of a key/value head have its gate. The others read the first and the most recent tokens: as many
    as `sink_size` and `recent_size` of the config.json beside it say. As in its own code the file may have comments
    (#) and empty lines, gates outside [0, 1] are clipped, and a share is a quantile of the gates: those below the
    quantile stream. Of equal gates the first stream, where its code draws lots.

    Args:
        path: the folder, or the file full_attention_heads.tsv in it.
        model: the model that it is for.
        threshold: gates from it on are dense; or
        sparsity: share of the key/value heads that are not dense, in (0, 1], those with the smallest gates; 0.5 if
            neither is given.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such files, or for another number of layers or heads; or both options.
    """
    found = Fingerprint.of(model)
    dense, sink, recent = _duo(path, found, threshold, sparsity)
    streaming = _made(SIZES, "sliding_window", sink=sink, window=recent)
    of_heads = np.repeat(dense, found.heads // found.kv_heads, axis=1)
    cells = [None if keep else streaming for keep in of_heads.flat]
    return _profile(found, cells, [(0.0, 1.0)], {"source": "DuoAttention", "file": GATES})


def duo_attention_heads(
    path: str | os.PathLike[str], model: Any, *, threshold: float | None = None, sparsity: float | None = None
) -> dict[str, Any]:
    """The same choice as parameters of the method `duo`, which reads a cache by it; see `from_duo_attention`.

    Returns:
        `retrieval`, `sink` and `recent`.

    Raises:
        FileNotFoundError, ValueError: as `from_duo_attention`.
    """
    dense, sink, recent = _duo(path, Fingerprint.of(model), threshold, sparsity)
    retrieval = tuple(tuple(int(head) for head in layer.nonzero()[0]) for layer in dense)
    return {"retrieval": retrieval, "sink": sink, "recent": recent}


def _duo(
    path: str | os.PathLike[str], found: Fingerprint, threshold: float | None, sparsity: float | None
) -> tuple[NDArray[np.bool_], Any, Any]:
    """Which heads of keys stay dense [layers, kv_heads], and the sizes of the others' window."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    if threshold is not None and sparsity is not None:
        raise ValueError(f"`threshold` must be None when `sparsity` is given, got {threshold} and {sparsity}")
    gates = _gates(folder / GATES, (found.layers, found.kv_heads))
    sizes = _read_json(folder / SIZES)
    if not isinstance(sizes, dict) or not {"sink_size", "recent_size"} <= set(sizes):
        raise ValueError(f"`path` must have `sink_size` and `recent_size` in {SIZES}, got {shortened(sizes)}")
    if threshold is not None:
        dense = gates >= finite("threshold", threshold)
    else:
        share = check_share("sparsity", 0.5 if sparsity is None else sparsity)
        dense = np.ones(gates.size, bool)
        dense[np.argsort(gates, axis=None, kind="stable")[: _below_quantile(gates, share)]] = False
    return dense.reshape(gates.shape), sizes["sink_size"], sizes["recent_size"]


def _below_quantile(gates: NDArray[np.float64], share: float) -> int:
    """How many gates are below their quantile, were none equal to another."""
    if share == 1:
        return gates.size
    # Between two gates the quantile is nearer to one of them, and above the lower one in any case.
    ranked = math.ceil(share * (gates.size - 1) - 1e-9)
    return max(ranked, int((gates < np.quantile(gates, share)).sum()))


def _gates(file: Path, shape: tuple[int, int]) -> NDArray[np.float64]:
    text = _read_text(file)
    # Its own code has tabs alone; a table typed by hand may have blanks.
    delimiter = "\t" if "\t" in text else None
    try:
        with warnings.catch_warnings():
            # Of a file without numbers, which the check of the shape refuses.
            warnings.simplefilter("ignore")
            gates = np.loadtxt(text.splitlines(), np.float64, delimiter=delimiter, ndmin=2)
    except ValueError as error:
        raise ValueError(
            f"`path` must hold numbers, got {file}, or rows of different length: {str(error)[:200]}"
        ) from None
    if gates.shape != shape:
        raise ValueError(
            f"`path` must have {shape[0]} rows of {shape[1]} key/value heads, got {len(gates)} rows of "
            f"[{gates.shape[1]}] in {file}"
        )
    if np.isnan(gates).any():
        raise ValueError(f"`path` must hold gates from 0 to 1, got nan in {file}")
    return gates.clip(0, 1)


def from_sliding_tile(
    path: str | os.PathLike[str],
    model: Any,
    *,
    tile: tuple[int, int, int] = (6, 8, 8),
    full: tuple[int, int, int] | None = None,
) -> HeadProfile:
    """The result of sliding tile attention's mask search: {"step_layer_head": [frames, height, width] in tiles}.

    Steps that follow one another with equal windows make one range. Every step, layer and head must be there.

    Args:
        path: the JSON file.
        model: the model that it is for.
        tile: (frames, height, width) of a tile in tokens.
        full: windows that are as large in every dimension are dense; None means that none is.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, one for another number of layers or heads, or one with steps left out.
    """
    value, found = _read_json(Path(path)), Fingerprint.of(model)
    if not isinstance(value, dict) or not value or not all(_STA_KEY.fullmatch(key) for key in value):
        raise ValueError(f"`path` must be an object of 'step_layer_head', got {shortened(value)} in {path}")
    windows = {tuple(map(int, key.split("_"))): window for key, window in value.items()}
    steps = max(step for step, _, _ in windows) + 1
    if steps > MOST_PLANS or len(windows) != steps * found.layers * found.heads or len(windows) != len(value):
        raise ValueError(
            f"`path` must have a window for each of {found.layers} layers and {found.heads} heads at every step, got "
            f"{len(value)} for {steps} steps in {path}"
        )
    made: dict[Any, Method | None] = {}
    cells = []
    for step, layer, head in product(range(steps), range(found.layers), range(found.heads)):
        where = f"step {step} layer {layer} head {head}"
        if (step, layer, head) not in windows:
            raise ValueError(f"`path` must have a window for {where}, got none in {path}")
        window = windows[step, layer, head]
        sizes = window if isinstance(window, list) and len(window) == 3 else [0]
        if not all(type(n) is int and 0 < n <= LARGEST for n in sizes):
            raise ValueError(f"{where} must be three numbers of tiles, got {shortened(window)}")
        key = tuple(window)
        if key not in made:
            dense = full is not None and all(a >= b for a, b in zip(key, full, strict=True))
            made[key] = None if dense else _made(where, "sliding_tile", window=key, tile=tuple(tile))
        cells.append(made[key])
    size = found.layers * found.heads
    plans = [cells[at : at + size] for at in range(0, len(cells), size)]
    runs = [len(list(run)) for _, run in groupby(plans)]
    edges = [0, *np.cumsum(runs).tolist()]
    ranges = [(a / steps, b / steps) for a, b in pairwise(edges)]
    kept = [cell for edge in edges[:-1] for cell in plans[edge]]
    calibration = {"source": "sliding tile attention", "file": Path(path).name, "steps": steps}
    return _profile(found, kept, ranges, calibration)


def _made(where: str, name: str, **params: Any) -> Method:
    try:
        return make_method(name, params)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{where} must be a method with its parameters: {str(error)[:300]}") from error


def _profile(
    model: Fingerprint, cells: Sequence[Method | None], ranges: list[tuple[float, float]], calibration: dict[str, Any]
) -> HeadProfile:
    """The profile of a method, or None for dense, for every range, layer and head in turn."""
    methods = [make_method("dense", {}), *dict.fromkeys(m for m in cells if m is not None)]
    index = {method: i for i, method in enumerate(methods)}
    shape = (len(ranges), model.layers, model.heads)
    choice = np.array([0 if m is None else index[m] for m in cells]).reshape(shape)
    return HeadProfile(
        model=model,
        methods=tuple(methods),
        plans=tuple(StepPlan(steps, own) for steps, own in zip(ranges, choice, strict=True)),
        figures={"density": np.where(choice == 0, 1.0, math.nan)},
        metric=PUBLISHED,
        budget={},
        calibration=calibration,
    )


def _read_text(file: Path) -> str:
    if not file.is_file():
        raise FileNotFoundError(f"`path` must be a file that is there, got {file}")
    if file.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"`path` must have at most {_LARGEST_FILE} bytes, got {file.stat().st_size} in {file}")
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"`path` must be a text file, got {file}: {error}") from error


def _read_json(file: Path) -> Any:
    text = _read_text(file)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"`path` must be a JSON file, got {file}: {str(error)[:200]}") from None
