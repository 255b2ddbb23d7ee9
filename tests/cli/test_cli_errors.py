"""What the command line answers to what cannot work: a line that names the argument, and status 2, before any work."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.profiling.budget import BudgetError
from hf_sparse_attn.sharing.files import make_folder
from hf_sparse_attn.sharing.hub import loading
from tests.support import tiny_lm


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what users may have lying about."""
    monkeypatch.chdir(tmp_path)
    files = {
        "file": b"x",
        "junk/config.json": b"{not json",
        "list/config.json": b"[1]",
        "pipe/model_index.json": b'{"_class_name": "Nope"}',
        "bad.yaml": b": :\n - [",
        "bytes.yaml": b"\xff\xfe\x80",
        "one.json": b'{"a": 1}',
        "name.json": b'[{"method": "slidng_window", "params": {}}]',
        "bytes.json": b"\xff\xff",
        "empty/keep": b"",
    }
    for name, content in files.items():
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_bytes(content)
    return tmp_path


MODEL = "`model` must be the folder of a model, its id on the Hub"
OUTPUT = "`output` must be a folder that can be written, got file: a file of that name is there"
BYTE = "profile byte_llama --output o"

CASES = {
    "profile ./nope --output o": f"{MODEL}, or one of byte_llama, moving_wan; got './nope', which is not there",
    "profile file --output o": "got the file file",
    "profile empty --output o": "got 'empty': it holds neither config.json nor model_index.json",
    "profile junk --output o": "got 'junk': Expecting property name",
    "profile list --output o": "got 'list': ",
    "profile pipe --output o": "got 'pipe': ",
    "profile byte_llama --output file": OUTPUT,
    "profile byte_llama --output file/x": "`output` must be a folder that can be written, got file/x: Not a directory",
    f"{BYTE} --budget 0": "`budget` must be more than 0 and at most 1, got 0.0",
    f"{BYTE} --budget 1.5": "`budget` must be more than 0 and at most 1, got 1.5",
    f"{BYTE} --metric nope": "`metric` must be one of",
    f"{BYTE} --passes 3": "`passes` must be 1 or 2, got 3",
    f"{BYTE} --steps x": "argument --steps: must be floats separated by commas, got 'x'",
    f"{BYTE} --steps 0.6,0.2": "`steps` must follow one another from 0 to 1",
    f"{BYTE} --max-plans-per-layer 0": "`max_plans_per_layer` must be at least 1, got 0",
    f"{BYTE} --query-blocks 0": "`query_blocks` must be at least 1, got 0",
    f"{BYTE} --seed -1": "`seed` must be at least 0, got -1",
    f"{BYTE} --dtype float16": "--dtype must be left out for byte_llama",
    f"{BYTE} --device nope": "`device` must be one that torch can use here, got 'nope'",
    f"{BYTE} --length 10": "`length` must be at least 545 for 16 needles, got 10",
    f"{BYTE} --candidates nope.json": "`candidates` must be a file that can be read, got nope.json: No such file",
    f"{BYTE} --candidates empty": "`candidates` must be a file that can be read, got empty: Is a directory",
    f"{BYTE} --candidates one.json": "`candidates` must be a JSON list of methods with params, got one.json",
    f"{BYTE} --candidates name.json": "(nearest: sliding_window)",
    f"{BYTE} --candidates bytes.json": "`candidates` must be a JSON list of methods with params, got bytes.json",
    "profile pipe --output o --call {": "`call` must be a JSON object, got {",
    "train duo_gate --output file": OUTPUT,
    "train llama_long_context model=./nope --output o": f"{MODEL}, or one of byte_llama; got './nope', which is not",
    "train seer_gate model=file --output o": "got the file file",
    "train duo_gate model=junk --output o": "got 'junk': It looks like the config file at",
    "train wan_long_video model=./nope --output o": f"{MODEL}; got './nope', which is not there",
    "train step_distill model=pipe --output o": "got 'pipe': ",
    "train qwen_vl_long_video model=empty --output o": "got 'empty': ",
    "train bad.yaml --output o": "the recipe and its overrides must be YAML, got bad.yaml",
    "train bytes.yaml --output o": "the recipe and its overrides must be YAML, got bytes.yaml",
    "train nope.yaml --output o": "the recipe must be a YAML file, got nope.yaml, which is not there",
    "train empty --output o": "the recipe must be a .yaml file or one of",
    "report ./nope": "`source` must be a folder that exists or a Hub id",
    "report file": "`source` must be a folder or a Hub id, got the file file",
    "report empty": "`source` must be a folder that holds head_profile.json, got empty",
    "demo --output file": OUTPUT,
    "demo --threads 0": "`threads` must be at least 1, got 0",
    "eval --output file": OUTPUT,
    "eval --clips 0": "`clips` must be at least 1, got 0",
    "eval --densities 2": "`density` must be more than 0 and at most 1, got 2.0",
    "bench --output file": OUTPUT,
    "bench --calibrate --output file": OUTPUT,
    "bench --device cuda:99": "`device` must be one that torch can use here, got 'cuda:99'",
    "coverage --output file": OUTPUT,
    "docs --output file": OUTPUT,
}


