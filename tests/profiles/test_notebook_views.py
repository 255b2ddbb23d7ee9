"""What notebooks show of a report and a profile: the same as the tables of the terminal, and texts stay texts."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape

import numpy as np
import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.profiles.head_profile import HeadProfile
from hf_sparse_attn.profiles.measurements import label_of
from hf_sparse_attn.report import LayerReport, Report
from hf_sparse_attn.tables import Markup, escape, html
from tests.support.head_profiles import HOSTILE, VIDEO, Page, make
from tests.support.tiny_lm import FAMILIES, tokens

HOSTILE_LAYER = LayerReport(0, HOSTILE, 1, 2, {HOSTILE: 1}, 0.25, 0.2512, 1.5, None, {HOSTILE: 2})


def rows_of(text: str) -> list[list[str]]:
    """The cells of a table, as a reader sees them."""
    lines = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return [[unescape(c) for c in re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL)] for line in lines]


def plain(text: str) -> None:
    """HTML that needs nothing, runs nothing and has no colours of its own."""
    tags = Page(text.replace("<br>", "")).tags
    assert {t for t, _ in tags} <= {"p", "b", "table", "thead", "tbody", "tr", "th", "td", "ul", "li"}
    assert {name for _, a in tags for name in a} <= {"style", "scope"}
    assert {a.get("style") for _, a in tags} <= {None, "text-align: left", "text-align: right"}


def test_a_report_of_a_patched_model_is_a_table() -> None:
    model = FAMILIES["llama"]()
    with hsa.patch(model, "sliding_window", window=16, sink=0, block_size=16, min_tokens=0) as patch, torch.no_grad():
        patch.note("one < two")
        model(tokens(1, 64))
        report = patch.report()
    shown = report._repr_html_()
    plain(shown)
    head, *rows = rows_of(shown)
    assert head[:3] == ["layer", "sparse", "dense"] and "dense because" in head
    assert [row[0] for row in rows] == [str(r.layer) for r in report.layers] and rows
    assert [row[head.index("density")] for row in rows] == [f"{r.density:.3f}" for r in report.layers]
    assert f"density {report.density:.3f}" in shown and "<li>one &lt; two</li>" in shown
    # The words of the terminal, whose lines are broken elsewhere.
    told = re.sub(r"[─\s]+|note:|Notes:", "", str(report))
    assert sorted(told) == sorted(unescape(re.sub(r"<[^>]*>|Notes:|\s+", "", shown)))


def test_a_report_escapes_what_others_named() -> None:
    report = Report(HOSTILE, {HOSTILE: HOSTILE}, HOSTILE, [HOSTILE_LAYER, replace(HOSTILE_LAYER)], (HOSTILE,), 2.0)
    shown = report._repr_html_()
    plain(shown)
    assert unescape(shown).count(HOSTILE) >= 8 and "<script" not in shown
    assert rows_of(shown)[1][0] == HOSTILE


def test_a_report_of_nothing_is_shown() -> None:
    shown = Report("dense", {}, "llama")._repr_html_()
    plain(shown)
    assert "dense() on llama: density 1.000" in shown and "Notes" not in shown


@pytest.mark.parametrize("profile", [make(), make(steps=VIDEO, measured=False)], ids=["language", "video"])
def test_a_profile_shows_its_methods(profile: HeadProfile) -> None:
    shown = profile._repr_html_()
    plain(shown)
    head, *rows = rows_of(shown)
    assert "Head profile of LlamaModel: 3 layers x 5 heads" in shown and f"density {profile.density:.4g}" in shown
    assert ("2 step ranges" in shown) == (len(profile.plans) == 2)
    choice = np.stack([p.choice for p in profile.plans])
    used = [i for i in range(4) if (choice == i).any()]
    assert [row[0] for row in rows] == [label_of(profile.methods[i]) for i in used]
    assert [row[1] for row in rows] == [f"{100 * (choice == i).mean():.1f} %" for i in used]
    at = head.index("damage")
    means = [float(np.nanmean(profile.figures["damage"][choice == i])) for i in used]
    assert [float(row[at]) for row in rows] == pytest.approx(means, rel=1e-3, abs=1e-9)
    # Small enough for a cell.
    assert len(shown) < 5000


def test_a_profile_escapes_what_others_named() -> None:
    profile = make()
    shown = replace(profile, model=replace(profile.model, model_class=HOSTILE))._repr_html_()
    plain(shown)
    assert HOSTILE in unescape(shown) and "<script" not in shown


def test_a_published_profile_without_figures_is_shown() -> None:
    profile = make(measured=False)
    known = np.full_like(profile.figures["density"], np.nan)
    shown = replace(profile, figures={"density": known}, metric="published", budget={})._repr_html_()
    plain(shown)
    assert "density unknown, budget none" in shown and rows_of(shown)[1][2] == "-"


def test_texts_for_html_lose_their_tags_and_controls_once() -> None:
    assert escape("a<b>&\"'\x1b\u202e") == "a&lt;b&gt;&amp;&quot;&#x27;\ufffd\ufffd"
    assert escape(escape("<")) == "&lt;" and escape(Markup("<b>")) == "<b>"
    assert html(("", ""), [("<", Markup("<i></i>"))], (1,)) == (
        '<table><tbody><tr><td>&lt;</td><td class="n"><i></i></td></tr></tbody></table>'
    )


def test_a_profile_shows_what_it_does_to_the_whole_model() -> None:
    row = {
        "figure": "a<b",
        "tokens": 2048,
        "inputs": 8,
        "density": 0.25,
        "dense": 2.5,
        "sparse": 2.75,
        "difference": 0.25,
    }
    shown = make(evaluation=(row,))._repr_html_()
    plain(shown)
    head, first = rows_of(shown)[:2]
    assert dict(zip(head, first, strict=True)) == {name: str(value) for name, value in row.items()}
