"""The benchmark: sparse against dense attention, all contestants of a point in one process and in turns."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from tqdm import tqdm

from hf_sparse_attn import doctor
from hf_sparse_attn.api import default_device
from hf_sparse_attn.context import check_int
from hf_sparse_attn.pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.selection import check_block_size, check_share

log = logging.getLogger(__name__)

SUITES = ("kernels", "patterns", "model", "quick")
VERSION = 1
DENSE = "dense"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# A point that is slow stops after this many rounds once its time is up.
FEWEST_ROUNDS = 2
# The specification materialises all logits; it is timed only when asked for by name.
_NOT_TIMED = frozenset({"torch_reference"})
_SDPA = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure; see `hf-sparse-attn bench --help`.

    Args:
        suite: one of SUITES.
        tokens: sequence lengths.
        dims: head sizes; the suites patterns and model take the first.
        dtypes: names of dtypes; the suites patterns and model take the first.
        densities: kept share of the visible pairs of tokens, in (0, 1].
        heads: number of heads.
        block: tokens in a block, a power of two from 16 to 256.
        causal: whether the kernels run under a causal mask.
        backends: names, or None for all but the reference.
        repeats: rounds over the contestants of a point.
        seconds: time after which a point gets no further round once it has two.
        threads: CPU threads, or None for what torch chose.
        device: where to run, or None for CUDA where there is one, else the CPU.

    Raises:
        ValueError, TypeError: a value out of range or of the wrong type.
    """

    suite: str = "kernels"
    tokens: tuple[int, ...] = (8192, 32768)
    dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    densities: tuple[float, ...] = (0.0625, 0.125, 0.25)
    heads: int = 8
    block: int = 128
    causal: bool = False
    backends: tuple[str, ...] | None = None
    repeats: int = 5
    seconds: float = 60.0
    threads: int | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        _check_one_of("suite", self.suite, SUITES)
        for name in ("tokens", "dims", "dtypes", "densities"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` must hold at least one value, got none")
        for tokens in self.tokens:
            check_int("tokens", tokens, 16)
        for dim in self.dims:
            check_int("dims", dim, 1)
        for dtype in self.dtypes:
            _check_one_of("dtypes", dtype, tuple(_DTYPES))
        for density in self.densities:
            check_share("densities", density)
        check_int("heads", self.heads, 1)
        check_block_size(self.block, "block")
        check_int("repeats", self.repeats, 1)
        if not self.seconds > 0:
            raise ValueError(f"`seconds` must be more than 0, got {self.seconds}")
        if self.threads is not None:
            check_int("threads", self.threads, 1)
        for name in self.backends or ():
            if name not in BACKENDS.missing:
                BACKENDS.get(name)
        try:
            torch.empty(0, device=self.where)
        # Torch raises RuntimeError or AssertionError for a device that it does not know or was not built for.
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` must be one that torch can use here, got {self.device!r}: {error}") from None

    @property
    def where(self) -> torch.device:
        """The device to run on."""
        return default_device() if self.device is None else torch.device(self.device)

    @property
    def dtype(self) -> torch.dtype:
        """The first dtype."""
        return _DTYPES[self.dtypes[0]]


_QUICK: dict[str, Any] = {
    "tokens": (4096,),
    "dims": (64,),
    "dtypes": ("float32",),
    "densities": (0.125,),
    "repeats": 3,
}


def make_options(**given: Any) -> Options:
    """Options with the defaults of their suite: "quick" is one small point of each."""
    suite = given.get("suite", "quick")
    return Options(**{"suite": suite, **(_QUICK if suite == "quick" else {}), **given})


def _check_one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(known)}; got {value!r}")


