"""HeadProfile: which method every head runs, at which denoising steps, and the figures behind the choice."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiles.measurements import METRICS, Measurements, label_of, weights_of
from hf_sparse_attn.profiles.step_plan import MOST_METHODS, MOST_PLANS, StepPlan
from hf_sparse_attn.registry import METHODS
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.strict_json import finite, shortened

FIGURES = ("density", "seconds", "damage", "output_error_p95", *METRICS)
# Of profiles that others measured: their figures are in units of their own.
PUBLISHED = "published"
BUDGETS = ("density", "time")
# Fields of a row of an evaluation.
EVALUATION = ("figure", "tokens", "inputs", "density", "dense", "sparse", "difference")
# Lengths are far from one another from this ratio on, and the same up to that one.
FAR, SAME = 1.5, 1.25


@dataclass(frozen=True, eq=False, repr=False)
class HeadProfile:
    """A method for every head of one model, with what was measured; a file that can be shared.

    Args:
        model: what the profile fits.
        methods: distinct methods with their parameters; the first is dense.
        plans: their step ranges follow one another from 0 to 1.
        figures: float32 [plans, layers, heads] of the chosen methods, by name (one of FIGURES, "density" always
            there); NaN where it is not known.
        metric: what damage was measured by, as `measurements.weights_of` reads it; "published" for profiles of others.
        budget: what the choice had to keep to, {"density": share} or {"time": share}; empty where none was.
        calibration: what was measured on: numbers, texts, or lists of them, by name.
        pareto: (density, damage) of the best choices at other budgets.
        same_in_group: whether all query heads of a key/value head read the union of their patterns.
        versions: versions of the libraries by name.
        measurements: all candidates' figures; kept in a file of its own.
        evaluation: what the profile does to the whole model, on inputs it was not made from: a row for each length and
            figure, with the keys of EVALUATION: "figure" ("loss", "output error", ...), "tokens" (the length),
            "inputs" (how many), "density", and the figure "dense", "sparse" and as "difference" of the two.

    Raises:
        ValueError, TypeError: a part that does not fit the others, or a value out of its range.
    """

    model: Fingerprint
    methods: tuple[Method, ...]
    plans: tuple[StepPlan, ...]
    figures: Mapping[str, NDArray[np.float32]]
    metric: str
    budget: Mapping[str, float]
    calibration: Mapping[str, Any]
    pareto: tuple[tuple[float, float], ...] = ()
    same_in_group: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)
    measurements: Measurements | None = None
    evaluation: tuple[Mapping[str, Any], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "methods", tuple(self.methods))
        _check_methods(self.methods)
        shape = (self.model.layers, self.model.heads)
        object.__setattr__(self, "plans", tuple(_checked_plan(p, shape, len(self.methods)) for p in self.plans))
        _check_steps([p.steps for p in self.plans])
        object.__setattr__(self, "figures", _checked_figures(self.figures, (len(self.plans), *shape)))
        if self.metric != PUBLISHED:
            try:
                weights_of(self.metric)
            except (TypeError, ValueError):
                known = ", ".join(METRICS)
                raise ValueError(
                    f"`metric` must be {PUBLISHED!r}, one of {known}, or a sum of them; got {shortened(self.metric)}"
                ) from None
        _check_budget(self.budget)
        _check_texts("calibration", self.calibration, (str, int, float, bool, type(None)))
        _check_texts("versions", self.versions, (str,))
        object.__setattr__(self, "pareto", tuple((finite("pareto", a), finite("pareto", b)) for a, b in self.pareto))
        if not isinstance(self.same_in_group, bool):
            raise TypeError(f"`same_in_group` must be a bool, got {shortened(self.same_in_group)}")
        object.__setattr__(self, "evaluation", tuple(map(_checked_row, self.evaluation)))
        if self.measurements is not None:
            found = (len(self.measurements.layers), self.measurements.heads)
            if found != shape:
                raise ValueError(f"`measurements` must be of {shape} layers and heads, got {found}")

    def __repr__(self) -> str:
        return (
            f"HeadProfile({self.model.model_class}, {self.model.layers} layers x {self.model.heads} heads, "
            f"{len(self.methods)} methods, {len(self.plans)} step ranges, density {self.density:.4g})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: the model, the budget and what was reached, and the methods in use."""
        from hf_sparse_attn.profiles.notebook import render

        return render(self)

    @property
    def density(self) -> float:
        """Mean density of all heads over the schedule; NaN where no head's is known."""
        return _mean_over_steps(self.figures["density"], self.plans)

    def layer_density(self, layer: int) -> float:
        """Mean density of the heads of a layer over the schedule; NaN where no head's is known."""
        return _mean_over_steps(self.figures["density"][:, layer], self.plans)

    def plan_at(self, ctx: Context) -> StepPlan:
        """The plan of the step that a call is in."""
        # A share of a run that is written with few digits must still find its step.
        share = ctx.step / max(1, ctx.num_steps) + 1e-6
        return next((p for p in self.plans if share < p.steps[1]), self.plans[-1])

    def remark(self, tokens: int) -> str | None:
        """What is to be known of a run at a length far from those the profile was measured at; None where it is not.

        Args:
            tokens: of the run.
        """
        found = self.calibration.get("tokens")
        lengths = [n for n in found if isinstance(n, int) and n > 0] if isinstance(found, (list, tuple)) else []
        if not lengths or min(_ratio(n, tokens) for n in lengths) < FAR:
            return None
        said = f"the profile was measured at {', '.join(map(str, lengths))} tokens and runs at {tokens}"
        rows = [row for row in self.evaluation if _ratio(row["tokens"], tokens) <= SAME]
        if not rows:
            return f"{said}, of which it has no figures"
        figures = "; ".join(
            f"{row['figure']} {row['sparse']:.4g} where dense has {row['dense']:.4g}, at density {row['density']:.3g}"
            for row in rows
        )
        return f"{said}, where it was found to do: {figures}"

    def labels(self) -> list[str]:
        """The methods in words."""
        return [label_of(m) for m in self.methods]

    def method(self) -> Method:
        """The profile as one Method: heads of several methods in one launch."""
        from hf_sparse_attn.profiles.profiled_method import ProfiledMethod

        return ProfiledMethod(profile=self)

    def check(self, model: Any) -> None:
        """Raises where the profile was made for another model.

        Raises:
            ValueError: names every field that differs, with both values.
            TypeError: a model of no known family.
        """
        self.model.check(model, "the profile was made for")

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Writes `head_profile.json`, a model card README.md, and `measurements.safetensors` where there are any.

        Figures are rounded to four significant digits. Each file is replaced as a whole or not at all.

        Args:
            directory: folder, made if it is not there.

        Raises:
            OSError: it cannot be written.
        """
        from hf_sparse_attn.profiles.file import write

        write(self, Path(directory))

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, measurements: bool = True) -> HeadProfile:
        """Reads what `save_pretrained` or `push_to_hub` wrote. Nothing in the file is run or used as a path.

        Args:
            source: a folder, or the id of a repository on the Hub ("name/repository").
            measurements: whether to read the figures of all candidates, too, where they are there.

        Raises:
            FileNotFoundError: a folder without a profile.
            ValueError: a file that is no whole, valid profile; or `source` is neither a folder nor a Hub id.
            OSError: the Hub cannot be reached, or has no such repository.
        """
        from hf_sparse_attn.profiles.file import load

        return load(cls, source, measurements)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | bool | None = None, **kwargs: Any
    ) -> str:
        """Uploads the files of `save_pretrained` to a model repository on the Hub, made if it is not there.

        Args:
            repo_id: "name/repository".
            private: whether a new repository is private.
            token: as huggingface_hub takes it.
            **kwargs: more arguments of `HfApi.upload_folder` (revision, commit_message, create_pr, ...).

        Returns:
            the address of the commit.

        Raises:
            ValueError: `repo_id` is not of that form.
            OSError: the Hub cannot be reached or refuses.
        """
        from hf_sparse_attn.profiles.file import push

        return push(self, repo_id, private, token, kwargs)


def find_profile(method: object) -> HeadProfile | None:
    """The profile that `method` of patch() is, or the folder or Hub id of; None where it is none of these.

    Raises:
        ValueError, OSError: as from_pretrained.
    """
    if isinstance(method, HeadProfile):
        return method
    named = isinstance(method, str) and method not in METHODS and ("/" in method or os.path.isdir(method))
    if isinstance(method, os.PathLike) or named:
        return HeadProfile.from_pretrained(method, measurements=False)  # type: ignore[arg-type]
    return None


def _mean_over_steps(values: NDArray[np.float32], plans: tuple[StepPlan, ...]) -> float:
    known = values.reshape(len(plans), -1).astype(np.float64)
    weight = np.array([p.steps[1] - p.steps[0] for p in plans])[:, None] * ~np.isnan(known)
    return float((np.nan_to_num(known) * weight).sum() / weight.sum()) if weight.any() else math.nan


def _check_methods(methods: tuple[Method, ...]) -> None:
    if not methods or not all(isinstance(m, Method) for m in methods) or methods[0].name != "dense":
        raise ValueError(f"`methods` must be Methods of which the first is dense, got {methods!r}")
    if len(methods) > MOST_METHODS:
        raise ValueError(f"`methods` must be at most {MOST_METHODS}, got {len(methods)}")
    if len(set(methods)) != len(methods):
        twice = sorted({label_of(m) for m in methods if methods.count(m) > 1})
        raise ValueError(f"`methods` must be distinct, got {', '.join(twice)} more than once")


def _checked_plan(plan: StepPlan, shape: tuple[int, int], methods: int) -> StepPlan:
    choice = np.array(plan.choice)
    if choice.dtype.kind not in "iu" or choice.shape != shape:
        raise ValueError(f"`choice` must be whole numbers {list(shape)}, got {choice.dtype} {list(choice.shape)}")
    if choice.min() < 0 or choice.max() >= methods:
        wrong = int(choice.min() if choice.min() < 0 else choice.max())
        raise ValueError(f"`choice` must be an index of one of {methods} methods, got {wrong}")
    choice = choice.astype(np.int16)
    choice.setflags(write=False)
    start, end = plan.steps
    return StepPlan((finite("steps", start), finite("steps", end)), choice)


def _check_steps(steps: list[tuple[float, float]]) -> None:
    edges = [0.0, *(end for _, end in steps)]
    if not steps or len(steps) > MOST_PLANS:
        raise ValueError(f"`plans` must be from 1 to {MOST_PLANS}, got {len(steps)}")
    if [start for start, _ in steps] != edges[:-1] or edges[-1] != 1 or any(a >= b for a, b in steps):
        raise ValueError(f"`steps` must follow one another from 0 to 1, got {shortened(steps)}")


def _checked_figures(
    figures: Mapping[str, NDArray[np.float32]], shape: tuple[int, int, int]
) -> dict[str, NDArray[np.float32]]:
    made = {}
    unknown = sorted(set(figures) - set(FIGURES))
    if unknown or "density" not in figures:
        raise ValueError(f"`figures` must hold density and others of {', '.join(FIGURES)}; got {sorted(figures)}")
    for name, values in figures.items():
        array = np.array(values, np.float32)
        if array.shape != shape:
            raise ValueError(f"`figures[{name!r}]` must be {list(shape)}, got {list(array.shape)}")
        if np.isinf(array).any():
            raise ValueError(f"`figures[{name!r}]` must be finite, or NaN where it is not known, got inf")
        array.setflags(write=False)
        made[name] = array
    density = made["density"]
    # What is rounded or predicted may be a little beyond.
    if (density < 0).any() or (density > 1.01).any():
        raise ValueError(f"`figures['density']` must be from 0 to 1, got {np.nanmin(density)} to {np.nanmax(density)}")
    return made


def _ratio(one: int, two: int) -> float:
    return max(one, two) / max(1, min(one, two))


def _checked_row(row: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(row, Mapping) or set(row) != set(EVALUATION):
        raise ValueError(f"`evaluation` must be rows of {', '.join(EVALUATION)}; got {shortened(row)}")
    made = {name: row[name] for name in EVALUATION}
    if not isinstance(made["figure"], str) or not 0 < len(made["figure"]) <= 200 or not made["figure"].isprintable():
        raise ValueError(f"`evaluation` must name a figure in a few words, got {shortened(made['figure'])}")
    for name in ("tokens", "inputs"):
        check_int(f"evaluation: {name}", made[name], 1)
    for name in ("density", "dense", "sparse", "difference"):
        made[name] = finite(f"evaluation: {name}", made[name])
    if not 0 <= made["density"] <= 1.01:
        raise ValueError(f"`evaluation` must have densities from 0 to 1, got {made['density']}")
    return made


def _check_budget(budget: Mapping[str, float]) -> None:
    unknown = sorted(set(budget) - set(BUDGETS))
    if unknown:
        raise ValueError(f"`budget` must be of {' or '.join(BUDGETS)}, got {', '.join(unknown)}")
    for name, value in budget.items():
        if not 0 < finite(f"budget[{name!r}]", value) <= 1:
            raise ValueError(f"`budget[{name!r}]` must be more than 0 and at most 1, got {value}")


def _check_texts(name: str, values: Mapping[str, Any], kinds: tuple[type, ...]) -> None:
    """Values that a profile carries along without reading them: short, and plain."""
    if len(values) > 64:
        raise ValueError(f"`{name}` must hold at most 64 values, got {len(values)}")
    for key, value in values.items():
        items = list(value) if isinstance(value, (list, tuple)) and len(kinds) > 1 else [value]
        if not isinstance(key, str) or len(key) > 200 or len(items) > 256:
            raise ValueError(f"`{name}` must have short names and lists of at most 256, got {shortened(key)}")
        for item in items:
            if not isinstance(item, kinds):
                kind = type(item).__name__
                raise TypeError(f"`{name}[{shortened(key)}]` must be plain values, got {shortened(item)} of {kind}")
            if isinstance(item, (int, float)) and not isinstance(item, bool):
                finite(f"{name}[{shortened(key)}]", item)
            if isinstance(item, str) and len(item) > 2000:
                raise ValueError(f"`{name}[{shortened(key)}]` must be at most 2000 characters, got {len(item)}")
