"""MiniMax M3, DeepSeek-V4, GLM 5.3 and Qwen 4 give under the patch what transformers' own attention gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import hf_sparse_attn as hsa
from hf_sparse_attn import listed_attention
from hf_sparse_attn.hosts import natively_sparse_csa, natively_sparse_msa, natively_sparse_pools
from hf_sparse_attn.session import DenseFallback
from tests.support import tiny_pools as tiny
from tests.support.natively_sparse import CLOSE, WAYS, generated_alike, gradients, run

each = pytest.mark.parametrize("name", tiny.NAMES)
# The others select by slots and positions that part where padding comes first; of Qwen 4 the eager attention of older
# versions gives no number then.
OLD = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23)
LEFT = [name for name in ("glm5_next", *([] if OLD else ["qwen4_exp"])) if name in tiny.NAMES]
NO_LEFT = {
    "minimax_m3_vl": "left padding, at which the model's own blocks and positions part",
    "deepseek_v4": "left padding, which the model's own entries hold as if it were text",
}
DENSE = "layer reads all keys by design"


def given(side: str | None = None, tokens: int = 45, batch: int = 2) -> dict[str, Tensor]:
    """Ids of a batch, its last row padded by 13 tokens on one side."""
    ids = tiny.ids(tokens, batch)
    mask = torch.ones_like(ids)
    if side is not None:
        mask[-1, slice(None, 13) if side == "left" else slice(-13, None)] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def sides(name: str) -> list[str | None]:
    return [None, "right", *(["left"] if name in LEFT else [])]


def reasons(patch: Any) -> list[str]:
    """Reasons for dense calls of layers that have a selection."""
    found = (reason for layer in patch.report().layers for reason in layer.reasons if reason != DENSE)
    return list(dict.fromkeys(found))


# What a query of a text reads at most, by the sizes of the tiny models, and of how many keys.
def expected(name: str, tokens: int) -> tuple[float, float]:
    """Keys that queries without padding read and see, in the last layer that chooses some."""
    at = torch.arange(tokens)
    if name == "minimax_m3_vl":
        # Two blocks besides the own, which is begun.
        return float(((at // 4).clamp(max=2) * 4 + at % 4 + 1).sum()), float((at + 1).sum())
    if name == "deepseek_v4":
        near, closed = (at + 1).clamp(max=7), (at + 1) // 4
        return float((near + closed.clamp(max=3)).sum()), float((near + closed).sum())
    whole = (at + 1) // 4
    return float((whole.clamp(max=3) * 4 + (at + 1) % 4).sum()), float((at + 1).sum())


@each
def test_prefill(name: str) -> None:
    model = tiny.build(name)
    for side in sides(name):
        inputs = given(side)
        wanted, valid = run(model, **inputs), inputs["attention_mask"].bool()
        with hsa.patch(model, "native", strict=name != "minimax_m3_vl") as patch:
            got = run(model, **inputs)
            layers = patch.report().layers
        torch.testing.assert_close(got[valid], wanted[valid], **CLOSE)
        assert all(
            (layer.sparse_calls, layer.dense_calls) == (1, 0) or layer.reasons == {DENSE: 1} for layer in layers
        )
        if side is None:
            read, seen = expected(name, 45)
            chosen = layers[1 if name == "deepseek_v4" else 0]
            assert chosen.density == pytest.approx(read / seen)


@each
def test_the_selection_matters(name: str) -> None:
    """The same model with room for all keys says something else: what is compared here can differ."""
    room: dict[str, dict[str, Any]] = {
        "minimax_m3_vl": {"index_topk_blocks": 12}, "deepseek_v4": {"index_topk": 12},
        "glm5_next": {"index_topk": 48}, "qwen4_exp": {"indexer_budget": 48},
    }  # fmt: skip
    few, all_keys = (run(tiny.build(name, **sizes), **given()) for sizes in ({}, room[name]))
    assert float((few - all_keys).abs().max()) > 0.3


KINDS = ["dynamic", "static"]


@each
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_single_tokens_over_a_cache(name: str, kind: str) -> None:
    """In pieces as in one go, and the patch may come and go between them."""
    if (name, kind) == ("deepseek_v4", "static"):
        # transformers has no such cache for it.
        with pytest.raises(KeyError):
            StaticCache(config=tiny.text(tiny.build(name)).config, max_cache_len=64)
        return
    model = tiny.build(name)
    for side in sides(name):
        ids, mask = given(side).values()
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        wanted, valid = run(model, input_ids=ids, attention_mask=mask, position_ids=positions), mask.bool()
        config = tiny.text(model).config
        cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)
        outputs, start = [], 0
        for i, size in enumerate((17, 1, 1, 21, 1, 4)):
            part = slice(start, start + size)
            piece: dict[str, Any] = {"input_ids": ids[:, part], "attention_mask": mask[:, : part.stop]}
            piece |= {"position_ids": positions[:, part], "past_key_values": cache}
            if i == 4:
                outputs.append(run(model, **piece))
            else:
                with hsa.patch(model, "native") as patch:
                    outputs.append(run(model, **piece))
                    assert reasons(patch) == []
            start += size
        torch.testing.assert_close(torch.cat(outputs, 1)[valid], wanted[valid], **CLOSE)


@each
def test_padding_between_tokens(name: str) -> None:
    """Keys of padding that stand before a query are not read."""
    model, inputs = tiny.build(name), given()
    inputs["attention_mask"][1, 20:26] = 0
    wanted, valid = run(model, **inputs), inputs["attention_mask"].bool()
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **inputs)[valid], wanted[valid], **CLOSE)
        assert reasons(patch) == []


@each
@pytest.mark.parametrize("way", WAYS)
def test_generate(name: str, way: str) -> None:
    if (name, way) == ("deepseek_v4", "static"):
        return
    model, inputs = tiny.build(name), given("left" if name in LEFT else None, 25)
    patch = generated_alike(model, inputs, way)
    assert patch.report().decode_density is not None and reasons(patch) == []


@each
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_gradients_are_those_of_transformers(name: str, checkpointing: bool) -> None:
    model, inputs = tiny.build(name).train(), given("right", 29)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    wanted = gradients(model, inputs)
    with hsa.patch(model, "native") as patch:
        got = gradients(model, inputs)
        assert reasons(patch) == []
    assert got.keys() == wanted.keys()
    assert not any("indexer" in n for n in got)
    for key, value in wanted.items():
        scale = float(value.abs().max()) + 1e-6
        torch.testing.assert_close(got[key] / scale, value / scale, rtol=1e-3, atol=2e-4, msg=key)


@pytest.mark.parametrize("name", [n for n in NO_LEFT if n in tiny.NAMES])
@pytest.mark.parametrize("cache", [True, False])
def test_left_padding_that_the_model_does_not_allow_for_is_declined(name: str, cache: bool) -> None:
    model, inputs = tiny.build(name), given("left")
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    for more in ({}, {"position_ids": positions}):
        wanted = run(model, **inputs, **more, use_cache=cache)
        with hsa.patch(model, "native") as patch:
            torch.testing.assert_close(run(model, **inputs, **more, use_cache=cache), wanted, **CLOSE)
            assert reasons(patch) == [NO_LEFT[name]]
    with hsa.patch(model, "native", strict=True), pytest.raises(DenseFallback, match=NO_LEFT[name]):
        run(model, **inputs)
    # A row of the batch is enough, and one step of decoding.
    with hsa.patch(model, "native") as patch:
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
        assert all(layer.sparse_calls == 0 for layer in patch.report().layers)


@pytest.mark.skipif("minimax_m3_vl" not in tiny.NAMES, reason="this transformers has no MiniMax M3")
@pytest.mark.parametrize("lists", [1, 4])
def test_lists_that_are_not_as_many_as_heads_of_keys(lists: int) -> None:
    model, inputs = tiny.build("minimax_m3_vl", index_n_heads=lists), given("right")
    wanted, valid = run(model, **inputs), inputs["attention_mask"].bool()
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **inputs)[valid], wanted[valid], **CLOSE)
        assert reasons(patch) == []


@pytest.mark.skipif("minimax_m3_vl" not in tiny.NAMES, reason="this transformers has no MiniMax M3")
def test_a_model_without_layers_that_select_is_declined() -> None:
    model = tiny.build("minimax_m3_vl", layer_types=["full_attention"] * 3)
    with pytest.raises(TypeError, match="no layer of it selects keys, by `layer_types` of its config"):
        hsa.patch(model, "native")


@pytest.mark.skipif("minimax_m3_vl" not in tiny.NAMES, reason="this transformers has no MiniMax M3")
def test_positions_that_part_from_the_slots_are_declined() -> None:
    """Blocks are those of slots, and a query counts by its position."""
    model, inputs = tiny.build("minimax_m3_vl"), given()
    positions = torch.arange(45)[None].expand(2, -1) - 0
    with hsa.patch(model, "native", strict=False) as patch:
        run(model, **inputs, position_ids=positions)
        assert reasons(patch) == []
        run(model, **inputs, position_ids=(positions - 5).clamp(min=0))
        assert reasons(patch) == ["positions that are not those of the keys"]


def full_mask(window: int | None) -> Tensor:
    shown = torch.ones(2, 1, 45, 45).tril().bool()
    if window is not None:
        shown = shown.triu(1 - window)
    return torch.zeros(shown.shape).masked_fill(~shown, torch.finfo(torch.float32).min)


@each
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_calls_that_run_as_transformers_has_them(name: str, implementation: str) -> None:
    if (name, implementation) == ("deepseek_v4", "sdpa"):
        return
    model, inputs = tiny.build(name, implementation), given("right")
    wanted, valid = run(model, **inputs), inputs["attention_mask"].bool()
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **inputs)[valid], wanted[valid], **CLOSE)
        with patch.paused():
            assert torch.equal(run(model, **inputs), wanted)
    with hsa.patch(model, "native", min_tokens=46) as patch:
        # Of padding, too, whose tokens read no key at all.
        torch.testing.assert_close(run(model, **inputs), wanted, **CLOSE)
        assert reasons(patch) == ["fewer than 46 keys (min_tokens=46)"]
    if implementation == "eager":
        with hsa.patch(model, "native") as patch, torch.no_grad():
            assert model(**inputs, output_attentions=True).attentions[0] is not None
            assert reasons(patch) == ["output_attentions=True"]


OWN_MASKS = {
    "minimax_m3_vl": "mask that is not the plain causal one",
    "deepseek_v4": "mask given as a tensor",
    "qwen4_exp": "mask that is not the plain causal one",
}
PACKED = {**OWN_MASKS, "deepseek_v4": "mask that is not the plain window"}
masked = pytest.mark.parametrize("name", [n for n in OWN_MASKS if n in tiny.NAMES])


@masked
def test_masks_of_the_user_run_as_transformers_has_them(name: str) -> None:
    model, ids = tiny.build(name), tiny.ids(45, 2)
    mask = full_mask(7 if name == "deepseek_v4" else None)
    # The window hides more than causal order does: nothing else may be lost of it.
    mask[:, :, 30:, 26] = torch.finfo(torch.float32).min
    inputs = {"input_ids": ids, "attention_mask": mask}
    wanted = run(model, **inputs)
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **inputs), wanted, **CLOSE)
        assert reasons(patch) == [OWN_MASKS[name]]


@masked
def test_packed_sequences_run_as_transformers_has_them(name: str) -> None:
    model, ids = tiny.build(name), tiny.ids(45)
    inputs = {"input_ids": ids, "position_ids": torch.cat([torch.arange(20), torch.arange(25)])[None]}
    wanted = run(model, **inputs, use_cache=False)
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **inputs, use_cache=False), wanted, **CLOSE)
        assert reasons(patch) == [PACKED[name]]


@each
def test_half_precision(name: str) -> None:
    """As near to float32 as transformers' own attention in half precision is."""
    inputs = given()
    exact = run(tiny.build(name), **inputs)
    model = tiny.build(name).to(torch.bfloat16)
    own = run(model, **inputs).float()
    with hsa.patch(model, "native") as patch:
        mine = run(model, **inputs)
        assert mine.dtype == torch.bfloat16 and reasons(patch) == []
    # Of most tokens: another key, or another expert, may be the last that is chosen.
    far, own_far = ((x - exact).abs().amax(-1).quantile(0.5) for x in (mine.float(), own))
    assert float(far) <= 1.3 * float(own_far)


