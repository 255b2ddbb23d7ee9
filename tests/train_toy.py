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
        kill_at: step whose end the process does not live to see.
        term_at: step in which SIGTERM comes.
    """

    steps: int = 7
    batch: int = 6
    dropout: float = 0.0
    bad_at: int | None = None
    kill_at: int | None = None
    term_at: int | None = None
    pause: float = 0.0

    @property
    def total_steps(self) -> int:
        return self.steps

    def task(self, run: Run) -> Task:
        return ToyTask(self, run)


class ToyTask(Task):
    def __init__(self, recipe: Toy, run: Run) -> None:
        self.recipe, self.run = recipe, run
        self.closed = False
        draw = torch.Generator().manual_seed(0)
        self.module = nn.Sequential(nn.Linear(5, 8), nn.Dropout(recipe.dropout), nn.Linear(8, 3))
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) / 3)
        self.module[0].bias.requires_grad_(False)
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
        return torch.stack(rows) if rows else torch.zeros(0, 5), torch.tensor([1.0 + n for n in samples])

    def weight(self, batch: Any) -> float:
        return float(batch[1].sum())

    def loss(self, batch: Any) -> Tensor:
        x, weight = batch
        return ((self.module(x) - x[:, :3]).square().sum(-1) * weight).sum()

    def begin_step(self, step: int) -> None:
        if step == self.recipe.bad_at:
            with torch.no_grad():
                self.module[0].weight.fill_(float("nan"))
        if step == self.recipe.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.recipe.term_at and self.run.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.recipe.pause)

    def end_step(self, step: int) -> None:
        self.average.lerp_(self.module[0].weight.detach(), 0.3)

    def evaluate(self) -> dict[str, float]:
        assert not self.module.training
        x = torch.randn(16, 5, generator=torch.Generator().manual_seed(99))
        return {"error": float((self.module(x) - x[:, :3]).square().mean())}

    def state(self) -> dict[str, Tensor]:
        return {"average": self.average}

    def load_state(self, state: dict[str, Tensor]) -> None:
        self.average.copy_(state["average"])

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        torch.save({**self.module.state_dict(), "average": self.average}, folder / "model.pt")

    def close(self) -> None:
        self.closed = True


def main(folder: str, settings: str, resume: str) -> None:
    """Trains as the arguments say; each process leaves what it has to tell in a file beside the folder."""
    from hf_sparse_attn.training import Interrupted, train

    torch.set_num_threads(1)
    try:
        told = train(Toy(**json.loads(settings)), Path(folder), resume=resume == "1", progress=False)
    except Interrupted as stopped:
        told = {"stopped": stopped.step, "signal": stopped.signal}
    Path(f"{folder}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
