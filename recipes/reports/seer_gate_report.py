"""Table of a run of seer_gate: its gates, what no gate could choose better, and methods that need no training.

    hf-sparse-attn train seer_gate --output RUN
    python -m hf_sparse_attn.recipes.reports.seer_gate_report --run RUN --output FILE

All rows are measured on the held-out documents of the run, with sparse attention in every layer.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import Context
from hf_sparse_attn.evaluation.equal_density import fit_density, mean_density
from hf_sparse_attn.evaluation.fidelity import CallFidelity, Reference
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.pattern.block_pattern import BlockPattern
from hf_sparse_attn.profiling.observe import Call, Seen
from hf_sparse_attn.recipe import Run
from hf_sparse_attn.recipes.reports.page import cells, pipes, recipe_of
from hf_sparse_attn.recipes.seer_gate import KIND, SeerGate, SeerGateTask, pooled_attention
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.selection import gather_rows, pattern_of_rows, rank_descending
from hf_sparse_attn.sharing.gates import GateSet
from hf_sparse_attn.training.text.held_out import held_out_figures

_COLUMNS = (
    ("density", "density", ".3f"),
    ("recall", "recall", ".3f"),
    ("output error", "output_error", ".3f"),
    ("loss", "loss", ".3f"),
    ("needles", "needles", ".2f"),
)


@dataclass(frozen=True, kw_only=True)
class Oracle(Method):
    """Each block of queries keeps as many key blocks as under another method, those with the most of its attention.

    A yardstick, which saves nothing: all attention weights of the call are computed, in float32 and a strip of rows at
    a time, and pooled over each tile of blocks; the block of the query itself is kept first. Ties go to the earlier
    block.

    Args:
        of: the method whose number of blocks every row takes; its blocks must be square and aligned.
        pool: "mass", the sum of the weights in a tile: no other choice of so many blocks in each row, the query's own
            among them, keeps more of the attention of the call; or "largest", the largest of them, which the gates of
            SeerAttention are trained for.

    Raises:
        ValueError: `pool` is neither, or, when it is asked, the blocks of `of` are others.
    """

    name = "oracle"
    needs = frozenset({"causal"})

    of: Method
    pool: Literal["mass", "largest"] = "mass"

    def __post_init__(self) -> None:
        if self.pool not in ("mass", "largest"):
            raise ValueError(f"`pool` must be 'mass' or 'largest', got {self.pool!r}")
        object.__setattr__(self, "reads", self.of.reads)

    def check_model(self, model: Any) -> None:
        """As the other method; see Method.check_model."""
        self.of.check_model(model)

    def pattern(self, q: Tensor | None, k: Tensor | None, ctx: Context) -> BlockPattern | Decline:
        """The blocks with the most attention of each head; see Method.pattern."""
        if q is None or k is None:
            raise TypeError("`q` and `k` must be tensors: oracle chooses by content, got None")
        layout = ctx.layout
        if layout.query_start:
            return Decline("oracle needs all tokens as queries")
        found = self.of.pattern_for(q, k, ctx)
        if isinstance(found, Decline):
            return found
        size = found.block_q
        if found.block_k != size or found.columns is not None or bool((found.starts % size).any()):
            raise ValueError(f"`of` must choose square aligned blocks, got {found!r} of {self.of.name!r}")
        counts = found.row_counts()
        rows = counts.shape[2]
        block = torch.arange(rows, device=q.device)

        def keep(first: int, last: int) -> Tensor:
            mass = pooled_attention(q, k, ctx, size, first, last, mass=self.pool == "mass")
            row = block[first:last, None]
            # Later blocks have no weight, and ties go to the earlier ones.
            scores = torch.nn.functional.pad(mass, (0, rows - last))
            order = rank_descending(scores.masked_fill(block == row, torch.inf))
            kept = (block < counts[:, :, first:last, None]).expand(scores.shape)
            return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, kept)

        shape = (q.shape[0], q.shape[1], rows, rows)
        return pattern_of_rows(*gather_rows(keep, shape, size * size), size, layout)


def open_run(folder: Path) -> tuple[SeerGateTask, GateSet]:
    """A finished run's model and held-out text, and the gates that it trained.

    Args:
        folder: of the run.
    """
    task = recipe_of(SeerGate, folder).task(Run(folder, torch.device("cpu"), progress=False))
    return task, GateSet.load(folder / "result" / "gates")


def measure(task: SeerGateTask, methods: dict[str, Method | None]) -> dict[str, dict[str, float]]:
    """Figures of methods on the held-out text of a task.

    Args:
        task: of a run.
        methods: by name; None is the model's own attention.

    Returns:
        for each `density` (kept share of the visible pairs), `loss`, `needles` where documents have some, and `recall`
        and `output_error` of the attention calls of the model as it is, means over layers and documents.
    """
    samples, device = task.recipe.evaluation_samples, task.run.device
    kept: dict[str, list[CallFidelity]] = {name: [] for name, method in methods.items() if method is not None}

    def observe(seen: Seen) -> None:
        reference = Reference([Call(seen.q, seen.k, seen.v, seen.ctx)])
        for name, method in methods.items():
            if method is not None:
                kept[name].append(reference.compare(method))

    for index in range(samples):
        task.read(task.held_out[index].ids[None].to(device), observe)
    figures: dict[str, dict[str, float]] = {}
    for name, method in methods.items():
        if method is None:
            exact = {"density": 1.0, "recall": 1.0, "output_error": 0.0}
            figures[name] = exact | held_out_figures(task.parts, task.held_out, samples, device)
            continue
        with patch(task.model, method, min_tokens=0, strict=True) as active:
            found = held_out_figures(task.parts, task.held_out, samples, device)
            found["density"] = active.report().density
        for at, what in enumerate(CallFidelity._fields):
            found[what] = sum(fidelity[at] for fidelity in kept[name]) / len(kept[name])
        figures[name] = found
    return figures


def methods_of(task: SeerGateTask, gates: GateSet) -> dict[str, Method | None]:
    """The rows of the table: at each density of the recipe the gates, both oracles, and methods without training.

    Args:
        task: of a run.
        gates: that it trained.
    """
    calls: list[Call] = []
    ids = task.held_out[0].ids[None].to(task.run.device)
    task.read(ids, lambda seen: calls.append(Call(seen.q, seen.k, seen.v, seen.ctx)))
    size = {"block_size": task.recipe.block_size}
    found: dict[str, Method | None] = {"dense": None}
    for density in task.recipe.densities:
        own = make_method(KIND, {"gates": gates, "density": density})
        reached = mean_density(own, calls)
        rows: dict[str, Method] = {
            KIND: own,
            "oracle, mass": Oracle(of=own),
            "oracle, largest weight": Oracle(of=own, pool="largest"),
            "block_topk": fit_density(make_method("block_topk", size), reached, calls).method,
            "xattention": fit_density(make_method("xattention", {**size, "stride": 16}), reached, calls).method,
        }
        found |= {f"{name}, {density:g}": method for name, method in rows.items()}
    return found


def page(figures: dict[str, dict[str, float]]) -> str:
    """The figures as a table of Markdown."""
    return pipes([{"method": name, **cells(found, _COLUMNS)} for name, found in figures.items()]) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and writes the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run of seer_gate")
    parser.add_argument("--output", type=Path, required=True, help="Markdown file to write")
    options = parser.parse_args(arguments)
    task, gates = open_run(options.run)
    with closing(task):
        options.output.write_text(page(measure(task, methods_of(task, gates))), encoding="utf-8")


if __name__ == "__main__":
    main()
