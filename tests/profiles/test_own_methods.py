"""Profiles whose methods do not come with the package: what a reader without them is told, and `--import`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.registry import METHODS
from tests.support import tiny_lm

MODULE = "told_methods"
CODE = """
from dataclasses import dataclass
import hf_sparse_attn as hsa

@hsa.register_method("own_told")
@dataclass(frozen=True, kw_only=True)
class ToldWindow(hsa.get_method("sliding_window")):
    "A window of one's own."
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where somebody's module lies, and a profile that was made with it; the module is forgotten again."""
    monkeypatch.chdir(tmp_path)
    Path(f"{MODULE}.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    __import__(MODULE)
    candidates = [hsa.get_method("own_told")(window=24, sink=2), "sliding_window"]
    model = tiny_lm.FAMILIES["llama"]()
    found = hsa.profile(model, [tiny_lm.tokens(1, 90)], candidates, budget=0.6, progress=False, maps=0)
    assert "own_told" in {method.name for method in found.methods}
    found.save_pretrained("profile")
    forget()
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(tmp_path)])
    yield tmp_path
    forget()


def forget() -> None:
    sys.modules.pop(MODULE, None)
    METHODS._entries.pop("own_told", None)


SAID = (
    rf"`method` must be one of .* got 'own_told' \(a method of your own: import {MODULE} first, on the "
    rf"command line by --import {MODULE}, or install a package with an entry point for it\)"
)


def test_the_file_says_which_module_and_nothing_imports_it(folder: Path) -> None:
    methods = json.loads((folder / "profile/head_profile.json").read_text())["methods"]
    modules = {entry["method"]: entry.get("module") for entry in methods}
    assert modules["own_told"] == MODULE and modules["dense"] is None
    for read in (hsa.HeadProfile.from_pretrained, lambda path: hsa.patch(tiny_lm.FAMILIES["llama"](), path)):
        with pytest.raises(ValueError, match=SAID):
            read("./profile")
    assert MODULE not in sys.modules


def test_the_command_line_imports_what_it_is_told_to(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "profile"]) == 2
    err = capsys.readouterr().err
    assert f"--import {MODULE}" in err and err.count("\n") == 1
    before = list(sys.path)
    assert main(["report", "profile", "--import", MODULE]) == 0
    assert "own_told" in capsys.readouterr().out and sys.path == before
    assert main(["methods", "--json", "--import", MODULE, "--import", "json"]) == 0
    assert "own_told" in capsys.readouterr().out


def test_candidates_of_ones_own(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("candidates.json").write_text('[{"method": "own_told", "params": {"window": 24}}]')
    assert main(["profile", "byte_llama", "--candidates", "candidates.json", "--output", "o"]) == 2
    assert (
        "import the module that registers it first, on the command line by --import MODULE" in capsys.readouterr().err
    )


@pytest.mark.parametrize("code", ["raise RuntimeError('broken')", "a b", "import a_module_nobody_has", None])
def test_modules_that_cannot_be_imported(
    code: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if code is not None:
        Path("told_broken.py").write_text(code)
    assert main(["methods", "--import", "told_broken"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("hf-sparse-attn: error: --import must name a module that can be imported, got 'told_broken'")
    assert err.count("\n") == 1 and str(tmp_path) not in sys.path


@pytest.mark.parametrize("module", ["os; import sys", "", 3, ["os"], "a" * 300, "../x"])
def test_a_module_that_is_no_name_is_refused(module: object, folder: Path) -> None:
    file = folder / "profile/head_profile.json"
    value = json.loads(file.read_text())
    value["methods"][-1]["module"] = module
    file.write_text(json.dumps(value))
    with pytest.raises(ValueError, match=r"`methods\[\d\].module` must be"):
        hsa.HeadProfile.from_pretrained("profile")
