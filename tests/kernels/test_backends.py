"""What every registered backend must do, against the float64 reference: a new file in kernels/ needs no test more."""

from __future__ import annotations

import pickle
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.dispatch import run_pattern
from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.registry import BACKENDS
from tests.support.backends import PROBLEMS, SHAPES, case
from tests.support.patterns import FEATURES, Largest, expected, random_inputs, random_pattern

pytestmark = pytest.mark.usefixtures("one_thread")

SCALE = 0.3
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# A compiler works for seconds at every new shape and type: these are fast in files of their own alone.
COMPILED = {"flex_attention"}
Problem = tuple[Tensor, Tensor, Tensor, BlockPattern, float]


EVERY = [pytest.param(name, marks=[pytest.mark.slow] * (name in COMPILED)) for name in BACKENDS.names()]


def _answer(name: str, problem: Problem, gradient: Tensor | None = None) -> str | list[Tensor]:
    """Why a backend cannot run a problem in this process; or output and log-sum-exp, and gradients if wanted."""
    *tensors, pattern, softcap = problem
    q, k, v = (x.detach().requires_grad_(gradient is not None) for x in tensors)
    reason = BACKENDS.get(name).why_not(pattern, q, k, v, gradient is not None, softcap)
    if reason is not None:
        assert reason and isinstance(reason, str)
        return reason
    out, lse = BACKENDS.get(name).attention(q, k, v, pattern, SCALE, softcap)
    assert out.dtype == q.dtype and lse.dtype == torch.promote_types(q.dtype, torch.float32)
    found = [out, lse] if gradient is None else [out, lse, *torch.autograd.grad(out, (q, k, v), gradient)]
    return [x.detach() for x in found]


def _interpreted(payload: bytes) -> bytes:
    return pickle.dumps(_answer(*pickle.loads(payload)))


@pytest.fixture
def answer(request: pytest.FixtureRequest) -> Any:
    """`_answer`, where it refuses the device asked again where Triton interprets."""

    def ask(name: str, problem: Problem, gradient: Tensor | None = None) -> str | list[Tensor]:
        found = _answer(name, problem, gradient)
        if not isinstance(found, str) or "Triton's interpreter" not in found:
            return found
        pool: ProcessPoolExecutor = request.getfixturevalue("interpreter")
        payload = pickle.dumps((name, problem, gradient))
        return pickle.loads(pool.submit(_interpreted, payload).result())  # type: ignore[no-any-return]

    return ask


def run(answer: Any, name: str, problem: Problem, gradient: Tensor | None = None) -> list[Tensor]:
    found = answer(name, problem, gradient)
    if isinstance(found, str):
        pytest.skip(found)
    return found  # type: ignore[no-any-return]


KNOWN: dict[str, torch.dtype] = {}


def first_dtype(answer: Any, name: str) -> torch.dtype:
    """The first of DTYPES that a backend takes."""
    for dtype in DTYPES if name not in KNOWN else ():
        pattern, tensors = small(dtype)
        if not isinstance(answer(name, (*tensors, pattern, 0.0)), str):
            KNOWN[name] = dtype
            break
    if name not in KNOWN:
        pytest.skip("it takes nothing on this machine")
    return KNOWN[name]


def small(
    dtype: torch.dtype, aligned: bool = True, **features: Any
) -> tuple[BlockPattern, tuple[Tensor, Tensor, Tensor]]:
    """Few tokens, grouped heads; aligned whole blocks are what every backend takes."""
    pattern = random_pattern(40, 70, aligned=aligned, tiles=features.pop("tiles", 0), **features)
    return pattern, random_inputs(pattern, heads=4, kv_heads=2, dim=16, dtype=dtype)


