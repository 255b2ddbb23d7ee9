"""`hf-sparse-attn methods NAME`: all there is to know of a method, and its pattern drawn."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import dataclass

import pytest

from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.context import TokenLayout
from hf_sparse_attn.documents import catalog, method_text
from hf_sparse_attn.documents.docstrings import fields_of
from hf_sparse_attn.documents.drawing import pattern_of
from hf_sparse_attn.method import Method
from hf_sparse_attn.registry import METHODS

OWN = [name for name, cls in METHODS.items() if catalog.is_own(cls)]


def shown(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["methods", *argv]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", OWN)
def test_everything_is_told_within_the_width(name: str, width: int, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    out = shown(capsys, name)
    cls = METHODS.get(name)
    flat = " ".join(out.split())
    assert flat.startswith(name) and cls.paper in flat and cls.__module__.replace(".", "/") in out
    assert all(f"\n  {field.name}: " in out for field, _, _ in fields_of(cls))
    columns, rows = catalog.presets_table()
    for row in rows:
        if row[columns.index("method")] == name:
            assert row[columns.index("source")] in flat
            assert row[columns.index("measured")] == catalog.NOT_MEASURED or row[columns.index("measured")] in flat
    assert f'hsa.patch(model, "{name}"' in out and "cpp_block_sparse" in out
    # Code that is to be copied, and paths, stay in one line.
    text = [line for line in out.splitlines() if "from_pretrained(" not in line and ".py" not in line]
    assert max(map(len, text)) <= width


def test_a_picture_shows_what_is_kept() -> None:
    found = method_text.record("sliding_window", 100)
    assert [pattern["layout"] for pattern in found["patterns"]] == [
        "causal text of 384 tokens",
        "video of 6 frames of 8 x 8 tokens",
    ]
    method = METHODS.get("sliding_window")(**METHODS.get("sliding_window").examples()[0])
    kept = pattern_of(method, TokenLayout.causal(384)).to_dense()[0, 0]
    (head,) = found["patterns"][0]["heads"]
    for row, line in enumerate(head["spots"]):
        for column, share in enumerate(line):
            part = kept[16 * row : 16 * (row + 1), 8 * column : 8 * (column + 1)]
            if 8 * column > 16 * row + 15:
                assert share is None
            elif 8 * column + 7 <= 16 * row:
                assert share == pytest.approx(float(part.float().mean()), abs=1e-3)
    drawn = method_text.render(found, 100).partition("head 0: ")[2].splitlines()[1:25]
    assert drawn[0] == "██" and drawn[12].startswith("▒··") and "···" in drawn[12] and drawn[12].endswith("██")


def test_a_narrow_terminal_has_the_heads_below_one_another() -> None:
    found = method_text.record("vertical_slash", 40)
    assert max(map(len, method_text.render(found, 40).partition("head 0")[2].splitlines())) <= 40
    assert len(found["patterns"][0]["heads"]) == 2


def test_json_holds_the_same(capsys) -> None:
    found = json.loads(shown(capsys, "radial", "--json"))
    assert found == json.loads(json.dumps(method_text.record("radial", 100)))
    assert found["knob"]["name"] == "decay" and found["needs"].keys() == {"bidirectional", "video grid"}
    assert {"wan", "hunyuan_video"} <= set(found["families"]) and "llama" not in found["families"]
    assert {("wan", "balanced"), ("hunyuan_video", "fast")} <= {(p["family"], p["quality"]) for p in found["presets"]}
    reference = next(backend for backend in found["backends"] if backend["name"] == "torch_reference")
    assert reference["runs"] and reference["backward"]
    assert found["measured"][0]["rows"][0]["method"] == "dense"


def test_markdown_is_the_page(capsys) -> None:
    assert shown(capsys, "radial", "--markdown").startswith("<!-- Made by")


def test_an_unknown_name_is_one_line(capsys) -> None:
    assert main(["methods", "radail"]) == 2
    err = capsys.readouterr().err
    assert "got 'radail' (nearest: radial)" in err and err.count("\n") == 1


def test_a_terminal_without_unicode_gets_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    assert main(["methods", "sliding_window"]) == 0
    assert sys.stdout.errors == "strict"
    sys.stdout.flush()
    lines = raw.getvalue().decode("ascii").splitlines()
    assert "##" in lines and any(line.startswith("#") and "..." in line for line in lines)


def test_a_method_of_the_users_own(capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Bare(Method):
        wanted: int

    Bare.name = "bare"
    monkeypatch.setitem(METHODS._entries, "bare", Bare)
    out = shown(capsys, "bare")
    assert "wanted: int, default required" in out and "Not drawn: TypeError: " in out
