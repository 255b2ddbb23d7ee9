"""The Triton kernel against the reference: interpreted on any machine, compiled where there is a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import expected, random_inputs, random_pattern
from tests.support.triton_testing import BIG, CASES, gpu, make, no_gpu, poisoned, unread

triton = pytest.importorskip("triton", reason="needs the package triton")
kernel = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse")
parts = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse_parts")
common = pytest.importorskip("hf_sparse_attn.kernels.triton_common")

Outputs = tuple[Tensor, Tensor]
Attention = Callable[..., Outputs]


def _run_in_worker(payload: bytes) -> bytes:
    """Runs in the process that interprets: (q, k, v, pattern, scale, pieces) -> (out, lse), both pickled."""
    q, k, v, pattern, scale, pieces = pickle.loads(payload)
    with parts.forced("forward", common.Launch(*pieces, 4, 1)) if pieces else nullcontext(), poisoned():
        return pickle.dumps(kernel.TritonBlockSparse.attention(q, k, v, pattern, scale))


def _far_tokens_in_worker() -> str:
    """Keys more than 2**31 elements apart in memory (touched only where they are), compared with close ones."""
    tokens, stride = 40, 60_000_000
    pattern = random_pattern(16, tokens, block_q=16, block_k=16, keep=1.0, columns=3)
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    try:
        far = torch.empty(tokens * stride, dtype=torch.float16).as_strided(k.shape, (0, 0, stride, 1))
    except RuntimeError as error:
        return f"no memory to address: {error}"
    far.copy_(k)
    close, apart = (kernel.TritonBlockSparse.attention(q, x, v, pattern, 0.25) for x in (k, far))
    return "equal" if torch.equal(close[0], apart[0]) and torch.equal(close[1], apart[1]) else "differ"


@pytest.fixture(scope="module")
def interpreted(interpreter: ProcessPoolExecutor) -> Attention:
    """TritonBlockSparse.attention, interpreted; `pieces` sets how many queries and keys the kernel takes at a time."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, pieces: tuple[int, int] | None = None
    ) -> Outputs:
        payload = pickle.dumps((q, k, v, pattern, scale, pieces))
        return pickle.loads(interpreter.submit(_run_in_worker, payload).result())  # type: ignore[no-any-return]

    return attention


# ---- against the reference; features and shapes one by one are checked with their gradients in test_triton_backward


@pytest.mark.parametrize("case", ["tail_in_the_second_piece", "all"])
@pytest.mark.parametrize("pieces", [(16, 16), (32, 16), (16, 32)], ids=lambda p: f"{p[0]}_queries_{p[1]}_keys")
def test_blocks_cut_into_pieces(pieces: tuple[int, int], case: str, interpreted: Attention) -> None:
    whole = {"q_len": 63, "kv_len": 150, "keep": 1.0, "aligned": True, "tiles": 0}
    q, k, v, pattern = make(CASES.get(case, whole))
    expected(q, k, v, pattern, 0.3).check(*interpreted(q, k, v, pattern, 0.3, pieces))


def test_large_logits_do_not_overflow(interpreted: Attention) -> None:
    q, k, v, pattern = make(CASES["columns"])
    expected(q, k, v, pattern, 200.0).check(*interpreted(q, k, v, pattern, 200.0))


