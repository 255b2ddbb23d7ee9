"""measure(): runs a model densely and measures every candidate on the q, k, v of every layer and head."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.family import find_family, pretrained_models
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.nearest import nearest
from hf_sparse_attn.patching import Patch
from hf_sparse_attn.presets import default_params
from hf_sparse_attn.profiles.measurements import METRICS, Measurements, label_of
from hf_sparse_attn.profiling.candidates import default_candidates
from hf_sparse_attn.profiling.head_maps import MapMaker, keep
from hf_sparse_attn.profiling.observe import Observing, Seen, evaluating, observing
from hf_sparse_attn.profiling.probe import Needle, Probe, sample_units
from hf_sparse_attn.profiling.tally import Steps, Tally
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.fingerprint import weights_hash

Batch = Mapping[str, Any] | Tensor | Callable[[Any], Any]
# Always measured, so that asking for them changes nothing.
_ALWAYS = ("output_error", "layer_error", "recall")
# Inputs of a forward that are images, videos or sound.
_SENSED = ("pixel_values", "pixel_values_videos", "input_features", "input_values")


def measure(
    model: Any,
    batches: Iterable[Batch],
    candidates: Sequence[str | Method] | None = None,
    metrics: Sequence[str] = ("output_error", "recall"),
    *,
    query_blocks: int | None = None,
    seed: int = 0,
    maps: int = 16,
    steps: Sequence[Steps] | None = None,
    state: Path | str | None = None,
    method: Method | None = None,
    progress: bool = True,
    foresee: Callable[[Sequence[Method], Context], object] | None = None,
    budget: float = 1.0,
) -> Measurements:
    """Measures candidates head by head on the calls that a dense model makes; the model is left as it was.

    Figures are means over calls; a quantile over rows is taken within a call. Every candidate chooses its keys with
    all q and k of the call; where queries are sampled, attention alone is run for fewer rows.

    Metrics beside recall and the relative errors of the output (see Measurements):
    - "retrieval_score": 1 less the dense attention of question positions on statement positions that is lost, mean
      over questions. Batches then hold "needles": pairs (question positions, statement positions) in the only row.
    - "influence": first-order change of the loss when the candidate replaces dense attention in this head alone:
      |sum over rows of <dL/d(output), sparse output - dense output>|, mean over calls. This is MoA's influence of the
      masked attention (Fu et al. 2024, arXiv 2406.14909): they sum dL/dA times the change of the attention matrix A
      over its cells, the row normalised anew; with output = A v the sum over the keys of a row is the product above,
      for which no matrix is needed. Batches then hold "labels", a callable returns the loss. The model computes dense
      attention with this package in these runs, and keeps its activations for the backward pass.
    - "video_mse": mean squared error of the head's output, mean over calls (steps, prompts), as SVG and STA search by.

    Args:
        model: a transformers model, a diffusers transformer, or a diffusers pipeline.
        batches: for a model, keyword inputs of its forward, or token ids [batch, tokens]; for a pipeline, keyword
            arguments of its call; for either, a callable that takes it. A transformer with "labels" (of its output)
            has their mean squared error as loss.
        candidates: methods or their names; None means `default_candidates` for the first call. Dense comes first,
            whether it is given or not.
        metrics: names out of METRICS; "output_error", "layer_error" and "recall" are always measured.
        query_blocks: runs of 128 queries measured in each call, drawn from as many equal parts; None means all up to
            32 (4096 queries), else 32.
        seed: of the draw.
        maps: heads whose attention is drawn.
        steps: (start, end) ranges of denoising steps to tell apart, as shares of the schedule; None means all as one.
        state: a file to keep the sums in after every batch; if it is there, the batches it holds are skipped.
        method: runs in place of dense attention after a layer was measured, so that later layers are measured on
            inputs with its errors; None means dense.
        progress: whether to show a bar on stderr.
        foresee: is shown the candidates and the first call of every length, before it is measured; may raise.
        budget: density that is to be spent, for the candidates where none are given.

    Raises:
        TypeError: a model of no known family, a batch of another type.
        ValueError: unknown metric, a value out of range, no self-attention call was seen, or a `state` of another
            model or other settings.
    """
    wanted = _check_metrics(metrics)
    ranges = _check_steps(steps)
    if query_blocks is not None:
        check_int("query_blocks", query_blocks, 1)
    check_int("maps", maps, 0)
    family, kind, modules = find_family(model)
    if getattr(kind, "requires", None):
        raise ValueError(
            f"`model` must be one whose keys are to be chosen; {type(model).__name__} selects its own: "
            'hsa.patch(model, "native") keeps these, and no profile is needed'
        )
    own = partial(default_params, family, modules)
    made = None if candidates is None else with_dense(candidates, own)
    about = {"metrics": sorted(wanted), "seed": seed, "query_blocks": query_blocks}
    if state is not None:
        # Of use for a file alone, and weights that are offloaded cannot be looked at.
        about["model"] = weights_hash(model)
    about["steps"], about["in force"] = [list(r) for r in ranges], None if method is None else label_of(method)
    path = None if state is None else Path(state)
    if path is not None and path.is_dir():
        raise ValueError(f"`state` must be a file, got the folder {path}")
    known = Tally.load(path, about, made) if path is not None and path.exists() else None
    watch = _Watch(known, made, ranges, wanted, query_blocks, seed, MapMaker(maps), batches, own, foresee, budget)
    total = len(batches) if isinstance(batches, Sized) else None
    bar = tqdm(total=total, desc="profiling", unit="batch", leave=False, disable=not progress)
    with bar, evaluating(modules):
        for number, batch in enumerate(batches):
            if watch.tally is None or number >= watch.tally.batches:
                watch.number = number
                reasons = _run(model, batch, watch, method, "influence" in wanted, len(ranges) > 1)
                if watch.tally is None:
                    raise ValueError(
                        f"`batches` must make the model attend to 16 tokens or more, batch {number}: {reasons}"
                    )
                watch.tally.batches = number + 1
                if path is not None:
                    watch.tally.save(path, about)
            bar.update()
    if watch.tally is None or not watch.tally.cases:
        raise ValueError("`batches` must hold at least one batch, got none")
    keys = sorted(watch.tally.cases)
    case = 0 if watch.maps.case is None else keys.index(watch.maps.case)  # type: ignore[arg-type]
    return watch.tally.means(watch.maps.finish(case))


@dataclass(eq=False)
class _Watch:
    """What sees the calls: measures every candidate and adds up."""

    tally: Tally | None
    candidates: Sequence[Method] | None
    steps: Sequence[Steps]
    metrics: frozenset[str]
    query_blocks: int | None
    seed: int
    maps: MapMaker
    batches: object
    # Parameters by which the family's default of a method differs from the method's.
    own: Callable[[object], dict[str, Any]] = lambda _: {}
    foresee: Callable[[Sequence[Method], Context], object] | None = None
    budget: float = 1.0
    # Of the batch that runs.
    number: int = 0
    needles: Sequence[Needle] = ()

    def __call__(self, seen: Seen) -> None:
        ctx = seen.ctx
        if self.tally is None:
            chosen = self.candidates
            if chosen is None:
                suited = default_candidates(ctx.layout, longest(self.batches), self.own, self.budget)
                if not suited:
                    least = f"no method keeps less than all of {ctx.layout.kv_len} tokens"
                    raise ValueError(f"`batches` must be longer: {least}, batch {self.number}")
                chosen = with_dense(suited, self.own)
            self.tally = Tally(chosen, self.steps)
        tally = self.tally
        cases = len(tally.cases)
        sums = tally.case_of(ctx)
        if sums is None:
            return
        if self.foresee is not None and len(tally.cases) > cases:
            self.foresee(tally.candidates, ctx)
        tally.layers[ctx.layer] = tally.layers[ctx.layer] or seen.layer
        units = sample_units(ctx.layout.q_len, self.query_blocks, self.seed + self.number)
        probe = Probe(seen, units, self.needles)
        case = next(key for key, found in tally.cases.items() if found is sums)
        drawn = self.maps.begin(seen, case, len(tally.candidates))
        tally.add(sums, ctx.layer, 0, self._asked(probe.dense()))
        for i, candidate in enumerate(tally.candidates[1:], 1):
            trial = probe.measure(candidate)
            if isinstance(trial, Decline):
                tally.declined.setdefault(label_of(candidate), trial.reason)
                continue
            tally.add(sums, ctx.layer, i, self._asked(trial.figures))
            keep(drawn, i, trial.patterns, ctx.layout.kv_len)

    def _asked(self, figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: value for name, value in figures.items() if name not in METRICS or name in self.metrics}


def _run(model: Any, batch: Batch, watch: _Watch, method: Method | None, gradients: bool, steps: bool) -> str:
    """One batch under observation; says why calls were not shown."""
    inputs, watch.needles = inputs_of(batch)
    if not callable(inputs):
        _check_inputs(inputs, watch.number)
    if "retrieval_score" in watch.metrics and not watch.needles:
        raise ValueError("`batches` must be mappings with \"needles\" for the metric 'retrieval_score'")
    with observing(model, watch, method, gradients, steps) as patch, torch.set_grad_enabled(gradients):
        if gradients:
            _differentiate(model, inputs, patch)
        else:
            run_batch(model, batch)
        said = {reason for record in patch.session.records.values() for reason in record.dense_reasons}
    return "; ".join(sorted(said - {"observed"})) or "no call came by"


def inputs_of(batch: Batch) -> tuple[Any, Sequence[Needle]]:
    """What a model is given, and the needles."""
    if isinstance(batch, Tensor):
        return {"input_ids": batch}, ()
    if callable(batch):
        return batch, ()
    if not isinstance(batch, Mapping):
        raise TypeError(f"`batches` must hold mappings, token ids or callables, got {type(batch).__name__}")
    inputs = dict(batch)
    return inputs, inputs.pop("needles", ())


def run_batch(model: Any, batch: Batch) -> None:
    """Runs a model on one batch, without its labels; see `measure`."""
    inputs = inputs_of(batch)[0]
    if callable(inputs):
        inputs(model)
        return
    inputs.pop("labels", None)
    model(**ready(model, inputs))


def _check_inputs(inputs: Mapping[str, Any], number: int) -> None:
    """Refuses inputs in which there is nothing to attend to: no tokens, a black image, silence."""
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            continue
        if not value.numel():
            raise ValueError(f"`batches` must hold values, batch {number} has none in {name!r}")
        if name in _SENSED and value.is_floating_point():
            # Channels of an image differ by how they were scaled.
            along = value.flatten(-2) if value.ndim > 3 else value
            if (along.amin(-1) == along.amax(-1)).all():
                raise ValueError(f"`batches` must show something, {name!r} of batch {number} is one value all over")


def _differentiate(model: Any, inputs: Any, patch: Patch) -> None:
    """Runs the model and takes the gradient of its loss for the output of every call, which is then shown.

    No gradient of a weight is computed or kept.
    """
    session = patch.session
    assert isinstance(session, Observing)
    if callable(inputs):
        loss = inputs(model)
    elif not isinstance(model, nn.Module) or inputs.get("labels") is None:
        raise ValueError(
            "`batches` must hold \"labels\" for a model, or callables that return the loss, for 'influence'"
        )
    elif pretrained_models(model):
        loss = model(**ready(model, inputs)).loss
    else:
        labels = inputs.pop("labels")
        out = model(**ready(model, inputs))
        out = out[0] if isinstance(out, tuple) else out.sample
        loss = (out.float() - labels.to(out.device).float()).square().mean()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(f"`batches` must lead to a loss with a gradient for 'influence', got {loss!r}")
    if session.outputs:
        torch.autograd.grad(loss, session.outputs, allow_unused=True)
    session.outputs.clear()


def ready(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs on the model's device; text models keep no cache and give the logits that are asked for alone."""
    if not isinstance(model, nn.Module):
        return inputs
    device = next((p.device for p in model.parameters()), None)
    if device is not None and device.type == "meta":
        # Offloaded: what brings the weights back moves the inputs, too.
        device = None
    moved = {n: v.to(device) if isinstance(v, Tensor) and device is not None else v for n, v in inputs.items()}
    if pretrained_models(model):
        takes = inspect.signature(model.forward).parameters
        spare = {"use_cache": False} | ({} if "labels" in moved else {"logits_to_keep": 1})
        moved = {n: v for n, v in spare.items() if n in takes} | moved
    return moved