def check(name: str, found: list[Tensor], problem: Problem) -> None:
    """No further from float64 than a small multiple of plain torch; what is inexact by design, than it says."""
    q, k, v, pattern, softcap = problem
    inexact = getattr(BACKENDS.get(name), "inexact", 0.0)
    if softcap or inexact:
        want, want_lse = TorchReference.attention(q.double(), k.double(), v.double(), pattern, SCALE, softcap)
        low, low_lse = TorchReference.attention(q, k, v, pattern, SCALE, softcap)
        some = want_lse > -torch.inf
        assert torch.equal(found[1] > -torch.inf, some)
        for got, plain, exact in ((found[0], low, want), (found[1][some], low_lse[some], want_lse[some])):
            if exact.numel():
                rounding = float((plain - exact).abs().max()) + torch.finfo(plain.dtype).eps * float(exact.abs().max())
                allowed = 3 * rounding + inexact * float(exact.abs().max())
                assert float((got - exact).abs().max()) <= allowed
        return
    want = expected(q, k, v, pattern, SCALE)
    # Logarithms and exponentials of half precision are coarser in fused operators than in the reference.
    coarser = 1e-3 if q.dtype in (torch.float16, torch.bfloat16) else 0.0
    want._replace(lse_tolerance=want.lse_tolerance + coarser).check(found[0], found[1])


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("name", EVERY)
def test_every_feature_of_a_pattern(name: str, feature: str, answer: Any) -> None:
    dtype = first_dtype(answer, name)
    pattern, tensors = case("few", feature, dtype)
    problem = (*tensors, pattern, 0.0)
    check(name, run(answer, name, problem), problem)


@pytest.mark.parametrize("name", EVERY)
def test_one_pattern_for_all_heads(name: str, answer: Any) -> None:
    pattern, tensors = case("few", "all", first_dtype(answer, name), per_head=False)
    problem = (*tensors, pattern, 0.0)
    check(name, run(answer, name, problem), problem)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", EVERY)
def test_every_shape(name: str, shape: str, answer: Any) -> None:
    # All features at once where that is not refused.
    dtype = first_dtype(answer, name)
    for feature in ("all", "aligned_tiles"):
        pattern, tensors = case(shape, feature, dtype)
        if not isinstance(answer(name, (*tensors, pattern, 0.0)), str):
            break
    problem = (*tensors, pattern, 0.0)
    check(name, run(answer, name, problem), problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_every_dtype(name: str, dtype: torch.dtype, answer: Any) -> None:
    pattern, tensors = small(dtype, tiles=3)
    problem = (*tensors, pattern, 0.0)
    check(name, run(answer, name, problem), problem)


@pytest.mark.parametrize("name", EVERY)
def test_a_soft_cap_bends_the_logits_or_is_refused(name: str, answer: Any) -> None:
    pattern, (q, k, v) = small(first_dtype(answer, name))
    problem = (q * 3, k, v, pattern, 2.0)
    found = run(answer, name, problem)
    check(name, found, problem)
    assert not torch.equal(found[0], run(answer, name, (*problem[:-1], 0.0))[0])


@pytest.mark.parametrize("name", EVERY)
def test_gradients_are_those_of_the_reference_or_are_refused(name: str, answer: Any) -> None:
    dtype = first_dtype(answer, name)
    pattern, tensors = small(dtype, tiles=3)
    gradient = torch.randn(1, 4, 40, 16, generator=torch.Generator().manual_seed(1)).to(dtype)
    found = run(answer, name, (*tensors, pattern, 0.0), gradient)
    exact = _answer("torch_reference", (*(x.double() for x in tensors), pattern, 0.0), gradient.double())
    low = _answer("torch_reference", (*tensors, pattern, 0.0), gradient)
    for got, plain, want in zip(found[2:], low[2:], exact[2:], strict=True):
        assert got.dtype == dtype and bool(want.any())
        eps = torch.finfo(dtype).eps * float(want.abs().max())
        assert float((got - want).abs().max()) <= 3 * max(float((plain - want).abs().max()), eps)


@pytest.mark.parametrize("shape, feature", [*PROBLEMS[: len(FEATURES)], ("wide_value", "all")])
@pytest.mark.parametrize("name", BACKENDS.names())
def test_gradients_in_float64_are_those_of_small_steps(name: str, shape: str, feature: str) -> None:
    pattern, tensors = case(shape, feature, torch.float64)
    small = [x[..., :5].clone().requires_grad_() for x in tensors]
    if reason := BACKENDS.get(name).why_not(pattern, *small, True):
        pytest.skip(reason)
    some = pattern.to_dense().any(-1).expand(small[0].shape[:3])

    def both(*given: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = BACKENDS.get(name).attention(*given, pattern, SCALE)
        return out, lse.masked_fill(~some, 0.0)

    assert torch.autograd.gradcheck(both, small, fast_mode=True)
    # Fused backwards run where the log-sum-exp is not used.
    assert torch.autograd.gradcheck(lambda *x: both(*x)[0], small, fast_mode=True)


@pytest.mark.parametrize("name", auto_order("cpu"))
@pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "causal"])
def test_no_tensor_grows_with_the_square_of_the_length(name: str, causal: bool) -> None:
    peaks = []
    for n in (1024, 4096):
        blocks = n // 64
        keep = torch.zeros(1, 1, blocks, blocks, dtype=torch.bool)
        keep.diagonal(0, 2, 3).fill_(True)
        keep[..., 0] = True
        pattern = BlockPattern.from_block_map(keep, 64, 64, n, n, causal)
        q, k, v = (x.requires_grad_() for x in random_inputs(pattern, heads=2, dim=16))
        if reason := BACKENDS.get(name).why_not(pattern, q, k, v, True):
            pytest.skip(reason)
        with Largest() as seen:
            run_pattern(q, k, v, pattern, SCALE, name)[0].sum().backward()
        peaks.append(seen.bytes)
    assert peaks[1] <= 4.5 * peaks[0]


