"""SeerAttention: the gate against a plain one, what it keeps, and models that run with it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import Context, GateSet, TokenLayout
from hf_sparse_attn.context import LayerInputs
from hf_sparse_attn.method import Decline
from hf_sparse_attn.methods.seer_attention import AttnGate, SeerAttention
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from tests.support.tiny_lm import FAMILIES, padded, positions, tokens

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS, KV_HEADS, DIM, SIZE = 4, 2, 8, 16
MODEL = Fingerprint("tiny", "llama", 2, HEADS, KV_HEADS, DIM, "", "")


def gates(hidden: int = 12, seed: int = 0) -> GateSet:
    return GateSet("seer_attention", MODEL, {"block_size": SIZE, "hidden": hidden, "rope_theta": 50.0}, seed=seed)


def call(n: int, batch: int = 2, start: int = 0, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, Context]:
    made = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, HEADS, n - start, DIM, generator=made)
    k = torch.randn(batch, KV_HEADS, n, DIM, generator=made)
    sizes = dict(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
    return q, k, Context(TokenLayout.causal(n).continued(start), inputs=LayerInputs(q=q, k=k), **sizes)


def rotated(gate: AttnGate, x: torch.Tensor, position: int) -> torch.Tensor:
    half, turn = gate.hidden // 2, complex(0, 1)
    angle = torch.tensor([position * gate.theta ** (-i / half) for i in range(half)], dtype=torch.float64)
    turned = (x[:half] + turn * x[half:]) * torch.exp(turn * angle)
    return torch.cat([turned.real, turned.imag])


def plain_logits(gate: AttnGate, q: torch.Tensor, k: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Logits of the blocks, head by head and block by block, as the paper puts it; not causal."""
    n, group = k.shape[2], q.shape[1] // k.shape[1]
    out = torch.zeros(q.shape[0], q.shape[1], -(-q.shape[2] // SIZE), -(-n // SIZE), dtype=torch.float64)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(out.shape[2]):
                one = q[b, h, i * SIZE : (i + 1) * SIZE].double().mean(0)
                one = one @ gate.query[h].double() if gate.query is not None else one
                one = rotated(gate, one, start + i * SIZE)
                for j in range(out.shape[3]):
                    block = k[b, h // group, j * SIZE : (j + 1) * SIZE].double()
                    pooled = torch.cat([block.max(0).values, block.min(0).values, block.mean(0)])
                    out[b, h, i, j] = (
                        one @ rotated(gate, pooled @ gate.key[h].double(), j * SIZE) / math.sqrt(gate.hidden)
                    )
    return out


@pytest.mark.parametrize("hidden", [12, DIM], ids=["projected", "as_wide_as_a_head"])
@pytest.mark.parametrize("n, start", [(111, 0), (64, 0), (111, 48), (5, 0)])
def test_the_gate_is_the_plain_one(hidden: int, n: int, start: int) -> None:
    gate = gates(hidden).layers[0]
    q, k, _ = call(n, start=start)
    with torch.no_grad():
        found = gate.queries(q, start) @ gate.keys(k).mT
        want = plain_logits(gate, q, k, start)
    assert (gate.query is None) == (hidden == DIM)
    torch.testing.assert_close(found.double(), want, rtol=1e-4, atol=1e-5)


def test_positions_of_a_long_prompt_are_exact() -> None:
    gate, start = gates().layers[0], 10**7 + 3
    q, _, _ = call(SIZE, batch=1)
    with torch.no_grad():
        found = gate.queries(q, start)
        for h in range(HEADS):
            want = rotated(gate, q[0, h].double().mean(0) @ gate.query[h].double(), start) / math.sqrt(gate.hidden)
            torch.testing.assert_close(found[0, h, 0].double(), want, rtol=1e-4, atol=1e-5)


def causal_logits(found: SeerAttention, q: torch.Tensor, k: torch.Tensor, start: int = 0) -> torch.Tensor:
    with torch.no_grad():
        logits = plain_logits(found.gates.layers[0], q, k, start)
    for i in range(logits.shape[2]):
        logits[:, :, i, (start + i * SIZE + SIZE - 1) // SIZE + 1 :] = -torch.inf
    return logits


# From 40 on a block of queries begins within a block of keys, and lies in two.
@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("density", [0.1, 0.3, 0.75, 1.0])
def test_the_best_blocks_are_kept_and_the_last_rows_whole(density: float, start: int) -> None:
    method = SeerAttention(gates=gates(), density=density)
    q, k, ctx = call(250, start=start)
    keep, logits = method.pattern(q, k, ctx).block_map(), causal_logits(method, q, k, start)
    rows, blocks = logits.shape[2:]
    most = max(1, math.floor((1 - math.sqrt(1 - density)) * blocks + 1e-6))
    for i in range(rows):
        begin, end = (start + i * SIZE) // SIZE, min((start + i * SIZE + SIZE - 1) // SIZE, blocks - 1)
        if i >= rows - 2:
            assert bool(keep[:, :, i, : end + 1].all()) and not bool(keep[:, :, i, end + 1 :].any())
            continue
        row = logits[:, :, i].clone()
        row[..., [begin, end]] = torch.inf
        best = row.topk(min(max(most, end - begin + 1), end + 1), -1).indices
        assert torch.equal(torch.zeros_like(row, dtype=torch.bool).scatter(-1, best, True), keep[:, :, i])


def test_a_share_that_is_whole_loses_no_block_to_rounding() -> None:
    # 1 - sqrt(1 - 0.36) is a fifth, and in floating point a little less.
    q, k, ctx = call(10 * SIZE)
    keep = SeerAttention(gates=gates(), density=0.36).pattern(q, k, ctx).block_map()
    assert keep.sum(-1)[0, 0].tolist() == [1, 2, 2, 2, 2, 2, 2, 2, 9, 10]


def test_the_gate_is_that_of_the_layer_and_reads_what_was_before_positions() -> None:
    q, k, ctx = call(250)
    own, swapped = gates(), gates()
    swapped.layers = torch.nn.ModuleList(reversed(swapped.layers))
    first, second = (
        SeerAttention(gates=own, density=0.3).pattern(q, k, replace(ctx, layer=i, num_layers=2)).block_map()
        for i in (0, 1)
    )
    assert not torch.equal(first, second)
    # After positions queries and keys are others, which the gate does not look at.
    late_q, late_k, _ = call(250, seed=1)
    found = SeerAttention(gates=swapped, density=0.3).pattern(late_q, late_k, replace(ctx, num_layers=2))
    assert torch.equal(found.block_map(), second)


def test_the_knob_and_its_least_density() -> None:
    own = gates()
    assert SeerAttention(gates=own).density == 0.25
    assert SeerAttention(gates=own, threshold=0.1).turned(0.5) == SeerAttention(gates=own, density=0.5)
    for density in (0.05, 0.3, 1.0):
        method = SeerAttention(gates=own, density=density)
        for n in (40, 250, 800):
            q, k, ctx = call(n, batch=1)
            assert 0 < method.least_density(ctx) <= method.pattern(q, k, ctx).density("causal")
    assert SeerAttention(gates=own, threshold=0.1).least_density(ctx) == 0


def test_starting_weights_are_uniform_within_the_bound_of_glorot() -> None:
    gate = gates().layers[0]
    for weight in (gate.key, gate.query):
        bound = math.sqrt(6 / (weight.shape[1] + weight.shape[2]))
        assert 0.9 * bound < float(weight.detach().abs().max()) <= bound


@pytest.mark.parametrize("start", [0, 40])
@pytest.mark.parametrize("threshold", [0.0, 0.08, 0.3])
def test_blocks_above_the_threshold_are_kept(threshold: float, start: int) -> None:
    method = SeerAttention(gates=gates(), threshold=threshold)
    q, k, ctx = call(250, start=start)
    keep, logits = method.pattern(q, k, ctx).block_map(), causal_logits(method, q, k, start)
    want = logits.softmax(-1) > threshold
    for i in range(want.shape[2]):
        want[:, :, i, (start + i * SIZE) // SIZE] = True
        want[:, :, i, min((start + i * SIZE + SIZE - 1) // SIZE, want.shape[3] - 1)] = True
    want[:, :, -2:] |= logits[:, :, -2:] > -torch.inf
    assert torch.equal(keep, want)


def test_strips_choose_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, ctx = call(250)
    methods = [SeerAttention(gates=gates(), density=0.3), SeerAttention(gates=gates(), threshold=0.08)]
    whole = [m.pattern(q, k, ctx).to_dense() for m in methods]
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    assert all(torch.equal(m.pattern(q, k, ctx).to_dense(), w) for m, w in zip(methods, whole, strict=True))


def test_heads_have_gates_of_their_own() -> None:
    q, k, ctx = call(250, batch=1)
    same = LayerInputs(q=q[:, :1].expand(-1, HEADS, -1, -1), k=k[:, :1].expand(-1, KV_HEADS, -1, -1))
    keep = (
        SeerAttention(gates=gates(), density=0.3).pattern(q, k, Context(**{**vars(ctx), "inputs": same})).block_map()
    )
    assert not torch.equal(keep[:, 0], keep[:, 1])


def test_calls_without_what_it_reads_are_declined() -> None:
    method = SeerAttention(gates=gates())
    q, k, ctx = call(111, start=48)
    for given, message in (
        (None, "reads the keys before positions and queries before positions, which the call has not"),
        (LayerInputs(hidden=q), "reads the keys before"),
        (LayerInputs(q=q, k=k[:, :, 48:]), "the last 63 of 111: the others are in a cache"),
    ):
        found = method.pattern(q, k, replace(ctx, inputs=given))
        assert isinstance(found, Decline) and message in found.reason
    half = replace(ctx, num_heads=2, num_kv_heads=1)
    assert "gates are of 4 heads, the call is of 2" in method.pattern(q, k, half).reason


BAD = [
    ({"density": 0.0}, ValueError, "`density` must be more than 0"),
    ({"density": 0.5, "threshold": 0.1}, ValueError, "`density` must be None when `threshold`"),
    ({"threshold": 1.0}, ValueError, "`threshold` must be at least 0 and less than 1, got 1.0"),
    ({"threshold": "low"}, TypeError, "`threshold` must be a number"),
]


@pytest.mark.parametrize("params, error, message", BAD, ids=str)
def test_bad_parameters_are_named(params: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SeerAttention(gates="", **params)


BAD_SETTINGS = [
    ({"hidden": 7}, "`hidden` must be even, got 7"),
    ({"block_size": 48}, "`block_size` must be a power of two"),
    ({"rope_theta": 1}, "`rope_theta` must be a number more than 1, got 1"),
    ({"depth": 1}, "take the settings block_size, hidden, rope_theta; got depth"),
]


@pytest.mark.parametrize("settings, message", BAD_SETTINGS, ids=str)
def test_bad_settings_are_named(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GateSet("seer_attention", MODEL, settings)


# ------------------------------------------------------------------ in models


def trained(model, folder: Path, seed: int = 2) -> str:
    GateSet("seer_attention", model, {"block_size": SIZE, "hidden": 12}, seed=seed).save(folder)
    return str(folder)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_a_folder_of_gates_is_the_live_set(name: str, tmp_path: Path) -> None:
    model, ids = FAMILIES[name]("sdpa"), tokens(2, 150)
    folder = trained(model, tmp_path)
    found = []
    for given in (folder, GateSet.load(folder)):
        with hsa.patch(model, "seer_attention", gates=given, density=0.3, strict=True, min_tokens=0) as patch:
            with torch.no_grad():
                found.append(model(ids, use_cache=False).logits)
            assert patch.report().density < 0.7 and all(r.sparse_calls == 1 for r in patch.report().layers)
            assert isinstance(patch.report().to_dict()["params"]["gates"], str)
    assert torch.equal(*found)
    with torch.no_grad():
        usual = model(ids, use_cache=False).logits
    assert not torch.allclose(found[0], usual, atol=1e-2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_is_its_rows(side: str, tmp_path: Path) -> None:
    model = FAMILIES["qwen3"]("sdpa")
    folder = trained(model, tmp_path)
    ids, mask, singles = padded([150, 91, 150], side)
    with hsa.patch(model, "seer_attention", gates=folder, density=0.3, strict=True, min_tokens=0), torch.no_grad():
        batch = model(ids, attention_mask=mask, position_ids=positions(mask), use_cache=False).logits
        for row, single in enumerate(singles):
            alone = model(single, use_cache=False).logits[0]
            torch.testing.assert_close(batch[row][mask[row].bool()], alone, rtol=1e-3, atol=1e-3)


def test_full_budget_is_the_model_itself(tmp_path: Path) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 111)
    with torch.no_grad():
        usual = model(ids, use_cache=False).logits
        with hsa.patch(
            model, "seer_attention", gates=trained(model, tmp_path), density=1.0, strict=True, min_tokens=0
        ):
            torch.testing.assert_close(model(ids, use_cache=False).logits, usual, rtol=1e-4, atol=1e-4)


def test_a_chunk_after_a_cache_is_dense_and_says_so(tmp_path: Path) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(1, 160)
    with hsa.patch(model, "seer_attention", gates=trained(model, tmp_path), min_tokens=0) as patch, torch.no_grad():
        first = model(ids[:, :96])
        model(ids[:, 96:], past_key_values=first.past_key_values)
        (reason, count), *rest = patch.report().layers[0].reasons.items()
    assert count == 1 and not rest and "the last 64 of 160: the others are in a cache" in reason
    assert patch.report().layers[0].sparse_calls == 1


def test_gradients_pass_and_recomputation_chooses_the_same(tmp_path: Path) -> None:
    model, ids = FAMILIES["llama"]("sdpa"), tokens(2, 111)
    weight = model.model.layers[0].self_attn.q_proj.weight
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.train()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        with hsa.patch(model, "seer_attention", gates=trained(model, tmp_path), strict=True, min_tokens=0):
            model.zero_grad()
            model(ids, use_cache=False, labels=ids).loss.backward()
        found.append(weight.grad.clone())
    assert bool(found[0].abs().sum() > 0)
    torch.testing.assert_close(*found)


def test_profiles_with_gates_check_the_model(tmp_path: Path) -> None:
    from hf_sparse_attn.profiles.measurements import label_of

    model = FAMILIES["llama"]("sdpa")
    method = SeerAttention(gates=trained(FAMILIES["qwen3"]("sdpa"), tmp_path))
    assert "seer_attention" in label_of(method)
    with pytest.raises(ValueError, match="model_class: Qwen3Model here, LlamaModel in the model"):
        hsa.patch(model, method)
