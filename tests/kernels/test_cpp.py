"""cpp_block_sparse against the float64 reference, forward and backward; what it refuses, and how it is compiled."""

from __future__ import annotations

import logging
import multiprocessing
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern
from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.kernels import cpp_block_sparse_build as build
from hf_sparse_attn.kernels.cpp_block_sparse import CppBlockSparse
from hf_sparse_attn.kernels.torch_reference import TorchReference
from tests.support.backends import PROBLEMS, case, check
from tests.support.patterns import expected, random_inputs, random_pattern
from tests.support.processes import run_code

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROOT = Path(__file__).parents[2]
HALVES = [torch.bfloat16, torch.float16]
FLOATS = [torch.float32, *HALVES]


@pytest.fixture
def compiled() -> None:
    """Skips where the kernel cannot be compiled."""
    reason = build.why_not(torch.float32)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture
def forgotten(compiled: None) -> Iterator[None]:
    """Nothing is known of compilers and libraries, neither before nor after."""
    known = (build.compiler, build.cpu_features, build._library, build._folder, build._key)
    for cache in known:
        cache.cache_clear()
    yield
    for cache in known:
        cache.cache_clear()


def forward(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return CppBlockSparse.attention(*args, **kwargs)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape, feature", PROBLEMS)
def test_forward(shape: str, feature: str, dtype: torch.dtype) -> None:
    pattern, (q, k, v) = case(shape, feature, dtype)
    out, lse = forward(q, k, v, pattern, 0.3)
    assert out.dtype == dtype and lse.dtype == torch.float32
    check(q, k, v, pattern, out, lse)
    again = forward(q, k, v, pattern, 0.3)
    assert torch.equal(out, again[0]) and torch.equal(lse, again[1])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("blocks", [(1, 1), (7, 200), (63, 5), (96, 96), (128, 128), (200, 63), (300, 300)], ids=str)
def test_block_shapes(blocks: tuple[int, int], dtype: torch.dtype) -> None:
    """Rows of several items, blocks of several chunks and the other way round; tiles and columns in all of them."""
    q_len, kv_len = (63, 111) if blocks == (1, 1) else (650, 1000)
    pattern = random_pattern(q_len, kv_len, block_q=blocks[0], block_k=blocks[1], heads=2, columns=40, seed=3)
    q, k, v = random_inputs(pattern, heads=2, dim=80, value_dim=72, dtype=dtype)
    check(q, k, v, pattern, *forward(q, k, v, pattern, 0.3))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dim, value_dim", [(1, 3), (15, 17), (40, 64), (256, 256)])
def test_head_sizes(dim: int, value_dim: int, dtype: torch.dtype) -> None:
    pattern = random_pattern(130, 200, block_q=64, block_k=64, columns=5)
    q, k, v = random_inputs(pattern, heads=2, kv_heads=1, dim=dim, value_dim=value_dim, dtype=dtype)
    check(q, k, v, pattern, *forward(q, k, v, pattern, 0.3))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("block", [128, 48, 256])
def test_causal(block: int) -> None:
    """The diagonal, of which only the part that is kept is computed."""
    pattern = BlockPattern.dense(700, 1000, causal=True, block=block)
    q, k, v = random_inputs(pattern, heads=2, dim=64)
    expected(q, k, v, pattern, 0.3).check(*forward(q, k, v, pattern, 0.3))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("scale", [0.0, -0.4])
def test_any_scale(scale: float) -> None:
    pattern = random_pattern(100, 130, columns=5)
    q, k, v = random_inputs(pattern, dim=40)
    expected(q, k, v, pattern, scale).check(*forward(q, k, v, pattern, scale))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["small", "beyond_the_cap"])
