"""Gradients of the Triton kernels against autograd of the float64 reference, and what they plan for a pattern."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from hf_sparse_attn.cost import tuning
from hf_sparse_attn.kernels.torch_reference import TorchReference
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from tests.support.patterns import random_inputs, random_pattern
from tests.support.triton_testing import BIG, CASES, gpu, make, no_gpu, poisoned, unread

triton = pytest.importorskip("triton", reason="needs the package triton")
kernel = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse")
parts = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse_parts")
plan = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse_plan")
tuner = pytest.importorskip("hf_sparse_attn.kernels.triton_block_sparse_tune")

NAMES = ("out", "lse", "grad of q", "grad of k", "grad of v")
SCALE = 0.3


class Problem(NamedTuple):
    """Inputs of a forward and a backward; `grad_lse` may be None, and is 0 where a query has no key."""

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: BlockPattern
    softcap: float
    grad_out: Tensor
    grad_lse: Tensor | None


def problem(case: dict[str, Any], softcap: float = 0.0, lse: bool = True, seed: int = 0) -> Problem:
    q, k, v, pattern = make(case)
    draw = torch.Generator().manual_seed(seed)
    grad_out = torch.randn(*q.shape[:3], v.shape[3], generator=draw).to(q.dtype)
    some = pattern.to_dense().any(-1).expand(q.shape[:3])
    grad_lse = torch.randn(q.shape[:3], generator=draw) * some if lse else None
    return Problem(q, k, v, pattern, softcap, grad_out, grad_lse)


def by_kernel(p: Problem, device: str = "cpu") -> list[Tensor]:
    """Output, log-sum-exp and gradients of q, k, v through autograd, from memory that held NaN."""
    inputs = [x.detach().to(device).requires_grad_() for x in (p.q, p.k, p.v)]
    with poisoned():
        out, lse = kernel.TritonBlockSparse.attention(*inputs, p.pattern.to(device), SCALE, p.softcap)
        ends, starts = [out], [p.grad_out.to(device)]
        if p.grad_lse is not None:
            ends, starts = [*ends, lse], [*starts, p.grad_lse.to(device)]
        return [x.detach().cpu() for x in (out, lse, *torch.autograd.grad(ends, inputs, starts))]


def by_reference(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """The same by torch_reference, in float64, or as plain torch does it in the precision of the inputs."""
    inputs = [x.detach().to(dtype).requires_grad_() for x in (p.q, p.k, p.v)]
    out, lse = TorchReference.attention(*inputs, p.pattern, SCALE, p.softcap)
    total = (out * p.grad_out.to(out.dtype)).sum()
    if p.grad_lse is not None:
        total = total + (lse.masked_fill(lse == -torch.inf, 0.0) * p.grad_lse).sum()
    return [x.detach() for x in (out, lse, *torch.autograd.grad(total, inputs))]


def rounded(p: Problem, dtype: torch.dtype) -> list[Tensor]:
    """Gradients as dense attention computes them in half precision: weights and d(logit) rounded before a product."""
    group = p.q.shape[1] // p.k.shape[1]
    q, grad = p.q.float(), p.grad_out.float()
    k, v = (x.float().repeat_interleave(group, 1) for x in (p.k, p.v))
    logits, slope = q @ k.mT * SCALE, torch.tensor(SCALE)
    if p.softcap:
        bounded = torch.tanh(logits / p.softcap)
        logits, slope = bounded * p.softcap, SCALE * (1 - bounded * bounded)
    logits = logits.masked_fill(~p.pattern.to_dense(), -torch.inf)
    weight = logits.softmax(-1).nan_to_num()
    out = (weight.to(dtype).float() @ v).to(dtype)
    shift = (grad * out.float()).sum(-1, keepdim=True) - (0 if p.grad_lse is None else p.grad_lse[..., None])
    d = (weight * (grad @ v.mT - shift) * slope).to(dtype).float()
    heads = [x.unflatten(1, (-1, group)).sum(2) for x in (d.mT @ q, weight.to(dtype).float().mT @ grad)]
    return [out, logits.logsumexp(-1), *((d @ k).to(dtype), heads[0].to(dtype), heads[1].to(dtype))]


def check(found: list[Tensor], p: Problem, factor: float = 3.0) -> None:
    """No further from float64 than `factor` times plain torch in the same precision, or roundings of the largest.

    A weight is exp(logit - log-sum-exp) in float32: its relative error is the rounding of the exponent's terms.
    """
    exact = by_reference(p, torch.float64)
    low = by_reference(p, torch.float32) if p.q.dtype == torch.float32 else rounded(p, p.q.dtype)
    some = exact[1] > -torch.inf
    exponent = max(1.0, float((p.q.double().norm(dim=-1).max() * p.k.double().norm(dim=-1).max()) * SCALE))
    exponent = min(exponent, p.softcap + 10) if p.softcap else exponent
    assert torch.equal(found[1] > -torch.inf, some)
    for name, ours, theirs, want in zip(NAMES, found, low, exact, strict=True):
        if name == "lse":
            ours, theirs, want = (x.masked_fill(~some, 0.0) for x in (ours, theirs, want))
        assert ours.shape == want.shape and not ours.isnan().any(), name
        precision = torch.finfo(torch.float32 if name == "lse" else p.q.dtype).eps
        if name not in ("out", "lse"):
            precision = max(precision, exponent * torch.finfo(torch.float32).eps / 2)
        allowed = factor * max(float((theirs.double() - want).abs().max()), precision * float(want.abs().max()))
        assert float((ours.double() - want).abs().max()) <= allowed, name


def _in_worker(payload: bytes) -> bytes:
    """Runs in the process that interprets: (problem, queries and keys at a time or None) -> by_kernel()."""
    p, pieces = pickle.loads(payload)
    with ExitStack() as stack:
        for name in parts.KERNELS if pieces else ():
            stack.enter_context(parts.forced(name, parts.Launch(*pieces, 4, 1)))
        return pickle.dumps(by_kernel(p))


@pytest.fixture(scope="module")
def interpreted(interpreter: ProcessPoolExecutor) -> Callable[..., list[Tensor]]:
    def run(p: Problem, pieces: tuple[int, int] | None = None) -> list[Tensor]:
        found: list[Tensor] = pickle.loads(interpreter.submit(_in_worker, pickle.dumps((p, pieces))).result())
        return found

    return run


Run = Callable[..., list[Tensor]]

# Cases of the gradients beside those of the forward.
MORE: dict[str, dict[str, Any]] = {
    "grouped_8_to_1_own_rows": {"q_len": 40, "kv_len": 63, "heads": 8, "columns": 5,
                                "inputs": {"heads": 8, "kv_heads": 1, "dim": 16}},
    "grouped_with_an_order_for_each_head": {"q_len": 40, "kv_len": 63, "heads": 4, "columns": 5, "kv_order": (1, 4),
                                            "q_order": (1, 4), "inputs": {"heads": 4, "kv_heads": 2, "dim": 16}},
    "grouped_one_pattern_an_order_for_each_head": {"q_len": 40, "kv_len": 63, "columns": 5, "kv_order": (1, 4),
                                                   "inputs": {"heads": 4, "kv_heads": 2, "dim": 16}},
    "rows_of_very_different_lengths": {"q_len": 130, "kv_len": 63, "batch": 2, "heads": 2, "empty_rows": (0, 3),
                                       "keep": 0.9, "inputs": {"heads": 2, "kv_heads": 2, "batch": 2, "dim": 16}},
    "padded_batch_of_whole_blocks": {"q_len": 63, "kv_len": 70, "batch": 2, "aligned": True, "tiles": 0, "keep": 1.0,
                                     "kv_range": [(5, 45), (17, 17)], "inputs": {"batch": 2, "dim": 16}},
    "dim_96": {"q_len": 40, "kv_len": 40, "inputs": {"dim": 96, "value_dim": 64}},
    "dim_128": {"q_len": 40, "kv_len": 40, "inputs": {"dim": 128}},
    "dim_256": {"q_len": 40, "kv_len": 40, "inputs": {"dim": 256}},
    "queries_of_128": {"q_len": 150, "kv_len": 79, "block_q": 128, "keep": 0.9, "columns": 5, "inputs": {"dim": 16}},
}  # fmt: skip
ALL = {**CASES, **MORE}


# ---- against the reference


@pytest.mark.parametrize("case", ALL.values(), ids=ALL)
def test_gradients(case: dict[str, Any], interpreted: Run) -> None:
    p = problem(case)
    check(interpreted(p), p)


@pytest.mark.parametrize("name", ["tiles", "all", "grouped_4_to_1", "bfloat16", "empty_rows"])
def test_softcap(name: str, interpreted: Run) -> None:
    p = problem(ALL[name], softcap=1.5)
    check(interpreted(p), p)


def test_softcap_of_large_and_of_tiny_logits(interpreted: Run) -> None:
    """tanh at its ends: saturated logits, and such that its naive formula would cancel."""
    p = problem(CASES["columns"], softcap=20.0)
    for factor in (30.0, 1e-3):
        scaled = p._replace(q=p.q * factor)
        check(interpreted(scaled), scaled)


@pytest.mark.parametrize("name", ["aligned", "all"])
def test_without_a_gradient_of_the_log_sum_exp(name: str, interpreted: Run) -> None:
    p = problem(CASES[name], lse=False)
    check(interpreted(p), p)


@pytest.mark.parametrize("pieces", [(32, 16), (16, 32)], ids=lambda p: f"{p[0]}_queries_{p[1]}_keys")
@pytest.mark.parametrize("name", ["tiles", "all"])
def test_blocks_cut_into_pieces(pieces: tuple[int, int], name: str, interpreted: Run) -> None:
    p = problem({**CASES[name], "q_len": 63})
    check(interpreted(p, pieces), p)


@pytest.mark.parametrize("name", ["unaligned", "columns"])
def test_keys_cut_finer_than_blocks_of_64(name: str, interpreted: Run) -> None:
    """An unaligned block overlaps up to five tiles of 16 keys."""
    p = problem({**CASES[name], "block_q": 64, "block_k": 64, "kv_len": 100})
    check(interpreted(p, (32, 16)), p)


def test_two_runs_give_the_same_bits(interpreted: Run) -> None:
    p = problem(MORE["grouped_with_an_order_for_each_head"], softcap=2.0)
    assert all(torch.equal(a, b) for a, b in zip(interpreted(p), interpreted(p), strict=True))


def sweep(number: int) -> Problem:
    """A problem drawn by its number."""
    draw = torch.Generator().manual_seed(1000 + number)

    def one(*choices: Any) -> Any:
        return choices[int(torch.randint(len(choices), (), generator=draw))]

    kv_heads, group, batch = one(1, 2), one(1, 2, 4), one(1, 2)
    heads, q_len, kv_len = kv_heads * group, one(1, 17, 40, 63), one(1, 33, 64, 97)
    block_q = one(16, 32)
    lead = {"batch": one(1, batch), "heads": one(1, heads)}
    case = {
        "q_len": q_len, "kv_len": kv_len, "block_q": block_q, "block_k": one(16, 32), **lead, "keep": one(0.3, 0.9),
        "aligned": one(True, False), "tiles": one(0, 3), "columns": one(0, 0, 12), "seed": number,
        "q_order": one(None, (1, 1), (batch, heads)), "kv_order": one(None, (1, 1), (1, heads)),
        "empty_rows": one((), (0,)),
        "inputs": {"batch": batch, "heads": heads, "kv_heads": kv_heads, "dim": one(8, 16, 40),
                   "value_dim": one(None, 24), "dtype": one(torch.float32, torch.float16, torch.bfloat16)},
    }  # fmt: skip
    p = problem(case, softcap=one(0.0, 0.0, 2.0), lse=one(True, False), seed=number)
    if one(True, False):
        low = torch.randint(kv_len + 1, (batch, 2), generator=draw).sort(-1).values
        p = p._replace(pattern=p.pattern.with_kv_range(low))
    some = p.pattern.to_dense().any(-1).expand(p.q.shape[:3])
    return p if p.grad_lse is None else p._replace(grad_lse=p.grad_lse * some)


@pytest.mark.parametrize("number", range(8))
def test_random_sweep(number: int, interpreted: Run) -> None:
    p = sweep(number)
    check(interpreted(p), p)


# ---- what nobody reads


@pytest.mark.parametrize("name", ["tiles", "columns", "all", "padded_batch_in_order"])
def test_unread_keys_have_no_gradient_and_do_not_matter(name: str, interpreted: Run) -> None:
    p = problem({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(p.pattern, p.q, p.k)
    assert nobody.any() and not nobody.all()
    clean = interpreted(p)
    assert (clean[3][nobody] == 0).all() and (clean[4][nobody] == 0).all()
    fill = nobody[..., None]
    dirty = interpreted(p._replace(k=p.k.masked_fill(fill, torch.nan), v=p.v.masked_fill(fill, torch.nan)))
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


def test_queries_without_keys_do_not_matter(interpreted: Run) -> None:
    """Of a row that reads nothing, and of one whose tile or range leaves some queries nothing."""
    mask = torch.rand(1, 1, 70, 64, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[:, :, 3:9] = False
    mask[:, :, 32:64] = False
    pattern = BlockPattern.from_token_mask(mask, 32, 32).validate()
    q, k, v = random_inputs(pattern, dim=16)
    p = Problem(q, k, v, pattern, 0.0, torch.randn(q.shape), torch.zeros(q.shape[:3]))
    clean = interpreted(p)
    none = ~mask.any(-1)
    fill = none[..., None]
    dirty = interpreted(
        p._replace(
            q=q.masked_fill(fill, torch.nan),
            grad_out=p.grad_out.masked_fill(fill, torch.nan),
            grad_lse=p.grad_lse.masked_fill(none, torch.nan),
        )
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    assert (dirty[2][none] == 0).all()


def _far_in_worker() -> str:
    """Keys, values, queries and gradients more than 2**31 elements apart in memory, compared with close ones."""
    tokens, stride = 40, 80_000_000
    p = problem({"q_len": tokens, "kv_len": tokens, "block_q": 16, "block_k": 64, "columns": 3,
                 "inputs": {"heads": 1, "dim": 16, "dtype": torch.float16}})  # fmt: skip
    close = by_kernel(p)
    try:
        apart = [
            torch.empty(tokens * stride, dtype=torch.float16).as_strided(x.shape, (0, 0, stride, 1))
            for x in (p.q, p.k, p.v, p.grad_out)
        ]
    except RuntimeError as error:
        return f"no memory to address: {error}"
    for to, x in zip(apart, (p.q, p.k, p.v, p.grad_out), strict=True):
        to.copy_(x)
    q, k, v, grad = apart
    out, lse = kernel.TritonBlockSparse.forward(q, k, v, p.pattern, SCALE, 0.0)
    grads = kernel.TritonBlockSparse.backward(grad, p.grad_lse, q, k, v, out, lse, p.pattern, SCALE, 0.0)
    same = [torch.equal(a, b) for a, b in zip(close, (out, lse, *grads), strict=True)]
    return "equal" if all(same) else f"differ: {same}"


def test_offsets_beyond_32_bits(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(_far_in_worker).result()
    if found.startswith("no memory"):
        pytest.skip(found)
    assert found == "equal"


# ---- what is planned


def _plan_in_worker(payload: bytes) -> bytes:
    pattern, size, merged, columns = pickle.loads(payload)
    share = plan.Share(merged, 1, 1)
    walk = plan.columns_of(pattern, size, share) if columns else plan.keys_of(pattern, size, share)
    return pickle.dumps((tuple(plan.rows_of(pattern)), tuple(walk)))


@pytest.mark.parametrize("merged", [1, 2], ids=["a_list_for_each_head", "two_heads_in_a_list"])
@pytest.mark.parametrize(
    ("size", "q_len", "lead"), [(16, 70, (2, 4)), (32, 70, (2, 4)), (32, 4800, (1, 2))], ids=["16", "32", "long_lists"]
)
def test_transposed_blocks(
    size: int, q_len: int, lead: tuple[int, int], merged: int, interpreter: ProcessPoolExecutor
) -> None:
    """Every row that reads a tile of keys stands in its list once, whole readers first, rows in order."""
    pattern = random_pattern(q_len, 111, batch=lead[0], heads=lead[1])
    payload = pickle.dumps((pattern, size, merged, False))
    _, found = pickle.loads(interpreter.submit(_plan_in_worker, payload).result())
    walk = plan.Keys(*found)
    whole = replace(pattern, tiles=torch.ones_like(pattern.tiles))
    # Which row covers which key with any block, and which with a whole one.
    covered = whole.to_dense()[:, :, :: pattern.block_q]
    full = replace(pattern, tiles=(torch.arange(len(pattern.tiles)) == 0)[:, None, None].expand_as(pattern.tiles))
    full = full.to_dense()[:, :, :: pattern.block_q]
    for lead in range(pattern.batch * pattern.heads // merged):
        heads = covered.flatten(0, 1)[lead * merged : (lead + 1) * merged].flatten(0, 1)
        wholes = full.flatten(0, 1)[lead * merged : (lead + 1) * merged].flatten(0, 1)
        for tile in range(walk.tiles):
            keys, cell = slice(tile * size, (tile + 1) * size), lead * walk.tiles + tile
            begin, end, many = int(walk.lists[cell]), int(walk.ends[cell]), int(walk.wholes[cell])
            readers, all_of_it = heads[:, keys].any(1), wholes[:, keys].all(1)
            assert walk.items[0, begin : begin + many].tolist() == all_of_it.nonzero()[:, 0].tolist()
            assert walk.items[0, begin + many : end].tolist() == (readers & ~all_of_it).nonzero()[:, 0].tolist()
            assert int(walk.sizes[cell]) == end - begin


@pytest.mark.parametrize("merged", [1, 2], ids=["a_list_for_each_head", "two_heads_in_a_list"])
def test_transposed_columns(merged: int, interpreter: ProcessPoolExecutor) -> None:
    pattern = random_pattern(70, 111, heads=4, keep=0.1, columns=30)
    payload = pickle.dumps((pattern, 16, merged, True))
    _, found = pickle.loads(interpreter.submit(_plan_in_worker, payload).result())
    walk, seen = plan.Keys(*found), []
    for lead in range(4 // merged):
        places = walk.places[lead, : int(walk.used[lead])].tolist()
        assert places == sorted(set(places))
        for tile in range(walk.tiles):
            cell = lead * walk.tiles + tile
            for at in range(int(walk.lists[cell]), int(walk.ends[cell])):
                row, bits = int(walk.items[0, at]) + lead * merged * pattern.rows, int(walk.bits[at])
                seen += [(row, places[tile * 16 + b]) for b in range(16) if bits >> b & 1]
    counts = pattern.column_indptr.diff(dim=-1).flatten()
    rows = torch.repeat_interleave(torch.arange(len(counts)), counts)
    want = sorted(zip(rows.tolist(), pattern.columns.tolist(), strict=True))
    assert sorted(seen) == want


@pytest.mark.parametrize(
    "pattern",
    [
        random_pattern(70, 111, heads=2, keep=0.9, aligned=True),
        # More blocks in a row than are handled at a time.
        random_pattern(20, 4_800, keep=0.95, aligned=True),
    ],
    ids=["short_rows", "long_rows"],
)
def test_whole_blocks_stand_first(pattern: BlockPattern, interpreter: ProcessPoolExecutor) -> None:
    payload = pickle.dumps((pattern, 32, 1, False))
    found = plan.Rows(*pickle.loads(interpreter.submit(_plan_in_worker, payload).result())[0])
    mixed = 0
    for row in range(pattern.heads * pattern.rows):
        at = row + row // pattern.rows
        begin, end = pattern.indptr.flatten()[at : at + 2].tolist()
        ours = list(zip(pattern.starts[begin:end].tolist(), pattern.tile_ids[begin:end].tolist(), strict=True))
        whole = [x for x in ours if x[1] == 0 and x[0] + 32 <= pattern.kv_len]
        rest = [x for x in ours if x not in whole]
        theirs = list(zip(found.starts[begin:end].tolist(), found.tile_ids[begin:end].tolist(), strict=True))
        assert theirs == whole + rest[::-1] and int(found.wholes.flatten()[row]) == len(whole)
        mixed += bool(whole and rest)
    assert mixed


def test_readers_of_a_key_are_bits() -> None:
    tiles = torch.rand(3, 128, 32) < 0.5
    words = plan._readers_of(tiles)
    assert words.shape == (3, 32, 2)
    lane = torch.arange(128)
    assert torch.equal((words[:, :, lane // 64] >> (lane % 64) & 1).bool(), tiles.transpose(1, 2))
    assert plan._readers_of(tiles[:, :16]).shape == (3, 32, 1)


def test_longest_rows_start_first() -> None:
    pattern = random_pattern(200, 64)
    sizes = torch.tensor([[[3, 9, 5], [7, 1, 9]]], dtype=torch.int32)
    # Without a second-level cache every head is by itself.
    assert plan.schedule(pattern, "a", sizes, 1, 2, 1).tolist() == [1, 2, 0, 5, 3, 4]
    assert plan.schedule(pattern, "b", sizes[:, :1], 2, 2, 1).tolist() == [1, 2, 0, 4, 5, 3, 7, 8, 6, 10, 11, 9]


def test_heads_that_fit_the_cache_are_one_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_cache_bytes", lambda _: 4000)
    sizes = torch.tensor([[[3, 9, 5], [7, 1, 9], [2, 2, 8], [1, 1, 1]]], dtype=torch.int32)
    pattern = random_pattern(200, 64)
    assert plan.schedule(pattern, "a", sizes, 1, 4, 1000).tolist() == [1, 5, 3, 2, 0, 4, 8, 6, 7, 9, 10, 11]
    assert plan.schedule(pattern, "b", sizes, 1, 4, 10).tolist() == [1, 5, 8, 3, 2, 0, 6, 7, 4, 9, 10, 11]


def test_a_plan_is_made_once(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(_plans_are_kept).result()


def _plans_are_kept() -> bool:
    """Whether a second forward and backward of the same pattern plan nothing."""
    p = problem(CASES["columns"])
    by_kernel(p)
    before = dict(p.pattern.derived)
    by_kernel(p)
    after = p.pattern.derived
    return before.keys() == after.keys() and all(before[n] is after[n] for n in before)


# ---- tuning


def test_tune_times_every_candidate_and_keeps_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    """Everything but the clock: the second candidate of each kernel is given the best time."""
    monkeypatch.setattr(tuning, "path", lambda: tmp_path / "tuning.json")
    ran: list[Any] = []
    refused = parts.Launch(128, 64, 8, 3)

    def forward(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        ran.append(dict(parts._FORCED))
        if parts._FORCED.get("forward") == refused:
            raise parts.OutOfResources(300_000, 232_448, "shared memory")
        return q, q[..., 0]

    def backward(grad: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        ran.append(dict(parts._FORCED))
        return grad, grad, grad

    monkeypatch.setattr(kernel.TritonBlockSparse, "forward", staticmethod(forward))
    monkeypatch.setattr(kernel.TritonBlockSparse, "backward", staticmethod(backward))
    limits, times = parts.Limits(232_448, 90), iter(range(100, 0, -1))

    def timer(run: Callable[[], object]) -> float:
        run()
        return float(next(times))

    records = tuner.tune(
        "cpu", [torch.float16], [64], [(128, 128)], tokens=300, heads=1, timer=timer, limits=limits, name="a GPU"
    )
    assert [r["kernel"] for r in records] == list(parts.KERNELS)
    for record in records:
        launches = parts.candidates(record["kernel"], 128, 128, 64, 64, 2, limits)
        assert record["launch"] == launches[-1]._asdict() and len(record["tried"]) == len(launches)
        shape = parts.shape_class(torch.float16, 64, 64, 128, 128)
        assert tuning.lookup("a GPU", parts.software(), record["kernel"], shape) == record["launch"]
        assert all({record["kernel"]: launch} in ran for launch in launches)
    assert records[0]["tried"]["128/64/8/3"] is None and not parts._FORCED


# ---- on a GPU


@gpu
@no_gpu
@pytest.mark.parametrize("softcap", [0.0, 1.5], ids=["plain", "softcap"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("case", [*ALL.values(), *BIG.values()], ids=[*ALL, *BIG])
def test_compiled_gradients(case: dict[str, Any], dtype: torch.dtype, softcap: float) -> None:
    p = problem({**case, "inputs": {**case.get("inputs", {}), "dtype": dtype}}, softcap)
    first, second = by_kernel(p, "cuda"), by_kernel(p, "cuda")
    check(first, p)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@gpu
@no_gpu
@pytest.mark.parametrize("part", range(20))
def test_compiled_random_sweep(part: int) -> None:
    for number in range(20 * part, 20 * part + 20):
        p = sweep(number)
        check(by_kernel(p, "cuda"), p)


@gpu
@no_gpu
@pytest.mark.parametrize("name", ["tiles", "columns", "all", "padded_batch_in_order"])
def test_compiled_unread_keys_have_no_gradient(name: str) -> None:
    p = problem({**CASES[name], "keep": 0.2, "tiles": 2})
    nobody = unread(p.pattern, p.q, p.k)
    fill = nobody[..., None]
    clean = by_kernel(p, "cuda")
    dirty = by_kernel(p._replace(k=p.k.masked_fill(fill, torch.nan), v=p.v.masked_fill(fill, torch.nan)), "cuda")
    assert (clean[3][nobody] == 0).all() and all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))


@gpu
@no_gpu
@pytest.mark.parametrize("name", parts.KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_candidate_runs_and_is_right(dim: int, dtype: torch.dtype, name: str) -> None:
    p = problem({"q_len": 300, "kv_len": 300, "block_q": 128, "block_k": 128, "columns": 5,
                 "inputs": {"dim": dim, "dtype": dtype}})  # fmt: skip
    limits = parts.limits_of(torch.device("cuda"))
    for launch in parts.candidates(name, 128, 128, dim, dim, dtype.itemsize, limits):
        with parts.forced(name, launch):
            check(by_kernel(p, "cuda"), p)


@gpu
@no_gpu
def test_compiled_beyond_32_bits() -> None:
    """More than 2**31 elements in each tensor, about 50 GB in all: the last head is that of a call by itself."""
    if torch.cuda.get_device_properties(0).total_memory < 120e9:
        pytest.skip("needs 120 GB of GPU memory")
    heads, tokens, dim = 130, 131_072, 128
    assert heads * tokens * dim > 2**31
    starts = torch.arange(0, tokens, 128, device="cuda")
    counts = torch.ones(1, 1, tokens // 128, dtype=torch.int64, device="cuda")
    pattern = BlockPattern.from_rows(counts, starts, 128, 128, tokens, tokens)
    # [batch, tokens, heads, dim] in memory as in a model: tokens of one head lie far apart, too.
    q, k, v, grad = (
        torch.randn(1, tokens, heads, dim, device="cuda", dtype=torch.bfloat16).transpose(1, 2) for _ in range(4)
    )
    out, lse = kernel.TritonBlockSparse.forward(q, k, v, pattern, 0.1, 0.0)
    grads = kernel.TritonBlockSparse.backward(grad, None, q, k, v, out, lse, pattern, 0.1, 0.0)
    last = [x[:, -1:].contiguous() for x in (q, k, v, grad)]
    alone = kernel.TritonBlockSparse.forward(*last[:3], pattern, 0.1, 0.0)
    again = kernel.TritonBlockSparse.backward(last[3], None, *last[:3], *alone, pattern, 0.1, 0.0)
    for whole, one in zip((out, lse, *grads), (*alone, *again), strict=True):
        assert torch.equal(whole[:, -1:], one)
