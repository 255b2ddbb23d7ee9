"""Pipelines of diffusers are told the steps that they run; see pipelines.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hf_sparse_attn.hosts.diffusers_clock import Clock, Moment

diffusers = pytest.importorskip("diffusers")
pipelines = pytest.importorskip("tests.coverage.pipelines")

pytestmark = pytest.mark.usefixtures("one_thread")

PAGE = Path(__file__).parents[2] / ".github" / "pipelines.md"
# What cannot be built small here.
NOT_BUILT: set[str] = {"Wan22VaceModularPipeline"}
# A time that the body of the loop overwrites, a controlnet's loop of closures, a part of a schedule, a matrix of steps
# and blocks.
FEW = (
    "DiTPipeline",
    "StableDiffusion3ControlNetPipeline",
    "LTXI2VLongMultiPromptPipeline",
    "SkyReelsV2DiffusionForcingPipeline",
    "WanModularPipeline",
    "EchoModularPipeline",
)


@pytest.mark.parametrize("name", FEW)
def test_a_pipeline_is_told_the_steps_that_it_runs(name: str) -> None:
    if not hasattr(diffusers, name):
        pytest.skip("not in this diffusers")
    rows = list(pipelines.of_class(name))
    assert {row.verdict for row in rows} <= {"right", "refused"}, rows
    assert sum(row.verdict == "right" for row in rows) >= 2


@pytest.mark.slow
def test_no_pipeline_is_told_a_wrong_step() -> None:
    names, others = pipelines.known()
    rows = pipelines.table(names)
    wrong = [row for row in rows if row.verdict == "wrong"]
    assert not wrong, "\n".join(map(str, wrong))
    assert {row.pipeline for row in rows if row.verdict == "not built"} <= NOT_BUILT
    assert {row.pipeline for row in rows} == set(names)
    said = pipelines.page(rows, others)
    assert all(f"- {name}: " in said for name in others)


def test_the_page_is_of_these_classes() -> None:
    said = PAGE.read_text()
    if f"diffusers {diffusers.__version__} " not in said:
        pytest.skip("made with another diffusers")
    assert all(f"\n| {name} | " in said for name in FEW)
    assert ", 0 wrong." in said


def test_a_wrong_step_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Clock.moment

    def late(self: Clock, *args: object) -> Moment:
        found = right(self, *args)
        return Moment(max(0, found.step - 1), found.num_steps)

    monkeypatch.setattr(Clock, "moment", late)
    row = next(pipelines.of_class("FluxPipeline"))
    assert row.verdict == "wrong" and "1 of 4 was told as (0, 4)" in row.why


def test_a_guess_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Clock, "moment", lambda self, *args: Moment(0, 4, guessed=True))
    row = next(pipelines.of_class("FluxPipeline"))
    assert (row.verdict, row.why) == ("unknown", "step guessed")


def test_runs_begin_with_a_schedule_and_evaluations_end_with_a_step() -> None:
    a, b, c, d = (pipelines.Forward() for _ in range(4))
    events = ["set_timesteps", "set_timesteps", a, b, "step", "step", c, "step", "set_timesteps", d, "step"]
    assert pipelines.evaluations(events, False) == [[[a, b], [c]], [[d]]]
    assert pipelines.evaluations(["set_timesteps", a, b, pipelines.Forward(aside=True)], True) == [[[a], [b]]]


def test_steps_are_said_in_few_words() -> None:
    assert pipelines.steps([(0, 3), (1, 3), (2, 3)]) == "0-2 of 3"
    assert pipelines.steps([(0, 2), (1, 2), (0, 2), (1, 2), (0, 1)]) == "2 x 0-1 of 2; 0 of 1"
    assert pipelines.steps([(0, 4), (2, 4), (3, 4), (0, None)]) == "0, 2-3 of 4; 0 of ?"
    assert pipelines.steps([]) == ""


def test_a_class_that_cannot_be_built_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise LookupError("no tiny vae is known")

    monkeypatch.setattr(pipelines, "tiny_pipeline", refuse)
    (row,) = pipelines.of_class("FluxPipeline")
    assert row.verdict == "not built" and row.why == "LookupError: no tiny vae is known"
    assert "- FluxPipeline: could not be built: LookupError: no tiny vae is known" in pipelines.page([row], {})
    assert torch.get_num_threads() == 1
