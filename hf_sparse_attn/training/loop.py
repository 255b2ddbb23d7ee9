"""The training loop: any recipe, in one process or several, stopped and gone on with at any step.

What a step computes depends on the seed and its number alone. So a run that was killed and resumed ends with the same
weights as one that was not, and several processes compute what one does, up to the order of a sum (but for dropout).
"""

from __future__ import annotations

import logging
import math
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from hf_sparse_attn.cost.timing import synchronize, threads
from hf_sparse_attn.extras import needing
from hf_sparse_attn.recipe import Recipe, Run, Task
from hf_sparse_attn.settings import plain
from hf_sparse_attn.training.files import TrainingFiles, alone, check_room

log = logging.getLogger(__name__)

# Share of the last steps whose mean is the loss that is told.
_TAIL = 0.1
_STOPPING = (signal.SIGTERM, signal.SIGINT)


class Interrupted(Exception):
    """A training was asked to stop, and has saved where it was.

    Args:
        step: steps that were done.
        signal: number of the signal that asked.
    """

    def __init__(self, step: int, signal: int) -> None:
        super().__init__(f"stopped after {step} steps; --resume goes on from there")
        self.step, self.signal = step, signal


def train(
    recipe: Recipe, output: str | os.PathLike[str], *, resume: bool = False, progress: bool = True
) -> dict[str, Any]:
    """Runs a recipe and writes what it trained.

    The processes that `torchrun` or `accelerate launch` started share the samples of each step; the gradients of the
    trained weights are added up. Each holds the whole model: the loop knows no sharding of weights. Dropout draws anew
    in each process and forward pass, so with it another number of processes, or another `micro_batch`, is another
    training.

    Args:
        recipe: the settings.
        output: folder for log, checkpoints and the result, which stands in its folder `result`.
        resume: go on from the last checkpoint in the folder; from the beginning where there is none.
        progress: whether to show a bar.

    Returns:
        the figures: "before" and "after" as the recipe evaluates, "loss" (mean of the last tenth of the steps),
        "steps", "seconds", "step_seconds" (median), "step_cpu_seconds" (of the process: other programs on the machine
        do not prolong it), "peak_memory" in bytes, "processes". Nothing in other processes than the first.

    Raises:
        ValueError: the folder holds a training and `resume` is not set, or one with other settings, or one that runs;
            or the recipe cannot work. Nothing was trained then.
        OSError: the disk is too full for the checkpoints.
        FloatingPointError: the loss or its gradient is not finite any more; the last checkpoint is kept.
        Interrupted: SIGTERM or SIGINT came; a checkpoint was written after the step that was under way.
        MissingExtra: accelerate is not installed.
    """
    output = Path(output)
    accelerator = _accelerator(recipe, output)
    files = TrainingFiles(output)
    run = Run(
        output=output,
        device=accelerator.device,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        progress=progress and accelerator.is_main_process,
        main_first=accelerator.main_process_first,
    )
    with ExitStack() as stack:
        if run.is_main:
            stack.enter_context(alone(output))
            files.open(plain(recipe) | {"recipe": recipe.name}, resume)
        accelerator.wait_for_everyone()
        # Seeds are set step by step: the caller's generators and threads must be as they were afterwards.
        devices = [run.device] if run.device.type == "cuda" else []
        stack.enter_context(torch.random.fork_rng(devices))
        stack.enter_context(threads(recipe.threads))
        finished = files.figures()
        if finished is not None:
            log.info("%s holds the finished training", output)
            return finished if run.is_main else {}
        torch.manual_seed(recipe.seed)
        task = recipe.task(run)
        stack.callback(task.close)
        return _Loop(recipe, run, task, accelerator, files).run_all(stack)


