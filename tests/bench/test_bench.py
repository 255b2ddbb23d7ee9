"""The benchmark: what it measures and writes, at sizes that take no time; no time is ever asserted."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import machine
from hf_sparse_attn.backend import auto_order
from hf_sparse_attn.bench import gpu as bench_gpu
from hf_sparse_attn.bench import harness as bench
from hf_sparse_attn.bench import kernels as bench_kernels
from hf_sparse_attn.bench import layers as bench_layers
from hf_sparse_attn.bench import patterns as bench_patterns
from hf_sparse_attn.bench import plot as bench_plot
from hf_sparse_attn.bench import tables as bench_tables
from hf_sparse_attn.bench.options import SUITES, make_options
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.cost import timing
from hf_sparse_attn.registry import BACKENDS

SMALL = ["--tokens", "256", "--heads", "2", "--block", "32", "--densities", "0.25,0.5", "--repeats", "1"]
SPREAD = ("median", "min", "max")


class _Refuses:
    """A backend that can run nothing here."""

    auto_rank: ClassVar[dict[str, int]] = {}

    @staticmethod
    def why_not(*args: Any) -> str:
        return "needs a machine from the future"

    @staticmethod
    def attention(*args: Any) -> None:
        raise AssertionError("must not be called")


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of one run of all suites, and what it printed."""
    folder = tmp_path_factory.mktemp("bench") / "new" / "folder"
    patched = pytest.MonkeyPatch()
    patched.setitem(BACKENDS._entries, "refuses", _Refuses)
    patched.setitem(BACKENDS.missing, "absent", "needs the package nowhere")
    try:
        backends = "torch_gather,torch_reference,refuses,absent"
        assert main(["bench", *SMALL, "--causal", "--backends", backends, "--output", str(folder)]) == 0
    finally:
        patched.undo()
    return folder


@pytest.fixture(scope="module")
def result(written):
    return json.loads((written / "bench.json").read_text())


def test_json_tells_machine_versions_date_and_options(result):
    assert result["version"] == bench.VERSION
    assert result["date"].endswith("Z")
    assert result["versions"]["torch"] == torch.__version__
    assert result["machine"]["cpu"] and result["machine"]["threads"] == torch.get_num_threads()
    assert result["options"]["tokens"] == [256] and result["options"]["device"]


def test_kernels_hold_every_contestant_at_every_density(result):
    found = {(r["contestant"], r["density"]) for r in result["kernels"]}
    names = ("torch_gather", "torch_reference", "refuses", "absent")
    assert {(n, d) for n in names for d in (0.25, 0.5)} < found
    assert result["kernels"][0]["contestant"].startswith("dense")


def test_kernel_times_are_raw_and_summed_up(result):
    timed = [r for r in result["kernels"] if r["reason"] is None and not r["contestant"].startswith(bench_kernels.NEW)]
    # Two dense backends of torch, and two of ours at two densities.
    assert len(timed) == 6
    for r in timed:
        assert r["rounds"] == len(r["seconds"]) == 1
        assert all(r[name] == r["seconds"][0] for name in SPREAD) and r["warmup_seconds"] > 0
        assert r["share_of_limit"] == pytest.approx(r["speedup"] * r["achieved_density"])


def test_contestants_that_cannot_run_say_why(result, written):
    reasons = {r["contestant"]: r["reason"] for r in result["kernels"] if r["reason"]}
    assert reasons == {
        "refuses": "needs a machine from the future",
        "absent": "needs the package nowhere",
        "flash_attn": "not installed",
        "sageattention (8 bit)": "not installed",
    }
    assert "seconds" not in next(r for r in result["kernels"] if r["contestant"] == "refuses")
    text = bench_plot.render(result, width=160)
    for document in (text, (written / "bench.md").read_text()):
        assert "needs a machine from the future" in document and "needs the package nowhere" in document


def test_patterns_cover_every_method(result):
    by_name = {r["method"]: r for r in result["patterns"]}
    assert sorted(by_name) == hsa.list_methods()
    assert by_name["radial"]["layout"].startswith("bidirectional 4x8x8")
    assert by_name["sliding_window"]["cached_call_seconds"] >= 0
    assert "keeps" not in (by_name["block_topk"]["reason"] or "")
    # The first of them where there is a C++ compiler.
    usual = auto_order("cpu", prompts=True)[:2]
    for r in by_name.values():
        assert r["reason"] is not None or (r["share_of_attention"] > 0 and r["backend"] in usual), r


