"""The oracle of the report of seer_gate against whole attention maps, and the table of a small run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, GateSet, TokenLayout
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.evaluation.fidelity import Reference
from hf_sparse_attn.method import Decline, Method
from hf_sparse_attn.profiling.observe import Call
from hf_sparse_attn.recipe import OptimizerSettings
from hf_sparse_attn.recipes.reports import seer_gate_report as report
from hf_sparse_attn.recipes.reports.seer_gate_report import Oracle
from hf_sparse_attn.recipes.seer_gate import SeerGate
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.training.loop import train
from hf_sparse_attn.training.text.data import TextSettings

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE, HEADS, KV_HEADS, DIM = 16, 4, 2, 8
MODEL = Fingerprint("tiny", "llama", 1, HEADS, KV_HEADS, DIM, "", "")
GATES = GateSet("seer_attention", MODEL, {"block_size": SIZE, "hidden": 12})


def seer(**params) -> Method:
    return make_method("seer_attention", {"gates": GATES, **params})


def call(n: int, **changes) -> Call:
    made = torch.Generator().manual_seed(n)
    q, early_q = (2 * torch.randn(2, HEADS, n, DIM, generator=made) for _ in range(2))
    k, v, early_k = (torch.randn(2, KV_HEADS, n, DIM, generator=made) for _ in range(3))
    sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM, inputs=LayerInputs(q=early_q, k=early_k))
    return Call(q, k, v, Context(TokenLayout.causal(n), **{**sizes, **changes}))


def pooled_map(given: Call, pool: str) -> torch.Tensor:
    """Attention of every tile, from the whole map in float64; -1 where not visible."""
    q, k, _, ctx = given
    n = q.shape[2]
    logits = q.double() @ k.double().repeat_interleave(2, 1).mT * ctx.softmax_scale
    if ctx.softcap:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    weights = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    blocks = -(-n // SIZE)
    found = torch.full((2, HEADS, blocks, blocks), -1.0, dtype=torch.float64)
    for i in range(blocks):
        for j in range(i + 1):
            tile = weights[:, :, i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE]
            found[:, :, i, j] = tile.sum((2, 3)) if pool == "mass" else tile.amax((2, 3))
    return found


# A threshold keeps another number of blocks in every head.
@pytest.mark.parametrize("of", [{"density": 0.3}, {"threshold": 0.12}], ids=["density", "threshold"])
@pytest.mark.parametrize("changes", [{}, {"scale": 0.9, "softcap": 2.0}], ids=["plain", "softcap"])
@pytest.mark.parametrize("pool", ["mass", "largest"])
def test_every_row_keeps_its_best_blocks_and_as_many_as_the_other_method(of: dict, changes: dict, pool: str) -> None:
    given = call(201, **changes)
    q, k, _, ctx = given
    keep = Oracle(of=seer(**of), pool=pool).pattern(q, k, ctx).validate().block_map()
    other = seer(**of).pattern(q, k, ctx)
    assert torch.equal(keep.sum(-1), other.block_map().sum(-1)) and not torch.equal(keep, other.block_map())
    attention = pooled_map(given, pool)
    blocks = keep.shape[2]
    for b in range(2):
        for h in range(HEADS):
            for i in range(blocks):
                row = attention[b, h, i].clone()
                row[i] = torch.inf
                best = row.topk(int(keep[b, h, i].sum())).indices
                assert sorted(best.tolist()) == keep[b, h, i].nonzero()[:, 0].tolist()
    # The same blocks of a row are kept, so the density is the same to the pair.
    assert Oracle(of=seer(**of)).pattern(q, k, ctx).density("causal") == other.density("causal")


def test_no_choice_of_as_many_blocks_keeps_more_of_the_attention() -> None:
    reference = Reference([call(250)])
    best = reference.compare(Oracle(of=seer(density=0.3))).recall
    for other in (seer(density=0.3), Oracle(of=seer(density=0.3), pool="largest")):
        assert best > reference.compare(other).recall


class Largest(TorchDispatchMode):
    """Notes the most numbers that a tensor has."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(made, torch.Tensor):
                self.numbers = max(self.numbers, made.numel())
        return out


