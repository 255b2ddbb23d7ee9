"""The repository itself: names at the top, links, sizes, the wheel, lazy imports, what the README says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest

import hf_sparse_attn as hsa
from tests.support.processes import run_code

ROOT = Path(__file__).parents[2]
LINKED = ("kernels", "patches", "recipes")
# Folders of recipes that stay in the repository: reports on trainings, and how the models in the package were made.
LEFT_OUT = ("reports", "shipped")
_NUMBER = re.compile(r"\d+(?:\.\d+)?")
_GAIN = re.compile(r"\b[\d.]+x\b")
TOP = {"pyproject.toml", "README.md", "LICENSE", "hf_sparse_attn", "tests", "findings", *LINKED}
# The pages that are read in the repository.
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / ".github").rglob("*.md")), ROOT / "findings" / "README.md"]
_LINK = re.compile(r"\]\(([^)\s]+)\)")


def tracked() -> list[Path]:
    found = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if found.returncode:
        pytest.skip("not a git checkout")
    return [Path(line) for line in found.stdout.splitlines()]


def said(code: str, *, cwd: Path, path: Path | None = None, **env: str) -> str:
    """What code prints in a process that has imported torch and nothing else; `path` goes first on its module path."""
    lead = f"import sys; sys.path.insert(0, {str(path)!r}); " if path else ""
    done = run_code(lead + code, cwd=cwd, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def said_alone(code: str, cwd: Path = ROOT, **env: str) -> str:
    """What code prints in an interpreter of its own."""
    given = {**os.environ, **env}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, env=given)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_top_level_names() -> None:
    names = {path.parts[0] for path in tracked()}
    assert {n for n in names if not n.startswith(".")} == TOP


@pytest.mark.parametrize("name", LINKED)
def test_linked_folders(name: str) -> None:
    assert not (ROOT / name / "__init__.py").exists()
    assert (ROOT / "hf_sparse_attn" / name).resolve() == (ROOT / name).resolve()
    assert not {"torch.py", "triton.py"} & {p.name for p in (ROOT / name).iterdir()}


def test_files_stay_readable() -> None:
    long = {}
    for path in tracked():
        if path.suffix == ".py" and (ROOT / path).exists():
            lines = len((ROOT / path).read_text().splitlines())
            limit = 600 if "triton" in path.name else 400
            if lines > limit and path.parts[0] != "tests":
                long[str(path)] = lines
    assert not long


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Built from a copy: building leaves folders behind where it runs.
    source, folder = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / path, source / path, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_is_pure_and_holds_every_file(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = set()
    for path in tracked():
        if path.parts[0] == "hf_sparse_attn" and path.name not in LINKED:
            wanted.add(str(path))
        elif path.parts[0] in LINKED and path.parent.name not in LEFT_OUT:
            wanted.add(f"hf_sparse_attn/{path}")
    assert wanted <= inside
    assert not any(name.startswith(f"hf_sparse_attn/recipes/{folder}/") for name in inside for folder in LEFT_OUT)
    assert not any(name.split("/")[0] in LINKED for name in inside)


@pytest.mark.slow
def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "import torch, hf_sparse_attn as hsa; from hf_sparse_attn.registry import FAMILIES, BACKENDS;"
        "from hf_sparse_attn.cli.demo import load_model; load_model();"
        "from hf_sparse_attn.cost import table as cost; assert cost.table_for(torch.device('cpu')).sparse;"
        "assert cost.table_for(torch.device('meta')).origin == 'assumed';"
        "print(hsa.__file__, {'llama', 'wan'} <= set(FAMILIES.names()), 'torch_gather' in BACKENDS)"
    )
    out = said(code, cwd=tmp_path, path=tmp_path / "site", HF_HOME=str(tmp_path))
    assert str(tmp_path) in out and "True True" in out


@pytest.mark.slow
def test_the_wheel_has_the_recipes_that_users_run(wheel: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from hf_sparse_attn.recipe import read_recipe, shipped_recipes; from hf_sparse_attn.cli import main;"
        "print(sorted(shipped_recipes()), read_recipe('moving_wan_distill').name);"
        "print(main(['train', 'byte_llama', '--output', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path / 'site')!r}); {code}"],
        cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""},
    )  # fmt: skip
    assert "'moving_wan_vsa'" in done.stdout and "step_distill\n2" in done.stdout, done.stderr
    assert "'byte_llama'" not in done.stdout and "'moving_wan'" not in done.stdout
    assert "recipe 'byte_llama' made a model that comes with the package: it is in the repository alone" in done.stderr


def test_a_clone_without_links_works(tmp_path: Path) -> None:
    """As on a file system without symbolic links: the folders stand beside the package only."""
    for path in tracked():
        source = ROOT / path
        if path.parts[0] in ("hf_sparse_attn", *LINKED) and source.is_file() and "assets" not in path.parts:
            target = tmp_path / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    code = (
        "import hf_sparse_attn as hsa; from hf_sparse_attn.registry import FAMILIES, BACKENDS;"
        "print(hsa.__file__, hsa.list_methods(), FAMILIES.names(), BACKENDS.names())"
    )
    out = said(code, cwd=tmp_path, path=tmp_path)
    assert str(tmp_path) in out and "llama" in out and "torch_gather" in out


def test_import_is_light() -> None:
    heavy = ("transformers", "diffusers", "triton", "matplotlib", "peft")
    code = "import sys, hf_sparse_attn; from hf_sparse_attn.native import install; install();"
    assert said_alone(f"{code} print([m for m in {heavy!r} if m in sys.modules])") == "[]"


@pytest.mark.slow
def test_it_runs_without_the_optional_packages(tmp_path: Path) -> None:
    """Without Triton, diffusers and the rest installed a tiny model runs, and what is missing is named."""
    absent = ("triton", "diffusers", "matplotlib", "peft", "accelerate", "scipy", "datasets")
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent!r}));"
        "import torch, hf_sparse_attn as hsa; from hf_sparse_attn.registry import FAMILIES, BACKENDS;"
        "model, inputs = FAMILIES.get('llama').tiny();"
        "p = hsa.patch(model, 'sliding_window', window=8, sink=2, min_tokens=0); model(**inputs);"
        "print(p.report().density < 1, BACKENDS.names(), BACKENDS.missing)"
    )
    out = said_alone(code, tmp_path)
    assert out.startswith("True") and "'triton_block_sparse': 'needs the package triton'" in out


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    links = [link for link in _LINK.findall(text) if not link.startswith("https://")]
    for link in links:
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def anchors(text: str) -> set[str]:
    """What the headings of a page are called in links."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def python_blocks() -> list[object]:
    """The Python of every page, to be run."""
    return [
        pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}")
        for page in DOCUMENTS
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.S))
    ]


