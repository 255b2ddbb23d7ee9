"""What attention costs on a device: a small measured table, and what it says of a call before the call runs.

A table holds seconds of dense attention by length, and what a sparse call costs per call, head, row of blocks and pair
of tokens, for each backend, dtype and head size that was measured. `hf-sparse-attn bench --calibrate` measures it
and keeps it under HF_HOME; a device that was never measured uses the table in the package, measured on another machine
of its kind (CPU) or assumed with a bias towards dense attention (all else).
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import torch

from hf_sparse_attn.context import Context
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.pattern.cache import derived

log = logging.getLogger(__name__)

VERSION = 1
# Sparse attention must be predicted to take less than this share of the dense time: predictions are off by
# up to a sixth or so, and where both are near, dense is the one that loses nothing.
MARGIN = 0.85
# Tables of machines that were measured, cost-<device>.json, and assumed.json for devices of any other kind.
SHIPPED = Path(__file__).parents[1] / "assets" / "cost"
CAUSAL = {True: "causal", False: "full"}
# Costs of a sparse call in seconds, each per one of what its name says; "call" is paid once.
RUN_COSTS = ("call", "head", "row", "key", "pair", "tile_pair", "column_pair")
# What the backend does besides for a pattern that it has not seen before.
PLAN_COSTS = ("plan_call", "plan_head", "plan_row", "plan_block", "plan_column")
# A backend that was never measured: its costs in units of dense seconds per pair, and seconds per call. Slower than
# any kernel here, so that dense attention is left only for patterns that are clearly worth it.
_UNMEASURED_PAIRS = {"pair": 1.6, "tile_pair": 2.5, "column_pair": 4.0}
_UNMEASURED_CALL = 5e-4
# Seconds that a patched layer spends around the backend (mask, policy, report) in a model, where no code is in the
# cache when it is needed. On a GPU they pass while it works.
_AROUND = {"cpu": 3e-4}
# Seconds that a method which looks at the queries and keys takes besides reading them, for its many small operators;
# what it computes then, in dense seconds per pair: the block means of a token, and each logit that it looks at.
_CHOOSING = {"cpu": 8e-4}
_CHOOSING_ELSEWHERE = 2e-4
_PAIRS_PER_TOKEN, _PAIRS_PER_LOGIT = 15.0, 1.5
# The least that a sparse call does: one block of this size in each row.
_BLOCK = 128
_LONGEST = 1 << 22


class Shape(NamedTuple):
    """The sizes that the cost of a call depends on.

    Args:
        q_len, kv_len: queries and keys.
        causal: whether a query sees only the keys up to its own; the last query is at the last key.
        heads: batch x query heads.
        dim: size of a query and key.
        dtype: name, as "float32".
    """

    q_len: int
    kv_len: int
    causal: bool
    heads: int
    dim: int
    dtype: str

    @property
    def pairs(self) -> int:
        """Pairs of tokens that see each other, over all heads."""
        hidden = self.q_len * (self.q_len - 1) // 2 if self.causal else 0
        return self.heads * (self.q_len * self.kv_len - hidden)


class Work(NamedTuple):
    """What one sparse call does, over all heads and batch rows, masked or short blocks counted whole."""

    heads: float
    rows: float
    keys: float
    blocks: float
    columns: float
    pairs: float
    tile_pairs: float
    column_pairs: float


def shape_of(q: torch.Tensor, ctx: Context) -> Shape:
    """The shape of a call with queries `q` [batch, heads, q_len, dim]."""
    layout = ctx.layout
    dtype = str(q.dtype).removeprefix("torch.")
    return Shape(layout.q_len, layout.kv_len, layout.is_causal, q.shape[0] * q.shape[1], q.shape[3], dtype)


def _counts_of(pattern: BlockPattern) -> tuple[float, float, float]:
    """Blocks, blocks with a tile, and single columns of one head."""
    blocks, rows = pattern.starts.numel(), pattern.rows
    tiled = min(blocks, rows * pattern.heads * pattern.batch) if len(pattern.tiles) > 1 else 0
    if tiled and pattern.device.type == "cpu":
        tiled = int(torch.count_nonzero(pattern.tile_ids))
    each, columns = pattern.batch * pattern.heads, 0.0
    if pattern.columns is not None and pattern.column_indptr is not None:
        columns = pattern.columns.numel() / (pattern.column_indptr.shape[0] * pattern.column_indptr.shape[1])
    return blocks / each, tiled / each, columns


def work_of(pattern: BlockPattern, heads: int) -> Work:
    """The work of a pattern for `heads` heads x batch rows.

    Counted once per pattern, and without waiting for a GPU: there the number of masked blocks is not looked up but
    taken as one per row.
    """
    blocks_each, tiled_each, columns_each = derived(pattern, "work", lambda: _counts_of(pattern))
    area = pattern.block_q * pattern.block_k
    return Work(
        heads,
        heads * pattern.rows,
        heads * pattern.kv_len,
        heads * blocks_each,
        heads * columns_each,
        heads * (blocks_each - tiled_each) * area,
        heads * tiled_each * area,
        heads * columns_each * pattern.block_q,
    )


def least_work(shape: Shape, density: float = 0.0) -> Work:
    """What a pattern of whole blocks that keeps this share of the visible pairs does at least."""
    rows = shape.heads * -(-shape.q_len // _BLOCK)
    pairs = max(density * shape.pairs, float(rows * _BLOCK * _BLOCK))
    return Work(shape.heads, rows, shape.heads * shape.kv_len, pairs / _BLOCK**2, 0, pairs, 0, 0)


class Table:
    """Predictions of one device.

    Args:
        data: what stands in a file of costs, see calibrate.measure.
        origin: "measured", "shipped" (measured on another machine of the kind) or "assumed".

    Raises:
        ValueError, TypeError, KeyError: `data` is not such a table.
    """

    def __init__(self, data: Mapping[str, Any], origin: str) -> None:
        if data["version"] != VERSION:
            raise ValueError(f"`version` must be {VERSION}, got {data['version']!r}")
        self.origin = origin
        self.device, self.kind = str(data["device"]), str(data["kind"])
        self.threads = int(data["threads"]) if data.get("threads") else None
        # dtype -> dim -> "causal" or "full" -> [(tokens, seconds of one head per tokens squared)], ascending.
        self.dense: dict[str, dict[int, dict[str, list[tuple[int, float]]]]] = {}
        for entry in data["dense"]:
            lengths, seconds = _ascending(entry["tokens"]), _positive(entry["seconds"])
            points = [(n, s / n**2) for n, s in zip(lengths, seconds, strict=True)]
            by_dim = self.dense.setdefault(str(entry["dtype"]), {})
            by_dim.setdefault(int(entry["dim"]), {})[str(entry["mask"])] = points
        # backend -> dtype -> dim -> costs.
        self.sparse: dict[str, dict[str, dict[int, dict[str, float]]]] = {}
        for entry in data["sparse"]:
            costs = dict(zip(RUN_COSTS + PLAN_COSTS, _not_negative(entry, RUN_COSTS + PLAN_COSTS), strict=True))
            by_dtype = self.sparse.setdefault(str(entry["backend"]), {})
            by_dtype.setdefault(str(entry["dtype"]), {})[int(entry["dim"])] = costs
        if not self.dense:
            raise ValueError("`dense` must hold at least one entry, got none")
        for found in self.dense.values():
            for dim, masks in found.items():
                if set(masks) != set(CAUSAL.values()):
                    raise ValueError(f"`dense` must hold causal and full times of dim {dim}, got {sorted(masks)}")
        # Seconds here per second of the table, for what more threads make faster: all but Python and launches. Of the
        # threads there are now, for what is predicted must not change while a process runs.
        self._speed = 1.0 if self.threads is None else self.threads / torch.get_num_threads()
        # The costs of a table do not change: each shape is worked out once.
        self._dense_seconds = lru_cache(4096)(self._find_dense)
        self._costs = lru_cache(1024)(self._find_costs)
        self.fewest_keys = lru_cache(1024)(self._find_fewest)

    def dense_seconds(self, shape: Shape) -> float:
        """Predicted seconds of dense attention."""
        return self._dense_seconds(shape) * self._speed

    def sparse_seconds(self, backend: str, work: Work, shape: Shape, new: bool) -> float:
        """Predicted seconds of sparse attention, with the planning for a pattern that is `new` to the backend."""
        c = self._costs(backend, shape.dim, shape.dtype)
        seconds = _AROUND.get(self.kind, 0.0) + c["call"] + work.heads * c["head"] + work.rows * c["row"]
        parallel = work.keys * c["key"] + work.pairs * c["pair"]
        parallel += work.tile_pairs * c["tile_pair"] + work.column_pairs * c["column_pair"]
        if new:
            seconds += c["plan_call"] + work.heads * c["plan_head"] + work.rows * c["plan_row"]
            seconds += work.blocks * c["plan_block"] + work.columns * c["plan_column"]
        return seconds + parallel * self._speed

    def choosing_seconds(self, shape: Shape, pairs: float, choices: int = 1) -> float:
        """Predicted seconds that a dynamic method takes to find its pattern; see Method.choosing_pairs and choices."""
        # A CPU estimates in float32, whatever units it has for less.
        dtype = "float32" if self.kind == "cpu" else shape.dtype
        whole = self._dense_seconds(shape._replace(causal=False, dtype=dtype)) / (shape.q_len * shape.kv_len)
        read = _PAIRS_PER_TOKEN * (shape.q_len + shape.kv_len) + _PAIRS_PER_LOGIT * pairs
        return choices * _CHOOSING.get(self.kind, _CHOOSING_ELSEWHERE) + read * whole * self._speed

    def _find_dense(self, shape: Shape) -> float:
        own, before = shape.q_len, shape.kv_len - shape.q_len
        masks = _at_dim(_at_dtype(self.dense, shape.dtype), shape.dim)

        def seconds(mask: str, n: float) -> float:
            return sum(weight * _at_length(found[mask], n) * n * n for found, weight in masks)

        if not shape.causal:
            return shape.heads * seconds("full", math.sqrt(own * shape.kv_len))
        # Cached keys before the queries are seen by all of them.
        return shape.heads * (seconds("causal", own) + (seconds("full", math.sqrt(own * before)) if before > 0 else 0))

    def _find_costs(self, backend: str, dim: int, dtype: str) -> dict[str, float]:
        if backend in self.sparse:
            found = _at_dim(_at_dtype(self.sparse[backend], dtype), dim)
            return {name: sum(costs[name] * weight for costs, weight in found) for name in RUN_COSTS + PLAN_COSTS}
        masks = _at_dim(_at_dtype(self.dense, dtype), dim)
        rate = sum(weight * found["full"][-1][1] for found, weight in masks)
        costs = dict.fromkeys(RUN_COSTS + PLAN_COSTS, 0.0)
        return {**costs, "call": _UNMEASURED_CALL, **{name: rate * f for name, f in _UNMEASURED_PAIRS.items()}}

    def _find_fewest(self, backends: tuple[str, ...], heads: int, dim: int, causal: bool) -> int:
        """Fewest keys with which any sparse call could pay: one block in each row, nothing to plan, any dtype."""
        n = 64
        while n < _LONGEST:
            for dtype in self.dense:
                shape = Shape(n, n, causal, heads, dim, dtype)
                limit, work = MARGIN * self.dense_seconds(shape), least_work(shape)
                if any(self.sparse_seconds(b, work, shape, False) < limit for b in backends):
                    return n
            # Steps of a quarter of a power of two.
            n += max(64, 1 << (n.bit_length() - 3))
        return _LONGEST


def _at_dtype(found: Mapping[str, Any], dtype: str) -> Any:
    """The entry of a dtype or of the one most like it; the gain hardly differs between those of one width."""
    for name in (dtype, "bfloat16" if dtype == "float16" else "float32"):
        if name in found:
            return found[name]
    return next(iter(found.values()))


def _at_dim(found: Mapping[int, Any], dim: int) -> list[tuple[Any, float]]:
    """Entries and weights that stand for a head size: nearest below the smallest, in proportion above the largest."""
    dims = sorted(found)
    if dim <= dims[0]:
        return [(found[dims[0]], 1.0)]
    if dim >= dims[-1]:
        return [(found[dims[-1]], dim / dims[-1])]
    above = next(i for i, d in enumerate(dims) if d > dim)
    low, high = dims[above - 1], dims[above]
    share = (dim - low) / (high - low)
    return [(found[low], 1 - share), (found[high], share)]


def _at_length(points: list[tuple[int, float]], n: float) -> float:
    """The rate at a length, between the measured ones on a logarithmic scale and constant outside."""
    if n <= points[0][0]:
        return points[0][1]
    for (a, low), (b, high) in pairwise(points):
        if n <= b:
            share = math.log(n / a) / math.log(b / a)
            return low + (high - low) * share
    return points[-1][1]


_TABLES: dict[tuple[str, int | None], Table] = {}
_LOADING = Lock()


def table_for(device: torch.device) -> Table:
    """The table of a device: the user's own, else the shipped one of this device, else that of its kind.

    Read once in a process, whatever is written since: what is sparse must not change between equal calls.
    """
    key = (device.type, device.index)
    found = _TABLES.get(key)
    if found is None:
        with _LOADING:
            found = _TABLES.get(key)
            if found is None:
                found = _TABLES[key] = _load(device)
    return found


def forget() -> None:
    """Has all tables read anew, for who asks for one that was written since."""
    _TABLES.clear()


def device_name(device: torch.device) -> str:
    """The name of the chip that `device` is."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type == "cpu":
        return cpu_name()
    return device.type