def test_heads_of_two_kinds_are_timed_at_the_first_density(result):
    mixed = {r["contestant"]: r for r in result["kernels"] if r["contestant"].startswith(bench_kernels.NEW)}
    assert len(mixed) == 5 and {r["density"] for r in mixed.values()} == {0.25}
    assert all(r["reason"] is None and r["median"] > 0 for r in mixed.values())


def test_layers_are_compared_with_the_unpatched_one(result):
    llama = {r["contestant"]: r for r in result["layers"] if r["model"] == "llama prefill"}
    assert sorted(llama) == sorted(["unpatched", *hsa.list_methods()])
    assert "ratio" not in llama["unpatched"] and llama["block_topk"]["forward_ratio"] > 0
    assert "video" in llama["radial"]["reason"]
    wan = {r["contestant"]: r for r in result["layers"] if r["model"] == "wan step"}
    assert wan["unpatched"]["reason"] == "needs the package diffusers" or wan["radial"]["median"] > 0


def test_markdown_names_machine_and_versions(result, written):
    text = (written / "bench.md").read_text()
    assert result["machine"]["cpu"] in text and f"torch {torch.__version__}" in text and result["date"] in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == sum(2 + len(result[name]) for name in ("kernels", "patterns", "layers"))
    assert len({line.replace("\\|", "").count("|") for line in tables}) <= 3