def own_attributes(model: Any) -> list[set[str]]:
    return [set(m.__dict__) for m in model.modules()]


@each
def test_nothing_is_left(name: str) -> None:
    model, inputs = tiny.build(name), given()
    before, wanted = own_attributes(model), run(model, **inputs)
    config = tiny.text(model).config._attn_implementation
    patch = hsa.patch(model)
    assert patch.method.name == "native" and own_attributes(model) != before
    copied = copy.deepcopy(model)
    handle = text_mlp(model).register_forward_hook(fails)
    with pytest.raises(RuntimeError, match="no more"):
        run(model, **inputs)
    handle.remove()
    torch.testing.assert_close(run(model, **inputs), wanted, **CLOSE)
    patch.remove()
    for one in (model, copied):
        assert tiny.text(one).config._attn_implementation == config
        assert torch.equal(run(one, **inputs), wanted)
    assert own_attributes(model) == before
    assert not any("forward" in m.__dict__ for m in copied.modules())


def text_mlp(model: Any) -> Any:
    return tiny.text(model).layers[-1].mlp


def fails(*_: Any) -> None:
    raise RuntimeError("no more")


@each
def test_other_methods_are_refused(name: str) -> None:
    model = tiny.build(name)
    with pytest.raises(hsa.MethodDoesNotApply, match="must be 'native'"):
        hsa.patch(model, "vertical_slash")
    assert tiny.text(model).config._attn_implementation == "eager"


