"""Measures what attention costs on a device, for the table of cost/table.py: `hf-sparse-attn bench --calibrate`."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from hf_sparse_attn import machine
from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.bench.kernels import random_pattern
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.cost.timing import clock
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.sharing.files import make_folder, replace_file
from hf_sparse_attn.tables import table

log = logging.getLogger(__name__)

_DTYPES = {"cpu": ("float32", "bfloat16")}
_OTHER_DTYPES = ("float32", "bfloat16", "float16")
_DIMS = (64, 128)
_LENGTHS = {"cpu": (64, 128, 256, 512, 1024, 2048, 4096, 8192)}
_OTHER_LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
_SPARSE_LENGTHS = {"cpu": (512, 1024, 3072)}
_OTHER_SPARSE_LENGTHS = (2048, 8192, 32768)
_HEADS = 4
_ROUNDS = 3
# A run shorter than this is repeated in each round.
_SHORT, _REPEATS = 5e-3, 4
# Bytes that are touched between two runs.
_OTHERS = 1 << 24
# A table whose fit is further off than this somewhere says so.
_LARGEST_ERROR = 0.5

Call = Callable[[], Any]


def measure(
    device: torch.device,
    dtypes: tuple[str, ...] | None = None,
    dims: tuple[int, ...] = _DIMS,
    lengths: tuple[int, ...] | None = None,
    sparse_lengths: tuple[int, ...] | None = None,
    rounds: int = _ROUNDS,
) -> dict[str, Any]:
    """Measures dense attention and every backend that backend="auto" may take on the device.

    Args:
        device: where to measure.
        dtypes, dims: what to measure; None means what models there use.
        lengths: tokens of the dense runs; ascending.
        sparse_lengths: tokens of the patterns.
        rounds: rounds over all runs of a dtype and head size after one to warm up; the fastest counts, for whatever
            else the machine does only adds time.

    Returns:
        plain values ready for JSON: `version`, `device`, `kind`, `matrix_units` (whether it is a CPU that has them for
        bfloat16), `threads` (None on a GPU), `date`, `torch`, `dense` (seconds of one head by length), `sparse`
        (cost.RUN_COSTS and cost.PLAN_COSTS in seconds, `error`: the largest relative error of the fit), `tuned` (what
        the backends' own `calibrate(device)` gave).
    """
    kind = device.type
    if dtypes is None:
        dtypes = _DTYPES.get(kind, _OTHER_DTYPES)
    if lengths is None:
        lengths = _LENGTHS.get(kind, _OTHER_LENGTHS)
    if sparse_lengths is None:
        sparse_lengths = _SPARSE_LENGTHS.get(kind, _OTHER_SPARSE_LENGTHS)
    found: dict[str, Any] = {
        "version": cost.VERSION,
        "device": cost.device_name(device),
        "kind": kind,
        "matrix_units": cost.has_matrix_units(device),
        "threads": torch.get_num_threads() if kind == "cpu" else None,
        "date": machine.now(),
        "torch": str(torch.__version__),
        "dense": [],
        "sparse": [],
        "tuned": {},
    }
    for name in auto_order(kind, prompts=True):
        tune = getattr(BACKENDS.get(name), "calibrate", None)
        if tune is not None:
            # First, so that what is measured is what will run.
            found["tuned"][name] = list(tune(device))
    points = [(dtype, dim) for dtype in dtypes for dim in dims]
    with torch.no_grad():
        for dtype, dim in tqdm(points, "calibrate", disable=None):
            dense, sparse = _point(device, dtype, dim, lengths, sparse_lengths, rounds)
            found["dense"] += dense
            found["sparse"] += sparse
    return found


def _point(
    device: torch.device, dtype: str, dim: int, lengths: tuple[int, ...], sparse_lengths: tuple[int, ...], rounds: int
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """All runs of one dtype and head size, in turns."""
    made = torch.Generator().manual_seed(0)
    longest = max(*lengths, *sparse_lengths)
    # In memory as models have them: heads inside of tokens.
    shape = (1, longest, _HEADS, dim)
    whole = [torch.randn(shape, generator=made).transpose(1, 2).to(device, getattr(torch, dtype)) for _ in range(3)]
    calls: dict[Any, Call] = {}
    for n in lengths:
        for causal, mask in cost.CAUSAL.items():
            calls["dense", mask, n] = _dense(whole, n, causal)
    patterns: dict[int, tuple[BlockPattern, cost.Work, int]] = {}
    for number, (heads, pattern) in enumerate(_patterns(sparse_lengths)):
        pattern = pattern.to(device)
        patterns[number] = pattern, cost.work_of(pattern, heads), heads
        for name in auto_order(device.type, prompts=True):
            backend = BACKENDS.get(name)
            q, k, v = (x[:, :heads, : pattern.kv_len] for x in whole)
            if backend.why_not(pattern, q, k, v, False) is None:
                calls[name, number, False] = _sparse(backend, q, k, v, pattern, False)
                calls[name, number, True] = _sparse(backend, q, k, v, pattern, True)
    best = _fastest(calls, device, rounds)
    dense = []
    for mask in cost.CAUSAL.values():
        seconds = [best["dense", mask, n] / _HEADS for n in lengths]
        dense.append({"dtype": dtype, "dim": dim, "mask": mask, "tokens": list(lengths), "seconds": seconds})
    sparse = []
    for name in auto_order(device.type, prompts=True):
        numbers = [i for i in patterns if (name, i, False) in best]
        if numbers:
            works = [patterns[i][1] for i in numbers]
            run, again = ([best[name, i, new] for i in numbers] for new in (False, True))
            sparse.append({"backend": name, "dtype": dtype, "dim": dim, **_fit(works, run, again)})
    return dense, sparse


def _dense(whole: list[Tensor], n: int, causal: bool) -> Call:
    q, k, v = (x[:, :, :n] for x in whole)
    return lambda: scaled_dot_product_attention(q, k, v, is_causal=causal)


def _sparse(backend: Any, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, new: bool) -> Call:
    """The backend's run, on a pattern that it has planned for, or one that it has not seen."""
    scale = q.shape[3] ** -0.5
    return lambda: backend.attention(q, k, v, replace(pattern) if new else pattern, scale)


def _fastest(calls: dict[Any, Call], device: torch.device, rounds: int) -> dict[Any, float]:
    """Seconds of each call, the least of all rounds; a short call, which is easily disturbed, runs several times."""
    best, now = dict.fromkeys(calls, float("inf")), clock(device)
    # In a model other layers run in between: a call finds neither its code nor its tensors in the cache.
    others = torch.zeros(_OTHERS // 4, device=device)
    for done in range(rounds + 1):
        for name, call in calls.items():
            for _ in range(_REPEATS if done else 1):
                others += 1
                begin = now()
                call()
                seconds = now() - begin
                best[name] = min(best[name], seconds) if done else best[name]
                if not done or seconds > _SHORT:
                    break
    return best


def _patterns(lengths: tuple[int, ...]) -> Iterator[tuple[int, BlockPattern]]:
    """Heads and patterns that differ in what costs: blocks of two sizes, masked blocks, single columns, few heads."""
    for n in lengths:
        for block, density, causal, heads in (
            (64, 0.1, True, _HEADS),
            (64, 0.4, False, 1),
            (128, 0.1, False, _HEADS),
            (128, 0.4, True, _HEADS),
            (128, 0.05, True, 1),
            (128, 0.9, True, _HEADS),
            (64, 0.7, True, 2),
        ):
            yield heads, random_pattern(n, heads, block, density, causal)
        yield 2, _band(n, max(1, n // 10), 64)
        yield 2, _with_columns(random_pattern(n, 2, 64, 0.1, True), max(1, n // 10))
        yield _HEADS, _with_columns(random_pattern(n, _HEADS, 128, 0.05, True), max(1, n // 40))


def _band(n: int, width: int, block: int) -> BlockPattern:
    """A window exact to the token: two of the blocks of each row are masked."""
    row, col = torch.arange(-(-n // block))[:, None], torch.arange(-(-n // block))
    keep = (col <= row) & ((row - col) * block < width + block)
    pattern = BlockPattern.from_block_map(keep[None, None], block, block, n, n, causal=True)
    # The last block of a row is the diagonal one; the first gets the other half of a block.
    first = pattern.indptr.flatten()[:-1]
    tile = torch.ones(1, block, block, dtype=torch.bool).triu()
    ids = pattern.tile_ids.clone()
    ids[first[pattern.row_counts().flatten() > 1]] = len(pattern.tiles)
    return replace(pattern, tiles=torch.cat([pattern.tiles, tile]), tile_ids=ids)


def _with_columns(pattern: BlockPattern, number: int) -> BlockPattern:
    """The pattern with up to `number` single keys per row besides, in blocks before the row that it leaves out."""
    block, rows = pattern.block_q, torch.arange(pattern.rows)
    free = ~pattern.block_map()[0] & (torch.arange(pattern.rows) < rows[:, None])
    free = free.repeat_interleave(block, -1)[..., : pattern.kv_len]
    score = torch.rand(free.shape, generator=torch.Generator().manual_seed(0)).masked_fill_(~free, -1.0)
    kept = (score >= score.topk(number, -1).values[..., -1:]) & free
    counts = kept.sum(-1)[None]
    indptr = torch.nn.functional.pad(counts.flatten().cumsum(0), (1, 0))
    index = torch.arange(counts.shape[1])[:, None] * pattern.rows + torch.arange(pattern.rows + 1)
    return replace(pattern, column_indptr=indptr[index][None], columns=kept.nonzero()[:, 2].to(torch.int32))


def _fit(works: list[cost.Work], run: list[float], new: list[float]) -> dict[str, float]:
    """Costs that explain the seconds best, none of them negative; `error` is the largest relative error."""
    w = np.array(works, dtype=np.float64)
    heads, rows, keys, blocks, columns, pairs, tile_pairs, column_pairs = w.T
    one = np.ones(len(w))
    seconds, extra = np.array(run), np.maximum(np.array(new) - np.array(run), 0.0)
    features = np.stack([one, heads, rows, keys, pairs, tile_pairs, column_pairs], 1)
    costs = _least_squares(features, seconds, 1 / seconds)
    planning = np.stack([one, heads, rows, blocks, columns], 1)
    plan = _least_squares(planning, extra, 1 / seconds)
    error = np.abs((features @ costs + planning @ plan) / (seconds + extra) - 1).max()
    if error > _LARGEST_ERROR:
        log.warning("the table is off by up to %.0f %%: something else ran meanwhile?", 100 * error)
    names = cost.RUN_COSTS + cost.PLAN_COSTS
    return {**dict(zip(names, map(float, [*costs, *plan]), strict=True)), "error": float(error)}


def _least_squares(features: Any, seconds: Any, weight: Any) -> Any:
    """The best fit without a negative cost: the best of the fits over all subsets of the features."""
    found, best = np.zeros(features.shape[1]), np.inf
    scaled, target = features * weight[:, None], seconds * weight
    # Columns of like size, for the numbers of pairs are a million times those of calls.
    size = np.maximum(np.abs(scaled).max(0), 1e-300)
    for number in range(1, features.shape[1] + 1):
        for chosen in map(list, combinations(range(features.shape[1]), number)):
            part = np.linalg.lstsq(scaled[:, chosen] / size[chosen], target, rcond=None)[0] / size[chosen]
            off = float(np.square(scaled[:, chosen] @ part - target).sum())
            if (part >= 0).all() and off < best:
                best, found = off, np.zeros(features.shape[1])
                found[chosen] = part
    return found


def write(found: dict[str, Any], path: Path) -> None:
    """Checks a table and writes it at once or not at all; for processes that begin later, see cost.table_for."""
    cost.Table(found, "measured")
    make_folder(path.parent)
    replace_file(path, lambda file: file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8"))


def render(found: dict[str, Any], width: int = 110) -> str:
    """The table for reading: dense attention by length, each backend's costs, and from how many keys it can pay."""
    made = cost.Table(found, "measured")
    place = f"{found['device']}" + (f", {found['threads']} threads" if found["threads"] else "")
    lengths = found["dense"][0]["tokens"]
    rows = [(d["dtype"], str(d["dim"]), d["mask"], *(f"{s * 1e3:.3g}" for s in d["seconds"])) for d in found["dense"]]
    parts = [
        table(("dtype", "dim", "mask", *map(str, lengths)), rows, f"Dense attention on {place}: ms of one head", width)
    ]
    rows = []
    for s in found["sparse"]:
        dense = made.dense[s["dtype"]][s["dim"]]["full"][-1][1]
        overheads = (s["call"], s["head"], s["row"], s["plan_call"] + s["plan_head"], s["plan_row"])
        rates = (s[n] / dense for n in ("pair", "tile_pair", "column_pair"))
        fewest = (made.fewest_keys((s["backend"],), 8, s["dim"], causal) for causal in (True, False))
        rows.append(
            (
                f"{s['backend']}, {s['dtype']}, {s['dim']}",
                *(f"{1e6 * x:.1f}" for x in overheads),
                *(f"{x:.2f}" for x in rates),
                *map(str, fewest),
                f"{100 * s['error']:.0f} %",
            )
        )
    columns = ("backend, dtype, dim", "call µs", "head µs", "row µs", "plan µs", "per row", "whole", "masked",
               "column", "causal from", "full from", "fit off by")  # fmt: skip
    title = (
        "Sparse attention: overheads; seconds per pair of whole blocks, masked blocks and columns in units of dense "
        "attention;\nfewest keys with which it can pay (8 heads)"
    )
    parts.append(table(columns, rows, title, width))
    for name, records in found["tuned"].items():
        keys = list(dict.fromkeys(key for record in records for key in record))
        parts.append(table(keys, [[str(r.get(key, "-")) for key in keys] for r in records], f"Tuned: {name}", width))
    return "\n\n".join(part.strip("\n") for part in parts)