@pytest.mark.slow
@pytest.mark.parametrize("block", python_blocks())
def test_code_of_the_documents_runs_and_prints_what_it_says(block: str, tmp_path: Path) -> None:
    printed = said_alone(block, tmp_path, HF_HOME=str(tmp_path), OMP_NUM_THREADS="2")
    said = [line[2:] for line in block.splitlines() if line.startswith("# ")]
    shown = [line for line in printed.splitlines() if line.strip()]
    # What is chosen by content may differ in the last digit from one processor to the next; the words may not.
    words = [_NUMBER.sub("0", line).split() for line in shown]
    kept = [line for line in said if _NUMBER.sub("0", line).split() in words]
    assert [_NUMBER.sub("0", line).split() for line in kept] == words
    # Predicted gains ("5.36x") are those of the shipped table for this kind of processor.
    numbers = [[float(n) for line in lines for n in _NUMBER.findall(_GAIN.sub("", line))] for lines in (kept, shown)]
    assert numbers[0] == pytest.approx(numbers[1], rel=0.02, abs=0.02)


def test_public_names_exist() -> None:
    for name in hsa.__all__:
        assert getattr(hsa, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hsa.nothing


@pytest.mark.parametrize(
    "name",
    [
        "bench.run", "bench.make_options", "cli.main", "corpus.needle_document", "coverage.coverage_table",
        "demo.MODEL", "demo.load_model", "native.report", "pattern.BlockPattern", "profiling.profile",
        "published_profiles.read_published", "recipe.LoraSettings", "recipe.read_recipe", "training.train",
    ],
)  # fmt: skip
def test_names_of_old_hold(name: str) -> None:
    module, _, member = name.partition(".")
    assert callable(getattr(import_module(f"hf_sparse_attn.{module}"), member)) or member == "MODEL"
