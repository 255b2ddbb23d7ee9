"""A training small enough to be killed, resumed and shared between processes; run as a program by the tests."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.recipe import OptimizerSettings, Recipe, Run, Task


@dataclass(frozen=True, kw_only=True)
class Toy(Recipe):
    """A small net that learns a linear map; samples weigh differently, and dropout draws from torch's generator.

    Args:
        overflow_at: step whose loss is finite and whose gradient is not.
        lonely: whether there are two weights more that only the sample 0 of even steps, and no sample, reaches.
        kill_at: step whose end the process does not live to see.
        term_at: step in which SIGTERM comes.
        term_all: whether it comes to all processes.
    """

    steps: int = 7
    batch: int = 6
    dropout: float = 0.0
    bad_at: int | None = None
    overflow_at: int | None = None
    lonely: bool = False
    kill_at: int | None = None
    term_at: int | None = None
    term_all: bool = False
    pause: float = 0.0

    @property
    def total_steps(self) -> int:
        return self.steps

    def task(self, run: Run) -> Task:
        return ToyTask(self, run)


class ToyTask(Task):
    def __init__(self, recipe: Toy, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.closed = self.overflowing = self.first = False
        draw = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(recipe.dropout), nn.Linear(8, 3))
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / 3)
        self.module[0].bias.requires_grad_(False)
        if recipe.lonely:
            self.module.seldom, self.module.never = nn.Linear(3, 1), nn.Linear(3, 1)
            for weight in (*self.module.seldom.parameters(), *self.module.never.parameters()):
                nn.init.constant_(weight, 0.5)
        self.average = self.module[0].weight.detach().clone()
        self.asked: list[tuple[int, tuple[int, ...]]] = []

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [OptimizerSettings(learning_rate=0.05, weight_decay=0.1).make(list(self.trained().values()))]

    def rate(self, step: int) -> float:
        return 1 - step / (2 * self.recipe.steps)

    def samples(self, step: int) -> int:
        return self.recipe.batch - step % 2

    def batch(self, step: int, samples: Sequence[int]) -> tuple[Tensor, Tensor]:
        self.asked.append((step, tuple(samples)))
        rows = [torch.randn(5, generator=torch.Generator().manual_seed(1000 * step + n)) for n in samples]
        self.first = step % 2 == 0 and 0 in samples
        return torch.stack(rows) if rows else torch.zeros(0, 5), torch.tensor([1.0 + n for n in samples])

    def weight(self, batch: Any) -> float:
        return float(batch[1].sum())

    def loss(self, batch: Any) -> Tensor:
        x, weight = batch
        guess = self.module[2](self.module[1](self.module[0](x)))
        loss = ((guess - x[:, :3]).square().sum(-1) * weight).sum()
        if self.overflowing:
            # The root of 0 is 0, and its slope infinite.
            loss = loss + (self.module[2].bias * 0.0).square().sum().sqrt()
        return loss + self.module.seldom(x[:1, :3]).square().sum() if self.recipe.lonely and self.first else loss

    def begin_step(self, step: int) -> None:
        if step == self.recipe.bad_at:
            with torch.no_grad():
                self.module[0].weight.fill_(float("nan"))
        self.overflowing = step == self.recipe.overflow_at
        if step == self.recipe.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.recipe.term_at and (self.recipe.term_all or self.run.rank == 0):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.recipe.pause)

    def end_step(self, step: int) -> None:
        self.average.lerp_(self.module[0].weight.detach(), 0.3)

    def evaluate(self) -> dict[str, float]:
        assert not self.module.training
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(99))
        guess = self.module[2](self.module[1](self.module[0](x)))
        return {"error": float((guess - x[:, :3]).square().mean())}

    def state(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.average.copy_(state["average"])

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        torch.save({**self.module.state_dict(), "average": self.average}, folder / "model.pt")

    def close(self) -> None:
        self.closed = True


def main(folder: str, settings: str, resume: str) -> None:
    """Trains as the arguments say; each process leaves what it has to tell in a file beside the folder.

    RANK in the folder's name is the number of the process.
    """
    from hf_sparse_attn.training.loop import Interrupted, train

    torch.set_num_threads(1)
    folder = folder.replace("RANK", os.environ.get("RANK", "0"))
    try:
        told = train(Toy(**json.loads(settings)), Path(folder), resume=resume == "1", progress=False)
    except Interrupted as stopped:
        told = {"stopped": stopped.step, "signal": stopped.signal}
    Path(f"{folder}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
