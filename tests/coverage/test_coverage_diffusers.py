"""What the list calls verified of diffusers is verified here; the other classes decline for the reason it gives."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version

from hf_sparse_attn.coverage import listing as coverage
from hf_sparse_attn.coverage import of_diffusers as coverage_diffusers
from hf_sparse_attn.coverage import page as coverage_page
from hf_sparse_attn.coverage.of_diffusers import Failed, verify
from hf_sparse_attn.coverage.rules_diffusers import Tiny
from hf_sparse_attn.coverage.table_diffusers import TABLE
from hf_sparse_attn.coverage.tiny_diffusers import tiny_inputs, tiny_model, tiny_sizes
from hf_sparse_attn.session import Session

diffusers = pytest.importorskip("diffusers")

pytestmark = pytest.mark.usefixtures("one_thread")

LISTED: dict[str, Any] = json.loads((Path(__file__).parents[2] / ".github" / "coverage.json").read_text())
CLASSES = {c["name"]: c for c in LISTED["classes"] if c["library"] == "diffusers"}
VERIFIED = [name for name, c in CLASSES.items() if c["status"] == "verified"]
LTX = "LTXVideoTransformer3DModel"


@pytest.fixture(scope="module")
def kinds() -> dict[str, Any]:
    return {kind.__name__: kind for kind in coverage._classes()}


@pytest.mark.parametrize("name", VERIFIED)
def test_a_tiny_instance_is_verified(name: str, kinds: dict[str, Any]) -> None:
    if name not in kinds:
        pytest.skip("not in this diffusers")
    if name == "ZImageTransformer2DModel" and Version(diffusers.__version__) < Version("0.37"):
        pytest.skip("rounding alone moves the output of a tiny instance of it by more than a per cent")
    verify(kinds[name])


def test_the_list_is_that_of_these_libraries(kinds: dict[str, Any]) -> None:
    """Families, ways and reasons; nothing that can be patched is left unverified."""
    found = {c.name: c for c in coverage.diffusers_classes()}
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
        built, run = coverage.inspect.signature(kind.__init__), coverage.inspect.signature(kind.forward)
        assert set(tiny.sizes) <= set(built.parameters) and set(tiny.inputs) <= set(run.parameters), name


def test_an_instance_is_drawn_without_touching_the_random_state() -> None:
    state = torch.get_rng_state()
    kind = diffusers.LTXVideoTransformer3DModel
    one, two = tiny_model(kind), tiny_model(kind)
    assert all(torch.equal(a, b) and a.any() for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert torch.equal(tiny_inputs(kind)["hidden_states"], tiny_inputs(kind)["hidden_states"])
    assert tiny_sizes(kind)["num_layers"] == 2 and tiny_sizes(kind)["attention_head_dim"] == 24
    verify(kind)
    assert torch.equal(torch.get_rng_state(), state)


class _Faults:
    """Ways in which a patch could go wrong, by what is said of it then."""

    @staticmethod
    def wrong(patch: pytest.MonkeyPatch) -> None:
        sparse = Session.sparse

        def off(self: Session, *args: Any, **kwargs: Any) -> Any:
            done = sparse(self, *args, **kwargs)
            return None if done is None else (done[0] * 1.001, done[1])

        patch.setattr(Session, "sparse", off)

    @staticmethod
    def dense(patch: pytest.MonkeyPatch) -> None:
        def never(self: Session, record: Any, *args: Any, **kwargs: Any) -> None:
            record.dense_reasons["because"] += 1

        patch.setattr(Session, "sparse", never)

    @staticmethod
    def half(patch: pytest.MonkeyPatch) -> None:
        sparse = Session.sparse

        def first(self: Session, record: Any, *args: Any, **kwargs: Any) -> Any:
            if record.index:
                record.dense_reasons["because"] += 1
                return None
            return sparse(self, record, *args, **kwargs)

        patch.setattr(Session, "sparse", first)

    @staticmethod
    def idle(patch: pytest.MonkeyPatch) -> None:
        found = coverage_diffusers._all_sparse

        def with_another(layers: Any, dense: str) -> None:
            from hf_sparse_attn.record import LayerRecord

            found([*layers, LayerRecord("other", 9).report(None)], dense)

        patch.setattr(coverage_diffusers, "_all_sparse", with_another)

    @staticmethod
    def left(patch: pytest.MonkeyPatch) -> None:
        run, seen = coverage_diffusers._run, [0]

        def changing(model: Any, inputs: Any, state: str) -> Any:
            out = run(model, inputs, state)
            seen[0] += state == "sparse"
            return out + 1.0 if state == "unpatched" and seen[0] else out

        patch.setattr(coverage_diffusers, "_run", changing)

    @staticmethod
    def restless(patch: pytest.MonkeyPatch) -> None:
        run = coverage_diffusers._run
        patch.setattr(coverage_diffusers, "_run", lambda *a: (out := run(*a)) + torch.rand(out.shape))

    @staticmethod
    def bits(patch: pytest.MonkeyPatch) -> None:
        run = coverage_diffusers._run
        patch.setattr(coverage_diffusers, "_run", lambda m, i, s: run(m, i, s) + (1e-4 if s == "dense" else 0.0))

    @staticmethod
    def nothing(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(coverage_diffusers, "_LITTLE", coverage_diffusers._EVERYTHING["sliding_window"])

    @staticmethod
    def infinite(patch: pytest.MonkeyPatch) -> None:
        run = coverage_diffusers._run
        patch.setattr(coverage_diffusers, "_run", lambda *a: run(*a) / 0)

    @staticmethod
    def rough(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(coverage_diffusers, "_MOST_ROUNDING", 0.0)

    @staticmethod
    def crash(patch: pytest.MonkeyPatch) -> None:
        def refuse(*args: Any, **kwargs: Any) -> None:
            raise RuntimeError("no\n  such kernel")

        patch.setattr(Session, "sparse", refuse)

    @staticmethod
    def sizes(patch: pytest.MonkeyPatch) -> None:
        patch.setitem(TABLE, LTX, Tiny({"num_layers": "many"}))

    @staticmethod
    def empty(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(coverage_diffusers, "_tensors", lambda out: iter(()))


@pytest.mark.parametrize(
    "fault, said",
    [
        ("wrong", "sliding_window of every key: its output is off by"),
        ("dense", "no call ran sparse: because"),
        ("half", r"not all layers ran sparse: because \(transformer.transformer_blocks.1.attn1\)"),
        ("idle", "layers that were not called: other"),
        ("left", "after the patch was removed its output differs"),
        ("restless", "its output differs from run to run"),
        ("bits", "patched with method dense its output differs"),
        ("nothing", "attention has no part in its output"),
        ("infinite", "its output is not finite"),
        ("rough", "rounding alone moves its output by"),
        ("crash", "a forward fails, sparse: RuntimeError: no such kernel"),
        ("sizes", "no tiny instance is known: TypeError"),
        ("empty", "its output holds no tensor"),
    ],
)
def test_a_faulty_patch_is_not_verified(fault: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    getattr(_Faults, fault)(monkeypatch)
    with pytest.raises(Failed, match=said):
        verify(diffusers.LTXVideoTransformer3DModel)


def test_a_slow_forward_ends_the_trial() -> None:
    with pytest.raises(Failed, match="one forward takes more than 1e-09 s"):
        verify(diffusers.LTXVideoTransformer3DModel, seconds=1e-9)


def test_what_fails_is_listed_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    _Faults.bits(monkeypatch)
    found = coverage.diffusers_classes(verify=True, names=[LTX, "SanaTransformer2DModel"])
    assert [(c.status, c.note) for c in found] == [
        ("patched", "patched with method dense its output differs"),
        ("declined", None),
    ]


def test_a_class_that_cannot_be_built_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise ImportError("needs a package")

    # A part of it: what the class itself names is read.
    module = sys.modules[diffusers.LTXVideoTransformer3DModel.__module__]
    monkeypatch.setattr(module.LTXVideoRotaryPosEmbed, "__init__", refuse)
    found = coverage.diffusers_classes(verify=True, names=[LTX])[0]
    assert (found.built, found.status, found.way) == (False, "patched", "dispatcher")
    assert found.note == "no instance of it could be built without arguments"


def test_guards() -> None:
    with pytest.raises(ValueError, match="`names` must be transformer classes of diffusers, got Nothing"):
        coverage.diffusers_classes(names=["Nothing"])


def test_the_page_is_that_of_the_document() -> None:
    folder = Path(__file__).parents[2] / ".github"
    assert (folder / "coverage.md").read_text() == coverage_page.page(LISTED)
    counts: dict[str, dict[str, int]] = LISTED["counts"]
    for kind, row in counts.items():
        of_kind = [c for c in LISTED["classes"] if kind in {f"{c['library']} {t}" for t in c["task"].split(", ")}]
        for status in coverage.STATUSES:
            assert row[status] == sum(c["status"] == status for c in of_kind)


def test_the_document_is_written_as_it_is_read(tmp_path: Path) -> None:
    found = coverage.diffusers_classes(names=[LTX, "SanaTransformer2DModel"])
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
