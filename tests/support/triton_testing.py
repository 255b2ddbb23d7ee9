"""What tests of Triton kernels share: problems, poisoned memory, calls written down, compiling for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import FEATURES, Expected, random_inputs, random_pattern

# Triton's name of a target, and bytes of shared memory that one program may use there.
TARGETS: dict[str, tuple[tuple[str, int | str, int], int]] = {
    "sm_80": (("cuda", 80, 32), 166_912),
    "sm_89": (("cuda", 89, 32), 101_376),
    "sm_90": (("cuda", 90, 32), 232_448),
    "gfx942": (("hip", "gfx942", 64), 65_536),
}


gpu = pytest.mark.gpu
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm GPU")

# Arguments of random_pattern() and, under "inputs", of random_inputs().
CASES: dict[str, dict[str, Any]] = {
    **{name: {"q_len": 45, "kv_len": 79, **feature} for name, feature in FEATURES.items()},
    "one_token": {"q_len": 1, "kv_len": 1, "keep": 1.0, "tiles": 0, "aligned": True},
    "one_query": {"q_len": 1, "kv_len": 63, "columns": 5},
    "tokens_63": {"q_len": 63, "kv_len": 63, "columns": 5},
    "chunk_45_of_120": {"q_len": 45, "kv_len": 120, "columns": 5},
    "more_queries_than_keys": {"q_len": 70, "kv_len": 40, "columns": 5},
    "blocks_16": {"q_len": 63, "kv_len": 63, "block_q": 16, "block_k": 16, "columns": 20},
    "blocks_64_by_16": {"q_len": 70, "kv_len": 63, "block_q": 64, "block_k": 16, "columns": 5},
    "blocks_16_by_64": {"q_len": 40, "kv_len": 130, "block_q": 16, "block_k": 64, "columns": 5},
    "heads_differ": {"q_len": 40, "kv_len": 63, "batch": 2, "heads": 2, "columns": 5, "q_order": (2, 2),
                     "kv_order": (2, 2), "inputs": {"batch": 2, "kv_heads": 2}},
    "grouped_4_to_1": {"q_len": 63, "kv_len": 63, "columns": 5, "inputs": {"heads": 4, "kv_heads": 1}},
    "padded_batch": {"q_len": 63, "kv_len": 70, "batch": 2, "columns": 5, "kv_range": [(0, 45), (17, 70)],
                     "inputs": {"batch": 2}},
    "padded_batch_in_order": {"q_len": 63, "kv_len": 70, "columns": 5, "kv_order": (1, 2), "heads": 2,
                              "kv_range": [(0, 45)], "inputs": {"kv_heads": 2}},
    "dim_40": {"q_len": 63, "kv_len": 70, "columns": 5, "inputs": {"dim": 40}},
    "dim_80_value_dim_24": {"q_len": 63, "kv_len": 70, "columns": 5, "inputs": {"dim": 80, "value_dim": 24}},
    "dim_7_value_dim_1": {"q_len": 63, "kv_len": 70, "columns": 5, "inputs": {"dim": 7, "value_dim": 1}},
    "float16": {"q_len": 45, "kv_len": 63, **FEATURES["all"], "inputs": {"dtype": torch.float16}},
    "float16_unaligned": {"q_len": 45, "kv_len": 63, "inputs": {"dtype": torch.float16}},
    "bfloat16": {"q_len": 45, "kv_len": 63, **FEATURES["all"], "inputs": {"dtype": torch.bfloat16}},
    "bfloat16_unaligned": {"q_len": 45, "kv_len": 63, "inputs": {"dtype": torch.bfloat16}},
}  # fmt: skip
BIG: dict[str, dict[str, Any]] = {
    "tokens_4096_blocks_128": {"q_len": 4096, "kv_len": 4096, "block_q": 128, "block_k": 128, "keep": 0.2,
                               "columns": 100, "inputs": {"heads": 8, "kv_heads": 2, "dim": 128}},
    "tokens_3001_dim_256": {"q_len": 1000, "kv_len": 3001, "block_q": 64, "block_k": 64, "keep": 0.2,
                            "kv_range": [(100, 2900)], "inputs": {"dim": 256}},
    "tokens_2500_blocks_256": {"q_len": 2500, "kv_len": 2500, "block_q": 256, "block_k": 256, "q_order": (1, 1),
                               "kv_order": (1, 1), "inputs": {"dim": 80}},
}  # fmt: skip


def make(case: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, BlockPattern]:
    """q, k, v and the pattern of a case."""
    case = dict(case)
    inputs = {"heads": 2, "kv_heads": 1, "dim": 32, "dtype": dtype, **case.pop("inputs", {})}
    pattern = random_pattern(**case)
    return *random_inputs(pattern, **inputs), pattern


def unread(pattern: BlockPattern, q: Tensor, k: Tensor) -> Tensor:
    """Bool [batch, kv_heads, kv_len]: keys that no query of the group reads."""
    read = pattern.to_dense().any(2).expand(q.shape[0], q.shape[1], -1)
    return ~read.unflatten(1, (k.shape[1], -1)).any(2)


@contextmanager
def poisoned() -> Iterator[None]:
    """Memory from torch.empty holds NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def expected_capped(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float) -> Expected:
    """As patterns.expected(), with a soft cap; for float32 queries and keys."""
    out, lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, scale, softcap)
    low_out, low_lse = TorchReference.attention(q, k, v, pattern, scale, softcap)
    some = lse > -torch.inf
    errors = (low_out.to(v.dtype) - out).abs().max(), (low_lse - lse)[some].abs().max()
    return Expected(out, lse, *(3 * float(error) for error in errors))


def equal(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> bool:
    """Whether two results have the same bits."""
    return torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


class Recorder:
    """Stands for a kernel: writes down grids and arguments by name, and launches nothing."""

    def __init__(self, kernel: Any) -> None:
        self.names = kernel.arg_names
        self.calls: list[dict[str, Any]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.calls.append({"grid": grid, **dict(zip(self.names, args, strict=False)), **kwargs})

        return launch

    def compiled_for(self, not_specialised: Sequence[str]) -> list[tuple[Any, ...]]:
        """For each call what Triton compiles a kernel for: constants, and of other numbers what it specialises."""

        def seen(name: str, value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                return value.dtype
            if isinstance(value, int) and not isinstance(value, bool) and name in self.names and not name.isupper():
                return None if name in not_specialised else (value == 1, value % 16 == 0)
            return None if isinstance(value, float) else value

        return [tuple((n, seen(n, x)) for n, x in call.items() if n != "grid") for call in self.calls]


def compile_for(
    kernel: Any, target: str, types: dict[str, str], constants: dict[str, Any], warps: int, stages: int
) -> Any:
    """The kernel down to machine code by Triton's own assemblers; says nothing about speed.

    Args:
        kernel: function under triton.jit.
        target: of TARGETS.
        types: Triton's types of the arguments; "i32" where none is given.
        constants: arguments that are constants.
        warps, stages: of a program.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [
        i
        for i, name in enumerate(names)
        if types.get(name, "").startswith("*") or (name[:2] in ("q_", "k_", "v_") and name.endswith(_STRIDES))
    ]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": warps, "num_stages": stages}
    built = triton.compile(source, target=GPUTarget(*TARGETS[target][0]), options=options)
    assert built.metadata.shared <= TARGETS[target][1]
    return built


_STRIDES = ("_batch", "_head", "_token")
