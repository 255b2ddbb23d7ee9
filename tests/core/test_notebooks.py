"""The notebooks: their form, and that their cells run in order, with the shipped models and no network."""

from __future__ import annotations

import ast
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.support.notebooks import FOLDER, NOTEBOOKS, load, run, source

FAST = {"patch_and_compare"}
NAMES = {"patch_and_compare", "profile_a_model", "fine_tune"}
_KEYS = {"markdown": set(), "code": {"execution_count", "outputs"}}
_OUTPUTS = {
    "stream": {"name", "output_type", "text"},
    "execute_result": {"data", "execution_count", "metadata", "output_type"},
}
# What a reader sees of an output, whatever the numbers in it.
Kinds = list[list[str]]


def named(path: Path) -> str:
    return path.stem


def kinds_of(outputs: list[dict[str, Any]]) -> list[str]:
    return [" ".join([output["output_type"], *output.get("data", {})]) for output in outputs]


def test_there_are_three() -> None:
    assert {path.stem for path in NOTEBOOKS} == NAMES


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_of_the_format(path: Path) -> None:
    document = load(path)
    assert (document["nbformat"], document["nbformat_minor"]) == (4, 5)
    assert set(document) == {"cells", "metadata", "nbformat", "nbformat_minor"}
    assert document["metadata"]["kernelspec"]["name"] == "python3"
    names = [cell["id"] for cell in document["cells"]]
    assert len(names) == len(set(names)) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in names)
    count = 0
    for cell in document["cells"]:
        kind = cell["cell_type"]
        assert set(cell) == {"cell_type", "id", "metadata", "source"} | _KEYS[kind]
        assert isinstance(cell["source"], list) and source(cell).strip() == source(cell) != ""
        if kind == "code":
            count += 1
            assert cell["execution_count"] == count
            for output in cell["outputs"]:
                assert set(output) == _OUTPUTS[output["output_type"]]
                assert output.get("execution_count", count) == count
    # As the run writes it: a change of one cell is then one change of the file.
    assert path.read_text(encoding="utf-8") == json.dumps(document, indent=1, ensure_ascii=False) + "\n"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_a_notebook_is_read_in_ten_minutes(path: Path) -> None:
    cells = load(path)["cells"]
    words = sum(len(source(cell).split()) for cell in cells if cell["cell_type"] == "markdown")
    code = [source(cell).splitlines() for cell in cells if cell["cell_type"] == "code"]
    assert words < 700 and sum(map(len, code)) < 100 and max(map(len, code)) <= 35
    assert path.stat().st_size < 100_000
    assert max(len(line) for lines in code for line in lines) < 120


@pytest.mark.parametrize("path", NOTEBOOKS, ids=named)
def test_cells_are_plain_python_and_links_lead_somewhere(path: Path) -> None:
    for cell in load(path)["cells"]:
        if cell["cell_type"] == "code":
            ast.parse(source(cell))
        else:
            for link in re.findall(r"\]\(([^)\s]+)\)", source(cell)):
                assert "://" not in link and (FOLDER / link.partition("#")[0]).exists(), link


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=[] if p.stem in FAST else pytest.mark.slow) for p in NOTEBOOKS]
)
def test_cells_run_in_order_without_network(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def refused(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            raise AssertionError(f"a notebook asked for the network: {address}")
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: pytest.fail(f"a name was looked up: {given}"))
    monkeypatch.chdir(tmp_path)
    document = load(path)
    for cell, outputs in run(document):
        # What stands in the notebook is what it shows; numbers may differ by machine.
        assert kinds_of(cell["outputs"]) == kinds_of(outputs), cell["id"]


def test_an_error_in_a_cell_is_told() -> None:
    cells = [
        {"cell_type": "code", "id": "a", "source": ["x = 1\n", "x"]},
        {"cell_type": "code", "id": "b", "source": ["y"]},
    ]
    ran = run({"cells": cells})
    shown = next(ran)[1]
    assert [o["data"] for o in shown] == [{"text/plain": ["1"]}]
    with pytest.raises(NameError, match="'y'"):
        next(ran)
