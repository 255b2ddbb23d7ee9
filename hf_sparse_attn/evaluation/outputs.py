"""What a model or pipeline gives for an input, and how far a sparse run is from the dense one in it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_sparse_attn.evaluation.fidelity import psnr, ssim
from hf_sparse_attn.family import find_family, pretrained_models
from hf_sparse_attn.profiling.measure import Batch
from hf_sparse_attn.profiling.observe import Call, Seen, observing

# Bytes of the dense log-probabilities of all inputs; where they were more, KL is taken at fewer positions.
_KEPT_BYTES = 1 << 30
# Rows of logits that are looked at in one go.
_ROWS = 256
# States of a model by the names that transformers gives them -> figure.
_STATES = {
    "encoder_last_hidden_state": "encoder_error",
    "last_hidden_state": "error",
    "image_embeds": "image_error",
    "text_embeds": "text_error",
    "sound": "error",
}


class Figure(NamedTuple):
    """A figure of an evaluation.

    Args:
        heading: of its column.
        label: of its axis.
        larger: whether more is better.
        dense: what a dense run has; None where it has a figure of its own.
        digits: behind the point.
    """

    heading: str
    label: str
    larger: bool
    dense: float | None
    digits: int = 4


FIGURES = {
    "loss": Figure("loss", "loss of the next token (nats)", False, None),
    "kl": Figure("KL to dense", "KL divergence of dense from sparse (nats)", False, 0.0),
    "agreement": Figure("same choice", "first choices that are the dense ones", True, 1.0),
    "encoder_error": Figure("encoder error", "relative error of the encoder's last hidden state", False, 0.0),
    "error": Figure("output error", "relative error of the last hidden state", False, 0.0),
    "image_error": Figure("image error", "relative error of the image's embedding", False, 0.0),
    "text_error": Figure("text error", "relative error of the text's embedding", False, 0.0),
    "psnr": Figure("PSNR (dB)", "PSNR against dense (dB)", True, 100.0, 2),
    "ssim": Figure("SSIM", "SSIM against dense", True, 1.0),
}


@dataclass(frozen=True, eq=False)
class Output:
    """What a run gave.

    Args:
        states: tensors by the names of _STATES.
        logits: [tokens, vocabulary], or None.
        targets: the token that each row of logits should have chosen, or None.
        pictures: [..., channels, height, width] in [0, 1], or None.
    """

    states: Mapping[str, Tensor]
    logits: Tensor | None = None
    targets: Tensor | None = None
    pictures: Tensor | None = None


class Dense:
    """The output of a dense run, which sparse ones are compared with.

    Args:
        out: of the dense run.
        inputs: that are kept like this one.
    """

    def __init__(self, out: Output, inputs: int) -> None:
        self.states = out.states
        self.pictures = out.pictures
        self.choice = self.places = self.log_p = None
        self.loss: float | None = None
        if out.logits is not None:
            rows, width = out.logits.shape
            most = max(1, min(rows, _KEPT_BYTES // (4 * width * inputs)))
            self.choice = out.logits.argmax(-1)
            self.places = torch.linspace(0, rows - 1, most).round().long().to(out.logits.device)
            self.log_p = out.logits[self.places].float().log_softmax(-1)
            self.loss = loss_of(out)

    def figures(self, out: Output) -> dict[str, float]:
        """How far a run on the same input is from this one, by name of FIGURES."""
        found: dict[str, float] = {}
        loss = loss_of(out)
        if loss is not None:
            found["loss"] = loss
        if out.logits is not None and self.log_p is not None and self.places is not None:
            found["kl"] = self._divergence(out.logits[self.places], self.log_p)
            found["agreement"] = float((out.logits.argmax(-1) == self.choice).float().mean())
        for name, state in out.states.items():
            found[_STATES[name]] = relative_error(state, self.states[name])
        if out.pictures is not None and self.pictures is not None:
            found["psnr"] = psnr(out.pictures, self.pictures)
            found["ssim"] = ssim(out.pictures, self.pictures)
        return found

    @staticmethod
    def _divergence(logits: Tensor, log_p: Tensor) -> float:
        """KL(dense || sparse) in nats, mean over positions."""
        total = 0.0
        for at in range(0, len(logits), _ROWS):
            rows = slice(at, at + _ROWS)
            log_q = logits[rows].float().log_softmax(-1)
            total += float((log_p[rows].exp() * (log_p[rows] - log_q)).sum(-1).double().sum())
        return max(0.0, total / len(logits))


def loss_of(out: Output) -> float | None:
    """Mean loss of the targets in nats, or None where there are none."""
    if out.logits is None or out.targets is None:
        return None
    total = sum(
        float(nn.functional.cross_entropy(logits.float(), targets, reduction="sum").double())
        for logits, targets in zip(out.logits.split(_ROWS), out.targets.split(_ROWS), strict=True)
    )
    return total / len(out.targets)


def relative_error(found: Tensor, dense: Tensor) -> float:
    """Norm of the difference over the norm of the dense tensor."""
    return float((found.double() - dense.double()).norm() / dense.double().norm())


class Runner:
    """Runs a model or pipeline on inputs.

    Args:
        model: a model of transformers or a part of one, or a pipeline of diffusers.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_pipeline = not isinstance(model, nn.Module)
        if self.is_pipeline and hasattr(model, "set_progress_bar_config"):
            model.set_progress_bar_config(disable=True)

    @torch.no_grad()
    def alone(self, batch: Batch) -> None:
        """Runs an input of which nothing but the attention counts."""
        if callable(batch):
            batch(self.model)
        elif self.is_pipeline:
            self.model(**_seeded(batch))
        else:
            takes = inspect.signature(self.model.forward).parameters
            spare = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
            self._forward(batch, **spare)

    @torch.no_grad()
    def output(self, batch: Batch) -> Output:
        """What the model gives for an input.

        Raises:
            ValueError: nothing that can be compared.
        """
        if self.is_pipeline:
            out = _made_by(self.model(**{**_seeded(batch), "output_type": "pt"}))
        else:
            out = self._of_model(batch)
        if not out.states and out.logits is None and out.pictures is None:
            raise ValueError(
                f"`model` must give logits, hidden states, embeddings, pictures or sound, got a "
                f"{type(self.model).__name__} that gives none of them"
            )
        return out

    def _of_model(self, batch: Any) -> Output:
        states: dict[str, Tensor] = {}
        logits = None
        with _kept(self.model) as given:
            if callable(batch):
                batch(self.model)
            else:
                self._forward(batch)
        for out in given:
            states.update({name: out[name] for name in _STATES if isinstance(out.get(name), Tensor)})
            logits = out["logits"] if isinstance(out.get("logits"), Tensor) else logits
        # Those of pictures have their classes elsewhere.
        if logits is None or logits.ndim not in (2, 3):
            return Output(states)
        logits = logits[0] if logits.ndim == 3 else logits
        targets = None if callable(batch) else batch.get("labels")
        if targets is not None and logits.ndim == 2 and len(logits) == targets.shape[-1]:
            targets = targets[0].to(logits.device)
            # A decoder beside an encoder is given its text one token late, any other the text itself.
            late = "decoder_input_ids" in batch
            logits, targets = (logits, targets) if late else (logits[:-1], targets[1:])
            return Output(states, logits, targets)
        return Output(states, logits.flatten(0, -2))

    def _forward(self, batch: Any, **more: Any) -> Any:
        takes = inspect.signature(self.model.forward).parameters
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        given = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in batch.items() if name != "labels"}
        if "use_cache" in takes:
            given["use_cache"] = False
        return self.model(**given, **more)


