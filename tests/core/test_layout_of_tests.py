"""How tests are laid out: what they share stands in tests/support, fixtures in conftest.py, one way to import."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import hf_sparse_attn

TESTS = Path(__file__).parents[1]
FILES = [path.relative_to(TESTS) for path in sorted(TESTS.rglob("*.py"))]
# Also within texts that another process runs.
_IMPORT = re.compile(r"\b(?:from\s+([\w.]+)\s+import\s+([\w, ]+)|import\s+([\w.]+))")


def imported(path: Path) -> set[str]:
    """Dotted names of what a file imports, in code and in texts."""
    found = set()
    for source, names, module in _IMPORT.findall((TESTS / path).read_text()):
        found |= {f"{source}.{name.split()[0]}" for name in names.split(",") if name.split()} or {module}
    return found


@pytest.mark.parametrize("path", FILES, ids=str)
def test_helpers_are_imported_by_their_whole_name_and_no_test_imports_a_test(path: Path) -> None:
    helpers = {file.stem for file in FILES if file.parts[0] == "support"}
    for name in imported(path):
        assert name.split(".")[0] not in helpers, f"{name} must be imported from tests.support"
        assert not any(part.startswith("test_") for part in name.split(".")), f"{name} belongs to tests/support"


def test_fixtures_stand_where_they_are_used_or_in_a_conftest() -> None:
    for path in FILES:
        if path.parts[0] == "support":
            assert "pytest.fixture" not in (TESTS / path).read_text(), path


def test_rooms_of_tests_are_those_of_the_package() -> None:
    package = Path(hf_sparse_attn.__file__).parent
    rooms = {path.name for path in package.iterdir() if path.is_dir()} | {"core", "support", "golden"}
    assert {path.parts[0] for path in FILES if len(path.parts) > 1} <= rooms
