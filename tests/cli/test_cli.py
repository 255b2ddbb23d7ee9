"""The command line: what it prints where, what it returns, and how it fails."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import machine
from hf_sparse_attn.bench import harness as bench
from hf_sparse_attn.cli import doctor
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.documents import catalog
from hf_sparse_attn.method import Method
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS
from hf_sparse_attn.tables import markdown


def test_methods_lists_every_method(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in hsa.list_methods())


def test_methods_json_holds_the_defaults(capsys):
    assert main(["methods", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [m["name"] for m in found["methods"]] == hsa.list_methods()
    window = next(m for m in found["methods"] if m["name"] == "sliding_window")
    assert window["parameters"] == hsa.get_method("sliding_window")().params()
    assert window["static"] is True
    assert {b["name"] for b in found["backends"]} >= {"torch_reference", "torch_gather", "triton_block_sparse"}
    assert {f["name"] for f in found["families"]} >= {"llama", "wan"}


def test_methods_markdown_is_the_tables_between_markers(capsys):
    assert main(["methods", "--markdown"]) == 0
    out = capsys.readouterr().out
    for name in ("methods", "families", "backends"):
        between = out.partition(f"<!-- generated: {name} -->\n")[2].partition("\n<!-- end -->")[0]
        assert between == markdown(*getattr(catalog, f"{name}_table")())


def test_tables_say_something_about_every_entry():
    for columns, rows in (catalog.methods_table(), catalog.families_table(), catalog.backends_table()):
        assert rows
        for row in rows:
            assert len(row) == len(columns)
            assert all(row), row


@pytest.mark.parametrize(
    "registry, name, table",
    [(BACKENDS, "flex_attention", catalog.backends_table), (FAMILIES, "wan", catalog.families_table)],
    ids=["backend", "family"],
)
def test_tables_do_not_depend_on_installed_packages(registry, name, table, monkeypatch):
    here = table()
    monkeypatch.delitem(registry._entries, name)
    monkeypatch.setitem(registry.missing, name, "needs the package nowhere")
    assert table() == here


def test_methods_of_others_are_listed_but_not_in_the_readme(capsys, monkeypatch):
    class Foreign(Method):
        """Keeps what it likes."""

    monkeypatch.setitem(METHODS._entries, "foreign", Foreign)
    assert "foreign" not in markdown(*catalog.methods_table())
    assert main(["methods"]) == 0
    assert "foreign" in capsys.readouterr().out


def test_markdown_escapes_bars():
    assert markdown(("a", "b"), [("x|y", "z")]) == "| a | b |\n| --- | --- |\n| x\\|y | z |"


def test_doctor_prints_versions_and_backends(capsys):
    assert main(["doctor", "--backends", "torch_gather"]) == 0
    out = capsys.readouterr().out
    assert torch.__version__ in out
    assert "torch_gather" in out and "agrees" in out and "All backends that run here agree" in out


def test_doctor_json_tries_dtypes_and_passes(capsys):
    assert main(["doctor", "--json", "--backends", "torch_gather,torch_reference"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True
    assert found["versions"]["torch"] == torch.__version__
    assert found["machine"]["threads"] == torch.get_num_threads()
    tried = {(r["backend"], r["dtype"], r["pass"]) for r in found["backends"]}
    assert len(tried) == 2 * 2 * 2
    for r in found["backends"]:
        assert r["runs"] and r["agrees"] and r["error"] <= r["allowed"]


class _Broken:
    """Stands in for a backend.

    Args:
        fault: "wrong", "nan" or "raises".
    """

    auto_rank: ClassVar[dict[str, int]] = {}

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def why_not(self, pattern: Any, q: Any, k: Any, v: Any, needs_grad: bool) -> str | None:
        return "forward only" if needs_grad else None

    def attention(self, q: Any, k: Any, v: Any, pattern: Any, scale: float) -> Any:
        if self.fault == "raises":
            raise RuntimeError("no kernel image")
        out = BACKENDS.get("torch_reference").attention(q, k, v, pattern, scale)[0].clone()
        # One wrong number among all.
        out[0, 0, 7, 3] += 0.5 if self.fault == "wrong" else torch.nan
        return out, out


@pytest.mark.parametrize("fault, said", [("wrong", "DISAGREES"), ("nan", "DISAGREES"), ("raises", "no kernel image")])
def test_doctor_finds_a_broken_backend(fault, said, capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS._entries, "broken", _Broken(fault))
    assert main(["doctor", "--backends", "broken"]) == 1
    out = capsys.readouterr().out
    assert said in out and "forward only" in out and "do not use it here" in out


@pytest.mark.parametrize("place", [0, 1, 2])
def test_doctor_sees_a_nan_in_any_gradient(place):
    exact = [torch.zeros(3, dtype=torch.float64) for _ in range(3)]
    found = [torch.ones(3) for _ in range(3)]
    assert doctor._distance(found, exact) == 1.0
    found[place][1] = torch.nan
    assert not doctor._distance(found, exact) <= 10.0


def test_doctor_lists_a_backend_whose_package_is_missing(capsys, monkeypatch):
    monkeypatch.setitem(BACKENDS.missing, "absent", "needs the package nowhere")
    assert main(["doctor", "--backends", "absent"]) == 0
    assert "needs the package nowhere" in capsys.readouterr().out


def test_doctor_does_not_list_a_file_that_only_helps(monkeypatch):
    monkeypatch.setitem(BACKENDS.missing, "triton_common", "needs the package triton")
    monkeypatch.setitem(BACKENDS.missing, "triton_int8", "needs the package triton")
    monkeypatch.delitem(BACKENDS._entries, "triton_int8", raising=False)
    known = BACKENDS.known()
    assert "triton_int8" in known and "triton_common" not in known


@pytest.mark.parametrize(("inexact", "code"), [(0.0, 1), (0.5, 0)], ids=["exact", "inexact"])
def test_doctor_allows_what_a_backend_says_of_itself(inexact, code, capsys, monkeypatch):
    class Coarse(_Broken):
        def attention(self, q, k, v, pattern, scale):
            out = BACKENDS.get("torch_reference").attention(q, k, v, pattern, scale)[0]
            return out + 0.4 * out.abs().max(), out

    coarse = Coarse("none")
    coarse.inexact = inexact
    monkeypatch.setitem(BACKENDS._entries, "coarse", coarse)
    assert main(["doctor", "--backends", "coarse"]) == code
    assert ("DISAGREES" in capsys.readouterr().out) == bool(code)


def test_versions_of_packages_that_are_not_there(monkeypatch):
    monkeypatch.setattr(machine, "_PACKAGES", ("torch", "no-such-package"))
    assert machine.versions()["no-such-package"] is None


@pytest.mark.parametrize(
    "argv, said",
    [
        ([], "required"),
        (["fly"], "invalid choice: 'fly'"),
        (["methods", "--wrong"], "--wrong"),
        (["doctor", "--backends", "cuda_magic"], "must be one of"),
        (
            ["bench", "--suite", "gpu9"],
            "`suite` must be one of kernels, patterns, layers, gpu, decode, quick; got 'gpu9'",
        ),
        (["bench", "--tokens", "many"], "must be ints separated by commas, got 'many'"),
        (["bench", "--tokens", "3"], "`tokens` must be at least 16, got 3"),
        (["bench", "--dtypes", "int8"], "`dtypes` must be one of"),
        (["bench", "--densities", "1.5"], "`densities` must be more than 0 and at most 1, got 1.5"),
        (["bench", "--block", "100"], "`block` must be a power of two"),
        (["bench", "--min-tokens", "few"], "`min_tokens` must be 'auto' or a number of tokens, got 'few'"),
        (["bench", "--repeats", "0"], "`repeats` must be at least 1, got 0"),
        (["bench", "--seconds", "0"], "`seconds` must be more than 0"),
        (["bench", "--heads", "0"], "`heads` must be at least 1"),
        (["bench", "--threads", "0"], "`threads` must be at least 1"),
        (["bench", "--backends", "cuda_magic"], "must be one of"),
        (["bench", "--device", "toaster"], "`device` must be one that torch can use here, got 'toaster'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_errors_are_one_line_and_status_2(argv, said, capsys):
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("hf-sparse-attn: error: ") and shown.err.count("\n") == 1
    assert said in shown.err


def test_debug_shows_the_traceback():
    with pytest.raises(ValueError, match="`tokens` must be at least 16"):
        main(["bench", "--tokens", "3", "--debug"])


def test_an_error_of_the_program_is_not_hidden(monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda backends: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        main(["doctor"])


def test_help_names_the_commands(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--help"])
    assert left.value.code == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("demo", "methods", "doctor", "bench"))
    assert "\n    report " in out and "\n    train " in out


def test_help_costs_no_import_of_torch():
    code = "import sys; from hf_sparse_attn.cli.commands import main\n"
    code += "try: main(['--help'])\nfinally: assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


def test_a_reader_that_leaves_early_is_no_error():
    code = "from hf_sparse_attn.cli.commands import main; raise SystemExit(main(['methods', '--json']))"
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, timeout=120)
    os.close(writer)
    assert done.stderr == b""


def test_bench_refuses_an_output_that_is_a_file_before_it_measures(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "run", lambda options: pytest.fail("measured first"))
    (tmp_path / "file").write_text("")
    assert main(["bench", "--output", str(tmp_path / "file")]) == 2
    assert "file" in capsys.readouterr().err


@pytest.mark.slow
def test_demo_compares_and_draws(tmp_path, capsys):
    assert main(["demo", "--length", "1024", "--output", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = {row["method"]: row for row in told["rows"]}
    assert told["length"] == 1024 and rows["dense"]["needles"] == 16 and rows["dense"]["density"] == 1.0
    others = [row for name, row in rows.items() if name != "dense"]
    assert len(others) == 6 and all(row["density"] < 1 and row["error"] > 0 for row in others)
    # A window of 64 bytes cannot answer what stands further back.
    assert rows["sliding_window(window=64, sink=16, block_size=64)"]["needles"] < 8
    assert (tmp_path / "attention_maps.png").stat().st_size > 50_000


def test_demo_prints_a_table(tmp_path, capsys):
    assert main(["demo", "--length", "640", "--output", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert all(word in out for word in ("vertical_slash", "needles", "time ratio", "attention_maps.png"))


def test_demo_refuses_lengths_beyond_the_model(capsys):
    assert main(["demo", "--length", "100000"]) == 2
    assert "`length` must be from 576 to 8192 bytes for the shipped model, got 100000" in capsys.readouterr().err
