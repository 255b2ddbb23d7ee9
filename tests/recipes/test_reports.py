"""Pages of reports: those that stand in .github/train come from the figures there, letter by letter."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_sparse_attn.recipes.reports import byte_llama_report, page

TRAIN = Path(__file__).parents[2] / ".github" / "train"
PAGES = ("llama_long_context", "step_distill", "wan_long_video")


@pytest.mark.parametrize("name", PAGES)
def test_pages_come_from_their_figures(name: str, tmp_path: Path) -> None:
    report: Any = importlib.import_module(f"hf_sparse_attn.recipes.reports.{name}_report")
    figures = json.loads((TRAIN / f"{name}.json").read_text())
    page.write(tmp_path / "new", name, report.page(figures), figures, lambda file: file.write_bytes(b""))
    for suffix in ("json", "md"):
        assert (tmp_path / "new" / f"{name}.{suffix}").read_text() == (TRAIN / f"{name}.{suffix}").read_text()


def test_the_page_written_by_hand_has_the_figures_of_its_runs() -> None:
    assert {file.stem for file in TRAIN.glob("*.json")} == {*PAGES, "distill_sparse"}
    runs = json.loads((TRAIN / "distill_sparse.json").read_text())["runs"]
    known = {value for run in runs for when in ("before", "after") for value in run[when].values()}
    rows = re.findall(r"^\| .*\d \|$", (TRAIN / "distill_sparse.md").read_text(), re.M)
    assert len(rows) == 10
    for row in rows:
        for told in row.split("|")[3:-1]:
            digits = len(told.strip().partition(".")[2])
            assert any(f"{value:.{digits}f}" == told.strip() for value in known), row


def test_rows_as_text_and_as_markdown() -> None:
    rows = [{"name": name, **page.cells(row, [("a", "x", ".2f")])} for name, row in (("m", {"x": 1.0}), ("n", {}))]
    assert page.pipes(rows) == "| name | a |\n| --- | --- |\n| m | 1.00 |\n| n | - |"
    assert page.grid(rows, 80).startswith("```\n") and "m      1.00" in page.grid(rows, 80)


def test_what_was_made_is_not_made_again(tmp_path: Path) -> None:
    file = tmp_path / "new" / "a.json"
    assert page.cached(file, lambda: {"a": 1}) == page.cached(file, lambda: pytest.fail("made again")) == {"a": 1}


def test_a_strip_shows_frames_of_all_clips() -> None:
    clips = {name: torch.rand(1, 9, 3, 4, 4) for name in ("true", "made")}
    rows = page.strip("a clip", clips, 3)
    assert [(title, name) for title, name, _ in rows] == [("a clip; frames 1, 5, 9", "true"), ("", "made")]
    assert torch.equal(rows[1][2], clips["made"][:, [0, 4, 8]])


def test_the_tables_of_the_byte_llama(tmp_path: Path) -> None:
    from hf_sparse_attn.shipped.byte_llama import MODEL

    argv = ["--model", str(MODEL), "--output", str(tmp_path / "a.md"), "--documents", "1", "--lengths", "512"]
    byte_llama_report.main(argv)
    needles, heads = (tmp_path / "a.md").read_text().strip().split("\n\n")
    assert needles.splitlines()[2].startswith("| 512 | ") and len(heads.splitlines()) == 2 + 3 * 8
    assert "| retrieval |" in heads


@pytest.mark.parametrize(
    "shares, kind",
    [((0.1, 0.1, 0.9, 0.3), "retrieval"), ((0.5, 0.9, 0.9, 0.0), "offset 3"), ((0.1, 0.1, 0.4, 0.0), "sink"),
     ((0.4, 0.5, 0.3, 0.0), "local"), ((0.4, 0.4, 0.3, 0.2), "spread")],
)  # fmt: skip
def test_heads_of_the_byte_llama_are_named(shares: tuple[float, ...], kind: str) -> None:
    assert byte_llama_report.kind_of(3, *shares) == kind
