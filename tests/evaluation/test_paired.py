"""Statistics of paired runs by numbers computed by hand, and densities that are corrected by runs."""

import math
from types import SimpleNamespace

import pytest

import hf_sparse_attn as hsa
from hf_sparse_attn.evaluation.equal_density import COARSE, END, VARIES, Dial, Fit, correct_density
from hf_sparse_attn.evaluation.paired import Paired
from hf_sparse_attn.evaluation.result import SCORED, Result, Row
from hf_sparse_attn.evaluation.run import Contestant, Trial, settled


def test_mean_spread_and_signs_are_those_of_the_differences():
    found = Paired.of([2.0, 3.0, 5.0, 1.0], [1.0, 1.0, 5.0, 2.0])
    assert found.differences == (1.0, 2.0, 0.0, -1.0)
    assert found.mean == 0.5 and found.signs == "++=-" and not found.agreed
    # Squares of 0.5, 1.5, -0.5 and -1.5 sum to 5.
    assert found.deviation == pytest.approx(math.sqrt(5 / 3)) and found.error == pytest.approx(math.sqrt(5 / 12))
    assert found.shown(2) == "+0.50 ±0.65 ++=-"


def test_inputs_of_very_different_figures_do_not_spread_a_steady_difference():
    found = Paired.of([1.1, 9.1, 5.1], [1.0, 9.0, 5.0])
    assert found.mean == pytest.approx(0.1) and found.error == pytest.approx(0, abs=1e-12) and found.agreed


def test_a_single_input_has_no_spread():
    found = Paired.of([0.75])
    assert (found.mean, found.deviation, found.error, found.shown(3)) == (0.75, None, None, "+0.750 +")


def test_many_signs_are_counted():
    assert Paired.of([1.0] * 20 + [-1.0] * 3, None).shown(1).endswith(" 20+ 3-")


@pytest.mark.parametrize("sparse, dense", [([], None), ([1.0], [1.0, 2.0])])
def test_as_many_dense_as_sparse_figures(sparse, dense):
    with pytest.raises(ValueError, match="`dense` must hold a figure for each"):
        Paired.of(sparse, dense)


def windows(low=1.0, high=1000.0):
    """A dial of windows, which stand for methods here."""
    made = hsa.get_method("sliding_window")
    return Dial(lambda value: made(window=int(value)), low, high, log=True, integer=True)


def counting(kept):
    """A measure by a function of the window, and the windows it was asked for."""
    asked = []

    def measure(method):
        asked.append(method.window)
        return kept(method.window)

    return measure, asked


@pytest.mark.parametrize("off", [0.7, 0.95, 1.2, 1.6])
def test_runs_that_keep_another_share_than_calls_are_met_within_two_per_cent(off):
    measure, asked = counting(lambda window: min(1.0, off * window / 1000))
    found = correct_density(windows(), 250, 0.25, measure, lambda density: 1000 * density)
    assert found.density == pytest.approx(0.25, rel=0.02) and found.limit == ""
    assert found.density == pytest.approx(off * found.method.window / 1000)
    assert len(asked) <= 3 and len(set(asked)) == len(asked)


def test_a_bent_curve_is_met_too():
    measure, asked = counting(lambda window: (window / 1000) ** 0.3)
    found = correct_density(windows(), 250, 0.25, measure, lambda density: 1000 * density)
    assert found.density == pytest.approx(0.25, rel=0.02) and found.limit == "" and len(asked) <= 7


def test_coarse_steps_and_ends_are_said():
    measure, _ = counting(lambda window: 0.2 if window < 200 else 0.3)
    found = correct_density(windows(), 250, 0.25, measure, lambda density: 1000 * density)
    assert found.limit == COARSE and found.density in (0.2, 0.3)
    measure, _ = counting(lambda window: 0.4 + window / 2000)
    found = correct_density(windows(), 250, 0.25, measure, lambda density: 1000 * density)
    assert found.limit == END and found.method.window == 1


def trial_of(kept):
    """Runs that keep a share by the window, and how often they were made."""
    measure, asked = counting(kept)
    return (lambda method: Trial(measure(method), {"paired": {}})), asked


def test_what_the_scored_runs_keep_is_met_where_inputs_differ():
    run, asked = trial_of(lambda window: 1.1 * window / 1000)
    before = Contestant("w", 0.25, Fit(windows().make(250), 0.25, "", 250.0), windows(), lambda d: 1000 * d)
    contestant, trial = settled(before, run)
    assert trial.density == pytest.approx(0.25, rel=0.02) and contestant.fit.limit == ""
    assert contestant.turned_by == SCORED
    assert contestant.fit.method.window == asked[-1] != 250


def test_what_is_near_enough_is_run_once():
    run, asked = trial_of(lambda window: 1.015 * window / 1000)
    before = Contestant("w", 0.25, Fit(windows().make(250), 0.25, "", 250.0), windows(), lambda d: 1000 * d)
    assert settled(before, run)[0] is before and asked == [250]


def test_what_cannot_be_met_is_marked():
    run, _ = trial_of(lambda window: 0.2 if window < 248 else 0.3)
    before = Contestant("w", 0.25, Fit(windows().make(250), 0.25, "", 250.0), windows(), lambda d: 1000 * d)
    assert settled(before, run)[0].fit.limit == VARIES


def test_tables_and_json_tell_differences_and_what_was_missed():
    rows = [
        Row("dense", "dense", None, 1.0, 1.0, 0.0, 0.0),
        Row("w", "w", 0.25, 0.3, 0.9, 0.1, 0.0, paired={"loss": Paired.of([1.0, 3.0])}, limit=COARSE),
        Row("x", "x", 0.25, 0.25, 0.9, 0.1, 0.0, turned_by=SCORED),
    ]
    result = Result("test", "two inputs", "the unpatched model", rows, {}, 0.0)
    said = str(result)
    assert "0.300*" in said and "against the unpatched model" in said
    assert "* w at 0.25: 0.3 is the nearest, for its steps are coarse" in said
    assert said.endswith("turned once more by the density of the scored runs: x at 0.25")
    kept = result.to_dict()["rows"][1]
    assert kept["paired"]["loss"]["signs"] == "++" and kept["limit"] == COARSE and kept["density"] == 0.3


def test_plots_have_bars_of_the_standard_error(tmp_path):
    pytest.importorskip("matplotlib")
    from hf_sparse_attn.evaluation.plot import _error

    row = SimpleNamespace(paired={"loss": Paired.of([1.0, 3.0])})
    assert (_error(row, "loss"), _error(row, "needles")) == (1.0, 0.0)
