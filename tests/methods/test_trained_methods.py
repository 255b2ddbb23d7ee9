"""MoBA, NSA and DSA in models: gates and indexers as they are trained, saved and read, and what is declined."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import Context, GateSet
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.method import Decline
from hf_sparse_attn.methods.dsa import Dsa, Indexer
from hf_sparse_attn.methods.nsa import Nsa, NsaGate
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.trained import dsa_attention, nsa_attention
from tests.support.tiny_lm import FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KV_HEADS, DIM = 4, 2, 8
MODEL = Fingerprint("tiny", "llama", 2, HEADS, KV_HEADS, DIM, "", "")
SETTINGS = {"nsa": {}, "dsa": {"heads": 16, "dim": 12, "rope_dim": 8}}
# Small enough that a prompt of a hundred tokens is sparse.
PARAMS = {
    "nsa": {"block_size": 8, "block_count": 4, "window_size": 12},
    "dsa": {"top_k": 20},
    "moba": {"chunk_size": 16, "top_k": 3},
}


def gates(name: str, model: object = MODEL) -> GateSet:
    """Gates far from their start, so that what they read matters."""
    made = GateSet(name, model, SETTINGS[name], seed=3)
    with torch.no_grad():
        for key, weight in made.named_parameters():
            if "norm" not in key:
                weight.mul_(4.0)
    return made


def params(name: str, model: object = MODEL) -> dict:
    return {**PARAMS[name], **({"gates": gates(name, model)} if name in SETTINGS else {})}


def call(n: int, batch: int = 2, start: int = 0) -> tuple[list[torch.Tensor], Context]:
    """q, k, v and hidden states, and a context that hands the last over."""
    draw = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, h, n, DIM, generator=draw) for h in (HEADS, KV_HEADS, KV_HEADS))
    hidden = torch.randn(batch, n, HEADS * DIM, generator=draw)[:, start:]
    ctx = Context.for_tensors(q[:, :, start:], k)
    return [q[:, :, start:], k, v, hidden], replace(ctx, inputs=LayerInputs(hidden=hidden))


# ------------------------------------------------------------------ as functions


@pytest.mark.parametrize("start", [0, 40])
def test_nsa_is_the_function_with_the_gates_of_the_layer(start: int) -> None:
    (q, k, v, hidden), ctx = call(90, start=start)
    own = gates("nsa")
    method = Nsa(gates=own, **PARAMS["nsa"])
    for layer in (0, 1):
        got = hsa.attention(q, k, v, method, replace(ctx, layer=layer, num_layers=2))
        # One row of weights for each branch and head.
        linear = own.layers[layer].linear
        weighed = torch.sigmoid(hidden @ linear.weight.T + linear.bias).transpose(1, 2).split(HEADS, 1)
        torch.testing.assert_close(got, nsa_attention(q, k, v, *weighed, **PARAMS["nsa"]), rtol=1e-5, atol=1e-6)


def test_gates_of_nsa_get_gradients() -> None:
    (q, k, v, _), ctx = call(90)
    own = gates("nsa")
    hsa.attention(q, k, v, Nsa(gates=own, **PARAMS["nsa"]), ctx).square().sum().backward()
    used = own.layers[0].linear.weight.grad
    assert used is not None and bool((used.abs().sum(1) > 0).all()) and own.layers[1].linear.weight.grad is None


def test_dsa_is_the_function_with_the_indexer_of_the_layer() -> None:
    (q, k, v, hidden), ctx = call(90)
    own = gates("dsa")
    for layer in (0, 1):
        got = hsa.attention(q, k, v, Dsa(gates=own, top_k=20), replace(ctx, layer=layer, num_layers=2))
        torch.testing.assert_close(got, dsa_attention(q, k, v, *own.layers[layer](hidden), 20), rtol=1e-5, atol=1e-6)
    pattern = Dsa(gates=own, top_k=20).pattern(q, k, ctx).validate()
    assert pattern.to_dense().sum(-1)[0, 0].tolist() == [min(t + 1, 20) for t in range(90)]


def test_the_indexer_is_that_of_the_paper() -> None:
    indexer = gates("dsa").layers[0]
    assert isinstance(indexer, Indexer)
    hidden = torch.randn(1, 50, HEADS * DIM, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        query, key, weight = indexer(hidden)
        angle = torch.arange(50)[:, None] * 10000.0 ** (-torch.arange(4) / 4)
        turn = torch.polar(torch.ones(50, 4), angle)

        def rotated(x: torch.Tensor) -> torch.Tensor:
            found = torch.complex(x[..., :4], x[..., 4:8]) * turn
            return torch.cat([found.real, found.imag, x[..., 8:]], -1)

        want = indexer.query(hidden).view(1, 50, 16, 12).transpose(1, 2)
        torch.testing.assert_close(query, rotated(want), rtol=1e-4, atol=1e-4)
        raw = indexer.key(hidden)
        normed = (raw - raw.mean(-1, True)) / (raw.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
        torch.testing.assert_close(key, rotated(normed), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(weight, indexer.weight(hidden).transpose(1, 2) / 4, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SETTINGS)
def test_calls_that_do_not_fit_are_declined(name: str) -> None:
    (q, k, v, hidden), ctx = call(90)
    method = hsa.get_method(name)(**params(name))
    with pytest.raises(hsa.MethodDoesNotApply, match=f"{name} reads the hidden states, which the call has not"):
        hsa.attention(q, k, v, method)
    narrow = replace(ctx, inputs=LayerInputs(hidden=hidden[..., :16]))
    with pytest.raises(hsa.MethodDoesNotApply, match="are for 32 hidden states"):
        hsa.attention(q, k, v, method, narrow)
    with pytest.raises(ValueError, match=f"`gates` must be a folder.* trained for {name}, got none"):
        hsa.attention(q, k, v, hsa.get_method(name)(), ctx)


def test_dsa_declines_a_part_of_a_prompt() -> None:
    (q, k, _, _), ctx = call(90, start=40)
    found = hsa.get_method("dsa")(**params("dsa")).pattern(q, k, ctx)
    assert isinstance(found, Decline) and "those of the first are in a cache" in found.reason


BAD = [
    ("nsa", {"depth": 1}, "gates of nsa take the settings width; got depth"),
    ("nsa", {"width": 0}, "`width` must be at least 1, got 0"),
    ("dsa", {"rope_dim": 7}, "`rope_dim` must be even and at most `dim` = 128, got 7"),
    ("dsa", {"dim": 32}, "`rope_dim` must be even and at most `dim` = 32, got 64"),
    ("dsa", {"rope_theta": 1}, "`rope_theta` must be a number more than 1, got 1"),
    ("dsa", {"size": 1}, "gates of dsa take the settings heads, dim, rope_dim, rope_theta, width; got size"),
]


@pytest.mark.parametrize("name, settings, message", BAD, ids=str)
def test_bad_settings_of_gates_are_named(name: str, settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSet(name, MODEL, settings)


@pytest.mark.parametrize("name", ["nsa", "dsa"])
def test_the_least_density_is_what_is_kept(name: str) -> None:
    (q, k, _, _), ctx = call(90)
    method = hsa.get_method(name)(**params(name))
    assert method.pattern(q, k, ctx).density("causal") == pytest.approx(method.least_density(ctx), rel=1e-6)


# ------------------------------------------------------------------ in models


def logits(model, ids, **kwargs):
    with torch.no_grad():
        return model(ids, use_cache=False, **kwargs).logits


@pytest.mark.parametrize("name", PARAMS)
def test_full_budget_is_the_model_itself(name: str) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 111)
    usual = logits(model, ids)
    full = hsa.get_method(name).full_budget()
    if name in SETTINGS:
        full["gates"] = gates(name, model)
        for gate in full["gates"].layers if name == "nsa" else ():
            assert isinstance(gate, NsaGate)
            with torch.no_grad():
                gate.linear.weight.zero_()
                gate.linear.bias.view(3, -1).copy_(torch.tensor([[-200.0], [200.0], [-200.0]]).expand(3, HEADS))
    with hsa.patch(model, name, strict=True, min_tokens=0, **full) as patch:
        torch.testing.assert_close(logits(model, ids), usual, rtol=1e-4, atol=1e-4)
        assert patch.report().density == pytest.approx(1.0)
    assert torch.equal(logits(model, ids), usual)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_folder_of_gates_is_the_live_set(name: str, tmp_path: Path) -> None:
    model, ids = FAMILIES["qwen3"]("sdpa"), tokens(2, 150)
    gates(name, model).save(tmp_path)
    found = []
    for given in (str(tmp_path), gates(name, model)):
        with hsa.patch(model, name, gates=given, strict=True, min_tokens=0, **PARAMS[name]) as patch:
            found.append(logits(model, ids))
            assert patch.report().density < 0.9 and all(r.sparse_calls == 1 for r in patch.report().layers)
    assert torch.equal(*found)
    assert not torch.allclose(found[0], logits(model, ids), atol=1e-2)


@pytest.mark.parametrize("name", PARAMS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(name: str, side: str) -> None:
    model = FAMILIES["llama"]("sdpa")
    ids, mask, singles = padded([150, 91, 150], side)
    with hsa.patch(model, name, strict=True, min_tokens=0, **params(name, model)):
        batch = logits(model, ids, attention_mask=mask, position_ids=positions(mask))
        for row, single in enumerate(singles):
            alone = logits(model, single)[0]
            torch.testing.assert_close(batch[row][mask[row].bool()], alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SETTINGS)
def test_without_gates_nothing_is_patched(name: str) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 50)
    usual = logits(model, ids)
    with pytest.raises(ValueError, match=f"`gates` must be a folder.* trained for {name}, got none"):
        hsa.patch(model, name)
    other = gates(name, FAMILIES["qwen3"]("sdpa"))
    with pytest.raises(ValueError, match="model_class: Qwen3Model here, LlamaModel in the model"):
        hsa.patch(model, name, gates=other)
    assert torch.equal(logits(model, ids), usual)
    with pytest.raises(ValueError, match="must be patched"):
        hsa.unpatch(model)


@pytest.mark.parametrize("name", PARAMS)
def test_chunks_of_a_prompt(name: str) -> None:
    """Those after the first are sparse where the method needs nothing of the tokens before, else dense and told."""
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 160)
    with hsa.patch(model, name, min_tokens=0, **params(name, model)) as patch, torch.no_grad():
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :96])
        rest = model(ids[:, 96:], past_key_values=first.past_key_values).logits
        layer = patch.report().layers[0]
    if name == "dsa":
        (reason,) = layer.reasons
        assert "those of the first are in a cache" in reason and layer.sparse_calls == 2
    else:
        assert layer.sparse_calls == 3 and not layer.reasons
        torch.testing.assert_close(rest, whole[:, 96:], rtol=1e-3, atol=1e-3)


def test_what_dense_calls_of_nsa_lack_is_told() -> None:
    model = FAMILIES["llama"]("sdpa")
    with hsa.patch(model, "nsa", min_tokens=0, **params("nsa", model)) as patch:
        logits(model, tokens(1, 90))
        assert any("lack the branches and gates" in note for note in patch.notes)


@pytest.mark.parametrize("name", PARAMS)
def test_gradients_pass_and_recomputation_chooses_the_same(name: str) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 111)
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with hsa.patch(model, name, strict=True, min_tokens=0, **params(name, model)):
            model.zero_grad()
            model(ids, use_cache=False, labels=ids).loss.backward()
        found.append(weight.grad.clone())
    assert bool(found[0].abs().sum() > 0)
    torch.testing.assert_close(*found)
