"""The benchmark: what it measures and writes, at sizes that take no time; no time is ever asserted."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import bench, bench_plot, bench_suites
from hf_sparse_attn.cli import main
from hf_sparse_attn.registry import BACKENDS

SMALL = ["--tokens", "256", "--heads", "2", "--block", "32", "--densities", "0.25,0.5", "--repeats", "1"]
SPREAD = ("median", "min", "max")


class _Refuses:
    """A backend that can run nothing here."""

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
    timed = [r for r in result["kernels"] if r["reason"] is None]
    assert len(timed) == 5
    for r in timed:
        assert r["rounds"] == len(r["seconds"]) == 1
        assert all(r[name] == r["seconds"][0] for name in SPREAD) and r["warmup_seconds"] > 0
        assert r["share_of_limit"] == pytest.approx(r["speedup"] * r["achieved_density"])


def test_contestants_that_cannot_run_say_why(result, written):
    reasons = {r["contestant"]: r["reason"] for r in result["kernels"] if r["reason"]}
    assert reasons == {"refuses": "needs a machine from the future", "absent": "needs the package nowhere"}
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
    for r in by_name.values():
        assert r["reason"] is not None or (r["share_of_attention"] > 0 and r["backend"] == "torch_gather"), r


def test_models_are_compared_with_the_unpatched_one(result):
    llama = {r["contestant"]: r for r in result["model"] if r["model"] == "llama prefill"}
    assert sorted(llama) == sorted(["unpatched", *hsa.list_methods()])
    assert llama["unpatched"]["speedup"] == 1.0
    assert "video" in llama["radial"]["reason"]
    # So short an input is dense by the policy, and the report says so.
    assert llama["block_topk"]["density"] == 1.0 and "fewer than" in llama["block_topk"]["dense_because"][0]
    wan = {r["contestant"]: r for r in result["model"] if r["model"] == "wan step"}
    assert wan["unpatched"]["reason"] == "needs the package diffusers" or wan["radial"]["median"] > 0


def test_markdown_names_machine_and_versions(result, written):
    text = (written / "bench.md").read_text()
    assert result["machine"]["cpu"] in text and f"torch {torch.__version__}" in text and result["date"] in text
    tables = [line for line in text.splitlines() if line.startswith("|")]
    assert len(tables) == sum(2 + len(result[name]) for name in ("kernels", "patterns", "model"))
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
    assert "patterns" not in found and "model" not in found and found["machine"]["threads"] == 1
    broken = [r for r in found["kernels"] if r["contestant"] == "breaks"]
    assert [r["reason"] for r in broken] == ["failed: AssertionError: must not be called"] * 2
    assert all("speedup" in r for r in found["kernels"] if r["contestant"] == "torch_gather")


def test_threads_are_put_back():
    before = torch.get_num_threads()
    given = {"suite": "kernels", "tokens": (64,), "dims": (16,), "dtypes": ("float32",), "block": 16, "heads": 1}
    bench.run(bench.make_options(**given, backends=("torch_gather",), repeats=1, threads=before + 1))
    assert torch.get_num_threads() == before


def test_flex_is_timed_without_its_log_sum_exp(monkeypatch):
    class OutputOnly:
        attention = staticmethod(lambda *args: pytest.fail("asked for the log-sum-exp"))
        attention_output = staticmethod(lambda q, k, v, pattern, scale: v)

    monkeypatch.setitem(BACKENDS._entries, "output_only", OutputOnly)
    v = torch.ones(1, 1, 1, 1)
    assert bench._sparse_call("output_only", v, v, v, hsa.BlockPattern.dense(1, 1, False))() is v


def test_contestants_take_turns_and_slow_points_stop(monkeypatch):
    options = bench.make_options(suite="kernels", repeats=5, device="cpu")
    order: list[str] = []
    calls = {name: (lambda n=name: order.append(n)) for name in "ab"}
    times, failed = bench.in_turns(calls, options, "test")
    assert "".join(order) == "ab" * 6 and not failed and times["a"]["rounds"] == 5
    # Each look at the clock is a minute later.
    clock = iter(range(0, 1 << 20, 60))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    times, _ = bench.in_turns(calls, options, "test")
    assert times["a"]["rounds"] == times["b"]["rounds"] == 2


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("tokens, block, density", [(1024, 32, 0.25), (1000, 64, 0.5), (111, 16, 1.0), (63, 64, 0.1)])
def test_random_patterns(tokens, block, density, causal):
    pattern = bench.random_pattern(tokens, 3, block, density, causal).validate()
    again = bench.random_pattern(tokens, 3, block, density, causal)
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
    assert bench_suites.scaled(type(full), 1 << 20) == full
    short = bench_suites.scaled(type(full), 8192)
    assert (short.vertical, short.slash) == (full.vertical // 4, full.slash // 4)
    assert (short.block_size, short.last_queries) == (full.block_size, full.last_queries)


@pytest.mark.parametrize("tokens", [1, 63, 256, 1000, 32768])
def test_video_grids(tokens):
    frames, height, width = bench_suites.video_grid(tokens)
    assert 1 <= frames * height * width <= tokens
    assert tokens < 64 or frames >= 4


@pytest.mark.parametrize("dim", [1, 7, 64])
def test_synthetic_heads_are_local_and_have_a_sink(dim):
    q, k = bench_suites.structured(256, 2, dim)
    assert q.shape == k.shape == (1, 2, 256, dim)
    weights = (q @ k.mT * dim**-0.5).softmax(-1)
    if dim == 64:
        assert (weights[..., 0].mean(-1) > 10 / 256).all()
        near = weights.diagonal(dim1=-2, dim2=-1).mean()
        far = weights.diagonal(offset=100, dim1=-2, dim2=-1).mean()
        assert near > 4 * far