def test_strips_of_rows_choose_the_same_and_hold_no_map_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _, ctx = call(1001)
    method = Oracle(of=make_method("block_topk", {"block_size": SIZE, "density": 0.3}))
    whole = method.pattern(q, k, ctx).to_dense()
    # Four of 63 rows of blocks at a time.
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 4 * 2 * HEADS * 63 * SIZE * SIZE)
    with Largest() as seen:
        strips = method.pattern(q, k, ctx)
    assert torch.equal(strips.to_dense(), whole)
    # Of the heads that share keys, padded to whole blocks.
    assert seen.numbers <= 4 * SIZE * 2 * 2 * 1008


class Wide(Method):
    """Blocks of keys that are twice as long as those of queries."""

    name = "wide"

    def pattern(self, q, k, ctx):
        return BlockPattern.from_block_map(torch.ones(1, 1, 4, 2, dtype=torch.bool), 16, 32, 64, 64, causal=True)


def test_calls_and_methods_that_it_cannot_serve() -> None:
    q, k, _, ctx = call(64)
    method = Oracle(of=seer(density=0.3))
    assert "reads the keys before" in method.pattern_for(q, k, replace(ctx, inputs=None)).reason
    chunk = replace(ctx, layout=TokenLayout.causal(64).continued(32))
    assert method.pattern(q[:, :, 32:], k, chunk).reason == "oracle needs all tokens as queries"
    assert "causal" in method.pattern_for(q, k, replace(ctx, layout=TokenLayout.bidirectional(64))).reason
    # What the other method declines.
    half = replace(ctx, num_heads=2, num_kv_heads=1)
    assert isinstance(method.pattern(q, k, half), Decline)
    with pytest.raises(ValueError, match=r"`of` must choose square aligned blocks, got .* of 'wide'"):
        Oracle(of=Wide()).pattern(q, k, ctx)
    with pytest.raises(ValueError, match="`pool` must be 'mass' or 'largest', got 'sum'"):
        Oracle(of=Wide(), pool="sum")
    with pytest.raises(TypeError, match="oracle chooses by content"):
        method.pattern(None, None, ctx)
    with pytest.raises(ValueError, match="`gates` must be a folder"):
        Oracle(of=make_method("seer_attention", {})).check_model(None)


def test_the_table_of_a_run(tmp_path: Path) -> None:
    data = TextSettings(source="needles", length=200, needles=2)
    recipe = SeerGate(
        model="byte_llama", steps=1, optimizer=OptimizerSettings(learning_rate=1e-2), data=data, block_size=SIZE,
        hidden=12, densities=(0.3,), density=0.3, evaluation_samples=1,
    )  # fmt: skip
    figures = train(recipe, tmp_path / "run", progress=False)["after"]
    report.main(["--run", str(tmp_path / "run"), "--output", str(tmp_path / "table.md")])
    lines = (tmp_path / "table.md").read_text().splitlines()
    rows = {cells[0]: cells[1:] for cells in ([c.strip() for c in line.strip("|").split("|")] for line in lines[2:])}
    names = ("seer_attention", "oracle, mass", "oracle, largest weight", "block_topk", "xattention")
    assert list(rows) == ["dense", *(f"{name}, 0.3" for name in names)]
    assert rows["dense"] == ["1.000", "1.000", "0.000", f"{figures['loss_dense']:.3f}", "1.00"]
    own = rows["seer_attention, 0.3"]
    told = [f"{figures[f'{what}_0.3']:.3f}" for what in ("density", "recall", "loss")]
    assert [own[0], own[1], own[3]] == told and own[4] == f"{figures['needles_0.3']:.2f}"
    oracle = rows["oracle, mass, 0.3"]
    assert oracle[0] == own[0] and float(oracle[1]) > float(own[1]) and float(oracle[2]) < float(own[2])
    assert len({row[0] + row[1] for row in rows.values()}) == 6


def test_the_report_of_a_patch_can_be_written(tmp_path: Path) -> None:
    from tests.support.tiny_lm import FAMILIES, tokens

    model = FAMILIES["llama"]("sdpa")
    gates = GateSet("seer_attention", model, {"block_size": SIZE, "hidden": 12})
    method = Oracle(of=make_method("seer_attention", {"gates": gates, "density": 0.3}))
    with hsa.patch(model, method, min_tokens=0, strict=True) as active, torch.no_grad():
        model(tokens(2, 150), use_cache=False)
        assert json.dumps(active.report().to_dict()) and 0 < active.report().density < 1