def test_picture_is_drawn(written):
    pytest.importorskip("matplotlib")
    assert (written / "speedup.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_so(result, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    notes = bench_plot.write(result, tmp_path)
    assert any("needs matplotlib" in note and "\n" not in note for note in notes)
    assert not (tmp_path / "speedup.png").exists() and (tmp_path / "bench.json").exists()


def test_nothing_to_draw_without_a_sparse_contestant(tmp_path):
    assert "no sparse contestant ran" in bench_plot.plot({"kernels": []}, tmp_path / "x.png")


def test_json_output_and_a_contestant_that_breaks(capsys, monkeypatch):
    class Breaks(_Refuses):
        @staticmethod
        def why_not(*args: Any) -> None:
            return None

    monkeypatch.setitem(BACKENDS._entries, "breaks", Breaks)
    assert main(["bench", "--suite", "kernels", *SMALL, "--dims", "16", "--dtypes", "float32",
                 "--backends", "breaks,torch_gather", "--threads", "1", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)
    assert "patterns" not in found and "layers" not in found and found["machine"]["threads"] == 1
    broken = [r for r in found["kernels"] if r["contestant"] == "breaks"]
    assert [r["reason"] for r in broken] == ["failed: AssertionError: must not be called"] * 2
    assert all("speedup" in r for r in found["kernels"] if r["contestant"] == "torch_gather")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    given = {"suite": "kernels", "tokens": (64,), "dims": (16,), "dtypes": ("float32",), "block": 16, "heads": 1}
    bench.run(make_options(**given, backends=("torch_gather",), repeats=1, threads=before + 1))
    assert torch.get_num_threads() == before


def test_flex_is_timed_without_its_log_sum_exp(monkeypatch):
    class OutputOnly:
        auto_rank: ClassVar[dict[str, int]] = {}
        attention = staticmethod(lambda *args: pytest.fail("asked for the log-sum-exp"))
        attention_output = staticmethod(lambda q, k, v, pattern, scale: v)

    monkeypatch.setitem(BACKENDS._entries, "output_only", OutputOnly)
    v = torch.ones(1, 1, 1, 1)
    assert bench_kernels.sparse_call("output_only", v, v, v, hsa.BlockPattern.dense(1, 1, False))() is v


def test_contestants_take_turns_and_slow_points_stop(monkeypatch):
    options = make_options(suite="kernels", repeats=5, device="cpu")
    order: list[str] = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    times, failed = timing.in_turns(calls, options.where, options.repeats, options.seconds, "test")
    # Once more each for the memory.
    assert "".join(order) == "ab" * 7 and not failed and times["a"]["rounds"] == 5
    # Each look at the clock is a minute later.
    clock = iter(range(0, 1 << 20, 60))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    times, _ = timing.in_turns(calls, options.where, options.repeats, options.seconds, "test")
    assert times["a"]["rounds"] == times["b"]["rounds"] == 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("tokens, block, density", [(1024, 32, 0.25), (1000, 64, 0.5), (111, 16, 1.0), (63, 64, 0.1)])
def test_random_patterns(tokens, block, density, causal):
    pattern = bench_kernels.random_pattern(tokens, 3, block, density, causal).validate()
    again = bench_kernels.random_pattern(tokens, 3, block, density, causal)
    assert torch.equal(pattern.starts, again.starts)
    kept = pattern.block_map()
    assert kept.diagonal(dim1=-2, dim2=-1).all()
    counts = kept.sum(-1)
    assert torch.equal(counts[:, 0], counts[:, -1]), "all heads have the same number of blocks in a row"
    if tokens > 63:
        assert pattern.density("causal" if causal else "full") == pytest.approx(density, abs=0.05)
    if tokens == 1024:
        assert pattern.density("causal" if causal else "full") == pytest.approx(density, rel=0.03)
        assert not torch.equal(kept[0, 0], kept[0, 1])
    if density == 1.0:
        assert pattern.density("causal" if causal else "full") == pytest.approx(1.0)


def test_parameters_that_count_tokens_shrink_with_the_input():
    full = hsa.get_method("vertical_slash")()
    assert bench_patterns.scaled(type(full), 1 << 20) == full
    short = bench_patterns.scaled(type(full), 8192)
    assert (short.vertical, short.slash) == (full.vertical // 4, full.slash // 4)
    assert (short.block_size, short.last_queries) == (full.block_size, full.last_queries)


@pytest.mark.parametrize("tokens", [1, 63, 256, 1000, 32768])
def test_video_grids(tokens):
    frames, height, width = bench_patterns.video_grid(tokens)
    assert 1 <= frames * height * width <= tokens
    assert tokens < 64 or frames >= 4


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_synthetic_heads_are_local_and_have_a_sink(dim):
    q, k = bench_patterns.structured(256, 2, dim)
    assert q.shape == k.shape == (1, 2, 256, dim)
    weights = (q @ k.mT * dim**-0.5).softmax(-1)
    if dim == 64:
        assert (weights[..., 0].mean(-1) > 10 / 256).all()
        near = weights.diagonal(dim1=-2, dim2=-1).mean()
        far = weights.diagonal(offset=100, dim1=-2, dim2=-1).mean()
        assert near > 4 * far


# ------------------------------------------------------------------ forward with backward, other packages


def test_backward_is_timed_and_its_refusals_are_listed(capsys):
    assert main(["bench", "--suite", "kernels", *SMALL, "--dims", "16", "--dtypes", "float32", "--backward",
                 "--backends", "torch_gather,torch_reference", "--json"]) == 0  # fmt: skip
    found = json.loads(capsys.readouterr().out)["kernels"]
    assert {r["pass"] for r in found} == {"forward + backward"}
    assert all(r["median"] > 0 for r in found if r["contestant"] in ("dense flash", "torch_gather"))
    text = bench_plot.render({**_frame(), "kernels": found}, 160)
    assert "forward + backward" in text


def test_backward_runs_both_passes():
    q = torch.ones(1, 1, 2, 2)
    grads = bench_kernels.with_backward(lambda: (q * 3, None), (q,), True)()
    assert torch.equal(grads[0], torch.full_like(q, 3)) and not q.grad
    assert torch.equal(bench_kernels.with_backward(lambda: q, (q,), False)(), q)


class _Package:
    """Stands in for a package of fast attention."""

    def sageattn(self, q, k, v, tensor_layout, is_causal):
        assert tensor_layout == "HND"
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)

    def flash_attn_func(self, q, k, v, causal):
        return self.sageattn(*(x.transpose(1, 2) for x in (q, k, v)), "HND", causal).transpose(1, 2)


def test_other_packages_are_contestants_where_they_are_installed(monkeypatch):
    for name in ("sageattention", "flash_attn"):
        monkeypatch.setitem(sys.modules, name, _Package())
    monkeypatch.setattr(bench_kernels, "find_spec", lambda name: True)
    q, k, v = torch.randn(3, 1, 2, 65, 16)
    found = bench_kernels._dense_calls(q, k, v, True, False)
    assert found["flash_attn"] == found["sageattention (8 bit)"] == "needs a CUDA device"
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(bench_kernels._other_call("sageattention", q, k, v, True)(), want)
    torch.testing.assert_close(bench_kernels._other_call("flash_attn", q, k, v, True)().transpose(1, 2), want)


def test_math_is_left_out_where_its_logits_are_too_large():
    small, large = (torch.empty(1, 8, n, 4) for n in (128, 32768))
    calls = bench_kernels._dense_calls(small, small, small, False, False)
    assert callable(calls["dense math"]) and callable(calls["dense flash"])
    assert "GiB for its logits" in bench_kernels._dense_calls(large, large, large, False, False)["dense math"]


@pytest.mark.parametrize("queries", [1, 20])
def test_few_queries_read_some_of_many_blocks(queries):
    pattern = bench_kernels.random_pattern(1000, 2, 32, 0.25, True, queries=queries).validate()
    assert (pattern.q_len, pattern.kv_len) == (queries, 1000)
    assert (pattern.row_counts() == 8).all()
    assert pattern.block_map()[..., -1].all(), "the newest keys are kept"


# ------------------------------------------------------------------ layers, what the dispatcher chooses, memory


def _frame() -> dict[str, Any]:
    options = make_options(suite="kernels", device="cpu")
    return {
        "version": bench.VERSION,
        "date": "2026-11-21T00:00:00Z",
        "machine": machine.machine(),
        "versions": machine.versions(),
        "options": {**vars(options), "device": "cpu"},
    }


def test_layers_are_forced_to_be_sparse_and_compared_in_the_same_round(tmp_path):
    options = make_options(suite="layers", tokens=(256,), dims=(16,), heads=2, repeats=2, device="cpu")
    result = bench.run(options)
    llama = {r["contestant"]: r for r in result["layers"] if r["model"] == "llama prefill"}
    assert sorted(llama) == sorted(["unpatched", *hsa.list_methods()]) and "video" in llama["radial"]["reason"]
    sparse = llama["block_topk"]
    assert sparse["sparse_calls"] == 2 and sparse["dense_calls"] == 0 and sparse["density"] < 0.8
    assert len(sparse["ratios"]) == 2 and sparse["speedup"] == pytest.approx(1 / sparse["ratio"])
    assert llama["dense"]["dense_because"] == ["method dense"]
    # The unpatched layer runs before the first and after every contestant.
    assert llama["unpatched"]["rounds"] == 2 * (1 + sum("ratio" in r for r in llama.values()))
    bench_plot.write(result, tmp_path)
    assert "forced to be sparse" in (tmp_path / "bench.md").read_text()


def test_auto_keeps_defaults():
    options = make_options(
        suite="layers", min_tokens="auto", tokens=(256,), dims=(16,), heads=2, repeats=2, device="cpu"
    )
    result = bench.run(options)
    found = {r["contestant"]: r for r in result["auto"] if r["model"] == "llama prefill"}
    assert found["sliding_window"]["params"]["window"] == 3968
    assert "fewer than" in found["block_topk"]["dense_because"][0]
    assert found["block_topk"]["within"] == (found["block_topk"]["ratio"] <= 1.02)
    assert not found["sliding_window"]["sparse_last"]
    found["block_topk"].update(ratio=1.5, within=False)
    text = bench_plot.render(result, 200)
    assert "1.500" in text and "MISSED" in text and "dense" in text


def test_a_contestant_is_patched_only_while_it_runs():
    options = make_options(suite="layers", min_tokens="auto", dims=(16,), heads=2, device="cpu")
    built = bench_layers._llama(options, 64, 1)
    contestant = bench_layers._Contestant(built, hsa.get_method("block_topk")(), options)
    contestant.run()
    attention, whole = contestant.run()
    assert 0 < attention < whole and len(contestant.runs) == 2
    assert hsa.patching.active_patch(built.module) is None


def test_memory_counts_what_is_allocated_inside_of_operators():
    x = torch.randn(100, 100)
    peaks = timing.peak_bytes([lambda: (x @ x) @ x, lambda: None, lambda: x + x], torch.device("cpu"))
    assert 2 * x.nbytes <= peaks[0] <= 3 * x.nbytes and peaks[1:] == [0, x.nbytes]


def test_kernels_tell_what_they_allocate(capsys):
    found = {}
    for passes in ("--no-backward", "--backward"):
        argv = ["bench", "--suite", "kernels", "--tokens", "512", "--dims", "16", "--heads", "2", "--block", "32",
                "--densities", "0.25", "--dtypes", "float32", "--repeats", "1"]  # fmt: skip
        assert main([*argv, passes, "--backends", "torch_gather", "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        found[passes] = {r["contestant"]: r for r in result["kernels"]}
    ours = found["--no-backward"]["torch_gather"]
    # Output and log-sum-exp at least, and less than the logits.
    assert 512 * 2 * 17 * 4 <= ours["bytes"] < 2 * 512 * 512 * 4 and ours["input_bytes"] == 3 * 512 * 2 * 16 * 4
    assert found["--backward"]["torch_gather"]["bytes"] > ours["bytes"]
    assert "MiB" in bench_plot.as_markdown(result)


@pytest.mark.parametrize(
    "name, serves",
    [("model", "--suite layers"), ("auto", "--suite layers --min-tokens auto"), ("memory", "--suite kernels"),
     ("mixed", "--suite kernels")],
)  # fmt: skip
def test_suites_of_before_name_the_one_that_serves_now(name, serves, capsys):
    assert main(["bench", "--suite", name]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.strip().endswith(f"{name!r} is measured by another one now: {serves}")


@pytest.mark.parametrize("name", ["cpu_kernels", "cpu_auto", "cpu_decode"])
def test_committed_results_are_still_read(name, tmp_path):
    folder = Path(__file__).parents[2] / ".github" / "bench"
    result = json.loads((folder / f"{name}.json").read_text())
    page, written = (
        [line for line in text.splitlines() if line]
        for text in (bench_plot.as_markdown(result), (folder / f"{name}.md").read_text())
    )
    # What was said by hand besides stands between generated lines.
    assert [line for line in written if line in page] == page
    if name == "cpu_kernels":
        assert written == page
        pytest.importorskip("matplotlib")
        assert bench_plot.plot(result, tmp_path / "speedup.png").startswith("wrote")


# ------------------------------------------------------------------ all that is promised of a GPU


def test_the_gpu_suite_wants_a_gpu(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert main(["bench", "--suite", "gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_the_gpu_suite_runs_the_same_on_a_cpu(tmp_path, capsys):
    argv = ["bench", "--suite", "gpu", "--device", "cpu", "--tokens", "256,320", "--dims", "16,32", "--heads", "2"]
    argv += ["--dtypes", "float32", "--block", "32", "--densities", "0.25", "--repeats", "1", "--json"]
    assert main([*argv, "--backends", "torch_gather", "--output", str(tmp_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    points = {(r["tokens"], r["dim"], r["pass"]) for r in found["kernels"]}
    assert points == {
        (n, d, p) for n, d in ((256, 16), (320, 16), (256, 32)) for p in ("forward", "forward + backward")
    }
    assert any(r["contestant"] == "torch_gather" and r["density"] == 1.0 for r in found["kernels"])
    assert {r["queries"] for r in found["decode"]} == {1}
    assert any(r["contestant"] == "triton_decode" and r["reason"] for r in found["decode"])
    names = {t["target"] for t in found["targets"]}
    assert "speed over the best dense SDPA at density 1" in names and "pattern building over its attention" in names
    for name in ("bench.json", "bench.md"):
        assert (tmp_path / name).stat().st_size > 1000
    text = (tmp_path / "bench.md").read_text()
    # Neither runs on a CPU: the table says why instead.
    assert "What is promised of a GPU" in text and "needs a CUDA or ROCm GPU" in text


def _record(**more: Any) -> dict[str, Any]:
    point = {"tokens": 32768, "dim": 128, "dtype": "bfloat16", "causal": False, "pass": "forward", "reason": None}
    return {**point, "contestant": "own", "density": 0.25, "median": 1.0, "share_of_limit": 0.9, **more}


@pytest.mark.parametrize(
    "change, others, target, reached",
    [
        ({}, [], "share of 1/density, forward", True),
        ({"share_of_limit": 0.79}, [], "share of 1/density, forward", False),
        ({"share_of_limit": 0.75, "pass": "forward + backward"}, [], "share of 1/density, forward + backward", True),
        ({"tokens": 16384}, [], "share of 1/density, forward", "absent"),
        ({"density": 0.5}, [], "share of 1/density, forward", "absent"),
        ({"density": 1.0, "speedup": 0.81}, [], "speed over the best dense SDPA at density 1", True),
        ({}, [{"contestant": "flex_attention", "median": 1.1}], "speed over compiled FlexAttention", True),
        ({}, [{"contestant": "flex_attention", "median": 0.9}], "speed over compiled FlexAttention", False),
        ({}, [], "speed over compiled FlexAttention", None),
        ({}, [{"contestant": "triton_int8", "median": 0.7}], "8-bit over 16-bit kernel", True),
        ({}, [{"contestant": "triton_int8", "median": 0.9}], "8-bit over 16-bit kernel", False),
    ],
)
def test_targets_are_judged(change, others, target, reached):
    records = [_record(**change), *(_record(**change, **o) for o in others), _record(contestant="dense flash")]
    found = {t["target"]: t["reached"] for t in bench_gpu._kernel_targets(records, "own")}
    assert found.get(target, "absent") == reached


def test_a_point_that_could_not_be_measured_is_no_success():
    record = {k: v for k, v in _record(reason="failed").items() if k not in ("median", "share_of_limit")}
    targets = list(bench_gpu._kernel_targets([record], "own"))
    assert len(targets) == 3 and all(t["reached"] is None and t["reason"] == "failed" for t in targets)
    text = bench_plot.render({**_frame(), "targets": targets}, 160)
    assert "not measured" in text and "yes" not in text


def test_building_has_its_own_target():
    built = {"method": "m", "tokens": 9, "static": False, "share_of_attention": 0.13, "reason": None}
    (slow,) = bench_gpu._pattern_targets([built, {**built, "static": True}])
    assert slow["reached"] is False and slow["wanted"] == "at most 0.12"


def test_the_time_of_a_lent_machine_is_kept(monkeypatch):
    monkeypatch.setattr(bench_gpu, "BUDGET", -1.0)
    options = make_options(suite="gpu", device="cpu", tokens=(64,), dims=(16,), heads=1, dtypes=("float32",),
                                 block=16, repeats=1, backends=("torch_gather",))  # fmt: skip
    result = bench.run(options)
    assert result["kernels"] == []
    assert [t["target"] for t in result["targets"]][-2:] == ["not begun: the time was over"] * 2


def test_every_suite_has_a_table_and_every_table_a_note():
    assert set(bench_tables.TITLES) == set(bench_tables.NOTES)
    assert SUITES == ("kernels", "patterns", "layers", "gpu", "decode", "quick")
    assert set(SUITES) - {"quick", "gpu"} <= set(bench_tables.TITLES)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_heads_of_two_kinds_are_the_same_in_one_launch_and_in_two(causal):
    q, k, v = torch.randn(3, 1, 5, 200, 16)
    options = make_options(suite="kernels", heads=5, block=32, causal=causal, device="cpu")
    pattern = bench_kernels.random_pattern(200, 5, 32, 0.25, causal)
    calls = bench_kernels._mixed_calls(options, q, k, v, pattern, 0.25)
    one_kind, *rest = [call() for call in calls.values()]
    assert next(iter(calls)) == "new pattern"
    torch.testing.assert_close(one_kind, hsa.attention(q, k, v, pattern))
    for single, double in zip(rest[::2], rest[1::2], strict=True):
        torch.testing.assert_close(single, double)
    assert not torch.allclose(rest[0], rest[2])


def test_heads_of_two_kinds_that_no_backend_runs_say_why(monkeypatch):
    from hf_sparse_attn.backend import BackendUnavailable

    def fails(*args):
        raise BackendUnavailable("nothing here")

    monkeypatch.setattr(bench_kernels, "run_pattern", fails)
    given = {"tokens": (256,), "dims": (16,), "dtypes": ("float32",), "heads": 2, "repeats": 1, "block": 32}
    records = bench.run(make_options(suite="kernels", backends=("torch_gather",), device="cpu", **given))["kernels"]
    told = {r["reason"] for r in records if r["contestant"].startswith(bench_kernels.NEW)}
    assert told == {"failed: BackendUnavailable: nothing here"}
