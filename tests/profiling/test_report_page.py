"""The page of a head profile: what it says in its cells, what it lets run, and where its links lead."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_sparse_attn.profiles.head_profile import HeadProfile, StepPlan
from hf_sparse_attn.profiling.view.attention import values_of
from hf_sparse_attn.profiling.view.chart import _Axis, chart
from hf_sparse_attn.profiling.view.colours import LEVELS, contrast, level_class
from hf_sparse_attn.profiling.view.page import page
from hf_sparse_attn.profiling.view.report import number, short_labels, summary
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.tables import escape
from tests.support.head_profiles import HOSTILE, VIDEO, Page, make

Tags = list[tuple[str, dict[str, str | None]]]


def made(profile: HeadProfile) -> tuple[str, Tags]:
    html = page(profile, summary(profile))
    return html, Page(html).tags


@pytest.fixture(scope="module")
def video() -> tuple[HeadProfile, str, Tags]:
    profile = make(steps=VIDEO)
    return profile, *made(profile)


def policy_of(tags: Tags) -> dict[str, str]:
    (text,) = (a["content"] for t, a in tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert text is not None
    return dict(part.strip().split(" ", 1) for part in text.split(";"))


def test_only_the_pages_own_style_and_script_may_run(video: tuple[HeadProfile, str, Tags]) -> None:
    _, html, tags = video
    policy = policy_of(tags)
    for tag, rule in (("style", "style-src"), ("script", "script-src")):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert policy["img-src"] == "data:" and set(policy) == {
        "default-src", "img-src", "style-src", "script-src", "base-uri", "form-action",
    }  # fmt: skip
    # The policy would block these, and the page would not look or act as it does.
    for _, attributes in tags:
        assert "style" not in attributes and not [name for name in attributes if name.startswith("on")]


def test_nothing_is_loaded_from_elsewhere(video: tuple[HeadProfile, str, Tags]) -> None:
    _, html, tags = video
    for tag, attributes in tags:
        assert tag not in {"link", "iframe", "object", "base", "embed", "form"}
        for name in ("src", "srcset", "data", "action", "href", "xlink:href"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,"))
    assert "url(" not in html and "@import" not in html and "fetch(" not in html


def test_every_link_leads_somewhere_and_every_name_is_one(video: tuple[HeadProfile, str, Tags]) -> None:
    _, _, tags = video
    names = [a["id"] for _, a in tags if "id" in a]
    assert len(names) == len(set(names))
    links = [a["href"] for _, a in tags if a.get("href", "")]
    assert links and {link[1:] for link in links if link} <= set(names)
    assert {a["aria-labelledby"] for _, a in tags if "aria-labelledby" in a} <= set(names)


def test_every_head_says_what_it_runs_and_what_that_costs(video: tuple[HeadProfile, str, Tags]) -> None:
    profile, html, _ = video
    labels = short_labels(profile.methods)
    for plan, layer, head in np.ndindex(2, 3, 5):
        (cell,) = re.findall(rf'<td class="\w+" id="head-{plan}-{layer}-{head}".*?</td>', html)
        said = dict(re.findall(r'(title)="([^"]*)"', cell))["title"]
        assert said.startswith(f"layer {layer}, head {head}: {labels[profile.plans[plan].choice[layer, head]]};")
        for name in ("density", "damage", "recall"):
            assert f"{name} {number(float(profile.figures[name][plan, layer, head]))}" in said
    for name in ("density", "damage"):
        for plan in range(2):
            (table,) = re.findall(rf'<table class="map " aria-labelledby="{name}-{plan}">(.*?)</table>', html)
            found = re.findall(
                rf'<td class="{name}\d+" title="layer (\d), head (\d): {name} ([^"]*)">([^<]+)</td>', table
            )
            values = profile.figures[name][plan]
            assert [(int(a), int(b)) for a, b, _, _ in found] == list(np.ndindex(3, 5))
            assert [text for *_, text, _ in found] == [number(float(v)) for v in values.ravel()]
            assert all(float(shown) == pytest.approx(float(text), rel=0.5, abs=5e-3) for *_, text, shown in found)


def test_heads_lead_to_their_attention_and_back(video: tuple[HeadProfile, str, Tags]) -> None:
    profile, html, _ = video
    found = profile.measurements
    assert found is not None
    pairs = set()
    for there, back in re.findall(r'<figure id="(attention-\d+)">.*?<figcaption><a href="#(head-[\d-]+)">', html):
        pairs.add(back)
        assert re.search(rf'id="{back}"><a href="#{there}" title=', html)
    assert pairs == {f"head-{m.case}-{m.layer}-{m.head}" for m in found.maps}
    # A row of the worst heads leads to the cell, and to the attention where it is drawn.
    (worst,) = re.findall(r'<h2 id="worst">.*?</section>', html, re.DOTALL)
    for row in re.findall(r"<tr>(.*?)</tr>", worst)[1:]:
        (cell,) = re.findall(r'href="#(head-[\d-]+)"', row)
        assert ("see</a>" in row) == (cell in pairs)


def test_the_squares_of_a_head_are_in_the_page(video: tuple[HeadProfile, str, Tags]) -> None:
    from matplotlib.image import imread

    profile, _, tags = video
    found = profile.measurements
    assert found is not None
    images = [a for t, a in tags if t == "img"]
    assert len(images) == len(found.maps) and all(a["alt"] for a in images)
    first = next(a for a in images if str(a["alt"]).startswith("Attention of layer 0, head 4, steps 0 to 0.25"))
    # 333 tokens in 6 squares: 56 tokens each.
    assert (first["data-side"], first["data-size"], first["data-tokens"]) == ("6", "56", "333")
    values = np.frombuffer(base64.b64decode(str(first["data-values"])), np.uint8).reshape(6, 6)
    seen = found.maps[0]
    kept = seen.kept[found.candidates.index(profile.methods[profile.plans[0].choice[0, 4]])]
    assert ((values > 127) == kept).all()
    np.testing.assert_allclose(10 ** (4 * ((values & 127) / 127 - 1.0)), np.clip(seen.attention, 1e-4, 1), rtol=0.04)
    pixels = imread(io.BytesIO(base64.b64decode(str(first["src"]).partition(",")[2])))[..., :3]
    assert pixels.shape == (6, 6, 3) and ((np.ptp(pixels, -1) > 0.1) == kept).all()


def test_squares_beyond_the_tokens_are_left_out() -> None:
    profile = make()
    found = profile.measurements
    assert found is not None
    # 13 tokens in 6 squares are 3 tokens each: the sixth is empty.
    short = replace(found, cases=(replace(found.cases[0], tokens=13),))
    _, tags = made(replace(profile, measurements=short))
    assert {a["data-side"] for t, a in tags if t == "img"} == {"5"}


def test_weights_beyond_the_scale_are_its_ends() -> None:
    values = values_of(np.array([[0.0, 1e-9, 1e-4], [1.0, 7.0, math.nan]], np.float32), None)
    assert values.tolist() == [[0, 0, 0], [127, 127, 0]]


def test_marks_of_the_plot_and_its_table_have_their_values() -> None:
    profile = make(pareto=((0.1, 9.0), (0.25, 4.0), (0.9, 0.0)))
    drawn = chart(profile)
    assert drawn is not None
    assert "<title>best mix of methods: density 0.2500, damage 4.0000</title>" in drawn
    assert f"<title>this profile: density {number(profile.density)}, damage " in drawn
    assert "<title>budget: density 0.25</title>" in drawn and "off the scale" in drawn
    assert "<td>best mix of methods</td>" in drawn and drawn.count("<td>sliding_window, all heads</td>") == 2
    marks = re.findall(r'<use href="#(mark-\w+)" x="[\d.]+%" y="[\d.]+%"><title>', drawn)
    assert len(marks) == 4 + 2 + 1 and {f'<path id="{m}"' in drawn for m in marks} == {True}
    assert chart(make(measured=False, pareto=())) is None


def test_a_budget_of_time_draws_no_density() -> None:
    drawn = chart(make(budget={"time": 0.5}))
    assert drawn is not None and "time (share of dense)" in drawn
    assert "this profile" not in drawn and "budget: time 0.5" in drawn


@pytest.mark.parametrize(
    ("values", "wide", "ticks"),
    [
        ([0.1, 0.5], 7.0, [0.1, 0.2, 0.3, 0.4, 0.5]),
        ([0.06, 0.8], 7.0, [0.1, 0.2, 0.5]),
        ([1e-4, 9.0], 20.0, [0.0001, 0.001, 0.01, 0.1, 1, 10]),
        ([3.0], 7.0, [1.5, 2, 2.5, 3, 3.5, 4, 4.5]),
        ([1e-30, 1.0], 7.0, None),
    ],
    ids=["plain", "ratios", "powers", "one value", "far apart"],
)
def test_axes_have_round_ticks(values: list[float], wide: float, ticks: list[float] | None) -> None:
    axis = _Axis.over(values, wide)
    found = axis.ticks(8)
    assert 1 <= len(found) <= 9 and all(0 <= axis.at(v) <= 100 for v in (*values, *found))
    assert ticks is None or found == pytest.approx(ticks)


def test_letters_and_numbers_can_be_read_on_their_colours(video: tuple[HeadProfile, str, Tags]) -> None:
    _, html, tags = video
    light, dark = html.split("@media (prefers-color-scheme: dark) {\n.method0")
    rules: dict[str, Any] = {}
    for mode, text in (("light", light), ("dark", ".method0" + dark)):
        found = re.findall(r"\.(\w+\d+) \{ background: (#\w{6}); color: (#\w{6}); \}", text)
        rules[mode] = {name: (behind, ink) for name, behind, ink in found}
        assert all(contrast(behind, ink) >= 4.5 for _, behind, ink in found)
        assert len({behind for name, behind, _ in found if name.startswith("density")}) == LEVELS
    assert rules["light"].keys() == rules["dark"].keys() and rules["light"] != rules["dark"]
    used = {
        name
        for _, a in tags
        for name in str(a.get("class", "")).split()
        if re.fullmatch(r"(method|density|damage)\d+", name)
    }
    assert used <= rules["light"].keys()
    assert {level_class("density", share) for share in (-1, 0, 0.5, 1, 9)} <= rules["light"].keys()


def test_words_can_be_read_on_the_page() -> None:
    html, _ = made(make(1, 1, measured=False))
    for block in re.findall(r":root \{(.*?)\}", html, re.DOTALL):
        colours = dict(re.findall(r"--(\w+): (#\w{6})", block))
        for name in ("ink", "faint", "accent", "mark"):
            assert contrast(colours[name], colours["page"]) >= 4.5
        assert contrast(colours["faint"], colours["soft"]) >= 4.5


def test_contrast_is_that_of_the_guidelines() -> None:
    assert contrast("#000000", "#FFFFFF") == pytest.approx(21)
    assert contrast("#777777", "#FFFFFF") == pytest.approx(4.48, abs=0.01)


def test_hostile_names_stay_texts_in_every_place() -> None:
    model = Fingerprint(HOSTILE, HOSTILE, 3, 5, 1, 64, HOSTILE, HOSTILE)
    html, tags = made(make(model=model, calibration={HOSTILE: [HOSTILE]}, versions={HOSTILE: HOSTILE}))
    assert [t for t, _ in tags].count("script") == 1 and 'evil.example/x.js"' not in html
    assert policy_of(tags)["default-src"] == "'none'"


def test_heads_without_a_map_are_not_led_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_sparse_attn.profiling.view import page as module

    monkeypatch.setattr(module, "_MOST_PLANS", 1)
    _, tags = made(make(steps=VIDEO))
    names = {a["id"] for _, a in tags if "id" in a}
    assert {str(a["href"])[1:] for _, a in tags if "href" in a} <= names


def test_many_heads_are_small_cells_with_their_values() -> None:
    html, _ = made(make(2, 111, measured=False))
    assert html.count('class="map tiny"') == 2 and html.count('class="map letters tiny"') == 1
    assert len(re.findall(r'<td class="density\d+" title="[^"]+">[\d.]+</td>', html)) == 222


def test_equal_plans_of_one_method_have_a_page() -> None:
    profile = make(1, 2, measured=False)
    plans = (StepPlan((0.0, 1.0), np.zeros((1, 2), np.int16)),)
    figures = {"density": np.ones((1, 1, 2), np.float32), "damage": np.zeros((1, 1, 2), np.float32)}
    html, _ = made(replace(profile, plans=plans, figures=figures))
    assert "0 of 2" in html


def test_the_whole_models_figures_are_a_table() -> None:
    row = {"figure": HOSTILE[:60], "tokens": 2048, "inputs": 8, "density": 0.25, "dense": 2.5, "sparse": 2.75,
           "difference": 0.25}  # fmt: skip
    html, _ = made(make(evaluation=(row,)))
    (section,) = re.findall(r'<h2 id="quality">.*?</section>', html, re.DOTALL)
    numbers = re.findall(r'<td class="n">([^<]+)</td>', section)
    assert sorted(map(float, numbers)) == [0.25, 0.25, 2.5, 2.75, 8, 2048]
    assert "<script" not in section and escape(HOSTILE[:60]) in section
    assert "was not measured" in made(make())[0]
