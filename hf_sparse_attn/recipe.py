"""What a training recipe is: settings in a YAML file, and a task that the training loop asks step by step."""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_sparse_attn.context import check_int
from hf_sparse_attn.extras import EXTRAS, MissingExtra
from hf_sparse_attn.lazy import lazy_names
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.settings import build_config, read_yaml

# Stood here before.
__getattr__, _ = lazy_names(__name__, {"LoraSettings": "hf_sparse_attn.training.lora.settings"})

# Recipes, and those which made the models that come with the package: these are in the repository alone.
_PACKAGES = ("hf_sparse_attn.recipes", "hf_sparse_attn.recipes.shipped")
_IN_REPOSITORY = ("byte_llama", "moving_wan")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """AdamW with a linear warm-up and then a decay of the rate.

    Args:
        learning_rate: the highest, at least 0.
        schedule: how it falls after the warm-up: not at all, along a line, or along a cosine.
        warmup_steps: steps over which it rises from near 0, at least 0.
        final_fraction: share of it that is left at the last step, at least 0.
        weight_decay: of AdamW, on matrices alone, at least 0.
        beta1, beta2: of AdamW, in [0, 1).
        gradient_clip: longest gradient, over all weights together, more than 0; None leaves it as it is.
    """

    learning_rate: float
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = 0
    final_fraction: float = 0.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    gradient_clip: float | None = 1.0

    def __post_init__(self) -> None:
        check_int("warmup_steps", self.warmup_steps, 0)
        for name in ("learning_rate", "weight_decay", "final_fraction", "beta1", "beta2"):
            value = getattr(self, name)
            if not 0 <= value < math.inf:
                raise ValueError(f"`{name}` must be 0 or more, got {value}")
        for name in ("beta1", "beta2"):
            if getattr(self, name) >= 1:
                raise ValueError(f"`{name}` must be less than 1, got {getattr(self, name)}")
        if self.gradient_clip is not None and not self.gradient_clip > 0:
            raise ValueError(f"`gradient_clip` must be more than 0, or none, got {self.gradient_clip}")

    def factor(self, step: int, steps: int) -> float:
        """Share of the highest rate at a step, counted from 0, out of so many."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = min(1.0, (step - self.warmup_steps) / max(1, steps - self.warmup_steps))
        shape = {"constant": 1.0, "linear": 1.0 - done, "cosine": 0.5 * (1.0 + math.cos(math.pi * done))}
        return self.final_fraction + (1.0 - self.final_fraction) * shape[self.schedule]

    def make(self, parameters: Sequence[nn.Parameter]) -> torch.optim.AdamW:
        """The optimizer over some weights."""
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        used = [group for group in groups if group["params"]]
        return torch.optim.AdamW(used, lr=self.learning_rate, betas=(self.beta1, self.beta2))


@dataclass(frozen=True)
class Run:
    """Where a training runs.

    Args:
        output: folder for everything it writes.
        device: of this process.
        rank, world: number of this process, and how many there are.
        progress: whether to show bars.
        main_first: a context in which the first process is alone, and the others follow when it has left it.
    """

    output: Path
    device: torch.device
    rank: int = 0
    world: int = 1
    progress: bool = True
    main_first: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that evaluates and writes."""
        return self.rank == 0


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Base of all recipes: a frozen dataclass whose fields are the keys of its YAML file.

    Args:
        seed: of everything drawn. What a step computes depends on the seed and its number alone.
        micro_batch: samples of one forward pass; None takes a process's share of a step at once.
        precision: what matrix products are computed in while training.
        evaluate_every: steps between evaluations; None evaluates before the first step and after the last.
        save_every: steps between checkpoints.
        threads: threads of a process on a CPU; None leaves torch's choice.
        trackers: trackers of accelerate that get the figures, such as "tensorboard" or "wandb".
    """

    name: ClassVar[str] = ""
    seed: int = 0
    micro_batch: int | None = None
    precision: Literal["float32", "bfloat16"] = "float32"
    evaluate_every: int | None = None
    save_every: int = 100
    threads: int | None = None
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_int("seed", self.seed, 0)
        for name in ("micro_batch", "evaluate_every", "save_every", "threads"):
            value = getattr(self, name)
            if value is not None:
                check_int(name, value, 1)

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole training."""
        raise TypeError(f"recipe {self.name!r} must define total_steps")

    def task(self, run: Run) -> Task:
        """Makes model, data and all else; whatever cannot work is refused here, before the first step."""
        raise TypeError(f"recipe {self.name!r} must define task()")