UNREAD: dict[str, dict[str, Any]] = {
    "blocks": {"keep": 0.3},
    "range": {"kv_range": [(17, 60)]},
    "range_in_order": {"kv_range": [(17, 60)], "kv_order": (1, 1)},
}


@pytest.mark.parametrize("given", UNREAD.values(), ids=UNREAD)
@pytest.mark.parametrize("name", EVERY)
def test_keys_that_nobody_reads_change_no_bit(name: str, given: dict[str, Any], answer: Any) -> None:
    pattern, (q, k, v) = small(first_dtype(answer, name), seed=1, **given)
    nobody = ~pattern.to_dense().any(2).expand(1, 2, -1)[..., None]
    assert nobody.any() and not nobody.all()
    dirty = run(answer, name, (q, k.masked_fill(nobody, torch.nan), v.masked_fill(nobody, torch.nan), pattern, 0.0))
    # Keys are rounded by the mean of all in what is inexact.
    clean = run(answer, name, (q, k, v, pattern, 0.0)) if not hasattr(BACKENDS.get(name), "inexact") else dirty
    assert not any(bool(x.isnan().any()) for x in dirty)
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_two_runs_give_the_same_bits(name: str, answer: Any) -> None:
    pattern, tensors = small(first_dtype(answer, name))
    first, second = (run(answer, name, (*tensors, pattern, 0.0)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", BACKENDS.names())
def test_what_it_cannot_do_is_said_and_an_explicit_request_raises(name: str) -> None:
    """Nothing of a refused call is run; what is not refused is right by the tests above."""
    for dtype in (*DTYPES, torch.float8_e4m3fn):
        for features in ({}, {"aligned": False, "columns": 9}, {"kv_range": [(3, 50)]}, {"block_q": 8, "block_k": 48}):
            pattern, tensors = small(torch.float32, **features)
            tensors = tuple(x.to(dtype) for x in tensors)
            for softcap in (0.0, 2.0):
                reason = BACKENDS.get(name).why_not(pattern, *tensors, False, softcap)
                if reason is None:
                    continue
                assert reason.strip() == reason != ""
                with pytest.raises(hsa.BackendUnavailable) as raised:
                    hsa.attention(*tensors, pattern, backend=name, softcap=softcap)
                assert str(raised.value) == f"`backend` {name!r} cannot run this call: {reason}"


@pytest.mark.parametrize("name", BACKENDS.names())
def test_without_a_pattern_it_answers_for_device_and_sizes(name: str) -> None:
    _, tensors = small(torch.float32)
    for grad in (False, True):
        reason = BACKENDS.get(name).why_not(None, *tensors, grad)
        assert reason is None or reason
    on_meta = BACKENDS.get(name).why_not(None, *(x.to("meta") for x in tensors), False)
    assert on_meta is None or "meta" in on_meta


@pytest.mark.parametrize("name", BACKENDS.names())
def test_ranks_are_of_device_types(name: str) -> None:
    ranks = BACKENDS.get(name).auto_rank
    assert all(isinstance(rank, int) and device in ("cpu", "cuda", "xpu", "mps") for device, rank in ranks.items())
    for device in ("cpu", "cuda"):
        assert (name in auto_order(device)) == (device in ranks)
    order = auto_order("cuda")
    assert order == sorted(order, key=lambda n: (BACKENDS.get(n).auto_rank["cuda"], n))