@contextmanager
def _kept(model: nn.Module) -> Iterator[list[Mapping[str, Any]]]:
    """Within it, what a model and the one without a head within it give is kept, the inner one first."""
    given: list[Mapping[str, Any]] = []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        if isinstance(out, Mapping):
            given.append(out)

    modules = {id(m): m for m in (getattr(model, "base_model", model), model)}.values()
    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _seeded(batch: Any) -> dict[str, Any]:
    """Arguments of a pipeline with its generator where it began: a call moves it on."""
    made = dict(batch)
    if isinstance(made.get("generator"), torch.Generator):
        made["generator"].manual_seed(made["generator"].initial_seed())
    return made


def _made_by(out: Any) -> Output:
    """Pictures or sound of a pipeline's output."""
    for name in ("frames", "images"):
        if isinstance(found := getattr(out, name, None), Tensor):
            return Output({}, pictures=found.float().clamp(0, 1))
    sound = getattr(out, "audios", None)
    return Output({} if sound is None else {"sound": torch.as_tensor(sound)})


def captured(model: Any, run: Callable[[], object], most: int) -> list[Call]:
    """Attention calls of a dense run, at most so many, spread evenly over it.

    Args:
        model: that runs.
        run: runs it.
        most: calls that are kept.

    Raises:
        ValueError: no call of 16 tokens or more was seen.
    """
    calls: list[Call] = []
    seen, stride = 0, 1

    def look(shown: Seen) -> None:
        nonlocal calls, seen, stride
        if seen % stride == 0:
            calls.append(Call(shown.q, shown.k, shown.v, shown.ctx))
        if len(calls) >= 2 * most:
            calls, stride = calls[::2], 2 * stride
        seen += 1

    steps = not pretrained_models(model) and getattr(find_family(model)[1], "has_steps", True)
    with observing(model, look, steps=steps) as applied:
        run()
    if not calls:
        said = {reason for record in applied.session.records.values() for reason in record.dense_reasons}
        raise ValueError(
            "the inputs must make the model attend to 16 tokens or more, "
            f"got none: {'; '.join(sorted(said - {'observed'})) or 'no call came by'}"
        )
    return [calls[i * len(calls) // most] for i in range(most)] if len(calls) > most else calls
