"""The suite of decoding: every way meets the same model, cache and tokens, and the table says what ran."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from hf_sparse_attn.bench import generation, harness, plot
from hf_sparse_attn.bench.options import make_options
from hf_sparse_attn.cli.commands import main

WAYS = ["transformers", "exact", "exact, preallocated", "quest 0.5, preallocated", "OpenVINO GenAI", "llama.cpp"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 3, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    made = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(made)
    return made


def options(folder: Path, **given: object):
    return make_options(
        suite="decode", model=str(folder), tokens=(150,), dtypes=("float32",), densities=(0.5,), repeats=2,
        device="cpu", **given,
    )  # fmt: skip


def test_every_way_is_timed_in_turns(folder: Path) -> None:
    result = harness.run(options(folder))
    records = {record["contestant"]: record for record in result["generation"]}
    assert list(records) == WAYS
    for name in WAYS[:4]:
        found = records[name]
        assert found["reason"] is None and len(found["ratios"]) == 2 and len(found["seconds"]) == 8
        assert found["min"] <= found["median"] <= found["max"]
    assert set(records["transformers"]["ratios"]) == {1.0}
    assert records["exact"]["density"] == 1.0 and records["quest 0.5, preallocated"]["density"] < 1.0
    assert records["llama.cpp"]["reason"] == "llama_cpp is not installed"
    shown = plot.render(result)
    assert "tiny, 150 tokens, float32" in shown and "Steps of generated text" in shown
    assert "cpu" in result["machine"] and result["versions"]["transformers"]


def test_what_breaks_does_not_take_the_others_along(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ways = generation._ways

    def broken(*given):
        yield from ways(*given)
        yield "broken", lambda: (_ for _ in ()).throw(RuntimeError("no such way"))

    monkeypatch.setattr(generation, "_ways", broken)
    records = {r["contestant"]: r for r in harness.run(options(folder))["generation"]}
    assert "no such way" in records["broken"]["reason"] and records["exact"]["reason"] is None


def test_others_read_the_same_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []

    class Llama:
        def __init__(self, model_path: str, n_ctx: int, **_: object) -> None:
            assert Path(model_path).is_file() and n_ctx > 150

        def eval(self, tokens: list[int]) -> None:
            seen.append(tokens)

    fake = ModuleType("llama_cpp")
    fake.Llama = Llama
    fake.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "llama_cpp", fake)
    file = folder / "config.json"
    records = {r["contestant"]: r for r in harness.run(options(folder, gguf=str(file)))["generation"]}
    assert [len(tokens) for tokens in seen] == [150, *[1] * 9]
    assert records["llama.cpp"]["reason"] is None and len(records["llama.cpp"]["seconds"]) == 8
    assert records["llama.cpp"]["file"] == "config.json"
    # Without a file there is nothing to read.
    records = {r["contestant"]: r for r in harness.run(options(folder))["generation"]}
    assert records["llama.cpp"]["reason"] == "needs a GGUF file of the model: --gguf"


def test_from_the_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--tokens", "64", "--dtypes", "bfloat16", "--densities", "0.25", "--repeats", "1", "--device", "cpu"]
    assert main(["bench", "--suite", "decode", "--model", str(folder), "--json", *given]) == 0
    result = json.loads(capsys.readouterr().out)
    assert [r["contestant"] for r in result["generation"]][:2] == ["transformers", "exact"]
    assert result["options"]["threads"] == 1
    for wrong, said in (
        (["--suite", "decode", "--gguf", "none.gguf"], "`gguf` must be a file, got 'none.gguf'"),
        (["--suite", "kernels", "--model", str(folder)], "`model` must be left out of suite kernels"),
    ):
        assert main(["bench", *wrong]) != 0
        assert said in capsys.readouterr().err
