"""The page of two runs of llama_long_context: what it says of given figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_sparse_attn.recipe import read_recipe
from hf_sparse_attn.recipes.reports import llama_long_context_report as report
from hf_sparse_attn.settings import plain

LENGTHS = (16384, 4096)


def figures(loss: float, needles: float) -> dict[str, float]:
    found = {}
    for how, more in (("sparse", 0.01), ("dense", 0.0)):
        for length in LENGTHS:
            found[f"loss_{how}_{length}"] = loss + more
            found[f"needles_{how}_{length}"] = needles
    return found | {"density": 0.25}


def runs(folder: Path, **changes: Any) -> tuple[Path, Path]:
    """Two folders as the training loop leaves them."""
    recipe: Any = read_recipe("llama_long_context", ["steps=3", "optimizer.warmup_steps=1"])
    made = []
    for how, loss in (("sparse", 0.81), ("dense", 0.8)):
        run = folder / how
        run.mkdir()
        own = replace(recipe, train_with=how, **(changes if how == "dense" else {}))
        (run / "settings.json").write_text(json.dumps({"recipe": "llama_long_context", **plain(own)}))
        lines = [{"step": 0, "evaluation": figures(1.0, 0.5)}, *({"step": n, "loss": 1.0 / n} for n in (1, 2, 3))]
        (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told = {"before": figures(1.0, 0.5), "after": figures(loss, 0.75), "steps": 3, "step_seconds": 2.5}
        (run / "figures.json").write_text(json.dumps(told))
        (run / "cost.json").write_text(json.dumps({"cpu_seconds": 1.5, "peak": 3 * 2.0**30, "before": 2.0**30}))
        made.append(run)
    (made[0] / "unstretched.json").write_text(json.dumps(figures(1.2, 0.125)))
    return made[0], made[1]


def test_page_and_json_and_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sparse, dense = runs(tmp_path)
    arguments = ["--sparse", str(sparse), "--dense", str(dense), "--output", str(tmp_path / "made")]
    report.main(arguments)
    page = (tmp_path / "made" / "llama_long_context.md").read_text()
    # 0.81 over 0.80, and 0.82 over 0.80.
    assert "that of the dense one read dense: +2.50 % read sparse, +1.25 % read dense." in page
    assert "3072" in page and "2048" in page and "1.2000" in page and "0.125" in page
    found = json.loads((tmp_path / "made" / "llama_long_context.json").read_text())
    assert found["runs"]["dense"]["losses"] == [1.0, 0.5, 1.0 / 3]
    assert found["machine"]["date"] and len(found["commands"]) == 3
    assert [(name, how) for name, how, _ in report.rows_of(found)][:2] == [
        ("as it is", "sparse"),
        ("as it is", "dense"),
    ]
    assert (tmp_path / "made" / "llama_long_context.png").stat().st_size > 1000


def test_runs_that_cannot_be_compared(tmp_path: Path) -> None:
    sparse, dense = runs(tmp_path, seed=1)
    with pytest.raises(ValueError, match="differ in `train_with` alone"):
        report.collect(sparse, dense)


def test_a_dense_run_with_another_profile_is_read_with_that_of_the_sparse_one(tmp_path: Path) -> None:
    recipe: Any = read_recipe("llama_long_context")
    sparse, dense = runs(tmp_path, profile=replace(recipe.profile, budget=0.5))
    (dense / "reread.json").write_text(json.dumps(figures(0.9, 0.25)))
    found = report.collect(sparse, dense)
    assert found["runs"]["dense"]["after"]["loss_dense_4096"] == 0.9


def test_documents_of_a_fresh_seed(tmp_path: Path) -> None:
    sparse, dense = runs(tmp_path)
    for how, folder, loss in (("sparse", sparse, 0.606), ("dense", dense, 0.6)):
        told = {f"loss_{how}_16384": loss, f"needles_{how}_16384": 0.5}
        (folder / "fresh-7.json").write_text(json.dumps(told))
    found = report.collect(sparse, dense, fresh_seed=7)
    text = "\n".join(report.page(found))
    assert "of seed 7, read once: loss 0.6060 trained" in text
    assert "0.6000 trained and read dense (+1.00 %); needles 0.500 and 0.500." in text


def test_what_is_missing_on_the_command_line() -> None:
    with pytest.raises(SystemExit):
        report.main(["--sparse", "x"])
