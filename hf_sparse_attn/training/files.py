"""What a training writes: settings, log, checkpoints and the result; readable after a kill at any moment."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.recipe import Task
from hf_sparse_attn.sharing.files import make_folder, move, to_disk, write_text

# Settings that change how a run goes about its work, not what it computes.
_FREE = frozenset({"micro_batch", "evaluate_every", "save_every", "threads", "trackers"})
# Adam keeps two numbers for each weight, and the checkpoint before stands until the new one is complete.
_ADAM, _CHECKPOINTS = 2, 2
_CHECKPOINTS_FOLDER = "checkpoints"


class TrainingFiles:
    """The folder of a training.

    It holds `settings.json`, `log.jsonl` (a line for every step and evaluation), `checkpoints/` with the last one, and
    in the end `result/` and `figures.json`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result = folder / "result"
        self._checkpoints = folder / _CHECKPOINTS_FOLDER
        self._log = folder / "log.jsonl"
        self._entries: list[dict[str, Any]] = []

    def open(self, settings: dict[str, Any], resume: bool) -> None:
        """Makes the folder, or checks that it holds a training with these settings.

        A training that failed before its first step and evaluation has left nothing: another one may take its place.

        Raises:
            ValueError: it holds one and `resume` is not set, or the settings differ.
        """
        make_folder(self.folder)
        file = self.folder / "settings.json"
        text = json.dumps(settings, indent=2)
        if file.is_file() and any(path.exists() for path in (self._log, self._checkpoints, self.result)):
            if not resume:
                raise ValueError(
                    f"`output` must be a folder without a training, got {self.folder}: resume it, or choose another"
                )
            before = _read_json(file)
            names = sorted({*settings, *before} - _FREE)
            plain = json.loads(text)
            for name in names:
                if before.get(name) != plain.get(name):
                    raise ValueError(
                        f"`{name}` must be as in the training of {self.folder}, {before.get(name)!r}, "
                        f"got {plain.get(name)!r}"
                    )
        write_text(file, text)

    def load(
        self,
        weights: dict[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        task: Task,
        device: torch.device,
    ) -> int:
        """Takes the last checkpoint back; returns the number of steps done.

        Raises:
            ValueError: the checkpoint is of other weights, or damaged.
        """
        found = max(self._checkpoints.glob("step-*"), default=None)
        step = 0 if found is None else int(found.name.removeprefix("step-"))
        if found is not None:
            kept, states, state = _read_checkpoint(found)
            if {n: tuple(t.shape) for n, t in kept.items()} != {n: tuple(p.shape) for n, p in weights.items()}:
                odd = sorted(set(kept) ^ set(weights))[:5] or "shapes"
                raise ValueError(f"the checkpoint {found} must hold the weights that are trained, got other {odd}")
            with torch.no_grad():
                for name, parameter in weights.items():
                    parameter.copy_(kept[name])
            for optimizer, own in zip(optimizers, states, strict=True):
                optimizer.load_state_dict(own)
            task.load_state({name: tensor.to(device) for name, tensor in state.items()})
        lines = self._log.read_text(encoding="utf-8").splitlines() if self._log.is_file() else []
        self._entries = [entry for entry in map(json.loads, lines) if entry["step"] <= step]
        return step

    def save(
        self,
        step: int,
        weights: dict[str, nn.Parameter],
        optimizers: Sequence[torch.optim.Optimizer],
        task: Task,
    ) -> None:
        """Writes a checkpoint, then removes those before it.

        Raises:
            OSError: it cannot be written, as on a full disk; the one before is kept.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        # safetensors takes no views, and no two tensors that share memory.
        held = {n: p.detach().to("cpu", copy=True).contiguous() for n, p in weights.items()}
        state = {n: t.detach().to("cpu", copy=True).contiguous() for n, t in task.state().items()}
        scratch = self._checkpoints / ".partial"
        try:
            # What a step noted is written before the checkpoint that counts it.
            self._write_log()
            self._checkpoints.mkdir(exist_ok=True)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            save_file(held, scratch / "weights.safetensors")
            save_file(state, scratch / "state.safetensors")
            torch.save([optimizer.state_dict() for optimizer in optimizers], scratch / "optimizers.pt")
            for file in scratch.iterdir():
                to_disk(file)
        # A full disk is another error in each of the libraries.
        except (OSError, SafetensorError, RuntimeError) as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise OSError(
                f"the checkpoint after step {step} must be written to {self._checkpoints}; "
                f"the one before is kept: {error}"
            ) from error
        done = self._checkpoints / f"step-{step:08d}"
        shutil.rmtree(done, ignore_errors=True)
        move(scratch, done)
        for old in self._checkpoints.glob("step-*"):
            if old != done:
                shutil.rmtree(old)

    def finish(self, task: Task, figures: dict[str, Any]) -> None:
        """Writes the result; the checkpoint, which nothing needs any more, goes."""
        scratch = self.folder / ".result"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        task.save(scratch, figures)
        shutil.rmtree(self.result, ignore_errors=True)
        move(scratch, self.result)
        self._write_log()
        write_text(self.folder / "figures.json", json.dumps(figures, indent=2))
        shutil.rmtree(self._checkpoints, ignore_errors=True)

    def figures(self) -> dict[str, Any] | None:
        """The figures of a training that is finished, else None."""
        file = self.folder / "figures.json"
        return _read_json(file) if file.is_file() and self.result.is_dir() else None

    def note(self, step: int, entry: dict[str, float]) -> None:
        """Keeps what a step showed, for the log."""
        self._entries.append({"step": step, **entry})

    def note_evaluation(self, step: int, found: dict[str, float]) -> None:
        """Keeps what an evaluation showed, and writes the log at once: evaluations are few and dear."""
        self._entries.append({"step": step, "evaluation": found})
        self._write_log()

    def steps(self) -> list[dict[str, Any]]:
        """What the steps showed so far, those before a resumption included."""
        return [entry for entry in self._entries if "evaluation" not in entry]

    def last(self, name: str) -> float:
        """A value of the last step."""
        return float(next(entry for entry in reversed(self._entries) if "evaluation" not in entry)[name])

    def evaluation(self, step: int) -> dict[str, float]:
        """What an evaluation showed."""
        found = [e["evaluation"] for e in self._entries if e["step"] == step and "evaluation" in e]
        return dict(found[-1]) if found else {}

    def _write_log(self) -> None:
        write_text(self._log, "".join(json.dumps(entry) + "\n" for entry in self._entries))


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within it no other process can train in a folder, which is made if it is not there.

    Raises:
        ValueError: another one does.
    """
    make_folder(folder)
    path = folder / ".lock"
    file = _locked(path)
    try:
        yield
    finally:
        windows = sys.platform == "win32"
        if not windows:
            # While it is held: once let go of it may be another's.
            path.unlink(missing_ok=True)
        _lock(file, hold=False)
        file.close()
        if windows:
            # There no file can go that is open, and another process may look at it now.
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _locked(path: Path) -> IO[str]:
    """A file that is held against other processes.

    Raises:
        ValueError: another process holds it.
    """
    while True:
        file = path.open("a")
        try:
            _lock(file, hold=True)
        except OSError as error:
            # Some network disks have no locks.
            if error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
                return file
            file.close()
            raise ValueError(
                f"`output` must be a folder that no other process trains in, got {path.parent}"
            ) from error
        # Whoever held it before may have removed it in the meantime: then it would keep nobody out.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()


def _lock(file: IO[str], hold: bool) -> None:
    """Holds a file, or lets go of it; the system does the latter when the process ends, however it ends."""
    if sys.platform == "win32":
        import msvcrt

        # It is the byte at this place that is held.
        file.seek(0)
        with nullcontext() if hold else suppress(OSError):
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK if hold else msvcrt.LK_UNLCK, 1)
    elif hold:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_room(folder: Path, weights: dict[str, nn.Parameter], task: Task) -> None:
    """Raises where the disk cannot take the checkpoints and the result.

    Raises:
        OSError: naming how much is needed and how much is free.
    """
    own = sum(p.numel() * p.element_size() for p in weights.values())
    state = sum(t.numel() * t.element_size() for t in task.state().values())
    needed = _CHECKPOINTS * (own * (1 + _ADAM) + state) + task.result_bytes()
    # A resumed run has one of the two already, and what a kill left of the other goes.
    there = sum(path.stat().st_size for path in (folder / _CHECKPOINTS_FOLDER).rglob("*") if path.is_file())
    free = shutil.disk_usage(folder).free + there
    if free < needed:
        raise OSError(
            f"`output` must have room for {needed / 2**20:,.0f} MiB of checkpoints and result, "
            f"got {free / 2**20:,.0f} MiB free at {folder}"
        )


def _read_checkpoint(folder: Path) -> tuple[dict[str, Tensor], list[Any], dict[str, Tensor]]:
    """Weights, states of the optimizers, and what else the task keeps."""
    from safetensors.torch import load_file

    try:
        weights, state = (load_file(folder / f"{name}.safetensors") for name in ("weights", "state"))
        return weights, torch.load(folder / "optimizers.pt", weights_only=True, map_location="cpu"), state
    # Each of the formats has errors of its own.
    except Exception as error:
        raise ValueError(f"the checkpoint {folder} must be whole, got a damaged one: {error}") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} must be JSON, got {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} must hold an object, got {type(found).__name__}")
    return found
