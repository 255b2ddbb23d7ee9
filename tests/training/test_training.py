"""The training loop: exact resumption, several processes, what is refused, what it leaves behind."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hf_sparse_attn.recipe import OptimizerSettings, Run
from hf_sparse_attn.training import files as training_files
from hf_sparse_attn.training.loop import Interrupted, train
from tests.support.processes import exit_code, run_code
from tests.support.train_toy import Toy, ToyTask

PROGRAM = Path(__file__).parents[1] / "support" / "train_toy.py"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "result" / "model.pt", weights_only=True)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def program(
    folder: Path, resume: bool = False, processes: int = 1, **settings: Any
) -> subprocess.CompletedProcess[str]:
    call = (str(folder), json.dumps(settings), str(int(resume)))
    return run_code(f"from tests.support.train_toy import main; main(*{call!r})", processes=processes)


def launched(folder: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Two processes as people start them."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    call = [*launch, str(PROGRAM), str(folder), json.dumps(settings), "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(call, capture_output=True, text=True, timeout=120, env=env, check=False)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    train(Toy(dropout=0.2), folder, progress=False)
    return folder


def test_it_learns_and_tells_figures(tmp_path: Path) -> None:
    figures = train(Toy(steps=40), tmp_path, progress=False)
    assert figures["after"]["error"] < 0.6 * figures["before"]["error"]
    assert (figures["steps"], figures["processes"]) == (40, 1)
    assert figures["peak_memory"] > 1 << 20 and figures["step_seconds"] > 0
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))
    assert {line["step"] for line in lines if "evaluation" in line} == {0, 40}
    assert figures["loss"] == pytest.approx(
        sum(line["loss"] for line in lines if "loss" in line and line["step"] > 36) / 4
    )


@pytest.mark.parametrize("micro_batch", [None, 2], ids=str)
def test_loss_and_gradient_are_means_over_the_weights_of_a_step(tmp_path: Path, micro_batch: int | None) -> None:
    train(Toy(steps=1, micro_batch=micro_batch), tmp_path, progress=False)
    task = ToyTask(Toy(), Run(tmp_path, torch.device("cpu")))
    batch = task.batch(0, range(6))
    loss = task.loss(batch) / (1 + 2 + 3 + 4 + 5 + 6)
    gradients = torch.autograd.grad(loss, list(task.trained().values()))
    (entry,) = (json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines() if "loss" in line)
    assert entry["loss"] == pytest.approx(float(loss.detach()), rel=1e-5)
    assert entry["gradient"] == pytest.approx(float(torch.stack([g.norm() for g in gradients]).norm()), rel=1e-5)


def test_steps_are_those_of_a_plain_loop(tmp_path: Path) -> None:
    train(Toy(steps=5), tmp_path, progress=False)
    task = ToyTask(Toy(steps=5), Run(tmp_path, torch.device("cpu")))
    (optimizer,) = task.optimizers()
    for step in range(5):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * task.rate(step)
        optimizer.zero_grad()
        batch = task.batch(step, range(task.samples(step)))
        (task.loss(batch) / task.weight(batch)).backward()
        torch.nn.utils.clip_grad_norm_(list(task.trained().values()), 1.0)
        optimizer.step()
        task.end_step(step)
    for name, found in weights(tmp_path).items():
        wanted = task.average if name == "average" else task.module.state_dict()[name]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)


def test_where_the_system_tells_no_peak_memory_the_result_is_there_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Elsewhere than on Windows psutil needs the module itself.
    import psutil  # noqa: F401

    # Windows has no module of that name.
    monkeypatch.setitem(sys.modules, "resource", None)
    assert train(Toy(steps=1), tmp_path, progress=False)["peak_memory"] > 1 << 20
    assert (tmp_path / "result" / "model.pt").is_file()


def test_groups_are_cut_apart_and_frozen_weights_stand_still(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def groups(self: ToyTask, weights: dict[str, Any]) -> list[list[Any]]:
        return [[p for name, p in weights.items() if name.startswith(first)] for first in ("0", "2")]

    def freezes(self: ToyTask, step: int) -> None:
        self.module[0].weight.requires_grad_(step != 1)

    monkeypatch.setattr(ToyTask, "gradient_groups", groups)
    monkeypatch.setattr(ToyTask, "gradient_clip", lambda self: 0.1)
    monkeypatch.setattr(ToyTask, "begin_step", freezes)
    train(Toy(steps=3), tmp_path, progress=False)
    task = ToyTask(Toy(steps=3), Run(tmp_path, torch.device("cpu")))
    parts = groups(task, task.trained())
    (optimizer,) = task.optimizers()
    norms = []
    for step in range(3):
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * task.rate(step)
        optimizer.zero_grad()
        batch = task.batch(step, range(task.samples(step)))
        (task.loss(batch) / task.weight(batch)).backward()
        if step == 1:
            parts[0][0].grad = None
        norms.append(math.hypot(*(float(torch.nn.utils.clip_grad_norm_(part, 0.1)) for part in parts)))
        optimizer.step()
        task.end_step(step)
    for name, found in weights(tmp_path).items():
        wanted = task.average if name == "average" else task.module.state_dict()[name]
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["gradient"] for line in lines if "loss" in line] == pytest.approx(norms, rel=1e-5)


def test_only_the_last_checkpoint_stays_and_none_in_the_end(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Toy(save_every=2, term_at=5), tmp_path, progress=False)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000006"]
    train(Toy(save_every=2, term_at=5), tmp_path, resume=True, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["figures.json", "log.jsonl", "result", "settings.json"]


@pytest.mark.parametrize("kill_at, save_every", [(0, 3), (5, 3)], ids=str)
def test_killed_and_resumed_ends_with_the_same_bits(
    whole: Path, tmp_path: Path, kill_at: int, save_every: int
) -> None:
    toy = Toy(dropout=0.2, kill_at=kill_at, save_every=save_every)
    assert exit_code(lambda: train(toy, tmp_path, progress=False)) == -signal.SIGKILL
    assert not (tmp_path / "result").exists()
    # What kills it is a setting like any other; here it must be let go.
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "kill_at": None}))
    figures = train(Toy(dropout=0.2), tmp_path, resume=True, progress=False)
    assert same(weights(tmp_path), weights(whole))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert figures["before"]["error"] == json.loads((whole / "figures.json").read_text())["before"]["error"]


def test_a_kill_while_a_checkpoint_is_written_costs_nothing(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = torch.save

    def dies(*args: Any) -> None:
        if len(list((tmp_path / "checkpoints").glob("step-*"))) == 1:
            raise KeyboardInterrupt
        kept(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", dies)
        with pytest.raises(KeyboardInterrupt):
            train(Toy(dropout=0.2, save_every=2), tmp_path, progress=False)
    assert (tmp_path / "checkpoints" / ".partial").is_dir()
    train(Toy(dropout=0.2), tmp_path, resume=True, progress=False)
    assert same(weights(tmp_path), weights(whole))


def test_the_log_holds_every_step_once_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def dies(self: ToyTask, step: int) -> None:
        if step == 5:
            raise KeyboardInterrupt

    # Evaluations write the log beyond the last checkpoint.
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(ToyTask, "begin_step", dies)
        train(Toy(save_every=3, evaluate_every=1), tmp_path, progress=False)
    assert '"step": 5' in (tmp_path / "log.jsonl").read_text()
    train(Toy(save_every=3, evaluate_every=2), tmp_path, resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 8))
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 1, 2, 3, 4, 6, 7]


def test_an_evaluation_that_a_stop_left_out_is_made_up_for(tmp_path: Path) -> None:
    toy = Toy(term_at=2, evaluate_every=3)
    with pytest.raises(Interrupted, match="stopped after 3 steps"):
        train(toy, tmp_path, progress=False)
    train(toy, tmp_path, resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 3, 6, 7]


def test_an_evaluation_that_was_made_is_not_made_again(tmp_path: Path) -> None:
    toy = Toy(kill_at=4, evaluate_every=3, save_every=3)
    assert exit_code(lambda: train(toy, tmp_path, progress=False)) == -signal.SIGKILL
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "kill_at": None}))
    train(Toy(evaluate_every=3), tmp_path, resume=True, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "evaluation" in line] == [0, 3, 6, 7]


def test_sigterm_saves_and_stops(whole: Path, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="stopped after 3 steps") as stopped:
        train(Toy(dropout=0.2, term_at=2), tmp_path, progress=False)
    assert (stopped.value.step, stopped.value.signal) == (3, signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before
    train(Toy(dropout=0.2, term_at=2), tmp_path, resume=True, progress=False)
    assert same(weights(tmp_path), weights(whole))


def test_one_process_stops_after_the_step_in_which_the_signal_came(tmp_path: Path) -> None:
    def signalled(self: ToyTask, step: int) -> None:
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ToyTask, "end_step", signalled)
        with pytest.raises(Interrupted, match="stopped after 3 steps"):
            train(Toy(), tmp_path, progress=False)


def test_a_finished_training_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = train(Toy(steps=2), tmp_path, progress=False)
    monkeypatch.setattr(Toy, "task", None)
    assert train(Toy(steps=2), tmp_path, resume=True, progress=False) == figures


@pytest.mark.parametrize("micro_batch", [1, 2, 4], ids=str)
def test_micro_batches_add_up_to_the_whole(tmp_path: Path, micro_batch: int) -> None:
    train(Toy(), tmp_path / "whole", progress=False)
    train(Toy(micro_batch=micro_batch), tmp_path / "parts", progress=False)
    for a, b in zip(weights(tmp_path / "whole").values(), weights(tmp_path / "parts").values(), strict=True):
        # Adam divides by the size of a gradient: a rounding of 1e-7 of it moves a weight by as much of the rate.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_two_processes_stopped_and_resumed_equal_one(tmp_path: Path) -> None:
    # Weights that no sample of a step reaches have no gradient: Adam leaves them, and does not decay them.
    train(Toy(lonely=True), tmp_path / "one", progress=False)
    # The signal comes to one of the two; both must stop after the same step.
    stopped = launched(tmp_path / "two", lonely=True, term_at=2)
    told = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    assert told == [{"stopped": 3, "signal": signal.SIGTERM}] * 2, stopped.stderr[-2000:]
    again = {"resume": True, "processes": 2, "lonely": True, "term_at": 2}
    resumed = program(tmp_path / "two", **again)
    assert resumed.returncode == 0, resumed.stderr[-2000:]
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert bool((one["never.weight"] == 0.5).all() and (one["seldom.weight"] != 0.5).all())
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-6, msg=name)
    first, second = (json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2))
    assert first["processes"] == 2 and second == {}
    # The first process alone tells the figures, also of a training that was over before.
    finished = program(tmp_path / "two", **again)
    told = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    assert told == [first, {}], finished.stderr[-2000:]


def test_a_signal_to_all_processes_is_told_as_one(tmp_path: Path) -> None:
    # As after Ctrl-C in a terminal: the numbers of the signals make no sum.
    stopped = program(tmp_path / "two", processes=2, term_at=2, term_all=True)
    told = [json.loads((tmp_path / f"two-{rank}.json").read_text()) for rank in range(2)]
    assert told == [{"stopped": 3, "signal": signal.SIGTERM}] * 2, stopped.stderr[-2000:]


def test_processes_that_see_other_folders_do_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Toy(term_at=2), tmp_path / "rank0", progress=False)
    # As two machines without a disk in common: the second has no checkpoint, and would train another model.
    resumed = program(tmp_path / "rankRANK", resume=True, processes=2, term_at=2)
    assert resumed.returncode != 0
    assert (
        "`output` must be a folder that all processes see, got one with 3 steps done and one with 0" in resumed.stderr
    )


def test_only_weights_that_ask_for_it_change(tmp_path: Path) -> None:
    start = ToyTask(Toy(), Run(tmp_path, torch.device("cpu"))).module.state_dict()
    train(Toy(), tmp_path / "run", progress=False)
    changed = {n for n, t in weights(tmp_path / "run").items() if n != "average" and not torch.equal(t, start[n])}
    assert changed == {"0.weight", "2.weight", "2.bias"}


def test_the_callers_generator_and_threads_are_left_alone(tmp_path: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    train(Toy(threads=1, dropout=0.5, steps=2), tmp_path, progress=False)
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_kept(tmp_path: Path) -> None:
    tasks: list[ToyTask] = []
    toy = Toy(bad_at=3, save_every=1)
    made = Toy.task
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Toy, "task", lambda self, run: tasks.append(made(self, run)) or tasks[0])
        with pytest.raises(FloatingPointError, match="the loss must stay finite, got nan at step 3"):
            train(toy, tmp_path, progress=False)
    assert tasks[0].closed
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_gradient_that_is_not_finite_spoils_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="the gradient must stay finite, got nan at step 3"):
        train(Toy(overflow_at=3, save_every=1), tmp_path, progress=False)
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-00000003"
    assert all(bool(t.isfinite().all()) for t in load_file(kept / "weights.safetensors").values())


def test_a_folder_with_a_training_is_not_overwritten(tmp_path: Path) -> None:
    train(Toy(steps=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match="`output` must be a folder without a training"):
        train(Toy(steps=2), tmp_path, progress=False)


def test_other_settings_do_not_go_on(tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        train(Toy(term_at=2), tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"`steps` must be as in the training of .*, 7, got 9"):
        train(Toy(term_at=2, steps=9), tmp_path, resume=True, progress=False)
    # How a run goes about its work may change.
    train(Toy(term_at=2, save_every=1, micro_batch=2), tmp_path, resume=True, progress=False)


def test_a_full_disk_is_told_before_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(training_files.shutil, "disk_usage", lambda path: free._replace(free=100))
    with pytest.raises(OSError, match=r"`output` must have room for .* MiB of checkpoints and result, got 0 MiB free"):
        train(Toy(), tmp_path, progress=False)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "error", [RuntimeError("file write failed"), SafetensorError("no space"), OSError(28, "full")]
)
def test_a_disk_that_fills_while_a_checkpoint_is_written_keeps_the_one_before(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    kept, toy = torch.save, Toy(dropout=0.2, save_every=2)

    def fails(*args: Any) -> None:
        if list((tmp_path / "checkpoints").glob("step-*")):
            raise error
        kept(*args)

    with monkeypatch.context() as patched:
        patched.setattr(torch, "save", fails)
        with pytest.raises(OSError, match=r"checkpoint after step 4 must be written to .*; the one before is kept"):
            train(toy, tmp_path, progress=False)
    # What was written of it takes no room.
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000002"]
    train(toy, tmp_path, resume=True, progress=False)
    assert same(weights(tmp_path), weights(whole))


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "optimizers.pt"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(Interrupted):
        train(Toy(term_at=2), tmp_path, progress=False)
    file = tmp_path / "checkpoints" / "step-00000003" / name
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"the checkpoint .*step-00000003 must be whole, got a damaged one"):
        train(Toy(term_at=2), tmp_path, resume=True, progress=False)


def test_two_trainings_do_not_share_a_folder(tmp_path: Path) -> None:
    held = multiprocessing.get_context("fork").Process(
        target=train, args=(Toy(pause=60.0, threads=1), tmp_path), kwargs={"progress": False}
    )
    held.start()
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "log.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(ValueError, match="`output` must be a folder that no other process trains in"):
            train(Toy(pause=60.0, threads=1), tmp_path, resume=True, progress=False)
    finally:
        held.kill()
        held.join()
    # A process that was killed holds nothing.
    settings = json.loads((tmp_path / "settings.json").read_text())
    (tmp_path / "settings.json").write_text(json.dumps({**settings, "pause": 0.0}))
    train(Toy(threads=1), tmp_path, resume=True, progress=False)
    assert not (tmp_path / ".lock").exists()


def test_a_checkpoint_is_on_the_disk_before_the_one_before_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    kept = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (synced.append(os.fstat(number).st_ino), kept(number))[1])
    with pytest.raises(Interrupted):
        train(Toy(term_at=2), tmp_path, progress=False)
    files = [*(tmp_path / "checkpoints" / "step-00000003").iterdir(), tmp_path / "log.jsonl"]
    assert len(files) == 4 and all(file.stat().st_ino in synced for file in files)


@pytest.mark.parametrize("started", [False, True], ids=("no step", "a step"))
def test_a_start_that_failed_can_be_tried_again_with_other_settings(tmp_path: Path, started: bool) -> None:
    def fails(self: ToyTask, step: int) -> None:
        raise ValueError("no such data")

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ToyTask, "end_step" if started else "optimizers", fails)
        with pytest.raises((ValueError, TypeError)):
            train(Toy(steps=2), tmp_path, progress=False)
    if started:
        with pytest.raises(ValueError, match="`output` must be a folder without a training"):
            train(Toy(steps=3), tmp_path, progress=False)
    else:
        assert train(Toy(steps=3), tmp_path, progress=False)["steps"] == 3


def test_a_resumed_run_needs_no_second_room_for_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = Toy(term_at=2, steps=4)
    free, task = shutil.disk_usage(tmp_path), ToyTask(toy, Run(tmp_path, torch.device("cpu")))
    own = sum(4 * p.numel() for p in task.trained().values())
    # Two checkpoints of weights, both moments and the average; and the result.
    needed = 2 * (3 * own + 4 * task.average.numel()) + own

    def disk_usage(path: Path) -> Any:
        used = sum(p.stat().st_size for p in tmp_path.rglob("*") if p.suffix in (".pt", ".safetensors"))
        return free._replace(free=max(0, needed - used))

    monkeypatch.setattr(training_files.shutil, "disk_usage", disk_usage)
    with pytest.raises(Interrupted):
        train(toy, tmp_path, progress=False)
    # What a kill left of another one goes when the next is written.
    left = tmp_path / "checkpoints" / ".partial"
    left.mkdir()
    (left / "weights.safetensors").write_bytes(bytes(100))
    train(toy, tmp_path, resume=True, progress=False)


@pytest.mark.parametrize(
    "name, message", [("paper", "must be out of .*tensorboard"), ("clearml", "must be installed")]
)
def test_trackers_that_are_not_there_are_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"`trackers` {message}.*{name}"):
        train(Toy(trackers=(name,)), tmp_path, progress=False)


def test_trackers_get_steps_and_evaluations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate import tracking

    class Kept(tracking.GeneralTracker):
        name, requires_logging_directory, tracker, told = "kept", False, None, []

        def __init__(self, run_name: str, **rest: Any) -> None:
            super().__init__()

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            self.told.append(values)

        def log(self, values: dict[str, Any], step: int | None = None, **rest: Any) -> None:
            self.told.append((step, *values))

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "kept", Kept)
    train(Toy(steps=2, trackers=("kept",)), tmp_path, progress=False)
    assert Kept.told[0]["recipe"] == ""
    assert [entry[0] for entry in Kept.told[1:]] == [0, 1, 2, 2]
    assert Kept.told[1] == (0, "evaluation/error") and "loss" in Kept.told[2]


@pytest.mark.parametrize("schedule, last", [("constant", 1.0), ("linear", 0.19), ("cosine", 0.1219)], ids=str)
def test_rates_rise_and_fall(schedule: Any, last: float) -> None:
    settings = OptimizerSettings(learning_rate=1.0, schedule=schedule, warmup_steps=4, final_fraction=0.1)
    assert [settings.factor(step, 14) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert settings.factor(4, 14) == 1.0
    assert settings.factor(13, 14) == pytest.approx(last, abs=1e-3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"learning_rate": -1.0}, "`learning_rate` must be 0 or more, got -1.0"),
        ({"learning_rate": 1.0, "beta2": 1.0}, "`beta2` must be less than 1"),
        ({"learning_rate": 1.0, "gradient_clip": 0.0}, "`gradient_clip` must be more than 0"),
        ({"learning_rate": 1.0, "warmup_steps": -1}, "`warmup_steps` must be at least 0"),
    ],
    ids=["rate", "beta", "clip", "warmup"],
)
def test_bad_optimizers_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        OptimizerSettings(**settings)
