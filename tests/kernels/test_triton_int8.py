"""The 8-bit kernel against plain torch that rounds alike, and how far that is from exact attention."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn import backend
from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import Expected, expected, random_inputs, random_pattern

pytest.importorskip("triton", reason="needs the package triton")
from hf_sparse_attn.kernels import triton_common as common
from hf_sparse_attn.kernels import triton_int8 as kernel
from tests.support.triton_testing import (
    BIG,
    TARGETS,
    Recorder,
    compile_for,
    equal,
    expected_capped,
    gpu,
    make,
    no_gpu,
    poisoned,
)
from tests.support.triton_testing import (
    CASES as triton_cases,
)

Outputs = tuple[Tensor, Tensor]
Quantised = tuple[Tensor, Tensor, Tensor]
Attention = Callable[..., Outputs]

# In 16 bits: what is float32 in the others is float16 here.
CASES: dict[str, dict[str, Any]] = {
    **{
        name: case
        for name, case in triton_cases.items()
        if not name.startswith(("float16", "blocks_16_by", "grouped"))
    },
    "blocks_16_by_64": {"q_len": 40, "kv_len": 130, "block_q": 16, "block_k": 64, "columns": 20},
    "grouped_8_to_1": {"q_len": 63, "kv_len": 63, "columns": 5, "inputs": {"heads": 8, "kv_heads": 1}},
    **{f"dim_{dim}": {"q_len": 40, "kv_len": 70, "columns": 5, "inputs": {"dim": dim}} for dim in (96, 128, 256)},
}

half = partial(make, dtype=torch.float16)


def _run_in_worker(payload: bytes) -> bytes:
    """Runs in the process that interprets: (q, k, v, pattern, scale, softcap, pieces) -> (out, lse), both pickled."""
    q, k, v, pattern, scale, softcap, pieces = pickle.loads(payload)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if pieces:
            patch.setattr(kernel, "_launch", lambda *_: kernel.Launch(*pieces, 4, 1))
        return pickle.dumps(kernel.TritonInt8.attention(q, k, v, pattern, scale, softcap))


def _quantise_in_worker(payload: bytes) -> bytes:
    with poisoned():
        return pickle.dumps(kernel.quantise_keys(*pickle.loads(payload)))


def _far_tokens_in_worker() -> str:
    """Keys and values more than 2**31 elements apart in memory (touched only where they are), and close ones."""
    tokens, stride = 40, 60_000_000
    pattern = random_pattern(16, tokens, block_q=16, block_k=16, keep=1.0, columns=3)
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    try:
        far = torch.empty(tokens * stride, dtype=torch.float16).as_strided(k.shape, (0, 0, stride, 1))
    except RuntimeError as error:
        return f"no memory to address: {error}"
    results = [kernel.TritonInt8.attention(q, k, v, pattern, 0.25)]
    far.copy_(k)
    results.append(kernel.TritonInt8.attention(q, far, v, pattern, 0.25))
    far.copy_(v)
    results.append(kernel.TritonInt8.attention(q, k, far, pattern, 0.25))
    return "equal" if all(equal(results[0], other) for other in results[1:]) else "differ"


@pytest.fixture(scope="module")
def interpreted(interpreter: ProcessPoolExecutor) -> Attention:
    """TritonInt8.attention, interpreted; `pieces` sets how many queries and keys the kernel takes at a time."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0,
        pieces: tuple[int, int] | None = None,
    ) -> Outputs:  # fmt: skip
        payload = pickle.dumps((q, k, v, pattern, scale, softcap, pieces))
        return pickle.loads(interpreter.submit(_run_in_worker, payload).result())  # type: ignore[no-any-return]

    return attention


@pytest.fixture(scope="module")
def quantised(interpreter: ProcessPoolExecutor) -> Callable[..., Quantised]:
    """kernel.quantise_keys, interpreted."""

    def quantise(k: Tensor, kv_range: Tensor | None = None) -> Quantised:
        payload = pickle.dumps((k, kv_range))
        return pickle.loads(interpreter.submit(_quantise_in_worker, payload).result())  # type: ignore[no-any-return]

    return quantise