@pytest.mark.parametrize("line", CASES, ids=lambda line: line.replace(" ", "-"))
def test_one_clear_line(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert CASES[line] in err and err.startswith("hf-sparse-attn: error: ") and err.count("\n") == 1
    assert not out


def test_data_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    tiny_lm.FAMILIES["llama"]().save_pretrained(tmp_path / "lm")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, "a"))).save_pretrained(
        tmp_path / "lm"
    )
    for data, said in (
        ("nope.txt", "`data` must be a file that can be read, got nope.txt: No such file or directory"),
        ("empty", "`data` must be a file that can be read, got empty: Is a directory"),
        ("bytes.json", "`data` must be a text in UTF-8, got bytes.json"),
        ("file", "`data` must hold at least 64 tokens for 4 texts of each length, got 1"),
    ):
        assert main(["profile", "lm", "--data", data, "--length", "16", "--output", "o"]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"hf-sparse-attn: error: {said}")


def test_a_folder_that_must_not_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=r"`output` must be a folder that can be written, got .*: Permission"):
        make_folder(tmp_path / "new")


def test_what_is_not_installed_and_memory_are_no_fault_of_the_model() -> None:
    for error in (ImportError("torchvision"), MemoryError(), torch.OutOfMemoryError("2 GiB")):
        with pytest.raises(type(error)), loading("empty"):
            raise error
    with pytest.raises(OSError, match=r"got 'empty': gone"), loading("empty"):
        raise OSError("gone")


def ran(model: Any) -> list[int]:
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    return calls


WINDOW = hsa.get_method("sliding_window")(window=64, sink=16, block_size=32)


@pytest.mark.parametrize(
    ("candidates", "budget"),
    [([WINDOW], 0.2), ([hsa.get_method("block_topk")(block_size=16, density=0.5)], 0.3), ([WINDOW, "dense"], 0.05)],
    ids=["static", "dynamic", "with-dense"],
)
def test_a_budget_that_cannot_be_met_costs_no_measuring(candidates: list[Any], budget: float) -> None:
    model = tiny_lm.FAMILIES["llama"]()
    finished = ran(model)
    texts = [tiny_lm.tokens(1, n, n) for n in (180, 200, 190)]
    with pytest.raises(BudgetError, match=r"`budget` must be at least 0\.\d+, the least that a candidate keeps"):
        hsa.profile(model, texts, candidates, budget=budget, progress=False)
    assert not finished


def test_a_budget_that_the_longest_text_meets_is_tried() -> None:
    model = tiny_lm.FAMILIES["llama"]()
    # At 96 tokens alone the window keeps more than that.
    texts = [tiny_lm.tokens(1, 96), *(tiny_lm.tokens(1, 180, n) for n in range(3))]
    assert hsa.profile(model, texts, [WINDOW], budget=0.78, progress=False, maps=0).density <= 0.78


def test_steps_are_refused_before_measuring_where_there_are_none() -> None:
    model = tiny_lm.FAMILIES["llama"]()
    finished = ran(model)
    with pytest.raises(ValueError, match="`steps` must be left out for a model without denoising steps"):
        hsa.profile(model, [tiny_lm.tokens(1, 64)], [WINDOW], steps=[(0, 0.5), (0.5, 1)], progress=False)
    with pytest.raises(ValueError, match="`solver` must be one of"):
        hsa.profile(model, [tiny_lm.tokens(1, 64)], [WINDOW], solver="dp", progress=False)
    with pytest.raises(ValueError, match="`state` must be a file, got the folder empty"):
        hsa.profile(model, [tiny_lm.tokens(1, 64)], [WINDOW], state="empty", progress=False)
    assert not finished
