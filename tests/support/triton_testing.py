"""What tests of Triton kernels share: poisoned memory, calls written down instead of launched, compiling for a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import Expected

# Triton's name of a target, and bytes of shared memory that one program may use there.
TARGETS: dict[str, tuple[tuple[str, int | str, int], int]] = {
    "sm_80": (("cuda", 80, 32), 166_912),
    "sm_89": (("cuda", 89, 32), 101_376),
    "sm_90": (("cuda", 90, 32), 232_448),
    "gfx942": (("hip", "gfx942", 64), 65_536),
}


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
