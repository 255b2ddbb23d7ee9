"""`python -m tests.coverage.pipelines --output .github`: the steps that pipelines are told, against those they ran.

Every pipeline class of diffusers that holds a transformer which can be patched is built tiny and run for a few steps.
What a forward is told is compared with what the scheduler saw: a call of `set_timesteps` begins a run, and the
forwards between two calls of `step` are one evaluation of it.
"""

from __future__ import annotations

import argparse
import inspect
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.coverage.listing import quiet, short
from hf_sparse_attn.coverage.of_diffusers import diffusers_classes
from hf_sparse_attn.family import find_family
from hf_sparse_attn.hosts.diffusers_clock import Clock, Moment
from tests.support.tiny_diffusers import tiny_sizes
from tests.support.tiny_pipelines import (
    classes_of,
    modular_blocks,
    modular_call,
    modular_classes,
    pipeline_classes,
    tiny_call,
    tiny_modular,
    tiny_pipeline,
    transformer_parts,
)
from tests.support.tiny_pipelines_table import HEIGHT, PIPES, STEPS, WIDE, Pipe, image


@dataclass
class Forward:
    """One forward of a patched transformer.

    Args:
        moment: what the clock found.
        told: (step, num_steps) as its layers were told, each once.
        aside: whether it is none of the denoising, as one that fills a cache.
        patched: whether the transformer is one that is patched.
    """

    aside: bool = False
    patched: bool = True
    moment: Moment | None = None
    told: set[tuple[int, int]] = field(default_factory=set)


@dataclass(frozen=True, kw_only=True)
class Spy(hsa.Method):
    """Keeps everything and notes what it is told."""

    events: list[Any] = field(default_factory=list, compare=False)

    def pattern(self, q: Any, k: Any, ctx: hsa.Context) -> hsa.BlockPattern:
        self.events[-1].told.add((ctx.step, ctx.num_steps))
        return hsa.BlockPattern.dense(q.shape[2], k.shape[2], causal=False, block=64)


@dataclass(frozen=True)
class Row:
    """What came of a pipeline in one setting.

    Args:
        pipeline, scheduler, variant: which; no scheduler where it could not be built.
        told, ran: (step, num_steps) of each evaluation, by what it was told and by what the scheduler saw.
        verdict: "right", "unknown" (and said so), "wrong", "refused" (the pipeline does not take the setting) or
            "not built".
        why: what is unknown, wrong or refused.
    """

    pipeline: str
    scheduler: str
    variant: str
    told: tuple[tuple[int | None, int | None], ...] = ()
    ran: tuple[tuple[int, int], ...] = ()
    verdict: str = "right"
    why: str = ""


class _Aborted(Exception):
    """Raised by a callback, as a user's interrupt."""


@contextmanager
def watched(events: list[Any]) -> Iterator[None]:
    """Notes calls of the schedulers' `set_timesteps` and `step`, and what the clock finds for each forward."""

    def noting(name: str, own: Callable[..., Any]) -> Callable[..., Any]:
        def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
            events.append(name)
            return own(self, *args, **kwargs)

        # Pipelines look at its signature.
        noted.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
        return noted

    moment = Clock.moment

    def timed(self: Clock, *args: Any, **kwargs: Any) -> Moment:
        found = moment(self, *args, **kwargs)
        events[-1].moment = found
        return found

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(Clock, "moment", timed))
        for kind in _schedulers(diffusers.SchedulerMixin):
            for name in ("set_timesteps", "step"):
                if name in vars(kind):
                    stack.enter_context(mock.patch.object(kind, name, noting(name, vars(kind)[name])))
        yield


def _schedulers(kind: type[Any]) -> Iterator[type[Any]]:
    for one in kind.__subclasses__():
        yield one
        yield from _schedulers(one)


def evaluations(events: list[Any], stepless: bool) -> list[list[list[Forward]]]:
    """The forwards of each evaluation of each run.

    Args:
        stepless: whether the pipeline steps without a scheduler, with one forward for each step.
    """
    runs: list[list[list[Forward]]] = [[[]]]
    for event in events:
        if event == "set_timesteps" and runs[-1] != [[]]:
            runs.append([[]])
        elif isinstance(event, Forward) and not event.aside:
            runs[-1][-1].append(event)
            if stepless:
                runs[-1].append([])
        elif event == "step" and runs[-1][-1]:
            runs[-1].append([])
    return [[one for one in run if one] for run in runs if any(run)]


