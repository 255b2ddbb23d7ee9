"""The report of a head profile: the summary and its tables, the page, the pictures, the CLI."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.cli.commands import main
from hf_sparse_attn.extras import MissingExtra
from hf_sparse_attn.profiles.head_profile import StepPlan
from hf_sparse_attn.profiling.view import page as profile_page
from hf_sparse_attn.profiling.view import report as profile_report
from hf_sparse_attn.profiling.view.curves import _singles, shown_maps
from hf_sparse_attn.profiling.view.page import page, pictures
from hf_sparse_attn.profiling.view.plots import method_styles
from hf_sparse_attn.profiling.view.report import number, short_labels, total_damage
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support.head_profiles import CANDIDATES, HOSTILE, VIDEO, Page, make
from tests.support.processes import run_code


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "new"
    profile_page.write(make(), folder)
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    make().save_pretrained(tmp_path / "profile")
    return tmp_path / "profile"


def test_the_summary_says_what_the_profile_says() -> None:
    profile = make(steps=VIDEO)
    found = profile_report.summary(profile, worst=4)
    choice = np.stack([p.choice for p in profile.plans])
    assert found["density"] == profile.density and found["heads"] == choice.size == 30
    weights = np.array([0.25, 0.75]) * 2
    assert found["damage"] == pytest.approx(float(profile.figures["damage"].sum((1, 2)) @ weights), rel=1e-6)
    for entry in found["methods"]:
        index = profile.labels().index(entry["label"])
        assert entry["heads"] == (choice == index).sum() == sum(entry["heads_by_steps"])
        for name, value in entry["figures"].items():
            assert value == pytest.approx(float(profile.figures[name][choice == index].mean()), rel=1e-6)
    assert [m["short"] for m in found["methods"]] == [
        "dense", "sliding_window window=64", "sliding_window window=256", "vertical_slash",
    ]  # fmt: skip
    for entry in found["layers"]:
        assert entry["density"] == profile.layer_density(entry["layer"])
        assert sum(entry["methods"].values()) == 10
    damages = np.sort(profile.figures["damage"].ravel())[::-1]
    assert [h["figures"]["damage"] for h in found["worst"]] == damages[:4].tolist()
    for head in found["worst"]:
        plan = VIDEO.index(tuple(head["steps"]))
        assert head["figures"]["density"] == profile.figures["density"][plan, head["layer"], head["head"]]
    json.loads(json.dumps(found, allow_nan=False))


def test_the_table_of_the_terminal_has_the_profiles_numbers() -> None:
    profile = make()
    text = profile_report.render(profile_report.summary(profile, worst=2), width=160)
    assert f"achieved density: {profile.density:.4f}; total damage by output_error:" in text
    assert "budget: density 0.25" in text and "3 layers x 5 heads" in text
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    choice = profile.plans[0].choice
    for index in np.unique(choice):
        cells = lines[profile.labels()[index].split()[0]]
        means = [
            profile.figures[n][0][choice == index].mean() for n in ("density", "recall", "output_error", "damage")
        ]
        same_name = [i for i in np.unique(choice) if profile.labels()[i].split()[0] == cells[0]]
        if same_name == [index]:
            assert cells[-5:] == [str((choice == index).sum()), *(f"{m:.4f}" for m in means)]
    layer, head = np.unravel_index(profile.figures["damage"][0].argmax(), choice.shape)
    first = text.split("Worst heads of 15")[1].splitlines()[4].split()
    assert first[:2] == [str(layer), str(head)] and f"{profile.figures['damage'].max():.4f}" in first


@pytest.mark.parametrize(("value", "text"), [(None, "-"), (math.nan, "-"), (0.0, "0.0000"), (0.25, "0.2500"),
                                             (12.5, "12.5000"), (2.5e-6, "2.50e-06"), (1e9, "1.00e+09")])  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


def test_the_page_has_the_profiles_numbers(written: Path) -> None:
    profile, shown = make(), Page((written / "report.html").read_text(encoding="utf-8"))
    for text in (f"{profile.density:.4f}", "achieved density", *profile.labels(), "512, 1024", "2.13", "config_hash"):
        assert text in shown.text
    worst = profile_report.summary(profile, 1)["worst"][0]
    assert f"{worst['figures']['damage']:.4f}" in shown.text


def test_pictures_are_files_too_and_not_empty(written: Path) -> None:
    from matplotlib.image import imread

    names = ["attention", "damage", "density", "methods", "pareto"]
    assert sorted(p.name for p in written.iterdir()) == [*(f"{n}.png" for n in names), "report.html", "report.json"]
    for name in names:
        image = imread(written / f"{name}.png")
        assert min(image.shape[:2]) > 250 and image[..., :3].std() > 0.05
    assert json.loads((written / "report.json").read_text()) == profile_report.summary(make())


def test_hostile_texts_are_only_texts(tmp_path: Path) -> None:
    model = Fingerprint(HOSTILE, HOSTILE, 3, 5, 1, 64, HOSTILE, HOSTILE)
    more = {HOSTILE: HOSTILE, "\u202eleft": "a\x1b[31m"}
    profile = make(model=model, calibration=more, versions=more)
    html = profile_page.write(profile, tmp_path)[0].read_text(encoding="utf-8")
    assert html.count("<script") == 1 and 'src="http' not in html
    parsed = Page(html)
    assert [t for t, _ in parsed.tags].count("script") == 1
    assert parsed.text.count(HOSTILE) >= 6
    assert "\x1b" not in html and "\u202e" not in html
    assert "\x1b" not in profile_report.render(profile_report.summary(profile))


def test_without_measurements_the_page_says_so(tmp_path: Path) -> None:
    files = profile_page.write(make(measured=False, pareto=()), tmp_path)
    assert sorted(f.name for f in files) == ["damage.png", "density.png", "methods.png", "report.html", "report.json"]
    text = Page(files[0].read_text(encoding="utf-8")).text
    assert "This part needs measurements with attention maps" in text and "No other budgets were tried" in text


def test_only_density_is_known() -> None:
    profile = make(measured=False)
    profile = make(measured=False, figures={"density": profile.figures["density"]}, metric="published", budget={})
    found = profile_report.summary(profile)
    assert found["damage"] is None and found["worst"] == []
    text = profile_report.render(found)
    assert "budget: none" in text and "total damage by published: -" in text and "Worst" not in text
    assert [p.name for p in pictures(profile)] == ["methods", "density", "pareto"]


def test_unknown_figures_are_neither_worst_nor_counted() -> None:
    profile = make()
    figures = {n: v.copy() for n, v in profile.figures.items()}
    figures["damage"][0, 1] = math.nan
    figures["density"][0, 1] = math.nan
    unknown = make(figures=figures)
    found = profile_report.summary(unknown, worst=15)
    assert len(found["worst"]) == 10 and all(h["layer"] != 1 for h in found["worst"])
    assert found["layers"][1]["density"] is None and found["layers"][1]["damage"] is None
    shown = Page(page(unknown, found))
    assert "Cells with a question mark are not known." in shown.text
    titles = [a["title"] for t, a in shown.tags if t == "td" and a.get("class") == "unknown"]
    assert titles == [f"layer 1, head {head}: not known" for head in range(5)] * 2


def test_each_range_of_steps_has_its_maps(tmp_path: Path) -> None:
    files = [f.name for f in profile_page.write(make(2, 3, VIDEO), tmp_path)]
    assert [n for n in files if n[0] in "md"] == [
        f"{name}_{i}.png" for i in (0, 1) for name in ("methods", "density", "damage")
    ]
    text = Page((tmp_path / "report.html").read_text(encoding="utf-8")).text
    assert "heads, steps 0 to 0.25" in text and "0.25 to 1" in text


def test_many_ranges_of_steps_are_not_all_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_page, "_MOST_PLANS", 2)
    profile = make(1, 2, ((0.0, 0.25), (0.25, 0.5), (0.5, 1.0)), measured=False)
    assert [p.name for p in pictures(profile) if p.name.startswith("methods")] == ["methods_0", "methods_1"]
    shown = page(profile, profile_report.summary(profile))
    assert "The first 2 of 3 step ranges are drawn." in shown
    assert shown.count('class="map letters') == 2


@pytest.mark.parametrize(("layers", "heads"), [(1, 1), (63, 2), (2, 111)], ids=["one", "tall", "wide"])
def test_any_shape_is_drawn(layers: int, heads: int) -> None:
    from matplotlib.image import imread

    drawn = pictures(make(layers, heads, measured=False))
    assert [p.name for p in drawn] == ["methods", "density", "damage", "pareto"]
    # In pixels at 140 dots per inch.
    assert all(220 < imread(BytesIO(p.png)).shape[1] < 1900 for p in drawn)


def test_colours_and_letters_tell_methods_apart() -> None:
    styles = method_styles(CANDIDATES)
    assert [letter for _, letter in styles] == ["·", "A", "B", "C", "D"]
    assert len({colour for colour, _ in styles}) == 5
    window = hsa.get_method("sliding_window")
    many = method_styles([CANDIDATES[0], *(window(window=16 * i) for i in range(1, 31))])
    assert len(set(many)) == 31 and many[27][1] == ""


def test_single_methods_count_declined_heads_as_dense() -> None:
    profile = make(steps=VIDEO)
    found = profile.measurements
    assert found is not None
    points = list(_singles(profile))
    assert [name for name, _, _ in points] == ["sliding_window", "sliding_window", "vertical_slash", "radial"]
    error, density = found.figures["output_error"][..., 3], np.nan_to_num(found.figures["density"][..., 3], nan=1.0)
    assert points[2][1] == pytest.approx(density.mean((1, 2)) @ [0.25, 0.75], rel=1e-6)
    assert points[2][2] == pytest.approx(np.nansum(error, (1, 2)) @ [0.5, 1.5], rel=1e-6)
    # A mix that gives all heads one method has the damage of its point.
    plans = tuple(StepPlan(s, np.full((3, 5), 1)) for s in VIDEO)
    same = make(steps=VIDEO, plans=plans, figures={n: found.figures[n][..., 1] for n in ("density", "recall")}
                | {"damage": found.figures["output_error"][..., 1]})  # fmt: skip
    assert total_damage(same) == pytest.approx(points[0][2], rel=1e-6)


def test_attention_is_shown_of_every_method_in_turn() -> None:
    profile = make(40, 3)
    found = profile.measurements
    assert found is not None
    shown = shown_maps(profile, found)
    used = [int(profile.plans[0].choice[m.layer, m.head]) for m in shown]
    assert len(shown) == 12 and [used.count(i) for i in range(4)] == [3, 3, 3, 3]


def test_short_labels_name_what_differs() -> None:
    assert short_labels(CANDIDATES) == [
        "dense", "sliding_window window=64", "sliding_window window=256", "vertical_slash", "radial",
    ]  # fmt: skip


# ------------------------------------------------------------------ command line


def test_command_prints_tables_and_writes(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved), "--output", str(tmp_path / "out"), "--worst", "2"]) == 0
    out, err = capsys.readouterr()
    assert "Head profile of LlamaModel (llama): 3 layers x 5 heads" in out and "Worst heads of 15" in out
    assert f"wrote {tmp_path / 'out' / 'report.html'}" in err
    assert (tmp_path / "out" / "attention.png").stat().st_size > 1000


def test_command_prints_json(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(saved), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["files"] == [] and found["measured"] is True
    assert found["density"] == pytest.approx(make().density, rel=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere"),
        ([], "PROFILE"),
        (["SAVED", "--worst", "-1"], "`worst` must be 0 or more, got -1"),
        (["SAVED/head_profile.json"], "`source` must be a folder or a Hub id"),
    ],
    ids=["no such folder", "nothing", "negative", "a file"],
)
def test_command_guards(
    arguments: list[str],
    message: str,
    saved: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main(["report", *(a.replace("SAVED", str(saved)) for a in arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and message in err and err.startswith("hf-sparse-attn: error:")


def test_without_matplotlib_the_extra_is_named(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["report", str(saved)]) == 0
    assert main(["report", str(saved), "--output", str(tmp_path / "out")]) == 2
    assert "the page needs matplotlib (pip install 'hf-sparse-attn[report]')" in capsys.readouterr().err
    # Nothing half done is left behind.
    assert not (tmp_path / "out").exists()
    with pytest.raises(MissingExtra):
        pictures(make())


def test_the_summary_does_not_load_matplotlib(saved: Path) -> None:
    code = (
        "import sys; from hf_sparse_attn.cli.commands import main\n"
        f"main(['report', {str(saved)!r}]); print('matplotlib' in sys.modules)"
    )
    done = run_code(code)
    assert done.stdout.splitlines()[-1] == "False", done.stderr


def test_single_methods_are_drawn_for_sums_of_metrics() -> None:
    profile = make()
    both = replace(profile, metric="output_error + 2 * recall")
    assert len(list(_singles(profile))) == len(list(_singles(both))) == 4
    for (_, _, alone), (_, _, more) in zip(_singles(profile), _singles(both), strict=True):
        assert more > alone
    assert not list(_singles(replace(profile, metric="influence")))