# ---- the same rounding in plain torch


def rounded(x: Tensor) -> tuple[Tensor, Tensor]:
    """int8 rows of a float32 tensor, and the step of each."""
    largest = x.abs().amax(-1)
    largest = torch.where(largest > 1e-30, largest, 127.0)
    # torch makes 127 / largest of the reciprocal of `largest`: rounded twice.
    per_unit = torch.full_like(largest, 127.0) / largest
    return torch.floor(x * per_unit[..., None] + 0.5).to(torch.int8), largest / 127


def mean_key(k: Tensor, kv_range: Tensor | None = None) -> Tensor:
    """Mean of the valid keys, float64 [batch, kv_heads, dim]."""
    places = torch.arange(k.shape[2])
    ranges = [(0, k.shape[2])] * len(k) if kv_range is None else kv_range.expand(len(k), 2).tolist()
    return torch.stack(
        [x[:, (places >= low) & (places < high)].double().sum(1) / max(high - low, 1)
         for x, (low, high) in zip(k, ranges, strict=True)]
    )  # fmt: skip


def as_rounded(
    q: Tensor, k: Tensor, scale: float, mean: Tensor | None, kv_range: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose plain products are the logits of the 8-bit kernel, float32.

    Args:
        mean: float32 [batch, kv_heads, dim], the mean key to take off; None takes off nothing.

    Returns:
        [batch, heads, q_len, dim + 1] and [batch, kv_heads, kv_len, dim + 1]; the last place of a query holds what the
        mean key adds to its logits.
    """
    mean = torch.zeros(*k.shape[:2], k.shape[3]) if mean is None else mean
    scaled = q.float() * torch.tensor(scale * common.LOG2E)
    group = q.shape[1] // k.shape[1]
    offset = (scaled * mean.repeat_interleave(group, 1)[:, :, None]).sum(-1, keepdim=True)
    queries, query_steps = rounded(scaled)
    keys, key_steps = rounded(k.float() - mean[:, :, None])
    ln2 = 0.6931471805599453
    return (
        torch.cat([queries.float() * query_steps[..., None], offset], -1) * ln2,
        torch.cat([keys.float() * key_steps[..., None], torch.ones_like(key_steps)[..., None]], -1),
    )


def as_expected(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, quantise: Callable[..., Quantised],
    softcap: float = 0.0,
) -> Expected:  # fmt: skip
    """What the kernel must give: exact attention over the rounded queries and keys.

    The mean is the kernel's own, for the last bit of a mean decides how a key on the border of two steps is rounded.
    """
    mean = quantise(k, pattern.kv_range)[2][..., : k.shape[3]]
    queries, keys = as_rounded(q, k, scale, mean)
    if softcap:
        return expected_capped(queries, keys, v, pattern, 1.0, softcap)
    return expected(queries, keys, v, pattern, 1.0)


# ---- keys in 8 bits


@pytest.mark.parametrize(
    ("tokens", "dim", "dtype", "kv_range"),
    [(1, 7, torch.float16, None), (63, 80, torch.bfloat16, None), (2100, 32, torch.float16, None),
     (1111, 40, torch.float16, [(3, 1050), (1111, 1111)])],
    ids=["one_key", "bfloat16_dim_80", "several_chunks", "range"],
)  # fmt: skip
def test_keys_are_rounded_to_the_nearest_step(
    tokens: int, dim: int, dtype: torch.dtype, kv_range: list[tuple[int, int]] | None, quantised: Any
) -> None:
    ranges = None if kv_range is None else torch.tensor(kv_range, dtype=torch.int32)
    pattern = random_pattern(1, tokens, block_q=1, block_k=tokens)
    _, k, _ = random_inputs(pattern, batch=2, heads=2, dim=dim, dtype=dtype)
    keys8, steps, mean = quantised(k + 3, ranges)
    exact = mean_key(k + 3, ranges)
    rough = 2 * tokens * torch.finfo(torch.float32).eps * float((k + 3).abs().max())
    assert (mean[..., :dim] - exact).abs().max() <= rough
    want, want_steps = rounded((k + 3).float() - mean[..., None, :dim])
    assert torch.equal(keys8[..., :dim], want) and torch.equal(steps, want_steps)
    assert keys8.shape[3] >= 32 and not keys8[..., dim:].any() and not mean[..., dim:].any()


def test_a_key_that_is_not_finite_spoils_only_itself(quantised: Any) -> None:
    k = torch.randn(1, 1, 100, 16).half()
    k[0, 0, 7, 3], k[0, 0, 70, 5] = torch.nan, torch.inf
    keys8, steps, mean = quantised(k)
    broken = torch.tensor([7, 70])
    others = torch.ones(100, dtype=torch.bool).index_fill(0, broken, False)
    assert steps[0, 0, broken].isnan().all() and not steps[0, 0, others].isnan().any()
    clean = quantised(k[:, :, others])
    assert torch.allclose(mean, clean[2], atol=1e-6)
    assert (keys8[:, :, others].int() - clean[0].int()).abs().max() <= 1


def test_equal_keys_need_no_steps(interpreted: Attention) -> None:
    """Keys less their mean are all 0, and so is every logit but for what the mean adds."""
    pattern = random_pattern(40, 70, keep=1.0, tiles=0)
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    k = k[:, :, :1].expand_as(k)
    expected(q, k, v, pattern, 0.3).check(*interpreted(q, k, v, pattern, 0.3))


# ---- against the same rounding


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matches_the_same_rounding(case: dict[str, Any], interpreted: Attention, quantised: Any) -> None:
    q, k, v, pattern = half(case)
    as_expected(q, k, v, pattern, 0.3, quantised).check(*interpreted(q, k, v, pattern, 0.3))


@pytest.mark.parametrize("case", ["aligned", "all"])
@pytest.mark.parametrize("pieces", [(16, 16), (32, 16), (16, 32)], ids=lambda p: f"{p[0]}_queries_{p[1]}_keys")
def test_blocks_cut_into_pieces(pieces: tuple[int, int], case: str, interpreted: Attention, quantised: Any) -> None:
    q, k, v, pattern = half(CASES[case])
    as_expected(q, k, v, pattern, 0.3, quantised).check(*interpreted(q, k, v, pattern, 0.3, 0.0, pieces))


@pytest.mark.parametrize("scale", [0.02, 0.3, 30.0])
def test_soft_cap(scale: float, interpreted: Attention, quantised: Any) -> None:
    """It bends the whole logits: what the mean key adds goes in before it."""
    q, k, v, pattern = half(CASES["columns"])
    k = k + 2
    want = as_expected(q, k, v, pattern, scale, quantised, 4.0)
    want.check(*interpreted(q, k, v, pattern, scale, 4.0))
    assert not equal(interpreted(q, k, v, pattern, scale), interpreted(q, k, v, pattern, scale, 4.0))


def test_large_logits_do_not_overflow(interpreted: Attention, quantised: Any) -> None:
    q, k, v, pattern = half(CASES["columns"])
    as_expected(q, k, v, pattern, 200.0, quantised).check(*interpreted(q, k, v, pattern, 200.0))


def test_any_strides(interpreted: Attention) -> None:
    """Inputs whose last dimension is not the dense one, or lies within others."""
    q, k, v, pattern = half(CASES["dim_40"])
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    within_nan = [torch.nn.functional.pad(x, (3, 50), value=torch.nan)[..., 3:43] for x in (q, k, v)]
    want = interpreted(q, k, v, pattern, 0.3)
    assert equal(want, interpreted(*apart, pattern, 0.3)) and equal(want, interpreted(*within_nan, pattern, 0.3))


def test_two_runs_give_the_same_bits(interpreted: Attention) -> None:
    q, k, v, pattern = half(CASES["all"])
    assert equal(*(interpreted(q, k, v, pattern, 0.3) for _ in range(2)))


def test_offsets_beyond_32_bits(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(_far_tokens_in_worker).result()
    if found.startswith("no memory"):
        pytest.skip(found)
    assert found == "equal"


# ---- how far it is from exact attention


def with_outliers(k: Tensor) -> Tensor:
    """The same keys with four channels far from 0 at every token, as models have them."""
    moved = torch.zeros(k.shape[3])
    moved[:: k.shape[3] // 4] = torch.tensor([20.0, -15.0, 25.0, -30.0])
    return (k.float() + moved).to(k.dtype)


def errors(out: Tensor, exact: Tensor) -> tuple[float, float, float, float]:
    """Relative L1 and L2, 1 - cosine, and the worst element over the largest."""
    out = out.double()
    far = out - exact
    cosine = (out * exact).sum() / out.norm() / exact.norm()
    found = far.abs().sum() / exact.abs().sum(), far.norm() / exact.norm(), 1 - cosine, far.abs().max()
    return float(found[0]), float(found[1]), float(found[2]), float(found[3] / exact.abs().max())


@pytest.mark.parametrize("outliers", [False, True], ids=["normal", "outlier_channels"])
@pytest.mark.parametrize("dim", [64, 128])
def test_error_is_as_documented(dim: int, outliers: bool, interpreted: Attention) -> None:
    """The figures of the docstring, by the kernel on few tokens; the log-sum-exp is the true one."""
    pattern = random_pattern(64, 500, block_q=64, block_k=64, keep=1.0, tiles=0, aligned=True)
    q, k, v = random_inputs(pattern, heads=2, dim=dim, dtype=torch.float16)
    k = with_outliers(k) if outliers else k
    exact, exact_lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, dim**-0.5)
    out, lse = interpreted(q, k, v, pattern, dim**-0.5)
    l1, l2, cosine, worst = errors(out, exact)
    assert l1 < 0.01 and l2 < 0.01 and cosine < 5e-5 and worst < kernel.TritonInt8.inexact
    assert (lse - exact_lse).abs().max() < 0.01
    # Without taking off the mean key: as good where there are no outliers, much worse where there are.
    queries, keys = as_rounded(q, k, dim**-0.5, None)
    plain = TorchReference.attention(queries, keys, v.float(), pattern, 1.0)[0]
    assert (0.06 < errors(plain, exact)[1] < 0.08) if outliers else errors(plain, exact)[1] < 0.01


# ---- what tokens may not do to one another


@pytest.mark.parametrize("garbage", [float("nan"), 1e4], ids=["nan", "large"])
@pytest.mark.parametrize("name", ["kv_range", "padded_batch", "padded_batch_in_order"])
def test_padding_does_not_matter(name: str, garbage: float, interpreted: Attention) -> None:
    q, k, v, pattern = half(CASES[name])
    places = torch.arange(k.shape[2])
    assert pattern.kv_range is not None
    padded = (places < pattern.kv_range[:, :1]) | (places >= pattern.kv_range[:, 1:])
    padded = padded[:, None, :, None]
    assert padded.any() and not padded.all()
    dirty = interpreted(q, k.masked_fill(padded, garbage), v.masked_fill(padded, garbage), pattern, 0.3)
    assert equal(interpreted(q, k, v, pattern, 0.3), dirty)


@pytest.mark.parametrize("name", ["tiles", "columns", "all"])
def test_unread_keys_need_not_be_finite(name: str, interpreted: Attention, quantised: Any) -> None:
    q, k, v, pattern = half({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = ~pattern.to_dense().any(2).expand(1, 2, -1).any(1, keepdim=True)[..., None]
    assert nobody.any() and not nobody.all()
    with_nan, with_inf = (
        interpreted(q, k.masked_fill(nobody, x), v.masked_fill(nobody, x), pattern, 0.3)
        for x in (torch.nan, torch.inf)
    )
    assert equal(with_nan, with_inf)
    mean = quantised(k.masked_fill(nobody, torch.nan), pattern.kv_range)[2][..., : k.shape[3]]
    expected(*as_rounded(q, k, 0.3, mean), v, pattern, 1.0).check(*with_nan)


def test_value_read_only_by_queries_that_do_not_exist(interpreted: Attention) -> None:
    """from_token_mask() lets the missing queries of a short tail row keep every key."""
    mask = torch.rand(1, 1, 40, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 50:] = False
    pattern = BlockPattern.from_token_mask(mask, 32, 32).validate()
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    clean = interpreted(q, k, v, pattern, 0.3)
    v[:, :, 50:] = torch.nan
    assert equal(clean, interpreted(q, k, v, pattern, 0.3))


def test_queries_of_a_strip_are_rounded_apart(interpreted: Attention) -> None:
    """A query that is not finite, and one that is large, change no bit of their neighbours."""
    q, k, v, pattern = half(CASES["unaligned"])
    dirty = q.clone()
    dirty[:, :, 5], dirty[:, :, 6] = torch.nan, 6e4
    clean, found = interpreted(q, k, v, pattern, 0.3), interpreted(dirty, k, v, pattern, 0.3)
    others = torch.ones(q.shape[2], dtype=torch.bool).index_fill(0, torch.tensor([5, 6]), False)
    assert equal(*((out[:, :, others], lse[:, :, others]) for out, lse in (clean, found)))
    assert found[0][:, :, 5].isnan().all()


def test_a_nan_key_reaches_its_readers_only(interpreted: Attention) -> None:
    mask = torch.ones(1, 1, 64, 64, dtype=torch.bool)
    mask[..., 5:, 40] = False
    pattern = BlockPattern.from_token_mask(mask, 32, 32).validate()
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    k[:, :, 40] = torch.nan
    out, lse = interpreted(q, k, v, pattern, 0.3)
    assert out[:, :, :5].isnan().all() and lse[:, :, :5].isnan().all()
    assert not out[:, :, 5:].isnan().any() and not lse[:, :, 5:].isnan().any()


# ---- what it refuses


def tiny(dim: int = 16, value_dim: int = 16, dtype: torch.dtype = torch.float16) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.zeros(1, 1, 32, d, dtype=dtype) for d in (dim, dim, value_dim))  # type: ignore[return-value]


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None = None, grad: bool = False) -> str | None:
    return kernel.TritonInt8.why_not(pattern, q, k, v, grad)


@pytest.mark.usefixtures("as_if_interpreted")
@pytest.mark.parametrize(
    ("inputs", "pattern", "grad", "reason"),
    [
        pytest.param({}, None, True, "forward only", id="gradient"),
        pytest.param({"dtype": torch.float32}, None, False, "needs float16 or bfloat16, got float32 (values are "
                     "multiplied in 16 bits)", id="float32"),
        pytest.param({"dim": 257}, None, False, "a dim from 1 to 256, got 257", id="dim"),
        pytest.param({"value_dim": 300}, None, False, "a value dim from 1 to 256, got 300", id="value_dim"),
        pytest.param({}, (8, 16), False, "`block_q` to be a power of two from 16 on, got 8", id="small_block"),
        pytest.param({}, (16, 48), False, "`block_k` to be a power of two from 16 on, got 48", id="odd_block"),
    ],
)  # fmt: skip
def test_refuses(inputs: dict[str, Any], pattern: tuple[int, int] | None, grad: bool, reason: str) -> None:
    blocks = pattern and random_pattern(32, 32, block_q=pattern[0], block_k=pattern[1])
    assert reason in str(why_not(*tiny(**inputs), blocks, grad))


def test_refuses_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "runs_interpreted", lambda: False)
    assert "needs a CUDA or ROCm GPU" in str(why_not(*tiny()))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    q: Any = SimpleNamespace(device=torch.device("cuda:0"), dtype=torch.float16)
    if torch.version.hip is None:
        assert "needs compute capability 8.0 or more, cuda:0 has 7.5" in str(why_not(q, q, q))


@pytest.mark.usefixtures("as_if_interpreted")
def test_takes_what_it_can_run() -> None:
    assert why_not(*tiny(), random_pattern(32, 32)) is None
    assert why_not(*tiny()) is None


def test_an_explicit_request_raises_with_the_reason() -> None:
    q, k, v = tiny(dtype=torch.float64)
    with pytest.raises(hsa.BackendUnavailable, match="'triton_int8' cannot run this call: needs a CUDA"):
        hsa.attention(q, k, v, BlockPattern.dense(32, 32, causal=False), backend="triton_int8")


@pytest.mark.parametrize("device", ["cpu", "cuda", "xpu", "mps"])
def test_auto_never_takes_it(device: str) -> None:
    assert "triton_int8" not in backend.auto_order(device)


def test_empty_batch_gives_an_empty_output() -> None:
    q, k, v = (x[:0] for x in tiny())
    out, lse = kernel.TritonInt8.attention(q, k, v, random_pattern(32, 32), 1.0)
    assert out.shape == (0, 1, 32, 16) and lse.shape == (0, 1, 32)


# ---- launching


def test_no_compile_per_length_and_nothing_asked_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data cannot be read: whoever asked for a length on the device would fail here."""
    recorders = {name: Recorder(getattr(kernel, name)) for name in ("_sum_keys", "_quantise_keys", "_attend")}
    for name, recorder in recorders.items():
        monkeypatch.setattr(kernel, name, recorder)
    for tokens in (1000, 1001, 4096):
        pattern = random_pattern(tokens, tokens, block_q=512, block_k=64, kv_order=(1, 1), kv_range=[(0, 500)])
        q, k, v = (x.to("meta") for x in random_inputs(pattern, heads=2, dtype=torch.float16))
        kernel.TritonInt8.attention(q, k, v, pattern.to("meta"), 0.3)
    for name, recorder in recorders.items():
        assert len(recorder.calls) == 3 and len({call["grid"] for call in recorder.calls}) >= 2, name
        lengths = common.LENGTHS if name == "_attend" else ["kv_heads", "kv_len", "chunks", "range_batch"]
        assert len(set(recorder.compiled_for(lengths))) == 1, name
        assert len(set(recorder.compiled_for([]))) > 1, name


@pytest.mark.parametrize("shared", [shared for _, shared in TARGETS.values()], ids=TARGETS)
@pytest.mark.parametrize("dim", [32, 64, 128, 256])
def test_launch_divides_the_blocks(dim: int, shared: int) -> None:
    for block_q in (16, 64, 128, 512):
        for block_k in (16, 64, 128, 512):
            launch = kernel.choose_launch(block_q, block_k, dim, dim, shared)
            assert block_q % launch.queries == 0 and block_k % launch.keys == 0
            assert min(launch.queries, launch.keys) >= 16 and launch.stages >= 2 and launch.warps in (4, 8)
            assert launch.queries * dim + (launch.stages - 1) * launch.keys * 3 * dim <= shared


_FLAGS = ("HAS_TILES", "HAS_COLUMNS", "HAS_Q_ORDER", "HAS_KV_ORDER", "HAS_RANGE", "HAS_CAP")
# What multiplies in 8 bits in the machine code or its assembler text.
_PRODUCTS = {"sm_90": ("ptx", "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8"),
             "sm_80": ("ptx", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
             "sm_89": ("ptx", "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"),
             "gfx942": ("amdgcn", "v_mfma_i32_32x32x16_i8")}  # fmt: skip


@pytest.mark.skipif(common.runs_interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("target", "dtype", "dim", "features"),
    [pytest.param("sm_90", "bf16", 128, False, id="h100_bfloat16_plain"),
     pytest.param("sm_80", "fp16", 64, False, id="a100_float16_plain", marks=pytest.mark.slow),
     pytest.param("sm_89", "fp16", 80, True, id="ada_float16_all_features", marks=pytest.mark.slow),
     pytest.param("gfx942", "bf16", 64, False, id="mi300_bfloat16_plain", marks=pytest.mark.slow)],
)  # fmt: skip
def test_compiles_without_a_gpu(target: str, dtype: str, dim: int, features: bool) -> None:
    pad = 128 if dim == 80 else dim
    launch = kernel.choose_launch(128, 128, pad, pad, TARGETS[target][1], int(features))
    sizes = {"DIM": dim, "DIM_PAD": pad}
    types = {
        **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"), "keys8": "*i8", "factor": "fp32", "cap": "fp32",
        **dict.fromkeys(("key_steps", "steps", "mean", "lse", "sums", "counts"), "*fp32"),
        **dict.fromkeys(("indptr", "column_indptr", "q_order", "kv_order"), "*i64"),
        **dict.fromkeys(("starts", "tile_ids", "columns", "kv_range"), "*i32"),
        **dict.fromkeys(("tiles", "read"), "*u8"),
    }  # fmt: skip
    constants = {
        **sizes, "VALUE_DIM": dim, "VALUE_PAD": pad, "BLOCK_Q": 128, "BLOCK_K": 128, "M": launch.queries,
        "N": launch.keys, "UPCAST": False, "q_dim": 1, "v_dim": 1, **dict.fromkeys(_FLAGS, features),
    }  # fmt: skip
    built = compile_for(kernel._attend, target, types, constants, launch.warps, launch.stages)
    text, product = _PRODUCTS[target]
    assert product in built.asm[text]
    taken = {**sizes, "TAKEN": kernel._TAKEN, "k_dim": 1}
    compile_for(kernel._quantise_keys, target, types, taken, 4, 3)
    summed = {**taken, "SUMMED": kernel._SUMMED, "HAS_RANGE": features}
    compile_for(kernel._sum_keys, target, types, summed, 4, 3)


# ---- on a GPU


@gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("case", [*CASES.values(), *BIG.values()], ids=[*CASES, *BIG])
def test_compiled_matches_exact_attention(case: dict[str, Any], dtype: torch.dtype) -> None:
    """A GPU fuses products and sums, so that a number on the border of two steps may fall to the other one: it is
    compared with exact attention, by twice the error of the same rounding in plain torch."""
    q, k, v, pattern = half({**case, "inputs": {**case.get("inputs", {}), "dtype": dtype}})
    on_gpu, there = [x.cuda() for x in (q, k, v)], pattern.to("cuda")
    assert why_not(*on_gpu, there) is None
    with poisoned():
        first, second = (kernel.TritonInt8.attention(*on_gpu, there, 0.3) for _ in range(2))
    assert equal(first, second)
    exact = expected(q, k, v, pattern, 0.3)
    queries, keys = as_rounded(q, k, 0.3, mean_key(k, pattern.kv_range).float())
    same = TorchReference.attention(queries, keys, v.float(), pattern, 1.0)
    some = exact.lse > -torch.inf
    far = (same[0] - exact.out).abs().amax(), (same[1] - exact.lse)[some].abs().sum()
    exact._replace(
        out_tolerance=exact.out_tolerance + 2 * float(far[0]), lse_tolerance=exact.lse_tolerance + 2 * float(far[1])
    ).check(*first)


@gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_compiled_keys(dtype: torch.dtype) -> None:
    k = torch.randn(2, 3, 2100, 80).to(dtype) + 3
    ranges = torch.tensor([[0, 2100], [7, 1500]], dtype=torch.int32)
    keys8, steps, mean = (x.cpu() for x in kernel.quantise_keys(k.cuda(), ranges.cuda()))
    want, want_steps = rounded(k.float() - mean[..., None, :80])
    assert torch.allclose(steps, want_steps, rtol=1e-6, atol=0)
    off = (keys8[..., :80].int() - want.int()).abs()
    assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    assert torch.allclose(mean[..., :80].double(), mean_key(k, ranges), atol=1e-4)
