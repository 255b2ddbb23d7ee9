"""Models that select their own keys give what transformers' own dense attention under their selection gives."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, StaticCache

import hf_sparse_attn as hsa
from hf_sparse_attn.session import DenseFallback
from tests.support import tiny_natively_sparse as tiny
from tests.support.natively_sparse import CLOSE, WAYS, generated_alike, gradients, run

each = pytest.mark.parametrize("name", tiny.NAMES)
# One whose layers share selections, keys or both, and one with sinks.
some = pytest.mark.parametrize("name", [n for n in ("deepseek_v32", "mistral_large4", "hy_v4") if n in tiny.NAMES])


def padded(tokens: int = 45, batch: int = 3) -> dict[str, Tensor]:
    """Ids with left padding, of another length in every row."""
    ids = tiny.ids(tokens, batch)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, : 6 * row + 1] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text(model: Any) -> Any:
    return getattr(model.model, "language_model", model.model)


def attention(model: Any) -> list[Any]:
    return [layer.self_attn for layer in text(model).layers]


@each
def test_prefill_of_a_padded_batch(name: str) -> None:
    model, given = tiny.build(name), padded()
    wanted, valid = run(model, **given), given["attention_mask"].bool()
    with hsa.patch(model, "native", strict=not any(m.indexer is None for m in attention(model))) as patch:
        got = run(model, **given)
        report = patch.report()
    torch.testing.assert_close(got[valid], wanted[valid], **CLOSE)
    # Every key from the first real one on is seen, and 12 of them at most are read.
    seen = valid.cumsum(1)[valid]
    density = float(seen.clamp(max=12).sum() / seen.sum())
    for layer, module in zip(report.layers, attention(model), strict=True):
        if getattr(module, "sliding_window", None) is None:
            assert (layer.sparse_calls, layer.dense_calls) == (1, 0)
            assert layer.density == pytest.approx(density)
        else:
            assert layer.reasons == {"layer's own sliding window of 9": 1}


@each
def test_the_selection_matters(name: str) -> None:
    """The same model with room for all keys says something else: what is compared here can differ."""
    given = {"input_ids": tiny.ids(45)}
    few, all_keys = run(tiny.build(name), **given), run(tiny.build(name, index_topk=45), **given)
    assert float((few - all_keys).abs().max()) > 0.1


def caches(kind: str, model: Any) -> Any:
    config = text(model).config
    return DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=64)


@each
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_chunks_and_single_tokens_over_a_cache(name: str, kind: str) -> None:
    """In pieces as in one go, with an index key written once for every token."""
    model, given = tiny.build(name), padded(41, 2)
    ids, mask = given.values()
    whole = run(model, **given)
    own, cache = caches(kind, model), caches(kind, model)
    run(model, **given, past_key_values=own)
    outputs, start = [], 0
    with hsa.patch(model, "native") as patch:
        for size in (17, 1, 20, 1, 2):
            stop = start + size
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            outputs.append(run(model, **piece, past_key_values=cache))
            start = stop
        ran = patch.report().layers[0].backends
    # One token reads latents, where the cache holds them.
    assert ("latents by list" in ran) is (cache.layers[0].keys.shape[1] == 1)
    valid = mask.bool()
    # Positions of padded rows count the padding here.
    torch.testing.assert_close(torch.cat(outputs, 1)[valid], whole[valid], **CLOSE)
    for mine, theirs in zip(cache.layers, own.layers, strict=True):
        keys = getattr(theirs, "indexer_keys", None)
        if keys is not None:
            slots = valid_slots(keys, valid)
            torch.testing.assert_close(mine.indexer_keys[slots], keys[slots], **CLOSE)


@each
def test_a_cache_is_the_models_own(name: str) -> None:
    """One that was filled without the patch goes on under it, and the other way round."""
    model, ids = tiny.build(name), tiny.ids(30)
    whole, cache = run(model, input_ids=ids), caches("dynamic", model)
    run(model, input_ids=ids[:, :20], past_key_values=cache)
    with hsa.patch(model, "native"):
        under = run(model, input_ids=ids[:, 20:25], past_key_values=cache)
    after = run(model, input_ids=ids[:, 25:], past_key_values=cache)
    torch.testing.assert_close(torch.cat([under, after], 1), whole[:, 20:], **CLOSE)


def valid_slots(keys: Tensor, valid: Tensor) -> Tensor:
    return nn.functional.pad(valid, (0, keys.shape[1] - valid.shape[1]))


@each
@pytest.mark.parametrize("way", WAYS)
def test_generate(name: str, way: str) -> None:
    model, given = tiny.build(name), padded(21, 2)
    assert generated_alike(model, given, way).report().decode_density is not None


@each
def test_gradients_are_those_of_transformers(name: str) -> None:
    """Of everything that has one there; the indexer has none."""
    model, given = tiny.build(name), padded(33, 2)
    wanted = gradients(model, given)
    with hsa.patch(model, "native"):
        got = gradients(model, given)
    assert got.keys() == wanted.keys()
    assert not any("indexer" in n for n in got)
    for key, value in wanted.items():
        scale = float(value.abs().max()) + 1e-6
        torch.testing.assert_close(got[key] / scale, value / scale, rtol=1e-3, atol=1e-4)


@some
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model, given = tiny.build(name), padded(33, 2)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    wanted = gradients(model, given)
    with hsa.patch(model, "native") as patch:
        got = gradients(model, given)
        assert all(layer.sparse_calls for layer in patch.report().layers)
    for key, value in wanted.items():
        torch.testing.assert_close(got[key], value, rtol=1e-3, atol=1e-3 * float(value.abs().max()))


def four_dimensional(bias: float) -> Callable[[], dict[str, Any]]:
    def made() -> dict[str, Any]:
        ids = tiny.ids(30, 2)
        shown = torch.ones(2, 1, 30, 30).tril().bool()
        # No more than the order: some keys are hidden from some queries.
        shown &= ~((torch.arange(30)[:, None] + torch.arange(30)) % 5 == 3)
        shown |= torch.eye(30, dtype=torch.bool)
        return {"input_ids": ids, "attention_mask": torch.zeros(2, 1, 30, 30).masked_fill(~shown, bias)}

    return made


def packed() -> dict[str, Any]:
    return {"input_ids": tiny.ids(30), "position_ids": torch.cat([torch.arange(13), torch.arange(17)])[None]}


MASKS = {
    "additive": four_dimensional(torch.finfo(torch.float32).min),
    "packed": packed,
}


@some
@pytest.mark.parametrize("kind", MASKS)
def test_masks_that_are_no_plain_order(name: str, kind: str) -> None:
    model, given = tiny.build(name), MASKS[kind]()
    wanted = run(model, **given, use_cache=False)
    with hsa.patch(model, "native", strict=True) as patch:
        torch.testing.assert_close(run(model, **given, use_cache=False), wanted, **CLOSE)
        assert all(layer.sparse_calls == 1 for layer in patch.report().layers)


def test_a_mask_that_weighs_keys_runs_as_transformers_has_it() -> None:
    model, given = tiny.build("deepseek_v32"), four_dimensional(-3.0)()
    wanted = run(model, **given)
    with hsa.patch(model, "native") as patch:
        torch.testing.assert_close(run(model, **given), wanted, **CLOSE)
        assert patch.report().layers[0].reasons == {"mask that weighs keys": 1}
    with hsa.patch(model, "native", strict=True), pytest.raises(DenseFallback, match="mask that weighs keys"):
        run(model, **given)


REASONS: dict[str, tuple[dict[str, Any], dict[str, Any], list[str]]] = {
    "dense_layers": ({"dense_layers": [1]}, {}, ["", "dense_layers", ""]),
    "min_tokens": ({"min_tokens": 100}, {}, ["fewer than 100 keys (min_tokens=100)"] * 3),
    "weights": ({}, {"output_attentions": True}, ["output_attentions=True"] * 3),
}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("case", REASONS)
def test_calls_that_run_as_transformers_has_them(case: str, implementation: str) -> None:
    """With masks of either kind, that are added and that say yes or no."""
    options, extra, reasons = REASONS[case]
    model, given = tiny.build("deepseek_v32", implementation), padded()
    wanted, valid = run(model, **given), given["attention_mask"].bool()
    with hsa.patch(model, "native", **options) as patch:
        torch.testing.assert_close(run(model, **given, **extra)[valid], wanted[valid], **CLOSE)
        assert ["; ".join(layer.reasons) for layer in patch.report().layers] == reasons


def test_dropout_runs_as_transformers_has_it() -> None:
    model, given = tiny.build("deepseek_v32", attention_dropout=0.3).train(), padded()
    torch.manual_seed(3)
    wanted = run(model, **given)
    with hsa.patch(model, "native") as patch:
        torch.manual_seed(3)
        assert torch.equal(run(model, **given), wanted)
        assert list(patch.report().layers[0].reasons) == ["dropout of 0.3 on the attention weights"]


def test_half_precision() -> None:
    """As near to float32 as transformers' own attention in half precision is, or nearer."""
    given = {"input_ids": tiny.ids(50, 2)}
    # Every key fits into the list: in half precision another one may be the last of it.
    sizes: dict[str, Any] = {"index_topk": 50, "num_hidden_layers": 3, "mlp_layer_types": ["dense"] * 3}
    exact = run(tiny.build("deepseek_v32", **sizes), **given)
    model = tiny.build("deepseek_v32", **sizes).to(torch.bfloat16)
    own = (run(model, **given).float() - exact).abs().mean()
    with hsa.patch(model, "native") as patch:
        mine = (run(model, **given).float() - exact).abs().mean()
        assert patch.report().density == 1
    assert float(mine) <= 1.2 * float(own)