def test_any_strides(interpreted: Attention) -> None:
    """Inputs whose last dimension is not the dense one, and a pattern whose leading sizes are expanded."""
    q, k, v, pattern = make(CASES["columns"])
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    wide = replace(
        pattern,
        indptr=pattern.indptr.expand(1, 2, -1),
        column_indptr=pattern.column_indptr.expand(1, 2, -1),
        tiles=pattern.tiles.mT.contiguous().mT,
    )
    same = zip(interpreted(q, k, v, pattern, 0.3), interpreted(*apart, wide, 0.3), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_two_runs_give_the_same_bits(interpreted: Attention) -> None:
    q, k, v, pattern = make(CASES["all"])
    first, second = (interpreted(q, k, v, pattern, 0.3) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_offsets_beyond_32_bits(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(_far_tokens_in_worker).result()
    if found.startswith("no memory"):
        pytest.skip(found)
    assert found == "equal"


# ---- keys that nobody reads


@pytest.mark.parametrize("name", ["tiles", "all", "padded_batch_in_order"])
def test_unread_keys_need_not_be_finite(name: str, interpreted: Attention) -> None:
    q, k, v, pattern = make({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(pattern, q, k)[..., None]
    assert nobody.any() and not nobody.all()
    clean = interpreted(q, k, v, pattern, 0.3)
    dirty = interpreted(q, k.masked_fill(nobody, torch.inf), v.masked_fill(nobody, torch.inf), pattern, 0.3)
    assert torch.equal(clean[0], dirty[0]) and torch.equal(clean[1], dirty[1])


def test_value_read_only_by_queries_that_do_not_exist(interpreted: Attention) -> None:
    """from_token_mask() lets the missing queries of a short tail row keep every key."""
    mask = torch.rand(1, 1, 40, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 50:] = False
    pattern = BlockPattern.from_token_mask(mask, 32, 32).validate()
    q, k, v = random_inputs(pattern, dim=16)
    want = expected(q, k, v, pattern, 0.3)
    v[:, :, 50:] = torch.nan
    want.check(*interpreted(q, k, v, pattern, 0.3))


def test_nan_value_reaches_only_rows_that_read_it(interpreted: Attention) -> None:
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 5:32, 40] = False
    mask[..., 32:, 40] = False
    pattern = BlockPattern.from_token_mask(mask, 32, 32).validate()
    q, k, v = random_inputs(pattern, dim=16)
    v[:, :, 40] = torch.nan
    out, lse = interpreted(q, k, v, pattern, 0.3)
    assert out[:, :, :5].isnan().all()
    assert not out[:, :, 32:].isnan().any() and not lse.isnan().any()


# ---- what it refuses


def tiny(dim: int = 16, value_dim: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(1, 1, 32, d, dtype=dtype) for d in (dim, dim, value_dim))  # type: ignore[return-value]


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None = None) -> str | None:
    return kernel.TritonBlockSparse.why_not(pattern, q, k, v, True, 2.0)  # type: ignore[no-any-return]


def test_refuses_the_cpu_where_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "runs_interpreted", lambda: False)
    assert "needs a CUDA or ROCm GPU" in why_not(*tiny())
    assert "on the CPU only Triton's interpreter" in why_not(*tiny())


@pytest.mark.usefixtures("as_if_interpreted")
def test_refuses_a_device_of_another_kind() -> None:
    assert "needs a CUDA or ROCm GPU, the tensors are on meta" in why_not(*(x.to("meta") for x in tiny()))


@pytest.mark.usefixtures("as_if_interpreted")
@pytest.mark.parametrize(
    ("inputs", "pattern", "reason"),
    [
        pytest.param({"dtype": torch.float64}, None, "got float64", id="float64"),
        pytest.param({"dim": 257}, None, "a dim from 1 to 256, got 257", id="dim"),
        pytest.param({"value_dim": 300}, None, "a value dim from 1 to 256, got 300", id="value_dim"),
        pytest.param({"value_dim": 0}, None, "a value dim from 1 to 256, got 0", id="no_value"),
        pytest.param({}, (8, 16), "`block_q` to be a power of two from 16 on, got 8", id="small_block"),
        pytest.param({}, (16, 48), "`block_k` to be a power of two from 16 on, got 48", id="odd_block"),
    ],
)
def test_refuses(inputs: dict[str, Any], pattern: tuple[int, int] | None, reason: str) -> None:
    blocks = pattern and random_pattern(32, 32, block_q=pattern[0], block_k=pattern[1])
    assert reason in str(why_not(*tiny(**inputs), blocks))


@pytest.mark.usefixtures("as_if_interpreted")
def test_refuses_tensors_on_different_devices() -> None:
    q, k, v = tiny()
    pattern = random_pattern(32, 32)
    assert "`k` on cpu like `q`, it is on meta" in why_not(q, k.to("meta"), v)
    assert "`v` on cpu like `q`, it is on meta" in why_not(q, k, v.to("meta"))
    assert "`pattern` on cpu like `q`, it is on meta" in why_not(q, k, v, pattern.to("meta"))


@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm has no compute capability")
def test_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(common, "runs_interpreted", lambda: False)
    q = SimpleNamespace(device=torch.device("cuda:0"))
    assert "needs compute capability 8.0 or more, cuda:0 has 7.5" in why_not(q, q, q)


@pytest.mark.usefixtures("as_if_interpreted")
def test_takes_what_it_can_run() -> None:
    assert why_not(*tiny(), random_pattern(32, 32)) is None
    assert why_not(*tiny()) is None


def test_empty_batch_gives_an_empty_output() -> None:
    q, k, v = (x[:0] for x in tiny())
    out, lse = kernel.TritonBlockSparse.attention(q, k, v, random_pattern(32, 32), 1.0)
    assert out.shape == (0, 1, 32, 16) and lse.shape == (0, 1, 32)


# ---- launching

LIMITS = {
    "rocm": parts.Limits(65_536, 0),
    "ada": parts.Limits(101_376, 89),
    "a100": parts.Limits(166_912, 80),
    "h100": parts.Limits(232_448, 90),
    "rtx_50": parts.Limits(101_376, 120),
}


@pytest.mark.parametrize("limits", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("itemsize", [2, 4], ids=["half", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_launch_divides_the_blocks_and_fits(dim: int, itemsize: int, limits: Any) -> None:
    for name in parts.KERNELS:
        for block_q in (16, 64, 128, 512):
            for block_k in (16, 64, 128, 512):
                shape = (name, block_q, block_k, dim, dim, itemsize, limits)
                launches = parts.candidates(*shape)
                assert launches[0] == parts.choose_launch(*shape) and len(set(launches)) == len(launches)
                for launch in launches:
                    assert block_q % launch.queries == 0 and block_k % launch.keys == 0
                    assert min(launch.queries, launch.keys) >= 16 and launch.stages >= 1 and launch.warps in (4, 8)
                    fits = parts.shared_bytes(name, launch, dim, dim, itemsize, limits) <= limits.shared
                    # By the estimate float32 at dim 256 has no room on ROCm; the smallest launch is tried then.
                    assert fits or launch == common.Launch(16, 16, 4, 1)


def test_hopper_takes_larger_pieces_than_ada() -> None:
    h100, ada = (parts.choose_launch("forward", 128, 128, 128, 128, 2, LIMITS[n]) for n in ("h100", "ada"))
    assert h100.queries * h100.keys > ada.queries * ada.keys


def test_smaller_launches_end() -> None:
    launch, seen = common.Launch(128, 128, 8, 3), []
    while launch is not None:
        seen.append(launch)
        launch = parts.smaller(launch)
    assert len(set(seen)) == len(seen) and seen[-1] == common.Launch(16, 16, 4, 1)


@pytest.fixture
def as_if_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "runs_interpreted", lambda: False)
    monkeypatch.setattr(parts, "limits_of", lambda _: LIMITS["h100"])
    monkeypatch.setattr(parts.torch.cuda, "get_device_name", lambda _: "a GPU")
    monkeypatch.setattr(parts, "_KNOWN", {})


@pytest.mark.usefixtures("as_if_compiled")
def test_no_room_takes_a_smaller_launch_and_remembers_it(caplog: pytest.LogCaptureFixture) -> None:
    tried: list[Any] = []
    q, _, v = tiny()

    def run(launch: Any) -> None:
        tried.append(launch)
        if len(tried) < 3:
            raise parts.OutOfResources(300_000, 232_448, "shared memory")

    pattern = random_pattern(128, 128, block_q=128, block_k=128)
    for _ in range(2):
        parts.launched("forward", pattern, q, v, run)
    assert len(tried) == 4 and tried[2] == tried[3] and tried[0] != tried[2]
    assert caplog.text.count("no room") == 2


@pytest.mark.usefixtures("as_if_compiled")
def test_no_room_at_all_raises() -> None:
    def run(launch: Any) -> None:
        raise parts.OutOfResources(300_000, 232_448, "shared memory")

    q, _, v = tiny()
    with pytest.raises(parts.OutOfResources):
        parts.launched("forward", random_pattern(32, 32), q, v, run)


@pytest.mark.parametrize(
    ("entry", "used"),
    [
        ({"queries": 32, "keys": 16, "warps": 4, "stages": 5}, True),
        ({"queries": 48, "keys": 16, "warps": 4, "stages": 5}, False),
        ({"queries": 8, "keys": 16, "warps": 4, "stages": 5}, False),
        ({"queries": 32}, False),
    ],
    ids=["fits", "does_not_divide", "too_small", "of_another_form"],
)
@pytest.mark.usefixtures("as_if_compiled")
def test_a_tuned_launch_is_taken_where_it_fits(
    entry: dict[str, int], used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def lookup(*args: str) -> dict[str, int]:
        asked.append(args)
        return entry

    monkeypatch.setattr(parts.tuning, "lookup", lookup)
    q, _, v = tiny(dim=40, value_dim=7)
    taken: list[Any] = []
    for _ in range(2):
        parts.launched("keys", random_pattern(32, 32), q, v, taken.append)
    assert (taken[0] == common.Launch(32, 16, 4, 5)) is used
    assert asked == [("a GPU", parts.software(), "keys", "float32, dim 64, value dim 16, blocks 32 x 32")]


class Calls(TorchDispatchMode):
    """Names of torch's operators that run, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view:
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def _recorded(*lengths: int, calls: int = 1) -> tuple[list[str], list[list[str]]]:
    """A forward and backward at these lengths on a GPU that is not there: Triton's kernels are not run.

    Returns what Triton would compile anew for, one text per kernel of all calls, and torch's operators of each call.
    """
    seen, operators = [], []
    pattern = random_pattern(*lengths, block_q=16, block_k=16, columns=3, q_order=(1, 1), kv_order=(1, 1))
    pattern = replace(pattern, kv_range=torch.tensor([[0, lengths[1]]], dtype=torch.int32))
    q, k, v = random_inputs(pattern, heads=2, kv_heads=1, dim=16)

    from triton.backends.nvidia.compiler import CUDABackend

    target = CUDABackend(triton.backends.compiler.GPUTarget("cuda", 90, 32))

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        binder = triton.runtime.jit.create_function_from_signature(self.signature, self.params, target)
        seen.append(f"{self.__name__} {binder(*args, **options)[1]}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.JITFunction, "run", record)
        patch.setattr(parts, "limits_of", lambda _: LIMITS["h100"])
        patch.setattr(parts.torch.cuda, "get_device_name", lambda _: "a GPU")
        for _ in range(calls):
            with Calls() as found:
                out, lse = kernel.TritonBlockSparse.forward(q, k, v, pattern, 0.3, 0.0)
                kernel.TritonBlockSparse.backward(out, lse, q, k, v, out, lse, pattern, 0.3, 0.0)
            operators.append(found.names)
    return seen, operators


@pytest.mark.skipif(parts.runs_interpreted(), reason="the interpreter compiles nothing")
def test_no_length_compiles_a_kernel_anew() -> None:
    """Lengths of 1, of a multiple of 16 and of neither: Triton's key of a compiled kernel is the same."""
    first, _ = _recorded(100, 100)
    assert len(first) == 7
    for lengths in ((16, 16), (1, 16), (160, 320), (77, 1000), (1, 1)):
        assert _recorded(*lengths)[0] == first


@pytest.mark.skipif(parts.runs_interpreted(), reason="the interpreter compiles nothing")
def test_nobody_waits_for_the_gpu() -> None:
    """No operator whose result the host reads; and of a pattern seen before only its outputs are allocated."""
    _, (new, known) = _recorded(100, 200, calls=2)
    waits = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::_unique2", "aten::is_nonzero"}
    assert not waits & {*new, *known}
    # With columns, orders and a range; most of it is the transposition, which only a backward pays.
    assert len(new) < 115, new
    assert {name.partition(".")[0] for name in known} <= {"aten::empty", "aten::empty_like", "aten::new_empty",
                                                          "aten::_to_copy"}, known  # fmt: skip
    assert len(known) < 12


TARGETS = {
    "sm_80": ("cuda", 80, 32, LIMITS["a100"]),
    "sm_89": ("cuda", 89, 32, LIMITS["ada"]),
    "sm_90": ("cuda", 90, 32, LIMITS["h100"]),
    "gfx942": ("hip", "gfx942", 64, LIMITS["rocm"]),
}


@pytest.mark.skipif(parts.runs_interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("name", "target", "dtype", "dim", "features"),
    [
        pytest.param("forward", "sm_90", "bf16", 128, False, id="forward_h100_bfloat16"),
        pytest.param("queries", "sm_90", "bf16", 128, False, id="queries_h100_bfloat16", marks=pytest.mark.slow),
        pytest.param("keys", "sm_90", "bf16", 128, False, id="keys_h100_bfloat16", marks=pytest.mark.slow),
        pytest.param(
            "forward", "sm_89", "fp16", 64, True, id="forward_ada_float16_all_features", marks=pytest.mark.slow
        ),
        pytest.param("queries", "sm_80", "fp32", 64, False, id="queries_a100_float32", marks=pytest.mark.slow),
        pytest.param("keys", "sm_80", "bf16", 64, True, id="keys_a100_bfloat16_all_features"),
        pytest.param("forward", "gfx942", "fp16", 64, False, id="forward_mi300_float16", marks=pytest.mark.slow),
        pytest.param("keys", "gfx942", "fp16", 64, False, id="keys_mi300_float16", marks=pytest.mark.slow),
    ],
)
def test_compiles_without_a_gpu(name: str, target: str, dtype: str, dim: int, features: bool) -> None:
    """Down to machine code by Triton's own assemblers; says nothing about speed."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hf_sparse_attn.kernels.triton_block_sparse_backward import _keys
    from hf_sparse_attn.kernels.triton_block_sparse_rows import _rows

    kind, arch, warp, limits = TARGETS[target]
    function = _keys if name == "keys" else _rows
    absent = {"forward": ("grad", "delta", "base2", "g_batch", "g_head", "g_token", "g_dim"), "queries": ("lse",)}
    names = function.arg_names
    launch = parts.choose_launch(name, 128, 128, dim, dim, 4 if dtype == "fp32" else 2, limits)
    constants: dict[str, Any] = {
        "DIM": dim, "DIM_PAD": dim, "VALUE_DIM": dim, "VALUE_PAD": dim, "BLOCK_Q": 128, "BLOCK_K": 128,
        "M": min(launch.queries, 64) if name == "keys" else launch.queries, "N": launch.keys, "UPCAST": False,
        "WIDE": False, "STAGES": parts.masked_stages(launch), "COLUMNS": False, "ADD": features,
        **dict.fromkeys(("q_dim", "k_dim", "v_dim", "g_dim", "out_dim", "dk_dim", "dv_dim"), 1),
        **dict.fromkeys(("HAS_COLUMNS", "HAS_Q_ORDER", "HAS_KV_ORDER", "HAS_RANGE", "HAS_CAP"), features),
        **dict.fromkeys(absent.get(name, ())), "GRADIENT": name == "queries",
    }  # fmt: skip
    constants = {n: value for n, value in constants.items() if n in names}
    types = {
        **dict.fromkeys(("q", "k", "v", "out", "grad", "dk", "dv"), f"*{dtype}"),
        **dict.fromkeys(("lse", "delta", "base2"), "*fp32"), **dict.fromkeys(("factor", "cap", "scale"), "fp32"),
        **dict.fromkeys(("indptr", "column_indptr", "q_order", "kv_order", "lists", "ends", "bits", "places",
                         "readers_of"), "*i64"),
        **dict.fromkeys(("starts", "tile_ids", "columns", "kv_range", "order", "wholes", "items", "used"), "*i32"),
        **dict.fromkeys(("tiles", "read"), "*u8"),
    }  # fmt: skip
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    aligned = [
        i
        for i, n in enumerate(names)
        if signature[n].startswith("*")
        or (signature[n] == "i32" and n not in common.LENGTHS and n.endswith(("_batch", "_head", "_token")))
    ]
    source = ASTSource(function, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    built = triton.compile(source, target=GPUTarget(kind, arch, warp), options=options)
    assert built.metadata.shared <= limits.shared


# ---- on a GPU


@gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", [*CASES.values(), *BIG.values()], ids=[*CASES, *BIG])
def test_compiled_matches_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v, pattern = make({**case, "inputs": {**case.get("inputs", {}), "dtype": dtype}})
    on_gpu, there = [x.cuda() for x in (q, k, v)], pattern.to("cuda")
    assert why_not(*on_gpu, there) is None
    with poisoned():
        first, second = (kernel.TritonBlockSparse.attention(*on_gpu, there, 0.3) for _ in range(2))
    expected(q, k, v, pattern, 0.3).check(*first)
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


@gpu
@no_gpu
@pytest.mark.parametrize("name", ["tiles", "all", "padded_batch_in_order"])
def test_compiled_unread_keys_do_not_matter(name: str) -> None:
    q, k, v, pattern = make({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(pattern, q, k)[..., None]
    dirty = [q, k.masked_fill(nobody, torch.nan), v.masked_fill(nobody, torch.nan)]
    runs = [
        kernel.TritonBlockSparse.attention(*(x.cuda() for x in inputs), pattern.to("cuda"), 0.3)
        for inputs in ([q, k, v], dirty)
    ]
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])