class _Loop:
    """One training, from its first step or a checkpoint to its result."""

    def __init__(self, recipe: Recipe, run: Run, task: Task, accelerator: Any, files: TrainingFiles) -> None:
        self.recipe, self.run, self.task, self.accelerator, self.files = recipe, run, task, accelerator, files
        self.weights = task.trained()
        if not self.weights:
            raise ValueError(
                f"recipe {recipe.name!r} must train at least one weight, got none that requires a gradient"
            )
        self.optimizers = task.optimizers()
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group.setdefault("initial_lr", group["lr"])
        if run.is_main:
            check_room(run.output, self.weights, task)
        self.first = files.load(self.weights, self.optimizers, task, run.device)
        if run.world > 1:
            done = accelerator.gather(torch.tensor([self.first], device=run.device)).tolist()
            if min(done) != max(done):
                raise ValueError(
                    f"`output` must be a folder that all processes see, got one with {max(done)} steps done and one "
                    f"with {min(done)}"
                )

    def run_all(self, stack: ExitStack) -> dict[str, Any]:
        """Trains, evaluates, saves."""
        recipe, run, files, total = self.recipe, self.run, self.files, self.recipe.total_steps
        if run.is_main:
            count = sum(p.numel() for p in self.weights.values())
            log.info("%s: %s weights trained, %d steps from %d", recipe.name, f"{count:,}", total, self.first)
        stop = stack.enter_context(_signals())
        if recipe.trackers:
            self.accelerator.init_trackers("hf_sparse_attn", {"recipe": recipe.name, "settings": str(plain(recipe))})
            stack.callback(self.accelerator.end_training)
        # A run that was stopped after this step has not evaluated it.
        if self.first < total and (self.first == 0 or self._evaluates_at(self.first)):
            self._evaluate(self.first)
        if run.progress:
            stack.enter_context(logging_redirect_tqdm([logging.getLogger("hf_sparse_attn")]))
        bar = tqdm(total=total, initial=self.first, desc=recipe.name, unit="step", disable=not run.progress)
        stack.callback(bar.close)
        self.task.module.train()
        saved = self.first
        for step in range(self.first, total):
            asked = self._step(step, stop)
            done = step + 1
            bar.update()
            if run.is_main:
                bar.set_postfix(loss=f"{files.last('loss'):.4g}")
            if done % recipe.save_every == 0 or done == total or asked:
                self._save(done)
                saved = done
            if asked and done < total:
                raise Interrupted(saved, asked)
            if done < total and self._evaluates_at(done):
                self._evaluate(done)
        self._evaluate(total)
        figures = self._figures()
        if run.is_main:
            files.finish(self.task, figures)
        self.accelerator.wait_for_everyone()
        return figures

    def _evaluates_at(self, done: int) -> bool:
        return self.recipe.evaluate_every is not None and done % self.recipe.evaluate_every == 0

    def _step(self, step: int, stop: list[int]) -> int:
        """One optimizer step; returns the number of a signal that came to any process, or 0."""
        task, run = self.task, self.run
        began, worked = time.perf_counter(), time.process_time()
        torch.manual_seed(_mixed(self.recipe.seed, step, run.rank))
        rate = task.rate(step)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * rate
            optimizer.zero_grad(set_to_none=True)
        task.begin_step(step)
        mine = range(run.rank, task.samples(step), run.world)
        size = self.recipe.micro_batch or max(1, len(mine))
        batches = [task.batch(step, mine[i : i + size]) for i in range(0, len(mine), size)]
        # Signals are counted kind by kind: several processes may have had one.
        own = [sum(task.weight(b) for b in batches), *(float(number in stop) for number in _STOPPING)]
        told = torch.tensor(own, dtype=torch.float32 if run.device.type == "mps" else torch.float64)
        weight, *came = self._sum(told).tolist()
        asked = next((int(number) for number, count in zip(_STOPPING, came, strict=True) if count), 0)
        if not weight > 0:
            raise ValueError(
                f"step {step} must have samples with some weight in the loss, got a total weight of {weight}"
            )
        losses = [torch.zeros((), device=run.device)]
        while batches:
            with torch.autocast(run.device.type, dtype=torch.bfloat16, enabled=self.recipe.precision == "bfloat16"):
                loss = task.loss(batches.pop(0)) / weight
            torch.autograd.backward(loss)
            losses.append(loss.detach().float())
        loss = float(self._sum(torch.stack(losses).sum()))
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss must stay finite, got {loss} at step {step}")
        norm = self._gradients()
        if not math.isfinite(norm):
            # A finite loss can have such a gradient; the weights after it would go into the next checkpoint.
            raise FloatingPointError(f"the gradient must stay finite, got {norm} at step {step}")
        for optimizer in self.optimizers:
            optimizer.step()
        task.end_step(step)
        synchronize(run.device)
        if run.is_main:
            took = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - worked}
            entry = {"loss": loss, "gradient": norm, "rate": rate, **took}
            self.files.note(step + 1, entry)
            if self.recipe.trackers:
                self.accelerator.log(entry, step=step + 1)
        # One process need not wait for the next step to know of a signal.
        return asked if run.world > 1 else max(stop)

    def _sum(self, value: Tensor) -> Tensor:
        """The sum over the processes."""
        if self.run.world == 1:
            return value
        total: Tensor = self.accelerator.reduce(value.to(self.run.device), "sum")
        return total

    def _gradients(self) -> float:
        """Adds the gradients up over the processes and cuts them to length; returns the length they had."""
        weights = list(self.weights.values())
        if self.run.world > 1:
            # A process may have met no sample that reaches a weight, where others have; where none has, the weight has
            # no gradient, as in one process: an optimizer leaves it then.
            reached = self._sum(torch.tensor([float(p.grad is not None) for p in weights])).tolist()
            used = [p for p, count in zip(weights, reached, strict=True) if count]
            for dtype in sorted({p.dtype for p in used}, key=str):
                same = [p for p in used if p.dtype == dtype]
                parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in same]
                flat = self._sum(torch.cat([part.flatten() for part in parts]))
                for p, part in zip(same, flat.split([p.numel() for p in same]), strict=True):
                    p.grad = part.view_as(p)
        longest = self.task.gradient_clip()
        groups = self.task.gradient_groups(self.weights)
        norms = [nn.utils.clip_grad_norm_(group, math.inf if longest is None else longest) for group in groups]
        return math.hypot(*map(float, norms))

    def _evaluate(self, step: int) -> None:
        """Has the task evaluate in the first process, and notes the figures; not a second time after a resumption."""
        if self.run.is_main and not self.files.evaluation(step):
            self.task.module.eval()
            with torch.no_grad():
                found = {name: float(value) for name, value in self.task.evaluate().items()}
            self.task.module.train()
            self.files.note_evaluation(step, found)
            if found:
                shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
                log.info("step %d/%d: %s", step, self.recipe.total_steps, shown)
                if self.recipe.trackers:
                    self.accelerator.log({f"evaluation/{name}": value for name, value in found.items()}, step=step)
        self.accelerator.wait_for_everyone()

    def _save(self, step: int) -> None:
        if self.run.is_main:
            self.files.save(step, self.weights, self.optimizers, self.task)
        self.accelerator.wait_for_everyone()

    def _figures(self) -> dict[str, Any]:
        if not self.run.is_main:
            return {}
        steps = self.files.steps()
        tail = steps[-max(1, math.ceil(_TAIL * len(steps))) :]
        seconds = [entry["seconds"] for entry in steps]
        return {
            "before": self.files.evaluation(0),
            "after": self.files.evaluation(self.recipe.total_steps),
            "loss": statistics.fmean(entry["loss"] for entry in tail),
            "steps": self.recipe.total_steps,
            "seconds": sum(seconds),
            "step_seconds": statistics.median(seconds),
            "step_cpu_seconds": statistics.median(entry["cpu_seconds"] for entry in steps),
            "peak_memory": peak_memory(self.run.device),
            "processes": self.run.world,
        }


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: of the device's allocator on CUDA, else of the whole process."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:
        # Windows has none; accelerate brings psutil.
        import psutil

        info = psutil.Process().memory_info()
        return int(getattr(info, "peak_wset", info.rss))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * 1024