def test_autocast() -> None:
    """Training under autocast: nearer to float32 than that of transformers, or about as near."""
    sizes: dict[str, Any] = {"index_topk": 50, "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    model, given = tiny.build("deepseek_v32", "sdpa", **sizes), padded(33, 2)
    exact = gradients(model, given)

    def off(found: dict[str, Tensor]) -> float:
        return sum(float((found[n] - g).abs().mean() / g.abs().mean()) for n, g in exact.items()) / len(exact)

    with torch.autocast("cpu", torch.bfloat16):
        own = off(gradients(model, given))
        with hsa.patch(model, "native"):
            assert off(gradients(model, given)) <= 1.2 * own


class Adapted(nn.Module):
    """A low-rank adapter around a linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.more = nn.Linear(base.in_features, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 0.3 * self.more(x)


@pytest.mark.parametrize("how", ["adapter", "hook"])
def test_an_expansion_that_is_more_than_its_weight_is_called(how: str) -> None:
    model, given = tiny.build("deepseek_v32"), padded()
    seen: list[int] = []
    torch.manual_seed(0)
    for module in attention(model):
        if how == "adapter":
            module.kv_b_proj = Adapted(module.kv_b_proj)
        else:
            module.kv_b_proj.register_forward_hook(lambda m, a, out: seen.append(out.shape[1]) or out * 1.5)
    wanted, valid = run(model, **given), given["attention_mask"].bool()
    cache = DynamicCache(config=model.config)
    with hsa.patch(model, "native") as patch:
        seen.clear()
        torch.testing.assert_close(run(model, **given, past_key_values=cache)[valid], wanted[valid], **CLOSE)
        assert list(patch.report().layers[0].backends) == ["keys by list"]
        one = {"input_ids": given["input_ids"][:, :1], "attention_mask": torch.ones(3, 46)}
        seen.clear()
        got = run(model, **one, past_key_values=copy.deepcopy(cache))
    if how == "hook" and cache.layers[0].keys.shape[1] == 1:
        # In decoding, of the keys that are read and of no others: 12 for each of three rows.
        assert max(seen) <= 36
    torch.testing.assert_close(got, run(model, **one, past_key_values=cache), **CLOSE)


def own_attributes(model: Any) -> list[set[str]]:
    return [set(m.__dict__) for m in model.modules()]


@each
def test_nothing_is_left(name: str) -> None:
    model, given = tiny.build(name), padded()
    before, wanted, config = own_attributes(model), run(model, **given), text(model).config._attn_implementation
    patch = hsa.patch(model, "native")
    assert own_attributes(model) != before
    with patch.paused():
        assert torch.equal(run(model, **given), wanted)
    assert patch.report().density == 1
    with pytest.raises(ValueError, match="patched already"):
        hsa.patch(model, "native")
    copied = copy.deepcopy(model)
    hsa.unpatch(model)
    assert patch.removed
    for one in (model, copied):
        assert text(one).config._attn_implementation == config
        assert torch.equal(run(one, **given), wanted)
    assert own_attributes(model) == before
    assert not any("forward" in m.__dict__ or "expand_kv" in m.__dict__ for m in copied.modules())


def test_an_error_while_patching_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.build("deepseek_v32")
    before = own_attributes(model)

    def fails(*_: Any) -> None:
        raise RuntimeError("no more")

    monkeypatch.setattr("hf_sparse_attn.hosts.natively_sparse_install.watch_changes", fails)
    with pytest.raises(RuntimeError, match="no more"):
        hsa.patch(model, "native")
    assert own_attributes(model) == before and model.config._attn_implementation == "eager"


def test_other_methods_are_refused() -> None:
    model = tiny.build("deepseek_v32")
    for method in ("vertical_slash", "sliding_window", "dense", "radial"):
        with pytest.raises(hsa.MethodDoesNotApply, match=f"must be 'native' for DeepseekV32.*got '{method}'"):
            hsa.patch(model, method)
    with pytest.raises(ValueError, match='`backend` must be "auto"'):
        hsa.patch(model, "native", backend="torch_gather")
    assert model.config._attn_implementation == "eager"
    with hsa.patch(model) as patch:
        assert patch.method.name == "native"


@pytest.mark.parametrize("method", ["sliding_window", "native"])
def test_a_native_name_is_refused(method: str) -> None:
    """It would lose the selection, and has no seams."""
    model = tiny.build("deepseek_v32", f"hsa:{method}")
    with pytest.raises(hsa.MethodDoesNotApply, match=r'selects its keys by itself: use .*patch\(model, "native"\)'):
        run(model, input_ids=tiny.ids(20))


def test_a_plain_model_has_no_selection() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=20, intermediate_size=16
    )
    with pytest.raises(hsa.MethodDoesNotApply, match="'native' needs a model that selects its keys by itself"):
        hsa.patch(transformers.LlamaForCausalLM(config), "native")


class OtherIndexer(nn.Module):
    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        raise AssertionError


def without(module: Any) -> None:
    del module.indexer


def none(module: Any) -> None:
    module.indexer = None


def other(module: Any) -> None:
    module.indexer = OtherIndexer()


def expands(module: Any) -> None:
    module.expand_kv = lambda latents: latents


UNKNOWN = [
    (without, "layer 1 .* has no `indexer`"),
    (none, "layer 1 .* has no `indexer`, and is no layer that takes over another's selection"),
    (other, r"OtherIndexer.forward takes \(hidden_states, mask\) where \(hidden_states, q_resid, .* is known"),
    (expands, r"expand_kv takes \(latents\) where \(kv_nope, k_rot\) is known"),
]


@pytest.mark.parametrize(("change", "says"), UNKNOWN, ids=lambda x: getattr(x, "__name__", ""))
def test_what_is_not_known_is_declined(change: Callable[[Any], None], says: str) -> None:
    model = tiny.build("deepseek_v32")
    change(attention(model)[1])
    before = own_attributes(model)
    with pytest.raises(TypeError, match=says):
        hsa.patch(model, "native")
    assert own_attributes(model) == before


def test_two_forwards_at_once_and_a_removal_within_one() -> None:
    """What began under the patch ends under it, and puts back then."""
    model, given = tiny.build("glm_moe_dsa"), padded()
    wanted, valid = run(model, **given), given["attention_mask"].bool()
    before = own_attributes(model)
    patch = hsa.patch(model, "native")
    handle = attention(model)[1].register_forward_hook(lambda *_: patch.remove())
    got = run(model, **given)
    handle.remove()
    torch.testing.assert_close(got[valid], wanted[valid], **CLOSE)
    assert all(layer.sparse_calls == 1 for layer in patch.report().layers)
    assert own_attributes(model) == before


@pytest.mark.skipif("dots3_note" not in tiny.NAMES, reason="not in this transformers")
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
def test_a_window_beside_selections(kind: str) -> None:
    """Longer than the window: in strips, equal to transformers, with gradients, and over a cache of the window."""
    model, given = tiny.build("dots3_note"), padded(150, 2)
    ids, mask = given.values()
    valid = mask.bool()
    made: list[Tensor] = []
    if kind == "none":
        wanted, slopes = run(model, **given), gradients(model, given)
        with hsa.patch(model, "native", strict=True) as patch, Makes(made):
            torch.testing.assert_close(run(model, **given)[valid], wanted[valid], **CLOSE)
        assert patch.report().layers[2].reasons == {"layer's own sliding window of 9": 1}
        # No layer made a mask of all pairs.
        assert not any(t.shape[-2:] == (150, 150) for t in made)
        with hsa.patch(model, "native"):
            for name, mine in gradients(model, given).items():
                scale = float(slopes[name].abs().max()) + 1e-6
                torch.testing.assert_close(mine / scale, slopes[name] / scale, rtol=1e-3, atol=1e-4)
        return
    wanted, cache = run(model, **given), caches(kind, model) if kind == "dynamic" else None
    cache = cache or StaticCache(config=model.config, max_cache_len=160)
    outputs = []
    with hsa.patch(model, "native"):
        for start, stop in ((0, 100), (100, 101), (101, 150)):
            piece = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            outputs.append(run(model, **piece, past_key_values=cache))
    torch.testing.assert_close(torch.cat(outputs, 1)[valid], wanted[valid], **CLOSE)


class Makes(TorchDispatchMode):
    """Keeps the tensors that are made."""

    def __init__(self, into: list[Tensor]) -> None:
        super().__init__()
        self.into = into

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.into += [t for t in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(t, Tensor)]
        return out


@pytest.mark.slow
def test_a_compiled_graph_runs_as_transformers_has_it() -> None:
    """Whole, and said so."""
    model, given = tiny.build("deepseek_v32", "sdpa", num_hidden_layers=1), padded()
    wanted, valid = run(model, **given), given["attention_mask"].bool()
    with hsa.patch(model, "native") as patch:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(compiled, **given, use_cache=False)[valid], wanted[valid], **CLOSE)
        assert "not read under torch.compile" in next(iter(patch.report().layers[0].reasons))
