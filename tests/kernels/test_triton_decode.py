"""The decoding kernel against the reference: interpreted on any machine, compiled where there is a GPU."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import hf_sparse_attn as hsa
from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import FEATURES, expected, random_inputs, random_pattern

pytest.importorskip("triton", reason="needs the package triton")
from hf_sparse_attn.kernels import triton_common as common
from hf_sparse_attn.kernels import triton_decode as kernel
from tests.support.triton_testing import (
    TARGETS,
    Recorder,
    compile_for,
    equal,
    expected_capped,
    gpu,
    make,
    no_gpu,
    poisoned,
    unread,
)

Outputs = tuple[Tensor, Tensor]
Attention = Callable[..., Outputs]

_EIGHT_TO_ONE = {"heads": 8, "kv_heads": 1}
# Arguments of random_pattern() and, under "inputs", of random_inputs().
CASES: dict[str, dict[str, Any]] = {
    **{name: {"q_len": 20, "kv_len": 79, "block_q": 8, **feature} for name, feature in FEATURES.items()},
    "one_token": {"q_len": 1, "kv_len": 1, "block_q": 1, "keep": 1.0, "tiles": 0, "aligned": True},
    "one_query": {"q_len": 1, "kv_len": 1000, "block_q": 1, "columns": 5, "inputs": _EIGHT_TO_ONE},
    "one_query_of_a_row_of_128": {"q_len": 1, "kv_len": 130, "block_q": 128, "block_k": 64, "columns": 30},
    "rows_of_one": {"q_len": 3, "kv_len": 63, "block_q": 1, "block_k": 16, "columns": 5},
    "rows_of_three": {"q_len": 7, "kv_len": 63, "block_q": 3, "columns": 20, "q_order": (1, 1)},
    "blocks_of_1": {"q_len": 2, "kv_len": 111, "block_q": 2, "block_k": 1, "tiles": 2},
    "blocks_of_7": {"q_len": 2, "kv_len": 111, "block_q": 2, "block_k": 7, "keep": 0.9, "columns": 20},
    "blocks_of_48": {"q_len": 2, "kv_len": 200, "block_q": 2, "block_k": 48, "keep": 0.9, "columns": 20},
    "blocks_of_64": {"q_len": 2, "kv_len": 300, "block_q": 2, "block_k": 64, "keep": 0.9, "columns": 20},
    "queries_63_in_strips": {"q_len": 63, "kv_len": 63, "block_q": 64, "columns": 5},
    "grouped_8_to_1": {"q_len": 3, "kv_len": 63, "block_q": 4, "columns": 9, "inputs": _EIGHT_TO_ONE},
    "grouped_8_to_1_own_lists": {"q_len": 3, "kv_len": 63, "block_q": 4, "columns": 9, "heads": 8,
                                 "q_order": (1, 8), "kv_order": (1, 8), "inputs": _EIGHT_TO_ONE},
    "grouped_6_to_2_own_orders": {"q_len": 3, "kv_len": 63, "block_q": 4, "columns": 9, "q_order": (1, 6),
                                  "kv_order": (1, 6), "heads": 6, "inputs": {"heads": 6, "kv_heads": 2}},
    "heads_differ": {"q_len": 5, "kv_len": 70, "batch": 2, "heads": 2, "columns": 5, "q_order": (2, 2),
                     "kv_order": (2, 2), "inputs": {"batch": 2, "kv_heads": 2}},
    "padded_batch": {"q_len": 5, "kv_len": 170, "batch": 2, "columns": 5, "kv_range": [(0, 45), (17, 170)],
                     "inputs": {"batch": 2}},
    "padded_batch_in_order": {"q_len": 5, "kv_len": 70, "columns": 5, "kv_order": (1, 2), "heads": 2,
                              "kv_range": [(0, 45), (70, 70)], "inputs": {"batch": 2, "kv_heads": 2}},
    **{f"dim_{dim}": {"q_len": 5, "kv_len": 70, "columns": 5, "inputs": {"dim": dim}} for dim in (40, 96, 128, 256)},
    "dim_80_value_dim_24": {"q_len": 5, "kv_len": 70, "columns": 5, "inputs": {"dim": 80, "value_dim": 24}},
    "dim_7_value_dim_1": {"q_len": 5, "kv_len": 70, "columns": 5, "inputs": {"dim": 7, "value_dim": 1}},
    "float16": {"q_len": 20, "kv_len": 70, "block_q": 16, **FEATURES["all"], "inputs": {"dtype": torch.float16}},
    "float16_unaligned": {"q_len": 5, "kv_len": 70, "inputs": {"dtype": torch.float16}},
    "bfloat16": {"q_len": 20, "kv_len": 70, "block_q": 16, **FEATURES["all"], "inputs": {"dtype": torch.bfloat16}},
    "bfloat16_unaligned": {"q_len": 5, "kv_len": 70, "inputs": {"dtype": torch.bfloat16}},
}  # fmt: skip


def _run_in_worker(payload: bytes) -> bytes:
    """Runs in the process that interprets: (q, k, v, pattern, scale, softcap, cut) -> (out, lse), both pickled."""
    q, k, v, pattern, scale, softcap, cut = pickle.loads(payload)
    with pytest.MonkeyPatch.context() as patch, poisoned():
        if cut:
            keys, splits = cut
            chosen = kernel._launch
            patch.setattr(kernel, "_launch", lambda *a: (chosen(*a)[0]._replace(keys=keys), 1))
            patch.setattr(kernel, "choose_splits", lambda *_: splits)
        return pickle.dumps(kernel.TritonDecode.attention(q, k, v, pattern, scale, softcap))


def _far_tokens_in_worker() -> str:
    """Keys more than 2**31 elements apart in memory (touched only where they are), compared with close ones."""
    tokens, stride = 40, 60_000_000
    pattern = random_pattern(1, tokens, block_q=1, block_k=16, keep=1.0, columns=3)
    q, k, v = random_inputs(pattern, dim=16, dtype=torch.float16)
    try:
        far = torch.empty(tokens * stride, dtype=torch.float16).as_strided(k.shape, (0, 0, stride, 1))
    except RuntimeError as error:
        return f"no memory to address: {error}"
    far.copy_(k)
    close, apart = (kernel.TritonDecode.attention(q, x, v, pattern, 0.25) for x in (k, far))
    return "equal" if torch.equal(close[0], apart[0]) and torch.equal(close[1], apart[1]) else "differ"


@pytest.fixture(scope="module")
def interpreted(interpreter: ProcessPoolExecutor) -> Attention:
    """TritonDecode.attention, interpreted; `cut` sets keys at a time and the number of splits."""

    def attention(
        q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern, scale: float, softcap: float = 0.0,
        cut: tuple[int, int] | None = None,
    ) -> Outputs:  # fmt: skip
        payload = pickle.dumps((q, k, v, pattern, scale, softcap, cut))
        return pickle.loads(interpreter.submit(_run_in_worker, payload).result())  # type: ignore[no-any-return]

    return attention


# ---- against the reference


@pytest.mark.parametrize("name", CASES)
def test_matches_reference(name: str, interpreted: Attention) -> None:
    """Once whole and once in three splits of short steps; whole, single features are checked in test_backends."""
    q, k, v, pattern = make(CASES[name])
    want = expected(q, k, v, pattern, 0.3)
    if name not in FEATURES:
        want.check(*interpreted(q, k, v, pattern, 0.3))
    want.check(*interpreted(q, k, v, pattern, 0.3, cut=(16, 3)))


@pytest.mark.parametrize("splits", [2, 27])
def test_any_number_of_splits(splits: int, interpreted: Attention) -> None:
    """More than the steps of a row, so that some are empty, and more than the merging kernel takes at a time."""
    q, k, v, pattern = make({"q_len": 2, "kv_len": 500, "block_q": 1, "columns": 40})
    assert len(pattern.starts) * 32 // 16 < 27 * pattern.rows
    expected(q, k, v, pattern, 0.3).check(*interpreted(q, k, v, pattern, 0.3, cut=(16, splits)))


@pytest.mark.parametrize("scale", [0.02, 0.3, 30.0])
def test_soft_cap(scale: float, interpreted: Attention) -> None:
    """Logits in the straight part, over the bend, and beyond it."""
    q, k, v, pattern = make(CASES["columns"])
    want = expected_capped(q, k, v, pattern, scale, 4.0)
    want.check(*interpreted(q, k, v, pattern, scale, 4.0))
    want.check(*interpreted(q, k, v, pattern, scale, 4.0, (16, 3)))
    assert not equal(interpreted(q, k, v, pattern, scale), interpreted(q, k, v, pattern, scale, 4.0))


@pytest.mark.parametrize("cut", [None, (16, 3)], ids=["whole", "split"])
def test_large_logits_do_not_overflow(cut: tuple[int, int] | None, interpreted: Attention) -> None:
    q, k, v, pattern = make(CASES["columns"])
    expected(q, k, v, pattern, 200.0).check(*interpreted(q, k, v, pattern, 200.0, cut=cut))


def test_any_strides(interpreted: Attention) -> None:
    """Inputs whose last dimension is not the dense one or lies within others, and an expanded pattern."""
    q, k, v, pattern = make(CASES["dim_40"])
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    within_nan = [torch.nn.functional.pad(x, (3, 50), value=torch.nan)[..., 3:43] for x in (q, k, v)]
    wide = replace(
        pattern,
        indptr=pattern.indptr.expand(1, 2, -1),
        column_indptr=pattern.column_indptr.expand(1, 2, -1),
        tiles=pattern.tiles.mT.contiguous().mT,
    )
    want = interpreted(q, k, v, pattern, 0.3, cut=(16, 3))
    assert equal(want, interpreted(*apart, wide, 0.3, cut=(16, 3)))
    assert equal(want, interpreted(*within_nan, pattern, 0.3, cut=(16, 3)))


def test_two_runs_give_the_same_bits(interpreted: Attention) -> None:
    q, k, v, pattern = make(CASES["all"])
    first, second = (interpreted(q, k, v, pattern, 0.3, cut=(16, 3)) for _ in range(2))
    assert equal(first, second)


def test_offsets_beyond_32_bits(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(_far_tokens_in_worker).result()
    if found.startswith("no memory"):
        pytest.skip(found)
    assert found == "equal"


@pytest.mark.parametrize("name", ["columns", "all", "padded_batch_in_order", "rows_of_three"])
def test_unread_keys_need_not_be_finite(name: str, interpreted: Attention) -> None:
    q, k, v, pattern = make({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(pattern, q, k)[..., None]
    assert nobody.any() and not nobody.all()
    clean = interpreted(q, k, v, pattern, 0.3)
    dirty = interpreted(q, k.masked_fill(nobody, torch.inf), v.masked_fill(nobody, torch.inf), pattern, 0.3)
    assert equal(clean, dirty)


def test_value_read_only_by_queries_that_do_not_exist(interpreted: Attention) -> None:
    """from_token_mask() lets the missing queries of a short tail row keep every key."""
    mask = torch.rand(1, 1, 20, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[..., 50:] = False
    pattern = BlockPattern.from_token_mask(mask, 16, 32).validate()
    q, k, v = random_inputs(pattern, dim=16)
    want = expected(q, k, v, pattern, 0.3)
    v[:, :, 50:] = torch.nan
    want.check(*interpreted(q, k, v, pattern, 0.3))


# ---- what it refuses


def tiny(
    dim: int = 16, value_dim: int = 16, dtype: torch.dtype = torch.float32, queries: int = 32
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((1, 1, queries, dim), (1, 1, 32, dim), (1, 1, 32, value_dim))
    return tuple(torch.zeros(shape, dtype=dtype) for shape in shapes)  # type: ignore[return-value]


def why_not(q: Tensor, k: Tensor, v: Tensor, pattern: BlockPattern | None = None, grad: bool = False) -> str | None:
    return kernel.TritonDecode.why_not(pattern, q, k, v, grad)


def test_refuses_the_cpu_where_not_interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "runs_interpreted", lambda: False)
    assert "needs a CUDA or ROCm GPU" in str(why_not(*tiny()))
    assert "on the CPU only Triton's interpreter" in str(why_not(*tiny()))


@pytest.mark.usefixtures("as_if_interpreted")
@pytest.mark.parametrize(
    ("inputs", "grad", "reason"),
    [
        pytest.param({"queries": 65}, False, "needs at most 64 queries, got 65", id="queries"),
        pytest.param({}, True, "forward only", id="gradient"),
        pytest.param({"dtype": torch.float64}, False, "float16, bfloat16 or float32, got float64", id="float64"),
        pytest.param({"dim": 257}, False, "a dim from 1 to 256, got 257", id="dim"),
        pytest.param({"value_dim": 300}, False, "a value dim from 1 to 256, got 300", id="value_dim"),
        pytest.param({"value_dim": 0}, False, "a value dim from 1 to 256, got 0", id="no_value"),
    ],
)
def test_refuses(inputs: dict[str, Any], grad: bool, reason: str) -> None:
    assert reason in str(why_not(*tiny(**inputs), None, grad))


@pytest.mark.usefixtures("as_if_interpreted")
def test_refuses_other_devices() -> None:
    q, k, v = tiny()
    assert "needs a CUDA or ROCm GPU, the tensors are on meta" in str(why_not(*(x.to("meta") for x in (q, k, v))))
    assert "`k` on cpu like `q`, it is on meta" in str(why_not(q, k.to("meta"), v))
    assert "`v` on cpu like `q`, it is on meta" in str(why_not(q, k, v.to("meta")))
    assert "`pattern` on cpu like `q`, it is on meta" in str(why_not(q, k, v, random_pattern(32, 32).to("meta")))


@pytest.mark.skipif(torch.version.hip is not None, reason="ROCm has no compute capability")
def test_refuses_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    monkeypatch.setattr(common, "runs_interpreted", lambda: False)
    q: Any = SimpleNamespace(device=torch.device("cuda:0"), shape=(1, 1, 1, 16))
    assert "needs compute capability 8.0 or more, cuda:0 has 7.5" in str(why_not(q, q, q))


@pytest.mark.usefixtures("as_if_interpreted")
def test_takes_what_it_can_run() -> None:
    assert why_not(*tiny(), random_pattern(32, 32, block_q=3, block_k=5)) is None
    assert why_not(*tiny(queries=64)) is None


def test_an_explicit_request_raises_with_the_reason() -> None:
    q, k, v = tiny(queries=65)
    with pytest.raises(hsa.BackendUnavailable, match="'triton_decode' cannot run this call: needs at most 64 queries"):
        hsa.attention(q, k, v, BlockPattern.dense(65, 32, causal=False), backend="triton_decode")


def test_auto_takes_it_for_decoding_on_a_gpu_only() -> None:
    order = auto_order("cuda")
    assert order.index("triton_decode") < order.index("triton_block_sparse")
    assert "triton_decode" not in auto_order("cpu")


def test_empty_batch_gives_an_empty_output() -> None:
    q, k, v = (x[:0] for x in tiny())
    out, lse = kernel.TritonDecode.attention(q, k, v, random_pattern(32, 32), 1.0)
    assert out.shape == (0, 1, 32, 16) and lse.shape == (0, 1, 32)


# ---- launching


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> tuple[Recorder, Recorder]:
    """The two kernels, written down as on a GPU of 132 multiprocessors."""
    attend, merge = Recorder(kernel._attend), Recorder(kernel._merge)
    monkeypatch.setattr(kernel, "_attend", attend)
    monkeypatch.setattr(kernel, "_merge", merge)
    chosen = kernel.choose_launch
    monkeypatch.setattr(
        kernel, "_launch", lambda lanes, d, vd, hops, q: (chosen(lanes, d, vd, q.element_size(), 232_448, hops), 132)
    )
    return attend, merge


def call(kv_len: int, heads: int = 8, own_lists: bool = False, device: str = "meta", **kwargs: Any) -> None:
    pattern = random_pattern(
        1, kv_len, block_q=1, block_k=64, keep=0.5, heads=heads if own_lists else 1, kv_order=(1, 1),
        kv_range=[(0, kv_len - 1)], **kwargs,
    )  # fmt: skip
    q, k, v = (x.to(device) for x in random_inputs(pattern, heads=heads, kv_heads=2, dtype=torch.float16))
    kernel.TritonDecode.attention(q, k, v, pattern.to(device), 0.3)


def test_nothing_is_asked_of_the_device(recorded: tuple[Recorder, Recorder]) -> None:
    """Tensors without data cannot be read: whoever asked for a length on the device would fail here."""
    call(5000, columns=9)
    assert len(recorded[0].calls) == len(recorded[1].calls) == 1


def test_heads_of_a_group_share_their_keys(recorded: tuple[Recorder, Recorder]) -> None:
    call(20_000)
    call(20_000, own_lists=True)
    shared, own = recorded[0].calls
    assert (shared["PACK"], own["PACK"]) == (4, 1)
    assert shared["grid"] == (2 * shared["splits"],) and own["grid"] == (8 * own["splits"],)
    assert shared["splits"] > own["splits"] > 1


def test_short_rows_are_not_split(recorded: tuple[Recorder, Recorder]) -> None:
    call(100)
    assert recorded[0].calls[0]["splits"] == 1 and not recorded[0].calls[0]["SPLIT"]
    assert not recorded[1].calls


def test_no_compile_per_length(recorded: tuple[Recorder, Recorder]) -> None:
    lengths = (5000, 5001, 5008, 8192)
    for kv_len in lengths:
        call(kv_len)
    attend, merge = recorded
    assert len({c["splits"] for c in attend.calls}) > 1
    assert len(set(attend.compiled_for(common.LENGTHS))) == 1
    assert len(set(merge.compiled_for(["splits", "spots"]))) == 1
    # What the two lists are for: without them there would be more.
    assert len(set(attend.compiled_for([]))) > 1


@pytest.mark.parametrize(
    ("units", "steps", "splits"),
    [(1, 1, 1), (1, 3, 1), (1, 100, 50), (8, 1000, 33), (264, 1000, 1), (1000, 1000, 1), (1, 10_000, 128)],
)
def test_splits(units: int, steps: int, splits: int) -> None:
    assert kernel.choose_splits(units, steps, 132) == splits


@pytest.mark.parametrize("shared", [shared for _, shared in TARGETS.values()], ids=TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4], ids=["half", "float32"])
@pytest.mark.parametrize("dim", [16, 64, 128, 256])
def test_launch_fits(dim: int, itemsize: int, shared: int) -> None:
    for lanes in (1, 8, 17, 64, 512):
        launch = kernel.choose_launch(lanes, dim, dim, itemsize, shared, 0)
        assert 16 <= launch.lanes <= 64 and 16 <= launch.keys <= 64
        assert launch.stages >= 2 and launch.warps in (4, 8)
        used = itemsize * (launch.lanes * dim + (launch.stages - 1) * launch.keys * 2 * dim)
        assert used <= shared // 2 or launch.keys == 16


_FLAGS = ("HAS_TILES", "HAS_COLUMNS", "HAS_Q_ORDER", "HAS_KV_ORDER", "HAS_RANGE", "HAS_CAP")


@pytest.mark.skipif(common.runs_interpreted(), reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    ("target", "dtype", "dim", "block_k", "features"),
    [pytest.param("sm_90", "bf16", 128, 64, False, id="h100_bfloat16_plain"),
     pytest.param("sm_80", "fp32", 64, 64, False, id="a100_float32_plain", marks=pytest.mark.slow),
     pytest.param("sm_89", "fp16", 80, 48, True, id="ada_float16_all_features", marks=pytest.mark.slow),
     pytest.param("gfx942", "bf16", 64, 16, True, id="mi300_bfloat16_all_features", marks=pytest.mark.slow)],
)  # fmt: skip
def test_compiles_without_a_gpu(target: str, dtype: str, dim: int, block_k: int, features: bool) -> None:
    pad = 128 if dim == 80 else dim
    hops = 2 * features
    launch = kernel.choose_launch(8, pad, pad, 4 if dtype == "fp32" else 2, TARGETS[target][1], hops)
    constants = {
        "DIM": dim, "DIM_PAD": pad, "VALUE_DIM": dim, "VALUE_PAD": pad, "BLOCK_K": block_k, "PACK": 8,
        "M": launch.lanes, "N": launch.keys, "SPLIT": True, "UPCAST": False, "q_dim": 1, "k_dim": 1, "v_dim": 1,
        **dict.fromkeys(_FLAGS, features),
    }  # fmt: skip
    types = {
        **dict.fromkeys(("q", "k", "v"), f"*{dtype}"), **dict.fromkeys(("out", "lse"), "*fp32"), "tiles": "*u8",
        **dict.fromkeys(("indptr", "column_indptr", "q_order", "kv_order"), "*i64"), "factor": "fp32", "cap": "fp32",
        **dict.fromkeys(("starts", "tile_ids", "columns", "kv_range"), "*i32"),
    }  # fmt: skip
    built = compile_for(kernel._attend, target, types, constants, launch.warps, launch.stages)
    if target == "sm_90":
        assert "mma.sync" in built.asm["ptx"] and "cp.async" in built.asm["ptx"]
    types = {"out": f"*{dtype}", **dict.fromkeys(("part", "part_lse", "lse"), "*fp32")}
    compile_for(kernel._merge, target, types, {"VALUE_DIM": dim, "VALUE_PAD": pad, "MERGED": kernel._MERGED}, 4, 2)


# ---- on a GPU

BIG: dict[str, dict[str, Any]] = {
    "cache_of_100000": {"q_len": 1, "kv_len": 100_000, "block_q": 1, "block_k": 64, "keep": 0.05, "columns": 100,
                        "inputs": {"heads": 32, "kv_heads": 8, "dim": 128}},
    "cache_of_30001_own_lists": {"q_len": 4, "kv_len": 30_001, "block_q": 4, "block_k": 128, "keep": 0.1, "heads": 8,
                                 "kv_range": [(100, 29_000)], "inputs": {"heads": 8, "kv_heads": 2, "dim": 256}},
    "queries_64": {"q_len": 64, "kv_len": 5000, "block_q": 64, "block_k": 48, "kv_order": (1, 1),
                   "inputs": {"heads": 16, "kv_heads": 2, "dim": 80}},
}  # fmt: skip


@gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", [*CASES.values(), *BIG.values()], ids=[*CASES, *BIG])
def test_compiled_matches_reference(case: dict[str, Any], dtype: torch.dtype) -> None:
    q, k, v, pattern = make({**case, "inputs": {**case.get("inputs", {}), "dtype": dtype}})
    on_gpu, there = [x.cuda() for x in (q, k, v)], pattern.to("cuda")
    assert why_not(*on_gpu, there) is None
    with poisoned():
        first, second = (kernel.TritonDecode.attention(*on_gpu, there, 0.3) for _ in range(2))
    expected(q, k, v, pattern, 0.3).check(*first)
    assert equal(first, second)


@gpu
@no_gpu
@pytest.mark.parametrize("splits", [2, 17, 40])
def test_compiled_in_splits(splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "choose_splits", lambda *_: splits)
    q, k, v, pattern = make(CASES["all"])
    with poisoned():
        out, lse = kernel.TritonDecode.attention(q.cuda(), k.cuda(), v.cuda(), pattern.to("cuda"), 0.3, 4.0)
    expected_capped(q, k, v, pattern, 0.3, 4.0).check(out, lse)


@gpu
@no_gpu
@pytest.mark.parametrize("name", ["tiles", "all", "padded_batch_in_order"])
def test_compiled_unread_keys_do_not_matter(name: str) -> None:
    q, k, v, pattern = make({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(pattern, q, k)[..., None]
    dirty = [q, k.masked_fill(nobody, torch.nan), v.masked_fill(nobody, torch.nan)]
    clean, poisoned_ = (
        kernel.TritonDecode.attention(*(x.cuda() for x in inputs), pattern.to("cuda"), 0.3)
        for inputs in ([q, k, v], dirty)
    )
    assert equal(clean, poisoned_)
