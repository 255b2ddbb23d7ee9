"""An unknown name is answered with the known ones and the nearest of them, wherever names are taken."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.bench.options import make_options
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.presets import Preset
from hf_sparse_attn.profiles.measurements import weights_of
from hf_sparse_attn.profiling.budget import choose
from hf_sparse_attn.recipe import read_recipe, recipe_class
from hf_sparse_attn.registry import BACKENDS, FAMILIES, METHODS, make_method
from tests.support import tiny_lm


def patched(*args: Any, **options: Any) -> Callable[[], object]:
    return lambda: hsa.patch(tiny_lm.FAMILIES["llama"](), *args, **options)


@pytest.mark.parametrize(
    ("call", "near"),
    [
        (lambda: METHODS.get("vertical-slash"), "vertical_slash"),
        (lambda: hsa.get_method("Radial"), "radial"),
        (lambda: make_method("slidng_window", {}), "sliding_window"),
        (lambda: BACKENDS.get("torch_gathr"), "torch_gather"),
        (lambda: FAMILIES.get("qwen"), "qwen_vl"),
        (patched("sliding_window", backend="cpp_block_spars"), "cpp_block_sparse"),
        (patched("slash_vertical"), None),
        (patched("xatention"), "xattention"),
        (patched("vertical_slash", quality="blanced"), "balanced"),
        (lambda: Preset("svg", "hihg", ""), "high"),
        (patched("sliding_window", windw=3), "window"),
        (patched("sliding_window", dense_layer=3), "dense_layers"),
        (lambda: make_method("block_topk", {"top_k": 3, "densty": 1}), "density, topk"),
        (lambda: weights_of("layer_eror"), "layer_error"),
        (lambda: weights_of("layer_error + 0.5 * recal"), "recall"),
        (lambda: choose([[0, 1]], [[1, 0.5]], 0.7, solver="exakt"), "exact"),
        (lambda: make_options(suite="kernel"), "kernels"),
        (lambda: METHODS.get("radial")(variant="hunyuan_video"), "hunyuan"),
        (lambda: read_recipe("llama_long_contxt"), "llama_long_context"),
        (lambda: recipe_class("duo_gates"), "duo_gate"),
        (lambda: read_recipe("llama_long_context", ["sed=3"]), "seed"),
    ],
)  # fmt: skip
def test_the_nearest_name_is_told(call: Callable[[], object], near: str | None) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    said = str(caught.value)
    assert said.endswith(f"(nearest: {near})") or f"(nearest: {near})," in said if near else "nearest" not in said


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["dmo"], "invalid choice: 'dmo'"),
        (["demo", "--lenght", "3"], "unrecognized arguments: --lenght 3 (nearest: --length)"),
        (["profile", "byte_llama", "--per", "densty", "--output", "x"], "(nearest: density)"),
        (["bench", "--suite", "layer"], "(nearest: layers)"),
        (["doctor", "--backends", "torch_gathr"], "(nearest: torch_gather)"),
        (["eval", "--methods", "radail", "--model", "video"], "(nearest: radial)"),
        (["train", "duo_gat", "--output", "x"], "(nearest: duo_gate)"),
        (["profile", "byte_lama", "--output", "x"], "(nearest: byte_llama)"),
        (["profile", "byte_llama", "--metric", "recal", "--output", "x"], "(nearest: recall)"),
        (["profile", "byte_llama", "--dtype", "float61", "--output", "x"], "(nearest: float16)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_the_command_line_tells_it_too(
    argv: list[str], said: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert said in err and err.startswith("hf-sparse-attn: error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("name", ["hsa:nope", "hsa:vertical-slash"])
def test_an_unknown_native_name_lists_the_methods(name: str) -> None:
    with pytest.raises(ValueError, match=rf"must be one of hsa:block_topk, .*hsa:xattention.* got '{name}'") as caught:
        tiny_lm.FAMILIES["llama"](name)
    assert ("(nearest: hsa:vertical_slash)" in str(caught.value)) == ("slash" in name)
    model = tiny_lm.FAMILIES["llama"]("hsa:sliding_window")
    with pytest.raises(ValueError, match="must be one of hsa:block_topk"):
        model.set_attn_implementation(name)


def test_other_unknown_implementations_are_answered_by_transformers() -> None:
    with pytest.raises(ValueError, match="The only possible arguments are"):
        tiny_lm.FAMILIES["llama"]("sdpaa")


def test_nothing_is_guessed_where_nothing_is_near() -> None:
    assert nearest("zzz", ["radial", "svg"]) == "" and nearest(3, ["radial"]) == ""
    assert nearest(["SVG ", "Radial"], ["radial", "svg"]) == " (nearest: svg, radial)"


def test_a_backend_whose_package_is_missing_is_told_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS.missing, "triton_decode", "needs the package triton")
    monkeypatch.delitem(BACKENDS._entries, "triton_decode", raising=False)
    said = r"`backend` 'triton_decode' needs the package triton \(pip install 'hf-sparse-attn\[triton\]'\)"
    with pytest.raises(ValueError, match=said):
        patched("sliding_window", backend="triton_decode")()
