"""How a launch of the block-sparse Triton kernels is chosen and tried."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from hf_sparse_attn.cost import tuning
from hf_sparse_attn.kernels.triton_common import Launch, device_limits, padded, runs_interpreted
from hf_sparse_attn.pattern.block_pattern import BlockPattern

log = logging.getLogger(__name__)

KERNELS = ("forward", "queries", "keys")


class Limits(NamedTuple):
    """What a launch must fit: bytes of shared memory a program may use, compute capability (0 for ROCm)."""

    shared: int
    capability: int


def limits_of(device: torch.device) -> Limits:
    """The limits of a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return Limits(device_limits(device)[1], 0 if torch.version.hip else 10 * major + minor)


def masked_stages(launch: Launch) -> int:
    """Pipeline stages of the loops over partial blocks: their tiles take room, too."""
    return min(launch.stages, 2) if launch.queries * launch.keys > 128 * 64 else launch.stages


def shared_bytes(kernel: str, launch: Launch, dim: int, value_dim: int, itemsize: int, limits: Limits) -> int:
    """Bytes of shared memory that a kernel needs, at most, by what Triton 3.7 was seen to allocate.

    Args:
        kernel: one of KERNELS: "forward"; "queries", the gradient of q; "keys", the gradients of k and v.
        launch: see Launch.
        dim, value_dim: padded head dims.
        itemsize: bytes of an element.
        limits: of the device: what passes through registers differs.
    """
    m, n, stages = launch.queries, launch.keys, max(2, launch.stages)
    # Held: what a program keeps. Streamed: what each stage holds. A tile is a byte for each pair.
    held, streamed, tile = {
        "forward": (m * dim, n * (dim + value_dim), m * n),
        "queries": (m * (dim + value_dim), n * (dim + value_dim), m * n),
        "keys": (n * (dim + value_dim), m * (dim + value_dim), 0),
    }[kernel]
    if itemsize == 4:
        return 2048 + itemsize * (held + (stages - 1) * streamed) + 8 * m * n
    if _family(limits) == "rocm":
        return itemsize * max(1, launch.stages - 1) * streamed + 4 * m * n
    if _family(limits) == "ampere":
        # Other layouts of an operand or of the logits are made in shared memory; the queries stay in registers.
        held, spare = (0, 4) if kernel == "forward" else (held, 2)
        stages += kernel == "queries"
        return itemsize * (held + stages * streamed) + (launch.stages - 1) * tile + spare * m * n
    partial = max(2, masked_stages(launch))
    # Statistics of the queries and what else is small.
    little = 2048
    return little + itemsize * held + max(stages * itemsize * streamed, partial * (itemsize * streamed + tile) - tile)


def choose_launch(
    kernel: str, block_q: int, block_k: int, dim: int, value_dim: int, itemsize: int, limits: Limits
) -> Launch:
    """Queries and keys at a time, warps and pipeline stages; a rule by sizes, never by length, and nothing is timed.

    Args:
        kernel: one of KERNELS.
        block_q, block_k: sizes of the pattern's blocks; what is returned divides them.
        dim, value_dim: padded head dims.
        itemsize: bytes of an element.
        limits: see Limits.
    """
    return candidates(kernel, block_q, block_k, dim, value_dim, itemsize, limits)[0]


def candidates(
    kernel: str, block_q: int, block_k: int, dim: int, value_dim: int, itemsize: int, limits: Limits
) -> list[Launch]:
    """Launches that fit the device, the one of the rule first; arguments as in `choose_launch`."""
    wide = max(dim, value_dim)

    def fits(launch: Launch) -> bool:
        return shared_bytes(kernel, launch, dim, value_dim, itemsize, limits) <= limits.shared

    found: list[Launch] = []
    widths = _WANTED["single" if itemsize == 4 else _family(limits)][kernel]
    for launch in widths["wide" if wide > (64 if itemsize == 4 else 128) else "narrow"]:
        cut = launch._replace(queries=min(launch.queries, block_q), keys=min(launch.keys, block_k))
        if cut not in found and fits(cut):
            found.append(cut)
    return found or [smaller_until(cut, fits)]


def _family(limits: Limits) -> str:
    if not limits.capability:
        return "rocm"
    return "hopper" if 90 <= limits.capability < 120 else "ampere"


def _launches(text: str) -> list[Launch]:
    return [Launch(*map(int, one.split("/"))) for one in text.split()]


