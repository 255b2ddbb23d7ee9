"""VSA against a plain dense reference of both branches, and the hidden states that Wan hands it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn import BlockPattern, Context, Decline, TokenLayout
from hf_sparse_attn.context import LayerInputs, Segment
from hf_sparse_attn.method import MethodDoesNotApply
from hf_sparse_attn.methods import vsa as file
from hf_sparse_attn.methods.vsa import Vsa
from hf_sparse_attn.pattern.video_tiles import cut_video, video_tiles
from hf_sparse_attn.session import Session
from hf_sparse_attn.sharing.fingerprint import Fingerprint
from hf_sparse_attn.sharing.gates import GateSet
from tests.support import tiny_wan
from tests.support.golden import golden
from tests.support.tiny_wan import run

pytestmark = pytest.mark.usefixtures("one_thread")

# Grids with every kind of edge, tiles that fill blocks, straddle them, or are larger than the canvas; and text.
CASES = {
    "ragged": ((9, 10, 7), (4, 4, 4), (0, 0), 0.3),
    "whole": ((4, 8, 8), (4, 4, 4), (0, 0), 0.3),
    "image": ((1, 11, 13), (4, 4, 4), (0, 0), 0.2),
    "three frames": ((3, 9, 5), (4, 4, 4), (0, 0), 0.5),
    "tiny rests": ((5, 9, 5), (4, 4, 4), (0, 0), 0.4),
    "odd tile": ((5, 7, 6), (2, 3, 5), (0, 0), 0.3),
    "large tile": ((9, 9, 9), (4, 8, 8), (0, 0), 0.4),
    "text after": ((5, 6, 7), (4, 4, 4), (0, 21), 0.3),
    "text both": ((5, 5, 7), (2, 2, 4), (9, 3), 0.15),
    "one": ((1, 1, 1), (4, 4, 4), (0, 0), 0.1),
}
HEADS, KV_HEADS, DIM = 4, 2, 8
WIDTH = HEADS * DIM


def fingerprint(layers: int = 1, heads: int = HEADS, dim: int = DIM) -> Fingerprint:
    return Fingerprint("Any", "wan", layers, heads, heads, dim, "", "")


def gate_set(layers: int = 1, zero: bool = False, dtype: torch.dtype = torch.float32) -> GateSet:
    made = GateSet("vsa", fingerprint(layers)).to(dtype)
    if not zero:
        draw = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.randn(p.shape, generator=draw, dtype=dtype) * 0.3)
    return made


def call(name: str, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Context, list[torch.Tensor]]:
    """Context, and q, k, v and hidden states."""
    grid, _, (before, after), _ = CASES[name]
    layout = TokenLayout.video(*grid, text_before=before, text_after=after)
    draw = torch.Generator().manual_seed(1)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw, dtype=dtype)

    n = layout.kv_len
    ctx = Context(layout, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM)
    q, k, v = (tensor(batch, n, heads, DIM).transpose(1, 2) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return ctx, [q, k, v, tensor(batch, n, WIDTH)]


def members(grid: tuple[int, int, int], tile: tuple[int, int, int]) -> list[list[int]]:
    """Tokens of each tile, tiles and tokens in raster order."""
    ranges = [[range(i, min(i + t, n)) for i in range(0, n, t)] for n, t in zip(grid, tile, strict=True)]
    return [[(f * grid[1] + h) * grid[2] + w for f, h, w in product(*three)] for three in product(*ranges)]


def reference(name: str, q, k, v, gate=None, scale: float | None = None):
    """Mask [batch, heads, tokens, tokens] and output, token by token, with loops over tiles."""
    grid, tile, (before, _), density = CASES[name]
    scale = DIM**-0.5 if scale is None else scale
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    own = [[before + i for i in tokens] for tokens in members(grid, tile)]
    q_c, k_c, v_c = (torch.stack([x[:, :, i].mean(2) for i in own], 2) for x in (q, k, v))
    scores = q_c @ k_c.mT * scale
    count = max(1, min(len(own), math.ceil(round(density * len(own), 6))))
    best = scores.topk(count).indices
    mask = torch.ones(*q.shape[:3], q.shape[2], dtype=torch.bool)
    video = range(before, before + math.prod(grid))
    mask[:, :, video[0] : video[-1] + 1, video[0] : video[-1] + 1] = False
    for b, h, i in product(range(q.shape[0]), range(q.shape[1]), range(len(own))):
        for j in best[b, h, i].tolist():
            mask[b, h, torch.tensor(own[i])[:, None], torch.tensor(own[j])] = True
    logits = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    out = logits.softmax(-1) @ v
    if gate is not None:
        coarse = scores.softmax(-1) @ v_c
        spread = torch.zeros_like(out)
        for i, tokens in enumerate(own):
            spread = spread.index_add(2, torch.tensor(tokens), coarse[:, :, i : i + 1].expand(-1, -1, len(tokens), -1))
        out = out + spread * gate.unflatten(2, (q.shape[1], -1)).transpose(1, 2)
    return mask, out


def method(name: str, **params) -> Vsa:
    return Vsa(density=CASES[name][3], tile=CASES[name][1], **params)


# ------------------------------------------------------------------ tiles


def test_the_published_partition() -> None:
    data = golden("vsa")
    cut = cut_video((9, 10, 7), (4, 4, 4))
    counts = torch.bincount(cut.tile_at)
    assert len(counts) == 18 and int(counts.min()) == 6
    place = cut.coordinates @ torch.tensor([6, 2, 1])
    want = torch.from_numpy(data["order"]).split(data["counts"].tolist())
    for tile, tokens in enumerate(cut.order.split(counts.tolist())):
        assert torch.equal(tokens, want[int(place[tile])])


def test_the_canvas_of_wan_has_the_published_counts() -> None:
    tiles = video_tiles(TokenLayout.video(21, 30, 52), (4, 4, 4))
    assert tiles.tiles == 624 and sum(tiles.counts) == 21 * 30 * 52 and tiles.block == 64
    kept = {sparsity: Vsa(density=1 - sparsity).count(624) for sparsity in (0.8, 0.9, 0.95)}
    assert kept == {0.8: 125, 0.9: 63, 0.95: 32}
    # In floating point a hundred times 0.07 is more than 7.
    assert Vsa(density=0.7).count(10) == 7 and Vsa(density=0.07).count(100) == 7
    assert Vsa(density=0.001).count(10) == 1 and Vsa(density=1).count(10) == 10


@pytest.mark.parametrize("name", CASES)
def test_means_are_over_the_tokens_that_a_tile_has(name: str) -> None:
    ctx, (q, *_) = call(name)
    tiles = video_tiles(ctx.layout, CASES[name][1])
    # With slots of padding in it a mean of ones would be less than one.
    assert torch.equal(tiles.means(torch.ones_like(q)), torch.ones(2, HEADS, tiles.tiles, DIM))
    before = CASES[name][2][0]
    want = sorted(
        (q[:, :, [before + i for i in own]].mean(2) for own in members(*CASES[name][:2])), key=lambda x: x.sum()
    )
    got = sorted(tiles.means(q).unbind(2), key=lambda x: x.sum())
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


# ------------------------------------------------------------------ both branches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_both_branches_equal_the_dense_reference(name: str, dtype: torch.dtype) -> None:
    ctx, (q, k, v, hidden) = call(name, dtype)
    gates = gate_set(dtype=dtype)
    mask, plain = reference(name, q, k, v)
    with torch.no_grad():
        want = reference(name, q, k, v, gates.layers[0](hidden))[1]
        got = hsa.attention(q, k, v, method(name, gates=gates), replace(ctx, inputs=LayerInputs(hidden)))
    pattern = method(name).pattern(q, k, ctx)
    assert isinstance(pattern, BlockPattern)
    assert torch.equal(pattern.validate().to_dense(), mask)
    assert torch.equal(method(name).attention(q, k, v, ctx, lambda *given: (given[3], None))[0].to_dense(), mask)
    room = 64 * torch.finfo(dtype).eps
    torch.testing.assert_close(hsa.attention(q, k, v, method(name), ctx), plain, rtol=room, atol=room)
    torch.testing.assert_close(got, want, rtol=room, atol=room)
    assert not torch.allclose(got, plain, atol=1e-2)


def test_a_scale_of_its_own_counts_in_both_branches() -> None:
    ctx, (q, k, v, hidden) = call("ragged", torch.float64)
    gates = gate_set(dtype=torch.float64)
    # Below zero the order of the scores is the other way round.
    for scale in (0.9, -0.2):
        with torch.no_grad():
            want = reference("ragged", q, k, v, gates.layers[0](hidden), scale)[1]
            own = replace(ctx, scale=scale, inputs=LayerInputs(hidden))
            got = hsa.attention(q, k, v, method("ragged", gates=gates), own)
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ["ragged", "odd tile", "text both"])
def test_gradients_equal_those_of_the_reference(name: str) -> None:
    ctx, given = call(name, torch.float64, batch=1)
    gates = gate_set(dtype=torch.float64)
    given = [x.requires_grad_() for x in given]
    wanted = [*given, *gates.parameters()]
    q, k, v, hidden = given
    weight = torch.randn(1, HEADS, q.shape[2], DIM, dtype=torch.float64)
    want = torch.autograd.grad((reference(name, q, k, v, gates.layers[0](hidden))[1] * weight).sum(), wanted)
    own = replace(ctx, inputs=LayerInputs(hidden))
    got = torch.autograd.grad((hsa.attention(q, k, v, method(name, gates=gates), own) * weight).sum(), wanted)
    for a, b in zip(got, want, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b)


def test_zero_gates_are_plain_top_k_and_no_gates_compute_no_pooled_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, (q, k, v, hidden) = call("ragged")
    plain = hsa.attention(q, k, v, method("ragged"), ctx)
    zero = method("ragged", gates=gate_set(zero=True))
    assert torch.equal(hsa.attention(q, k, v, zero, replace(ctx, inputs=LayerInputs(hidden))), plain)
    assert zero.reads == {"hidden"} and not method("ragged").reads

    def never(*_: object) -> None:
        raise AssertionError("no coarse branch without gates")

    monkeypatch.setattr(file, "_coarse", never)
    assert torch.equal(hsa.attention(q, k, v, method("ragged"), ctx), plain)
    with pytest.raises(AssertionError, match="no coarse branch"):
        hsa.attention(q, k, v, zero, replace(ctx, inputs=LayerInputs(hidden)))


def test_the_log_sum_exp_is_that_of_the_fine_branch() -> None:
    ctx, (q, k, v, hidden) = call("text both")
    own = replace(ctx, inputs=LayerInputs(hidden))
    found = hsa.attention(q, k, v, method("text both", gates=gate_set()), own, return_lse=True)[1]
    assert torch.equal(found, hsa.attention(q, k, v, method("text both"), ctx, return_lse=True)[1])


def test_gates_from_a_folder_compute_in_the_type_of_the_model(tmp_path: Path) -> None:
    ctx, given = call("ragged")
    gates = gate_set()
    gates.save(tmp_path)
    q, k, v, hidden = (x.bfloat16() for x in given)
    own = replace(ctx, inputs=LayerInputs(hidden))
    with torch.no_grad():
        want = hsa.attention(q, k, v, method("ragged", gates=gates.bfloat16()), own)
        assert torch.equal(hsa.attention(q, k, v, method("ragged", gates=str(tmp_path)), own), want)


@pytest.mark.parametrize("name", CASES)
def test_all_tiles_are_dense_attention(name: str) -> None:
    ctx, (q, k, v, _) = call(name)
    got = hsa.attention(q, k, v, replace(method(name), density=1.0), ctx)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_equal_scores_go_to_the_earlier_tile() -> None:
    ctx = Context(TokenLayout.video(4, 8, 16), num_heads=1, num_kv_heads=1, head_dim=DIM)
    zeros = torch.zeros(1, 1, 512, DIM)
    pattern = Vsa(density=0.25).pattern(zeros, zeros, ctx)
    assert torch.equal(pattern.starts.view(8, 2), torch.tensor([[0, 64]] * 8, dtype=torch.int32))


@pytest.mark.parametrize("name", CASES)
def test_strips_of_rows_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ctx, (q, k, _, _) = call(name)
    whole = method(name).pattern(q, k, ctx)
    monkeypatch.setattr("hf_sparse_attn.pattern.layout._SCORES_AT_A_TIME", 1)
    strips = method(name).pattern(q, k, ctx).validate()
    for field in ("indptr", "starts", "tile_ids", "tiles", "q_order"):
        assert torch.equal(getattr(strips, field), getattr(whole, field)), field


def test_a_tile_that_divides_the_canvas_needs_no_mask() -> None:
    ctx, (q, k, _, _) = call("whole")
    pattern = method("whole").pattern(q, k, ctx)
    assert len(pattern.tiles) == 1 and not pattern.tile_ids.any() and not (pattern.starts % 64).any()
    assert pattern.density() == pytest.approx(0.5)


@pytest.mark.parametrize("name", CASES)
def test_the_least_density_is_not_above_the_density(name: str) -> None:
    ctx, (q, k, _, _) = call(name)
    found = method(name).pattern(q, k, ctx).density()
    assert method(name).least_density(ctx) <= found + 1e-9


def test_bad_parameters_are_named() -> None:
    for params, error, message in [
        ({"density": 0}, ValueError, "`density` must be more than 0 and at most 1, got 0"),
        ({"tile": (4, 4)}, ValueError, r"`tile` must be \(frames, height, width\)"),
        ({"tile": 4}, TypeError, "`tile` must be .* of type int"),
        ({"tile": (4, 0, 4)}, ValueError, "`width|height` must be at least 1, got 0|`tile`"),
        ({"gates": 3}, TypeError, "`gates` must be a folder, a Hub id or a GateSet, got 3"),
    ]:
        with pytest.raises(error, match=message):
            Vsa(**params)
    with pytest.raises(ValueError, match="gates of vsa take the settings"):
        GateSet("vsa", fingerprint(), {"rank": 4})


def test_calls_that_it_cannot_serve_are_declined() -> None:
    ctx, (q, k, v, hidden) = call("ragged")
    gated = method("ragged", gates=gate_set())

    def reason(made: Vsa, own: Context) -> str:
        found = made.attention(q, k, v, own, lambda *_: pytest.fail("must not run"))
        assert isinstance(found, Decline)
        return found.reason

    assert "reads the hidden states, which the call has not" in reason(gated, ctx)
    assert "are for 32 hidden states and 32 values" in reason(
        gated, replace(ctx, inputs=LayerInputs(hidden[..., :30]))
    )
    two = TokenLayout.segments([Segment("video", 315, (9, 5, 7))] * 2, causal=False)
    assert "exactly one video segment" in reason(method("ragged"), replace(ctx, layout=two))
    assert "all tokens as queries" in reason(method("ragged"), replace(ctx, layout=ctx.layout.continued(70)))
    assert method("ragged").pattern(q, k, replace(ctx, layout=two)).reason
    with pytest.raises(MethodDoesNotApply, match="reads the hidden states"):
        hsa.attention(q, k, v, gated, ctx)
    with pytest.raises(ValueError, match="`gates` must be of more than 3 layers"):
        hsa.attention(q, k, v, gated, replace(ctx, num_layers=9, layer=3, inputs=LayerInputs(hidden)))


# ------------------------------------------------------------------ on a model

SPARSE = {"backend": "torch_reference", "min_tokens": 0, "density": 0.3, "strict": True}


def wan_gates(model, zero: bool = False) -> GateSet:
    made = GateSet("vsa", model)
    if not zero:
        draw = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in made.parameters():
                p.copy_(torch.randn(p.shape, generator=draw) * 0.2)
    return made


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Context]:
    """The contexts of all calls of attention."""
    found: list[Context] = []
    before = Session.sparse

    def sparse(self, record, q, k, v, ctx, *rest, **named):
        found.append(ctx)
        return before(self, record, q, k, v, ctx, *rest, **named)

    monkeypatch.setattr(Session, "sparse", sparse)
    return found


def test_wan_hands_over_what_its_projections_read(seen: list[Context]) -> None:
    model, given, read = tiny_wan.transformer(), tiny_wan.inputs(2), []
    handles = [b.attn1.to_q.register_forward_pre_hook(lambda _, args: read.append(args[0])) for b in model.blocks]
    with hsa.patch(model, "vsa", gates=wan_gates(model), **SPARSE) as patch:
        run(model, **given)
        assert [r.sparse_calls for r in patch.report().layers] == [1, 1]
    for handle in handles:
        handle.remove()
    assert [ctx.layer for ctx in seen] == [0, 1]
    for ctx, hidden in zip(seen, read, strict=True):
        assert ctx.inputs is not None and ctx.inputs.hidden is hidden and ctx.inputs.q is None


def test_nothing_is_held_for_a_method_that_reads_nothing(seen: list[Context]) -> None:
    model = tiny_wan.transformer()
    with hsa.patch(model, "vsa", **SPARSE):
        run(model, **tiny_wan.inputs())
    assert len(seen) == 2 and all(ctx.inputs is None for ctx in seen)


def test_zero_gates_on_a_model_are_no_gates_and_removal_is_exact() -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs(2, (5, 10, 14))
    dense, before = run(model, **given), tiny_wan.state(model)
    with hsa.patch(model, "vsa", **SPARSE):
        plain = run(model, **given)
    with hsa.patch(model, "vsa", gates=wan_gates(model, zero=True), **SPARSE):
        assert torch.equal(run(model, **given), plain)
    with hsa.patch(model, "vsa", gates=wan_gates(model), **SPARSE):
        gated = run(model, **given)
    tiny_wan.assert_same(before, tiny_wan.state(model))
    assert torch.equal(run(model, **given), dense)
    assert not torch.allclose(gated, plain, atol=1e-3)


def test_gates_from_a_folder_give_what_live_ones_give(tmp_path: Path) -> None:
    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    gates = wan_gates(model)
    gates.save(tmp_path)
    with hsa.patch(model, "vsa", gates=gates, **SPARSE):
        want = run(model, **given)
    with hsa.patch(model, "vsa", gates=str(tmp_path), **SPARSE):
        assert torch.equal(run(model, **given), want)
    other = tiny_wan.transformer(num_layers=3)
    with pytest.raises(ValueError, match="`model` must be the one that the gates were trained for; layers: 2 here, 3"):
        hsa.patch(other, "vsa", gates=str(tmp_path), **SPARSE)
    assert not any(hasattr(m, "_hf_sparse_attn_patch") for m in other.modules())


def test_a_batch_of_guidance_branches_is_its_rows() -> None:
    model, gated = tiny_wan.transformer(), {**SPARSE}
    gated["gates"] = wan_gates(model)
    rows = [tiny_wan.inputs(latents=(3, 10, 14), seed=s) for s in (1, 2)]
    batch = {k: torch.cat([r[k] for r in rows]) for k in rows[0]}
    with hsa.patch(model, "vsa", **gated):
        apart, together = torch.cat([run(model, **r) for r in rows]), run(model, **batch)
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_gradients_reach_gates_and_base_model(checkpointing: bool) -> None:
    """Against the same model with the reference in place of its attention."""
    model, given = tiny_wan.transformer(), tiny_wan.inputs(1, (5, 6, 10))
    gates = wan_gates(model)
    weights = [*gates.parameters(), model.blocks[0].attn1.to_v.weight, model.blocks[1].attn1.to_q.weight]
    if checkpointing:
        model.enable_gradient_checkpointing()
        model.train()
    with hsa.patch(model, "vsa", gates=gates, **{**SPARSE, "density": 0.4}):
        out = run(model, grad=True, **given)
        got = torch.autograd.grad(out.square().mean(), weights)
    CASES["wan"] = ((5, 3, 5), (4, 4, 4), (0, 0), 0.4)
    try:
        want = torch.autograd.grad(_by_reference(model.eval(), gates, given).square().mean(), weights)
    finally:
        del CASES["wan"]
    for a, b in zip(got, want, strict=True):
        assert bool(b.any())
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def _by_reference(model, gates: GateSet, given: dict) -> torch.Tensor:
    from diffusers.models.transformers import transformer_wan

    original, hidden, layer = transformer_wan.dispatch_attention_fn, [], []
    handles = [
        b.attn1.register_forward_pre_hook(lambda _, args, n=n: (hidden.append(args[0]), layer.append(n)) and None)
        for n, b in enumerate(model.blocks)
    ]

    def attend(query, key, value, **rest):
        if query.shape[1] != key.shape[1]:
            return original(query, key, value, **rest)
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        gate = gates.layers[layer[-1]](hidden[-1])
        return reference("wan", q, k, v, gate, q.shape[3] ** -0.5)[1].transpose(1, 2)

    transformer_wan.dispatch_attention_fn = attend
    model.disable_gradient_checkpointing()
    try:
        return run(model, grad=True, **given)
    finally:
        transformer_wan.dispatch_attention_fn = original
        for handle in handles:
            handle.remove()


def test_projections_wrapped_by_lora_change_nothing(seen: list[Context]) -> None:
    pytest.importorskip("peft")
    from peft import LoraConfig

    model, given = tiny_wan.transformer(), tiny_wan.inputs()
    gates = wan_gates(model)
    with hsa.patch(model, "vsa", gates=gates, **SPARSE):
        want = run(model, **given)
    # A new adapter adds nothing yet.
    model.add_adapter(LoraConfig(r=4, target_modules=["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]))
    with hsa.patch(model, "vsa", gates=gates, **SPARSE):
        torch.testing.assert_close(run(model, **given), want)
    assert len(seen) == 4 and all(ctx.inputs is not None and ctx.inputs.hidden.shape[2] == 24 for ctx in seen)


def test_a_compiled_model_is_right_or_refuses() -> None:
    model, given = tiny_wan.transformer(num_layers=1), tiny_wan.inputs(latents=(3, 6, 10))
    with hsa.patch(model, "vsa", gates=wan_gates(model), **SPARSE):
        want = run(model, **given)
        compiled = torch.compile(model, backend="eager")
        assert torch.equal(run(compiled, **given), want)
        # Its operator has no way to give a gradient to the gates.
        with pytest.raises(RuntimeError, match="`gates` must not require gradients in a compiled model"):
            run(compiled, grad=True, **given)
    torch._dynamo.reset()


def test_families_that_hand_over_no_hidden_states_are_refused() -> None:
    from hf_sparse_attn.registry import FAMILIES

    model = FAMILIES.get("hunyuan_video").tiny()[0]
    with pytest.raises(MethodDoesNotApply, match=r"'vsa' reads the hidden states of a layer, .*hunyuan_video"):
        hsa.patch(model, "vsa", gates=GateSet("vsa", model))
    with hsa.patch(model, "vsa", min_tokens=0):
        pass


def test_gates_are_those_of_one_expert() -> None:
    pipe = tiny_wan.pipeline("experts")
    gates = wan_gates(pipe.transformer)
    with pytest.raises(ValueError, match="`model` must be the one transformer that the gates were trained for, got 2"):
        hsa.patch(pipe, "vsa", gates=gates)
    with hsa.patch(pipe.transformer, "vsa", gates=gates), hsa.patch(pipe.transformer_2, "vsa", gates=wan_gates(pipe)):
        pass


def test_presets_of_wan_work() -> None:
    model = tiny_wan.transformer()
    densities = []
    for quality in ("high", "balanced", "fast"):
        with hsa.patch(model, "vsa", quality=quality) as patch:
            densities.append(patch.method.density)
    assert densities == sorted(densities, reverse=True)
