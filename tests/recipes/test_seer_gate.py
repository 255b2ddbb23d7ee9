"""Recipe seer_gate: the pooled target against a dense map, its gradient, what is trained, going on, and the bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import GateSet
from hf_sparse_attn.context import Context, LayerInputs, TokenLayout
from hf_sparse_attn.profiling.observe import Seen
from hf_sparse_attn.recipe import OptimizerSettings, Run, SparseSettings, read_recipe
from hf_sparse_attn.recipes import seer_gate
from hf_sparse_attn.recipes.seer_gate import SeerGate, gate_divergence, pooled_attention
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.text.data import TextSettings
from tests.support.tiny_lm import FAMILIES

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = 16
DATA = TextSettings(source="needles", length=256, needles=3)


def recipe(**changes) -> SeerGate:
    given = dict(
        model="byte_llama", steps=4, optimizer=OptimizerSettings(learning_rate=1e-2), data=DATA, block_size=SIZE,
        hidden=12, densities=(0.3,), density=0.3, evaluation_samples=1,
    )  # fmt: skip
    return SeerGate(**{**given, **changes})


@pytest.fixture()
def task(tmp_path: Path):
    made = recipe().task(Run(output=tmp_path, device=torch.device("cpu")))
    yield made
    made.close()


def call(n: int, softcap: float = 0.0, scale: float | None = None) -> Seen:
    made = torch.Generator().manual_seed(n)
    q, early_q = (torch.randn(2, 4, n, 8, generator=made) for _ in range(2))
    k, early_k = (torch.randn(2, 2, n, 8, generator=made) for _ in range(2))
    inputs = LayerInputs(q=early_q, k=early_k)
    sizes = dict(num_heads=4, num_kv_heads=2, head_dim=8, softcap=softcap, scale=scale, inputs=inputs)
    return Seen("layer", q, k, k, Context(TokenLayout.causal(n), **sizes))


def dense_map(seen: Seen) -> torch.Tensor:
    """Largest weight of each tile, from the whole attention map, float64."""
    n, ctx = seen.q.shape[2], seen.ctx
    logits = seen.q.double() @ seen.k.double().repeat_interleave(2, 1).mT * ctx.softmax_scale
    if ctx.softcap:
        logits = ctx.softcap * torch.tanh(logits / ctx.softcap)
    weights = logits.masked_fill(~torch.ones(n, n, dtype=torch.bool).tril(), -torch.inf).softmax(-1)
    blocks = -(-n // SIZE)
    found = torch.zeros(2, 4, blocks, blocks, dtype=torch.float64)
    for i in range(blocks):
        for j in range(blocks):
            tile = weights[:, :, i * SIZE : (i + 1) * SIZE, j * SIZE : (j + 1) * SIZE]
            found[:, :, i, j] = tile.amax((2, 3))
    return found


@pytest.mark.parametrize("n, softcap, scale", [(111, 0.0, None), (128, 2.0, None), (5, 0.0, None), (65, 0.0, 0.9)])
def test_the_target_is_the_pooled_dense_map(n: int, softcap: float, scale: float | None) -> None:
    seen = call(n, softcap, scale)
    want = dense_map(seen)
    blocks = want.shape[2]
    for first, last in ((0, blocks), (blocks // 2, blocks), (blocks // 3, blocks // 3 + 1)):
        found = pooled_attention(seen.q, seen.k, seen.ctx, SIZE, first, last)
        torch.testing.assert_close(found.double(), want[:, :, first:last, :last], rtol=1e-4, atol=1e-6)


def plain_divergence(gate, seen: Seen) -> torch.Tensor:
    """The loss of one layer by the formula, over whole maps."""
    inputs = seen.ctx.inputs
    logits = gate.queries(inputs.q) @ gate.keys(inputs.k).mT
    blocks = logits.shape[2]
    visible = torch.ones(blocks, blocks, dtype=torch.bool).tril()
    shares = logits.masked_fill(~visible, -torch.inf).softmax(-1).double()
    target = dense_map(seen)
    target = target / target.sum(-1, keepdim=True)
    terms = torch.where(visible, target * (target.log() - shares.clamp(min=1e-300).log()), 0.0)
    return terms[:, :, blocks // 4 :].sum(-1).mean((1, 2)).sum()


@pytest.mark.parametrize("n", [111, 200])
def test_the_divergence_and_its_gradient_are_the_plain_ones(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = call(n)
    gates = GateSet("seer_attention", Fingerprint("tiny", "llama", 1, 4, 2, 8, "", ""), {"block_size": SIZE})
    gate = gates.layers[0]
    want = plain_divergence(gate, seen)
    slopes = torch.autograd.grad(want, list(gate.parameters()))
    for budget in (1 << 24, 1):
        monkeypatch.setattr(seer_gate, "_WEIGHTS_AT_A_TIME", budget)
        found, own = gate_divergence(gate, seen, learn=True)
        assert float(found) == pytest.approx(float(want), rel=1e-4)
        assert [p for p, _ in own] == list(gate.parameters())
        for (_, got), slope in zip(own, slopes, strict=True):
            torch.testing.assert_close(got, slope, rtol=1e-3, atol=1e-6)
    with torch.no_grad():
        assert float(gate_divergence(gate, seen)[0]) == pytest.approx(float(want), rel=1e-4)


def steps(task, first: int, last: int, optimizer=None):
    optimizer = optimizer or task.optimizers()[0]
    losses = []
    for step in range(first, last):
        loss = task.loss(task.batch(step, range(task.samples(step))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.end_step(step)
        losses.append(float(loss.detach()))
    return optimizer, losses


def test_only_gates_are_trained_and_they_learn(task) -> None:
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    start = {name: p.detach().clone() for name, p in task.trained().items()}
    assert set(start) == {f"layers.{i}.{n}" for i in range(4) for n in ("key", "query")}
    _, losses = steps(task, 0, 4)
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())
    assert not any(torch.equal(p, start[name]) for name, p in task.trained().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in task.model.modules())


def test_the_loss_is_the_sum_over_layers(task) -> None:
    batch = task.batch(0, [0])
    found = []

    def note(seen: Seen) -> None:
        found.append(float(gate_divergence(task.gates.layers[seen.ctx.layer], seen)[0]))

    task.read(batch.ids, note)
    assert len(found) == 4 and float(task.loss(batch)) == pytest.approx(sum(found), rel=1e-5)


def test_samples_of_a_batch_add_up_and_every_step_has_its_own(task) -> None:
    both, one, two = task.batch(0, [0, 1]), task.batch(0, [0]), task.batch(1, [0])
    # A batch of one: the second sample of the first step is the first of the second.
    assert torch.equal(both.ids, torch.cat([one.ids, two.ids])) and not torch.equal(one.ids, two.ids)
    assert task.weight(both) == 2 and task.weight(one) == 1
    found = float(task.loss(both).detach())
    assert found == pytest.approx(float(task.loss(one).detach()) + float(task.loss(two).detach()), rel=1e-4)


def test_seeds_and_sizes_are_those_of_the_recipe(tmp_path: Path) -> None:
    run = Run(output=tmp_path, device=torch.device("cpu"))
    made = recipe(seed=3, held_out_seed=7, rope_theta=123.0).task(run)
    assert made.gates.settings == {"block_size": SIZE, "hidden": 12, "rope_theta": 123.0}
    own = GateSet("seer_attention", made.model, made.gates.settings, seed=3)
    assert torch.equal(own.layers[2].query, made.gates.layers[2].query)
    assert (made.data.seed, made.held_out.seed) == (3, 7)
    assert (made.data.settings.split, made.held_out.settings.split) == ("train", "heldout")
    made.close()


THETAS = {
    "plain": ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, 5e5),
    "by_layer_type": (
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        1e6,
    ),
    "older": ({"rope_theta": 2e4}, 2e4),
    "none": ({"rope_parameters": None}, 1e4),
}


@pytest.mark.parametrize("name", THETAS)
def test_the_gates_turn_as_the_model_does(name: str) -> None:
    fields, want = THETAS[name]
    config = SimpleNamespace(**fields)
    assert seer_gate._theta(SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))) == want


def test_layers_that_hand_over_no_keys_are_refused_before_the_first_step(tmp_path: Path) -> None:
    FAMILIES["phi3"](vocab_size=256).save_pretrained(tmp_path / "fused")
    with pytest.raises(hsa.MethodDoesNotApply, match=r"k_norm or k_proj, which layers.0.self_attn \(Phi3Att"):
        recipe(model=str(tmp_path / "fused")).task(Run(output=tmp_path, device=torch.device("cpu")))


def test_every_density_is_evaluated(tmp_path: Path) -> None:
    made = recipe(densities=(0.2, 0.7), density=0.4).task(Run(output=tmp_path, device=torch.device("cpu")))
    figures = made.evaluate()
    assert figures["density_0.2"] < figures["density_0.7"] and figures["recall_0.2"] < figures["recall_0.7"]
    found: dict[int, list[float]] = {}

    def note(seen: Seen) -> None:
        divergence = float(gate_divergence(made.gates.layers[seen.ctx.layer], seen)[0])
        found.setdefault(seen.ctx.layer, []).append(divergence)

    made.read(made.held_out[0].ids[None], note)
    assert figures["divergence"] == pytest.approx(sum(sum(x) for x in found.values()) / 4, rel=1e-5)
    assert made.bundle_parts()["sparse"].params == {"density": 0.4}
    made.close()


def test_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    run = Run(output=tmp_path, device=torch.device("cpu"))
    one, two, three = (recipe().task(run) for _ in range(3))
    steps(one, 0, 3)
    optimizer, _ = steps(two, 0, 2)
    with torch.no_grad():
        for name, p in three.trained().items():
            p.copy_(two.trained()[name])
    resumed = three.optimizers()[0]
    resumed.load_state_dict(optimizer.state_dict())
    steps(three, 2, 3, resumed)
    assert all(torch.equal(p, three.trained()[name]) for name, p in one.trained().items())


def test_figures_and_the_bundle(task, tmp_path: Path) -> None:
    figures = task.evaluate()
    names = {"divergence", "recall_0.3", "density_0.3", "loss_0.3", "needles_0.3", "loss_dense", "needles_dense"}
    assert set(figures) == names
    assert 0.2 < figures["recall_0.3"] < 1 and figures["loss_0.3"] > figures["loss_dense"] > 0
    task.save(tmp_path / "result", figures)
    task.close()
    ids = task.held_out[0].ids[None]
    with torch.no_grad():
        usual = task.model(ids, use_cache=False).logits
        with hsa.patch(task.model, task.method(0.3), min_tokens=0):
            want = task.model(ids, use_cache=False).logits
        with hsa.load_bundle(task.model, tmp_path / "result") as loaded:
            assert loaded.patch.method.name == "seer_attention" and loaded.patch.method.density == 0.3
            loaded.patch.session.policy = replace(loaded.patch.session.policy, min_tokens=0)
            assert torch.equal(task.model(ids, use_cache=False).logits, want)
        assert torch.equal(task.model(ids, use_cache=False).logits, usual)
    assert not torch.equal(want, usual)


BAD = [
    ({"lora": LoraSettings(targets=("q_proj",))}, "`lora` must be left out"),
    ({"sparse": SparseSettings(method="block_topk")}, "`sparse` must be left out"),
    ({"gradient_checkpointing": True}, "`gradient_checkpointing` must be left out"),
    ({"densities": (0.0,)}, "`density` must be more than 0"),
    ({"data": TextSettings(source="/somewhere", length=64)}, "`held_out` must be given for text of one's own"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda value: str(value)[:30])
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**change)


def test_the_shipped_file_is_a_recipe() -> None:
    made = read_recipe("seer_gate", ["steps=30"])
    assert isinstance(made, SeerGate) and made.steps == made.total_steps == 30