# Queries / keys / warps / stages, the best by design first: what ptxas compiles with few spills; nothing was timed.
# Hopper: 128 queries are 64 a warp group, the least its matrix units take, and two groups hide softmax behind
# products; three stages, since Triton starts loads at the end of a step. Ampere and Ada: smaller, as operands pass
# through registers. Exact float32 products use no matrix units and are unrolled: larger pieces spill.
_WANTED = {
    family: {kernel: {width: _launches(text) for width, text in widths.items()} for kernel, widths in kernels.items()}
    for family, kernels in {
        "hopper": {
            "forward": {
                "narrow": "128/128/8/3 128/64/8/3 128/64/4/3 64/64/4/3 64/32/4/2",
                "wide": "128/64/8/2 64/64/8/2 64/32/4/2 32/32/4/2",
            },
            "queries": {
                "narrow": "128/64/8/3 128/32/8/3 64/64/4/3 64/32/4/2",
                "wide": "64/64/8/2 64/32/8/2 32/32/4/2",
            },
            "keys": {
                "narrow": "64/128/8/3 32/128/8/3 64/64/8/3 32/64/4/3 32/32/4/2",
                "wide": "32/64/8/2 32/32/4/2 16/32/4/2",
            },
        },
        "ampere": {
            "forward": {
                "narrow": "128/64/8/3 128/32/8/3 64/64/4/3 64/32/4/2",
                "wide": "64/64/8/2 64/32/8/2 32/32/4/2 32/16/4/2",
            },
            "queries": {
                "narrow": "128/64/8/2 64/64/8/2 64/32/8/2 64/32/4/2 32/32/4/2",
                "wide": "64/32/8/2 32/32/4/2 32/16/4/2 16/16/4/2",
            },
            "keys": {
                "narrow": "64/64/8/3 64/64/8/2 32/64/8/2 32/32/4/2",
                "wide": "32/32/8/2 32/32/4/2 16/32/4/2 16/16/4/2",
            },
        },
        "rocm": {
            "forward": {
                "narrow": "128/64/4/2 128/32/4/2 64/64/4/2 64/32/4/2 64/32/4/1",
                "wide": "64/32/4/2 32/32/4/2 32/16/4/2 32/16/4/1",
            },
            "queries": {"narrow": "64/32/4/2 32/32/4/2 32/32/4/1", "wide": "32/16/4/2 16/16/4/2 16/16/4/1"},
            "keys": {"narrow": "32/32/4/2 32/64/4/2 32/32/4/1", "wide": "16/32/4/2 16/16/4/2 16/16/4/1"},
        },
        "single": {
            "forward": {"narrow": "32/16/4/2 32/32/4/2 16/16/4/2", "wide": "16/16/4/2"},
            "queries": {"narrow": "16/16/4/2 32/16/4/2 32/32/4/2", "wide": "16/16/4/2"},
            "keys": {"narrow": "16/16/4/2 16/32/4/2 32/32/4/2", "wide": "16/16/4/2"},
        },
    }.items()
}


def smaller_until(launch: Launch, fits: Callable[[Launch], bool]) -> Launch:
    """The launch made smaller step by step until it fits, or the smallest."""
    while not fits(launch):
        least = smaller(launch)
        if least is None:
            break
        launch = least
    return launch


def smaller(launch: Launch) -> Launch | None:
    """The next launch that needs less memory: fewer stages down to 2, then less work at a time, or None."""
    queries, keys, warps, stages = launch
    if stages > 2:
        return Launch(queries, keys, warps, stages - 1)
    if max(queries, keys) > 16:
        queries, keys = (queries // 2, keys) if queries > keys else (queries, keys // 2)
        return Launch(queries, keys, min(warps, 4) if max(queries, keys) <= 64 else warps, stages)
    return Launch(queries, keys, warps, 1) if stages == 2 else None


# Launches that a tuning run tries, by kernel.
_FORCED: dict[str, Launch] = {}
# Launches in use by kernel and shape class: rule, tuned, or what was left after the device refused larger ones.
_KNOWN: dict[tuple[object, ...], Launch] = {}


def software() -> str:
    """Versions a tuned launch is good for."""
    return f"torch {torch.__version__}, triton {triton.__version__}"


def shape_class(dtype: torch.dtype, dim: int, value_dim: int, block_q: int, block_k: int) -> str:
    """Name of a class of shapes that share a launch; dims are padded ones."""
    name = str(dtype).removeprefix("torch.")
    return f"{name}, dim {dim}, value dim {value_dim}, blocks {block_q} x {block_k}"


def launched(kernel: str, p: BlockPattern, q: Tensor, v: Tensor, run: Callable[[Launch], None]) -> None:
    """Calls `run` with the launch for a kernel and shapes; with a smaller one where the device has no room for it.

    A device says so before anything has run. What it took is remembered.
    """
    if kernel in _FORCED:
        return run(_FORCED[kernel])
    if runs_interpreted():
        # The interpreter pays per operation, so it takes whole blocks.
        return run(Launch(p.block_q, p.block_k, 4, 1))
    dim, value_dim = padded(q.shape[3]), padded(v.shape[3])
    at = (kernel, q.device, q.dtype, dim, value_dim, p.block_q, p.block_k)
    launch = _KNOWN.get(at)
    if launch is None:
        launch = _tuned(kernel, p, q, dim, value_dim) or choose_launch(
            kernel, p.block_q, p.block_k, dim, value_dim, q.element_size(), limits_of(q.device)
        )
    while True:
        try:
            run(launch)
        except OutOfResources as error:
            least = smaller(launch)
            if least is None:
                raise
            log.warning("kernel %r: %s has no room for %s (%s); trying %s", kernel, q.device, launch, error, least)
            launch = least
        else:
            _KNOWN[at] = launch
            return


def _tuned(kernel: str, p: BlockPattern, q: Tensor, dim: int, value_dim: int) -> Launch | None:
    shape = shape_class(q.dtype, dim, value_dim, p.block_q, p.block_k)
    found = tuning.lookup(torch.cuda.get_device_name(q.device), software(), kernel, shape)
    if found is None or set(found) != set(Launch._fields):
        return None
    launch = Launch(**found)
    cuts = (p.block_q, launch.queries), (p.block_k, launch.keys)
    return launch if all(cut >= 16 and block % cut == 0 for block, cut in cuts) else None


@contextlib.contextmanager
def forced(kernel: str, launch: Launch) -> Iterator[None]:
    """Within it a kernel runs with this launch, or raises OutOfResources; for tuning and tests."""
    _FORCED[kernel] = launch
    try:
        yield
    finally:
        del _FORCED[kernel]


def forget_launches() -> None:
    """Makes the next calls look their launches up again, after tuning."""
    _KNOWN.clear()


def is_wide(block: int, *tensors: Tensor) -> bool:
    """Whether tokens of one block may lie 2**31 elements apart in memory, or a row of one be that long."""
    return any(block * abs(t.stride(2)) + t.shape[3] * abs(t.stride(3)) >= 2**31 for t in tensors)