class Task:
    """What a recipe does, asked by the training loop (training/loop.py).

    Attributes:
        module: what is put into training mode; its weights that require gradients are trained.
    """

    module: nn.Module

    def trained(self) -> dict[str, nn.Parameter]:
        """The weights that are trained, by name; checkpoints hold these alone."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers; the rate of each group is its first one times `rate`."""
        raise TypeError(f"{type(self).__name__} must define optimizers()")

    def rate(self, step: int) -> float:
        """Factor on the learning rates at a step."""
        return 1.0

    def gradient_clip(self) -> float | None:
        """Longest gradient, over all weights of a group together; None leaves it."""
        return 1.0

    def gradient_groups(self, weights: dict[str, nn.Parameter]) -> list[list[nn.Parameter]]:
        """Trained weights whose gradients are cut to length together."""
        return [list(weights.values())]

    def samples(self, step: int) -> int:
        """Samples of a step, over all processes."""
        raise TypeError(f"{type(self).__name__} must define samples()")

    def batch(self, step: int, samples: Sequence[int]) -> Any:
        """Some of a step's samples, on the device.

        Args:
            step: counted from 0.
            samples: their numbers within the step, from 0. What a sample is depends on the seed, `step` and its number
                alone: so any number of processes and any micro-batch compute the same, and a resumed run as well.
        """
        raise TypeError(f"{type(self).__name__} must define batch()")

    def weight(self, batch: Any) -> float:
        """What the loss of a batch is a sum over: its tokens, or its samples. The step's loss is the mean over all."""
        raise TypeError(f"{type(self).__name__} must define weight()")

    def loss(self, batch: Any) -> Tensor:
        """Loss of a batch, a sum and not a mean; a scalar to run backward from."""
        raise TypeError(f"{type(self).__name__} must define loss()")

    def begin_step(self, step: int) -> None:
        """Called before the batches of a step are drawn (a schedule of the sparsity)."""

    def end_step(self, step: int) -> None:
        """Called after the weights have changed (a clamp, a moving average)."""

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out data, by name. Called in the first process alone, in eval mode, without gradients."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """Tensors besides the trained weights and the optimizers that a resumed run needs."""
        return {}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Takes back what `state` gave."""

    def result_bytes(self) -> int:
        """About how much `save` writes, for the check of the disk."""
        return sum(p.numel() * p.element_size() for p in self.trained().values())

    def save(self, folder: Path, figures: dict[str, Any]) -> None:
        """Writes what was trained. Called in the first process alone, with an empty folder.

        Args:
            folder: where; complete or not there at all afterwards.
            figures: what was measured, as training.train returns it.
        """
        raise TypeError(f"{type(self).__name__} must define save()")

    def close(self) -> None:
        """Takes off what was put on the model; called also after an exception."""


# Settings that many recipes share stand here, what they do in training/adapter_task.py.


@dataclass(frozen=True, kw_only=True)
class SparseSettings:
    """Sparse attention as `hsa.patch` takes it.

    Args:
        method: a name, or the folder or Hub id of a profile.
        params: parameters of the method that differ from its defaults.
        backend: the name of one, or "auto" for the fastest that can run a call.
        dense_layers: so many first layers stay dense, or those listed.
        dense_steps: share of the denoising steps at the start that stay dense, or (share at the start, at the end).
        min_tokens: fewer tokens stay dense; "auto" decides by the predicted time.
    """

    method: str
    params: dict[str, Any] = field(default_factory=dict)
    backend: str = "auto"
    dense_layers: int | tuple[int, ...] | None = None
    dense_steps: float | tuple[float, ...] | None = None
    min_tokens: int | Literal["auto"] = "auto"


# ---------------------------------------------------------------------- finding recipes


def shipped_recipes() -> dict[str, Path]:
    """The YAML files that come with the package, by the name that `hf-sparse-attn train` takes."""
    found = [path for _, folder in _folders() for path in folder.glob("*.yaml")]
    return {path.stem: path for path in sorted(found, key=lambda path: path.stem)}


def recipe_class(name: object) -> type[Recipe]:
    """The recipe called `name`: the class `RECIPE` of the file of that name.

    Raises:
        ValueError: unknown name; the message lists the known ones.
        MissingExtra: a package that the recipe needs is not installed.
    """
    modules = recipe_modules()
    if name not in modules:
        said = f"`recipe` must be one of {', '.join(modules)}; got {name!r}{nearest(name, modules)}"
        raise ValueError(_unknown(said, name))
    module = modules[str(name)]
    try:
        found: Any = importlib.import_module(module).RECIPE
    except ImportError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        raise MissingExtra(f"recipe {name!r}", package) from error
    if not (isinstance(found, type) and issubclass(found, Recipe)):
        raise TypeError(f"`RECIPE` of {module} must be a subclass of Recipe, got {found!r}")
    found.name = str(name)
    return found


def read_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe: the settings of a YAML file, checked.

    Args:
        source: a file, or the name of one that comes with the package. Its key `recipe` names the recipe.
        overrides: settings put in place of the file's, "optimizer.learning_rate=1e-4".

    Raises:
        FileNotFoundError, ValueError, TypeError: no such file, or settings that are none.
        MissingExtra: a package that the recipe needs is not installed.
    """
    if importlib.util.find_spec("yaml") is None:
        raise MissingExtra("a recipe", "PyYAML")
    path = Path(source)
    if path.suffix not in (".yaml", ".yml"):
        shipped = shipped_recipes()
        if str(source) not in shipped:
            said = f"the recipe must be a .yaml file or one of {', '.join(shipped)}; got {str(source)!r}"
            raise ValueError(_unknown(said + nearest(source, shipped), str(source)))
        path = shipped[str(source)]
    values = read_yaml(path, overrides)
    kind = recipe_class(values.pop("recipe", None))
    return build_config(kind, values, kind.name)


def _folders() -> list[tuple[str, Path]]:
    """The packages of recipes that are there, and their folders."""
    specs = ((package, importlib.util.find_spec(package)) for package in _PACKAGES)
    found = [(name, place) for name, spec in specs if spec for place in spec.submodule_search_locations or ()]
    return [(name, Path(place)) for name, place in found]


def recipe_modules() -> dict[str, str]:
    """Files in the folders of recipes that define `RECIPE`, told without importing them: their modules by name."""
    modules = {}
    for package, folder in _folders():
        for file in folder.glob("*.py"):
            if any(line.startswith("RECIPE = ") for line in file.read_text(encoding="utf-8").splitlines()):
                modules[file.stem] = f"{package}.{file.stem}"
    return dict(sorted(modules.items()))


def _unknown(said: str, name: object) -> str:
    if name not in _IN_REPOSITORY:
        return said
    return (
        f"recipe {name!r} made a model that comes with the package: it is in the repository alone, run it in a clone"
    )