def _accelerator(recipe: Recipe, output: Path) -> Any:
    with needing("training"):
        from accelerate import Accelerator
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
        from accelerate.utils import InitProcessGroupKwargs, LoggerType
    known = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    # accelerate leaves trackers out that are not installed; those that a program registered need nothing.
    absent = {str(kind) for kind in LoggerType} - {str(kind) for kind in get_available_trackers()}
    for name in recipe.trackers:
        if name not in known:
            raise ValueError(f"`trackers` must be out of {', '.join(known)}, got {name!r}")
        if name in absent:
            raise ValueError(f"`trackers` must be installed, got {name!r}, which is not")
    other = torch.cuda.is_available() or torch.backends.mps.is_available()
    # The precision is the loop's: accelerate would keep the first one it was given for the whole process.
    # The other processes wait while the first one encodes videos or evaluates, for hours if need be.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    made = Accelerator(
        log_with=list(recipe.trackers) or None, project_dir=output, cpu=not other, kwargs_handlers=[patient]
    )
    kind = getattr(made.distributed_type, "value", str(made.distributed_type))
    if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM", "TP"):
        raise ValueError(f"a recipe must be launched with plain data parallelism, got {kind}")
    return made


def _mixed(*numbers: int) -> int:
    """One seed out of several numbers."""
    import numpy as np

    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


@contextmanager
def _signals() -> Iterator[list[int]]:
    """A list that holds the number of a signal to stop once one came; a second one stops at once."""
    came = [0]
    if threading.current_thread() is not threading.main_thread():
        yield came
        return
    before = {number: signal.getsignal(number) for number in _STOPPING}

    def note(number: int, frame: Any) -> None:
        came[0] = number
        signal.signal(number, before[signal.Signals(number)] or signal.SIG_DFL)
        log.warning("stopping after this step; once more stops at once")

    for number in _STOPPING:
        signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
