"""`hf-sparse-attn train RECIPE --help`: every key, at once, whatever is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from hf_sparse_attn.cli import recipe_help
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.documents.docstrings import dataclasses_in, fields_of
from hf_sparse_attn.recipe import recipe_class, shipped_recipes


def every_key(kind: type[Any], prefix: str = "") -> Iterator[str]:
    """The keys of settings, those inside of others with dots."""
    for field, hint, _ in fields_of(kind):
        name = prefix + field.name
        yield name
        many = "[]" if "tuple" in str(hint) else ""
        for inner in dataclasses_in(hint):
            yield from every_key(inner, f"{name}{many}.")


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_key_is_told_with_what_the_file_sets(name: str) -> None:
    file = yaml.safe_load(shipped_recipes()[name].read_text())
    found = recipe_help.keys_of(name)
    keys = [key for group in found["groups"] for key in group["keys"]]
    assert sorted(key["key"] for key in keys) == sorted(every_key(recipe_class(file.pop("recipe"))))
    assert all(key["type"] and key["default"] and key["meaning"] for key in keys)
    values = {key["key"]: key["value"] for key in keys if "value" in key}
    groups = {group["title"].partition(":")[0] for group in found["groups"]}
    for key, value in file.items():
        if key not in values:
            assert key in groups
            inner = {name.removeprefix(f"{key}."): told for name, told in values.items()}
            assert all(inner[name] == told for name, told in value.items())
        else:
            assert values[key] == value


def test_the_text_fits_the_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["train", "wan_long_video", "--help", "optimizer.beta2=0.5"]) == 0
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    assert "  optimizer.beta2: float, default 0.999; here 0.5\n      of AdamW, in [0, 1).\n" in out
    assert out.startswith("usage: hf-sparse-attn train wan_long_video [key=value ...] --output DIR")
    # The option may stand in front; without a recipe it is the help of the command.
    assert main(["train", "--help", "wan_long_video", "optimizer.beta2=0.5"]) == 0
    assert capsys.readouterr().out == out
    assert main(["train", "--help"]) == 0
    assert "after a recipe, its keys" in capsys.readouterr().out


def test_a_file_of_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("recipe: duo_gate\nsteps: 7\n")
    assert main(["train", str(file), "--help", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"key": "steps", "value": 7}.items() <= next(
        key for key in found["groups"][0]["keys"] if key["key"] == "steps"
    ).items()
    for text, said in (
        ("recipe: duo_gat\n", "`recipe` must be one of byte_llama, distill_sparse"),
        ("[1]", "must hold a mapping of settings"),
        (": :\n -", "the recipe and its overrides must be YAML"),
    ):
        file.write_text(text)
        assert main(["train", str(file), "--help"]) == 2
        assert said in capsys.readouterr().err
    assert main(["train", "duo_gat", "--help"]) == 2
    assert "got 'duo_gat' (nearest: duo_gate)" in capsys.readouterr().err


def test_it_needs_neither_torch_nor_an_extra_and_no_time() -> None:
    code = (
        "import sys, time\n"
        "for name in ('torch', 'yaml', 'peft', 'transformers', 'diffusers'): sys.modules[name] = None\n"
        "import importlib.util as util; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'yaml' else find(name, *rest)\n"
        "from hf_sparse_attn.cli import main\n"
        "status = main(['train', 'llama_long_context', '--help'])\n"
        "assert time.process_time() < 2\n"
        "sys.exit(status)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    said = "what llama_long_context sets needs PyYAML (pip install 'hf-sparse-attn[train]')"
    assert said in " ".join(run.stdout.split())
    assert "optimizer.learning_rate: float, required\n" in run.stdout