def judged(row: dict[str, str], calls: list[list[Any]], stepless: bool) -> Row:
    """The row of some calls, of which those that were aborted have the lengths of the last one."""
    ran, told, wrong, unknown = [], [], [], []
    whole = evaluations(calls[-1], stepless)
    for events in calls:
        found = evaluations(events, stepless)
        # An aborted call is shorter than it would have been.
        aborted = "aborted" in events
        asides = [event.moment for event in events if isinstance(event, Forward) and event.aside]
        wrong += [f"what fills a cache was told as step {a.step}" for a in asides if a is not None and not a.guessed]
        for number, run in enumerate(found):
            length = len(whole[number]) if aborted else len(run)
            for place, forwards in enumerate(run):
                asked = [forward for forward in forwards if forward.patched]
                ran += [(place, length)] if asked else []
                told += [_told(forward) for forward in asked[:1]]
                for forward in asked:
                    moment = forward.moment
                    if moment is None:
                        wrong.append(f"{place} of {length} was not asked about")
                    elif moment.guessed or moment.num_steps is None:
                        unknown.append("number of steps unknown" if moment.num_steps is None else "step guessed")
                    elif forward.told - {(place, length)} or _told(forward) != (place, length):
                        wrong.append(f"{place} of {length} was told as {_told(forward)}, {sorted(forward.told)}")
    if not ran:
        wrong.append("no forward of the transformer")
    why = dict.fromkeys(wrong or unknown)
    verdict = "wrong" if wrong else "unknown" if unknown else "right"
    return Row(**row, told=tuple(told), ran=tuple(ran), verdict=verdict, why="; ".join(list(why)[:3]))


def _told(forward: Forward) -> tuple[int | None, int | None]:
    return (None, None) if forward.moment is None else (forward.moment.step, forward.moment.num_steps)


def run(pipe: Any, patched: Any, calls: list[dict[str, Any]]) -> list[list[Any]]:
    """Events of each call of a pipeline.

    Args:
        pipe: that is called.
        patched: it, or a transformer or pipeline that it shares one with.
        calls: keyword arguments of each call.
    """
    spy, aside = Spy(), PIPES.get(_name(pipe), Pipe()).aside

    ours = find_family(patched)[2]

    def began(module: Any, args: Any, given: dict[str, Any]) -> None:
        spy.events.append(Forward(aside=aside(given), patched=module in ours))

    modules = dict.fromkeys((*ours, *find_family(pipe)[2]))
    hooks = [module.register_forward_pre_hook(began, with_kwargs=True) for module in modules]
    found: list[list[Any]] = []
    try:
        with hsa.patch(patched, spy, min_tokens=0, backend="torch_gather"), watched(spy.events):
            for call in calls:
                spy.events.clear()
                try:
                    pipe(**call)
                except _Aborted:
                    spy.events.append("aborted")
                found.append(list(spy.events))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _name(pipe: Any) -> str:
    return type(pipe).__name__


def aborting(pipe: Any, *_: Any) -> dict[str, Any]:
    """A callback at the end of a step that ends the call."""
    raise _Aborted


@dataclass(frozen=True)
class Setting:
    """A way to run a pipeline.

    Args:
        variant: its name.
        pipe: that is called.
        calls: keyword arguments of each call.
        patched: what is patched; None means the pipeline.
        scheduler: that the pipeline is given; None leaves it its own.
    """

    variant: str
    pipe: Any
    calls: list[dict[str, Any]]
    patched: Any = None
    scheduler: Any = None


def settings(pipe: Any) -> Iterator[Setting]:
    """What any pipeline may be asked for, as far as its call takes it."""
    takes = inspect.signature(type(pipe).__call__).parameters
    yield Setting("as it is", pipe, [tiny_call(pipe)])
    again = [tiny_call(pipe, STEPS - 1), tiny_call(pipe, STEPS)]
    if "callback_on_step_end" in takes:
        again.insert(1, tiny_call(pipe, STEPS, callback_on_step_end=aborting))
    said = "a call aborted between two" if len(again) > 2 else "two calls"
    yield Setting(f"transformer patched, {said}", pipe, again, pipe.transformer)
    if "true_cfg_scale" in takes:
        yield Setting("true guidance", pipe, [tiny_call(pipe, true_cfg_scale=3.0)])
    elif "guidance_scale" in takes:
        yield Setting("no guidance", pipe, [tiny_call(pipe, guidance_scale=1.0)])
    for name in ("strength", "denoise_strength"):
        if name in takes:
            yield Setting("strength 0.5", pipe, [tiny_call(pipe, 2 * STEPS, **{name: 0.5})])
    for scheduler in _others(pipe.scheduler):
        yield Setting("another scheduler", pipe, [tiny_call(pipe)], scheduler=scheduler)


def _others(own: Any) -> Iterator[Any]:
    """Schedulers of second order and of several steps that may stand in for one."""
    flow = getattr(own.config, "prediction_type", "flow_prediction") == "flow_prediction"
    if flow:
        yield diffusers.FlowMatchHeunDiscreteScheduler()
        if not isinstance(own, diffusers.UniPCMultistepScheduler):
            yield diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    else:
        yield diffusers.HeunDiscreteScheduler()
        yield diffusers.KDPM2DiscreteScheduler()


