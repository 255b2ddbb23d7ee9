"""Recipe duo_gate: the mix against plain attention, the clamp, the published files, profiles, and going on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import hf_sparse_attn as hsa
from hf_sparse_attn.context import Context, TokenLayout
from hf_sparse_attn.profiles.published import from_duo_attention
from hf_sparse_attn.recipe import OptimizerSettings, Run, read_recipe
from hf_sparse_attn.recipes.duo_gate import DuoGate, MixedHeads, PasskeyData
from hf_sparse_attn.registry import make_method
from hf_sparse_attn.training.lora.settings import LoraSettings
from hf_sparse_attn.training.text.data import TextSettings
from hf_sparse_attn.training.text.model import load_language_model

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = TextSettings(source="needles", length=256, needles=3)


def recipe(**changes) -> DuoGate:
    given = dict(
        model="byte_llama", steps=4, optimizer=OptimizerSettings(learning_rate=0.2), data=DATA, sink=4, recent=16,
        block_size=16, evaluation_samples=1,
    )  # fmt: skip
    return DuoGate(**{**given, **changes})


@pytest.fixture()
def task(tmp_path: Path):
    made = recipe().task(Run(output=tmp_path, device=torch.device("cpu")))
    yield made
    made.close()


def steps(task, first: int, last: int, optimizer=None):
    optimizer = optimizer or task.optimizers()[0]
    for step in range(first, last):
        loss = task.loss(task.batch(step, range(task.samples(step))))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.end_step(step)
    return optimizer


def test_heads_are_mixed_by_their_gates() -> None:
    made = torch.Generator().manual_seed(0)
    q = torch.randn(2, 6, 111, 8, generator=made)
    k, v = (torch.randn(2, 3, 111, 8, generator=made) for _ in range(2))
    gates = torch.nn.Parameter(torch.tensor([[9.0, 9.0, 9.0], [0.0, 0.25, 1.0]]))
    window = make_method("sliding_window", {"sink": 3, "window": 20, "block_size": 16})
    method = MixedHeads(gates=gates, window=window)
    ctx = Context(TokenLayout.causal(111), layer=1, num_layers=2, num_heads=6, num_kv_heads=3, head_dim=8)
    out = hsa.attention(q, k, v, method, ctx)
    i, j = torch.arange(111)[:, None], torch.arange(111)
    near = (j <= i) & ((i - j < 20) | (j < 3))
    full = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    stream = scaled_dot_product_attention(q, k, v, attn_mask=near, enable_gqa=True)
    for head in range(6):
        a = gates[1, head // 2].item()
        torch.testing.assert_close(out[:, head], a * full[:, head] + (1 - a) * stream[:, head], rtol=1e-4, atol=1e-5)
    slope = torch.autograd.grad(out.sum(), gates)[0]
    assert bool((slope[0] == 0).all()) and bool((slope[1] != 0).all())
    method.switch[0] = True
    torch.testing.assert_close(hsa.attention(q, k, v, method, ctx), full, rtol=1e-4, atol=1e-5)


def test_only_gates_are_trained_and_stay_between_0_and_1(task) -> None:
    before = {name: p.clone() for name, p in task.model.named_parameters()}
    assert list(task.trained()) == ["gates.0"] and task.gates.shape == (4, 3)
    # At the start the mix is the model itself.
    batch = task.batch(0, [0])
    assert float(task.loss(batch)) == pytest.approx(0.05 * 12, abs=1e-6)
    steps(task, 0, 3)
    gates = task.gates.detach()
    assert bool((gates >= 0).all()) and bool((gates <= 1).all()) and len(gates.unique()) > 2
    assert all(torch.equal(p, before[name]) for name, p in task.model.named_parameters())
    with torch.no_grad():
        task.gates[0] = torch.tensor([-0.25, 0.5, 1.25])
    task.end_step(3)
    assert task.gates[0].tolist() == [0, 0.5, 1]


def test_the_loss_is_over_the_positions_that_choose_answers(task) -> None:
    batch = task.batch(0, [0])
    document = task.data.document(0)
    want = sorted(p for asked, _ in document.questions for p in asked)
    assert batch.asked[0].nonzero()[:, 0].tolist() == want
    with torch.no_grad():
        task.gates.fill_(0.5)
        own = task.model.model
        mixed = own(batch.ids, use_cache=False).last_hidden_state
        with task._taken_off():
            dense = own(batch.ids, use_cache=False).last_hidden_state
        difference = (mixed - dense)[0, want].square().mean()
        assert float(task.loss(batch)) == pytest.approx(float(difference) + 0.05 * 6, rel=1e-4)


def test_samples_of_a_batch_add_up_and_every_step_has_its_own(task) -> None:
    both, one, two = task.batch(0, [0, 1]), task.batch(0, [0]), task.batch(1, [0])
    # A batch of one: the second sample of the first step is the first of the second.
    assert torch.equal(both.ids, torch.cat([one.ids, two.ids])) and not torch.equal(one.ids, two.ids)
    assert task.weight(both) == 2 and task.weight(one) == 1
    with torch.no_grad():
        task.gates.copy_(torch.linspace(0.1, 0.9, 12).view(4, 3))
        found = [float(task.loss(batch)) for batch in (both, one, two)]
    assert found[0] == pytest.approx(found[1] + found[2], rel=1e-4)
    with torch.no_grad():
        assert float(task._difference(one)) == pytest.approx(found[1] - 0.05 * 6, rel=1e-4)


def test_settings_reach_window_data_and_profile(tmp_path: Path) -> None:
    made = recipe(sparsity=0.25, held_out_seed=7, seed=3).task(Run(output=tmp_path, device=torch.device("cpu")))
    window = made.recipe.window().params()
    assert (window["sink"], window["window"], window["block_size"]) == (4, 16, 16)
    assert (made.data.seed, made.held_out.seed) == (3, 7)
    assert (made.data.settings.split, made.held_out.settings.split) == ("train", "heldout")
    with torch.no_grad():
        made.gates.copy_(torch.linspace(0.1, 0.9, 12).view(4, 3))
    profile = made.profile()
    # Three of twelve key/value heads are on the window: those with the smallest gates.
    assert np.flatnonzero(profile.plans[0].choice[:, ::2].reshape(-1) == 0).tolist() == [3, 4, 5, 6, 7, 8, 9, 10, 11]
    made.close()


def test_what_is_saved_is_read_again(task, tmp_path: Path) -> None:
    steps(task, 0, 2)
    folder = tmp_path / "result"
    task.save(folder, {"loss": 1.0})
    published = folder / "duo_attention"
    assert json.loads((published / "config.json").read_text()) == {"sink_size": 4, "recent_size": 16}
    values = np.loadtxt(published / "full_attention_heads.tsv")
    np.testing.assert_allclose(values, task.gates.detach().numpy(), atol=1e-6)
    gates = task.gates.detach().flatten()
    task.close()
    assert hsa.patching.active_patch(task.model.model) is None
    profile = from_duo_attention(published, task.model, sparsity=0.5)
    choice = profile.plans[0].choice[:, ::2].reshape(-1)
    assert sorted(np.flatnonzero(choice)) == sorted(gates.argsort(stable=True)[:6].tolist())
    with hsa.load_bundle(task.model, folder) as loaded:
        ids = own_ids(task)
        with torch.no_grad():
            task.model(ids, use_cache=False)
        assert loaded.patch.method.name == "head_profile"
        assert np.array_equal(loaded.patch.method.profile.plans[0].choice, profile.plans[0].choice)


def own_ids(task) -> torch.Tensor:
    return task.data.document(0).token_ids


def test_a_resumed_training_ends_the_same(tmp_path: Path) -> None:
    run = Run(output=tmp_path, device=torch.device("cpu"))
    one, two = recipe().task(run), recipe().task(run)
    steps(one, 0, 3)
    optimizer = steps(two, 0, 2)
    three = recipe().task(run)
    with torch.no_grad():
        three.gates.copy_(two.gates)
    resumed = three.optimizers()[0]
    resumed.load_state_dict(optimizer.state_dict())
    steps(three, 2, 3, resumed)
    assert torch.equal(one.gates, three.gates)
    for task in (one, two, three):
        task.close()


def test_figures_are_finite_and_the_patch_stays(task) -> None:
    figures = task.evaluate()
    assert {"difference", "gates", "loss_dense", "loss_profile", "needles_dense", "needles_profile", "density"} == set(
        figures
    )
    assert figures["difference"] == pytest.approx(0, abs=1e-9) and 0 < figures["density"] < 1
    assert figures["loss_profile"] > figures["loss_dense"]
    assert hsa.patching.active_patch(task.model.model).method.name == "duo_training"
    with torch.no_grad():
        task.gates.fill_(0.5)
        assert task.evaluate()["loss_dense"] == figures["loss_dense"], "of the model without gates"


BAD = [
    ({"lora": LoraSettings(targets=("q_proj",))}, "`lora` must be left out"),
    ({"data": replace(DATA, source="standard_library")}, "`data.source` must be 'needles', got 'standard_library'"),
    ({"sparsity": 0.0}, "`sparsity` must be more than 0"),
    ({"weight": -1.0}, "`weight` must be 0 or more"),
    ({"recent": 0}, "`window` must be at least 1"),
]


@pytest.mark.parametrize("change, message", BAD, ids=lambda value: str(value)[:30])
def test_bad_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe(**change)


def test_the_shipped_file_is_a_recipe() -> None:
    assert isinstance(read_recipe("duo_gate"), DuoGate)


def test_answers_in_tokens_of_a_tokenizer() -> None:
    tokenizers, transformers = pytest.importorskip("tokenizers"), pytest.importorskip("transformers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.decoder = tokenizers.decoders.ByteLevel()
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    texts = [PasskeyData(replace(DATA, length=2000), None, 1).document(i).text.decode("latin-1") for i in range(3)]
    made.train_from_iterator(texts, trainer)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made)
    data = PasskeyData(replace(DATA, length=300, needles=4), fast, 1)
    ids, asked = data.asked(5)
    assert ids.shape == asked.shape == (300,) and bool(asked.any())
    answers, text = fast.decode(ids[asked.nonzero()[:, 0] + 1]), fast.decode(ids)
    for needle in data.document(5).needles:
        # Asked for where its statement is still there.
        assert (needle.value in answers) == (f"# key {needle.key}={needle.value}" in text)
    assert any(needle.value in answers for needle in data.document(5).needles)
    # In evaluations every token but those of answers counts in the loss, and each of those is an answer of its own.
    sample, places = data.scored(5)
    assert torch.equal(sample.ids, ids) and places == [[i] for i in range(300) if asked[i]]
    assert sample.weights[1:].tolist() == (~asked[:-1]).float().tolist()
    # Somewhere the tokens begin within a statement: what is left of it is no statement.
    cut = 0
    for length in range(230, 290):
        data = PasskeyData(replace(DATA, length=length, needles=4), fast, 1)
        ids, asked = data.asked(5)
        text, answers = fast.decode(ids), fast.decode(ids[asked.nonzero()[:, 0] + 1])
        for needle in data.document(5).needles:
            assert (needle.value in answers) == (f"# key {needle.key}={needle.value}" in text), length
            cut += f"={needle.value}" in text.split("# get")[0] and needle.value not in answers
    assert cut
    with pytest.raises(ValueError, match="must be a fast one"):
        PasskeyData(DATA, object(), 0)


def test_the_shipped_model_reads_bytes() -> None:
    model, tokenizer = load_language_model("byte_llama", "auto", torch.device("cpu"))
    assert tokenizer is None and not model.training