def other(hidden_states: Tensor, mask: Tensor) -> None:
    raise AssertionError


SEAMS: dict[str, list[tuple[Callable[[Any], Any], str]]] = {
    "minimax_m3_vl": [(lambda m: m.indexer, "forward"), (lambda m: m.indexer, "build_block_mask")],
    "deepseek_v4": [(lambda m: m.compressor, "forward"), (lambda m: m.compressor.indexer, "forward")],
    "glm5_next": [
        (lambda m: m.indexer, "forward"), (lambda m: m, "expand_kv"),
        (lambda m: m, "build_attention_mask_from_topk"), (lambda m: m.indexer, "get_pooled_states"),
    ],
    "qwen4_exp": [(lambda m: m.indexer, "forward")],
}  # fmt: skip


@pytest.mark.parametrize(("name", "seam"), [(n, i) for n in tiny.NAMES for i in range(len(SEAMS[n]))])
def test_seams_that_are_not_as_known_are_declined(name: str, seam: int) -> None:
    model = tiny.build(name)
    find, method = SEAMS[name][seam]
    module = tiny.selecting(model)[1 if name == "deepseek_v4" else 0]
    setattr(find(module), method, other)
    before = own_attributes(model)
    with pytest.raises(TypeError, match=rf"{method} takes \(hidden_states, mask\) where \(.* is known"):
        hsa.patch(model, "native")
    assert own_attributes(model) == before


