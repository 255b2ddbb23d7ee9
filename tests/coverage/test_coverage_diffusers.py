"""What the list calls verified of diffusers is verified here; the other classes decline for the reason it gives."""

from __future__ import annotations

import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from hf_sparse_attn.coverage import page as coverage_page
from hf_sparse_attn.coverage.listing import STATUSES
from hf_sparse_attn.coverage.of_diffusers import diffusers_classes, diffusers_kinds
from tests.coverage import trial
from tests.coverage.trial import Failed, listed, try_diffusers, verified
from tests.support import patch_faults
from tests.support.tiny_diffusers import TABLE, Tiny, tiny_inputs, tiny_model, tiny_sizes

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

LISTED: dict[str, Any] = json.loads((Path(__file__).parents[2] / ".github" / "coverage.json").read_text())
CLASSES = {c["name"]: c for c in LISTED["classes"] if c["library"] == "diffusers"}
VERIFIED = [name for name, c in CLASSES.items() if c["status"] == "verified"]
LTX = "LTXVideoTransformer3DModel"


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return diffusers_kinds()


@pytest.mark.slow
@pytest.mark.parametrize("name", VERIFIED)
def test_a_tiny_instance_is_verified(name: str, kinds: dict[str, Any]) -> None:
    if name not in kinds:
        pytest.skip("not in this diffusers")
    if name == "ZImageTransformer2DModel" and Version(diffusers.__version__) < Version("0.37"):
        pytest.skip("rounding alone moves the output of a tiny instance of it by more than a per cent")
    try_diffusers(kinds[name])


def test_the_list_is_that_of_these_libraries(kinds: dict[str, Any]) -> None:
    """Families, ways and reasons; nothing that can be patched is left unverified."""
    found = {c.name: c for c in diffusers_classes()}
    assert all(c.built for c in found.values())
    for name in set(found) & set(CLASSES):
        c, said = found[name], CLASSES[name]
        assert (c.family, c.reason) == (said["family"], said["reason"])
        assert c.way == said["way"] or diffusers.__version__ != LISTED["versions"]["diffusers"]
    assert {c["status"] for c in CLASSES.values()} == {"verified", "declined"}
    if diffusers.__version__ == LISTED["versions"]["diffusers"]:
        assert set(found) == set(CLASSES)


def test_the_table_names_classes_and_arguments_that_exist(kinds: dict[str, Any]) -> None:
    if diffusers.__version__ != LISTED["versions"]["diffusers"]:
        pytest.skip("the table is of the newest diffusers")
    for name, tiny in TABLE.items():
        kind = kinds[name]
        built, run = inspect.signature(kind.__init__), inspect.signature(kind.forward)
        assert set(tiny.sizes) <= set(built.parameters) and set(tiny.inputs) <= set(run.parameters), name


def test_an_instance_is_drawn_without_touching_the_random_state() -> None:
    state = torch.get_rng_state()
    kind = diffusers.LTXVideoTransformer3DModel
    one, two = tiny_model(kind), tiny_model(kind)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(tiny_inputs(kind)["hidden_states"], tiny_inputs(kind)["hidden_states"])
    assert tiny_sizes(kind)["num_layers"] == 2 and tiny_sizes(kind)["attention_head_dim"] == 24
    try_diffusers(kind)
    assert torch.equal(torch.get_rng_state(), state)


def rough(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(trial, "MOST_ROUNDING", 0.0)


def sizes(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, LTX, Tiny({"num_layers": "many"}))


OWN_FAULTS = {
    patch_faults.half: "not all layers ran sparse: because (transformer.transformer_blocks.1.attn1)",
    patch_faults.idle: "layers that were not called: other",
    rough: "rounding alone moves its output by",
    sizes: "no tiny instance is known: TypeError",
}


@pytest.mark.parametrize(
    "fault, said", {**patch_faults.FAULTS, **OWN_FAULTS}.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_faulty_patch_is_not_verified(fault: Any, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    with pytest.raises(Failed, match=re.escape(said)):
        try_diffusers(diffusers.LTXVideoTransformer3DModel)


def test_a_slow_forward_ends_the_trial() -> None:
    with pytest.raises(Failed, match="one forward takes more than 1e-09 s"):
        try_diffusers(diffusers.LTXVideoTransformer3DModel, seconds=1e-9)


def test_what_fails_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    patch_faults.bits(monkeypatch)
    found = [verified(c) for c in listed("diffusers", names=[LTX, "SanaTransformer2DModel"])]
    assert [(c.status, c.note) for c in found] == [
        ("patched", "patched with method dense its output differs"),
        ("declined", None),
    ]


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    module = sys.modules[diffusers.LTXVideoTransformer3DModel.__module__]
    monkeypatch.setattr(module.LTXVideoRotaryPosEmbed, "__init__", refuse)
    found = verified(diffusers_classes(names=[LTX])[0])
    assert (found.status, found.way) == ("not built", None)
    assert found.reason == "could not be built: ImportError: needs a package"


def test_guards() -> None:
    with pytest.raises(ValueError, match="`names` must be transformer classes of diffusers, got Nothing"):
        diffusers_classes(names=["Nothing"])


def test_the_page_is_that_of_the_document() -> None:
    folder = Path(__file__).parents[2] / ".github"
    assert (folder / "coverage.md").read_text() == coverage_page.page(LISTED)
    counts: dict[str, dict[str, int]] = LISTED["counts"]
    for kind, row in counts.items():
        of_kind = [c for c in LISTED["classes"] if kind in {f"{c['library']} {t}" for t in c["task"].split(", ")}]
        for status in STATUSES:
            assert row[status] == sum(c["status"] == status for c in of_kind)


def test_the_document_is_written_as_it_is_read(tmp_path: Path) -> None:
    found = diffusers_classes(names=[LTX, "SanaTransformer2DModel"])
    document = coverage_page.document(found, {"diffusers": "0"})
    paths = coverage_page.write(document, tmp_path / "new")
    assert [p.name for p in paths] == ["coverage.json", "coverage.md"]
    assert json.loads(paths[0].read_text()) == document
    text = paths[1].read_text()
    assert "| diffusers transformer | 2 | 1 | 0 | 1 | 0 |" in text and LTX in text and "<details>" not in text


def test_weights_that_a_class_only_allocates_are_drawn() -> None:
    dirt = [torch.full((1, 4), 7.0) for _ in range(1000)]

    class Allocates(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(3, 2)
            self.token = torch.nn.Parameter(torch.empty(1, 4))

    del dirt
    model: Any = tiny_model(Allocates)
    drawn = torch.randn(1, 4, generator=torch.Generator().manual_seed(2)) * 0.1
    assert torch.equal(model.token, drawn) and bool(model.linear.weight.isfinite().all())