def more(name: str) -> Iterator[Setting]:
    """What some pipelines take besides."""
    if name in ("FluxPipeline", "WanPipeline", "StableDiffusion3Pipeline"):
        pipe = tiny_pipeline(name, diffusers.FlowMatchEulerDiscreteScheduler(shift=10.0)).to(torch.bfloat16)
        call = tiny_call(pipe, 50, height=32, width=48)
        half = {
            k: v.bfloat16() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in call.items()
        }
        yield Setting("50 steps in bfloat16 with shift 10", pipe, [half])
    if name in _DERIVED:
        source = tiny_pipeline(_DERIVED[name])
        derived = getattr(diffusers, name).from_pipe(source)
        derived.set_progress_bar_config(disable=True)
        yield Setting(f"from_pipe of {_DERIVED[name]}, which is patched", derived, [tiny_call(derived)], source)
    if name in ("WanPipeline", "WanImageToVideoPipeline"):
        experts = {"transformer_2": tiny_pipeline(name).transformer, "boundary_ratio": 0.8}
        pipe = tiny_pipeline(name, diffusers.FlowMatchEulerDiscreteScheduler(), **experts)
        yield Setting("two experts", pipe, [tiny_call(pipe, 6)])
    if name.startswith("SkyReelsV2DiffusionForcing"):
        pipe = tiny_pipeline(name)
        asynchronous = {"ar_step": 2, "causal_block_size": 1}
        yield Setting("asynchronous", pipe, [tiny_call(pipe, **asynchronous)])
        long = {"num_frames": 17, "base_num_frames": 9, "overlap_history": 5, "addnoise_condition": 20}
        yield Setting("long and asynchronous", pipe, [tiny_call(pipe, **long, **asynchronous)])
    if name == "GlmImagePipeline":
        pipe = tiny_pipeline(name)
        grid = torch.tensor([[1, HEIGHT // 16, WIDE // 16]])
        shown = {"prior_token_image_ids": [torch.arange(24) % 32], "source_image_grid_thw": [grid]}
        yield Setting("an image to edit", pipe, [tiny_call(pipe, image=[image()], **shown)])


_DERIVED = {
    "FluxImg2ImgPipeline": "FluxPipeline",
    "WanVideoToVideoPipeline": "WanPipeline",
    "StableDiffusion3Img2ImgPipeline": "StableDiffusion3Pipeline",
    "QwenImageImg2ImgPipeline": "QwenImagePipeline",
}


def modular(pipe: Any) -> Iterator[Setting]:
    """The settings of a modular pipeline."""
    name = _name(pipe)
    yield Setting("as it is", pipe, [modular_call(pipe, name)])
    twice = [modular_call(pipe, name, steps) for steps in (STEPS, STEPS - 1)]
    yield Setting("transformer patched, two calls", pipe, twice, pipe.transformer)
    for scheduler in () if PIPES.get(name, Pipe()).stepless else _others(pipe.scheduler):
        yield Setting("another scheduler", pipe, [modular_call(pipe, name)], scheduler=scheduler)


def of_class(name: str) -> Iterator[Row]:
    """The rows of a pipeline class."""
    of_blocks = issubclass(getattr(diffusers, name), diffusers.ModularPipeline)
    try:
        pipe = tiny_modular(name) if of_blocks else tiny_pipeline(name)
    except Exception as error:
        yield Row(name, "", "", verdict="not built", why=short(error))
        return
    own = getattr(pipe, "scheduler", None)
    for setting in modular(pipe) if of_blocks else chain(settings(pipe), more(name)):
        if setting.pipe is pipe and own is not None:
            pipe.scheduler = own if setting.scheduler is None else setting.scheduler
        found = of_setting(setting)
        if found.verdict == "refused" and setting.variant == "as it is":
            yield replace(found, verdict="not built")
            return
        yield found


def of_setting(setting: Setting) -> Row:
    """The row of a pipeline in one setting."""
    pipe = setting.pipe
    stepless = PIPES.get(_name(pipe), Pipe()).stepless
    row = {
        "pipeline": _name(pipe),
        "scheduler": "none" if stepless else type(pipe.scheduler).__name__,
        "variant": setting.variant,
    }
    try:
        return judged(row, run(pipe, pipe if setting.patched is None else setting.patched, setting.calls), stepless)
    except Exception as error:
        return Row(**row, verdict="refused", why=short(error))


def known() -> tuple[list[str], dict[str, str]]:
    """The pipeline classes to run, and why others that hold a transformer are not, by name."""
    families = {c.name: c.reason for c in diffusers_classes(sizes=tiny_sizes)}
    chosen, others = [], {}
    for name, kind in pipeline_classes().items():
        parts = sorted({part.__name__ for part in transformer_parts(kind).values()})
        if any(families.get(part, "") is None for part in parts):
            chosen.append(name)
        else:
            others[name] = "; ".join(families[part] or "" for part in parts)
    for name in modular_classes():
        specs = modular_blocks(name).expected_components
        parts = sorted({kind.__name__ for spec in specs for kind in classes_of(spec.type_hint)} & set(families))
        if any(families[part] is None for part in parts):
            chosen.append(name)
        else:
            others[name] = "; ".join(families[part] or "" for part in parts) or "has no transformer"
    for name in dir(diffusers):
        if name.endswith("Pipeline") and "dummy" in getattr(getattr(diffusers, name), "__module__", ""):
            others[name] = "needs a package that is not installed"
    return sorted(chosen), dict(sorted(others.items()))


def steps(places: Sequence[tuple[int | None, int | None]]) -> str:
    """Steps in few words: "0-3 of 4" is a run of four, "0-1, 3 of 4" one that left out its third."""
    runs: list[tuple[list[list[Any]], int | None]] = []
    for place, length in places:
        ranges = runs[-1][0] if runs else []
        if not ranges or runs[-1][1] != length or place is None or ranges[-1][1] is None or place <= ranges[-1][1]:
            runs.append(([[place, place]], length))
        elif place <= ranges[-1][1] + 1:
            ranges[-1][1] = place
        else:
            ranges.append([place, place])
    said = []
    for ranges, length in runs:
        parts = (str(first) if first == last else f"{first}-{last}" for first, last in ranges)
        said.append(f"{', '.join(parts)} of {'?' if length is None else length}")
    counts = [(one, len(list(same))) for one, same in groupby(said)]
    return "; ".join(one if count == 1 else f"{count} x {one}" for one, count in counts)


def page(rows: Sequence[Row], others: Mapping[str, str]) -> str:
    """The table as Markdown."""
    counts = Counter(row.verdict for row in rows)
    classes = {row.pipeline for row in rows if row.verdict != "not built"}
    lines = [
        "# Steps of pipelines",
        "",
        "What the forwards of a patched transformer are told of their step, in every pipeline class of diffusers "
        f"{diffusers.__version__} that holds a transformer which can be patched, against what the scheduler saw: a "
        "call of `set_timesteps` begins a run, and what runs between two calls of `step` is one evaluation of the "
        "model. The pipelines are tiny and have random weights. `python -m tests.coverage.pipelines --output .github` "
        "makes this page.",
        "",
        f"{len(classes)} classes in {counts['right'] + counts['unknown'] + counts['wrong']} settings: "
        f"{counts['right']} right, {counts['unknown']} said to be unknown, {counts['wrong']} wrong.",
        "",
        "| class | scheduler | setting | steps told | steps run | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if row.verdict in ("right", "unknown", "wrong"):
            verdict = row.verdict + (f": {row.why}" if row.why else "")
            cells = (row.pipeline, row.scheduler, row.variant, steps(row.told), steps(row.ran), verdict)
            lines.append(f"| {' | '.join(cells)} |")
    refused = sorted({(row.pipeline, row.scheduler) for row in rows if row.verdict == "refused"})
    lines += ["", "## Not taken", "", "Settings that pipelines themselves refuse:", ""]
    for scheduler, same in groupby(sorted(refused, key=lambda one: one[1]), key=lambda one: one[1]):
        lines.append(f"- {scheduler}: {', '.join(name for name, _ in same)}")
    lines += ["", "## Not run", ""]
    lines += [f"- {row.pipeline}: could not be built: {row.why}" for row in rows if row.verdict == "not built"]
    lines += [f"- {name}: {why}" for name, why in others.items()]
    return "\n".join(lines) + "\n"


def table(names: Sequence[str]) -> list[Row]:
    """The rows of some pipeline classes."""
    rows: list[Row] = []
    with quiet("diffusers"):
        for number, name in enumerate(names):
            begin = time.process_time()
            rows += of_class(name)
            print(f"{number + 1} of {len(names)}: {name}, {time.process_time() - begin:.1f} s", file=sys.stderr)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="pipeline classes; all without it")
    parser.add_argument("--output", metavar="FOLDER", help="write pipelines.md there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names, others = (args.only, {}) if args.only else known()
    said = page(table(names), others)
    print(said, end="")
    if args.output is not None:
        path = Path(args.output) / "pipelines.md"
        path.write_text(said)
        print(f"wrote {path}", file=sys.stderr)


if __name__ == "__main__":
    main()
