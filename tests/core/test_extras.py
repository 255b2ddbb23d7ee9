"""Optional packages that are missing: every place that needs one says the same sentence, with its extra."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.evaluation.contact_sheet import draw_clips
from hf_sparse_attn.extras import EXTRAS, MissingExtra, need, needing
from hf_sparse_attn.recipe import read_recipe
from hf_sparse_attn.registry import BACKENDS
from hf_sparse_attn.shipped.moving import frames_to_image, load_moving_wan
from hf_sparse_attn.shipped.moving import sample as sample_clips
from tests.support import tiny_lm

ROOT = Path(__file__).parents[2]
IMPORTED = {**{name: name for name in EXTRAS}, "PyYAML": "yaml", "pillow": "PIL"}
SENTENCE = r"needs {} \(pip install 'hf-sparse-attn\[{}\]'\)"


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if a package were not installed."""
    for name in [n for n in sys.modules if n.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def lora() -> object:
    from hf_sparse_attn.training.lora.adapter import add_lora
    from hf_sparse_attn.training.lora.settings import LoraSettings

    return add_lora(tiny_lm.FAMILIES["llama"](), LoraSettings(targets=("q_proj",)))


def trained(name: str) -> Callable[[], object]:
    def run() -> object:
        from hf_sparse_attn.training.loop import train

        return train(read_recipe(name), Path("never"))

    return run


def page() -> object:
    from hf_sparse_attn.profiling.view.page import pictures

    return pictures(hsa.profile(tiny_lm.FAMILIES["llama"](), [tiny_lm.tokens(1, 40)], ["block_topk"], 1.0, maps=0,
                                progress=False))  # fmt: skip


def choice() -> object:
    from hf_sparse_attn.profiling.budget import choose

    return choose([[0, 0.5]], [[1, 0.2]], 0.5, solver="milp")


def pipeline() -> object:
    from hf_sparse_attn.training.video.material import load_pipeline

    return load_pipeline("never")


def listed() -> object:
    from hf_sparse_attn.coverage.of_diffusers import diffusers_kinds

    return diffusers_kinds()


CLIP = torch.zeros(1, 2, 3, 4, 4)

USES: dict[str, tuple[str, Callable[[], object]]] = {
    "shipped video model": ("diffusers", load_moving_wan),
    "sampling": ("diffusers", lambda: sample_clips(torch.nn.Linear(1, 1), [None])),  # type: ignore[list-item]
    "pipeline": ("diffusers", pipeline),
    "list of classes": ("diffusers", listed),
    "frames": ("pillow", lambda: frames_to_image(CLIP)),
    "sheet": ("matplotlib", lambda: draw_clips([("", "", CLIP)], Path("x.png"), 1.0, 9.0)),
    "page": ("matplotlib", page),
    "integer programming": ("scipy", choice),
    "adapter": ("peft", lora),
    "training": ("accelerate", trained("llama_long_context")),
    "recipe": ("PyYAML", lambda: read_recipe("llama_long_context")),
}


@pytest.mark.parametrize("use", USES)
def test_what_needs_a_package_says_so(use: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    package, run = USES[use]
    hide(monkeypatch, IMPORTED[package])
    if package in ("peft", "PyYAML"):
        monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(MissingExtra, match=SENTENCE.format(package, EXTRAS[package])):
        run()


def test_extras_are_those_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    section = text[text.index("[project.optional-dependencies]") : text.index("[project.scripts]")]
    for package, extra in EXTRAS.items():
        (packages,) = re.findall(rf"^{extra} = \[(.*)\]", section, re.M)
        # pyarrow comes with datasets.
        assert f'"{"datasets" if package == "pyarrow" else package}' in packages


@pytest.mark.parametrize("package", EXTRAS)
def test_one_sentence_for_all(package: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    said = f"needs {package} (pip install 'hf-sparse-attn[{EXTRAS[package]}]')"
    assert need(package) == need(IMPORTED[package]) == said
    hide(monkeypatch, IMPORTED[package])
    with pytest.raises(MissingExtra, match=re.escape(f"the thing {said}")) as caught, needing("the thing"):
        __import__(IMPORTED[package])
    assert isinstance(caught.value, ImportError) and caught.value.name == package

    # What no place of the package has foreseen is told by the command line all the same.
    def fails(_: object) -> int:
        __import__(IMPORTED[package])
        return 0

    monkeypatch.setattr("hf_sparse_attn.cli.commands._methods", fails)
    assert main(["methods"]) == 2
    assert capsys.readouterr().err == f"hf-sparse-attn: error: the command {said}\n"


def test_other_import_errors_stay_what_they_are() -> None:
    for error in (ModuleNotFoundError("no numpy", name="numpy"), ImportError("cannot import name", name="diffusers")):
        with pytest.raises(type(error)) as caught, needing("it"):
            raise error
        assert caught.value is error


def test_pictures_that_are_left_out_say_why(monkeypatch: Any, tmp_path: Path, caplog: Any, capsys: Any) -> None:
    from hf_sparse_attn.bench.plot import plot
    from hf_sparse_attn.evaluation.plot import draw

    hide(monkeypatch, "matplotlib")
    assert plot({"kernels": []}, tmp_path / "x.png") == f"no speedup.png: it {need('matplotlib')}"
    assert draw(None, tmp_path) is None  # type: ignore[arg-type]
    assert caplog.messages == [f"the plot of fidelity {need('matplotlib')}"]
    assert main(["demo", "--length", "576", "--output", str(tmp_path)]) == 0
    assert f"no picture: it {need('matplotlib')}" in capsys.readouterr().out


def test_backends_that_lack_a_package_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKENDS.missing, "triton_int8", "needs the package triton")
    monkeypatch.delitem(BACKENDS._entries, "triton_int8", raising=False)
    with pytest.raises(ValueError, match=r"`backend` 'triton_int8' needs the package triton \(pip install"):
        BACKENDS.get("triton_int8")