def run(options: Options) -> dict[str, Any]:
    """Measures, and returns plain values ready for JSON.

    Returns:
        `version`, `date`, `machine`, `versions`, `options`, and a list of records per suite that ran: `kernels`,
        `patterns`, `model`. Times are in seconds. A timed contestant has `seconds` (all of them), `rounds`, `median`,
        `min`, `max`, `warmup_seconds` and `speedup`; every record has `reason`: None, or why it has no times.
    """
    from hf_sparse_attn import bench_suites

    before = torch.get_num_threads()
    torch.set_num_threads(before if options.threads is None else options.threads)
    suites: dict[str, Callable[[Options], list[dict[str, Any]]]] = {
        "kernels": kernels,
        "patterns": bench_suites.patterns,
        "model": bench_suites.model,
    }
    try:
        result = {
            "version": VERSION,
            "date": doctor.now(),
            "machine": doctor.machine(),
            "versions": doctor.versions(),
            "options": {**asdict(options), "device": str(options.where)},
        }
        with torch.no_grad():
            for name, suite in suites.items():
                if options.suite in (name, "quick"):
                    result[name] = suite(options)
    finally:
        torch.set_num_threads(before)
    return result


def timed(call: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Seconds of one call, the work it left on the device included, and what it returned."""
    synchronize(device)
    begin = time.perf_counter()
    made = call()
    synchronize(device)
    return time.perf_counter() - begin, made


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _allocated(device: torch.device) -> int | None:
    """Bytes in use on a GPU, from where its peak is counted anew; None elsewhere: torch does not count there."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def in_turns(
    contestants: dict[Any, Callable[[], Any]], options: Options, title: str
) -> tuple[dict[Any, dict[str, Any]], dict[Any, str]]:
    """Times all contestants round by round, so that what else the machine does meets them alike.

    Returns:
        by contestant: `warmup_seconds` (the first call, compiling and planning included), `seconds` (one per round),
        `rounds`, `median`, `min`, `max`, on CUDA `peak_bytes` of the first call; and the reasons of those that failed.
    """
    times: dict[Any, dict[str, Any]] = {}
    failed: dict[Any, str] = {}
    with tqdm(total=len(contestants) * (1 + options.repeats), desc=title, leave=False, disable=None) as bar:
        for name, call in contestants.items():
            try:
                before = _allocated(options.where)
                times[name] = {"warmup_seconds": timed(call, options.where)[0], "seconds": []}
                if before is not None:
                    times[name]["peak_bytes"] = torch.cuda.max_memory_allocated(options.where) - before
            # A contestant that breaks must not take the others' numbers with it; it is listed with its error.
            except Exception as error:
                log.debug("%s failed", name, exc_info=True)
                failed[name] = f"failed: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            bar.update()
        begin = time.perf_counter()
        for done in range(options.repeats):
            if done >= FEWEST_ROUNDS and time.perf_counter() - begin > options.seconds:
                break
            for name in times:
                times[name]["seconds"].append(timed(contestants[name], options.where)[0])
                bar.update()
    return {name: {**found, **summary(found["seconds"])} for name, found in times.items()}, failed


def summary(seconds: Sequence[float]) -> dict[str, Any]:
    """Number of rounds, median and spread."""
    return {
        "rounds": len(seconds),
        "median": statistics.median(seconds),
        "min": min(seconds),
        "max": max(seconds),
    }


def kernels(options: Options) -> list[dict[str, Any]]:
    """Every backend on random block patterns against dense attention.

    All densities of a shape take turns with one dense run per round. Patterns are used again in each round, as a
    static method's are: planning and compiling stand in `warmup_seconds`.
    """
    records = []
    for tokens in options.tokens:
        for dim in options.dims:
            for dtype in options.dtypes:
                records += _kernel_point(options, tokens, dim, dtype)
    return records


