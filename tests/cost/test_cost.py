"""What attention is predicted to cost, who measures it, and what the dispatcher makes of it."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from dataclasses import dataclass, field, replace

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Method, TokenLayout
from hf_sparse_attn.bench import calibrate
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.cost import table as cost
from hf_sparse_attn.cost.table import Shape, Table, Work
from hf_sparse_attn.decision import by_shape
from hf_sparse_attn.kernels.cpp_block_sparse import CppBlockSparse
from hf_sparse_attn.kernels.torch_gather import TorchGather
from hf_sparse_attn.policy import Policy
from hf_sparse_attn.record import LayerRecord
from hf_sparse_attn.registry import FAMILIES
from hf_sparse_attn.report import Report
from hf_sparse_attn.session import Session
from tests.support.patterns import random_inputs, random_pattern

CPU = torch.device("cpu")
LENGTHS = [64, 256, 1024]
COSTS = dict.fromkeys(cost.RUN_COSTS + cost.PLAN_COSTS, 0.0)


def data(pair: float = 1e-9, **costs: float) -> dict:
    """A table whose dense attention takes 1 ns per pair of one head, at dim 128 the double."""
    dense = [
        {
            "dtype": "float32",
            "dim": dim,
            "mask": mask,
            "tokens": LENGTHS,
            "seconds": [f * n * n * 1e-9 for n in LENGTHS],
        }
        for dim, scale in ((64, 1.0), (128, 2.0))
        for mask, f in (("causal", scale / 2), ("full", scale))
    ]
    sparse = [
        {"backend": "torch_gather", "dtype": "float32", "dim": dim, **COSTS, "error": 0.0, **costs, "pair": f * pair}
        for dim, f in ((64, 1), (128, 2))
    ]
    return {"version": cost.VERSION, "device": "a chip", "kind": "any", "threads": None, "date": "", "torch": "",
            "dense": dense, "sparse": sparse, "tuned": {}}  # fmt: skip


@pytest.fixture
def costs(monkeypatch: pytest.MonkeyPatch):
    """Makes a table the one of the CPU."""

    def use(origin: str = "measured", **given: float) -> Table:
        made = Table(data(**given), origin)
        monkeypatch.setitem(cost._TABLES, ("cpu", None), made)
        return made

    return use


def shape(
    n: int = 256, q_len: int | None = None, causal: bool = False, heads: int = 4, dim: int = 64, dtype="float32"
):
    return Shape(n if q_len is None else q_len, n, causal, heads, dim, dtype)


# ------------------------------------------------------------------ predictions


def test_dense_seconds_are_those_measured_and_between_them():
    table = Table(data(), "measured")
    for n in (*LENGTHS, 500, 63, 4000):
        assert table.dense_seconds(shape(n)) == pytest.approx(4 * n * n * 1e-9)
    assert table.dense_seconds(shape(causal=True)) == pytest.approx(2 * 256**2 * 1e-9)
    assert table.dense_seconds(shape(dim=96)) == pytest.approx(1.5 * table.dense_seconds(shape()))
    assert table.dense_seconds(shape(dim=256)) == pytest.approx(4 * table.dense_seconds(shape()))
    assert table.dense_seconds(shape(dim=16)) == pytest.approx(table.dense_seconds(shape()))
    assert table.dense_seconds(shape(dtype="float16")) == pytest.approx(table.dense_seconds(shape()))


def test_a_rate_that_falls_with_the_length_is_interpolated():
    given = data()
    given["dense"][1]["seconds"] = [64**2 * 4e-9, 256**2 * 2e-9, 1024**2 * 1e-9]
    rates = [Table(given, "measured").dense_seconds(shape(n, heads=1)) / n**2 for n in (64, 128, 256, 512, 1024)]
    assert rates == pytest.approx([4e-9, 3e-9, 2e-9, 1.5e-9, 1e-9])


def test_queries_after_cached_keys_see_all_of_those():
    table = Table(data(), "measured")
    chunk = table.dense_seconds(shape(1000, q_len=100, causal=True, heads=1))
    assert chunk == pytest.approx(100 * 900 * 1e-9 + 100 * 100 / 2 * 1e-9)
    assert shape(1000, 100, True, 1).pairs == sum(901 + i for i in range(100))


def test_threads_make_the_parallel_part_faster(monkeypatch):
    given = {**data(call=1e-3), "threads": 2}
    work = Work(4, 8, 0, 10, 0, 1e6, 0, 0)
    for threads, factor in ((1, 2.0), (2, 1.0), (8, 0.25)):
        monkeypatch.setattr(torch, "get_num_threads", lambda n=threads: n)
        table = Table(given, "measured")
        assert table.dense_seconds(shape()) == pytest.approx(4 * 256**2 * 1e-9 * factor)
        assert table.sparse_seconds("torch_gather", work, shape(), False) == pytest.approx(1e-3 + 1e-3 * factor)


def test_a_table_goes_on_with_the_threads_it_was_read_with(monkeypatch):
    table = Table({**data(), "threads": 2}, "measured")
    before = table.dense_seconds(shape())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 17)
    assert table.dense_seconds(shape()) == before


def test_every_cost_is_counted_and_planning_only_for_new_patterns():
    names = ("call", "head", "row", "key", "tile_pair", "column_pair", *cost.PLAN_COSTS)
    table = Table(data(pair=1.0, **{name: 10.0**i for i, name in enumerate(names, 1)}), "measured")
    work = Work(2, 3, 9, 4, 5, 6, 7, 8)
    run = 10 + 2e2 + 3e3 + 9e4 + 6 + 7e5 + 8e6
    assert table.sparse_seconds("torch_gather", work, shape(), False) == pytest.approx(run)
    plan = 1e7 + 2e8 + 3e9 + 4e10 + 5e11
    assert table.sparse_seconds("torch_gather", work, shape(), True) == pytest.approx(run + plan)


def test_on_a_cpu_what_the_patch_does_around_the_backend_counts():
    work = Work(4, 8, 0, 10, 0, 1e6, 0, 0)
    here, elsewhere = (Table({**data(), "kind": kind}, "measured") for kind in ("cpu", "cuda"))
    seconds = [table.sparse_seconds("torch_gather", work, shape(), False) for table in (here, elsewhere)]
    assert seconds == pytest.approx([1e-3 + 3e-4, 1e-3])


def test_a_backend_never_measured_is_taken_for_slow():
    table = Table(data(), "measured")
    work = Work(4, 8, 0, 10, 0, 1e6, 0, 0)
    assert table.sparse_seconds("other", work, shape(), False) > 1.5 * 1e6 * 1e-9


@pytest.mark.parametrize("heads", [1, 3])
def test_work_is_what_the_pattern_holds(heads):
    pattern = random_pattern(300, 333, heads=heads, columns=9)
    work = cost.work_of(pattern, 6)
    each = 6 / heads
    tiled = int((pattern.tile_ids > 0).sum())
    assert (
        work.heads == 6 and work.rows == 6 * 10 and work.keys == 6 * 333 and work.blocks == each * len(pattern.starts)
    )
    assert work.tile_pairs == each * tiled * 32 * 32 and tiled
    assert work.pairs == pytest.approx(each * (len(pattern.starts) - tiled) * 32 * 32)
    assert work.columns == each * len(pattern.columns) and work.column_pairs == work.columns * 32
    assert cost.work_of(replace(pattern, columns=None, column_indptr=None), 6).columns == 0


def test_counts_and_densities_wait_for_no_device():
    """On the meta device no value can be read: nothing here reads one."""
    pattern = random_pattern(300, 333, heads=2, columns=9).to("meta")
    work = cost.work_of(pattern, 2)
    assert work.tile_pairs == 2 * 10 * 32 * 32, "one masked block per row"
    assert isinstance(pattern.density_later(), torch.Tensor)


@pytest.mark.parametrize("name", hsa.list_methods())
def test_the_least_density_is_not_above_the_density(name):
    cls = hsa.get_method(name)
    for params in [*cls.examples(), cls.full_budget() or {}, {}]:
        for layout in (TokenLayout.causal(300), TokenLayout.bidirectional(111), TokenLayout.video(3, 8, 8)):
            method, ctx = cls(**params), Context(layout, num_heads=2, num_kv_heads=2, head_dim=16)
            q = torch.randn(1, 2, layout.kv_len, 16)
            found = method.pattern_for(q, q, ctx)
            if isinstance(found, BlockPattern):
                # The share that is asked for is met by whole blocks, as nearly as these allow.
                room = 0.15 if name == "block_topk" else 1e-9
                assert method.least_density(ctx) <= found.density(layout.density_count) + room, (params, layout)


# ------------------------------------------------------------------ tables and files


def broken(**change) -> dict:
    found = copy.deepcopy(data())
    for path, value in change.items():
        at, names = found, path.split("__")
        for name in names[:-1]:
            at = at[int(name)] if name.isdigit() else at[name]
        at[int(names[-1]) if names[-1].isdigit() else names[-1]] = value
    return found


BROKEN = {
    "version": ({"version": 99}, "`version` must be 1, got 99"),
    "lengths": ({"dense__0__tokens": [64, 64, 65]}, "`tokens` must be ascending"),
    "seconds": ({"dense__0__seconds": [1.0, math.nan, 2.0]}, "`seconds` must be positive"),
    "zero": ({"dense__0__seconds": [1.0, 0.0, 2.0]}, "`seconds` must be positive"),
    "negative": ({"sparse__0__row": -1.0}, "`row` must be a number of seconds, got -1.0"),
    "unnamed": ({"sparse__0": {"backend": "x", "dtype": "y", "dim": 1}}, "`sparse` must hold the costs call, head"),
    "mask": ({"dense__0__mask": "full"}, "must hold causal and full times of dim 64"),
    "none": ({"dense": []}, "`dense` must hold at least one entry"),
    "lacking": ({"dense__0__seconds": [1.0]}, "shorter|longer"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_broken_tables_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        Table(broken(**change), "measured")


@pytest.fixture
def home(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    cost.forget()
    yield tmp_path / "hf_sparse_attn"
    cost.forget()


def test_the_users_own_table_comes_first(home):
    assert cost.table_for(CPU).origin in ("measured", "shipped")
    before = cost.table_for(CPU)
    calibrate.write(data(), cost.user_file(CPU))
    assert cost.table_for(CPU) is before, "what is sparse must not change between equal calls"
    cost.forget()
    found = cost.table_for(CPU)
    assert found.device == "a chip" and found.origin == "measured"
    assert [p.name for p in home.iterdir()] == [cost.file_name(CPU)]


@pytest.mark.parametrize("text", ["{", "[]", "null", json.dumps({"version": 1}), json.dumps(broken(version=0))])
def test_a_broken_file_is_ignored_with_a_warning(home, text, caplog):
    path = cost.user_file(CPU)
    path.parent.mkdir()
    path.write_text(text)
    with caplog.at_level(logging.WARNING):
        assert cost.table_for(CPU).origin in ("measured", "shipped")
        cost.table_for(CPU)
    assert len(caplog.records) == 1 and "is ignored" in caplog.text and str(path) in caplog.text


def test_a_bad_table_does_not_replace_a_good_one(home, monkeypatch):
    path = cost.user_file(CPU)
    calibrate.write(data(), path)
    before = path.read_text()
    with pytest.raises(ValueError, match="version"):
        calibrate.write(broken(version=0), path)
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        calibrate.write(data(pair=2e-9), path)
    assert path.read_text() == before and len(list(path.parent.iterdir())) == 1


def test_other_machines_use_the_shipped_table_and_other_devices_an_assumed_one(home, monkeypatch):
    monkeypatch.setattr(cost, "device_name", lambda device: "unheard of")
    assert cost.table_for(CPU).origin == "shipped"
    assumed = cost.table_for(torch.device("meta"))
    assert assumed.origin == "assumed" and not assumed.sparse
    # Dense is kept at a few thousand tokens whatever the pattern, and where most pairs are kept.
    for n, density, pays in ((4096, 0.0, False), (32768, 0.1, True), (32768, 0.6, False)):
        long = Shape(n, n, True, 32, 128, "bfloat16")
        seconds = assumed.sparse_seconds("triton", cost.least_work(long, density), long, True)
        assert (seconds < cost.MARGIN * assumed.dense_seconds(long)) == pays, (n, density)


# ------------------------------------------------------------------ calibration


def test_the_fit_finds_the_costs():
    true = {"call": 1e-4, "head": 2e-5, "row": 3e-6, "key": 1e-8, "pair": 4e-9, "tile_pair": 5e-9, "column_pair": 6e-9}
    plan = {"plan_call": 1e-5, "plan_head": 0.0, "plan_row": 2e-6, "plan_block": 3e-7, "plan_column": 4e-8}
    works = [cost.work_of(pattern, heads) for heads, pattern in calibrate._patterns((300, 1000))]
    table = Table(data() | {"sparse": [{"backend": "x", "dtype": "float32", "dim": 64, **true, **plan}]}, "measured")
    run, new = ([table.sparse_seconds("x", w, shape(), n) for w in works] for n in (False, True))
    found = calibrate._fit(works, run, new)
    assert found.pop("error") < 1e-6
    assert found == pytest.approx(true | plan, rel=1e-3, abs=1e-12)


def test_a_poor_fit_is_told(caplog):
    works = [cost.work_of(pattern, heads) for heads, pattern in calibrate._patterns((300,))]
    times = [1.0 if i % 2 else 1e-3 for i in range(len(works))]
    assert calibrate._fit(works, times, times)["error"] > 0.5
    assert "something else ran meanwhile" in caplog.text


def test_what_is_measured_is_a_valid_table_and_reads_well(monkeypatch):
    asked = []

    def tune(device):
        asked.append(device)
        return [{"shape": "64", "warps": 4}]

    monkeypatch.setattr(TorchGather, "calibrate", staticmethod(tune), raising=False)
    found = calibrate.measure(CPU, ("float32",), (16,), (64, 130), (256,), rounds=1)
    assert asked == [CPU] and found["tuned"] == {"torch_gather": [{"shape": "64", "warps": 4}]}
    table = Table(json.loads(json.dumps(found)), "measured")
    # Real times of a busy machine: that they are there is all that can be told.
    assert table.dense_seconds(shape(130, dim=16)) > 0 and table.dense_seconds(shape(64, dim=16)) > 0
    assert [entry["backend"] for entry in found["sparse"]] == ["torch_gather"]
    text = calibrate.render(found, 160)
    assert all(
        word in text for word in ("Dense attention", "torch_gather, float32, 16", "Tuned: torch_gather", "warps")
    )


def test_calibrating_by_command_writes_the_users_table(home, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(calibrate, "measure", lambda device: data())
    assert main(["bench", "--calibrate"]) == 0
    shown = capsys.readouterr()
    assert "Dense attention on a chip" in shown.out and str(cost.user_file(CPU)) in shown.err
    cost.forget()
    assert cost.table_for(CPU).device == "a chip"
    assert main(["bench", "--calibrate", "--json", "--output", str(tmp_path / "there")]) == 0
    assert json.loads(capsys.readouterr().out)["device"] == "a chip"
    assert (tmp_path / "there" / cost.file_name(CPU)).is_file()
    assert main(["bench", "--calibrate", "--tokens", "4096"]) == 2
    assert "--calibrate takes only" in capsys.readouterr().err


# ------------------------------------------------------------------ the dispatcher


@dataclass(frozen=True, kw_only=True)
class Asked(Method):
    """Gives the pattern it is told to give, and counts how often it was asked."""

    name = "asked"
    share: float = 0.1

    def pattern(self, q, k, ctx):
        CALLS.append(ctx.layer)
        n = -(-ctx.layout.kv_len // 32)
        keep = torch.arange(n) < max(1, round(self.share * n))
        return BlockPattern.from_block_map(keep.expand(1, 1, n, n), 32, 32, ctx.layout.q_len, ctx.layout.kv_len)


CALLS: list[int] = []


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch):
    CALLS.clear()
    # The tables of these tests know one backend.
    monkeypatch.setattr(CppBlockSparse, "auto_rank", {})


def attend(session: Session, layer: int = 0, n: int = 640, **more):
    q, k, v = random_inputs(BlockPattern.dense(n, n, False), heads=2, dim=16)
    ctx = Context(TokenLayout.bidirectional(n), layer=layer, num_heads=2, num_kv_heads=2, head_dim=16)
    record = session.record(f"layers.{layer}", layer)
    return session.sparse(record, q, k, v, ctx, **more), record


def session_of(share: float = 0.1, **policy) -> Session:
    return Session(Asked(share=share), Policy(**policy), "auto", strict=False)


def test_the_cheaper_attention_is_taken(costs):
    costs(pair=1e-9)
    sparse, record = attend(session_of(0.1))
    assert sparse is not None and record.report(None).predicted_gain == pytest.approx(10, rel=0.01)
    dense, record = attend(session_of(0.95))
    (reason,) = record.report(None).reasons
    assert dense is None and reason == "predicted slower: 0.78 ms at density 0.95, dense 0.82 ms"
    costs(pair=20e-9)
    assert attend(session_of(0.1))[0] is None and attend(session_of(0.1, min_tokens=0))[0] is not None


def test_dense_by_prediction_is_one_reason_with_mean_numbers(costs):
    costs(pair=1e-9)
    session = session_of(0.95)
    for _ in range(2):
        attend(session)
    attend(session, n=1280)
    report = session.records["layers.0"].report(None)
    assert report.reasons == {"predicted slower: 1.6 ms at density 0.95, dense 1.6 ms": 3}
    assert report.dense_calls == 3 and report.predicted_gain is None


def test_an_assumed_table_says_so(costs):
    costs("assumed", pair=2e-9)
    reasons = attend(session_of(0.95))[1].report(None).reasons
    assert "assumed: this device was not measured" in next(iter(reasons))


def test_too_short_needs_no_method(costs):
    table = costs(call=1e-3)
    fewest = table.fewest_keys(("torch_gather",), 2, 16, False)
    result, record = attend(session_of(0.1))
    assert result is None and not CALLS
    assert record.dense_reasons == {f"fewer than {fewest} keys (min_tokens=auto)": 1}
    assert 640 < fewest < 1024
    # With the method's own time besides.
    assert attend(session_of(0.1), n=2 * fewest)[0] is not None


def test_a_method_that_keeps_too_much_by_its_own_word_is_not_asked(costs, monkeypatch):
    costs()
    monkeypatch.setattr(Asked, "least_density", lambda self, ctx: self.share)
    result, record = attend(session_of(0.95))
    assert result is None and not CALLS
    assert "predicted slower at best" in next(iter(record.report(None).reasons))
    assert attend(session_of(0.5))[0] is not None


def test_a_method_that_loses_is_asked_every_time(costs):
    """Its pattern may be another each time, and what was before must not decide."""
    costs()
    session = session_of(0.95)
    assert all(attend(session)[0] is None for _ in range(9)) and len(CALLS) == 9
    object.__setattr__(session.method, "share", 0.1)
    assert attend(session)[0] is not None


def test_what_was_decided_of_a_shape_is_found_without_a_context(costs):
    """As the hook of transformers does: what is known of a shape costs one look-up."""
    costs()
    session, q = session_of(0.1), torch.randn(1, 2, 640, 16)
    record = session.record("layers.0", 0)
    ctx = Context(TokenLayout.bidirectional(640), num_heads=2, num_kv_heads=2, head_dim=16)
    short = Context(TokenLayout.bidirectional(50), num_heads=2, num_kv_heads=2, head_dim=16)
    few = q[:, :, :50]
    for asked in (lambda: ctx, None):
        assert by_shape(session, record, q, 640, asked).reason is None
    assert "fewer than" in by_shape(session, record, few, 50, lambda: short).reason
    assert "fewer than" in by_shape(session, record, few, 50, None).reason
    # Other tokens of as many queries and keys are another matter.
    assert by_shape(session, record, q, 640, lambda: replace(ctx, layer=0), "video").reason is None
    assert len(record.by_shape) == 3
    layer = Session(Asked(), Policy(dense_layers=1), "auto", strict=False)
    assert by_shape(layer, layer.record("layers.0", 0), q, 640, lambda: ctx).reason == "dense_layers"


def test_the_methods_own_time_counts_before_it_is_asked(costs, monkeypatch):
    table = costs()
    assert attend(session_of(0.1))[0] is not None
    # A millisecond of dense attention is that of so many logits.
    own = table.choosing_seconds(cost.Shape(640, 640, False, 2, 16, "float32"), 0.0)
    monkeypatch.setattr(Asked, "choosing_pairs", lambda self, ctx: 640 * 640)
    CALLS.clear()
    result, record = attend(session_of(0.1))
    assert result is None and not CALLS and own > 0
    (reason,) = record.report(None).reasons
    assert reason.startswith("predicted slower with the method's own time: ")
    assert attend(session_of(0.1, min_tokens=0))[0] is not None


def test_choosing_costs_what_is_read_and_computed():
    table = Table(data(), "measured")
    at = [table.choosing_seconds(shape(256), pairs) for pairs in (0.0, 1000.0, 2000.0)]
    assert at[1] - at[0] == pytest.approx(cost._PAIRS_PER_LOGIT * 4 * 1000 * 1e-9) == pytest.approx(at[2] - at[1])
    read = at[0] - cost._CHOOSING_ELSEWHERE
    assert read == pytest.approx(cost._PAIRS_PER_TOKEN * 4 * 512 * 1e-9)
    # Of a causal call the same: pairs are counted as they are computed.
    assert table.choosing_seconds(shape(256, causal=True), 1000.0) == at[1]
    on_cpu = Table({**data(), "kind": "cpu"}, "measured")
    assert on_cpu.choosing_seconds(shape(256), 0.0) - at[0] == pytest.approx(6e-4)


@pytest.mark.parametrize("name", hsa.list_methods())
def test_finding_a_pattern_takes_less_than_all_pairs(name):
    layout = TokenLayout.video(16, 24, 32) if "video grid" in hsa.get_method(name).needs else TokenLayout.causal(12288)
    ctx = Context(layout, num_heads=2, num_kv_heads=2, head_dim=16)
    assert 0 < hsa.get_method(name)().choosing_pairs(ctx) < layout.kv_len**2 / 10


def test_only_auto_decides_but_gains_are_always_predicted(costs):
    costs(pair=3e-9)
    session = session_of(0.95, min_tokens=0)
    assert all(attend(session)[0] is not None for _ in range(5)) and len(CALLS) == 5
    assert session.records["layers.0"].report(None).predicted_gain == pytest.approx(1 / 3 / 0.95, rel=0.01)


# ------------------------------------------------------------------ measured gains


def test_nothing_is_measured_until_asked_and_then_as_often(costs):
    costs()
    session, runs = session_of(0.1), []
    first, record = attend(session, dense=lambda: runs.append(1))
    assert not runs and record.report(None).measured_gain is None
    record.to_measure = 2
    for _ in range(4):
        out, _ = attend(session, dense=lambda: runs.append(1))
        assert torch.equal(out[0], first[0]) and torch.equal(out[1], first[1])
    # One of each to warm up and three rounds, for two calls.
    assert len(runs) == 2 * 4 and len(record.measured) == 2 and record.to_measure == 0
    assert record.sparse_calls == 5 and record.backends == {"torch_gather": 5}
    record.measured = [(1.0, 3.0), (1.0, 1.0)]
    assert record.report(None).measured_gain == 2.0


def test_timed_runs_are_sparse(costs):
    costs()
    session = session_of(0.1)
    record = attend(session)[1]
    record.to_measure, asked = 1, len(CALLS)
    costs(pair=1e-9)
    attend(session, dense=lambda: costs(pair=9e-9))
    assert len(CALLS) == asked + 5, "the call, one run to warm up and three rounds, though it would be dense by then"


def test_methods_that_cannot_be_compared_are_judged_too(costs):
    costs()

    @dataclass(frozen=True, kw_only=True)
    class Listed(Asked):
        shares: list = field(default_factory=list)

    assert attend(Session(Listed(), Policy(), "auto", strict=False))[0] is not None


def test_a_layer_without_a_dense_attention_to_run_measures_nothing(costs):
    costs()
    session = session_of(0.1)
    record = attend(session)[1]
    record.to_measure = 1
    attend(session)
    assert record.measured == [] and record.to_measure == 1


@pytest.mark.parametrize("family, method", [("llama", "sliding_window"), ("wan", "block_topk")])
def test_a_patched_model_measures_its_gain(family, method):
    if family not in FAMILIES.names():
        pytest.skip("needs diffusers")
    model, inputs = FAMILIES.get(family).tiny()
    with torch.no_grad(), hsa.patch(model, method, block_size=16, min_tokens=0) as patch:
        plain = model(**inputs)[0]
        layers = patch.report().layers
        assert all(r.measured_gain is None and r.predicted_gain > 0 for r in layers)
        patch.measure()
        assert torch.equal(model(**inputs)[0], plain)
        model(**inputs)
        report = patch.report()
    assert all(r.measured_gain > 0 and r.sparse_calls == 3 for r in report.layers)
    assert all(len(r.measured) == 1 for r in patch.session.records.values())
    shown = report.to_dict()["layers"][0]
    assert shown["measured_gain"] == report.layers[0].measured_gain and shown["predicted_gain"] > 0
    assert f"{shown['measured_gain']:.2f}x" in str(report)


def test_measuring_keeps_gradients():
    model, inputs = FAMILIES.get("llama").tiny()
    grads = []
    for measured in (False, True):
        model.zero_grad()
        with hsa.patch(model, "sliding_window", block_size=16, min_tokens=0) as patch:
            if measured:
                patch.measure()
            model(**inputs).logits.sum().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("calls, error", [(-1, ValueError), (1.5, TypeError)])
def test_measure_takes_a_number(calls, error):
    model, _ = FAMILIES.get("llama").tiny()
    with hsa.patch(model, "sliding_window") as patch, pytest.raises(error, match="`calls` must be"):
        patch.measure(calls)


def test_reports_show_a_dash_where_nothing_is_known():
    record = LayerRecord("layers.0", 0)
    record.dense_reasons["method dense"] += 1
    line = str(Report("dense", {}, "llama", [record.report(None)])).splitlines()[-1].split()
    assert line[:8] == ["0", "0", "1", "-", "-", "-", "-", "-"]


def test_backends_by_name_are_predicted_by_their_own_costs(costs):
    costs()
    session = Session(Asked(share=0.3), Policy(), "torch_reference", strict=False)
    result, record = attend(session, n=1280)
    # Never measured: slower than dense per pair, and half a millisecond per call.
    sparse = 0.5e-3 + 1.6 * 2 * 0.3 * 1280**2 * 1e-9
    assert result is not None
    assert record.report(None).predicted_gain == pytest.approx(2 * 1280**2 * 1e-9 / sparse, rel=0.01)
