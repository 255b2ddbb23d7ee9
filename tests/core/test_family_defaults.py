"""Parameters that a method's authors ran a family with are its defaults there; what is given goes before them."""

from __future__ import annotations

import json
from typing import Any

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.presets import default_params, family_defaults, presets_of
from hf_sparse_attn.profiling.measure import with_dense
from hf_sparse_attn.registry import FAMILIES, make_method
from tests.support import tiny_hunyuan, tiny_wan

MODELS: dict[str, Any] = {
    "wan": tiny_wan.transformer,
    "experts": lambda: tiny_wan.pipeline("experts"),
    "hunyuan": tiny_hunyuan.transformer,
}


@pytest.mark.parametrize(
    ("model", "method", "given", "differs"),
    [
        ("wan", "radial", {}, {}),
        ("wan", "radial", {"variant": "hunyuan"}, {"variant": "hunyuan"}),
        ("experts", "radial", {}, {"decay": 0.8, "block_size": 64}),
        ("experts", "radial", {"block_size": 32}, {"decay": 0.8, "block_size": 32}),
        ("hunyuan", "radial", {}, {"decay": 0.95, "variant": "hunyuan"}),
        ("hunyuan", "radial", {"decay": 0.2}, {"variant": "hunyuan"}),
        ("hunyuan", "radial", {"variant": "wan"}, {"decay": 0.95}),
        ("hunyuan", "radial", {"quality": "high"}, {"decay": 0.95, "variant": "hunyuan"}),
        ("wan", "svg", {}, {"density": 0.3}),
        ("hunyuan", "svg", {}, {"sink": False}),
        ("hunyuan", "svg", {"density": 0.5, "sink": True}, {"density": 0.5}),
        ("hunyuan", "svg", {"quality": "fast"}, {"density": 0.2, "sink": False}),
        ("hunyuan", "sliding_tile", {}, {}),
    ],
    ids=str,
)
def test_what_is_in_force(model: str, method: str, given: dict[str, Any], differs: dict[str, Any]) -> None:
    with hsa.patch(MODELS[model](), method, **given) as patch:
        assert patch.report().params == {**hsa.get_method(method)().params(), **differs}


def test_a_ready_method_is_taken_as_it_is() -> None:
    method = hsa.get_method("radial")()
    with hsa.patch(tiny_hunyuan.transformer(), method) as patch:
        assert patch.method is method


@pytest.mark.parametrize("family", sorted(family_defaults()))
def test_rows_are_parameters_of_their_methods_and_what_balanced_takes(family: str) -> None:
    balanced = {(p.method, p.size): p for p in presets_of(family, FAMILIES.get(family)) if p.quality == "balanced"}
    for row in family_defaults()[family]:
        made = make_method(row.method, dict(row.params))
        assert made != make_method(row.method, {}) and row.source and row.method in hsa.list_methods()
        # The word "balanced" is what the authors ran as well.
        assert made == make_method(row.method, dict(balanced[row.method, row.size].params))


def test_a_profile_chooses_from_the_family_s_defaults() -> None:
    def own(name: object) -> dict[str, Any]:
        return default_params("hunyuan_video", [], name)

    assert with_dense(["radial", hsa.get_method("svg")()], own)[1:] == (
        hsa.get_method("radial")(decay=0.95, variant="hunyuan"), hsa.get_method("svg")(),
    )  # fmt: skip
    model, inputs = tiny_hunyuan.transformer(), tiny_hunyuan.inputs()
    found = hsa.profile(model, [inputs], ["radial", "block_topk"], budget=1.0, progress=False, maps=0)
    assert found.measurements is not None
    assert hsa.get_method("radial")(decay=0.95, variant="hunyuan") in found.measurements.candidates


def test_the_table_of_presets_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["presets"]
    told = {(r["family"], r["method"], r["values"]) for r in rows if r["quality"] == "(none given)"}
    assert ("hunyuan_video", "radial", "decay=0.95, variant=hunyuan") in told and len(told) == 4