class Widest(TorchDispatchMode):
    """Notes the tensor of the most elements that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(one, Tensor):
                # A view has no elements of its own.
                self.most = max(self.most, one.untyped_storage().nbytes() // one.element_size())
        return out


@each
def test_nothing_is_made_for_all_pairs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With strips that hold little, no tensor has as many elements as a sixth of the pairs of tokens."""
    for place, what, size in (
        (listed_attention, "_STRIP", 1 << 18), (natively_sparse_pools, "_SCORES", 1 << 18),
        (natively_sparse_msa, "_SLOTS", 1 << 14), (natively_sparse_csa, "_SLOTS", 1 << 14),
    ):  # fmt: skip
        monkeypatch.setattr(place, what, size)
    # Without what is not the patch's: dense layers and those of linear attention.
    sizes: dict[str, dict[str, Any]] = {
        "minimax_m3_vl": {"layer_types": ["minimax_m3_sparse"] * 3},
        "deepseek_v4": {"compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 128}},
        "glm5_next": {"layer_types": ["full_attention"] * 4},
        "qwen4_exp": {"layer_types": ["full_attention"] * 3},
    }
    model, tokens = tiny.build(name, **sizes[name]), 2048
    inputs = {"input_ids": tiny.ids(tokens), "logits_to_keep": 1, "use_cache": False}
    with hsa.patch(model, "native", strict=True), Widest() as widest:
        run(model, **inputs)
    assert widest.most < tokens**2 / 6