def _kernel_point(options: Options, tokens: int, dim: int, dtype: str) -> list[dict[str, Any]]:
    device = options.where
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, options.heads, tokens, dim, generator=made).to(device, _DTYPES[dtype]) for _ in range(3))
    shape = {
        "tokens": tokens,
        "dim": dim,
        "dtype": dtype,
        "heads": options.heads,
        "block": options.block,
        "causal": options.causal,
    }
    calls: dict[tuple[str, float], Callable[[], Any]] = {}
    reasons: dict[tuple[str, float], str] = {}
    achieved: dict[float, float] = {1.0: 1.0}
    for name, call in _dense_calls(q, k, v, options.causal).items():
        calls[name, 1.0] = call
    for density in options.densities:
        pattern = random_pattern(tokens, options.heads, options.block, density, options.causal).to(device)
        achieved[density] = pattern.density("causal" if options.causal else "full")
        for name in options.backends or [n for n in doctor.known_backends() if n not in _NOT_TIMED]:
            if name in BACKENDS.missing:
                reasons[name, density] = BACKENDS.missing[name]
                continue
            reason = BACKENDS.get(name).why_not(pattern, q, k, v, False)
            if reason is None:
                calls[name, density] = _sparse_call(name, q, k, v, pattern)
            else:
                reasons[name, density] = reason
    times, failed = in_turns(calls, options, f"kernels {tokens} x {dim} {dtype}")
    reasons.update(failed)
    dense = min((t["median"] for (name, _), t in times.items() if name.startswith(DENSE)), default=None)
    records = []
    for name, density in [*calls, *(key for key in reasons if key not in calls)]:
        key = (name, density)
        record: dict[str, Any] = {**shape, "contestant": name, "density": density}
        record["achieved_density"] = achieved[density]
        record.update(times.get(key, {}), reason=reasons.get(key))
        if dense is not None and key in times:
            record["speedup"] = dense / times[key]["median"]
            record["share_of_limit"] = record["speedup"] * achieved[density]
        records.append(record)
    order = {d: i for i, d in enumerate((1.0, *options.densities))}
    return sorted(records, key=lambda r: (not r["contestant"].startswith(DENSE), order[r["density"]]))


def _dense_calls(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Callable[[], Tensor]]:
    """Dense attention: on CUDA each fused backend of torch, elsewhere what torch chooses."""

    def call(backend: SDPBackend | None) -> Callable[[], Tensor]:
        def dense() -> Tensor:
            with nullcontext() if backend is None else sdpa_kernel(backend):
                return scaled_dot_product_attention(q, k, v, is_causal=causal)

        return dense

    if q.device.type == "cuda":
        return {f"{DENSE} {name}": call(backend) for name, backend in _SDPA.items()}
    return {f"{DENSE} sdpa": call(None)}


def _sparse_call(name: str, q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern) -> Callable[[], Any]:
    """The backend's call; without the log-sum-exp where it has a way to leave that out, as dense attention does."""
    backend: Any = BACKENDS.get(name)
    attend = getattr(backend, "attention_output", backend.attention)
    return lambda: attend(q, k, v, pattern, q.shape[3] ** -0.5)


def random_pattern(tokens: int, heads: int, block: int, density: float, causal: bool, seed: int = 0) -> BlockPattern:
    """Random blocks, other ones for each head; the diagonal is kept, and every row has the same number where it can.

    Args:
        tokens: queries and keys.
        heads: number of heads.
        block: tokens in a block.
        density: share of the visible pairs of tokens to keep; reached as nearly as whole blocks allow.
        causal: whether keys after the query are dropped.
        seed: of the draw.
    """
    number = -(-tokens // block)
    row = torch.arange(number)
    visible = row + 1 if causal else torch.full_like(row, number)
    # Under a causal mask the diagonal block costs a whole block and keeps half of its pairs.
    lost = (block - 1) / (2 * block) if causal else 0.0
    wanted = density * float((visible - lost).sum())

    def counts(mean: float) -> Tensor:
        # Spread evenly: some rows have one block more than others where the mean is no whole number.
        share = torch.floor((row + 1) * mean + 1e-9) - torch.floor(row * mean + 1e-9)
        return torch.minimum(share.long().clamp(min=1), visible)

    low, high = 1.0, float(number)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if float((counts(middle) - lost).sum()) >= wanted else (middle, high)
    score = torch.rand(heads, number, number, generator=torch.Generator().manual_seed(seed))
    score[:, row, row] = 2.0
    if causal:
        score.masked_fill_(torch.ones(number, number, dtype=torch.bool).triu(1), -1.0)
    rank = torch.argsort(score, dim=-1, descending=True, stable=True).argsort(-1)
    keep = rank < counts(high)[:, None]
    return BlockPattern.from_block_map(keep[None], block, block, tokens, tokens, causal)
