"""The generated pages: current, complete and the same on every machine; and the command that makes them."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.documents import catalog, drawing, figures, pages
from hf_sparse_attn.documents.docstrings import fields_of, read, type_text
from hf_sparse_attn.recipe import recipe_class, recipe_modules, shipped_recipes
from hf_sparse_attn.registry import METHODS

ROOT = Path(__file__).parents[2]
DOCS = ROOT / ".github" / "docs"
OWN = [name for name, cls in METHODS.items() if catalog.is_own(cls)]
DRAWN = [name for name in OWN if METHODS.get(name).has_pattern()]


def test_the_pages_are_current(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    status = main(["docs", "--check"])
    assert (status, capsys.readouterr().out) == (0, "all current\n"), "run: hf-sparse-attn docs"
    assert "<!-- generated: methods -->" in (ROOT / "README.md").read_text()


def test_a_page_that_is_not_current_is_named_and_written_anew(tmp_path: Path, capsys, monkeypatch) -> None:
    # Of the pictures only that there is one for each method: to draw them takes seconds.
    monkeypatch.setattr(pages, "draw", lambda method: f"<svg>{method.name}</svg>")
    folder = tmp_path / ".github" / "docs"
    readme = tmp_path / "README.md"
    readme.write_text("Ours.\n\n<!-- generated: backends -->\nold\n<!-- end -->\n\nOurs, too.\n")
    assert main(["docs", "--output", str(folder), "--json"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert {str(folder / "methods" / "svg.svg"), str(folder / "recipes.md"), str(readme)} <= set(written)
    text = readme.read_text()
    assert text.startswith("Ours.\n\n<!--") and text.endswith("-->\n\nOurs, too.\n") and "torch_gather" in text
    # Prose is kept, what is generated is not.
    page = folder / "presets.md"
    page.write_text(page.read_text().replace("# Presets", "# Presets\n\nSaid by hand.").replace("balanced", "other"))
    (folder / "methods" / "vsa.md").unlink()
    assert main(["docs", "--output", str(folder), "--check"]) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"not current: {folder / 'methods' / 'vsa.md'}", f"not current: {page}"]
    assert main(["docs", "--output", str(folder)]) == 0
    assert "Said by hand." in page.read_text() and "other" not in page.read_text()
    page.write_text(page.read_text().replace("generated: presets", "generated: nothing"))
    assert main(["docs", "--output", str(folder)]) == 2
    assert "must be among" in capsys.readouterr().err


def test_every_method_has_a_page_and_a_picture() -> None:
    wanted = {*(f"{n}.md" for n in OWN), *(f"{n}.svg" for n in DRAWN)}
    assert {path.name for path in (DOCS / "methods").iterdir()} == wanted
    index = (DOCS / "methods.md").read_text()
    assert all(f"[{name}](methods/{name}.md)" in index for name in OWN)


@pytest.mark.parametrize("name", OWN)
def test_a_method_tells_its_formula_when_to_take_it_and_every_parameter(name: str) -> None:
    cls = METHODS.get(name)
    doc = read(cls.__doc__)
    assert cls.paper and {"Formula", "When"} <= set(doc.sections)
    assert all(said for _, _, said in fields_of(cls))
    page = (DOCS / "methods" / f"{name}.md").read_text()
    assert all(f"| `{field.name}` |" in page for field, _, _ in fields_of(cls))


def test_every_family_backend_preset_and_recipe_is_told() -> None:
    for page, names in {
        "families.md": [record["name"] for record in catalog.families()],
        "backends.md": [record["name"] for record in catalog.backends()],
        "recipes.md": [*shipped_recipes(), *recipe_modules()],
        "presets.md": [row[1] for row in catalog.presets_table()[1]],
    }.items():
        text = (DOCS / page).read_text()
        assert names and all(name in text for name in names), page


def test_every_key_of_every_recipe_has_a_meaning() -> None:
    for name in recipe_modules():
        assert all(said for _, _, said in fields_of(recipe_class(name))), name
    silent = re.findall(r"^\| `\w+` \|.*\|  \|$", (DOCS / "recipes.md").read_text(), re.M)
    assert not silent


@pytest.mark.parametrize("name", DRAWN)
def test_a_picture_does_not_hang_on_rounding(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS.get(name)(**METHODS.get(name).examples()[0])
    exact, made_up = drawing.draw(method), drawing.made_up
    assert len(exact) < 20_000

    def shaken(layout: TokenLayout) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = made_up(layout)
        return q + 1e-5 * torch.randn_like(q), k + 1e-5 * torch.randn_like(k)

    monkeypatch.setattr(drawing, "made_up", shaken)
    assert drawing.draw(method) == exact


def test_a_picture_is_what_is_kept() -> None:
    drawn = drawing.draw(hsa.get_method("sliding_window")(window=8, sink=0, block_size=16))
    # Eight tokens back from each token of a spot of eight: that spot in full, the one before in part.
    paths = {colour: runs for colour, runs in re.findall(r'fill="(#\w+)" d="([^"]*)"', drawn)}
    assert paths["#1f5f9e"].split("z")[:-1] == [f"M{n} {n}h1v1h-1" for n in range(48)]
    assert paths["#9fc2e3"].split("z")[:-1] == [f"M{n} {n + 1}h1v1h-1" for n in range(47)]
    with pytest.raises(ValueError, match=r"`method` must apply to bidirectional 6x8x8"):
        drawing.draw(hsa.get_method("radial")(block_size=256))


def test_a_docstring_is_read_in_parts() -> None:
    doc = read("""One line.

        Prose that
        goes on.

            hf-sparse-attn something

        Deviations: some.

        Args:
            one, two: both of them
                at length.
            three: alone.

        Raises:
            ValueError: never.
        """)
    assert doc.summary == "One line." and doc.chosen(deviations=True) == ["Deviations: some."]
    assert doc.chosen(deviations=False) == ["Prose that\ngoes on.", "```bash\nhf-sparse-attn something\n```"]
    assert doc.arguments == {"one": "both of them at length.", "two": "both of them at length.", "three": "alone."}
    assert doc.sections["Raises"] == "ValueError: never."


@dataclass
class _Base:
    """Base.

    Args:
        first: of the base.
        second: of the base.
    """

    first: int = 1
    second: int = 2


@dataclass
class _Derived(_Base):
    """Derived.

    Args:
        second: of its own.
    """


def test_fields_are_told_by_the_nearest_docstring() -> None:
    assert [said for _, _, said in fields_of(_Derived)] == ["of the base.", "of its own."]


@pytest.mark.parametrize(
    "hint, text",
    [
        (int, "int"),
        (int | None, "int | None"),
        (Literal["a", "b"] | None, '"a" | "b" | None'),
        (tuple[float, ...], "tuple[float, ...]"),
        (dict[str, tuple[int, int]], "dict[str, tuple[int, int]]"),
    ],
    ids=str,
)
def test_types_are_written_as_in_python(hint: object, text: str) -> None:
    assert type_text(hint) == text


def test_figures_are_those_of_the_files(tmp_path: Path) -> None:
    assert figures.figures(tmp_path) == {}
    made = figures.figures(ROOT / ".github")
    assert set(made) == {
        "kernels", "layers", "decoding", "quality", "longer_context", "longer_video", "few_steps", "coverage"
    }  # fmt: skip
    rows = json.loads((ROOT / ".github" / "eval" / "eval.json").read_text())["results"][0]["rows"]
    mixed = next(r for r in rows if r["name"] == "per-head profile" and r["wanted"] == 0.125)
    line = next(line for line in made["quality"].splitlines() if line.startswith("| 1/8 |"))
    assert f"{mixed['loss']:.3f}" in line.split("|")[3]


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0 and capsys.readouterr().out == f"hf-sparse-attn {hsa.__version__}\n"