def test_softcap(size: float) -> None:
    pattern = random_pattern(100, 130, columns=5)
    q, k, v = (x * size for x in random_inputs(pattern, dim=40))
    want, want_lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, 0.3, 20.0)
    plain, plain_lse = TorchReference.attention(q, k, v, pattern, 0.3, 20.0)
    out, lse = forward(q, k, v, pattern, 0.3, 20.0)
    some = want_lse > -torch.inf
    for got, low, exact in ((out, plain, want), (lse[some], plain_lse[some], want_lse[some])):
        assert float((got - exact).abs().max()) <= 3 * float((low - exact).abs().max())


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [256, 7])
def test_every_half_precision_number_passes_unchanged(dim: int, dtype: torch.dtype) -> None:
    """A query with one key gives its value."""
    n = -(-(1 << 16) // dim)
    values = torch.arange(n * dim).to(torch.int16).view(dtype).view(1, 1, n, dim)
    # Weight 1 times an infinite value is infinite, but zero times it, in the lanes beside, is not a number.
    values = values.masked_fill(~values.isfinite(), 1.0)
    if dtype == torch.bfloat16:
        # Where the CPU multiplies pairs of bfloat16 it takes what is below the normal range for zero.
        values = values.masked_fill(values.abs() < torch.finfo(dtype).tiny, 0.0)
    pattern = BlockPattern.from_rows(torch.ones(1, 1, n, dtype=torch.int64), torch.arange(n), 1, 1, n, n)
    out = forward(torch.ones(1, 1, n, 2, dtype=dtype), torch.ones(1, 1, n, 2, dtype=dtype), values, pattern, 1.0)[0]
    assert torch.equal(out, values)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("dim", [256, 7])
def test_rounds_to_nearest_and_ties_to_even(dim: int, dtype: torch.dtype) -> None:
    """A query with two equal keys gives the mean of their values: here halfway between two numbers."""
    first, last = (torch.tensor([x], dtype=dtype).view(torch.int16).item() for x in (0.01, 200.0))
    rows = (last - first) // dim
    bits = (first + torch.arange(rows * dim)).view(rows, 1, dim)
    values = torch.cat([bits, bits + 1], 1).to(torch.int16).view(dtype)
    pattern = BlockPattern.from_rows(
        torch.ones(1, 1, rows, dtype=torch.int64), 2 * torch.arange(rows), 1, 2, rows, 2 * rows
    )
    q, k = torch.ones(1, 1, rows, 2, dtype=dtype), torch.ones(1, 1, 2 * rows, 2, dtype=dtype)
    out = forward(q, k, values.view(1, 1, 2 * rows, dim), pattern, 1.0)[0]
    assert torch.equal(out[0, 0], values.float().mean(1).to(dtype))


# ---------------------------------------------------------------------- gradients


@pytest.mark.usefixtures("compiled")
def test_gradcheck_softcap() -> None:
    pattern = random_pattern(20, 33, block_q=16, block_k=16, heads=2, columns=5)
    small = [x.requires_grad_() for x in random_inputs(pattern, heads=2, kv_heads=1, dim=5, dtype=torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: forward(*x, pattern, 0.7, 0.9)[0], small)


def gradients(attend: Any, tensors: list[torch.Tensor], weight: torch.Tensor, dtype: torch.dtype) -> list[Any]:
    leaves = [x.to(dtype).requires_grad_() for x in tensors]
    return list(torch.autograd.grad((attend(*leaves) * weight.to(dtype)).sum(), leaves))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("sizes", [(130, 111, 32, 32), (650, 700, 200, 63)], ids=str)
def test_gradients(sizes: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    """No further from the float64 gradients than by a small factor what plain torch in this precision is."""
    q_len, kv_len, block_q, block_k = sizes
    pattern = random_pattern(q_len, kv_len, block_q=block_q, block_k=block_k, batch=2, heads=4, columns=9)
    tensors = random_inputs(pattern, batch=2, heads=4, kv_heads=2, dim=40, value_dim=24, dtype=dtype)
    weight = torch.randn(2, 4, q_len, 24).to(dtype)
    mask = pattern.to_dense()

    def plain(q, k, v):
        k, v = (x.repeat_interleave(2, 1) for x in (k, v))
        return (q @ k.mT * 0.3).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num() @ v

    exact = gradients(plain, tensors, weight, torch.float64)
    low = gradients(plain, tensors, weight, dtype)
    for got, other, want in zip(
        gradients(lambda *x: forward(*x, pattern, 0.3)[0], tensors, weight, dtype), low, exact, strict=True
    ):
        assert got.dtype == dtype and got.shape == want.shape
        assert float((got - want).abs().max()) <= 3 * float((other - want).abs().max())


# ---------------------------------------------------------------------- what must not matter


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("with_order", [False, True], ids=["in_order", "reordered"])
def test_keys_outside_the_valid_range_change_no_bit(with_order: bool, dtype: torch.dtype) -> None:
    pattern = random_pattern(111, 130, kv_range=[(17, 99)], kv_order=(1, 1) if with_order else None, seed=8)
    q, k, v = random_inputs(pattern, heads=2, dim=32, dtype=dtype)
    clean = forward(q, k, v, pattern, 0.3)
    for x in (k, v):
        x[:, :, :17], x[:, :, 99:] = torch.nan, torch.inf
    dirty = forward(q, k, v, pattern, 0.3)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_keys_that_tiles_hide_from_all_queries_change_no_bit(dtype: torch.dtype) -> None:
    keep = torch.zeros(1, 1, 100, 130, dtype=torch.bool)
    keep[..., ::3] = True
    pattern = BlockPattern.from_token_mask(keep, 64, 64)
    q, k, v = random_inputs(pattern, dim=32, dtype=dtype)
    clean = forward(q, k, v, pattern, 0.3)
    for x in (k, v):
        x[:, :, 1::3], x[:, :, 2::3] = torch.nan, torch.inf
    dirty = forward(q, k, v, pattern, 0.3)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


@pytest.mark.usefixtures("compiled")
def test_a_query_that_is_not_a_number_stays_one_and_alone() -> None:
    pattern = random_pattern(100, 130, keep=1.0)
    q, k, v = random_inputs(pattern, dim=32)
    clean = forward(q, k, v, pattern, 0.3)[0]
    q[:, :, 7] = torch.nan
    dirty = forward(q, k, v, pattern, 0.3)[0]
    assert bool(dirty[:, :, 7].isnan().all())
    others = torch.arange(100) != 7
    assert torch.equal(clean[:, :, others], dirty[:, :, others])


@pytest.mark.usefixtures("compiled")
def test_threads_change_no_bit() -> None:
    pattern, tensors = case("batch", "all", torch.float32)
    threads = torch.get_num_threads()
    found = []
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            leaves = [x.clone().requires_grad_() for x in tensors]
            out, lse = forward(*leaves, pattern, 0.3)
            found.append([out, lse, *torch.autograd.grad(out.square().sum(), leaves)])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("layout", ["tokens_first", "dims_apart", "expanded"])
def test_layouts_of_memory(layout: str) -> None:
    pattern = random_pattern(100, 100, heads=3)
    q, k, v = (x.contiguous() for x in random_inputs(pattern, heads=3, dim=32))
    want = forward(q, k, v, pattern, 0.3)
    if layout == "tokens_first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "dims_apart":
        q, k, v = (x.mT.contiguous().mT for x in (q, k, v))
    else:
        k, v = (x[:, :1].expand(-1, 3, -1, -1) for x in (k, v))
        want = forward(q, k.contiguous(), v.contiguous(), pattern, 0.3)
    assert torch.equal(forward(q, k, v, pattern, 0.3)[0], want[0])
    # The gradient of a sum has strides of 0.
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(forward(*leaves, pattern, 0.3)[0].sum(), leaves)


@pytest.mark.usefixtures("compiled")
def test_empty_heads_and_empty_batch_rows() -> None:
    pattern = replace(random_pattern(64, 64, batch=2, heads=2), kv_range=torch.tensor([[0, 64], [9, 9]]).int())
    q, k, v = random_inputs(pattern, batch=2, heads=2, dim=16)
    out, lse = forward(q, k, v, pattern, 0.3)
    assert not out[1].any() and bool((lse[1] == -torch.inf).all())
    expected(q, k, v, pattern, 0.3).check(out, lse)


@pytest.mark.usefixtures("compiled")
def test_torch_compile_keeps_it_whole() -> None:
    pattern = random_pattern(100, 130, heads=2, columns=5)
    q, k, v = (x.requires_grad_() for x in random_inputs(pattern, heads=2, dim=16))

    def attend(q, k, v):
        return hsa.attention(q, k, v, pattern, backend="cpp_block_sparse")

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    want, got = attend(q, k, v), compiled(q, k, v)
    assert torch.equal(want, got)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (want, got)), strict=True):
        assert torch.equal(a, b)


# ---------------------------------------------------------------------- compiling, and refusing


def tiny(dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    return torch.zeros(3, 1, 1, 40, 16, dtype=dtype, device=device).unbind()


@pytest.mark.usefixtures("compiled")
def test_auto_takes_it_first_on_a_cpu() -> None:
    # What comes before it takes few queries alone.
    assert auto_order("cpu")[:3] == ["cpp_decode", "torch_folded", "cpp_block_sparse"]
    pattern = random_pattern(40, 40)
    assert run_pattern(*tiny(), pattern, 1.0)[2] == "cpp_block_sparse"


@pytest.mark.parametrize(
    "what, reason",
    [
        ("device", "needs a CPU, the tensors are on meta"),
        ("dtype", "needs float32, bfloat16, float16, float64, got float8_e4m3fn"),
        ("platform", "needs Linux on x86_64 or aarch64, this is win32 on "),
        ("compiler", r"needs a C\+\+ compiler: none of g\+\+, c\+\+, clang\+\+ is on the path"),
        ("amx", r"this CPU multiplies bfloat16 in tiles \(AMX\)"),
    ],
)
def test_refuses(what: str, reason: str, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = tiny()
    if what == "device":
        inputs = tiny(device="meta")
    elif what == "dtype":
        inputs = [x.to(torch.float8_e4m3fn) for x in inputs]
    elif what == "platform":
        monkeypatch.setattr(build, "sys", SimpleNamespace(platform="win32"))
    elif what == "compiler":
        monkeypatch.setattr(shutil, "which", lambda name: None)
    else:
        inputs = [x.requires_grad_() for x in tiny(torch.bfloat16)]
        monkeypatch.setattr(build, "cpu_features", lambda: frozenset({"amx_bf16"}))
    with pytest.raises(hsa.BackendUnavailable, match=f"'cpp_block_sparse' cannot run this call: {reason}"):
        run_pattern(*inputs, random_pattern(40, 40).to(inputs[0].device), 1.0, "cpp_block_sparse")


@pytest.fixture
def own_home(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".cache" / "hf_sparse_attn" / "cpp"


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="instruction sets of x86")
@pytest.mark.parametrize("instructions", ["x86-64", "x86-64-v3"])
def test_shorter_vectors(instructions: str, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an older CPU would run: vectors of 16 and of 32 bytes."""
    if instructions == "x86-64-v3" and not {"avx2", "fma", "f16c"} <= build.cpu_features():
        pytest.skip("this CPU has no AVX2")
    monkeypatch.setattr(build, "_NATIVE", {"x86_64": f"-march={instructions}"})
    for dtype in (torch.float32, torch.float16):
        pattern, (q, k, v) = case("odd", "all", dtype)
        check(q, k, v, pattern, *forward(q, k, v, pattern, 0.3))


def fake_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    script = folder / "g++"
    script.write_text(f'#!/bin/sh\nif [ "$1" = --version ]; then echo 0; exit 0; fi\n{body}\n')
    script.chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(script))


def test_a_broken_compiler_is_a_reason_and_is_asked_once(
    own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_compiler(tmp_path, monkeypatch, f"echo x >> {tmp_path}/asked; echo 'error: no headers' >&2; exit 1")
    pattern = random_pattern(40, 40)
    for _ in range(2):
        reason = CppBlockSparse.why_not(pattern, *tiny(), False)
        assert reason is not None and reason.endswith("g++ cannot compile it: error: no headers")
        assert run_pattern(*tiny(), pattern, 1.0)[2] == "torch_gather"
    assert (tmp_path / "asked").read_text() == "x\n"
    assert not list(own_home.iterdir())


def test_what_is_no_library_is_a_reason(own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_compiler(tmp_path, monkeypatch, 'while [ "$1" != -o ]; do shift; done; echo nonsense > "$2"')
    reason = CppBlockSparse.why_not(random_pattern(40, 40), *tiny(), False)
    assert reason is not None and reason.startswith("its library cannot be made or loaded: ")


def test_compiles_what_is_needed_once_and_says_so(own_home: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=build.__name__)
    # Without a pattern nothing is compiled.
    assert CppBlockSparse.why_not(None, *tiny(), True) is None and not own_home.exists()
    pattern = random_pattern(40, 40)
    run_pattern(*tiny(), pattern, 1.0, "cpp_block_sparse")
    made = [path.name for path in own_home.iterdir()]
    assert len(made) == 1 and made[0].startswith("float_forward_")
    assert [m.split()[0] for m in caplog.messages] == ["compiling", "compiled"]
    # As another process would find it.
    build._library.cache_clear()
    run_pattern(*tiny(), pattern, 1.0, "cpp_block_sparse")
    assert len(caplog.messages) == 2


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library as it is kept."""
    reason = build.why_not(torch.float32)
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("kept")
    build._compile(torch.float32, "forward", folder / "whole.so")
    return folder / "whole.so"


def _folder_with_a_file(path: Path) -> None:
    path.mkdir()
    (path / "file").write_text("")


def _signed(library: bytes) -> bytes:
    return library + build._digest(library)


SPOILT: dict[str, Callable[[Path, bytes], object]] = {
    "empty": lambda path, kept: path.write_bytes(b""),
    "half": lambda path, kept: path.write_bytes(kept[: len(kept) // 2]),
    "without its end": lambda path, kept: path.write_bytes(kept[:-1]),
    "a byte is another": lambda path, kept: path.write_bytes(kept[:5000] + bytes([kept[5000] ^ 1]) + kept[5001:]),
    "text": lambda path, kept: path.write_text("no library"),
    "other": lambda path, kept: path.write_bytes(Path(torch._C.__file__).read_bytes()),
    "other machine": lambda path, kept: path.write_bytes(_signed(kept[:18] + b"\xff\xff" + kept[20 : -build._DIGEST])),
    "folder": lambda path, kept: _folder_with_a_file(path),
    "link to nothing": lambda path, kept: path.symlink_to(path.parent / "gone"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_library_that_is_spoilt_is_made_anew(
    how: str, whole: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    copying_compiler(tmp_path, monkeypatch, whole)
    path = build._folder() / f"float_forward_{build._key()}.so"
    SPOILT[how](path, whole.read_bytes())
    pattern = random_pattern(40, 40)
    out, _, name = run_pattern(*tiny(), pattern, 1.0, "cpp_block_sparse")
    want = TorchReference.attention(*tiny(), pattern, 1.0)[0]
    assert name == "cpp_block_sparse" and torch.allclose(out, want, atol=1e-5)
    assert how == "link to nothing" or "compiled anew" in caplog.text
    # And not again.
    build._library.cache_clear()
    build.library(torch.float32, "forward")
    assert (tmp_path / "asked").read_text() == "x\n" and list(own_home.iterdir()) == [path]


def test_processes_that_come_together_compile_once(
    whole: Path, own_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copying_compiler(tmp_path, monkeypatch, whole)
    fork = multiprocessing.get_context("fork")
    children = [fork.Process(target=build.library, args=(torch.float32, "forward")) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [0, 0, 0]
    assert (tmp_path / "asked").read_text() == "x\n"


def copying_compiler(folder: Path, monkeypatch: pytest.MonkeyPatch, library: Path) -> None:
    """A compiler whose result is known, and which notes that it was asked."""
    copied = f'while [ "$1" != -o ]; do shift; done; head -c -{build._DIGEST} {library} > "$2"'
    fake_compiler(folder, monkeypatch, f"echo x >> {folder}/asked; sleep 0.2; {copied}")


def test_a_home_that_cannot_be_written(forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    folder = build._folder()
    try:
        assert folder.is_dir() and tmp_path not in folder.parents
    finally:
        folder.rmdir()


def test_importing_compiles_nothing(tmp_path: Path) -> None:
    code = "from hf_sparse_attn.registry import BACKENDS; print(BACKENDS.names())"
    done = run_code(code, HOME=str(tmp_path))
    assert "cpp_block_sparse" in done.stdout, done.stderr
    assert not (tmp_path / ".cache" / "hf_sparse_attn").exists()