@lru_cache(maxsize=1)
def cpu_name() -> str:
    """The processor's own name where the system tells it, else its architecture."""
    import platform

    return _cpu_info("model name") or platform.processor() or platform.machine()


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """What the CPU can do, in the words of Linux; empty where that is not told."""
    return frozenset(_cpu_info("flags", "Features").split())


def has_matrix_units(device: torch.device) -> bool:
    """Whether a CPU has units for products of matrices in bfloat16 (AMX): what is computed in it costs far less."""
    return device.type == "cpu" and "amx_bf16" in cpu_features()


def _cpu_info(*names: str) -> str:
    """What Linux tells of the first CPU under one of some names, or nothing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    found = (line.partition(":") for line in lines)
    return next((value.strip() for name, _, value in found if name.strip() in names), "")


def user_file(device: torch.device) -> Path:
    """Where the user's own table of a device is kept."""
    from huggingface_hub import constants

    return Path(constants.HF_HOME) / "hf_sparse_attn" / file_name(device)


def file_name(device: torch.device) -> str:
    """Name of the file of a device's table."""
    return f"cost-{re.sub(r'[^a-z0-9]+', '-', device_name(device).lower()).strip('-') or device.type}.json"


def _load(device: torch.device) -> Table:
    path = user_file(device)
    if path.is_file():
        try:
            return Table(json.loads(path.read_text(encoding="utf-8")), "measured")
        # Whatever is wrong with a file that only makes things faster must not stop a model.
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            log.warning(
                "%s is ignored (%s: %s); `hf-sparse-attn bench --calibrate` writes it anew",
                path,
                type(error).__name__,
                error,
            )
    own = SHIPPED / file_name(device)
    if own.is_file():
        return Table(json.loads(own.read_text(encoding="utf-8")), "measured")
    shipped = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(SHIPPED.glob("cost-*.json"))]
    alike = [found for found in shipped if found["kind"] == device.type]
    if alike:
        same = [found for found in alike if found.get("matrix_units", False) == has_matrix_units(device)]
        return Table((same or alike)[0], "shipped")
    return Table(json.loads((SHIPPED / "assumed.json").read_text(encoding="utf-8")), "assumed")


def _ascending(values: Iterable[Any]) -> list[int]:
    found = [int(n) for n in values]
    if not found or found[0] < 1 or any(a >= b for a, b in pairwise(found)):
        raise ValueError(f"`tokens` must be ascending lengths, got {found}")
    return found


def _positive(values: Iterable[Any]) -> list[float]:
    found = [float(v) for v in values]
    if not all(math.isfinite(v) and v > 0 for v in found):
        raise ValueError(f"`seconds` must be positive numbers, got {found}")
    return found


def _not_negative(entry: Mapping[str, Any], names: Iterable[str]) -> list[float]:
    lacking = [name for name in names if name not in entry]
    if lacking:
        raise ValueError(f"`sparse` must hold the costs {', '.join(lacking)}, got {', '.join(entry)}")
    found = [float(entry[name]) for name in names]
    for name, value in zip(names, found, strict=True):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"`{name}` must be a number of seconds, got {value}")
    return found