def with_dense(
    candidates: Sequence[str | Method], own: Callable[[object], dict[str, Any]] = lambda _: {}
) -> tuple[Method, ...]:
    """Methods of names and methods, dense first, none twice.

    Args:
        candidates: methods, or names of methods with their defaults.
        own: parameters by which the family's default of a method, given its name, differs from the method's.

    Raises:
        ValueError: no candidate but dense, or one twice.
    """
    if isinstance(candidates, (str, Method)) or not isinstance(candidates, Sequence):
        raise TypeError(f"`candidates` must be a list of methods or names, got {candidates!r}")
    dense = make_method("dense", {})
    made = [dense] + [m for m in (make_method(c, own(c)) for c in candidates) if m.name != "dense"]
    labels = [label_of(m) for m in made]
    if len(made) < 2 or len(set(labels)) < len(labels):
        raise ValueError(f"`candidates` must be distinct and at least one beside dense, got {', '.join(labels)}")
    return tuple(made)


def longest(batches: object) -> int:
    """Tokens of the longest batch of ids, as far as that is known before they run; else 0."""
    if not isinstance(batches, Sequence):
        return 0
    ids = [b.get("input_ids") if isinstance(b, Mapping) else b for b in batches]
    return max((t.shape[-1] for t in ids if isinstance(t, Tensor)), default=0)


def _check_metrics(metrics: Sequence[str]) -> frozenset[str]:
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        said = f"`metrics` must be among {', '.join(METRICS)}; got {', '.join(map(str, names)) or 'none'}"
        raise ValueError(said + nearest(unknown, METRICS))
    return frozenset({*names, *_ALWAYS})


def _check_steps(steps: Sequence[Steps] | None) -> tuple[Steps, ...]:
    ranges = ((0.0, 1.0),) if steps is None else tuple((float(a), float(b)) for a, b in steps)
    before = 0.0
    for start, end in ranges:
        if not before <= start < end <= 1:
            raise ValueError(f"`steps` must be ascending, disjoint ranges of shares in [0, 1], got {list(ranges)}")
        before = end
    if not ranges:
        raise ValueError("`steps` must hold at least one range, got none")
    return ranges
