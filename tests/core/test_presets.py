"""quality="high" | "balanced" | "fast": what the word sets, and what it leaves to the caller."""

from __future__ import annotations

import pytest
import torch

import hf_sparse_attn as hsa
from hf_sparse_attn.presets import BUDGETS, QUALITIES, Preset, find_preset, presets_of
from hf_sparse_attn.registry import FAMILIES, make_method
from tests.support import tiny_hunyuan, tiny_wan
from tests.support.tiny_lm import FAMILIES as MODELS

ALL = [(name, p) for name, family in FAMILIES.items() for p in presets_of(name, family)]


@pytest.mark.parametrize(
    "name, preset", ALL, ids=lambda x: x if isinstance(x, str) else f"{x.method}-{x.quality}-{x.size}"
)
def test_values_are_ones_that_the_method_takes(name: str, preset: Preset) -> None:
    method = make_method(preset.method, dict(preset.params))
    # "causal" text methods among those of a video family would be presets that nobody can use.
    assert method.needs <= FAMILIES.get(name).provides
    assert preset.source


@pytest.mark.parametrize("name", sorted({name for name, _ in ALL}))
def test_every_method_with_presets_has_all_words(name: str) -> None:
    mine = [p for family, p in ALL if family == name]
    for method in {p.method for p in mine}:
        assert {p.quality for p in mine if p.method == method and p.size == "all"} == set(QUALITIES)


def test_a_word_sets_parameters_dense_layers_and_steps() -> None:
    with hsa.patch(tiny_wan.transformer(), "radial", quality="balanced") as patch:
        assert patch.method.params()["decay"] == 0.2 and patch.method.params()["block_size"] == 128
        assert (patch.session.policy.dense_layers, patch.session.policy.dense_steps) == (1, 12 / 50)


def test_what_is_given_goes_before() -> None:
    given = dict(decay=0.7, dense_layers=0, dense_steps=0.5)
    with hsa.patch(tiny_wan.transformer(), "radial", quality="balanced", **given) as patch:
        assert patch.method.params()["decay"] == 0.7
        assert (patch.session.policy.dense_layers, patch.session.policy.dense_steps) == (0, 0.5)


def test_two_experts_have_their_own() -> None:
    pipe = tiny_wan.pipeline("experts")
    with hsa.patch(pipe, "radial", quality="balanced") as patch:
        assert (patch.method.params()["decay"], patch.session.policy.dense_steps) == (0.8, 11 / 40)


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("model", [tiny_wan.transformer, tiny_hunyuan.transformer], ids=["wan", "hunyuan_video"])
def test_blocks_of_a_video(model, quality: str) -> None:
    with hsa.patch(model(), "block_topk", quality=quality) as patch:
        assert patch.method.params()["density"] == {"high": 0.5, "balanced": 0.25, "fast": 0.125}[quality]
        assert 0.1 <= patch.session.policy.dense_steps <= 0.4


@pytest.mark.parametrize("quality", QUALITIES)
def test_text(quality: str) -> None:
    with hsa.patch(MODELS["llama"](), "vertical_slash", quality=quality) as patch:
        params = patch.method.params()
        # Shares of the keys, for any length.
        assert 0 < params["slash"] < params["vertical"] < 1


@pytest.mark.parametrize(
    "method, quality, error, message",
    [
        ("radial", "best", ValueError, "`quality` must be one of high, balanced, fast; got 'best'"),
        (
            "sliding_window",
            "fast",
            ValueError,
            "method 'sliding_window' in family wan, which has presets for: block_topk, radial",
        ),
        ("no_such", "fast", ValueError, "`method` must be one of "),
        (hsa.get_method("radial")(), "fast", TypeError, "`method` must then be a name, got Radial"),
    ],
)
def test_bad_words_are_named_and_nothing_is_patched(method, quality, error, message) -> None:
    model = tiny_wan.transformer()
    with pytest.raises(error, match=message):
        hsa.patch(model, method, quality=quality)
    hsa.patch(model, "dense").remove()


def test_a_preset_of_an_unknown_quality_cannot_be_made() -> None:
    with pytest.raises(ValueError, match="`quality` must be one of high, balanced, fast; got 'best'"):
        Preset("radial", "best", "nowhere")


def test_presets_that_a_family_brings_go_before_the_table() -> None:
    own = Preset("radial", "fast", "a paper", {"decay": 0.9}, size="three of them", modules=3)
    family = type("Own", (), {"presets": (own,)})
    assert find_preset("own", family, [torch.nn.Identity()] * 3, "radial", "fast") is own
    with pytest.raises(ValueError, match="in family own, which has presets for: radial"):
        find_preset("own", family, [torch.nn.Identity()], "radial", "fast")
    assert presets_of("wan", family) == (own, *presets_of("wan", FAMILIES.get("wan")))


@pytest.mark.parametrize("quality", QUALITIES)
@pytest.mark.parametrize("method", ["sliding_window", "block_topk"])
def test_a_word_keeps_the_same_share_of_a_text_of_any_length(method: str, quality: str) -> None:
    preset = find_preset("llama", FAMILIES.get("llama"), [], method, quality)
    made = make_method(method, dict(preset.params))
    for tokens in (1000, 2000, 8000):
        ctx = hsa.Context(hsa.TokenLayout.causal(tokens), num_heads=1, num_kv_heads=1, head_dim=8)
        q = torch.randn(1, 1, tokens, 8, generator=torch.Generator().manual_seed(tokens))
        found = made.pattern_for(q, q, ctx)
        assert isinstance(found, hsa.BlockPattern)
        assert found.density("causal") == pytest.approx(BUDGETS[quality], rel=0.2)


def test_presets_of_text_are_shares() -> None:
    # A number of tokens is a number at 2,000 and at 128,000 tokens; sinks are the first few wherever a text ends.
    for name, preset in ALL:
        if "causal" in FAMILIES.get(name).provides:
            amounts = {k: v for k, v in preset.params.items() if k not in ("block_size", "stride", "sink")}
            assert amounts and all(isinstance(v, float) and 0 < v < 1 for v in amounts.values()), preset
