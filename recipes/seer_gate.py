"""Train the gates of SeerAttention on a frozen model, to tell where each of its layers attends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_sparse_attn.api import patch
from hf_sparse_attn.context import Context, check_int
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.method import Method
from hf_sparse_attn.profiling.observe import Call, Observer, Seen, observing
from hf_sparse_attn.recipe import Run, SparseSettings
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.selection import check_share
from hf_sparse_attn.sharing.gates import GateSet
from hf_sparse_attn.training.adapter_task import AdapterRecipe, AdapterTask
from hf_sparse_attn.training.chunked_loss import CausalParts
from hf_sparse_attn.training.text.data import TextSample, TextSettings, open_text
from hf_sparse_attn.training.text.held_out import held_out_figures, held_out_settings, open_held_out
from hf_sparse_attn.training.text.model import load_language_model

KIND = "seer_attention"
READS = frozenset({"q", "k"})
# Attention weights held at a time while a target is pooled.
_WEIGHTS_AT_A_TIME = 1 << 24
_FEWEST_STRIPS = 8
# Logarithm of a share that is 0; with -inf the products with targets of 0 would be no numbers.
_NOTHING = -1e30


@dataclass(frozen=True, kw_only=True)
class SeerGate(AdapterRecipe):
    """Gates of SeerAttention (Gao et al. 2024, arXiv 2410.13276) for a pretrained decoder, which stays as it is.

    The target of a gate is the layer's own attention, its largest weight in every tile of blocks, rows made to sum to
    1; the loss is the Kullback-Leibler divergence of the gate's shares from it. As published the first quarter of
    the rows, which see few blocks, is left out. Deviations: the target is float32 and exact (published: bfloat16,
    where small weights are lost); the loss is the mean over rows and heads and the sum over layers, where the
    published one is ten times the mean over all elements, which only scales it.

    Args:
        data: text to train on.
        block_size: tokens in a block of the gates.
        hidden: width of the gates.
        rope_theta: base of the gates' rotation; None takes the model's.
        density: of the bundle that is saved; see methods/seer_attention.py.
        densities: what is kept in evaluations, each in turn.
        held_out: text to evaluate on; None takes the held-out part of a source that comes with the package.
        held_out_seed: of held-out documents with needles.
        evaluation_samples: held-out samples.
    """

    data: TextSettings
    block_size: int = 64
    hidden: int = 128
    rope_theta: float | None = None
    density: float = 0.25
    densities: tuple[float, ...] = (0.125, 0.25, 0.5)
    held_out: TextSettings | None = None
    held_out_seed: int = 1000
    evaluation_samples: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("held_out_seed", self.held_out_seed, 0)
        check_int("evaluation_samples", self.evaluation_samples, 1)
        for share in (self.density, *self.densities):
            check_share("density", share)
        for name, wanted in (("lora", None), ("sparse", None), ("gradient_checkpointing", False)):
            if getattr(self, name) != wanted:
                raise ValueError(f"`{name}` must be left out: the model itself is not trained")
        held_out_settings(self.data, self.held_out)

    def task(self, run: Run) -> SeerGateTask:
        return SeerGateTask(self, run)


class SeerGateTask(AdapterTask):
    """See SeerGate."""

    def __init__(self, recipe: SeerGate, run: Run) -> None:
        model, tokenizer = load_language_model(recipe.model, recipe.torch_dtype, run.device)
        self.parts, cache = CausalParts(model), run.output / "cache"
        self.data = open_text(recipe.data, tokenizer, seed=recipe.seed, cache=cache, run=run)
        settings, samples = held_out_settings(recipe.data, recipe.held_out), recipe.evaluation_samples
        self.held_out = open_held_out(
            settings, recipe.data, samples, tokenizer, seed=recipe.held_out_seed, cache=cache, run=run
        )
        theta = _theta(model) if recipe.rope_theta is None else recipe.rope_theta
        sizes = {"block_size": recipe.block_size, "hidden": recipe.hidden, "rope_theta": theta}
        self.gates = GateSet(KIND, model, sizes, seed=recipe.seed).to(run.device)
        # Layers that do not hand over what a gate reads are refused before the first step.
        with observing(model, lambda seen: None, reads=READS):
            pass
        super().__init__(recipe, run, model, base_model=recipe.model)
        self.recipe: SeerGate = recipe
        self.module: nn.Module = self.gates

    def batch(self, step: int, samples: Sequence[int]) -> TextSample:
        ids, weights = self.data.draw(self.numbers(step, samples))
        return TextSample(ids.to(self.run.device), weights.to(self.run.device))

    def weight(self, batch: TextSample) -> float:
        return float(len(batch.ids))

    def loss(self, batch: TextSample) -> Tensor:
        """The divergence, summed over layers and samples; its gradient is known when it is returned."""
        value = torch.zeros((), device=self.run.device)
        slopes: list[tuple[nn.Parameter, Tensor]] = []

        def observe(seen: Seen) -> None:
            nonlocal value
            found, own = gate_divergence(self.gates.layers[seen.ctx.layer], seen, learn=True)
            value = value + found
            slopes.extend(own)

        self.read(batch.ids, observe)
        # Each layer was differentiated at once: the attention of all layers is never in memory together.
        return value + torch.stack([((p - p.detach()) * slope).sum() for p, slope in slopes]).sum()

    def evaluate(self) -> dict[str, float]:
        """Figures on held-out text.

        `divergence`: mean over layers, heads and rows. `recall_D`: share of the attention mass on what the gates keep
        at density D, mean over layers, heads and queries; `density_D`: the share of the pairs that this is. `loss_D`,
        `needles_D`: of the model with the gates in force; `loss_dense`, `needles_dense`: of the model as it is.
        """
        sums: dict[str, list[float]] = {}

        def observe(seen: Seen) -> None:
            divergence, _ = gate_divergence(self.gates.layers[seen.ctx.layer], seen)
            note("divergence", float(divergence))
            call = Call(seen.q, seen.k, seen.v, seen.ctx)
            reference = Reference([call])
            for share in self.recipe.densities:
                note(f"recall_{share:g}", reference.compare(self.method(share)).recall)

        def note(name: str, number: float) -> None:
            sums.setdefault(name, []).append(number)

        given = self.parts, self.held_out, self.recipe.evaluation_samples, self.run.device
        for index in range(self.recipe.evaluation_samples):
            self.read(self.held_out[index].ids[None].to(self.run.device), observe)
        figures = {name: sum(numbers) / len(numbers) for name, numbers in sums.items()}
        for share in (None, *self.recipe.densities):
            kind = "dense" if share is None else f"{share:g}"
            if share is None:
                found = held_out_figures(*given)
            else:
                with patch(self.model, self.method(share), min_tokens=0) as active:
                    found = held_out_figures(*given)
                    figures[f"density_{kind}"] = active.report().density
            figures |= {f"{name}_{kind}": number for name, number in found.items()}
        return figures

    def method(self, density: float) -> Method:
        """SeerAttention with the gates as they are now."""
        return make_method(KIND, {"gates": self.gates, "density": density})

    def bundle_parts(self) -> dict[str, Any]:
        return {"gates": self.gates, "sparse": SparseSettings(method=KIND, params={"density": self.recipe.density})}

    def read(self, ids: Tensor, observe: Observer) -> None:
        """Shows every attention call of a dense forward; the logits, which nobody wants, are not computed.

        Args:
            ids: token ids [batch, tokens].
            observe: is called with each.
        """
        with observing(self.model, observe, reads=READS), torch.no_grad():
            self.parts.hidden(ids)


def gate_divergence(gate: Any, seen: Seen, learn: bool = False) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
    """Divergence of a gate's shares from the pooled attention of a call, and its gradient.

    Args:
        gate: of the layer.
        seen: the call, of whole causal sequences, with what the layer had before positions.
        learn: whether the gradient is wanted.

    Returns:
        mean over rows and heads, summed over the batch, float32; and the weights of the gate with their gradients.
    """
    inputs, ctx, size = seen.ctx.inputs, seen.ctx, gate.block_size
    assert inputs is not None and inputs.q is not None and inputs.k is not None
    with torch.set_grad_enabled(learn), torch.autocast(seen.q.device.type, enabled=False):
        made = gate.queries(inputs.q.detach()), gate.keys(inputs.k.detach())
        # The rows go in strips, whose gradients meet here.
        queries, keys = (x.detach().requires_grad_(learn) for x in made)
        blocks = queries.shape[2]
        skipped = blocks // 4
        share = 1 / (queries.shape[1] * (blocks - skipped))
        total = torch.zeros((), device=seen.q.device)
        for first, last in _strips(seen, size, skipped):
            target = pooled_attention(seen.q, seen.k, ctx, size, first, last)
            target = target / target.sum(-1, keepdim=True)
            logits = queries[:, :, first:last] @ keys[:, :, :last].mT
            row = torch.arange(first, last, device=logits.device)[:, None]
            later = torch.arange(last, device=logits.device) > row
            shares = logits.masked_fill(later, _NOTHING).log_softmax(-1)
            loss = nn.functional.kl_div(shares, target, reduction="sum") * share
            if learn:
                torch.autograd.backward(loss)
            total = total + loss.detach()
        if not learn:
            return total, []
        weights = list(gate.parameters())
        slopes = torch.autograd.grad(made, weights, [queries.grad, keys.grad])
    return total, list(zip(weights, slopes, strict=True))


def pooled_attention(
    q: Tensor, k: Tensor, ctx: Context, size: int, first: int, last: int, mass: bool = False
) -> Tensor:
    """The largest attention weight in each tile of blocks, for the query blocks from `first` to `last`.

    Args:
        q: [batch, heads, tokens, dim]; k: [batch, kv_heads, tokens, dim], of whole causal sequences.
        ctx: the call.
        size: tokens in a block.
        first, last: query blocks.
        mass: the sum of the weights in a tile, in place of the largest.

    Returns:
        float32 [batch, heads, last - first, last]: later key blocks have no weight.
    """
    begin, end = first * size, min(last * size, q.shape[2])
    group = q.shape[1] // k.shape[1]
    parts = []
    later = torch.arange(end, device=q.device) > torch.arange(begin, end, device=q.device)[:, None]
    pad = (0, last * size - end, 0, last * size - end)
    for head in range(k.shape[1]):
        own = q[:, head * group : (head + 1) * group, begin:end].float()
        logits = own @ k[:, head, None, :end].float().mT * ctx.softmax_scale
        if ctx.softcap:
            logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
        weights = logits.masked_fill_(later, -torch.inf).softmax(-1)
        tiles = nn.functional.pad(weights, pad).unflatten(2, (-1, size)).unflatten(4, (-1, size))
        parts.append(tiles.sum((3, 5)) if mass else tiles.amax((3, 5)))
    return torch.cat(parts, 1)


def _strips(seen: Seen, size: int, skipped: int) -> Iterator[tuple[int, int]]:
    """Query blocks that are worked on at a time, from the first that counts on."""
    tokens, group = seen.q.shape[2], seen.q.shape[1] // seen.k.shape[1]
    blocks = -(-tokens // size)
    # Strips end at the diagonal: several of them leave out what comes after it.
    step = max(1, min(-(-blocks // _FEWEST_STRIPS), _WEIGHTS_AT_A_TIME // (seen.q.shape[0] * group * tokens * size)))
    for first in range(skipped, blocks, step):
        yield first, min(first + step, blocks)


def _theta(model: Any) -> float:
    """Base of the model's rotation."""
    config = model.config.get_text_config()
    rope: Any = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    return float(rope.get("rope_theta") or getattr(config, "rope_theta", None) or 10000.0)


RECIPE = SeerGate
